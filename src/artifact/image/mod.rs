//! Disk images that others made, read into trees: what squashfs and erofs have in common.
//!
//! An image is hostile until read. Every offset is checked against its length, a folder is entered once, and
//! [`Limits`] bound what reading costs in memory and time. Nothing here mounts anything: the readers are for showing
//! and comparing what a machine's kernel will mount.

mod collect;

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::tree::{PathError, Tree, TreeError, TreePath};

pub(crate) use collect::{Collector, ContentHasher};

/// What an image may hold at most.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Names.
    pub names: u64,
    /// Bytes of paths, link texts and extended attributes together.
    pub text_bytes: u64,
    /// The lengths of all files together, holes included: each is read and hashed.
    pub content_bytes: u64,
}

impl Default for Limits {
    /// Several times the largest distribution images; a hostile image is given up after some minutes at worst.
    fn default() -> Self {
        Self { names: 4_000_000, text_bytes: 512 << 20, content_bytes: 256 << 30 }
    }
}

/// What an image holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Its tree.
    pub tree: Tree,
    /// Regular files whose content this reader cannot decompress. Their digest in `tree` is that of nothing.
    pub unread: BTreeSet<TreePath>,
}

/// Why an image cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file fails.
    #[error("the image cannot be read")]
    Read(#[from] io::Error),
    /// It has no superblock of the format.
    #[error("it is no {format} image: {what}")]
    Superblock {
        /// The format.
        format: &'static str,
        /// What is wrong.
        what: &'static str,
    },
    /// It is shorter than its superblock says.
    #[error("the image is cut off: it has {found} of {expected} bytes")]
    CutOff {
        /// How long it is.
        found: u64,
        /// How long it should be.
        expected: u64,
    },
    /// Something in it is impossible.
    #[error("the image is corrupt: {0}")]
    Corrupt(&'static str),
    /// A node of it is impossible.
    #[error("the image is corrupt at `/{path}`: {what}")]
    CorruptNode {
        /// The node.
        path: TreePath,
        /// What is wrong.
        what: String,
    },
    /// It uses something that this reader does not know.
    #[error("the image uses {0}, which kiln does not read")]
    Unsupported(String),
    /// It holds more than the caller allows.
    #[error("the image holds more than {limit} {what}")]
    Limit {
        /// Of what.
        what: &'static str,
        /// How much is allowed.
        limit: u64,
    },
    /// The whole is not a tree.
    #[error("the image's files are not a well-formed tree")]
    Tree(#[from] TreeError),
}

impl ImageError {
    /// Says at which node something went wrong, where that is not said yet.
    pub(crate) fn at(self, path: &TreePath) -> Self {
        match self {
            Self::Corrupt(what) => Self::CorruptNode { path: path.clone(), what: what.to_owned() },
            other => other,
        }
    }
}

impl From<PathError> for ImageError {
    fn from(_: PathError) -> Self {
        Self::Corrupt("an impossible name")
    }
}

/// Bytes that can be read at any place.
pub trait ReadAt {
    /// Fills `buffer` with what lies at `offset`.
    ///
    /// # Errors
    /// What reading says; `UnexpectedEof` where there is less.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// How many bytes there are.
    ///
    /// # Errors
    /// What asking says.
    fn length(&self) -> io::Result<u64>;
}

impl ReadAt for File {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buffer, offset)
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }
}

impl ReadAt for &[u8] {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let there =
            usize::try_from(offset).ok().and_then(|start| self.get(start..start.checked_add(buffer.len())?));
        buffer.copy_from_slice(there.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }
}

/// Little-endian numbers from a structure that was read whole. Beyond its end they are zero, which no caller reaches:
/// each reads the structure by its length first.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fields<'a>(pub &'a [u8]);

impl Fields<'_> {
    fn array<const N: usize>(self, at: usize) -> [u8; N] {
        self.0.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
    }

    pub fn u8(self, at: usize) -> u8 {
        u8::from_le_bytes(self.array(at))
    }

    pub fn u16(self, at: usize) -> u16 {
        u16::from_le_bytes(self.array(at))
    }

    pub fn u32(self, at: usize) -> u32 {
        u32::from_le_bytes(self.array(at))
    }

    pub fn u64(self, at: usize) -> u64 {
        u64::from_le_bytes(self.array(at))
    }
}

/// A device number as Linux's file systems keep it (`new_encode_dev()`): major and minor.
pub(crate) fn device(number: u32) -> (u32, u32) {
    (number >> 8 & 0xfff, number & 0xff | number >> 12 & 0xf_ff00)
}

/// The inverse of [`device`] (`new_encode_dev()`): twenty bits of minor number round twelve of major.
pub(crate) fn encode_device(major: u32, minor: u32) -> u32 {
    minor & 0xff | (major & 0xfff) << 8 | (minor & !0xff) << 12
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_are_encoded_as_the_kernel_does() {
        for (major, minor, number) in [(1, 3, 0x103), (259, 70_000, 0x1111_0370), (0xfff, 0xf_ffff, u32::MAX)]
        {
            assert_eq!(encode_device(major, minor), number);
            assert_eq!(device(number), (major, minor));
        }
    }
}
