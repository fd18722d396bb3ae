//! The parent's half of the control connection.
//!
//! One thread of the client's reads events and hands them to whoever waits for them; any thread may ask. The
//! device process is not trusted: its messages are bounded, and what does not belong closes the connection,
//! after which everything fails with [`ClientError::Closed`].

use std::collections::BTreeMap;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::{Ask, Event, FrameError, Request, receive, send};
use crate::fs::Attributes;
use crate::fs::record::{AssembleError, Assembler, PathBytes, Record};

/// Why a device process did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The device process is gone, or broke the protocol.
    #[error("the device process has closed the control connection")]
    Closed,
    /// The guest did what no driver does, and the device process ended.
    #[error("guest-misbehaved: {0}")]
    Misbehaved(String),
    /// The device process refused.
    #[error("the device process refused: {0}")]
    Refused(String),
    /// What it sent is no record, or too large a one.
    #[error(transparent)]
    Record(#[from] AssembleError),
    /// No answer in time.
    #[error("no answer from the device process")]
    TimedOut,
    /// The request could not be sent.
    #[error("cannot send to the device process")]
    Send(#[source] FrameError),
    /// No socket or thread could be made.
    #[error("cannot set up a connection to the device process")]
    Setup(#[from] io::Error),
}

/// Most characters that are kept of what a guest did.
const MOST_WORDS: usize = 500;
/// How long a request that needs nothing of the guest may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long the record may take: all that was listed is looked at again.
const RECORD_PATIENCE: Duration = Duration::from_secs(600);

/// A connection to a device process. Dropping it tells the process to end.
#[derive(Debug)]
pub struct Client {
    shared: Arc<Shared>,
    reader: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    socket: UnixStream,
    // Held while a frame is sent, so that frames of two threads do not mix.
    sending: Mutex<()>,
    // Who waits for what.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    next_id: u64,
    closed: bool,
    misbehaved: Option<String>,
    waiting: BTreeMap<u64, Waiting>,
    listening: BTreeMap<u32, SyncSender<UnixStream>>,
}

#[derive(Debug)]
struct Waiting {
    answer: Sender<Result<Option<Record>, ClientError>>,
    record: Option<(Assembler, Option<Record>)>,
}

impl Client {
    /// A client on `socket`, whose other end is the device process's `control`.
    ///
    /// # Errors
    /// The socket or a thread cannot be set up.
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        // A process that takes nothing any more must not hold up its parent.
        socket.set_write_timeout(Some(PATIENCE))?;
        socket.set_read_timeout(None)?;
        let (sending, state) = (Mutex::new(()), Mutex::new(State::default()));
        let shared = Arc::new(Shared { socket, sending, state });
        let reading = shared.clone();
        let reader = std::thread::Builder::new().name("device-control".to_owned());
        let reader = reader.stack_size(256 << 10).spawn(move || reading.read_events())?;
        Ok(Self { shared, reader: Some(reader) })
    }

    /// Lets the guest see `directory` as the share `name`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn add_share(
        &self,
        name: &[u8],
        directory: BorrowedFd<'_>,
        attributes: Attributes,
    ) -> Result<(), ClientError> {
        let ask = Ask::AddShare { name: PathBytes(name.to_vec()), attributes };
        self.ask(ask, Some(directory), PATIENCE).map(drop)
    }

    /// Leaves `paths` out of what the share `name` shows. To be called before the guest runs.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn hide(&self, name: &[u8], paths: &[PathBytes]) -> Result<(), ClientError> {
        // A thousand paths of the greatest length stay below the longest frame.
        for paths in paths.chunks(1000) {
            let ask = Ask::Hide { name: PathBytes(name.to_vec()), paths: paths.to_vec() };
            self.ask(ask, None, PATIENCE)?;
        }
        Ok(())
    }

    /// Locks the process in: from now on it opens files beneath the directories of its shares only, and takes no others.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn narrow(&self) -> Result<(), ClientError> {
        self.ask(Ask::Narrow, None, PATIENCE).map(drop)
    }

    /// Lets the share `name` disappear.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn remove_share(&self, name: &[u8]) -> Result<(), ClientError> {
        self.ask(Ask::RemoveShare { name: PathBytes(name.to_vec()) }, None, PATIENCE).map(drop)
    }

    /// Lets the guest connect to vsock port `port` of the host, once: after that the port refuses. The connection
    /// comes out of the receiver, as a blocking stream; when the receiver is dropped, it is closed at once.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn listen(&self, port: u32) -> Result<Receiver<UnixStream>, ClientError> {
        let (sender, receiver) = sync_channel(1);
        self.shared.state().listening.insert(port, sender);
        match self.ask(Ask::Listen { port }, None, PATIENCE) {
            Ok(_) => Ok(receiver),
            Err(error) => {
                self.shared.state().listening.remove(&port);
                Err(error)
            }
        }
    }

    /// Connects to vsock port `port` of the guest, waiting at most `patience` for it to accept. While the
    /// guest has no driver yet, it waits; a port at which nobody listens is refused.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn connect(&self, port: u32, patience: Duration) -> Result<UnixStream, ClientError> {
        let (ours, theirs) = UnixStream::pair()?;
        self.ask(Ask::Connect { port }, Some(theirs.as_fd()), patience)?;
        Ok(ours)
    }

    /// Ends the guest, where it runs in that process.
    ///
    /// # Errors
    /// See [`ClientError`]; `Refused` where it does not.
    pub fn stop_guest(&self) -> Result<(), ClientError> {
        self.ask(Ask::Stop, None, PATIENCE).map(drop)
    }

    /// Freezes the guest, where it runs in that process: it does no more, and all of its machine but the memory is in
    /// `state` then.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn freeze_guest(&self, state: BorrowedFd<'_>) -> Result<(), ClientError> {
        self.ask(Ask::Freeze, Some(state), PATIENCE).map(drop)
    }

    /// Has it say into `to` which pages of its memory the guest has touched, where it runs in that process and the machine is
    /// there for that.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn write_working_set(&self, to: BorrowedFd<'_>) -> Result<(), ClientError> {
        self.ask(Ask::WorkingSet, Some(to), PATIENCE).map(drop)
    }

    /// The record of everything the guest has asked so far. To be called when its run is over; calling it
    /// earlier gives what was asked until then.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn finish(&self) -> Result<Record, ClientError> {
        self.ask(Ask::Finish, None, RECORD_PATIENCE)?.ok_or(ClientError::Closed)
    }

    /// What the guest did that ended the device process, if that is how it ended.
    pub fn misbehaved(&self) -> Option<String> {
        self.shared.state().misbehaved.clone()
    }

    fn ask(
        &self,
        what: Ask,
        descriptor: Option<BorrowedFd<'_>>,
        patience: Duration,
    ) -> Result<Option<Record>, ClientError> {
        let (answer, answered) = channel();
        let id = {
            let mut state = self.shared.state();
            if state.closed {
                return Err(state.end());
            }
            state.next_id += 1;
            let id = state.next_id;
            let record = (what == Ask::Finish).then(|| (Assembler::default(), None));
            state.waiting.insert(id, Waiting { answer, record });
            id
        };
        let sent = {
            let _sending = self.shared.sending.lock().unwrap_or_else(PoisonError::into_inner);
            send(&self.shared.socket, &Request { id, what }, descriptor)
        };
        // A process that has hung up may have said why: its last words are waited for like an answer.
        let hung_up = |error: &FrameError| matches!(error, FrameError::Socket(error) if error.kind() == io::ErrorKind::BrokenPipe);
        let result = match sent {
            Err(error) if !hung_up(&error) => {
                // Half a frame may be under way: nothing can follow it.
                self.shared.close();
                Err(ClientError::Send(error))
            }
            Ok(()) | Err(_) => match answered.recv_timeout(patience) {
                Ok(result) => result,
                Err(RecvTimeoutError::Timeout) => Err(ClientError::TimedOut),
                Err(RecvTimeoutError::Disconnected) => Err(self.shared.state().end()),
            },
        };
        // Whoever gave up is not waiting any more; a late answer is dropped.
        self.shared.state().waiting.remove(&id);
        result
    }
}

impl State {
    /// Why a closed connection is closed.
    fn end(&self) -> ClientError {
        self.misbehaved.clone().map_or(ClientError::Closed, ClientError::Misbehaved)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.shared.close();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    fn read_events(&self) {
        while let Ok(Some((event, descriptor))) = receive::<Event>(&self.socket) {
            if self.take(event, descriptor).is_none() {
                break;
            }
        }
        self.close();
        let mut state = self.state();
        state.closed = true;
        // Drops the senders, which tells all who wait.
        state.waiting.clear();
        state.listening.clear();
    }

    /// Hands on one event, or `None` where it breaks the protocol.
    fn take(&self, event: Event, descriptor: Option<OwnedFd>) -> Option<()> {
        let mut state = self.state();
        match event {
            Event::Reply { id, result } => {
                if let Some(waiting) = state.waiting.remove(&id) {
                    let record = waiting.record.and_then(|(_, record)| record);
                    let _ = waiting.answer.send(result.map(|()| record).map_err(ClientError::Refused));
                }
            }
            Event::Record { id, part } => {
                if let Some(waiting) = state.waiting.get_mut(&id) {
                    let (assembler, record) = waiting.record.as_mut()?;
                    if record.is_some() {
                        return None;
                    }
                    match assembler.push(part) {
                        Ok(whole) => *record = whole,
                        Err(error) => {
                            let _ = waiting.answer.send(Err(error.into()));
                            return None;
                        }
                    }
                }
            }
            Event::Misbehaved { what } => {
                state.misbehaved.get_or_insert_with(|| what.chars().take(MOST_WORDS).collect());
            }
            Event::Accepted { port } => {
                let stream = UnixStream::from(descriptor?);
                stream.set_nonblocking(false).ok()?;
                // Where nobody listens (any more), dropping the stream closes it.
                if let Some(listening) = state.listening.remove(&port) {
                    let _ = listening.try_send(stream);
                }
            }
        }
        Some(())
    }
}
