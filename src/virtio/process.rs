//! The device process beside one QEMU: its devices, and the loop that does what the parent asks.
//!
//! The parent starts it with inherited descriptors and talks to it through [`crate::control`]. Each device has
//! two threads (QEMU's messages, the queues), and the caller's thread serves the control connection. Whatever
//! jail the process is to run in is put around it by the launcher; a thread enters its own part of it through
//! [`Confine`].

use std::collections::BTreeSet;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::control::{Ask, Event, FrameError, Request, receive, send};
use crate::fs::{Fs, Settings, Share, Shares};
use crate::ring::QueueError;
use crate::vhost_user::{Carrier, CarryError, Confinement};
use crate::vsock::{Backend, Connector, Vsock};

/// Descriptors kept for shares, queues and sockets.
const OTHER_DESCRIPTORS: usize = 128;

/// A thread of a device process that is set up and is about to meet what others send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thread {
    /// Does what the parent asks.
    Control,
    /// Takes QEMU's messages, and starts the thread that does.
    Messages,
    /// Serves the fs device's queues.
    FsQueues,
    /// Serves the vsock device's queues.
    VsockQueues,
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
pub(crate) type Narrowing = Arc<OnceLock<LockIn>>;

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
    /// The limit of open descriptors (RLIMIT_NOFILE) is left as it is and shared out: below about 1,700, there
    /// are fewer open files and streams than there could be.
    ///
    /// # Errors
    /// See [`ProcessError`].
    pub fn run(self) -> Result<(), ProcessError> {
        // Files and streams must not take each other's descriptors, and some are for everything else.
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let limit = limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX);
        let settings = Settings::default();
        let open_files = settings.open_files.min(limit / 4);
        let most_connections = limit.saturating_sub(open_files + OTHER_DESCRIPTORS);
        let (fs, shares) = Fs::new(Settings { open_files, ..settings });
        let confine = self.confine;
        let narrowing = Narrowing::default();
        let sender = Sender { socket: Arc::new(self.control), sending: Arc::default() };
        let ending = Ending::new()?;
        let thread = Thread::FsQueues;
        let confinement = Confinement { confine, thread, narrowing: Arc::clone(&narrowing) };
        start(fs, "fs", confinement, self.fs, &ending)?;
        let mut vsock = None;
        if let Some((listener, guest_cid)) = self.vsock {
            let listening = Arc::new(Mutex::default());
            let ports = Ports { listening: Arc::clone(&listening), sender: sender.clone() };
            let device =
                Vsock::new(guest_cid, most_connections, Box::new(ports)).map_err(ProcessError::Vsock)?;
            let (device, connector) = device;
            // It opens no files, and is let no more than that from the first.
            let thread = Thread::VsockQueues;
            let confinement = Confinement { confine, thread, narrowing: Narrowing::default() };
            start(device, "vsock", confinement, listener, &ending)?;
            vsock = Some((connector, listening));
        }
        confine(Thread::Control).map_err(ProcessError::Confine)?;
        let (narrow, given) = (self.narrow, Vec::new());
        let mut control = Control { sender: sender.clone(), shares, vsock, given, narrow, narrowing };
        let served = control.serve(&ending);
        let ended = ending.taken();
        if let Some(ProcessError::Misbehaved(what)) = &ended {
            // A parent that is gone need not know.
            let _ = sender.send(&Event::Misbehaved { what: what.clone() }, None);
        }
        // A device whose QEMU still runs holds the socket until the process is gone.
        let _ = sender.socket.shutdown(Shutdown::Both);
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

/// The sending half of the connection to the parent.
#[derive(Clone)]
struct Sender {
    socket: Arc<UnixStream>,
    // Held while a frame is sent, so that frames of two threads do not mix.
    sending: Arc<Mutex<()>>,
}

impl Sender {
    fn send(&self, event: &Event, stream: Option<&UnixStream>) -> Result<(), FrameError> {
        let _sending = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        send(&self.socket, event, stream.map(UnixStream::as_fd))
    }
}

/// Ports of the host that the guest may connect to, each once: whoever comes second is not who was waited for.
/// Shared by the thread that serves the parent, which adds to it, and the vsock device's, which takes from it.
type Listening = Arc<Mutex<BTreeSet<u32>>>;

/// What is behind the vsock device: the parent.
struct Ports {
    listening: Listening,
    sender: Sender,
}

impl Backend for Ports {
    fn connect_from_guest(&mut self, port: u32) -> Option<UnixStream> {
        if !self.listening.lock().unwrap_or_else(PoisonError::into_inner).remove(&port) {
            return None;
        }
        let (ours, theirs) = UnixStream::pair().ok()?;
        self.sender.send(&Event::Accepted { port }, Some(&theirs)).ok()?;
        Some(ours)
    }
}

/// What the parent asks, and who does it.
struct Control {
    sender: Sender,
    shares: Shares,
    vsock: Option<(Connector, Listening)>,
    /// The directories of the shares that were added so far.
    given: Vec<OwnedFd>,
    narrow: Narrow,
    narrowing: Narrowing,
}

impl Control {
    fn serve(&mut self, ending: &Ending) -> Result<(), FrameError> {
        while ending.waits_for(&self.sender.socket) {
            let Some((request, descriptor)) = receive::<Request>(&self.sender.socket)? else { break };
            let id = request.id;
            if let Some(result) = self.answer(request, descriptor)? {
                self.sender.send(&Event::Reply { id, result }, None)?;
            }
        }
        Ok(())
    }

    /// Locks this thread in, and lets the others know that they are to.
    fn narrow(&mut self) -> io::Result<()> {
        let lock_in = (self.narrow)(&std::mem::take(&mut self.given))?;
        lock_in()?;
        self.narrowing.set(lock_in).map_err(|_| io::Error::other("it was done before"))
    }

    /// Does what is asked; `None` where the answer will come from elsewhere.
    fn answer(
        &mut self,
        request: Request,
        descriptor: Option<OwnedFd>,
    ) -> Result<Option<Result<(), String>>, FrameError> {
        let id = request.id;
        Ok(Some(match (request.what, descriptor, &self.vsock) {
            (Ask::AddShare { .. }, Some(_), _) if self.narrowing.get().is_some() => {
                Err("no share can be added any more".to_owned())
            }
            (Ask::AddShare { name, attributes }, Some(directory), _) => {
                directory.try_clone().map_err(|error| error.to_string()).and_then(|held| {
                    let share = Share { directory, attributes };
                    let added = self.shares.with_tree(|tree| tree.add_share(&name.0, share));
                    added.map(|()| self.given.push(held)).map_err(|error| error.to_string())
                })
            }
            (Ask::Narrow, None, _) => self.narrow().map_err(|error| error.to_string()),
            (Ask::Hide { name, paths }, None, _) => {
                let paths = paths.into_iter().map(|path| path.0.into_boxed_slice());
                let hidden = self.shares.with_tree(|tree| tree.hide(&name.0, paths));
                if hidden { Ok(()) } else { Err("no share of that name".to_owned()) }
            }
            (Ask::RemoveShare { name }, None, _) => {
                let removed = self.shares.with_tree(|tree| tree.remove_share(&name.0));
                if removed { Ok(()) } else { Err("no share of that name".to_owned()) }
            }
            (Ask::Finish, None, _) => {
                self.shares.with_tree(|tree| {
                    tree.settle();
                    tree.export(|part| self.sender.send(&Event::Record { id, part }, None))
                })?;
                Ok(())
            }
            (Ask::Listen { port }, None, Some((_, listening))) => {
                listening.lock().unwrap_or_else(PoisonError::into_inner).insert(port);
                Ok(())
            }
            (Ask::Connect { port }, Some(stream), Some((connector, _))) => {
                let sender = self.sender.clone();
                connector.connect_to_guest(port, stream.into(), move |accepted| {
                    let refused = || Err("the guest does not accept".to_owned());
                    let result = if accepted { Ok(()) } else { refused() };
                    // A parent that is gone ends the process on another thread.
                    let _ = sender.send(&Event::Reply { id, result }, None);
                });
                return Ok(None);
            }
            (Ask::Listen { .. } | Ask::Connect { .. }, _, None) => Err("there is no vsock device".to_owned()),
            _ => Err("a descriptor is missing, or one too many".to_owned()),
        }))
    }
}
