//! A running QEMU and its device process, as a [`Machine`].

use std::io;
use std::os::unix::net::UnixStream;
use std::process::ExitStatus;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use kiln_virtio::fs::record::Record;

use super::devices::Devices;
use super::qmp::{DiskTrouble, Watch};
use crate::machine::spawn::Process;
use crate::machine::tail::Tail;
use crate::machine::{Death, Identity, Machine, MachineError};

/// How long a process that closed its streams may take to be gone.
const REAP_PATIENCE: Duration = Duration::from_millis(500);
/// How long an agent may take to connect over vsock.
const WIRE_PATIENCE: Duration = Duration::from_secs(90);

/// The stream to the agent.
pub(super) enum Wire {
    Connected(UnixStream),
    Awaited(Receiver<UnixStream>),
    Taken,
}

/// A running QEMU. Fields are dropped in order: QEMU dies before what it is connected to.
pub(super) struct QemuMachine {
    pub identity: Identity,
    pub wire: Wire,
    pub console: Tail,
    pub watch: Watch,
    /// Serials, in QEMU's order.
    pub disks: Vec<String>,
    pub process: Process,
    pub devices: Option<Devices>,
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
        let wire = match std::mem::replace(&mut self.wire, Wire::Taken) {
            Wire::Connected(wire) => Ok(wire),
            // The first connection is the agent's: nothing of a step runs before it. Later ones find nobody.
            Wire::Awaited(connections) => connections
                .recv_timeout(WIRE_PATIENCE)
                .map_err(|_| MachineError::DiedAtStart(self.death(Duration::ZERO))),
            Wire::Taken => Err(MachineError::Device("the wire was taken before".to_owned())),
        }?;
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

pub(in crate::machine) fn in_words(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => io::Error::last_os_error().to_string(),
    }
}
