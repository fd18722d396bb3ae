//! Tries, in a jail, what a jail is there to prevent; and the same without it, or the trial would prove nothing.
//!
//! Each attempt runs in a child of its own, because some end it. What it is made on (a file, sockets, this process) is
//! put up here for the purpose and taken down again.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr as UnixAddress, UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use rustix::process::Pid;
use rustix::thread::UnshareFlags;
use serde::{Deserialize, Serialize};

use super::{Held, Layer, Profile, sys};
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
}

impl Attempt {
    /// All of them.
    pub const ALL: [Self; 13] = [
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
        }
    }

    /// Whether `profile` has to let it happen: an emulator writes the code it runs, and QEMU has to be started.
    pub fn is_needed_by(self, profile: &Profile) -> bool {
        matches!((self, profile), (Self::ExecutableMemory, Profile::Qemu { .. }))
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
        let (mut process, _) = self.start(attempt, profile, without)?;
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
        self.start(Attempt::ReadFile, profile, &[]).map(|(_, held)| held)
    }

    fn start(&self, attempt: Attempt, profile: &Profile, without: &[Layer]) -> io::Result<(Process, Held)> {
        let trial = Trial {
            profile: profile.clone(),
            without: without.to_vec(),
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
        }
    }
}
