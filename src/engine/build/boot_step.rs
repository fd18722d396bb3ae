//! Steps that boot what others put out, by the same code as `kiln boot`: the image is copied out of the store, changed where the
//! recipe says so, and booted; what is left of it is the step's output. Like other steps it is done again only when something
//! that goes into it has changed.

use std::fs;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use kiln_artifact::tree::{Kind, Meta, Tree, TreePath};
use kiln_digest::Digest;
use kiln_wire::{Outcome as Exit, Stream, Usage};

use super::check::Checker;
use super::host_step::{HERE, ran};
use super::runner::{Ran, Runner};
use super::tamper::{self, TamperError};
use super::worker::{Kept, Message, Passed, Told, Worker};
use super::{BuildError, lower, view};
use crate::boot::firmware::SecureBoot;
use crate::boot::trial::{Moment, Outcome, What};
use crate::boot::{self, BootError, DiskChoice, SshChoice, report};
use crate::cache::Key;
use crate::clock::now_nanos;
use crate::engine::event::Phase;
use crate::engine::host::Boundary;
use crate::engine::run::Ended;
use crate::machine::qemu::firmware::Bus;
use crate::plan::boot::{self as plan, Alteration, Boot, Expected, Trust};
use crate::plan::make::Pattern;
use crate::plan::script::{self, ScriptError, Statement};
use crate::plan::{PlannedStep, StepId};
use crate::sign::close_process;
use crate::writes::Folder;

/// Changes with how images are booted and judged.
const FORMAT: u32 = 2;
/// Memory of the machine, where the recipe does not say.
const MEMORY_BYTES: u64 = 1 << 30;
/// The private key for ssh below SECRETS.
const SSH_KEY: &str = "root.key";
/// What its key calls that.
const SSH_KEY_PART: &str = "the key for ssh";
/// Most of a file of statements.
const SCRIPT_BYTES_MAX: u64 = 1 << 20;

/// Why nothing was judged.
#[derive(Debug, thiserror::Error)]
pub enum BootStepError {
    /// The boot.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A file of statements.
    #[error(transparent)]
    Script(#[from] ScriptError),
    /// Nothing of this name, or several.
    #[error("{} `{path}` among what step `{step}` boots, of what other steps put out", if *.is_several { "there is more than one" } else { "there is no" })]
    Which {
        /// The step.
        step: String,
        /// The path, as it was written.
        path: String,
        /// Whether there are several.
        is_several: bool,
    },
    /// A link, a device or the like.
    #[error("`{path}`, of what step `{step}` boots, is neither a file nor a folder")]
    Unfit {
        /// The step.
        step: String,
        /// Within what is booted.
        path: String,
    },
    /// No keys among what steps put out.
    #[error("there are no keys in `{path}` for step `{step}`")]
    NoKeys {
        /// The step.
        step: String,
        /// The folder.
        path: String,
    },
    /// A file of SRCDIR.
    #[error("there is no file `{0}` in SRCDIR")]
    NoFile(String),
    /// A file that is not changed.
    #[error("cannot change `{file}`")]
    Change {
        /// The file.
        file: String,
        /// Why not.
        #[source]
        source: Box<TamperError>,
    },
}

impl BootStepError {
    /// Whether this host lacks something.
    #[must_use]
    pub fn is_the_hosts(&self) -> bool {
        matches!(self, Self::Boot(error) if error.is_the_hosts())
    }

    /// What the user can do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Boot(error) => error.hint(),
            Self::NoKeys { .. } => Some(
                "`kiln sign --init` makes keys in SECRETS, and a step with sign = true puts them into boot/efi/KEYS; name it in needs"
                    .to_owned(),
            ),
            _ => None,
        }
    }
}

impl From<BootStepError> for BuildError {
    fn from(error: BootStepError) -> Self {
        Self::Boot(Box::new(error))
    }
}

impl From<BootError> for BuildError {
    fn from(error: BootError) -> Self {
        BootStepError::from(error).into()
    }
}

/// What a boot is of: what there is in WORK, and what is expected.
struct Parts {
    image: TreePath,
    /// The folder with all in it; a file alone where the image is one.
    files: Tree,
    is_folder: bool,
    /// With the folder that they lie in.
    keys: Option<(TreePath, Tree)>,
    statements: Vec<Statement>,
    ssh_key: PathBuf,
}

impl Parts {
    /// What says that the key for ssh is another.
    fn ssh_key_now(&self) -> String {
        // It is part of the step's key, so this comes before anybody speaks with it.
        close_process();
        let read = fs::read(&self.ssh_key).map(|bytes| Digest::of(&bytes).to_string());
        read.unwrap_or_else(|_| "none".to_owned())
    }
}

impl<R: Runner> Checker<'_, R> {
    fn parts(
        &self,
        step: &PlannedStep,
        boot: &Boot,
        needs: &[(StepId, Digest)],
    ) -> Result<Parts, BuildError> {
        let view = self.view(step, needs)?;
        let image = one(step, &view, &boot.image)?;
        let is_folder = view.get(&image).is_some_and(|node| node.kind == Kind::Directory);
        let mut files = match (is_folder, view.shown(&image)) {
            (true, _) => view.below(&image),
            (false, Some(node)) => {
                let mut alone = Tree::new();
                alone.insert(image.clone(), node.clone());
                alone
            }
            (false, None) => Tree::new(),
        };
        plain(&step.name, &mut files)?;
        let keys = match &boot.trust {
            Trust::Off | Trust::Setup | Trust::Vendor => None,
            Trust::Keys(folder) | Trust::Enroll(folder) => {
                let none =
                    || BootStepError::NoKeys { step: step.name.clone(), path: folder.text().to_owned() };
                let at = one(step, &view, folder).map_err(|_| none())?;
                let mut keys = view.below(&at);
                plain(&step.name, &mut keys)?;
                Some((at, keys))
            }
        };
        let statements = match &boot.expected {
            Expected::Statements(statements) => statements.clone(),
            Expected::File(path) => {
                script::parse(path, &self.source_text(step, path)?).map_err(BootStepError::from)?
            }
        };
        let settings = self.build.settings;
        let ssh_key = match &boot.ssh_key {
            Some(path) => {
                settings.directory.join(settings.srcdir.value.clone().unwrap_or_default()).join(path)
            }
            None => settings.secrets.value.join(crate::sign::KEYS).join(SSH_KEY),
        };
        Ok(Parts { image, files, is_folder, keys, statements, ssh_key })
    }

    fn source_text(&self, step: &PlannedStep, path: &str) -> Result<String, BuildError> {
        let none = || BootStepError::NoFile(path.to_owned());
        let digest = self.source_file(step, path)?.ok_or_else(none)?;
        let file = self.build.store.blobs().file(&digest).map_err(|_| none())?;
        let mut text = String::new();
        std::io::Read::read_to_string(&mut std::io::Read::take(file, SCRIPT_BYTES_MAX), &mut text)
            .map_err(|source| BuildError::Io { what: "read", path: path.into(), source })?;
        Ok(text)
    }

    /// The key of a step that boots.
    pub fn key_of_boot(
        &self,
        step: &PlannedStep,
        boot: &Boot,
        needs: &[(StepId, Digest)],
    ) -> Result<Key, BuildError> {
        let parts = self.parts(step, boot, needs)?;
        let mut key = Key::default();
        key.add("how images are booted", FORMAT.to_string());
        key.add("the image", format!("{} {}", parts.image, parts.files.digest()));
        let Boot { bus, label, trust, tpm, changes, report, .. } = boot;
        key.add(
            "the machine",
            format!(
                "{bus:?} {label:?} {trust:?} tpm {tpm} {:?} {:?}",
                step.limits.memory_bytes, step.limits.cpus,
            ),
        );
        key.add("what is changed", format!("{changes:?}"));
        key.add("the report", format!("{report:?}"));
        let lines: Vec<&str> = parts.statements.iter().map(|statement| statement.text.as_str()).collect();
        key.add("what is expected", lines.join("\n"));
        if let Some((_, keys)) = &parts.keys {
            key.add("the keys", keys.digest().to_string());
        }
        if wants_ssh(&parts.statements) {
            // What the key is must not be in a file; that it is another must.
            key.add(SSH_KEY_PART, parts.ssh_key_now());
        }
        for (name, value) in self.build.runner.firmware(&boot.trust)? {
            key.add(name, value);
        }
        Ok(key)
    }

    /// Writes `files`, which lie in the folder `at` of what the steps `needs` put out.
    fn write_below(
        &self,
        at: &TreePath,
        files: &Tree,
        needs: &[(StepId, Digest)],
    ) -> Result<Folder, BuildError> {
        view::write(files, self.build.store, |path| {
            let whole = [at.as_bytes(), b"/", path.as_bytes()].concat();
            TreePath::new(&whole).map_or_else(|_| String::new(), |whole| self.owner(needs, &whole))
        })
    }

    /// The parts in files, changed as the recipe says.
    fn lay_out(
        &self,
        step: &PlannedStep,
        boot: &Boot,
        parts: &Parts,
        needs: &[(StepId, Digest)],
        scratch: &Path,
    ) -> Result<(Folder, PathBuf), BuildError> {
        let mut files = parts.files.clone();
        let name = TreePath::new(parts.image.name()).unwrap_or_else(|_| TreePath::root());
        if !parts.is_folder {
            // Its name alone: what is above it is not there.
            if let Some(node) = parts.files.get(&parts.image) {
                files = Tree::new();
                files.insert(name.clone(), node.clone());
            }
        }
        let folder = match parts.is_folder {
            true => self.write_below(&parts.image, &files, needs)?,
            false => view::write(&files, self.build.store, |_| self.owner(needs, &parts.image))?,
        };
        let place = |path: &TreePath| folder.join(std::ffi::OsStr::from_bytes(path.as_bytes()));
        for change in &boot.changes {
            let file = match parts.is_folder {
                true => one(step, &files, &change.file)?,
                false => name.clone(),
            };
            let copied = match &change.what {
                Alteration::Copy(from) => Some(place(&one(step, &files, from)?)),
                _ => None,
            };
            tamper::change(&place(&file), &change.what, copied.as_deref(), scratch)
                .map_err(|source| BootStepError::Change { file: file.to_string(), source: source.into() })?;
        }
        let image = if parts.is_folder { folder.to_path_buf() } else { place(&name) };
        Ok((folder, image))
    }
}

impl<R: Runner> Worker<'_, '_, R> {
    /// Boots what the step `id` boots, and merges its report into WORK, whether or not it is as expected.
    pub(super) fn boot(
        &self,
        id: StepId,
        planned: &Boot,
        needs: &[(StepId, Digest)],
        why: &str,
    ) -> Result<Kept, BuildError> {
        let (build, stamped_nanos) = (self.checker.build, now_nanos());
        let step = build.plan.step(id);
        let area = build.store.temporary();
        let io = |what| {
            let path = area.clone();
            move |source| BuildError::Io { what, path, source }
        };
        let parts = self.checker.parts(step, planned, needs)?;
        let scratch = Folder::new_in(&area, "boot-").map_err(io("make a folder in"))?;
        let (_files, image) = self.checker.lay_out(step, planned, &parts, needs, &scratch)?;
        let keys = parts.keys.as_ref().map(|(at, keys)| self.checker.write_below(at, keys, needs));
        let keys = keys.transpose()?;
        let report = scratch.join("report");
        let mut wanted = boot::Boot {
            disks: vec![DiskChoice {
                path: image,
                format: None,
                bus: bus(planned.bus),
                keep_writes: false,
                label: planned.label,
            }],
            secure_boot: secure_boot(&planned.trust, keys.as_deref()),
            firmware: None,
            vars: None,
            tpm: None,
            memory_bytes: memory_bytes(step),
            cpus: step.limits.cpus,
            network: false,
            ssh: wants_ssh(&parts.statements).then(|| SshChoice {
                user: "root".to_owned(),
                key: parts.ssh_key.clone(),
                host_key: None,
            }),
            script: parts.statements.clone(),
            report: planned.report.is_some().then(|| report.clone()),
            scratch: PathBuf::new(),
        };
        boot::check(&wanted, &build.settings.secrets.value)?;
        let started = Instant::now();
        let mut log = build.store.blobs().writer().map_err(io("write a log in"))?;
        let mut log_error = None;
        let (mut machine, script) = (HERE.to_owned(), &parts.statements);
        let boundary = Boundary { require: Vec::new(), untrusted: step.untrusted };
        let verdict = build.runner.boot(&mut wanted, planned.tpm, &boundary, &mut |told| {
            let told = match told {
                boot::Told::Started(identity) => {
                    machine = identity.to_string();
                    Told::Machine(identity.clone())
                }
                // Where the keys lie for the machine is nobody's concern.
                boot::Told::Note(text) => Told::Progress(match (keys.as_deref(), &planned.trust) {
                    (Some(copy), Trust::Keys(folder) | Trust::Enroll(folder)) => {
                        text.replace(&copy.display().to_string(), folder.text())
                    }
                    _ => text,
                }),
                boot::Told::Warning(text) => Told::Warning(text),
                boot::Told::Moment(moment) => {
                    let line = line(moment, script);
                    log_error = log_error.take().or(log.write_all(&line).err());
                    Told::Output(Stream::Stdout, line)
                }
            };
            let _ = self.messages.send(Message::Event(id, told));
        })?;
        if let Some(error) = log_error {
            return Err(io("write a log in")(error));
        }
        let (log, _) = log.finish().map_err(io("write a log in"))?;
        let took = started.elapsed();
        let phase = Told::Phase(Phase::Command, took, Instant::now());
        let _ = self.messages.send(Message::Event(id, phase));
        let mut left = Tree::new();
        if let Some(folder) = &planned.report {
            let xml = report::junit(&step.name, script, &verdict.moments, verdict.total);
            self.put_out(&mut left, &format!("{}/junit.xml", folder.text()), xml.as_bytes())?;
            for entry in fs::read_dir(&report).map_err(io("read a report in"))? {
                let path = entry.map_err(io("read a report in"))?.path();
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let file = fs::File::open(&path).map_err(io("read a report in"))?;
                self.put_out(&mut left, &format!("{}/{name}", folder.text()), file)?;
            }
        }
        let outputs = self.manifest(&left)?;
        // Its file was read when the guest was spoken to; the store has no copy that could have been.
        let is_of_key = || {
            let key = self.keys.get(id);
            key.is_some_and(|key| key.value(SSH_KEY_PART) == Some(&parts.ssh_key_now()))
        };
        let spoiled = (wants_ssh(&parts.statements) && !is_of_key())
            .then(|| format!("`{}` was modified while the step ran", parts.ssh_key.display()));
        let _passed = Passed::enter(self.gate, id);
        let merged = self.merge(id, &left);
        let is_met = matches!(verdict.outcome, Outcome::Met);
        let ran = Ran {
            ended: Ended::Ran(Exit::Exit(u8::from(!is_met)), Usage::default()),
            machine,
            spoiled,
            ..ran(Some(outputs), merged, took)
        };
        self.keep(id, ran, Some(log), why, stamped_nanos)
    }
}

/// Memory of the machine of a step that boots.
pub(super) fn memory_bytes(step: &PlannedStep) -> u64 {
    step.limits.memory_bytes.map_or(MEMORY_BYTES, |_| lower::memory_bytes(step))
}

/// What is told of a moment, as a line of the step's output.
fn line(moment: &Moment, script: &[Statement]) -> Vec<u8> {
    let statement = |index: usize| script.get(index).map_or("", |statement| statement.text.as_str());
    let mut line = format!("[{:8.3}] ", moment.at.as_secs_f64()).into_bytes();
    match &moment.what {
        What::Line(text) => line.extend_from_slice(text),
        What::Output(text) => line.extend([b"ssh: ", &text[..]].concat()),
        What::HostKey(key) => line.extend(format!("the guest's host key is {key}").bytes()),
        What::Reset => line.extend(b"the guest restarted its machine"),
        What::PowerOff => line.extend(b"the guest switched its machine off"),
        What::Verdict { index, failure: None, .. } => {
            line.extend(format!("met: {}", statement(*index)).bytes());
        }
        What::Verdict { index, failure: Some(why), .. } => {
            line.extend(format!("not met: `{}`: {why}", statement(*index)).bytes());
        }
    }
    line.push(b'\n');
    line
}

fn bus(bus: plan::Bus) -> Bus {
    match bus {
        plan::Bus::Virtio => Bus::Virtio,
        plan::Bus::Nvme => Bus::Nvme,
        plan::Bus::Usb => Bus::Usb,
        plan::Bus::Sata => Bus::Sata,
    }
}

/// As the firmware is given it; `keys` is where the keys are.
pub(super) fn secure_boot(trust: &Trust, keys: Option<&Path>) -> SecureBoot {
    let keys = keys.map(Path::to_owned).unwrap_or_default();
    match trust {
        Trust::Off => SecureBoot::Off,
        Trust::Setup => SecureBoot::Setup,
        Trust::Vendor => SecureBoot::Vendor,
        Trust::Keys(_) => SecureBoot::Keys(keys),
        Trust::Enroll(_) => SecureBoot::Enrol(keys),
    }
}

fn wants_ssh(statements: &[Statement]) -> bool {
    statements.iter().any(|statement| matches!(statement.step, script::Step::Ssh { .. }))
}

/// The one path in `tree` that `pattern` stands for.
fn one(step: &PlannedStep, tree: &Tree, pattern: &Pattern) -> Result<TreePath, BootStepError> {
    let which = |is_several| BootStepError::Which {
        step: step.name.clone(),
        path: pattern.text().to_owned(),
        is_several,
    };
    if !pattern.has_star() {
        let path = TreePath::new(pattern.text().as_bytes()).map_err(|_| which(false))?;
        return tree.get(&path).map(|_| path.clone()).ok_or_else(|| which(false));
    }
    let mut found =
        tree.iter().map(|(path, _)| path).filter(|path| pattern.matches(&path.to_string()).is_some());
    match (found.next(), found.next()) {
        (Some(path), None) => Ok(path.clone()),
        (None, _) => Err(which(false)),
        (Some(_), Some(_)) => Err(which(true)),
    }
}

/// Takes away what a disk that is made of the files does not show: owners, modes and times. What is neither file nor folder
/// is refused: files are changed by their names, and a link that a step put out may name any file of this host.
fn plain(step: &str, tree: &mut Tree) -> Result<(), BootStepError> {
    for (path, node) in tree.iter_mut() {
        if !matches!(node.kind, Kind::Directory | Kind::File { .. } | Kind::HardLink(_)) {
            return Err(BootStepError::Unfit { step: step.to_owned(), path: path.to_string() });
        }
        let mode = if node.kind == Kind::Directory { 0o755 } else { 0o644 };
        node.meta = Meta { mode, ..Meta::default() };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use kiln_artifact::tree::Node;

    use super::*;

    fn node(kind: Kind) -> Node {
        Node { kind, meta: Meta::default() }
    }

    #[test]
    fn a_link_that_a_step_put_out_is_not_booted() {
        let path = |text: &str| TreePath::new(text.as_bytes()).expect("a path");
        let mut tree = Tree::new();
        tree.insert(TreePath::root(), node(Kind::Directory));
        assert!(plain("try", &mut tree).is_ok());
        tree.insert(path("BOOTX64.EFI"), node(Kind::Symlink(b"/home/you/.profile".as_slice().into())));
        let error = plain("try", &mut tree).expect_err("a link");
        let said = "`BOOTX64.EFI`, of what step `try` boots, is neither a file nor a folder";
        assert_eq!(error.to_string(), said);
    }
}
