//! `file:PATH` as a root. Its first bytes say what it is: a tar archive is read into a tree; a squashfs or erofs image
//! is attached as it is, and its identity is the digest of its bytes.
//!
//! What a machine sees of an image is a copy in the store (a reflink where the file system has them), and the copy
//! is what was hashed: whoever changes the file later changes no root.

use std::fs::{File, Metadata};
use std::io::{self, BufReader, Read, Seek};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use kiln_artifact::archive;
use kiln_artifact::tree::Tree;
use kiln_artifact::{erofs, squashfs};
use kiln_digest::Digest;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::decompress::Compression;
use super::image::{self, Filesystem, Image, ImageError};
use super::stat::Stat;
use super::{Root, RootError};
use crate::store::Store;
use crate::writes::Unfinished;

/// What a root archive may hold.
const ARCHIVE_LIMITS: archive::tar::Limits =
    archive::tar::Limits { members: 10_000_000, content_bytes: 1 << 40 };
/// Images are as long as a multiple of this: kernels read them by blocks, and not all tools fill up the last one.
const BLOCK_BYTES: u64 = 4096;

/// What a file was when it was looked at last.
#[derive(Debug, Serialize, Deserialize)]
struct Seen {
    stat: Stat,
    digest: Digest,
}

/// Opens a regular file, and nothing that an open would wait for or act upon.
///
/// # Errors
/// [`RootError::Read`], [`RootError::NotAFile`].
fn open(path: &Path) -> Result<(File, Metadata), RootError> {
    let fail = |source| RootError::Read { path: path.to_owned(), source };
    let mut options = File::options();
    let file = options.read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(fail)?;
    let meta = file.metadata().map_err(fail)?;
    if meta.is_dir() {
        return Err(fail(Errno::ISDIR.into()));
    }
    if !meta.is_file() {
        return Err(RootError::NotAFile(path.to_owned()));
    }
    Ok((file, meta))
}

/// The root that the file at `path` is.
///
/// # Errors
/// [`RootError`].
pub(super) fn import(store: &Store, path: &Path) -> Result<Root, RootError> {
    let (file, meta) = open(path)?;
    let fail = |source| RootError::Read { path: path.to_owned(), source };
    match filesystem(&file).map_err(fail)? {
        Some(filesystem) => Ok(Root::Image(attach(store, path, &file, &meta, filesystem)?)),
        None => Root::image(store, &read_archive(store, path, file, &meta)?),
    }
}

/// The file system that the first bytes show; none for what can only be an archive.
fn filesystem(file: &File) -> io::Result<Option<Filesystem>> {
    let starts_with = |magic: &[u8], offset| {
        let mut bytes = vec![0; magic.len()];
        match file.read_exact_at(&mut bytes, offset) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            result => result.map(|()| bytes == magic),
        }
    };
    // The first kilobyte of an erofs image is free, and so could be an archive's header.
    if starts_with(b"ustar", 257)? {
        return Ok(None);
    }
    Ok(if starts_with(b"hsqs", 0)? {
        Some(Filesystem::Squashfs)
    } else if starts_with(&0xe0f5_e1e2_u32.to_le_bytes(), 1024)? {
        Some(Filesystem::Erofs)
    } else {
        None
    })
}

/// Refuses what no kernel could mount, while its name is at hand.
fn check(path: &Path, file: &File, filesystem: Filesystem) -> Result<(), RootError> {
    let bad = |source| RootError::Image { path: path.to_owned(), filesystem, source };
    match filesystem {
        Filesystem::Erofs => erofs::ReadSuperblock::read(file).map(drop).map_err(bad),
        Filesystem::Squashfs => match squashfs::Superblock::read(file).map_err(bad)?.compression {
            compression @ squashfs::Compression::Lzma => {
                Err(RootError::Compression { path: path.to_owned(), compression })
            }
            _ => Ok(()),
        },
    }
}

/// The image in the store that has the bytes of `file`.
fn attach(
    store: &Store,
    path: &Path,
    file: &File,
    meta: &Metadata,
    filesystem: Filesystem,
) -> Result<Image, RootError> {
    check(path, file, filesystem)?;
    let io = |what| move |source| RootError::Io { what, source };
    if let Some(digest) = remembered(store, path, meta)
        && let Some(image) = Image::open(store, &digest, filesystem).map_err(io("open a root's image"))?
    {
        return Ok(image);
    }
    let digest = copy(store, path, file, meta, filesystem)?;
    Image::made(store, &digest, filesystem, || copy(store, path, file, meta, filesystem).map(drop))
}

/// Copies `file` into the store, and gives the digest of the copy.
fn copy(
    store: &Store,
    path: &Path,
    mut file: &File,
    meta: &Metadata,
    filesystem: Filesystem,
) -> Result<Digest, RootError> {
    let io = |what| move |source| RootError::Io { what, source };
    let _room = store.reserve(meta.len()).map_err(io("copy an image"))?;
    let copy = Unfinished::new_in(&store.temporary()).map_err(io("copy an image"))?;
    // Without reflinks, or on another file system: a copy within the kernel.
    if rustix::fs::ioctl_ficlone(copy.file(), file).is_err() {
        let read = |source| RootError::Read { path: path.to_owned(), source };
        file.rewind().map_err(read)?;
        io::copy(&mut file, &mut copy.file()).map_err(read)?;
    }
    copy.file().rewind().map_err(io("copy an image"))?;
    let (digest, length) = Digest::of_reader(copy.file()).map_err(io("hash an image"))?;
    unchanged(path, file, meta)?;
    let whole = length.next_multiple_of(BLOCK_BYTES);
    copy.file().set_len(whole).map_err(io("copy an image"))?;
    let place = image::image_path(store, &digest, filesystem);
    image::keep(store, copy, &digest, &place).map_err(|source| ImageError::Io { path: place, source })?;
    store.sync()?;
    remember(store, path, meta, digest).map_err(io("remember a file"))?;
    Ok(digest)
}

/// Whether `file` is what it was when `meta` was taken. If not, what was read of it may be of two minds.
fn unchanged(path: &Path, file: &File, meta: &Metadata) -> Result<(), RootError> {
    let now = file.metadata().map_err(|source| RootError::Read { path: path.to_owned(), source })?;
    if Stat::of(&now) == Stat::of(meta) { Ok(()) } else { Err(RootError::Changed(path.to_owned())) }
}

fn key(path: &Path) -> Digest {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    Digest::of(path.as_os_str().as_bytes())
}

/// The digest of the file at `path`, if it is as it was when it was hashed.
pub(super) fn remembered(store: &Store, path: &Path, meta: &Metadata) -> Option<Digest> {
    let seen: Seen = store.records("file").get(&key(path))?;
    (seen.stat == Stat::of(meta)).then_some(seen.digest)
}

/// Notes that the file at `path` had that digest when `meta` was taken of it.
///
/// # Errors
/// What writing says.
pub(super) fn remember(store: &Store, path: &Path, meta: &Metadata, digest: Digest) -> io::Result<()> {
    let stat = Stat::of(meta);
    if !stat.is_old(crate::clock::now()) {
        return Ok(());
    }
    store.records("file").put(&key(path), &Seen { stat, digest })
}

/// The digest of the file at `path`, which is read where it is not as it was when it was read last.
///
/// # Errors
/// [`RootError`] where it is no file that can be read.
pub fn digest_of_file(store: &Store, path: &Path) -> Result<Digest, RootError> {
    let (file, meta) = open(path)?;
    hashed(store, path, &file, &meta)
}

fn hashed(store: &Store, path: &Path, file: &File, meta: &Metadata) -> Result<Digest, RootError> {
    if let Some(digest) = remembered(store, path, meta) {
        return Ok(digest);
    }
    let fail = |source| RootError::Read { path: path.to_owned(), source };
    let (digest, _) = Digest::of_reader(file).map_err(fail)?;
    unchanged(path, file, meta)?;
    remember(store, path, meta, digest)
        .map_err(|source| RootError::Io { what: "remember a file", source })?;
    Ok(digest)
}

/// The tree in an archive. One that was read before is remembered by its manifest.
fn read_archive(store: &Store, path: &Path, mut file: File, meta: &Metadata) -> Result<Tree, RootError> {
    let fail = |source| RootError::Read { path: path.to_owned(), source };
    let digest = hashed(store, path, &file, meta)?;
    let key = Digest::of(format!("archive 1 {digest}").as_bytes());
    if let Some(manifest) = store.records("archive").get::<Digest>(&key)
        && let Ok(bytes) = std::fs::read(store.blobs().path(&manifest))
        && let Ok(tree) = Tree::parse_manifest(&bytes)
    {
        return Ok(tree);
    }
    file.rewind().map_err(fail)?;
    let held = file.try_clone().map_err(fail)?;
    let reader = decompressed(BufReader::new(file)).map_err(fail)?;
    let tree = archive::tar::read(reader, &mut store.blobs(), &ARCHIVE_LIMITS)
        .map_err(|source| RootError::Archive { path: PathBuf::from(path), source })?;
    unchanged(path, &held, meta)?;
    let io = |source| RootError::Io { what: "remember an archive", source };
    let (manifest, _) = store.blobs().put(&tree.manifest()[..]).map_err(io)?;
    store.sync()?;
    store.records("archive").put(&key, &manifest).map_err(io)?;
    Ok(tree)
}

/// Takes off the compression that the first bytes show.
fn decompressed(mut file: BufReader<File>) -> io::Result<Box<dyn Read>> {
    let compression = match io::BufRead::fill_buf(&mut file)? {
        [0x1f, 0x8b, ..] => Compression::Gzip,
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Compression::Xz,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
        _ => Compression::None,
    };
    compression.reader(file)
}
