//! The fs device as a target: FUSE requests by name, and raw chains on its queues.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use kiln_virtio::device::{Device, Wake};
use kiln_virtio::fs::record::{Assembler, Record, ShareRecord};
use kiln_virtio::fs::{Attributes, Fs, Settings, Share, Shares};

use super::changes::{change, inside};
use super::folder::Folder;
use super::fuse::{IN_BYTES, OUT_BYTES, REQUESTS, names};
use super::layout;
use super::rings::{Driver, POISON, Rings};
use super::script::{Step, Target, errno_name};
use super::value::Value;

/// The high-priority queue and two request queues.
const QUEUES: usize = 3;
/// Open files that the device may keep.
const OPEN_FILES: usize = 16;
/// How much room there is for names that are not there.
const MISSED_BYTES: usize = 1 << 20;
/// Room for an answer, unless a case says otherwise.
const ROOM: usize = 4096;
/// What is in the file that must never be reached.
const CANARY: &[u8] = b"outside of every share";

/// A device with the shares `s` and `t`, and its driver.
pub struct FsTarget {
    folder: Folder,
    device: Fs,
    shares: Shares,
    rings: Rings,
    unique: u64,
    /// What came with the last answer, behind its header.
    reply: Vec<u8>,
    /// Nodes of `s` that the driver knows from the start.
    nodes: Vec<(&'static str, u64)>,
}

/// What a request was answered with.
enum Answer {
    None,
    Error(i32),
    Payload(Vec<u8>),
}

impl FsTarget {
    /// A device whose driver has said INIT and looked up `s` and what is in it. On the host, `s` holds `f` ("content"),
    /// `d/f` ("inside") and `x`, a link to `/`; `t` holds `g` ("good").
    pub fn new(driver: Driver) -> Result<Self, String> {
        let folder = Folder::new();
        for (name, content) in [("s/f", &b"content"[..]), ("s/d/f", b"inside"), ("t/g", b"good")] {
            folder.file(name, content);
        }
        folder.file("canary", CANARY);
        symlink("/", folder.path("s/x")).map_err(|error| error.to_string())?;
        let (device, shares) =
            Fs::new(Settings { open_files: OPEN_FILES, missed_bytes: MISSED_BYTES, ..Settings::default() });
        let device = device.with_request_queues(2);
        let (rings, reply, nodes) = (Rings::new(QUEUES, driver)?, Vec::new(), Vec::new());
        let mut target = Self { folder, device, shares, rings, unique: 0, reply, nodes };
        for name in ["s", "t"] {
            target.share(name, &target.folder.path(name), Attributes::Fixed { mtime_seconds: 1 })?;
        }
        target.init()?;
        let s = target.lookup(1, b"s")?;
        target.nodes.push(("s", s));
        for name in ["f", "d", "x"] {
            let node = target.lookup(s, name.as_bytes())?;
            target.nodes.push((name, node));
        }
        // The rings as if nobody had used them; the device knows better.
        target.rings.renew(QUEUES)?;
        Ok(target)
    }

    fn share(&self, name: &str, directory: &Path, attributes: Attributes) -> Result<(), String> {
        let directory = File::open(directory).map_err(|error| error.to_string())?.into();
        let share = Share { directory, attributes };
        self.shares
            .with_tree(|tree| tree.add_share(name.as_bytes(), share))
            .map_err(|error| error.to_string())
    }

    fn init(&mut self) -> Result<(), String> {
        let body = [7_u32, 41, 1 << 17, u32::MAX].map(u32::to_le_bytes).concat();
        self.good(26, 0, &[body, vec![0; 48]].concat()).map(drop)
    }

    fn lookup(&mut self, directory: u64, name: &[u8]) -> Result<u64, String> {
        let entry = self.good(1, directory, &[name, b"\0"].concat())?;
        let node =
            entry.get(..8).map_or(0, |bytes| bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)));
        if node == 0 { Err(format!("`{}` is not found", name.escape_ascii())) } else { Ok(node) }
    }

    /// Asks what must be answered.
    fn good(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, String> {
        let mut request = Vec::new();
        let length = u32::try_from(IN_BYTES + body.len()).map_err(|error| error.to_string())?;
        request.extend(length.to_le_bytes());
        request.extend(opcode.to_le_bytes());
        self.unique += 1;
        request.extend(self.unique.to_le_bytes());
        request.extend(node.to_le_bytes());
        request.extend([0; 16]);
        request.extend(body);
        match self.send(&request, ROOM)? {
            Answer::Payload(payload) => Ok(payload),
            Answer::Error(errno) => Err(format!("request {opcode} gets {}", errno_name(errno))),
            Answer::None => Err(format!("request {opcode} gets no answer")),
        }
    }

    /// Sends a request as it is, in two descriptors of the current queue, and checks that what comes back is an
    /// answer and nothing else.
    fn send(&mut self, request: &[u8], room: usize) -> Result<Answer, String> {
        let (data, answer) = self.rings.places()?;
        let room_bytes = u32::try_from(room).map_err(|error| error.to_string())?;
        let length = u32::try_from(request.len()).map_err(|error| error.to_string())?;
        self.rings.write(data, request)?;
        self.rings.write(answer, &vec![POISON; room])?;
        self.rings.describe(0, (data, length), u16::from(room > 0), 1)?;
        self.rings.describe(1, (answer, room_bytes), 2, 0)?;
        self.rings.offer(0)?;
        self.kick()?;
        if let Some(why) = &self.rings.broken {
            return Err(format!("the queue is not served any more: {why}"));
        }
        let used = self.rings.used()?.ok_or("the request is not in the used ring")?;
        let written = usize::try_from(used.1).map_err(|error| error.to_string())?;
        if used.0 != 0 || written > room {
            return Err(format!("used head {} with {written} bytes in a room of {room}", used.0));
        }
        let bytes = self.rings.read(answer, room)?;
        let (bytes, rest) = bytes.split_at(written);
        if rest.iter().any(|byte| *byte != POISON) {
            return Err(format!("bytes were written behind the {written} of the answer"));
        }
        if bytes.is_empty() {
            return Ok(Answer::None);
        }
        let field = |at: usize, width: usize| bytes.get(at..at + width).unwrap_or_default();
        let unique = request.get(8..16).unwrap_or_default();
        let says = u32::try_from(written).map_err(|error| error.to_string())?.to_le_bytes();
        if written < OUT_BYTES || field(0, 4) != says || field(8, 8) != unique {
            return Err(format!("a malformed answer: {}", bytes[..written.min(64)].escape_ascii()));
        }
        let error = field(4, 4).try_into().map_or(0, i32::from_le_bytes);
        match (error, bytes.get(OUT_BYTES..).unwrap_or_default()) {
            (0, payload) => Ok(Answer::Payload(payload.to_vec())),
            (-4095..0, []) => Ok(Answer::Error(-error)),
            _ => Err(format!("an answer with the error {error} and {written} bytes")),
        }
    }

    fn kick(&mut self) -> Result<(), String> {
        let wake = Wake::Queue(self.rings.current);
        self.rings.process(&mut self.device, wake)
    }

    /// A request of the language: `NAME field=… body=… tail=… cut=… room=…`.
    fn request(&mut self, opcode: u32, layout: &str, step: &mut Step) -> Result<(), String> {
        self.unique += 1;
        let body = match step.bytes("body")? {
            Some(body) => body,
            None => layout::encode(layout, step)?,
        };
        let tail = step.bytes("tail")?.unwrap_or_default();
        let given = |step: &mut Step, key: &str, value: u64| step.number(key, i128::from(value));
        let mut header = Vec::new();
        for (field, default) in [("opcode", opcode.into()), ("unique", self.unique), ("nodeid", 1)] {
            let width = if field == "opcode" { 4 } else { 8 };
            header.extend(super::value::little_endian(given(step, field, default)?, width, field)?);
        }
        header.extend(layout::encode("uid:4 gid:4 pid:4 ext:2 padding:2", step)?);
        let length = 4 + header.len() + body.len() + tail.len();
        let length = given(step, "len", length as u64)?;
        let mut request = super::value::little_endian(length, 4, "len")?;
        request.extend([header, body, tail].concat());
        let cut = step.number("cut", request.len())?;
        request.truncate(cut);
        let room = step.number("room", ROOM)?;
        let answer = self.send(&request, room)?;
        self.expect(answer, step)
    }

    fn expect(&mut self, answer: Answer, step: &mut Step) -> Result<(), String> {
        let expected = step.expected_word().unwrap_or("ok").to_owned();
        let (found, payload) = match answer {
            Answer::None => ("none".to_owned(), Vec::new()),
            Answer::Error(errno) => (errno_name(errno), Vec::new()),
            Answer::Payload(payload) => ("ok".to_owned(), payload),
        };
        self.reply = payload;
        let node = self.reply.get(..8).map(|bytes| bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)));
        match (expected.as_str(), &*found) {
            ("any", _) => return Ok(()),
            ("found", "ok") if node.is_some_and(|node| node != 0) && self.reply.len() == 128 => {}
            ("absent", "ok") if node == Some(0) && self.reply.len() == 128 => {}
            _ if expected.split('|').any(|word| word == found) => {}
            _ => return Err(step.unlike(found)),
        }
        let words = step.expected_values();
        let texts: Vec<&str> = words.iter().map(|word| &*word.text).collect();
        match texts[..] {
            [] => {}
            ["as", name] => {
                let bound = (name.to_owned(), Value::from(node.unwrap_or(0)));
                step.bound.push(bound);
            }
            [_] => {
                let value = words[0].value.clone()?;
                if self.reply != value.bytes("answer")? {
                    return Err(step.unlike(Value::Bytes(self.reply.clone())));
                }
            }
            _ => return Err("too much is expected of one answer".to_owned()),
        }
        for (key, value) in step.expected_keys()? {
            let found = match key.as_str() {
                "size" => Value::from(self.reply.len()),
                "names" => self.names()?,
                _ => return Err(format!("an answer has no `{key}`")),
            };
            if found != value {
                return Err(step.unlike(format!("{key}={found}")));
            }
        }
        Ok(())
    }

    fn names(&self) -> Result<Value, String> {
        names(&self.reply).map(|names| Value::Bytes(names.join(&b' ')))
    }

    fn record(&self) -> Result<Record, String> {
        let mut assembler = Assembler::default();
        let mut record = None;
        self.shares.with_tree(|tree| {
            tree.settle();
            tree.export(|part| {
                record = assembler.push(part).map_err(|error| error.to_string())?;
                Ok::<(), String>(())
            })
        })?;
        record.ok_or_else(|| "the record has no end".to_owned())
    }
}

impl Target for FsTarget {
    fn act(&mut self, step: &mut Step) -> Result<(), String> {
        if self.rings.act(step)? {
            return Ok(());
        }
        match step.verb.as_str() {
            "kick" => {
                (0..step.number("times", 1_u64)?).try_for_each(|_| self.kick())?;
                self.rings.expect_kick(step)
            }
            "reset" => {
                Device::<()>::reset(&mut self.device);
                self.rings.renew(QUEUES)
            }
            "forget_driver" => {
                Device::<()>::reset(&mut self.device);
                Ok(())
            }
            "host" => change(&self.folder, step),
            "share" => {
                let directory = step.path_at(1)?;
                // An absolute path is a directory that every host has, such as `/dev`.
                let directory =
                    if directory.is_absolute() { directory } else { inside(&self.folder, &directory)? };
                let attributes = match step.word(2) {
                    "real" => Attributes::Real,
                    _ => Attributes::Fixed { mtime_seconds: 1 },
                };
                self.share(&String::from_utf8_lossy(&step.bytes_at(0)?), &directory, attributes)
            }
            "unshare" => {
                let name = step.bytes_at(0)?;
                let gone = self.shares.with_tree(|tree| tree.remove_share(&name));
                if gone { Ok(()) } else { Err("there is no such share".to_owned()) }
            }
            "REQUEST" => self.request(0, "", step),
            verb => match REQUESTS.iter().find(|(name, ..)| *name == verb) {
                Some((_, opcode, layout)) => self.request(*opcode, layout, step),
                None => Err(format!("`{verb}` is not known here")),
            },
        }
    }

    fn name(&self, name: &str) -> Option<Value> {
        let node = || self.nodes.iter().find(|(known, _)| *known == name).map(|(_, node)| Value::from(*node));
        match name {
            "top" => Some(Value::from(1_u64)),
            "reply" => Some(Value::Bytes(self.reply.clone())),
            _ => node().or_else(|| self.rings.name(name)),
        }
    }

    fn call(&mut self, function: &str, arguments: &[Value]) -> Result<Value, String> {
        match function {
            "names" => self.names(),
            "missed" | "changed" | "observed" => {
                let record = self.record()?;
                let of = |share: &ShareRecord| -> Vec<String> {
                    match function {
                        "missed" => share.missed.iter().map(|path| path.to_string()).collect(),
                        "observed" => share.entries.iter().map(|entry| entry.path.to_string()).collect(),
                        _ => {
                            let changed = share.changed.iter();
                            changed
                                .map(|entry| format!("{}:{:?}", entry.path, entry.what).to_lowercase())
                                .collect()
                        }
                    }
                };
                let all: Vec<String> = record.shares.iter().flat_map(of).collect();
                Ok(Value::Bytes(all.join(" ").into_bytes()))
            }
            "full" => self.record().map(|record| Value::from(u64::from(record.full))),
            _ => self.rings.call(function, arguments),
        }
    }

    fn serve(&mut self) -> Result<(), String> {
        Device::<()>::reset(&mut self.device);
        self.rings.renew(QUEUES)?;
        self.init()?;
        let t = self.lookup(1, b"t")?;
        let file = self.lookup(t, b"g")?;
        let mut body = [0_u64, 0].map(u64::to_le_bytes).concat();
        body.extend(100_u32.to_le_bytes());
        body.extend([0; 20]);
        match self.good(15, file, &body)?.as_slice() {
            b"good" => Ok(()),
            other => Err(format!("a good read gives `{}`", other.escape_ascii())),
        }
    }

    fn untouched(&self) -> Result<(), String> {
        let canary = self.folder.path("canary");
        let meta = fs::symlink_metadata(&canary).map_err(|error| format!("the canary: {error}"))?;
        let same = fs::read(&canary).is_ok_and(|content| content == CANARY);
        if !same || !meta.is_file() || meta.nlink() != 1 {
            return Err("the canary was touched".to_owned());
        }
        match fs::read(self.folder.path("t/g")) {
            Ok(content) if content == b"good" => Ok(()),
            _ => Err("a file of a read-only share was changed".to_owned()),
        }
    }
}
