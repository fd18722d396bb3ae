//! A lock that one thread of one process holds: open once, since to open it takes longer than to take it.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The lock.
#[derive(Debug)]
pub(super) struct Alone {
    path: PathBuf,
    // Keeps other threads out, as the lock does other processes.
    file: Mutex<Option<File>>,
}

/// Somebody holds it, until this is dropped. It goes with its holder, however that ends.
pub(super) struct Held<'a>(MutexGuard<'a, Option<File>>);

impl Alone {
    /// The one at `path`.
    pub fn new(path: PathBuf) -> Self {
        Self { path, file: Mutex::default() }
    }

    /// Waits for it.
    ///
    /// # Errors
    /// What open(2) and flock(2) say.
    pub fn hold(&self) -> io::Result<Held<'_>> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let lock = match file.take() {
            Some(lock) => lock,
            None => File::create(&self.path)?,
        };
        file.insert(lock).lock()?;
        Ok(Held(file))
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let _ = self.0.as_ref().map(File::unlock);
    }
}
