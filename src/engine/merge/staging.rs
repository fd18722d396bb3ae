//! The staging folder in WORK: where outputs wait for their renames, beside the journal that says which.
//!
//! Whoever merges makes it and holds its lock, so that kilns of different stores keep out of each other's way too; those of
//! one store have a lock there already. Whoever finds one and gets its lock finishes what its maker could not.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kiln_artifact::tree::TreePath;
use kiln_digest::Digest;
use kiln_virtio::fs::record::{Fingerprint, PathBytes};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::work::{Seen, Work};
use super::{MergeError, at, on_host};
use crate::cache::ledger::{Changes, Identity, Ledger};
use crate::store::Store;
use crate::writes::{self, Through};

/// The staging folder's name in WORK: reserved, and gone after every merge.
pub const STAGING: &str = ".kiln-staging";
/// The journal's name in there.
const JOURNAL: &str = "journal";

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
    /// What stood where something is removed or replaced, as far as it was looked at. A journal of an earlier kiln does not say.
    #[serde(default)]
    pub stood: Option<Vec<(PathBytes, Identity)>>,
    /// The store whose ledger that is; that of whoever completes it where it is not said, or gone.
    #[serde(default)]
    pub store: Option<PathBytes>,
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

/// What `store` is called in journals.
pub(super) fn name_of(store: &Store) -> PathBytes {
    let path = fs::canonicalize(store.path());
    PathBytes(path.as_deref().unwrap_or(store.path()).as_os_str().as_bytes().to_vec())
}

impl Staging {
    /// From now on the merge is completed.
    pub fn write(&self, journal: &Journal) -> Result<(), MergeError> {
        let path = self.path.join(JOURNAL);
        let temporary = self.path.join("journal.new");
        let write = || {
            let file = writes::create(&temporary)?;
            Through::new(&file, &temporary).write_all(&serde_json::to_vec(journal)?)?;
            writes::sync(&file, &temporary)?;
            writes::rename(&temporary, &path)?;
            writes::sync(&self.folder, &self.path)
        };
        write().map_err(at("write", &path))
    }

    /// Takes it away before anything in WORK was changed.
    pub fn discard(&self) -> Result<(), MergeError> {
        let journal = self.path.join(JOURNAL);
        if fs::symlink_metadata(&journal).is_ok() {
            // First, and for good: with a part of what it places it would be completed as if that were all.
            let gone = writes::remove(&journal).and_then(|()| writes::sync(&self.folder, &self.path));
            gone.map_err(at("remove", &journal))?;
        }
        self.remove()
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
    /// Kilns of one store have their lock; those of two meet here, on one host: a lock of a folder goes no further. Whoever
    /// holds the lock of a folder that is not there any more holds nothing.
    fn staging(&self) -> Result<Option<Staging>, MergeError> {
        let path = self.path.join(STAGING);
        loop {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let folder = match rustix::fs::open(&path, flags, Mode::empty()) {
                Ok(folder) => folder,
                Err(Errno::NOENT) => return Ok(None),
                Err(Errno::NOTDIR | Errno::LOOP) => return Err(MergeError::NoStaging { path }),
                Err(errno) => return Err(at("open", &path)(errno.into())),
            };
            match rustix::fs::flock(&folder, FlockOperation::LockExclusive) {
                Ok(()) => {}
                Err(Errno::INTR) => continue,
                // Where a file system locks no folder, the lock of the store has to do.
                Err(Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL | Errno::BADF) => {}
                Err(errno) => return Err(at("lock", &path)(errno.into())),
            }
            let folder = File::from(folder);
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
        let journal = match fs::read(staging.path.join(JOURNAL)) {
            // Nothing was changed yet.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return staging.remove(),
            // Something may have been: whoever removed it would leave WORK half as it was, and say nothing.
            journal => journal.map_err(at("read what was left in", &staging.path))?,
        };
        let journal: Result<Journal, _> = serde_json::from_slice(&journal);
        let journal = journal.map_err(|_| MergeError::Unreadable { staging: staging.path.clone() })?;
        self.is_as_it_stood(staging, &journal)?;
        // What another store's kiln began is in that store's ledger, where there still is one.
        let begun_in = journal.store.as_ref().filter(|of| **of != name_of(store));
        let begun_in = begun_in.map(|of| PathBuf::from(OsStr::from_bytes(&of.0)));
        let begun_in = begun_in.filter(|path| path.join("version").is_file());
        let other = begun_in.and_then(|path| Store::open(&path).ok());
        self.complete(other.as_ref().unwrap_or(store), staging, &journal)?;
        staging.remove()
    }

    /// That nobody has put anything since where `journal` removes and replaces.
    fn is_as_it_stood(&self, staging: &Staging, journal: &Journal) -> Result<(), MergeError> {
        let Some(stood) = &journal.stood else { return Ok(()) };
        let stood: BTreeMap<&PathBytes, &Identity> = stood.iter().map(|(path, what)| (path, what)).collect();
        let waits = |number: usize| fs::symlink_metadata(staging.path.join(number.to_string())).is_ok();
        let places = journal.places.iter().enumerate();
        let places = places.filter(|(number, _)| waits(*number)).map(|(_, name)| name);
        // What was removed for another reason than that it stood there was looked at by nobody.
        let removals = journal.removals.iter().filter(|name| stood.contains_key(name));
        for name in places.chain(removals) {
            let Ok(path) = TreePath::new(&name.0) else { continue };
            let host = on_host(&self.path, &path);
            let is_in_the_way = match self.work.look(&path).map_err(at("read", &host))? {
                Seen::Leaf(found, _) => {
                    Some(&&found) != stood.get(name) && Some(&found) != journal.changes.placed.get(name)
                }
                Seen::Folder => !journal.cleared.contains(name) && journal.places.contains(name),
                Seen::Other => true,
                Seen::Nothing | Seen::Blocked(_) => false,
            };
            if is_in_the_way {
                return Err(MergeError::InTheWay { path: host });
            }
        }
        Ok(())
    }

    /// A staging folder with nothing in it, after what an earlier kiln left is settled.
    pub fn begin(&self, store: &Store) -> Result<Staging, MergeError> {
        let path = self.path.join(STAGING);
        loop {
            match writes::make_folder(&path, 0o700) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                made => made.map_err(at("make", &path))?,
            }
            let Some(staging) = self.staging()? else { continue };
            let mut inside = fs::read_dir(&path).map_err(at("read", &path))?;
            if inside.next().is_none() {
                return Ok(staging);
            }
            self.finish(store, &staging)?;
        }
    }

    /// Does what the journal says, which is of the ledger in `store`; every part may have been done already. What is placed then
    /// looks like what comes back. The caller removes the staging folder.
    pub fn complete(
        &self,
        store: &Store,
        staging: &Staging,
        journal: &Journal,
    ) -> Result<Vec<Option<Fingerprint>>, MergeError> {
        let Self { path: top, work, .. } = self;
        let Staging { path, folder } = staging;
        let output = |name: &PathBytes| {
            let output = TreePath::new(&name.0);
            output.map_err(|_| at("read", path)(io::ErrorKind::InvalidData.into()))
        };
        let failed = |output: &TreePath| at("change", &on_host(top, output));
        for name in &journal.removals {
            let output = output(name)?;
            work.remove(&output).map_err(failed(&output))?;
        }
        // Done before the leaf is placed; afterwards the path is no folder any more.
        for name in &journal.cleared {
            let output = output(name)?;
            work.remove_empty_folders(&output).map_err(failed(&output))?;
        }
        for (name, mode) in &journal.folders {
            let output = output(name)?;
            work.make_folder(&output, *mode).map_err(failed(&output))?;
        }
        let place = |(number, name): (usize, &PathBytes)| {
            let output = output(name)?;
            let placed = work.place((folder.as_fd(), path), &number.to_string(), &output);
            placed.map_err(failed(&output))
        };
        let placed = journal.places.iter().enumerate().map(place).collect::<Result<_, _>>()?;
        Ledger::of(store, top).change(&journal.changes).map_err(at("record the outputs of", top))?;
        // The journal goes when what it says is done for good: else a power failure could take it and leave half of that.
        writes::sync_all(folder, path).map_err(at("sync", top))?;
        if !store.is_beside(top) {
            store.sync().map_err(|error| at("sync", top)(io::Error::other(error)))?;
        }
        Ok(placed)
    }
}

/// Completes or undoes an interrupted merge at `work`, if there was one.
///
/// # Errors
/// [`MergeError`]; the merge is still to be completed then.
pub fn recover(store: &Store, work: &Path) -> Result<(), MergeError> {
    if fs::symlink_metadata(work.join(STAGING)).is_err() {
        return Ok(());
    }
    Locked::open(store, work)?.settle(store)
}
