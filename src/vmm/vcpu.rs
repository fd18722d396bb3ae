//! The loop that runs a virtual processor until its machine ends, and the ways in which one does.
#![expect(unsafe_code, reason = "what KVM says of an exit is a union")]

use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON,
};
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
    #[error("KVM had an internal error on the guest's processor {cpu}: {}", cause(*suberror))]
    InternalError {
        /// Which processor.
        cpu: u8,
        /// Why: `KVM_INTERNAL_ERROR_…`.
        suberror: u32,
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
        let result = run_once(vcpu, cpu, buses);
        vcpu.set_kvm_immediate_exit(0);
        match result? {
            None => return Ok(()),
            // It was one more of its accesses, done as the first was.
            Some(Effect::Nothing) => {}
            Some(Effect::PowerOff) => return Err(End::PoweredOff),
            Some(Effect::Reset) => return Err(End::Reset),
        }
    }
    Err(End::Failed { cpu, what: "an instruction does not come to an end".to_owned() })
}

/// Runs `vcpu`, which is processor `cpu`, until it leaves the guest, and does what it leaves to be done; none where it was
/// interrupted.
fn run_once(vcpu: &mut VcpuFd, cpu: u8, buses: &Buses) -> Result<Option<Effect>, End> {
    let effect = match vcpu.run() {
        // What a string instruction moves comes as one piece, longer than any register, and so moves ones.
        Ok(VcpuExit::IoIn(port, data)) => {
            buses.ports.read(port.into(), data);
            Effect::Nothing
        }
        Ok(VcpuExit::IoOut(port, data)) => buses.ports.write(port.into(), data),
        Ok(VcpuExit::MmioRead(address, data)) => {
            buses.memory.read(address, data);
            Effect::Nothing
        }
        Ok(VcpuExit::MmioWrite(address, data)) => buses.memory.write(address, data),
        Ok(VcpuExit::Shutdown) => return Err(End::TripleFault { cpu }),
        Ok(VcpuExit::Hlt) => return Err(End::Halted { cpu }),
        Ok(VcpuExit::InternalError) => return Err(internal_error(vcpu, cpu)),
        Ok(VcpuExit::FailEntry(reason, _)) => return Err(End::FailedEntry { cpu, reason }),
        Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => Effect::Nothing,
        Ok(other) => return Err(End::Unknown { cpu, what: format!("{other:?}") }),
        Err(error) if error.errno() == libc::EINTR => return Ok(None),
        Err(error) if error.errno() == libc::EAGAIN => Effect::Nothing,
        Err(error) => return Err(End::Failed { cpu, what: error.to_string() }),
    };
    Ok(Some(effect))
}

/// What KVM says of the exit KVM_EXIT_INTERNAL_ERROR that `vcpu` had last (Linux documentation, virt/kvm/api.rst, 5).
fn internal_error(vcpu: &mut VcpuFd, cpu: u8) -> End {
    // SAFETY: every part of the union is of integers, of which any bytes are values, so one that is not KVM's last word says
    // something wrong and no worse.
    let suberror = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror };
    End::InternalError { cpu, suberror }
}

/// A suberror of KVM's in words.
fn cause(suberror: u32) -> String {
    match suberror {
        KVM_INTERNAL_ERROR_EMULATION => "it cannot emulate an instruction of the guest's".to_owned(),
        KVM_INTERNAL_ERROR_SIMUL_EX => "two exceptions at once that it cannot deliver".to_owned(),
        KVM_INTERNAL_ERROR_DELIVERY_EV => "an exit while it delivered an event to the guest".to_owned(),
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
            "the processor left the guest for a reason that it does not know".to_owned()
        }
        unknown => format!("suberror {unknown}"),
    }
}

/// Runs `vcpu` until the machine ends or `stop` says so, which is asked each time that the processor leaves the guest.
pub fn run(vcpu: &mut VcpuFd, cpu: u8, buses: &Buses, stop: &AtomicBool) -> End {
    while !stop.load(Ordering::Acquire) {
        match run_once(vcpu, cpu, buses) {
            Ok(None | Some(Effect::Nothing)) => {}
            Ok(Some(Effect::PowerOff)) => return End::PoweredOff,
            Ok(Some(Effect::Reset)) => return End::Reset,
            Err(end) => return end,
        }
    }
    End::Stopped
}
