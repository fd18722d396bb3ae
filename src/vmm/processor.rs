//! All that a virtual processor holds between two instructions, taken from one and given to another.
#![expect(unsafe_code, reason = "KVM reads as much of an XSAVE area as the guest's features ask for")]

use kvm_bindings::{
    Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::cpu::{CpuError, kvm};

/// MSR_IA32_TSC, which all that counts time starts from, and IA32_TSC_DEADLINE, which is armed by what it says.
const TIME_STAMP: u32 = 0x10;
const DEADLINE: u32 = 0x6e0;

/// The state of one processor.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Processor {
    /// What it can do.
    pub leaves: Vec<kvm_cpuid_entry2>,
    /// Cycles in a millisecond.
    khz: u32,
    running: kvm_mp_state,
    registers: kvm_regs,
    special: kvm_sregs,
    extended: kvm_xsave,
    /// Where the host has them.
    extended_control: Option<kvm_xcrs>,
    debug: kvm_debugregs,
    interrupts: kvm_lapic_state,
    events: kvm_vcpu_events,
    model_specific: Vec<kvm_msr_entry>,
}

impl Processor {
    /// That of `vcpu`, which has `leaves`, and of whose model-specific registers those of `indices` that there are. It must
    /// have finished its last instruction.
    ///
    /// # Errors
    /// What KVM does not tell.
    pub fn of(vcpu: &VcpuFd, leaves: &[kvm_cpuid_entry2], indices: &[u32]) -> Result<Self, CpuError> {
        let doing = || kvm("tell all of a processor's state");
        Ok(Self {
            leaves: leaves.to_vec(),
            khz: vcpu.get_tsc_khz().map_err(doing())?,
            running: vcpu.get_mp_state().map_err(doing())?,
            registers: vcpu.get_regs().map_err(doing())?,
            special: vcpu.get_sregs().map_err(doing())?,
            extended: vcpu.get_xsave().map_err(doing())?,
            extended_control: vcpu.get_xcrs().ok(),
            debug: vcpu.get_debug_regs().map_err(doing())?,
            interrupts: vcpu.get_lapic().map_err(doing())?,
            events: vcpu.get_vcpu_events().map_err(doing())?,
            model_specific: model_specific(vcpu, indices)?,
        })
    }

    /// The same with one register more.
    #[cfg(test)]
    pub(crate) fn push_register(&mut self, index: u32, data: u64) {
        self.model_specific.push(kvm_msr_entry { index, data, ..kvm_msr_entry::default() });
    }

    /// Makes `vcpu`, which has the same leaves, go on from here.
    ///
    /// # Errors
    /// What KVM does not take.
    pub fn put_into(&self, vcpu: &VcpuFd) -> Result<(), CpuError> {
        let doing = || kvm("take all of a processor's state");
        if vcpu.get_tsc_khz().map_err(doing())? != self.khz {
            vcpu.set_tsc_khz(self.khz).map_err(kvm("count time as the processor did that was frozen"))?;
        }
        vcpu.set_mp_state(self.running).map_err(doing())?;
        vcpu.set_sregs(&self.special).map_err(doing())?;
        vcpu.set_regs(&self.registers).map_err(doing())?;
        if let Some(registers) = &self.extended_control {
            vcpu.set_xcrs(registers).map_err(doing())?;
        }
        // SAFETY: KVM reads more than this structure only where the guest was given features that the host has to ask for
        // (arch_prctl(2), ARCH_REQ_XCOMP_GUEST_PERM), which this process never does.
        unsafe { vcpu.set_xsave(&self.extended) }.map_err(doing())?;
        vcpu.set_debug_regs(&self.debug).map_err(doing())?;
        vcpu.set_lapic(&self.interrupts).map_err(doing())?;
        for registers in &self.model_specific {
            let one = Msrs::from_entries(&[*registers]).map_err(|_| CpuError::TooManyLeaves)?;
            let taken = vcpu.set_msrs(&one).map_err(doing())?;
            // One that cannot be set and holds nothing is one that the guest has no use for; and some tell what the host can do, and
            // are what they were (IA32_PERF_CAPABILITIES, of a processor without counters).
            if taken == 0 && registers.data != 0 && !holds(vcpu, registers)? {
                return Err(CpuError::Msr(registers.index));
            }
        }
        vcpu.set_vcpu_events(&self.events).map_err(doing())
    }
}

/// Whether the register of `wanted` has its value.
fn holds(vcpu: &VcpuFd, wanted: &kvm_msr_entry) -> Result<bool, CpuError> {
    let asked = kvm_msr_entry { index: wanted.index, ..kvm_msr_entry::default() };
    let mut asked = Msrs::from_entries(&[asked]).map_err(|_| CpuError::TooManyLeaves)?;
    let told = vcpu.get_msrs(&mut asked).map_err(kvm("tell registers"))?;
    Ok(told == 1 && asked.as_slice()[0].data == wanted.data)
}

/// The registers of `indices` that this processor has, in the order in which they are to be set.
fn model_specific(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, CpuError> {
    let mut known = Vec::new();
    let mut rest = indices;
    while !rest.is_empty() {
        let asked: Vec<_> =
            rest.iter().map(|index| kvm_msr_entry { index: *index, ..kvm_msr_entry::default() }).collect();
        let mut asked = Msrs::from_entries(&asked).map_err(|_| CpuError::TooManyLeaves)?;
        let told = vcpu.get_msrs(&mut asked).map_err(kvm("tell registers"))?;
        known.extend(asked.as_slice().iter().take(told).copied());
        // It stops at the first that this processor does not have.
        rest = rest.get(told + 1..).unwrap_or_default();
    }
    known.sort_by_key(|entry| match entry.index {
        TIME_STAMP => 0,
        DEADLINE => 2,
        _ => 1,
    });
    Ok(known)
}
