//! The store: every byte kiln keeps, by digest, and small records that name what belongs together.
//!
//! A blob is a read-only file named by its SHA-256; it appears under its name whole or not at all. Records are
//! JSON files that appear by rename after what they name was synced, so that a record never names a blob that a
//! crash took. Several kilns may use one store at once.

mod blob;
mod durable;
mod lease;
mod limit;
mod lock_file;
mod record;
mod seal;
mod temporary;

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use kiln_digest::Digest;

use crate::writes::{self, Unfinished};
use blob::Damage;
pub use blob::{BlobWriter, Blobs};
use durable::Durable;
use lease::Lease;
pub use lease::Sweep;
use limit::Limit;
pub use limit::{Full, MakeRoom, Room, taken_bytes};
pub use lock_file::{Held, LockFile};
pub use record::Records;
pub use seal::{SEAL_BYTES, seal, seal_line, unseal, unseal_line};

/// The file that says which form a store has.
const VERSION_FILE: &str = "version";
/// What it says. The number goes up when an older kiln would misread a store.
const VERSION: &str = "kiln store 1\n";
/// How long it may be.
const LONGEST_VERSION: usize = 64;

/// Why the store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A folder or file of the store could not be made or read.
    #[error("store `{path}` cannot be used")]
    Io {
        /// What was touched.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// Something else lies where the store is to be.
    #[error("store `{0}` is not a directory")]
    NotADirectory(PathBuf),
    /// The store belongs to somebody else.
    #[error("store `{path}` belongs to user {owner}, not to the user who runs kiln ({user})")]
    Owner {
        /// The store.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Who runs.
        user: u32,
    },
    /// A newer kiln made it, or something else did.
    #[error("store `{path}` says that it is `{version}`, which this kiln does not know")]
    Version {
        /// The store.
        path: PathBuf,
        /// What its version file says.
        version: String,
    },
    /// The file system has no locks, by which kilns share a store.
    #[error("store `{path}` lies on a file system without locks")]
    NoLocks {
        /// The store.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
}

impl StoreError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Version { .. } => {
                "use the kiln that made it, or name another directory with --store or KILN_STORE".to_owned()
            }
            Self::NoLocks { .. } => {
                "name a directory on a local file system with --store or KILN_STORE".to_owned()
            }
            _ => "name a directory of yours with --store or KILN_STORE".to_owned(),
        })
    }

    fn at(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}

/// An open store.
#[derive(Debug, Clone)]
pub struct Store {
    path: PathBuf,
    lease: Lease,
    limit: Arc<Limit>,
    durable: Arc<Durable>,
    damage: Damage,
    blobs: Blobs,
}

impl Store {
    /// Opens the store at `path`, making it (mode 0700) where it is missing.
    ///
    /// # Errors
    /// [`StoreError::Io`] when it cannot be made or written, [`StoreError::NotADirectory`] when something else lies
    /// there, [`StoreError::Owner`] when it is another user's.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        if let Ok(meta) = fs::metadata(path) {
            let (owner, user) = (meta.uid(), rustix::process::geteuid().as_raw());
            if !meta.is_dir() {
                return Err(StoreError::NotADirectory(path.to_owned()));
            }
            if owner != user {
                return Err(StoreError::Owner { path: path.to_owned(), owner, user });
            }
        }
        // Before anything is made or swept there: what a newer kiln has is for it to say.
        Self::check_version(path)?;
        writes::make_private_folders(path).map_err(StoreError::at(path))?;
        for folder in ["blobs", "images", "records", "run", "tmp"] {
            let folder = path.join(folder);
            writes::make_private_folders(&folder).map_err(StoreError::at(&folder))?;
        }
        let area = path.join("tmp");
        let lease = Lease::begin(path, &area).map_err(|source| {
            match rustix::io::Errno::from_io_error(&source) {
                // What flock(2) says where a file system, such as NFS without its lock service, has none.
                Some(rustix::io::Errno::NOLCK | rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {
                    StoreError::NoLocks { path: path.to_owned(), source }
                }
                _ => StoreError::at(&area)(source),
            }
        })?;
        let limit = Arc::new(Limit::default());
        let durable = Arc::<Durable>::default();
        let damage = Damage::default();
        let blobs = Blobs::new(
            path.join("blobs"),
            lease.clone(),
            Arc::clone(&limit),
            Arc::clone(&durable),
            damage.clone(),
        );
        let store = Self { path: path.to_owned(), lease, limit, durable, damage, blobs };
        store.note_version()?;
        Ok(store)
    }

    /// Refuses a store of another form, in which nothing is touched; whether anything says which form the one at `path` has.
    fn check_version(path: &Path) -> Result<bool, StoreError> {
        let file = path.join(VERSION_FILE);
        match fs::read(&file) {
            Ok(found) if found == VERSION.as_bytes() => Ok(true),
            Ok(found) => {
                let found = String::from_utf8_lossy(&found[..found.len().min(LONGEST_VERSION)]).into_owned();
                Err(StoreError::Version { path: path.to_owned(), version: found.trim_end().to_owned() })
            }
            Err(error) => match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Ok(false),
                _ => Err(StoreError::at(&file)(error)),
            },
        }
    }

    /// Says what form the store has, where nothing does yet.
    fn note_version(&self) -> Result<(), StoreError> {
        // Another kiln may have made it since it was looked at first.
        if Self::check_version(&self.path)? {
            return Ok(());
        }
        let file = self.path.join(VERSION_FILE);
        // Synced before it has its name: half of it would be another version's.
        let written = Unfinished::new_in(self.lease.temporary()).and_then(|mut version| {
            version.write_all(VERSION.as_bytes())?;
            version.sync()?;
            version.persist(&file)
        });
        written.map_err(StoreError::at(&file))
    }

    /// Sets how much the store may hold. Before a write would go beyond that, `make_room` is asked to.
    ///
    /// # Errors
    /// [`StoreError::Io`] where what the others have to see cannot be written.
    pub fn set_limit(&self, limit_bytes: u64, make_room: MakeRoom) -> Result<(), StoreError> {
        let folder = self.lease.temporary();
        self.limit.set(limit_bytes, (&self.path, folder), make_room).map_err(StoreError::at(folder))
    }

    /// Whether there is a limit to what the store may hold.
    pub fn has_limit(&self) -> bool {
        self.limit.is_set()
    }

    /// Reserves room for a file of `bytes` that is written beside the blobs while the answer is held.
    ///
    /// # Errors
    /// `StorageFull` with [`Full`].
    pub fn reserve(&self, bytes: u64) -> io::Result<Room> {
        self.limit.reserve(bytes)
    }

    /// Waits until nobody begins to use anything in the store, and keeps it so. With `others`, only what other processes
    /// use is spared, else also what this one does.
    ///
    /// # Errors
    /// What flock(2) says.
    pub fn sweep(&self, others: bool) -> io::Result<Sweep> {
        self.lease.sweep(others)
    }

    /// Says of the file at `path` in the store that it is used now; whether it is there. It stays then for as long as this
    /// process lives.
    pub fn mark(&self, path: &Path) -> bool {
        self.lease.mark(path)
    }

    /// What is used now is dated so.
    pub fn date(&self) -> SystemTime {
        self.lease.now()
    }

    /// Since when this process uses the store: what is dated no earlier stays for as long as it lives.
    pub fn since(&self) -> SystemTime {
        self.lease.since()
    }

    /// Keeps collections away while something is dated that is no file of its own.
    ///
    /// # Errors
    /// What flock(2) says.
    pub fn using(&self) -> io::Result<Held<'_>> {
        self.lease.using()
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The blobs.
    pub fn blobs(&self) -> &Blobs {
        &self.blobs
    }

    /// The records of one `family`: a short folder name.
    pub fn records(&self, family: &'static str) -> Records {
        Records::new(family, self.path.join("records").join(family), self.lease.clone())
    }

    /// Notes that the file at `path` in the store was not what was written, and was taken away.
    pub fn note_damage(&self, path: PathBuf) {
        self.damage.note(path);
    }

    /// What was found damaged and taken away since this was asked last, in words for people.
    pub fn take_damage(&self) -> Vec<String> {
        let said = |path: PathBuf| {
            let path = path.strip_prefix(&self.path).unwrap_or(&path).display();
            format!("`{path}` in the store was damaged: it was taken away, to be made or fetched anew")
        };
        self.damage.take().into_iter().map(said).collect()
    }

    /// Where disk images lie, named by whoever makes them after what they hold.
    pub fn images(&self) -> PathBuf {
        self.path.join("images")
    }

    /// Where frozen machines lie, named by whoever freezes them after what is in them.
    pub fn templates(&self) -> PathBuf {
        self.path.join("templates")
    }

    /// Where traces lie, named by scope.
    pub fn traces(&self) -> PathBuf {
        self.path.join("traces")
    }

    /// Where it is noted what steps did last.
    pub fn notes(&self) -> PathBuf {
        self.path.join("notes")
    }

    /// Where it is noted what outputs look like where they were put.
    pub fn placed(&self) -> PathBuf {
        self.path.join("placed")
    }

    /// Writes a small file of the store's in place of what was there: whole or not at all, but for a power failure, after
    /// which it may be empty or as it was. So it is for what can be told from a damaged one.
    ///
    /// # Errors
    /// What writing and renaming say.
    pub fn replace(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut file = Unfinished::new_in(self.lease.temporary())?;
        file.write_all(bytes)?;
        self.put_in_place(file, path)
    }

    /// The same, and after a power failure too it is whole or as it was.
    ///
    /// # Errors
    /// What writing, syncing and renaming say.
    pub fn replace_for_good(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut file = Unfinished::new_in(self.lease.temporary())?;
        file.write_all(bytes)?;
        file.sync()?;
        self.put_in_place(file, path)
    }

    fn put_in_place(&self, file: Unfinished, path: &Path) -> io::Result<()> {
        self.lease.date(file.file())?;
        if let Some(folder) = path.parent() {
            writes::make_folders(folder)?;
        }
        file.persist(path)
    }

    /// A place on the store's file system for files that are not finished; it goes with this process.
    pub fn temporary(&self) -> PathBuf {
        self.lease.temporary().to_owned()
    }

    /// Where running machines keep what must have a name.
    pub fn run(&self) -> PathBuf {
        self.path.join("run")
    }

    /// Where the lock of what `key` names among things of a `kind`, a short word, lies.
    pub fn lock_path(&self, kind: &str, key: &Digest) -> PathBuf {
        self.run().join(format!("{kind}-{key}.lock"))
    }

    /// All such locks. Where no process uses the store, nobody holds one.
    ///
    /// # Errors
    /// What reading the folder says.
    pub fn lock_paths(&self) -> io::Result<Vec<PathBuf>> {
        let is_lock = |path: &PathBuf| {
            let name =
                path.file_name().and_then(|name| name.to_str()?.strip_suffix(".lock")?.rsplit_once('-'));
            name.is_some_and(|(_, key)| key.parse::<Digest>().is_ok())
        };
        let paths =
            fs::read_dir(self.run())?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
        Ok(paths.into_iter().filter(is_lock).collect())
    }

    /// Makes the blobs `digests` survive a power failure; those that this process has synced before do.
    ///
    /// # Errors
    /// What fsync(2) says.
    pub fn sync_blobs(&self, digests: &[Digest]) -> Result<(), StoreError> {
        let synced = self.durable.sync(digests, |digest| self.blobs.path(digest));
        synced.map_err(|(path, source)| StoreError::Io { path, source })
    }

    /// Whether the store lies on the file system that `path` does.
    pub fn is_beside(&self, path: &Path) -> bool {
        let device = |path: &Path| fs::metadata(path).map(|meta| meta.dev()).ok();
        device(&self.path).is_some_and(|own| device(path) == Some(own))
    }

    /// Makes everything written so far survive a power failure. Called before a record names it.
    ///
    /// # Errors
    /// What syncfs(2) says.
    pub fn sync(&self) -> Result<(), StoreError> {
        let folder = fs::File::open(&self.path).map_err(StoreError::at(&self.path))?;
        writes::sync_all(&folder, &self.path).map_err(StoreError::at(&self.path))
    }
}
