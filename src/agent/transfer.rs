//! What a machine's layers hold, carried out: a checked listing first, then the contents that the host chose.
//!
//! The list is the guest's word. It is accepted only as a well-formed tree (folders before what they hold, every path
//! once, links only to earlier files), within limits; contents are hashed as they arrive into blobs, which
//! no guest holds a way to change.

use std::collections::{BTreeSet, HashMap};
use std::io::{self, Write};
use std::time::{Duration, Instant};

use kiln_artifact::tree::{Kind, Meta, Node, Timestamp, TreePath};
use kiln_digest::Digest;
use kiln_wire::{Deadline, Entry, EntryKind, FromAgent, MAX_FETCH, ToAgent};

use super::session::{Session, SessionError, unexpected};
use crate::plan::show_bytes;
use crate::store::Blobs;

/// How long a listing may take: a million entries need a minute under emulation.
const LIST_PATIENCE: Duration = Duration::from_secs(1800);
/// How long contents may take, beside what their number and their bytes need.
const FETCH_PATIENCE: Duration = Duration::from_secs(300);
/// The slowest transfer that is waited for, in bytes and in files a second.
const SLOWEST_RATE: u64 = 1 << 20;
const SLOWEST_FILES: u64 = 1000;
/// Most bytes of paths, link texts and extended attributes in one listing.
const LISTED_BYTES: usize = 512 << 20;
/// How many files are asked for at once: their ordinals fit into any socket's buffer.
const FETCHED_AT_ONCE: usize = 4096;

/// What a step may have of its machine, and what may leave it, at most.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Entries in a layer.
    pub entries: u32,
    /// Bytes of all collected files together, holes included.
    pub total_bytes: u64,
    /// Bytes that a command may print, on both streams together.
    pub printed_bytes: u64,
    /// Processes and threads at a time.
    pub processes: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { entries: 4_000_000, total_bytes: 64 << 30, printed_bytes: 1 << 30, processes: 4096 }
    }
}

/// Why a layer could not be carried out.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The conversation failed.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// There are more entries than the limits allow.
    #[error("the step's output has more than {limit} entries")]
    TooMany {
        /// The limit.
        limit: u32,
    },
    /// There are more bytes than the limits allow.
    #[error("the step's output has more than {} of {what}", show_bytes(*.limit))]
    TooMuch {
        /// Of what.
        what: &'static str,
        /// The limit, in bytes.
        limit: u64,
    },
    /// The store could not take a content.
    #[error("cannot store `{path}`")]
    Store {
        /// Whose content.
        path: TreePath,
        /// The system's word.
        #[source]
        source: io::Error,
    },
}

/// What a layer holds: checked entries, and the contents fetched so far.
#[derive(Debug, Default)]
pub struct Listing {
    entries: Vec<(TreePath, Entry)>,
    contents: HashMap<u32, (Digest, u64)>,
}

/// What an entry costs to keep, roughly.
fn size_in_memory(entry: &Entry) -> usize {
    let link = match &entry.kind {
        EntryKind::Symlink(text) => text.len(),
        _ => 0,
    };
    let xattrs: usize = entry.xattrs.iter().map(|(name, value)| name.len() + value.len() + 64).sum();
    // A path is kept as it came, as a path, and in the sets that check the order.
    entry.path.len() * 4 + link + xattrs
}

fn violation<T>(what: String) -> Result<T, TransferError> {
    Err(SessionError::Violation(what).into())
}

impl Listing {
    /// Lists what was written to the layered mount at `target`.
    ///
    /// # Errors
    /// [`TransferError`].
    pub fn receive(session: &mut Session, target: &[u8], limits: &Limits) -> Result<Self, TransferError> {
        session.send(&ToAgent::List { target: target.to_vec() })?;
        let mut listing = Self::default();
        let mut folders = BTreeSet::from([TreePath::root()]);
        let mut seen = BTreeSet::new();
        let (mut deadline, mut listed_bytes) = (Deadline::after(LIST_PATIENCE, Instant::now()), 0_usize);
        loop {
            match session.next("listing what the step wrote", &mut deadline)? {
                FromAgent::Entry(entry) => {
                    if listing.entries.len() as u64 >= u64::from(limits.entries) {
                        return Err(TransferError::TooMany { limit: limits.entries });
                    }
                    listed_bytes += size_in_memory(&entry);
                    if listed_bytes > LISTED_BYTES {
                        let limit = LISTED_BYTES as u64;
                        return Err(TransferError::TooMuch { what: "names and attributes", limit });
                    }
                    let path = listing.check(&entry, &folders)?;
                    if !seen.insert(path.clone()) {
                        return violation(format!("`{path}` is listed twice"));
                    }
                    if matches!(entry.kind, EntryKind::Directory { .. }) {
                        folders.insert(path.clone());
                    }
                    listing.entries.push((path, entry));
                }
                FromAgent::ListDone { entries } if entries as usize == listing.entries.len() => {
                    return Ok(listing);
                }
                FromAgent::ListDone { .. } => return violation("a list of another length".to_owned()),
                other => return Err(unexpected(&other, "in a list").into()),
            }
        }
    }

    fn check(&self, entry: &Entry, folders: &BTreeSet<TreePath>) -> Result<TreePath, TransferError> {
        if entry.ordinal as usize != self.entries.len() {
            return violation(format!("entry {} out of order", entry.ordinal));
        }
        let path = match TreePath::new(&entry.path) {
            Ok(path) => path,
            Err(error) => return violation(format!("entry `{}`: {error}", entry.path.escape_ascii())),
        };
        if path.parent().is_some_and(|parent| !folders.contains(&parent)) {
            return violation(format!("`{path}` is listed before its folder"));
        }
        if path.is_root() && !matches!(entry.kind, EntryKind::Directory { .. }) {
            return violation("the top of a layer is not a folder".to_owned());
        }
        if entry.mode > 0o7777 || entry.mtime_nanoseconds >= 1_000_000_000 {
            return violation(format!("`{path}` has an impossible mode or time"));
        }
        match &entry.kind {
            EntryKind::HardLink { ordinal } => {
                let target = self.entries.get(*ordinal as usize).map(|(_, target)| &target.kind);
                if matches!(
                    target,
                    None | Some(
                        EntryKind::Directory { .. } | EntryKind::HardLink { .. } | EntryKind::Whiteout
                    )
                ) {
                    return violation(format!("`{path}` is a hard link to what is not a file before it"));
                }
            }
            _ if entry.xattrs.iter().any(|(name, _)| name.starts_with(b"trusted.overlay.")) => {
                return violation(format!("`{path}` has attributes of an overlay"));
            }
            EntryKind::Symlink(text) if text.is_empty() || text.contains(&0) => {
                return violation(format!("`{path}` is a symbolic link with an impossible target"));
            }
            _ => {}
        }
        Ok(path)
    }

    /// The entries in the guest's order: folders before what they hold.
    pub fn entries(&self) -> impl Iterator<Item = (&TreePath, &Entry)> {
        self.entries.iter().map(|(path, entry)| (path, entry))
    }

    /// Bytes and number of the contents fetched.
    pub fn totals(&self) -> (u64, usize) {
        (self.contents.values().map(|(_, size)| size).sum(), self.contents.len())
    }

    /// The entry with this ordinal.
    pub fn entry(&self, ordinal: u32) -> Option<&Entry> {
        self.entries.get(ordinal as usize).map(|(_, entry)| entry)
    }

    /// The path of the entry with this ordinal.
    pub fn path(&self, ordinal: u32) -> Option<&TreePath> {
        self.entries.get(ordinal as usize).map(|(path, _)| path)
    }

    /// Fetches into `blobs` the contents of the regular files among the entries `wanted`, and of the files that hard
    /// links among them lead to.
    ///
    /// # Errors
    /// [`TransferError`].
    pub fn fetch(
        &mut self,
        session: &mut Session,
        blobs: &Blobs,
        limits: &Limits,
        wanted: &BTreeSet<u32>,
    ) -> Result<(), TransferError> {
        let mut ordinals = BTreeSet::new();
        let mut total_bytes = 0_u64;
        for (_, entry) in self.entries.iter().filter(|(_, entry)| wanted.contains(&entry.ordinal)) {
            let ordinal = match entry.kind {
                EntryKind::HardLink { ordinal } => ordinal,
                _ => entry.ordinal,
            };
            if let Some((_, Entry { kind: EntryKind::File { size }, .. })) =
                self.entries.get(ordinal as usize)
            {
                // Each name counts: a hard link becomes a file of its own in WORK.
                total_bytes = total_bytes.saturating_add(*size);
                ordinals.insert(ordinal);
            }
        }
        if total_bytes > limits.total_bytes {
            return Err(TransferError::TooMuch { what: "files", limit: limits.total_bytes });
        }
        let ordinals: Vec<u32> = ordinals.into_iter().collect();
        let seconds = total_bytes / SLOWEST_RATE + ordinals.len() as u64 / SLOWEST_FILES;
        let patience = FETCH_PATIENCE + Duration::from_secs(seconds);
        let mut deadline = Deadline::after(patience, Instant::now());
        for chunk in ordinals.chunks(FETCHED_AT_ONCE.min(MAX_FETCH)) {
            session.send(&ToAgent::Fetch { ordinals: chunk.to_vec() })?;
            for &ordinal in chunk {
                match session.next("collecting outputs", &mut deadline)? {
                    FromAgent::FileStart { ordinal: other } if other == ordinal => {}
                    other => return Err(unexpected(&other, "where a wanted file should start").into()),
                }
                let content = self.receive_file(session, blobs, ordinal, &mut deadline)?;
                self.contents.insert(ordinal, content);
            }
            match session.next("collecting outputs", &mut deadline)? {
                FromAgent::FetchDone => {}
                other => return Err(unexpected(&other, "at the end of a transfer").into()),
            }
        }
        Ok(())
    }

    fn receive_file(
        &self,
        session: &mut Session,
        blobs: &Blobs,
        ordinal: u32,
        deadline: &mut Deadline,
    ) -> Result<(Digest, u64), TransferError> {
        let Some((path, Entry { kind: EntryKind::File { size }, .. })) = self.entries.get(ordinal as usize)
        else {
            return violation(format!("entry {ordinal} is not a file"));
        };
        let stored = |source| TransferError::Store { path: path.clone(), source };
        let mut writer = blobs.writer().map_err(stored)?;
        let mut position = 0_u64;
        let skip_to = |writer: &mut crate::store::BlobWriter, position: &mut u64, offset: u64| {
            let gap = offset - *position;
            *position = offset;
            if gap > 0 { writer.skip(gap) } else { Ok(()) }
        };
        loop {
            match session.next("collecting outputs", deadline)? {
                FromAgent::FileData { data, .. } if data.is_empty() => {
                    return violation(format!("an empty piece of `{path}`"));
                }
                FromAgent::FileData { offset, data } => {
                    let end = offset.checked_add(data.len() as u64);
                    if offset < position || end.is_none_or(|end| end > *size) {
                        return violation(format!("`{path}` is not as long as it was listed"));
                    }
                    skip_to(&mut writer, &mut position, offset).map_err(stored)?;
                    writer.write_all(&data).map_err(stored)?;
                    position += data.len() as u64;
                }
                FromAgent::FileEnd { size: end } if end == *size => {
                    skip_to(&mut writer, &mut position, end).map_err(stored)?;
                    return writer.finish().map_err(stored);
                }
                FromAgent::FileEnd { .. } => {
                    return violation(format!("`{path}` is not as long as it was listed"));
                }
                other => return Err(unexpected(&other, "within a file").into()),
            }
        }
    }

    /// The entry at `ordinal` as a node of a tree; none for a whiteout and for a file that was not fetched. A hard
    /// link comes as a link to the entry it names.
    pub fn node(&self, ordinal: u32) -> Option<Node> {
        let (_, entry) = self.entries.get(ordinal as usize)?;
        let kind = match &entry.kind {
            EntryKind::Directory { .. } => Kind::Directory,
            EntryKind::File { .. } => {
                let (digest, size) = *self.contents.get(&ordinal)?;
                Kind::File { digest, size }
            }
            EntryKind::Symlink(text) => Kind::Symlink(text.as_slice().into()),
            EntryKind::HardLink { ordinal } => {
                return Some(Node {
                    kind: Kind::HardLink(self.path(*ordinal)?.clone()),
                    meta: Meta::default(),
                });
            }
            EntryKind::Whiteout => return None,
            EntryKind::CharDevice { major, minor } => Kind::CharDevice { major: *major, minor: *minor },
            EntryKind::BlockDevice { major, minor } => Kind::BlockDevice { major: *major, minor: *minor },
            EntryKind::Fifo => Kind::Fifo,
            EntryKind::Socket => Kind::Socket,
        };
        let meta = Meta {
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: Timestamp { seconds: entry.mtime_seconds, nanoseconds: entry.mtime_nanoseconds },
            xattrs: entry.xattrs.iter().cloned().collect(),
        };
        Some(Node { kind, meta })
    }
}
