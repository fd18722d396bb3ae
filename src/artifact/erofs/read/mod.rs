//! Reading erofs images, also those that other tools made: names, attributes, and the digests of contents that lie
//! uncompressed. Of a compressed file everything but the content is read, and it is named among those that were not.
//!
//! Source: `Documentation/filesystems/erofs.rst` and the structures in `fs/erofs/erofs_fs.h`.

mod inode;
mod superblock;

pub use superblock::Superblock;

use self::inode::{Data, Inode};
use crate::archive::ContentSink;
use crate::image::{Collector, ContentHasher, Image, ImageError, Limits, ReadAt};
use crate::tree::{Kind, MAX_PATH_BYTES, TreePath};

/// Contents are read in pieces of at most this.
const PIECE_BYTES: u64 = 256 << 10;
/// Length of one entry's fixed part in a folder (`struct erofs_dirent`).
const DIRENT_BYTES: usize = 12;

/// Reads the image whole.
///
/// # Errors
/// [`ImageError`].
pub fn read(source: &dyn ReadAt, limits: &Limits) -> Result<Image, ImageError> {
    walk(source, limits, None)
}

/// As [`read`], and gives the content of every file that can be read to `sink`, one file in memory at a time.
///
/// # Errors
/// [`ImageError`].
pub fn extract(
    source: &dyn ReadAt,
    limits: &Limits,
    sink: &mut dyn ContentSink,
) -> Result<Image, ImageError> {
    walk(source, limits, Some(sink))
}

fn walk<'a>(
    source: &'a dyn ReadAt,
    limits: &'a Limits,
    sink: Option<&'a mut (dyn ContentSink + 'a)>,
) -> Result<Image, ImageError> {
    let superblock = Superblock::read(source)?;
    if let Some(feature) = superblock.unknown_feature() {
        return Err(ImageError::Unsupported(feature));
    }
    Walk { source, superblock, collector: Collector::new(limits), sink }.run()
}

struct Walk<'a> {
    source: &'a dyn ReadAt,
    superblock: Superblock,
    collector: Collector<'a>,
    sink: Option<&'a mut (dyn ContentSink + 'a)>,
}

/// A folder still to be listed.
type Open = (TreePath, u64, Data);

impl Walk<'_> {
    fn run(mut self) -> Result<Image, ImageError> {
        let root = self.superblock.root;
        let inode = Inode::read(self.source, &self.superblock, root)?;
        if inode.format != 0o4 {
            return Err(ImageError::Corrupt("a root that is no folder"));
        }
        self.collector.folder(TreePath::root(), root, inode.meta)?;
        let mut open = vec![(TreePath::root(), inode.size, inode.data)];
        while let Some((path, size, data)) = open.pop() {
            self.folder(&path, size, data, &mut open).map_err(|error| error.at(&path))?;
        }
        self.collector.finish()
    }

    /// Takes up all entries of a folder; folders in it are added to `open`.
    fn folder(
        &mut self,
        path: &TreePath,
        size: u64,
        data: Data,
        open: &mut Vec<Open>,
    ) -> Result<(), ImageError> {
        if matches!(data, Data::Compressed | Data::Elsewhere) {
            return Err(ImageError::Unsupported("compressed folders".to_owned()));
        }
        let block_bytes = self.superblock.block_bytes();
        let mut at = 0;
        // One block of the listing at a time; each stands by itself.
        while at < size {
            let length = block_bytes.min(size - at);
            let mut block = Vec::new();
            self.content(data, size, at, length, &mut |piece| {
                match piece {
                    Piece::Bytes(bytes) => block.extend_from_slice(bytes),
                    Piece::Zeros(_) => return Err(ImageError::Corrupt("a folder with a hole")),
                }
                Ok(())
            })?;
            for (name, number, kind) in entries(&block)? {
                if matches!(name, b"." | b"..") {
                    continue;
                }
                self.collector.count_name()?;
                let path = self.collector.name(path, name)?;
                self.entry(path.clone(), number, kind, open).map_err(|error| error.at(&path))?;
            }
            at += length;
        }
        Ok(())
    }

    fn entry(
        &mut self,
        path: TreePath,
        number: u64,
        kind: u8,
        open: &mut Vec<Open>,
    ) -> Result<(), ImageError> {
        if self.collector.link(&path, number) {
            return Ok(());
        }
        let inode = Inode::read(self.source, &self.superblock, number)?;
        // 0 where an image does not say types (`EROFS_FT_UNKNOWN`).
        if kind != 0 && file_type(inode.format) != Some(kind) {
            return Err(ImageError::Corrupt("an entry of another kind than its inode"));
        }
        for (name, value) in &inode.meta.xattrs {
            self.collector.text(name.len() + value.len())?;
        }
        let (major, minor) = inode.device;
        let kind = match inode.format {
            0o4 => {
                self.collector.folder(path.clone(), number, inode.meta)?;
                open.push((path, inode.size, inode.data));
                return Ok(());
            }
            0o10 if matches!(inode.data, Data::Compressed | Data::Elsewhere) => {
                self.collector.unread(&path, inode.size)
            }
            0o10 => {
                self.collector.content(inode.size)?;
                let mut hasher = ContentHasher::default();
                let mut kept = self.sink.is_some().then(Vec::new);
                self.content(inode.data, inode.size, 0, inode.size, &mut |piece| {
                    match piece {
                        Piece::Bytes(bytes) => {
                            hasher.update(bytes);
                            kept.iter_mut().for_each(|kept| kept.extend_from_slice(bytes));
                        }
                        Piece::Zeros(count) => {
                            hasher.zeros(count);
                            let count = usize::try_from(count).unwrap_or(usize::MAX);
                            kept.iter_mut().for_each(|kept| kept.resize(kept.len().saturating_add(count), 0));
                        }
                    }
                    Ok(())
                })?;
                if let (Some(sink), Some(kept)) = (&mut self.sink, kept) {
                    sink.store(&mut &kept[..])?;
                }
                hasher.finish()
            }
            0o12 => self.link_text(&inode)?,
            0o2 => Kind::CharDevice { major, minor },
            0o6 => Kind::BlockDevice { major, minor },
            0o1 => Kind::Fifo,
            0o14 => Kind::Socket,
            _ => return Err(ImageError::Corrupt("an inode of an unknown kind")),
        };
        self.collector.leaf(path, number, kind, inode.meta);
        Ok(())
    }

    fn link_text(&mut self, inode: &Inode) -> Result<Kind, ImageError> {
        if inode.size > MAX_PATH_BYTES as u64 {
            return Err(ImageError::Corrupt("a symbolic link that is too long"));
        }
        let mut text = Vec::new();
        self.content(inode.data, inode.size, 0, inode.size, &mut |piece| {
            if let Piece::Bytes(bytes) = piece {
                text.extend_from_slice(bytes);
            }
            Ok(())
        })?;
        self.collector.text(text.len())?;
        Ok(Kind::Symlink(text.into()))
    }

    /// Gives `length` bytes from `offset` on of a content of `size` bytes, piece by piece. What is asked for lies
    /// within one block, or is the whole.
    fn content(
        &self,
        data: Data,
        size: u64,
        offset: u64,
        length: u64,
        give: &mut dyn FnMut(Piece<'_>) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        let address = |block: u32| u64::from(block) << self.superblock.block_bits;
        let end = offset + length;
        match data {
            Data::Blocks { first } => self.pieces(address(first).saturating_add(offset), length, give),
            Data::Inline { first, tail } => {
                let in_blocks =
                    size.saturating_sub(1) >> self.superblock.block_bits << self.superblock.block_bits;
                if offset < in_blocks {
                    self.pieces(address(first).saturating_add(offset), end.min(in_blocks) - offset, give)?;
                }
                if end > in_blocks {
                    let start = offset.max(in_blocks);
                    self.pieces(tail.saturating_add(start - in_blocks), end - start, give)?;
                }
                Ok(())
            }
            Data::Chunks { bits, table, with_device } => {
                let entry_bytes: u64 = if with_device { 8 } else { 4 };
                let mut at = offset;
                while at < end {
                    let index = at >> bits;
                    let stop = end.min(((index + 1) << bits).min(size));
                    let place = index.checked_mul(entry_bytes).and_then(|below| table.checked_add(below));
                    let place = place.ok_or(ImageError::Corrupt("an impossible list of chunks"))?;
                    let mut entry = [0; 8];
                    let entry = &mut entry[..if with_device { 8 } else { 4 }];
                    self.source.read_exact_at(entry, place).map_err(beyond)?;
                    let (_, block) = entry.split_at(entry.len() - 4);
                    match crate::image::Fields(block).u32(0) {
                        u32::MAX => give(Piece::Zeros(stop - at))?,
                        block => {
                            self.pieces(address(block).saturating_add(at - (index << bits)), stop - at, give)?
                        }
                    }
                    at = stop;
                }
                Ok(())
            }
            Data::Compressed | Data::Elsewhere => Err(ImageError::Unsupported("compression".to_owned())),
        }
    }

    /// Gives `length` bytes of the image from `at` on.
    fn pieces(
        &self,
        mut at: u64,
        mut length: u64,
        give: &mut dyn FnMut(Piece<'_>) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        if at.checked_add(length).is_none_or(|end| end > self.superblock.length) {
            return Err(ImageError::Corrupt("a content beyond the image's end"));
        }
        let mut buffer = vec![0; usize::try_from(length.min(PIECE_BYTES)).unwrap_or_default()];
        while length > 0 {
            let piece = length.min(PIECE_BYTES);
            buffer.truncate(usize::try_from(piece).unwrap_or_default());
            self.source.read_exact_at(&mut buffer, at)?;
            give(Piece::Bytes(&buffer))?;
            (at, length) = (at + piece, length - piece);
        }
        Ok(())
    }
}

/// What a content is given in.
enum Piece<'a> {
    Bytes(&'a [u8]),
    Zeros(u64),
}

/// The type that entries have for a format of `st_mode`.
fn file_type(format: u16) -> Option<u8> {
    Some(match format {
        0o10 => 1,
        0o4 => 2,
        0o2 => 3,
        0o6 => 4,
        0o1 => 5,
        0o14 => 6,
        0o12 => 7,
        _ => return None,
    })
}

fn beyond(error: std::io::Error) -> ImageError {
    match error.kind() {
        std::io::ErrorKind::UnexpectedEof => ImageError::Corrupt("something lies beyond the image's end"),
        _ => ImageError::Read(error),
    }
}

/// Name, inode number and type of an entry.
type Dirent<'a> = (&'a [u8], u64, u8);

/// The entries of one block of a folder: fixed parts, then the names; the last one ends with the block or with a zero
/// byte.
fn entries(block: &[u8]) -> Result<Vec<Dirent<'_>>, ImageError> {
    const CORRUPT: ImageError = ImageError::Corrupt("a folder with impossible entries");
    let fields = crate::image::Fields(block);
    let names_at = usize::from(fields.u16(8));
    if names_at < DIRENT_BYTES || names_at % DIRENT_BYTES != 0 || names_at > block.len() {
        return Err(CORRUPT);
    }
    let count = names_at / DIRENT_BYTES;
    let start = |index: usize| usize::from(fields.u16(index * DIRENT_BYTES + 8));
    let mut found = Vec::with_capacity(count);
    for index in 0..count {
        let end = if index + 1 < count { start(index + 1) } else { block.len() };
        let name = block.get(start(index)..end).ok_or(CORRUPT)?;
        let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
        found.push((name, fields.u64(index * DIRENT_BYTES), fields.u8(index * DIRENT_BYTES + 10)));
    }
    Ok(found)
}
