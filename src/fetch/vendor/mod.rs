//! Vendored bytes: all that a lock names, in a directory or in one tar archive, from which a build needs no network.
//!
//! ```text
//! kiln.lock              the lock that they are the bytes of
//! blobs/sha256/DIGEST    each of them
//! ```
//!
//! The same in an archive: `kiln.lock` first, then the blobs by digest, with nothing in it of who made it and when, so that
//! equal locks give equal archives. Nothing here is believed: what is taken is held against its digest. [`Vendor`] reads,
//! [`write_directory`] and [`write_archive`] write.

mod read;
#[cfg(test)]
mod tests;
mod write;

use std::io;
use std::path::{Path, PathBuf};

use kiln_digest::Digest;

pub use read::Vendor;
pub use write::{Written, write_archive, write_directory};

/// Where the lock lies.
pub const LOCK: &str = "kiln.lock";
/// Where the blobs lie.
const BLOBS: &str = "blobs/sha256";

/// Why vendored bytes cannot be used or made.
#[derive(Debug, thiserror::Error)]
pub enum VendorError {
    /// They cannot be read or written.
    #[error("cannot {what} `{path}`")]
    Io {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// There is something else.
    #[error("`{path}` holds no vendored bytes: {why}")]
    NotVendored {
        /// What was named.
        path: PathBuf,
        /// What it lacks.
        why: &'static str,
    },
    /// The archive ends too early.
    #[error("the archive `{path}` is cut off after {bytes} bytes, in or after `{member}`")]
    Cut {
        /// The archive.
        path: PathBuf,
        /// Its length.
        bytes: u64,
        /// The last member that begins in it.
        member: String,
    },
    /// A blob is shorter or longer than the lock says.
    #[error("`{path}` has {found} bytes for {expected_digest}, not {expected}")]
    Size {
        /// Where it lies.
        path: PathBuf,
        /// What it should be.
        expected_digest: Digest,
        /// How long it should be.
        expected: u64,
        /// How long it is at least.
        found: u64,
    },
    /// A blob is another.
    #[error("`{path}` has other bytes than it says: digest {found}, not {expected}")]
    Digest {
        /// Where it lies.
        path: PathBuf,
        /// What it should be.
        expected: Digest,
        /// What it is.
        found: Digest,
    },
    /// A blob of the store is another than its name says.
    #[error("the store's copy of {what} is damaged: digest {found}, not {expected}")]
    Store {
        /// What it is.
        what: String,
        /// Its name.
        expected: Digest,
        /// What it is.
        found: Digest,
    },
    /// It would be written among other files.
    #[error("`{path}` holds other things than vendored bytes")]
    Occupied {
        /// What was named.
        path: PathBuf,
    },
}

impl VendorError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Cut { .. } | Self::Size { .. } | Self::Digest { .. } => {
                Some("copy the vendored bytes again, or make them anew with `kiln lock vendor`".to_owned())
            }
            Self::NotVendored { .. } => Some(
                "name what `kiln lock vendor` made: a directory, or an archive whose name ends in .tar"
                    .to_owned(),
            ),
            Self::Store { .. } => Some("run `kiln store repair`: it fetches it again".to_owned()),
            Self::Occupied { .. } => Some("name an empty directory, or one that does not exist".to_owned()),
            Self::Io { .. } => None,
        }
    }

    fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }
}
