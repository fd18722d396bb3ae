//! The ceiling: how much a store may hold, and what happens before a write would go beyond it.
//!
//! Who knows what may go is above the store, and is asked through [`Limit::set`]. What other processes write meanwhile
//! is seen when this one looks again, which it does each time that it has written as much as was free.

use std::fmt;
use std::io;
use std::sync::{Mutex, PoisonError};

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
    free_bytes: u64,
    make_room: MakeRoom,
}

impl fmt::Debug for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Limit").finish_non_exhaustive()
    }
}

/// Room is made for so many bytes more than are asked for, so that it is not made for each write.
const AHEAD_BYTES: u64 = 16 << 20;

impl Limit {
    /// Sets the ceiling. Nothing is free until it is asked for.
    pub fn set(&self, limit_bytes: u64, make_room: MakeRoom) {
        *self.ceiling.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Ceiling { limit_bytes, free_bytes: 0, make_room });
    }

    /// Whether there is one.
    pub fn is_set(&self) -> bool {
        self.ceiling.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Takes `wanted_bytes` of what is free.
    ///
    /// # Errors
    /// `StorageFull` with [`Full`] where there is not enough; what making room says.
    pub fn take(&self, wanted_bytes: u64) -> io::Result<()> {
        let mut ceiling = self.ceiling.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(ceiling) = ceiling.as_mut() else { return Ok(()) };
        if ceiling.free_bytes < wanted_bytes {
            let ahead = AHEAD_BYTES.min(ceiling.limit_bytes / 16);
            ceiling.free_bytes = (ceiling.make_room)(wanted_bytes, ahead)?;
        }
        let Ceiling { limit_bytes, free_bytes, .. } = *ceiling;
        match free_bytes.checked_sub(wanted_bytes) {
            Some(left) => {
                ceiling.free_bytes = left;
                Ok(())
            }
            None => Err(io::Error::new(
                io::ErrorKind::StorageFull,
                Full { limit_bytes, free_bytes, wanted_bytes },
            )),
        }
    }
}
