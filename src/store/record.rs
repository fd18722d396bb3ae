//! Records: small JSON documents by key, which appear whole or not at all.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::SystemTime;

use kiln_digest::Digest;
use rustix::fs::{Timespec, Timestamps, UTIME_NOW};
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

    /// The keys of all records of the family, in their order.
    ///
    /// # Errors
    /// What reading the folder says; a family that has no record yet is empty.
    pub fn keys(&self) -> io::Result<Vec<Digest>> {
        let entries = match fs::read_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut keys = Vec::new();
        for entry in entries {
            let name = entry?.file_name();
            keys.extend(name.to_str().and_then(|name| name.strip_suffix(".json")?.parse::<Digest>().ok()));
        }
        keys.sort_unstable();
        Ok(keys)
    }

    /// Takes the record under `key` away; nothing happens where there is none.
    ///
    /// # Errors
    /// What unlink(2) says.
    pub fn remove(&self, key: &Digest) -> io::Result<()> {
        match fs::remove_file(self.file(key)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    /// Notes that the record under `key` was used now: its modification time says when.
    ///
    /// # Errors
    /// `NotFound` where there is none; what setting a file's times says.
    pub fn touch(&self, key: &Digest) -> io::Result<()> {
        let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        let times = Timestamps { last_access: now, last_modification: now };
        Ok(rustix::fs::futimens(File::open(self.file(key))?, &times)?)
    }

    /// When the record under `key` was written or touched last; none where there is none.
    pub fn touched(&self, key: &Digest) -> Option<SystemTime> {
        fs::metadata(self.file(key)).and_then(|meta| meta.modified()).ok()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn records_are_listed_touched_and_removed() {
        let folder = tempfile::tempdir().expect("a folder");
        let records = Records::new(folder.path().join("family"), folder.path().to_owned());
        assert_eq!(records.keys().expect("an empty family"), []);
        let mut keys = [Digest::of(b"one"), Digest::of(b"two")];
        keys.sort_unstable();
        for key in &keys {
            records.put(key, &"text").expect("room");
        }
        fs::write(folder.path().join("family/other"), "").expect("room");
        assert_eq!(records.keys().expect("a family"), keys);
        let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1);
        File::open(records.file(&keys[0])).and_then(|file| file.set_modified(old)).expect("times");
        assert_eq!(records.touched(&keys[0]), Some(old));
        records.touch(&keys[0]).expect("it is there");
        assert!(records.touched(&keys[0]) > Some(old));
        records.remove(&keys[0]).expect("it is there");
        records.remove(&keys[0]).expect("nothing to do");
        assert_eq!((records.touched(&keys[0]), records.get::<String>(&keys[0])), (None, None));
        assert!(records.touch(&keys[0]).is_err());
    }
}
