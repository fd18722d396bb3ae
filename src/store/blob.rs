//! Blobs: files named by the SHA-256 of what is in them.

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use kiln_artifact::archive::ContentSink;
use kiln_artifact::tree::Contents;
use kiln_digest::{Digest, Hasher};

use super::durable::Durable;
use super::lease::Lease;
use super::limit::Limit;
use crate::writes::{self, Unfinished};

/// A block of most file systems.
const DISK_BLOCK_BYTES: u64 = 4096;
/// The longest blob that is in memory until it is finished.
const SHORT_BYTES: usize = 64 << 10;
/// As much as is read at a time: where all of it is zeros, it is a hole. Whole blocks of any file system.
static ZEROS: [u8; SHORT_BYTES] = [0; SHORT_BYTES];

/// What was found not to be as it was written, and taken away, until somebody tells of it.
#[derive(Debug, Clone, Default)]
pub(super) struct Damage {
    // Protects the paths; held only to put one in or to take all.
    paths: Arc<Mutex<Vec<PathBuf>>>,
}

impl Damage {
    pub fn note(&self, path: PathBuf) {
        self.paths.lock().unwrap_or_else(PoisonError::into_inner).push(path);
    }

    pub fn take(&self) -> Vec<PathBuf> {
        std::mem::take(&mut self.paths.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The blobs of a store.
#[derive(Debug, Clone)]
pub struct Blobs {
    path: PathBuf,
    lease: Lease,
    limit: Arc<Limit>,
    durable: Arc<Durable>,
    damage: Damage,
    // Protects what this process has found to be whole, and which file that was; held only to look and to put something in.
    whole: Arc<Mutex<BTreeMap<Digest, u64>>>,
}

impl Blobs {
    pub(super) fn new(
        path: PathBuf,
        lease: Lease,
        limit: Arc<Limit>,
        durable: Arc<Durable>,
        damage: Damage,
    ) -> Self {
        Self { path, lease, limit, durable, damage, whole: Arc::default() }
    }

    /// Where the blob `digest` lies if it is there.
    pub fn path(&self, digest: &Digest) -> PathBuf {
        let name = digest.to_string();
        self.path.join(&name[..2]).join(&name[2..])
    }

    /// Whether the blob is there. It stays then for as long as this process lives.
    pub fn contains(&self, digest: &Digest) -> bool {
        self.lease.mark(&self.path(digest))
    }

    /// Whether all these blobs are there. They stay then for as long as this process lives.
    pub fn contains_all<'d>(&self, digests: impl IntoIterator<Item = &'d Digest>) -> bool {
        self.lease.mark_all(digests.into_iter().map(|digest| self.path(digest)))
    }

    /// The whole blob, which is what its name says.
    ///
    /// # Errors
    /// `NotFound` where it is not there; `InvalidData` where something else is in its place; what reading says.
    pub fn read(&self, digest: &Digest) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.file(digest)?.read_to_end(&mut bytes)?;
        match Digest::of(&bytes) == *digest {
            true => Ok(bytes),
            false => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Whether the blob is there, `length_bytes` long, and what its name says: read whole, once in this process. What stands
    /// in its place and is something else is taken away, so that it can be had anew.
    pub fn holds(&self, digest: &Digest, length_bytes: u64) -> bool {
        let path = self.path(digest);
        let Some(there) = self.lease.marked(&path) else { return false };
        let is_whole = self.is_whole(&path, &there, digest, length_bytes);
        if !is_whole {
            self.discard_damaged(digest);
        }
        is_whole
    }

    /// Whether the blob is there and what its name says: read whole.
    pub fn is_sound(&self, digest: &Digest) -> bool {
        self.file(digest).and_then(Digest::of_reader).is_ok_and(|(found, _)| found == *digest)
    }

    /// Takes a blob away that is not what its name says, for [`Store::take_damage`](super::Store::take_damage) to tell of.
    pub fn discard_damaged(&self, digest: &Digest) {
        let path = self.path(digest);
        if path.exists() && self.discard(digest).is_ok() {
            self.damage.note(path);
        }
    }

    /// Whether the blob at `path`, a file that is as `there` says, is what it should be. One that nothing synced may be cut short
    /// after a power failure, or be zeros of the right length; what is to be named anew would be lost in it. Power fails in no
    /// process's life: what one has found to be whole it does not read again.
    fn is_whole(&self, path: &Path, there: &Metadata, digest: &Digest, length_bytes: u64) -> bool {
        if !there.is_file() || there.len() != length_bytes {
            return false;
        }
        let found = || self.whole.lock().unwrap_or_else(PoisonError::into_inner);
        if found().get(digest) == Some(&there.ino()) {
            return true;
        }
        let Ok(file) = File::open(path) else { return false };
        let is_same = file.metadata().is_ok_and(|meta| meta.ino() == there.ino());
        let is_whole = is_same && Digest::of_reader(file).is_ok_and(|(found, _)| found == *digest);
        if is_whole {
            found().insert(*digest, there.ino());
        }
        is_whole
    }

    /// Takes a blob away that is not what its name says, so that it can be had anew, or that nobody should have.
    ///
    /// # Errors
    /// What unlink(2) says.
    pub fn discard(&self, digest: &Digest) -> io::Result<()> {
        self.durable.forget(digest);
        self.whole.lock().unwrap_or_else(PoisonError::into_inner).remove(digest);
        writes::remove(&self.path(digest))
    }

    /// Opens a blob for reading.
    ///
    /// # Errors
    /// `NotFound` where it is not there; what open(2) says.
    pub fn file(&self, digest: &Digest) -> io::Result<File> {
        let path = self.path(digest);
        match self.lease.mark(&path) {
            true => File::open(path),
            false => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Starts a blob whose digest will be known when it is complete.
    ///
    /// # Errors
    /// What making a temporary file says.
    pub fn writer(&self) -> io::Result<BlobWriter> {
        let (memory, file, hasher) = (Vec::new(), None, Hasher::default());
        Ok(BlobWriter { blobs: self.clone(), memory, file, hasher, hole: false })
    }

    /// Stores all that `reader` gives, long zeros as holes: a file of a root or of SRCDIR may be far longer than the disk. Its
    /// digest and its length in bytes.
    ///
    /// # Errors
    /// What reading or writing says.
    pub fn put(&self, mut reader: impl Read) -> io::Result<(Digest, u64)> {
        let mut writer = self.writer()?;
        let mut piece = Vec::with_capacity(ZEROS.len());
        loop {
            piece.clear();
            reader.by_ref().take(ZEROS.len() as u64).read_to_end(&mut piece)?;
            // Of what is no hole the first bytes decide.
            if piece == ZEROS {
                writer.skip(ZEROS.len() as u64)?;
                continue;
            }
            writer.write_all(&piece)?;
            if piece.len() < ZEROS.len() {
                return writer.finish();
            }
        }
    }
}

impl Contents for Blobs {
    fn open(&self, digest: &Digest) -> io::Result<Box<dyn Read + '_>> {
        Ok(Box::new(self.file(digest)?))
    }
}

/// Archives and images are unpacked into blobs.
impl ContentSink for &Blobs {
    fn store(&mut self, reader: &mut dyn Read) -> io::Result<(Digest, u64)> {
        self.put(reader)
    }
}

/// Takes room for `bytes` and writes them. No sooner: what others do not see written nobody may take for free.
fn write_within(limit: &Limit, file: &mut Unfinished, bytes: &[u8]) -> io::Result<()> {
    limit.take(bytes.len() as u64)?;
    file.write_all(bytes)?;
    limit.settle();
    Ok(())
}

/// A blob being written. Dropped before [`BlobWriter::finish`], it leaves nothing.
#[derive(Debug)]
pub struct BlobWriter {
    blobs: Blobs,
    /// What was written, as long as it is short: where the store has it already, no file is made.
    memory: Vec<u8>,
    file: Option<Unfinished>,
    hasher: Hasher,
    hole: bool,
}

impl BlobWriter {
    /// The file, with what was in memory so far.
    fn spill(&mut self) -> io::Result<&mut Unfinished> {
        let mut file = match self.file.take() {
            Some(file) => file,
            None => Unfinished::new_in(self.blobs.lease.temporary())?,
        };
        write_within(&self.blobs.limit, &mut file, &self.memory)?;
        self.memory = Vec::new();
        Ok(self.file.insert(file))
    }

    /// Adds `length_bytes` zeros as a hole.
    ///
    /// # Errors
    /// What lseek(2) says.
    pub fn skip(&mut self, length_bytes: u64) -> io::Result<()> {
        let forward = i64::try_from(length_bytes).map_err(|_| io::ErrorKind::FileTooLarge)?;
        self.spill()?.file_mut().seek(SeekFrom::Current(forward))?;
        let mut left = length_bytes;
        while left > 0 {
            let piece = left.min(ZEROS.len() as u64);
            self.hasher.update(&ZEROS[..usize::try_from(piece).unwrap_or(ZEROS.len())]);
            left -= piece;
        }
        self.hole = true;
        Ok(())
    }

    /// Ends the blob and gives it its name.
    ///
    /// # Errors
    /// What writing and renaming say.
    pub fn finish(mut self) -> io::Result<(Digest, u64)> {
        let (digest, length_bytes) = std::mem::take(&mut self.hasher).finish();
        let path = self.blobs.path(&digest);
        let there = self.blobs.lease.marked(&path);
        if there.is_some_and(|there| self.blobs.is_whole(&path, &there, &digest, length_bytes)) {
            return Ok((digest, length_bytes));
        }
        // On the disk it takes whole blocks.
        self.blobs.limit.take(length_bytes.next_multiple_of(DISK_BLOCK_BYTES) - length_bytes)?;
        self.spill()?;
        let Self { blobs, file: Some(file), hole, .. } = self else {
            return Err(io::ErrorKind::NotFound.into());
        };
        if hole {
            writes::set_length(file.file(), file.path(), length_bytes)?;
        }
        file.set_mode(0o444)?;
        blobs.lease.date(file.file())?;
        if let Some(folder) = path.parent() {
            writes::make_folders(folder)?;
        }
        file.persist(&path)?;
        blobs.durable.forget(&digest);
        Ok((digest, length_bytes))
    }
}

impl Write for BlobWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = if self.file.is_none() && self.memory.len() + bytes.len() <= SHORT_BYTES {
            self.memory.write(bytes)?
        } else {
            self.spill()?;
            let file = self.file.as_mut().ok_or(io::ErrorKind::NotFound)?;
            write_within(&self.blobs.limit, file, bytes)?;
            bytes.len()
        };
        self.hasher.update(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::Store;
    use super::*;

    #[test]
    fn a_long_file_of_zeros_takes_the_room_of_what_else_is_in_it_and_keeps_its_digest() {
        const LONG_BYTES: u64 = 16 << 20;
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(&folder.path().join("store")).expect("a store");
        let text = b"not zeros";
        // Where something is in it: nowhere, at its beginning, within a piece, and at its end.
        for at in [None, Some(0), Some(LONG_BYTES / 2 + 12_345), Some(LONG_BYTES - text.len() as u64)] {
            for length_bytes in [LONG_BYTES, LONG_BYTES + 1] {
                let mut file = tempfile::tempfile().expect("a file");
                file.set_len(length_bytes).expect("a hole");
                if let Some(at) = at {
                    file.seek(SeekFrom::Start(at)).expect("a place");
                    file.write_all(text).expect("room");
                    file.seek(SeekFrom::Start(0)).expect("a place");
                }
                let wanted = Digest::of_reader(&file).expect("readable");
                file.seek(SeekFrom::Start(0)).expect("a place");
                let put = store.blobs().put(&mut file).expect("room");
                assert_eq!(put, wanted, "{at:?}");
                let there = store.blobs().path(&put.0).metadata().expect("a blob");
                assert_eq!(there.len(), length_bytes, "{at:?}");
                assert!(there.blocks() * 512 <= 1 << 20, "{at:?}: {} blocks", there.blocks());
                assert!(store.blobs().is_sound(&put.0), "{at:?}");
            }
        }
    }

    #[test]
    fn what_is_about_as_long_as_a_piece_comes_back_as_it_was() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(&folder.path().join("store")).expect("a store");
        for length in [0, 1, ZEROS.len() - 1, ZEROS.len(), ZEROS.len() + 1, 2 * ZEROS.len()] {
            for byte in [0_u8, 7] {
                let bytes = vec![byte; length];
                let (digest, length_bytes) = store.blobs().put(&bytes[..]).expect("room");
                assert_eq!((digest, length_bytes), (Digest::of(&bytes), length as u64), "{byte}");
                assert!(store.blobs().read(&digest).expect("a blob") == bytes, "{length} of {byte}");
            }
        }
    }
}
