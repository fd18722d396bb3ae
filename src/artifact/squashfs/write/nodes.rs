//! The inode and directory tables: the inodes of a folder's names lie together, after the folders in it and before
//! its own, so that every reference points backwards.

use super::compressor::Compressor;
use super::data::Data;
use super::directory::{Entry, Listing};
use super::inode::{self, File, Folder, Head};
use super::metadata::{Position, Stream};
use super::owners::{Owners, Xattrs};
use super::pool::Places;
use super::{Options, SquashfsError};
use crate::squashfs::tables::NO_XATTRS;
use crate::tree::{Entries, Kind};

/// The two tables on their way, and what inodes refer to.
pub(super) struct Nodes<'a> {
    entries: &'a Entries<'a>,
    options: &'a Options,
    pub inodes: Stream,
    pub folders: Stream,
    pub owners: Owners,
    pub xattrs: Xattrs<'a>,
    /// By the index of an inode's first name.
    numbers: Vec<u32>,
    places: Vec<Option<Position>>,
    links: Vec<u32>,
    /// By the index of a folder: where its listing is, its length and its marks.
    listings: Vec<Option<(Position, Listing<'a>)>>,
    /// References by inode number, the first of which is 1.
    pub exports: Vec<u8>,
    pub count: u32,
    /// The root's inode.
    pub root: Position,
}

impl<'a> Nodes<'a> {
    /// Writes both tables of a tree whose contents are placed.
    pub fn write(
        entries: &'a Entries<'a>,
        options: &'a Options,
        (data, places): (&Data, &Places),
        compressor: &mut Compressor,
    ) -> Result<Self, SquashfsError> {
        let (numbers, count) = numbers(entries)?;
        let mut nodes = Self {
            entries,
            options,
            inodes: Stream::new(),
            folders: Stream::new(),
            owners: Owners::default(),
            xattrs: Xattrs::new(),
            numbers,
            places: vec![None; entries.len()],
            links: entries.links(),
            listings: entries.iter().map(|_| None).collect(),
            exports: Vec::new(),
            count,
            root: Position::default(),
        };
        for folder in folders(entries) {
            for &child in entries.children(folder) {
                nodes.inode(entries[child].holder, (data, places), compressor)?;
            }
            nodes.listing(folder, compressor)?;
        }
        nodes.root = nodes.inode(0, (data, places), compressor)?;
        Ok(nodes)
    }

    /// Writes a folder's listing. All that is in it has its inode.
    fn listing(&mut self, folder: usize, compressor: &mut Compressor) -> Result<(), SquashfsError> {
        let children: Vec<Entry<'a>> = self
            .entries
            .children(folder)
            .iter()
            .map(|&child| {
                let holder = self.entries[child].holder;
                Entry {
                    name: self.entries[child].path.name(),
                    number: self.numbers[holder],
                    at: self.places[holder].unwrap_or_default(),
                    kind: inode::short_type(&self.entries[holder].node.kind),
                }
            })
            .collect();
        let listing = Listing::new(&children)?;
        let at = self.folders.position();
        self.folders.write(&listing.bytes, compressor)?;
        self.listings[folder] = Some((at, listing));
        Ok(())
    }

    /// Writes an inode, if it is not yet written, and returns where it is.
    fn inode(
        &mut self,
        index: usize,
        (data, places): (&Data, &Places),
        compressor: &mut Compressor,
    ) -> Result<Position, SquashfsError> {
        if let Some(place) = self.places[index] {
            return Ok(place);
        }
        let entry = &self.entries[index];
        let path = entry.path;
        let meta = &entry.node.meta;
        let mtime = u32::try_from(meta.mtime.seconds);
        let head = Head {
            mode: meta.mode,
            uid: self.owners.place(meta.uid, path)?,
            gid: self.owners.place(meta.gid, path)?,
            mtime: mtime.map_err(|_| SquashfsError::Unrepresentable {
                path: path.clone(),
                what: "modification time",
            })?,
            number: self.numbers[index],
            links: self.links[index],
            xattrs: if self.options.drop_xattrs {
                NO_XATTRS
            } else {
                self.xattrs.place(&meta.xattrs, path, compressor)?
            },
        };
        let mut lengths = Vec::new();
        let bytes = match &entry.node.kind {
            Kind::Directory => {
                let (at, listing) = self.listings[index].take().unwrap_or_else(|| {
                    (Position::default(), Listing { bytes: Vec::new(), marks: Vec::new() })
                });
                // The root's parent is a number that no inode has.
                let parent = if index == 0 { self.count + 1 } else { self.numbers[entry.parent] };
                let folder = Folder { at, bytes: listing.bytes.len(), parent, marks: &listing.marks };
                head.folder(&folder, &self.folders)?
            }
            Kind::File { digest, size } => {
                let content = data.content(digest);
                lengths.extend(content.lengths(places).flat_map(u32::to_le_bytes));
                head.file(&File {
                    start: content.start(places),
                    size: *size,
                    sparse_bytes: content.sparse_bytes,
                    fragment: content.fragment(),
                })
            }
            other => head.other(other)?,
        };
        let place = self.inodes.position();
        self.inodes.write(&bytes, compressor)?;
        self.inodes.write(&lengths, compressor)?;
        self.exports.extend_from_slice(&place.reference().to_le_bytes());
        self.places[index] = Some(place);
        Ok(place)
    }
}

/// Folders, each after those in it: in path order they come the other way.
fn folders<'a>(entries: &'a Entries<'a>) -> impl Iterator<Item = usize> + 'a {
    (0..entries.len()).rev().filter(|&index| matches!(entries[index].node.kind, Kind::Directory))
}

/// Inode numbers in the order in which inodes are written, by the index of the first name; and how many there are.
fn numbers(entries: &Entries<'_>) -> Result<(Vec<u32>, u32), SquashfsError> {
    let mut numbers = vec![0; entries.len()];
    let mut count = 0_u32;
    let mut number = |index: usize| {
        if numbers[index] == 0 {
            // One more is the number of the root's parent.
            count = count.checked_add(1).filter(|count| *count < u32::MAX).ok_or(SquashfsError::TooLarge)?;
            numbers[index] = count;
        }
        Ok::<(), SquashfsError>(())
    };
    for folder in folders(entries) {
        for &child in entries.children(folder) {
            number(entries[child].holder)?;
        }
    }
    number(0)?;
    Ok((numbers, count))
}
