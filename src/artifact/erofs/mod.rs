//! erofs images, uncompressed and byte-reproducible: what roots are.
//!
//! A function of the tree alone: the UUID is the digest of its manifest, and there is no clock in it. Contents
//! stream through; memory is proportional to the number of nodes. Only what every kernel since 5.4 reads is used:
//! flat files with inline ends, inline attributes, no optional feature. [`layout`] says where things lie and why.
//!
//! Source: `Documentation/filesystems/erofs.rst` and the structures in `fs/erofs/erofs_fs.h`.

mod directory;
mod format;
mod image;
mod layout;
mod read;
#[cfg(test)]
mod reader;

use std::collections::BTreeMap;
use std::io::{self, Seek, Write};

pub use self::read::{Superblock as ReadSuperblock, extract, read};

use self::format::{BLOCK, BLOCK_BYTES, Inode, Superblock};
use self::image::Image;
use self::layout::Plan;
use crate::content::{self, ContentError, Expected};
use crate::image as disk;
use crate::tree::{Contents, Kind, Meta, Tree, TreeError, TreePath};
use crate::uuid;

/// Contents are read in pieces of this; a multiple of the block size.
const PIECE_BYTES: usize = 256 << 10;

/// Why an image could not be written.
#[derive(Debug, thiserror::Error)]
pub enum ErofsError {
    /// The tree is not well formed.
    #[error("the tree for an erofs image is not well formed")]
    Tree(#[from] TreeError),
    /// Content that is missing or not what the tree says, or a failing output.
    #[error(transparent)]
    Content(#[from] ContentError),
    /// Attributes in a namespace that erofs has no index for, a value over 65,535 bytes, or 256 KiB in all.
    #[error("erofs cannot hold the extended attributes of `{0}`")]
    Xattrs(TreePath),
    /// More than 2^32 blocks of 4 KiB.
    #[error("an erofs image of this tree would be over 16 TiB")]
    TooLarge,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// The image's length; a multiple of 4,096.
    pub bytes: u64,
    /// How many inodes it has: nodes of the tree without hard links.
    pub inodes: u64,
}

/// Writes the image of `tree` to `out`, which is empty and positioned at its start. Blocks of zeros are passed over
/// by seeking, so that a file gets holes there.
///
/// # Errors
/// [`ErofsError`]; `out` then holds a part of the image, without a superblock.
pub fn write(tree: &Tree, contents: &dyn Contents, out: impl Write + Seek) -> Result<Written, ErofsError> {
    tree.check()?;
    let plan = Plan::new(tree)?;
    let mut writer = Writer {
        image: Image::new(out),
        metadata: BTreeMap::new(),
        unwritten: plan.inodes_in_block.clone(),
        piece: vec![0; PIECE_BYTES],
        contents,
    };
    for index in (0..plan.entries.len()).filter(|&index| plan.entries.holds_inode(index)) {
        writer.inode(&plan, index)?;
    }
    let superblock = Superblock {
        root_nid: u16::try_from(plan.places[0].nid()).expect("the root is the first inode"),
        inodes: plan.inode_count,
        time: plan.time,
        blocks: plan.blocks,
        uuid: uuid::of(&tree.digest()),
    };
    let bytes = u64::from(plan.blocks) * BLOCK;
    let mut image = writer.image;
    image.write_metadata(0, &superblock.block()).map_err(ContentError::Write)?;
    image.finish(bytes).map_err(ContentError::Write)?;
    Ok(Written { bytes, inodes: plan.inode_count })
}

struct Writer<'a, W> {
    image: Image<W>,
    /// Metadata blocks some of whose inodes have been put in, by number.
    metadata: BTreeMap<usize, Box<[u8; BLOCK_BYTES]>>,
    /// How many inodes each metadata block waits for; the first of these is block 1.
    unwritten: Vec<u16>,
    piece: Vec<u8>,
    contents: &'a dyn Contents,
}

impl<W: Write + Seek> Writer<'_, W> {
    /// Writes an inode with its attributes and its content.
    fn inode(&mut self, plan: &Plan<'_>, index: usize) -> Result<(), ErofsError> {
        let (entry, place) = (&plan.entries[index], &plan.places[index]);
        let Meta { mode, uid, gid, mtime, xattrs } = &entry.node.meta;
        let block_or_device = match entry.node.kind {
            Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor } => {
                disk::encode_device(major, minor)
            }
            _ => place.first_block,
        };
        let inode = Inode {
            extended: place.extended,
            layout: place.layout(),
            xattr_bytes: place.xattr_bytes,
            mode: format::file_type(&entry.node.kind).0 | mode,
            links: place.links,
            size: place.size,
            block_or_device,
            number: u32::try_from(index + 1).unwrap_or(u32::MAX),
            uid: *uid,
            gid: *gid,
            mtime: *mtime,
        };
        let mut record = Vec::with_capacity(128 + place.inline_bytes);
        inode.write(&mut record);
        format::write_xattrs(&mut record, xattrs);
        let inline_at = record.len();

        let mut at = u64::from(place.first_block) * BLOCK;
        let image = &mut self.image;
        let mut put = |piece: &[u8]| -> io::Result<()> {
            // Only the last piece can hold less than whole blocks, and what follows the inode is its end.
            let is_last = !piece.len().is_multiple_of(BLOCK_BYTES);
            let (blocks, inline) = piece.split_at(piece.len() - if is_last { place.inline_bytes } else { 0 });
            record.extend_from_slice(inline);
            if !place.is_shared {
                image.write_data(at, blocks)?;
            }
            at += blocks.len() as u64;
            Ok(())
        };
        match &entry.node.kind {
            Kind::File { digest, size } => {
                let file = Expected { path: entry.path, digest, size: *size };
                content::copy(self.contents, &file, &mut self.piece, put)?;
            }
            Kind::Symlink(text) => put(text).map_err(ContentError::Write)?,
            Kind::Directory => {
                let dirents: Vec<_> = plan
                    .names(index)
                    .into_iter()
                    .map(|(name, target)| {
                        let holder = plan.entries[target].holder;
                        let file_type = format::file_type(&plan.entries[holder].node.kind).1;
                        directory::Entry { name, nid: plan.places[holder].nid(), file_type }
                    })
                    .collect();
                directory::write(&dirents, put).map_err(ContentError::Write)?;
            }
            Kind::HardLink(_)
            | Kind::CharDevice { .. }
            | Kind::BlockDevice { .. }
            | Kind::Fifo
            | Kind::Socket => {}
        }
        debug_assert_eq!(record.len(), inline_at + place.inline_bytes, "the inline end of {}", entry.path);
        self.put_metadata(place.address, &record)
    }

    /// Puts a record into its block or blocks, and writes those that wait for no other.
    fn put_metadata(&mut self, address: u64, record: &[u8]) -> Result<(), ErofsError> {
        let address = usize::try_from(address).map_err(|_| ErofsError::TooLarge)?;
        let mut rest = record;
        let mut at = address;
        while !rest.is_empty() {
            let (number, offset) = (at / BLOCK_BYTES, at % BLOCK_BYTES);
            let (here, later) = rest.split_at(rest.len().min(BLOCK_BYTES - offset));
            let block = self.metadata.entry(number).or_insert_with(|| Box::new([0; BLOCK_BYTES]));
            block[offset..offset + here.len()].copy_from_slice(here);
            let waiting = &mut self.unwritten[number - 1];
            *waiting -= 1;
            if *waiting == 0
                && let Some(block) = self.metadata.remove(&number)
            {
                self.image
                    .write_metadata((number * BLOCK_BYTES) as u64, &block[..])
                    .map_err(ContentError::Write)?;
            }
            at += here.len();
            rest = later;
        }
        Ok(())
    }
}
