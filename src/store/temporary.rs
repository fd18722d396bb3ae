//! A process's own folder for files that are not finished: swept by the next kiln where its owner was killed.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::writes;

/// What the name of each folder begins with. Nanoseconds since 1970 follow: since when its process has used the store.
const PREFIX: &str = "kiln-";

/// One process's folder; removed when dropped.
#[derive(Debug)]
pub(super) struct Temporary {
    path: PathBuf,
    since: SystemTime,
    // A lock on the folder itself, held for life: the system lets go of it however its owner ends.
    _lock: File,
}

impl Temporary {
    /// Sweeps what dead processes left in `area`, and makes a folder there.
    pub fn new(area: &Path) -> io::Result<Self> {
        sweep(area)?;
        let now = crate::clock::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let since = UNIX_EPOCH + now;
        let prefix = format!("{PREFIX}{}-", now.as_nanos());
        let path = writes::make_folder_in(area, &prefix)?;
        // Between the two steps another kiln may take the folder for a dead one's: it is made anew then.
        match File::open(&path).and_then(|lock| lock.lock().map(|()| lock)) {
            Ok(lock) if path.is_dir() => Ok(Self { path, since, _lock: lock }),
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                let _ = writes::remove_folder(&path);
                Err(error)
            }
            _ => Self::new(area),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Since when its process has been using the store.
    pub fn since(&self) -> SystemTime {
        self.since
    }
}

/// What the name of a process's folder says.
fn since(folder: &Path) -> Option<SystemTime> {
    let (nanos, _) = folder.file_name()?.to_str()?.strip_prefix(PREFIX)?.split_once('-')?;
    Some(UNIX_EPOCH + Duration::from_nanos(nanos.parse().ok()?))
}

/// Since when the processes that live now have been using the store: the earliest of them, but for the one whose folder
/// is `own`.
pub(super) fn earliest(area: &Path, own: Option<&Path>) -> io::Result<Option<SystemTime>> {
    let mut earliest: Option<SystemTime> = None;
    for entry in fs::read_dir(area)?.flatten() {
        let path = entry.path();
        if Some(path.as_path()) == own {
            continue;
        }
        let Ok(lock) = File::open(&path) else { continue };
        if let Err(TryLockError::WouldBlock) = lock.try_lock() {
            // Of one that has another name nothing is known: it may use everything.
            let since = since(&path).unwrap_or(UNIX_EPOCH);
            earliest = Some(earliest.map_or(since, |other| other.min(since)));
        }
    }
    Ok(earliest)
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // An empty one goes where no descriptor is left to look into it, too.
        if writes::remove_folder(&self.path).is_err() {
            let _ = writes::remove_tree(&self.path);
        }
    }
}

fn sweep(area: &Path) -> io::Result<()> {
    for entry in fs::read_dir(area)?.flatten() {
        let Ok(lock) = File::open(entry.path()) else { continue };
        if lock.try_lock().is_ok() {
            // Held until the folder is gone: an owner that was about to lock it sees that, and makes another.
            let _ = writes::remove_tree(&entry.path());
        }
        drop(lock);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_dead_process_left_is_swept_and_what_a_live_one_has_stays() {
        let area = tempfile::tempdir().expect("a folder");
        let live = Temporary::new(area.path()).expect("a folder");
        fs::write(live.path().join("file"), "x").expect("room");
        let dead = area.path().join("kiln-dead");
        fs::create_dir(&dead).expect("a folder");
        fs::write(dead.join("file"), "x").expect("room");
        let other = Temporary::new(area.path()).expect("a folder");
        assert!(live.path().join("file").exists());
        assert!(!dead.exists());
        let path = other.path().to_owned();
        drop(other);
        assert!(!path.exists());
    }
}
