//! Vendored bytes, written: out of the store, each blob held against its digest on the way.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::Path;

use kiln_digest::{Digest, HashingReader};

use super::{BLOBS, LOCK, VendorError};
use crate::fetch::unfinished;
use crate::store::Blobs;
use crate::writes::Unfinished;

/// How the names of files begin that are not finished.
const UNFINISHED: &str = ".kiln.vendor.";

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Written {
    /// Blobs that were written.
    pub new: usize,
    /// Blobs that were there already, and good.
    pub kept: usize,
    /// Blobs in the directory that the lock does not name.
    pub others: usize,
    /// Length of all blobs that the lock names, in bytes.
    pub bytes: u64,
}

/// Puts `files`, what a lock of the text `lock` names, into the directory `path`: made where it is missing, completed
/// where it holds vendored bytes. What is there is read through, and written anew where it is damaged.
///
/// # Errors
/// [`VendorError::Occupied`] where something else is in it, [`VendorError::Store`], and what reading and writing say.
pub fn write_directory(
    path: &Path,
    lock: &str,
    files: &BTreeMap<Digest, (String, u64)>,
    blobs: &Blobs,
) -> Result<Written, VendorError> {
    let folder = path.join(BLOBS);
    let io = VendorError::io;
    match fs::read_dir(path) {
        Ok(entries) => {
            let ours = |name: &str| name == LOCK || name == "blobs" || name.starts_with(UNFINISHED);
            let is_foreign = |entry: io::Result<fs::DirEntry>| {
                entry.is_ok_and(|entry| !entry.file_name().to_str().is_some_and(ours))
            };
            if entries.into_iter().any(is_foreign) {
                return Err(VendorError::Occupied { path: path.to_owned() });
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(io("read", path)(error)),
    }
    fs::create_dir_all(&folder).map_err(io("make", &folder))?;
    unfinished::sweep(&folder, UNFINISHED);
    let mut written = Written::default();
    for (digest, (what, size)) in files {
        written.bytes += size;
        let place = folder.join(digest.to_string());
        let there = File::open(&place).and_then(Digest::of_reader).map(|(found, _)| found);
        if there.is_ok_and(|found| found == *digest) {
            written.kept += 1;
            continue;
        }
        let mut file = unfinished::new_in(&folder, UNFINISHED).map_err(io("write in", &folder))?;
        copy(what, *digest, blobs, &mut file).map_err(|error| error.unwrap_or_else(io("write", &place)))?;
        finish(file, &place, 0o444).map_err(io("write", &place))?;
        written.new += 1;
    }
    let there = fs::read_dir(&folder).map_err(io("read", &folder))?;
    let name = |entry: io::Result<fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse::<Digest>().ok();
    written.others = there.filter_map(name).filter(|digest| !files.contains_key(digest)).count();
    // Last: a directory that has a lock has all that the lock names.
    let place = path.join(LOCK);
    let mut file = unfinished::new_in(path, UNFINISHED).map_err(io("write in", path))?;
    file.write_all(lock.as_bytes()).map_err(io("write", &place))?;
    finish(file, &place, 0o644).map_err(io("write", &place))?;
    Ok(written)
}

fn finish(file: Unfinished, place: &Path, mode: u32) -> io::Result<()> {
    file.set_mode(mode)?;
    file.sync()?;
    file.persist(place)
}

/// What went wrong: known, or the system's word about where it was written to.
enum Failure {
    Known(VendorError),
    Io(io::Error),
}

impl Failure {
    fn unwrap_or_else(self, name: impl FnOnce(io::Error) -> VendorError) -> VendorError {
        match self {
            Self::Known(error) => error,
            Self::Io(error) => name(error),
        }
    }
}

/// Copies the store's blob `digest` to `to`.
fn copy(what: &str, digest: Digest, blobs: &Blobs, to: &mut impl Write) -> Result<(), Failure> {
    let path = blobs.path(&digest);
    let from = blobs.file(&digest).map_err(|error| Failure::Known(VendorError::io("read", &path)(error)))?;
    let mut reader = HashingReader::new(from);
    io::copy(&mut reader, to).map_err(Failure::Io)?;
    match reader.finish().0 {
        found if found == digest => Ok(()),
        found => Err(Failure::Known(VendorError::Store { what: what.to_owned(), expected: digest, found })),
    }
}

/// Writes `files`, what a lock of the text `lock` names, as a tar archive in place of `path`: whole or not at all.
///
/// # Errors
/// [`VendorError::Store`], and what reading and writing say.
pub fn write_archive(
    path: &Path,
    lock: &str,
    files: &BTreeMap<Digest, (String, u64)>,
    blobs: &Blobs,
) -> Result<Written, VendorError> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let io = || VendorError::io("write", path);
    let file = unfinished::new_in(folder, UNFINISHED).map_err(VendorError::io("write in", folder))?;
    let mut archive = tar::Builder::new(BufWriter::new(file));
    let mut append = |name: &str, size: u64, reader: &mut dyn Read| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Regular);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(size);
        archive.append_data(&mut header, name, reader)
    };
    append(LOCK, lock.len() as u64, &mut lock.as_bytes()).map_err(io())?;
    let mut written = Written { new: files.len(), ..Written::default() };
    for (digest, (what, _)) in files {
        let from = blobs.path(digest);
        let open = || -> io::Result<(File, u64)> {
            let file = blobs.file(digest)?;
            let size = file.metadata()?.len();
            Ok((file, size))
        };
        let (file, size) = open().map_err(VendorError::io("read", &from))?;
        // A file that grows meanwhile must not shift what comes after it.
        let mut reader = HashingReader::new(file.take(size));
        append(&format!("{BLOBS}/{digest}"), size, &mut reader).map_err(io())?;
        let (found, count) = reader.finish();
        if found != *digest || count != size {
            return Err(VendorError::Store { what: what.clone(), expected: *digest, found });
        }
        written.bytes += size;
    }
    let file =
        archive.into_inner().and_then(|inner| inner.into_inner().map_err(io::IntoInnerError::into_error));
    finish(file.map_err(io())?, path, 0o644).map_err(io())?;
    Ok(written)
}
