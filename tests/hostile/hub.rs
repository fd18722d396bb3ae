//! Several commands at once in the conversation of `host`: what the agent says of each, and how the conversation ends for all.
//!
//! The hub's thread takes what the agent says as it comes, so a case starts its commands first. The hub counts them
//! from 1001.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use kiln::agent::{Hub, Remote, Session, SessionError};
use kiln_wire::{Exec, FromAgent, Outcome};

use super::script::Step;

/// How long the hub may take to hand out what was said.
const PATIENCE: Duration = Duration::from_secs(10);
/// The number of a hub's first command.
const FIRST: u32 = 1001;

/// A conversation that several commands share.
pub struct Shared {
    hub: Hub,
    end: Receiver<Result<(), SessionError>>,
    commands: BTreeMap<u32, (Remote, Receiver<FromAgent>)>,
    next: u32,
}

impl Shared {
    /// Shares `session`.
    pub fn new(session: Session) -> Result<Self, String> {
        let (sender, end) = channel();
        let hub = Hub::new(session, move |result| drop(sender.send(result)));
        let hub = hub.map_err(|error| error.to_string())?;
        Ok(Self { hub, end, commands: BTreeMap::new(), next: FIRST })
    }

    /// Starts another command.
    pub fn start(&mut self, exec: Exec) -> Result<(), SessionError> {
        let command = self.hub.start(exec)?;
        self.commands.insert(self.next, command);
        self.next += 1;
        Ok(())
    }

    /// Asks for the end of the machine.
    pub fn power_off(&self) -> Result<(), SessionError> {
        self.hub.power_off()
    }

    /// Nobody listens to a command any more.
    pub fn leave(&mut self, step: &Step) -> Result<(), String> {
        let id = step.number_at(0)?;
        self.commands.remove(&id).map(drop).ok_or_else(|| format!("there is no command {id}"))
    }

    /// How the conversation ended, for all.
    pub fn end(&self) -> Result<Result<(), SessionError>, String> {
        self.end.recv_timeout(PATIENCE).map_err(|_| "the conversation goes on".to_owned())
    }

    /// The next that one command hears: a word for it, and its bytes or status.
    pub fn hear(&self, step: &Step) -> Result<(&'static str, String), String> {
        let id = step.number_at(0)?;
        let (_, messages) = self.commands.get(&id).ok_or_else(|| format!("there is no command {id}"))?;
        Ok(match messages.recv_timeout(PATIENCE) {
            Ok(FromAgent::Started { .. }) => ("started", String::new()),
            Ok(FromAgent::Output { data, .. }) => ("output", data.escape_ascii().to_string()),
            Ok(FromAgent::Credit { bytes, .. }) => ("credit", bytes.to_string()),
            Ok(FromAgent::Exited { outcome: Outcome::Exit(status), .. }) => {
                ("exit", format!("status {status}"))
            }
            Ok(FromAgent::Exited { outcome, .. }) => ("exit", format!("{outcome:?}")),
            Ok(FromAgent::ExecFailed { errno, .. }) => ("not_started", format!("error {errno}")),
            Ok(other) => return Err(format!("command {id} hears {other:?}")),
            Err(RecvTimeoutError::Disconnected) => ("nothing", String::new()),
            Err(RecvTimeoutError::Timeout) => return Err(format!("command {id} hears nothing, and no end")),
        })
    }
}
