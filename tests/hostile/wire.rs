//! Messages of the wire by name: tag and layout of the payload. Written down apart from `kiln-wire`'s own.

use super::layout;
use super::script::Step;
use super::value::little_endian;

/// What every entry of a list ends with.
const META: &str = " mode:2=420 uid:4 gid:4 mtime:8 nanos:4 xattrs:4 xattr:b";

/// From the agent: name, tag, layout. Entries go by their kinds.
const FROM_AGENT: [(&str, u8, &str); 25] = [
    ("READY", 0x81, "version:2=VERSION kernel:c=6.12.0 uptime_us:8 memory_bytes:8 cpus:2=1"),
    ("SETUP_DONE", 0x82, ""),
    ("FAILED", 0x83, "what:c errno:2=5"),
    ("STARTED", 0x84, "id:4=1"),
    ("EXEC_FAILED", 0x85, "id:4=1 what:c errno:2=2 why:c"),
    ("OUTPUT", 0x86, "id:4=1 stream:1=1 data:c=x"),
    (
        "EXITED",
        0x87,
        "id:4=1 outcome:1 status:1 wall_us:8 user_us:8 system_us:8 max_rss:8 peak_memory:8 oom_kills:4 refused:4",
    ),
    ("DIR", 0x88, "ordinal:4=NEXT path:c kind:1=0 opaque:1 META"),
    ("FILE", 0x88, "ordinal:4=NEXT path:c kind:1=1 size:8 META"),
    ("SYMLINK", 0x88, "ordinal:4=NEXT path:c kind:1=2 target:c META"),
    ("HARDLINK", 0x88, "ordinal:4=NEXT path:c kind:1=3 to:4 META"),
    ("WHITEOUT", 0x88, "ordinal:4=NEXT path:c kind:1=4 META"),
    ("CHAR", 0x88, "ordinal:4=NEXT path:c kind:1=5 major:4 minor:4 META"),
    ("BLOCK", 0x88, "ordinal:4=NEXT path:c kind:1=6 major:4 minor:4 META"),
    ("FIFO", 0x88, "ordinal:4=NEXT path:c kind:1=7 META"),
    ("SOCKET", 0x88, "ordinal:4=NEXT path:c kind:1=8 META"),
    ("LIST_DONE", 0x89, "entries:4=NEXT"),
    ("FILE_START", 0x8a, "ordinal:4=1"),
    ("FILE_DATA", 0x8b, "offset:8 data:c"),
    ("FILE_END", 0x8c, "size:8"),
    ("FETCH_DONE", 0x8d, ""),
    ("LOG", 0x8e, "text:c"),
    ("BYE", 0x8f, ""),
    ("MOUNTED", 0x90, ""),
    ("CREDIT", 0x91, "id:4=1 bytes:4=1"),
];

/// From the host, likewise.
const TO_AGENT: [(&str, u8, &str); 12] = [
    ("HELLO", 0x01, "version:2=VERSION"),
    (
        "SETUP",
        0x02,
        "seed:8 seed1:8 seed2:8 seed3:8 seed4:8 seed5:8 seed6:8 seed7:8 warm_up:1 clock:8 nanos:4 root_kind:1 root:c=root \
         scratch:1 scratch_disk:b layer_bytes:8 processes:4 mounts:4 mount:b hostname:c=kiln modules:4 module:b",
    ),
    (
        "EXEC",
        0x03,
        "id:4=1 arguments:4=1 argument:c=true argument_more:b variables:4 variable:b cwd:c=/ timeout_ms:8 \
         grace_ms:8 stdin:1 terminal:1 size:b",
    ),
    ("STDIN", 0x04, "id:4=1 data:c"),
    ("SIGNAL", 0x05, "id:4=1 signal:1=15"),
    ("LIST", 0x06, "target:c=/"),
    ("FETCH", 0x07, "ordinals:4 ordinal:b"),
    ("POWER_OFF", 0x08, ""),
    ("MOUNT", 0x09, "source:1 name:c=tools target:c=/toolbox access:1"),
    ("CREDIT", 0x0a, "id:4=1 bytes:4=1"),
    ("RESIZE", 0x0b, "id:4=1 rows:2=24 columns:2=80"),
    (
        "SETTLE",
        0x0d,
        "seed:8 seed1:8 seed2:8 seed3:8 seed4:8 seed5:8 seed6:8 seed7:8 serial:c=scratch bytes:8=8192",
    ),
];

/// Which end a message is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    Agent,
    Host,
}

impl From {
    fn messages(self) -> &'static [(&'static str, u8, &'static str)] {
        match self {
            Self::Agent => &FROM_AGENT,
            Self::Host => &TO_AGENT,
        }
    }

    /// The name of the message with this tag.
    pub fn name(self, tag: u8) -> &'static str {
        self.messages().iter().find(|(_, known, _)| *known == tag).map_or("UNKNOWN", |(name, ..)| name)
    }
}

/// Whether a message is an entry of a list.
pub fn is_entry(name: &str) -> bool {
    FROM_AGENT.iter().any(|(known, tag, _)| *known == name && *tag == 0x88)
}

/// The frame of a message of the language: `NAME field=… body=… tail=… cut=… frame_len=…`; none where there is no
/// message of that name. `next` is the number that the next entry has.
pub fn frame(from: From, step: &mut Step, next: u32) -> Result<Option<Vec<u8>>, String> {
    let verb = step.verb.clone();
    let payload = match verb.as_str() {
        // A payload as it is.
        "frame" => step.bytes_at(0)?,
        // Bytes as they are.
        "bytes" => return step.bytes_at(0).map(Some),
        _ => {
            let known = from.messages().iter().find(|(name, ..)| *name == verb);
            let Some((_, tag, layout)) = known else { return Ok(None) };
            let layout = layout
                .replace(" META", META)
                .replace("=NEXT", &format!("={next}"))
                .replace("=VERSION", &format!("={}", kiln_wire::VERSION));
            let mut payload = vec![*tag];
            payload.extend(match step.bytes("body")? {
                Some(body) => body,
                None => layout::encode(&layout, step)?,
            });
            payload.extend(step.bytes("tail")?.unwrap_or_default());
            payload
        }
    };
    let length = i128::try_from(payload.len()).map_err(|error| error.to_string())?;
    let mut frame = little_endian(step.number("frame_len", length)?, 4, "frame_len")?;
    frame.extend(payload);
    let cut = step.number("cut", frame.len())?;
    frame.truncate(cut);
    Ok(Some(frame))
}
