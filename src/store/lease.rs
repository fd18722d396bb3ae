//! What keeps a process's things in the store while it lives.
//!
//! Whatever is used is dated: its modification time says when. A collection takes nothing that was dated since the
//! oldest process that lives began to use the store. A date is set under a shared lock, and collections hold it alone, so
//! that nothing is dated between the look at its date and its removal. Both locks go with their holder, however it ends.

use std::fs::{self, File, Metadata};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_OMIT};

use super::lock_file::{Held, LockFile};
use super::temporary::{self, Temporary};
use crate::writes::{self, Act};

/// The lock's name in the store.
const LOCK: &str = "collect.lock";

/// How many files are dated under a lock.
const MOST_AT_ONCE: usize = 1024;

/// A process's hold on what it uses.
#[derive(Debug, Clone)]
pub(super) struct Lease {
    store: PathBuf,
    temporary: Arc<Temporary>,
    /// Of those who date.
    lock: Arc<LockFile>,
}

/// The right to remove what is not in use.
#[derive(Debug)]
pub struct Sweep {
    /// Nothing that was dated since then may be removed; none where no other process uses the store.
    pub since: Option<SystemTime>,
    // Held alone: nobody dates anything meanwhile, and no process begins to use the store.
    _lock: File,
}

impl Sweep {
    /// Whether what was dated at `used` may be removed.
    pub fn may_take(&self, used: SystemTime) -> bool {
        self.since.is_none_or(|since| used < since)
    }
}

impl Lease {
    /// Begins to use the store at `store`, whose folder for unfinished files is `area`.
    pub fn begin(store: &Path, area: &Path) -> io::Result<Self> {
        let lock = Arc::new(LockFile::new(store.join(LOCK)));
        let temporary = {
            let _using = lock.shared()?;
            Arc::new(Temporary::new(area)?)
        };
        Ok(Self { store: store.to_owned(), temporary, lock })
    }

    /// Since when this process has been using the store.
    pub fn since(&self) -> SystemTime {
        self.temporary.since()
    }

    /// Waits until nobody collects, and keeps it so.
    pub fn using(&self) -> io::Result<Held<'_>> {
        self.lock.shared()
    }

    /// Where unfinished files lie.
    pub fn temporary(&self) -> &Path {
        self.temporary.path()
    }

    /// Dates the file at `path` unless it was since this process began; whether it is there.
    pub fn mark(&self, path: &Path) -> bool {
        self.marked(path).is_some()
    }

    /// The same; what the file at `path` is, where it is there.
    pub fn marked(&self, path: &Path) -> Option<Metadata> {
        let meta = fs::metadata(path).ok()?;
        if self.is_marked(&meta) {
            return Some(meta);
        }
        let using = self.using();
        self.marked_within(using.as_ref().ok(), path)
    }

    /// The same of many files, as long as they are there; whether all are. To take the lock costs as much as to date a file.
    pub fn mark_all(&self, paths: impl IntoIterator<Item = PathBuf>) -> bool {
        let mut paths = paths.into_iter().peekable();
        while paths.peek().is_some() {
            // A collection has its turn in between.
            let using = self.using();
            let is_there = |path: PathBuf| self.marked_within(using.as_ref().ok(), &path).is_some();
            if !paths.by_ref().take(MOST_AT_ONCE).all(is_there) {
                return false;
            }
        }
        true
    }

    fn is_marked(&self, meta: &Metadata) -> bool {
        meta.modified().is_ok_and(|dated| dated >= self.temporary.since())
    }

    /// Dates the file at `path` where that is called for. A store that can only be read is not collected, and nothing in it is
    /// dated; there it has to be a file.
    fn marked_within(&self, using: Option<&Held<'_>>, path: &Path) -> Option<Metadata> {
        let meta = fs::metadata(path).ok()?;
        if self.is_marked(&meta) || using.is_some() && self.date_at(path).is_ok() {
            return Some(meta);
        }
        fs::metadata(path).ok().filter(Metadata::is_file)
    }

    fn date_at(&self, path: &Path) -> io::Result<()> {
        let now = self.now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let time = Timespec {
            tv_sec: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(now.subsec_nanos()),
        };
        let unchanged = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
        let times = Timestamps { last_access: unchanged, last_modification: time };
        writes::through(Act::Date, || Ok(rustix::fs::utimensat(CWD, path, &times, AtFlags::empty())?))
    }

    /// When that is. A clock that was set back makes nothing older than this process.
    pub fn now(&self) -> SystemTime {
        crate::clock::now().max(self.temporary.since())
    }

    /// Says of `file` that it was used now.
    pub fn date(&self, file: &File) -> io::Result<()> {
        writes::through(Act::Date, || file.set_modified(self.now()))
    }

    /// Waits until nobody dates anything, and keeps it so. With `others`, this process's own things may be taken too.
    pub fn sweep(&self, others: bool) -> io::Result<Sweep> {
        // Not by the file that this process dates by: that a lock is held is known of each file alone.
        let lock = File::options().write(true).open(self.store.join(LOCK))?;
        lock.lock()?;
        let own = others.then(|| self.temporary.path());
        let since = temporary::earliest(&self.store.join("tmp"), own)?;
        Ok(Sweep { since, _lock: lock })
    }
}
