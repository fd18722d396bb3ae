//! One folder, held open, whose files are read and written without following a link: of SECRETS, of WORK or of
//! configuration.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;

/// What files that are not finished begin with; the next kiln that signs sweeps them.
const UNFINISHED: &str = ".kiln-sign-";

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// The system's word.
    #[error("cannot {what} `{path}`")]
    System {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// Others could read or change what only its owner may.
    #[error("`{path}` {fault}")]
    Open {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        fault: &'static str,
        /// What makes it right.
        fix: &'static str,
    },
    /// A file that is far too long for what it should be.
    #[error("`{path}` is longer than {limit_bytes} bytes")]
    TooLong {
        /// The file.
        path: PathBuf,
        /// What it may have.
        limit_bytes: u64,
    },
}

impl FolderError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Open { path, fix, .. } => Some(format!("{fix} {}", path.display())),
            _ => None,
        }
    }
}

/// An open folder.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    top: OwnedFd,
}

impl Folder {
    /// Opens the folder at `path`, which may be a link.
    pub fn open(path: &Path) -> Result<Self, FolderError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let top =
            rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| system("open", path, errno))?;
        Ok(Self { path: path.to_owned(), top })
    }

    /// The folder `name` in this one, which must be no link.
    pub fn folder(&self, name: &Path) -> Result<Self, FolderError> {
        let path = self.path.join(name);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let top = self.beneath(name, flags).map_err(|errno| system("open", &path, errno))?;
        Ok(Self { path, top })
    }

    /// The same, made first where it is missing; what holds it must be there.
    pub fn made(&self, name: &Path) -> Result<Self, FolderError> {
        let path = self.path.join(name);
        match rustix::fs::mkdirat(&self.top, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => self.folder(name),
            Err(errno) => Err(system("make", &path, errno)),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn beneath(&self, name: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(&self.top, name, flags, Mode::empty(), resolve)
    }

    /// Checks that only its owner, who is this user, can put something into the folder.
    pub fn check_private(&self) -> Result<(), FolderError> {
        let stat = rustix::fs::fstat(&self.top).map_err(|errno| system("look at", &self.path, errno))?;
        let open = |fault, fix| FolderError::Open { path: self.path.clone(), fault, fix };
        if stat.st_uid != rustix::process::geteuid().as_raw() {
            return Err(open("belongs to another user, who could change what is in it", "chown $(id -u)"));
        }
        if stat.st_mode & 0o022 != 0 {
            return Err(open("can be written by others, who could change what is in it", "chmod go-w"));
        }
        Ok(())
    }

    /// Its permissions.
    pub fn mode(&self) -> Result<u32, FolderError> {
        let stat = rustix::fs::fstat(&self.top).map_err(|errno| system("look at", &self.path, errno))?;
        Ok(stat.st_mode & 0o7777)
    }

    /// What `name` in it is; links are not followed.
    pub fn kind(&self, name: &Path) -> Result<FileType, FolderError> {
        let stat = rustix::fs::statat(&self.top, name, AtFlags::SYMLINK_NOFOLLOW);
        let stat = stat.map_err(|errno| system("look at", &self.path.join(name), errno))?;
        Ok(FileType::from_raw_mode(stat.st_mode))
    }

    /// The text of the link `name` in it.
    pub fn link(&self, name: &Path) -> Result<Vec<u8>, FolderError> {
        let text = rustix::fs::readlinkat(&self.top, name, Vec::new());
        Ok(text.map_err(|errno| system("read", &self.path.join(name), errno))?.into_bytes())
    }

    /// Opens the file `name` for reading.
    pub fn file(&self, name: &Path) -> Result<File, FolderError> {
        let path = self.path.join(name);
        // A FIFO must not make kiln wait.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(self.beneath(name, flags).map_err(|errno| system("open", &path, errno))?);
        let metadata = file.metadata().map_err(|source| FolderError::System {
            what: "look at",
            path: path.clone(),
            source,
        })?;
        if metadata.is_file() {
            Ok(file)
        } else {
            Err(FolderError::System { what: "read", path, source: io::Error::other("it is no regular file") })
        }
    }

    /// Reads the file `name`, of at most `limit_bytes`, once and whole.
    pub fn read(&self, name: &Path, limit_bytes: u64) -> Result<Vec<u8>, FolderError> {
        self.read_opened(name, self.file(name)?, limit_bytes)
    }

    /// The same of a file that none but its owner may write.
    pub fn read_guarded(&self, name: &Path, limit_bytes: u64) -> Result<Vec<u8>, FolderError> {
        self.read_opened(name, self.guarded(name)?, limit_bytes)
    }

    /// Reads `file`, which is the file `name` and was opened before, as [`Folder::read`] does.
    pub fn read_opened(&self, name: &Path, file: File, limit_bytes: u64) -> Result<Vec<u8>, FolderError> {
        let path = self.path.join(name);
        let length = file.metadata().map_or(0, |metadata| metadata.len());
        // Before it is read: the limit of images is more than a host may have memory.
        if length > limit_bytes {
            return Err(FolderError::TooLong { path, limit_bytes });
        }
        let failed = |source| FolderError::System { what: "read", path: path.clone(), source };
        // Room for all of it at once, where the host has that: kernels and initrds are tens of megabytes.
        let mut bytes = Vec::new();
        let room_bytes = usize::try_from(length).unwrap_or(usize::MAX).saturating_add(1);
        let room = bytes.try_reserve_exact(room_bytes);
        room.map_err(|_| failed(io::ErrorKind::OutOfMemory.into()))?;
        file.take(limit_bytes.saturating_add(1)).read_to_end(&mut bytes).map_err(failed)?;
        if u64::try_from(bytes.len()).is_ok_and(|length| length > limit_bytes) {
            return Err(FolderError::TooLong { path, limit_bytes });
        }
        Ok(bytes)
    }

    /// Checks that the file `name` is one that only its owner, who is this user, can read or write, under one name.
    pub fn check_secret(&self, name: &Path) -> Result<(), FolderError> {
        let path = self.path.join(name);
        let open = |fault, fix| FolderError::Open { path: path.clone(), fault, fix };
        let file = match self.file(name) {
            Err(FolderError::System { source, .. }) if Errno::from_io_error(&source) == Some(Errno::LOOP) => {
                return Err(open("is a symbolic link, not a key", "put the key itself at"));
            }
            file => file?,
        };
        let metadata = file.metadata().map_err(|source| FolderError::System {
            what: "look at",
            path: path.clone(),
            source,
        })?;
        if metadata.uid() != rustix::process::geteuid().as_raw() {
            return Err(open("belongs to another user", "chown $(id -u)"));
        }
        if metadata.mode() & 0o077 != 0 {
            return Err(open("can be read or written by others", "chmod 600"));
        }
        if metadata.nlink() != 1 {
            return Err(open(
                "has another name somewhere (a hard link)",
                "look for other links to, and copy",
            ));
        }
        Ok(())
    }

    /// Opens the file `name` for reading, which others may read and none but its owner write.
    pub fn guarded(&self, name: &Path) -> Result<File, FolderError> {
        let path = self.path.join(name);
        let file = self.file(name)?;
        let metadata = file.metadata();
        let metadata =
            metadata.map_err(|source| FolderError::System { what: "look at", path: path.clone(), source })?;
        if metadata.mode() & 0o022 != 0 {
            let fault = "can be written by others, who could change what is in it";
            return Err(FolderError::Open { path, fault, fix: "chmod go-w" });
        }
        Ok(file)
    }

    /// Whether `name` is there.
    pub fn has(&self, name: impl AsRef<Path>) -> bool {
        let name = name.as_ref();
        rustix::fs::statat(&self.top, name, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> Result<bool, FolderError> {
        Ok(self.names()?.is_empty())
    }

    /// The names in it, sorted.
    pub fn names(&self) -> Result<Vec<Vec<u8>>, FolderError> {
        let read = |errno| system("read", &self.path, errno);
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.top).map_err(read)? {
            let name = entry.map_err(read)?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// Writes `bytes` beside where they go, synced; [`put`] gives them their name.
    pub fn write<'a>(&'a self, name: &str, bytes: &[u8], mode: u32) -> Result<Unfinished<'a>, FolderError> {
        let unfinished = format!("{UNFINISHED}{}-{name}", std::process::id());
        let path = self.path.join(&unfinished);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.top, &unfinished, flags, Mode::from_raw_mode(mode));
        let mut file = File::from(file.map_err(|errno| system("make", &path, errno))?);
        // Removed again where writing fails.
        let handle = Unfinished { folder: self, unfinished, name: name.to_owned() };
        file.write_all(bytes)
            .and_then(|()| Ok(rustix::fs::fchmod(&file, Mode::from_raw_mode(mode))?))
            .and_then(|()| file.sync_all())
            .map_err(|source| FolderError::System { what: "write", path, source })?;
        Ok(handle)
    }

    /// Removes what signers left that were killed. The caller knows that no other signs here now.
    pub fn sweep(&self) -> Result<(), FolderError> {
        for name in self.names()?.into_iter().filter(|name| name.starts_with(UNFINISHED.as_bytes())) {
            let _ = rustix::fs::unlinkat(&self.top, name, AtFlags::empty());
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), FolderError> {
        rustix::fs::fsync(&self.top).map_err(|errno| system("sync", &self.path, errno))
    }
}

/// A file that is whole and has not its name yet; it goes where it never gets it.
#[derive(Debug)]
pub(super) struct Unfinished<'a> {
    folder: &'a Folder,
    unfinished: String,
    name: String,
}

/// How a file got its name, and so how it loses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Put {
    /// Nothing had it.
    New,
    /// What had it has the unfinished one now.
    Exchanged,
    /// What had it is gone: the file system cannot exchange names.
    Replaced,
}

/// Gives all `files` their names, in place of files that had them, or none: where one cannot get its name, those before it
/// lose theirs again.
pub(super) fn put(files: Vec<Unfinished<'_>>) -> Result<(), FolderError> {
    let mut done: Vec<(&Unfinished<'_>, Put)> = Vec::new();
    for file in &files {
        match file.put() {
            Ok(put) => done.push((file, put)),
            Err(error) => {
                done.iter().rev().for_each(|(file, put)| file.take_back(*put));
                return Err(error);
            }
        }
    }
    files.iter().try_for_each(|file| file.folder.sync())
}

impl Unfinished<'_> {
    fn put(&self) -> Result<Put, FolderError> {
        let path = self.folder.path.join(&self.name);
        let there = match rustix::fs::statat(&self.folder.top, &self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {
                return Err(system("write", &path, Errno::ISDIR));
            }
            Ok(_) => true,
            Err(Errno::NOENT) => false,
            Err(errno) => return Err(system("look at", &path, errno)),
        };
        let top = &self.folder.top;
        let put = match there {
            false => {
                let (from, to) = (Path::new(&self.unfinished), Path::new(&self.name));
                rename_to_new(top, from, to).map(|()| Put::New)
            }
            true => match self.exchange() {
                Ok(()) => Ok(Put::Exchanged),
                Err(Errno::INVAL | Errno::NOSYS) => {
                    rustix::fs::renameat(top, &self.unfinished, top, &self.name).map(|()| Put::Replaced)
                }
                Err(errno) => Err(errno),
            },
        };
        put.map_err(|errno| system("write", &path, errno))
    }

    fn exchange(&self) -> Result<(), Errno> {
        let top = &self.folder.top;
        rustix::fs::renameat_with(top, &self.unfinished, top, &self.name, RenameFlags::EXCHANGE)
    }

    fn take_back(&self, put: Put) {
        let top = &self.folder.top;
        // What fails here leaves a whole file, and the error that led here is the one to know.
        let _ = match put {
            Put::New => rustix::fs::renameat(top, &self.name, top, &self.unfinished),
            Put::Exchanged => self.exchange(),
            Put::Replaced => Ok(()),
        };
    }
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        let _ = rustix::fs::unlinkat(&self.folder.top, &self.unfinished, AtFlags::empty());
    }
}

/// Gives `from` the name `to`, which nothing may have (`EXIST`), both in `top`.
pub(super) fn rename_to_new(top: impl AsFd + Copy, from: &Path, to: &Path) -> Result<(), Errno> {
    match rustix::fs::renameat_with(top, from, top, to, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS) => rename_after_look(top, from, to),
        done => done,
    }
}

/// The same on file systems that cannot look and rename at once, as NFS: what takes the name in between is lost, where it is
/// a file or an empty folder.
fn rename_after_look(top: impl AsFd + Copy, from: &Path, to: &Path) -> Result<(), Errno> {
    match rustix::fs::statat(top, to, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => rustix::fs::renameat(top, from, top, to),
        Ok(_) => Err(Errno::EXIST),
        Err(errno) => Err(errno),
    }
}

fn system(what: &'static str, path: &Path, errno: Errno) -> FolderError {
    FolderError::System { what, path: path.to_owned(), source: errno.into() }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_has_a_name_keeps_it_also_where_the_file_system_cannot_see_to_that_itself() {
        let folder = tempfile::tempdir().expect("a folder");
        let top = Folder::open(folder.path()).expect("a folder");
        let path = |name: &str| folder.path().join(name);
        for can_see_to_it in [true, false] {
            let rename = |to: &str| {
                let (from, to) = (Path::new("from"), Path::new(to));
                match can_see_to_it {
                    true => rename_to_new(&top.top, from, to),
                    false => rename_after_look(&top.top, from, to),
                }
            };
            fs::create_dir(path("from")).expect("a folder");
            fs::write(path("from").join("key"), "a key").expect("room");
            // An empty folder is what a rename would replace, and a link that leads nowhere is something, too.
            fs::create_dir(path("to")).expect("a folder");
            assert_eq!(rename("to"), Err(Errno::EXIST), "{can_see_to_it}");
            fs::remove_dir(path("to")).expect("it is empty");
            std::os::unix::fs::symlink("nowhere", path("to")).expect("a link");
            assert_eq!(rename("to"), Err(Errno::EXIST), "{can_see_to_it}");
            fs::remove_file(path("to")).expect("a link");
            assert_eq!(rename("to"), Ok(()), "{can_see_to_it}");
            assert_eq!(fs::read_to_string(path("to").join("key")).expect("moved"), "a key");
            assert!(!top.has("from"), "{can_see_to_it}");
            fs::remove_dir_all(path("to")).expect("there");
        }
    }
}
