//! A running command as the agent sees it: its pipes or its terminal, its deadline, and what becomes of it.
//!
//! The session polls what [`Command::interests`] names and calls [`Command::advance`] with what it found.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use kiln_wire::{
    Credit, Deadline, Exec, FromAgent, MAX_DATA_BYTES, Outcome, Stream, Taken, TerminalSize, Usage,
};
use rustix::event::PollFlags;
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::io::{Errno, read, write};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::failure::cut;
use crate::group::Group;
use crate::link::Link;
use crate::meter::Meter;
use crate::program::Program;
use crate::reap::{self, Ends, Kill, MAX_REFUSAL_BYTES, Refusal, Stage, Verdict};
use crate::sys::{self, Fork};
use crate::terminal::{END_OF_FILE, Terminal};

/// Room in the pipes of standard output and error: fewer, larger reads. More would only let the command run further
/// ahead of the host.
const PIPE_BYTES: usize = MAX_DATA_BYTES;

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
    /// How much more input the host may send, and what of it was taken without the host's knowing.
    stdin_credit: Credit,
    stdin_taken: Taken,
    terminal: Option<Terminal>,
    outputs: [(Stream, Option<OwnedFd>); 2],
    buffer: Box<[u8]>,
    /// How much more output the host takes.
    output_credit: Credit,
    started: Instant,
    deadline: Option<Deadline>,
    grace: Duration,
    timed_out: bool,
    usage: Usage,
    oom_kills_before: u64,
    refusals_before: u64,
    /// Set once all its processes are gone.
    end: Option<Option<Verdict>>,
}

/// A command that could not even be tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("starting a command: {0}")]
pub struct StartError(#[from] pub Errno);

impl Command {
    /// Starts a command. `null` is an open `/dev/null`, `terminals` the step's devpts.
    ///
    /// # Errors
    /// The machine has no room for it.
    pub fn start(
        exec: &Exec,
        null: &OwnedFd,
        terminals: &OwnedFd,
        meter: &Meter,
    ) -> Result<Self, StartError> {
        let program = Program::new(exec)?;
        let Streams { terminal, stdin, outputs, theirs } = match exec.terminal {
            Some(size) => Streams::terminal(Terminal::open(terminals, size)?, exec.stdin)?,
            None => Streams::pipes(exec.stdin, null)?,
        };
        let [stdin_read, stdout_write, stderr_write] = theirs;
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
            controls_terminal: terminal.is_some(),
        };
        let oom_kills_before = meter.oom_kills();
        let refusals_before = meter.refusals();
        let usage = Usage { peak_memory_bytes: meter.used_bytes(), ..Usage::default() };
        let started = Instant::now();
        let group = meter.group.as_ref().map(Group::place);
        let init = match sys::fork_into(sys::OWN_WORLD, group)? {
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
            stdin,
            stdin_bytes: Vec::new(),
            stdin_ends: false,
            stdin_credit: Credit::default(),
            stdin_taken: Taken::default(),
            terminal,
            outputs,
            buffer: vec![0; MAX_DATA_BYTES].into(),
            output_credit: Credit::default(),
            started,
            deadline: (exec.timeout_ms > 0)
                .then(|| Deadline::after(Duration::from_millis(exec.timeout_ms), started)),
            grace: Duration::from_millis(exec.grace_ms),
            timed_out: false,
            usage,
            oom_kills_before,
            refusals_before,
            end: None,
        })
    }

    /// What to poll, and for what. `has_room`: whether output may be read.
    pub fn interests(&self, has_room: bool) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        let stdin = self.stdin.as_ref().filter(|_| !self.stdin_bytes.is_empty());
        let has_room = has_room && self.output_credit.left() > 0;
        let outputs = self.outputs.iter().filter_map(|(_, fd)| fd.as_ref()).filter(move |_| has_room);
        let init = self.end.is_none().then_some(&self.init_fd);
        let inputs = init.into_iter().chain(&self.report).chain(outputs);
        inputs.map(|fd| (fd.as_fd(), PollFlags::IN)).chain(stdin.map(|fd| (fd.as_fd(), PollFlags::OUT)))
    }

    /// When [`Command::advance`] must be called even if nothing happens.
    pub fn wake_at(&self) -> Option<Instant> {
        self.deadline.as_ref().filter(|_| self.end.is_none()).map(Deadline::next)
    }

    /// Takes bytes for standard input; none: its end. They are written by [`Command::advance`]. Returns false where they
    /// are more than the host was allowed.
    #[must_use]
    pub fn feed(&mut self, data: &[u8]) -> bool {
        if !self.stdin_credit.spend(data.len()) {
            return false;
        }
        if self.stdin_ends {
            return true;
        }
        self.stdin_bytes.extend_from_slice(data);
        if data.is_empty() {
            self.stdin_ends = true;
            if self.terminal.is_some() {
                self.stdin_bytes.push(END_OF_FILE);
            }
        }
        true
    }

    /// The host has taken so much of the output. Returns false where it was not sent so much.
    #[must_use]
    pub fn regain(&mut self, bytes: u32) -> bool {
        self.output_credit.regain(bytes)
    }

    /// Gives its terminal another size; nothing where it has none.
    pub fn resize(&self, size: TerminalSize) {
        // It cannot fail in a way that the host could do anything about.
        let _ = self.terminal.as_ref().map(|terminal| terminal.resize(size));
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
        self.write_stdin(link);
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
            Some(Refusal { stage, errno, why }) => {
                let what = cut(self.attempt(*stage));
                FromAgent::ExecFailed { id: self.id, what, errno: *errno, why: cut(why.clone()) }
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

    /// What was being done for the command, in words; nothing where it is the program's own fault.
    fn attempt(&self, stage: Stage) -> String {
        match stage {
            Stage::World => "making the command's namespaces".to_owned(),
            Stage::Process => "preparing the command's process".to_owned(),
            Stage::Folder => format!("entering the working directory `{}`", self.folder.escape_ascii()),
            Stage::Program => String::new(),
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

    fn write_stdin(&mut self, link: &mut Link) {
        let mut taken = 0;
        while !self.stdin_bytes.is_empty() {
            let written = match &self.stdin {
                Some(stdin) => write(stdin, &self.stdin_bytes),
                None => Err(Errno::PIPE),
            };
            match written {
                Ok(length) => {
                    taken += length;
                    self.stdin_bytes.drain(..length);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                // Nobody reads any more. The host may go on all the same: it is to learn of the command's end.
                Err(_) => {
                    taken += self.stdin_bytes.len();
                    self.stdin_bytes.clear();
                    self.stdin = None;
                }
            }
        }
        if self.stdin_ends && self.stdin_bytes.is_empty() {
            self.stdin = None;
        }
        // A terminal's end-of-file character was not the host's.
        let taken = if self.stdin_ends { 0 } else { taken };
        if let Some(bytes) = self.stdin_taken.add(taken) {
            // Cannot fail: no more was taken than came.
            let _ = self.stdin_credit.regain(bytes);
            link.queue(&FromAgent::Credit { id: self.id, bytes });
        }
    }

    /// At the first deadline everything gets SIGTERM, at the second SIGKILL.
    fn enforce_deadline(&mut self, now: Instant) {
        let Some(deadline) = self.deadline.as_mut().filter(|_| self.end.is_none()) else { return };
        if deadline.wait(now).is_some() {
            return;
        }
        if self.timed_out || self.grace.is_zero() {
            self.deadline = None;
            self.kill_now();
        } else {
            self.deadline = Some(Deadline::after(self.grace, now));
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
        let refusals = meter.refusals().saturating_sub(self.refusals_before);
        self.usage.refused_processes = u32::try_from(refusals).unwrap_or(u32::MAX);
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
            while let Some(fd) = output.as_ref().filter(|_| link.has_room() && self.output_credit.left() > 0)
            {
                let most = self.buffer.len().min(self.output_credit.left());
                match read(fd, self.buffer.get_mut(..most).unwrap_or_default()) {
                    Ok(length @ 1..) => {
                        // Cannot be overdrawn: no more was read than there is.
                        let _ = self.output_credit.spend(length);
                        let data = self.buffer.get(..length).unwrap_or_default().to_vec();
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

/// A command's standard streams: the agent's side of them, and the command's.
struct Streams {
    terminal: Option<Terminal>,
    stdin: Option<OwnedFd>,
    outputs: [(Stream, Option<OwnedFd>); 2],
    /// Standard input, output and error.
    theirs: [OwnedFd; 3],
}

impl Streams {
    fn pipes(with_stdin: bool, null: &OwnedFd) -> Result<Self, Errno> {
        let (stdin_read, stdin_write) = if with_stdin {
            let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC)?;
            fcntl_setfl(&write_end, OFlags::NONBLOCK)?;
            (read_end, Some(write_end))
        } else {
            (copy(null)?, None)
        };
        let (stdout_read, stdout_write) = output_pipe()?;
        let (stderr_read, stderr_write) = output_pipe()?;
        Ok(Self {
            terminal: None,
            stdin: stdin_write,
            outputs: [(Stream::Stdout, Some(stdout_read)), (Stream::Stderr, Some(stderr_read))],
            theirs: [stdin_read, stdout_write, stderr_write],
        })
    }

    fn terminal(terminal: Terminal, with_stdin: bool) -> Result<Self, Errno> {
        let slave = || copy(&terminal.slave);
        let theirs = [slave()?, slave()?, slave()?];
        let stdin = if with_stdin { Some(copy(&terminal.master)?) } else { None };
        let shown = copy(&terminal.master)?;
        let outputs = [(Stream::Stdout, Some(shown)), (Stream::Stderr, None)];
        Ok(Self { terminal: Some(terminal), stdin, outputs, theirs })
    }
}

fn copy(fd: &OwnedFd) -> Result<OwnedFd, Errno> {
    fd.try_clone().map_err(|_| Errno::MFILE)
}

fn output_pipe() -> Result<(OwnedFd, OwnedFd), Errno> {
    let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC)?;
    fcntl_setfl(&read_end, OFlags::NONBLOCK)?;
    fcntl_setpipe_size(&write_end, PIPE_BYTES)?;
    Ok((read_end, write_end))
}

fn microseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn timeval_us(time: libc::timeval) -> u64 {
    let part = |value| u64::try_from(value).unwrap_or(0);
    part(time.tv_sec).saturating_mul(1_000_000).saturating_add(part(time.tv_usec))
}
