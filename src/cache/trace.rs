//! A trace: what a step was seen to read, with digests, and what it gave.
//!
//! In a pack it is a line, which has a name and then the trace in a word. The form is private to kiln: one that another
//! kiln wrote, or that is damaged, is as good as none.

use std::borrow::Cow;

use kiln_digest::Digest;
use kiln_virtio::fs::record::{Fingerprint, Kind, Observed, PathBytes};

use super::codec::{Reader, Writer, unword, word};

/// What a trace begins with: the number of its form.
const FORM: u8 = 3;

/// What a step asked about one path, and what it was told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Path within the share; empty for the share's own directory.
    pub path: Vec<u8>,
    /// What it was.
    pub kind: Kind,
    /// What was asked.
    pub observed: Observed,
    /// What the host's file looked like.
    pub fingerprint: Fingerprint,
    /// Digest of the content, or of a link's text.
    pub content: Option<Digest>,
    /// Digest of the listing.
    pub listing: Option<Digest>,
    /// Digest of the extended attributes.
    pub xattrs: Option<Digest>,
}

/// What a step asked of one share.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ShareTrace {
    /// The share's name.
    pub name: String,
    /// Where the guest saw it.
    pub guest: String,
    /// What was found, in the order of a walk.
    pub entries: Vec<Entry>,
    /// What was looked for in vain.
    pub missed: Vec<Vec<u8>>,
}

/// What a step read and gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// When fingerprints were taken at the earliest, nanoseconds since 1970.
    pub stamped_nanos: i64,
    /// What it read.
    pub shares: Vec<ShareTrace>,
    /// Digest of its outputs' manifest.
    pub outputs: Digest,
    /// Digest of what it printed.
    pub log: Option<Digest>,
    /// How long its command ran, milliseconds.
    pub command_ms: u64,
    /// What ran it, in words.
    pub machine: String,
}

const KINDS: [Kind; 7] =
    [Kind::Regular, Kind::Directory, Kind::Link, Kind::Fifo, Kind::Socket, Kind::Character, Kind::Block];

/// Which digests an entry has.
mod has {
    pub const CONTENT: u8 = 1;
    pub const LISTING: u8 = 2;
    pub const XATTRS: u8 = 4;
}

impl Entry {
    fn write(&self, to: &mut Writer) {
        to.path(&self.path);
        let digests =
            [(self.content, has::CONTENT), (self.listing, has::LISTING), (self.xattrs, has::XATTRS)];
        let has = digests.iter().filter(|(digest, _)| digest.is_some()).fold(0, |all, (_, one)| all | one);
        [self.kind as u8, self.observed.bits(), has].into_iter().for_each(|byte| to.byte(byte));
        let Fingerprint { device, inode, size_bytes, mtime_nanos, ctime_nanos, mode } = self.fingerprint;
        [device, inode, size_bytes, u64::from(mode)].into_iter().for_each(|number| to.number(number));
        to.signed(mtime_nanos);
        to.signed(ctime_nanos);
        digests.iter().filter_map(|(digest, _)| digest.as_ref()).for_each(|digest| to.digest(digest));
    }

    fn read(from: &mut Reader<'_>) -> Option<Self> {
        let path = from.path()?;
        let kind = *KINDS.get(usize::from(from.byte()?))?;
        let observed = Observed::from_bits(from.byte()?)?;
        let has = from.byte()?;
        let (device, inode, size_bytes) = (from.number()?, from.number()?, from.number()?);
        let mode = u32::try_from(from.number()?).ok()?;
        let (mtime_nanos, ctime_nanos) = (from.signed()?, from.signed()?);
        let fingerprint = Fingerprint { device, inode, size_bytes, mtime_nanos, ctime_nanos, mode };
        let mut digest = |one: u8| match has & one {
            0 => Some(None),
            _ => from.digest().map(Some),
        };
        let (content, listing, xattrs) = (digest(has::CONTENT)?, digest(has::LISTING)?, digest(has::XATTRS)?);
        Some(Self { path, kind, observed, fingerprint, content, listing, xattrs })
    }

    /// Its path for people.
    pub fn shown(&self) -> PathBytes {
        PathBytes(self.path.clone())
    }
}

impl ShareTrace {
    /// Files whose content was read, and their bytes together.
    pub fn contents(&self) -> (u64, u64) {
        let read = |entry: &&Entry| entry.kind == Kind::Regular && entry.observed.contains(Observed::CONTENT);
        let entries = self.entries.iter().filter(read);
        entries.fold((0, 0), |(count, bytes), entry| (count + 1, bytes + entry.fingerprint.size_bytes))
    }

    fn write(&self, to: &mut Writer) {
        to.text(self.name.as_bytes());
        to.text(self.guest.as_bytes());
        to.number(self.entries.len() as u64);
        to.restart();
        self.entries.iter().for_each(|entry| entry.write(to));
        to.number(self.missed.len() as u64);
        to.restart();
        self.missed.iter().for_each(|path| to.path(path));
    }

    fn read(from: &mut Reader<'_>) -> Option<Self> {
        let name = String::from_utf8(from.text()?.to_vec()).ok()?;
        let guest = String::from_utf8(from.text()?.to_vec()).ok()?;
        let count = from.count()?;
        from.restart();
        let entries = (0..count).map(|_| Entry::read(from)).collect::<Option<_>>()?;
        let count = from.count()?;
        from.restart();
        let missed = (0..count).map(|_| from.path()).collect::<Option<_>>()?;
        Some(Self { name, guest, entries, missed })
    }
}

impl Trace {
    fn write(&self, to: &mut Writer) {
        to.signed(self.stamped_nanos);
        to.digest(&self.outputs);
        to.byte(u8::from(self.log.is_some()));
        self.log.iter().for_each(|log| to.digest(log));
        to.number(self.command_ms);
        to.text(self.machine.as_bytes());
        to.number(self.shares.len() as u64);
        self.shares.iter().for_each(|share| share.write(to));
    }

    fn read(from: &mut Reader<'_>) -> Option<Self> {
        let stamped_nanos = from.signed()?;
        let outputs = from.digest()?;
        let log = match from.byte()? {
            0 => None,
            _ => Some(from.digest()?),
        };
        let command_ms = from.number()?;
        let machine = String::from_utf8(from.text()?.to_vec()).ok()?;
        let count = from.count()?;
        let shares = (0..count).map(|_| ShareTrace::read(from)).collect::<Option<_>>()?;
        Some(Self { stamped_nanos, shares, outputs, log, command_ms, machine })
    }

    /// Files whose content was read, and their bytes together.
    pub fn contents(&self) -> (u64, u64) {
        let each = self.shares.iter().map(ShareTrace::contents);
        each.fold((0, 0), |all, one| (all.0 + one.0, all.1 + one.1))
    }
}

/// What the line of a pack says that is `trace`, under `name`.
pub(super) fn line(name: &str, trace: &Trace) -> Vec<u8> {
    let mut to = Writer::default();
    to.byte(FORM);
    trace.write(&mut to);
    [&word(name.as_bytes())[..], b" ", &word(&to.bytes)].concat()
}

/// The name of a line that [`line`] wrote. There may be anything after it.
pub(super) fn name_of(text: &[u8]) -> Option<Cow<'_, str>> {
    let at = text.iter().position(|byte| *byte == b' ')?;
    match std::str::from_utf8(&text[..at]).ok()? {
        name if !name.contains('\\') => Some(Cow::Borrowed(name)),
        name => Some(Cow::Owned(String::from_utf8(unword(name.as_bytes())?).ok()?)),
    }
}

/// The trace of a line that [`line`] wrote; none where that is not what it is.
pub(super) fn read_line(text: &[u8]) -> Option<Trace> {
    let at = text.iter().position(|byte| *byte == b' ')?;
    let bytes = unword(&text[at + 1..])?;
    let mut from = Reader::new(bytes.strip_prefix(&[FORM])?);
    let trace = Trace::read(&mut from)?;
    from.is_at_end().then_some(trace)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace() -> Trace {
        let entry = |path: &[u8], content| Entry {
            path: path.to_vec(),
            kind: Kind::Regular,
            observed: Observed::CONTENT | Observed::METADATA,
            fingerprint: Fingerprint {
                device: 1,
                inode: u64::MAX,
                size_bytes: 300,
                mtime_nanos: -5,
                ctime_nanos: i64::MAX,
                mode: 0o100_644,
            },
            content,
            listing: None,
            xattrs: Some(Digest::of(b"x")),
        };
        let src = ShareTrace {
            name: "src".to_owned(),
            guest: "/ws/p".to_owned(),
            entries: vec![entry(b"a/b", Some(Digest::of(b"1"))), entry(b"a/bc\xff", None)],
            missed: vec![b"a/c".to_vec(), b"a/cd".to_vec()],
        };
        Trace {
            stamped_nanos: 7,
            shares: vec![src, ShareTrace { name: "work".to_owned(), ..ShareTrace::default() }],
            outputs: Digest::of(b"outputs"),
            log: Some(Digest::of(b"log")),
            command_ms: 1234,
            machine: "qemu".to_owned(),
        }
    }

    #[test]
    fn a_trace_is_read_as_it_was_written() {
        for (name, trace) in [("key.0", trace()), ("a step\nof \\ two", Trace { log: None, ..trace() })] {
            let line = line(name, &trace);
            assert!(!line.contains(&b'\n'));
            assert_eq!(name_of(&line).as_deref(), Some(name));
            assert_eq!(read_line(&line).as_ref(), Some(&trace));
        }
    }

    #[test]
    fn half_a_trace_and_one_of_another_form_are_as_good_as_none() {
        let line = line("n", &trace());
        for at in 0..line.len() {
            assert_eq!(read_line(&line[..at]), None, "cut after {at} bytes");
        }
        let mut other = line.clone();
        other["n ".len()] = FORM + 1;
        assert_eq!(read_line(&other), None);
        assert_eq!(read_line(&[&line[..], b"x"].concat()), None);
    }
}
