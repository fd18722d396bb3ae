//! The FUSE protocol as it lies in memory: linux/fuse.h, version 7.41, as far as a read-only server meets it.
//!
//! Layouts and numbers only. All fields are little-endian, as virtio 1.3 §5.11.6 has them on these hosts.

use zerocopy::little_endian::{I32, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// FUSE_KERNEL_VERSION.
pub const VERSION: u32 = 7;
/// The newest minor version this server speaks.
pub const NEWEST_MINOR: u32 = 41;
/// The oldest minor version accepted: the first that Linux speaks over virtio-fs.
pub const OLDEST_MINOR: u32 = 31;
/// FUSE_ROOT_ID.
pub const ROOT_ID: u64 = 1;

/// Request numbers (enum fuse_opcode).
pub mod op {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const INIT: u32 = 26;
    pub const READDIR: u32 = 28;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const NOTIFY_REPLY: u32 = 41;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const TMPFILE: u32 = 51;
}

/// INIT flags (FUSE_*), the low 32 of them.
pub mod init {
    pub const ASYNC_READ: u32 = 1 << 0;
    pub const AUTO_INVAL_DATA: u32 = 1 << 12;
    pub const DO_READDIRPLUS: u32 = 1 << 13;
    pub const NO_OPEN_SUPPORT: u32 = 1 << 17;
    pub const PARALLEL_DIROPS: u32 = 1 << 18;
    pub const MAX_PAGES: u32 = 1 << 22;
    pub const CACHE_SYMLINKS: u32 = 1 << 23;
    pub const NO_OPENDIR_SUPPORT: u32 = 1 << 24;
    pub const INIT_EXT: u32 = 1 << 30;
}

/// struct fuse_in_header: 40 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct InHeader {
    /// Length of the request, this header included.
    pub length: U32,
    /// One of [`op`].
    pub opcode: U32,
    /// The driver's name for the request.
    pub unique: U64,
    /// The inode it is about.
    pub nodeid: U64,
    /// Who asks, which does not matter to a read-only share.
    pub uid: U32,
    /// See `uid`.
    pub gid: U32,
    /// The thread that asks, as the driver counts them.
    pub pid: U32,
    /// Length of extensions, in units of 8 bytes.
    pub extension_length: U16,
    /// Reserved.
    pub padding: U16,
}

/// struct fuse_out_header: 16 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct OutHeader {
    /// Length of the answer, this header included.
    pub length: U32,
    /// 0 or a negative errno.
    pub error: I32,
    /// From the request.
    pub unique: U64,
}

/// struct fuse_attr: 88 bytes.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Attr {
    /// Inode number that stat(2) shows.
    pub ino: U64,
    /// Size in bytes.
    pub size: U64,
    /// Size in blocks of 512 bytes.
    pub blocks: U64,
    /// Times, seconds.
    pub atime: U64,
    /// See `atime`.
    pub mtime: U64,
    /// See `atime`.
    pub ctime: U64,
    /// Times, nanoseconds.
    pub atime_nanos: U32,
    /// See `atime_nanos`.
    pub mtime_nanos: U32,
    /// See `atime_nanos`.
    pub ctime_nanos: U32,
    /// Type and permissions.
    pub mode: U32,
    /// Hard links.
    pub nlink: U32,
    /// Owner.
    pub uid: U32,
    /// Group.
    pub gid: U32,
    /// Device number, in the kernel's 32-bit form (new_encode_dev).
    pub rdev: U32,
    /// Preferred size of reads.
    pub block_size: U32,
    /// FUSE_ATTR_*.
    pub flags: U32,
}

/// struct fuse_entry_out: 128 bytes, the answer to LOOKUP.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct EntryOut {
    /// The inode, or 0: the name is known not to exist.
    pub nodeid: U64,
    /// Tells apart inodes that had the same number: here always 0, as numbers are never used again.
    pub generation: U64,
    /// How long the name may be cached, seconds.
    pub entry_valid: U64,
    /// How long the attributes may be cached, seconds.
    pub attr_valid: U64,
    /// Nanoseconds of `entry_valid`.
    pub entry_valid_nanos: U32,
    /// Nanoseconds of `attr_valid`.
    pub attr_valid_nanos: U32,
    /// The attributes.
    pub attr: Attr,
}

/// struct fuse_attr_out: 104 bytes, the answer to GETATTR.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct AttrOut {
    /// How long the attributes may be cached, seconds.
    pub attr_valid: U64,
    /// Nanoseconds of `attr_valid`.
    pub attr_valid_nanos: U32,
    /// Reserved.
    pub dummy: U32,
    /// The attributes.
    pub attr: Attr,
}

/// struct fuse_init_in: 64 bytes since 7.36; older drivers send the first 16.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct InitIn {
    /// Protocol version.
    pub major: U32,
    /// Protocol version.
    pub minor: U32,
    /// Readahead, bytes.
    pub max_readahead: U32,
    /// What the driver can do.
    pub flags: U32,
}

/// struct fuse_init_out: 64 bytes.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct InitOut {
    /// Protocol version.
    pub major: U32,
    /// Protocol version.
    pub minor: U32,
    /// Readahead, bytes.
    pub max_readahead: U32,
    /// What both can do.
    pub flags: U32,
    /// Requests the driver may have under way in the background.
    pub max_background: U16,
    /// From how many of them on it calls itself congested.
    pub congestion_threshold: U16,
    /// Largest WRITE.
    pub max_write: U32,
    /// Granularity of times, nanoseconds.
    pub time_granularity: U32,
    /// Largest request, pages.
    pub max_pages: U16,
    /// For DAX, which is not offered.
    pub map_alignment: U16,
    /// The high 32 flags.
    pub flags2: U32,
    /// Reserved.
    pub unused: [U32; 7],
}

/// struct fuse_read_in: 40 bytes, the body of READ, READDIR and READDIRPLUS.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ReadIn {
    /// Handle of an OPEN; there are none.
    pub fh: U64,
    /// Where to read: bytes of a file, or the `offset` of the last entry seen.
    pub offset: U64,
    /// Bytes asked for.
    pub size: U32,
    /// FUSE_READ_*.
    pub read_flags: U32,
    /// For locks.
    pub lock_owner: U64,
    /// open(2) flags.
    pub flags: U32,
    /// Reserved.
    pub padding: U32,
}

/// struct fuse_getxattr_in and fuse_getxattr_out: 8 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct XattrSize {
    /// Room in the caller's buffer, or 0 to ask for the size; in the answer, the size.
    pub size: U32,
    /// Reserved.
    pub padding: U32,
}

/// struct fuse_forget_one: 16 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ForgetOne {
    /// The inode.
    pub nodeid: U64,
    /// How many lookups are given back.
    pub nlookup: U64,
}

/// struct fuse_dirent: 24 bytes, followed by the name, padded to a multiple of 8.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Dirent {
    /// Inode number that readdir(3) shows.
    pub ino: U64,
    /// Position of the next entry.
    pub offset: U64,
    /// Bytes of the name.
    pub name_length: U32,
    /// DT_*.
    pub kind: U32,
}

/// What comes before each [`Dirent`] of a READDIRPLUS (struct fuse_direntplus) where nothing is told of the entry.
pub const NOTHING_TOLD: [u8; size_of::<EntryOut>()] = [0; size_of::<EntryOut>()];

/// struct fuse_kstatfs: 80 bytes, the answer to STATFS.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Statfs {
    /// Blocks: all, free, free for users.
    pub blocks: [U64; 3],
    /// Inodes: all, free.
    pub files: [U64; 2],
    /// Block size, bytes.
    pub block_size: U32,
    /// Longest name, bytes.
    pub name_length: U32,
    /// Fragment size, bytes.
    pub fragment_size: U32,
    /// Reserved.
    pub padding: U32,
    /// Reserved.
    pub spare: [U32; 6],
}

const _: () = {
    assert!(size_of::<InHeader>() == 40 && size_of::<OutHeader>() == 16);
    assert!(size_of::<Attr>() == 88 && size_of::<EntryOut>() == 128 && size_of::<AttrOut>() == 104);
    assert!(size_of::<InitOut>() == 64 && size_of::<ReadIn>() == 40 && size_of::<Statfs>() == 80);
    assert!(size_of::<Dirent>() == 24);
};
