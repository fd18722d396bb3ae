//! The backend that is kiln's own VMM (`src/vmm`) on KVM, and beside it the device process, which serves shares and the
//! wire over vhost-user as it does beside QEMU. This is the parent's side; [`process`] is the VMM's.
//!
//! The VMM gets descriptors alone: KVM's, the guest's memory, kernel, initramfs, console, disks, and its two connections
//! to the device process. The wire is carried by vsock.

mod process;

use std::fs::{File, OpenOptions};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use kiln_virtio::fs::record::Record;
use kiln_vmm::End;
use kiln_vmm::memory;

use self::process::DiskOf;
pub(super) use self::process::Vmm;
use super::launch::{Become, RAM};
use super::qemu::devices::{Devices, pair};
use super::qemu::in_words;
use super::spawn::{Process, spawn_jailed};
use super::tail::Tail;
use super::{Accelerator, Backend, Carrier, Death, Identity, Machine, MachineError, Origin, Spec};

/// How long an agent may take to connect.
const WIRE_PATIENCE: Duration = Duration::from_secs(90);
/// How often to look meanwhile whether the VMM is still there.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// How long a process that closed its streams may take to be gone.
const REAP_PATIENCE: Duration = Duration::from_millis(500);

/// The kernel's command line. As for QEMU: a panic is a reset, which ends the machine at once, and ciphers are not tested.
/// There is no PCI to look for. Without `reboot=a` Linux 6.12 resets this machine by way of a BIOS in real mode, of which it
/// has none, and hangs there.
const COMMAND_LINE: &str = "console=ttyS0 quiet loglevel=4 panic=-1 init_on_alloc=1 cryptomgr.notests \
                            random.trust_cpu=off tsc=nowatchdog rcupdate.rcu_expedited=1 pci=off reboot=a kiln.wire=vsock";

/// Starts machines with kiln's own VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KilnVmm;

impl Backend for KilnVmm {
    fn start(&self, spec: Spec) -> Result<Box<dyn Machine>, MachineError> {
        let device = OpenOptions::new().read(true).write(true).open("/dev/kvm");
        let device = device.map_err(MachineError::io("open /dev/kvm"))?;
        let open = |path| File::open(path).map_err(MachineError::io("open the kernel or its initramfs"));
        let (kernel, initramfs) = (open(&spec.kernel)?, open(&spec.initramfs)?);
        let ram = memory::make_file(spec.memory_bytes)?;
        let cpus = u8::try_from(spec.cpus).map_err(|_| MachineError::Processors(spec.cpus))?;
        let mut devices = Devices::with_shares(Carrier::Vsock, &spec.shares)?;
        let port = kiln_wire::AGENT_VSOCK_PORT;
        let wire = devices.control()?.listen(port).map_err(|error| devices.failure(&error))?;
        let (console, theirs) = pair("make a socket pair")?;
        let mut descriptors = vec![
            ("kvm".to_owned(), device.into()),
            ("kernel".to_owned(), kernel.into()),
            ("initramfs".to_owned(), initramfs.into()),
            ("console".to_owned(), theirs),
            (RAM.to_owned(), ram.into()),
        ];
        descriptors.append(&mut devices.for_qemu);
        let mut disks = Vec::new();
        for (index, disk) in spec.disks.into_iter().enumerate() {
            descriptors.push((format!("disk{index}"), disk.file));
            disks.push(DiskOf { serial: disk.serial, read_only: disk.read_only });
        }
        let vmm = Vmm { command_line: COMMAND_LINE.to_owned(), memory_bytes: spec.memory_bytes, cpus, disks };
        let (process, held) =
            spawn_jailed(Become::Vmm(vmm), &descriptors).map_err(MachineError::io("start kiln's VMM"))?;
        // The processes hold their ends now; with ours gone, their death closes the streams.
        drop(descriptors);
        Ok(Box::new(VmmMachine {
            identity: Identity {
                backend: format!("vmm {}", env!("CARGO_PKG_VERSION")),
                accelerator: Accelerator::Kvm,
                jail: held.both(&devices.held),
                origin: Origin::Boot,
            },
            wire: Some(wire),
            console: Tail::follow(console),
            process,
            devices,
        }))
    }
}

/// A running VMM. Fields are dropped in order: it dies before what it is connected to.
struct VmmMachine {
    identity: Identity,
    wire: Option<Receiver<UnixStream>>,
    console: Tail,
    process: Process,
    devices: Devices,
}

impl Machine for VmmMachine {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn wire(&mut self) -> Result<UnixStream, MachineError> {
        let Some(connections) = self.wire.take() else {
            return Err(MachineError::Device("the wire was taken before".to_owned()));
        };
        let give_up = Instant::now() + WIRE_PATIENCE;
        let wire = loop {
            // The first connection is the agent's: nothing of a step runs before it. Later ones find nobody.
            match connections.recv_timeout(LOOK_AGAIN) {
                Ok(wire) => break wire,
                Err(RecvTimeoutError::Timeout) if Instant::now() < give_up => {
                    if self.process.wait(Duration::ZERO).is_none() {
                        continue;
                    }
                }
                Err(_) => {}
            }
            return Err(MachineError::DiedAtStart(self.death(Duration::ZERO)));
        };
        self.process.hang_up_at_end(wire.try_clone().map_err(MachineError::io("hold the wire"))?);
        Ok(wire)
    }

    fn observed(&mut self) -> Result<Record, MachineError> {
        // A guest that still ran could read on after the record was taken.
        self.process.stop();
        self.observed_so_far()
    }

    fn observed_so_far(&mut self) -> Result<Record, MachineError> {
        let devices = &self.devices;
        devices.control()?.finish().map_err(|error| devices.failure(&error))
    }

    fn death(&mut self, patience: Duration) -> Death {
        if let Some(status) = self.devices.process.wait(REAP_PATIENCE) {
            let (status, said) = (in_words(status), self.devices.process.said());
            return Death::Killed { program: "the device process".into(), status, said };
        }
        let status = self.process.wait(patience);
        let said = self.process.said();
        let said = said.trim_start_matches("kiln: ").to_owned();
        // What a guest prints counts only where the machine went as such a guest's does.
        let console = self.console.text();
        let panic = console.lines().find(|line| line.contains("Kernel panic"));
        match status {
            Some(_) if let Some((disk, why)) = disk_of(&said) => Death::Disk { disk, why },
            Some(status) if status.success() => Death::Stopped(End::PoweredOff.to_string()),
            Some(_) if said == End::Reset.to_string() => match panic {
                Some(line) => Death::Panicked(line.trim().to_owned()),
                None => Death::Stopped(said),
            },
            None if let Some(line) = panic => Death::Panicked(line.trim().to_owned()),
            Some(status) => Death::Killed { program: PROGRAM.into(), status: in_words(status), said },
            None => Death::Killed {
                program: PROGRAM.into(),
                status: "still running, but not answering".to_owned(),
                said,
            },
        }
    }

    fn console(&self) -> String {
        self.console.text()
    }

    fn processes(&self) -> Vec<i32> {
        [&self.process, &self.devices.process].into_iter().filter_map(Process::number).collect()
    }
}

const PROGRAM: &str = "kiln's VMM";

/// The disk that ended a machine, and why, where that is what its VMM `said` last: [`process`] writes it.
fn disk_of(said: &str) -> Option<(String, String)> {
    let end = End::Device { what: said.to_owned() }.to_string();
    let words = end.strip_suffix(said)?;
    let (disk, why) = said.strip_prefix(words)?.strip_prefix("disk `")?.split_once("`: ")?;
    Some((disk.to_owned(), why.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_the_host_could_not_serve_is_named() {
        let said = End::Device { what: "disk `scratch`: No space left on device".to_owned() }.to_string();
        let disk = ("scratch".to_owned(), "No space left on device".to_owned());
        assert_eq!(disk_of(&said), Some(disk));
        assert_eq!(disk_of(&End::Reset.to_string()), None);
        assert_eq!(disk_of(&End::Device { what: "disk: its ring".to_owned() }.to_string()), None);
    }
}
