//! The parent's half of starting a process: the request that `launch` receives, and the child as a value.
//!
//! The signal that a child gets when its parent dies follows the *thread* that started it. So one thread starts
//! all children and lives as long as kiln does.

use std::io::{self, BufRead, BufReader, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Sender};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::retry_on_intr;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

use super::Failure;
use super::jail::Held;
use super::launch::{Become, MAX_DESCRIPTORS, MAX_REQUEST_BYTES, Request, SUBCOMMAND, Word, machine_name};
use super::program;
use super::tail::Tail;
use crate::threads::{self, Refused};

/// How long the last words of a process may take to be read after its end. A child of its own may hold its standard error.
const LAST_WORDS_PATIENCE: Duration = Duration::from_millis(500);

/// A child that is killed and reaped when dropped.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    /// As what it goes on, where it does.
    successor: Option<Successor>,
    stderr: Tail,
}

/// Another child, in whose place the first one ended. Nobody else waits for it, so its number is its own until it has ended.
#[derive(Debug)]
struct Successor {
    number: Pid,
    ended: Option<ExitStatus>,
}

impl Successor {
    fn wait(&mut self, options: WaitOptions) -> io::Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            let ended = retry_on_intr(|| waitpid(Some(self.number), options))?;
            self.ended = ended.map(|(_, status)| ExitStatus::from_raw(status.as_raw()));
        }
        Ok(self.ended)
    }

    fn kill(&self) {
        if self.ended.is_none() {
            let _ = kill_process(self.number, Signal::KILL);
        }
    }
}

impl Process {
    /// Its number.
    pub fn number(&self) -> Option<i32> {
        match &self.successor {
            Some(successor) => Some(successor.number.as_raw_pid()),
            None => i32::try_from(self.child.id()).ok(),
        }
    }

    fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        match &mut self.successor {
            Some(successor) => successor.wait(WaitOptions::NOHANG),
            None => self.child.try_wait(),
        }
    }

    /// From now on it is the child `number`; what was started has ended, or is about to.
    fn goes_on_as(&mut self, number: i32) -> io::Result<()> {
        let number = Pid::from_raw(number).ok_or(io::ErrorKind::InvalidData)?;
        self.successor = Some(Successor { number, ended: None });
        self.child.wait().map(drop)
    }

    /// The end of its standard error, on one line.
    pub fn said(&self) -> String {
        match self.failure() {
            Some(failure) => failure.said,
            None => self.stderr.text().trim().replace('\n', "; "),
        }
    }

    /// Why it could not become what it was to be, or not be it any more, if it is a kiln and said so.
    pub fn failure(&self) -> Option<Failure> {
        self.stderr.text().lines().find_map(Failure::of_line)
    }

    /// Waits until all is read that it said, where it has ended or is about to; not for long.
    pub fn has_said_all(&self) {
        self.stderr.wait_for_end(LAST_WORDS_PATIENCE);
    }

    /// Whether all that it wrote to its standard error is lines, and there is one.
    pub fn has_said_a_line(&self) -> bool {
        self.stderr.text().ends_with('\n')
    }

    /// Hangs up on `stream` when the process ends: whoever waits at its other half then learns that.
    pub fn hang_up_at_end(&self, stream: UnixStream) {
        self.stderr.hang_up_at_end(stream);
    }

    /// Its standard output, where it was asked for; once.
    pub fn take_stdout(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// Its exit status, if it ends within `patience`. What it said is all there then.
    pub fn wait(&mut self, patience: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            match self.try_wait() {
                Ok(Some(status)) => {
                    self.has_said_all();
                    return Some(status);
                }
                Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(2)),
                _ => return None,
            }
        }
    }
}

impl Process {
    /// Kills and reaps it, if it still runs.
    pub fn stop(&mut self) {
        match &mut self.successor {
            Some(successor) => {
                successor.kill();
                let _ = successor.wait(WaitOptions::empty());
            }
            None => {
                let _ = self.child.kill();
                let _ = self.child.wait();
            }
        }
    }
}

impl Process {
    /// Kills all that is in the process group that it leads, and reaps it. It must still run.
    pub fn stop_group(&mut self) {
        if let Some(group) = self.number().and_then(Pid::from_raw) {
            let _ = rustix::process::kill_process_group(group, Signal::KILL);
        }
        self.stop();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What [`in_words`] says of a process that got SIGKILL.
pub(super) const KILLED: &str = "killed by signal 9";

/// How a process ended.
pub(super) fn in_words(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => io::Error::last_os_error().to_string(),
    }
}

type Job = (Command, Sender<io::Result<Child>>);

fn spawner() -> io::Result<Sender<Job>> {
    // Protects that there is one thread at most.
    static SPAWNER: Mutex<Option<Sender<Job>>> = Mutex::new(None);
    let mut spawner = SPAWNER.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(sender) = &*spawner {
        return Ok(sender.clone());
    }
    let (sender, jobs) = mpsc::channel::<Job>();
    threads::start("spawner", move || {
        for (mut command, answer) in jobs {
            let _ = answer.send(command.spawn().map_err(Refused::told("process")));
        }
    })?;
    Ok(spawner.insert(sender).clone())
}

/// How long a child may take to lock itself in. It takes milliseconds; a loaded host may need a network namespace
/// more than it has time for.
const JAIL_PATIENCE: Duration = Duration::from_secs(30);
/// Most bytes of what it says about its jail.
const MOST_REPLY_BYTES: u64 = 16 << 10;

/// Starts a child that becomes `what` in its jail, holding `descriptors` by name, and says what of the jail holds.
///
/// # Errors
/// What starting it or sending its request says; what the child says where it cannot be locked in.
pub(super) fn spawn_jailed(what: Become, descriptors: &[(String, OwnedFd)]) -> io::Result<(Process, Held)> {
    let (mut process, stream) = start(what, descriptors)?;
    stream.set_read_timeout(Some(JAIL_PATIENCE))?;
    match hear(&mut process, stream) {
        Ok(held) => Ok((process, held)),
        Err(error) => {
            process.wait(Duration::from_secs(1));
            let said = process.said().trim_start_matches("kiln: ").to_owned();
            Err(io::Error::other(if said.is_empty() { error.to_string() } else { said }))
        }
    }
}

/// What of the jail holds around `process`, in its own words, which come over `stream`.
fn hear(process: &mut Process, stream: UnixStream) -> io::Result<Held> {
    for line in BufReader::new(stream.take(MOST_REPLY_BYTES)).lines() {
        match serde_json::from_str(&line?)? {
            Word::WentOn(number) => process.goes_on_as(number)?,
            Word::Held(held) => return Ok(held),
        }
    }
    Err(io::Error::other("it ended without a word"))
}

/// Starts a child that becomes `what`, holding `descriptors` by name.
///
/// # Errors
/// What starting it or sending its request says.
pub(super) fn spawn(what: Become, descriptors: &[(String, OwnedFd)]) -> io::Result<Process> {
    start(what, descriptors).map(|(process, _)| process)
}

fn start(what: Become, descriptors: &[(String, OwnedFd)]) -> io::Result<(Process, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    let parent = rustix::process::getpid().as_raw_pid();
    let mut command = program::command(SUBCOMMAND)?;
    command.arg(machine_name(parent)).stdin(OwnedFd::from(theirs)).stderr(Stdio::piped());
    command.stdout(if matches!(what, Become::KvmProbe | Become::Attempt(_) | Become::Fetcher(_)) {
        Stdio::piped()
    } else {
        Stdio::null()
    });
    let (sender, answer) = mpsc::channel();
    let gone = |_| io::Error::other("the thread that starts processes is gone");
    spawner()?.send((command, sender)).map_err(|_| gone(mpsc::RecvError))?;
    let mut child = answer.recv().map_err(gone)??;
    let stderr = child.stderr.take();
    // Killed with it where it cannot be followed.
    let mut process = Process { child, successor: None, stderr: Tail::default() };
    if let Some(stderr) = stderr {
        process.stderr = Tail::follow(stderr)?;
    }

    let request =
        Request { parent, what, descriptors: descriptors.iter().map(|(name, _)| name.clone()).collect() };
    let bytes = serde_json::to_vec(&request)?;
    if bytes.len() > MAX_REQUEST_BYTES || descriptors.len() > MAX_DESCRIPTORS {
        return Err(io::Error::other("a machine has too many parts"));
    }
    let borrowed: Vec<BorrowedFd<'_>> =
        descriptors.iter().map(|(_, descriptor)| descriptor.as_fd()).collect();
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&borrowed));
    }
    let sent = rustix::net::sendmsg(&ours, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
    if sent != bytes.len() {
        return Err(io::Error::other("the request was cut short"));
    }
    Ok((process, ours))
}
