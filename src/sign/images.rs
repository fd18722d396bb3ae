//! Signs what a record names: each image held against the record, signed as it was read or assembled, and given its names
//! when all of them are whole.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kiln_artifact::uefi::Signer;
use kiln_artifact::uefi::authenticode::{self, Others, Request, SignatureError};
use kiln_artifact::uefi::pe::Image;
use kiln_digest::Digest;

use super::assemble::Target;
use super::error::SignError;
use super::folder::{Folder, put};
use super::keys::Keys;
use super::local::Local;
use super::work::{IMAGE_BYTES_MAX, Roots, Work};
use crate::threads;

/// Of 16,384 bits at most.
const SIGNATURE_BYTES_MAX: u64 = 2048;
/// What [`Work::request`] writes behind an image's name, and what [`Source::Folder`] looks for.
const REQUEST: &str = "to-be-signed";
const SIGNATURE: &str = "signature";

/// Where signatures come from.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// db's key.
    Keys,
    /// Files that others made of what [`Work::request`] wrote: NAME.signature in this folder.
    Folder(&'a Path),
}

/// A file that signing put out.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Written {
    /// Where, from WORK.
    pub path: String,
    /// Its content.
    pub sha256: Digest,
    /// Its length.
    pub size_bytes: usize,
}

impl Written {
    fn of(path: String, bytes: &[u8]) -> Self {
        Self { path, sha256: Digest::of(bytes), size_bytes: bytes.len() }
    }
}

impl Work {
    /// Checks everything that signing checks, and signs nothing.
    ///
    /// # Errors
    /// [`SignError`].
    pub fn check(&self, roots: &Roots, local: &Local<'_>) -> Result<(), SignError> {
        let targets: Vec<_> = self.targets().collect();
        let check = |target: &Target<'_>| {
            let bytes = self.unsigned(*target, roots, local)?;
            parse(*target, &bytes).map(drop)
        };
        threads::map(&targets, "check", check).map(drop)
    }

    /// Holds every signed image in WORK against what would be signed now, its signature against db's certificate, and the enrolment files
    /// against the keys. Returns the list of what it found so, by path.
    ///
    /// # Errors
    /// [`SignError`].
    pub fn verify_signed(
        &self,
        roots: &Roots,
        local: &Local<'_>,
        keys: &Keys,
    ) -> Result<Vec<Written>, SignError> {
        let mut found = Vec::new();
        for (name, bytes) in keys.public()? {
            let path = format!("{}/{name}", self.record.keys);
            if self.folder.read(Path::new(&path), bytes.len() as u64)? != bytes {
                return Err(SignError::Stale(path));
            }
            found.push(Written::of(path, &bytes));
        }
        let targets: Vec<_> = self.targets().collect();
        let signed = threads::map(&targets, "verify", |&target| {
            let unsigned = self.unsigned(target, roots, local)?;
            let wanted = authenticode::digest(&parse(target, &unsigned)?);
            let verified = target.signed().iter().map(|path| {
                let failed = |source| SignError::Verified { file: path.clone(), source };
                let bytes = self.folder.read(Path::new(path), IMAGE_BYTES_MAX)?;
                let image = Image::parse(&bytes).map_err(SignatureError::Image).map_err(failed)?;
                authenticode::verify(&image, keys.db()).map_err(failed)?;
                // By its signature it is what was signed once.
                let is_current = authenticode::digest(&image) == wanted;
                is_current
                    .then(|| Written::of(path.clone(), &bytes))
                    .ok_or_else(|| SignError::Stale(path.clone()))
            });
            verified.collect::<Result<Vec<_>, SignError>>()
        })?;
        found.extend(signed.into_iter().flatten());
        found.sort();
        Ok(found)
    }

    /// Writes what is to be signed by `signer` into `folder`, a file an image, and returns their names.
    ///
    /// # Errors
    /// [`SignError`].
    pub fn request(
        &self,
        roots: &Roots,
        local: &Local<'_>,
        signer: &Signer,
        folder: &Path,
    ) -> Result<Vec<String>, SignError> {
        let folder = Folder::open(folder)?;
        let (mut unfinished, mut names) = (Vec::new(), Vec::new());
        for target in self.targets() {
            let bytes = self.unsigned(target, roots, local)?;
            let image = parse(target, &bytes)?;
            let request = Request::new(&image, signer).map_err(failed(target))?;
            let name = format!("{}.{REQUEST}", target.name());
            unfinished.push(folder.write(&name, request.to_be_signed(), 0o644)?);
            names.push(name);
        }
        put(unfinished)?;
        Ok(names)
    }

    /// Signs every image by `keys` with signatures from `source`, and puts the enrolment files beside them. Returns the list of
    /// exactly what it has put out, by path.
    ///
    /// # Errors
    /// [`SignError`]; nothing of WORK has changed then but for folders that were made.
    pub fn sign(
        &self,
        roots: &Roots,
        local: &Local<'_>,
        keys: &Keys,
        source: Source<'_>,
    ) -> Result<Vec<Written>, SignError> {
        let signatures = match source {
            Source::Keys => None,
            Source::Folder(path) => Some(Folder::open(path)?),
        };
        let enrolment = keys.public()?;
        let mut folders: BTreeMap<PathBuf, Folder> = BTreeMap::new();
        let places = self.targets().flat_map(Target::signed).map(|path| parent(path));
        for path in places.chain([Path::new(&self.record.keys)]) {
            if !folders.contains_key(path) {
                let folder = self.made(path)?;
                folder.sweep()?;
                folders.insert(path.to_owned(), folder);
            }
        }
        let at = |path: &Path| folders.get(path).unwrap_or(&self.folder);
        let (mut unfinished, mut written) = (Vec::new(), Vec::new());
        for (name, bytes) in enrolment {
            written.push(Written::of(format!("{}/{name}", self.record.keys), &bytes));
            unfinished.push(at(Path::new(&self.record.keys)).write(name, &bytes, 0o644)?);
        }
        let targets: Vec<_> = self.targets().collect();
        let signed = threads::map(&targets, "sign", |&target| {
            // The one copy that is hashed, signed and written.
            let bytes = self.unsigned(target, roots, local)?;
            let image = parse(target, &bytes)?;
            let request = Request::new(&image, keys.db()).map_err(failed(target))?;
            let signature = match &signatures {
                None => keys.sign(request.to_be_signed())?,
                Some(folder) => {
                    folder.read(Path::new(&format!("{}.{SIGNATURE}", target.name())), SIGNATURE_BYTES_MAX)?
                }
            };
            let signed = request.attach(&signature, Others::Keep).map_err(failed(target))?;
            verify(&signed, keys.db()).map_err(failed(target))?;
            let sha256 = Digest::of(&signed);
            let mut put_out = Vec::new();
            for path in target.signed() {
                let name = Path::new(path).file_name().and_then(|name| name.to_str()).unwrap_or(path);
                let file = at(parent(path)).write(name, &signed, 0o644)?;
                put_out.push((Written { path: path.clone(), sha256, size_bytes: signed.len() }, file));
            }
            Ok::<_, SignError>(put_out)
        })?;
        for (what, file) in signed.into_iter().flatten() {
            written.push(what);
            unfinished.push(file);
        }
        put(unfinished)?;
        written.sort();
        Ok(written)
    }
}

fn parent(path: &str) -> &Path {
    Path::new(path).parent().unwrap_or(Path::new(""))
}

fn parse<'a>(target: Target<'_>, bytes: &'a [u8]) -> Result<Image<'a>, SignError> {
    Image::parse(bytes).map_err(SignatureError::Image).map_err(failed(target))
}

fn failed(target: Target<'_>) -> impl Fn(SignatureError) -> SignError {
    move |source| SignError::Signature { file: target.file(), source }
}

/// Reads again what is about to be written.
fn verify(signed: &[u8], signer: &Signer) -> Result<(), SignatureError> {
    authenticode::verify(&Image::parse(signed)?, signer)
}
