//! The device process beside one QEMU: its devices, and the loop that does what the parent asks.
//!
//! The parent starts it with inherited descriptors and talks to it through [`crate::control`]. Each device has
//! two threads (QEMU's messages, the queues), and the caller's thread serves the control connection. Whatever
//! jail the process is to run in is put around it by the launcher; a thread enters its own part of it through
//! [`Confine`].

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::control::{FrameError, Server};
use crate::fs::MOST_REQUEST_QUEUES;
use crate::ring::QueueError;
use crate::vhost_user::{Carrier, CarryError, Confinement};

/// A thread of a device process that is set up and is about to meet what others send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thread {
    /// Does what the parent asks.
    Control,
    /// Takes QEMU's messages, and starts the thread that does.
    Messages,
    /// Serves the fs device's queues.
    FsQueues,
    /// Serves the queues of a device that is streams.
    StreamQueues,
}

/// Called on each thread once, before it takes anything from outside: what it confines the thread to is the
/// launcher's business. An error ends the process.
pub type Confine = fn(Thread) -> io::Result<()>;

/// Locks the calling thread in further.
pub type LockIn = Box<dyn Fn() -> io::Result<()> + Send + Sync>;

/// Makes what locks threads in so that they read beneath `directories` only. Each thread that opens files calls the
/// result once.
pub type Narrow = fn(directories: &[OwnedFd]) -> io::Result<LockIn>;

/// How threads that serve queues learn that they are to be narrowed.
pub type Narrowing = Arc<OnceLock<LockIn>>;

/// Most bytes of private memory a device process should need.
pub const MEMORY_BYTES: u64 = 15 << 20;

/// Why a device process ended.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// A thread could not be started.
    #[error("cannot start a device thread")]
    Thread(#[source] io::Error),
    /// The vsock device could not be made.
    #[error("cannot make the vsock device")]
    Vsock(#[source] io::Error),
    /// The parent sent what is not a request.
    #[error("cannot receive from the parent")]
    Control(#[from] FrameError),
    /// The thread that serves the parent could not be confined.
    #[error("cannot confine a thread")]
    Confine(#[source] io::Error),
    /// A device could not be served.
    #[error("device `{device}` failed")]
    Device {
        /// `fs` or `vsock`.
        device: &'static str,
        /// Why.
        #[source]
        source: CarryError,
    },
    /// The guest, or a QEMU that it owns, did what no driver does.
    #[error("guest-misbehaved: {0}")]
    Misbehaved(String),
}

/// Serves the fs (and, where given, vsock) device of one machine.
///
/// A vhost-user socket here is the *listener*: a bound, listening unix socket. The parent connects to it
/// before it starts this process, unlinks its path, and gives the connected end to QEMU
/// (`-chardev socket,id=fs,fd=N`), or lets QEMU connect by path and unlinks afterwards.
#[derive(Debug)]
pub struct DeviceProcess {
    /// The vhost-user listener of the fs device, tag `kiln`.
    pub fs: OwnedFd,
    /// The vhost-user listener of the vsock device, and the guest's CID.
    pub vsock: Option<(OwnedFd, u64)>,
    /// The connection to the parent's [`crate::control::Client`].
    pub control: UnixStream,
    /// Confines each thread.
    pub confine: Confine,
    /// Confines those that open files to what they were given, when they have been given all.
    pub narrow: Narrow,
}

impl DeviceProcess {
    /// Serves until the parent closes the control connection, or a device has failed; where the guest is to
    /// blame for that, the parent is told. That QEMU hangs up ends a device, but not the process: the record is
    /// asked for afterwards.
    ///
    /// # Errors
    /// See [`ProcessError`].
    pub fn run(self) -> Result<(), ProcessError> {
        let (confine, ending) = (self.confine, Ending::new()?);
        let (vsock, guest_cid) = self.vsock.unzip();
        let server = Server::new(self.control, guest_cid, self.narrow, None).map_err(ProcessError::Vsock)?;
        let (mut server, fs, device) = server;
        let (thread, narrowing) = (Thread::FsQueues, server.narrowing());
        // QEMU says how many of these its driver sees.
        let fs = fs.with_request_queues(MOST_REQUEST_QUEUES);
        start(fs, "fs", Confinement { confine, thread, narrowing }, self.fs, &ending)?;
        if let Some((device, listener)) = device.zip(vsock) {
            // It opens no files, and is let no more than that from the first.
            let (thread, narrowing) = (Thread::StreamQueues, Narrowing::default());
            start(device, "vsock", Confinement { confine, thread, narrowing }, listener, &ending)?;
        }
        confine(Thread::Control).map_err(ProcessError::Confine)?;
        let served = server.serve(|parent| ending.waits_for(parent));
        let ended = ending.taken();
        if let Some(ProcessError::Misbehaved(what)) = &ended {
            server.misbehaved(what.clone());
        }
        // A device whose QEMU still runs holds the socket until the process is gone.
        server.hang_up();
        match ended {
            Some(error) => Err(error),
            None => Ok(served?),
        }
    }
}

/// Serves a device in threads of its own.
fn start<D: crate::device::Device<()> + 'static>(
    device: D,
    name: &'static str,
    confinement: Confinement,
    listener: OwnedFd,
    ending: &Ending,
) -> Result<(), ProcessError> {
    let broken = ending.clone();
    let on_broken = move |error: QueueError| broken.end(misbehaved(name, &error));
    let carrier = Carrier::new(device, confinement, on_broken);
    let ending = ending.clone();
    let serve = move || {
        if let Err(source) = carrier.serve(listener) {
            ending.end(match source {
                CarryError::Connection(_) => misbehaved(name, &source),
                _ => ProcessError::Device { device: name, source },
            });
        }
    };
    let thread = std::thread::Builder::new().name(name.to_owned()).stack_size(256 << 10);
    thread.spawn(serve).map(drop).map_err(ProcessError::Thread)
}

fn misbehaved(device: &str, error: &dyn std::error::Error) -> ProcessError {
    ProcessError::Misbehaved(format!("{device}: {}", in_words(error)))
}

/// How a device that failed ends the process: its threads may do little (see [`Confine`]), so they leave word and
/// ring, and the thread that serves the parent does the rest.
#[derive(Clone)]
struct Ending {
    // What failed first. Set by a device's threads, taken by the one that serves the parent.
    first: Arc<Mutex<Option<ProcessError>>>,
    bell: Arc<OwnedFd>,
}

impl Ending {
    fn new() -> Result<Self, ProcessError> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let bell = bell.map_err(|error| ProcessError::Thread(error.into()))?;
        Ok(Self { first: Arc::default(), bell: Arc::new(bell) })
    }

    fn end(&self, error: ProcessError) {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        // Only a full counter fails, and then the bell rings anyway.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }

    fn taken(&self) -> Option<ProcessError> {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Waits until the parent has something to say; false where the process is to end instead.
    fn waits_for(&self, parent: &UnixStream) -> bool {
        let mut wait = [PollFd::new(parent, PollFlags::IN), PollFd::new(&self.bell, PollFlags::IN)];
        while let Err(rustix::io::Errno::INTR) = poll(&mut wait, None) {}
        !wait[1].revents().contains(PollFlags::IN)
    }
}

/// An error and what it came from.
fn in_words(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}
