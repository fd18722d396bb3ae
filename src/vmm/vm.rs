//! A machine put together: memory, interrupt controllers, processors and devices; run, stopped and frozen.
//!
//! ```text
//! Machine::new ──▶ start ──▶ Running ──▶ stop: nothing more is served ──▶ finish: what devices hold is passed on
//!   boots, or goes on where          └──▶ freeze: all but the memory, as bytes
//!   one was frozen
//! ```
//!
//! [`Machine::new`] does all that needs KVM's device and the caller's files. [`Machine::start`] starts the processors, and
//! is called when the process is locked in: from then on guest code decides what happens.

#![expect(unsafe_code, reason = "KVM maps memory of this process into the guest, and comes as a descriptor")]

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kiln_virtio::device::StateError;
use kvm_bindings::{
    KVM_CAP_PRE_FAULT_MEMORY, kvm_clock_data, kvm_cpuid_entry2, kvm_irqchip, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::acpi::{self, AcpiError};
use crate::boot::{self, BootError};
use crate::cpu::{self, CpuError, Model, kvm};
use crate::memory::{GENERATION_ID, MemoryError, WINDOW_BYTES, check_reach};
use crate::mmio::{Carried, DeviceState, USED_BUFFER};
use crate::processor::Processor;
use crate::serial::{self, Console, Port, Power};
use crate::snapshot::{Snapshot, SnapshotError};
use crate::vcpu::{self, Buses, End};
use crate::working_set::WorkingSet;

/// What KVM must be able to do for a machine of ours.
const NEEDED: [(Cap, &str); 15] = [
    (Cap::Irqchip, "interrupt controllers"),
    (Cap::Irqfd, "interrupts by descriptor"),
    (Cap::Ioeventfd, "notifications by descriptor"),
    (Cap::UserMemory, "memory of a process's"),
    (Cap::SetTssAddr, "a place for its task state"),
    (Cap::SetIdentityMapAddr, "a place for its page table"),
    (Cap::ExtCpuid, "a list of features"),
    (Cap::TscDeadlineTimer, "the deadline timer"),
    (Cap::GetTscKhz, "the rate of the time-stamp counter"),
    (Cap::AdjustClock, "a clock that can be set"),
    (Cap::MpState, "the state of waiting processors"),
    (Cap::VcpuEvents, "the state of pending events"),
    (Cap::Xsave, "the state of extended registers"),
    (Cap::Debugregs, "the state of debug registers"),
    (Cap::ImmediateExit, "an end to an instruction"),
];
/// How often a machine is asked for where a signal comes in between.
const TRIES: u32 = 100;
/// Three pages and one that KVM needs on Intel's processors, in the hole where nothing else is.
const IDENTITY_MAP: u64 = 0xfffb_c000;
const TASK_STATE: usize = 0xfffb_d000;
/// The stack of a thread that runs a processor.
const STACK_BYTES: usize = 256 << 10;

/// A device on the memory bus, which the guest's kernel drives as virtio-mmio.
pub struct Slot {
    /// Its registers, and what is behind them.
    pub device: Arc<Mutex<dyn Carried>>,
    /// Written to, raises its interrupt.
    pub interrupt: EventFd,
    /// Where the driver's notification of each queue goes, without a stop in [`Slot::device`].
    pub notified: Vec<EventFd>,
}

/// The register that a driver writes a queue's number to (virtio 1.3 §4.2.2).
const QUEUE_NOTIFY: u64 = 0x50;
/// The register that a driver writes the reasons of an interrupt to which it has dealt with.
const INTERRUPT_ACKNOWLEDGE: u64 = 0x64;

/// What a machine is made of.
pub struct Parts {
    /// /dev/kvm, open for reading and writing.
    pub kvm: OwnedFd,
    /// Where it begins.
    pub origin: Origin,
    /// Another one for each machine that ever runs: at a new one a guest's kernel draws its random numbers anew.
    pub generation: [u8; 16],
    /// Guest memory, as [`crate::memory`] maps it.
    pub memory: GuestMemoryMmap,
    /// What of it is to be there before the guest runs, where it goes on and that is known.
    pub working_set: Option<WorkingSet>,
    /// Virtual processors.
    pub cpus: u8,
    /// Which processor the guest sees.
    pub model: Model,
    /// Where the serial port prints to.
    pub console: Box<dyn Write + Send>,
    /// Devices, in the order in which the kernel finds them.
    pub devices: Vec<Slot>,
    /// Hears of whatever ends the machine, of a processor or a device; more than once where several do.
    pub on_end: OnEnd,
}

/// Where a machine begins.
pub enum Origin {
    /// At the first instruction of a kernel.
    Boot {
        /// vmlinux or bzImage.
        kernel: File,
        /// The initramfs.
        initramfs: File,
        /// The kernel's command line.
        command_line: String,
    },
    /// Where one was frozen, whose memory it has.
    Frozen(Box<Snapshot>),
}

/// Hears how a machine ended.
pub type OnEnd = Arc<dyn Fn(End) + Send + Sync>;

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// This KVM is none that can be used.
    #[error("this KVM cannot be used: it lacks {0}")]
    Lacks(&'static str),
    /// KVM's interface is another.
    #[error("this KVM cannot be used: its interface has version {0}")]
    Version(i32),
    /// More processors than it can have, or none.
    #[error("a machine cannot have {asked} processors here: 1 to {most}")]
    Cpus {
        /// How many were asked for.
        asked: u8,
        /// How many there can be.
        most: usize,
    },
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel and what goes with it.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// KVM and its processors.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// A snapshot cannot be read.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A snapshot is of a machine with other parts.
    #[error("the snapshot is of a machine with {0}")]
    OtherMachine(&'static str),
    /// A device cannot be frozen, or does not go on.
    #[error("device {index}: {why}")]
    Device {
        /// Its place.
        index: usize,
        /// Why.
        why: String,
    },
    /// The instruction that a processor was in the middle of does not end as it should.
    #[error("a machine that is to be frozen ends: {0}")]
    Instruction(#[source] vcpu::End),
    /// There is nothing left to freeze.
    #[error("the guest has ended")]
    Ended,
    /// A thread, an eventfd.
    #[error("cannot {what}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The system's word.
        #[source]
        source: io::Error,
    },
}

impl VmError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Lacks(_) | Self::Version(_) => Some("run with `--backend tcg` on this host".to_owned()),
            Self::Cpus { most, .. } => Some(format!("give the machine at most {most} processors")),
            Self::Memory(error) => error.hint(),
            Self::Boot(error) => error.hint().map(str::to_owned),
            _ => None,
        }
    }

    /// Whether the host is in the way, not what the machine is or was: KVM is busy or withdrawn, say.
    pub fn is_hosts(&self) -> bool {
        match self {
            Self::Lacks(_) | Self::Version(_) | Self::Cpus { .. } | Self::Io { .. } => true,
            Self::Memory(error) => error.is_hosts(),
            Self::Cpu(error) => error.is_hosts(),
            Self::Instruction(end) => !end.is_the_guests(),
            _ => false,
        }
    }
}

fn io(what: &'static str) -> impl FnOnce(io::Error) -> VmError {
    move |source| VmError::Io { what, source }
}

/// Called on each processor's thread before it runs guest code; an error ends the machine.
pub type Confine = fn() -> io::Result<()>;

/// A machine that has not run yet. Fields are dropped in order: nothing of KVM's outlives the guest's memory.
pub struct Machine {
    vcpus: Vec<VcpuFd>,
    on_end: OnEnd,
    rest: Rest,
}

/// What of a machine is no processor.
struct Rest {
    buses: Arc<Buses>,
    devices: Vec<Arc<Mutex<dyn Carried>>>,
    console: Arc<Mutex<dyn Port>>,
    /// What each processor can do.
    leaves: Vec<Vec<kvm_cpuid_entry2>>,
    /// The model-specific registers that this KVM knows.
    registers: Vec<u32>,
    vm: VmFd,
    memory: GuestMemoryMmap,
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Machine {
    /// Puts a machine together.
    ///
    /// # Errors
    /// See [`VmError`].
    pub fn new(parts: Parts) -> Result<Self, VmError> {
        // SAFETY: the descriptor is owned, and its ownership goes over to `Kvm`. That it is KVM's is checked below, by what
        // it answers; another file answers no such question.
        let kvm_device = unsafe { Kvm::from_raw_fd(parts.kvm.into_raw_fd()) };
        check(&kvm_device)?;
        check_cpus(&kvm_device, parts.cpus)?;
        let vm = create(&kvm_device)?;
        set_memory(&vm, &parts.memory)?;
        vm.set_identity_map_address(IDENTITY_MAP).map_err(kvm("take a place for its page table"))?;
        vm.set_tss_address(TASK_STATE).map_err(kvm("take a place for its task state"))?;
        vm.create_irq_chip().map_err(kvm("make interrupt controllers"))?;

        let memory = parts.memory;
        let line = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(io("make an interrupt"))?;
        let interrupt = line.try_clone().map_err(io("make an interrupt"))?;
        let console: Arc<Mutex<dyn Port>> = match &parts.origin {
            Origin::Boot { .. } => Arc::new(Mutex::new(Console::new(interrupt, parts.console))),
            Origin::Frozen(snapshot) => {
                let console = Console::thaw(snapshot.console, interrupt, parts.console);
                Arc::new(Mutex::new(console.map_err(io("set the serial port up"))?))
            }
        };
        let devices: Vec<_> = parts.devices.iter().map(|slot| Arc::clone(&slot.device)).collect();
        let buses = Arc::new(attach(&vm, &line, &console, parts.devices)?);
        let (supported, deadline_timer) = cpu::supported(&kvm_device)?;
        check_reach(&memory, cpu::address_bits(&supported))?;
        let leaves: Vec<_> = (0..parts.cpus)
            .map(|number| cpu::leaves(parts.model, &supported, deadline_timer, number))
            .collect();
        let registers = kvm_device.get_msr_index_list().map_err(kvm("list registers"))?.as_slice().to_vec();
        let mut vcpus = Vec::new();
        for (number, leaves) in (0..).zip(&leaves) {
            let vcpu = vm.create_vcpu(number).map_err(kvm("make a processor"))?;
            cpu::set_up(&vcpu, leaves)?;
            vcpus.push(vcpu);
        }
        let rest = Rest { buses, devices, console, leaves, registers, vm, memory };
        let id = rest.memory.write_slice(&parts.generation, GENERATION_ID);
        id.map_err(AcpiError::Write)?;
        match parts.origin {
            Origin::Boot { mut kernel, mut initramfs, command_line } => {
                let entry = boot::load(&rest.memory, &mut kernel, &mut initramfs, &command_line)?;
                cpu::write_tables(&rest.memory)?;
                acpi::write(&rest.memory, parts.cpus, rest.devices.len())?;
                if let Some(first) = vcpus.first() {
                    cpu::enter_long_mode(first, entry)?;
                }
            }
            Origin::Frozen(snapshot) => rest.thaw(&vcpus, &snapshot)?,
        }
        if let (Some(set), Some(first)) = (&parts.working_set, vcpus.first()) {
            set.populate(&rest.memory);
            // Last: what is mapped for a guest may go with what its processors are told to be.
            if kvm_device.check_extension_raw(KVM_CAP_PRE_FAULT_MEMORY.into()) > 0 {
                set.map_into_guest(first);
            }
        }
        Ok(Self { vcpus, on_end: parts.on_end, rest })
    }

    /// Starts its processors, each on a thread of its own.
    ///
    /// # Errors
    /// A thread that cannot be started.
    pub fn start(self, confine: Confine) -> Result<Running, VmError> {
        register_signal_handler(SIGRTMIN(), interrupted)
            .map_err(|error| io("take a signal")(io::Error::from_raw_os_error(error.errno())))?;
        let stop = Arc::new(AtomicBool::new(false));
        let threads = Threads { stop: Arc::clone(&stop), running: Vec::new() };
        let mut running = Running { threads, stopped: Vec::new(), rest: self.rest };
        for (number, mut vcpu) in (0..).zip(self.vcpus) {
            let (on_end, stop) = (Arc::clone(&self.on_end), Arc::clone(&stop));
            let buses = Arc::clone(&running.rest.buses);
            let run = move || {
                let end = match confine() {
                    Ok(()) => vcpu::run(&mut vcpu, number, &buses, &stop),
                    Err(error) => End::Failed { cpu: number, what: error.to_string() },
                };
                let runs = end == End::Stopped;
                if !runs {
                    on_end(end);
                }
                Halted { vcpu, runs }
            };
            let builder = thread::Builder::new().name(format!("vcpu{number}")).stack_size(STACK_BYTES);
            running.threads.running.push(builder.spawn(run).map_err(io("start a processor's thread"))?);
        }
        Ok(running)
    }
}

impl Rest {
    /// Becomes the machine that was frozen.
    fn thaw(&self, vcpus: &[VcpuFd], snapshot: &Snapshot) -> Result<(), VmError> {
        let memory_bytes: u64 = self.memory.iter().map(GuestMemoryRegion::len).sum();
        if snapshot.memory_bytes != memory_bytes {
            return Err(VmError::OtherMachine("another size of memory"));
        }
        if snapshot.processors.len() != vcpus.len() || snapshot.devices.len() != self.devices.len() {
            return Err(VmError::OtherMachine("other parts"));
        }
        let same = snapshot.processors.iter().zip(&self.leaves).all(|(frozen, ours)| frozen.leaves == *ours);
        if !same {
            return Err(VmError::OtherMachine("other processors than this host's can be"));
        }
        for (frozen, vcpu) in snapshot.processors.iter().zip(vcpus) {
            frozen.put_into(vcpu)?;
        }
        for chip in &snapshot.chips {
            self.vm.set_irqchip(chip).map_err(kvm("take an interrupt controller's state"))?;
        }
        // It counts on from where it was: what it says of the world's time belongs to the machine that was frozen.
        let clock = kvm_clock_data { clock: snapshot.clock.clock, ..kvm_clock_data::default() };
        self.vm.set_clock(&clock).map_err(kvm("take a clock"))?;
        for (index, (state, device)) in snapshot.devices.iter().zip(&self.devices).enumerate() {
            let thawed = lock(device).thaw(state);
            thawed.map_err(|error| VmError::Device { index, why: error.to_string() })?;
        }
        // The generation id in its memory is another, and what the serial port owed when it was set up went with the
        // controllers' state of before.
        self.interrupt(acpi::GENERATION_INTERRUPT)?;
        if snapshot.console.owes_interrupt() { self.interrupt(serial::INTERRUPT) } else { Ok(()) }
    }

    /// Raises the interrupt of that number.
    fn interrupt(&self, number: u32) -> Result<(), VmError> {
        for level in [true, false] {
            self.vm.set_irq_line(number, level).map_err(kvm("raise an interrupt"))?;
        }
        Ok(())
    }

    fn freeze(&self, vcpus: &[&VcpuFd]) -> Result<Snapshot, VmError> {
        let devices = self.devices.iter().enumerate().map(|(index, device)| {
            let state = lock(device).freeze();
            state.map_err(|error: StateError| VmError::Device { index, why: error.to_string() })
        });
        let devices: Vec<DeviceState> = devices.collect::<Result<_, _>>()?;
        let processors = vcpus.iter().zip(&self.leaves);
        let processors = processors.map(|(vcpu, leaves)| Processor::of(vcpu, leaves, &self.registers));
        let mut chips = Vec::new();
        for chip_id in 0..CHIPS {
            let mut chip = kvm_irqchip { chip_id, ..kvm_irqchip::default() };
            self.vm.get_irqchip(&mut chip).map_err(kvm("tell an interrupt controller's state"))?;
            chips.push(chip);
        }
        Ok(Snapshot {
            memory_bytes: self.memory.iter().map(GuestMemoryRegion::len).sum(),
            processors: processors.collect::<Result<_, _>>()?,
            chips,
            clock: self.vm.get_clock().map_err(kvm("tell the clock"))?,
            console: lock(&self.console).freeze(),
            devices,
        })
    }
}

/// The two controllers of the PC, and the I/O APIC (KVM_GET_IRQCHIP).
const CHIPS: u32 = 3;

/// A machine whose processors run, until it is stopped. Fields are dropped in order, as [`Machine`]'s are.
pub struct Running {
    threads: Threads,
    stopped: Vec<Halted>,
    rest: Rest,
}

impl Running {
    /// Stops the processors, for good. When this returns the devices have answered all that they ever answer.
    pub fn stop(&mut self) {
        self.stop_processors();
        for device in &self.rest.devices {
            lock(device).halt();
        }
    }

    /// Stops the machine, and lets the devices pass on what the guest left with them.
    pub fn finish(&mut self) {
        self.stop();
        for device in &self.rest.devices {
            lock(device).finish();
        }
    }

    fn stop_processors(&mut self) {
        self.stopped.extend(self.threads.stop());
    }

    /// Stops the processors, and gives all of the machine but its memory, which nothing writes to any more.
    ///
    /// # Errors
    /// See [`VmError`].
    pub fn freeze(&mut self) -> Result<Snapshot, VmError> {
        self.stop_processors();
        if self.stopped.iter().any(|halted| !halted.runs) {
            return Err(VmError::Ended);
        }
        for (number, halted) in (0..).zip(&mut self.stopped) {
            vcpu::complete(&mut halted.vcpu, number, &self.rest.buses).map_err(VmError::Instruction)?;
        }
        let vcpus: Vec<_> = self.stopped.iter().map(|halted| &halted.vcpu).collect();
        self.rest.freeze(&vcpus)
    }
}

/// Interrupts a thread that runs a guest.
extern "C" fn interrupted(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// A processor whose thread has ended.
struct Halted {
    vcpu: VcpuFd,
    /// The guest would run on.
    runs: bool,
}

/// The processors' threads, which have ended when this is dropped.
struct Threads {
    stop: Arc<AtomicBool>,
    running: Vec<JoinHandle<Halted>>,
}

impl Threads {
    /// Ends them, and gives back the processors.
    fn stop(&mut self) -> Vec<Halted> {
        self.stop.store(true, Ordering::Release);
        let mut stopped = Vec::new();
        for thread in self.running.drain(..) {
            // A signal that comes just before a thread enters the guest is lost on it, so it gets another.
            while !thread.is_finished() && thread.kill(SIGRTMIN()).is_ok() {
                thread::sleep(Duration::from_millis(1));
            }
            stopped.extend(thread.join());
        }
        stopped
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Whether `device` is KVM's, and this KVM can do all that a machine needs.
///
/// # Errors
/// [`VmError::Version`], [`VmError::Lacks`].
pub fn check(device: &Kvm) -> Result<(), VmError> {
    const VERSION: i32 = 12;
    match device.get_api_version() {
        VERSION => {}
        other => return Err(VmError::Version(other)),
    }
    if let Some((_, what)) = NEEDED.iter().find(|(capability, _)| !device.check_extension(*capability)) {
        return Err(VmError::Lacks(what));
    }
    Ok(())
}

/// KVM's machine, with nothing in it.
///
/// # Errors
/// [`VmError::Cpu`]: another hypervisor has the processors, say.
pub fn create(device: &Kvm) -> Result<VmFd, VmError> {
    let mut made = device.create_vm();
    for _ in 1..TRIES {
        // It waits for locks that every thread of a process is stopped for, and gives up at a signal.
        match &made {
            Err(error) if error.errno() == libc::EINTR => made = device.create_vm(),
            _ => break,
        }
    }
    Ok(made.map_err(kvm("make a machine"))?)
}

fn check_cpus(device: &Kvm, cpus: u8) -> Result<(), VmError> {
    // The I/O APIC's number comes after the processors', and the last is everybody's.
    let most = device.get_max_vcpus().min(254);
    if cpus == 0 || usize::from(cpus) > most {
        return Err(VmError::Cpus { asked: cpus, most });
    }
    Ok(())
}

fn set_memory(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), VmError> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let host = region.as_ptr() as u64;
        let description = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: host,
        };
        // SAFETY: the region is a mapping of that length, which `Machine` keeps until its processors and KVM's machine are
        // gone (its fields are dropped in that order). Its pages stay where the file behind it is sealed; that of a
        // template can be cut off by who owns it, and whoever then touches it dies of SIGBUS, which ends the machine and
        // breaks no rule of Rust's. That the guest writes to them is nothing to this process: it reads them through
        // `vm-memory` alone, volatile.
        unsafe { vm.set_user_memory_region(description) }.map_err(kvm("take guest memory"))?;
    }
    Ok(())
}

/// Puts the devices where guests find them.
fn attach(
    vm: &VmFd,
    line: &EventFd,
    console: &Arc<Mutex<dyn Port>>,
    devices: Vec<Slot>,
) -> Result<Buses, VmError> {
    let mut buses = Buses::default();
    vm.register_irqfd(line, serial::INTERRUPT).map_err(kvm("take an interrupt"))?;
    let power = Arc::new(Mutex::new(Power));
    let mut placed = buses.ports.insert(serial::PORT.into(), serial::PORTS.into(), Arc::clone(console) as _)
        && buses.ports.insert(serial::POWER_PORT.into(), serial::POWER_PORTS.into(), power);
    let count = devices.len();
    let ignored = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(io("make an event"))?;
    for (index, slot) in devices.into_iter().enumerate() {
        let (start, interrupt) = acpi::place(index).ok_or(AcpiError::TooManyDevices(count))?;
        vm.register_irqfd(&slot.interrupt, interrupt).map_err(kvm("take an interrupt"))?;
        for (queue, notified) in (0_u32..).zip(&slot.notified) {
            let address = IoEventAddress::Mmio(start.0 + QUEUE_NOTIFY);
            vm.register_ioevent(notified, &address, queue).map_err(kvm("take a notification"))?;
        }
        // That a used buffer was seen changes nothing (`mmio`), and is said after every interrupt: it ends in KVM, in a counter that
        // nobody reads. Any other acknowledgement comes to the registers.
        let address = IoEventAddress::Mmio(start.0 + INTERRUPT_ACKNOWLEDGE);
        vm.register_ioevent(&ignored, &address, USED_BUFFER).map_err(kvm("take an acknowledgement"))?;
        placed &= buses.memory.insert(start.0, WINDOW_BYTES, slot.device);
    }
    debug_assert!(placed, "the places of devices are constants that do not overlap");
    Ok(buses)
}

#[cfg(test)]
mod tests;
