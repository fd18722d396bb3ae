//! A machine for tests of what stands above machines: its agent is a closure that speaks the wire.

use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::time::Duration;

use kiln_virtio::fs::record::Record;

use super::jail::Held;
use super::{Accelerator, Backend, Death, Identity, Machine, MachineError, Origin, Spec};
use crate::threads;

/// What plays the guest: it gets the agent's end of the wire and the machine's spec.
pub type Guest = Box<dyn FnOnce(UnixStream, Spec) + Send>;

/// Starts machines whose guests were prepared by the test, one after another.
pub struct Fake {
    // Guests not started yet, taken from the front.
    guests: Mutex<Vec<Guest>>,
}

impl Fake {
    /// A backend whose machines are played by `guests`, in their order.
    pub fn new(guests: Vec<Guest>) -> Self {
        Self { guests: Mutex::new(guests) }
    }
}

impl Backend for Fake {
    fn start(&self, spec: Spec) -> Result<Box<dyn Machine>, MachineError> {
        let mut guests = self.guests.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if guests.is_empty() {
            return Err(MachineError::Missing { program: "a guest for this test".to_owned() });
        }
        let guest = guests.remove(0);
        let (ours, theirs) = UnixStream::pair().map_err(MachineError::io("make a socket pair"))?;
        threads::start("guest", move || guest(theirs, spec)).map_err(MachineError::io("start a guest"))?;
        let identity = Identity {
            backend: "fake".to_owned(),
            accelerator: Accelerator::Tcg,
            jail: Held::default(),
            origin: Origin::Boot,
        };
        Ok(Box::new(FakeMachine { identity, wire: Some(ours) }))
    }
}

struct FakeMachine {
    identity: Identity,
    wire: Option<UnixStream>,
}

impl Machine for FakeMachine {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn wire(&mut self) -> Result<UnixStream, MachineError> {
        self.wire.take().ok_or_else(|| MachineError::Device("the wire was taken".to_owned()))
    }

    fn observed(&mut self) -> Result<Record, MachineError> {
        Ok(Record::default())
    }

    fn observed_so_far(&mut self) -> Result<Record, MachineError> {
        Ok(Record::default())
    }

    fn death(&mut self, _patience: Duration) -> Death {
        Death::Stopped("the fake guest ended".to_owned())
    }

    fn console(&self) -> String {
        String::new()
    }
}
