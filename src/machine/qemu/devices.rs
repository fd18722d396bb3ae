//! The device process beside a QEMU: started in its jail, given its shares, and connected to QEMU.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::OnceLock;

use kiln_virtio::control;

use crate::machine::jail::Held;
use crate::machine::launch::Become;
use crate::machine::spawn::{Process, spawn_jailed};
use crate::machine::{Carrier, MachineError, Share};

/// The guest's vsock address; each machine has a device process of its own, so all may have the same.
pub(in crate::machine) const GUEST_CID: u64 = 3;

/// One end for us, one to be handed over.
pub(in crate::machine) fn pair(what: &'static str) -> Result<(UnixStream, OwnedFd), MachineError> {
    let (ours, theirs) = UnixStream::pair().map_err(MachineError::io(what))?;
    Ok((ours, theirs.into()))
}

/// A listening socket for a device, and the connection to it for QEMU. The name exists only within this function.
fn listening_pair() -> Result<(OwnedFd, OwnedFd), MachineError> {
    let make = || {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path)?;
        let connected = UnixStream::connect(&path)?;
        io::Result::Ok((listener.into(), connected.into()))
    };
    make().map_err(MachineError::io("make a socket for a device"))
}

/// The parent's and QEMU's side of the device process.
pub(in crate::machine) struct Devices {
    pub process: Process,
    pub held: Held,
    /// The connection to it, of which others may have descriptors too.
    pub socket: UnixStream,
    /// Speaks on that; made when there is something to say.
    client: OnceLock<control::Client>,
    /// vhost-user connections for QEMU: of fs, and of vsock where it carries the wire.
    pub for_qemu: Vec<(String, OwnedFd)>,
}

impl Devices {
    /// Starts it; it has no shares yet.
    pub fn start(carrier: Carrier) -> Result<Self, MachineError> {
        let (socket, theirs) = pair("make a socket pair")?;
        let (device_fs, qemu_fs) = listening_pair()?;
        let mut for_qemu = vec![("fs".to_owned(), qemu_fs)];
        let mut for_process = vec![("control".to_owned(), theirs), ("fs".to_owned(), device_fs)];
        if carrier == Carrier::Vsock {
            let (device_vsock, qemu_vsock) = listening_pair()?;
            for_qemu.push(("vsock".to_owned(), qemu_vsock));
            for_process.push(("vsock".to_owned(), device_vsock));
        }
        let vsock_cid = (carrier == Carrier::Vsock).then_some(GUEST_CID);
        let (process, held) = spawn_jailed(Become::Devices { vsock_cid }, &for_process)
            .map_err(MachineError::io("start the device process"))?;
        Ok(Self { process, held, socket, client: OnceLock::new(), for_qemu })
    }

    /// Starts it with `shares`, which are all that it may read.
    pub fn with_shares(carrier: Carrier, shares: &[Share]) -> Result<Self, MachineError> {
        let devices = Self::start(carrier)?;
        give(devices.control()?, shares).map_err(|error| devices.failure(&error))?;
        Ok(devices)
    }

    /// What speaks to it.
    pub fn control(&self) -> Result<&control::Client, MachineError> {
        if self.client.get().is_none() {
            let client = self.socket.try_clone().and_then(control::Client::new);
            let _ = self.client.set(client.map_err(MachineError::io("speak to the device process"))?);
        }
        self.client.get().ok_or_else(|| MachineError::Device("nobody speaks to it".to_owned()))
    }

    /// An error of its, with what it said last.
    pub fn failure(&self, error: &dyn std::fmt::Display) -> MachineError {
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
