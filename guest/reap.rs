//! The two processes behind a command. The first is init of the command's namespaces: it makes their file system view,
//! starts the command, reaps what is orphaned and says how the command ended. When it ends, the kernel ends everything
//! left in its pid namespace. The second becomes the command.
//!
//! Both are forks of the agent and never return to its code.

use std::convert::Infallible;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, read, write};
use rustix::mount::{MountFlags, mount, mount_move};
use rustix::path::Arg;
use rustix::process::{Pid, Signal, chdir, chroot, ioctl_tiocsctty, setsid};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use crate::program::Program;
use crate::setup::ROOT;
use crate::sys::{self, Fork};

/// What the agent's ends of a command's pipes, terminal and sockets are connected to.
pub struct Ends {
    /// Standard input.
    pub stdin: OwnedFd,
    /// Standard output.
    pub stdout: OwnedFd,
    /// Standard error.
    pub stderr: OwnedFd,
    /// A pipe that tells by a [`Refusal`] why the command could not be started, and by its end that it was.
    pub report: OwnedFd,
    /// A packet socket: [`Kill`] comes in, [`Verdict`] goes out.
    pub control: OwnedFd,
    /// Whether standard input is a terminal that is to be the command's controlling one.
    pub controls_terminal: bool,
}

/// Why a command could not be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What was being done.
    pub stage: Stage,
    /// Linux errno.
    pub errno: u16,
    /// What stands in the way, in words, where more than the errno is known.
    pub why: String,
}

/// Most bytes of a [`Refusal`]: what a pipe takes at once (PIPE_BUF).
pub const MAX_REFUSAL_BYTES: usize = 4096;

/// The steps on the way to a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// Making its namespaces' view of files.
    World,
    /// Starting a process.
    Process,
    /// Going to the working directory.
    Folder,
    /// Executing the program.
    Program,
}

impl Refusal {
    /// As bytes on the report pipe.
    fn encode(&self) -> Vec<u8> {
        let [low, high] = self.errno.to_le_bytes();
        let mut bytes = vec![self.stage as u8, low, high];
        bytes.extend_from_slice(self.why.as_bytes());
        bytes.truncate(MAX_REFUSAL_BYTES);
        bytes
    }

    /// From bytes off the report pipe; none where there are too few.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let [stage, low, high, why @ ..] = bytes else { return None };
        let stage = match stage {
            0 => Stage::World,
            1 => Stage::Process,
            2 => Stage::Folder,
            _ => Stage::Program,
        };
        let why = String::from_utf8_lossy(why).into_owned();
        Some(Self { stage, errno: u16::from_le_bytes([*low, *high]), why })
    }
}

/// A signal for a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kill {
    /// For its process group.
    Group(u8),
    /// For all processes of its pid namespace.
    All(u8),
}

impl Kill {
    /// As a packet.
    pub fn encode(self) -> [u8; 2] {
        match self {
            Self::Group(signal) => [0, signal],
            Self::All(signal) => [1, signal],
        }
    }

    fn decode([tag, signal]: [u8; 2]) -> Self {
        if tag == 0 { Self::Group(signal) } else { Self::All(signal) }
    }
}

/// How a command's own process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It called exit.
    Exit(u8),
    /// A signal ended it.
    Signal(u8),
}

impl Verdict {
    fn of(status: libc::c_int) -> Self {
        let byte = |value| u8::try_from(value).unwrap_or(u8::MAX);
        if libc::WIFSIGNALED(status) {
            Self::Signal(byte(libc::WTERMSIG(status)))
        } else {
            Self::Exit(byte(libc::WEXITSTATUS(status)))
        }
    }

    fn encode(self) -> [u8; 2] {
        match self {
            Self::Exit(status) => [0, status],
            Self::Signal(signal) => [1, signal],
        }
    }

    /// From a packet.
    pub fn decode([tag, value]: [u8; 2]) -> Self {
        if tag == 0 { Self::Exit(value) } else { Self::Signal(value) }
    }
}

/// Runs as init of new pid, mount and ipc namespaces: the life of a command, start to end.
pub fn run(program: &Program, ends: &Ends) -> ! {
    let refuse = |stage, errno: Errno| -> ! {
        let why = if stage == Stage::Program { program.obstacle(errno) } else { String::new() };
        let errno = crate::failure::errno_number(errno);
        // If even this cannot be written, the agent sees a command that ended without a verdict.
        let _ = write(&ends.report, &Refusal { stage, errno, why }.encode());
        sys::exit(127)
    };
    // Priority is not inherited. If it cannot be had, time-outs are late under load, no more.
    let _ = sys::run_first();
    if let Err(errno) = enter_root() {
        refuse(Stage::World, errno);
    }
    let signals = match sys::child_signals() {
        Ok(signals) => signals,
        Err(errno) => refuse(Stage::Process, errno),
    };
    match sys::fork(0) {
        Err(errno) => refuse(Stage::Process, errno),
        Ok(Fork::Child) => {
            let (stage, errno) = become_command(program, ends);
            refuse(stage, errno)
        }
        Ok(Fork::Parent { child }) => {
            // Also closes the report's and the pipes' ends, which only the command is to hold.
            sys::close_all_but([ends.control.as_fd(), signals.as_fd()], || {
                reap(child, &ends.control, signals.as_fd())
            })
        }
    }
}

/// Makes the step's root this mount namespace's, as switch_root(8) does, and mounts /proc for this pid namespace.
pub fn enter_root() -> Result<(), Errno> {
    enter(ROOT)?;
    mount_proc()
}

/// Makes the mount at `place` this mount namespace's root.
pub fn enter(place: impl Arg) -> Result<(), Errno> {
    // By path: the descriptors that the agent holds refer to mounts of its own namespace, this is a copy.
    chdir(place)?;
    mount_move(".", "/")?;
    chroot(".")?;
    chdir("/")
}

/// Mounts /proc for this pid namespace.
pub fn mount_proc() -> Result<(), Errno> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("proc", "/proc", "proc", flags, None)
}

/// Begins a session, with the signals and, from the next program on, the descriptors that a program expects.
pub fn leave_agent() -> Result<(), Errno> {
    setsid()?;
    sys::reset_signals();
    sys::close_on_exec_above_stdio()
}

/// Lets the out-of-memory killer end this process: it spares the agent and a command's init, and what they start until then.
pub fn be_spared_no_longer() -> Result<(), Errno> {
    std::fs::write("/proc/self/oom_score_adj", "0").map_err(|_| Errno::ACCESS)
}

fn become_command(program: &Program, ends: &Ends) -> (Stage, Errno) {
    let prepare = || -> Result<(), Errno> {
        leave_agent()?;
        if ends.controls_terminal {
            ioctl_tiocsctty(&ends.stdin)?;
        }
        dup2_stdin(&ends.stdin)?;
        dup2_stdout(&ends.stdout)?;
        dup2_stderr(&ends.stderr)?;
        be_spared_no_longer()
    };
    if let Err(errno) = prepare() {
        return (Stage::Process, errno);
    }
    if let Err(errno) = chdir(program.folder()) {
        return (Stage::Folder, errno);
    }
    (Stage::Program, program.execute())
}

/// Waits for children until the command is among them, and passes signals on.
fn reap(command: Pid, control: &OwnedFd, signals: BorrowedFd<'_>) -> Infallible {
    loop {
        let mut fds = [PollFd::from_borrowed_fd(signals, PollFlags::IN), PollFd::new(control, PollFlags::IN)];
        if poll(&mut fds, None).is_err() {
            continue;
        }
        let [signalled, asked] = fds.map(|fd| !fd.revents().is_empty());
        if signalled {
            let mut information = [0; 128];
            let _ = read(signals, &mut information[..]);
            while let Ok(Some(ended)) = sys::wait(None, false) {
                if ended.pid == command {
                    let _ = write(control, &Verdict::of(ended.status).encode());
                    sys::exit(0);
                }
            }
        }
        if asked {
            let mut packet = [0; 2];
            match read(control, &mut packet) {
                Ok(2) => pass_on(Kill::decode(packet), command),
                Err(Errno::INTR | Errno::AGAIN) => {}
                // The agent is gone, and with it the machine.
                _ => sys::exit(1),
            }
        }
    }
}

fn pass_on(kill: Kill, command: Pid) {
    // Failures mean that nobody is left to be signalled.
    let _ = match kill {
        Kill::All(signal) => sys::kill_everyone(signal),
        // Before setsid the command has no group of its own.
        Kill::Group(signal) => sys::kill_group(command, signal).or_else(|_| {
            let signal = Signal::from_named_raw(signal.into()).ok_or(Errno::INVAL)?;
            rustix::process::kill_process(command, signal)
        }),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_survive_their_bytes() {
        for kill in [Kill::Group(15), Kill::All(9)] {
            assert_eq!(Kill::decode(kill.encode()), kill);
        }
        for verdict in [Verdict::Exit(3), Verdict::Signal(9)] {
            assert_eq!(Verdict::decode(verdict.encode()), verdict);
        }
        assert_eq!(Refusal::decode(&[1, 2]), None);
        for stage in [Stage::World, Stage::Process, Stage::Folder, Stage::Program] {
            let refusal = Refusal { stage, errno: 400, why: "no loader".to_owned() };
            assert_eq!(Refusal::decode(&refusal.encode()), Some(refusal));
        }
    }

    #[test]
    fn wait_statuses_are_told_apart() {
        assert_eq!(Verdict::of(3 << 8), Verdict::Exit(3));
        assert_eq!(Verdict::of(9), Verdict::Signal(9));
        assert_eq!(Verdict::of(0x80 | 11), Verdict::Signal(11), "with a core dump");
    }
}
