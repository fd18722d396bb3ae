//! The process that is a VMM: what it is handed becomes a machine, which it runs to its end, and whose shares it serves.
//!
//! It is locked in by the time it gets here, and all that it takes of the guest it takes on threads that are locked in
//! further: one for each processor and one for each device. Another serves the parent. This one owns the machine: it is told
//! of the guest's end and of what the parent asks.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use kiln_virtio::balloon::Balloon;
use kiln_virtio::console::Console;
use kiln_virtio::control::{Guest, Server};
use kiln_virtio::process::Thread as Kind;
use kiln_virtio::rng::Rng;
use kiln_vmm::cpu::Model;
use kiln_vmm::disk::Disk;
use kiln_vmm::local::{Local, Thread};
use kiln_vmm::mmio::Registers;
use kiln_vmm::snapshot::Snapshot;
use kiln_vmm::vm::{OnEnd, Running, Slot};
use kiln_vmm::working_set::{self, WorkingSet};
use kiln_vmm::{End, Machine, Parts, memory};
use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;

use crate::machine::drawn;
use crate::machine::jail;
use crate::machine::launch::RAM;
use crate::machine::server::GUEST_CID;
use crate::threads;

/// What its machine is to be, beside the descriptors `kvm`, `console`, `control`, `ram`, `kernel` and `initramfs` or `state`,
/// [`WORKING_SET`] or [`PAGEMAP`], `wire` where no vsock carries it, and `disk0` and so on.
#[derive(Debug, Serialize, Deserialize)]
pub struct Vmm {
    /// Where it begins.
    pub origin: Origin,
    /// Guest memory, all of `ram`.
    pub memory_bytes: u64,
    /// Virtual processors.
    pub cpus: u8,
    /// Whether they are all that the host's can be.
    pub host_cpu: bool,
    /// Whether the wire is carried by vsock.
    pub has_vsock: bool,
    /// Disks, in the order of their numbers.
    pub disks: Vec<DiskOf>,
}

/// The working set of the machine's template, where it is known.
pub const WORKING_SET: &str = "working-set";
/// What tells the process about its own pages, in a machine that is there to show its working set.
pub const PAGEMAP: &str = "pagemap";

/// Where a machine begins.
#[derive(Debug, Serialize, Deserialize)]
pub enum Origin {
    /// At `kernel`.
    Boot {
        /// The kernel's command line.
        command_line: String,
        /// Whether it is to be frozen, for others to go on from there.
        becomes_template: bool,
    },
    /// Where it was frozen, as `state` says.
    Frozen {
        /// Whether it is there to show what it touches, and for nothing else.
        shows_working_set: bool,
    },
}

/// A disk of a machine.
#[derive(Debug, Serialize, Deserialize)]
pub struct DiskOf {
    /// By which the agent finds it.
    pub serial: String,
    /// Whether the guest may write.
    pub read_only: bool,
    /// How large it says it is, where that is not what its file is.
    pub capacity: Option<u64>,
    /// Whether there is a file for it.
    pub is_there: bool,
}

/// What the thread that owns the machine is told.
enum Word {
    /// The guest ended, or cannot go on.
    Ended(End),
    /// The guest is to end.
    Stop(Sender<Result<(), String>>),
    /// The machine is to be frozen into this file.
    Freeze(File, Sender<Result<(), String>>),
    /// What the guest has touched is to be said into this file.
    WorkingSet(File, Sender<Result<(), String>>),
    /// The parent is gone.
    Left,
}

/// What the thread that serves the parent asks of the one that owns the machine.
struct Owner(Sender<Word>);

impl Owner {
    fn ask(&self, word: impl FnOnce(Sender<Result<(), String>>) -> Word) -> Result<(), String> {
        let (answer, answered) = mpsc::channel();
        let gone = || "the machine is gone".to_owned();
        self.0.send(word(answer)).map_err(|_| gone())?;
        answered.recv().map_err(|_| gone())?
    }
}

impl Guest for Owner {
    fn stop(&mut self) -> Result<(), String> {
        self.ask(Word::Stop)
    }

    fn freeze(&mut self, state: File) -> Result<(), String> {
        self.ask(|answer| Word::Freeze(state, answer))
    }

    fn working_set(&mut self, to: File) -> Result<(), String> {
        self.ask(|answer| Word::WorkingSet(to, answer))
    }
}

/// Descriptors by name.
struct Descriptors(BTreeMap<String, OwnedFd>);

impl Descriptors {
    fn take(&mut self, name: &str) -> Result<OwnedFd, String> {
        self.0.remove(name).ok_or_else(|| format!("no descriptor `{name}`"))
    }
}

/// More than the state of a frozen machine ever has.
const MOST_STATE_BYTES: u64 = 64 << 20;

impl Vmm {
    /// Adds what it needs and can open for itself only, as the process that it stays and before it is locked in: what tells the process about its own pages, where
    /// that is what its machine is there for.
    ///
    /// # Errors
    /// What open(2) says.
    pub fn open_own(&self, descriptors: &mut BTreeMap<String, OwnedFd>) -> io::Result<()> {
        if let Origin::Frozen { shows_working_set: true } = self.origin {
            descriptors.insert(PAGEMAP.to_owned(), File::open("/proc/self/pagemap")?.into());
        }
        Ok(())
    }

    /// How large a file may be that it writes: its disks do not grow, and where it is frozen there is its state, or where it is there for that, its working set.
    ///
    /// # Errors
    /// What fstat(2) says.
    pub fn most_file_bytes(&self, descriptors: &BTreeMap<String, OwnedFd>) -> io::Result<u64> {
        let mut most = match self.origin {
            Origin::Boot { becomes_template: true, .. } => MOST_STATE_BYTES,
            Origin::Frozen { shows_working_set: true } => working_set::MOST_BYTES,
            Origin::Boot { .. } | Origin::Frozen { .. } => 0,
        };
        for (name, file) in descriptors.iter().filter(|(name, _)| name.starts_with("disk")) {
            let size = rustix::fs::fstat(file)?.st_size;
            most =
                most.max(u64::try_from(size).map_err(|_| io::Error::other(format!("{name} has no size")))?);
        }
        Ok(most)
    }

    /// Runs the machine until the parent hangs up. How the guest ended is said on standard error.
    ///
    /// # Errors
    /// It cannot be put together, or not be run any more.
    pub fn run(self, descriptors: BTreeMap<String, OwnedFd>) -> Result<(), Box<dyn std::error::Error>> {
        // A thread that panics says no end, and the others would wait for one.
        std::panic::set_hook(Box::new(|panic| {
            say(panic);
            std::process::abort();
        }));
        let mut descriptors = Descriptors(descriptors);
        let ram = File::from(descriptors.take(RAM)?);
        let (words, inbox) = mpsc::channel();
        let memory = match self.origin {
            Origin::Boot { .. } => memory::map(&ram, self.memory_bytes)?,
            Origin::Frozen { .. } => memory::map_private(&ram, self.memory_bytes)?,
        };
        let control = UnixStream::from(descriptors.take("control")?);
        let cid = self.has_vsock.then_some(GUEST_CID);
        let owner = Box::new(Owner(words.clone()));
        let (mut server, fs, vsock) = Server::new(control, cid, jail::narrow, Some(owner))?;
        let ended = words.clone();
        let on_end: OnEnd = Arc::new(move |end| drop(ended.send(Word::Ended(end))));

        let devices = Devices { memory: &memory, on_end: &on_end };
        let narrowing = Some(server.narrowing());
        let fs_thread = Thread { name: "fs", confine: || jail::enter_thread(Kind::FsQueues), narrowing };
        let mut slots = vec![devices.slot(fs_thread, fs)?];
        let stream =
            |name| Thread { name, confine: || jail::enter_thread(Kind::StreamQueues), narrowing: None };
        match vsock {
            Some(vsock) => slots.push(devices.slot(stream("vsock"), vsock)?),
            None => {
                let wire = UnixStream::from(descriptors.take("wire")?);
                let console = Console::new(kiln_wire::SERIAL_PORT_NAME, wire)?;
                slots.push(devices.slot(stream("console"), console)?);
            }
        }
        let rng = match self.origin {
            Origin::Boot { becomes_template: true, .. } => Rng::silent(),
            Origin::Boot { .. } | Origin::Frozen { .. } => Rng::new(),
        };
        let plain = |name| Thread { name, confine: jail::enter_plain_device, narrowing: None };
        slots.push(devices.slot(plain("rng"), rng)?);
        slots.push(devices.slot(plain("balloon"), Balloon::new())?);
        for (index, disk) in self.disks.iter().enumerate() {
            let file = match disk.is_there {
                true => Some(File::from(descriptors.take(&format!("disk{index}"))?)),
                false => None,
            };
            let size = file.as_ref().map(File::metadata).transpose()?.map_or(0, |meta| meta.len());
            let capacity = disk.capacity.unwrap_or(size);
            let (on_end, serial) = (Arc::clone(&on_end), disk.serial.clone());
            let failed = move |error: &io::Error| {
                on_end(End::Device { what: format!("disk `{serial}`: {error}") });
            };
            let disk = Disk::slot(file, &disk.serial, disk.read_only, capacity, failed)?.scratch();
            let thread = Thread { name: "disk", confine: jail::enter_disk, narrowing: None };
            slots.push(devices.slot(thread, disk)?);
        }

        let origin = match self.origin {
            Origin::Boot { command_line, .. } => kiln_vmm::Origin::Boot {
                kernel: descriptors.take("kernel")?.into(),
                initramfs: descriptors.take("initramfs")?.into(),
                command_line,
            },
            Origin::Frozen { .. } => {
                let mut bytes = Vec::new();
                File::from(descriptors.take("state")?).read_to_end(&mut bytes)?;
                kiln_vmm::Origin::Frozen(Box::new(Snapshot::decode(&bytes)?))
            }
        };
        let console = File::from(descriptors.take("console")?);
        let working_set = descriptors.take(WORKING_SET).ok().and_then(|file| {
            let mut bytes = Vec::new();
            File::from(file).take(working_set::MOST_BYTES).read_to_end(&mut bytes).ok()?;
            WorkingSet::decode(&bytes, self.memory_bytes).ok()
        });
        let pages = Pages { map: descriptors.take(PAGEMAP).ok().map(File::from), memory: memory.clone() };
        let machine = Machine::new(Parts {
            kvm: descriptors.take("kvm")?,
            origin,
            generation: drawn()?,
            memory: memory.clone(),
            working_set,
            cpus: self.cpus,
            model: if self.host_cpu { Model::Host } else { Model::Fixed },
            console: Box::new(console),
            devices: slots,
            on_end,
        })?;
        let serve = move || {
            if jail::enter_thread(Kind::Control).is_ok() {
                // A parent that speaks nonsense is as good as gone.
                let _ = server.serve(|_| true);
            }
            let _ = words.send(Word::Left);
        };
        threads::start_small("control", serve)?;
        let running = machine.start(jail::enter_processor)?;
        jail::enter_owner()?;
        own(running, &inbox, &pages)
    }
}

/// Makes devices of the machine's.
struct Devices<'a> {
    memory: &'a GuestMemoryMmap,
    on_end: &'a OnEnd,
}

impl Devices<'_> {
    fn slot<D>(&self, thread: Thread, device: D) -> io::Result<Slot>
    where
        D: kiln_virtio::device::Device<()> + 'static,
    {
        let local = Local::new(thread, device, self.memory, Arc::clone(self.on_end))?;
        Registers::slot(local, self.memory)
    }
}

/// The guest's memory in this process.
struct Pages {
    /// What tells which of its pages there are.
    map: Option<File>,
    memory: GuestMemoryMmap,
}

impl Pages {
    fn write_working_set(&self, mut to: File) -> io::Result<()> {
        let map = self.map.as_ref().ok_or_else(|| io::Error::other("this machine is not there for that"))?;
        to.write_all(&WorkingSet::of(map, &self.memory)?.encode())
    }
}

/// Says `what` to the parent, on standard error and at once: it believes a whole line.
fn say(what: &dyn std::fmt::Display) {
    let _ = io::stderr().write_all(format!("kiln: {what}\n").as_bytes());
}

/// Does with the machine what it is told to, until the parent leaves.
fn own(
    mut running: Running,
    inbox: &Receiver<Word>,
    pages: &Pages,
) -> Result<(), Box<dyn std::error::Error>> {
    let mut has_ended = false;
    while let Ok(word) = inbox.recv() {
        match word {
            Word::Left => break,
            Word::Stop(answer) => {
                running.stop();
                let _ = answer.send(Ok(()));
            }
            Word::Freeze(state, answer) => {
                let _ = answer.send(freeze(&mut running, state).map_err(|error| error.to_string()));
            }
            Word::WorkingSet(to, answer) => {
                let _ = answer.send(pages.write_working_set(to).map_err(|error| error.to_string()));
            }
            // Several may say so, of which the first is why.
            Word::Ended(_) if has_ended => {}
            Word::Ended(end) => {
                if !end.is_the_guests() {
                    return Err(end.into());
                }
                has_ended = true;
                say(&end);
                // The wire ends here, and what was read can still be asked for.
                running.finish();
            }
        }
    }
    Ok(())
}

fn freeze(running: &mut Running, mut state: File) -> Result<(), Box<dyn std::error::Error>> {
    let snapshot = running.freeze()?.encode()?;
    Ok(state.write_all(&snapshot)?)
}
