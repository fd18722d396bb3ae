//! A lock file that one thread of a process holds at a time: open once, since to open it takes longer than to take it.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The lock.
#[derive(Debug)]
pub struct LockFile {
    path: PathBuf,
    // Keeps other threads out, as the lock does other processes.
    file: Mutex<Option<File>>,
}

/// Somebody holds it, until this is dropped. It goes with its holder, however that ends.
#[derive(Debug)]
pub struct Held<'a>(MutexGuard<'a, Option<File>>);

impl LockFile {
    /// The one at `path`.
    pub fn new(path: PathBuf) -> Self {
        Self { path, file: Mutex::default() }
    }

    fn hold(&self, locks: impl FnOnce(&File) -> io::Result<()>) -> io::Result<Held<'_>> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let lock = match file.take() {
            Some(lock) => lock,
            None => File::options().create(true).truncate(false).write(true).open(&self.path)?,
        };
        locks(file.insert(lock))?;
        Ok(Held(file))
    }

    /// Waits until nobody has it, and keeps it so.
    ///
    /// # Errors
    /// What open(2) and flock(2) say.
    pub fn alone(&self) -> io::Result<Held<'_>> {
        self.hold(File::lock)
    }

    /// Waits until nobody has it alone, and keeps it so.
    ///
    /// # Errors
    /// What open(2) and flock(2) say.
    pub fn shared(&self) -> io::Result<Held<'_>> {
        self.hold(File::lock_shared)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let _ = self.0.as_ref().map(File::unlock);
    }
}
