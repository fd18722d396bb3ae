//! The ceiling: how much a store may hold, and what happens before a write would go beyond it.
//!
//! Who knows what may go is above the store, and is asked through [`Limit::set`]. Processes that share a store take room one
//! after another, each no more than it is about to write. What each has taken and not written yet is seen by the others as
//! the lengths of two files of nothing in its folder of unfinished files, which goes with it.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::lock_file::LockFile;
use crate::writes;

/// The name in the store of the lock under which room is taken.
const LOCK: &str = "room.lock";
/// What a process may write without asking again.
const AHEAD: &str = "ahead";
/// What it writes to files that it has said the lengths of.
const RESERVED: &str = "reserved";

/// Makes room for so many bytes, and for so many more than those where it can, and says how many are free then.
pub type MakeRoom = Box<dyn FnMut(u64, u64) -> io::Result<u64> + Send>;

/// A store is full.
#[derive(Debug, thiserror::Error)]
#[error(
    "the store may hold {limit_bytes} bytes (store-limit), and all that is left in it is in use: {free_bytes} are free, {wanted_bytes} are needed; raise --store-limit or end other builds"
)]
pub struct Full {
    /// How much it may hold.
    pub limit_bytes: u64,
    /// How much is free, after all that may go is gone.
    pub free_bytes: u64,
    /// How much was to be written.
    pub wanted_bytes: u64,
}

/// A store's ceiling; none unless it is set.
#[derive(Default)]
pub(super) struct Limit {
    // Protects the count of what is free. Held while room is made, so that two writers do not do so at once.
    ceiling: Mutex<Option<Ceiling>>,
}

struct Ceiling {
    limit_bytes: u64,
    /// What this process may write.
    free_bytes: u64,
    /// What it writes within [`Room`]s.
    reserved_bytes: u64,
    shown: Shown,
    make_room: MakeRoom,
}

/// What other processes see of this one.
struct Shown {
    lock: LockFile,
    ahead: (PathBuf, File),
    reserved: (PathBuf, File),
}

impl Shown {
    /// In the store at `store`, of the process whose unfinished files lie in `folder`.
    fn new(store: &Path, folder: &Path) -> io::Result<Self> {
        let file = |name| {
            let path = folder.join(name);
            writes::create(&path).map(|file| (path, file))
        };
        Ok(Self { lock: LockFile::new(store.join(LOCK)), ahead: file(AHEAD)?, reserved: file(RESERVED)? })
    }
}

fn say((path, file): &(PathBuf, File), bytes: u64) -> io::Result<()> {
    writes::set_length(file, path, bytes)
}

/// How much the process whose unfinished files are `written_bytes` and lie in `folder` has or will have there.
pub fn taken_bytes(folder: &Path, written_bytes: u64) -> u64 {
    let said = |name| fs::metadata(folder.join(name)).map_or(0, |meta| meta.len());
    said(RESERVED).max(written_bytes).saturating_add(said(AHEAD))
}

/// Room for a file that is being written; given back when it is dropped, as the file's own length counts then.
#[derive(Debug)]
#[must_use = "what is written without it is not held against the ceiling by other processes"]
pub struct Room {
    limit: Arc<Limit>,
    bytes: u64,
}

impl Drop for Room {
    fn drop(&mut self) {
        let mut ceiling = self.limit.ceiling.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ceiling) = ceiling.as_mut() {
            ceiling.reserved_bytes = ceiling.reserved_bytes.saturating_sub(self.bytes);
            // What cannot be said counts twice until this process ends.
            let _ = say(&ceiling.shown.reserved, ceiling.reserved_bytes);
        }
    }
}

impl fmt::Debug for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Limit").finish_non_exhaustive()
    }
}

/// Room is made for so many bytes more than are asked for, so that it is not made for each write.
const AHEAD_BYTES: u64 = 16 << 20;

impl Limit {
    /// Sets the ceiling of the store at `store`, where this process's unfinished files lie in `folder`. Nothing is free until it is
    /// asked for.
    ///
    /// # Errors
    /// What open(2) says of files in these.
    pub fn set(
        &self,
        limit_bytes: u64,
        (store, folder): (&Path, &Path),
        make_room: MakeRoom,
    ) -> io::Result<()> {
        let shown = Shown::new(store, folder)?;
        *self.ceiling.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Ceiling { limit_bytes, free_bytes: 0, reserved_bytes: 0, shown, make_room });
        Ok(())
    }

    /// Whether there is one.
    pub fn is_set(&self) -> bool {
        self.ceiling.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Takes `wanted_bytes` of what is free, for bytes that are written at once.
    ///
    /// # Errors
    /// `StorageFull` with [`Full`] where there is not enough; what making room says.
    pub fn take(&self, wanted_bytes: u64) -> io::Result<()> {
        let mut ceiling = self.ceiling.lock().unwrap_or_else(PoisonError::into_inner);
        ceiling.as_mut().map_or(Ok(()), |ceiling| ceiling.take(wanted_bytes))
    }

    /// Shows other processes what is left of the room that was taken, once what this thread took it for is written: until then
    /// the bytes count twice.
    pub fn settle(&self) {
        let ceiling = self.ceiling.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ceiling) = ceiling.as_ref() {
            let _ = say(&ceiling.shown.ahead, ceiling.free_bytes);
        }
    }

    /// As [`Limit::take`], for a file that is written while the answer is held.
    ///
    /// # Errors
    /// As [`Limit::take`].
    pub fn reserve(self: &Arc<Self>, wanted_bytes: u64) -> io::Result<Room> {
        let mut ceiling = self.ceiling.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ceiling) = ceiling.as_mut() {
            ceiling.take(wanted_bytes)?;
            // Counted once it is said: where that fails there is no room to give back.
            let reserved_bytes = ceiling.reserved_bytes.saturating_add(wanted_bytes);
            say(&ceiling.shown.reserved, reserved_bytes)?;
            ceiling.reserved_bytes = reserved_bytes;
            say(&ceiling.shown.ahead, ceiling.free_bytes)?;
        }
        Ok(Room { limit: Arc::clone(self), bytes: wanted_bytes })
    }
}

impl Ceiling {
    /// Takes room. Other processes see it taken until the next is, as these bytes are written after this.
    fn take(&mut self, wanted_bytes: u64) -> io::Result<()> {
        match self.free_bytes >= wanted_bytes {
            true => say(&self.shown.ahead, self.free_bytes)?,
            false => self.ask(wanted_bytes)?,
        }
        self.free_bytes -= wanted_bytes;
        Ok(())
    }

    /// Has room made, one process after another: what two find free at once, both would write.
    fn ask(&mut self, wanted_bytes: u64) -> io::Result<()> {
        let _one = self.shown.lock.alone()?;
        self.free_bytes = 0;
        say(&self.shown.ahead, 0)?;
        let limit_bytes = self.limit_bytes;
        let ahead = AHEAD_BYTES.min(limit_bytes / 16);
        let free_bytes = (self.make_room)(wanted_bytes, ahead)?;
        let more = free_bytes.checked_sub(wanted_bytes).ok_or_else(|| {
            io::Error::new(io::ErrorKind::StorageFull, Full { limit_bytes, free_bytes, wanted_bytes })
        })?;
        // Of the last room some is left for others.
        self.free_bytes = wanted_bytes + ahead.min(more / 2);
        say(&self.shown.ahead, self.free_bytes)
    }
}
