//! Vendored bytes, read: by digest, and held against it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use kiln_digest::{Digest, Hasher};

use super::{BLOBS, VendorError};

/// A tar archive ends with two blocks of zeros (POSIX.1-2017, pax, "ustar Interchange Format").
const END_BYTES: u64 = 1024;

/// A directory or an archive of vendored bytes. It is looked into when something is wanted of it.
#[derive(Debug)]
pub struct Vendor {
    path: PathBuf,
    /// What is known of it, once somebody has looked.
    found: Mutex<Option<Found>>,
}

#[derive(Debug, Clone)]
enum Found {
    Directory,
    /// Where each blob begins and how long it is, in bytes.
    Archive(BTreeMap<Digest, (u64, u64)>),
}

impl Vendor {
    /// The one at `path`.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), found: Mutex::new(None) }
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The blob that is kept for `digest`, where there is one. What it gives is not verified: [`Vendor::copy`] does that.
    ///
    /// # Errors
    /// [`VendorError`], as its variants say.
    pub fn open(&self, digest: &Digest) -> Result<Option<Box<dyn Read + Send>>, VendorError> {
        // Held while it is looked into, so that one thread does that.
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if found.is_none() {
            *found = Some(look(&self.path)?);
        }
        let at = match &*found {
            Some(Found::Archive(members)) => match members.get(digest) {
                Some(at) => Some(*at),
                None => return Ok(None),
            },
            _ => None,
        };
        drop(found);
        let path = match at {
            None => self.path.join(BLOBS).join(digest.to_string()),
            Some(_) => self.path.clone(),
        };
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound && at.is_none() => return Ok(None),
            Err(error) => return Err(VendorError::io("read", &path)(error)),
        };
        Ok(Some(match at {
            None => Box::new(file),
            Some((start, size)) => {
                file.seek(SeekFrom::Start(start)).map_err(VendorError::io("read", &path))?;
                Box::new(file.take(size))
            }
        }))
    }

    /// Copies what `reader` of [`Vendor::open`] gives to `writer`, and holds it against `size` in bytes and `digest`.
    ///
    /// # Errors
    /// [`VendorError::Size`], [`VendorError::Digest`], or what reading and writing say.
    pub fn copy(
        &self,
        digest: Digest,
        size: u64,
        reader: impl Read,
        writer: &mut impl Write,
    ) -> Result<(), VendorError> {
        let failed = |error| VendorError::io("copy from", &self.path)(error);
        let mut reader = reader.take(size.saturating_add(1));
        let (mut hasher, mut buffer) = (Hasher::default(), vec![0; 1 << 16]);
        let mut count = 0_u64;
        loop {
            let piece = match reader.read(&mut buffer) {
                Ok(0) => break,
                Ok(piece) => piece,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(failed(error)),
            };
            count += piece as u64;
            hasher.update(&buffer[..piece]);
            writer.write_all(&buffer[..piece]).map_err(failed)?;
        }
        if count != size {
            let path = self.path.clone();
            return Err(VendorError::Size { path, expected_digest: digest, expected: size, found: count });
        }
        match hasher.finish().0 {
            found if found == digest => Ok(()),
            found => Err(VendorError::Digest { path: self.path.clone(), expected: digest, found }),
        }
    }
}

fn look(path: &Path) -> Result<Found, VendorError> {
    let read = || VendorError::io("read", path);
    let meta = fs::metadata(path).map_err(read())?;
    if meta.is_dir() {
        let why = "there is no folder blobs/sha256 in it";
        return match path.join(BLOBS).is_dir() {
            true => Ok(Found::Directory),
            false => Err(VendorError::NotVendored { path: path.to_owned(), why }),
        };
    }
    let not_vendored = |why| VendorError::NotVendored { path: path.to_owned(), why };
    if !meta.is_file() {
        return Err(not_vendored("it is neither a directory nor a file"));
    }
    let bytes = meta.len();
    let mut archive = tar::Archive::new(File::open(path).map_err(read())?);
    let mut members = BTreeMap::new();
    // The last member, and where it ends.
    let mut last = (String::new(), 0);
    let cut = |member: String| VendorError::Cut { path: path.to_owned(), bytes, member };
    for entry in archive.entries_with_seek().map_err(read())? {
        let Ok(entry) = entry else {
            return Err(match last.0.is_empty() {
                true => not_vendored("it is no tar archive"),
                false => cut(last.0),
            });
        };
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let (start, size) = (entry.raw_file_position(), entry.size());
        last = (name.clone(), start.saturating_add(size.next_multiple_of(512)));
        if last.1 > bytes {
            return Err(cut(name));
        }
        let digest = name.strip_prefix(BLOBS).and_then(|rest| rest.strip_prefix('/'));
        if let Some(Ok(digest)) = digest.map(str::parse::<Digest>) {
            members.insert(digest, (start, size));
        }
    }
    if last.0.is_empty() {
        return Err(not_vendored("it is no tar archive"));
    }
    match last.1.saturating_add(END_BYTES) > bytes {
        true => Err(cut(last.0)),
        false => Ok(Found::Archive(members)),
    }
}
