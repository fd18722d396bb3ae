//! The device process's half of the control connection: does what the parent asks.
//!
//! It serves on the thread that calls it. What a device must know of it goes by the handles that [`Server::new`] gives out.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use super::{Ask, Event, FrameError, Request, receive, send};
use crate::fs::{Fs, Settings, Share, Shares};
use crate::process::{Narrow, Narrowing};
use crate::vsock::{Backend, Connector, Vsock};

/// Descriptors kept for shares, queues and sockets.
const OTHER_DESCRIPTORS: usize = 128;

/// The guest, where it runs in the process that serves its devices.
pub trait Guest: Send {
    /// Ends it. What it asked for and has not been answered when this returns never is.
    ///
    /// # Errors
    /// Why not, in words.
    fn stop(&mut self) -> Result<(), String>;

    /// Stops it for good and writes down all of its machine but the memory.
    ///
    /// # Errors
    /// Why not, in words.
    fn freeze(&mut self, state: File) -> Result<(), String>;

    /// Writes down which pages of its memory it has touched, in a machine that is there for that.
    ///
    /// # Errors
    /// Why not, in words.
    fn working_set(&mut self, to: File) -> Result<(), String>;
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
pub struct Server {
    sender: Sender,
    shares: Shares,
    vsock: Option<(Connector, Listening)>,
    /// The directories of the shares that were added so far.
    given: Vec<OwnedFd>,
    narrow: Narrow,
    narrowing: Narrowing,
    guest: Option<Box<dyn Guest>>,
}

impl Server {
    /// Serves the parent behind `control`, for the devices that come along: fs, and the vsock device of the guest
    /// `guest_cid` where there is one.
    ///
    /// The limit of open descriptors (RLIMIT_NOFILE) is left as it is and shared out: below about 1,700, there
    /// are fewer open files and streams than there could be.
    ///
    /// # Errors
    /// The vsock device cannot be made.
    pub fn new(
        control: UnixStream,
        guest_cid: Option<u64>,
        narrow: Narrow,
        guest: Option<Box<dyn Guest>>,
    ) -> io::Result<(Self, Fs, Option<Vsock>)> {
        // Files and streams must not take each other's descriptors, and some are for everything else.
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let limit = limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX);
        let settings = Settings::default();
        let open_files = settings.open_files.min(limit / 4);
        let most_connections = limit.saturating_sub(open_files + OTHER_DESCRIPTORS);
        let (fs, shares) = Fs::new(Settings { open_files, ..settings });
        let sender = Sender { socket: Arc::new(control), sending: Arc::default() };
        let (mut device, mut vsock) = (None, None);
        if let Some(guest_cid) = guest_cid {
            let listening = Arc::new(Mutex::default());
            let ports = Ports { listening: Arc::clone(&listening), sender: sender.clone() };
            let (made, connector) = Vsock::new(guest_cid, most_connections, Box::new(ports))?;
            (device, vsock) = (Some(made), Some((connector, listening)));
        }
        let (given, narrowing) = (Vec::new(), Narrowing::default());
        Ok((Self { sender, shares, vsock, given, narrow, narrowing, guest }, fs, device))
    }

    /// How the fs device's thread learns that it is to be narrowed.
    pub fn narrowing(&self) -> Narrowing {
        Arc::clone(&self.narrowing)
    }

    /// Serves until the parent hangs up, or `waits`, which waits for it, says that this is to end instead.
    ///
    /// # Errors
    /// The parent sent what is not a request.
    pub fn serve(&mut self, mut waits: impl FnMut(&UnixStream) -> bool) -> Result<(), FrameError> {
        while waits(&self.sender.socket) {
            let Some((request, descriptor)) = receive::<Request>(&self.sender.socket)? else { break };
            let id = request.id;
            if let Some(result) = self.answer(request, descriptor)? {
                self.sender.send(&Event::Reply { id, result }, None)?;
            }
        }
        Ok(())
    }

    /// Tells the parent what the guest did that ends this process. A parent that is gone need not know.
    pub fn misbehaved(&self, what: String) {
        let _ = self.sender.send(&Event::Misbehaved { what }, None);
    }

    /// Hangs up, also where a device still holds the socket.
    pub fn hang_up(&self) {
        let _ = self.sender.socket.shutdown(Shutdown::Both);
    }

    /// Locks this thread in, and lets the others know that they are to.
    fn narrow(&mut self) -> io::Result<()> {
        let lock_in = (self.narrow)(&std::mem::take(&mut self.given))?;
        lock_in()?;
        self.narrowing.set(lock_in).map_err(|_| io::Error::other("it was done before"))
    }

    fn guest(&mut self) -> Result<&mut Box<dyn Guest>, String> {
        self.guest.as_mut().ok_or_else(|| "no guest runs in this process".to_owned())
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
            (Ask::Stop, None, _) => self.guest().and_then(|guest| guest.stop()),
            (Ask::Freeze, Some(state), _) => self.guest().and_then(|guest| guest.freeze(state.into())),
            (Ask::WorkingSet, Some(to), _) => self.guest().and_then(|guest| guest.working_set(to.into())),
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
