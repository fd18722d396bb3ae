//! Inodes and their extended attributes.

use std::collections::BTreeMap;

use super::beyond;
use super::superblock::Superblock;
use crate::image::{self, Fields, ImageError, ReadAt};
use crate::tree::{Meta, Timestamp};

/// Inode numbers count in these.
const SLOT_BYTES: u64 = 32;
/// Length of `struct erofs_xattr_ibody_header`.
const XATTR_HEADER_BYTES: usize = 12;
/// Length of the fixed part of an attribute.
const XATTR_ENTRY_BYTES: usize = 4;
/// The bit of an attribute's prefix that says it is one of the image's own.
const LONG_PREFIX: u8 = 0x80;

/// An inode as the image has it.
pub(super) struct Inode {
    /// The type in `st_mode`: its bits above the lowest twelve.
    pub format: u16,
    pub meta: Meta,
    pub size: u64,
    pub data: Data,
    /// Major and minor, of a device.
    pub device: (u32, u32),
}

/// Where a content lies.
#[derive(Debug, Clone, Copy)]
pub(super) enum Data {
    /// In consecutive blocks.
    Blocks { first: u32 },
    /// Likewise, and what does not fill a block at byte `tail` of the image.
    Inline { first: u32, tail: u64 },
    /// In chunks of two to `bits` bytes, whose first blocks are listed at `table`.
    Chunks { bits: u8, table: u64, with_device: bool },
    /// Compressed.
    Compressed,
    /// In a layout that is not known.
    Elsewhere,
}

impl Inode {
    /// Reads inode `number`.
    pub fn read(source: &dyn ReadAt, superblock: &Superblock, number: u64) -> Result<Self, ImageError> {
        const NOT_THERE: ImageError = ImageError::Corrupt("an inode beyond the image's end");
        let at = number.checked_mul(SLOT_BYTES).and_then(|below| superblock.metadata.checked_add(below));
        let at = at.filter(|at| at + SLOT_BYTES <= superblock.length).ok_or(NOT_THERE)?;
        let mut bytes = [0; 64];
        source.read_exact_at(&mut bytes[..32], at).map_err(beyond)?;
        let extended = bytes[0] & 1 == 1;
        if extended {
            source.read_exact_at(&mut bytes, at).map_err(beyond)?;
        }
        let fields = Fields(&bytes);
        let (format, xattr_count, mode) = (fields.u16(0), usize::from(fields.u16(2)), fields.u16(4));
        let (size, uid, gid, mtime) = if extended {
            let mtime = Timestamp { seconds: fields.u64(32).cast_signed(), nanoseconds: fields.u32(40) };
            (fields.u64(8), fields.u32(24), fields.u32(28), mtime)
        } else {
            (fields.u32(8).into(), fields.u16(24).into(), fields.u16(26).into(), superblock.time)
        };
        let header_bytes = if extended { 64 } else { 32 };
        let xattr_bytes = match xattr_count {
            0 => 0,
            count => XATTR_HEADER_BYTES + XATTR_ENTRY_BYTES * (count - 1),
        };
        let mut xattrs = vec![0; xattr_bytes];
        let xattrs_at = at + header_bytes;
        source.read_exact_at(&mut xattrs, xattrs_at).map_err(beyond)?;
        let end = xattrs_at + xattr_bytes as u64;
        let union = fields.u32(16);
        let data = match format >> 1 & 7 {
            0 => Data::Blocks { first: union },
            2 => Data::Inline { first: union, tail: end },
            1 | 3 => Data::Compressed,
            4 => {
                // struct erofs_inode_chunk_info: five bits of chunk size, one bit of how chunks are listed.
                let [low, ..] = union.to_le_bytes();
                let with_device = low & 0x20 != 0;
                let align: u64 = if with_device { 8 } else { 4 };
                let bits = superblock.block_bits + (low & 0x1f);
                Data::Chunks { bits, table: end.next_multiple_of(align), with_device }
            }
            _ => Data::Elsewhere,
        };
        Ok(Self {
            format: mode >> 12,
            meta: Meta {
                mode: mode & 0o7777,
                uid,
                gid,
                mtime,
                xattrs: read_xattrs(source, superblock, &xattrs)?,
            },
            size,
            data,
            device: image::device(union),
        })
    }
}

/// The attributes in `body`, which follows an inode, and those it shares with others.
fn read_xattrs(
    source: &dyn ReadAt,
    superblock: &Superblock,
    body: &[u8],
) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, ImageError> {
    let mut found = BTreeMap::new();
    if body.is_empty() {
        return Ok(found);
    }
    let fields = Fields(body);
    let shared = usize::from(fields.u8(4));
    let mut at = XATTR_HEADER_BYTES + XATTR_ENTRY_BYTES * shared;
    for index in 0..shared.min(body.len()) {
        let id = fields.u32(XATTR_HEADER_BYTES + XATTR_ENTRY_BYTES * index);
        let place = superblock.shared_xattrs.saturating_add(u64::from(id) * 4);
        let mut head = [0; XATTR_ENTRY_BYTES];
        source.read_exact_at(&mut head, place).map_err(beyond)?;
        let mut entry = vec![0; entry_bytes(Fields(&head))];
        source.read_exact_at(&mut entry, place).map_err(beyond)?;
        let (name, value) = parse(&entry)?;
        found.insert(name, value);
    }
    while at < body.len() {
        let rest = &body[at..];
        let (name, value) = parse(rest)?;
        found.insert(name, value);
        at += entry_bytes(Fields(rest)).next_multiple_of(XATTR_ENTRY_BYTES);
    }
    Ok(found)
}

fn entry_bytes(head: Fields<'_>) -> usize {
    XATTR_ENTRY_BYTES + usize::from(head.u8(0)) + usize::from(head.u16(2))
}

fn parse(entry: &[u8]) -> Result<(Vec<u8>, Vec<u8>), ImageError> {
    const CORRUPT: ImageError = ImageError::Corrupt("an impossible extended attribute");
    let fields = Fields(entry);
    let prefix: &[u8] = match fields.u8(1) {
        1 => b"user.",
        2 => b"system.posix_acl_access",
        3 => b"system.posix_acl_default",
        4 => b"trusted.",
        6 => b"security.",
        prefix if prefix & LONG_PREFIX != 0 => {
            return Err(ImageError::Unsupported("attribute prefixes of its own".to_owned()));
        }
        _ => return Err(CORRUPT),
    };
    let name_end = XATTR_ENTRY_BYTES + usize::from(fields.u8(0));
    let name = entry.get(XATTR_ENTRY_BYTES..name_end).ok_or(CORRUPT)?;
    let value = entry.get(name_end..name_end + usize::from(fields.u16(2))).ok_or(CORRUPT)?;
    Ok(([prefix, name].concat(), value.to_vec()))
}
