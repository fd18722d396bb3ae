//! What is in a store: units, each of which goes or stays as a whole, and the blobs that they name.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use kiln_artifact::tree::{Kind as NodeKind, Tree};
use kiln_digest::Digest;
use serde::Serialize;

use super::UpkeepError;
use crate::cache::index::step_of;
use crate::cache::stock::{Content, Stored, files, key_of, left_behind, stock};
use crate::cache::{LOCKED, ledger};
use crate::root::bundle::Bundle;
use crate::root::image::{Filesystem, SUMS};
use crate::store::{Store, taken_bytes};

/// What kind of thing takes up room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Contents that steps put out, and their manifests.
    Outputs,
    /// What steps printed.
    Logs,
    /// Packages that roots were made of.
    Packages,
    /// Kernels and initramfs of boot bundles.
    Kernels,
    /// Other blobs: sources, contents of roots, and what nothing names any more.
    Blobs,
    /// Images of roots, modules and toolboxes.
    Images,
    /// Frozen machines.
    Templates,
    /// Traces of what steps read.
    Traces,
    /// Notes of what steps did last and where outputs were put, and records.
    Records,
    /// Files that are not finished, of processes that live.
    Unfinished,
}

/// What a unit is, for whoever removes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// A trace, by its name in its pack.
    Trace(String),
    /// What a step did last, or where its outputs were put, by its name in its pack.
    Note(String),
    /// An image with the records that name it.
    Image(Digest, Filesystem),
    /// A frozen machine.
    Template,
    /// A record that names blobs.
    Record,
    /// A record that only age takes: what it says can be had again, or is of a WORK that may come back.
    Aged,
}

/// Something that goes or stays as a whole.
#[derive(Debug, Clone)]
pub struct Unit {
    /// What it is.
    pub what: What,
    /// What it is called by people.
    pub name: String,
    /// Its file or folder.
    pub path: PathBuf,
    /// What it takes up on the disk.
    pub size_bytes: u64,
    /// When it was used last.
    pub used: SystemTime,
    /// The blobs that it names, each as what.
    pub names: BTreeMap<Digest, (Kind, String)>,
}

/// A blob.
#[derive(Debug, Clone)]
pub struct Blob {
    /// What it takes up on the disk.
    pub size_bytes: u64,
    /// When it was used last.
    pub used: SystemTime,
    /// How many units name it.
    pub named: usize,
    /// As what.
    pub kind: Kind,
}

/// All of it.
#[derive(Debug, Default)]
pub struct Census {
    /// The units.
    pub units: Vec<Unit>,
    /// The blobs.
    pub blobs: BTreeMap<Digest, Blob>,
    /// What else takes up room: records that name no blob, and unfinished files.
    pub others: BTreeMap<Kind, u64>,
    /// Steps by the key that they had last.
    pub steps: BTreeMap<Digest, String>,
}

fn io(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> UpkeepError {
    UpkeepError::at(what, path)
}

/// What a file takes up, and when it was used last; nothing where it is gone meanwhile.
pub(super) fn measure(path: &Path) -> Option<(u64, SystemTime)> {
    let meta = fs::symlink_metadata(path).ok()?;
    Some((meta.blocks() * 512, meta.modified().ok()?))
}

fn size_beneath(folder: &Path) -> Result<u64, UpkeepError> {
    let files = files(folder).map_err(io("list", folder))?;
    Ok(files.iter().filter_map(|path| measure(path)).map(|(size_bytes, _)| size_bytes).sum())
}

/// Whether nothing is at `path` any more, rather than that nobody may look.
fn is_gone(path: &Path) -> bool {
    fs::symlink_metadata(path).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
}

/// The digest that the last two parts of a blob's path are.
pub(super) fn blob_digest(path: &Path) -> Option<Digest> {
    let rest = path.file_name()?.to_str()?;
    let start = path.parent()?.file_name()?.to_str()?;
    (start.len() == 2).then(|| format!("{start}{rest}").parse().ok()).flatten()
}

/// The digest and the file system that an image's name says.
pub(super) fn image_name(path: &Path) -> Option<(Digest, Filesystem)> {
    let (digest, filesystem) = path.file_name()?.to_str()?.split_once('.')?;
    let filesystem = match filesystem {
        "erofs" => Filesystem::Erofs,
        "squashfs" => Filesystem::Squashfs,
        _ => return None,
    };
    Some((digest.parse().ok()?, filesystem))
}

impl Census {
    /// Takes it. Nothing is dated.
    ///
    /// # Errors
    /// What listing the store's folders says.
    pub fn take(store: &Store) -> Result<Self, UpkeepError> {
        let mut census = Self::default();
        // First: what gets its name meanwhile counts twice then, and not never.
        census.add_unfinished(&store.path().join("tmp"))?;
        let folder = store.path().join("blobs");
        for path in files(&folder).map_err(io("list", &folder))? {
            if let (Some(digest), Some((size_bytes, used))) = (blob_digest(&path), measure(&path)) {
                census.blobs.insert(digest, Blob { size_bytes, used, named: 0, kind: Kind::Blobs });
            }
        }
        census.add_stock(store)?;
        census.add_images(store)?;
        census.add_templates(store)?;
        census.add_records(store)?;
        for (digest, (kind, _)) in census.units.iter().flat_map(|unit| &unit.names) {
            if let Some(blob) = census.blobs.get_mut(digest) {
                blob.named += 1;
                blob.kind = blob.kind.min(*kind);
            }
        }
        Ok(census)
    }

    fn add_stock(&mut self, store: &Store) -> Result<(), UpkeepError> {
        let stock = stock(store).map_err(io("list the traces of", store.path()))?;
        for line in stock.iter().flat_map(|stored| &stored.lines) {
            if let Content::Note(run) = &line.content {
                self.steps.insert(run.key.digest(), run.step.clone());
            }
        }
        let mut manifests = BTreeMap::new();
        for Stored { path, name: pack, lines, .. } in &stock {
            let Some((size_bytes, _)) = measure(path) else { continue };
            let kind = if pack.starts_with("traces/") { Kind::Traces } else { Kind::Records };
            let lines_bytes: u64 = lines.iter().map(|line| line.size_bytes).sum();
            *self.others.entry(kind).or_default() += size_bytes.saturating_sub(lines_bytes);
            for line in lines {
                let mut names = BTreeMap::new();
                let log = |log: Digest| (log, (Kind::Logs, "what it printed".to_owned()));
                let (what, name) = match &line.content {
                    Content::Trace(trace) => {
                        let Some((scope, key)) = key_of(pack, &line.name) else { continue };
                        let step = self.steps.get(&key);
                        let step = step.map_or_else(|| format!("of key {key}"), |s| format!("`{s}`"));
                        outputs(store, &trace.outputs, &mut manifests, &mut names);
                        names.extend(trace.log.map(log));
                        (What::Trace(line.name.clone()), format!("a trace of step {step} in scope `{scope}`"))
                    }
                    Content::Note(run) => {
                        names.extend(run.log.map(log));
                        (What::Note(line.name.clone()), format!("the last run of step `{}`", run.step))
                    }
                    Content::Placed(_) => {
                        let step = step_of(&line.name);
                        let name = format!("where the outputs of step `{step}` were put");
                        (What::Note(line.name.clone()), name)
                    }
                };
                let (path, size_bytes, used) = (path.clone(), line.size_bytes, line.when);
                self.units.push(Unit { what, name, path, size_bytes, used, names });
            }
        }
        for path in left_behind(store).map_err(io("list the traces of", store.path()))? {
            let size_bytes = match path.is_dir() {
                true => size_beneath(&path)?,
                false => measure(&path).map_or(0, |(size_bytes, _)| size_bytes),
            };
            *self.others.entry(Kind::Traces).or_default() += size_bytes;
        }
        Ok(())
    }

    /// What processes are writing, and have taken room for.
    fn add_unfinished(&mut self, area: &Path) -> Result<(), UpkeepError> {
        let mut size_bytes = 0;
        for entry in fs::read_dir(area).map_err(io("list", area))?.flatten() {
            let folder = entry.path();
            size_bytes += taken_bytes(&folder, size_beneath(&folder)?);
        }
        self.others.insert(Kind::Unfinished, size_bytes);
        Ok(())
    }

    fn add_images(&mut self, store: &Store) -> Result<(), UpkeepError> {
        let folder = store.images();
        for path in files(&folder).map_err(io("list", &folder))? {
            let (Some((digest, filesystem)), Some((size_bytes, used))) = (image_name(&path), measure(&path))
            else {
                continue;
            };
            let root = crate::root::catalog::peek(store, &digest);
            let mut names = BTreeMap::new();
            if let Some(manifest) = store.records("manifest").peek::<Digest>(&digest) {
                names.insert(manifest, (Kind::Blobs, "its manifest".to_owned()));
            }
            let (mut name, mut used) = (format!("image {digest}"), used);
            if let Some(root) = root {
                used = store.records("roots").touched(&digest).map_or(used, |noted| used.max(noted));
                name = format!("root {}", root.origins.first().map_or("", String::as_str));
                for package in root.provenance.packages {
                    let what = format!("package {} {}", package.name, package.version);
                    names.insert(package.sha256, (Kind::Packages, what));
                }
            }
            self.units.push(Unit {
                what: What::Image(digest, filesystem),
                name,
                path,
                size_bytes,
                used,
                names,
            });
        }
        Ok(())
    }

    fn add_templates(&mut self, store: &Store) -> Result<(), UpkeepError> {
        for path in folders(&store.templates())? {
            let Some((_, used)) = measure(&path.join("about.json")) else { continue };
            let size_bytes = size_beneath(&path)?;
            let name = format!("template {}", path.file_name().unwrap_or_default().to_string_lossy());
            let names = BTreeMap::new();
            self.units.push(Unit { what: What::Template, name, path, size_bytes, used, names });
        }
        Ok(())
    }

    fn add_records(&mut self, store: &Store) -> Result<(), UpkeepError> {
        let records = store.path().join("records");
        // What is noted of one WORK goes together.
        let mut gone: BTreeMap<PathBuf, Vec<(PathBuf, u64, SystemTime)>> = BTreeMap::new();
        for path in files(&records).map_err(io("list", &records))? {
            let Some((size_bytes, used)) = measure(&path) else { continue };
            let family = path.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
            let key = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok());
            let mut names = BTreeMap::new();
            let name = match (&*family, key) {
                ("bundle", Some(key)) => {
                    let bundle = store.records("bundle").peek::<Bundle>(&key);
                    if let Some(bundle) = &bundle {
                        names.insert(bundle.kernel, (Kind::Kernels, "the kernel".to_owned()));
                        names.insert(bundle.initramfs, (Kind::Kernels, "the initramfs".to_owned()));
                    }
                    bundle.map_or_else(String::new, |bundle| format!("boot bundle {}", bundle.release))
                }
                ("archive", Some(key)) => {
                    if let Some(manifest) = store.records("archive").peek::<Digest>(&key) {
                        let mut tree = BTreeMap::new();
                        outputs(store, &manifest, &mut BTreeMap::new(), &mut tree);
                        let blob = |(digest, (_, what))| (digest, (Kind::Blobs, what));
                        names.extend(tree.into_iter().map(blob));
                    }
                    "an archive that was read".to_owned()
                }
                (LOCKED, Some(_)) => "what a lock says".to_owned(),
                (ledger::FAMILY, Some(key)) => match ledger::work_of(store, &key) {
                    Some(work) if is_gone(&work) => {
                        gone.entry(work).or_default().push((path, size_bytes, used));
                        continue;
                    }
                    Some(_) => String::new(),
                    None => "what an earlier kiln put into a WORK".to_owned(),
                },
                _ => String::new(),
            };
            // What a WORK that is there holds of kiln's is told by nothing else, and the others are small.
            if name.is_empty() || &*family == SUMS {
                *self.others.entry(Kind::Records).or_default() += size_bytes;
            } else {
                let is_aged = [LOCKED, ledger::FAMILY].contains(&&*family);
                let what = if is_aged { What::Aged } else { What::Record };
                self.units.push(Unit { what, name, path, size_bytes, used, names });
            }
        }
        for (work, records) in gone {
            let last = records.iter().map(|(.., used)| *used).max();
            for (path, size_bytes, used) in records {
                let name = format!("what was put into {}, which is gone", work.display());
                let used = last.unwrap_or(used);
                let unit = Unit { what: What::Aged, name, path, size_bytes, used, names: BTreeMap::new() };
                self.units.push(unit);
            }
        }
        Ok(())
    }

    /// What each kind takes up, in bytes on the disk.
    pub fn usage(&self) -> BTreeMap<Kind, u64> {
        let mut usage = self.others.clone();
        for blob in self.blobs.values() {
            *usage.entry(blob.kind).or_default() += blob.size_bytes;
        }
        for unit in &self.units {
            let kind = match unit.what {
                What::Trace(_) => Kind::Traces,
                What::Note(_) | What::Record | What::Aged => Kind::Records,
                What::Image(..) => Kind::Images,
                What::Template => Kind::Templates,
            };
            *usage.entry(kind).or_default() += unit.size_bytes;
        }
        usage
    }

    /// What everything takes up together.
    pub fn total(&self) -> u64 {
        self.usage().values().sum()
    }

    /// What keeps the blobs and images whose digests begin with `digits`: each of these with what names it, and as what.
    pub fn why(&self, digits: &str) -> BTreeMap<Digest, Vec<(String, String)>> {
        let digits = digits.trim_start_matches("sha256:").to_ascii_lowercase();
        let mut found: BTreeMap<Digest, Vec<_>> = BTreeMap::new();
        for digest in self.blobs.keys().filter(|digest| digest.to_string().starts_with(&digits)) {
            found.entry(*digest).or_default();
        }
        for unit in &self.units {
            if let What::Image(digest, _) = unit.what
                && digest.to_string().starts_with(&digits)
            {
                found.entry(digest).or_default().push((unit.name.clone(), "its image".to_owned()));
            }
            for (digest, (_, what)) in &unit.names {
                if let Some(keepers) = found.get_mut(digest) {
                    keepers.push((unit.name.clone(), what.clone()));
                }
            }
        }
        found
    }
}

/// The folders in `folder` whose names are digests.
pub(super) fn folders(folder: &Path) -> Result<Vec<PathBuf>, UpkeepError> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(io("list", folder))?,
    };
    let is_digest = |path: &PathBuf| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.parse::<Digest>().is_ok())
    };
    let mut found: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(is_digest).collect();
    found.sort();
    Ok(found)
}

/// Adds a manifest and the contents that it names to `names`.
fn outputs(
    store: &Store,
    manifest: &Digest,
    known: &mut BTreeMap<Digest, Vec<(Digest, String)>>,
    names: &mut BTreeMap<Digest, (Kind, String)>,
) {
    let contents = known.entry(*manifest).or_insert_with(|| {
        let bytes = fs::read(store.blobs().path(manifest)).unwrap_or_default();
        let tree = Tree::parse_manifest(&bytes).unwrap_or_default();
        let content = |(path, node): (&_, &kiln_artifact::tree::Node)| match node.kind {
            NodeKind::File { digest, .. } => Some((digest, format!("`{path}`"))),
            _ => None,
        };
        tree.iter().filter_map(content).collect()
    });
    names.insert(*manifest, (Kind::Outputs, "the manifest of its outputs".to_owned()));
    names.extend(contents.iter().map(|(digest, path)| (*digest, (Kind::Outputs, path.clone()))));
}
