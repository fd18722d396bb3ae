//! Metadata as it is written: a stream cut into blocks of 8 KiB, each compressed by itself; and the tables that are a
//! list of such blocks and a list of where they are.

use super::SquashfsError;
use super::compressor::Compressor;
use crate::squashfs::metadata::{BLOCK_BYTES, STORED};

/// A place in a stream: where its block begins, from the stream's start, and the byte in the block before compression.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Position {
    pub block: u32,
    pub offset: u16,
}

impl Position {
    /// As inodes, the export table and the superblock have it.
    pub fn reference(self) -> u64 {
        u64::from(self.block) << 16 | u64::from(self.offset)
    }
}

/// A stream of metadata on its way.
pub(super) struct Stream {
    /// Finished blocks with their headers.
    blocks: Vec<u8>,
    /// What is not yet in a block; less than one.
    pending: Vec<u8>,
    /// Where each block begins, the next one's included.
    starts: Vec<u32>,
}

impl Stream {
    pub fn new() -> Self {
        Self { blocks: Vec::new(), pending: Vec::with_capacity(BLOCK_BYTES), starts: vec![0] }
    }

    /// Where the next byte goes.
    pub fn position(&self) -> Position {
        let block = self.starts.last().copied().unwrap_or_default();
        // Less than a block is pending.
        Position { block, offset: u16::try_from(self.pending.len()).unwrap_or_default() }
    }

    /// Where the block begins that has the byte `after` bytes behind block `first` and its `offset`. The block must
    /// have been begun.
    pub fn block_at(&self, first: Position, after: usize) -> u32 {
        let index = self.starts.partition_point(|start| *start < first.block);
        let block = index + (usize::from(first.offset) + after) / BLOCK_BYTES;
        self.starts.get(block).copied().unwrap_or_default()
    }

    pub fn write(&mut self, mut bytes: &[u8], compressor: &mut Compressor) -> Result<(), SquashfsError> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(BLOCK_BYTES - self.pending.len()));
            self.pending.extend_from_slice(now);
            bytes = later;
            if self.pending.len() == BLOCK_BYTES {
                self.flush(compressor)?;
            }
        }
        Ok(())
    }

    fn flush(&mut self, compressor: &mut Compressor) -> Result<(), SquashfsError> {
        let (bytes, flag) = match compressor.compress(&self.pending).map_err(SquashfsError::Compress)? {
            Some(smaller) => (smaller, 0),
            None => (&self.pending[..], STORED),
        };
        // At most 8,192.
        let length = u16::try_from(bytes.len()).map_err(|_| SquashfsError::TooLarge)?;
        self.blocks.extend_from_slice(&(length | flag).to_le_bytes());
        self.blocks.extend_from_slice(bytes);
        self.pending.clear();
        self.starts.push(u32::try_from(self.blocks.len()).map_err(|_| SquashfsError::TooLarge)?);
        Ok(())
    }

    /// The blocks, and where each of them begins.
    pub fn finish(mut self, compressor: &mut Compressor) -> Result<(Vec<u8>, Vec<u32>), SquashfsError> {
        if !self.pending.is_empty() {
            self.flush(compressor)?;
        }
        self.starts.pop();
        Ok((self.blocks, self.starts))
    }
}

/// A table of `entries` written at byte `at`: the blocks, then the list of where they are.
pub(super) struct Table {
    /// Blocks and list.
    pub bytes: Vec<u8>,
    /// Where the list begins.
    pub list_at: u64,
}

impl Table {
    /// The table, with `header` between blocks and list.
    pub fn new(
        entries: &[u8],
        header: &[u8],
        at: u64,
        compressor: &mut Compressor,
    ) -> Result<Self, SquashfsError> {
        let mut stream = Stream::new();
        stream.write(entries, compressor)?;
        let (mut bytes, starts) = stream.finish(compressor)?;
        let list_at = at + bytes.len() as u64;
        bytes.extend_from_slice(header);
        for start in starts {
            bytes.extend_from_slice(&(at + u64::from(start)).to_le_bytes());
        }
        Ok(Self { bytes, list_at })
    }
}
