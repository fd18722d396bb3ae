//! Bytes of the messages from agent to host: a tag, then the fields in the order of their declaration.

use crate::codec::{DecodeError, Reader, Writer};
use crate::message::{
    Entry, EntryKind, FromAgent, MAX_DATA_BYTES, MAX_NAME_BYTES, MAX_PATH_BYTES, MAX_XATTR_BYTES, MAX_XATTRS,
    Outcome, Stream, Usage,
};

const READY: u8 = 0x81;
const SETUP_DONE: u8 = 0x82;
const FAILED: u8 = 0x83;
const STARTED: u8 = 0x84;
const EXEC_FAILED: u8 = 0x85;
const OUTPUT: u8 = 0x86;
const EXITED: u8 = 0x87;
const ENTRY: u8 = 0x88;
const LIST_DONE: u8 = 0x89;
const FILE_START: u8 = 0x8a;
const FILE_DATA: u8 = 0x8b;
const FILE_END: u8 = 0x8c;
const FETCH_DONE: u8 = 0x8d;
const LOG: u8 = 0x8e;
const BYE: u8 = 0x8f;
const MOUNTED: u8 = 0x90;
const CREDIT: u8 = 0x91;

impl FromAgent {
    /// The payload of this message's frame. Limits are the caller's to keep: a message over one of them is refused by
    /// `decode` on the other side.
    pub fn encode(&self) -> Vec<u8> {
        let mut w;
        match self {
            Self::Ready { version, kernel, uptime_us, memory_bytes, cpus } => {
                w = Writer::new(READY);
                w.u16(*version);
                w.text(kernel);
                w.u64(*uptime_us);
                w.u64(*memory_bytes);
                w.u16(*cpus);
            }
            Self::SetupDone => w = Writer::new(SETUP_DONE),
            Self::Mounted => w = Writer::new(MOUNTED),
            Self::Failed { what, errno } => {
                w = Writer::new(FAILED);
                w.text(what);
                w.u16(*errno);
            }
            Self::Started { id } => {
                w = Writer::new(STARTED);
                w.u32(*id);
            }
            Self::ExecFailed { id, what, errno, why } => {
                w = Writer::new(EXEC_FAILED);
                w.u32(*id);
                w.text(what);
                w.u16(*errno);
                w.text(why);
            }
            Self::Output { id, stream, data } => {
                w = Writer::with_room(OUTPUT, data.len());
                w.u32(*id);
                w.u8(match stream {
                    Stream::Stdout => 1,
                    Stream::Stderr => 2,
                });
                w.bytes(data);
            }
            Self::Credit { id, bytes } => {
                w = Writer::new(CREDIT);
                w.u32(*id);
                w.u32(*bytes);
            }
            Self::Exited { id, outcome, usage } => {
                w = Writer::new(EXITED);
                w.u32(*id);
                write_outcome(&mut w, *outcome);
                write_usage(&mut w, usage);
            }
            Self::Entry(entry) => {
                w = Writer::new(ENTRY);
                write_entry(&mut w, entry);
            }
            Self::ListDone { entries } => {
                w = Writer::new(LIST_DONE);
                w.u32(*entries);
            }
            Self::FileStart { ordinal } => {
                w = Writer::new(FILE_START);
                w.u32(*ordinal);
            }
            Self::FileData { offset, data } => {
                w = Writer::with_room(FILE_DATA, data.len());
                w.u64(*offset);
                w.bytes(data);
            }
            Self::FileEnd { size } => {
                w = Writer::new(FILE_END);
                w.u64(*size);
            }
            Self::FetchDone => w = Writer::new(FETCH_DONE),
            Self::Log(text) => {
                w = Writer::new(LOG);
                w.text(text);
            }
            Self::Bye => w = Writer::new(BYE),
        }
        w.finish()
    }

    /// The message in a frame's payload.
    ///
    /// # Errors
    /// The payload is no message: cut, too long, over a limit, or with a value that means nothing.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader::new(payload);
        let message = match r.u8("message from the agent")? {
            READY => Self::Ready {
                version: r.u16("version")?,
                kernel: r.name("kernel release")?,
                uptime_us: r.u64("uptime")?,
                memory_bytes: r.u64("memory")?,
                cpus: r.u16("processors")?,
            },
            SETUP_DONE => Self::SetupDone,
            MOUNTED => Self::Mounted,
            FAILED => Self::Failed { what: r.text("failure")?, errno: r.u16("errno")? },
            STARTED => Self::Started { id: r.u32("command id")? },
            EXEC_FAILED => Self::ExecFailed {
                id: r.u32("command id")?,
                what: r.text("failure")?,
                errno: r.u16("errno")?,
                why: r.text("obstacle")?,
            },
            OUTPUT => Self::Output {
                id: r.u32("command id")?,
                stream: match r.u8("stream")? {
                    1 => Stream::Stdout,
                    2 => Stream::Stderr,
                    tag => return Err(DecodeError::Tag { what: "stream", tag }),
                },
                data: match r.bytes(MAX_DATA_BYTES, "output")? {
                    // Costs no credit, so there could be any number of them.
                    data if data.is_empty() => return Err(DecodeError::Invalid { what: "empty output" }),
                    data => data,
                },
            },
            CREDIT => Self::Credit { id: r.u32("command id")?, bytes: r.positive("credit")? },
            EXITED => Self::Exited {
                id: r.u32("command id")?,
                outcome: read_outcome(&mut r)?,
                usage: read_usage(&mut r)?,
            },
            ENTRY => Self::Entry(read_entry(&mut r)?),
            LIST_DONE => Self::ListDone { entries: r.u32("entries")? },
            FILE_START => Self::FileStart { ordinal: r.u32("ordinal")? },
            FILE_DATA => {
                Self::FileData { offset: r.u64("offset")?, data: r.bytes(MAX_DATA_BYTES, "content")? }
            }
            FILE_END => Self::FileEnd { size: r.u64("size")? },
            FETCH_DONE => Self::FetchDone,
            LOG => Self::Log(r.text("log line")?),
            BYE => Self::Bye,
            tag => return Err(DecodeError::Tag { what: "message from the agent", tag }),
        };
        r.finish()?;
        Ok(message)
    }
}

fn write_outcome(w: &mut Writer, outcome: Outcome) {
    let (tag, number) = match outcome {
        Outcome::Exit(status) => (0, status),
        Outcome::Signal(signal) => (1, signal),
        Outcome::TimedOut => (2, 0),
    };
    w.u8(tag);
    w.u8(number);
}

fn read_outcome(r: &mut Reader<'_>) -> Result<Outcome, DecodeError> {
    match (r.u8("outcome")?, r.u8("outcome")?) {
        (0, status) => Ok(Outcome::Exit(status)),
        (1, signal) => Ok(Outcome::Signal(signal)),
        (2, 0) => Ok(Outcome::TimedOut),
        (tag, _) => Err(DecodeError::Tag { what: "outcome", tag }),
    }
}

fn write_usage(w: &mut Writer, usage: &Usage) {
    w.u64(usage.wall_us);
    w.u64(usage.user_us);
    w.u64(usage.system_us);
    w.u64(usage.max_rss_bytes);
    w.u64(usage.peak_memory_bytes);
    w.u32(usage.oom_kills);
    w.u32(usage.refused_processes);
}

fn read_usage(r: &mut Reader<'_>) -> Result<Usage, DecodeError> {
    Ok(Usage {
        wall_us: r.u64("usage")?,
        user_us: r.u64("usage")?,
        system_us: r.u64("usage")?,
        max_rss_bytes: r.u64("usage")?,
        peak_memory_bytes: r.u64("usage")?,
        oom_kills: r.u32("usage")?,
        refused_processes: r.u32("usage")?,
    })
}

fn write_entry(w: &mut Writer, entry: &Entry) {
    w.u32(entry.ordinal);
    w.bytes(&entry.path);
    write_kind(w, &entry.kind);
    w.u16(entry.mode);
    w.u32(entry.uid);
    w.u32(entry.gid);
    w.i64(entry.mtime_seconds);
    w.u32(entry.mtime_nanoseconds);
    w.count(entry.xattrs.len());
    for (name, value) in &entry.xattrs {
        w.bytes(name);
        w.bytes(value);
    }
}

fn read_entry(r: &mut Reader<'_>) -> Result<Entry, DecodeError> {
    Ok(Entry {
        ordinal: r.u32("ordinal")?,
        path: r.relative_path("path of an entry")?,
        kind: read_kind(r)?,
        mode: match r.u16("mode")? {
            mode if mode <= 0o7777 => mode,
            _ => return Err(DecodeError::Invalid { what: "mode" }),
        },
        uid: r.u32("owner")?,
        gid: r.u32("group")?,
        mtime_seconds: r.i64("modification time")?,
        mtime_nanoseconds: r.nanoseconds("modification time")?,
        xattrs: r.list(MAX_XATTRS, "extended attributes", |r| {
            let name = r.c_bytes(MAX_NAME_BYTES, "extended attribute's name")?;
            if name.is_empty() {
                return Err(DecodeError::Invalid { what: "extended attribute's name" });
            }
            Ok((name, r.bytes(MAX_XATTR_BYTES, "extended attribute")?))
        })?,
    })
}

fn write_kind(w: &mut Writer, kind: &EntryKind) {
    match kind {
        EntryKind::Directory { opaque } => {
            w.u8(0);
            w.bool(*opaque);
        }
        EntryKind::File { size } => {
            w.u8(1);
            w.u64(*size);
        }
        EntryKind::Symlink(text) => {
            w.u8(2);
            w.bytes(text);
        }
        EntryKind::HardLink { ordinal } => {
            w.u8(3);
            w.u32(*ordinal);
        }
        EntryKind::Whiteout => w.u8(4),
        EntryKind::CharDevice { major, minor } => {
            w.u8(5);
            w.u32(*major);
            w.u32(*minor);
        }
        EntryKind::BlockDevice { major, minor } => {
            w.u8(6);
            w.u32(*major);
            w.u32(*minor);
        }
        EntryKind::Fifo => w.u8(7),
        EntryKind::Socket => w.u8(8),
    }
}

fn read_kind(r: &mut Reader<'_>) -> Result<EntryKind, DecodeError> {
    Ok(match r.u8("kind of an entry")? {
        0 => EntryKind::Directory { opaque: r.bool("opaque folder")? },
        1 => EntryKind::File { size: r.u64("size")? },
        2 => EntryKind::Symlink(r.c_bytes(MAX_PATH_BYTES, "symbolic link")?),
        3 => EntryKind::HardLink { ordinal: r.u32("hard link")? },
        4 => EntryKind::Whiteout,
        5 => EntryKind::CharDevice { major: r.u32("device")?, minor: r.u32("device")? },
        6 => EntryKind::BlockDevice { major: r.u32("device")?, minor: r.u32("device")? },
        7 => EntryKind::Fifo,
        8 => EntryKind::Socket,
        tag => return Err(DecodeError::Tag { what: "kind of an entry", tag }),
    })
}
