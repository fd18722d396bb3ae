//! WORK as signing sees it: its record, its parts, each read once and held against the record, and the images that are
//! verified instead of signed.

use std::fs;
use std::fs::TryLockError;
use std::io;
use std::path::Path;

use kiln_artifact::image::ReadAt as _;
use kiln_artifact::verity;
use kiln_digest::Digest;

use super::error::SignError;
use super::folder::{Folder, FolderError};
use super::keys::Keys;
use super::record::{self, File, Record, Verity};
use crate::apart::{self, Kept};
use crate::threads;

/// Offsets in an image have 32 bits.
pub(super) const IMAGE_BYTES_MAX: u64 = 1 << 32;
/// A record is some lines an image.
const RECORD_BYTES_MAX: u64 = 16 << 20;
/// A hash is a line.
const HASH_BYTES_MAX: u64 = 4096;

/// A WORK whose record was read, and in which no other kiln signs.
#[derive(Debug)]
pub struct Work {
    pub(super) folder: Folder,
    /// What its build says.
    pub record: Record,
    lock: fs::File,
}

impl Drop for Work {
    fn drop(&mut self) {
        // Closing it is not enough: a process that is being started holds a copy of every descriptor until its execve(2).
        let _ = self.lock.unlock();
    }
}

/// Root hashes that were computed from their images.
#[derive(Debug)]
pub struct Roots(Vec<(Verity, Digest)>);

impl Roots {
    /// That of an image; none where it was not verified.
    pub fn get(&self, image: &Verity) -> Option<Digest> {
        self.0.iter().find(|(known, _)| known == image).map(|(_, root)| *root)
    }
}

impl Work {
    /// Opens `work`, which must have nothing in common with `secrets` and `config`.
    ///
    /// # Errors
    /// [`SignError`].
    pub fn open(work: &Path, secrets: &Path, config: Option<&Path>) -> Result<Self, SignError> {
        apart::refuse("WORK", work, Kept::Secrets, secrets)?;
        config.map_or(Ok(()), |config| apart::refuse("WORK", work, Kept::Configuration, config))?;
        let folder = Folder::open(work)?;
        let path = Path::new(record::PATH);
        let lock = match folder.file(path) {
            Err(FolderError::System { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Err(SignError::NoRecord(work.to_owned()));
            }
            lock => lock?,
        };
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(SignError::Busy(work.to_owned())),
            Err(TryLockError::Error(source)) => {
                return Err(SignError::Lock { path: work.join(path), source });
            }
        }
        let record = Record::parse(&folder.read(path, RECORD_BYTES_MAX)?)?;
        Ok(Self { folder, record, lock })
    }

    /// Computes the root hash of every image anew, and holds it against its tree and the file of its hash; and the digests
    /// of what else the record names.
    ///
    /// # Errors
    /// [`SignError`].
    pub fn verify(&self) -> Result<Roots, SignError> {
        threads::map(&self.record.images, "images", |image| {
            let read = self.folder.file(Path::new(&image.file)).map(Digest::of_reader)?;
            let path = self.folder.path().join(&image.file);
            let (found, _) = read.map_err(|source| FolderError::System { what: "read", path, source })?;
            same(&image.file, found, image.sha256)
        })?;
        // Kernels share their root.
        let mut images: Vec<&Verity> = Vec::new();
        for image in self.record.kernels.iter().flat_map(|kernel| &kernel.verity) {
            if !images.contains(&image) {
                images.push(image);
            }
        }
        let root = |image: &&Verity| self.root(image).map(|root| ((*image).clone(), root));
        threads::map(&images, "roots", root).map(Roots)
    }

    fn root(&self, image: &Verity) -> Result<Digest, SignError> {
        let hash = self.part(&image.hash, HASH_BYTES_MAX)?;
        // What the initrd reads as one: guest/init takes white space around it.
        let root = std::str::from_utf8(hash.trim_ascii()).ok().and_then(|text| text.parse().ok());
        let root: Digest = root.ok_or_else(|| SignError::Hash(image.hash.file.clone()))?;
        let tree = self.part(&image.tree, IMAGE_BYTES_MAX)?;
        let data = self.folder.file(Path::new(&image.image))?;
        let failed =
            |source| SignError::Verity { image: image.image.clone(), hash: image.hash.file.clone(), source };
        verity::verify(&data, &&tree[..], &root).map_err(failed)?;
        let covered = verity::covered_bytes(&tree).map_err(failed)?;
        let length = data.length().map_err(|source| FolderError::System {
            what: "read",
            path: self.folder.path().join(&image.image),
            source,
        })?;
        if length != covered {
            return Err(SignError::Covered { image: image.image.clone(), length, covered });
        }
        Ok(root)
    }

    /// What signing by `keys` has written: the path of each file from WORK, and the file.
    ///
    /// # Errors
    /// [`SignError`].
    pub fn written(&self, keys: &Keys) -> Result<Vec<(String, fs::File)>, SignError> {
        let enrolment = keys.public()?.into_iter().map(|(name, _)| format!("{}/{name}", self.record.keys));
        let signed = self.record.signed().map(ToOwned::to_owned);
        let open = |path: String| {
            let file = self.folder.file(Path::new(&path))?;
            Ok((path, file))
        };
        signed.chain(enrolment).map(open).collect()
    }

    /// Where signing would put an image and one is already, of an earlier signing.
    pub fn left(&self) -> Vec<&str> {
        self.record.signed().filter(|path| self.folder.file(Path::new(path)).is_ok()).collect()
    }

    /// A part, read once, after it was found to be what the record has.
    pub(super) fn part(&self, part: &File, limit_bytes: u64) -> Result<Vec<u8>, SignError> {
        self.part_of(part, self.folder.file(Path::new(&part.file))?, limit_bytes)
    }

    /// The file of a part, and how long it is: at most `limit_bytes`.
    pub(super) fn part_file(&self, part: &File, limit_bytes: u64) -> Result<(fs::File, u64), SignError> {
        let (file, path) = (self.folder.file(Path::new(&part.file))?, self.folder.path().join(&part.file));
        match file.metadata() {
            Ok(metadata) if metadata.len() > limit_bytes => {
                Err(FolderError::TooLong { path, limit_bytes }.into())
            }
            Ok(metadata) => Ok((file, metadata.len())),
            Err(source) => Err(FolderError::System { what: "look at", path, source }.into()),
        }
    }

    /// As [`Work::part`], of its `file`.
    pub(super) fn part_of(
        &self,
        part: &File,
        file: fs::File,
        limit_bytes: u64,
    ) -> Result<Vec<u8>, SignError> {
        let bytes = self.folder.read_opened(Path::new(&part.file), file, limit_bytes)?;
        same(&part.file, Digest::of(&bytes), part.sha256)?;
        Ok(bytes)
    }

    /// The folder at `path` below WORK; its parts are made where they are missing.
    pub(super) fn made(&self, path: &Path) -> Result<Folder, SignError> {
        let mut folder = Folder::open(self.folder.path())?;
        for component in path.components() {
            folder = folder.made(Path::new(&component))?;
        }
        Ok(folder)
    }
}

pub(super) fn same(file: &str, found: Digest, recorded: Digest) -> Result<(), SignError> {
    if found == recorded { Ok(()) } else { Err(SignError::Digest { file: file.to_owned(), found, recorded }) }
}

#[cfg(test)]
mod tests {
    use super::super::record::Unified;
    use super::*;

    #[test]
    fn what_was_signed_before_is_known_where_it_lies() {
        let folder = tempfile::tempdir().expect("a folder");
        let unified = ["boot/efi/A.EFI", "boot/efi/B.EFI", "boot/efi/C.EFI"].map(|signed| Unified {
            file: "boot/a.efi".to_owned(),
            sha256: Digest::of(b"a"),
            signed: signed.to_owned(),
            sections: Default::default(),
        });
        fs::create_dir_all(folder.path().join("boot/efi/C.EFI")).expect("folders");
        fs::write(folder.path().join("boot/efi/B.EFI"), "signed").expect("room");
        let work = Work {
            folder: Folder::open(folder.path()).expect("a folder"),
            record: Record { unified: unified.into(), ..Record::default() },
            lock: fs::File::open(folder.path()).expect("a folder"),
        };
        assert_eq!(work.left(), ["boot/efi/B.EFI"]);
    }
}
