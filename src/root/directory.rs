//! A host directory as a tree: every file hashed into the store, unless it is as it was when it was hashed last.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use kiln_artifact::tree::{Builder, Kind, Meta, Node, PathError, Timestamp, Tree, TreeError, TreePath};
use kiln_digest::Digest;
use kiln_virtio::fs::kernel_filesystem;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::stat::Stat;
use crate::store::Store;

/// Why a directory cannot be imported.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// Something in it cannot be read.
    #[error("cannot read `{path}`")]
    Read {
        /// What.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// It is no directory.
    #[error("`{0}` is not a directory")]
    NotADirectory(PathBuf),
    /// It shows the kernel itself, and holds no files.
    #[error("`{path}` is on {filesystem}, a file system of the kernel's own, and has no content to be kept")]
    Kernel {
        /// What was to be imported.
        path: PathBuf,
        /// The file system.
        filesystem: &'static str,
    },
    /// A file changed while it was hashed.
    #[error("`{0}` changed while it was read")]
    Changed(PathBuf),
    /// A path that a tree cannot have.
    #[error("`{path}` cannot be in a root")]
    Path {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: PathError,
    },
    /// The whole is not a tree.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// What was hashed cannot be remembered.
    #[error("the store cannot remember a directory")]
    Store(#[source] io::Error),
}

type Known = HashMap<String, (Stat, Digest)>;

impl DirectoryError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Read { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                Some("kiln reads as the user who runs it: let that user read it, or leave it out".to_owned())
            }
            Self::Kernel { .. } => Some("copy what is needed of it into a folder of its own".to_owned()),
            Self::Changed(_) => Some("try again when nothing writes to it".to_owned()),
            _ => None,
        }
    }
}

struct Import<'a> {
    store: &'a Store,
    builder: Builder,
    links: BTreeMap<(u64, u64), TreePath>,
    known: Known,
    hashed: Known,
    now: SystemTime,
}

/// Reads the directory `path` whole.
///
/// # Errors
/// [`DirectoryError`] names the first thing that cannot be read.
pub fn import(store: &Store, path: &Path) -> Result<Tree, DirectoryError> {
    let read = |source| DirectoryError::Read { path: path.to_owned(), source };
    let path = fs::canonicalize(path).map_err(read)?;
    if !path.is_dir() {
        return Err(DirectoryError::NotADirectory(path));
    }
    refuse_kernel(&path)?;
    let key = Digest::of(path.as_os_str().as_bytes());
    let mut import = Import {
        store,
        builder: Builder::new(),
        links: BTreeMap::new(),
        known: store.records("directory").get(&key).unwrap_or_default(),
        hashed: Known::new(),
        now: crate::clock::now(),
    };
    import.walk(&path)?;
    store.records("directory").put(&key, &import.hashed).map_err(DirectoryError::Store)?;
    Ok(import.builder.finish()?)
}

/// The kernel's file system that `path` is on, if it is.
fn kernel(path: &Path) -> Result<Option<&'static str>, DirectoryError> {
    let read = |errno: Errno| DirectoryError::Read { path: path.to_owned(), source: errno.into() };
    // A name is enough, and opens nothing.
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(read)?;
    kernel_filesystem(file).map_err(read)
}

fn refuse_kernel(path: &Path) -> Result<(), DirectoryError> {
    match kernel(path)? {
        Some(filesystem) => Err(DirectoryError::Kernel { path: path.to_owned(), filesystem }),
        None => Ok(()),
    }
}

impl Import<'_> {
    fn walk(&mut self, top: &Path) -> Result<(), DirectoryError> {
        let read = |source| DirectoryError::Read { path: top.to_owned(), source };
        let device = fs::symlink_metadata(top).map_err(read)?.dev();
        let mut folders = vec![(top.to_owned(), TreePath::root(), device)];
        while let Some((folder, inner, device)) = folders.pop() {
            let read = |source| DirectoryError::Read { path: folder.clone(), source };
            let meta = fs::symlink_metadata(&folder).map_err(read)?;
            let above = meta.dev();
            self.builder.put(inner.clone(), Node { kind: Kind::Directory, meta: shown(&folder, &meta)? });
            // What is mounted below is taken too, but for the kernel's own: a machine has its own in their place.
            if meta.dev() != device && kernel(&folder)?.is_some() {
                continue;
            }
            for entry in fs::read_dir(&folder).map_err(read)? {
                let path = entry.map_err(read)?.path();
                let name = path.file_name().unwrap_or_default().as_bytes();
                let inner =
                    inner.join(name).map_err(|source| DirectoryError::Path { path: path.clone(), source })?;
                let meta = fs::symlink_metadata(&path)
                    .map_err(|source| DirectoryError::Read { path: path.clone(), source })?;
                match meta.is_dir() {
                    true => folders.push((path, inner, above)),
                    false => self.leaf(&path, inner, &meta, above)?,
                }
            }
        }
        Ok(())
    }

    /// Takes up what is no folder, in a folder on `device`.
    fn leaf(
        &mut self,
        path: &Path,
        inner: TreePath,
        meta: &Metadata,
        device: u64,
    ) -> Result<(), DirectoryError> {
        if meta.dev() != device && meta.is_file() {
            refuse_kernel(path)?;
        }
        if meta.nlink() > 1 {
            if let Some(first) = self.links.get(&(meta.dev(), meta.ino())) {
                let first = first.clone();
                return match self.builder.link(inner, &first) {
                    true => Ok(()),
                    false => Err(DirectoryError::Changed(path.to_owned())),
                };
            }
            self.links.insert((meta.dev(), meta.ino()), inner.clone());
        }
        let kind = meta.file_type();
        let number = |meta: &Metadata| (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
        let kind = if kind.is_symlink() {
            let target = fs::read_link(path)
                .map_err(|source| DirectoryError::Read { path: path.to_owned(), source })?;
            Kind::Symlink(target.into_os_string().into_vec().into())
        } else if kind.is_file() {
            let (digest, size) = self.content(path, meta)?;
            Kind::File { digest, size }
        } else if kind.is_char_device() {
            let (major, minor) = number(meta);
            Kind::CharDevice { major, minor }
        } else if kind.is_block_device() {
            let (major, minor) = number(meta);
            Kind::BlockDevice { major, minor }
        } else if kind.is_fifo() {
            Kind::Fifo
        } else {
            Kind::Socket
        };
        let node = Node { kind, meta: shown(path, meta)? };
        self.builder.put(inner, node);
        Ok(())
    }

    fn content(&mut self, path: &Path, meta: &Metadata) -> Result<(Digest, u64), DirectoryError> {
        let stat = Stat::of(meta);
        let key = path.as_os_str().as_bytes().escape_ascii().to_string();
        let digest = match self.known.get(&key) {
            Some((known, digest)) if *known == stat && self.store.blobs().contains(digest) => *digest,
            _ => {
                let read = |source| DirectoryError::Read { path: path.to_owned(), source };
                let changed = || DirectoryError::Changed(path.to_owned());
                // Whatever stands there by now is not waited for.
                let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW;
                let mut file =
                    File::options().read(true).custom_flags(flags).open(path).map_err(|error| {
                        if error.raw_os_error() == Some(libc::ELOOP) { changed() } else { read(error) }
                    })?;
                if Stat::of(&file.metadata().map_err(read)?) != stat {
                    return Err(changed());
                }
                let (digest, length) = self.store.blobs().put(&mut file).map_err(read)?;
                if Stat::of(&file.metadata().map_err(read)?) != stat || length != meta.size() {
                    return Err(changed());
                }
                digest
            }
        };
        if stat.is_old(self.now) {
            self.hashed.insert(key, (stat, digest));
        }
        Ok((digest, meta.size()))
    }
}

fn shown(path: &Path, meta: &Metadata) -> Result<Meta, DirectoryError> {
    Ok(Meta {
        mode: u16::try_from(meta.mode() & 0o7777).unwrap_or_default(),
        uid: meta.uid(),
        gid: meta.gid(),
        mtime: Timestamp {
            seconds: meta.mtime(),
            nanoseconds: u32::try_from(meta.mtime_nsec()).unwrap_or_default(),
        },
        xattrs: xattrs(path)
            .map_err(|errno| DirectoryError::Read { path: path.to_owned(), source: errno.into() })?,
    })
}

fn xattrs(path: &Path) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, Errno> {
    let mut names = vec![0; 64 << 10];
    let length = match rustix::fs::llistxattr(path, &mut names[..]) {
        Err(Errno::OPNOTSUPP) => return Ok(BTreeMap::new()),
        other => other?,
    };
    let mut found = BTreeMap::new();
    for name in names[..length].split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; 64 << 10];
        let length = rustix::fs::lgetxattr(path, name, &mut value[..])?;
        value.truncate(length);
        found.insert(name.to_vec(), value);
    }
    Ok(found)
}
