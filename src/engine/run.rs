//! `run`: one step from its description to its merged outputs.

use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kiln_artifact::tree::{Kind, TreePath};
use kiln_digest::Digest;
use kiln_wire::{ABOUT_ROOT, Exec, NOT_LISTED, Outcome, Setup, Usage};

use super::collect::{Collect, Collection, collect};
use super::error::RunError;
use super::event::{Event, Listener, Phase};
use super::host::Host;
use super::merge::{self, Looks, Merge, MergeError};
use super::prepare::{Prepared, describe, host_clock, prepare, seconds, toolbox_mount};
use super::reads::{self, Beside, ReadsReport};
use super::ready::{Readiness, Series};
use super::step::{Clock, Keep, Step};
use crate::agent::{ExecEnd, RUNNING, Session, SessionError};
use crate::keeper::{Entry, Kept, Registration, Registry};
use crate::machine::{Accelerator, Backend, Identity, Machine, Origin, footprint, in_full};
use crate::root::bundle::NEEDED;
use crate::root::{Filesystem, Image, Root, toolbox};
use crate::threads;

/// How long a machine may take from its start to its agent's first word. An emulated one needs two seconds.
const BOOT_PATIENCE: Duration = Duration::from_secs(90);
/// How long a machine that closed its wire may take to be gone.
const DEATH_PATIENCE: Duration = Duration::from_secs(5);
/// How long the console may be behind the wire.
const CONSOLE_PATIENCE: Duration = Duration::from_secs(1);
/// How often to look whether it is not any more.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// How the command ended.
#[derive(Debug)]
pub enum Ended {
    /// It ran to an end.
    Ran(Outcome, Usage),
    /// It could not be started.
    NotStarted {
        /// The guest kernel's word.
        error: io::Error,
        /// What stands in the way of a program that is there, in the agent's words; empty where nothing is known.
        why: String,
    },
}

impl Ended {
    /// Whether the step succeeded.
    pub fn is_success(&self) -> bool {
        matches!(self, Self::Ran(Outcome::Exit(0), _))
    }
}

/// What came out of WORK's layer.
#[derive(Debug)]
pub struct Collected {
    /// The digest of the outputs' manifest.
    pub manifest: Digest,
    /// Output files, and their bytes together.
    pub files: (u64, u64),
    /// Paths in WORK that changed.
    pub changed: Vec<TreePath>,
    /// Paths written in WORK that nobody declared.
    pub undeclared: Vec<TreePath>,
    /// What the outputs look like in WORK; none where nothing was merged.
    pub looks: Option<Looks>,
}

/// What a run came to.
#[derive(Debug)]
pub struct Report {
    /// How the command ended.
    pub ended: Ended,
    /// What ran it.
    pub identity: Identity,
    /// Digest of the boot bundle.
    pub bundle: Digest,
    /// Digest of the tree of its kernel's modules.
    pub modules: Option<Digest>,
    /// The outputs; none where the command failed.
    pub collected: Option<Collected>,
    /// What was read. Contents have digests where they were asked for.
    pub reads: ReadsReport,
    /// How much of the host's memory its machine held at most, where that is known.
    pub held_bytes: Option<u64>,
    /// Where WORK is.
    pub work: PathBuf,
    /// Why WORK was not given the outputs, which the store has.
    pub unmerged: Option<MergeError>,
}

/// A run that is over.
pub struct Run {
    /// What it came to. [`RunError`] where kiln could not carry it through; a command that fails is a [`Report`].
    pub result: Result<Report, RunError>,
    /// Its machine, where the step wants it kept and it still answers.
    pub kept: Option<Kept>,
}

/// Runs `step` on `host`, telling `events` what happens. `input` is the command's standard input.
pub fn run(step: &Step, host: &Host, input: Option<OwnedFd>, events: Listener<'_>) -> Run {
    let Run { result, kept } = run_among(step, host, input, &Series::new(1, 0), events);
    let merged = |mut report: Report| match report.unmerged.take() {
        Some(error) => Err(error.into()),
        None => Ok(report),
    };
    Run { result: result.and_then(merged), kept }
}

/// Does what [`run`] does, as one run of `series`. A merge that was refused is left for the caller to tell.
pub fn run_among(
    step: &Step,
    host: &Host,
    input: Option<OwnedFd>,
    series: &Series,
    events: Listener<'_>,
) -> Run {
    let mut standing = None;
    let result = carry_through(step, host, input, series, events, &mut standing, true);
    let is_good = |report: &Report| report.ended.is_success() && report.unmerged.is_none();
    let failed = !result.as_ref().is_ok_and(is_good);
    let standing = standing.filter(|_| step.keeps(!failed));
    Run { result, kept: standing.map(|kept| with_toolbox(kept, step, events)) }
}

/// Gives a machine that was kept its toolbox, which its step did not see.
pub(super) fn with_toolbox(mut kept: Kept, step: &Step, events: Listener<'_>) -> Kept {
    if kept.has_toolbox
        && !step.toolbox
        && let Err(error) = kept.session.mount(toolbox_mount())
    {
        let _ = events(Event::Warning(&format!("the machine has no toolbox: {error}")));
        kept.has_toolbox = false;
    }
    if kept.has_toolbox {
        for variable in &mut kept.environment {
            if variable.starts_with(b"PATH=") {
                variable.extend_from_slice(format!(":{}", toolbox::PROGRAMS).as_bytes());
            }
        }
    }
    kept
}

/// Does what [`run`] says. A machine that may be wanted afterwards is left in `standing`. Where it `may_boot_again`, a machine
/// that came up badly is followed by another.
fn carry_through(
    step: &Step,
    host: &Host,
    input: Option<OwnedFd>,
    series: &Series,
    events: Listener<'_>,
    standing: &mut Option<Kept>,
    may_boot_again: bool,
) -> Result<Report, RunError> {
    let mut stopwatch = Stopwatch::start();
    let has_input = input.is_some();
    let work = host.settings.work.value.clone();
    merge::recover(&host.store, &work)?;
    let started = start(step, host, Some(series), &mut stopwatch, events)?;
    let Started { prepared, setup, exec, mut machine, wire, registration, stopped, readiness } = started;
    let (environment, directory) = (exec.env.clone(), exec.cwd.clone());
    let stopwatch = &mut stopwatch;
    let mut talk = Talk::new(step, host, &prepared, stopwatch);
    let mut session = None;
    // Beside the command: to start a process takes as long as some commands. Where the run fails, nobody waits for it to be given.
    let order = |readiness: Readiness| threads::start_small("order", || readiness.order()).ok();
    let (early, late) = match readiness {
        Some(readiness) if readiness.is_pressed() => (Some(readiness), None),
        readiness => (None, readiness),
    };
    let mut ordered = early.and_then(order);
    let opened = talk.open(wire, setup, events);
    if let Err(error) = &opened
        && may_boot_again
        && came_up_badly(error, machine.identity())
    {
        // Nothing of the step has run: what it took so far is part of the boot.
        let _ = events(Event::Phase(Phase::Boot, talk.stopwatch.lap()));
        let _ = events(Event::Warning(&format!("the machine was booted again: {}", in_full(error))));
        drop((machine, registration));
        return carry_through(step, host, input, series, events, standing, false);
    }
    let conversation = opened.and_then(|opened| {
        ordered = ordered.take().or_else(|| late.and_then(order));
        talk.work(session.insert(opened), exec, input, events)
    });
    let (doing, is_off) = (talk.doing, talk.is_off);
    // What it gave back it may need again the next time.
    let held_bytes = conversation.is_ok().then(|| footprint::most_held_bytes(&machine.processes())).flatten();
    // An agent that answers nothing any more leaves a machine that nobody can look into.
    let can_stay = !is_off && conversation.as_ref().err().is_none_or(RunError::leaves_session_usable);
    let conversation = match conversation
        .map_err(|error| explain(error, doing, &mut *machine, &stopped, events))
    {
        // Only a command with a time-out is waited for so long: whatever became of it, it took longer than that.
        Err(RunError::Session(SessionError::Silent { doing: RUNNING, .. })) => {
            let text = "the command's time had passed and its machine did not stop it: it hung, or was kept from answering";
            let _ = events(Event::Warning(text));
            Ok((Ended::Ran(Outcome::TimedOut, Usage::default()), None))
        }
        other => other,
    };
    let identity = machine.identity().clone();
    let ((ended, collection), record) = match session.filter(|_| step.keep != Keep::Never && can_stay) {
        Some(session) => {
            let kept = standing.insert(Kept {
                machine,
                session,
                registration,
                environment,
                directory,
                has_toolbox: prepared.toolbox.is_some(),
                writes_disks: step.writes_disks(),
            });
            (conversation?, kept.machine.observed_so_far()?)
        }
        None => {
            let over = conversation.and_then(|conversation| Ok((conversation, machine.observed()?)));
            // Before its registration: who finds no entry finds no machine either.
            drop(machine);
            over?
        }
    };
    if record.full {
        return Err(RunError::RecordFull);
    }
    let beside = Beside {
        machine: Some(identity.clone()),
        root: prepared.root.digest(),
        bundle: Some(prepared.bundle.digest()),
        unrecorded: unrecorded(step, has_input),
    };
    let mut progress = |text: &str| {
        let _ = events(Event::Progress(text));
    };
    let hash: Option<&mut dyn FnMut(&str)> = if step.report_reads { Some(&mut progress) } else { None };
    let reads = reads::report(record, &prepared.observables, beside, hash);
    for text in reads.empty() {
        let _ = events(Event::Warning(&text));
    }
    let _ = events(Event::Phase(Phase::Record, stopwatch.lap()));

    let mut unmerged = None;
    let collected = match collection {
        None => None,
        Some(collection) => {
            // Before the merge, which syncs what was written so far.
            let manifest = collection.outputs.manifest();
            let io = |source| RunError::Io { what: "keep the outputs' manifest", source };
            let (manifest, _) = host.store.blobs().put(&manifest[..]).map_err(io)?;
            let merged = if step.outputs.is_empty() {
                None
            } else {
                let merge =
                    Merge { store: &host.store, work: &work, step: &step.name, overwrite: step.overwrite };
                let merged = match step.outputs.are_everything() {
                    true => merge.run_upon(&collection.outputs, &collection.removed),
                    false => merge.run(&collection.outputs),
                };
                merged.map_err(|error| unmerged = Some(error)).ok()
            };
            let (changed, looks) = merged.map(|merged| (merged.placed, merged.looks)).unzip();
            let changed = changed.unwrap_or_default();
            let files = collection.outputs.iter().filter_map(|(_, node)| match node.kind {
                Kind::File { size, .. } => Some(size),
                // Another name of one that was counted.
                Kind::HardLink(_) => Some(0),
                _ => None,
            });
            let files = files.fold((0, 0), |(count, bytes), size| (count + 1, bytes + size));
            Some(Collected { manifest, files, changed, undeclared: collection.undeclared, looks })
        }
    };
    if unmerged.is_none() {
        let _ = events(Event::Phase(Phase::Merge, stopwatch.lap()));
    }
    drop(ordered.map(JoinHandle::join));
    let (bundle, modules) = (prepared.bundle.digest(), prepared.bundle.modules);
    Ok(Report { ended, identity, bundle, modules, collected, reads, held_bytes, work, unmerged })
}

/// A machine that was started for a step, before its agent's first word.
pub(super) struct Started {
    pub prepared: Prepared,
    pub setup: Setup,
    pub exec: Exec,
    pub machine: Box<dyn Machine>,
    pub wire: UnixStream,
    pub registration: Registration,
    /// Set where somebody ends it.
    pub stopped: Arc<AtomicBool>,
    /// What it has to do with machines that are made ready; none without a series.
    pub readiness: Option<Readiness>,
}

/// Starts the machine of `step`, or takes one of those that are ready for the runs of `series`.
///
/// # Errors
/// [`RunError`] where there is none then.
pub(super) fn start(
    step: &Step,
    host: &Host,
    series: Option<&Series>,
    stopwatch: &mut Stopwatch,
    events: Listener<'_>,
) -> Result<Started, RunError> {
    let mut prepared = prepare(step, host, &host.settings.work.value, events)?;
    let (setup, exec, spec) = describe(step, host, &mut prepared)?;
    let _ = events(Event::Phase(Phase::Prepare, stopwatch.lap()));

    let mut readiness = series.and_then(|series| Readiness::of(host, series, &prepared, &spec));
    let borrowed = readiness.as_mut().and_then(|readiness| readiness.borrow(host, &spec));
    let mut machine = match borrowed {
        Some(machine) => machine,
        None => {
            if let Some(why) = readiness.as_ref().and_then(Readiness::failure) {
                let _ = events(Event::Warning(&format!("no machine was made ready for this run: {why}")));
            }
            match &prepared.vmm {
                Some(vmm) => vmm.start(spec)?,
                None => prepared.qemu.start(spec)?,
            }
        }
    };
    let _ = events(Event::Machine(machine.identity()));
    for note in machine.notes() {
        let _ = events(Event::Warning(note));
    }
    let wire = machine.wire()?;
    let (registration, stopped) = register(step, host, &prepared, &*machine, &wire)?;
    Ok(Started { prepared, setup, exec, machine, wire, registration, stopped, readiness })
}

/// Whether another machine may fare better than this one, where `error` came of preparing a step: an emulated kernel has been
/// seen not to load a module of its own on a busy host.
fn came_up_badly(error: &RunError, identity: &Identity) -> bool {
    let (RunError::Root { source, .. } | RunError::Session(source)) = error else { return false };
    let lacks_a_file_system =
        matches!(source, SessionError::Failed { what, .. } if what.contains(NOT_LISTED));
    lacks_a_file_system && identity.accelerator == Accelerator::Tcg && identity.origin == Origin::Boot
}

/// What `error`, in a conversation about `doing`, says of the machine: whether somebody ended it, and how it died. What its
/// console has to say is told.
pub(super) fn explain(
    error: RunError,
    doing: &'static str,
    machine: &mut dyn Machine,
    stopped: &AtomicBool,
    events: Listener<'_>,
) -> RunError {
    match error {
        RunError::Session(_) if stopped.load(Ordering::Acquire) => return RunError::Stopped { doing },
        RunError::Session(SessionError::Closed) => {
            let death = machine.death(DEATH_PATIENCE);
            quote_console(&machine.console(), events);
            return RunError::Died { doing, death };
        }
        RunError::Session(SessionError::Silent { .. }) => quote_console(&machine.console(), events),
        // What errno leaves out, some file systems say on the console only.
        RunError::Root { filesystem, .. } => {
            quote_console(&console_about(&*machine, filesystem.name()), events);
        }
        _ => {}
    }
    error
}

/// What the step could read and no record says how much of it.
fn unrecorded(step: &Step, has_input: bool) -> Vec<String> {
    let mut unrecorded: Vec<String> = step.disks.iter().map(|disk| format!("disk {}", disk.guest)).collect();
    if has_input {
        unrecorded.push("standard input".to_owned());
    }
    if step.toolbox {
        unrecorded.push(format!("disk {}", toolbox::PLACE));
    }
    if step.network {
        unrecorded.push("the network".to_owned());
    }
    unrecorded
}

/// How much of a console is quoted.
const CONSOLE_LINES: usize = 15;

pub(super) struct Stopwatch(Instant);

impl Stopwatch {
    /// One that starts now.
    pub fn start() -> Self {
        Self(Instant::now())
    }

    fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now.duration_since(std::mem::replace(&mut self.0, now))
    }
}

/// Shows the end of what a machine printed; of a panic, from the line that says so.
fn quote_console(console: &str, events: Listener<'_>) {
    let from_panic = console.find("Kernel panic").map(|at| &console[at..]);
    let quoted = match from_panic {
        Some(text) => text.lines().take(CONSOLE_LINES).collect::<Vec<_>>().join("\n"),
        None => last_lines(console, CONSOLE_LINES),
    };
    if !quoted.trim().is_empty() {
        let _ = events(Event::Warning(&format!("the machine's console says:\n{quoted}")));
    }
}

/// The lines of the console that have `word` in them. The console is slower than the wire, and its reader may not have had
/// its turn yet: where there is no such line, one is waited for.
fn console_about(machine: &dyn Machine, word: &str) -> String {
    let give_up = Instant::now() + CONSOLE_PATIENCE;
    loop {
        let console = machine.console();
        let about = |line: &&str| line.ends_with('\n') && line.to_ascii_lowercase().contains(word);
        let lines: String = console.split_inclusive('\n').filter(about).collect();
        if !lines.is_empty() || Instant::now() >= give_up {
            return lines;
        }
        thread::sleep(LOOK_AGAIN);
    }
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.trim_end().lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

type Conversation = (Ended, Option<Collection>);

/// A conversation with one agent, from its first word to the end of the collection.
pub(super) struct Talk<'a> {
    step: &'a Step,
    host: &'a Host,
    prepared: &'a Prepared,
    stopwatch: &'a mut Stopwatch,
    /// What is going on, for the case that the machine dies.
    pub doing: &'static str,
    /// Whether the machine was switched off.
    is_off: bool,
}

impl<'a> Talk<'a> {
    /// One that begins.
    pub fn new(step: &'a Step, host: &'a Host, prepared: &'a Prepared, stopwatch: &'a mut Stopwatch) -> Self {
        Self { step, host, prepared, stopwatch, doing: "booting", is_off: false }
    }

    /// Why the step's world could not be made, with what of it the user named.
    fn setup_failed(&self, source: SessionError) -> RunError {
        match (source, &self.prepared.root) {
            (source @ SessionError::Failed { .. }, root) if self.prepared.bundle.modules.is_none() => {
                let mut needed = NEEDED.to_vec();
                if let Root::Image(Image { filesystem: Filesystem::Squashfs, .. }) = root {
                    needed.push(Filesystem::Squashfs.name());
                }
                RunError::BareKernel { needed: needed.join(", "), source }
            }
            (SessionError::Failed { what, errno }, Root::Image(image)) if what.starts_with(ABOUT_ROOT) => {
                RunError::Root {
                    root: self.step.root.to_string(),
                    filesystem: image.filesystem,
                    source: SessionError::Failed { what, errno },
                }
            }
            (source, _) => RunError::Session(source),
        }
    }

    /// From the machine's start to a world that the step's command can run in.
    pub fn open(
        &mut self,
        wire: UnixStream,
        mut setup: Setup,
        events: Listener<'_>,
    ) -> Result<Session, RunError> {
        let mut session = Session::open(wire, BOOT_PATIENCE).map_err(RunError::Session)?;
        let _ = events(Event::Phase(Phase::Boot, self.stopwatch.lap()));
        if self.step.clock == Clock::Host {
            // Since it was described its machine was made, and perhaps a template before that.
            setup.clock = host_clock();
        }
        self.doing = "preparing the step";
        session.setup(setup).map_err(|source| self.setup_failed(source))?;
        match events(Event::Phase(Phase::Setup, self.stopwatch.lap())) {
            Err(source) if source.kind() == io::ErrorKind::Interrupted => {
                return Err(RunError::Session(SessionError::Output(source)));
            }
            _ => {}
        }
        // Whoever heard it may have let the step wait for its turn.
        let _ = self.stopwatch.lap();
        Ok(session)
    }

    /// The command, and where it succeeds its outputs.
    fn work(
        &mut self,
        session: &mut Session,
        mut exec: Exec,
        input: Option<OwnedFd>,
        events: Listener<'_>,
    ) -> Result<Conversation, RunError> {
        self.doing = RUNNING;
        exec.stdin = input.is_some();
        let limit = self.step.limits.printed_bytes;
        let mut printed: u64 = 0;
        let mut output = |stream, data: &[u8]| {
            let room = usize::try_from(limit.saturating_sub(printed)).unwrap_or(usize::MAX);
            printed = printed.saturating_add(data.len() as u64);
            match data.split_at_checked(room) {
                Some((fits, [_, ..])) => {
                    events(Event::Output(stream, fits))?;
                    Err(io::ErrorKind::QuotaExceeded.into())
                }
                _ => events(Event::Output(stream, data)),
            }
        };
        let end = session.exec(exec, input, &mut output).map_err(|error| match error {
            SessionError::Output(_) if printed > limit => RunError::Printed { limit },
            error => RunError::Session(error),
        })?;
        let _ = events(Event::Phase(Phase::Command, self.stopwatch.lap()));
        let ended = match end {
            ExecEnd::Ran(outcome, usage) => Ended::Ran(outcome, usage),
            ExecEnd::NotStarted { error, why } => Ended::NotStarted { error, why },
        };
        let mut collection = None;
        if ended.is_success() {
            self.doing = "collecting outputs";
            let what = Collect {
                target: self.prepared.work_target.as_bytes(),
                outputs: &self.step.outputs,
                limits: &self.step.limits,
                epoch: seconds(self.prepared)?,
            };
            collection = Some(collect(&what, session, self.host.store.blobs())?);
        }
        // A disk that the step may write has to be left clean; without one there is nothing in the machine worth
        // waiting for. A machine that is kept is switched off when it goes.
        self.is_off = self.step.writes_disks() && !self.step.keeps(ended.is_success());
        if self.is_off {
            self.doing = "powering off";
            session.power_off().map_err(RunError::Session)?;
        }
        if ended.is_success() {
            let _ = events(Event::Phase(Phase::Collect, self.stopwatch.lap()));
        }
        Ok((ended, collection))
    }
}

/// Registers the machine, so that others can find and end it, and gives what tells whether somebody did.
fn register(
    step: &Step,
    host: &Host,
    prepared: &Prepared,
    machine: &dyn Machine,
    wire: &UnixStream,
) -> Result<(Registration, Arc<AtomicBool>), RunError> {
    let stopped = Arc::<AtomicBool>::default();
    let told = Arc::clone(&stopped);
    let wire = wire.try_clone().map_err(|source| RunError::Io { what: "hold the wire", source })?;
    let entry = Entry::running(&step.name, &step.argv, step.memory_bytes, prepared.cpus, machine.identity());
    let mut entry = Entry { processes: machine.processes(), ..entry };
    if step.view.is_some() {
        // What runs steps of recipes is one shell or another.
        entry.called.clone_from(&step.name);
    }
    let registration = Registry::open(&host.store.run())?.register(entry, move || {
        told.store(true, Ordering::Release);
        // Whoever waits for the agent learns of it at once.
        let _ = wire.shutdown(Shutdown::Both);
    })?;
    Ok((registration, stopped))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::jail::Held;

    #[test]
    fn an_emulated_machine_that_booted_without_a_file_system_came_up_badly_and_no_other() {
        let failed = |what: &str| {
            RunError::Session(SessionError::Failed {
                what: what.to_owned(),
                errno: io::Error::from_raw_os_error(19),
            })
        };
        let identity = |accelerator, origin| Identity {
            backend: "qemu".to_owned(),
            accelerator,
            jail: Held::default(),
            origin,
        };
        let lacks = failed(&format!("mounting layer as overlay: {NOT_LISTED}, its module not loaded"));
        let booted = identity(Accelerator::Tcg, Origin::Boot);
        assert!(came_up_badly(&lacks, &booted));
        assert!(!came_up_badly(&failed("finding the disk with serial \"root\""), &booted));
        assert!(!came_up_badly(&lacks, &identity(Accelerator::Kvm, Origin::Boot)));
        assert!(!came_up_badly(&lacks, &identity(Accelerator::Tcg, Origin::Template)));
    }
}
