//! What a step read, with digests: the device's record, each content hashed as it is now and shown to be what was
//! served, because its fingerprint is still the one taken when the guest was first told about it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use kiln_digest::Digest;
use kiln_virtio::fs::record::{Change, Fingerprint, Kind, Observed, PathBytes, Record, ShareRecord};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use serde::Serialize;

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

/// The version of the report's format.
pub const VERSION: u32 = 1;

/// What a step read: the document that `--reads` writes.
#[derive(Debug, Clone, Serialize)]
pub struct ReadsReport {
    /// [`VERSION`].
    pub version: u32,
    /// Digest of the root's tree; none for a live root, which is a share then.
    pub root: Option<Digest>,
    /// Whether the record says all that was read; if not, why.
    pub complete: bool,
    /// One for each share, in the order in which they were attached.
    pub shares: Vec<ShareReads>,
}

/// What was read of one share.
#[derive(Debug, Clone, Serialize)]
pub struct ShareReads {
    /// Its name.
    pub name: String,
    /// Where the guest saw it.
    pub guest: String,
    /// What was asked about, sorted by path.
    pub entries: Vec<Read>,
    /// Paths that were looked for and do not exist.
    pub missed: Vec<PathBytes>,
    /// Paths that changed while the step ran: the record does not say what the step saw there.
    pub changed: Vec<ChangedPath>,
}

/// A path that did not hold still.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ChangedPath {
    /// Path in the share.
    pub path: PathBytes,
    /// How it changed, in words.
    pub what: &'static str,
}

/// One path and what was asked about it.
#[derive(Debug, Clone, Serialize)]
pub struct Read {
    /// Path in the share; bytes that are not UTF-8 as `%XX`.
    pub path: PathBytes,
    /// What it is.
    pub kind: Kind,
    /// Of `content`, `metadata`, `listing`, `xattrs`.
    pub observed: Vec<&'static str>,
    /// Permissions in octal, where metadata was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// Length in bytes, for a regular file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// Digest of the content, or of a link's text, where that was read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
}

/// A share as the engine keeps it for the time after the run.
#[derive(Debug)]
pub(super) struct Observable {
    pub name: String,
    pub guest: String,
    pub directory: OwnedFd,
}

/// Makes the report of `record`. With `hash`, contents are hashed beneath `shares`; without, none has a digest.
pub(super) fn report(
    record: &Record,
    shares: &[Observable],
    root: Option<Digest>,
    hash: bool,
) -> ReadsReport {
    let mut report = ReadsReport { version: VERSION, root, complete: record.complete, shares: Vec::new() };
    for share in shares {
        let observed = record.shares.iter().find(|other| other.name.0 == share.name.as_bytes());
        if let Some(observed) = observed {
            report.shares.push(share_reads(share, observed, hash));
        }
    }
    report.complete &= report.shares.iter().all(|share| share.changed.is_empty());
    report
}

fn share_reads(share: &Observable, observed: &ShareRecord, hash: bool) -> ShareReads {
    let note = |path: &PathBytes, what| ChangedPath { path: path.clone(), what: change_in_words(what) };
    let mut changed: Vec<ChangedPath> =
        observed.changed.iter().map(|change| note(&change.path, change.what)).collect();
    let mut entries = Vec::with_capacity(observed.entries.len());
    for entry in &observed.entries {
        let mut digest = None;
        let known_changed = observed.changed.iter().any(|change| change.path == entry.path);
        if hash && entry.observed.contains(Observed::CONTENT) && !known_changed {
            let content = content(share.directory.as_fd(), &entry.path.0, entry.kind, &entry.fingerprint);
            match content {
                Ok(Some(content)) => digest = Some(content),
                Ok(None) => changed.push(note(&entry.path, Change::Modified)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    changed.push(note(&entry.path, Change::Vanished));
                }
                Err(_) => changed.push(note(&entry.path, Change::Unreadable)),
            }
        }
        entries.push(Read {
            path: entry.path.clone(),
            kind: entry.kind,
            observed: names(entry.observed),
            mode: entry
                .observed
                .contains(Observed::METADATA)
                .then(|| format!("{:04o}", entry.fingerprint.mode & 0o7777)),
            size: (entry.kind == Kind::Regular).then_some(entry.fingerprint.size_bytes),
            digest,
        });
    }
    changed.sort_unstable_by(|one, other| one.path.cmp(&other.path));
    ShareReads {
        name: share.name.clone(),
        guest: share.guest.clone(),
        entries,
        missed: observed.missed.clone(),
        changed,
    }
}

fn names(observed: Observed) -> Vec<&'static str> {
    let all = [
        (Observed::CONTENT, "content"),
        (Observed::METADATA, "metadata"),
        (Observed::LISTING, "listing"),
        (Observed::XATTRS, "xattrs"),
    ];
    all.into_iter().filter(|(bit, _)| observed.contains(*bit)).map(|(_, name)| name).collect()
}

/// The digest of a content; none where it is not what was served.
fn content(share: impl AsFd, path: &[u8], kind: Kind, served: &Fingerprint) -> io::Result<Option<Digest>> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::CLOEXEC | OFlags::NOFOLLOW;
    if kind == Kind::Regular && served.size_bytes == 0 {
        // Nobody reads an empty file: its size says all, and it may be one that kiln cannot open.
        return Ok(Some(Digest::of(b"")));
    }
    if kind == Kind::Link {
        let link = rustix::fs::openat2(share, path, flags | OFlags::PATH, Mode::empty(), resolve)?;
        let text = rustix::fs::readlinkat(&link, "", Vec::new())?;
        return Ok(Some(Digest::of(text.as_bytes())));
    }
    let file = rustix::fs::openat2(share, path, flags | OFlags::NONBLOCK, Mode::empty(), resolve)?;
    let file = File::from(file);
    let is_as_served = |file: &File| {
        let meta = file.metadata()?;
        let nanos = |seconds: i64, nanos: i64| seconds.saturating_mul(1_000_000_000).saturating_add(nanos);
        io::Result::Ok(
            meta.ino() == served.inode
                && meta.dev() == served.device
                && meta.size() == served.size_bytes
                && nanos(meta.mtime(), meta.mtime_nsec()) == served.mtime_nanos
                && nanos(meta.ctime(), meta.ctime_nsec()) == served.ctime_nanos,
        )
    };
    if !is_as_served(&file)? {
        return Ok(None);
    }
    let (digest, _) = Digest::of_reader(&file)?;
    Ok(is_as_served(&file)?.then_some(digest))
}

impl ReadsReport {
    /// Files whose content was read, and their bytes together.
    pub fn contents(&self) -> (u64, u64) {
        let read = self.shares.iter().flat_map(|share| &share.entries);
        read.filter(|read| read.kind == Kind::Regular && read.observed.contains(&"content"))
            .fold((0, 0), |(count, bytes), read| (count + 1, bytes + read.size.unwrap_or_default()))
    }

    /// What spoiled the record, in words.
    pub fn spoiled(&self) -> Option<String> {
        let changed: Vec<String> = self
            .shares
            .iter()
            .flat_map(|share| {
                share
                    .changed
                    .iter()
                    .map(|changed| format!("`{}/{}` {}", share.guest, changed.path, changed.what))
            })
            .collect();
        match changed.as_slice() {
            [] if self.complete => None,
            [] => Some("the step looked for more names than are kept".to_owned()),
            [one] => Some(format!("{one} while the step ran")),
            [one, rest @ ..] => Some(format!("{one} while the step ran, and {} more", rest.len())),
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
