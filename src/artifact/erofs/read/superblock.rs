//! The superblock, as far as a reader needs it.

use crate::image::{Fields, ImageError, ReadAt};
use crate::tree::Timestamp;

/// Where it lies.
const AT: u64 = 1024;
/// Length of `struct erofs_super_block`.
const BYTES: usize = 128;
const MAGIC: u32 = 0xe0f5_e1e2;
/// EROFS_FEATURE_INCOMPAT_*: what changes where things lie. The bits before are about compressed contents and about
/// other devices, which the inodes themselves tell.
const KNOWN_FEATURES: u32 = 0x7f;

/// What an image says of itself.
#[derive(Debug, Clone)]
pub struct Superblock {
    /// The length of the image's file.
    pub length: u64,
    /// The length of a block is two to this.
    pub block_bits: u8,
    pub(super) root: u64,
    pub(super) metadata: u64,
    pub(super) shared_xattrs: u64,
    pub(super) time: Timestamp,
    incompatible: u32,
    other_devices: u16,
}

impl Superblock {
    /// Reads the superblock, and checks what it says against the length of `source`.
    ///
    /// # Errors
    /// [`ImageError`]: no superblock, an image that is cut off.
    pub fn read(source: &dyn ReadAt) -> Result<Self, ImageError> {
        let bad = |what| ImageError::Superblock { format: "erofs", what };
        let length = source.length()?;
        if length < AT + BYTES as u64 {
            return Err(bad("it is too short for a superblock"));
        }
        let mut bytes = [0; BYTES];
        source.read_exact_at(&mut bytes, AT)?;
        let fields = Fields(&bytes);
        if fields.u32(0) != MAGIC {
            return Err(bad("there is no magic number at byte 1,024"));
        }
        let block_bits = fields.u8(12);
        // 512 bytes to 64 KiB, the largest page of any Linux.
        if !(9..=16).contains(&block_bits) {
            return Err(bad("its block size is impossible"));
        }
        let expected = u64::from(fields.u32(36)) << block_bits;
        if expected > length {
            return Err(ImageError::CutOff { found: length, expected });
        }
        let seconds = fields.u64(24);
        Ok(Self {
            length,
            block_bits,
            root: fields.u16(14).into(),
            metadata: u64::from(fields.u32(40)) << block_bits,
            shared_xattrs: u64::from(fields.u32(44)) << block_bits,
            time: Timestamp { seconds: seconds.cast_signed(), nanoseconds: fields.u32(32) },
            incompatible: fields.u32(80),
            other_devices: fields.u16(86),
        })
    }

    /// A feature of the image that this reader cannot make sense of, in words.
    pub(super) fn unknown_feature(&self) -> Option<String> {
        let unknown = self.incompatible & !KNOWN_FEATURES;
        if self.other_devices > 0 {
            return Some("erofs data on other devices".to_owned());
        }
        (unknown != 0).then(|| format!("erofs features {unknown:#x}"))
    }

    pub(super) fn block_bytes(&self) -> u64 {
        1 << self.block_bits
    }
}
