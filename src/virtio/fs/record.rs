//! The record: what a guest asked of each share, as it is handed to whoever keys and re-runs steps.
//!
//! It is complete by construction: the server notes an observation before it puts the answer in the used ring,
//! so what is not in the record was not answered. It is a superset of what programs asked, because the guest
//! kernel's own lookups and readahead count.
//!
//! - A name that was looked up counts as [`Observed::METADATA`]: the guest kernel caches the attributes that
//!   come with it and may show them to any program later.
//! - Reading bytes of a file, or a link's text, counts as [`Observed::CONTENT`]. Nobody ever reads a file of
//!   size zero, its size says it all: asking for the metadata of an empty regular file counts as content too.
//! - [`Observed::LISTING`] is names and types of a directory's entries, [`Observed::XATTRS`] any question about
//!   extended attributes.
//!
//! [`RecordPart`] is the record in pieces of bounded size, because a record of some hundred thousand names is
//! larger than all other memory of the device process; [`Assembler`] puts them together again.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Bytes of a path or name. In text, what is not valid UTF-8 is written as `%` and two hexadecimal digits per
/// byte, and `%` itself as `%25`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct PathBytes(pub Vec<u8>);

impl fmt::Display for PathBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            for (index, piece) in chunk.valid().split('%').enumerate() {
                f.write_str(if index == 0 { "" } else { "%25" })?;
                f.write_str(piece)?;
            }
            chunk.invalid().iter().try_for_each(|byte| write!(f, "%{byte:02x}"))?;
        }
        Ok(())
    }
}

impl fmt::Debug for PathBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

impl PathBytes {
    /// The bytes of which `text` is the escaped form, or `None` where an escape is malformed.
    pub fn from_escaped(text: &str) -> Option<Self> {
        let mut bytes = Vec::with_capacity(text.len());
        let mut pieces = text.as_bytes().split(|byte| *byte == b'%');
        bytes.extend_from_slice(pieces.next()?);
        for piece in pieces {
            let (digits, rest) = piece.split_at_checked(2)?;
            let digits = std::str::from_utf8(digits).ok()?;
            let hexadecimal = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
            bytes.push(u8::from_str_radix(digits, 16).ok().filter(|_| hexadecimal)?);
            bytes.extend_from_slice(rest);
        }
        Some(Self(bytes))
    }
}

impl Serialize for PathBytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PathBytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::from_escaped(&text).ok_or_else(|| D::Error::custom("malformed escape in path"))
    }
}

/// What kind of file an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Kind {
    /// A regular file.
    Regular,
    /// A directory.
    Directory,
    /// A symbolic link.
    Link,
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
    /// A character device.
    Character,
    /// A block device.
    Block,
}

bitflags::bitflags! {
    /// What was asked about an entry. In JSON: the number.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct Observed: u8 {
        /// Bytes of a file, or the text of a link.
        const CONTENT = 1;
        /// What stat(2) shows.
        const METADATA = 2;
        /// Names and kinds of a directory's entries.
        const LISTING = 4;
        /// Names or values of extended attributes.
        const XATTRS = 8;
    }
}

impl Serialize for Observed {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u8(self.bits())
    }
}

impl<'de> Deserialize<'de> for Observed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::from_bits(u8::deserialize(deserializer)?).ok_or_else(|| D::Error::custom("unknown observation"))
    }
}

/// What the host's file looked like when the guest was first told about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Fingerprint {
    /// st_dev.
    pub device: u64,
    /// st_ino.
    pub inode: u64,
    /// st_size, bytes.
    pub size_bytes: u64,
    /// st_mtim, nanoseconds since 1970; a time that does not fit is the nearest that does.
    pub mtime_nanos: i64,
    /// st_ctim, likewise.
    pub ctime_nanos: i64,
    /// st_mode: type and permissions.
    pub mode: u32,
}

/// One entry of a share of which something was asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Path within the share; empty for the share's own directory.
    pub path: PathBytes,
    /// What it is.
    pub kind: Kind,
    /// What was asked.
    pub observed: Observed,
    /// What the file looked like. All zero where only its parent's listing named it.
    pub fingerprint: Fingerprint,
}

/// How an entry was seen to differ from what the guest had been told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Change {
    /// Another size, modification or change time.
    Modified,
    /// Another file stands at its path.
    Replaced,
    /// Nothing stands at its path.
    Vanished,
    /// The host refused to read it, so the guest got an error that another host might not give.
    Unreadable,
}

/// An entry that did not hold still: a record that has any does not say what the guest saw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    /// Path within the share.
    pub path: PathBytes,
    /// How it differed, the first time that was seen.
    pub what: Change,
}

/// What was asked of one share. All lists are sorted by path.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ShareRecord {
    /// The share's name.
    pub name: PathBytes,
    /// What was found.
    pub entries: Vec<Entry>,
    /// Paths that were looked for and do not exist.
    pub missed: Vec<PathBytes>,
    /// What changed under the guest's feet.
    pub changed: Vec<Changed>,
}

/// What a guest asked of its shares, in the order in which they were added.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Record {
    /// False where the guest looked for more absent names than are kept; the record then proves nothing.
    pub complete: bool,
    /// One for each share that was added, also where it was removed again.
    pub shares: Vec<ShareRecord>,
}

/// A piece of a record, of bounded size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RecordPart {
    /// What follows is about this share.
    Share(PathBytes),
    /// Some of its entries.
    Entries(Vec<Entry>),
    /// Some of what was missed in it.
    Missed(Vec<PathBytes>),
    /// Some of what changed in it.
    Changed(Vec<Changed>),
    /// That was all.
    End {
        /// [`Record::complete`].
        complete: bool,
    },
}

/// Most paths in one [`RecordPart`].
pub const PART_PATHS: usize = 500;
/// Bytes of paths after which a [`RecordPart`] ends.
pub const PART_BYTES: usize = 256 << 10;

/// Why the parts do not make up a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AssembleError {
    /// A part before the first share, or after the end.
    #[error("record parts out of order")]
    Order,
    /// More paths or bytes than the limit.
    #[error("record is too large")]
    TooLarge,
}

/// Puts a record together from its parts, which may come from a process that is not trusted.
#[derive(Debug, Default)]
pub struct Assembler {
    record: Record,
    paths: usize,
    bytes: usize,
}

/// Most paths an [`Assembler`] takes.
const MOST_PATHS: usize = 20_000_000;
/// Most bytes of paths an [`Assembler`] takes.
const MOST_BYTES: usize = 2 << 30;

impl Assembler {
    /// Takes the next part, and gives the record when that was the last.
    ///
    /// # Errors
    /// See [`AssembleError`].
    pub fn push(&mut self, part: RecordPart) -> Result<Option<Record>, AssembleError> {
        let (paths, bytes) = match &part {
            RecordPart::Share(name) => (1, name.0.len()),
            RecordPart::Entries(list) => (list.len(), list.iter().map(|entry| entry.path.0.len()).sum()),
            RecordPart::Missed(list) => (list.len(), list.iter().map(|path| path.0.len()).sum()),
            RecordPart::Changed(list) => (list.len(), list.iter().map(|entry| entry.path.0.len()).sum()),
            RecordPart::End { .. } => (0, 0),
        };
        self.paths = self.paths.saturating_add(paths);
        self.bytes = self.bytes.saturating_add(bytes);
        if self.paths > MOST_PATHS || self.bytes > MOST_BYTES {
            return Err(AssembleError::TooLarge);
        }
        match part {
            RecordPart::Share(name) => self.record.shares.push(ShareRecord { name, ..Default::default() }),
            RecordPart::Entries(list) => self.share()?.entries.extend(list),
            RecordPart::Missed(list) => self.share()?.missed.extend(list),
            RecordPart::Changed(list) => self.share()?.changed.extend(list),
            RecordPart::End { complete } => {
                let mut record = std::mem::take(self).record;
                record.complete = complete;
                for share in &mut record.shares {
                    share.entries.sort_unstable_by(|one, other| one.path.cmp(&other.path));
                    share.missed.sort_unstable();
                    share.changed.sort_unstable_by(|one, other| one.path.cmp(&other.path));
                }
                return Ok(Some(record));
            }
        }
        Ok(None)
    }

    fn share(&mut self) -> Result<&mut ShareRecord, AssembleError> {
        self.record.shares.last_mut().ok_or(AssembleError::Order)
    }
}

/// Names that were looked for in vain, by the index of the directory.
#[derive(Debug, Default)]
pub(super) struct Missed {
    names: BTreeMap<u32, std::collections::BTreeSet<Box<[u8]>>>,
    bytes: usize,
    overflowed: bool,
}

/// Most memory for missed names. A hostile guest can invent names without end; a compiler that looks through a
/// hundred include directories for 10,000 headers stays below.
const MISSED_BYTES: usize = 96 << 20;
/// What a name costs besides its bytes.
const MISSED_OVERHEAD: usize = 48;

impl Missed {
    /// Notes that `name` was looked for in `directory`.
    pub fn insert(&mut self, directory: u32, name: &[u8]) {
        let names = self.names.entry(directory).or_default();
        if names.contains(name) {
            return;
        }
        if self.bytes + name.len() + MISSED_OVERHEAD > MISSED_BYTES {
            self.overflowed = true;
            return;
        }
        self.bytes += name.len() + MISSED_OVERHEAD;
        names.insert(name.into());
    }

    /// True where names were left out.
    pub fn overflowed(&self) -> bool {
        self.overflowed
    }

    /// All directories and what was missed in them.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &[u8])> {
        self.names.iter().flat_map(|(directory, names)| names.iter().map(|name| (*directory, &**name)))
    }
}
