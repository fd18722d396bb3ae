//! The staging folder in WORK: where outputs wait for their renames, beside the journal that says which.
//!
//! Whoever merges makes it and holds its lock, so that kilns of different stores keep out of each other's way too; those of
//! one store have a lock there already. Whoever finds one and gets its lock finishes what its maker could not.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kiln_artifact::tree::TreePath;
use kiln_digest::Digest;
use kiln_virtio::fs::record::PathBytes;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::work::Work;
use super::{MergeError, at, on_host};
use crate::cache::ledger::{Changes, Ledger};
use crate::store::Store;
use crate::writes::{self, Through};

/// The staging folder's name in WORK: reserved, and gone after every merge.
pub const STAGING: &str = ".kiln-staging";

/// A merge that will be completed whatever happens.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Journal {
    /// Leaves to be removed first.
    pub removals: Vec<PathBytes>,
    /// Folders to be cleared of empty folders, and removed, for a leaf to take their place.
    pub cleared: Vec<PathBytes>,
    /// Folders to be made, with their modes.
    pub folders: Vec<(PathBytes, u32)>,
    /// Paths that the staged files 0, 1, … are renamed to.
    pub places: Vec<PathBytes>,
    /// What becomes of the ledger. A journal of an earlier kiln has none, and is completed all the same.
    #[serde(default)]
    pub changes: Changes,
}

/// A WORK that no other kiln of its store merges into while this is held.
pub(super) struct Locked {
    pub path: PathBuf,
    pub work: Work,
    _lock: File,
}

/// The staging folder, which no kiln of another store touches while this is held.
pub(super) struct Staging {
    pub path: PathBuf,
    pub folder: File,
}

impl Staging {
    /// From now on the merge is completed.
    pub fn write(&self, journal: &Journal) -> Result<(), MergeError> {
        let path = self.path.join("journal");
        let temporary = self.path.join("journal.new");
        let write = || {
            let file = writes::create(&temporary)?;
            Through::new(&file, &temporary).write_all(&serde_json::to_vec(journal)?)?;
            writes::sync(&file, &temporary)?;
            writes::rename(&temporary, &path)?;
            writes::sync_folder(&self.path)
        };
        write().map_err(at("write", &path))
    }

    /// Takes it away, with all that is in it.
    pub fn remove(&self) -> Result<(), MergeError> {
        writes::remove_tree(&self.path).map_err(at("remove", &self.path))
    }
}

impl Locked {
    /// Takes the lock that kilns of this store have at a WORK.
    pub fn open(store: &Store, work: &Path) -> Result<Self, MergeError> {
        writes::make_folders(work).map_err(at("make", work))?;
        let path = fs::canonicalize(work).map_err(at("find", work))?;
        let lock_path = store.lock_path("work", &Digest::of(path.as_os_str().as_bytes()));
        let lock = File::create(&lock_path).map_err(at("lock", &lock_path))?;
        lock.lock().map_err(at("lock", &lock_path))?;
        let top = File::open(&path).map_err(at("open", &path))?;
        Ok(Self { work: Work::new(top.into(), path.clone()), path, _lock: lock })
    }

    /// Waits for the staging folder that is there; none where there is none.
    ///
    /// Kilns of one store have their lock; those of two meet here. Whoever holds the lock of a folder that is not there any
    /// more holds nothing.
    fn staging(&self) -> Result<Option<Staging>, MergeError> {
        let path = self.path.join(STAGING);
        loop {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let folder = match rustix::fs::open(&path, flags, Mode::empty()) {
                Ok(folder) => File::from(folder),
                Err(Errno::NOENT) => return Ok(None),
                Err(errno) => return Err(at("open", &path)(errno.into())),
            };
            match folder.lock() {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // Some file systems, such as NFS, lock no folder: there the lock of the store has to do.
                Err(_) => return Ok(Some(Staging { path, folder })),
            }
            let ours = folder.metadata().map_err(at("open", &path))?;
            match fs::symlink_metadata(&path) {
                Ok(now) if (now.dev(), now.ino()) == (ours.dev(), ours.ino()) => {
                    return Ok(Some(Staging { path, folder }));
                }
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(at("open", &path)(error));
                }
                _ => {}
            }
        }
    }

    /// Completes or undoes what a kiln left in the middle of a merge.
    fn settle(&self, store: &Store) -> Result<(), MergeError> {
        while let Some(staging) = self.staging()? {
            self.finish(store, &staging)?;
        }
        Ok(())
    }

    /// Completes what the journal in `staging` says, or undoes what has none.
    fn finish(&self, store: &Store, staging: &Staging) -> Result<(), MergeError> {
        let journal = match fs::read(staging.path.join("journal")) {
            // Nothing was changed yet.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return staging.remove(),
            // Something may have been: whoever removed it would leave WORK half as it was, and say nothing.
            journal => journal.map_err(at("read what was left in", &staging.path))?,
        };
        let journal = serde_json::from_slice(&journal);
        let journal = journal.map_err(|_| MergeError::Unreadable { staging: staging.path.clone() })?;
        self.complete(store, staging, &journal)
    }

    /// An empty staging folder, after what an earlier kiln left is settled.
    pub fn begin(&self, store: &Store) -> Result<Staging, MergeError> {
        self.settle(store)?;
        loop {
            let path = self.path.join(STAGING);
            let is_new = match writes::make_folder(&path, 0o700) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
                made => made.map(|()| true).map_err(at("make", &path))?,
            };
            let Some(staging) = self.staging()? else { continue };
            // Another kiln may have taken it away, put its own there and died.
            let mut inside = fs::read_dir(&path).map_err(at("read", &path))?;
            if is_new && inside.next().is_none() {
                return Ok(staging);
            }
            self.finish(store, &staging)?;
        }
    }

    /// Does what the journal says; every part may have been done already.
    pub fn complete(&self, store: &Store, staging: &Staging, journal: &Journal) -> Result<(), MergeError> {
        let Self { path: top, work, .. } = self;
        let Staging { path, folder } = staging;
        let each = |names: &[PathBytes], act: &dyn Fn(usize, &TreePath) -> io::Result<()>| {
            for (number, name) in names.iter().enumerate() {
                let output = TreePath::new(&name.0);
                let output = output.map_err(|_| at("read", path)(io::ErrorKind::InvalidData.into()))?;
                act(number, &output).map_err(at("change", &on_host(top, &output)))?;
            }
            Ok(())
        };
        each(&journal.removals, &|_, path| work.remove(path))?;
        // Done before the leaf is placed; afterwards the path is no folder any more.
        each(&journal.cleared, &|_, path| work.remove_empty_folders(path))?;
        for (name, mode) in &journal.folders {
            each(std::slice::from_ref(name), &|_, path| work.make_folder(path, *mode))?;
        }
        each(&journal.places, &|number, output| {
            work.place((folder.as_fd(), path), &number.to_string(), output)
        })?;
        Ledger::of(store, top).change(&journal.changes).map_err(at("record the outputs of", top))?;
        // The journal goes when what it says is done for good: else a power failure could take it and leave half of that.
        writes::sync_all(folder, path).map_err(at("sync", top))?;
        if !store.is_beside(top) {
            store.sync().map_err(|error| at("sync", top)(io::Error::other(error)))?;
        }
        staging.remove()
    }
}

/// Completes or undoes an interrupted merge at `work`, if there was one.
///
/// # Errors
/// [`MergeError::Io`].
pub fn recover(store: &Store, work: &Path) -> Result<(), MergeError> {
    if fs::symlink_metadata(work.join(STAGING)).is_err() {
        return Ok(());
    }
    Locked::open(store, work)?.settle(store)
}
