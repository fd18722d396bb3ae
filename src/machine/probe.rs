//! Whether /dev/kvm runs guest code at a processor's speed: found out by running some.
//!
//! On hosts whose KVM has no hardware beneath it, the device opens, machines and processors are made, and kernel-mode
//! code is then emulated instruction by instruction (1.6 million a second were seen). Only a loop in long mode,
//! timed, tells. It runs in a child that is killed when it takes too long.

#![expect(unsafe_code, reason = "KVM maps memory of this process into the guest")]

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{FromRawFd as _, IntoRawFd as _};
use std::time::{Duration, Instant};

use kiln_vmm::cpu::CpuError;
use kiln_vmm::vm::{self, VmError};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::in_full;
use super::launch::Become;
use super::spawn::spawn;

/// Rounds of the loop; two instructions each.
const ROUNDS: u64 = 100_000;
/// Below this, what calls itself KVM is an emulator. Hardware gives over 1,000, an emulated KVM 1.6; KVM on a
/// processor that is itself emulated gives some 100.
const SLOWEST_MIPS: f64 = 20.0;
/// How long the child may take.
const PATIENCE: Duration = Duration::from_secs(3);

/// KVM's device.
pub const DEVICE: &str = "/dev/kvm";

/// Opens KVM's device, which is little proof that it can be used.
///
/// # Errors
/// What open(2) says.
pub fn open() -> io::Result<File> {
    File::options().read(true).write(true).open(DEVICE)
}

/// Why KVM cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// There is no device.
    Missing,
    /// The device is there, and not for this user.
    Forbidden,
    /// What has its name is not KVM's.
    Stranger,
    /// It cannot do all that is needed.
    TooOld,
    /// Another hypervisor has the processors.
    Busy,
    /// It is not to be.
    Unwanted,
    /// Something else.
    Other,
}

impl Cause {
    /// Why a call on the device failed with `error`.
    pub fn of(error: &io::Error) -> Self {
        match Errno::from_io_error(error) {
            Some(Errno::NOENT | Errno::NODEV | Errno::NXIO) => Self::Missing,
            Some(Errno::ACCESS | Errno::PERM) => Self::Forbidden,
            Some(Errno::BUSY) => Self::Busy,
            _ => Self::Other,
        }
    }

    /// What the user can do about it.
    pub fn fix(self) -> Option<&'static str> {
        match self {
            Self::Missing => Some(
                "load kvm_intel or kvm_amd, with virtualisation switched on in the firmware; a container has to be given \
                 /dev/kvm (`--device /dev/kvm`)",
            ),
            Self::Forbidden => Some(
                "let your user open /dev/kvm: `sudo usermod -aG kvm $USER` and a new login; a container has to be given \
                 the device and the group",
            ),
            Self::Stranger => {
                Some("remove what lies at /dev/kvm, and load kvm_intel or kvm_amd, which make it anew")
            }
            Self::TooOld => Some("boot a kernel of 5.10 or newer on this host"),
            Self::Busy => {
                Some("end the other hypervisor on this host (VirtualBox, VMware), or unload its modules")
            }
            Self::Unwanted => Some("let kiln choose (`--backend auto`)"),
            Self::Other => None,
        }
    }
}

/// What the probe found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Guest code runs at a processor's speed.
    Usable {
        /// Million instructions a second.
        mips: f64,
    },
    /// KVM is there and emulates guest instructions, or hangs.
    Slow {
        /// Million instructions a second; 0 where the loop did not end in time.
        mips: f64,
    },
    /// There is no /dev/kvm, or it cannot be used.
    Absent {
        /// What is to be done about it.
        cause: Cause,
        /// Why.
        why: String,
    },
}

impl Verdict {
    /// Whether machines may run on KVM.
    pub fn is_usable(&self) -> bool {
        matches!(self, Self::Usable { .. })
    }

    /// Whether the probe came to no end, as it may on a host that is busy.
    pub fn has_hung(&self) -> bool {
        matches!(self, Self::Slow { mips } if *mips == 0.0)
    }

    /// What the user can do to have KVM.
    pub fn fix(&self) -> Option<&'static str> {
        match self {
            Self::Usable { .. } => None,
            Self::Slow { .. } => {
                Some("run on hardware with virtualisation, or ask your host for nested virtualisation")
            }
            Self::Absent { cause, .. } => cause.fix(),
        }
    }

    fn absent(cause: Cause, why: impl fmt::Display) -> Self {
        Self::Absent { cause, why: why.to_string() }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usable { mips } => write!(f, "KVM runs guest code ({mips:.0} MIPS)"),
            Self::Slow { .. } if self.has_hung() => {
                write!(
                    f,
                    "KVM is present but did not finish a short loop in {} s: not usable",
                    PATIENCE.as_secs()
                )
            }
            Self::Slow { mips } => {
                write!(f, "KVM is present but emulates guest instructions ({mips:.1} MIPS): not usable")
            }
            Self::Absent { why, .. } => write!(f, "KVM cannot be used: {why}"),
        }
    }
}

/// Runs the probe in a child.
pub fn probe() -> Verdict {
    if let Err(error) = open() {
        return Verdict::absent(Cause::of(&error), format!("{DEVICE}: {error}"));
    }
    let mut child = match spawn(Become::KvmProbe, &[]) {
        Ok(child) => child,
        Err(error) => {
            return Verdict::absent(Cause::Other, format!("the probe could not be started: {error}"));
        }
    };
    let stdout = child.take_stdout();
    match child.wait(PATIENCE) {
        None => Verdict::Slow { mips: 0.0 },
        Some(_) => {
            let mut text = String::new();
            let read = stdout.map(|stdout| stdout.take(MOST_VERDICT_BYTES).read_to_string(&mut text));
            match (read, serde_json::from_str(&text)) {
                (Some(Ok(_)), Ok(verdict)) => verdict,
                _ => Verdict::absent(Cause::Other, format!("the probe gave no verdict: {}", child.said())),
            }
        }
    }
}

/// Most bytes of what the child says.
const MOST_VERDICT_BYTES: u64 = 4 << 10;

/// What this process finds.
pub(super) fn judge_here() -> Verdict {
    match measure_here() {
        Ok(mips) if mips >= SLOWEST_MIPS => Verdict::Usable { mips },
        Ok(mips) => Verdict::Slow { mips },
        Err(error) => {
            let cause = error.downcast_ref().map_or(Cause::Other, |error| match error {
                VmError::Version(_) => Cause::Stranger,
                VmError::Lacks(_) => Cause::TooOld,
                VmError::Cpu(CpuError::Kvm { source, .. }) => {
                    Cause::of(&io::Error::from_raw_os_error(source.errno()))
                }
                _ => Cause::Other,
            });
            Verdict::absent(cause, in_full(error.as_ref()))
        }
    }
}

const MEMORY_BYTES: usize = 2 << 20;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const CODE: u64 = 0x8000;

/// Runs the loop in this process and gives million instructions a second, the best of three.
///
/// # Errors
/// What KVM says, or that the guest did something else than halt.
fn measure_here() -> Result<f64, Box<dyn std::error::Error>> {
    // SAFETY: the descriptor is owned, and its ownership goes over to `Kvm`. That it is KVM's is checked next, by what it
    // answers; another file answers no such question.
    let kvm = unsafe { Kvm::from_raw_fd(open()?.into_raw_fd()) };
    vm::check(&kvm)?;
    let vm = vm::create(&kvm)?;
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)])?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY_BYTES as u64,
        userspace_addr: memory.get_host_address(GuestAddress(0))? as u64,
    };
    // SAFETY: the region is one mapping of MEMORY_BYTES owned by `memory`, which outlives `vm` and its processor:
    // it is declared before them in this function's scope and dropped at its end, after they have stopped.
    unsafe { vm.set_user_memory_region(region)? };

    // Identity-mapped long mode by one 2 MiB page (Intel SDM vol. 3, 5.5.4): not every KVM takes 1 GiB pages.
    memory.write_obj(PDPT | 0b11, GuestAddress(PML4))?;
    memory.write_obj(PD | 0b11, GuestAddress(PDPT))?;
    memory.write_obj(0b1000_0011_u64, GuestAddress(PD))?;
    // dec ecx; jnz -4; hlt
    memory.write_slice(&[0xff, 0xc9, 0x75, 0xfc, 0xf4], GuestAddress(CODE))?;

    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)?)?;
    let mut special = vcpu.get_sregs()?;
    let segment = |kind: u8, long: u8| kvm_segment {
        limit: u32::MAX,
        type_: kind,
        present: 1,
        s: 1,
        l: long,
        db: 1 - long,
        g: 1,
        selector: if long == 1 { 0x8 } else { 0x10 },
        ..kvm_segment::default()
    };
    special.cs = segment(11, 1);
    for data in [&mut special.ds, &mut special.es, &mut special.ss, &mut special.fs, &mut special.gs] {
        *data = segment(3, 0);
    }
    special.cr3 = PML4;
    // PAE; protection and paging; long mode enabled and active.
    special.cr4 |= 1 << 5;
    special.cr0 |= 1 | 1 << 31;
    special.efer |= 1 << 8 | 1 << 10;
    vcpu.set_sregs(&special)?;

    let mut best = f64::MAX;
    for _ in 0..3 {
        vcpu.set_regs(&kvm_regs { rip: CODE, rcx: ROUNDS, rflags: 2, ..kvm_regs::default() })?;
        let start = Instant::now();
        match vcpu.run()? {
            VcpuExit::Hlt => best = best.min(start.elapsed().as_secs_f64()),
            other => return Err(format!("the loop ended in {other:?} instead of a halt").into()),
        }
    }
    let instructions = u32::try_from(ROUNDS * 2)?;
    Ok(f64::from(instructions) / best / 1e6)
}
