//! Metadata blocks: inodes, folders and tables lie in blocks of 8 KiB, each compressed by itself, and what is read
//! from them may run over from one into the next.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::superblock::Superblock;
use crate::image::{ImageError, ReadAt};

/// The length of a metadata block before compression.
pub(super) const BLOCK_BYTES: usize = 8192;
/// The bit of a block's length that says it is stored as it is.
pub(super) const STORED: u16 = 1 << 15;
/// Blocks that are kept, 16 MiB of them.
const KEPT: usize = 2048;

/// The metadata of one image.
pub(super) struct Metadata<'a> {
    pub source: &'a dyn ReadAt,
    pub superblock: Superblock,
    blocks: BTreeMap<u64, Block>,
}

#[derive(Clone)]
struct Block {
    bytes: Rc<[u8]>,
    /// Where the block after it begins.
    next: u64,
}

impl<'a> Metadata<'a> {
    pub fn new(source: &'a dyn ReadAt, superblock: Superblock) -> Self {
        Self { source, superblock, blocks: BTreeMap::new() }
    }

    /// Checks that `length` bytes at `at` are within the image, and reads them.
    pub fn raw(&self, at: u64, length: usize) -> Result<Vec<u8>, ImageError> {
        let end = at.checked_add(length as u64).filter(|end| *end <= self.superblock.bytes_used);
        if end.is_none() {
            return Err(ImageError::Corrupt("something lies beyond the image's end"));
        }
        let mut bytes = vec![0; length];
        self.source.read_exact_at(&mut bytes, at)?;
        Ok(bytes)
    }

    fn block(&mut self, at: u64) -> Result<Block, ImageError> {
        if let Some(block) = self.blocks.get(&at) {
            return Ok(block.clone());
        }
        let header = self.raw(at, 2)?;
        let header = u16::from_le_bytes([header[0], header[1]]);
        let length = usize::from(header & !STORED);
        if length == 0 || length > BLOCK_BYTES {
            return Err(ImageError::Corrupt("a metadata block of impossible length"));
        }
        let stored = self.raw(at + 2, length)?;
        let bytes = if header & STORED != 0 {
            stored
        } else {
            let mut bytes = vec![0; BLOCK_BYTES];
            let filled = self.superblock.compression.decompress(&stored, &mut bytes)?;
            bytes.truncate(filled);
            bytes
        };
        let block = Block { bytes: bytes.into(), next: at + 2 + length as u64 };
        if self.blocks.len() == KEPT {
            self.blocks.clear();
        }
        self.blocks.insert(at, block.clone());
        Ok(block)
    }

    /// What begins at byte `offset` of the block at `at`.
    pub fn cursor(&mut self, at: u64, offset: u16) -> Cursor<'_, 'a> {
        Cursor { metadata: self, at, offset: usize::from(offset) }
    }

    /// The position that a reference of 48 bits and 16 bits says, in the table at `table`.
    pub fn position(table: u64, reference: u64) -> Result<(u64, u16), ImageError> {
        let at = table.checked_add(reference >> 16).ok_or(ImageError::Corrupt("an impossible reference"))?;
        let [low, high, ..] = reference.to_le_bytes();
        Ok((at, u16::from_le_bytes([low, high])))
    }
}

/// A place in the metadata that moves on as it is read.
pub(super) struct Cursor<'m, 'a> {
    metadata: &'m mut Metadata<'a>,
    at: u64,
    offset: usize,
}

impl Cursor<'_, '_> {
    /// Fills `buffer`, from as many blocks as that takes.
    pub fn read(&mut self, buffer: &mut [u8]) -> Result<(), ImageError> {
        let mut filled = 0;
        while filled < buffer.len() {
            let block = self.metadata.block(self.at)?;
            let rest = block.bytes.get(self.offset..).unwrap_or_default();
            if rest.is_empty() {
                if block.bytes.is_empty() || self.offset > block.bytes.len() {
                    return Err(ImageError::Corrupt("a reference into the middle of nothing"));
                }
                (self.at, self.offset) = (block.next, 0);
                continue;
            }
            let count = rest.len().min(buffer.len() - filled);
            buffer[filled..filled + count].copy_from_slice(&rest[..count]);
            filled += count;
            self.offset += count;
        }
        Ok(())
    }

    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], ImageError> {
        let mut bytes = [0; N];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    pub fn u16(&mut self) -> Result<u16, ImageError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub fn u32(&mut self) -> Result<u32, ImageError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub fn u64(&mut self) -> Result<u64, ImageError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// `length` bytes, of which the caller knows that they are few.
    pub fn bytes(&mut self, length: usize) -> Result<Vec<u8>, ImageError> {
        let mut bytes = vec![0; length];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    /// Where it is, for another cursor to go on from there.
    pub fn place(&self) -> (u64, u16) {
        // At most the length of a block.
        (self.at, u16::try_from(self.offset).unwrap_or(u16::MAX))
    }
}
