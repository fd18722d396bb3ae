//! What host and agent say to each other. The order of a machine's life:
//!
//! 1. host → `Hello`; agent → `Ready`. Versions must be equal. Until `Setup` another host may say `Hello` in this one's
//!    place, as it does to the copy of a frozen machine. Before a machine is frozen, host → `Settle`; of one that is to wait for a
//!    step, host → `Rehearse`. Agent → `SetupDone` or `Failed`.
//! 2. host → `Setup`; agent → `SetupDone` or `Failed`. Inside it the seed comes before anything that draws random numbers.
//! 3. host → `Exec` (any number, also at once, `id` chosen by the host); agent → `Started`, `Output`…, `Exited`, or
//!    `ExecFailed`. Meanwhile host → `Stdin`, `Signal`, `Resize`. Input and output of each command flow on a
//!    [`Credit`] of their own, so that one which nobody reads holds up no other message. Between commands host →
//!    `Mount`; agent → `Mounted` or `Failed`.
//! 4. host → `List` of a layered mount; agent → `Entry`… `ListDone`. Then host → `Fetch` of some of those entries by
//!    their ordinal; agent → for each `FileStart`, `FileData`…, `FileEnd`; then `FetchDone`.
//! 5. host → `PowerOff`; agent syncs, answers `Bye` and powers off.

/// The version of this protocol. Host and agent are installed together, so there is no negotiation.
pub const VERSION: u16 = 8;

/// The vsock port on the host (CID 2) that an agent connects to when its carrier is vsock.
pub const AGENT_VSOCK_PORT: u32 = 1024;

/// The name of the virtio-serial port that carries the wire.
pub const SERIAL_PORT_NAME: &str = "kiln.wire";

/// The tag of the one virtio-fs device whose top directory holds every share by name.
pub const SHARES_TAG: &str = "kiln";

/// Which standard stream some output is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// File descriptor 1.
    Stdout,
    /// File descriptor 2.
    Stderr,
}

/// In a `Failed` text about a file system that the kernel does not know.
pub const NOT_LISTED: &str = "not listed among the kernel's";

/// The beginning of a `Failed` text that is about the root itself, not about what is made around it.
pub const ABOUT_ROOT: &str = "mounting the root";

/// The folder of the initramfs with the modules of file systems that are loaded when one is to be mounted: in each
/// folder of it, named as the file system is, in the order of their names.
pub const FILESYSTEMS_FOLDER: &str = "filesystems";

/// The folder of the initramfs with the drivers that a machine can wait for: in each folder of it, named as sysfs has the number of
/// a virtio device (`0x0004`), its modules in the order of their names.
pub const DRIVERS_FOLDER: &str = "drivers";

/// Where a mounted tree comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The share of this name, a directory under the virtio-fs mount.
    Share(String),
    /// The virtio-blk disk with this serial, and its file system (`erofs`, `squashfs`, `ext4`, …).
    Disk {
        /// The virtio-blk serial, at most 20 bytes.
        serial: String,
        /// File system type as `mount` names it; empty: the disk is not mounted but shown as a block device at the
        /// target.
        filesystem: String,
        /// Whether the disk is attached read-only.
        read_only: bool,
    },
    /// The modules that the initramfs was not given: the erofs disk with this serial, which holds what is mounted
    /// at `/lib/modules/RELEASE`, whatever the mount's target says.
    Modules(String),
    /// A folder of the step's own tree by its absolute path, made where missing: one folder at two places, so that what is
    /// written at either is in the layer of the first.
    Within(Vec<u8>),
}

/// What may be done to a mounted tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Nothing but reading.
    ReadOnly,
    /// Writes go to a private layer above it, which dies with the machine; `List` may name it.
    Layered,
    /// Writes reach the source itself (a disk).
    Direct,
}

/// A tree mounted below the step's root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Where it comes from.
    pub source: Source,
    /// Absolute path in the step's root; created in the root's layer where missing.
    pub target: Vec<u8>,
    /// What may be done to it.
    pub access: Access,
}

/// The clock of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clock {
    /// Seconds since 1970-01-01 UTC at the moment the step starts.
    pub seconds: i64,
    /// Nanoseconds within the second.
    pub nanoseconds: u32,
}

/// A disk that is swapped to, so that the layers may outgrow memory. The agent writes its swap header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scratch {
    /// Its serial.
    pub serial: String,
    /// How much of it is used: two pages at least. Its driver may think that it is larger.
    pub bytes: u64,
}

/// Everything a machine needs before its first command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setup {
    /// Fresh entropy, credited to the kernel's generator before any program starts.
    pub seed: [u8; 64],
    /// Whether a program that does nothing is started meanwhile, one of the root's where that is on a disk. Where the machine is
    /// emulated and another of its processors is free, what the kernel does for a command is translated then.
    pub warm_up: bool,
    /// What the clock is set to.
    pub clock: Clock,
    /// The root's source; mounted below a private layer at `/`.
    pub root: Source,
    /// The disk that is swapped to, if there is one.
    pub scratch: Option<Scratch>,
    /// Most bytes that all private layers may hold together (size of their tmpfs); 0: no limit.
    pub layer_bytes: u64,
    /// Most processes and threads that commands may have together; 0: as many as the kernel has room for.
    pub processes: u32,
    /// Other trees, mounted in this order.
    pub mounts: Vec<Mount>,
    /// Host name.
    pub hostname: String,
    /// Kernel modules to load (with what they depend on) once `Source::Modules` is mounted.
    pub load_modules: Vec<String>,
}

/// How large a terminal is, in characters; 0: not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// One command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exec {
    /// The host's number for it.
    pub id: u32,
    /// Program and arguments, at least one; a program without `/` is searched in `env`'s PATH.
    pub argv: Vec<Vec<u8>>,
    /// The whole environment, `NAME=VALUE` each.
    pub env: Vec<Vec<u8>>,
    /// Working directory in the step's root.
    pub cwd: Vec<u8>,
    /// Kill it this long after its start; 0: never.
    pub timeout_ms: u64,
    /// How long after SIGTERM comes SIGKILL.
    pub grace_ms: u64,
    /// Whether `Stdin` will follow; otherwise standard input is `/dev/null`.
    pub stdin: bool,
    /// Gives the command a terminal of this size as its controlling one and as all its standard streams: `Stdin` is what
    /// is typed, and what the terminal shows comes as `Output` of standard output.
    pub terminal: Option<TerminalSize>,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It called exit.
    Exit(u8),
    /// A signal ended it.
    Signal(u8),
    /// Its time was over, and the agent killed it.
    TimedOut,
}

/// What a command used (getrusage(2) of it and all it waited for; peaks of the machine).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// From start to end.
    pub wall_us: u64,
    /// Processor time in user mode.
    pub user_us: u64,
    /// Processor time in the kernel.
    pub system_us: u64,
    /// Largest resident set of any one process.
    pub max_rss_bytes: u64,
    /// Most memory in use in the machine as sampled while it ran (MemTotal - MemAvailable).
    pub peak_memory_bytes: u64,
    /// How often the kernel's out-of-memory killer struck while it ran.
    pub oom_kills: u32,
    /// How often a process could not be started while it ran, because commands had as many as `Setup` allows.
    pub refused_processes: u32,
}

/// From host to agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToAgent {
    /// The first message, from each host there is before `Setup`.
    Hello {
        /// Must be [`VERSION`].
        version: u16,
    },
    /// Prepare the step's world.
    Setup(Setup),
    /// Before `Setup`: prepare a world in a process of its own, start a program in it and drop both. The kernel has been
    /// through it all then, and an emulator has translated what it did.
    Rehearse(Setup),
    /// Before `Setup`: do what each copy of this machine would have to do otherwise. What a generator has from this seed is no
    /// copy's: each is seeded anew.
    Settle {
        /// Entropy, credited to the kernel's generator.
        seed: [u8; 64],
        /// A disk to swap to, where nothing may be in use yet. A `Setup` that names the same one finds that done.
        scratch: Scratch,
    },
    /// Mount another tree below the step's root. Commands started later see it.
    Mount(Mount),
    /// Start a command.
    Exec(Exec),
    /// Bytes for a command's standard input; empty: end of input (a terminal gets its end-of-file character).
    Stdin {
        /// The command.
        id: u32,
        /// At most [`MAX_DATA_BYTES`], and no more than the credit left.
        data: Vec<u8>,
    },
    /// The host has taken so much of a command's output.
    Credit {
        /// The command.
        id: u32,
        /// At least 1.
        bytes: u32,
    },
    /// A command's terminal has another size.
    Resize {
        /// The command.
        id: u32,
        /// The size.
        size: TerminalSize,
    },
    /// Send a signal to a command's process and its group.
    Signal {
        /// The command.
        id: u32,
        /// Linux signal number.
        signal: u8,
    },
    /// List what a layer holds: everything written to the `Layered` mount at `target` (`/` for the root).
    List {
        /// The mount's target.
        target: Vec<u8>,
    },
    /// Send the content of these regular files of the last `List`.
    Fetch {
        /// Ordinals in the order wanted, at most [`MAX_FETCH`].
        ordinals: Vec<u32>,
    },
    /// Sync and power off.
    PowerOff,
}

/// What an entry of a layer is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A folder.
    Directory {
        /// Whether it hides what the lower tree has beneath it (overlayfs `trusted.overlay.opaque`).
        opaque: bool,
    },
    /// A regular file.
    File {
        /// Length in bytes, holes included.
        size: u64,
    },
    /// A symbolic link and its text.
    Symlink(Vec<u8>),
    /// Another name of an earlier entry.
    HardLink {
        /// That entry's ordinal.
        ordinal: u32,
    },
    /// A name that the lower tree has and the layer removed (overlayfs whiteout).
    Whiteout,
    /// A character device.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A FIFO.
    Fifo,
    /// A socket.
    Socket,
}

/// One thing in a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Counts up from 0 within one `List`.
    pub ordinal: u32,
    /// Path below the mount, no leading slash; empty for the layer's own top.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// The low twelve bits of its mode.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time, seconds.
    pub mtime_seconds: i64,
    /// Modification time, nanoseconds.
    pub mtime_nanoseconds: u32,
    /// Extended attributes, overlayfs' own left out, at most [`MAX_XATTRS`].
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// From agent to host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromAgent {
    /// The agent runs and listens.
    Ready {
        /// [`VERSION`].
        version: u16,
        /// `uname -r`.
        kernel: String,
        /// Microseconds since the kernel started (CLOCK_BOOTTIME).
        uptime_us: u64,
        /// MemTotal.
        memory_bytes: u64,
        /// Processors online.
        cpus: u16,
    },
    /// `Setup`, `Rehearse` or `Settle` succeeded.
    SetupDone,
    /// `Mount` succeeded.
    Mounted,
    /// A request other than `Exec` failed.
    Failed {
        /// What was being done, to what.
        what: String,
        /// Linux errno, 0 where there is none.
        errno: u16,
    },
    /// A command's process exists.
    Started {
        /// The command.
        id: u32,
    },
    /// A command could not be started.
    ExecFailed {
        /// The command.
        id: u32,
        /// What was being done for it; empty: its program was executed, and only that failed.
        what: String,
        /// Linux errno, of execve: ENOENT not found, EACCES not executable, ENOEXEC not a program, …
        errno: u16,
        /// What stands in the way of a program that is there, in words; empty where nothing is known.
        why: String,
    },
    /// Bytes a command wrote.
    Output {
        /// The command.
        id: u32,
        /// To which stream.
        stream: Stream,
        /// At least 1, at most [`MAX_DATA_BYTES`], and no more than the credit left.
        data: Vec<u8>,
    },
    /// A command has taken so much of its standard input.
    Credit {
        /// The command.
        id: u32,
        /// At least 1.
        bytes: u32,
    },
    /// A command ended, and everything it wrote was sent.
    Exited {
        /// The command.
        id: u32,
        /// How.
        outcome: Outcome,
        /// What it used.
        usage: Usage,
    },
    /// One entry of a `List`, folders before what is in them.
    Entry(Entry),
    /// The `List` is complete.
    ListDone {
        /// How many entries there were.
        entries: u32,
    },
    /// The content of an entry follows.
    FileStart {
        /// The entry.
        ordinal: u32,
    },
    /// Some content; what is skipped is zeros.
    FileData {
        /// Where, never before the end of the last piece.
        offset: u64,
        /// At most [`MAX_DATA_BYTES`].
        data: Vec<u8>,
    },
    /// The content is complete.
    FileEnd {
        /// Its length as read.
        size: u64,
    },
    /// The `Fetch` is complete.
    FetchDone,
    /// A line for the machine's log.
    Log(String),
    /// All is synced; the machine powers off.
    Bye,
}

/// Most bytes in one `Output`, `Stdin` or `FileData`.
pub const MAX_DATA_BYTES: usize = 256 << 10;
/// Longest path and symbolic-link text (Linux's PATH_MAX without the NUL).
pub const MAX_PATH_BYTES: usize = 4095;
/// Longest name of a share, host, module, file system or serial.
pub const MAX_NAME_BYTES: usize = 255;
/// Longest `Log` line and `Failed` text.
pub const MAX_TEXT_BYTES: usize = 4096;
/// Most mounts and modules in a `Setup`.
pub const MAX_MOUNTS: usize = 256;
/// Most arguments, and most environment variables, of an `Exec`.
pub const MAX_ARGUMENTS: usize = 65_536;
/// Most bytes of arguments and environment together.
pub const MAX_ARGUMENT_BYTES: usize = 4 << 20;
/// Most extended attributes of one entry.
pub const MAX_XATTRS: usize = 64;
/// Longest value of an extended attribute (Linux's XATTR_SIZE_MAX).
pub const MAX_XATTR_BYTES: usize = 65_536;
/// Most ordinals in one `Fetch`.
pub const MAX_FETCH: usize = 65_536;
