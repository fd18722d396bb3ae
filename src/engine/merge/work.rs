//! WORK as a place to put files: every operation goes from its descriptor, one component at a time, and follows no
//! link. What a person or an earlier step left in the way is seen, never walked through.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use kiln_artifact::tree::TreePath;
use kiln_digest::Digest;
use kiln_virtio::fs::fingerprint_of;
use kiln_virtio::fs::record::Fingerprint;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::cache::ledger::Identity;
use crate::writes::{self, Act};

/// What stands at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Seen {
    /// Nothing.
    Nothing,
    /// A file or a symbolic link, and what it looked like before it was read.
    Leaf(Identity, Fingerprint),
    /// A folder.
    Folder,
    /// Something that is neither, such as a device.
    Other,
    /// Something on the way to it is no folder.
    Blocked(TreePath),
}

/// An open WORK.
#[derive(Debug)]
pub(super) struct Work {
    top: OwnedFd,
    path: PathBuf,
}

const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

fn name(bytes: &[u8]) -> &OsStr {
    OsStr::from_bytes(bytes)
}

/// What the last component of `path` looks like in the folder `parent`.
fn fingerprint(parent: BorrowedFd<'_>, path: &TreePath) -> Option<Fingerprint> {
    let stat = rustix::fs::statat(parent, name(path.name()), AtFlags::SYMLINK_NOFOLLOW);
    stat.ok().map(|stat| fingerprint_of(&stat))
}

impl Work {
    /// The WORK whose directory `top` is. `path` is what it is called.
    pub fn new(top: OwnedFd, path: PathBuf) -> Self {
        Self { top, path }
    }

    /// What `path`, which is not the top, looks like; none where nothing is there.
    pub fn fingerprint(&self, path: &TreePath) -> Option<Fingerprint> {
        let parent = self.parent(path).ok()?.ok()?;
        fingerprint(parent.as_fd(), path)
    }

    /// What a path in it is called.
    fn called(&self, path: &TreePath) -> PathBuf {
        self.path.join(name(path.as_bytes()))
    }

    fn child(folder: BorrowedFd<'_>, component: &[u8]) -> io::Result<OwnedFd> {
        Ok(rustix::fs::openat(folder, name(component), FOLDER, Mode::empty())?)
    }

    /// The folder at `path`, or what is there in its stead: `Err(Ok(…))`.
    fn folder(&self, path: &TreePath) -> io::Result<Result<OwnedFd, Seen>> {
        let mut folder = self.top.try_clone()?;
        let mut walked = TreePath::root();
        for component in path.components() {
            walked = walked.join(component).map_err(|_| io::ErrorKind::InvalidInput)?;
            folder = match Self::child(folder.as_fd(), component) {
                Ok(child) => child,
                Err(error) => {
                    return match Errno::from_io_error(&error) {
                        Some(Errno::NOENT) => Ok(Err(Seen::Nothing)),
                        Some(Errno::NOTDIR | Errno::LOOP) => Ok(Err(Seen::Blocked(walked))),
                        _ => Err(error),
                    };
                }
            };
        }
        Ok(Ok(folder))
    }

    /// The folder that holds `path`, which is not the top.
    fn parent(&self, path: &TreePath) -> io::Result<Result<OwnedFd, Seen>> {
        self.folder(&path.parent().unwrap_or_else(TreePath::root))
    }

    /// What stands at `path`. Files are read whole.
    pub fn look(&self, path: &TreePath) -> io::Result<Seen> {
        if path.is_root() {
            return Ok(Seen::Folder);
        }
        let parent = match self.parent(path)? {
            Ok(parent) => parent,
            Err(seen) => return Ok(seen),
        };
        let stat = match rustix::fs::statat(&parent, name(path.name()), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(Seen::Nothing),
            Err(errno) => return Err(errno.into()),
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => Ok(Seen::Folder),
            FileType::Symlink => {
                let text = rustix::fs::readlinkat(&parent, name(path.name()), Vec::new())?;
                Ok(Seen::Leaf(Identity::link(text.as_bytes()), fingerprint_of(&stat)))
            }
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let file = File::from(rustix::fs::openat(&parent, name(path.name()), flags, Mode::empty())?);
                let (digest, _) = Digest::of_reader(file)?;
                Ok(Seen::Leaf(Identity::file(digest, stat.st_mode), fingerprint_of(&stat)))
            }
            _ => Ok(Seen::Other),
        }
    }

    /// All that is no folder at and beneath the folder `path`.
    pub fn leaves(&self, path: &TreePath) -> io::Result<Vec<TreePath>> {
        let mut leaves = Vec::new();
        let mut folders = vec![path.clone()];
        while let Some(path) = folders.pop() {
            let Ok(folder) = self.folder(&path)? else { continue };
            for entry in Dir::read_from(&folder)? {
                let entry = entry?;
                if matches!(entry.file_name().to_bytes(), b"." | b"..") {
                    continue;
                }
                let inner =
                    path.join(entry.file_name().to_bytes()).map_err(|_| io::ErrorKind::InvalidInput)?;
                let stat = rustix::fs::statat(&folder, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW)?;
                match FileType::from_raw_mode(stat.st_mode) {
                    FileType::Directory => folders.push(inner),
                    _ => leaves.push(inner),
                }
            }
        }
        Ok(leaves)
    }

    /// Makes the folder `path` and those above it where they are missing; a new one gets `mode`.
    pub fn make_folder(&self, path: &TreePath, mode: u32) -> io::Result<()> {
        let mut folder = self.top.try_clone()?;
        let depth = path.components().count();
        let mut called = self.path.clone();
        for (index, component) in path.components().enumerate() {
            called.push(name(component));
            let made = writes::through(Act::Make(&called), || {
                match rustix::fs::mkdirat(&folder, name(component), Mode::from_raw_mode(0o755)) {
                    Err(Errno::EXIST) => Ok(Err(Errno::EXIST)),
                    made => Ok(Ok(made?)),
                }
            })?;
            match made {
                Ok(()) if index + 1 == depth => {
                    let mode = Mode::from_raw_mode((mode & 0o755) | 0o700);
                    let set = || rustix::fs::chmodat(&folder, name(component), mode, AtFlags::empty());
                    writes::through(Act::Set(&called), || Ok(set()?))?;
                }
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno.into()),
            }
            folder = Self::child(folder.as_fd(), component)?;
        }
        Ok(())
    }

    /// Renames `staged` in the open folder `staging`, whose path is `folder`, to `path`, and says what that looks like then.
    /// What was renamed before is no error.
    pub fn place(
        &self,
        (staging, folder): (BorrowedFd<'_>, &Path),
        staged: &str,
        path: &TreePath,
    ) -> io::Result<Option<Fingerprint>> {
        if let Some(above) = path.parent() {
            self.make_folder(&above, 0o755)?;
        }
        let Ok(parent) = self.parent(path)? else { return Err(io::ErrorKind::NotADirectory.into()) };
        let called = self.called(path);
        writes::through(Act::Rename(&folder.join(staged), &called), || {
            match rustix::fs::renameat(staging, staged, &parent, name(path.name())) {
                Ok(()) | Err(Errno::NOENT) => Ok(()),
                Err(errno) => Err(errno.into()),
            }
        })?;
        Ok(fingerprint(parent.as_fd(), path))
    }

    /// Removes the leaf at `path` and the folders above it that are empty then. What is gone is no error.
    pub fn remove(&self, path: &TreePath) -> io::Result<()> {
        let Ok(parent) = self.parent(path)? else { return Ok(()) };
        let called = self.called(path);
        writes::through(Act::Remove(&called), || {
            match rustix::fs::unlinkat(&parent, name(path.name()), AtFlags::empty()) {
                // A folder has taken its place already, when an interrupted merge is completed.
                Ok(()) | Err(Errno::NOENT | Errno::ISDIR) => Ok(()),
                Err(errno) => Err(errno.into()),
            }
        })?;
        let mut above = path.parent();
        while let Some(folder) = above.filter(|folder| !folder.is_root()) {
            if !self.remove_folder(&folder)? {
                break;
            }
            above = folder.parent();
        }
        Ok(())
    }

    /// Removes the folder `path` if it is empty, and says whether it is gone.
    pub fn remove_folder(&self, path: &TreePath) -> io::Result<bool> {
        let Ok(parent) = self.parent(path)? else { return Ok(true) };
        let called = self.called(path);
        writes::through(Act::Remove(&called), || {
            match rustix::fs::unlinkat(&parent, name(path.name()), AtFlags::REMOVEDIR) {
                Ok(()) | Err(Errno::NOENT) => Ok(true),
                Err(Errno::NOTEMPTY | Errno::EXIST | Errno::NOTDIR) => Ok(false),
                Err(errno) => Err(errno.into()),
            }
        })
    }

    /// Removes a folder that holds nothing but folders. Anything else in it stays, and so does it.
    pub fn remove_empty_folders(&self, path: &TreePath) -> io::Result<()> {
        let mut order = vec![path.clone()];
        let mut next = 0;
        while let Some(path) = order.get(next).cloned() {
            next += 1;
            let Ok(folder) = self.folder(&path)? else { continue };
            for entry in Dir::read_from(&folder)? {
                let entry = entry?;
                let bytes = entry.file_name().to_bytes();
                if !matches!(bytes, b"." | b"..") && entry.file_type() == FileType::Directory {
                    order.push(path.join(bytes).map_err(|_| io::ErrorKind::InvalidInput)?);
                }
            }
        }
        for path in order.iter().rev() {
            self.remove_folder(path)?;
        }
        Ok(())
    }
}
