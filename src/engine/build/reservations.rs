//! What kilns of one store expect their machines to take of the host's memory: a file for each build, locked for as long
//! as its kiln lives, with a number in it. Who takes more does so alone, so that two that look at once do not both take
//! the last.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The lock's name; no build's file is called so.
const LOCK: &str = "lock";
/// Most that is read of a file: 20 digits are all there can be.
const MOST_BYTES: u64 = 20;

/// This build's reservation among those of others.
pub(super) struct Reservations {
    folder: PathBuf,
    lock: File,
    path: PathBuf,
    own: File,
}

impl Reservations {
    /// Those below `run`; this one is of nothing yet.
    ///
    /// # Errors
    /// What making and locking files says.
    pub fn open(run: &Path) -> io::Result<Self> {
        let folder = run.join("memory");
        fs::create_dir_all(&folder)?;
        let lock = File::create(folder.join(LOCK))?;
        // Nobody takes it for a dead one's before it is locked.
        lock.lock()?;
        let prefix = format!("{}-", rustix::process::getpid().as_raw_pid());
        let (own, path) = tempfile::Builder::new().prefix(&prefix).tempfile_in(&folder)?.keep()?;
        own.lock()?;
        lock.unlock()?;
        Ok(Self { folder, lock, path, own })
    }

    /// Reserves `bytes` in place of what was reserved before, where `may` says so of what other builds have: their
    /// processes, with how many bytes each. Nobody else takes any meanwhile.
    ///
    /// # Errors
    /// What locking, reading and writing say.
    pub fn take(&self, bytes: u64, may: impl FnOnce(&[(i32, u64)]) -> bool) -> io::Result<bool> {
        self.lock.lock()?;
        let taken = self.others().and_then(|others| match may(&others) {
            true => self.set(bytes).map(|()| true),
            false => Ok(false),
        });
        self.lock.unlock()?;
        taken
    }

    /// Reserves less than before.
    ///
    /// # Errors
    /// What writing says.
    pub fn set(&self, bytes: u64) -> io::Result<()> {
        // As many digits each time: whoever reads meanwhile reads one number or the other.
        self.own.write_all_at(format!("{bytes:020}").as_bytes(), 0)
    }

    /// What other builds that live have reserved; what dead ones left is removed.
    fn others(&self) -> io::Result<Vec<(i32, u64)>> {
        let mut others = Vec::new();
        for entry in fs::read_dir(&self.folder)?.flatten() {
            let path = entry.path();
            let name = entry.file_name();
            let process = name.to_str().and_then(|name| name.split_once('-')?.0.parse::<i32>().ok());
            let (Some(process), false) = (process, path == self.path) else { continue };
            let Ok(file) = File::open(&path) else { continue };
            if file.try_lock_shared().is_ok() {
                let _ = fs::remove_file(&path);
                continue;
            }
            let mut text = String::new();
            if file.take(MOST_BYTES).read_to_string(&mut text).is_ok() {
                others.push((process, text.parse().unwrap_or(0)));
            }
        }
        Ok(others)
    }
}

impl Drop for Reservations {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::thread;

    use super::*;

    #[test]
    fn what_one_has_reserved_others_see_until_it_is_gone() {
        let run = tempfile::tempdir().expect("a folder");
        let open = || Reservations::open(run.path()).expect("a reservation");
        let (one, other) = (open(), open());
        let own = rustix::process::getpid().as_raw_pid();
        assert!(one.take(700, |others| others == [(own, 0)]).expect("room"));
        assert!(!other.take(1, |others| others != [(own, 700)]).expect("room"));
        one.set(80).expect("room");
        assert!(other.take(1, |others| others == [(own, 80)]).expect("room"));
        drop(one);
        assert!(other.take(1, <[_]>::is_empty).expect("room"));
        // As a kiln that was killed leaves it.
        fs::write(run.path().join("memory").join(format!("{own}-dead")), format!("{:020}", 5)).expect("room");
        assert!(other.take(1, <[_]>::is_empty).expect("room"));
        assert_eq!(fs::read_dir(run.path().join("memory")).expect("a folder").count(), 2);
    }

    #[test]
    fn of_two_that_look_at_once_one_gets_the_last() {
        let run = tempfile::tempdir().expect("a folder");
        let builds: Vec<_> = (0..8).map(|_| Reservations::open(run.path()).expect("a reservation")).collect();
        let granted: usize = thread::scope(|scope| {
            let threads: Vec<_> = builds
                .iter()
                .map(|build| {
                    let fits =
                        |others: &[(i32, u64)]| others.iter().map(|(_, bytes)| bytes).sum::<u64>() + 10 <= 30;
                    scope.spawn(move || usize::from(build.take(10, fits).expect("room")))
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).sum()
        });
        assert_eq!(granted, 3);
        let seen = Cell::new(0);
        let _ = builds[0].take(0, |others| {
            seen.set(others.len());
            false
        });
        assert_eq!(seen.get(), 7);
    }
}
