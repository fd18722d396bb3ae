//! squashfs 4.0 images: reading what is in them, for showing and comparing, and writing ([`write`](write()) says how). The
//! guest's kernel mounts them by itself.
//!
//! Contents with gzip, xz, lz4 and zstd are decompressed; images with lzo or lzma are refused by name. Unlike
//! libraries for the format this reader keeps hard links and extended attributes, without which two roots that
//! differ in a file's capabilities look the same.
//!
//! Source: the kernel's `fs/squashfs/squashfs_fs.h` and `Documentation/filesystems/squashfs.rst`.

mod compression;
mod inode;
mod metadata;
mod superblock;
mod tables;
mod walk;
mod write;

pub use compression::Compression;
pub use superblock::Superblock;
pub use write::{Codec, Options, SquashfsError, Written, write};

use crate::image::{Image, ImageError, Limits, ReadAt};

/// Reads the image whole: names, attributes, and the digest of every content.
///
/// # Errors
/// [`ImageError`].
pub fn read(source: &dyn ReadAt, limits: &Limits) -> Result<Image, ImageError> {
    walk::Walk::new(source, limits)?.run()
}
