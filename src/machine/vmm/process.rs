//! The process that is a VMM: what it is handed becomes a machine, which it runs to its end.
//!
//! It is locked in by the time it gets here, and all that it takes of the guest it takes on threads that are locked in
//! further: one for each processor, one for each disk.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;

use kiln_vmm::cpu::Model;
use kiln_vmm::disk::Disk;
use kiln_vmm::local::Local;
use kiln_vmm::mmio::Registers;
use kiln_vmm::vhost::{Kind, VhostUser};
use kiln_vmm::{End, Machine, Parts, memory};
use serde::{Deserialize, Serialize};

use crate::machine::jail;
use crate::machine::launch::RAM;
use crate::machine::qemu::devices::GUEST_CID;

/// What its machine is to be, beside the descriptors `kvm`, `kernel`, `initramfs`, `console`, `ram`, `fs`, `vsock` and
/// `disk0` and so on.
#[derive(Debug, Serialize, Deserialize)]
pub struct Vmm {
    /// The kernel's command line.
    pub command_line: String,
    /// Guest memory, all of `ram`.
    pub memory_bytes: u64,
    /// Virtual processors.
    pub cpus: u8,
    /// Disks, in the order of their descriptors.
    pub disks: Vec<DiskOf>,
}

/// A disk of a machine.
#[derive(Debug, Serialize, Deserialize)]
pub struct DiskOf {
    /// By which the agent finds it.
    pub serial: String,
    /// Whether the guest may write.
    pub read_only: bool,
}

impl Vmm {
    /// Runs the machine until it is switched off.
    ///
    /// # Errors
    /// It cannot be put together, or ended in another way.
    pub fn run(self, mut descriptors: BTreeMap<String, OwnedFd>) -> Result<(), Box<dyn std::error::Error>> {
        // A thread that panics says no end, and the others would wait for one.
        std::panic::set_hook(Box::new(|panic| {
            let _ = writeln!(io::stderr(), "kiln: {panic}");
            std::process::abort();
        }));
        let mut take = |name: &str| descriptors.remove(name).ok_or(format!("no descriptor `{name}`"));
        let memory = memory::map(&File::from(take(RAM)?), self.memory_bytes)?;
        let ends = mpsc::channel();
        let mut devices = Vec::new();
        for (name, kind) in [("fs", Kind::fs(kiln_wire::SHARES_TAG)), ("vsock", Kind::vsock(GUEST_CID))] {
            let stream = UnixStream::from(take(name)?);
            devices.push(Registers::slot(VhostUser::new(stream, kind, &memory)?, &memory)?);
        }
        for (index, disk) in self.disks.iter().enumerate() {
            let file = File::from(take(&format!("disk{index}"))?);
            let (sender, serial) = (ends.0.clone(), disk.serial.clone());
            let failed = move |error: &io::Error| {
                let _ = sender.send(End::Device { what: format!("disk `{serial}`: {error}") });
            };
            let disk = Disk::new(file, &disk.serial, disk.read_only, failed)?;
            let device = Local::new("disk", disk, &memory, jail::enter_disk, ends.0.clone())?;
            devices.push(Registers::slot(device, &memory)?);
        }
        let machine = Machine::new(Parts {
            kvm: take("kvm")?,
            kernel: take("kernel")?.into(),
            initramfs: take("initramfs")?.into(),
            command_line: self.command_line,
            memory,
            cpus: self.cpus,
            model: Model::Fixed,
            console: Box::new(UnixStream::from(take("console")?)),
            devices,
            ends,
        })?;
        match machine.run(jail::enter_processor)? {
            End::PoweredOff => Ok(()),
            other => Err(other.into()),
        }
    }
}
