//! Machines that are ready before their step: each is held by a keeper, a process of kiln's own that a run starts when its
//! own step runs, and lent to the next run that wants such a machine. The keeper ends with the machine's step, or when
//! nobody came for its idle time. No run depends on one: whoever finds none, or one that does not answer, makes a machine.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use kiln_digest::Digest;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::entry::Entry;
use super::registry::Registry;
use super::talk::{Answer, hear, hear_descriptors, say, say_descriptors};
use crate::machine::jail;
use crate::machine::meminfo::available_bytes;
use crate::machine::program;
use crate::machine::qemu::Qemu;
use crate::machine::ready::{Lender, Readies, Ready};
use crate::machine::template::Templates;
use crate::machine::vmm::KilnVmm;
use crate::machine::{Accelerator, Carrier, Cpu, Death, Disk, Identity, Spec, scratch};
use crate::plan::harmless;
use crate::store::Store;
use crate::threads;

/// The first argument that makes kiln's program for machines a keeper.
pub const SUBCOMMAND: &str = "__ready";

/// How long whoever ordered a keeper may take to say what it wants.
const ORDER_PATIENCE: Duration = Duration::from_secs(10);

/// How long a step may run before another machine is made beside it.
const COURTESY: Duration = Duration::from_millis(300);

/// How long after a run none may have begun before a machine is made: runs that follow each other without a pause are
/// faster where nothing is made beside them.
const QUIET: Duration = Duration::from_millis(100);

/// How long the machine of a [pressed](Order::is_pressed) order waits for a run before it rehearses after all.
const PRESSURE: Duration = Duration::from_millis(500);

/// Runs that begin within this time of one another follow each other at once.
const SUCCESSION: Duration = Duration::from_secs(1);

/// Most machines of a store that wait for a step, where no build has more steps at once.
const MOST_READY: usize = 4;

/// What stands in place of a run's turn where no machine is wanted any more.
const CALLED_OFF: &str = "none";

/// How long a lender may take, beyond what it is given to wait.
pub(super) const LENDER_PATIENCE: Duration = Duration::from_secs(30);

/// Most that is told of a failure.
const MOST_FAILURE_BYTES: usize = 1000;

/// What a keeper is to hold.
#[derive(Debug, Serialize, Deserialize)]
pub struct Order {
    /// What the run that orders it said when it began.
    pub turn: String,
    /// Under which key the machine is found.
    pub key: Digest,
    /// The store. A keeper opens it for itself, as a run's temporary folder goes when the run ends.
    pub store: PathBuf,
    /// What runs it.
    pub backend: Backend,
    /// What is booted, as in [`Spec`].
    pub kernel: PathBuf,
    /// See there.
    pub initramfs: PathBuf,
    /// See there.
    pub bundle: Digest,
    /// See there.
    pub memory_bytes: u64,
    /// See there.
    pub cpus: u16,
    /// See there.
    pub cpu: Cpu,
    /// Serials of the disks that are only read; their files come along.
    pub disks: Vec<String>,
    /// How large the scratch disk is.
    pub scratch_bytes: u64,
    /// What the agent is told to rehearse: the world of such a step, without its shares.
    pub rehearsal: Vec<u8>,
    /// Whether the next run is expected to follow this one at once.
    pub is_pressed: bool,
    /// How long the machine waits for a step.
    pub idle_seconds: u64,
    /// How many may be made at a time: as many as there are steps at once.
    pub at_once: usize,
    /// How many such machines may wait.
    pub alike: usize,
    /// Whether a template may be made. In a store with a ceiling only runs make some, which know what may go for it.
    pub makes_templates: bool,
}

/// What runs a machine.
#[derive(Debug, Serialize, Deserialize)]
pub enum Backend {
    /// kiln's own VMM.
    Vmm,
    /// QEMU.
    Qemu {
        /// Where it is.
        program: PathBuf,
        /// Whether it uses KVM.
        kvm: bool,
    },
}

impl Backend {
    /// It, with `templates`.
    fn open(&self, templates: Templates) -> Result<Box<dyn Readies>, Box<dyn std::error::Error>> {
        Ok(match self {
            Self::Vmm => Box::new(KilnVmm::new(Some(templates))),
            Self::Qemu { program, kvm } => {
                let accelerator = if *kvm { Accelerator::Kvm } else { Accelerator::Tcg };
                let program = program.to_str().ok_or("a QEMU whose path is not UTF-8")?;
                Box::new(Qemu::find(program, "", accelerator)?.with_templates(templates))
            }
        })
    }
}

/// What a borrower asks.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Wish {
    /// That the guest ends.
    Stop,
    /// How the machine went; it is waited for so long.
    Death {
        /// In milliseconds.
        patience_ms: u64,
    },
    /// What the guest's kernel printed.
    Console,
}

/// What comes to a keeper's door.
pub(super) enum Caller {
    /// Somebody who wants the machine, and is answered on this stream.
    Borrower(UnixStream),
    /// Somebody who wants it to end.
    Stop,
}

// Protects the keepers that this process started: those that have ended are waited for when another is ordered, lest a build of
// many steps leaves as many behind for as long as it lives.
static STARTED: Mutex<Vec<Child>> = Mutex::new(Vec::new());

/// Starts a keeper that carries `order` out with the files of its disks, and does not wait for it. It waits a moment
/// before it takes time from the step that runs, or until the stream is dropped.
///
/// # Errors
/// It cannot be started or spoken to.
pub fn order(order: &Order, disks: &[OwnedFd]) -> io::Result<UnixStream> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut command = program::command(SUBCOMMAND)?;
    // It ends by itself, after this process or before.
    command.stdin(OwnedFd::from(theirs)).stdout(Stdio::null()).stderr(Stdio::null());
    let keeper = command.spawn()?;
    let mut started = STARTED.lock().unwrap_or_else(PoisonError::into_inner);
    started.retain_mut(|keeper| matches!(keeper.try_wait(), Ok(None)));
    started.push(keeper);
    drop(started);
    say(&ours, order)?;
    say_descriptors(&ours, disks)?;
    Ok(ours)
}

/// Runs a keeper, to its end.
pub fn main() -> ExitCode {
    // Of whoever called kiln nothing may stay open for as long as a machine waits.
    match jail::close_inherited().and_then(|()| hear_order()).and_then(|(order, files)| keep(order, files)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Where a keeper leaves why it failed.
fn failure_file(store: &Path) -> PathBuf {
    store.join("run").join("keeper.failed")
}

fn turn_file(store: &Path) -> PathBuf {
    store.join("run").join("keeper.turn")
}

/// Whether a run of the store at `store` began just now.
pub fn is_in_succession(store: &Path) -> bool {
    let began = fs::metadata(turn_file(store)).and_then(|meta| meta.modified());
    began.is_ok_and(|began| began.elapsed().is_ok_and(|since| since < SUCCESSION))
}

/// Says that a run begins in the store at `store`: what others ordered before and is not begun is not made any more. Runs
/// that belong together say the same.
///
/// # Errors
/// The store cannot be written to.
pub fn take_turn(store: &Path, turn: &str) -> io::Result<()> {
    fs::write(turn_file(store), turn)
}

/// Lets what is being made in the store at `store` not be kept, until another run begins.
///
/// # Errors
/// The store cannot be written to.
pub fn call_off(store: &Path) -> io::Result<()> {
    take_turn(store, CALLED_OFF)
}

/// A seat for one that makes a machine, where there are `most`, and how many others are taken; none where all are.
fn take_seat(run: &Path, most: usize) -> io::Result<Option<(File, usize)>> {
    let (mut ours, mut others) = (None, 0);
    for number in 0..most {
        let seat = File::create(run.join(format!("keeper.{number}.lock")))?;
        match (seat.try_lock(), &ours) {
            (Ok(()), None) => ours = Some(seat),
            (Ok(()), Some(_)) => {}
            (Err(_), _) => others += 1,
        }
    }
    Ok(ours.map(|seat| (seat, others)))
}

/// Why the last keeper of the store at `store` failed, once.
pub fn take_failure(store: &Path) -> Option<String> {
    let path = failure_file(store);
    let why = fs::read(&path).ok()?;
    fs::remove_file(path).ok()?;
    Some(harmless(&why[..why.len().min(MOST_FAILURE_BYTES)]))
}

/// What is wanted, once there is time for it.
fn hear_order() -> io::Result<(Order, Vec<OwnedFd>)> {
    let _ = rustix::thread::set_name(c"kiln");
    rustix::process::setsid()?;
    let caller = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    caller.set_read_timeout(Some(ORDER_PATIENCE))?;
    let order: Order = hear(&caller)?;
    let files = hear_descriptors(&caller, order.disks.len())?;
    if !order.is_pressed {
        caller.set_read_timeout(Some(COURTESY))?;
        let over = hear::<()>(&caller).is_err_and(|error| error.kind() == io::ErrorKind::UnexpectedEof);
        if over {
            thread::sleep(QUIET);
        }
    }
    drop(caller);
    rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
    Ok((order, files))
}

fn keep(order: Order, files: Vec<OwnedFd>) -> io::Result<()> {
    let place = order.store.clone();
    let ends = make_and_hold(order, files);
    if let Err(error) = &ends {
        // Nobody hears it now; the next run that finds no machine does.
        let _ = fs::write(failure_file(&place), error.to_string());
    }
    ends.map_err(|error| io::Error::other(error.to_string()))
}

fn make_and_hold(order: Order, files: Vec<OwnedFd>) -> Result<(), Box<dyn std::error::Error>> {
    let store = Store::open(&order.store)?;
    let registry = Registry::open(&store.run())?;
    let idle = Duration::from_secs(order.idle_seconds);
    // For the run that began last, and as many at a time as have steps at once: more would take from each other's time,
    // and from that of steps.
    let Some((making, others)) = take_seat(&store.run(), order.at_once)? else { return Ok(()) };
    let alike = order.alike.saturating_sub(others);
    // None is ended for one that would not fit all the same.
    if fs::read_to_string(turn_file(&order.store))? != order.turn
        || !has_room(0, order.memory_bytes, others, available_bytes())
        || !registry.make_room(&order.key, alike, MOST_READY.max(order.alike))
        || !has_room(registry.promised_bytes(), order.memory_bytes, others, available_bytes())
    {
        return Ok(());
    }
    let disks = order.disks.into_iter().zip(files);
    let mut disks: Vec<Disk> = disks.map(|(serial, file)| Disk { serial, file, read_only: true }).collect();
    disks.push(scratch::disk(&store.temporary(), order.scratch_bytes)?);
    let spec = Spec {
        kernel: order.kernel,
        initramfs: order.initramfs,
        bundle: order.bundle,
        memory_bytes: order.memory_bytes,
        cpus: order.cpus,
        shares: Vec::new(),
        disks,
        carrier: Carrier::Serial,
        cpu: order.cpu,
        network: false,
        rehearsal: Some(order.rehearsal.clone()),
    };
    let mut templates = Templates::new(store.templates(), store.temporary());
    if !order.makes_templates {
        templates = templates.with_room(|_| Err(io::ErrorKind::StorageFull.into()));
    }
    let backend = order.backend.open(templates)?;
    // The files may have changed since they were named.
    if backend.ready_key(&spec)? != Some(order.key) {
        return Err("the machine would not be the one that was ordered".into());
    }
    let Some(mut ready) = backend.make_ready(&spec)? else { return Ok(()) };
    if !order.is_pressed {
        ready.rehearse(&order.rehearsal)?;
    }
    let entry = Entry::ready(&spec, ready.identity(), &order.key, idle);
    let (sender, callers) = channel();
    watch(&ready, sender.clone())?;
    let registration = registry.register_ready(entry, sender)?;
    drop(making);
    // Looked at when it can be found: whoever calls it off looks for it after that.
    if fs::read_to_string(turn_file(&order.store))? == CALLED_OFF {
        return Ok(());
    }
    let first = match order.is_pressed {
        true => callers.recv_timeout(PRESSURE),
        false => Err(RecvTimeoutError::Timeout),
    };
    let has_rehearsed = matches!(first, Err(RecvTimeoutError::Timeout));
    if has_rehearsed && order.is_pressed {
        // Whoever comes meanwhile waits for it as long as for any that is ready.
        ready.rehearse(&order.rehearsal)?;
    }
    let caller = if has_rehearsed { callers.recv_timeout(idle) } else { first };
    let Ok(Caller::Borrower(stream)) = caller else { return Ok(()) };
    drop(registration);
    // A borrower that is gone is no failure.
    let _ = lend(ready, &stream, has_rehearsed);
    Ok(())
}

/// Whether of `available_bytes` there is enough for what machines that are ready may grow to: `promised_bytes`, and for this one and
/// `others` that are being made `each_bytes`.
fn has_room(promised_bytes: u64, each_bytes: u64, others: usize, available_bytes: u64) -> bool {
    let made = u64::try_from(others).unwrap_or(u64::MAX).saturating_add(1);
    promised_bytes.saturating_add(each_bytes.saturating_mul(made)) < available_bytes
}

/// Tells `owner` when the machine is gone: nothing else would, while nobody speaks to it.
fn watch(ready: &Ready, owner: Sender<Caller>) -> io::Result<()> {
    let [wire, _] = ready.descriptors()?;
    threads::start_small("watch", move || {
        let mut fds = [PollFd::new(&wire, PollFlags::RDHUP)];
        while poll(&mut fds, None).is_err_and(|errno| errno == rustix::io::Errno::INTR) {}
        let _ = owner.send(Caller::Stop);
    })?;
    Ok(())
}

/// Lends `ready` to the borrower at the other end of `stream`, until its step is over.
fn lend(mut ready: Ready, stream: &UnixStream, has_rehearsed: bool) -> io::Result<()> {
    if let Err(error) = ready.check() {
        return say(stream, &Answer::Refused(format!("it does not answer: {error}")));
    }
    say(stream, &Answer::Granted)?;
    say(stream, &(ready.identity(), has_rehearsed, ready.notes()))?;
    say_descriptors(stream, &ready.descriptors()?)?;
    stream.set_read_timeout(None)?;
    // Ends when the borrower does, whatever ended that.
    while let Ok(wish) = hear(stream) {
        match wish {
            Wish::Stop => {
                ready.stop();
                say(stream, &())?;
            }
            Wish::Death { patience_ms } => {
                say(stream, &ready.machine().death(Duration::from_millis(patience_ms)))?;
            }
            Wish::Console => say(stream, &ready.machine().console())?,
        }
    }
    Ok(())
}

/// The connection to the keeper of a machine that was lent.
pub(super) struct Lifeline {
    stream: UnixStream,
    /// The keeper, where the system says.
    pid: Option<Pid>,
    /// The same, where the system has descriptors of processes.
    process: Option<OwnedFd>,
}

impl Lifeline {
    /// Over a stream on which the keeper has just answered.
    pub fn new(stream: UnixStream) -> Self {
        let pid = rustix::net::sockopt::socket_peercred(&stream).ok().map(|peer| peer.pid);
        let process = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        Self { stream, pid, process }
    }

    /// What the keeper answers. One that a signal stopped goes on; one that does not answer all the same is killed, and its machine
    /// with it.
    fn ask<T: DeserializeOwned>(&self, wish: &Wish) -> io::Result<T> {
        self.signal(Signal::CONT);
        let answer = say(&self.stream, wish).and_then(|()| hear(&self.stream));
        if matches!(&answer, Err(error) if error.kind() == io::ErrorKind::WouldBlock) {
            self.signal(Signal::KILL);
        }
        answer
    }

    fn signal(&self, signal: Signal) {
        // One that is gone hears nothing.
        let _ = self.process.as_ref().map(|process| pidfd_send_signal(process, signal));
    }
}

impl Drop for Lifeline {
    fn drop(&mut self) {
        // It ends when the stream does, which one that a signal stopped would not notice.
        self.signal(Signal::CONT);
    }
}

impl Lender for Lifeline {
    fn stop(&mut self) -> io::Result<()> {
        self.ask(&Wish::Stop)
    }

    fn death(&mut self, patience: Duration) -> io::Result<Death> {
        let patience_ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
        self.stream.set_read_timeout(Some(LENDER_PATIENCE.saturating_add(patience)))?;
        self.ask(&Wish::Death { patience_ms })
    }

    fn console(&self) -> io::Result<String> {
        self.ask(&Wish::Console)
    }

    fn process(&self) -> Option<i32> {
        self.pid.map(Pid::as_raw_pid)
    }
}

/// What a borrower gets of a keeper.
pub struct Loan {
    /// What the machine is.
    pub identity: Identity,
    /// Whether it has rehearsed.
    pub has_rehearsed: bool,
    /// What the user should know of how it came to be.
    pub notes: Vec<String>,
    /// The wire, and the connection to the device process.
    pub descriptors: [OwnedFd; 2],
    /// Its keeper.
    pub lender: Box<dyn Lender>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_are_made_where_all_that_there_will_be_have_room_to_grow() {
        assert!(has_room(0, 100, 0, 101) && !has_room(0, 100, 0, 100));
        assert!(has_room(300, 100, 2, 601) && !has_room(300, 100, 2, 600));
        assert!(!has_room(1, u64::MAX, 3, u64::MAX));
    }
}
