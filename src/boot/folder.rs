//! A disk with an EFI system partition that holds a folder, made when it is booted, by kiln's own writers.
//!
//! The folder is not changed, and what the guest writes on the disk goes with it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use kiln_artifact::fat::{self, FatError};
use kiln_artifact::gpt::{self, GptError};
use kiln_artifact::tree::{Contents, Kind, Meta, Node, PathError, Tree, TreePath};
use kiln_digest::Digest;

/// Where firmware looks for a program on a disk that it knows nothing of (UEFI 2.10 §3.5.1.1).
const DEFAULT_PROGRAM: [&str; 3] = ["EFI", "EFI/BOOT", "EFI/BOOT/BOOTX64.EFI"];
/// What a partition is called unless said.
const LABEL: &str = "KILN";
/// What a partition has beyond what it takes to hold the folder: loaders write to where they came from.
const ROOM_BYTES: u64 = 16 << 20;

/// Why a folder cannot be put on a disk.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// Something cannot be read or written.
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
    /// A path that grew too long.
    #[error("the path of {} is no path on a disk", .path.display())]
    Path {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: PathError,
    },
    /// It is neither a file nor a folder.
    #[error("{} is neither a file nor a folder, and FAT has nothing else", .0.display())]
    Kind(PathBuf),
    /// FAT does not hold it.
    #[error(transparent)]
    Fat(#[from] FatError),
    /// The disk.
    #[error(transparent)]
    Disk(#[from] GptError),
}

impl FolderError {
    /// What the user can do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Fat(error) => error.hint().map(ToOwned::to_owned),
            _ => None,
        }
    }

    /// Whether what was named is to blame, and not the host.
    #[must_use]
    pub fn is_the_users(&self) -> bool {
        matches!(
            self,
            Self::Path { .. }
                | Self::Kind(_)
                | Self::Fat(FatError::Name { .. } | FatError::SameName { .. } | FatError::Node { .. })
        )
    }
}

/// Files by what is in them.
#[derive(Default)]
struct Files(BTreeMap<Digest, PathBuf>);

impl Contents for Files {
    fn open(&self, digest: &Digest) -> io::Result<Box<dyn Read + '_>> {
        let path = self.0.get(digest).ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(File::open(path)?))
    }
}

impl Files {
    /// The content of `path`: its digest and length.
    fn add(&mut self, path: &Path) -> Result<Kind, FolderError> {
        let read = File::open(path).and_then(Digest::of_reader);
        let (digest, size) = read.map_err(io_error("read", path))?;
        self.0.insert(digest, path.to_owned());
        Ok(Kind::File { digest, size })
    }
}

/// Makes the disk in `scratch`, in a file without a name.
///
/// # Errors
/// FAT cannot hold what is in the folder, or it cannot be read or written.
pub fn disk_of_folder(
    folder: &Path,
    label: Option<fat::Label>,
    scratch: &Path,
) -> Result<OwnedFd, FolderError> {
    let mut files = Files::default();
    let tree = tree(folder, &mut |path, _| files.add(path))?;
    disk(&tree, &files, label, scratch)
}

/// Makes a disk that holds one program where firmware looks for it.
///
/// # Errors
/// As [`disk_of_folder`].
pub fn disk_of_program(program: &Path, scratch: &Path) -> Result<OwnedFd, FolderError> {
    let mut files = Files::default();
    let mut tree = Tree::new();
    for name in DEFAULT_PROGRAM {
        let kind = if name.ends_with(".EFI") { files.add(program)? } else { Kind::Directory };
        insert(&mut tree, Path::new(name), kind)?;
    }
    disk(&tree, &files, None, scratch)
}

/// Whether FAT can hold all beneath `folder`.
///
/// # Errors
/// What it cannot hold.
pub fn check(folder: &Path) -> Result<(), FolderError> {
    // Names and lengths are all that counts.
    let tree = tree(folder, &mut |_, size| Ok(Kind::File { digest: Digest::of(b""), size }))?;
    fat::least_bytes(&tree)?;
    Ok(())
}

fn disk(
    tree: &Tree,
    files: &Files,
    label: Option<fat::Label>,
    scratch: &Path,
) -> Result<OwnedFd, FolderError> {
    let image = tempfile::NamedTempFile::new_in(scratch).map_err(io_error("write in", scratch))?;
    let size_bytes = (fat::least_bytes(tree)? + ROOM_BYTES).next_multiple_of(1 << 20);
    let options = fat::Options {
        size_bytes: Some(size_bytes),
        label: label.or(fat::Label::new(LABEL)),
        ..fat::Options::default()
    };
    gpt::write_esp(tree, files, image.as_file(), &options)?;
    // QEMU takes a descriptor only as it is opened: for reading.
    let image = File::open(image.path()).map_err(io_error("read", image.path()))?;
    Ok(image.into())
}

/// All beneath `folder`, in which `file` says what a file of some length is.
fn tree(
    folder: &Path,
    file: &mut dyn FnMut(&Path, u64) -> Result<Kind, FolderError>,
) -> Result<Tree, FolderError> {
    let mut tree = Tree::new();
    let mut waiting = vec![folder.to_owned()];
    while let Some(next) = waiting.pop() {
        for entry in fs::read_dir(&next).map_err(io_error("read", &next))? {
            let path = entry.map_err(io_error("read", &next))?.path();
            let meta = fs::symlink_metadata(&path).map_err(io_error("read", &path))?;
            let kind = if meta.is_dir() {
                waiting.push(path.clone());
                Kind::Directory
            } else if meta.is_file() {
                file(&path, meta.len())?
            } else {
                return Err(FolderError::Kind(path));
            };
            insert(&mut tree, path.strip_prefix(folder).unwrap_or(&path), kind)?;
        }
    }
    Ok(tree)
}

fn insert(tree: &mut Tree, path: &Path, kind: Kind) -> Result<(), FolderError> {
    let place = TreePath::new(path.as_os_str().as_bytes())
        .map_err(|source| FolderError::Path { path: path.to_owned(), source })?;
    tree.insert(place, Node { kind, meta: Meta { mode: 0o755, ..Meta::default() } });
    Ok(())
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FolderError + use<> {
    let path = path.to_owned();
    move |source| FolderError::Io { what, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fat_cannot_hold_is_named() {
        for name in ["a:b", "a?", "end.", "end ", "tab\t"] {
            let folder = tempfile::tempdir().expect("a folder");
            fs::write(folder.path().join(name), "x").expect("room");
            assert!(matches!(check(folder.path()), Err(FolderError::Fat(FatError::Name { .. }))), "{name}");
        }
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["BOOTX64.EFI", "über", "a+b,c;d=[e]", ".hidden", &"x".repeat(255)] {
            fs::write(folder.path().join(name), "x").expect("room");
        }
        check(folder.path()).expect("FAT holds it");
        disk_of_folder(folder.path(), None, folder.path()).expect("FAT holds it");
        std::os::unix::fs::symlink("Name", folder.path().join("link")).expect("a link");
        assert!(matches!(check(folder.path()), Err(FolderError::Kind(_))));
        fs::remove_file(folder.path().join("link")).expect("it was made");
        fs::write(folder.path().join("ÜBER"), "x").expect("room");
        assert!(matches!(check(folder.path()), Err(FolderError::Fat(FatError::SameName { .. }))));
    }
}
