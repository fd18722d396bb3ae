//! The file an image is written to: metadata and data at their places, blocks of zeros left as holes.

use std::io::{self, Seek, SeekFrom, Write};

use super::format::BLOCK_BYTES;

/// Writes are gathered up to this much.
const RUN_BYTES: usize = 1 << 20;

/// Consecutive bytes that are not written yet.
#[derive(Default)]
struct Run {
    at: u64,
    bytes: Vec<u8>,
}

/// An output in which metadata and data are each written mostly forwards.
pub(super) struct Image<W> {
    out: W,
    position: u64,
    end: u64,
    metadata: Run,
    data: Run,
}

impl<W: Write + Seek> Image<W> {
    /// Takes `out`, which is empty.
    pub(super) fn new(out: W) -> Self {
        Self { out, position: 0, end: 0, metadata: Run::default(), data: Run::default() }
    }

    /// Writes whole metadata blocks at a byte offset.
    pub(super) fn write_metadata(&mut self, at: u64, blocks: &[u8]) -> io::Result<()> {
        if at != self.metadata.at + self.metadata.bytes.len() as u64 || self.metadata.bytes.len() >= RUN_BYTES
        {
            self.flush_metadata()?;
            self.metadata.at = at;
        }
        self.metadata.bytes.extend_from_slice(blocks);
        Ok(())
    }

    /// Writes a piece of content that begins at a block's start; what does not fill its last block is filled
    /// with zeros.
    pub(super) fn write_data(&mut self, at: u64, piece: &[u8]) -> io::Result<()> {
        const ZEROS: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];
        for (index, block) in piece.chunks(BLOCK_BYTES).enumerate() {
            if *block == ZEROS[..block.len()] {
                continue;
            }
            let at = at + (index * BLOCK_BYTES) as u64;
            if at != self.data.at + self.data.bytes.len() as u64 || self.data.bytes.len() >= RUN_BYTES {
                self.flush_data()?;
                self.data.at = at;
            }
            self.data.bytes.extend_from_slice(block);
            self.data.bytes.extend_from_slice(&ZEROS[block.len()..]);
        }
        Ok(())
    }

    /// Writes what is left, and makes the output `length` bytes long; that is a multiple of the block size.
    pub(super) fn finish(mut self, length: u64) -> io::Result<W> {
        self.flush_metadata()?;
        self.flush_data()?;
        if self.end < length {
            // The last block is a hole, which no file can end with.
            self.write(length - BLOCK_BYTES as u64, &[0; BLOCK_BYTES])?;
        }
        self.out.flush()?;
        Ok(self.out)
    }

    fn flush_metadata(&mut self) -> io::Result<()> {
        let run = std::mem::take(&mut self.metadata);
        self.write(run.at, &run.bytes)
    }

    fn flush_data(&mut self) -> io::Result<()> {
        let mut run = std::mem::take(&mut self.data);
        self.write(run.at, &run.bytes)?;
        // Its room is used again.
        run.bytes.clear();
        self.data = run;
        Ok(())
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        if self.position != at {
            self.out.seek(SeekFrom::Start(at))?;
        }
        self.out.write_all(bytes)?;
        self.position = at + bytes.len() as u64;
        self.end = self.end.max(self.position);
        Ok(())
    }
}
