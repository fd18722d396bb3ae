//! A child that serves a machine's shares, and what speaks to it: the device process beside a QEMU, or kiln's own VMM.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;

use kiln_virtio::control;

use super::jail::Held;
use super::launch::Become;
use super::spawn::{Process, spawn_jailed};
use super::{MachineError, Share};
use crate::threads::Refused;

/// The guest's vsock address; each machine has a device of its own, so all may have the same.
pub(super) const GUEST_CID: u64 = 3;

/// One end for us, one to be handed over.
pub(super) fn pair(what: &'static str) -> Result<(UnixStream, OwnedFd), MachineError> {
    let (ours, theirs) = UnixStream::pair().map_err(MachineError::io(what))?;
    Ok((ours, theirs.into()))
}

/// The parent's side of a child that serves shares.
pub(super) struct Server {
    pub process: Process,
    pub held: Held,
    /// The connection to it, of which others may have descriptors too.
    pub socket: UnixStream,
    /// Speaks on that; made when there is something to say.
    client: OnceLock<control::Client>,
}

impl Server {
    /// Starts a child that becomes `what` and holds `descriptors`, its end of the connection among them as `control`.
    pub fn start(
        what: Become,
        mut descriptors: Vec<(String, OwnedFd)>,
        doing: &'static str,
    ) -> Result<Self, MachineError> {
        let (socket, theirs) = pair("make a socket pair")?;
        descriptors.push(("control".to_owned(), theirs));
        let (process, held) = spawn_jailed(what, &descriptors).map_err(MachineError::io(doing))?;
        Ok(Self { process, held, socket, client: OnceLock::new() })
    }

    /// What speaks to it.
    pub fn control(&self) -> Result<&control::Client, MachineError> {
        if self.client.get().is_none() {
            let client =
                |socket| control::Client::new(socket).map_err(Refused::told("thread `device-control`"));
            let client = self.socket.try_clone().and_then(client);
            let _ = self.client.set(client.map_err(MachineError::io("speak to the device process"))?);
        }
        self.client.get().ok_or_else(|| MachineError::Device("nobody speaks to it".to_owned()))
    }

    /// Gives it `shares`, which are all that it may read from then on.
    pub fn give(&self, shares: &[Share]) -> Result<(), MachineError> {
        give(self.control()?, shares).map_err(|error| self.failure(&error))
    }

    /// An error of its, with what it said last.
    pub fn failure(&self, error: &control::ClientError) -> MachineError {
        if matches!(error, control::ClientError::Closed | control::ClientError::Send(_)) {
            self.process.has_said_all();
        }
        if let Some(failure) = self.process.failure() {
            return MachineError::Failed(failure);
        }
        let said = self.process.said();
        MachineError::Device(if said.is_empty() { error.to_string() } else { format!("{error}: {said}") })
    }
}

/// Gives a device process `shares`, which are all that it may read from then on.
pub(super) fn give(control: &control::Client, shares: &[Share]) -> Result<(), control::ClientError> {
    for share in shares {
        control.add_share(share.name.as_bytes(), share.directory.as_fd(), share.attributes)?;
        control.hide(share.name.as_bytes(), &share.hidden)?;
    }
    control.narrow()
}
