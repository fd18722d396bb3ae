//! squashfs 4.0 images, byte-reproducible and packed on all cores: what recoveries, modules and firmware ship as.
//!
//! A function of the tree and the [`Options`] alone; the number of threads does not show. Contents are read, hashed
//! and cut into blocks on the caller's thread in path order, and compressed on the others. Files of equal content are
//! one, known by their digests before a byte is read. Memory is proportional to the number of nodes and blocks.
//! Leaving out nodes is the tree's part ([`Tree::retain`]).
//!
//! The format has whole seconds, from 1970 to 2106: nanoseconds are dropped, other times are an error.
//! `Documentation/filesystems/squashfs.rst` and `fs/squashfs/squashfs_fs.h` are the source; the tables lie in the order
//! of mksquashfs, since the kernel checks that each ends where the next begins (`squashfs_fill_super()`).

mod compressor;
mod data;
mod directory;
mod inode;
mod metadata;
mod nodes;
mod owners;
mod pool;
#[cfg(test)]
mod tests;

use std::io::{self, Seek, SeekFrom, Write};
use std::num::NonZero;
use std::thread;

use self::compressor::Compressor;
use self::data::Data;
use self::metadata::{Position, Table};
use self::nodes::Nodes;
use self::pool::Pool;
use super::superblock::{BYTES as SUPERBLOCK_BYTES, MAGIC, NONE};
use crate::content::ContentError;
use crate::tree::{Contents, Entries, Tree, TreeError, TreePath};

/// What an image's length is a multiple of, so that it can be a disk.
const PADDING_BYTES: u64 = 4096;
/// Bits of the superblock (`squashfs_fs.h`).
const NO_FRAGMENTS: u16 = 1 << 4;
const ALWAYS_FRAGMENTS: u16 = 1 << 5;
const DUPLICATES: u16 = 1 << 6;
const EXPORTABLE: u16 = 1 << 7;
const NO_XATTRS: u16 = 1 << 9;
const COMPRESSOR_OPTIONS: u16 = 1 << 10;

/// How blocks are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// zlib.
    Gzip {
        /// 1 to 9.
        level: u32,
    },
    /// zstd.
    Zstd {
        /// 1 to 22.
        level: i32,
    },
    /// LZ4, the quick kind.
    Lz4,
    /// xz, without filters.
    Xz {
        /// liblzma's preset, 0 to 9; the dictionary is as long as a block.
        level: u32,
    },
}

/// What may vary.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// How blocks are compressed.
    pub codec: Codec,
    /// Length of a block: a power of two from 4 KiB to 1 MiB.
    pub block_bytes: u32,
    /// When the image was made, in seconds since 1970.
    pub mkfs_time: u32,
    /// Gather the ends of files longer than a block as well: smaller, and an end is read with those of others.
    pub tail_ends: bool,
    /// Leave out extended attributes, instead of failing at those that the format has no place for.
    pub drop_xattrs: bool,
    /// How many threads compress; as many as there are processors unless said.
    pub threads: Option<NonZero<usize>>,
}

impl Default for Options {
    /// What mksquashfs does unless told: gzip 9, 128 KiB; made in 1970.
    fn default() -> Self {
        Self {
            codec: Codec::Gzip { level: 9 },
            block_bytes: 128 << 10,
            mkfs_time: 0,
            tail_ends: false,
            drop_xattrs: false,
            threads: None,
        }
    }
}

/// Why an image could not be written.
#[derive(Debug, thiserror::Error)]
pub enum SquashfsError {
    /// The tree is not well formed.
    #[error("the tree for a squashfs image is not well formed")]
    Tree(#[from] TreeError),
    /// Content that is missing or not what the tree says, or a failing output.
    #[error(transparent)]
    Content(#[from] ContentError),
    /// A block size that the format does not have.
    #[error("squashfs has no blocks of {0} bytes")]
    BlockSize(u32),
    /// A level that the compressor does not have.
    #[error("there is no such compression: {0:?}")]
    Level(Codec),
    /// Something that the format has no place for.
    #[error("squashfs cannot hold the {what} of `{path}`")]
    Unrepresentable {
        /// The node.
        path: TreePath,
        /// Which part of it.
        what: &'static str,
    },
    /// The node whose owner or group is the 65,536th number.
    #[error("squashfs holds at most 65,535 user and group numbers, and `{0}` has one more")]
    TooManyOwners(TreePath),
    /// More than 2^32 of something, or 4 GiB of metadata.
    #[error("a squashfs image of this tree would have larger tables than the format allows")]
    TooLarge,
    /// A compressor fails, which is one that is out of memory.
    #[error("a block could not be compressed")]
    Compress(#[source] io::Error),
    /// The host gives not one thread.
    #[error("the host gives no thread that compresses")]
    Thread(#[source] io::Error),
}

impl SquashfsError {
    /// What the user can do.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::BlockSize(_) => Some("a block is a power of two from 4096 to 1048576 bytes"),
            Self::Level(_) => Some("gzip has levels 1 to 9, zstd 1 to 22, xz 0 to 9"),
            Self::Unrepresentable { .. } | Self::TooManyOwners(_) => {
                Some("erofs holds it, or change the tree before it is packed")
            }
            Self::Tree(_) | Self::Content(_) | Self::TooLarge | Self::Compress(_) => None,
            Self::Thread(_) => Some("raise the limit of processes (`ulimit -u`)"),
        }
    }
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// The image's length; a multiple of 4,096.
    pub bytes: u64,
    /// How many inodes it has: nodes of the tree without hard links.
    pub inodes: u32,
}

/// Writes the image of `tree` to `out`, which is empty and positioned at its start.
///
/// # Errors
/// [`SquashfsError`]; `out` then holds a part of the image, without a superblock.
pub fn write(
    tree: &Tree,
    contents: &dyn Contents,
    mut out: impl Write + Seek,
    options: &Options,
) -> Result<Written, SquashfsError> {
    let Options { codec, block_bytes, .. } = *options;
    codec.check()?;
    if !block_bytes.is_power_of_two() || !(4 << 10..=1 << 20).contains(&block_bytes) {
        return Err(SquashfsError::BlockSize(block_bytes));
    }
    tree.check()?;
    let entries = Entries::new(tree);
    let mut compressor = Compressor::new(codec, block_bytes).map_err(SquashfsError::Compress)?;

    // The superblock comes last: an image that was not finished is none.
    let mut head = vec![0; SUPERBLOCK_BYTES];
    let codec_options = codec.options();
    if let Ok(length) = u16::try_from(codec_options.len())
        && length > 0
    {
        head.extend_from_slice(&(length | super::metadata::STORED).to_le_bytes());
        head.extend_from_slice(&codec_options);
    }
    let put = |out: &mut dyn Write, bytes: &[u8]| out.write_all(bytes).map_err(ContentError::Write);
    put(&mut out, &head)?;

    let threads =
        options.threads.or_else(|| thread::available_parallelism().ok()).unwrap_or(NonZero::<usize>::MIN);
    let (sender, queue) = pool::queue();
    let (data, pool) = thread::scope(|scope| {
        let at = head.len() as u64;
        let mut pool = Pool::start(scope, (sender, &queue), threads, (codec, block_bytes), at)?;
        let data = Data::write(&entries, contents, options, &mut pool, &mut out)?;
        Ok::<_, SquashfsError>((data, pool.retire()))
    })?;

    let nodes = Nodes::write(&entries, options, (&data, &pool), &mut compressor)?;
    let mut superblock = Superblock {
        options,
        inodes: nodes.count,
        fragments: u32::try_from(data.fragments.len()).map_err(|_| SquashfsError::TooLarge)?,
        has_codec_options: !codec_options.is_empty(),
        owners: nodes.owners.count(),
        root: nodes.root,
        bytes_used: 0,
        owner_table: NONE,
        xattr_table: NONE,
        inode_table: pool.at,
        directory_table: NONE,
        fragment_table: NONE,
        export_table: NONE,
    };
    let (inodes, _) = nodes.inodes.finish(&mut compressor)?;
    let (folders, _) = nodes.folders.finish(&mut compressor)?;
    superblock.directory_table = superblock.inode_table + inodes.len() as u64;
    let mut at = superblock.directory_table + folders.len() as u64;
    put(&mut out, &inodes)?;
    put(&mut out, &folders)?;

    let mut put_table = |entries: &[u8], at: &mut u64| {
        let table = Table::new(entries, &[], *at, &mut compressor)?;
        *at += table.bytes.len() as u64;
        put(&mut out, &table.bytes)?;
        Ok::<u64, SquashfsError>(table.list_at)
    };
    if !data.fragments.is_empty() {
        superblock.fragment_table = put_table(&data.fragment_table(&pool), &mut at)?;
    }
    superblock.export_table = put_table(&nodes.exports, &mut at)?;
    superblock.owner_table = put_table(nodes.owners.entries(), &mut at)?;
    if let Some(table) = nodes.xattrs.finish(at, &mut compressor)? {
        put(&mut out, &table.bytes)?;
        superblock.xattr_table = table.list_at;
        at += table.bytes.len() as u64;
    }
    superblock.bytes_used = at;
    let bytes = at.next_multiple_of(PADDING_BYTES);
    let padding = usize::try_from(bytes - at).map_err(|_| SquashfsError::TooLarge)?;
    put(&mut out, &vec![0; padding])?;
    out.seek(SeekFrom::Start(0)).map_err(ContentError::Write)?;
    put(&mut out, &superblock.bytes())?;
    out.flush().map_err(ContentError::Write)?;
    Ok(Written { bytes, inodes: superblock.inodes })
}

/// `struct squashfs_super_block`, to be written.
struct Superblock<'a> {
    options: &'a Options,
    inodes: u32,
    fragments: u32,
    has_codec_options: bool,
    owners: u16,
    root: Position,
    bytes_used: u64,
    owner_table: u64,
    xattr_table: u64,
    inode_table: u64,
    directory_table: u64,
    fragment_table: u64,
    export_table: u64,
}

impl Superblock<'_> {
    fn bytes(&self) -> Vec<u8> {
        let Options { codec, block_bytes, mkfs_time, tail_ends, .. } = *self.options;
        let mut flags = EXPORTABLE | DUPLICATES;
        for (is_set, flag) in [
            (self.fragments == 0, NO_FRAGMENTS),
            (tail_ends, ALWAYS_FRAGMENTS),
            (self.xattr_table == NONE, NO_XATTRS),
            (self.has_codec_options, COMPRESSOR_OPTIONS),
        ] {
            flags |= if is_set { flag } else { 0 };
        }
        // A power of two of at most twenty bits.
        let block_log = u16::try_from(block_bytes.ilog2()).unwrap_or_default();
        let mut bytes = MAGIC.to_vec();
        for number in [self.inodes, mkfs_time, block_bytes, self.fragments] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        // Version 4.0 comes last.
        for number in [codec.id(), block_log, flags, self.owners, 4, 0] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        for number in [
            self.root.reference(),
            self.bytes_used,
            self.owner_table,
            self.xattr_table,
            self.inode_table,
            self.directory_table,
            self.fragment_table,
            self.export_table,
        ] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes
    }
}
