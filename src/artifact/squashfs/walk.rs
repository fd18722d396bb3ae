//! From the root folder to every name and content.

use super::inode::{Body, Directory, File, Inode, NO_FRAGMENT};
use super::metadata::Metadata;
use super::superblock::Superblock;
use super::tables::{self, Fragment};
use crate::image::{Collector, ContentHasher, Image, ImageError, Limits, ReadAt};
use crate::tree::{Kind, Meta, Timestamp, TreePath};

/// The bit of a data block's length that says it is stored as it is.
pub(super) const STORED: u32 = 1 << 24;
/// SQUASHFS_DIR_COUNT: most entries behind one header of a listing.
pub(super) const MOST_ENTRIES: u32 = 256;

pub(super) struct Walk<'a> {
    metadata: Metadata<'a>,
    collector: Collector<'a>,
    ids: Vec<u32>,
    /// A content's block, before it is hashed.
    block: Vec<u8>,
    /// The fragment block that was read last: many small files share one.
    fragment: Option<(Fragment, Vec<u8>)>,
}

/// A folder still to be listed: its path, and where its entries are.
type Open = (TreePath, Directory);

impl<'a> Walk<'a> {
    pub fn new(source: &'a dyn ReadAt, limits: &'a Limits) -> Result<Self, ImageError> {
        let superblock = Superblock::read(source)?;
        let block = vec![0; superblock.block_bytes as usize];
        let mut metadata = Metadata::new(source, superblock);
        let ids = tables::ids(&mut metadata)?;
        Ok(Self { metadata, collector: Collector::new(limits), ids, block, fragment: None })
    }

    pub fn run(mut self) -> Result<Image, ImageError> {
        let root = self.metadata.superblock.root;
        let inode = self.inode(root)?;
        let Body::Directory(directory) = inode.body else {
            return Err(ImageError::Corrupt("a root that is no folder"));
        };
        let meta = self.meta(&inode)?;
        self.collector.folder(TreePath::root(), root, meta)?;
        let mut open = vec![(TreePath::root(), directory)];
        while let Some((path, directory)) = open.pop() {
            self.folder(&path, directory, &mut open).map_err(|error| error.at(&path))?;
        }
        self.collector.finish()
    }

    fn inode(&mut self, reference: u64) -> Result<Inode, ImageError> {
        let position = Metadata::position(self.metadata.superblock.inode_table, reference)?;
        Inode::read(&mut self.metadata, position)
    }

    fn meta(&mut self, inode: &Inode) -> Result<Meta, ImageError> {
        let id = |index: u16| {
            let id = self.ids.get(usize::from(index)).copied();
            id.ok_or(ImageError::Corrupt("an owner that is not in the table"))
        };
        let (uid, gid) = (id(inode.uid)?, id(inode.gid)?);
        let xattrs = tables::xattrs(&mut self.metadata, inode.xattrs)?;
        for (name, value) in &xattrs {
            self.collector.text(name.len() + value.len())?;
        }
        let mtime = Timestamp { seconds: inode.mtime.into(), nanoseconds: 0 };
        Ok(Meta { mode: inode.mode, uid, gid, mtime, xattrs })
    }

    /// Takes up all entries of a folder; folders in it are added to `open`.
    fn folder(
        &mut self,
        path: &TreePath,
        directory: Directory,
        open: &mut Vec<Open>,
    ) -> Result<(), ImageError> {
        for entry in self.entries(directory)? {
            let path = self.collector.name(path, &entry.name)?;
            self.entry(path.clone(), &entry, open).map_err(|error| error.at(&path))?;
        }
        Ok(())
    }

    fn entry(&mut self, path: TreePath, entry: &Entry, open: &mut Vec<Open>) -> Result<(), ImageError> {
        if self.collector.link(&path, entry.inode) {
            return Ok(());
        }
        let inode = self.inode(entry.inode)?;
        if inode.entry_type() != entry.kind {
            return Err(ImageError::Corrupt("an entry of another kind than its inode"));
        }
        let meta = self.meta(&inode)?;
        let kind = match inode.body {
            Body::Directory(directory) => {
                self.collector.folder(path.clone(), entry.inode, meta)?;
                open.push((path, directory));
                return Ok(());
            }
            Body::File(file) => self.content(&file)?,
            Body::Other(kind) => {
                if let Kind::Symlink(text) = &kind {
                    self.collector.text(text.len())?;
                }
                kind
            }
        };
        self.collector.leaf(path, entry.inode, kind, meta);
        Ok(())
    }

    /// The entries of a folder. Their number is bounded by the folder's size, and that by the table.
    fn entries(&mut self, directory: Directory) -> Result<Vec<Entry>, ImageError> {
        const CORRUPT: ImageError = ImageError::Corrupt("a folder of impossible size");
        let table = self.metadata.superblock.directory_table;
        let at = table.checked_add(directory.block.into()).ok_or(CORRUPT)?;
        let mut cursor = self.metadata.cursor(at, directory.offset);
        // Three more than its entries take, for `.` and `..`, which are not there.
        let mut left = u64::from(directory.size.saturating_sub(3));
        let mut spend = |bytes: u64| {
            left = left.checked_sub(bytes).ok_or(CORRUPT)?;
            Ok::<bool, ImageError>(left > 0)
        };
        let mut entries = Vec::new();
        let mut more = spend(0)?;
        while more {
            let (count, block, _base) = (cursor.u32()?, cursor.u32()?, cursor.u32()?);
            spend(12)?;
            if count >= MOST_ENTRIES {
                return Err(ImageError::Corrupt("a folder with an impossible header"));
            }
            for _ in 0..=count {
                let (offset, _delta) = (cursor.u16()?, cursor.u16()?);
                let (kind, length) = (cursor.u16()?, cursor.u16()?);
                // One less than the length, which is at most 255.
                if length > 255 {
                    return Err(ImageError::Corrupt("an impossible name"));
                }
                let name = cursor.bytes(usize::from(length) + 1)?;
                more = spend(8 + name.len() as u64)?;
                self.collector.count_name()?;
                entries.push(Entry { name, kind, inode: u64::from(block) << 16 | u64::from(offset) });
            }
        }
        Ok(entries)
    }

    /// Hashes a content block by block.
    fn content(&mut self, file: &File) -> Result<Kind, ImageError> {
        self.collector.content(file.size)?;
        let block_bytes = u64::from(self.metadata.superblock.block_bytes);
        let in_fragment = if file.fragment == NO_FRAGMENT { 0 } else { file.size % block_bytes };
        let mut hasher = ContentHasher::default();
        let mut left = file.size - in_fragment;
        let mut at = file.start;
        let mut lengths = file.lengths;
        while left > 0 {
            let mut cursor = self.metadata.cursor(lengths.0, lengths.1);
            let size = cursor.u32()?;
            lengths = cursor.place();
            let expected = left.min(block_bytes);
            if size == 0 {
                hasher.zeros(expected);
            } else {
                at = self.data_block(at, size)?;
                if self.block.len() as u64 != expected {
                    return Err(ImageError::Corrupt("a content that is shorter or longer than its file"));
                }
                hasher.update(&self.block);
            }
            left -= expected;
        }
        if in_fragment > 0 {
            let end = self.fragment_block(file.fragment)?;
            let start = usize::try_from(file.fragment_offset).unwrap_or(usize::MAX);
            let length = usize::try_from(in_fragment).unwrap_or(usize::MAX);
            let part = start.checked_add(length).and_then(|stop| end.get(start..stop));
            hasher.update(part.ok_or(ImageError::Corrupt("a fragment that is too short"))?);
        }
        Ok(hasher.finish())
    }

    /// Reads the block of `size`, as block lists write it, at `at` into `self.block`; where the next one begins.
    fn data_block(&mut self, at: u64, size: u32) -> Result<u64, ImageError> {
        let stored = size & STORED != 0;
        let length = size & (STORED - 1);
        let most = self.metadata.superblock.block_bytes;
        if length == 0 || length > most {
            return Err(ImageError::Corrupt("a data block of impossible length"));
        }
        let bytes = self.metadata.raw(at, length as usize)?;
        if stored {
            self.block = bytes;
        } else {
            self.block.resize(most as usize, 0);
            let filled = self.metadata.superblock.compression.decompress(&bytes, &mut self.block)?;
            self.block.truncate(filled);
        }
        Ok(at + u64::from(length))
    }

    fn fragment_block(&mut self, index: u32) -> Result<&[u8], ImageError> {
        let fragment = tables::fragment(&mut self.metadata, index)?;
        if self.fragment.as_ref().is_none_or(|(known, _)| *known != fragment) {
            self.data_block(fragment.at, fragment.size)?;
            self.fragment = Some((fragment, std::mem::take(&mut self.block)));
        }
        Ok(self.fragment.as_ref().map_or(&[], |(_, bytes)| bytes))
    }
}

/// One entry of a folder.
struct Entry {
    name: Vec<u8>,
    kind: u16,
    /// The inode's reference.
    inode: u64,
}
