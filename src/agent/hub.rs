//! Several commands at once in one session, for several who are waiting: one thread reads what the agent says and hands it
//! to whom it concerns.
//!
//! The agent is not trusted here either: what concerns no command, overdraws a command's credit or comes at the wrong time
//! ends the session for all. What is held for a command that nobody listens to is bounded by its credit.

use std::collections::BTreeMap;
use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_wire::{Credit, Exec, FromAgent, ToAgent};

use super::session::{Session, SessionError, Writer, unexpected};
use crate::threads;

/// SIGKILL.
const KILL: u8 = 9;

/// A session that is shared.
#[derive(Debug, Clone)]
pub struct Hub {
    writer: Writer,
    table: Arc<Table>,
}

/// The commands. The reading thread and those that start commands share it.
#[derive(Debug, Default)]
struct Table {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The last number given.
    last_id: u32,
    /// The machine was asked to power off.
    ending: bool,
    closed: bool,
    lines: BTreeMap<u32, Line>,
}

/// A command's end of the hub.
#[derive(Debug)]
struct Line {
    messages: Sender<FromAgent>,
    started: bool,
    input: Credit,
    output: Credit,
}

/// A command that runs, or ran, in a shared session. Dropping it kills the command.
#[derive(Debug)]
pub struct Remote {
    id: u32,
    writer: Writer,
    table: Arc<Table>,
}

/// A message that its sender had no business to send.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Misplaced(&'static str);

impl Table {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Line {
    /// Counts all that was handed out as taken, and gives how much that was beyond what was said before.
    fn take_all(&mut self) -> u32 {
        let owed = self.output.spent();
        // Cannot fail: it is what was spent.
        let _ = self.output.regain(owed);
        owed
    }
}

impl Hub {
    /// Shares `session`, whose step's world is made. `at_end` is called once it is over: without an error after
    /// [`Hub::power_off`].
    ///
    /// # Errors
    /// There can be no thread.
    pub fn new(
        mut session: Session,
        at_end: impl FnOnce(Result<(), SessionError>) + Send + 'static,
    ) -> io::Result<Self> {
        let (writer, table) = (session.writer().clone(), Arc::<Table>::default());
        // Numbers below were the step's own.
        table.lock().last_id = 1000;
        let hub = Self { writer: writer.clone(), table: Arc::clone(&table) };
        threads::start("agent", move || {
            let end = loop {
                match session.wait() {
                    Ok(FromAgent::Bye) if table.lock().ending => break Ok(()),
                    Ok(message) => {
                        if let Err(error) = table.hand_out(message, &writer) {
                            break Err(error);
                        }
                    }
                    Err(error) => break Err(error),
                }
            };
            let mut state = table.lock();
            state.closed = true;
            // Drops the senders, which tells all who wait.
            state.lines.clear();
            drop(state);
            at_end(end);
        })?;
        Ok(hub)
    }

    /// Starts a command; the hub gives it its number. What the agent says of it comes out of the receiver, which ends
    /// with the command or with the session.
    ///
    /// # Errors
    /// [`SessionError::Closed`] when the session is over, or what sending says.
    pub fn start(&self, exec: Exec) -> Result<(Remote, Receiver<FromAgent>), SessionError> {
        let (sender, messages) = channel();
        let id = {
            let mut state = self.table.lock();
            if state.closed {
                return Err(SessionError::Closed);
            }
            state.last_id = state.last_id.wrapping_add(1);
            let id = state.last_id;
            let line = Line {
                messages: sender,
                started: false,
                input: Credit::default(),
                output: Credit::default(),
            };
            state.lines.insert(id, line);
            id
        };
        let (writer, table) = (self.writer.clone(), Arc::clone(&self.table));
        let remote = Remote { id, writer, table };
        self.writer.send(&ToAgent::Exec(Exec { id, ..exec }))?;
        Ok((remote, messages))
    }

    /// Asks the machine to sync and power off.
    ///
    /// # Errors
    /// What sending says.
    pub fn power_off(&self) -> Result<(), SessionError> {
        self.table.lock().ending = true;
        self.writer.send(&ToAgent::PowerOff)
    }
}

impl Table {
    /// Hands a message to whom it concerns.
    fn hand_out(&self, message: FromAgent, writer: &Writer) -> Result<(), SessionError> {
        let (id, ends) = match &message {
            FromAgent::Started { id } | FromAgent::Output { id, .. } | FromAgent::Credit { id, .. } => {
                (*id, false)
            }
            FromAgent::Exited { id, .. } | FromAgent::ExecFailed { id, .. } => (*id, true),
            other => return Err(unexpected(other, "while commands ran")),
        };
        let mut state = self.lock();
        let line = state.lines.get_mut(&id).ok_or_else(|| unexpected(&message, "of no command"))?;
        let good = match &message {
            FromAgent::Started { .. } => !std::mem::replace(&mut line.started, true),
            FromAgent::Output { data, .. } => line.output.spend(data.len()),
            FromAgent::Credit { bytes, .. } => line.input.regain(*bytes),
            FromAgent::ExecFailed { .. } => !line.started,
            _ => true,
        };
        if !good {
            return Err(unexpected(&message, "beyond what was allowed"));
        }
        let listened_to = line.messages.send(message).is_ok();
        // A command that was left alone runs to its end all the same, however much it writes.
        let owed = if listened_to || ends { 0 } else { line.take_all() };
        if ends {
            state.lines.remove(&id);
        }
        drop(state);
        match owed {
            0 => Ok(()),
            bytes => writer.send(&ToAgent::Credit { id, bytes }),
        }
    }
}

impl Remote {
    /// Passes on what concerns a running command: its input, credit, a signal, a terminal's size. Whatever number the
    /// message has, it goes to this command; one that has ended gets nothing.
    ///
    /// # Errors
    /// [`Misplaced`] where the agent would be right to end the machine over it.
    pub fn pass(&self, message: ToAgent) -> Result<(), Misplaced> {
        let id = self.id;
        let mut state = self.table.lock();
        let Some(line) = state.lines.get_mut(&id) else { return Ok(()) };
        let message = match message {
            ToAgent::Stdin { data, .. } => {
                if !line.input.spend(data.len()) {
                    return Err(Misplaced("more input than there was credit for"));
                }
                ToAgent::Stdin { id, data }
            }
            ToAgent::Credit { bytes, .. } => {
                if !line.output.regain(bytes) {
                    return Err(Misplaced("more output taken than there was"));
                }
                ToAgent::Credit { id, bytes }
            }
            ToAgent::Signal { signal, .. } => ToAgent::Signal { id, signal },
            ToAgent::Resize { size, .. } => ToAgent::Resize { id, size },
            _ => return Err(Misplaced("a message that concerns no running command")),
        };
        drop(state);
        // Where this fails the session is over, and whoever waits is told.
        let _ = self.writer.send(&message);
        Ok(())
    }

    /// Counts all that was handed out as taken, so that the command's end, which comes after its output, is not held up.
    pub fn take_all(&self) {
        let mut state = self.table.lock();
        let Some(line) = state.lines.get_mut(&self.id) else { return };
        let owed = line.take_all();
        drop(state);
        if owed > 0 {
            let _ = self.writer.send(&ToAgent::Credit { id: self.id, bytes: owed });
        }
    }

    /// Has nothing to do with the command any more: what the agent still says of it ends the session.
    pub fn disown(&self) {
        self.table.lock().lines.remove(&self.id);
    }

    /// Kills the command, with all it started.
    pub fn kill(&self) {
        let _ = self.writer.send(&ToAgent::Signal { id: self.id, signal: KILL });
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        if self.table.lock().lines.contains_key(&self.id) {
            self.take_all();
            self.kill();
        }
    }
}
