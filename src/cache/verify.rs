//! Whether a trace holds against the files as they are now.
//!
//! The check goes by stat(2) where that is proof: a file whose device, inode, size, mode and times are those of the trace
//! has the content of the trace, unless its change time is so young that a later change could have the same. Such a
//! file, and one that was touched, is hashed again; what holds then is stamped anew, so it happens once.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use kiln_artifact::tree::{Kind as NodeKind, Tree, TreePath};
use kiln_digest::{Digest, Hasher};
use kiln_virtio::fs::record::{Fingerprint, Kind, Observed, PathBytes};
use kiln_virtio::fs::{Open, fingerprint_of, list_directory, open_beneath, xattrs_of};
use rustix::fs::AtFlags;
use rustix::io::Errno;

use super::difference::{Difference, What};
use super::trace::{Entry, ShareTrace, Trace};
use crate::plan::graph::Ignore;

/// What of a directory a step is not shown.
#[derive(Debug, Clone, Default)]
pub struct Hidden {
    /// By globs.
    pub ignore: Ignore,
    /// By path.
    pub paths: BTreeSet<Vec<u8>>,
}

impl Hidden {
    /// Whether the entry at `path`, whose folder is shown, is not.
    pub fn hides(&self, path: &[u8]) -> bool {
        self.paths.contains(path) || self.ignore.hides(path)
    }

    /// Whether the entry at `path` is not shown, for itself or for a folder that it lies in.
    pub fn hides_within(&self, path: &[u8]) -> bool {
        let folders = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(end, _)| &path[..end]);
        folders.chain([path]).any(|path| self.hides(path))
    }
}

/// What stands now where a step saw a share.
#[derive(Debug)]
pub enum Place<'a> {
    /// A directory of the host's.
    Live {
        /// The directory.
        directory: OwnedFd,
        /// What of it is not shown.
        hidden: &'a Hidden,
    },
    /// What a step is shown of the outputs of others: the manifest is all there is to know.
    Tree(&'a Tree),
}

/// The shares of a step by name.
pub type Places<'a> = BTreeMap<String, Place<'a>>;

/// The fingerprint under which contents were hashed, when that was, and their digest.
type Known = (Fingerprint, i64, Digest);

/// Contents that were hashed while this process runs: no file is read twice for two steps.
#[derive(Debug, Default)]
pub struct Hashed {
    // Protects the digests; held only to look one up or put one in.
    digests: Mutex<BTreeMap<(u64, u64), Known>>,
}

/// How a trace holds.
#[derive(Debug)]
pub enum Verdict {
    /// It does. With what it has to be replaced by, where a stamp of it is no proof any more.
    Holds(Option<Box<Trace>>),
    /// It does not.
    Differs(Box<Difference>),
}

/// Longest tick of the clock that stamps changes, with room to spare; of file systems that keep whole seconds, two of them.
const TICK_NANOS: i64 = 20_000_000;
const COARSE_NANOS: i64 = 2_000_000_000;

/// Whether a file may have changed after `stamped_nanos` and still show this change time. A change time after the stamp is
/// one of a clock that was set back since.
fn is_young(seen: &Fingerprint, stamped_nanos: i64) -> bool {
    let margin = if seen.ctime_nanos % 1_000_000_000 == 0 { COARSE_NANOS } else { TICK_NANOS };
    seen.ctime_nanos.saturating_add(margin) >= stamped_nanos
}

/// Holds `trace` against `places`. `now_nanos` is the time, nanoseconds since 1970.
pub fn verify(trace: &Trace, places: &Places<'_>, hashed: &Hashed, now_nanos: i64) -> Verdict {
    let mut renewed: Option<Trace> = None;
    for (index, share) in trace.shares.iter().enumerate() {
        let result = match places.get(&share.name) {
            None => Err((PathBytes::default(), What::NoShare)),
            Some(Place::Tree(tree)) => against_tree(share, tree).map(|()| None),
            Some(Place::Live { directory, hidden }) => {
                Live { directory, hidden, hashed, stamped_nanos: trace.stamped_nanos, now_nanos }.check(share)
            }
        };
        match result {
            Ok(None) => {}
            Ok(Some(entries)) => {
                let renewed = renewed.get_or_insert_with(|| trace.clone());
                renewed.shares[index].entries = entries;
            }
            Err((path, what)) => {
                return Verdict::Differs(Box::new(Difference { guest: share.guest.clone(), path, what }));
            }
        }
    }
    Verdict::Holds(renewed.map(|renewed| Box::new(Trace { stamped_nanos: now_nanos, ..renewed })))
}

type Found = (PathBytes, What);

fn word(kind: Kind) -> &'static str {
    match kind {
        Kind::Regular => "file",
        Kind::Directory => "folder",
        Kind::Link => "symbolic link",
        Kind::Fifo => "FIFO",
        Kind::Socket => "socket",
        Kind::Character | Kind::Block => "device",
    }
}

/// What stat(2) shows of a file, held against what it showed.
fn same_metadata(was: &Entry, kind: Kind, mode: u32, size_bytes: u64) -> Result<(), What> {
    if kind != was.kind {
        return Err(What::Kind(word(was.kind), word(kind)));
    }
    if was.observed.contains(Observed::METADATA) {
        let mode_was = was.fingerprint.mode;
        if (mode ^ mode_was) & 0o7777 != 0 && kind != Kind::Link {
            return Err(What::Mode(mode_was, mode));
        }
        let reads = was.observed.contains(Observed::CONTENT);
        if !reads && matches!(kind, Kind::Regular | Kind::Link) && size_bytes != was.fingerprint.size_bytes {
            return Err(What::Size(was.fingerprint.size_bytes, size_bytes));
        }
    }
    Ok(())
}

/// Whether the digest `now` is the one that `was` there; one that is not known is none.
fn same(was: Option<Digest>, now: Digest) -> Result<(), What> {
    if was == Some(now) { Ok(()) } else { Err(What::Content(was, now)) }
}

/// A listing's digest, as the fs device makes it: letter, name and a zero byte of each, by kind and name.
fn listing_digest(mut children: Vec<(char, Vec<u8>)>) -> Digest {
    children.sort_unstable();
    let mut hasher = Hasher::default();
    for (letter, name) in children {
        hasher.update(letter.encode_utf8(&mut [0; 4]).as_bytes());
        hasher.update(&name);
        hasher.update(b"\0");
    }
    hasher.finish().0
}

struct Live<'a> {
    directory: &'a OwnedFd,
    hidden: &'a Hidden,
    hashed: &'a Hashed,
    stamped_nanos: i64,
    now_nanos: i64,
}

impl Live<'_> {
    /// The entries with new fingerprints, where some are no proof any more.
    fn check(&self, share: &ShareTrace) -> Result<Option<Vec<Entry>>, Found> {
        let mut unchanged: BTreeSet<&[u8]> = BTreeSet::new();
        let mut renewed: Vec<(usize, Fingerprint)> = Vec::new();
        for (index, entry) in share.entries.iter().enumerate() {
            let found = |what| (entry.shown(), what);
            let now = match self.stat(&entry.path) {
                Ok(now) if !self.hidden.hides(&entry.path) => now,
                Ok(_) | Err(Errno::NOENT | Errno::NOTDIR) => return Err(found(What::Vanished)),
                Err(error) => return Err(found(What::Unreadable(error.to_string()))),
            };
            if now == entry.fingerprint && !is_young(&now, self.stamped_nanos) {
                if entry.kind == Kind::Directory {
                    unchanged.insert(&entry.path);
                }
                continue;
            }
            self.look(entry, &now).map_err(found)?;
            renewed.push((index, now));
        }
        for path in &share.missed {
            let folder = path.iter().rposition(|byte| *byte == b'/').map_or(&[][..], |at| &path[..at]);
            if unchanged.contains(folder) || self.hidden.hides(path) {
                continue;
            }
            match self.stat(path) {
                Err(Errno::NOENT | Errno::NOTDIR) => {}
                Ok(_) => return Err((PathBytes(path.clone()), What::Appeared)),
                Err(error) => return Err((PathBytes(path.clone()), What::Unreadable(error.to_string()))),
            }
        }
        if renewed.is_empty() {
            return Ok(None);
        }
        let mut entries = share.entries.clone();
        renewed.into_iter().for_each(|(index, now)| entries[index].fingerprint = now);
        Ok(Some(entries))
    }

    fn stat(&self, path: &[u8]) -> Result<Fingerprint, Errno> {
        let path = if path.is_empty() { b"." } else { path };
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        match rustix::fs::statat(self.directory, path, flags) {
            // Longer than the kernel takes at once.
            Err(Errno::NAMETOOLONG) => {
                let file = open_beneath(self.directory, path, Open::Name)?;
                Ok(fingerprint_of(&rustix::fs::fstat(&file)?))
            }
            stat => Ok(fingerprint_of(&stat?)),
        }
    }

    /// Looks at a file whose stamp is no proof. Its fingerprint is `now`.
    fn look(&self, entry: &Entry, now: &Fingerprint) -> Result<(), What> {
        let unreadable = |error: Errno| What::Unreadable(error.to_string());
        let kind = kiln_virtio::fs::kind_of(now.mode).ok_or_else(|| unreadable(Errno::IO))?;
        same_metadata(entry, kind, now.mode, now.size_bytes)?;
        if entry.observed.contains(Observed::CONTENT) {
            same(entry.content, self.content(entry, now)?)?;
        }
        if entry.observed.contains(Observed::LISTING) && Some(self.listing(&entry.path)?) != entry.listing {
            return Err(What::Listing);
        }
        // The fs device gives files and folders theirs, and says of all else that it has none.
        let can_have = matches!(kind, Kind::Regular | Kind::Directory);
        if can_have && entry.observed.contains(Observed::XATTRS) {
            let how = if kind == Kind::Directory { Open::Directory } else { Open::Regular };
            let file = open_beneath(self.directory, &entry.path, how).map_err(unreadable)?;
            let (_, _, digest) = xattrs_of(&file, b"").map_err(unreadable)?;
            if Some(digest) != entry.xattrs {
                return Err(What::Xattrs);
            }
        }
        Ok(())
    }

    fn content(&self, entry: &Entry, now: &Fingerprint) -> Result<Digest, What> {
        let unreadable = |error: Errno| What::Unreadable(error.to_string());
        if entry.kind == Kind::Link {
            let file = open_beneath(self.directory, &entry.path, Open::Name).map_err(unreadable)?;
            let text = rustix::fs::readlinkat(&file, "", Vec::new()).map_err(unreadable)?;
            return Ok(Digest::of(text.as_bytes()));
        }
        if now.size_bytes == 0 {
            return Ok(Digest::of(b""));
        }
        let number = (now.device, now.inode);
        let known = self.hashed.digests.lock().unwrap_or_else(PoisonError::into_inner).get(&number).copied();
        if let Some((seen, stamped, digest)) = known
            && seen == *now
            && !is_young(now, stamped)
        {
            return Ok(digest);
        }
        let file = File::from(open_beneath(self.directory, &entry.path, Open::Regular).map_err(unreadable)?);
        let hashed = Digest::of_reader(&file);
        let (digest, _) = hashed.map_err(|error| What::Unreadable(error.to_string()))?;
        // What changes while it is read is not what the step read, whatever it was.
        let after = rustix::fs::fstat(&file).map(|stat| fingerprint_of(&stat)).map_err(unreadable)?;
        if after != *now {
            return Err(What::Content(entry.content, digest));
        }
        let mut digests = self.hashed.digests.lock().unwrap_or_else(PoisonError::into_inner);
        digests.insert(number, (*now, self.now_nanos, digest));
        Ok(digest)
    }

    fn listing(&self, path: &[u8]) -> Result<Digest, What> {
        let unreadable = |error: Errno| What::Unreadable(error.to_string());
        let folder = open_beneath(self.directory, path, Open::Directory).map_err(unreadable)?;
        let mut inner = path.to_vec();
        let length = match path.len() {
            0 => 0,
            _ => {
                inner.push(b'/');
                inner.len()
            }
        };
        let mut children = Vec::new();
        let each = |name: &[u8], kind: Kind, _| {
            inner.truncate(length);
            inner.extend(name);
            if !self.hidden.hides(&inner) {
                children.push((kind.letter(), name.to_vec()));
            }
            Ok(())
        };
        list_directory(folder.as_fd(), each).map_err(unreadable)?;
        Ok(listing_digest(children))
    }
}

/// Kind, mode and size of an output as a later step is shown it. None for what WORK does not hold.
pub fn shown(node: &kiln_artifact::tree::Node) -> Option<(Kind, u32, u64)> {
    let mode = u32::from(node.meta.mode) & 0o777;
    Some(match &node.kind {
        NodeKind::Directory => (Kind::Directory, mode | 0o700, 0),
        NodeKind::File { size, .. } => (Kind::Regular, mode | 0o400, *size),
        NodeKind::Symlink(text) => (Kind::Link, 0o777, text.len() as u64),
        _ => return None,
    })
}

fn against_tree(share: &ShareTrace, tree: &Tree) -> Result<(), Found> {
    let node =
        |path: &[u8]| TreePath::new(path).ok().and_then(|path| tree.shown(&path).map(|node| (path, node)));
    for entry in &share.entries {
        let found = |what| (entry.shown(), what);
        let Some((path, node)) = node(&entry.path) else { return Err(found(What::Vanished)) };
        let Some((kind, mode, size)) = shown(node) else { return Err(found(What::Vanished)) };
        same_metadata(entry, kind, mode, size).map_err(found)?;
        if entry.observed.contains(Observed::CONTENT) {
            let now = match &node.kind {
                NodeKind::File { digest, .. } => *digest,
                NodeKind::Symlink(text) => Digest::of(text),
                _ => return Err(found(What::Vanished)),
            };
            same(entry.content, now).map_err(found)?;
        }
        if entry.observed.contains(Observed::LISTING) {
            let depth = path.components().count() + 1;
            let children = tree.subtree(&path).filter(|(inner, _)| inner.components().count() == depth);
            let children = children.filter_map(|(inner, _)| {
                let (kind, ..) = shown(tree.shown(inner)?)?;
                Some((kind.letter(), inner.name().to_vec()))
            });
            if Some(listing_digest(children.collect())) != entry.listing {
                return Err(found(What::Listing));
            }
        }
        // Extended attributes of a view are the host's own labels: no step put them there.
    }
    match share.missed.iter().find(|path| node(path).is_some()) {
        Some(path) => Err((PathBytes(path.clone()), What::Appeared)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
