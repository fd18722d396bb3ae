//! Why nothing was signed, and what to do about it.

use std::io;
use std::path::PathBuf;

use kiln_artifact::kernel::KernelError;
use kiln_artifact::uefi::authenticode::SignatureError;
use kiln_artifact::uefi::uki::UkiError;
use kiln_artifact::verity::VerityError;
use kiln_digest::Digest;

use super::folder::FolderError;
use super::keys::KeyError;
use super::local::LocalError;
use super::record::{self, RecordError};
use crate::apart::Overlap;

/// Why nothing was signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The keys.
    #[error(transparent)]
    Keys(#[from] KeyError),
    /// A file of WORK.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The configuration.
    #[error(transparent)]
    Local(#[from] LocalError),
    /// WORK has no record.
    #[error("`{0}` has no record of a build (`{path}`)", path = record::PATH)]
    NoRecord(PathBuf),
    /// Steps see WORK, and would see the keys or the configuration.
    #[error(transparent)]
    Overlap(#[from] Overlap),
    /// Another kiln signs here.
    #[error("another kiln signs in `{0}`")]
    Busy(PathBuf),
    /// A lock.
    #[error("cannot lock `{path}`")]
    Lock {
        /// On what.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// Changed after it was built, or of another build.
    #[error("`{file}` is not what was built: its digest is {found}, and the record has {recorded}")]
    Digest {
        /// The file, or a section of it.
        file: String,
        /// What it is.
        found: Digest,
        /// What it should be.
        recorded: Digest,
    },
    /// A section that nobody built.
    #[error("`{file}` has a section `{section}` that the record does not know")]
    Unknown {
        /// The image.
        file: String,
        /// The section.
        section: String,
    },
    /// A section that is not there.
    #[error("`{file}` has no section `{section}`, which the record has")]
    Gone {
        /// The image.
        file: String,
        /// The section.
        section: String,
    },
    /// A file of a root hash that has none.
    #[error("`{0}` holds no root hash (64 hexadecimal digits)")]
    Hash(String),
    /// An image that is not what its tree and hash say.
    #[error("`{image}` is not what its hash tree and `{hash}` say")]
    Verity {
        /// The image.
        image: String,
        /// The file of the hash.
        hash: String,
        /// Why not.
        #[source]
        source: VerityError,
    },
    /// An image with more in it than its tree covers.
    #[error("`{image}` has {length} bytes, and its hash tree covers {covered}")]
    Covered {
        /// The image.
        image: String,
        /// Its length.
        length: u64,
        /// That of what is verified.
        covered: u64,
    },
    /// A command line that is no text.
    #[error("`{0}` is no command line: it is not UTF-8")]
    CommandLine(String),
    /// A kernel that cannot be read.
    #[error("`{file}` cannot be the kernel")]
    Kernel {
        /// The file.
        file: String,
        /// Why not.
        #[source]
        source: KernelError,
    },
    /// Another kernel than the record says.
    #[error("`{file}` is kernel {found}, and the record has it as {recorded}")]
    Release {
        /// The file.
        file: String,
        /// What it says.
        found: String,
        /// What the record says.
        recorded: String,
    },
    /// No unified kernel image, or not a whole one.
    #[error("`{file}` is not signed")]
    Unified {
        /// The image.
        file: String,
        /// Why not.
        #[source]
        source: UkiError,
    },
    /// It has a signature, which would count beside ours.
    #[error("`{0}` has a signature already, and what is signed here has none")]
    Signed(String),
    /// A signed image that cannot be verified.
    #[error("`{file}` is not signed by these keys as it is")]
    Verified {
        /// The image.
        file: String,
        /// Why not.
        #[source]
        source: SignatureError,
    },
    /// What was signed or enrolled once, of other parts, keys or configuration.
    #[error("`{0}` is not what these parts, keys and configuration make")]
    Stale(String),
    /// The signature.
    #[error("cannot sign `{file}`")]
    Signature {
        /// The image.
        file: String,
        /// Why not.
        #[source]
        source: SignatureError,
    },
}

impl SignError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Keys(error) => error.hint(),
            Self::Folder(error) => error.hint(),
            Self::Local(error) => error.hint(),
            Self::NoRecord(_) => {
                Some("build first, or copy the whole WORK of a build; WORK says where".to_owned())
            }
            Self::Overlap(overlap) => Some(overlap.hint().to_owned()),
            Self::Digest { .. }
            | Self::Unknown { .. }
            | Self::Gone { .. }
            | Self::Verity { .. }
            | Self::Covered { .. } => Some("build again; if nobody changed it, ask who did".to_owned()),
            Self::Unified { source, .. } => source.hint().map(str::to_owned),
            Self::Verified { .. } | Self::Stale(_) => Some("`kiln sign` signs it anew".to_owned()),
            Self::Signature { source: SignatureError::NotOverThis { .. }, .. } => Some(
                "ask for signatures again (`--request`): keys, WORK or configuration have changed since"
                    .to_owned(),
            ),
            _ => None,
        }
    }
}
