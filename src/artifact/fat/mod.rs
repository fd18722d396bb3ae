//! FAT32 images from trees, byte-reproducible: what firmware reads as an EFI system partition.
//!
//! A function of the tree and the [`Options`]: the volume's number comes from the tree's digest unless given, times are
//! the files' own. Written in one pass: where everything lies is known before, since files do not fragment; what is
//! zero is passed over by seeking. FAT has no owners, modes and attributes, which are dropped, and no links or devices:
//! a further name of a file is a copy of it, all else is an error.
//!
//! Source: *Microsoft Extensible Firmware Initiative FAT32 File System Specification* 1.03, which UEFI 2.10 §13.3 names.

mod directory;
mod layout;
mod name;
mod time;

use std::io::{self, Seek, SeekFrom, Write};

use self::layout::{Layout, RESERVED_SECTORS, SECTOR, SECTOR_BYTES};
use crate::content::{self, ContentError, Expected};
use crate::tree::{Contents, Entries, Kind, Tree, TreeError, TreePath};

/// Contents are read in pieces of this.
const PIECE_BYTES: usize = 256 << 10;
/// The byte that says what kind of disk it is: a fixed one. Repeated in the low byte of the table's first entry.
const MEDIA: u8 = 0xf8;
/// Marks the end of a chain of clusters.
const END_OF_CHAIN: u32 = 0x0fff_ffff;
/// The longest a file can be.
const MAX_FILE_BYTES: u64 = 0xffff_ffff;

/// What may vary.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// The image's length, a multiple of 512; the shortest that holds the tree unless given.
    pub size_bytes: Option<u64>,
    /// The volume's number; from the tree's digest unless given.
    pub volume_id: Option<u32>,
    /// The volume's name: eleven characters, filled up with spaces. All spaces is none.
    pub label: Option<Label>,
    /// How many sectors of the disk are before the partition.
    pub hidden_sectors: u32,
}

/// A volume's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Label([u8; 11]);

impl Label {
    /// A name of one to eleven of the characters that short names have, spaces within them; letters become capitals.
    /// `None` for any other.
    pub fn new(text: &str) -> Option<Self> {
        let text = text.to_ascii_uppercase();
        let is_good = |byte: u8| byte == b' ' || name::is_short(byte);
        if text.is_empty() || text.len() > 11 || text.starts_with(' ') || !text.bytes().all(is_good) {
            return None;
        }
        let mut label = [b' '; 11];
        label[..text.len()].copy_from_slice(text.as_bytes());
        Some(Self(label))
    }
}

/// Why an image could not be written.
#[derive(Debug, thiserror::Error)]
pub enum FatError {
    /// The tree is not well formed.
    #[error("the tree for a FAT image is not well formed")]
    Tree(#[from] TreeError),
    /// Content that is missing or not what the tree says, or a failing output.
    #[error(transparent)]
    Content(#[from] ContentError),
    /// A name with what FAT cannot hold.
    #[error("FAT cannot hold the name of `{path}`: it {what}")]
    Name {
        /// The node.
        path: TreePath,
        /// What about it.
        what: &'static str,
    },
    /// Two names that FAT takes for one.
    #[error("FAT takes `{path}` and `{other}` for one name")]
    SameName {
        /// The second of them.
        path: TreePath,
        /// The first.
        other: TreePath,
    },
    /// A node that is neither file nor folder, a file over 4 GiB, or a folder of over 65,536 entries.
    #[error("FAT cannot hold `{path}`: it is {what}")]
    Node {
        /// The node.
        path: TreePath,
        /// What it is.
        what: &'static str,
    },
    /// A size that is not what FAT32 can be, or in which the tree has no room.
    #[error("the tree takes a FAT32 image of {least} to {most} bytes in whole sectors, not {asked}")]
    Size {
        /// What was asked for.
        asked: u64,
        /// The least.
        least: u64,
        /// The most.
        most: u64,
    },
}

impl FatError {
    /// What the user can do.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Name { .. } | Self::SameName { .. } => Some("rename it, or leave it out of the image"),
            Self::Node { .. } => Some("leave it out of the image, or put a file in its place"),
            Self::Tree(_) | Self::Content(_) | Self::Size { .. } => None,
        }
    }
}

/// The length of the shortest image that holds `tree`, in bytes: some 33 MiB at least, below which there is no FAT32.
///
/// # Errors
/// [`FatError`] of what FAT cannot hold.
pub fn least_bytes(tree: &Tree) -> Result<u64, FatError> {
    tree.check()?;
    let entries = Entries::new(tree);
    Ok(Layout::new(&entries, None)?.sectors * SECTOR)
}

/// Writes the image of `tree` to `out`, which is empty and positioned at its start, and returns its length.
///
/// # Errors
/// [`FatError`]; `out` then holds a part of the image, without a boot sector.
pub fn write(
    tree: &Tree,
    contents: &dyn Contents,
    out: impl Write + Seek,
    options: &Options,
) -> Result<u64, FatError> {
    tree.check()?;
    let entries = Entries::new(tree);
    let layout = Layout::new(&entries, options.size_bytes)?;
    let mut image = Image { out, at: 0 };
    let volume_id = options.volume_id.unwrap_or_else(|| {
        let [a, b, c, d, ..] = *tree.digest().as_bytes();
        u32::from_le_bytes([a, b, c, d])
    });

    let table = table(&layout);
    for copy in 0..layout::TABLES {
        image.put(layout.table_at(copy), &table)?;
    }
    for (index, entry) in entries.iter().enumerate() {
        if matches!(entry.node.kind, Kind::Directory) {
            let bytes = directory::bytes(&entries, &layout, index, options.label.map(|label| label.0))?;
            image.put(layout.cluster_at(layout.first_clusters[index]), &bytes)?;
        }
    }
    let mut piece = vec![0; PIECE_BYTES];
    for (index, entry) in entries.iter().enumerate() {
        if let Kind::File { digest, size } = &entries[entry.holder].node.kind {
            let mut at = layout.cluster_at(layout.first_clusters[index]);
            let file = Expected { path: entry.path, digest, size: *size };
            content::copy(contents, &file, &mut piece, |bytes| {
                image.put_io(at, bytes)?;
                at += bytes.len() as u64;
                Ok(())
            })?;
        }
    }
    let end = layout.sectors * SECTOR;
    if image.at < end {
        image.put(end - 1, &[0])?;
    }
    // Last, so that an image which was not finished is none; with their copies.
    let boot = boot_sector(&layout, volume_id, options);
    let information = information_sector(&layout);
    for first in [layout::BACKUP_SECTOR, 0] {
        image.put(first * SECTOR, &[&boot[..], &information].concat())?;
    }
    image.out.flush().map_err(ContentError::Write)?;
    Ok(end)
}

/// An output that is written at places.
struct Image<W> {
    out: W,
    at: u64,
}

impl<W: Write + Seek> Image<W> {
    fn put(&mut self, at: u64, bytes: &[u8]) -> Result<(), FatError> {
        Ok(self.put_io(at, bytes).map_err(ContentError::Write)?)
    }

    fn put_io(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        if self.at != at {
            self.out.seek(SeekFrom::Start(at))?;
        }
        self.out.write_all(bytes)?;
        self.at = at + bytes.len() as u64;
        Ok(())
    }
}

/// The table of clusters, up to the last that is used.
fn table(layout: &Layout) -> Vec<u8> {
    // The two entries before the first cluster's say the media and that the volume is clean.
    let mut table = [0x0fff_ff00 | u32::from(MEDIA), END_OF_CHAIN].map(u32::to_le_bytes).concat();
    for &(first, count) in &layout.chains {
        for next in first + 1..first + count {
            table.extend_from_slice(&next.to_le_bytes());
        }
        table.extend_from_slice(&END_OF_CHAIN.to_le_bytes());
    }
    table
}

/// The BIOS parameter block (specification, *Boot Sector and BPB Structure*), with code that only waits.
fn boot_sector(layout: &Layout, volume_id: u32, options: &Options) -> [u8; SECTOR_BYTES] {
    let mut sector = [0; SECTOR_BYTES];
    let mut at = 0;
    let mut put = |bytes: &[u8]| {
        sector[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    };
    put(&[0xeb, 0x58, 0x90]);
    put(b"kiln    ");
    put(&512_u16.to_le_bytes());
    put(&[layout.sectors_per_cluster]);
    put(&RESERVED_SECTORS.to_le_bytes());
    put(&[layout::TABLES]);
    // No entries of a fixed root, no count of sectors in sixteen bits.
    put(&[0; 4]);
    put(&[MEDIA]);
    // No length of a table in sixteen bits; a geometry that nobody has.
    put(&0_u16.to_le_bytes());
    put(&63_u16.to_le_bytes());
    put(&255_u16.to_le_bytes());
    put(&options.hidden_sectors.to_le_bytes());
    put(&u32::try_from(layout.sectors).unwrap_or(u32::MAX).to_le_bytes());
    put(&layout.table_sectors.to_le_bytes());
    // Both tables are kept alike; version 0.0.
    put(&[0; 4]);
    put(&layout::ROOT_CLUSTER.to_le_bytes());
    put(&1_u16.to_le_bytes());
    put(&u16::try_from(layout::BACKUP_SECTOR).unwrap_or_default().to_le_bytes());
    put(&[0; 12]);
    put(&[0x80, 0, 0x29]);
    put(&volume_id.to_le_bytes());
    put(&options.label.map_or(*b"NO NAME    ", |label| label.0));
    put(b"FAT32   ");
    // `hlt`, and again.
    put(&[0xf4, 0xeb, 0xfd]);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

/// The sector that says how much is free (specification, *FAT32 FSInfo Sector Structure*).
fn information_sector(layout: &Layout) -> [u8; SECTOR_BYTES] {
    let mut sector = [0; SECTOR_BYTES];
    sector[..4].copy_from_slice(b"RRaA");
    sector[484..488].copy_from_slice(b"rrAa");
    sector[488..492].copy_from_slice(&(layout.clusters - layout.used_clusters).to_le_bytes());
    sector[492..496].copy_from_slice(&(layout::ROOT_CLUSTER + layout.used_clusters).to_le_bytes());
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;
    use crate::tree::sample::trees_with_contents;

    fn written(tree: &Tree, contents: &dyn Contents) -> Result<Vec<u8>, FatError> {
        let mut out = Cursor::new(Vec::new());
        let bytes = write(tree, contents, &mut out, &Options::default())?;
        assert_eq!(out.get_ref().len() as u64, bytes);
        Ok(out.into_inner())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn any_tree_is_written_or_refused_by_path((mut tree, contents) in trees_with_contents()) {
            match written(&tree, &contents) {
                Ok(_) => {}
                Err(FatError::Name { path, .. } | FatError::Node { path, .. } | FatError::SameName { path, .. }) => {
                    prop_assert!(tree.get(&path).is_some());
                }
                Err(other) => prop_assert!(false, "{other}"),
            }
            // What is left of it when what FAT cannot hold is taken out.
            while let Err(FatError::Name { path, .. } | FatError::Node { path, .. } | FatError::SameName { path, .. }) =
                least_bytes(&tree)
            {
                tree.remove_subtree(&path);
            }
            let image = written(&tree, &contents).expect("nothing is left that FAT cannot hold");
            for (path, node) in tree.iter() {
                let holder = if let Kind::HardLink(holder) = &node.kind { holder } else { path };
                if let Some(Kind::File { digest, size }) = tree.get(holder).map(|node| &node.kind) {
                    let content = &contents[digest];
                    let is_there = *size == 0
                        || image.chunks(SECTOR_BYTES).enumerate().any(|(sector, _)| image[sector * SECTOR_BYTES..].starts_with(content));
                    prop_assert!(is_there, "{path}");
                }
            }
        }
    }
}
