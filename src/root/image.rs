//! Root images: a tree written once as an uncompressed erofs file, kept under the digest of its manifest.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use kiln_artifact::erofs::{self, ErofsError};
use kiln_artifact::tree::Tree;
use kiln_digest::Digest;
use tempfile::NamedTempFile;

use crate::store::Store;

/// Why an image cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The tree or its contents cannot be written as erofs.
    #[error("the tree cannot be written as an image")]
    Erofs(#[from] ErofsError),
    /// A file cannot be written.
    #[error("cannot write `{path}`")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
}

/// Where the image of the tree `digest` lies if it was made.
pub fn path(store: &Store, digest: &Digest) -> PathBuf {
    store.images().join(format!("{digest}.erofs"))
}

/// Makes the image of `tree` unless it is there, and gives the tree's digest.
///
/// # Errors
/// [`ImageError`].
pub fn make(store: &Store, tree: &Tree) -> Result<Digest, ImageError> {
    let digest = tree.digest();
    let path = path(store, &digest);
    if path.is_file() {
        return Ok(digest);
    }
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| ImageError::Io { path, source }
    };
    let mut file = NamedTempFile::new_in(store.temporary()).map_err(at(&path))?;
    erofs::write(tree, store.blobs(), file.as_file_mut())?;
    file.as_file().set_permissions(fs::Permissions::from_mode(0o444)).map_err(at(&path))?;
    file.persist(&path).map_err(|error| at(&path)(error.error))?;
    Ok(digest)
}
