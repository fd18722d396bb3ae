//! A running QEMU and its device process, as a [`Machine`].

use std::os::unix::net::UnixStream;
use std::time::Duration;

use kiln_virtio::fs::record::Record;

use super::qmp::{DiskTrouble, Watch};
use crate::machine::ready::Lendable;
use crate::machine::server::Server;
use crate::machine::spawn::{Process, in_words};
use crate::machine::tail::Tail;
use crate::machine::wire::Wire;
use crate::machine::{Death, Identity, Machine, MachineError, Share};

/// How long a process that closed its streams may take to be gone.
const REAP_PATIENCE: Duration = Duration::from_millis(500);

/// A running QEMU. Fields are dropped in order: QEMU dies before what it is connected to.
pub(in crate::machine) struct QemuMachine {
    pub identity: Identity,
    pub wire: Wire,
    pub console: Tail,
    pub(super) watch: Watch,
    /// Serials, in QEMU's order.
    pub disks: Vec<String>,
    pub process: Process,
    /// The device process.
    pub devices: Option<Server>,
    /// What the user should know of how it came to be.
    pub notes: Vec<String>,
}

impl Machine for QemuMachine {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn notes(&self) -> &[String] {
        &self.notes
    }

    fn wire(&mut self) -> Result<UnixStream, MachineError> {
        let process = &mut self.process;
        let wire = self.wire.take(|| process.wait(Duration::ZERO).is_some())?;
        let Some(wire) = wire else { return Err(MachineError::DiedAtStart(self.death(Duration::ZERO))) };
        self.watch.hang_up_at_trouble(wire.try_clone().map_err(MachineError::io("hold the wire"))?);
        Ok(wire)
    }

    fn observed(&mut self) -> Result<Record, MachineError> {
        // A guest that still ran could read on after the record was taken.
        self.process.stop();
        self.observed_so_far()
    }

    fn observed_so_far(&mut self) -> Result<Record, MachineError> {
        match &self.devices {
            Some(devices) => devices.control()?.finish().map_err(|error| devices.failure(&error)),
            None => Ok(Record::default()),
        }
    }

    fn death(&mut self, patience: Duration) -> Death {
        if let Some(devices) = &mut self.devices
            // Its streams close a moment before it can be reaped.
            && let Some(status) = devices.process.wait(REAP_PATIENCE)
        {
            let status = in_words(status);
            return Death::Killed {
                program: "the device process".into(),
                status,
                said: devices.process.said(),
            };
        }
        if let Some(DiskTrouble { node, why }) = self.watch.trouble() {
            let index = node.strip_prefix("disk").and_then(|number| number.parse::<usize>().ok());
            let disk = index.and_then(|index| self.disks.get(index)).cloned().unwrap_or(node);
            return Death::Disk { disk, why };
        }
        let reason = self.watch.shutdown_reason(patience);
        let status = self.process.wait(patience);
        let console = self.console.text();
        if let Some(line) = console.lines().find(|line| line.contains("Kernel panic")) {
            return Death::Panicked(line.trim().to_owned());
        }
        match (reason, status) {
            (Some(reason), Some(status)) if status.success() => Death::Stopped(reason),
            (_, Some(status)) => {
                Death::Killed { program: "QEMU".into(), status: in_words(status), said: self.process.said() }
            }
            (_, None) => Death::Killed {
                program: "QEMU".into(),
                status: "still running, but not answering".to_owned(),
                said: self.process.said(),
            },
        }
    }

    fn console(&self) -> String {
        self.console.text()
    }

    fn processes(&self) -> Vec<i32> {
        let devices = self.devices.as_ref().map(|devices| &devices.process);
        [Some(&self.process), devices].into_iter().flatten().filter_map(Process::number).collect()
    }
}

impl Lendable for QemuMachine {
    fn wire_held(&self) -> Option<&UnixStream> {
        self.wire.held()
    }

    fn control_socket(&self) -> Option<&UnixStream> {
        self.devices.as_ref().map(|devices| &devices.socket)
    }

    fn stop(&mut self) {
        self.process.stop();
    }

    fn note(&mut self, notes: Vec<String>) {
        self.notes = notes;
    }

    fn give(&mut self, shares: &[Share]) -> Result<(), MachineError> {
        match &self.devices {
            Some(devices) => devices.give(shares),
            None => Ok(()),
        }
    }
}
