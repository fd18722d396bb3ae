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
//! What was shown is in an [`Entry`] as it was shown, or as a digest of that; only contents are not, which
//! whoever takes the record hashes, and shows by the [`Fingerprint`] that they are what was served.
//!
//! [`RecordPart`] is the record in pieces of bounded size, because a record of some hundred thousand names is
//! larger than all other memory of the device process; `assemble` puts them together again, `packed` keeps them.

use std::cmp::Ordering;
use std::fmt;

use kiln_digest::Digest;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::share::Attributes;

pub use super::assemble::{AssembleError, Assembler};
pub use super::packed::{Entries, Paths};
pub use super::share::Extra;

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
    /// The text that it is shown as, without a copy where that has the same bytes.
    pub fn into_text(self) -> String {
        match String::from_utf8(self.0) {
            Ok(text) if !text.contains('%') => text,
            Ok(text) => Self(text.into_bytes()).to_string(),
            Err(error) => Self(error.into_bytes()).to_string(),
        }
    }

    /// The order of a walk: a directory, then all that is in it, name by name.
    pub fn cmp_as_walked(&self, other: &Self) -> Ordering {
        // No name has a zero byte in it.
        fn names(path: &PathBytes) -> impl Iterator<Item = u8> {
            path.0.iter().map(|byte| if *byte == b'/' { 0 } else { *byte })
        }
        names(self).cmp(names(other))
    }

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

impl Kind {
    /// The letter by which find(1) knows the type.
    pub fn letter(self) -> char {
        match self {
            Self::Regular => 'f',
            Self::Directory => 'd',
            Self::Link => 'l',
            Self::Fifo => 'p',
            Self::Socket => 's',
            Self::Character => 'c',
            Self::Block => 'b',
        }
    }
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
    /// What the file looked like.
    pub fingerprint: Fingerprint,
    /// What stat(2) showed besides, of device nodes and in a share with [`Attributes::Real`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub extra: Option<Extra>,
    /// Digest of what a listing shows, where there was one: for each entry in the order of kind and name, its
    /// letter, name and a zero byte; in a share with [`Attributes::Real`] `/` and the inode number before that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listing: Option<Digest>,
    /// Digest of the extended attributes, where they were asked about: for each in the order of names, the name,
    /// a zero byte, the value's length in decimal, a zero byte, the value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub xattrs: Option<Digest>,
}

impl Entry {
    /// What stat(2) showed, as a line: letter, permissions in octal; the size of a file or link, or the number of
    /// a device node; in a share with [`Attributes::Real`] also, for everything, size, owner, group, links, inode
    /// number, blocks, and times of access, modification and change.
    pub fn metadata_line(&self, attributes: Attributes) -> String {
        let seen = &self.fingerprint;
        let mut line = format!("{} {:o}", self.kind.letter(), seen.mode & 0o7777);
        let is_real = attributes == Attributes::Real;
        if is_real || matches!(self.kind, Kind::Regular | Kind::Link) {
            line += &format!(" {}", seen.size_bytes);
        }
        let extra = self.extra.unwrap_or_default();
        if matches!(self.kind, Kind::Character | Kind::Block) {
            let (major, minor) = extra.device_number();
            line += &format!(" {major}:{minor}");
        }
        if is_real {
            let Extra { uid, gid, nlink, blocks, atime, .. } = extra;
            line += &format!(" {uid} {gid} {nlink} {} {blocks}", seen.inode);
            line += &format!(" {}.{:09}", atime.0.cast_signed(), atime.1);
            for nanos in [seen.mtime_nanos, seen.ctime_nanos] {
                let (seconds, nanos) = (nanos.div_euclid(1_000_000_000), nanos.rem_euclid(1_000_000_000));
                line += &format!(" {seconds}.{nanos:09}");
            }
        }
        line + "\n"
    }
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

/// What was asked of one share. All lists are in the order of a walk ([`PathBytes::cmp_as_walked`]).
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ShareRecord {
    /// The share's name.
    pub name: PathBytes,
    /// What was found.
    pub entries: Entries,
    /// Paths that were looked for and do not exist.
    pub missed: Paths,
    /// What changed under the guest's feet.
    pub changed: Vec<Changed>,
}

/// What a guest asked of its shares, in the order in which they were added.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Record {
    /// True where the guest looked for more absent names than there is room for, and got errors instead of
    /// answers: what it did next follows from that room, and not only from what it was shown.
    pub full: bool,
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
        /// [`Record::full`].
        full: bool,
    },
}

/// Most paths in one [`RecordPart`].
pub const PART_PATHS: usize = 500;
/// Bytes of paths after which a [`RecordPart`] ends.
pub const PART_BYTES: usize = 256 << 10;
