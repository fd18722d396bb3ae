//! Records: small JSON documents by key, sealed, which appear whole or not at all.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::SystemTime;

use kiln_digest::Digest;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::lease::Lease;
use super::seal::{seal, unseal};
use crate::writes::{self, Unfinished};

/// One family of records.
#[derive(Debug, Clone)]
pub struct Records {
    family: &'static str,
    path: PathBuf,
    lease: Lease,
}

impl Records {
    pub(super) fn new(family: &'static str, path: PathBuf, lease: Lease) -> Self {
        Self { family, path, lease }
    }

    /// Where the record under `key` lies if it is there.
    pub fn path(&self, key: &Digest) -> PathBuf {
        self.path.join(format!("{key}.json"))
    }

    fn name(&self, key: &Digest) -> String {
        name(self.family, key)
    }

    /// The record under `key`; none where there is none, or where it is not what was written or cannot be read as a `T`
    /// (another kiln's).
    pub fn get<T: DeserializeOwned>(&self, key: &Digest) -> Option<T> {
        if !self.lease.mark(&self.path(key)) {
            return None;
        }
        self.peek(key)
    }

    /// The same, but for whoever must not take what cannot be read for what is not there.
    ///
    /// # Errors
    /// What reading says.
    pub fn read<T: DeserializeOwned>(&self, key: &Digest) -> io::Result<Option<T>> {
        let path = self.path(key);
        self.lease.mark(&path);
        match fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            bytes => {
                let bytes = bytes?;
                Ok(unseal(&self.name(key), &bytes).and_then(|record| serde_json::from_slice(record).ok()))
            }
        }
    }

    /// As [`Records::get`], without dating it: for whoever looks after the store.
    pub fn peek<T: DeserializeOwned>(&self, key: &Digest) -> Option<T> {
        let path = self.path(key);
        serde_json::from_slice(unseal(&self.name(key), &fs::read(path).ok()?)?).ok()
    }

    /// Writes the record under `key`. The caller has synced what it names (`Store::sync`).
    ///
    /// # Errors
    /// What writing and renaming say.
    pub fn put<T: Serialize>(&self, key: &Digest, record: &T) -> io::Result<()> {
        writes::make_folders(&self.path)?;
        let mut file = Unfinished::new_in(self.lease.temporary())?;
        file.write_all(&seal(&self.name(key), serde_json::to_vec_pretty(record)?))?;
        file.sync()?;
        self.lease.date(file.file())?;
        file.persist(&self.path(key))
    }

    /// Makes the records that were put survive a power failure; until then one of them may be as it was before.
    ///
    /// # Errors
    /// What fsync(2) says.
    pub fn sync(&self) -> io::Result<()> {
        // The folder above too: that of the family may be new.
        self.path.parent().map_or(Ok(()), writes::sync_folder)?;
        writes::sync_folder(&self.path)
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
        writes::remove(&self.path(key))
    }

    /// Notes that the record under `key` was used now: its modification time says when.
    ///
    /// # Errors
    /// `NotFound` where there is none; what setting a file's times says.
    pub fn touch(&self, key: &Digest) -> io::Result<()> {
        self.lease.date(&File::open(self.path(key))?)
    }

    /// When the record under `key` was written or touched last; none where there is none.
    pub fn touched(&self, key: &Digest) -> Option<SystemTime> {
        fs::metadata(self.path(key)).and_then(|meta| meta.modified()).ok()
    }
}

/// Under which name the record `key` of `family` is sealed.
pub(super) fn name(family: &str, key: &Digest) -> String {
    format!("records/{family}/{key}")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::Store;
    use super::*;

    #[test]
    fn records_are_listed_touched_and_removed() {
        let folder = tempfile::tempdir().expect("a folder");
        let records = Store::open(folder.path()).expect("a store").records("family");
        assert_eq!(records.keys().expect("an empty family"), []);
        let mut keys = [Digest::of(b"one"), Digest::of(b"two")];
        keys.sort_unstable();
        for key in &keys {
            records.put(key, &"text").expect("room");
        }
        fs::write(folder.path().join("records/family/other"), "").expect("room");
        assert_eq!(records.keys().expect("a family"), keys);
        let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1);
        File::open(records.path(&keys[0])).and_then(|file| file.set_modified(old)).expect("times");
        assert_eq!(records.touched(&keys[0]), Some(old));
        records.touch(&keys[0]).expect("it is there");
        assert!(records.touched(&keys[0]) > Some(old));
        records.remove(&keys[0]).expect("it is there");
        records.remove(&keys[0]).expect("nothing to do");
        assert_eq!((records.touched(&keys[0]), records.get::<String>(&keys[0])), (None, None));
        assert!(records.touch(&keys[0]).is_err());
    }
}
