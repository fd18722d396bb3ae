//! One thread's compressor: a block in, a smaller one out or none.

use std::io::{self, Write as _};

use flate2::{FlushCompress, Status};
use lzma_rust2::{CheckType, XzOptions, XzWriter};

use super::{Codec, SquashfsError};
use crate::squashfs::Compression;

/// mksquashfs's defaults, which images need not state.
const GZIP_DEFAULT_LEVEL: u32 = 9;
const ZSTD_DEFAULT_LEVEL: i32 = 15;
/// zlib's largest window, 32 KiB: what the kernel allocates.
const GZIP_WINDOW_BITS: u16 = 15;
/// The version of LZ4 blocks that the kernel reads (`LZ4_LEGACY` of `lz4_wrapper.c`).
const LZ4_VERSION: u32 = 1;
/// xz's smallest dictionary (`LZMA_DICT_SIZE_MIN`), which is also the smallest block.
const XZ_LEAST_DICTIONARY_BYTES: u32 = 8192;

impl Codec {
    /// Checks the level, since libraries would take the nearest one they know.
    pub(super) fn check(self) -> Result<(), SquashfsError> {
        let known = match self {
            Self::Gzip { level } => (1..=9).contains(&level),
            Self::Zstd { level } => (1..=22).contains(&level),
            Self::Xz { level } => level <= 9,
            Self::Lz4 => true,
        };
        if known { Ok(()) } else { Err(SquashfsError::Level(self)) }
    }

    /// Its number in the superblock.
    pub(super) fn id(self) -> u16 {
        match self {
            Self::Gzip { .. } => 1,
            Self::Xz { .. } => 4,
            Self::Lz4 => 5,
            Self::Zstd { .. } => 6,
        }
    }

    /// Which it is, without its level.
    pub fn compression(self) -> Compression {
        match self {
            Self::Gzip { .. } => Compression::Gzip,
            Self::Xz { .. } => Compression::Xz,
            Self::Lz4 => Compression::Lz4,
            Self::Zstd { .. } => Compression::Zstd,
        }
    }

    /// What follows the superblock: empty where a reader may assume the defaults.
    pub(super) fn options(self) -> Vec<u8> {
        match self {
            Self::Gzip { level: GZIP_DEFAULT_LEVEL } | Self::Xz { .. } => Vec::new(),
            Self::Gzip { level } => {
                // No strategy but the default one.
                [&level.to_le_bytes()[..], &GZIP_WINDOW_BITS.to_le_bytes(), &[0; 2]].concat()
            }
            Self::Zstd { level: ZSTD_DEFAULT_LEVEL } => Vec::new(),
            Self::Zstd { level } => level.to_le_bytes().into(),
            Self::Lz4 => [LZ4_VERSION.to_le_bytes(), [0; 4]].concat(),
        }
    }
}

/// A compressor and the room it works in.
pub(super) struct Compressor {
    engine: Engine,
    room: Vec<u8>,
}

enum Engine {
    Gzip(flate2::Compress),
    Zstd(zstd::bulk::Compressor<'static>),
    Lz4,
    Xz(XzOptions),
}

impl Compressor {
    /// A compressor of blocks of at most `block_bytes`, and of metadata.
    pub fn new(codec: Codec, block_bytes: u32) -> io::Result<Self> {
        let engine = match codec {
            Codec::Gzip { level } => {
                Engine::Gzip(flate2::Compress::new(flate2::Compression::new(level), true))
            }
            Codec::Zstd { level } => Engine::Zstd(zstd::bulk::Compressor::new(level)?),
            Codec::Lz4 => Engine::Lz4,
            Codec::Xz { level } => {
                let mut options = XzOptions::with_preset(level);
                // The kernel takes no larger dictionary than a block, and checks CRC-32 (`xz_wrapper.c`).
                options.lzma_options.dict_size = block_bytes.max(XZ_LEAST_DICTIONARY_BYTES);
                options.set_check_sum_type(CheckType::Crc32);
                Engine::Xz(options)
            }
        };
        Ok(Self { engine, room: Vec::new() })
    }

    /// The block compressed; `None` where that is not smaller, and it is to be stored as it is.
    pub fn compress(&mut self, block: &[u8]) -> io::Result<Option<&[u8]>> {
        let length = match &mut self.engine {
            Engine::Gzip(engine) => {
                // No more room than the block has: what does not fit is of no use.
                self.room.resize(block.len(), 0);
                engine.reset();
                match engine.compress(block, &mut self.room, FlushCompress::Finish)? {
                    Status::StreamEnd => usize::try_from(engine.total_out()).unwrap_or(usize::MAX),
                    Status::Ok | Status::BufError => usize::MAX,
                }
            }
            Engine::Zstd(engine) => {
                self.room.resize(zstd::zstd_safe::compress_bound(block.len()), 0);
                engine.compress_to_buffer(block, &mut self.room[..])?
            }
            Engine::Lz4 => {
                self.room.resize(lz4_flex::block::get_maximum_output_size(block.len()), 0);
                lz4_flex::block::compress_into(block, &mut self.room).map_err(io::Error::other)?
            }
            Engine::Xz(options) => {
                self.room.clear();
                let mut writer = XzWriter::new(&mut self.room, options.clone())?;
                writer.write_all(block)?;
                writer.finish()?.len()
            }
        };
        Ok(if length < block.len() { self.room.get(..length) } else { None })
    }
}
