//! Inodes as they are written: the short form wherever it has room for what there is to say.

use super::SquashfsError;
use super::directory::Mark;
use super::metadata::{Position, Stream};
use crate::image;
use crate::squashfs::tables::NO_XATTRS;
use crate::tree::Kind;

/// What every inode has.
pub(super) struct Head {
    pub mode: u16,
    pub uid: u16,
    pub gid: u16,
    pub mtime: u32,
    pub number: u32,
    pub links: u32,
    pub xattrs: u32,
}

/// A folder's listing.
pub(super) struct Folder<'a> {
    /// Where it begins in the table of folders.
    pub at: Position,
    pub bytes: usize,
    pub parent: u32,
    pub marks: &'a [Mark<'a>],
}

/// A file's content.
pub(super) struct File {
    pub start: u64,
    pub size: u64,
    pub sparse_bytes: u64,
    pub fragment: (u32, u32),
}

/// The number of the long form is that of the short form and this.
const LONG: u16 = 7;

/// The number of a kind's short form, by which listings call it too.
pub(super) fn short_type(kind: &Kind) -> u16 {
    match kind {
        Kind::Directory => 1,
        Kind::File { .. } | Kind::HardLink(_) => 2,
        Kind::Symlink(_) => 3,
        Kind::BlockDevice { .. } => 4,
        Kind::CharDevice { .. } => 5,
        Kind::Fifo => 6,
        Kind::Socket => 7,
    }
}

impl Head {
    /// A folder. `folders` is the stream that has its listing.
    pub fn folder(&self, folder: &Folder<'_>, folders: &Stream) -> Result<Vec<u8>, SquashfsError> {
        // Three more, for `.` and `..`, which are not there.
        let size = u32::try_from(folder.bytes + 3).map_err(|_| SquashfsError::TooLarge)?;
        let short_size = u16::try_from(size);
        if let Ok(size) = short_size
            && self.xattrs == NO_XATTRS
            && folder.marks.is_empty()
        {
            let mut bytes = self.begin(1);
            put(&mut bytes, &[folder.at.block, self.links]);
            bytes.extend_from_slice(&size.to_le_bytes());
            bytes.extend_from_slice(&folder.at.offset.to_le_bytes());
            put(&mut bytes, &[folder.parent]);
            return Ok(bytes);
        }
        // A name behind the last mark is looked for from there.
        let marks = &folder.marks[..folder.marks.len().min(usize::from(u16::MAX))];
        let count = u16::try_from(marks.len()).unwrap_or(u16::MAX);
        let mut bytes = self.begin(1 + LONG);
        put(&mut bytes, &[self.links, size, folder.at.block, folder.parent]);
        bytes.extend_from_slice(&count.to_le_bytes());
        bytes.extend_from_slice(&folder.at.offset.to_le_bytes());
        put(&mut bytes, &[self.xattrs]);
        for Mark { name, offset } in marks {
            let block = folders.block_at(folder.at, *offset);
            let offset = u32::try_from(*offset).map_err(|_| SquashfsError::TooLarge)?;
            let length = u32::try_from(name.len() - 1).map_err(|_| SquashfsError::TooLarge)?;
            put(&mut bytes, &[offset, block, length]);
            bytes.extend_from_slice(name);
        }
        Ok(bytes)
    }

    /// A file. The lengths of its blocks follow.
    pub fn file(&self, file: &File) -> Vec<u8> {
        let (fragment, offset) = file.fragment;
        if let (Ok(start), Ok(size)) = (u32::try_from(file.start), u32::try_from(file.size))
            && self.xattrs == NO_XATTRS
            && self.links == 1
            && file.sparse_bytes == 0
        {
            let mut bytes = self.begin(2);
            put(&mut bytes, &[start, fragment, offset, size]);
            return bytes;
        }
        let mut bytes = self.begin(2 + LONG);
        for wide in [file.start, file.size, file.sparse_bytes] {
            bytes.extend_from_slice(&wide.to_le_bytes());
        }
        put(&mut bytes, &[self.links, fragment, offset, self.xattrs]);
        bytes
    }

    /// What is neither folder nor file.
    pub fn other(&self, kind: &Kind) -> Result<Vec<u8>, SquashfsError> {
        let has_xattrs = self.xattrs != NO_XATTRS;
        let mut bytes = self.begin(short_type(kind) + if has_xattrs { LONG } else { 0 });
        put(&mut bytes, &[self.links]);
        match kind {
            Kind::Symlink(text) => {
                put(&mut bytes, &[u32::try_from(text.len()).map_err(|_| SquashfsError::TooLarge)?]);
                bytes.extend_from_slice(text);
            }
            Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor } => {
                put(&mut bytes, &[image::encode_device(*major, *minor)]);
            }
            Kind::Directory | Kind::File { .. } | Kind::HardLink(_) | Kind::Fifo | Kind::Socket => {}
        }
        if has_xattrs {
            put(&mut bytes, &[self.xattrs]);
        }
        Ok(bytes)
    }

    fn begin(&self, kind: u16) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(64);
        for short in [kind, self.mode, self.uid, self.gid] {
            bytes.extend_from_slice(&short.to_le_bytes());
        }
        put(&mut bytes, &[self.mtime, self.number]);
        bytes
    }
}

fn put(bytes: &mut Vec<u8>, numbers: &[u32]) {
    numbers.iter().for_each(|number| bytes.extend_from_slice(&number.to_le_bytes()));
}
