//! Where everything of an image lies, decided before a byte is written.
//!
//! ```text
//! block 0       superblock
//! from block 1  inodes, each with its attributes and, if short, its content
//! then          directories that do not fit beside their inode
//! then          files, in path order
//! ```
//! Metadata lies together in front and in path order, so a walk reads forward. The kernel reads metadata a block at a
//! time, so what an inode has beside it costs no further request: directories and link texts go there whenever they
//! fit, files' ends only where two fit into a block, because the end of a longer file is better read with the rest of it.

use std::collections::BTreeMap;

use super::ErofsError;
use super::directory;
use super::format::{self, BLOCK, BLOCK_BYTES, Inode, Layout, SLOT_BYTES};
use crate::tree::{Entries, Entry, Kind, Timestamp, Tree};

/// The most that a file's inode, attributes and end may be together for the end to be inline.
const MAX_FILE_INLINE_BYTES: usize = BLOCK_BYTES / 2;
/// How many blocks that are not full yet are looked at for the next inode: enough to fill holes, few enough that
/// neighbours stay near.
const OPEN_BLOCKS: usize = 8;
/// Directory entries of the folder itself and of its parent.
const DOTS: [&[u8]; 2] = [b".", b".."];

/// An inode's place. Those of hard links stay empty.
#[derive(Clone, Default)]
pub(super) struct Place {
    /// Where the inode is, in bytes from the image's start.
    pub address: u64,
    pub extended: bool,
    pub xattr_bytes: usize,
    pub links: u32,
    /// Length of the content.
    pub size: u64,
    /// The first of the content's own blocks.
    pub first_block: u32,
    /// How many bytes of the content, its last, follow the inode.
    pub inline_bytes: usize,
    /// Whether the blocks are those of an earlier file of equal content.
    pub is_shared: bool,
}

impl Place {
    pub(super) fn nid(&self) -> u64 {
        self.address / SLOT_BYTES as u64
    }

    pub(super) fn layout(&self) -> Layout {
        if self.inline_bytes > 0 { Layout::FlatInline } else { Layout::FlatPlain }
    }

    fn block_count(&self) -> u64 {
        (self.size - self.inline_bytes as u64).div_ceil(BLOCK)
    }
}

/// The whole plan.
pub(super) struct Plan<'a> {
    /// In path order.
    pub entries: Entries<'a>,
    /// By the index of the entry.
    pub places: Vec<Place>,
    /// The time of compact inodes.
    pub time: Timestamp,
    /// How many inodes lie, wholly or in part, in each metadata block; the first of these is block 1.
    pub inodes_in_block: Vec<u16>,
    pub inode_count: u64,
    pub blocks: u32,
}

impl<'a> Plan<'a> {
    /// Plans the image of a tree that is well formed.
    pub(super) fn new(tree: &'a Tree) -> Result<Self, ErofsError> {
        let entries = Entries::new(tree);
        let mut plan = Self {
            places: vec![Place::default(); entries.len()],
            time: commonest_time(&entries),
            entries,
            inodes_in_block: Vec::new(),
            inode_count: 0,
            blocks: 0,
        };
        plan.count_links();
        plan.place_inodes()?;
        plan.place_contents()?;
        Ok(plan)
    }

    /// The names in a folder in order, each with the entry it leads to.
    pub(super) fn names(&self, index: usize) -> Vec<(&'a [u8], usize)> {
        let mut names: Vec<_> = self
            .entries
            .children(index)
            .iter()
            .map(|&child| (self.entries[child].path.name(), child))
            .collect();
        for (dot, target) in DOTS.into_iter().zip([index, self.entries[index].parent]) {
            let at = names.partition_point(|(name, _)| *name < dot);
            names.insert(at, (dot, target));
        }
        names
    }

    fn count_links(&mut self) {
        for (place, links) in self.places.iter_mut().zip(self.entries.links()) {
            place.links = links;
        }
    }

    fn place_inodes(&mut self) -> Result<(), ErofsError> {
        let mut space = MetadataSpace::default();
        for index in 0..self.entries.len() {
            if !self.entries.holds_inode(index) {
                continue;
            }
            let Entry { path, node, .. } = &self.entries[index];
            let meta = &node.meta;
            let xattr_bytes =
                format::xattrs_bytes(&meta.xattrs).ok_or_else(|| ErofsError::Xattrs((*path).clone()))?;
            let (size, most_inline) = match &node.kind {
                Kind::File { size, .. } => (*size, MAX_FILE_INLINE_BYTES),
                Kind::Symlink(text) => (text.len() as u64, BLOCK_BYTES),
                Kind::Directory => {
                    (directory::size(self.names(index).into_iter().map(|(name, _)| name)), BLOCK_BYTES)
                }
                _ => (0, 0),
            };
            let place = &mut self.places[index];
            place.extended =
                meta.mtime != self.time || !format::fits_compact(place.links, size, meta.uid, meta.gid);
            place.xattr_bytes = xattr_bytes;
            place.size = size;
            let head = Inode::header_bytes(place.extended) + xattr_bytes;
            let tail = usize::try_from(size % BLOCK).unwrap_or(BLOCK_BYTES);
            if head + tail <= most_inline {
                place.inline_bytes = tail;
            }
            place.address = space.take(head + place.inline_bytes);
            self.inode_count += 1;
        }
        self.inodes_in_block = space.inodes_in_block;
        Ok(())
    }

    /// Gives blocks to directories, then to files and link texts; files of equal content share theirs.
    fn place_contents(&mut self) -> Result<(), ErofsError> {
        let mut next = 1 + self.inodes_in_block.len() as u64;
        let mut give = |place: &mut Place| -> Result<u32, ErofsError> {
            let first = u32::try_from(next).map_err(|_| ErofsError::TooLarge)?;
            next = next.checked_add(place.block_count()).ok_or(ErofsError::TooLarge)?;
            place.first_block = first;
            Ok(first)
        };
        let is_directory = |entry: &Entry<'_>| matches!(entry.node.kind, Kind::Directory);
        for (entry, place) in self.entries.iter().zip(&mut self.places) {
            if is_directory(entry) && place.block_count() > 0 {
                give(place)?;
            }
        }
        let mut given = BTreeMap::new();
        for (entry, place) in self.entries.iter().zip(&mut self.places) {
            if is_directory(entry) || place.block_count() == 0 {
                continue;
            }
            let Kind::File { digest, .. } = &entry.node.kind else {
                give(place)?;
                continue;
            };
            // Another of equal content may end inline and so have a block less.
            let key = (digest, place.block_count());
            if let Some(&first) = given.get(&key) {
                place.first_block = first;
                place.is_shared = true;
            } else {
                given.insert(key, give(place)?);
            }
        }
        self.blocks = u32::try_from(next).map_err(|_| ErofsError::TooLarge)?;
        Ok(())
    }
}

/// The commonest modification time, the earliest of several: its inodes can be compact.
fn commonest_time(entries: &Entries<'_>) -> Timestamp {
    let mut counts: BTreeMap<Timestamp, usize> = BTreeMap::new();
    for (index, entry) in entries.iter().enumerate() {
        if entries.holds_inode(index) {
            *counts.entry(entry.node.meta.mtime).or_default() += 1;
        }
    }
    // `max_by_key` gives the last of equals.
    counts.into_iter().rev().max_by_key(|(_, count)| *count).map(|(time, _)| time).unwrap_or_default()
}

/// Hands out room for inodes so that none that could lie in one block lies across two.
#[derive(Default)]
struct MetadataSpace {
    inodes_in_block: Vec<u16>,
    /// Blocks with room at their end, oldest first: index and bytes used.
    open: Vec<(usize, usize)>,
}

impl MetadataSpace {
    /// The address of `bytes` of room.
    fn take(&mut self, bytes: usize) -> u64 {
        let bytes = bytes.next_multiple_of(SLOT_BYTES);
        let fitting = self.open.iter().enumerate().filter(|(_, (_, used))| used + bytes <= BLOCK_BYTES);
        let (block, used) = match fitting.max_by_key(|(_, (_, used))| *used).map(|(at, _)| at) {
            Some(at) => self.open.remove(at),
            None => (self.inodes_in_block.len(), 0),
        };
        let end = block * BLOCK_BYTES + used + bytes;
        let last_block = (end - 1) / BLOCK_BYTES;
        if self.inodes_in_block.len() <= last_block {
            self.inodes_in_block.resize(last_block + 1, 0);
        }
        self.inodes_in_block[block..=last_block].iter_mut().for_each(|count| *count += 1);
        let used_of_last = end - last_block * BLOCK_BYTES;
        if used_of_last < BLOCK_BYTES {
            if self.open.len() == OPEN_BLOCKS {
                // The fullest is the least likely to be of use again.
                let fullest =
                    self.open.iter().enumerate().max_by_key(|(_, (_, used))| *used).map(|(at, _)| at);
                self.open.remove(fullest.unwrap_or(0));
            }
            self.open.push((last_block, used_of_last));
        }
        // The superblock's block comes first.
        ((1 + block) * BLOCK_BYTES + used) as u64
    }
}
