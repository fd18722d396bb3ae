//! A share: a host directory under a name, and what its files show.

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use super::abi;
use super::record::{Fingerprint, Kind};

/// What the files of a share show besides type, permissions, size, link text and extended attributes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Attributes {
    /// The same for every host and user: owner 0:0, all times as given, one link, an inode number made of the
    /// path, a directory's size 4,096 bytes (on the host it depends on what was in it before).
    Fixed {
        /// Modification, change and access time of everything, seconds since 1970.
        mtime_seconds: u64,
    },
    /// What the host has.
    Real,
}

/// A host directory to be shown read-only.
#[derive(Debug)]
pub struct Share {
    /// The directory. O_PATH is enough.
    pub directory: OwnedFd,
    /// What its files show.
    pub attributes: Attributes,
}

/// Longest name of a share or file, bytes (NAME_MAX).
pub const NAME_BYTES: usize = 255;

/// Whether a share may be called so: one path component that is neither `.` nor `..`.
pub fn is_name(name: &[u8]) -> bool {
    !matches!(name, b"" | b"." | b"..")
        && name.len() <= NAME_BYTES
        && !name.iter().any(|byte| matches!(byte, 0 | b'/'))
}

/// What only a share with real attributes shows, and the number of a device node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Extra {
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Hard links.
    pub nlink: u32,
    /// Device number, as the FUSE protocol has it.
    pub rdev: u32,
    /// Blocks of 512 bytes.
    pub blocks: u64,
    /// Access time, seconds and nanoseconds since 1970.
    pub atime: (u64, u32),
}

impl Extra {
    /// What a stat says.
    pub fn of(stat: &rustix::fs::Stat) -> Self {
        let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
        Self {
            uid: stat.st_uid,
            gid: stat.st_gid,
            nlink: u32::try_from(stat.st_nlink).unwrap_or(u32::MAX),
            // new_encode_dev() of Linux.
            rdev: minor & 0xff | (major & 0xfff) << 8 | (minor & 0xfff00) << 12,
            blocks: u64::try_from(stat.st_blocks).unwrap_or(0),
            atime: (stat.st_atime.cast_unsigned(), u32::try_from(stat.st_atime_nsec).unwrap_or(0)),
        }
    }

    /// Major and minor number of a device node: new_decode_dev() of Linux.
    pub fn device_number(&self) -> (u32, u32) {
        (self.rdev >> 8 & 0xfff, self.rdev & 0xff | self.rdev >> 12 & 0xf_ff00)
    }
}

impl Attributes {
    /// The attributes of a file as the driver is told them. `inode` is made of the path for [`Self::Fixed`].
    pub fn show(self, inode: u64, seen: &Fingerprint, kind: Kind, extra: Extra) -> abi::Attr {
        let shown = match self {
            Self::Fixed { mtime_seconds } => {
                let size_bytes = if kind == Kind::Directory { 4096 } else { seen.size_bytes };
                abi::Attr {
                    size: size_bytes.into(),
                    blocks: size_bytes.div_ceil(512).into(),
                    atime: mtime_seconds.into(),
                    mtime: mtime_seconds.into(),
                    ctime: mtime_seconds.into(),
                    nlink: 1.into(),
                    ..Default::default()
                }
            }
            Self::Real => {
                let (mtime, mtime_nanos) = split(seen.mtime_nanos);
                let (ctime, ctime_nanos) = split(seen.ctime_nanos);
                abi::Attr {
                    size: seen.size_bytes.into(),
                    blocks: extra.blocks.into(),
                    atime: extra.atime.0.into(),
                    mtime: mtime.into(),
                    ctime: ctime.into(),
                    atime_nanos: extra.atime.1.into(),
                    mtime_nanos: mtime_nanos.into(),
                    ctime_nanos: ctime_nanos.into(),
                    nlink: extra.nlink.into(),
                    uid: extra.uid.into(),
                    gid: extra.gid.into(),
                    ..Default::default()
                }
            }
        };
        abi::Attr {
            ino: inode.into(),
            mode: seen.mode.into(),
            rdev: extra.rdev.into(),
            block_size: 4096.into(),
            ..shown
        }
    }
}

fn split(nanos: i64) -> (u64, u32) {
    let seconds = nanos.div_euclid(1_000_000_000).cast_unsigned();
    (seconds, u32::try_from(nanos.rem_euclid(1_000_000_000)).unwrap_or(0))
}

/// Inode numbers made of share name and path: the first 63 bits of a SHA-256, so the same on every host.
#[derive(Debug, Clone)]
pub struct InodeNames(kiln_digest::Hasher);

impl InodeNames {
    /// Numbers for what is in the directory `path` of `share`; for the share's directory itself, see
    /// [`InodeNames::own`].
    pub fn within(share: &[u8], path: &[u8]) -> Self {
        let mut hasher = kiln_digest::Hasher::default();
        hasher.update(share);
        hasher.update(b"/");
        if !path.is_empty() {
            hasher.update(path);
            hasher.update(b"/");
        }
        Self(hasher)
    }

    /// The number of the file `name`.
    pub fn number(&self, name: &[u8]) -> u64 {
        let mut hasher = self.0.clone();
        hasher.update(name);
        let (digest, _) = hasher.finish();
        let first = digest.as_bytes().first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes));
        // 0 and 1 mean something to programs.
        (first >> 1).max(2)
    }
}
