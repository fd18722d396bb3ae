//! The loop that runs a virtual processor until its machine ends, and the ways in which one does.

use std::sync::atomic::{AtomicBool, Ordering};

use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::bus::{Bus, Effect};

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum End {
    /// It switched itself off.
    #[error("the guest switched itself off")]
    PoweredOff,
    /// It asked to start again, as a kernel does that panicked.
    #[error("the guest asked for a reset")]
    Reset,
    /// A fault while a fault was handled while a fault was handled: the processor shut down.
    #[error("the guest's processor {cpu} met a triple fault")]
    TripleFault {
        /// Which processor.
        cpu: u8,
    },
    /// All that could wake a processor is off.
    #[error("the guest's processor {cpu} halted for good")]
    Halted {
        /// Which processor.
        cpu: u8,
    },
    /// KVM met something that it cannot emulate, or failed within.
    #[error("KVM had an internal error on the guest's processor {cpu}")]
    InternalError {
        /// Which processor.
        cpu: u8,
    },
    /// The host's processor did not take the guest's state.
    #[error("the host's processor refused to run the guest's processor {cpu} (reason {reason:#x})")]
    FailedEntry {
        /// Which processor.
        cpu: u8,
        /// The hardware's word.
        reason: u64,
    },
    /// Something that KVM was not set up to leave to us.
    #[error("KVM left something unknown to do on the guest's processor {cpu}: {what}")]
    Unknown {
        /// Which processor.
        cpu: u8,
        /// What it was.
        what: String,
    },
    /// KVM does not run it at all.
    #[error("KVM cannot run the guest's processor {cpu}: {what}")]
    Failed {
        /// Which processor.
        cpu: u8,
        /// The system's word.
        what: String,
    },
    /// The driver broke a device's queue, or the device failed.
    #[error("a device of the guest's ended: {what}")]
    Device {
        /// Which, and why.
        what: String,
    },
    /// A thread of this process's cannot go on.
    #[error("a thread of the machine's failed: {what}")]
    Thread {
        /// Which, and why.
        what: String,
    },
    /// Whoever runs the machine wanted it to.
    #[error("the machine was stopped")]
    Stopped,
}

impl End {
    /// Whether the guest brought it about, or its driver, or may have: not so where KVM or this process cannot go on.
    #[must_use]
    pub fn is_the_guests(&self) -> bool {
        match self {
            Self::PoweredOff
            | Self::Reset
            | Self::TripleFault { .. }
            | Self::Halted { .. }
            | Self::InternalError { .. }
            | Self::FailedEntry { .. }
            | Self::Device { .. }
            | Self::Stopped => true,
            Self::Unknown { .. } | Self::Failed { .. } | Self::Thread { .. } => false,
        }
    }
}

/// The two spaces of addresses of a machine.
#[derive(Default)]
pub struct Buses {
    /// Memory that is none.
    pub memory: Bus,
    /// Ports.
    pub ports: Bus,
}

/// More accesses than KVM lets one instruction make, repeated or not, before it leaves the guest between two of them.
const MOST_ACCESSES: usize = 4096;

/// Lets `vcpu`, the processor of that number, finish what the guest was doing when it left it: only then are its registers
/// those of a whole instruction.
///
/// # Errors
/// How the instruction ends the machine, or that it does not come to an end.
pub fn complete(vcpu: &mut VcpuFd, cpu: u8, buses: &Buses) -> Result<(), End> {
    for _ in 0..MOST_ACCESSES {
        vcpu.set_kvm_immediate_exit(1);
        let left = vcpu.run();
        let result = match left {
            Err(error) if error.errno() == libc::EINTR => Ok(None),
            // One more of its accesses, which is to be done as the first was.
            left => follow(left, cpu, buses).map(Some),
        };
        vcpu.set_kvm_immediate_exit(0);
        match result? {
            None => return Ok(()),
            Some(Effect::Nothing) => {}
            Some(Effect::PowerOff) => return Err(End::PoweredOff),
            Some(Effect::Reset) => return Err(End::Reset),
        }
    }
    Err(End::Failed { cpu, what: "an instruction does not come to an end".to_owned() })
}

/// Does what `left`, with which processor `cpu` left the guest, asks for.
fn follow(left: Result<VcpuExit<'_>, kvm_ioctls::Error>, cpu: u8, buses: &Buses) -> Result<Effect, End> {
    match left {
        // What a string instruction moves comes as one piece, longer than any register, and so moves ones.
        Ok(VcpuExit::IoIn(port, data)) => {
            buses.ports.read(port.into(), data);
            Ok(Effect::Nothing)
        }
        Ok(VcpuExit::IoOut(port, data)) => Ok(buses.ports.write(port.into(), data)),
        Ok(VcpuExit::MmioRead(address, data)) => {
            buses.memory.read(address, data);
            Ok(Effect::Nothing)
        }
        Ok(VcpuExit::MmioWrite(address, data)) => Ok(buses.memory.write(address, data)),
        Ok(VcpuExit::Shutdown) => Err(End::TripleFault { cpu }),
        Ok(VcpuExit::Hlt) => Err(End::Halted { cpu }),
        Ok(VcpuExit::InternalError) => Err(End::InternalError { cpu }),
        Ok(VcpuExit::FailEntry(reason, _)) => Err(End::FailedEntry { cpu, reason }),
        Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => Ok(Effect::Nothing),
        Ok(other) => Err(End::Unknown { cpu, what: format!("{other:?}") }),
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Ok(Effect::Nothing),
        Err(error) => Err(End::Failed { cpu, what: error.to_string() }),
    }
}

/// Runs `vcpu` until the machine ends or `stop` says so, which is asked each time that the processor leaves the guest.
pub fn run(vcpu: &mut VcpuFd, cpu: u8, buses: &Buses, stop: &AtomicBool) -> End {
    while !stop.load(Ordering::Acquire) {
        let effect = match follow(vcpu.run(), cpu, buses) {
            Ok(effect) => effect,
            Err(end) => return end,
        };
        match effect {
            Effect::Nothing => {}
            Effect::PowerOff => return End::PoweredOff,
            Effect::Reset => return End::Reset,
        }
    }
    End::Stopped
}
