//! A process's own folder for files that are not finished: swept by the next kiln where its owner was killed.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// One process's folder; removed when dropped.
#[derive(Debug)]
pub(super) struct Temporary {
    path: PathBuf,
    // A lock on the folder itself, held for life: the system lets go of it however its owner ends.
    _lock: File,
}

impl Temporary {
    /// Sweeps what dead processes left in `area`, and makes a folder there.
    pub fn new(area: &Path) -> io::Result<Self> {
        sweep(area)?;
        let path = tempfile::Builder::new().prefix("kiln-").tempdir_in(area)?.keep();
        // Between the two steps another kiln may take the folder for a dead one's: it is made anew then.
        match File::open(&path).and_then(|lock| lock.lock().map(|()| lock)) {
            Ok(lock) if path.is_dir() => Ok(Self { path, _lock: lock }),
            _ => Self::new(area),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

fn sweep(area: &Path) -> io::Result<()> {
    for entry in fs::read_dir(area)?.flatten() {
        let Ok(lock) = File::open(entry.path()) else { continue };
        if lock.try_lock().is_ok() {
            // Held until the folder is gone: an owner that was about to lock it sees that, and makes another.
            let _ = fs::remove_dir_all(entry.path());
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
