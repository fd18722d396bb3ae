//! The backend that is kiln's own VMM (`src/vmm`) on KVM: one process a machine, which serves its shares too. This is the parent's
//! side; [`process`] is the VMM's.
//!
//! The VMM gets descriptors alone: KVM's, the guest's memory, kernel and initramfs or the state of a frozen machine, console,
//! wire, disks, and the connection over which it is given shares and asked for their record. A copy of a template maps the
//! template's memory, and holds for itself only what it writes to.

mod process;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use kiln_digest::Digest;
use kiln_virtio::fs::record::Record;
use kiln_vmm::working_set::{self, WorkingSet};
use kiln_vmm::{End, memory};
use rustix::fs::{MemfdFlags, memfd_create};

pub(super) use self::process::Vmm;
use self::process::{DiskOf, Origin as Begin, WORKING_SET};
use super::launch::{Become, RAM};
use super::ready::Lendable;
use super::server::{Server, pair};
use super::slots::{Places, SLOT_BYTES, SLOTS};
use super::spawn::in_words;
use super::tail::Tail;
use super::template::{
    self, COPY_PATIENCE, Freezer, Frozen, Template, TemplateError, Templates, answer, rehearse, settle,
};
use super::wire::Wire;
use super::{
    Accelerator, Backend, Carrier, Cpu, Death, Identity, KERNEL_WORDS, Machine, MachineError, Origin, Share,
    Spec, probe,
};

/// How often to look whether the VMM has said how its guest ended.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// What the kernel is told beside [`KERNEL_WORDS`]. There is no PCI to look for. Without `reboot=a` Linux 6.12 resets this
/// machine by way of a BIOS in real mode, of which it has none, and hangs there.
const OWN_WORDS: &str = "pci=off reboot=a";

/// Changes with what a machine of this backend is, beside what is in the key anyway.
const FORMAT: u32 = 3;

fn command_line(carrier: Carrier) -> String {
    match carrier {
        Carrier::Serial => format!("{KERNEL_WORDS} {OWN_WORDS}"),
        Carrier::Vsock => format!("{KERNEL_WORDS} {OWN_WORDS} kiln.wire=vsock"),
    }
}

/// Starts machines with kiln's own VMM.
#[derive(Debug, Clone)]
pub struct KilnVmm {
    templates: Option<Templates>,
}

impl KilnVmm {
    /// One that copies machines from `templates`, where it is given some.
    #[must_use]
    pub fn new(templates: Option<Templates>) -> Self {
        Self { templates }
    }

    /// Starts a machine of `spec` without its shares.
    fn bring_up(&self, spec: &Spec, begins: Begins<'_>) -> Result<VmmMachine, MachineError> {
        let device = probe::open().map_err(MachineError::Kvm)?;
        let cpus = u8::try_from(spec.cpus).map_err(|_| MachineError::Processors(spec.cpus))?;
        let (console, theirs) = io::pipe().map_err(MachineError::io("make a pipe"))?;
        // Where nobody reads, what the guest prints is lost, and the guest runs on.
        rustix::io::ioctl_fionbio(&theirs, true)
            .map_err(|errno| MachineError::io("make a pipe")(errno.into()))?;
        let mut descriptors = vec![("kvm".to_owned(), device.into()), ("console".to_owned(), theirs.into())];
        let mut add = |name: &str, file: File| descriptors.push((name.to_owned(), file.into()));
        let (origin, begin) = match begins {
            Begins::Boot { ram, becomes_template } => {
                let open =
                    |path| File::open(path).map_err(MachineError::io("open the kernel or its initramfs"));
                add("kernel", open(&spec.kernel)?);
                add("initramfs", open(&spec.initramfs)?);
                add(RAM, ram);
                (Origin::Boot, Begin::Boot { command_line: command_line(spec.carrier), becomes_template })
            }
            Begins::Thaw { template, shows_working_set } => {
                let ram = template.ram.try_clone().map_err(MachineError::io("hold a template's memory"))?;
                add(RAM, ram);
                add("state", held(&template.state).map_err(MachineError::io("hold a template's state"))?);
                // What is put in place ahead would show as touched.
                if let (Some(set), false) = (&template.working_set, shows_working_set) {
                    let held = held(&set.encode()).map_err(MachineError::io("hold a working set"))?;
                    add(WORKING_SET, held);
                }
                (Origin::Template, Begin::Frozen { shows_working_set })
            }
        };
        let mut wire = None;
        if spec.carrier == Carrier::Serial {
            let (ours, theirs) = pair("make a socket pair")?;
            descriptors.push(("wire".to_owned(), theirs));
            wire = Some(Wire::Connected(ours));
        }
        let places = Places::of(&spec.disks);
        let mut disks = Vec::new();
        for (slot, disk) in SLOTS.iter().zip(places.slots) {
            let (serial, read_only) = (slot.serial.to_owned(), slot.read_only);
            // A copy's driver keeps the size that it saw when the slot was empty.
            let capacity = (disk.is_none() || matches!(begin, Begin::Frozen { .. })).then_some(SLOT_BYTES);
            disks.push(DiskOf { serial, read_only, capacity, is_there: disk.is_some() });
        }
        for disk in &places.others {
            let (serial, read_only) = (disk.serial.clone(), disk.read_only);
            disks.push(DiskOf { serial, read_only, capacity: None, is_there: true });
        }
        for (index, disk) in places.numbered() {
            let file = disk.file.try_clone().map_err(MachineError::io("hold a disk"))?;
            descriptors.push((format!("disk{index}"), file));
        }
        let vmm = Vmm {
            origin: begin,
            memory_bytes: spec.memory_bytes,
            cpus,
            host_cpu: spec.cpu == Cpu::Host,
            has_vsock: spec.carrier == Carrier::Vsock,
            disks,
        };
        let server = Server::start(Become::Vmm(vmm), descriptors, "start kiln's VMM")?;
        let wire = match wire {
            Some(wire) => wire,
            None => {
                let port = kiln_wire::AGENT_VSOCK_PORT;
                Wire::Awaited(server.control()?.listen(port).map_err(|error| server.failure(&error))?)
            }
        };
        Ok(VmmMachine {
            identity: Identity {
                backend: format!("vmm {}", env!("CARGO_PKG_VERSION")),
                accelerator: Accelerator::Kvm,
                jail: server.held.clone(),
                origin,
            },
            wire,
            console: Tail::follow(console).map_err(MachineError::io("read the console"))?,
            server,
            notes: Vec::new(),
        })
    }
}

/// Where a machine begins.
enum Begins<'a> {
    /// At its kernel, in this memory.
    Boot { ram: File, becomes_template: bool },
    /// Where another was frozen.
    Thaw { template: &'a Template, shows_working_set: bool },
}

/// `bytes` as a file for another process to read.
fn held(bytes: &[u8]) -> io::Result<File> {
    let file = File::from(memfd_create("state", MemfdFlags::CLOEXEC)?);
    file.write_all_at(bytes, 0)?;
    Ok(file)
}

impl Backend for KilnVmm {
    fn start(&self, spec: Spec) -> Result<Box<dyn Machine>, MachineError> {
        let notes = match template::copy(self, &spec)? {
            Ok(machine) => return Ok(Box::new(machine)),
            Err(notes) => notes,
        };
        let ram = memory::make_file(spec.memory_bytes)?;
        let mut machine = self.bring_up(&spec, Begins::Boot { ram, becomes_template: false })?;
        machine.note(notes);
        machine.give(&spec.shares)?;
        Ok(Box::new(machine))
    }
}

impl Freezer for KilnVmm {
    type Machine = VmmMachine;

    const HAS_WORKING_SETS: bool = true;

    fn templates(&self) -> Option<&Templates> {
        self.templates.as_ref()
    }

    fn key(&self, spec: &Spec) -> io::Result<Digest> {
        let parts = [
            format!("vmm {FORMAT}, wire {}", kiln_wire::VERSION),
            template::key::kiln()?,
            template::key::processor()?,
            format!("bundle {}", spec.bundle),
            format!("{} bytes, {} processors: {:?}", spec.memory_bytes, spec.cpus, spec.cpu),
            command_line(spec.carrier),
        ];
        Ok(Digest::of(parts.join("\n").as_bytes()))
    }

    fn freeze(&self, spec: &Spec, state: File) -> Result<Frozen, TemplateError> {
        let ram = memory::make_file(spec.memory_bytes).map_err(MachineError::from)?;
        let given = ram.try_clone().map_err(TemplateError::io("hold a template's memory"))?;
        let started = Instant::now();
        let mut machine = self.bring_up(spec, Begins::Boot { ram: given, becomes_template: true })?;
        let complaints = settle(&mut machine, started)?;
        let server = &machine.server;
        let frozen = server.control()?.freeze_guest(state.as_fd());
        frozen.map_err(|error| server.failure(&error))?;
        Ok(Frozen { ram, version: env!("CARGO_PKG_VERSION").to_owned(), complaints })
    }

    fn thaw(&self, template: &Template, spec: &Spec) -> Result<VmmMachine, TemplateError> {
        let mut machine = self.bring_up(spec, Begins::Thaw { template, shows_working_set: false })?;
        answer(&mut machine, COPY_PATIENCE)?;
        Ok(machine)
    }

    fn find_working_set(
        &self,
        template: &Template,
        spec: &Spec,
        rehearsal: &[u8],
    ) -> Result<WorkingSet, TemplateError> {
        let mut machine = self.bring_up(spec, Begins::Thaw { template, shows_working_set: true })?;
        answer(&mut machine, COPY_PATIENCE)?;
        rehearse(&mut machine, rehearsal)?;
        let file = held(&[]).map_err(TemplateError::io("hold a working set"))?;
        let server = &machine.server;
        let written = server.control()?.write_working_set(file.as_fd());
        written.map_err(|error| server.failure(&error))?;
        let mut bytes = vec![0; usize::try_from(working_set::MOST_BYTES).unwrap_or(usize::MAX)];
        let length = file.read_at(&mut bytes, 0).map_err(TemplateError::io("read a working set"))?;
        WorkingSet::decode(&bytes[..length], spec.memory_bytes)
            .map_err(|_| TemplateError::Damaged("its working set is damaged"))
    }
}

/// A running VMM. Fields are dropped in order: the streams to it go before it does.
pub(super) struct VmmMachine {
    identity: Identity,
    wire: Wire,
    console: Tail,
    server: Server,
    notes: Vec<String>,
}

impl VmmMachine {
    /// What the VMM said of its guest's end, if it says something within `patience` or ends itself.
    fn last_words(&mut self, patience: Duration) -> String {
        let give_up = Instant::now() + patience;
        loop {
            let over = self.server.process.wait(Duration::ZERO).is_some() || Instant::now() >= give_up;
            if over || self.server.process.has_said_a_line() {
                return self.server.process.said().trim_start_matches("kiln: ").to_owned();
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }
}

impl Machine for VmmMachine {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn notes(&self) -> &[String] {
        &self.notes
    }

    fn wire(&mut self) -> Result<UnixStream, MachineError> {
        let process = &mut self.server.process;
        let wire = self.wire.take(|| process.wait(Duration::ZERO).is_some())?;
        let Some(wire) = wire else { return Err(MachineError::DiedAtStart(self.death(Duration::ZERO))) };
        let held = wire.try_clone().map_err(MachineError::io("hold the wire"))?;
        self.server.process.hang_up_at_end(held);
        Ok(wire)
    }

    fn observed(&mut self) -> Result<Record, MachineError> {
        // A guest that still ran could read on after the record was taken.
        self.server.control()?.stop_guest().map_err(|error| self.server.failure(&error))?;
        self.observed_so_far()
    }

    fn observed_so_far(&mut self) -> Result<Record, MachineError> {
        self.server.control()?.finish().map_err(|error| self.server.failure(&error))
    }

    fn death(&mut self, patience: Duration) -> Death {
        let said = self.last_words(patience);
        if let Some(failure) = self.server.process.failure() {
            return Death::Failed(failure);
        }
        let status = self.server.process.wait(Duration::ZERO);
        // What a guest prints counts only where the machine went as such a guest's does.
        let console = self.console.text();
        let panic = console.lines().find(|line| line.contains("Kernel panic"));
        if let Some((disk, why)) = disk_of(&said) {
            return Death::Disk { disk, why };
        }
        match (status, panic) {
            (None, Some(line)) if said == End::Reset.to_string() => Death::Panicked(line.trim().to_owned()),
            (None, _) if !said.is_empty() => Death::Stopped(said),
            (status, _) => {
                let status = status.map_or_else(|| "still running, but not answering".to_owned(), in_words);
                Death::Killed { program: PROGRAM.into(), status, said }
            }
        }
    }

    fn console(&self) -> String {
        self.console.text()
    }

    fn processes(&self) -> Vec<i32> {
        self.server.process.number().into_iter().collect()
    }
}

impl Lendable for VmmMachine {
    fn wire_held(&self) -> Option<&UnixStream> {
        self.wire.held()
    }

    fn control_socket(&self) -> Option<&UnixStream> {
        Some(&self.server.socket)
    }

    fn stop(&mut self) {
        self.server.process.stop();
    }

    fn note(&mut self, notes: Vec<String>) {
        self.notes = notes;
    }

    fn give(&mut self, shares: &[Share]) -> Result<(), MachineError> {
        self.server.give(shares)
    }
}

const PROGRAM: &str = "kiln's VMM";

/// The disk that ended a machine, and why, where that is what its VMM `said`: [`process`] writes it.
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
