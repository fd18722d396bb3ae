//! The tables beside inodes and folders: owners, fragments, extended attributes. Each is a list of metadata blocks
//! found through a list of their positions.

use std::collections::BTreeMap;

use super::metadata::{BLOCK_BYTES, Metadata};
use super::superblock::NONE;
use crate::image::{Fields, ImageError};

/// Where an inode's attributes are not.
pub(super) const NO_XATTRS: u32 = u32::MAX;
/// Entries of an attribute list, beyond which it is no list that Linux made (XATTR_LIST_MAX / 2).
const MOST_XATTRS: u32 = 32 << 10;
/// XATTR_SIZE_MAX.
const MOST_VALUE_BYTES: u32 = 64 << 10;
/// The bit of an attribute's type that says its value is elsewhere.
const ELSEWHERE: u16 = 0x100;

/// Position of entry `index`, of `entry_bytes` each, of the table whose list of blocks begins at `list`.
fn locate(
    metadata: &Metadata<'_>,
    list: u64,
    index: u32,
    entry_bytes: usize,
) -> Result<(u64, u16), ImageError> {
    let per_block = BLOCK_BYTES / entry_bytes;
    let index = usize::try_from(index).unwrap_or(usize::MAX);
    let pointer = (index / per_block * 8) as u64;
    let at = list.checked_add(pointer).ok_or(ImageError::Corrupt("an impossible table"))?;
    let bytes = metadata.raw(at, 8)?;
    let offset = index % per_block * entry_bytes;
    Ok((Fields(&bytes).u64(0), u16::try_from(offset).unwrap_or_default()))
}

/// All user and group numbers.
pub(super) fn ids(metadata: &mut Metadata<'_>) -> Result<Vec<u32>, ImageError> {
    let (table, count) = (metadata.superblock.id_table, metadata.superblock.ids);
    (0..count.into())
        .map(|index| {
            let (at, offset) = locate(metadata, table, index, 4)?;
            metadata.cursor(at, offset).u32()
        })
        .collect()
}

/// Where a block of the ends of several files lies, and its length with the bit that says whether it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fragment {
    pub at: u64,
    pub size: u32,
}

/// The fragment block `index`.
pub(super) fn fragment(metadata: &mut Metadata<'_>, index: u32) -> Result<Fragment, ImageError> {
    let table = metadata.superblock.fragment_table;
    if index >= metadata.superblock.fragments || table == NONE {
        return Err(ImageError::Corrupt("a fragment that is not there"));
    }
    let (at, offset) = locate(metadata, table, index, 16)?;
    let bytes: [u8; 16] = metadata.cursor(at, offset).array()?;
    Ok(Fragment { at: Fields(&bytes).u64(0), size: Fields(&bytes).u32(8) })
}

/// The extended attributes of list `index`.
pub(super) fn xattrs(
    metadata: &mut Metadata<'_>,
    index: u32,
) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, ImageError> {
    let mut found = BTreeMap::new();
    let table = metadata.superblock.xattr_table;
    if index == NO_XATTRS || table == NONE {
        return Ok(found);
    }
    let header = metadata.raw(table, 16)?;
    let (values, lists) = (Fields(&header).u64(0), Fields(&header).u32(8));
    if index >= lists {
        return Err(ImageError::Corrupt("attributes that are not there"));
    }
    let list = table.checked_add(16).ok_or(ImageError::Corrupt("an impossible table"))?;
    let (at, offset) = locate(metadata, list, index, 16)?;
    let entry: [u8; 16] = metadata.cursor(at, offset).array()?;
    let (reference, count) = (Fields(&entry).u64(0), Fields(&entry).u32(8));
    if count > MOST_XATTRS {
        return Err(ImageError::Corrupt("too many attributes of one file"));
    }
    let (at, offset) = Metadata::position(values, reference)?;
    let mut elsewhere = Vec::new();
    let mut cursor = metadata.cursor(at, offset);
    for _ in 0..count {
        let (kind, length) = (cursor.u16()?, cursor.u16()?);
        let prefix: &[u8] = match kind & 0xff {
            0 => b"user.",
            1 => b"trusted.",
            2 => b"security.",
            _ => return Err(ImageError::Corrupt("an attribute of an unknown kind")),
        };
        if length > 255 {
            return Err(ImageError::Corrupt("an attribute with an impossible name"));
        }
        let name = [prefix, &cursor.bytes(length.into())?].concat();
        let size = cursor.u32()?;
        if kind & ELSEWHERE != 0 {
            elsewhere.push((name, cursor.u64()?));
        } else {
            found.insert(name, value(&mut cursor, size)?);
        }
    }
    for (name, reference) in elsewhere {
        let (at, offset) = Metadata::position(values, reference)?;
        let mut cursor = metadata.cursor(at, offset);
        let size = cursor.u32()?;
        found.insert(name, value(&mut cursor, size)?);
    }
    Ok(found)
}

fn value(cursor: &mut super::metadata::Cursor<'_, '_>, size: u32) -> Result<Vec<u8>, ImageError> {
    if size > MOST_VALUE_BYTES {
        return Err(ImageError::Corrupt("an attribute with an impossible value"));
    }
    cursor.bytes(size as usize)
}
