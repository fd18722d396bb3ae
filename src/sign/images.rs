//! Signs the images that a build's record names: each read once, held against the record, signed as it was read, and
//! given its name when all of them are whole.

use std::collections::BTreeMap;
use std::fs;
use std::fs::TryLockError;
use std::io;
use std::path::{Path, PathBuf};

use kiln_artifact::uefi::Signer;
use kiln_artifact::uefi::authenticode::{self, Others, Request, SignatureError};
use kiln_artifact::uefi::pe::{Image, PeError};
use kiln_artifact::uefi::uki::{Uki, UkiError};
use kiln_digest::Digest;

use super::folder::{Folder, FolderError};
use super::keys::{KeyError, Keys};
use super::record::{self, Record, RecordError, Unified};

/// Offsets in an image have 32 bits.
const IMAGE_BYTES_MAX: u64 = 1 << 32;
/// A record is some lines an image.
const RECORD_BYTES_MAX: u64 = 16 << 20;
/// Of 16,384 bits at most.
const SIGNATURE_BYTES_MAX: u64 = 2048;
/// What [`request`] writes behind an image's name, and what [`Source::Folder`] looks for.
const REQUEST: &str = "to-be-signed";
const SIGNATURE: &str = "signature";

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
    /// WORK has no record.
    #[error("`{0}` has no record of a build (`{path}`)", path = record::PATH)]
    NoRecord(PathBuf),
    /// Steps see WORK, and would see the keys.
    #[error("SECRETS (`{secrets}`) and WORK (`{work}`) lie in one another")]
    Shared {
        /// SECRETS.
        secrets: PathBuf,
        /// WORK.
        work: PathBuf,
    },
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
            Self::NoRecord(_) => {
                Some("build first, or copy the whole WORK of a build; WORK says where".to_owned())
            }
            Self::Shared { .. } => Some("keep the keys elsewhere and set SECRETS".to_owned()),
            Self::Digest { .. } | Self::Unknown { .. } | Self::Gone { .. } => {
                Some("build again; if nobody changed it, ask who did".to_owned())
            }
            Self::Unified { source, .. } => source.hint().map(str::to_owned),
            _ => None,
        }
    }
}

/// A WORK whose record was read, and in which no other kiln signs.
#[derive(Debug)]
pub struct Work {
    folder: Folder,
    /// What its build says.
    pub record: Record,
    _lock: fs::File,
}

/// Where signatures come from.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// db's key.
    Keys,
    /// Files that others made of what [`request`] wrote: NAME.signature in this folder.
    Folder(&'a Path),
}

impl Work {
    /// Opens `work`.
    ///
    /// # Errors
    /// [`SignError`].
    pub fn open(work: &Path, secrets: &Path) -> Result<Self, SignError> {
        if let (Ok(work), Ok(secrets)) = (fs::canonicalize(work), fs::canonicalize(secrets))
            && (work.starts_with(&secrets) || secrets.starts_with(&work))
        {
            return Err(SignError::Shared { secrets, work });
        }
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
        Ok(Self { folder, record, _lock: lock })
    }

    /// Checks everything that signing checks, and signs nothing.
    ///
    /// # Errors
    /// [`SignError`].
    pub fn check(&self) -> Result<(), SignError> {
        self.check_images()?;
        self.record.unified.iter().try_for_each(|image| {
            let bytes = self.read(image)?;
            parse(image, &bytes).map(drop)
        })
    }

    /// Writes what is to be signed by `signer` into `folder`, a file an image, and returns their names.
    ///
    /// # Errors
    /// [`SignError`].
    pub fn request(&self, signer: &Signer, folder: &Path) -> Result<Vec<String>, SignError> {
        self.check_images()?;
        let folder = Folder::open(folder)?;
        let mut written = Vec::new();
        for image in &self.record.unified {
            let bytes = self.read(image)?;
            let parsed = parse(image, &bytes)?;
            let failed = |source| SignError::Signature { file: image.file.clone(), source };
            let request = Request::new(&parsed, signer).map_err(failed)?;
            let name = format!("{}.{REQUEST}", image.name());
            folder.write(&name, request.to_be_signed(), 0o644)?.put()?;
            written.push(name);
        }
        Ok(written)
    }

    /// Signs every image by `keys` with signatures from `source`, and puts the enrolment files beside them.
    ///
    /// # Errors
    /// [`SignError`]; no image has been given its name then, but for one: that the system refuses to rename.
    pub fn sign(&self, keys: &Keys, source: Source<'_>) -> Result<(), SignError> {
        self.check_images()?;
        let signatures = match source {
            Source::Keys => None,
            Source::Folder(path) => Some(Folder::open(path)?),
        };
        let mut folders: BTreeMap<PathBuf, Folder> = BTreeMap::new();
        let targets = self.record.unified.iter().filter_map(|image| Path::new(&image.signed).parent());
        for path in targets.chain([Path::new(&self.record.keys)]) {
            if !folders.contains_key(path) {
                let folder = self.made(path)?;
                folder.sweep()?;
                folders.insert(path.to_owned(), folder);
            }
        }
        let at = |path: &Path| folders.get(path).unwrap_or(&self.folder);
        let mut unfinished = Vec::new();
        for (name, bytes) in keys.public()? {
            unfinished.push(at(Path::new(&self.record.keys)).write(name, &bytes, 0o644)?);
        }
        for image in &self.record.unified {
            // The one copy that is held against the record, hashed, signed and written.
            let bytes = self.read(image)?;
            let parsed = parse(image, &bytes)?;
            let failed = |source| SignError::Signature { file: image.file.clone(), source };
            let request = Request::new(&parsed, keys.db()).map_err(failed)?;
            let signature = match &signatures {
                None => keys.sign(request.to_be_signed())?,
                Some(folder) => {
                    folder.read(Path::new(&format!("{}.{SIGNATURE}", image.name())), SIGNATURE_BYTES_MAX)?
                }
            };
            let signed = request.attach(&signature, Others::Keep).map_err(failed)?;
            verify(&signed, keys.db()).map_err(failed)?;
            let parent = Path::new(&image.signed).parent().unwrap_or(Path::new(""));
            unfinished.push(at(parent).write(image.name(), &signed, 0o644)?);
        }
        unfinished.into_iter().try_for_each(|file| Ok(file.put()?))
    }

    /// The folder at `path` below WORK; its parts are made where they are missing.
    fn made(&self, path: &Path) -> Result<Folder, SignError> {
        let mut folder = Folder::open(self.folder.path())?;
        for component in path.components() {
            folder = folder.made(Path::new(&component))?;
        }
        Ok(folder)
    }

    fn check_images(&self) -> Result<(), SignError> {
        for image in &self.record.images {
            let read = self.folder.file(Path::new(&image.file)).map(Digest::of_reader)?;
            let path = self.folder.path().join(&image.file);
            let (found, _) = read.map_err(|source| FolderError::System { what: "read", path, source })?;
            same(&image.file, found, image.sha256)?;
        }
        Ok(())
    }

    fn read(&self, image: &Unified) -> Result<Vec<u8>, SignError> {
        Ok(self.folder.read(Path::new(&image.file), IMAGE_BYTES_MAX)?)
    }
}

fn same(file: &str, found: Digest, recorded: Digest) -> Result<(), SignError> {
    if found == recorded { Ok(()) } else { Err(SignError::Digest { file: file.to_owned(), found, recorded }) }
}

/// The image in `bytes`, after it and each of its sections were found to be what the record has.
fn parse<'a>(image: &Unified, bytes: &'a [u8]) -> Result<Image<'a>, SignError> {
    let file = || image.file.clone();
    let unified = Uki::read(bytes).map_err(|source| SignError::Unified { file: file(), source })?;
    if !unified.image().certificates().is_empty() {
        return Err(SignError::Signed(file()));
    }
    for (name, content) in unified.payloads() {
        let recorded = image.sections.get(name);
        let recorded =
            recorded.ok_or_else(|| SignError::Unknown { file: file(), section: name.to_owned() })?;
        same(&format!("{} ({name})", image.file), Digest::of(content), *recorded)?;
    }
    for name in image.sections.keys() {
        if unified.section(name).is_none() {
            return Err(SignError::Gone { file: file(), section: name.clone() });
        }
    }
    same(&image.file, Digest::of(bytes), image.sha256)?;
    Ok(unified.image().clone())
}

/// Reads again what is about to be written.
fn verify(signed: &[u8], signer: &Signer) -> Result<(), SignatureError> {
    let image = Image::parse(signed).map_err(|error: PeError| SignatureError::Image(error))?;
    authenticode::verify(&image, signer)
}
