//! Blocks and how they are compressed. A block's length is known before, so no stream can ask for more memory.

use std::fmt;
use std::io::{self, Read};

use lzma_rust2::{Action, Status, XzStream};

use crate::image::ImageError;

/// How an image's blocks are compressed, by its number in the superblock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// zlib streams.
    Gzip,
    /// lzma streams, which Linux never learnt to read in squashfs.
    Lzma,
    /// LZO1X blocks.
    Lzo,
    /// xz streams.
    Xz,
    /// LZ4 blocks.
    Lz4,
    /// zstd frames.
    Zstd,
}

/// Most memory for an xz decoder, KiB. The dictionary of a block need be no larger than the block, 1 MiB; mksquashfs
/// allows no more.
const XZ_MEMORY_KIB: u32 = 16 << 10;

impl Compression {
    pub(super) fn from_id(id: u16) -> Option<Self> {
        let all = [Self::Gzip, Self::Lzma, Self::Lzo, Self::Xz, Self::Lz4, Self::Zstd];
        all.get(usize::from(id).checked_sub(1)?).copied()
    }

    /// Decompresses `block` into `into`, and returns how many bytes that gave.
    pub(super) fn decompress(self, block: &[u8], into: &mut [u8]) -> Result<usize, ImageError> {
        let corrupt = |_| ImageError::Corrupt("a block that does not decompress");
        match self {
            Self::Gzip => read_into(flate2::bufread::ZlibDecoder::new(block), into).map_err(corrupt),
            Self::Xz => xz(block, into).map_err(corrupt),
            Self::Lz4 => lz4_flex::block::decompress_into(block, into)
                .map_err(|_| ImageError::Corrupt("a block that does not decompress")),
            Self::Zstd => zstd::bulk::decompress_to_buffer(block, into).map_err(corrupt),
            Self::Lzma | Self::Lzo => Err(ImageError::Unsupported(format!("{self} compression"))),
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gzip => "gzip",
            Self::Lzma => "lzma",
            Self::Lzo => "lzo",
            Self::Xz => "xz",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        })
    }
}

/// All that `reader` gives, which must fit.
fn read_into(mut reader: impl Read, into: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < into.len() {
        match reader.read(&mut into[filled..])? {
            0 => return Ok(filled),
            count => filled += count,
        }
    }
    // One byte more would be one too many; and a zlib stream's check sum is held against it only at its end.
    if reader.read(&mut [0])? == 0 { Ok(filled) } else { Err(io::ErrorKind::InvalidData.into()) }
}

fn xz(mut block: &[u8], into: &mut [u8]) -> io::Result<usize> {
    let mut decoder = XzStream::new_mem_limit(false, XZ_MEMORY_KIB);
    let mut filled = 0;
    // Room for one byte too many, so that a stream which has it is seen to.
    let mut beyond = [0; 1];
    loop {
        let room = if filled < into.len() { &mut into[filled..] } else { &mut beyond[..] };
        let done = decoder.process(block, room, Action::Finish)?;
        filled += done.bytes_produced;
        if filled > into.len() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        if done.status == Status::StreamEnd {
            return Ok(filled);
        }
        if done.bytes_consumed == 0 && done.bytes_produced == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        block = &block[done.bytes_consumed..];
    }
}
