//! The processor that a guest sees, and its registers at the first instruction.
//!
//! By default that is one fixed model, whatever the host has, so that what a step does with its processor's features is the
//! same everywhere: x86-64-v2, as QEMU's `qemu64` with SSSE3, SSE4, POPCNT and CMPXCHG16B gives it. It is said by
//! positive lists: a feature that is in none of them does not exist for the guest, nor does one that the host lacks.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_msr_entry, kvm_regs, kvm_segment,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::memory::{GDT, PAGE_TABLES, ZERO_PAGE};

/// Which processor a guest sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Model {
    /// The fixed one.
    #[default]
    Fixed,
    /// All that the host's KVM can give but virtualisation: results may depend on the host.
    Host,
}

/// Leaf 1, ECX: SSE3, SSSE3, CX16, SSE4.1, SSE4.2, x2APIC, POPCNT.
const FEATURES_ECX: u32 = 1 | 1 << 9 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 21 | 1 << 23;
/// Leaf 1, ECX: the timer by the time-stamp counter, which KVM gives without listing it.
const DEADLINE_TIMER: u32 = 1 << 24;
/// Leaf 1, ECX, and leaf 0x80000001, ECX: virtualisation, of which the latter has a leaf of its own.
const VMX: u32 = 1 << 5;
const SVM: u32 = 1 << 2;
const SVM_LEAF: u32 = 0x8000_000a;
/// Leaf 1, ECX: a hypervisor is there.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: FPU, DE, PSE, TSC, MSR, PAE, MCE, CX8, APIC, SEP, MTRR, PGE, MCA, CMOV, PAT, PSE36, CLFLUSH, MMX,
/// FXSR, SSE, SSE2.
const FEATURES_EDX: u32 = 1
    | 1 << 2
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 7
    | 1 << 8
    | 1 << 9
    | 1 << 11
    | 1 << 12
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 16
    | 1 << 17
    | 1 << 19
    | 1 << 23
    | 1 << 24
    | 1 << 25
    | 1 << 26;
/// Leaf 0x8000_0001, ECX: LAHF in long mode.
const EXTENDED_ECX: u32 = 1;
/// Leaf 0x8000_0001, EDX: SYSCALL, NX, long mode, and on AMD's the repeated ones of leaf 1.
const EXTENDED_EDX: u32 = 1 << 11 | 1 << 20 | 1 << 29 | (FEATURES_EDX & 0x0183_f3ff);
/// Leaf 0x4000_0001, EAX: KVM's clock by either MSR, no delay after ports, a clock that is stable across processors.
const PARAVIRTUAL: u32 = 1 | 1 << 1 | 1 << 3 | 1 << 24;
/// Leaf 1, EAX: family 15, model 107, stepping 1, those of QEMU's `qemu64`.
const SIGNATURE: u32 = 0x0006_0fb1;
/// Leaf 6, EAX: the timer runs in every sleep state.
const ALWAYS_RUNNING_TIMER: u32 = 1 << 2;
/// The last basic leaf of the fixed model.
const LAST_LEAF: u32 = 7;
/// What the fixed model is called.
const BRAND: &[u8; 48] = b"kiln virtual processor, x86-64-v2\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// Why a processor could not be made what it should be.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// KVM refuses.
    #[error("KVM does not {what}")]
    Kvm {
        /// What it was to do.
        what: &'static str,
        /// What it says.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A register was not taken.
    #[error("KVM does not take the register {0:#x}")]
    Msr(u32),
    /// The processor's first tables do not fit.
    #[error("the processor's tables cannot be written")]
    Memory(#[from] GuestMemoryError),
    /// There are more leaves than KVM takes.
    #[error("the processor has too many CPUID leaves")]
    TooManyLeaves,
}

impl CpuError {
    /// Whether the host is in the way: what KVM does not take for what it is, it calls invalid or too much.
    pub fn is_hosts(&self) -> bool {
        matches!(self, Self::Kvm { source, .. } if !matches!(source.errno(), libc::EINVAL | libc::E2BIG))
    }
}

pub(crate) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> CpuError {
    move |source| CpuError::Kvm { what, source }
}

/// What the host's KVM can give, as leaves for [`leaves`].
///
/// # Errors
/// What KVM says.
pub fn supported(kvm_device: &Kvm) -> Result<(Vec<kvm_cpuid_entry2>, bool), CpuError> {
    let supported =
        kvm_device.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm("say what it supports"))?;
    Ok((supported.as_slice().to_vec(), kvm_device.check_extension(Cap::TscDeadlineTimer)))
}

/// How many bits the physical addresses of a guest can have here (CPUID 0x8000_0008, EAX; SDM vol. 2).
#[must_use]
pub fn address_bits(supported: &[kvm_cpuid_entry2]) -> u8 {
    /// Without the leaf, as the first processors of this architecture had it.
    const LEAST: u8 = 36;
    let leaf = supported.iter().find(|leaf| leaf.function == 0x8000_0008);
    leaf.map_or(LEAST, |leaf| leaf.eax.to_le_bytes()[0])
}

/// The leaves of processor `number`, made of what the host supports.
#[must_use]
pub fn leaves(
    model: Model,
    supported: &[kvm_cpuid_entry2],
    deadline_timer: bool,
    number: u8,
) -> Vec<kvm_cpuid_entry2> {
    let mut leaves = supported.to_vec();
    if model == Model::Fixed {
        leaves.retain(|leaf| match leaf.function {
            0x4000_0000 | 0x4000_0001 | 0x8000_0000..=0x8000_0004 | 0x8000_0008 => true,
            function => matches!(function, 0 | 1 | 6 | 7),
        });
    }
    for leaf in &mut leaves {
        match model {
            Model::Fixed => fix(leaf),
            Model::Host => hide_virtualisation(leaf),
        }
        match leaf.function {
            1 => {
                let clears = 0xff << 24 | 0xff << 16;
                leaf.ebx = leaf.ebx & !clears | u32::from(number) << 24 | 1 << 16;
                leaf.ecx |= HYPERVISOR;
                if deadline_timer {
                    leaf.ecx |= DEADLINE_TIMER;
                }
            }
            // The numbers of the processors, by which a kernel tells which is which.
            0xb | 0x1f => leaf.edx = u32::from(number),
            _ => {}
        }
    }
    leaves
}

/// Takes VMX and SVM out of the host's leaf: a guest has no machines of its own, and their state is in no snapshot.
fn hide_virtualisation(leaf: &mut kvm_cpuid_entry2) {
    match leaf.function {
        1 => leaf.ecx &= !VMX,
        0x8000_0001 => leaf.ecx &= !SVM,
        SVM_LEAF => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
        _ => {}
    }
}

/// Makes of the host's leaf the fixed model's.
fn fix(leaf: &mut kvm_cpuid_entry2) {
    let brand = |index: usize| {
        let word = |at: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&BRAND[at..at + 4]);
            u32::from_le_bytes(word)
        };
        [word(index * 16), word(index * 16 + 4), word(index * 16 + 8), word(index * 16 + 12)]
    };
    match leaf.function {
        // The vendor stays: it decides which of SYSCALL and SYSENTER work how.
        0 => leaf.eax = LAST_LEAF,
        1 => {
            leaf.eax = SIGNATURE;
            // CLFLUSH works on 64 bytes; the numbers of processors come later.
            leaf.ebx = 8 << 8;
            leaf.ecx &= FEATURES_ECX;
            leaf.edx &= FEATURES_EDX;
        }
        6 => {
            (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (ALWAYS_RUNNING_TIMER, 0, 0, 0);
        }
        7 => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
        0x4000_0000 => leaf.eax = 0x4000_0001,
        0x4000_0001 => {
            leaf.eax &= PARAVIRTUAL;
            (leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0);
        }
        0x8000_0000 => leaf.eax = 0x8000_0008,
        0x8000_0001 => {
            leaf.eax = SIGNATURE;
            leaf.ebx = 0;
            leaf.ecx &= EXTENDED_ECX;
            leaf.edx &= EXTENDED_EDX;
        }
        0x8000_0002 => [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx] = brand(0),
        0x8000_0003 => [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx] = brand(1),
        0x8000_0004 => [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx] = brand(2),
        // The widths of addresses are the host's: memory could lie beyond others. A processor for itself.
        0x8000_0008 => (leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0),
        _ => {}
    }
}

/// Gives the processor `vcpu` its leaves and its model-specific registers.
///
/// # Errors
/// What KVM does not take.
pub fn set_up(vcpu: &VcpuFd, leaves: &[kvm_cpuid_entry2]) -> Result<(), CpuError> {
    let leaves = CpuId::from_entries(leaves).map_err(|_| CpuError::TooManyLeaves)?;
    vcpu.set_cpuid2(&leaves).map_err(kvm("take the processor's features"))?;
    // What firmware leaves behind: memory is cached where nothing else is said (SDM vol. 3, 13.11), and strings are
    // copied fast.
    const MTRR_DEFAULT: u32 = 0x2ff;
    const MISC_ENABLE: u32 = 0x1a0;
    let entry = |index, data| kvm_msr_entry { index, data, ..kvm_msr_entry::default() };
    let entries = [entry(MTRR_DEFAULT, 1 << 11 | 6), entry(MISC_ENABLE, 1)];
    let registers = Msrs::from_entries(&entries).map_err(|_| CpuError::TooManyLeaves)?;
    let taken = vcpu.set_msrs(&registers).map_err(kvm("take the processor's registers"))?;
    match entries.get(taken) {
        Some(refused) => Err(CpuError::Msr(refused.index)),
        None => Ok(()),
    }
}

/// The code segment's place in the descriptor table (`__BOOT_CS` of the boot protocol), and the data segment's.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;

fn segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        s: 1,
        l: u8::from(long),
        db: u8::from(!long),
        g: 1,
        ..kvm_segment::default()
    }
}

/// Writes the tables that long mode needs: descriptors, and pages that map the first 4 GiB as they are.
///
/// # Errors
/// Memory that ends before them.
pub fn write_tables(memory: &GuestMemoryMmap) -> Result<(), CpuError> {
    // Flat 64-bit code and data (SDM vol. 3, 3.4.5), at CODE and DATA.
    for (index, descriptor) in [0, 0, 0x00af_9b00_0000_ffff_u64, 0x00cf_9300_0000_ffff].iter().enumerate() {
        let offset = u64::try_from(index).unwrap_or(0) * 8;
        memory.write_obj(*descriptor, GuestAddress(GDT.0 + offset))?;
    }
    // Present and writable; the third level's are pages of 2 MiB.
    let (pml4, pdpt, pd) = (PAGE_TABLES.0, PAGE_TABLES.0 + 0x1000, PAGE_TABLES.0 + 0x2000);
    memory.write_obj(pdpt | 0b11, GuestAddress(pml4))?;
    for gib in 0..4 {
        memory.write_obj((pd + gib * 0x1000) | 0b11, GuestAddress(pdpt + gib * 8))?;
    }
    for page in 0..4 * 512 {
        memory.write_obj(page << 21 | 0b1000_0011, GuestAddress(pd + page * 8))?;
    }
    Ok(())
}

/// Sets the first processor's registers as the 64-bit boot protocol asks (Linux, x86/boot, "64-bit BOOT PROTOCOL"):
/// long mode with the first memory mapped as it is, interrupts off, RSI at the boot parameters.
///
/// # Errors
/// What KVM does not take.
pub fn enter_long_mode(vcpu: &VcpuFd, entry: GuestAddress) -> Result<(), CpuError> {
    let mut special = vcpu.get_sregs().map_err(kvm("tell registers"))?;
    special.cs = segment(CODE, 11, true);
    for data in [&mut special.ds, &mut special.es, &mut special.ss, &mut special.fs, &mut special.gs] {
        *data = segment(DATA, 3, false);
    }
    special.gdt.base = GDT.0;
    special.gdt.limit = 4 * 8 - 1;
    special.idt.limit = 0;
    special.cr3 = PAGE_TABLES.0;
    // PAE; protection and paging; long mode enabled and active.
    special.cr4 |= 1 << 5;
    special.cr0 |= 1 | 1 << 31;
    special.efer |= 1 << 8 | 1 << 10;
    vcpu.set_sregs(&special).map_err(kvm("take the first state of a processor"))?;
    let registers = kvm_regs { rip: entry.0, rsi: ZERO_PAGE.0, rflags: 2, ..kvm_regs::default() };
    vcpu.set_regs(&registers).map_err(kvm("take the first registers of a processor"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host that has everything.
    fn host() -> Vec<kvm_cpuid_entry2> {
        let functions = [0, 1, 2, 4, 6, 7, 0xb, 0xd, 0x4000_0000, 0x4000_0001, 0x8000_0000, 0x8000_0001];
        let functions = functions.into_iter().chain(0x8000_0002..=0x8000_001f);
        let all = u32::MAX;
        let leaf = |function| kvm_cpuid_entry2 {
            function,
            eax: all,
            ebx: all,
            ecx: all,
            edx: all,
            ..kvm_cpuid_entry2::default()
        };
        functions.map(leaf).collect()
    }

    fn leaf(leaves: &[kvm_cpuid_entry2], function: u32) -> kvm_cpuid_entry2 {
        *leaves.iter().find(|leaf| leaf.function == function).expect("a leaf")
    }

    #[test]
    fn a_guest_with_the_hosts_processor_has_no_machines_of_its_own() {
        let leaves = leaves(Model::Host, &host(), true, 0);
        assert_eq!(leaf(&leaves, 1).ecx >> 5 & 1, 0, "VMX");
        let extended = leaf(&leaves, 0x8000_0001).ecx;
        assert_eq!(extended >> 2 & 1, 0, "SVM");
        assert_eq!(extended.count_ones(), 31, "what else the host has is there");
        assert_eq!(leaf(&leaves, 0x8000_000a).edx, 0);
    }

    #[test]
    fn the_fixed_model_has_what_version_2_asks_for_and_nothing_beyond() {
        let leaves = leaves(Model::Fixed, &host(), true, 3);
        let one = leaf(&leaves, 1);
        for bit in [0, 9, 13, 19, 20, 23] {
            assert_eq!(one.ecx >> bit & 1, 1, "ECX {bit}");
        }
        // MONITOR, VMX, FMA, XSAVE, AVX, F16C, RDRAND.
        for bit in [3, 5, 12, 26, 27, 28, 29, 30] {
            assert_eq!(one.ecx >> bit & 1, 0, "ECX {bit}");
        }
        assert_eq!(one.ebx >> 24, 3, "the processor's number");
        let seven = leaf(&leaves, 7);
        assert_eq!((seven.ebx, seven.ecx, seven.edx), (0, 0, 0), "no AVX2, no AVX-512");
        let extended = leaf(&leaves, 0x8000_0001);
        assert_eq!(extended.ecx, 1, "no SVM");
        assert_eq!(leaf(&leaves, 0).eax, 7);
        assert!(!leaves.iter().any(|leaf| matches!(leaf.function, 0xb | 0xd | 0x8000_001f)));
    }

    #[test]
    fn the_fixed_model_gives_nothing_that_the_host_lacks() {
        let nothing: Vec<_> =
            host().into_iter().map(|leaf| kvm_cpuid_entry2 { ecx: 0, edx: 0, ..leaf }).collect();
        let one = leaf(&leaves(Model::Fixed, &nothing, false, 0), 1);
        assert_eq!((one.ecx, one.edx), (HYPERVISOR, 0));
    }

    #[test]
    fn two_hosts_give_the_same_fixed_model() {
        let other: Vec<_> = host()
            .into_iter()
            .filter(|leaf| leaf.function != 0xd)
            .map(|leaf| match leaf.function {
                1 => kvm_cpuid_entry2 { eax: 0x000a_06f8, ecx: leaf.ecx & !(1 << 28), ..leaf },
                _ => leaf,
            })
            .collect();
        assert_eq!(leaves(Model::Fixed, &host(), true, 1), leaves(Model::Fixed, &other, true, 1));
        assert_ne!(leaves(Model::Host, &host(), true, 1), leaves(Model::Host, &other, true, 1));
    }

    #[test]
    fn the_brand_is_spelt_over_three_leaves() {
        let leaves = leaves(Model::Fixed, &host(), true, 0);
        let text: Vec<u8> = (0x8000_0002..=0x8000_0004)
            .flat_map(|function| {
                let leaf = leaf(&leaves, function);
                [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes).concat()
            })
            .collect();
        assert!(text.starts_with(b"kiln virtual processor, x86-64-v2\0"));
    }
}
