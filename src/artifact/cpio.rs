//! The cpio archive a Linux kernel unpacks as its initramfs: `newc`, also called SVR4 without checksum.
//!
//! Written as `Documentation/driver-api/early-userspace/buffer-format.rst` has it. An archive's length is a multiple
//! of four, so archives may follow one another, also after others' and before compressed ones. `newc` has no place
//! for nanoseconds, which are dropped, nor for extended attributes, which are an error unless the caller says.

use std::collections::BTreeMap;
use std::io::{Read, Write};

use crate::content::{self, ContentError, Expected};
use crate::tree::{Contents, Kind, Meta, Node, Tree, TreeError, TreePath};

/// The name that ends an archive.
const TRAILER: &[u8] = b"TRAILER!!!";
const BUFFER_BYTES: usize = 64 << 10;

/// What may vary.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Leave out the root folder, so that an archive that is added to others keeps their root's metadata.
    pub omit_root: bool,
    /// Leave out extended attributes instead of failing.
    pub drop_xattrs: bool,
}

/// How an archive is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// Not at all.
    Plain,
    /// One gzip member, without a name or a time.
    Gzip {
        /// 0 to 9.
        level: u32,
    },
    /// One zstd frame.
    Zstd {
        /// 1 to 19: beyond, a frame's window is larger than the kernel's decompressor takes at boot.
        level: i32,
    },
}

/// Why an archive could not be written.
#[derive(Debug, thiserror::Error)]
pub enum CpioError {
    /// The tree is not well formed.
    #[error("the tree to archive is not well formed")]
    Tree(#[from] TreeError),
    /// Content that is missing or not what the tree says, or a failing output.
    #[error(transparent)]
    Content(#[from] ContentError),
    /// A level that the compressor does not have, or the kernel not.
    #[error("there is no such compression of an initramfs: {0:?}")]
    Level(Encoding),
    /// Something that `newc` has no field for.
    #[error("cpio (newc) cannot hold the {what} of `{path}`")]
    Unrepresentable {
        /// The node.
        path: TreePath,
        /// Which part of it.
        what: &'static str,
    },
}

/// Writes `tree` to `out`, folders before what they hold, inode numbers counted from 1.
///
/// # Errors
/// [`CpioError`]; `out` then holds a part of the archive.
pub fn write(
    tree: &Tree,
    contents: &dyn Contents,
    out: impl Write,
    options: Options,
) -> Result<(), CpioError> {
    tree.check()?;
    let mut sets: BTreeMap<&TreePath, LinkSet> = BTreeMap::new();
    for (_, node) in tree.iter() {
        if let Kind::HardLink(holder) = &node.kind {
            sets.entry(holder).or_insert(LinkSet { names: 1, written: 0, inode: 0 }).names += 1;
        }
    }
    let mut archive = Archive { out, buffer: vec![0; BUFFER_BYTES], contents, inodes: 0 };
    for (path, node) in tree.iter() {
        if path.is_root() && options.omit_root {
            continue;
        }
        let holder = if let Kind::HardLink(holder) = &node.kind { holder } else { path };
        let node = tree.get(holder).unwrap_or(node);
        let unrepresentable = |what| CpioError::Unrepresentable { path: path.clone(), what };
        if path.as_bytes() == TRAILER {
            return Err(unrepresentable("name"));
        }
        if !node.meta.xattrs.is_empty() && !options.drop_xattrs {
            return Err(unrepresentable("extended attributes"));
        }
        archive.entry(path, node, sets.get_mut(holder))?;
    }
    archive.header(TRAILER, &Header { links: 1, ..Header::default() })
}

/// As [`write`], compressed. `out` is an archive to which [`pad`] may be applied for another one to follow.
///
/// # Errors
/// [`CpioError`]; `out` then holds a part of the archive.
pub fn write_encoded(
    tree: &Tree,
    contents: &dyn Contents,
    mut out: impl Write,
    options: Options,
    encoding: Encoding,
) -> Result<(), CpioError> {
    match encoding {
        Encoding::Plain => write(tree, contents, out, options),
        Encoding::Gzip { level } if level <= 9 => {
            let mut encoder = flate2::write::GzEncoder::new(out, flate2::Compression::new(level));
            write(tree, contents, &mut encoder, options)?;
            Ok(encoder.finish().map(drop).map_err(ContentError::Write)?)
        }
        Encoding::Zstd { level } if (1..=19).contains(&level) => {
            let mut encoder = zstd::Encoder::new(&mut out, level).map_err(ContentError::Write)?;
            write(tree, contents, &mut encoder, options)?;
            Ok(encoder.finish().map(drop).map_err(ContentError::Write)?)
        }
        Encoding::Gzip { .. } | Encoding::Zstd { .. } => Err(CpioError::Level(encoding)),
    }
}

/// Writes the NULs that bring `length` bytes of archives to where another may begin (`buffer-format.rst`: each starts at
/// a multiple of four), and returns how many bytes there are then.
///
/// # Errors
/// What writing says.
pub fn pad(length: u64, out: &mut impl Write) -> std::io::Result<u64> {
    let padded = length.next_multiple_of(4);
    let count = usize::try_from(padded - length).unwrap_or_default();
    out.write_all(&[0; 3][..count.min(3)])?;
    Ok(padded)
}

/// Writes `archives`, compressed or not, one after the other, so that the kernel unpacks them in this order.
///
/// # Errors
/// What reading or writing says.
pub fn concatenate<R: Read>(
    archives: impl IntoIterator<Item = R>,
    out: &mut impl Write,
) -> std::io::Result<u64> {
    let mut length = 0;
    for mut archive in archives {
        length = pad(length, out)?;
        length += std::io::copy(&mut archive, out)?;
    }
    Ok(length)
}

/// The names of one inode, on the way through the archive.
struct LinkSet {
    names: u32,
    written: u32,
    inode: u32,
}

/// The fields that vary, in the order of the format.
#[derive(Default)]
struct Header {
    inode: u32,
    mode: u32,
    uid: u32,
    gid: u32,
    links: u32,
    mtime: u32,
    size: u32,
    device: (u32, u32),
}

struct Archive<'a, W> {
    out: W,
    buffer: Vec<u8>,
    contents: &'a dyn Contents,
    inodes: u32,
}

impl<W: Write> Archive<'_, W> {
    fn entry(&mut self, path: &TreePath, node: &Node, set: Option<&mut LinkSet>) -> Result<(), CpioError> {
        let unrepresentable = |what| CpioError::Unrepresentable { path: path.clone(), what };
        let Meta { mode, uid, gid, mtime, .. } = node.meta;
        let mut header = Header {
            mode: file_type(&node.kind) | u32::from(mode),
            uid,
            gid,
            mtime: u32::try_from(mtime.seconds).map_err(|_| unrepresentable("modification time"))?,
            // A folder's count is not read by anyone; two is that of an empty one.
            links: if matches!(node.kind, Kind::Directory) { 2 } else { 1 },
            ..Header::default()
        };
        let is_first = set.as_ref().is_none_or(|set| set.written == 0);
        self.inodes += u32::from(is_first);
        header.inode = self.inodes;
        // The last name of a set carries the content: the kernel takes any, GNU cpio looks there.
        let mut carries_content = true;
        if let Some(set) = set {
            if is_first {
                set.inode = header.inode;
            }
            set.written += 1;
            (header.inode, header.links) = (set.inode, set.names);
            carries_content = set.written == set.names;
        }
        let name = if path.is_root() { b"." } else { path.as_bytes() };
        match &node.kind {
            Kind::File { digest, size } if carries_content => {
                header.size = u32::try_from(*size).map_err(|_| unrepresentable("size"))?;
                self.header(name, &header)?;
                let file = Expected { path, digest, size: *size };
                content::copy(self.contents, &file, &mut self.buffer, |piece| self.out.write_all(piece))?;
                self.pad(*size)
            }
            // Each name of a symbolic link carries the text: the kernel does not look for links among them.
            Kind::Symlink(text) => {
                header.size = u32::try_from(text.len()).map_err(|_| unrepresentable("link text"))?;
                self.header(name, &header)?;
                self.bytes(text)?;
                self.pad(text.len() as u64)
            }
            Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor } => {
                header.device = (*major, *minor);
                self.header(name, &header)
            }
            Kind::File { .. } | Kind::Directory | Kind::HardLink(_) | Kind::Fifo | Kind::Socket => {
                self.header(name, &header)
            }
        }
    }

    /// The header, the name with its NUL, and the padding after them.
    fn header(&mut self, name: &[u8], header: &Header) -> Result<(), CpioError> {
        let Header { inode, mode, uid, gid, links, mtime, size, device: (major, minor) } = header;
        let name_bytes = name.len() + 1;
        let text = format!(
            "070701{inode:08x}{mode:08x}{uid:08x}{gid:08x}{links:08x}{mtime:08x}{size:08x}{:08x}{:08x}{major:08x}\
             {minor:08x}{name_bytes:08x}{:08x}",
            0, 0, 0
        );
        self.bytes(text.as_bytes())?;
        self.bytes(name)?;
        self.bytes(&[0])?;
        self.pad((text.len() + name_bytes) as u64)
    }

    /// Fills up to a multiple of four after `length` bytes.
    fn pad(&mut self, length: u64) -> Result<(), CpioError> {
        Ok(pad(length, &mut self.out).map(drop).map_err(ContentError::Write)?)
    }

    fn bytes(&mut self, bytes: &[u8]) -> Result<(), CpioError> {
        Ok(self.out.write_all(bytes).map_err(ContentError::Write)?)
    }
}

/// The type bits of `st_mode` (`stat.h`).
fn file_type(kind: &Kind) -> u32 {
    match kind {
        Kind::Fifo => 0o010_000,
        Kind::CharDevice { .. } => 0o020_000,
        Kind::Directory => 0o040_000,
        Kind::BlockDevice { .. } => 0o060_000,
        Kind::File { .. } | Kind::HardLink(_) => 0o100_000,
        Kind::Symlink(_) => 0o120_000,
        Kind::Socket => 0o140_000,
    }
}
