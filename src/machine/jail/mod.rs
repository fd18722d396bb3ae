//! The jail around the processes that a guest talks to: what they may still do when the guest has taken them over.
//!
//! [`enter`] is called in the child, between receiving its descriptors and becoming what it is to be, and says which
//! layers hold. They do not rely on each other:
//!
//! | layer | takes away | where the host does not grant it |
//! | --- | --- | --- |
//! | descriptors, limits | what kiln's parent left open, core dumps, growing files (QEMU may) | always held |
//! | capabilities | all of root's powers; the device process keeps reading what it was given, when kiln is root | always held |
//! | namespaces | the host's file system, network, IPC, host name and other processes | reported missing |
//! | landlock | files but those named, TCP, signals and abstract sockets of others | reported missing |
//! | seccomp | system calls that its work does not need, thread by thread | refused: never optional |
//!
//! The device process keeps its shares as descriptors and sees an empty root. QEMU, which has to load libraries, ROMs
//! and modules, sees the system's program folders read-only, its kernel and initramfs, and needs executable memory to
//! emulate. [`attempt`] tries what must not work.

pub mod attempt;
mod capability;
pub(super) mod fetcher;
mod filter;
mod namespace;
mod rules;
mod sys;

use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use kiln_virtio::process::LockIn;
use rustix::process::{DumpableBehavior, Resource, Rlimit, Signal};
use serde::{Deserialize, Serialize};

use crate::threads::Refused;

pub use self::filter::{ThreadKind, enter_thread};
pub(super) use self::filter::{enter_disk, enter_owner, enter_plain_device, enter_processor};

/// Makes what narrows the threads of a device process to `directories`, which are all that it will be given.
///
/// # Errors
/// The kernel refuses.
pub(super) fn narrow(directories: &[OwnedFd]) -> io::Result<LockIn> {
    rules::narrow(directories)
}

/// A layer of the jail that a host may not grant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layer {
    /// None of root's powers, and no way to them.
    Capabilities,
    /// A mount namespace with next to nothing in it, and network, IPC, host name and process numbers of its own.
    Namespaces,
    /// Landlock rules on files, TCP, signals and abstract sockets.
    Landlock,
    /// A filter of system calls on every thread.
    Seccomp,
}

impl Layer {
    /// All there are, in the order in which they are entered.
    pub const ALL: [Self; 4] = [Self::Namespaces, Self::Capabilities, Self::Landlock, Self::Seccomp];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Capabilities => "capabilities",
            Self::Namespaces => "namespaces",
            Self::Landlock => "landlock",
            Self::Seccomp => "seccomp",
        }
    }

    /// How a host comes to grant it.
    pub fn how_to_get(self) -> &'static str {
        match self {
            Self::Capabilities => "let kiln start without securebits of its parent's",
            Self::Namespaces => {
                "allow user namespaces: sysctl kernel.unprivileged_userns_clone=1 and user.max_user_namespaces and user.max_pid_namespaces; on \
                 Ubuntu an AppArmor profile for kiln that says `userns`"
            }
            Self::Landlock => "a kernel of 5.13 or newer, with `landlock` in its boot parameter `lsm=`",
            Self::Seccomp => "a kernel with CONFIG_SECCOMP_FILTER",
        }
    }

    /// What a jail without it lets a process do that a guest has taken over.
    pub fn what_missing_means(self) -> &'static str {
        match self {
            Self::Namespaces => {
                "a process taken over by a guest keeps the host's network, and sees the names of the host's files and the numbers of its processes"
            }
            Self::Landlock => {
                "without namespaces beside it, a process taken over by a guest can open what your user can open"
            }
            Self::Capabilities | Self::Seccomp => "machines are not started",
        }
    }
}

/// What of the jail holds around a process.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Held {
    /// The layers that hold.
    pub layers: Vec<Layer>,
    /// Those that the host does not grant, and what it says.
    pub missing: Vec<(Layer, String)>,
    /// The version of landlock's interface, where it holds.
    pub landlock_abi: Option<i32>,
}

impl Held {
    /// Whether every layer holds.
    pub fn is_whole(&self) -> bool {
        self.missing.is_empty() && Layer::ALL.iter().all(|layer| self.layers.contains(layer))
    }

    /// The layers that the host does not grant.
    pub fn missing_layers(&self) -> Vec<Layer> {
        self.missing.iter().map(|(layer, _)| *layer).collect()
    }

    /// The layers that do not hold, each with what the host says.
    pub fn what_is_missing(&self) -> String {
        let words: Vec<String> =
            self.missing.iter().map(|(layer, why)| format!("no {} ({why})", layer.name())).collect();
        words.join("; ")
    }

    /// What holds around both of two processes.
    pub fn both(self, other: &Self) -> Self {
        let layers = self.layers.into_iter().filter(|layer| other.layers.contains(layer)).collect();
        let mut missing = self.missing;
        for (layer, why) in &other.missing {
            if !missing.iter().any(|(known, _)| known == layer) {
                missing.push((*layer, why.clone()));
            }
        }
        Self { layers, missing, landlock_abi: self.landlock_abi.min(other.landlock_abi) }
    }
}

impl std::fmt::Display for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> = self.layers.iter().map(|layer| layer.name()).collect();
        f.write_str(if names.is_empty() { "none" } else { "" })?;
        f.write_str(&names.join(", "))?;
        if !self.missing.is_empty() {
            let names: Vec<&str> = self.missing.iter().map(|(layer, _)| layer.name()).collect();
            write!(f, " (missing: {})", names.join(", "))?;
        }
        Ok(())
    }
}

/// Which process is locked in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Profile {
    /// The device process: nothing but its descriptors.
    Devices,
    /// QEMU.
    Qemu {
        /// Its program.
        program: PathBuf,
        /// Whether it may use /dev/kvm.
        kvm: bool,
        /// Files that it has to open by a name, which is the first of each pair.
        files: Vec<(String, PathBuf)>,
        /// Whether it serves its guest's network itself. It then keeps the host's network, with your user's rights.
        network: bool,
        /// The descriptor of the guest's memory, where it comes as one: QEMU takes that by a name only, [`MEMORY`].
        #[serde(skip)]
        memory: Option<RawFd>,
    },
    /// kiln's own VMM, which is a device process too: nothing but its descriptors, of which one is KVM's.
    Vmm,
    /// An emulated TPM.
    Tpm {
        /// Its program.
        program: PathBuf,
        /// The folder of its state, which it finds as [`STATE`].
        state: PathBuf,
    },
}

/// The name of a TPM's state in its jail.
pub(super) const STATE: &str = "state";

/// The name of the guest's memory among the files of QEMU's jail.
pub(super) const MEMORY: &str = "memory";

/// What of the host's files a process sees, and how. The same list makes its file system and its landlock rules.
struct Reach {
    /// Where it is on the host.
    from: PathBuf,
    /// Its name in the jail's root.
    at: PathBuf,
    kind: ReachKind,
}

/// What is reached, and so what may be done to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ReachKind {
    /// Files that may be read and executed.
    Files,
    /// A device that may be written and controlled.
    Device,
    /// A folder whose files may be made, written and removed.
    Writable,
    /// One of the process's own descriptors: a link of /proc, which leads to what the descriptor stands for.
    Descriptor,
}

impl Reach {
    fn read(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        Self { from: path.clone(), at: path, kind: ReachKind::Files }
    }

    fn device(path: impl Into<PathBuf>) -> Self {
        Self { kind: ReachKind::Device, ..Self::read(path) }
    }
}

/// Folders in which distributions keep programs, their libraries and data.
const SYSTEM_FOLDERS: [&str; 7] = ["/usr", "/lib", "/lib32", "/lib64", "/libx32", "/bin", "/sbin"];
/// Stores that hold a program and all it needs.
const CLOSURES: [&str; 2] = ["/nix/store", "/gnu/store"];

impl Profile {
    /// The path at which it finds the file `name`: in its own root, or on the host.
    pub(super) fn path_of(&self, name: &str, held: &Held) -> Option<PathBuf> {
        let (files, memory) = match self {
            Self::Qemu { files, memory, .. } => (files, memory),
            Self::Tpm { state, .. } if name == STATE => {
                let inside = held.layers.contains(&Layer::Namespaces);
                return Some(if inside { Path::new("/").join(STATE) } else { state.clone() });
            }
            _ => return None,
        };
        let path = match memory {
            Some(memory) if name == MEMORY => &own_descriptor(*memory),
            _ => &files.iter().find(|(known, _)| known == name)?.1,
        };
        Some(if held.layers.contains(&Layer::Namespaces) { Path::new("/").join(name) } else { path.clone() })
    }

    /// What of the host's files the process may reach by name.
    fn reach(&self) -> Vec<Reach> {
        let mut list: Vec<Reach> = SYSTEM_FOLDERS.iter().chain(&CLOSURES).map(Reach::read).collect();
        list.push(Reach::read("/etc/ld.so.cache"));
        if matches!(self, Self::Qemu { network: true, .. })
            && let Ok(from) = std::fs::canonicalize("/etc/resolv.conf")
        {
            // Whom QEMU asks where its guest asks for a name. Often a link, to where a jail shows nothing.
            list.push(Reach { from, ..Reach::read("/etc/resolv.conf") });
        }
        let (program, kvm, files, memory) = match self {
            Self::Devices | Self::Vmm => return Vec::new(),
            Self::Qemu { program, kvm, files, memory, .. } => (program, *kvm, files, *memory),
            Self::Tpm { state, .. } => {
                let at = Path::new("/").join(STATE);
                list.push(Reach { at, kind: ReachKind::Writable, ..Reach::read(state) });
                list.extend(["/dev/null", "/dev/urandom"].map(Reach::device));
                list.retain(|reach| reach.from.exists());
                return list;
            }
        };
        // A QEMU that lies elsewhere has its libraries and ROMs beside it, as `make install` puts them.
        let real = std::fs::canonicalize(program).unwrap_or_else(|_| program.clone());
        for program in [program.as_path(), &real] {
            let folder = program.parent().unwrap_or(Path::new("/"));
            let prefix = folder.parent().unwrap_or(folder);
            let beside =
                ["share/qemu", "share/seabios", "lib", "lib64", "libexec"].map(|name| prefix.join(name));
            for folder in beside.into_iter().chain([folder.to_owned()]) {
                if !list.iter().any(|known| folder.starts_with(&known.from)) {
                    list.push(Reach::read(folder));
                }
            }
        }
        let devices = ["/dev/null", "/dev/zero", "/dev/urandom"].into_iter().chain(kvm.then_some("/dev/kvm"));
        list.extend(devices.map(Reach::device));
        list.extend(
            files.iter().map(|(name, path)| Reach { at: Path::new("/").join(name), ..Reach::read(path) }),
        );
        list.extend(memory.map(|memory| Reach {
            at: Path::new("/").join(MEMORY),
            kind: ReachKind::Descriptor,
            ..Reach::read(own_descriptor(memory))
        }));
        list.retain(|reach| reach.from.exists());
        list
    }
}

/// By which name the calling process can open what its descriptor stands for.
fn own_descriptor(descriptor: RawFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{descriptor}"))
}

/// Locks the calling process in, which must have one thread and nothing of its own opened. `beneath` are directories
/// that it may read in, which it gets as descriptors. `without` leaves layers out, for tests. Where the host grants namespaces
/// it comes back in another process, by a number that `tell` is given. `open_own` is called in the process that comes back, while it
/// still sees the host's files.
///
/// # Errors
/// What cannot be done and must be: limits, capabilities, seccomp.
pub(super) fn enter(
    profile: &Profile,
    beneath: &[&OwnedFd],
    without: &[Layer],
    tell: impl FnOnce(i32) -> io::Result<()>,
    open_own: impl FnOnce() -> io::Result<()>,
) -> io::Result<Held> {
    limit(profile)?;
    let mut held = Held::default();
    let reach = profile.reach();
    let wanted = |layer| !without.contains(&layer);
    let network = matches!(profile, Profile::Qemu { network: true, .. });
    let left = wanted(Layer::Namespaces).then(|| namespace::leave(network));
    if let Some(Ok(())) = left
        && let Err(error) = namespace::be_first(tell)
    {
        if namespace::is_shortage(&error) {
            return Err(Refused::told("process")(error));
        }
        // The other namespaces are worth having without it.
        held.missing.push((Layer::Namespaces, format!("cannot number processes anew: {error}")));
    }
    open_own()?;
    match left.map(|left| left.and_then(|()| namespace::enter(&reach))) {
        Some(Ok(())) => held.layers.push(Layer::Namespaces),
        Some(Err(error)) => held.missing.push((Layer::Namespaces, error.to_string())),
        None => {}
    }
    if wanted(Layer::Capabilities) {
        capability::drop_all(profile)?;
        held.layers.push(Layer::Capabilities);
    }
    // From here on not even a set-user-ID program gives anything back.
    rustix::thread::set_no_new_privs(true)?;
    if wanted(Layer::Landlock) {
        let inside = held.layers.contains(&Layer::Namespaces);
        match rules::enter(&reach, beneath, inside, network) {
            Ok(abi) => {
                held.landlock_abi = Some(abi);
                held.layers.push(Layer::Landlock);
            }
            Err(error) => held.missing.push((Layer::Landlock, error.to_string())),
        }
    }
    if matches!(profile, Profile::Devices | Profile::Vmm) {
        // Nothing in /proc/self is needed any more. QEMU's program would undo it.
        rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    }
    // Credentials have changed, at which the kernel may forget it.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    if wanted(Layer::Seccomp) {
        filter::enter(profile)?;
        held.layers.push(Layer::Seccomp);
    }
    Ok(held)
}

/// Lets no file grow beyond `bytes` that the calling process writes.
///
/// # Errors
/// What setrlimit(2) says.
pub(super) fn limit_files(bytes: u64) -> io::Result<()> {
    rustix::process::setrlimit(Resource::Fsize, Rlimit { current: Some(bytes), maximum: Some(bytes) })?;
    Ok(())
}

/// Closes what was inherited beyond the standard streams. The first thing a child does.
///
/// # Errors
/// What close_range(2) says.
pub fn close_inherited() -> io::Result<()> {
    sys::close_inherited()
}

/// Descriptors that a process of a machine needs: its queues, sockets and disks, and some files.
const FEWEST_DESCRIPTORS: u64 = 256;
/// More than that would only take memory from the host.
const MOST_DESCRIPTORS: u64 = 1 << 16;

fn limit(profile: &Profile) -> io::Result<()> {
    let files = rustix::process::getrlimit(Resource::Nofile);
    let most = files.maximum.unwrap_or(MOST_DESCRIPTORS).min(MOST_DESCRIPTORS);
    if most < FEWEST_DESCRIPTORS {
        return Err(io::Error::other(format!(
            "only {most} files may be open at once (ulimit -n), and a machine needs {FEWEST_DESCRIPTORS}"
        )));
    }
    rustix::process::setrlimit(Resource::Nofile, Rlimit { current: Some(most), maximum: Some(most) })?;
    // Guest memory may hold secrets.
    rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    if *profile == Profile::Devices {
        limit_files(0)?;
    }
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    // Away from the terminal of whoever called kiln.
    rustix::process::setsid()?;
    Ok(())
}
