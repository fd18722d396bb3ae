//! The device process beside a QEMU: started in its jail, and connected to QEMU.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};

use crate::machine::launch::Become;
use crate::machine::server::{GUEST_CID, Server};
use crate::machine::{Carrier, MachineError, Share};

/// A listening socket for a device, and the connection to it for QEMU. The name exists only within this function.
fn listening_pair() -> Result<(OwnedFd, OwnedFd), MachineError> {
    let make = || {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("s");
        let pair = UnixListener::bind(&path)
            .and_then(|listener| Ok((listener.into(), UnixStream::connect(&path)?.into())));
        // So it goes where no descriptor is left to look into it, too.
        let _ = fs::remove_file(&path);
        let _ = fs::remove_dir(folder.path());
        pair
    };
    make().map_err(MachineError::io("make a socket for a device"))
}

/// The parent's and QEMU's side of the device process.
pub(super) struct Devices {
    pub server: Server,
    /// vhost-user connections for QEMU: of fs, and of vsock where it carries the wire.
    pub for_qemu: Vec<(String, OwnedFd)>,
}

impl Devices {
    /// Starts it; it has no shares yet.
    pub fn start(carrier: Carrier) -> Result<Self, MachineError> {
        let (device_fs, qemu_fs) = listening_pair()?;
        let mut for_qemu = vec![("fs".to_owned(), qemu_fs)];
        let mut for_process = vec![("fs".to_owned(), device_fs)];
        if carrier == Carrier::Vsock {
            let (device_vsock, qemu_vsock) = listening_pair()?;
            for_qemu.push(("vsock".to_owned(), qemu_vsock));
            for_process.push(("vsock".to_owned(), device_vsock));
        }
        let vsock_cid = (carrier == Carrier::Vsock).then_some(GUEST_CID);
        let server = Server::start(Become::Devices { vsock_cid }, for_process, "start the device process")?;
        Ok(Self { server, for_qemu })
    }

    /// Starts it with `shares`, which are all that it may read.
    pub fn with_shares(carrier: Carrier, shares: &[Share]) -> Result<Self, MachineError> {
        let devices = Self::start(carrier)?;
        devices.server.give(shares)?;
        Ok(devices)
    }
}
