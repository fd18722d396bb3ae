//! A machine's folder in the registry: `entry.json` and `socket`, held by a lock on the folder itself for as long as its
//! owner lives. It appears under its name whole or not at all.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::entry::{Entry, is_name};
use crate::machine::drawn;

const ENTRY: &str = "entry.json";
const SOCKET: &str = "socket";
/// Begins the name of a folder that is not complete; no machine's does.
const UNFINISHED: &str = ".new-";
/// Longest entry that is read.
const MAX_ENTRY_BYTES: u64 = 64 << 10;
/// How often another name is tried.
const ATTEMPTS: u32 = 100;

/// A place that this process owns; removed when dropped.
#[derive(Debug)]
pub(super) struct Place {
    path: PathBuf,
    // Locked for life: the system lets go of it however its owner ends.
    folder: File,
}

impl Place {
    /// Takes a place in `area` for `entry`, which is given its name, and listens there.
    pub fn take(area: &Path, entry: &mut Entry) -> io::Result<(Self, UnixListener)> {
        let mut place = loop {
            let path = tempfile::Builder::new().prefix(UNFINISHED).tempdir_in(area)?.keep();
            // Until it is locked another kiln may sweep it as a dead one's.
            let folder = match File::open(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                folder => folder?,
            };
            let place = Self { path, folder };
            place.folder.lock()?;
            if place.path.is_dir() {
                break place;
            }
        };
        let listener = UnixListener::bind(inside(&place.folder, SOCKET))?;
        for _ in 0..ATTEMPTS {
            entry.name = entry.suggest_name(&drawn::<16>()?);
            place.write(entry)?;
            let path = area.join(&entry.name);
            // A folder replaces an empty one only, and no machine's is.
            match fs::rename(&place.path, &path) {
                Ok(()) => {
                    place.path = path;
                    return Ok((place, listener));
                }
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty
                    ) => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::other("there is no name left for another machine"))
    }

    /// Replaces the entry.
    pub fn write(&self, entry: &Entry) -> io::Result<()> {
        let mut file = NamedTempFile::new_in(&self.path)?;
        serde_json::to_writer(&mut file, entry)?;
        file.flush()?;
        file.persist(self.path.join(ENTRY)).map_err(|error| error.error)?;
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// A path to `name` in an open folder, short enough for a socket wherever the folder lies: the address of one holds 107
/// bytes (unix(7)).
fn inside(folder: &File, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{name}", folder.as_raw_fd()))
}

/// Removes what a dead owner left at `area`/`name`. Whether its owner lives.
pub(super) fn sweep(area: &Path, name: &str) -> io::Result<bool> {
    let path = area.join(name);
    let folder = match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        other => other?,
    };
    if folder.try_lock().is_err() {
        return Ok(true);
    }
    // Held until the folder is gone: an owner that was about to lock it sees that, and makes another.
    let _ = fs::remove_dir_all(&path);
    Ok(false)
}

/// The entry at `area`/`name` where its owner lives; what a dead one left there is removed.
pub(super) fn look(area: &Path, name: &str) -> io::Result<Option<Entry>> {
    if !sweep(area, name)? || !is_name(name) {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    match File::open(area.join(name).join(ENTRY)) {
        // It went between the two steps.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?.take(MAX_ENTRY_BYTES).read_to_end(&mut bytes)?,
    };
    // Another version's, or not kiln's at all: nothing can be said of it.
    Ok(serde_json::from_slice::<Entry>(&bytes).ok().map(|entry| Entry { name: name.to_owned(), ..entry }))
}

/// Whether the owner of `area`/`name` lives.
pub(super) fn is_alive(area: &Path, name: &str) -> bool {
    File::open(area.join(name)).is_ok_and(|folder| folder.try_lock().is_err())
}

/// Connects to the owner of `area`/`name`.
pub(super) fn connect(area: &Path, name: &str) -> io::Result<UnixStream> {
    UnixStream::connect(inside(&File::open(area.join(name))?, SOCKET))
}
