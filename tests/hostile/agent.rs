//! The agent's side of the wire as a target: what its decoder makes of a host's bytes. The case is the host.
//!
//! The agent itself is PID 1 of a machine and cannot run here. It switches the machine off at the first error that
//! the reader or the decoder gives (`guest/session.rs`), so what matters is that there is one.

use kiln_wire::{FrameReader, MAX_PAYLOAD_BYTES, ToAgent, encode_frame};

use super::script::{Step, Target};
use super::value::Value;
use super::wire::{From, frame};

/// Frames and messages, as the agent takes them.
pub struct AgentTarget {
    reader: FrameReader,
    /// Names of the messages that were taken.
    taken: Vec<&'static str>,
    /// Why the machine was switched off.
    ended: Option<String>,
}

impl AgentTarget {
    /// An agent that has heard nothing.
    pub fn new() -> Self {
        Self { reader: FrameReader::new(MAX_PAYLOAD_BYTES), taken: Vec::new(), ended: None }
    }

    /// Takes what has arrived; true where a message came out of it.
    fn take(&mut self) -> bool {
        let before = self.taken.len();
        while self.ended.is_none() {
            match self.reader.next() {
                Ok(None) => break,
                Err(error) => self.ended = Some(error.to_string()),
                Ok(Some(payload)) => match ToAgent::decode(&payload) {
                    Err(error) => self.ended = Some(error.to_string()),
                    // What was decoded is what was sent, and nothing but that.
                    Ok(message) if message.encode() != payload => {
                        self.ended = Some("the message has two forms".to_owned());
                    }
                    Ok(_) => self.taken.push(From::Host.name(payload.first().copied().unwrap_or(0))),
                },
            }
        }
        self.taken.len() > before
    }
}

impl Target for AgentTarget {
    fn act(&mut self, step: &mut Step) -> Result<(), String> {
        let Some(frame) = frame(From::Host, step, 0)? else {
            return Err(format!("`{}` is not known here", step.verb));
        };
        // In pieces, as a carrier delivers them.
        let mut taken = false;
        for piece in frame.chunks(64 << 10) {
            self.reader.push(piece);
            taken |= self.take();
        }
        match (&self.ended, step.expected_word()) {
            (Some(why), Some("ends")) => step.expect_text(why),
            (None, None | Some("taken")) if taken => Ok(()),
            (None, Some("waits")) if !taken => Ok(()),
            (Some(why), _) => Err(step.unlike(format!("ends ({why})"))),
            (None, _) => Err(step.unlike(if taken { "taken" } else { "waits" })),
        }
    }

    fn name(&self, name: &str) -> Option<Value> {
        match name {
            "taken" => Some(Value::Bytes(self.taken.join(" ").into_bytes())),
            "pending" => Some(Value::from(self.reader.pending_bytes())),
            "VERSION" => Some(Value::from(u64::from(kiln_wire::VERSION))),
            "MAX_FRAME" => Some(Value::from(MAX_PAYLOAD_BYTES)),
            "MAX_ARGUMENTS" => Some(Value::from(kiln_wire::MAX_ARGUMENTS)),
            "MAX_ARGUMENT_BYTES" => Some(Value::from(kiln_wire::MAX_ARGUMENT_BYTES)),
            _ => None,
        }
    }

    fn serve(&mut self) -> Result<(), String> {
        let mut agent = Self::new();
        agent.reader.push(&encode_frame(&ToAgent::Hello { version: kiln_wire::VERSION }.encode()));
        if agent.take() { Ok(()) } else { Err("a good message is not taken".to_owned()) }
    }
}
