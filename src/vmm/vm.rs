//! A machine put together: memory, interrupt controllers, processors and devices; and run.
//!
//! [`Machine::new`] does all that needs KVM's device and the caller's files. [`Machine::run`] starts the processors, and
//! is called when the process is locked in: from then on guest code decides what happens.

#![expect(unsafe_code, reason = "KVM maps memory of this process into the guest, and comes as a descriptor")]

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::acpi::{self, AcpiError};
use crate::boot::{self, BootError};
use crate::bus::Window;
use crate::cpu::{self, CpuError, Model, kvm};
use crate::memory::{MemoryError, WINDOW_BYTES};
use crate::serial::{self, Console, Power};
use crate::vcpu::{self, Buses, End};

/// What KVM must be able to do for a machine of ours.
const NEEDED: [(Cap, &str); 5] = [
    (Cap::Irqchip, "interrupt controllers"),
    (Cap::Irqfd, "interrupts by descriptor"),
    (Cap::Ioeventfd, "notifications by descriptor"),
    (Cap::UserMemory, "memory of a process's"),
    (Cap::TscDeadlineTimer, "the deadline timer"),
];
/// Three pages and one that KVM needs on Intel's processors, in the hole where nothing else is.
const IDENTITY_MAP: u64 = 0xfffb_c000;
const TASK_STATE: usize = 0xfffb_d000;
/// The stack of a thread that runs a processor.
const STACK_BYTES: usize = 256 << 10;

/// A device on the memory bus, which the guest's kernel drives as virtio-mmio.
pub struct Slot {
    /// Its registers.
    pub window: Arc<Mutex<dyn Window>>,
    /// Written to, raises its interrupt.
    pub interrupt: EventFd,
    /// Where the driver's notification of each queue goes, without a stop in [`Slot::window`].
    pub notified: Vec<EventFd>,
}

/// The register that a driver writes a queue's number to (virtio 1.3 §4.2.2).
const QUEUE_NOTIFY: u64 = 0x50;

/// What a machine is made of.
pub struct Parts {
    /// /dev/kvm, open for reading and writing.
    pub kvm: OwnedFd,
    /// vmlinux or bzImage.
    pub kernel: File,
    /// The initramfs.
    pub initramfs: File,
    /// The kernel's command line.
    pub command_line: String,
    /// Guest memory, as [`crate::memory::map`] maps it.
    pub memory: GuestMemoryMmap,
    /// Virtual processors.
    pub cpus: u8,
    /// Which processor the guest sees.
    pub model: Model,
    /// Where the serial port prints to.
    pub console: Box<dyn Write + Send>,
    /// Devices, in the order in which the kernel finds them.
    pub devices: Vec<Slot>,
    /// By which whatever ends the machine says so, devices too.
    pub ends: (Sender<End>, Receiver<End>),
}

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
}

fn io(what: &'static str) -> impl FnOnce(io::Error) -> VmError {
    move |source| VmError::Io { what, source }
}

/// A machine that has not run yet. Fields are dropped in order: nothing of KVM's outlives the guest's memory.
pub struct Machine {
    vcpus: Vec<VcpuFd>,
    buses: Buses,
    ends: (Sender<End>, Receiver<End>),
    _vm: VmFd,
    _memory: GuestMemoryMmap,
}

/// Called on each processor's thread before it runs guest code; an error ends the machine.
pub type Confine = fn() -> io::Result<()>;

impl Machine {
    /// Puts a machine together.
    ///
    /// # Errors
    /// See [`VmError`].
    pub fn new(mut parts: Parts) -> Result<Self, VmError> {
        // SAFETY: the descriptor is owned, and its ownership goes over to `Kvm`. That it is KVM's is checked below, by what
        // it answers; another file answers no such question.
        let device = unsafe { Kvm::from_raw_fd(parts.kvm.into_raw_fd()) };
        check(&device, parts.cpus)?;
        let vm = device.create_vm().map_err(kvm("make a machine"))?;
        set_memory(&vm, &parts.memory)?;
        vm.set_identity_map_address(IDENTITY_MAP).map_err(kvm("take a place for its page table"))?;
        vm.set_tss_address(TASK_STATE).map_err(kvm("take a place for its task state"))?;
        vm.create_irq_chip().map_err(kvm("make interrupt controllers"))?;

        let entry = boot::load(&parts.memory, &mut parts.kernel, &mut parts.initramfs, &parts.command_line)?;
        cpu::write_tables(&parts.memory)?;
        acpi::write(&parts.memory, parts.cpus, parts.devices.len())?;
        let buses = attach(&vm, parts.console, parts.devices)?;

        let (supported, deadline_timer) = cpu::supported(&device)?;
        let mut vcpus = Vec::new();
        for number in 0..parts.cpus {
            let vcpu = vm.create_vcpu(number.into()).map_err(kvm("make a processor"))?;
            cpu::set_up(&vcpu, &cpu::leaves(parts.model, &supported, deadline_timer, number))?;
            if number == 0 {
                cpu::enter_long_mode(&vcpu, entry)?;
            }
            vcpus.push(vcpu);
        }
        Ok(Self { vcpus, buses, ends: parts.ends, _vm: vm, _memory: parts.memory })
    }

    /// Runs it to its end, each processor on a thread of its own.
    ///
    /// # Errors
    /// A thread that cannot be started.
    pub fn run(self, confine: Confine) -> Result<End, VmError> {
        register_signal_handler(SIGRTMIN(), interrupted)
            .map_err(|error| io("take a signal")(io::Error::from_raw_os_error(error.errno())))?;
        let buses = Arc::new(self.buses);
        let (sender, ends) = self.ends;
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Threads { stop: Arc::clone(&stop), running: Vec::new() };
        for (number, mut vcpu) in (0..).zip(self.vcpus) {
            let (sender, buses, stop) = (sender.clone(), Arc::clone(&buses), Arc::clone(&stop));
            let run = move || {
                let end = match confine() {
                    Ok(()) => vcpu::run(&mut vcpu, number, &buses, &stop),
                    Err(error) => End::Failed { cpu: number, what: error.to_string() },
                };
                // Only the first is waited for.
                let _ = sender.send(end);
            };
            let builder = thread::Builder::new().name(format!("vcpu{number}")).stack_size(STACK_BYTES);
            threads.running.push(builder.spawn(run).map_err(io("start a processor's thread"))?);
        }
        drop(sender);
        ends.recv().map_err(|_| io("run a processor")(io::Error::other("its thread died")))
    }
}

/// Interrupts a thread that runs a guest.
extern "C" fn interrupted(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// The processors' threads, which have ended when this is dropped.
struct Threads {
    stop: Arc<AtomicBool>,
    running: Vec<JoinHandle<()>>,
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        for thread in self.running.drain(..) {
            // A signal that comes just before a thread enters the guest is lost on it, so it gets another.
            while !thread.is_finished() && thread.kill(SIGRTMIN()).is_ok() {
                thread::sleep(Duration::from_millis(1));
            }
            let _ = thread.join();
        }
    }
}

fn check(device: &Kvm, cpus: u8) -> Result<(), VmError> {
    const VERSION: i32 = 12;
    match device.get_api_version() {
        VERSION => {}
        other => return Err(VmError::Version(other)),
    }
    if let Some((_, what)) = NEEDED.iter().find(|(capability, _)| !device.check_extension(*capability)) {
        return Err(VmError::Lacks(what));
    }
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
        // gone (its fields are dropped in that order). Its pages stay, as the file behind it is sealed. That the guest
        // writes to them is nothing to this process: it reads them through `vm-memory` alone, volatile.
        unsafe { vm.set_user_memory_region(description) }.map_err(kvm("take guest memory"))?;
    }
    Ok(())
}

/// Puts the devices where guests find them.
fn attach(vm: &VmFd, console: Box<dyn Write + Send>, devices: Vec<Slot>) -> Result<Buses, VmError> {
    let mut buses = Buses::default();
    let line = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(io("make an interrupt"))?;
    vm.register_irqfd(&line, serial::INTERRUPT).map_err(kvm("take an interrupt"))?;
    let console = Arc::new(Mutex::new(Console::new(line, console)));
    let power = Arc::new(Mutex::new(Power));
    let mut placed = buses.ports.insert(serial::PORT.into(), serial::PORTS.into(), console)
        && buses.ports.insert(serial::POWER_PORT.into(), serial::POWER_PORTS.into(), power);
    let count = devices.len();
    for (index, device) in devices.into_iter().enumerate() {
        let (start, interrupt) = acpi::place(index).ok_or(AcpiError::TooManyDevices(count))?;
        vm.register_irqfd(&device.interrupt, interrupt).map_err(kvm("take an interrupt"))?;
        for (queue, notified) in (0_u32..).zip(&device.notified) {
            let address = IoEventAddress::Mmio(start.0 + QUEUE_NOTIFY);
            vm.register_ioevent(notified, &address, queue).map_err(kvm("take a notification"))?;
        }
        placed &= buses.memory.insert(start.0, WINDOW_BYTES, device.window);
    }
    debug_assert!(placed, "the places of devices are constants that do not overlap");
    Ok(buses)
}

#[cfg(test)]
mod tests;
