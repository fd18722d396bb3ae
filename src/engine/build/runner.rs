//! What runs the steps of a build: machines of this host, or what a test puts in their place.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kiln_artifact::tree::{Tree, TreePath};
use kiln_digest::Digest;
use kiln_virtio::fs::Attributes;
use kiln_wire::Outcome;

use super::BuildError;
use super::boot_step::secure_boot;
use crate::boot::{self, Boot, Verdict};
use crate::cache::{Entry, ShareTrace};
use crate::engine::error::RunError;
use crate::engine::event::{Event, Listener};
use crate::engine::host::{Boundary, Host, KernelChoice};
use crate::engine::merge::{Looks, MergeError};
use crate::engine::reads::ReadsReport;
use crate::engine::ready::Series;
use crate::engine::run::{Collected, Ended, Report, run_among};
use crate::engine::step::{Keep, Step, View};
use crate::keeper::{Keeper, Kept};
use crate::machine::Carrier;
use crate::plan::boot::Trust;
use crate::plan::{RootSpec, harmless};
use crate::root;
use crate::root::debian::DEFAULT_KERNEL_SUITE;

/// Most machines that wait for steps of a build beside as many as run at once: a step that finds none makes its own, and takes
/// processors from the commands that run.
const MOST_SPARE: usize = 2;

/// What a run of a step came to.
#[derive(Debug)]
pub struct Ran {
    /// How the command ended.
    pub ended: Ended,
    /// Digest of the manifest of what it put out, where it succeeded. It is in WORK, unless that is refused.
    pub outputs: Option<Digest>,
    /// Why it is not in WORK.
    pub unmerged: Option<MergeError>,
    /// What it looks like in WORK; none where nothing was merged.
    pub looks: Option<Looks>,
    /// Digest of what it printed, where that is kept.
    pub log: Option<Digest>,
    /// What it read.
    pub shares: Vec<ShareTrace>,
    /// Why what it read does not say all, in words.
    pub spoiled: Option<String>,
    /// Paths in WORK that it wrote and nobody declared.
    pub undeclared: Vec<TreePath>,
    /// Paths in WORK that changed.
    pub changed: usize,
    /// How long the command ran.
    pub command: Duration,
    /// How much of the host's memory its machine held at most, where that is known.
    pub held_bytes: Option<u64>,
    /// What ran it, in words.
    pub machine: String,
}

/// Runs steps.
pub trait Runner: Sync {
    /// How many steps, beside the `jobs` whose commands run, may be got ready for their commands meanwhile. A runner that
    /// says so tells [`Setup`](crate::engine::Phase::Setup) before a step's command, and begins that when it was heard without an error; it tells
    /// [`Collect`](crate::engine::Phase::Collect) as soon as another may begin.
    fn ahead(&self, jobs: usize) -> usize {
        let _ = jobs;
        0
    }

    /// What only a host knows of a step and its key has: names and digests of its root and kernel. What is not there yet
    /// is fetched or made.
    ///
    /// # Errors
    /// [`RunError`].
    fn identify(
        &self,
        step: &Step,
        progress: &mut dyn FnMut(&str),
    ) -> Result<Vec<(String, String)>, RunError>;

    /// The files of a root, all of whose contents the store has then.
    ///
    /// # Errors
    /// [`RunError`].
    fn files(&self, root: &RootSpec, progress: &mut dyn FnMut(&str)) -> Result<Arc<Tree>, RunError>;

    /// Runs it, and merges its outputs into WORK where it succeeds.
    ///
    /// # Errors
    /// [`RunError`] where it could not be carried through; a command that fails is a [`Ran`].
    fn run(&self, step: &Step, events: Listener<'_>) -> Result<Ran, RunError>;

    /// What of the firmware of a boot its key has: names and digests.
    ///
    /// # Errors
    /// [`BuildError`] where this host has none.
    fn firmware(&self, trust: &Trust) -> Result<Vec<(String, String)>, BuildError>;

    /// Boots `wanted`, in which the TPM and the place for files of the machine are still to be named, and judges it.
    ///
    /// # Errors
    /// [`BuildError`] where nothing could be judged.
    fn boot(
        &self,
        wanted: &mut Boot,
        tpm: bool,
        boundary: &Boundary,
        told: &mut dyn FnMut(boot::Told<'_>),
    ) -> Result<Verdict, BuildError>;

    /// When machines of steps stay.
    fn keep(&self) -> Keep {
        Keep::Never
    }
}

/// Machines of this host.
pub struct Machines<'a> {
    host: &'a Host,
    processors: usize,
    // Protects what was found out of roots and kernels, each once: held while it is found out.
    known: Mutex<BTreeMap<String, Known>>,
    // Protects what was found out of firmware, each once: held while it is found out.
    firmware: Mutex<BTreeMap<String, Vec<(String, String)>>>,
    // Protects the files of roots that were asked for; held while they are found out.
    files: Mutex<BTreeMap<String, Arc<Tree>>>,
    /// All steps that it runs.
    series: Series,
    /// How long those of failed steps stay with nobody in them; none do where this is none.
    idle: Option<Duration>,
    // Protects the list; held only to put one in or to take all.
    kept: Mutex<Vec<KeptStep>>,
}

/// A root and a kernel, as the keys of steps have them.
struct Known {
    parts: Vec<(String, String)>,
    root: Option<Digest>,
    bundle: (Digest, Option<Digest>),
}

impl Known {
    /// Why a step whose machine had this root, and booted this, is not the one that its key says, in words.
    fn differs(&self, step: &Step, report: &Report) -> Option<String> {
        if report.reads.beside.root != self.root {
            return Some(format!("the root `{}` was modified before the step ran", step.root));
        }
        let is_other = (report.bundle, report.modules) != self.bundle;
        is_other.then(|| "the kernel, its modules or kiln's agent changed before the step ran".to_owned())
    }
}

/// What a step of this root and kernel is known by.
fn name_of(step: &Step) -> String {
    format!("{:?} {}", step.kernel, step.root)
}

/// The machine of a failed step, which can be entered.
pub struct KeptStep {
    keeper: Keeper,
    // The directories that the machine still serves.
    _view: Option<View>,
}

impl KeptStep {
    /// Stays until it is of no more use.
    pub fn stay(self) {
        self.keeper.stay();
    }
}

impl<'a> Machines<'a> {
    /// Those of `host`.
    pub fn new(host: &'a Host) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            host,
            processors,
            known: Mutex::default(),
            firmware: Mutex::default(),
            files: Mutex::default(),
            series: Series::new(processors, processors.min(MOST_SPARE)),
            idle: None,
            kept: Mutex::default(),
        }
    }

    /// Lets those of failed steps stay, so long with nobody in them.
    pub fn keeping(self, idle: Option<Duration>) -> Self {
        Self { idle, ..self }
    }

    /// The machines that were kept.
    pub fn into_kept(self) -> Vec<KeptStep> {
        self.kept.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a machine that is left of `step` to callers.
    fn open(&self, kept: Kept, step: &Step, events: Listener<'_>) {
        let opened = kept.open(self.idle.unwrap_or_default());
        let _ = match &opened {
            Ok(keeper) => events(Event::Kept(&keeper.entry().name, self.idle.unwrap_or_default())),
            Err(error) => events(Event::Warning(&format!("the machine cannot be kept: {error}"))),
        };
        let kept = opened.map(|keeper| KeptStep { keeper, _view: step.view.clone() });
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).extend(kept);
    }
}

fn processors() -> u16 {
    std::thread::available_parallelism().ok().and_then(|n| u16::try_from(n.get()).ok()).unwrap_or(1)
}

impl Runner for Machines<'_> {
    fn ahead(&self, jobs: usize) -> usize {
        jobs.min(self.processors)
    }

    fn keep(&self) -> Keep {
        match self.idle {
            Some(_) => Keep::OnFailure,
            None => Keep::Never,
        }
    }

    fn identify(
        &self,
        step: &Step,
        progress: &mut dyn FnMut(&str),
    ) -> Result<Vec<(String, String)>, RunError> {
        let name = name_of(step);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = known.get(&name) {
            return Ok(known.parts.clone());
        }
        let qemu = self.host.backend(&step.boundary)?;
        let bundle = self.host.bundle(&step.kernel, step.carrier, progress)?;
        let root = self.host.root(&step.root, &qemu, &bundle, processors(), progress)?;
        let digest = root.digest().map_or_else(|| "live".to_owned(), |digest| digest.to_string());
        let modules = bundle.modules.map_or_else(|| "none".to_owned(), |modules| modules.to_string());
        // Where a folder or a file lies is no part of what it is.
        let root_name = match &step.root {
            RootSpec::Directory(_) => "dir:".to_owned(),
            RootSpec::File(_) => "file:".to_owned(),
            spec => spec.to_string(),
        };
        let parts = vec![
            ("root".to_owned(), format!("{root_name} {digest}")),
            ("kernel".to_owned(), format!("{} {} modules {modules}", bundle.release, bundle.kernel)),
        ];
        let (root, bundle) = (root.digest(), (bundle.digest(), bundle.modules));
        known.insert(name, Known { parts: parts.clone(), root, bundle });
        Ok(parts)
    }

    fn files(&self, root: &RootSpec, progress: &mut dyn FnMut(&str)) -> Result<Arc<Tree>, RunError> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tree) = files.get(&root.to_string()) {
            return Ok(Arc::clone(tree));
        }
        let found = match root {
            RootSpec::Debian(_) => {
                let qemu = self.host.backend(&Boundary::default())?;
                let kernel = KernelChoice::Debian(DEFAULT_KERNEL_SUITE.to_owned());
                let bundle = self.host.bundle(&kernel, Carrier::default(), progress)?;
                self.host.root(root, &qemu, &bundle, processors(), progress)?
            }
            _ => self.host.root_of_files(root, progress)?,
        };
        let tree = Arc::new(root::tree(&self.host.store, &found).map_err(RunError::of_root)?);
        files.insert(root.to_string(), Arc::clone(&tree));
        Ok(tree)
    }

    fn firmware(&self, trust: &Trust) -> Result<Vec<(String, String)>, BuildError> {
        // Which keys it gets is the step's; its files are the same.
        let wanted = secure_boot(trust, None);
        let name = format!("{wanted:?}");
        let mut known = self.firmware.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(parts) = known.get(&name) {
            return Ok(parts.clone());
        }
        let parts = boot::identify(&wanted)?;
        known.insert(name, parts.clone());
        Ok(parts)
    }

    fn boot(
        &self,
        wanted: &mut Boot,
        tpm: bool,
        boundary: &Boundary,
        told: &mut dyn FnMut(boot::Told<'_>),
    ) -> Result<Verdict, BuildError> {
        let qemu = self.host.backend(boundary).map_err(RunError::from)?;
        wanted.scratch = self.host.store.temporary();
        wanted.tpm = tpm.then(|| boot::find_tpm(&self.host.settings.search_path)).transpose()?;
        Ok(boot::boot(&qemu, wanted, told)?)
    }

    fn run(&self, step: &Step, events: Listener<'_>) -> Result<Ran, RunError> {
        let started = Instant::now();
        let mut machine = String::new();
        let mut note = |event: Event<'_>| {
            if let Event::Machine(identity) = event {
                machine = identity.to_string();
            }
            events(event)
        };
        let run = run_among(step, self.host, None, &self.series, &mut note);
        if let Some(kept) = run.kept {
            self.open(kept, step, events);
        }
        let report = run.result?;
        let command = match &report.ended {
            Ended::Ran(_, usage) => Duration::from_micros(usage.wall_us),
            Ended::NotStarted { .. } => started.elapsed(),
        };
        // A folder or a file is looked at again when its step's machine is made ready.
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let differs = known.get(&name_of(step)).and_then(|known| known.differs(step, &report));
        drop(known);
        let unrecorded = report.reads.beside.unrecorded.first();
        let not_fixed = || {
            let shares = &mut report.reads.shares.iter();
            let real = shares.find(|share| !matches!(share.attributes, Attributes::Fixed { .. }))?;
            Some(format!("`{}` shows the host's own owners and times", real.guest))
        };
        let unknown = unrecorded.map(|what| format!("nothing says what it read of {what}"));
        let (outputs, changed, undeclared, looks) = match report.collected {
            Some(Collected { manifest, changed, undeclared, looks, .. }) => {
                (Some(manifest), changed.len(), undeclared, looks)
            }
            None => (None, 0, Vec::new(), None),
        };
        Ok(Ran {
            ended: with_program(report.ended, step),
            outputs,
            unmerged: report.unmerged,
            looks,
            log: None,
            spoiled: report.reads.spoiled().or(differs).or(unknown).or_else(not_fixed),
            shares: shares(&report.reads),
            undeclared,
            changed,
            command,
            held_bytes: report.held_bytes,
            machine,
        })
    }
}

/// What was read, as a trace keeps it.
fn shares(reads: &ReadsReport) -> Vec<ShareTrace> {
    let share = |share: &super::super::reads::ShareReads| ShareTrace {
        name: share.record.name.to_string(),
        guest: share.guest.clone(),
        entries: share
            .entries()
            .map(|(entry, content)| Entry {
                path: entry.path.0,
                kind: entry.kind,
                observed: entry.observed,
                fingerprint: entry.fingerprint,
                content,
                listing: entry.listing,
                xattrs: entry.xattrs,
            })
            .collect(),
        missed: share.record.missed.iter().map(|path| path.0).collect(),
    };
    reads.shares.iter().map(share).collect()
}

/// Of a command that did not start: which one that was.
fn with_program(ended: Ended, step: &Step) -> Ended {
    let Ended::NotStarted { error, why } = ended else { return ended };
    let program = harmless(step.argv.first().map(Vec::as_slice).unwrap_or_default());
    let why = match (why.is_empty(), error.kind()) {
        (true, ErrorKind::NotFound) => format!("there is no `{program}` in its root, or none in its PATH"),
        (true, _) => format!("`{program}`: {error}"),
        (false, _) => format!("`{program}`: {why}"),
    };
    Ended::NotStarted { error, why }
}

/// How a command ended, in words; nothing where it succeeded.
pub(super) fn failure(ran: &Ran) -> Option<String> {
    Some(match &ran.ended {
        Ended::Ran(Outcome::Exit(0), _) => return None,
        Ended::Ran(Outcome::Exit(code), usage) if usage.oom_kills > 0 => {
            format!("exited with status {code}; its machine ran out of memory")
        }
        Ended::Ran(Outcome::Exit(code), _) => format!("exited with status {code}"),
        Ended::Ran(Outcome::Signal(signal), usage) if usage.oom_kills > 0 => {
            format!("was killed by signal {signal}; its machine ran out of memory")
        }
        Ended::Ran(Outcome::Signal(signal), _) => format!("was killed by signal {signal}"),
        Ended::Ran(Outcome::TimedOut, _) => "was stopped: it took longer than its timeout".to_owned(),
        Ended::NotStarted { error, why } if why.is_empty() => format!("could not be started: {error}"),
        Ended::NotStarted { why, .. } => format!("could not be started: {why}"),
    })
}

impl Ran {
    /// How its command failed, in words; nothing where it succeeded.
    pub fn failure(&self) -> Option<String> {
        failure(self)
    }
}
