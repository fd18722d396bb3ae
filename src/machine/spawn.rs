//! The parent's half of starting a process: the request that `launch` receives, and the child as a value.
//!
//! The signal that a child gets when its parent dies follows the *thread* that started it. So one thread starts
//! all children and lives as long as kiln does.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::launch::{Become, MAX_DESCRIPTORS, MAX_REQUEST_BYTES, Request, SUBCOMMAND};
use super::tail::Tail;

/// A child that is killed and reaped when dropped.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    stderr: Tail,
}

impl Process {
    /// The end of its standard error, on one line.
    pub fn said(&self) -> String {
        self.stderr.text().trim().replace('\n', "; ")
    }

    /// Hangs up on `stream` when the process ends: whoever waits at its other half then learns that.
    pub fn hang_up_at_end(&self, stream: UnixStream) {
        self.stderr.hang_up_at_end(stream);
    }

    /// Its standard output, where it was asked for; once.
    pub fn take_stdout(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// Its exit status, if it ends within `patience`.
    pub fn wait(&mut self, patience: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(2)),
                _ => return None,
            }
        }
    }
}

impl Process {
    /// Kills and reaps it, if it still runs.
    pub fn stop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.stop();
    }
}

type Job = (Command, Sender<io::Result<Child>>);

fn spawner() -> &'static Sender<Job> {
    static SPAWNER: OnceLock<Sender<Job>> = OnceLock::new();
    SPAWNER.get_or_init(|| {
        let (sender, jobs) = mpsc::channel::<Job>();
        thread::spawn(move || {
            for (mut command, answer) in jobs {
                let _ = answer.send(command.spawn());
            }
        });
        sender
    })
}

/// Starts a child that becomes `what`, holding `descriptors` by name.
///
/// # Errors
/// What starting it or sending its request says.
pub(super) fn spawn(what: Become, descriptors: &[(String, OwnedFd)]) -> io::Result<Process> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut command = Command::new("/proc/self/exe");
    command.arg(SUBCOMMAND).env_clear().current_dir("/").stdin(OwnedFd::from(theirs)).stderr(Stdio::piped());
    command.stdout(if matches!(what, Become::KvmProbe) { Stdio::piped() } else { Stdio::null() });
    let (sender, answer) = mpsc::channel();
    let gone = |_| io::Error::other("the thread that starts processes is gone");
    spawner().send((command, sender)).map_err(|_| gone(mpsc::RecvError))?;
    let mut child = answer.recv().map_err(gone)??;
    let stderr = child.stderr.take().map(Tail::follow).unwrap_or_default();
    let process = Process { child, stderr };

    let request = Request {
        parent: rustix::process::getpid().as_raw_pid(),
        what,
        descriptors: descriptors.iter().map(|(name, _)| name.clone()).collect(),
    };
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
    Ok(process)
}
