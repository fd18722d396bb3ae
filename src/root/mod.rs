//! Roots: from a named source to a read-only image whose identity is its tree's digest.
//!
//! A directory or an archive becomes a tree at once. Debian packages are verified and unpacked here, and configured by
//! their own scripts in a machine, never on the host. [`image`] writes trees as erofs.

pub mod bundle;
mod configure;
pub mod debian;
mod decompress;
pub mod directory;
pub mod image;
pub mod modules;

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::PathBuf;

use kiln_artifact::archive::{self, tar::TarError};
use kiln_artifact::tree::{Tree, TreeError};
use kiln_digest::Digest;

pub use configure::Workshop;
pub use image::ImageError;

use crate::agent::{SessionError, TransferError};
use crate::machine::{Death, MachineError};
use crate::plan::RootSpec;
use crate::store::{Store, StoreError};
use debian::{ArchiveError as DebianError, SpecError};
use decompress::Compression;
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
    Image(#[from] ImageError),
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
        matches!(self, Self::Directory(_) | Self::Archive { .. } | Self::Read { .. } | Self::Spec(_))
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Spec(error) => error.hint(),
            Self::Debian(error) => error.hint(),
            Self::Archive { .. } => {
                Some("file: takes a tar archive, plain or with gzip, xz or zstd".to_owned())
            }
            _ => None,
        }
    }
}

/// A root, ready to be attached.
#[derive(Debug, Clone)]
pub enum Root {
    /// An erofs image.
    Image {
        /// Digest of the tree's manifest.
        tree: Digest,
        /// The image.
        path: PathBuf,
    },
    /// A directory as it stands, to be shared.
    Live(PathBuf),
}

impl Root {
    /// The digest that names the root; none for a live one.
    pub fn digest(&self) -> Option<Digest> {
        match self {
            Self::Image { tree, .. } => Some(*tree),
            Self::Live(_) => None,
        }
    }

    fn image(store: &Store, tree: &Tree) -> Result<Self, RootError> {
        let digest = image::make(store, tree)?;
        Ok(Self::Image { tree: digest, path: image::path(store, &digest) })
    }
}

/// The root of a source that needs no machine: a directory, an archive, or a live directory.
///
/// # Errors
/// [`RootError`].
pub fn import(store: &Store, spec: &RootSpec) -> Result<Root, RootError> {
    match spec {
        RootSpec::Directory(path) => Root::image(store, &directory::import(store, path)?),
        RootSpec::Archive(path) => {
            let tree = read_archive(store, path)?;
            Root::image(store, &tree)
        }
        RootSpec::Live(path) if path.is_dir() => Ok(Root::Live(path.clone())),
        RootSpec::Live(path) => Err(DirectoryError::NotADirectory(path.clone()).into()),
        RootSpec::Debian(_) => Err(RootError::NeedsMachine),
    }
}

/// What a root archive may hold.
const ARCHIVE_LIMITS: archive::tar::Limits =
    archive::tar::Limits { members: 10_000_000, content_bytes: 1 << 40 };

fn read_archive(store: &Store, path: &PathBuf) -> Result<Tree, RootError> {
    let fail = |source| RootError::Read { path: path.clone(), source };
    let file = File::open(path).map_err(fail)?;
    let (digest, _) = Digest::of_reader(&file).map_err(fail)?;
    let key = Digest::of(format!("archive 1 {digest}").as_bytes());
    // The tree of an archive that was read before is remembered by its manifest.
    if let Some(manifest) = store.records("archive").get::<Digest>(&key)
        && let Ok(bytes) = std::fs::read(store.blobs().path(&manifest))
        && let Ok(tree) = Tree::parse_manifest(&bytes)
    {
        return Ok(tree);
    }
    let file = BufReader::new(File::open(path).map_err(fail)?);
    let reader = decompressed(file).map_err(fail)?;
    let tree = archive::tar::read(reader, &mut Sink(store), &ARCHIVE_LIMITS)
        .map_err(|source| RootError::Archive { path: path.clone(), source })?;
    let io = |source| RootError::Io { what: "remember an archive", source };
    let (manifest, _) = store.blobs().put(&tree.manifest()[..]).map_err(io)?;
    store.sync()?;
    store.records("archive").put(&key, &manifest).map_err(io)?;
    Ok(tree)
}

/// A sink for archives that puts contents into the store.
struct Sink<'a>(&'a Store);

impl archive::ContentSink for Sink<'_> {
    fn store(&mut self, reader: &mut dyn Read) -> io::Result<(Digest, u64)> {
        self.0.blobs().put(reader)
    }
}

/// Takes off the compression that the first bytes show.
fn decompressed(mut file: BufReader<File>) -> io::Result<Box<dyn Read>> {
    let compression = match io::BufRead::fill_buf(&mut file)? {
        [0x1f, 0x8b, ..] => Compression::Gzip,
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Compression::Xz,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
        _ => Compression::None,
    };
    compression.reader(file)
}
