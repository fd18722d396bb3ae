//! The store: every byte kiln keeps, by digest, and small records that name what belongs together.
//!
//! A blob is a read-only file named by its SHA-256; it appears under its name whole or not at all. Records are
//! JSON files that appear by rename after what they name was synced, so that a record never names a blob that a
//! crash took. Several kilns may use one store at once.

mod blob;
mod record;
mod temporary;

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_digest::Digest;

pub use blob::{BlobWriter, Blobs};
pub use record::Records;
use temporary::Temporary;

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
}

impl StoreError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        Some("name a directory of yours with --store or KILN_STORE".to_owned())
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
    temporary: Arc<Temporary>,
    blobs: Blobs,
}

impl Store {
    /// Opens the store at `path`, making it (mode 0700) where it is missing.
    ///
    /// # Errors
    /// [`StoreError::Io`] when it cannot be made or written, [`StoreError::NotADirectory`] when something else lies
    /// there, [`StoreError::Owner`] when it is another user's.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        if fs::metadata(path).is_ok_and(|meta| !meta.is_dir()) {
            return Err(StoreError::NotADirectory(path.to_owned()));
        }
        for folder in ["", "blobs", "images", "records", "run", "tmp"] {
            let folder = path.join(folder);
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&folder)
                .map_err(StoreError::at(&folder))?;
        }
        let owner = fs::metadata(path).map_err(StoreError::at(path))?.uid();
        let user = rustix::process::geteuid().as_raw();
        if owner != user {
            return Err(StoreError::Owner { path: path.to_owned(), owner, user });
        }
        let area = path.join("tmp");
        let temporary = Arc::new(Temporary::new(&area).map_err(StoreError::at(&area))?);
        let blobs = Blobs::new(path.join("blobs"), temporary.path().to_owned());
        Ok(Self { path: path.to_owned(), temporary, blobs })
    }

    /// The blobs.
    pub fn blobs(&self) -> &Blobs {
        &self.blobs
    }

    /// The records of one `family`: a short folder name.
    pub fn records(&self, family: &'static str) -> Records {
        Records::new(self.path.join("records").join(family), self.temporary())
    }

    /// Where disk images lie, named by whoever makes them after what they hold.
    pub fn images(&self) -> PathBuf {
        self.path.join("images")
    }

    /// Where frozen machines lie, named by whoever freezes them after what is in them.
    pub fn templates(&self) -> PathBuf {
        self.path.join("templates")
    }

    /// Where traces lie, named by scope and key.
    pub fn traces(&self) -> PathBuf {
        self.path.join("traces")
    }

    /// Where it is noted what steps did last.
    pub fn last_runs(&self) -> PathBuf {
        self.path.join("last")
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
        let mut file = tempfile::NamedTempFile::new_in(self.temporary.path())?;
        file.write_all(bytes)?;
        if let Some(folder) = path.parent().filter(|folder| !folder.is_dir()) {
            fs::create_dir_all(folder)?;
        }
        file.persist(path).map_err(|error| error.error)?;
        Ok(())
    }

    /// A place on the store's file system for files that are not finished; it goes with this process.
    pub fn temporary(&self) -> PathBuf {
        self.temporary.path().to_owned()
    }

    /// Where running machines keep what must have a name.
    pub fn run(&self) -> PathBuf {
        self.path.join("run")
    }

    /// Makes the blobs `digests` survive a power failure, and nothing else.
    ///
    /// # Errors
    /// What fsync(2) says.
    pub fn sync_blobs(&self, digests: &[Digest]) -> Result<(), StoreError> {
        for digest in digests {
            let path = self.blobs.path(digest);
            let folder = path.parent().unwrap_or(&self.path);
            for path in [&path, folder] {
                fs::File::open(path).and_then(|file| file.sync_all()).map_err(StoreError::at(path))?;
            }
        }
        Ok(())
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
        rustix::fs::syncfs(&folder).map_err(|errno| StoreError::at(&self.path)(errno.into()))
    }
}
