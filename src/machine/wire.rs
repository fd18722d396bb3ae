//! The stream to the agent, as a started machine has it.

use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

/// How long an agent may take to connect over vsock.
const PATIENCE: Duration = Duration::from_secs(90);
/// How often to look meanwhile whether the machine is still there.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// The stream to the agent.
pub(super) enum Wire {
    /// There from the first.
    Connected(UnixStream),
    /// The guest connects.
    Awaited(Receiver<UnixStream>),
    /// Somebody has it.
    Taken,
}

impl Wire {
    /// The stream, once the agent has connected; none where it does not, or `is_gone` says that the machine is.
    ///
    /// # Errors
    /// It was taken before.
    pub fn take(&mut self, mut is_gone: impl FnMut() -> bool) -> Result<Option<UnixStream>, Taken> {
        let connections = match std::mem::replace(self, Self::Taken) {
            Self::Connected(wire) => return Ok(Some(wire)),
            Self::Awaited(connections) => connections,
            Self::Taken => return Err(Taken),
        };
        let give_up = Instant::now() + PATIENCE;
        loop {
            // The first connection is the agent's: nothing of a step runs before it. Later ones find nobody.
            match connections.recv_timeout(LOOK_AGAIN) {
                Ok(wire) => return Ok(Some(wire)),
                Err(RecvTimeoutError::Timeout) if Instant::now() < give_up && !is_gone() => {}
                Err(_) => return Ok(None),
            }
        }
    }

    /// The stream, where it is there and nobody has it.
    pub fn held(&self) -> Option<&UnixStream> {
        match self {
            Self::Connected(wire) => Some(wire),
            _ => None,
        }
    }
}

/// The wire was taken before.
#[derive(Debug, thiserror::Error)]
#[error("the wire was taken before")]
pub(super) struct Taken;

impl From<Taken> for super::MachineError {
    fn from(taken: Taken) -> Self {
        Self::Device(taken.to_string())
    }
}
