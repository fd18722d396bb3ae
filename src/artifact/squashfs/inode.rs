//! Inodes: fourteen types, seven kinds in a short and a long form.

use super::metadata::{Cursor, Metadata};
use super::tables::NO_XATTRS;
use crate::image::{self, ImageError};
use crate::tree::{Kind, MAX_PATH_BYTES};

/// What stands for a file that has no fragment.
pub(super) const NO_FRAGMENT: u32 = u32::MAX;

/// An inode as the image has it.
pub(super) struct Inode {
    /// The low twelve bits of its mode.
    pub mode: u16,
    /// Its owner's place in the table of numbers.
    pub uid: u16,
    /// Its group's.
    pub gid: u16,
    pub mtime: u32,
    pub xattrs: u32,
    pub body: Body,
}

/// What belongs to its kind.
pub(super) enum Body {
    Directory(Directory),
    File(File),
    /// Whatever needs no more than itself.
    Other(Kind),
}

/// Where a folder's entries are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Directory {
    /// The metadata block in the table of folders, relative to its start.
    pub block: u32,
    /// Where in that block.
    pub offset: u16,
    /// Length of the entries and three.
    pub size: u32,
}

/// Where a file's content is.
#[derive(Debug, Clone, Copy)]
pub(super) struct File {
    pub start: u64,
    pub size: u64,
    pub fragment: u32,
    pub fragment_offset: u32,
    /// Where the lengths of its blocks begin.
    pub lengths: (u64, u16),
}

impl Inode {
    /// Reads the inode at `position`.
    pub fn read(metadata: &mut Metadata<'_>, position: (u64, u16)) -> Result<Self, ImageError> {
        let mut cursor = metadata.cursor(position.0, position.1);
        let kind = cursor.u16()?;
        let (mode, uid, gid) = (cursor.u16()?, cursor.u16()?, cursor.u16()?);
        let mtime = cursor.u32()?;
        let _number = cursor.u32()?;
        let mut xattrs = NO_XATTRS;
        let body = match kind {
            1 => {
                let block = cursor.u32()?;
                let _links = cursor.u32()?;
                let size = u32::from(cursor.u16()?);
                Body::Directory(Directory { block, size, offset: cursor.u16()? })
            }
            2 => {
                let start = u64::from(cursor.u32()?);
                let (fragment, fragment_offset) = (cursor.u32()?, cursor.u32()?);
                let size = u64::from(cursor.u32()?);
                Body::File(File { start, size, fragment, fragment_offset, lengths: cursor.place() })
            }
            3 | 10 => {
                let _links = cursor.u32()?;
                let text = link_text(&mut cursor)?;
                if kind == 10 {
                    xattrs = cursor.u32()?;
                }
                Body::Other(text)
            }
            4 | 5 | 11 | 12 => {
                let _links = cursor.u32()?;
                let (major, minor) = image::device(cursor.u32()?);
                if kind > 10 {
                    xattrs = cursor.u32()?;
                }
                Body::Other(match kind {
                    4 | 11 => Kind::BlockDevice { major, minor },
                    _ => Kind::CharDevice { major, minor },
                })
            }
            6 | 7 | 13 | 14 => {
                let _links = cursor.u32()?;
                if kind > 12 {
                    xattrs = cursor.u32()?;
                }
                Body::Other(if matches!(kind, 6 | 13) { Kind::Fifo } else { Kind::Socket })
            }
            8 => {
                let _links = cursor.u32()?;
                let (size, block) = (cursor.u32()?, cursor.u32()?);
                let _parent = cursor.u32()?;
                let _index_count = cursor.u16()?;
                let offset = cursor.u16()?;
                xattrs = cursor.u32()?;
                Body::Directory(Directory { block, size, offset })
            }
            9 => {
                let (start, size, _sparse) = (cursor.u64()?, cursor.u64()?, cursor.u64()?);
                let _links = cursor.u32()?;
                let (fragment, fragment_offset) = (cursor.u32()?, cursor.u32()?);
                xattrs = cursor.u32()?;
                Body::File(File { start, size, fragment, fragment_offset, lengths: cursor.place() })
            }
            _ => return Err(ImageError::Corrupt("an inode of an unknown type")),
        };
        Ok(Self { mode: mode & 0o7777, uid, gid, mtime, xattrs, body })
    }

    /// The type by which a folder's entry calls this kind: that of the short form.
    pub fn entry_type(&self) -> u16 {
        match &self.body {
            Body::Directory(_) => 1,
            Body::File(_) => 2,
            Body::Other(Kind::Symlink(_)) => 3,
            Body::Other(Kind::BlockDevice { .. }) => 4,
            Body::Other(Kind::CharDevice { .. }) => 5,
            Body::Other(Kind::Fifo) => 6,
            Body::Other(_) => 7,
        }
    }
}

fn link_text(cursor: &mut Cursor<'_, '_>) -> Result<Kind, ImageError> {
    let length = usize::try_from(cursor.u32()?).unwrap_or(usize::MAX);
    if length > MAX_PATH_BYTES {
        return Err(ImageError::Corrupt("a symbolic link that is too long"));
    }
    Ok(Kind::Symlink(cursor.bytes(length)?.into()))
}
