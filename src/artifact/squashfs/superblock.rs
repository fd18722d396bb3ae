//! The superblock: where the tables lie, and how blocks are compressed.

use super::compression::Compression;
use crate::image::{Fields, ImageError, ReadAt};

/// `hsqs`, the first bytes of every image.
pub(super) const MAGIC: &[u8; 4] = b"hsqs";
/// Length of `struct squashfs_super_block`.
pub(super) const BYTES: usize = 96;
/// What stands for a table that is not there.
pub(super) const NONE: u64 = u64::MAX;

/// What an image says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// How its blocks are compressed.
    pub compression: Compression,
    /// The length of the image without padding.
    pub bytes_used: u64,
    /// Length of a content's blocks: a power of two from 4 KiB to 1 MiB.
    pub(super) block_bytes: u32,
    pub(super) fragments: u32,
    pub(super) ids: u16,
    pub(super) root: u64,
    pub(super) id_table: u64,
    pub(super) xattr_table: u64,
    pub(super) inode_table: u64,
    pub(super) directory_table: u64,
    pub(super) fragment_table: u64,
}

impl Superblock {
    /// Reads the superblock, and checks what it says against the length of `source`.
    ///
    /// # Errors
    /// [`ImageError`]: no superblock, another version, an image that is cut off.
    pub fn read(source: &dyn ReadAt) -> Result<Self, ImageError> {
        let bad = |what| ImageError::Superblock { format: "squashfs", what };
        let found = source.length()?;
        if found < BYTES as u64 {
            return Err(bad("it is too short for a superblock"));
        }
        let mut bytes = [0; BYTES];
        source.read_exact_at(&mut bytes, 0)?;
        let fields = Fields(&bytes);
        if !bytes.starts_with(MAGIC) {
            return Err(bad("it does not begin with `hsqs`"));
        }
        if (fields.u16(28), fields.u16(30)) != (4, 0) {
            return Err(bad("its version is not 4.0"));
        }
        let compression = Compression::from_id(fields.u16(20)).ok_or(bad("its compression is unknown"))?;
        let block_bytes = fields.u32(12);
        let log = fields.u16(22);
        if !(12..=20).contains(&log) || block_bytes != 1 << log {
            return Err(bad("its block size is impossible"));
        }
        let superblock = Self {
            compression,
            bytes_used: fields.u64(40),
            block_bytes,
            fragments: fields.u32(16),
            ids: fields.u16(26),
            root: fields.u64(32),
            id_table: fields.u64(48),
            xattr_table: fields.u64(56),
            inode_table: fields.u64(64),
            directory_table: fields.u64(72),
            fragment_table: fields.u64(80),
        };
        if superblock.bytes_used > found {
            return Err(ImageError::CutOff { found, expected: superblock.bytes_used });
        }
        Ok(superblock)
    }
}
