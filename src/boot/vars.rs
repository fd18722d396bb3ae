//! The file of a machine's variables: a new one without a name, or one that is kept between runs.
//!
//! A kept file is made once, with what the firmware starts from, and from then on says itself which keys there are.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};

use kiln_artifact::variables::{GLOBAL_VARIABLE, VariableError, VariableStore};

use super::disks::nameless;

/// Why there are no variables.
#[derive(Debug, thiserror::Error)]
pub enum VarsError {
    /// A file cannot be read or written.
    #[error("cannot {what} {}", .path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To which.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// Another machine has it.
    #[error("{} is in use by another machine", .0.display())]
    Busy(PathBuf),
    /// It is of another firmware.
    #[error("{} has {found} bytes, and this firmware's variables have {wanted}", .path.display())]
    Size {
        /// Which.
        path: PathBuf,
        /// Its size.
        found: u64,
        /// The size it should have.
        wanted: u64,
    },
    /// Its contents are none.
    #[error("cannot use {}", .path.display())]
    Store {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: VariableError,
    },
    /// It was made for a machine without keys.
    #[error("{} was made before and has no keys", .0.display())]
    NoKeys(PathBuf),
}

impl VarsError {
    /// What the user can do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NoKeys(_) => {
                Some("name another file, which is made with the keys; or enrol them with --enroll".to_owned())
            }
            Self::Size { .. } | Self::Store { .. } => {
                Some("name a file that is not there yet, which is made then".to_owned())
            }
            _ => None,
        }
    }

    /// Whether the file that the user named is to blame.
    #[must_use]
    pub fn is_the_users(&self) -> bool {
        matches!(self, Self::Size { .. } | Self::Store { .. } | Self::NoKeys(_))
    }
}

/// Variables that a firmware can read and write.
#[derive(Debug)]
pub struct Vars {
    file: File,
    path: Option<PathBuf>,
    /// Whether they were there before.
    pub is_old: bool,
}

impl Vars {
    /// Variables that begin as `fresh` and go with the machine.
    ///
    /// # Errors
    /// There is no room in `scratch`.
    pub fn private(scratch: &Path, fresh: &[u8]) -> Result<Self, VarsError> {
        let file = nameless(scratch, fresh).map_err(io_error("write a file in", scratch))?;
        Ok(Self { file, path: None, is_old: false })
    }

    /// Variables that are in `path`, or go there as `fresh`. Nobody else has them meanwhile.
    ///
    /// # Errors
    /// The file cannot be used.
    pub fn kept(path: &Path, fresh: &[u8]) -> Result<Self, VarsError> {
        let opened = File::options().read(true).write(true).open(path);
        let (file, is_old) = match opened {
            Ok(file) => (file, true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => (make(path, fresh)?, false),
            Err(error) => return Err(io_error("open", path)(error)),
        };
        match file.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => return Err(VarsError::Busy(path.to_owned())),
            Err(std::fs::TryLockError::Error(error)) => return Err(io_error("lock", path)(error)),
        }
        let vars = Self { file, path: Some(path.to_owned()), is_old };
        match vars.check(path, fresh) {
            Ok(()) => Ok(vars),
            Err(error) => {
                // Closing it is not enough: a process that is being started holds a copy of every descriptor until its
                // execve(2).
                let _ = vars.file.unlock();
                Err(error)
            }
        }
    }

    /// Whether they can be what a firmware that starts from `fresh` keeps.
    fn check(&self, path: &Path, fresh: &[u8]) -> Result<(), VarsError> {
        let found = self.file.metadata().map_err(io_error("read", path))?.len();
        let wanted = u64::try_from(fresh.len()).unwrap_or(u64::MAX);
        if found != wanted {
            return Err(VarsError::Size { path: path.to_owned(), found, wanted });
        }
        self.have_keys().map(drop)
    }

    fn shown(&self) -> PathBuf {
        self.path.clone().unwrap_or_else(|| "the variable store".into())
    }

    fn bytes(&self) -> Result<Vec<u8>, VarsError> {
        let read = || {
            let (mut file, mut bytes) = (&self.file, Vec::new());
            file.rewind()?;
            file.read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        read().map_err(io_error("read", &self.shown()))
    }

    /// Whether there is a PK, with which setup mode ends (UEFI 2.10 §32.3).
    ///
    /// # Errors
    /// They cannot be read, or are damaged.
    pub fn have_keys(&self) -> Result<bool, VarsError> {
        let store = VariableStore::read(self.bytes()?)
            .map_err(|source| VarsError::Store { path: self.shown(), source })?;
        Ok(store.has("PK", GLOBAL_VARIABLE))
    }

    /// The file, for a machine.
    ///
    /// # Errors
    /// There are too many open files.
    pub fn file(&self) -> Result<File, VarsError> {
        self.file.try_clone().map_err(io_error("open", &self.shown()))
    }
}

/// Writes `fresh` to `path` whole, or nothing.
fn make(path: &Path, fresh: &[u8]) -> Result<File, VarsError> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let write = || {
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(fresh)?;
        file.persist_noclobber(path).map_err(|error| error.error)
    };
    write().map_err(io_error("make", path))
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> VarsError + use<> {
    let path = path.to_owned();
    move |source| VarsError::Io { what, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_another_size_or_of_no_variables_is_refused_and_stays_as_it_is() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("vars.fd");
        std::fs::write(&path, "mine").expect("room");
        assert!(matches!(Vars::kept(&path, &[0; 8]), Err(VarsError::Size { found: 4, wanted: 8, .. })));
        assert!(matches!(Vars::kept(&path, &[0; 4]), Err(VarsError::Store { .. })));
        assert_eq!(std::fs::read(&path).expect("it is there"), b"mine");
    }

    #[test]
    fn a_file_that_a_machine_has_is_given_to_no_other() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("vars.fd");
        std::fs::write(&path, "mine").expect("room");
        let held = File::open(&path).expect("it is there");
        held.lock().expect("nobody has it");
        assert!(matches!(Vars::kept(&path, &[0; 4]), Err(VarsError::Busy(_))));
    }
}
