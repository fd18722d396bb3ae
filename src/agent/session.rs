//! A conversation with one agent: who it is, the setup of the step's world, commands, and the end.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kiln_wire::{
    Credit, Deadline, Exec, FrameReader, FromAgent, MAX_FROM_AGENT_BYTES, Mount, Outcome, Setup, Stream,
    Taken, TerminalSize, ToAgent, Usage, VERSION, encode_frame,
};

use super::input::Feeder;

/// How long an agent may take for anything that is not a command.
const PATIENCE: Duration = Duration::from_secs(120);

/// What is being done while a command runs, in the words of [`SessionError::Silent`].
pub const RUNNING: &str = "running the command";

/// Why a session is over.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The carrier closed: the machine is gone.
    #[error("the machine is gone")]
    Closed,
    /// No answer in time.
    #[error("the agent did not answer within {} s while {doing}", waited.as_secs())]
    Silent {
        /// What was being done.
        doing: &'static str,
        /// For how long.
        waited: Duration,
    },
    /// The other side said what no agent of ours says.
    #[error("the guest broke the protocol: {0}")]
    Violation(String),
    /// The agent could not do what it was asked.
    #[error("the agent failed while {what}: {errno}")]
    Failed {
        /// What, and with what object, in the agent's words.
        what: String,
        /// The guest kernel's word: no source, as it says nothing of the host.
        errno: io::Error,
    },
    /// What the command wrote could not be passed on.
    #[error("the command's output cannot be written")]
    Output(#[source] io::Error),
    /// The host's end of the carrier failed.
    #[error("cannot speak to the agent")]
    Io(#[source] io::Error),
}

impl SessionError {
    pub(super) fn violation(what: impl std::fmt::Display) -> Self {
        Self::Violation(what.to_string())
    }
}

/// How a command ended.
#[derive(Debug)]
pub enum ExecEnd {
    /// It ran.
    Ran(Outcome, Usage),
    /// It could not be started.
    NotStarted {
        /// The guest kernel's word.
        error: io::Error,
        /// What stands in the way of a program that is there, in the agent's words; empty where nothing is known.
        why: String,
    },
}

/// The sending half of a conversation, for any number of threads.
#[derive(Debug, Clone)]
pub(super) struct Writer {
    // Whole frames are written under this lock.
    stream: Arc<Mutex<UnixStream>>,
}

impl Writer {
    /// One on `stream`.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream: Arc::new(Mutex::new(stream)) }
    }

    /// Sends one message.
    ///
    /// # Errors
    /// [`SessionError::Closed`] and [`SessionError::Io`].
    pub fn send(&self, message: &ToAgent) -> Result<(), SessionError> {
        let frame = encode_frame(&message.encode());
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        stream.write_all(&frame).map_err(closed_or_io)
    }
}

/// Reaches a running command from another thread than the one that waits for it.
#[derive(Debug, Clone)]
pub struct Controls {
    writer: Writer,
    id: u32,
}

impl Controls {
    /// Sends a signal to its process group.
    ///
    /// # Errors
    /// [`SessionError`].
    pub fn signal(&self, signal: u8) -> Result<(), SessionError> {
        self.writer.send(&ToAgent::Signal { id: self.id, signal })
    }

    /// Gives its terminal another size.
    ///
    /// # Errors
    /// [`SessionError`].
    pub fn resize(&self, size: TerminalSize) -> Result<(), SessionError> {
        self.writer.send(&ToAgent::Resize { id: self.id, size })
    }

    /// Ends the whole conversation: whoever waits in it gets [`SessionError::Closed`].
    pub fn hang_up(&self) {
        let stream = self.writer.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = stream.shutdown(Shutdown::Both);
    }
}

/// An open conversation.
#[derive(Debug)]
pub struct Session {
    stream: UnixStream,
    writer: Writer,
    reader: FrameReader,
    buffer: Box<[u8]>,
    kernel: String,
}

impl Session {
    /// Greets the agent, and waits for it to say that it is ready.
    ///
    /// # Errors
    /// [`SessionError::Silent`] after `patience`; [`SessionError::Closed`] when the machine died first;
    /// [`SessionError::Violation`] when the version differs.
    pub fn open(stream: UnixStream, patience: Duration) -> Result<Self, SessionError> {
        let mut session = Self::join(stream)?;
        session.send(&ToAgent::Hello { version: VERSION })?;
        match session.receive("booting", Some(patience))? {
            FromAgent::Ready { version: VERSION, kernel, .. } => session.kernel = kernel,
            FromAgent::Ready { version, .. } => {
                let text = format!("the agent speaks version {version} of the wire, this kiln {VERSION}");
                return Err(SessionError::Violation(text));
            }
            other => return Err(unexpected(&other, "before it was ready")),
        }
        Ok(session)
    }

    /// Joins a conversation that somebody else holds and passes messages on for.
    ///
    /// # Errors
    /// [`SessionError::Io`].
    pub fn join(stream: UnixStream) -> Result<Self, SessionError> {
        // An agent that stops reading must not hold up the host: the time-out is the socket's, and so both halves'.
        stream.set_write_timeout(Some(PATIENCE)).map_err(SessionError::Io)?;
        let writer = Writer::new(stream.try_clone().map_err(SessionError::Io)?);
        let (reader, buffer) = (FrameReader::new(MAX_FROM_AGENT_BYTES), vec![0; 64 << 10].into());
        Ok(Self { stream, writer, reader, buffer, kernel: String::new() })
    }

    /// The guest kernel's release.
    pub fn kernel(&self) -> &str {
        &self.kernel
    }

    /// Prepares the step's world.
    ///
    /// # Errors
    /// [`SessionError::Failed`] names what could not be done.
    pub fn setup(&mut self, setup: Setup) -> Result<(), SessionError> {
        self.send(&ToAgent::Setup(setup))?;
        match self.receive("preparing the step", Some(PATIENCE))? {
            FromAgent::SetupDone => Ok(()),
            other => Err(unexpected(&other, "during setup")),
        }
    }

    /// Mounts another tree; commands started later see it.
    ///
    /// # Errors
    /// [`SessionError::Failed`] names what could not be done; the session goes on.
    pub fn mount(&mut self, mount: Mount) -> Result<(), SessionError> {
        self.send(&ToAgent::Mount(mount))?;
        match self.receive("mounting a tree", Some(PATIENCE))? {
            FromAgent::Mounted => Ok(()),
            other => Err(unexpected(&other, "during a mount")),
        }
    }

    /// What reaches the command `id` while another thread runs it.
    pub fn controls(&self, id: u32) -> Controls {
        Controls { writer: self.writer.clone(), id }
    }

    /// Runs one command to its end. `output` gets what it writes as it comes; `input` is copied to it.
    ///
    /// # Errors
    /// [`SessionError`]; a command that fails is no error. With a time-out in `exec`, an agent that overstays it by
    /// a minute is [`SessionError::Silent`]. After [`SessionError::Failed`] the session goes on.
    pub fn exec(
        &mut self,
        exec: Exec,
        input: Option<OwnedFd>,
        output: &mut dyn FnMut(Stream, &[u8]) -> io::Result<()>,
    ) -> Result<ExecEnd, SessionError> {
        let id = exec.id;
        let limit = (exec.timeout_ms > 0).then(|| {
            Duration::from_millis(exec.timeout_ms.saturating_add(exec.grace_ms)) + Duration::from_secs(60)
        });
        let mut deadline = limit.map(|limit| Deadline::after(limit, Instant::now()));
        self.send(&ToAgent::Exec(exec))?;
        let feeder = match input {
            Some(input) => Some(Feeder::start(self.writer.clone(), id, input).map_err(SessionError::Io)?),
            None => None,
        };
        let (mut credit, mut taken, mut started) = (Credit::default(), Taken::default(), false);
        loop {
            match self.receive_by(RUNNING, deadline.as_mut())? {
                FromAgent::Started { id: other } if other == id && !started => started = true,
                FromAgent::Output { id: other, stream, data } if other == id => {
                    if !credit.spend(data.len()) {
                        return Err(SessionError::violation("more output than there was credit for"));
                    }
                    output(stream, &data).map_err(SessionError::Output)?;
                    if let Some(bytes) = taken.add(data.len()) {
                        // Cannot fail: no more was taken than came.
                        let _ = credit.regain(bytes);
                        match self.send(&ToAgent::Credit { id, bytes }) {
                            // What it said before it went is still to be read.
                            Ok(()) | Err(SessionError::Closed) => {}
                            Err(error) => return Err(error),
                        }
                    }
                }
                FromAgent::Credit { id: other, bytes } if other == id => {
                    if !feeder.as_ref().is_some_and(|feeder| feeder.regain(bytes)) {
                        return Err(SessionError::violation("more input taken than was sent"));
                    }
                }
                FromAgent::Exited { id: other, outcome, usage } if other == id => {
                    return Ok(ExecEnd::Ran(outcome, usage));
                }
                FromAgent::ExecFailed { id: other, what, errno, why } if other == id && !started => {
                    let error = io::Error::from_raw_os_error(errno.into());
                    // Not the program's fault: what it was to run in could not be made.
                    return match what.is_empty() {
                        true => Ok(ExecEnd::NotStarted { error, why }),
                        false => Err(SessionError::Failed { what, errno: error }),
                    };
                }
                other => return Err(unexpected(&other, "while a command ran")),
            }
        }
    }

    /// Asks the machine to sync and power off; returns when it said goodbye.
    ///
    /// # Errors
    /// [`SessionError`].
    pub fn power_off(&mut self) -> Result<(), SessionError> {
        self.send(&ToAgent::PowerOff)?;
        match self.receive("powering off", Some(PATIENCE))? {
            FromAgent::Bye => Ok(()),
            other => Err(unexpected(&other, "at the end")),
        }
    }

    pub(super) fn send(&self, message: &ToAgent) -> Result<(), SessionError> {
        self.writer.send(message)
    }

    /// The next message, however long it takes.
    pub(super) fn wait(&mut self) -> Result<FromAgent, SessionError> {
        self.receive("waiting", None)
    }

    pub(super) fn writer(&self) -> &Writer {
        &self.writer
    }

    /// The next message that is not a log line.
    pub(super) fn next(&mut self, doing: &'static str, by: &mut Deadline) -> Result<FromAgent, SessionError> {
        self.receive_by(doing, Some(by))
    }

    fn receive(
        &mut self,
        doing: &'static str,
        patience: Option<Duration>,
    ) -> Result<FromAgent, SessionError> {
        self.receive_by(doing, patience.map(|patience| Deadline::after(patience, Instant::now())).as_mut())
    }

    fn receive_by(
        &mut self,
        doing: &'static str,
        mut deadline: Option<&mut Deadline>,
    ) -> Result<FromAgent, SessionError> {
        loop {
            while let Some(payload) = self.reader.next().map_err(SessionError::violation)? {
                match FromAgent::decode(&payload).map_err(SessionError::violation)? {
                    // The agent's own words are for whoever debugs the machine: they are on its console too.
                    FromAgent::Log(_) => {}
                    message => return Ok(message),
                }
            }
            let wait = match &mut deadline {
                Some(deadline) => match deadline.wait(Instant::now()) {
                    None => return Err(SessionError::Silent { doing, waited: deadline.patience() }),
                    wait => wait,
                },
                None => None,
            };
            self.stream.set_read_timeout(wait).map_err(SessionError::Io)?;
            match self.stream.read(&mut self.buffer) {
                Ok(0) => return Err(SessionError::Closed),
                Ok(count) => self.reader.push(&self.buffer[..count]),
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(error) => return Err(closed_or_io(error)),
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Others may hold the stream too, to send on.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

fn closed_or_io(error: io::Error) -> SessionError {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => SessionError::Closed,
        _ => SessionError::Io(error),
    }
}

/// A message in the wrong place; `Failed` is an answer everywhere.
pub(super) fn unexpected(message: &FromAgent, place: &str) -> SessionError {
    if let FromAgent::Failed { what, errno } = message {
        return SessionError::Failed {
            what: what.clone(),
            errno: io::Error::from_raw_os_error((*errno).into()),
        };
    }
    let name = match message {
        FromAgent::Ready { .. } => "ready",
        FromAgent::SetupDone => "setup done",
        FromAgent::Mounted => "mounted",
        FromAgent::Credit { .. } => "credit",
        FromAgent::Started { .. } => "started",
        FromAgent::ExecFailed { .. } => "not started",
        FromAgent::Output { .. } => "output",
        FromAgent::Exited { .. } => "exited",
        FromAgent::Entry(_) => "an entry",
        FromAgent::ListDone { .. } => "the end of a list",
        FromAgent::FileStart { .. } => "the start of a file",
        FromAgent::FileData { .. } => "a file's bytes",
        FromAgent::FileEnd { .. } => "the end of a file",
        FromAgent::FetchDone => "the end of a transfer",
        FromAgent::Bye => "goodbye",
        FromAgent::Failed { .. } | FromAgent::Log(_) => "a report",
    };
    SessionError::Violation(format!("`{name}` {place}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_that_is_silent_is_told_by_what_it_was_to_do() {
        let (ours, _theirs) = UnixStream::pair().expect("a socket pair");
        let mut session = Session::join(ours).expect("a session");
        let waited = Duration::from_millis(30);
        let error = session.receive("waiting", Some(waited)).expect_err("nobody speaks");
        assert!(matches!(error, SessionError::Silent { doing: "waiting", waited: said } if said == waited));
    }
}
