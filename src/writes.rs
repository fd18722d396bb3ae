//! The one door through which files of the store, of WORK and of what steps are shown are made, written, synced, renamed
//! and removed; but for locks, what keepers leave word in, and scratch disks, which have no name.
//!
//! It does what is asked and nothing else. A test can stand in it ([`watch`]) and let the Nth operation fail, or kill
//! the process before or after it; where nobody does, an operation costs one load more than without the door. It knows
//! no format and no folder: the store, the merge and views say what is to be done.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::Deref;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use tempfile::NamedTempFile;

/// One operation that changes something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act<'a> {
    /// A file, a link or a folder is made: before, perhaps only the folder that it will be in is known; after, its name.
    Make(&'a Path),
    /// So many bytes are written to a file.
    Write(&'a Path, usize),
    /// A file or folder is made to survive a power failure.
    Sync(&'a Path),
    /// All of a file system is.
    SyncAll(&'a Path),
    /// A file or folder gets another name.
    Rename(&'a Path, &'a Path),
    /// A file or folder is removed.
    Remove(&'a Path),
    /// An open file is dated.
    Date,
    /// The length or the mode of a file is set, or, by cloning another, all of it.
    Set(&'a Path),
}

/// Somebody who stands in the door.
pub trait Watcher: Send + Sync {
    /// Called before an operation. Gives how many bytes of a write may be written.
    ///
    /// # Errors
    /// The operation fails with it, and is not done.
    fn before(&self, act: &Act<'_>) -> io::Result<usize>;

    /// Called after an operation that went well.
    fn after(&self, act: &Act<'_>);
}

static WATCHER: OnceLock<Box<dyn Watcher>> = OnceLock::new();

/// Puts `watcher` in the door, for as long as the process lives. False where one is there already.
pub fn watch(watcher: Box<dyn Watcher>) -> bool {
    WATCHER.set(watcher).is_ok()
}

/// Does the operation `act` by `does`.
///
/// # Errors
/// Its own.
pub fn through<T>(act: Act<'_>, does: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let Some(watcher) = WATCHER.get() else { return does() };
    watcher.before(&act)?;
    let done = does()?;
    watcher.after(&act);
    Ok(done)
}

/// Writes some of `bytes` to `file`, whose name is `path`.
///
/// # Errors
/// What write(2) says.
pub fn write(file: &mut impl Write, path: &Path, bytes: &[u8]) -> io::Result<usize> {
    let Some(watcher) = WATCHER.get() else { return file.write(bytes) };
    let act = Act::Write(path, bytes.len());
    let most = watcher.before(&act)?.min(bytes.len());
    let count = file.write(&bytes[..most])?;
    watcher.after(&act);
    Ok(count)
}

/// Makes the folder `path` and those above it where they are missing.
///
/// # Errors
/// What mkdir(2) says.
pub fn make_folders(path: &Path) -> io::Result<()> {
    make_folders_of(path, 0o777)
}

/// The same for nobody but this user.
///
/// # Errors
/// What mkdir(2) says.
pub fn make_private_folders(path: &Path) -> io::Result<()> {
    make_folders_of(path, 0o700)
}

fn make_folders_of(path: &Path, mode: u32) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(above) = path.parent().filter(|above| !above.as_os_str().is_empty()) {
        make_folders_of(above, mode)?;
    }
    match make_folder(path, mode) {
        // Another process was quicker.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(rustix::io::Errno::NOTDIR.into()),
        made => made,
    }
}

/// Makes the folder `path`.
///
/// # Errors
/// What mkdir(2) says.
pub fn make_folder(path: &Path, mode: u32) -> io::Result<()> {
    through(Act::Make(path), || fs::DirBuilder::new().mode(mode).create(path))
}

/// Makes an empty folder of this user's alone in `area`. Its name begins with `prefix`.
///
/// # Errors
/// What mkdir(2) says.
pub fn make_folder_in(area: &Path, prefix: &str) -> io::Result<PathBuf> {
    let mode = fs::Permissions::from_mode(0o700);
    let make = || tempfile::Builder::new().prefix(prefix).permissions(mode).tempdir_in(area);
    made_in(area, || Ok(make()?.keep()), |path| path)
}

/// Makes the symbolic link `path`.
///
/// # Errors
/// What symlink(2) says.
pub fn make_link(text: &OsStr, path: &Path) -> io::Result<()> {
    through(Act::Make(path), || symlink(text, path))
}

/// Makes the file `path`, which nobody has yet and is there to be written.
///
/// # Errors
/// What open(2) says.
pub fn create_new(path: &Path, mode: u32) -> io::Result<File> {
    let mut options = File::options();
    options.write(true).create_new(true).mode(mode);
    through(Act::Make(path), || options.open(path))
}

/// Makes something in `folder` whose name is known when it is there.
fn made_in<T>(
    folder: &Path,
    make: impl FnOnce() -> io::Result<T>,
    path: impl FnOnce(&T) -> &Path,
) -> io::Result<T> {
    let watcher = WATCHER.get();
    if let Some(watcher) = watcher {
        watcher.before(&Act::Make(folder))?;
    }
    let made = make()?;
    if let Some(watcher) = watcher {
        watcher.after(&Act::Make(path(&made)));
    }
    Ok(made)
}

/// Makes the file `path`, which may be there and is empty then.
///
/// # Errors
/// What open(2) says.
pub fn create(path: &Path) -> io::Result<File> {
    through(Act::Make(path), || File::create(path))
}

/// Sets the mode of `file`, whose name is `path`.
///
/// # Errors
/// What fchmod(2) says.
pub fn set_mode(file: &File, path: &Path, mode: u32) -> io::Result<()> {
    through(Act::Set(path), || file.set_permissions(fs::Permissions::from_mode(mode)))
}

/// Sets the mode of the folder `path`.
///
/// # Errors
/// What chmod(2) says.
pub fn set_folder_mode(path: &Path, mode: u32) -> io::Result<()> {
    through(Act::Set(path), || fs::set_permissions(path, fs::Permissions::from_mode(mode)))
}

/// Sets the length of `file`, whose name is `path`.
///
/// # Errors
/// What ftruncate(2) says.
pub fn set_length(file: &File, path: &Path, length_bytes: u64) -> io::Result<()> {
    through(Act::Set(path), || file.set_len(length_bytes))
}

/// Renames.
///
/// # Errors
/// What rename(2) says.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    through(Act::Rename(from, to), || fs::rename(from, to))
}

/// Removes a file; one that is gone is no error.
///
/// # Errors
/// What unlink(2) says.
pub fn remove(path: &Path) -> io::Result<()> {
    match through(Act::Remove(path), || fs::remove_file(path)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Removes an empty folder.
///
/// # Errors
/// What rmdir(2) says.
pub fn remove_folder(path: &Path) -> io::Result<()> {
    through(Act::Remove(path), || fs::remove_dir(path))
}

/// Removes a folder with all that is in it.
///
/// # Errors
/// What unlink(2) and rmdir(2) say.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    through(Act::Remove(path), || fs::remove_dir_all(path))
}

/// Makes `file`, whose name is `path`, survive a power failure.
///
/// # Errors
/// What fsync(2) says.
pub fn sync(file: &File, path: &Path) -> io::Result<()> {
    through(Act::Sync(path), || file.sync_all())
}

/// Makes the names in the folder `path` survive a power failure.
///
/// # Errors
/// What fsync(2) says.
pub fn sync_folder(path: &Path) -> io::Result<()> {
    sync(&File::open(path)?, path)
}

/// Makes all of the file system survive one on which the open folder `folder` lies, whose name is `path`.
///
/// # Errors
/// What syncfs(2) says.
pub fn sync_all(folder: &File, path: &Path) -> io::Result<()> {
    through(Act::SyncAll(path), || Ok(rustix::fs::syncfs(folder)?))
}

/// An open file that is written through the door.
#[derive(Debug)]
pub struct Through<'a>(&'a File, &'a Path);

impl<'a> Through<'a> {
    /// `file`, whose name is `path`.
    pub fn new(file: &'a File, path: &'a Path) -> Self {
        Self(file, path)
    }
}

impl Write for Through<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        write(&mut self.0, self.1, bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A folder that goes with all that is in it when this is dropped.
#[derive(Debug)]
pub struct Folder(PathBuf);

impl Folder {
    /// An empty one of this user's alone in `area`, whose name begins with `prefix`.
    ///
    /// # Errors
    /// What mkdir(2) says.
    pub fn new_in(area: &Path, prefix: &str) -> io::Result<Self> {
        make_folder_in(area, prefix).map(Self)
    }
}

impl Deref for Folder {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = remove_tree(&self.0);
    }
}

/// A file that has no name of its own yet, and is gone with this where it never gets one.
#[derive(Debug)]
pub struct Unfinished {
    file: NamedTempFile,
}

impl Unfinished {
    /// An empty one in `folder`.
    ///
    /// # Errors
    /// What open(2) says.
    pub fn new_in(folder: &Path) -> io::Result<Self> {
        Self::with_prefix_in(".tmp", folder)
    }

    /// An empty one in `folder` whose name begins with `prefix`, by which whoever finds it knows whose it was.
    ///
    /// # Errors
    /// What open(2) says.
    pub fn with_prefix_in(prefix: &str, folder: &Path) -> io::Result<Self> {
        let file = made_in(folder, || NamedTempFile::with_prefix_in(prefix, folder), NamedTempFile::path)?;
        Ok(Self { file })
    }

    /// The file.
    pub fn file(&self) -> &File {
        self.file.as_file()
    }

    /// The file, to be written by who must seek in it.
    pub fn file_mut(&mut self) -> &mut File {
        self.file.as_file_mut()
    }

    /// Where it is now.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Sets its mode.
    ///
    /// # Errors
    /// What fchmod(2) says.
    pub fn set_mode(&self, mode: u32) -> io::Result<()> {
        set_mode(self.file.as_file(), self.file.path(), mode)
    }

    /// Makes what was written survive a power failure.
    ///
    /// # Errors
    /// What fsync(2) says.
    pub fn sync(&self) -> io::Result<()> {
        sync(self.file.as_file(), self.file.path())
    }

    /// Gives it the name `path`, in place of what has it.
    ///
    /// # Errors
    /// What rename(2) says; the file is gone then.
    pub fn persist(self, path: &Path) -> io::Result<()> {
        let from: PathBuf = self.file.path().to_owned();
        through(Act::Rename(&from, path), || self.file.persist(path).map(drop).map_err(|error| error.error))
    }
}

impl Write for Unfinished {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let path = self.file.path().to_owned();
        write(self.file.as_file_mut(), &path, bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
