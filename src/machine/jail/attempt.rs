//! Tries, in a jail, what a jail is there to prevent; and the same without it, or the trial would prove nothing.
//!
//! Each attempt runs in a child of its own, because some end it. What it is made on (a file, sockets, this process) is
//! put up here for the purpose and taken down again.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{SocketAddr as UnixAddress, UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvAncillaryBuffer, RecvFlags, SocketFlags, SocketType, socket_with};
use rustix::process::Pid;
use rustix::thread::UnshareFlags;
use serde::{Deserialize, Serialize};

use super::{Held, Layer, Profile, ThreadKind, sys};
use crate::machine::launch::Become;
use crate::machine::spawn::{Process, spawn_jailed};

/// Something that a process taken over by a guest would try.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Attempt {
    /// Read a file of the user's.
    ReadFile,
    /// Write a file of the user's.
    WriteFile,
    /// List a folder of the host's.
    ListFolder,
    /// Read the environment of the kiln that started it.
    ReadEnvironment,
    /// Read the memory of the kiln that started it.
    ReadMemory,
    /// Send a signal to the kiln that started it.
    Signal,
    /// Connect to a service on this host.
    Tcp,
    /// Connect to an abstract unix socket.
    AbstractSocket,
    /// Connect to a unix socket by its path.
    Socket,
    /// Start a program.
    Execute,
    /// Make memory executable.
    ExecutableMemory,
    /// Get powers in a user namespace of its own.
    UserNamespace,
    /// Outlive the kiln that started it.
    Outlive,
    /// Trace the kiln that started it.
    Trace,
    /// Make a process.
    Fork,
    /// Change the mode of a file of the user's.
    ChangeMode,
    /// Make a socket of the internet's.
    InternetSocket,
    /// Make a socket for machines of the host's.
    VsockSocket,
    /// Make a device of KVM's, which no machine of kiln's has.
    KvmDevice,
    /// Make a machine of KVM's.
    KvmMachine,
    /// Open a file by openat2(2), as those of shares are.
    OpenBeneath,
    /// Write a file that it holds at some place.
    WriteAt,
    /// Receive what may come with a descriptor.
    Receive,
    /// Make a pair of sockets.
    Pair,
    /// Wait for several descriptors.
    Wait,
    /// Start a thread.
    StartThread,
}

impl Attempt {
    /// Those that no process of a machine's has a use for.
    pub const ALL: [Self; 19] = [
        Self::ReadFile,
        Self::WriteFile,
        Self::ListFolder,
        Self::ReadEnvironment,
        Self::ReadMemory,
        Self::Signal,
        Self::Tcp,
        Self::AbstractSocket,
        Self::Socket,
        Self::Execute,
        Self::ExecutableMemory,
        Self::UserNamespace,
        Self::Outlive,
        Self::Trace,
        Self::Fork,
        Self::ChangeMode,
        Self::InternetSocket,
        Self::VsockSocket,
        Self::KvmDevice,
    ];

    /// Those that a VMM needs, and few of its threads.
    pub const OF_THREADS: [Self; 7] = [
        Self::KvmMachine,
        Self::OpenBeneath,
        Self::WriteAt,
        Self::Receive,
        Self::Pair,
        Self::Wait,
        Self::StartThread,
    ];

    /// What it is, in words.
    pub fn name(self) -> &'static str {
        match self {
            Self::ReadFile => "read a file",
            Self::WriteFile => "write a file",
            Self::ListFolder => "list a folder",
            Self::ReadEnvironment => "read kiln's environment",
            Self::ReadMemory => "read kiln's memory",
            Self::Signal => "signal kiln",
            Self::Tcp => "connect over TCP",
            Self::AbstractSocket => "connect to an abstract socket",
            Self::Socket => "connect to a unix socket",
            Self::Execute => "start a program",
            Self::ExecutableMemory => "make memory executable",
            Self::UserNamespace => "make a user namespace",
            Self::Outlive => "outlive kiln",
            Self::Trace => "trace kiln",
            Self::Fork => "make a process",
            Self::ChangeMode => "change a file's mode",
            Self::InternetSocket => "make an internet socket",
            Self::VsockSocket => "make a vsock socket",
            Self::KvmDevice => "make a device of KVM's",
            Self::KvmMachine => "make a machine of KVM's",
            Self::OpenBeneath => "open a file beneath a share",
            Self::WriteAt => "write a file at a place",
            Self::Receive => "receive a message",
            Self::Pair => "make a pair of sockets",
            Self::Wait => "wait for several descriptors",
            Self::StartThread => "start a thread",
        }
    }

    /// Whether `profile` has to let it happen: an emulator writes the code it runs, and a QEMU with KVM asks that for what its
    /// version needs.
    pub fn is_needed_by(self, profile: &Profile) -> bool {
        matches!(
            (self, profile),
            (Self::ExecutableMemory, Profile::Qemu { .. })
                | (Self::KvmDevice, Profile::Qemu { kvm: true, .. })
        )
    }

    /// Whether a thread of this kind, of a VMM, has to be let do it.
    pub fn is_needed_by_thread(self, kind: ThreadKind) -> bool {
        use ThreadKind::{Control, Disk, Files, Owner, Processor, Streams};
        match self {
            Self::OpenBeneath => matches!(kind, Files | Control),
            Self::WriteAt => matches!(kind, Disk | Owner),
            Self::Receive => matches!(kind, Streams | Control | Owner),
            Self::Pair => matches!(kind, Streams | Owner),
            Self::Wait => kind != Processor,
            _ => false,
        }
    }
}

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It worked.
    Allowed,
    /// It failed, with this error.
    Refused(String),
    /// The process was killed for it.
    Killed,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allowed => f.write_str("allowed"),
            Self::Refused(_) => f.write_str("refused"),
            Self::Killed => f.write_str("killed"),
        }
    }
}

/// An attempt, and the jail it is made in.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::machine) struct Trial {
    pub profile: Profile,
    pub without: Vec<Layer>,
    thread: Option<ThreadKind>,
    attempt: Attempt,
    folder: PathBuf,
    tcp: SocketAddr,
    abstract_name: String,
    parent: i32,
}

/// What attempts are made on.
#[derive(Debug)]
pub struct Targets {
    folder: tempfile::TempDir,
    tcp: TcpListener,
    abstract_name: String,
    _sockets: [UnixListener; 2],
}

const FILE: &str = "file";
const SOCKET: &str = "socket";
/// How long an attempt may take to end.
const PATIENCE: Duration = Duration::from_secs(20);

impl Targets {
    /// Puts them up.
    ///
    /// # Errors
    /// A file or a socket cannot be made.
    pub fn new() -> io::Result<Self> {
        let folder = tempfile::tempdir()?;
        fs::write(folder.path().join(FILE), "a secret")?;
        let abstract_name = format!("kiln-attempt-{}", std::process::id());
        let address = UnixAddress::from_abstract_name(&abstract_name)?;
        let sockets = [UnixListener::bind_addr(&address)?, UnixListener::bind(folder.path().join(SOCKET))?];
        Ok(Self { folder, tcp: TcpListener::bind("127.0.0.1:0")?, abstract_name, _sockets: sockets })
    }

    /// Makes `attempt` in the jail of `profile` with the layers of `without` left out.
    ///
    /// # Errors
    /// The jail cannot be entered, or the attempt does not end; the layers that this host does not grant are not
    /// an error.
    pub fn attempt(&self, attempt: Attempt, profile: &Profile, without: &[Layer]) -> io::Result<Outcome> {
        self.outcome(attempt, profile, without, None)
    }

    /// Makes `attempt` as a thread of a VMM's, with what its process may do and, where `kind` says so, with the thread's own
    /// filter too.
    ///
    /// # Errors
    /// As [`Targets::attempt`].
    pub fn attempt_as(&self, attempt: Attempt, kind: Option<ThreadKind>) -> io::Result<Outcome> {
        // The other layers are the process's alone.
        let without: Vec<Layer> = Layer::ALL.into_iter().filter(|layer| *layer != Layer::Seccomp).collect();
        self.outcome(attempt, &Profile::Vmm, &without, kind)
    }

    fn outcome(
        &self,
        attempt: Attempt,
        profile: &Profile,
        without: &[Layer],
        thread: Option<ThreadKind>,
    ) -> io::Result<Outcome> {
        let (mut process, _) = self.start(attempt, profile, without, thread)?;
        let stdout = process.take_stdout();
        let Some(status) = process.wait(PATIENCE) else {
            return Err(io::Error::other(format!("the attempt to {} does not end", attempt.name())));
        };
        if status.signal().is_some() {
            return Ok(Outcome::Killed);
        }
        let mut text = String::new();
        if let Some(stdout) = stdout {
            stdout.take(1 << 10).read_to_string(&mut text)?;
        }
        match text.trim().split_once(' ').unwrap_or((text.trim(), "")) {
            ("allowed", _) => Ok(Outcome::Allowed),
            ("refused", why) => Ok(Outcome::Refused(why.to_owned())),
            _ => Err(io::Error::other(format!(
                "the attempt to {} said nothing: {}",
                attempt.name(),
                process.said()
            ))),
        }
    }

    /// What of the jail of `profile` this host grants.
    ///
    /// # Errors
    /// No process could be locked in.
    pub fn held(&self, profile: &Profile) -> io::Result<Held> {
        self.start(Attempt::ReadFile, profile, &[], None).map(|(_, held)| held)
    }

    fn start(
        &self,
        attempt: Attempt,
        profile: &Profile,
        without: &[Layer],
        thread: Option<ThreadKind>,
    ) -> io::Result<(Process, Held)> {
        let trial = Trial {
            profile: profile.clone(),
            without: without.to_vec(),
            thread,
            attempt,
            folder: self.folder.path().to_owned(),
            tcp: self.tcp.local_addr()?,
            abstract_name: self.abstract_name.clone(),
            parent: std::process::id().cast_signed(),
        };
        spawn_jailed(Become::Attempt(trial), &[])
    }
}

impl Trial {
    /// Makes the attempt, and says on standard output how it went.
    pub(in crate::machine) fn carry_out(&self) -> Result<(), Box<dyn std::error::Error>> {
        if let Some(kind) = self.thread {
            kind.enter()?;
        }
        let line = match self.attempt() {
            Ok(()) => "allowed\n".to_owned(),
            Err(error) => format!("refused {error}\n"),
        };
        io::stdout().write_all(line.as_bytes())?;
        Ok(())
    }

    fn attempt(&self) -> io::Result<()> {
        let file = self.folder.join(FILE);
        match self.attempt {
            Attempt::ReadFile => File::open(file)?.read_exact(&mut [0; 8]),
            Attempt::WriteFile => File::options().write(true).open(file).map(drop),
            Attempt::ListFolder => {
                fs::read_dir(&self.folder)?.next().ok_or(io::ErrorKind::NotFound)?.map(drop)
            }
            Attempt::ReadEnvironment => fs::read(format!("/proc/{}/environ", self.parent)).map(drop),
            Attempt::ReadMemory => File::open(format!("/proc/{}/mem", self.parent)).map(drop),
            Attempt::Signal => {
                let parent = Pid::from_raw(self.parent).ok_or(io::ErrorKind::InvalidInput)?;
                if parent == rustix::process::getpid() {
                    // The first process of a namespace, by the number of another's first.
                    return Err(Errno::SRCH.into());
                }
                Ok(rustix::process::test_kill_process(parent)?)
            }
            Attempt::Tcp => TcpStream::connect_timeout(&self.tcp, Duration::from_secs(5)).map(drop),
            Attempt::AbstractSocket => {
                UnixStream::connect_addr(&UnixAddress::from_abstract_name(&self.abstract_name)?).map(drop)
            }
            Attempt::Socket => UnixStream::connect(self.folder.join(SOCKET)).map(drop),
            Attempt::Execute => match Command::new("/bin/true").status()?.success() {
                true => Ok(()),
                false => Err(io::Error::other("it was started and failed")),
            },
            Attempt::ExecutableMemory => sys::map_executable(),
            Attempt::UserNamespace => sys::unshare(UnshareFlags::NEWUSER),
            Attempt::Outlive => Ok(rustix::process::set_parent_process_death_signal(None)?),
            Attempt::Trace => sys::trace(self.parent),
            Attempt::Fork => sys::fork(),
            Attempt::ChangeMode => fs::set_permissions(file, fs::Permissions::from_mode(0o644)),
            Attempt::InternetSocket => make_socket(AddressFamily::INET),
            Attempt::VsockSocket => make_socket(AddressFamily::VSOCK),
            Attempt::KvmDevice => sys::ask_kvm(KVM_CREATE_DEVICE),
            Attempt::KvmMachine => sys::ask_kvm(KVM_CREATE_VM),
            Attempt::OpenBeneath => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                Ok(openat2(CWD, "/", flags, Mode::empty(), ResolveFlags::empty()).map(drop)?)
            }
            // Of a socket the kernel says that it has no places.
            Attempt::WriteAt => reached(rustix::io::pwrite(io::stdin(), b"", 0).map(drop), Errno::SPIPE),
            Attempt::Receive => {
                let flags = RecvFlags::DONTWAIT;
                let received =
                    rustix::net::recvmsg(io::stdin(), &mut [], &mut RecvAncillaryBuffer::default(), flags);
                reached(received.map(drop), Errno::AGAIN)
            }
            Attempt::Pair => UnixStream::pair().map(drop),
            // Nor does it wait for others.
            Attempt::Wait => {
                let mut events = Vec::with_capacity(1);
                let now = Timespec { tv_sec: 0, tv_nsec: 0 };
                let waited = epoll::wait(io::stdin(), spare_capacity(&mut events), Some(&now));
                reached(waited.map(drop), Errno::INVAL)
            }
            Attempt::StartThread => {
                let thread = std::thread::Builder::new().spawn(|| {})?;
                thread.join().map_err(|_| io::Error::other("it was started and failed"))
            }
        }
    }
}

/// The requests of these names (linux/kvm.h).
const KVM_CREATE_VM: u32 = 0xae01;
const KVM_CREATE_DEVICE: u32 = 0xc00c_aee0;

fn make_socket(family: AddressFamily) -> io::Result<()> {
    let made = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None);
    // Where the kernel knows no such sockets, it was asked all the same.
    reached(made.map(drop), Errno::AFNOSUPPORT)
}

/// A call that the kernel carried out, or answered as it does what it was asked of.
fn reached(result: rustix::io::Result<()>, answer: Errno) -> io::Result<()> {
    match result {
        Err(errno) if errno != answer => Err(errno.into()),
        _ => Ok(()),
    }
}
