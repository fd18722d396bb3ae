//! Steps that are known only by what others put out: those that make artifacts of it, and those whose root or kernel it is.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_artifact::tree::{Kind, Meta, Node, Tree, TreePath};
use kiln_digest::Digest;
use kiln_virtio::fs::{Open, open_beneath};

use super::check::Checker;
use super::lower::{self, Found};
use super::runner::Runner;
use super::{BuildError, Lowered};
use crate::apart::{self, Kept};
use crate::cache::Key;
use crate::engine::error::RunError;
use crate::engine::host::KernelChoice;
use crate::engine::make::{Bench, MakeError, Materials, Source};
use crate::plan::graph::{Command, Kernel, Output, Root};
use crate::plan::make::{Make, Origin};
use crate::plan::{PlannedStep, RootSpec, StepId};
use crate::root::{self, bundle, directory, image};

/// Names of kernels among outputs, and where their modules may lie.
const KERNELS: &str = "vmlinuz-";
const MODULES: [&str; 3] = ["modules", "lib/modules", "usr/lib/modules"];
/// Which of several kernels is the one for machines.
const VERSION_OF_MACHINES: &str = "boot/version-virt";

/// What a step of this build can make things of.
struct Ingredients<'b, 'a, R> {
    checker: &'b Checker<'a, R>,
    step: &'b str,
}

/// What a step takes from outside WORK, as it was when its key was made: what is made of it is what its key says, whatever
/// becomes of the files meanwhile.
#[derive(Debug, Default)]
pub(super) struct Taken {
    /// Files and folders of SRCDIR, by path.
    sources: BTreeMap<String, Option<Source>>,
    /// kiln's own programs.
    programs: BTreeMap<String, (Digest, u64)>,
}

impl<R: Runner> Checker<'_, R> {
    /// When files are dated.
    pub fn epoch(&self) -> i64 {
        crate::plan::DEFAULT_SOURCE_DATE_EPOCH.try_into().unwrap_or_default()
    }

    /// Does `work` where things are made, for `step`.
    pub fn at_bench<T>(
        &self,
        step: &PlannedStep,
        needs: &[(StepId, Digest)],
        work: impl FnOnce(&Bench<'_>) -> Result<T, MakeError>,
    ) -> Result<T, BuildError> {
        let view = self.view(step, needs)?;
        let materials = Ingredients { checker: self, step: &step.name };
        let bench = Bench {
            store: self.build.store,
            materials: &materials,
            view: &view,
            epoch: self.epoch(),
            leaks: self.leaks(),
        };
        work(&bench).map_err(|error| match error.may_be_of_contents() {
            true => self.lost_of(needs).or_else(|| self.lost_elsewhere(step, &bench)).unwrap_or(error.into()),
            false => error.into(),
        })
    }

    /// The first of what `step` takes from SRCDIR and roots that the store does not have as it was. All of that is taken away
    /// there, so that the next build takes it in anew.
    fn lost_elsewhere(&self, step: &PlannedStep, bench: &Bench<'_>) -> Option<BuildError> {
        let mut trees: Vec<(String, Tree)> = self.taken(&step.name, |taken| {
            let folders = taken.sources.iter().filter_map(|(path, source)| match source {
                Some(Source::Folder(tree)) => Some((format!("`{path}` in SRCDIR"), tree.clone())),
                Some(Source::File(..)) | None => None,
            });
            folders.collect()
        });
        if let Command::Make(makes) = &step.command {
            for from in makes.iter().flat_map(Make::parts) {
                if let Origin::Root { spec, .. } = &from.origin
                    && let Ok(tree) = bench.materials.root(spec)
                {
                    trees.push((format!("root {spec}"), Tree::clone(&tree)));
                }
            }
        }
        let blobs = self.build.store.blobs();
        let mut lost = None;
        for (place, tree) in trees {
            for (path, node) in tree.iter() {
                let Kind::File { digest, .. } = &node.kind else { continue };
                if !blobs.is_sound(digest) {
                    blobs.discard_damaged(digest);
                    let (place, path, digest) = (place.clone(), path.to_string(), *digest);
                    lost.get_or_insert(BuildError::LostOf { place, path, digest });
                }
            }
        }
        lost
    }

    /// The key of a step that makes `makes`.
    pub fn key_of_makes(
        &self,
        step: &PlannedStep,
        makes: &[Make],
        needs: &[(StepId, Digest)],
    ) -> Result<Key, BuildError> {
        let mut key = Key::default();
        for (name, value) in self.at_bench(step, needs, |bench| bench.ingredients(makes))? {
            key.add(name, value);
        }
        Ok(key)
    }

    /// The file `path` of SRCDIR as `step` has it, in the store; none where there is none.
    pub fn source_file(&self, step: &PlannedStep, path: &str) -> Result<Option<Digest>, BuildError> {
        Ok(match (Ingredients { checker: self, step: &step.name }).source(path)? {
            Some(Source::File(digest, ..)) => Some(digest),
            Some(Source::Folder(_)) | None => None,
        })
    }

    /// The key of `id`, which follows from what the steps that it needs put out.
    pub fn late_key(&self, id: StepId, needs: &[(StepId, Digest)]) -> Result<Key, BuildError> {
        let step = self.build.plan.step(id);
        match &step.command {
            Command::Make(makes) => self.key_of_makes(step, makes, needs),
            Command::Sign => Ok(Key::default()),
            Command::Boot(boot) => self.key_of_boot(step, boot, needs),
            Command::Text(_) | Command::Script(_) => Ok(self.late(step, needs)?.key),
        }
    }

    /// `step`, whose root or kernel a step puts out.
    pub fn late(&self, step: &PlannedStep, needs: &[(StepId, Digest)]) -> Result<Lowered, BuildError> {
        let build = self.build;
        let mut found = Found::default();
        if let Root::Step(output) = &step.root {
            found.root = Some(self.root_of(step, output, needs)?);
        }
        if let Some(Kernel::Step(output)) = &step.kernel {
            found.kernel = Some(self.kernel_of(step, output, needs)?);
        }
        let lowered = lower::lower(step, build.settings, &build.folder, build.options.overwrite, &found);
        let mut host = build.runner.identify(&lowered, &mut |_| {}).map_err(|error| {
            // What cannot be read, and what is no root or kernel, may be so because it is damaged.
            self.lost_of(needs).unwrap_or(error.into())
        })?;
        for (name, value) in &mut host {
            // Where the store keeps it is no part of what it is.
            if let (Root::Step(output), "root") = (&step.root, name.as_str()) {
                *value = format!("step:{} {}", output.shown, value.rsplit(' ').next().unwrap_or_default());
            }
        }
        let key = lower::key(step, &lowered, build.settings, &build.plan.ignore, &build.sources, host);
        let key = key.map_err(|source| BuildError::Environment { step: step.name.clone(), source })?;
        Ok(Lowered { step: lowered, key })
    }

    /// What the step that `output` names has put out.
    fn outputs(&self, output: &Output, needs: &[(StepId, Digest)]) -> Result<Arc<Tree>, BuildError> {
        let manifest = needs.iter().find(|(id, _)| *id == output.step).map(|(_, manifest)| *manifest);
        let name = self.build.plan.step(output.step).name.clone();
        let lost = |digest| BuildError::Lost {
            step: name.clone(),
            path: "the manifest of its outputs".to_owned(),
            digest,
        };
        let manifest = manifest.ok_or_else(|| lost(Digest::of(b"")))?;
        self.tree(&manifest).ok_or_else(|| lost(manifest))
    }

    fn root_of(
        &self,
        step: &PlannedStep,
        output: &Output,
        needs: &[(StepId, Digest)],
    ) -> Result<RootSpec, BuildError> {
        let tree = self.outputs(output, needs)?;
        let none = |what: &'static str| BuildError::NotPutOut {
            step: step.name.clone(),
            what,
            output: output.shown.clone(),
        };
        let at = TreePath::new(output.path.as_bytes()).map_err(|_| none("root"))?;
        match tree.shown(&at).map(|node| &node.kind) {
            Some(Kind::File { digest, .. }) => {
                let path = self.build.store.blobs().path(digest);
                match root::digest_of_file(self.build.store, &path).is_ok_and(|found| found == *digest) {
                    true => Ok(RootSpec::File(path)),
                    false => {
                        let (step, path) = (self.build.plan.step(output.step).name.clone(), at.to_string());
                        Err(BuildError::Lost { step, path, digest: *digest })
                    }
                }
            }
            Some(Kind::Directory) => {
                // The folder's own mode and times are not the root's.
                let mut root = tree.below(&at);
                root.insert(
                    TreePath::root(),
                    Node { kind: Kind::Directory, meta: Meta { mode: 0o755, ..Meta::default() } },
                );
                let made = image::make(self.build.store, &root);
                let digest = made.map_err(crate::root::RootError::from).map_err(RunError::of_root)?;
                Ok(RootSpec::File(image::path(self.build.store, &digest)))
            }
            _ => Err(none("root")),
        }
    }

    fn kernel_of(
        &self,
        step: &PlannedStep,
        output: &Output,
        needs: &[(StepId, Digest)],
    ) -> Result<KernelChoice, BuildError> {
        let tree = self.outputs(output, needs)?;
        let none = || BuildError::NotPutOut {
            step: step.name.clone(),
            what: "kernel",
            output: output.shown.clone(),
        };
        let name_of = |path: &TreePath| String::from_utf8_lossy(path.name()).into_owned();
        let of_machines = || {
            let path = TreePath::new(VERSION_OF_MACHINES.as_bytes()).ok()?;
            let Kind::File { digest, .. } = &tree.shown(&path)?.kind else { return None };
            String::from_utf8(self.build.store.blobs().read(digest).ok()?).ok()
        };
        let mut kernels: Vec<&TreePath> = tree
            .iter()
            .filter(|(path, node)| {
                matches!(node.kind, Kind::File { .. }) && name_of(path).starts_with(KERNELS)
            })
            .map(|(path, _)| path)
            .collect();
        if !output.path.is_empty() {
            kernels =
                tree.iter().map(|(path, _)| path).filter(|path| path.to_string() == output.path).collect();
        } else if kernels.len() > 1
            && let Some(version) = of_machines()
        {
            kernels.retain(|path| name_of(path) == format!("{KERNELS}{}", version.trim()));
        }
        let [path] = kernels[..] else { return Err(none()) };
        let Some(Kind::File { digest, .. }) = tree.shown(path).map(|node| &node.kind) else {
            return Err(none());
        };
        let name = name_of(path);
        let release = name.strip_prefix(KERNELS).unwrap_or_default();
        let modules = MODULES.iter().find_map(|folder| {
            let path = TreePath::new(format!("{folder}/{release}").as_bytes()).ok()?;
            tree.get(&path).map(|_| path)
        });
        let modules = match modules.filter(|_| !release.is_empty()) {
            None => None,
            Some(folder) => {
                let mut kept = Tree::clone(&tree);
                kept.retain(|path, _| path.is_within(&folder) || folder.is_within(path));
                let put = self.build.store.blobs().put(&kept.manifest()[..]);
                let path = self.build.settings.store.value.clone();
                let (manifest, _) =
                    put.map_err(|source| BuildError::Io { what: "write to", path, source })?;
                Some(manifest)
            }
        };
        Ok(KernelChoice::Blob { kernel: *digest, modules })
    }
}

impl<R: Runner> Ingredients<'_, '_, R> {
    /// The file or folder at `path` of SRCDIR, as it is now.
    fn look(&self, path: &str) -> Result<Option<Source>, MakeError> {
        let (Some(top), hidden) = (self.checker.source(), &self.checker.hidden) else {
            return Err(MakeError::NoSource(path.to_owned()));
        };
        if hidden.hides_within(path.as_bytes()) {
            return Ok(None);
        }
        let store = self.checker.build.store;
        let place = |file: std::os::fd::BorrowedFd<'_>| {
            let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
            std::fs::read_link(link).unwrap_or_else(|_| PathBuf::from(path))
        };
        let secrets = &self.checker.build.settings.secrets.value;
        let refuse_secrets = |path: &Path| apart::refuse("source", path, Kept::Secrets, secrets);
        if let Ok(folder) = open_beneath(top, path.as_bytes(), Open::Directory) {
            let folder = place(folder.as_fd());
            // Before anything is read: what is left out below has its content in the store.
            refuse_secrets(&folder)?;
            let mut tree = directory::import(store, &folder)?;
            // The folder itself is shown, so only what is below it is asked about.
            tree.retain(|below, _| {
                let full = if path.is_empty() { Vec::new() } else { format!("{path}/").into_bytes() };
                below.is_root() || !hidden.hides_within(&[full.as_slice(), below.as_bytes()].concat())
            });
            for (_, node) in tree.iter_mut() {
                // As a share shows it: whose a source is, and when it was written, is no part of it.
                (node.meta.uid, node.meta.gid) = (0, 0);
                node.meta.mtime.seconds = self.checker.epoch();
                node.meta.mtime.nanoseconds = 0;
                node.meta.xattrs.clear();
            }
            return Ok(Some(Source::Folder(tree)));
        }
        let Ok(file) = open_beneath(top, path.as_bytes(), Open::Regular) else { return Ok(None) };
        refuse_secrets(&place(file.as_fd()))?;
        let file = std::fs::File::from(file);
        let meta = file.metadata().map_err(MakeError::io("read a file of SRCDIR"))?;
        let mode = u16::try_from(std::os::unix::fs::MetadataExt::mode(&meta) & 0o777).unwrap_or(0o644);
        let (digest, size) = store.blobs().put(file).map_err(MakeError::io("read a file of SRCDIR"))?;
        Ok(Some(Source::File(digest, size, mode)))
    }
}

impl<R: Runner> Materials for Ingredients<'_, '_, R> {
    fn source(&self, path: &str) -> Result<Option<Source>, MakeError> {
        if let Some(source) = self.checker.taken(self.step, |taken| taken.sources.get(path).cloned()) {
            return Ok(source);
        }
        let source = self.look(path)?;
        self.checker.taken(self.step, |taken| taken.sources.insert(path.to_owned(), source.clone()));
        Ok(source)
    }

    fn root(&self, spec: &RootSpec) -> Result<Arc<Tree>, MakeError> {
        let spec = lower::located(spec, &self.checker.build.folder);
        let tree = self.checker.build.runner.files(&spec, &mut |_| {});
        tree.map_err(|error| MakeError::Root(Box::new(error)))
    }

    fn program(&self, name: &str) -> Result<(Digest, u64), MakeError> {
        if let Some(program) = self.checker.taken(self.step, |taken| taken.programs.get(name).copied()) {
            return Ok(program);
        }
        let build = self.checker.build;
        let agent = bundle::find_agent(build.settings.agent.value.as_deref());
        let path = agent.map(|agent| agent.parent().unwrap_or(Path::new("/")).join(name));
        let path = path.filter(|path| path.is_file()).ok_or_else(|| MakeError::Program(name.to_owned()))?;
        let file = std::fs::File::open(path).map_err(MakeError::io("read a program of kiln's"))?;
        let program = build.store.blobs().put(file).map_err(MakeError::io("keep a program of kiln's"))?;
        self.checker.taken(self.step, |taken| taken.programs.insert(name.to_owned(), program));
        Ok(program)
    }
}
