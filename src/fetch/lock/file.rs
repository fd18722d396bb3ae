//! The lock as a file: read, and changed by one kiln at a time.
//!
//! Whoever changes it reads it again under a lock on its folder, so that of two kilns that lock different things at once
//! neither takes away what the other wrote. That lock is held for the moment of writing, never while something is fetched.
//! It is on the folder because the file itself is replaced.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use super::{Lock, LockError};
use crate::fetch::unfinished::{self, is_unsupported};
use crate::writes;

impl Lock {
    /// Reads the lock file at `path`; an empty lock where there is none.
    ///
    /// # Errors
    /// [`LockError`], as its variants say.
    pub fn load(path: &Path) -> Result<Self, LockError> {
        Self::text(path)?.map_or_else(|| Ok(Self::default()), |text| Self::parse(&text, path))
    }

    /// What the lock file at `path` says; none where there is none.
    ///
    /// # Errors
    /// [`LockError::Io`].
    pub fn text(path: &Path) -> Result<Option<String>, LockError> {
        match fs::read_to_string(path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(LockError::Io { path: path.to_owned(), source }),
        }
    }

    /// Lets `change` change what the file at `path` says now, replaces the file unless it says that already, and gives
    /// what `change` does.
    ///
    /// # Errors
    /// [`LockError`], as its variants say.
    pub fn change<T>(path: &Path, change: impl FnOnce(&mut Self) -> T) -> Result<T, LockError> {
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let io = |source| LockError::Io { path: path.to_owned(), source };
        let alone = File::open(folder).map_err(io)?;
        match alone.lock() {
            // Network file systems may not lock a folder: there, what another kiln writes in this moment is lost, and
            // is locked again by whoever misses it.
            Err(error) if is_unsupported(&error) => {}
            locked => locked.map_err(io)?,
        }
        let mut lock = Self::load(path)?;
        let before = lock.clone();
        let given = change(&mut lock);
        if lock != before {
            replace(path, folder, &lock.to_text()).map_err(io)?;
        }
        Ok(given)
    }
}

fn replace(path: &Path, folder: &Path, text: &str) -> io::Result<()> {
    // A link is kept, and what it leads to is replaced.
    let real = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let folder = real.parent().unwrap_or(folder);
    let mut file = unfinished::new_in(folder, ".kiln.lock.")?;
    file.write_all(text.as_bytes())?;
    // A temporary file is private; a lock file is shared like any source.
    let mode = fs::metadata(&real).map_or(0o644, |old| old.permissions().mode() & 0o7777);
    file.set_mode(mode)?;
    file.sync()?;
    file.persist(&real)?;
    // What is locked is what later builds go by: none that has ended may find the lock as it was before it.
    writes::sync_folder(folder)
}
