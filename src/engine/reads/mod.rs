//! What a step read, with digests: the device's record, each content hashed as it is now and shown to be what was
//! served, because its fingerprint is still the one taken when the guest was first told about it.
//!
//! `document` is the form in which users get it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use kiln_digest::Digest;
use kiln_virtio::fs::record::{Change, Changed, Entry, Kind, Observed, PathBytes, Record, ShareRecord};
use kiln_virtio::fs::{Attributes, Open, fingerprint_of, kernel_filesystem, open_beneath};

use crate::machine::Identity;
use crate::plan::show_bytes;

mod document;

/// Why what was read cannot be reported.
#[derive(Debug, thiserror::Error)]
pub enum ReadsError {
    /// The report cannot be written.
    #[error("cannot write the report of reads to `{path}`")]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
}

/// What a step read.
#[derive(Debug, Clone)]
pub struct ReadsReport {
    /// What it could read besides shares.
    pub beside: Beside,
    /// One for each share, in the order in which they were attached.
    pub shares: Vec<ShareReads>,
}

/// What a step could read that no record says more of.
#[derive(Debug, Clone, Default)]
pub struct Beside {
    /// What ran the step, and what held it in.
    pub machine: Option<Identity>,
    /// Digest of the root's tree; none for a live root, which is a share then.
    pub root: Option<Digest>,
    /// Digest of the boot bundle: kernel and modules.
    pub bundle: Option<Digest>,
    /// Inputs of which it is not known what was read: disks and standard input.
    pub unrecorded: Vec<String>,
}

/// What was read of one share.
#[derive(Debug, Clone)]
pub struct ShareReads {
    /// Where the guest saw it.
    pub guest: String,
    /// What its files show.
    pub attributes: Attributes,
    /// What was asked.
    pub record: ShareRecord,
    /// Digests of the contents and link texts that were read, in the order of their entries; none where that
    /// was not asked for, or the file did not hold still.
    contents: Vec<Option<Digest>>,
    /// Paths that changed while the step ran, or until they were hashed: the record does not say what the step
    /// saw there.
    changed: Vec<(PathBytes, &'static str)>,
    /// Folders that were empty in the guest, as a file system of the host's kernel is mounted there: its name.
    empty: Vec<(PathBytes, &'static str)>,
}

/// A share as the engine keeps it for the time after the run.
#[derive(Debug)]
pub(super) struct Observable {
    pub name: String,
    pub guest: String,
    pub attributes: Attributes,
    pub directory: OwnedFd,
}

/// Whoever waits for a content of this size to be hashed is told: it takes seconds.
const LARGE_BYTES: u64 = 4 << 30;

/// What a guest mounts itself over a root that is a share, and never sees of that.
const COVERED: [&[u8]; 4] = [b"dev", b"proc", b"run", b"sys"];

impl Observable {
    /// Whether the guest sees something else at `path`.
    fn is_covered(&self, path: &PathBytes) -> bool {
        self.guest == "/" && COVERED.contains(&path.0.as_slice())
    }
}

/// Makes the report of `record`. With `hash`, which is told of contents that take long, all contents are hashed beneath
/// `shares`; without, none has a digest.
pub(super) fn report(
    record: Record,
    shares: &[Observable],
    beside: Beside,
    mut hash: Option<&mut dyn FnMut(&str)>,
) -> ReadsReport {
    let mut records = record.shares;
    let mut take = |name: &str| {
        let at = records.iter().position(|record| record.name.0 == name.as_bytes())?;
        Some(records.remove(at))
    };
    let mut reports = Vec::with_capacity(shares.len());
    for share in shares {
        let mut reads = ShareReads {
            guest: share.guest.clone(),
            attributes: share.attributes,
            record: ShareRecord {
                name: PathBytes(share.name.clone().into_bytes()),
                ..ShareRecord::default()
            },
            contents: Vec::new(),
            changed: Vec::new(),
            empty: Vec::new(),
        };
        match take(&share.name) {
            Some(record) => reads.take(record, share, &mut hash),
            None => reads.changed.push((PathBytes::default(), "was not recorded")),
        }
        reports.push(reads);
    }
    ReadsReport { beside, shares: reports }
}

impl ShareReads {
    fn take(&mut self, record: ShareRecord, share: &Observable, hash: &mut Option<&mut dyn FnMut(&str)>) {
        let mut changed: Vec<Changed> = Vec::new();
        let mut filesystems = BTreeMap::new();
        for entry in record.entries.iter() {
            if entry.kind == Kind::Directory && !share.is_covered(&entry.path) {
                let device = entry.fingerprint.device;
                let known =
                    filesystems.entry(device).or_insert_with(|| kernels_own(share.directory.as_fd(), &entry));
                self.empty.extend(known.map(|name| (entry.path.clone(), name)));
            }
            if !entry.observed.contains(Observed::CONTENT) {
                continue;
            }
            let known = record.changed.binary_search_by(|change| change.path.cmp_as_walked(&entry.path));
            let content = match hash {
                Some(progress) if known.is_err() => {
                    if entry.kind == Kind::Regular && entry.fingerprint.size_bytes >= LARGE_BYTES {
                        let guest = share.guest.trim_end_matches('/');
                        let size = show_bytes(entry.fingerprint.size_bytes);
                        progress(&format!("hashing {guest}/{}, which the step read: {size}", entry.path));
                    }
                    content(share.directory.as_fd(), &entry)
                }
                _ => Ok(None),
            };
            match content {
                Ok(content) => self.contents.push(content),
                Err(what) => {
                    self.contents.push(None);
                    changed.push(Changed { path: entry.path, what });
                }
            }
        }
        changed.extend(record.changed.iter().cloned());
        changed.sort_by(|one, other| one.path.cmp_as_walked(&other.path));
        self.changed =
            changed.into_iter().map(|change| (change.path, change_in_words(change.what))).collect();
        self.record = record;
    }

    /// The entries, those whose content was read with its digest.
    pub(super) fn entries(&self) -> impl Iterator<Item = (Entry, Option<Digest>)> {
        let mut contents = self.contents.iter();
        self.record.entries.iter().map(move |entry| {
            let read = entry.observed.contains(Observed::CONTENT);
            let digest = if read { contents.next().copied().flatten() } else { None };
            (entry, digest)
        })
    }
}

/// The file system of the host's kernel's own that the folder of `entry` is on; none where that holds files.
fn kernels_own(share: impl AsFd, entry: &Entry) -> Option<&'static str> {
    kernel_filesystem(open_beneath(share, &entry.path.0, Open::Name).ok()?).ok()?
}

/// The digest of a content, or how it is not what was served.
fn content(share: impl AsFd, entry: &Entry) -> Result<Option<Digest>, Change> {
    if entry.kind == Kind::Regular && entry.fingerprint.size_bytes == 0 {
        // Nobody reads an empty file: its size says all, and it may be one that kiln cannot open.
        return Ok(Some(Digest::of(b"")));
    }
    let unreadable = |error: rustix::io::Errno| match error {
        rustix::io::Errno::NOENT => Change::Vanished,
        _ => Change::Unreadable,
    };
    let how = if entry.kind == Kind::Link { Open::Name } else { Open::Regular };
    let file = open_beneath(share, &entry.path.0, how).map_err(unreadable)?;
    let as_served = |file: &OwnedFd| {
        let now = fingerprint_of(&rustix::fs::fstat(file).map_err(unreadable)?);
        if now == entry.fingerprint { Ok(()) } else { Err(Change::Modified) }
    };
    as_served(&file)?;
    if entry.kind == Kind::Link {
        let text = rustix::fs::readlinkat(&file, "", Vec::new()).map_err(unreadable)?;
        return Ok(Some(Digest::of(text.as_bytes())));
    }
    let file = File::from(file);
    let (digest, _) = Digest::of_reader(&file).map_err(|_| Change::Unreadable)?;
    as_served(&OwnedFd::from(file))?;
    Ok(Some(digest))
}

impl ReadsReport {
    /// Whether the record says all that was read of the shares.
    pub fn is_complete(&self) -> bool {
        self.shares.iter().all(|share| share.changed.is_empty())
    }

    /// Files whose content was read, and their bytes together.
    pub fn contents(&self) -> (u64, u64) {
        let entries = self.shares.iter().flat_map(|share| share.record.entries.iter());
        entries
            .filter(|entry| entry.kind == Kind::Regular && entry.observed.contains(Observed::CONTENT))
            .fold((0, 0), |(count, bytes), entry| (count + 1, bytes + entry.fingerprint.size_bytes))
    }

    /// How many paths were asked about and found, and how many missed.
    pub fn paths(&self) -> (usize, usize) {
        let records = self.shares.iter().map(|share| &share.record);
        records.fold((0, 0), |(found, missed), record| {
            (found + record.entries.len(), missed + record.missed.len())
        })
    }

    /// Folders that the step saw empty, as the host's kernel shows itself there, each in words.
    pub fn empty(&self) -> impl Iterator<Item = String> {
        self.shares.iter().flat_map(|share| {
            let words = |(path, name): &(PathBytes, &str)| {
                format!(
                    "`{}/{path}` was an empty folder for the step: a {name} of the host's is mounted there, which holds no files",
                    share.guest.trim_end_matches('/')
                )
            };
            share.empty.iter().map(words)
        })
    }

    /// What spoiled the record, in words.
    pub fn spoiled(&self) -> Option<String> {
        let mut changed = self.shares.iter().flat_map(|share| {
            share.changed.iter().map(|(path, what)| match path.0.is_empty() {
                true => format!("`{}` {what}", share.guest),
                false => format!("`{}/{path}` {what}", share.guest),
            })
        });
        let first = changed.next()?;
        match changed.count() {
            0 => Some(format!("{first} while the step ran")),
            rest => Some(format!("{first} while the step ran, and {rest} more")),
        }
    }
}

/// In the device's words: what a change was.
fn change_in_words(change: Change) -> &'static str {
    match change {
        Change::Modified => "was modified",
        Change::Replaced => "was replaced",
        Change::Vanished => "vanished",
        Change::Unreadable => "could not be read",
    }
}

#[cfg(test)]
mod tests;
