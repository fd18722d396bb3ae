//! Roots: from a named source to a read-only image whose identity is its tree's digest.
//!
//! A directory or an archive becomes a tree at once; a squashfs or erofs image is one already. Debian packages are
//! verified and unpacked here, and configured by their own scripts in a machine, never on the host. [`image`] writes
//! trees as erofs, [`catalog`] keeps what is known of each root that the store has.

pub mod bundle;
pub mod catalog;
mod configure;
pub mod debian;
mod decompress;
pub mod directory;
mod file;
mod files;
pub mod image;
pub mod modules;
mod stat;
pub mod toolbox;

use std::io;
use std::path::PathBuf;

use kiln_artifact::archive::tar::TarError;
use kiln_artifact::image::ImageError as ReadImageError;
use kiln_artifact::squashfs;
use kiln_artifact::tree::{Tree, TreeError};
use kiln_digest::Digest;

pub use configure::Workshop;
pub use file::digest_of_file;
pub use files::{of_files, tree};
pub use image::{Filesystem, Image, ImageError};

use crate::agent::{SessionError, TransferError};
use crate::machine::{Death, MachineError};
use crate::plan::RootSpec;
use crate::store::{Store, StoreError};
use catalog::{CatalogError, Provenance};
use debian::{ArchiveError as DebianError, SpecError};
use directory::DirectoryError;

/// Why there is no root.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// A directory cannot be imported.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// An archive cannot be read.
    #[error("`{path}` is not a root archive")]
    Archive {
        /// The archive.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: TarError,
    },
    /// An image cannot be a root.
    #[error("`{path}` looks like {filesystem} and cannot be a root")]
    Image {
        /// The image.
        path: PathBuf,
        /// What it looks like.
        filesystem: Filesystem,
        /// What is wrong with it.
        #[source]
        source: ReadImageError,
    },
    /// An image with a compression that no kernel undoes.
    #[error("`{path}` is compressed with {compression}, which Linux does not read in squashfs images")]
    Compression {
        /// The image.
        path: PathBuf,
        /// How it is compressed.
        compression: squashfs::Compression,
    },
    /// Neither a regular file nor a folder.
    #[error("`{0}` is not a regular file")]
    NotAFile(PathBuf),
    /// A file changed while it was read.
    #[error("`{0}` changed while it was read")]
    Changed(PathBuf),
    /// A file cannot be opened.
    #[error("cannot read `{path}`")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// Text that names no Debian root.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Debian's archive.
    #[error(transparent)]
    Debian(#[from] DebianError),
    /// The image cannot be made.
    #[error(transparent)]
    Made(#[from] ImageError),
    /// What is known of the root cannot be kept.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// The store fails.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The store's file system fails.
    #[error("cannot {what}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// A root of packages is made in a machine; [`import`] has none.
    #[error("a root of Debian packages needs a machine to configure it")]
    NeedsMachine,
    /// A root whose files cannot be taken.
    #[error("the files of this root cannot be taken: it is a live one, or a compressed image")]
    NoTree,
    /// The configuring machine could not be driven.
    #[error("the root's machine cannot be driven")]
    Machine(#[from] MachineError),
    /// The conversation with its agent failed.
    #[error("the root could not be configured")]
    Session(#[from] SessionError),
    /// The configuring machine died.
    #[error("the machine that configures the root died: {0}")]
    Died(Death),
    /// A maintainer script failed.
    #[error("the packages could not be configured ({how}); the last of what they said:\n{said}")]
    Configure {
        /// How the configuring command ended.
        how: String,
        /// The end of its output.
        said: String,
    },
    /// What the configuring machine wrote could not be carried out.
    #[error("the configured root cannot be collected")]
    Transfer(#[from] TransferError),
    /// What it wrote does not fit the unpacked tree.
    #[error("the configured root is not a tree")]
    Tree(#[from] TreeError),
}

impl RootError {
    /// Whether the root that was named cannot be one, rather than something failing on the way to it.
    pub fn is_the_users(&self) -> bool {
        matches!(
            self,
            Self::Directory(error) if !matches!(error, DirectoryError::Store(_))
        ) || matches!(
            self,
            Self::Archive { .. }
                | Self::Image { .. }
                | Self::Compression { .. }
                | Self::NotAFile(_)
                | Self::Changed(_)
                | Self::Read { .. }
                | Self::Spec(_)
        )
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Directory(error) => error.hint(),
            Self::Spec(error) => error.hint(),
            Self::Debian(error) => error.hint(),
            Self::Archive { .. } | Self::NotAFile(_) => Some(
                "file: takes a tar archive, plain or with gzip, xz or zstd, or a squashfs or erofs image"
                    .to_owned(),
            ),
            Self::Compression { .. } => Some("make it anew with zstd, xz, lz4 or gzip".to_owned()),
            Self::Changed(_) => Some("try again when nothing writes to it".to_owned()),
            Self::Store(error) => error.hint(),
            _ => None,
        }
    }
}

/// A root, ready to be attached.
#[derive(Debug, Clone)]
pub enum Root {
    /// An image in the store.
    Image(Image),
    /// A directory as it stands, to be shared.
    Live(PathBuf),
}

impl Root {
    /// The digest that names the root; none for a live one.
    pub fn digest(&self) -> Option<Digest> {
        match self {
            Self::Image(image) => Some(image.digest),
            Self::Live(_) => None,
        }
    }

    fn image(store: &Store, tree: &Tree) -> Result<Self, RootError> {
        let image = Image::of_tree(store, tree)?;
        catalog::keep_manifest(store, tree)?;
        Ok(Self::Image(image))
    }
}

/// The root of a source that needs no machine: a directory, an archive, or a live directory.
///
/// # Errors
/// [`RootError`].
pub fn import(store: &Store, spec: &RootSpec) -> Result<Root, RootError> {
    let root = match spec {
        RootSpec::Directory(path) => Root::image(store, &directory::import(store, path)?)?,
        RootSpec::File(path) => file::import(store, path)?,
        RootSpec::Live(path) if path.is_dir() => Root::Live(path.clone()),
        RootSpec::Live(path) => return Err(DirectoryError::NotADirectory(path.clone()).into()),
        RootSpec::Debian(_) | RootSpec::Packages(_) => return Err(RootError::NeedsMachine),
    };
    if let Root::Image(image) = &root {
        catalog::note(store, image, spec, Provenance::default)?;
    }
    Ok(root)
}
