//! One VM for one step, whichever backend runs it.
//!
//! A [`Backend`] starts a [`Machine`] from a [`Spec`], which names what the step may see (shares, disks) and its
//! limits, never how they are carried. Everything is handed over as descriptors, so a machine needs no name in
//! the host's file system and leaves none. The life of a machine:
//!
//! ```text
//! start ──▶ wire (agent answers) ──▶ share, observe … ──▶ drop: killed and reaped
//! ```
//!
//! Backends: [`vmm`], kiln's own, and [`qemu`], which both copy machines from [`template`]s where they have a place for them, also
//! before there is a step ([`ready`]); [`fake`] for tests of what stands above.

pub mod fake;
pub mod fetcher;
pub mod footprint;
pub mod jail;
pub mod launch;
pub mod meminfo;
pub mod probe;
pub mod program;
pub mod qemu;
pub mod ready;
pub mod scratch;
mod server;
mod slots;
mod spawn;
mod tail;
pub mod template;
pub mod vmm;
mod wire;

use std::borrow::Cow;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use jail::Held;
use kiln_digest::Digest;
use kiln_virtio::fs::record::Record;
use serde::{Deserialize, Serialize};

use crate::shortage::Shortage;

/// The tree of a host directory under a name, as the machine's fs device shows it.
#[derive(Debug)]
pub struct Share {
    /// The name in the device's top directory.
    pub name: String,
    /// The directory. Beneath it the device opens what the guest asks for, and nowhere else.
    pub directory: OwnedFd,
    /// What its files show.
    pub attributes: Attributes,
    /// Paths in it that the guest is not shown.
    pub hidden: Vec<PathBytes>,
}

pub use kiln_virtio::fs::Attributes;
pub use kiln_virtio::fs::record::PathBytes;

/// What the kernel of every machine is told (Documentation/admin-guide/kernel-parameters.txt).
///
/// `panic=-1` turns a panic into a reset, which ends the machine at once. `init_on_alloc` keeps pages that a device process
/// filled from holding stale translated code under emulation. `cryptomgr.notests` leaves out tests of the kernel's ciphers, 0.4 s
/// of an emulated boot. Of the security modules only `landlock` is there, which a step can use on itself: the others guard
/// users of one system from each other, and their hooks are in every system call; nor does a machine of one step need to know
/// its pressure (`psi`), or share itself out among sessions (`noautogroup`). All are a MiB of translated code in an emulator.
const KERNEL_WORDS: &str = "console=ttyS0 quiet loglevel=4 panic=-1 init_on_alloc=1 cryptomgr.notests lsm=landlock psi=0 noautogroup \
                            random.trust_cpu=off tsc=nowatchdog rcupdate.rcu_expedited=1";

/// Serials of the disks that have a purpose of their own.
pub mod serial {
    /// The root's image.
    pub const ROOT: &str = "root";
    /// What the guest swaps to.
    pub const SCRATCH: &str = "scratch";
    /// The image of kernel modules.
    pub const MODULES: &str = "modules";
    /// Programs to look into a machine with.
    pub const TOOLBOX: &str = "toolbox";
}

/// A file attached as virtio-blk, read as raw bytes whatever is in it.
#[derive(Debug)]
pub struct Disk {
    /// The virtio serial by which the agent finds it, at most 20 bytes.
    pub serial: String,
    /// The file, open for writing unless `read_only`.
    pub file: OwnedFd,
    /// Whether the guest may write.
    pub read_only: bool,
}

impl Disk {
    /// Its size in bytes.
    ///
    /// # Errors
    /// What fstat(2) says.
    pub fn size(&self) -> std::io::Result<u64> {
        Ok(std::fs::File::from(self.file.try_clone()?).metadata()?.len())
    }
}

/// What carries the wire between host and agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Carrier {
    /// A virtio-serial port of the backend's own, which survives being frozen.
    #[default]
    Serial,
    /// kiln's vsock device.
    Vsock,
}

/// Which processor a guest sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cpu {
    /// One model, whatever the host has: what a step does with its processor's features is the same everywhere.
    #[default]
    Fixed,
    /// All that the host can give but virtualisation: what a step gives may depend on the host.
    Host,
    /// That, with virtualisation.
    Nested,
}

/// What a machine is made of.
#[derive(Debug)]
pub struct Spec {
    /// vmlinux or bzImage.
    pub kernel: PathBuf,
    /// The initramfs with the agent.
    pub initramfs: PathBuf,
    /// What names the contents of both.
    pub bundle: Digest,
    /// Guest memory.
    pub memory_bytes: u64,
    /// Virtual processors.
    pub cpus: u16,
    /// Trees the guest may read.
    pub shares: Vec<Share>,
    /// Disks, found by serial.
    pub disks: Vec<Disk>,
    /// What carries the wire.
    pub carrier: Carrier,
    /// Which processor it has.
    pub cpu: Cpu,
    /// Whether it reaches the host's network.
    pub network: bool,
    /// What the agent of a machine like it can rehearse, a message: the world of such a step, without its shares.
    pub rehearsal: Option<Vec<u8>>,
}

/// How strong the boundary around a machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Accelerator {
    /// Hardware virtualisation: a boundary.
    Kvm,
    /// Emulation, which QEMU's own policy does not call a boundary.
    Tcg,
}

impl Accelerator {
    /// Its name in events and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// How a machine came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Origin {
    /// It booted.
    Boot,
    /// It is the copy of a machine that was frozen when its agent was ready.
    Template,
    /// It is such a copy, made before there was a step for it.
    Ready,
}

/// What the first line of a run and its record say about the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Backend and its version, such as `qemu 10.0.2`.
    pub backend: String,
    /// How guest code runs.
    pub accelerator: Accelerator,
    /// What of the jail holds around each of its processes.
    pub jail: Held,
    /// How it came to be. Makes no difference to what it does.
    pub origin: Origin,
}

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let accelerator = match self.accelerator {
            Accelerator::Kvm => "KVM",
            Accelerator::Tcg => "emulation (no security boundary)",
        };
        write!(f, "{}, {accelerator}; jail: {}", self.backend, self.jail)
    }
}

/// What a child of kiln's own says before it ends because it cannot be what it was to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What failed, and why.
    pub said: String,
    /// What the user can do about it.
    pub hint: Option<String>,
    /// Whether the host was in the way, and not what the child was given.
    pub is_hosts: bool,
}

impl Failure {
    const MARK: &str = "kiln failed: ";

    /// As the child writes it: a line.
    fn line(&self) -> String {
        format!("{}{}\n", Self::MARK, serde_json::to_string(self).unwrap_or_default())
    }

    /// What a line of a child's standard error says, if it is that.
    fn of_line(line: &str) -> Option<Self> {
        serde_json::from_str(line.strip_prefix(Self::MARK)?).ok()
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        self.hint.clone().or_else(|| Some(Shortage::in_words(&self.said)?.hint().to_owned()))
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.said)
    }
}

/// How a machine that stopped by itself went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Death {
    /// The guest's kernel panicked; the line that says why.
    Panicked(String),
    /// The guest switched itself off or asked for a reset.
    Stopped(String),
    /// The host could not read or write one of its disks, and so it was stopped.
    Disk {
        /// The disk's serial.
        disk: String,
        /// The system's word.
        why: String,
    },
    /// The program that runs the machine died; how, and what it said last.
    Killed {
        /// Which program.
        program: Cow<'static, str>,
        /// Exit status in words.
        status: String,
        /// The end of its standard error.
        said: String,
    },
    /// kiln's own program that runs the machine could not run it, or not any more.
    Failed(Failure),
}

impl Death {
    /// What the host lacked, where that is what it died of.
    pub fn shortage(&self) -> Option<Shortage> {
        match self {
            Self::Killed { status, said, .. } => {
                // Unless a person kills it, the kernel does, which needs the memory.
                Shortage::in_words(said).or((status == spawn::KILLED).then_some(Shortage::Memory))
            }
            Self::Disk { why, .. } => Shortage::in_words(why),
            Self::Failed(failure) => Shortage::in_words(&failure.said),
            Self::Panicked(_) | Self::Stopped(_) => None,
        }
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        if let Self::Failed(failure) = self {
            return failure.hint();
        }
        let lack = self.shortage()?.hint();
        Some(match self {
            Self::Killed { status, .. } if status == spawn::KILLED => {
                format!("where nobody killed it, the system did, for want of memory: {lack}")
            }
            _ => lack.to_owned(),
        })
    }
}

impl std::fmt::Display for Death {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Panicked(line) => write!(f, "the guest's kernel panicked: {line}"),
            Self::Stopped(reason) => write!(f, "the guest stopped its machine ({reason})"),
            Self::Disk { disk, why } if disk == serial::SCRATCH => {
                write!(f, "its scratch disk, a file in kiln's store, cannot be written: {why}")
            }
            Self::Disk { disk, why } => write!(f, "its disk `{disk}` cannot be read or written: {why}"),
            Self::Killed { program, status, said } if said.is_empty() => {
                write!(f, "{program} ended ({status})")
            }
            Self::Killed { program, status, said } => write!(f, "{program} ended ({status}): {said}"),
            Self::Failed(failure) => write!(f, "kiln's VMM cannot run it: {failure}"),
        }
    }
}

/// Why a machine could not be started or driven.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The program of a backend is not there.
    #[error("`{program}` was not found")]
    Missing {
        /// What was looked for.
        program: String,
    },
    /// QEMU is older than what kiln is built for.
    #[error("QEMU {found} is too old: kiln needs {} or newer", qemu::OLDEST)]
    TooOld {
        /// Its version.
        found: String,
    },
    /// What belongs to kiln is not there.
    #[error(transparent)]
    NoProgram(#[from] program::Missing),
    /// The machine died before its agent answered.
    #[error("the machine died at start: {0}")]
    DiedAtStart(Death),
    /// A process could not be started or spoken to.
    #[error("cannot {what}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The system's word.
        #[source]
        source: std::io::Error,
    },
    /// KVM's device.
    #[error("cannot open {}", probe::DEVICE)]
    Kvm(#[source] std::io::Error),
    /// The guest's memory.
    #[error(transparent)]
    Memory(#[from] kiln_vmm::memory::MemoryError),
    /// More processors than a machine can have.
    #[error("a machine of kiln's VMM cannot have {0} processors")]
    Processors(u16),
    /// The fs device's process did not do what it was told.
    #[error("the process that serves the machine's shares failed: {0}")]
    Device(String),
    /// The process of the machine could not be it.
    #[error("the machine cannot be run: {0}")]
    Failed(Failure),
}

impl MachineError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Missing { .. } | Self::TooOld { .. } => Some(format!(
                "install QEMU {} or newer (Debian 13: qemu-system-x86; Debian 12: the same from \
                 bookworm-backports), or name it with KILN_QEMU",
                qemu::OLDEST
            )),
            Self::NoProgram(_) => Some(program::HINT.to_owned()),
            Self::Kvm(error) => probe::Cause::of(error).fix().map(str::to_owned),
            Self::Memory(error) => error.hint(),
            Self::Failed(failure) => failure.hint(),
            Self::Processors(_) => Some(format!("give it at most {}", u8::MAX - 1)),
            Self::DiedAtStart(death) => death.hint(),
            Self::Device(said) => Shortage::in_words(said).map(|lack| lack.hint().to_owned()),
            Self::Io { source, .. } => {
                Shortage::in_words(&source.to_string()).map(|lack| lack.hint().to_owned())
            }
        }
    }

    fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}

/// Random bytes of the host's.
///
/// # Errors
/// It has none.
pub fn drawn<const N: usize>() -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(bytes)
}

/// What `error` says and what its sources say that it does not.
pub fn in_full(error: &dyn std::error::Error) -> String {
    let mut said = error.to_string();
    for inner in std::iter::successors(error.source(), |error| error.source()) {
        let more = inner.to_string();
        if !said.contains(more.trim()) {
            said = format!("{said}: {more}");
        }
    }
    said
}

/// Starts machines.
pub trait Backend {
    /// Starts a machine; its agent may not answer yet.
    ///
    /// # Errors
    /// [`MachineError`] where the host cannot run it.
    fn start(&self, spec: Spec) -> Result<Box<dyn Machine>, MachineError>;
}

/// A started machine. Dropping it kills and reaps all of it.
pub trait Machine: Send {
    /// What it is.
    fn identity(&self) -> &Identity;

    /// What went wrong on the way to it and was made good, in words for the user.
    fn notes(&self) -> &[String] {
        &[]
    }

    /// The stream to the agent; once.
    ///
    /// # Errors
    /// [`MachineError::DiedAtStart`] where the machine is gone before the agent spoke.
    fn wire(&mut self) -> Result<UnixStream, MachineError>;

    /// Ends the guest, and gives what was observed of the shares.
    ///
    /// # Errors
    /// [`MachineError::Device`] when the device process is gone or does not answer.
    fn observed(&mut self) -> Result<Record, MachineError>;

    /// What was observed of the shares so far. The guest runs on, and may ask for more.
    ///
    /// # Errors
    /// As [`Machine::observed`].
    fn observed_so_far(&mut self) -> Result<Record, MachineError>;

    /// After the wire closed: waits at most `patience` for the machine to be gone, and says how it went.
    fn death(&mut self, patience: Duration) -> Death;

    /// The end of what the guest's kernel printed.
    fn console(&self) -> String;

    /// The processes that hold its memory, or that started those.
    fn processes(&self) -> Vec<i32> {
        Vec::new()
    }
}
