//! A running command as the agent sees it: its pipes, its deadline, and what becomes of it.
//!
//! The session polls what [`Command::interests`] names and calls [`Command::advance`] with what it found.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use kiln_wire::{Exec, FromAgent, MAX_DATA_BYTES, Outcome, Stream, Usage};
use rustix::buffer::spare_capacity;
use rustix::event::PollFlags;
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::io::{Errno, read, write};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::failure::cut;
use crate::link::Link;
use crate::meter::Meter;
use crate::program::Program;
use crate::reap::{self, Ends, Kill, MAX_REFUSAL_BYTES, Refusal, Stage, Verdict};
use crate::sys::{self, Fork};

/// Room in the pipes of standard output and error: fewer, larger reads. More would only let the command run further
/// ahead of the host.
const PIPE_BYTES: usize = MAX_DATA_BYTES;

/// Above this much unread standard input the agent stops listening to the host.
const STDIN_BYTES: usize = 1 << 20;

/// A command that was started and whose end the host does not know yet.
pub struct Command {
    id: u32,
    init: Pid,
    init_fd: OwnedFd,
    control: OwnedFd,
    report: Option<OwnedFd>,
    refusal: Option<Refusal>,
    /// Its working directory, for the case that it is not there.
    folder: Vec<u8>,
    stdin: Option<OwnedFd>,
    stdin_bytes: Vec<u8>,
    stdin_ends: bool,
    outputs: [(Stream, Option<OwnedFd>); 2],
    started: Instant,
    deadline: Option<Instant>,
    grace: Duration,
    timed_out: bool,
    usage: Usage,
    oom_kills_before: u64,
    /// Set once all its processes are gone.
    end: Option<Option<Verdict>>,
}

/// A command that could not even be tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("starting a command: {0}")]
pub struct StartError(#[from] pub Errno);

impl Command {
    /// Starts a command. `null` is an open `/dev/null`.
    ///
    /// # Errors
    /// The machine has no room for it.
    pub fn start(exec: &Exec, null: &OwnedFd, meter: &Meter) -> Result<Self, StartError> {
        let program = Program::new(exec)?;
        let (stdin_read, stdin_write) = if exec.stdin {
            let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC)?;
            fcntl_setfl(&write_end, OFlags::NONBLOCK)?;
            (read_end, Some(write_end))
        } else {
            (null.try_clone().map_err(|_| Errno::MFILE)?, None)
        };
        let (stdout_read, stdout_write) = output_pipe()?;
        let (stderr_read, stderr_write) = output_pipe()?;
        let (report_read, report_write) = pipe_with(PipeFlags::CLOEXEC)?;
        fcntl_setfl(&report_read, OFlags::NONBLOCK)?;
        let (control, init_control) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        fcntl_setfl(&control, OFlags::NONBLOCK)?;
        let ends = Ends {
            stdin: stdin_read,
            stdout: stdout_write,
            stderr: stderr_write,
            report: report_write,
            control: init_control,
        };
        let oom_kills_before = meter.oom_kills();
        let usage = Usage { peak_memory_bytes: meter.used_bytes(), ..Usage::default() };
        let started = Instant::now();
        let init = match sys::fork(libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWIPC)? {
            Fork::Child => reap::run(&program, &ends),
            Fork::Parent { child } => child,
        };
        // Not racy: nobody but this process waits for it, so its number is its own until then.
        let init_fd = pidfd_open(init, PidfdFlags::NONBLOCK)?;
        Ok(Self {
            id: exec.id,
            init,
            init_fd,
            control,
            report: Some(report_read),
            refusal: None,
            folder: exec.cwd.clone(),
            stdin: stdin_write,
            stdin_bytes: Vec::new(),
            stdin_ends: false,
            outputs: [(Stream::Stdout, Some(stdout_read)), (Stream::Stderr, Some(stderr_read))],
            started,
            deadline: deadline(started, exec.timeout_ms),
            grace: Duration::from_millis(exec.grace_ms),
            timed_out: false,
            usage,
            oom_kills_before,
            end: None,
        })
    }

    /// What to poll, and for what. `has_room`: whether output may be read.
    pub fn interests(&self, has_room: bool) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        let stdin = self.stdin.as_ref().filter(|_| !self.stdin_bytes.is_empty());
        let outputs = self.outputs.iter().filter_map(|(_, fd)| fd.as_ref()).filter(move |_| has_room);
        let init = self.end.is_none().then_some(&self.init_fd);
        let inputs = init.into_iter().chain(&self.report).chain(outputs);
        inputs.map(|fd| (fd.as_fd(), PollFlags::IN)).chain(stdin.map(|fd| (fd.as_fd(), PollFlags::OUT)))
    }

    /// When [`Command::advance`] must be called even if nothing happens.
    pub fn wake_at(&self) -> Option<Instant> {
        self.deadline.filter(|_| self.end.is_none())
    }

    /// Whether the agent should stop listening to the host until the command has read.
    pub fn is_full(&self) -> bool {
        self.stdin_bytes.len() >= STDIN_BYTES
    }

    /// Takes bytes for standard input; none: its end.
    pub fn feed(&mut self, data: &[u8]) {
        if data.is_empty() {
            self.stdin_ends = true;
        } else if self.stdin.is_some() && !self.stdin_ends {
            self.stdin_bytes.extend_from_slice(data);
        }
        self.write_stdin();
    }

    /// Passes a signal to the command's process group.
    pub fn signal(&self, signal: u8) {
        self.kill(Kill::Group(signal));
    }

    /// Ends everything of the command at once.
    pub fn kill_now(&self) {
        // ESRCH: it has ended already.
        let _ = pidfd_send_signal(&self.init_fd, Signal::KILL);
    }

    fn kill(&self, kill: Kill) {
        // Fails when init has ended, or when it has more to do than a socket holds: later ones will not be missed.
        let _ = send(&self.control, &kill.encode(), SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
    }

    /// Notes how much memory is in use.
    pub fn sample(&mut self, used_bytes: u64) {
        self.usage.peak_memory_bytes = self.usage.peak_memory_bytes.max(used_bytes);
    }

    /// Does what can be done without waiting. Returns true when the command is over and the host was told.
    pub fn advance(&mut self, now: Instant, link: &mut Link, meter: &Meter) -> bool {
        self.read_report(link);
        self.write_stdin();
        if self.end.is_none() {
            self.reap(now, meter);
        }
        // After looking whether it has ended: one that ended in time has not timed out because the agent was late.
        self.enforce_deadline(now);
        self.read_outputs(link);
        let Some(verdict) = self.end else { return false };
        if self.outputs.iter().any(|(_, fd)| fd.is_some()) {
            return false;
        }
        link.queue(&match &self.refusal {
            Some(Refusal { stage: Stage::Program, errno, why }) => {
                FromAgent::ExecFailed { id: self.id, errno: *errno, why: cut(why.clone()) }
            }
            // Not the program's fault: what it was to run in could not be made.
            Some(Refusal { stage, errno, .. }) => {
                FromAgent::Failed { what: cut(self.attempt(*stage)), errno: *errno }
            }
            None => FromAgent::Exited { id: self.id, outcome: self.outcome(verdict), usage: self.usage },
        });
        true
    }

    fn outcome(&self, verdict: Option<Verdict>) -> Outcome {
        match verdict {
            _ if self.timed_out => Outcome::TimedOut,
            Some(Verdict::Exit(status)) => Outcome::Exit(status),
            Some(Verdict::Signal(signal)) => Outcome::Signal(signal),
            // Its init was killed.
            None => Outcome::Signal(9),
        }
    }

    /// What was being done for the command, in words.
    fn attempt(&self, stage: Stage) -> String {
        match stage {
            Stage::World => "making the command's namespaces".to_owned(),
            Stage::Process => "preparing the command's process".to_owned(),
            Stage::Folder => format!("entering the working directory `{}`", self.folder.escape_ascii()),
            Stage::Program => "executing the program".to_owned(),
        }
    }

    /// The report pipe ends when the program is executed; before that it tells why it was not.
    fn read_report(&mut self, link: &mut Link) {
        let Some(report) = &self.report else { return };
        let mut bytes = [0; MAX_REFUSAL_BYTES];
        let length = match read(report, &mut bytes) {
            Err(Errno::AGAIN | Errno::INTR) => return,
            result => result.unwrap_or_default(),
        };
        self.refusal = Refusal::decode(bytes.get(..length).unwrap_or_default());
        if self.refusal.is_none() {
            link.queue(&FromAgent::Started { id: self.id });
        }
        self.report = None;
    }

    fn write_stdin(&mut self) {
        let Some(stdin) = &self.stdin else { return };
        while !self.stdin_bytes.is_empty() {
            match write(stdin, &self.stdin_bytes) {
                Ok(length) => drop(self.stdin_bytes.drain(..length)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                // Nobody reads any more.
                Err(_) => {
                    self.stdin_bytes = Vec::new();
                    self.stdin_ends = true;
                }
            }
        }
        if self.stdin_ends {
            self.stdin = None;
        }
    }

    /// At the first deadline everything gets SIGTERM, at the second SIGKILL.
    fn enforce_deadline(&mut self, now: Instant) {
        if self.end.is_some() || self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        if self.timed_out || self.grace.is_zero() {
            self.deadline = None;
            self.kill_now();
        } else {
            self.deadline = now.checked_add(self.grace);
            self.kill(Kill::All(15));
        }
        self.timed_out = true;
    }

    /// Takes note of the end of init, which is the end of everything of the command.
    fn reap(&mut self, now: Instant, meter: &Meter) {
        let rusage = match sys::wait(Some(self.init), false) {
            Ok(None) | Err(Errno::INTR) => return,
            Ok(Some(ended)) => Some(ended.rusage),
            Err(_) => None,
        };
        let mut packet = [0; 2];
        let verdict = matches!(read(&self.control, &mut packet), Ok(2)).then(|| Verdict::decode(packet));
        self.end = Some(verdict);
        self.stdin = None;
        self.stdin_bytes = Vec::new();
        self.sample(meter.used_bytes());
        self.usage.wall_us = microseconds(now.saturating_duration_since(self.started));
        let oom_kills = meter.oom_kills().saturating_sub(self.oom_kills_before);
        self.usage.oom_kills = u32::try_from(oom_kills).unwrap_or(u32::MAX);
        if let Some(rusage) = rusage {
            self.usage.user_us = timeval_us(rusage.ru_utime);
            self.usage.system_us = timeval_us(rusage.ru_stime);
            self.usage.max_rss_bytes = u64::try_from(rusage.ru_maxrss).unwrap_or(0).saturating_mul(1024);
        }
    }

    /// Sends what has been written, as far as the host keeps up. Once the processes are gone, an empty pipe stays
    /// empty: it is at its end even if a descriptor to it was handed out of the namespace.
    fn read_outputs(&mut self, link: &mut Link) {
        let ended = self.end.is_some();
        for (stream, output) in &mut self.outputs {
            while let Some(fd) = output.as_ref().filter(|_| link.has_room()) {
                // Not zeroed first: most reads are short.
                let mut data = Vec::with_capacity(MAX_DATA_BYTES);
                match read(fd, spare_capacity(&mut data)) {
                    Ok(length @ 1..) => {
                        link.queue(&FromAgent::Output { id: self.id, stream: *stream, data });
                        if length < PIPE_BYTES && !ended {
                            break;
                        }
                    }
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) if !ended => break,
                    Ok(_) | Err(_) => *output = None,
                }
            }
        }
    }
}

fn output_pipe() -> Result<(OwnedFd, OwnedFd), Errno> {
    let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC)?;
    fcntl_setfl(&read_end, OFlags::NONBLOCK)?;
    fcntl_setpipe_size(&write_end, PIPE_BYTES)?;
    Ok((read_end, write_end))
}

/// `None`: never, as is a moment that no clock reaches.
fn deadline(started: Instant, timeout_ms: u64) -> Option<Instant> {
    started.checked_add(Duration::from_millis(timeout_ms)).filter(|_| timeout_ms > 0)
}

fn microseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn timeval_us(time: libc::timeval) -> u64 {
    let part = |value| u64::try_from(value).unwrap_or(0);
    part(time.tv_sec).saturating_mul(1_000_000).saturating_add(part(time.tv_usec))
}
