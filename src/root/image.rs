//! Root images: files that a machine's kernel mounts. A tree is written once as an uncompressed erofs file, kept under
//! the digest of its manifest; an image that was given as one is kept under the digest of its bytes (`super::file`).

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Seek as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use kiln_artifact::erofs::{self, ErofsError};
use kiln_artifact::tree::{Kind, Tree};
use kiln_digest::Digest;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::stat::Stat;
use crate::store::Store;
use crate::writes::{self, Unfinished};

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
    /// Somebody takes images away as fast as they are made.
    #[error("the image `{0}` was removed again and again")]
    Removed(PathBuf),
}

/// How long an image is waited for. A process that is just being started holds all that its parent has open.
const LOCK_PATIENCE: Duration = Duration::from_millis(300);

/// The family of records that say which bytes an image has.
pub const SUMS: &str = "image";

/// What is on record of an image's bytes.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum OnRecord {
    /// Their digest.
    Sum(Digest),
    /// The same, and the file that had them when it was read last.
    Read(Digest, Stat),
}

/// The digest of the bytes that the image `digest` has, where that is on record.
pub fn sum(store: &Store, digest: &Digest) -> Option<Digest> {
    Some(match store.records(SUMS).peek(digest)? {
        OnRecord::Sum(sum) | OnRecord::Read(sum, _) => sum,
    })
}

/// Whether the image `digest`, open as `file`, is what was written. It is read only where it is not the file that was read
/// last, by its times.
fn is_whole(store: &Store, digest: &Digest, mut file: &File) -> io::Result<bool> {
    let stat = Stat::of(&file.metadata()?);
    let sum = match store.records(SUMS).peek(digest) {
        Some(OnRecord::Read(_, seen)) if seen == stat => return Ok(true),
        Some(OnRecord::Sum(sum) | OnRecord::Read(sum, _)) => sum,
        None => return Ok(false),
    };
    let (found, _) = Digest::of_reader(file)?;
    file.rewind()?;
    if found == sum {
        // Without it, it is read again.
        let _ = store.records(SUMS).put(digest, &OnRecord::Read(sum, stat));
    }
    Ok(found == sum)
}

/// What is on an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Filesystem {
    /// erofs: kiln's own, or another tool's.
    Erofs,
    /// squashfs 4.0.
    Squashfs,
}

impl Filesystem {
    /// Its name, as `mount` and the kernel's modules have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Erofs => "erofs",
            Self::Squashfs => "squashfs",
        }
    }
}

impl fmt::Display for Filesystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An image in the store, open. While any process holds one, `kiln root rm` leaves the image alone.
#[derive(Debug, Clone)]
pub struct Image {
    /// Digest of the tree's manifest; of the file's bytes where it was given as an image.
    pub digest: Digest,
    /// What is on it.
    pub filesystem: Filesystem,
    // A shared lock belongs to it, and to every descriptor made of it: a QEMU that outlives us holds it too.
    file: Arc<File>,
}

/// What became of an attempt to have an image for oneself.
#[derive(Debug)]
pub(super) enum Removal {
    /// It was taken away.
    Done,
    /// There is none.
    Missing,
    /// A process holds it.
    InUse,
}

impl Image {
    /// Opens the image and holds it; none where the store has none. One that is not what was written is taken away.
    ///
    /// # Errors
    /// What opening and locking say.
    pub fn open(store: &Store, digest: &Digest, filesystem: Filesystem) -> io::Result<Option<Self>> {
        let path = image_path(store, digest, filesystem);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        // Whoever removes it holds the lock for a moment.
        file.lock_shared()?;
        // It may have been removed between the two.
        if file.metadata()?.nlink() == 0 {
            return Ok(None);
        }
        if !is_whole(store, digest, &file)? {
            writes::remove(&path)?;
            store.note_damage(path);
            return Ok(None);
        }
        Ok(Some(Self { digest: *digest, filesystem, file: Arc::new(file) }))
    }

    /// Writes the image of `tree` unless it is there, and holds it.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn of_tree(store: &Store, tree: &Tree) -> Result<Self, ImageError> {
        let digest = make(store, tree)?;
        Self::made(store, &digest, Filesystem::Erofs, || make(store, tree).map(drop))
    }

    /// Opens an image that was just made, and makes it again where another process removed it meanwhile.
    pub(super) fn made<E: From<ImageError>>(
        store: &Store,
        digest: &Digest,
        filesystem: Filesystem,
        mut again: impl FnMut() -> Result<(), E>,
    ) -> Result<Self, E> {
        let path = image_path(store, digest, filesystem);
        for _ in 0..3 {
            let opened = Self::open(store, digest, filesystem);
            match opened.map_err(|source| ImageError::Io { path: path.clone(), source })? {
                Some(image) => return Ok(image),
                None => again()?,
            }
        }
        Err(ImageError::Removed(path).into())
    }

    /// Takes an image out of the store unless somebody holds it. What else names it goes first, by `forget`.
    pub(super) fn remove(
        store: &Store,
        digest: &Digest,
        filesystem: Filesystem,
        forget: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<Removal> {
        let path = image_path(store, digest, filesystem);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return forget().map(|()| Removal::Missing);
            }
            file => file?,
        };
        let give_up = Instant::now() + LOCK_PATIENCE;
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(fs::TryLockError::WouldBlock) if Instant::now() < give_up => {
                    thread::sleep(Duration::from_millis(5));
                }
                Err(fs::TryLockError::WouldBlock) => return Ok(Removal::InUse),
                Err(fs::TryLockError::Error(error)) => return Err(error),
            }
        }
        forget()?;
        // It goes for good before what says what its bytes are.
        writes::remove(&path)?;
        writes::sync_folder(&store.images())?;
        store.records(SUMS).remove(digest)?;
        Ok(Removal::Done)
    }

    /// A descriptor of it for a machine.
    ///
    /// # Errors
    /// What dup(2) says.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        Ok(self.file.try_clone()?.into())
    }

    /// The open file.
    pub(super) fn file(&self) -> &File {
        &self.file
    }
}

/// Where the erofs image of the tree `digest` lies if it was made.
pub fn path(store: &Store, digest: &Digest) -> PathBuf {
    image_path(store, digest, Filesystem::Erofs)
}

pub(super) fn image_path(store: &Store, digest: &Digest, filesystem: Filesystem) -> PathBuf {
    store.images().join(format!("{digest}.{filesystem}"))
}

/// Makes the image of `tree` unless it is there, and gives the tree's digest.
///
/// # Errors
/// [`ImageError`].
pub fn make(store: &Store, tree: &Tree) -> Result<Digest, ImageError> {
    let digest = tree.digest();
    let path = path(store, &digest);
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| ImageError::Io { path, source }
    };
    if Image::open(store, &digest, Filesystem::Erofs).map_err(at(&path))?.is_some() {
        return Ok(digest);
    }
    let sizes = tree.iter().map(|(_, node)| match node.kind {
        Kind::File { size, .. } => size,
        _ => 0,
    });
    let _room = store.reserve(sizes.sum()).map_err(at(&path))?;
    let mut file = Unfinished::new_in(&store.temporary()).map_err(at(&path))?;
    erofs::write(tree, store.blobs(), file.file_mut())?;
    keep(store, file, &digest, &path).map_err(at(&path))?;
    Ok(digest)
}

/// Gives the finished image `digest` its name, and notes what its bytes are: an image of a tree is not named by them.
pub(super) fn keep(store: &Store, file: Unfinished, digest: &Digest, path: &Path) -> io::Result<()> {
    file.set_mode(0o444)?;
    let (sum, _) = Digest::of_reader(File::open(file.path())?)?;
    // An image is believed by its name: whatever a power failure takes, none has one that is not whole and on record.
    file.sync()?;
    let sums = store.records(SUMS);
    sums.put(digest, &OnRecord::Sum(sum))?;
    sums.sync()?;
    file.persist(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_is_held_is_not_removed() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path()).expect("a store");
        let image = Image::of_tree(&store, &Tree::new()).expect("room");
        let remove = || {
            let forgotten = std::cell::Cell::new(false);
            let forget = || {
                forgotten.set(true);
                Ok(())
            };
            let removal = Image::remove(&store, &image.digest, image.filesystem, forget).expect("a store");
            (removal, forgotten.get())
        };
        assert!(matches!(remove(), (Removal::InUse, false)));
        // Not the value but the descriptor holds it: a machine's copy does so alone.
        let descriptor = image.descriptor().expect("a descriptor");
        let (digest, filesystem) = (image.digest, image.filesystem);
        drop(image);
        let remove = |digest: &Digest| Image::remove(&store, digest, filesystem, || Ok(())).expect("a store");
        assert!(matches!(remove(&digest), Removal::InUse));
        drop(descriptor);
        assert!(matches!(remove(&digest), Removal::Done));
        assert!(matches!(remove(&digest), Removal::Missing));
        assert!(Image::open(&store, &digest, filesystem).expect("a store").is_none());
    }

    #[test]
    fn an_image_that_is_not_what_was_written_is_taken_away_and_made_anew() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path()).expect("a store");
        let (content, size) = store.blobs().put(&b"content"[..]).expect("room");
        let mut tree = Tree::new();
        let node = |kind| kiln_artifact::tree::Node { kind, meta: Default::default() };
        tree.insert(kiln_artifact::tree::TreePath::root(), node(Kind::Directory));
        let path = kiln_artifact::tree::TreePath::new(b"file").expect("a path");
        tree.insert(path, node(Kind::File { digest: content, size }));
        let image = Image::of_tree(&store, &tree).expect("room");
        let place = path_of(&store, &image);
        let whole = fs::read(&place).expect("there");
        let open = || Image::open(&store, &image.digest, image.filesystem).expect("a store");
        assert!(open().is_some() && store.take_damage().is_empty());
        // Touched, it is what it was.
        File::open(&place).and_then(|file| file.set_modified(std::time::UNIX_EPOCH)).expect("ours");
        assert!(open().is_some());
        // Nothing but the stamp is looked at where that is the same.
        let record = store.records(SUMS).path(&image.digest);
        assert!(fs::read_to_string(record).expect("there").contains('['));
        fs::remove_file(&place).expect("there");
        let mut flipped = whole.clone();
        flipped[5000] ^= 1;
        fs::write(&place, flipped).expect("room");
        assert!(open().is_none() && !place.exists());
        assert_eq!(store.take_damage().len(), 1);
        assert_eq!(make(&store, &tree).expect("room"), image.digest);
        assert!(fs::read(&place).expect("there") == whole && open().is_some());
    }

    fn path_of(store: &Store, image: &Image) -> PathBuf {
        image_path(store, &image.digest, image.filesystem)
    }
}
