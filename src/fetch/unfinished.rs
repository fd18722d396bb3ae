//! Files that are not finished, in folders of the user's: beside a lock file, among vendored bytes. Each is locked by who
//! writes it; one that nobody holds was left by a kiln that was killed, and goes when the next one comes by.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::io::Errno;

use crate::writes::{self, Unfinished};

/// An empty file in `folder` whose name begins with `prefix`. What others of that name nobody writes any more are removed.
///
/// # Errors
/// What open(2) and flock(2) say.
pub(super) fn new_in(folder: &Path, prefix: &str) -> io::Result<Unfinished> {
    sweep(folder, prefix);
    loop {
        let file = Unfinished::with_prefix_in(prefix, folder)?;
        match file.file().lock() {
            // Where there are no locks nobody sweeps either.
            Err(error) if is_unsupported(&error) => return Ok(file),
            locked => locked?,
        }
        // Between the two steps another kiln may have taken it for a dead one's.
        if file.file().metadata()?.nlink() > 0 {
            return Ok(file);
        }
    }
}

/// Whether a file system says so that it has no locks, or none on folders.
pub(super) fn is_unsupported(error: &io::Error) -> bool {
    [Errno::BADF, Errno::NOLCK, Errno::OPNOTSUPP, Errno::NOSYS, Errno::INVAL]
        .iter()
        .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// Removes the files in `folder` whose names begin with `prefix` and that nobody writes any more. What cannot be removed
/// stays, as it did no harm so far.
pub(super) fn sweep(folder: &Path, prefix: &str) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let is_one = entry.file_name().to_str().is_some_and(|name| name.starts_with(prefix))
            && entry.file_type().is_ok_and(|kind| kind.is_file());
        if !is_one {
            continue;
        }
        let path = entry.path();
        if let Ok(file) = File::open(&path)
            && file.try_lock().is_ok()
        {
            let _ = writes::remove(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_kiln_left_goes_and_what_another_writes_stays() {
        let folder = tempfile::tempdir().expect("a folder");
        let place = |name: &str| folder.path().join(name);
        for name in [".kiln.x.dead", ".kiln.y.other", "kept"] {
            fs::write(place(name), "half").expect("room");
        }
        let live = new_in(folder.path(), ".kiln.x.").expect("a file");
        let other = new_in(folder.path(), ".kiln.x.").expect("a file");
        assert!(live.path().exists() && other.path().exists());
        assert!(!place(".kiln.x.dead").exists());
        assert!(place(".kiln.y.other").exists() && place("kept").exists());
    }
}
