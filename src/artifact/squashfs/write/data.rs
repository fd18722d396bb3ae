//! Contents: cut into blocks, ends of files gathered into fragments, equal files written once, zeros not at all.

use std::collections::BTreeMap;
use std::io::Write;
use std::ops::Range;

use kiln_digest::Digest;

use super::pool::{Placed, Places, Pool};
use super::{Options, SquashfsError};
use crate::content::{self, ContentError, Expected};
use crate::squashfs::inode::NO_FRAGMENT;
use crate::tree::{Contents, Entries, Kind};

/// Where a content is, in numbers of blocks that the pool will place.
#[derive(Debug, Clone, Default)]
pub(super) struct Content {
    /// Its blocks, one after the other.
    blocks: Range<usize>,
    /// Which of its blocks, counted with these, are zeros and lie nowhere.
    zeros: Vec<u32>,
    /// Bytes of these.
    pub sparse_bytes: u64,
    /// The fragment that has its end, and where in there.
    pub fragment: Option<(u32, u32)>,
}

impl Content {
    /// Where its first block lies.
    pub fn start(&self, places: &Places) -> u64 {
        if self.blocks.is_empty() { 0 } else { places.blocks[self.blocks.start].at }
    }

    /// The lengths of its blocks as an inode lists them: zero for zeros.
    pub fn lengths<'a>(&'a self, places: &'a Places) -> impl Iterator<Item = u32> + 'a {
        let count = self.blocks.len() + self.zeros.len();
        let mut zeros = self.zeros.iter().copied().peekable();
        let mut placed = places.blocks[self.blocks.clone()].iter();
        (0..count).map_while(move |index| {
            if zeros.next_if(|zero| usize::try_from(*zero).is_ok_and(|zero| zero == index)).is_some() {
                return Some(0);
            }
            placed.next().map(|placed| placed.size)
        })
    }

    /// The fragment and the place in it, as an inode has them.
    pub fn fragment(&self) -> (u32, u32) {
        self.fragment.unwrap_or((NO_FRAGMENT, 0))
    }
}

/// All contents of a tree.
#[derive(Default)]
pub(super) struct Data {
    /// By digest: equal contents are one.
    contents: BTreeMap<Digest, Content>,
    /// Which of the pool's blocks each fragment is.
    pub fragments: Vec<usize>,
}

impl Data {
    /// The content of a file of the tree.
    pub fn content(&self, digest: &Digest) -> Content {
        self.contents.get(digest).cloned().unwrap_or_default()
    }

    /// The table of fragments.
    pub fn fragment_table(&self, places: &Places) -> Vec<u8> {
        let mut table = Vec::with_capacity(16 * self.fragments.len());
        for &number in &self.fragments {
            let Placed { at, size } = places.blocks[number];
            table.extend_from_slice(&at.to_le_bytes());
            table.extend_from_slice(&size.to_le_bytes());
            table.extend_from_slice(&[0; 4]);
        }
        table
    }

    /// Gives the contents of all files to the pool, in path order, and waits until they are written.
    pub fn write(
        entries: &Entries<'_>,
        contents: &dyn Contents,
        options: &Options,
        pool: &mut Pool,
        out: &mut impl Write,
    ) -> Result<Self, SquashfsError> {
        let block_bytes = usize::try_from(options.block_bytes).map_err(|_| SquashfsError::TooLarge)?;
        let mut data = Self::default();
        let mut piece = vec![0; block_bytes];
        let mut fragment = Vec::with_capacity(block_bytes);
        for entry in entries.iter() {
            let Kind::File { digest, size } = &entry.node.kind else { continue };
            if data.contents.contains_key(digest) {
                continue;
            }
            let mut file = Content::default();
            let mut index = 0;
            let mut left = *size;
            let mut failed = Ok(());
            let expected = Expected { path: entry.path, digest, size: *size };
            let mut take = |block: &[u8]| -> Result<(), SquashfsError> {
                left -= block.len() as u64;
                let is_end = block.len() < block_bytes;
                if is_end && (options.tail_ends || index == 0) {
                    if fragment.len() + block.len() > block_bytes {
                        data.fragments.push(pool.give(&fragment, out)?);
                        fragment.clear();
                    }
                    let number = u32::try_from(data.fragments.len()).map_err(|_| SquashfsError::TooLarge)?;
                    let offset = u32::try_from(fragment.len()).map_err(|_| SquashfsError::TooLarge)?;
                    file.fragment = Some((number, offset));
                    fragment.extend_from_slice(block);
                    return Ok(());
                }
                if block.iter().all(|byte| *byte == 0) {
                    file.zeros.push(index);
                    file.sparse_bytes += block.len() as u64;
                } else {
                    let number = pool.give(block, out)?;
                    if file.blocks.is_empty() {
                        file.blocks.start = number;
                    }
                    file.blocks.end = number + 1;
                }
                index = index.checked_add(1).ok_or(SquashfsError::TooLarge)?;
                Ok(())
            };
            content::copy(contents, &expected, &mut piece, |block| {
                if failed.is_ok() {
                    failed = take(block);
                }
                // The reader learns that it may stop, the caller below why.
                if failed.is_ok() { Ok(()) } else { Err(std::io::ErrorKind::Interrupted.into()) }
            })
            .map_err(|error| match std::mem::replace(&mut failed, Ok(())) {
                Ok(()) => SquashfsError::from(error),
                Err(first) => first,
            })?;
            data.contents.insert(*digest, file);
        }
        if !fragment.is_empty() {
            data.fragments.push(pool.give(&fragment, out)?);
        }
        pool.finish(out)?;
        Ok(data)
    }
}

impl From<std::io::Error> for SquashfsError {
    fn from(error: std::io::Error) -> Self {
        Self::Content(ContentError::Write(error))
    }
}
