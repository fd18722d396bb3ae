//! Records: small JSON documents by key, which appear whole or not at all.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;

use kiln_digest::Digest;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tempfile::NamedTempFile;

/// One family of records.
#[derive(Debug, Clone)]
pub struct Records {
    path: PathBuf,
    temporary: PathBuf,
}

impl Records {
    pub(super) fn new(path: PathBuf, temporary: PathBuf) -> Self {
        Self { path, temporary }
    }

    fn file(&self, key: &Digest) -> PathBuf {
        self.path.join(format!("{key}.json"))
    }

    /// The record under `key`; none where there is none, or where it cannot be read as a `T` (an older kiln's).
    pub fn get<T: DeserializeOwned>(&self, key: &Digest) -> Option<T> {
        serde_json::from_slice(&fs::read(self.file(key)).ok()?).ok()
    }

    /// Writes the record under `key`. The caller has synced what it names (`Store::sync`).
    ///
    /// # Errors
    /// What writing and renaming say.
    pub fn put<T: Serialize>(&self, key: &Digest, record: &T) -> io::Result<()> {
        fs::create_dir_all(&self.path)?;
        let mut file = NamedTempFile::new_in(&self.temporary)?;
        serde_json::to_writer_pretty(&mut file, record)?;
        file.write_all(b"\n")?;
        file.as_file().sync_all()?;
        file.persist(self.file(key)).map_err(|error| error.error)?;
        Ok(())
    }
}
