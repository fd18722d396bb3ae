//! The block device as a target: requests by name, and the file behind it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kiln_virtio::device::{Device, Wake};
use kiln_vmm::disk::Disk;

use super::rings::{Driver, POISON, Rings};
use super::script::{Step, Target};
use super::value::Value;

const QUEUES: usize = 1;
const SECTOR_BYTES: usize = 512;
/// Sectors of the file at first, each full of its number.
const SECTORS: u8 = 64;
const HEADER_BYTES: u32 = 16;
/// Ends of requests, and what the place of one has before.
const ENDS: [&str; 3] = ["OK", "IOERR", "UNSUPP"];
const NO_END: u8 = POISON;

/// Types of requests.
pub const REQUESTS: [(&str, u32); 6] =
    [("IN", 0), ("OUT", 1), ("FLUSH", 4), ("GET_ID", 8), ("DISCARD", 11), ("WRITE_ZEROES", 13)];

/// A disk and its driver.
pub struct DiskTarget {
    device: Disk,
    file: Option<File>,
    rings: Rings,
    /// How often the host failed.
    failures: Arc<AtomicU64>,
    /// The data of the last answer.
    reply: Vec<u8>,
}

fn say(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// A file of [`SECTORS`] sectors.
pub fn file() -> Result<File, String> {
    let file = tempfile::tempfile().map_err(say)?;
    let bytes: Vec<u8> = (0..SECTORS).flat_map(|number| [number; SECTOR_BYTES]).collect();
    file.write_all_at(&bytes, 0).map_err(say)?;
    Ok(file)
}

/// The bytes of a request's header.
fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

impl DiskTarget {
    /// A disk that is written to.
    pub fn new(driver: Driver) -> Result<Self, String> {
        let file = file()?;
        let failures = Arc::default();
        let device = disk(Some(&file), false, None, &failures)?;
        Ok(Self { device, file: Some(file), rings: Rings::new(QUEUES, driver)?, failures, reply: Vec::new() })
    }

    /// `disk [read_only=1] [capacity=BYTES] [file=0]`: another device with the same file, or none.
    fn replace(&mut self, step: &mut Step) -> Result<(), String> {
        let read_only = step.number("read_only", 0_u8)? != 0;
        let capacity = step.key("capacity").map(|value| value.to("capacity")).transpose()?;
        let file = self.file.as_ref().filter(|_| !matches!(step.number("file", 1_u8), Ok(0)));
        self.device = disk(file, read_only, capacity, &self.failures)?;
        self.rings.renew(QUEUES)
    }

    fn process(&mut self) -> Result<(), String> {
        self.rings.process(&mut self.device, Wake::Queue(0))
    }

    /// Asks as a good driver would, and gives the byte that says how it ended and the number of bytes used.
    fn ask(&mut self, header: &[u8], data: &[u8], room: u32) -> Result<(u8, Option<u32>), String> {
        let (at, answer) = self.rings.places()?;
        self.rings.write(at, &[header, data].concat())?;
        self.rings.write(answer, &vec![POISON; room as usize + 64])?;
        let pieces = [
            ((at, HEADER_BYTES), 0),
            ((at + u64::from(HEADER_BYTES), u32::try_from(data.len()).map_err(say)?), 0),
            ((answer, room), 2),
            ((answer + u64::from(room), 1), 2),
        ];
        let pieces: Vec<_> =
            pieces.into_iter().filter(|((_, length), _): &((u64, u32), u16)| *length > 0).collect();
        for (index, (piece, flags)) in (0_u16..).zip(&pieces) {
            let more = usize::from(index) + 1 < pieces.len();
            self.rings.describe(index.into(), *piece, flags | u16::from(more), index + 1)?;
        }
        self.rings.offer(0)?;
        self.process()?;
        let used = self.rings.used()?.map(|(_, length)| length);
        let bytes = self.rings.read(answer, room as usize + 64)?;
        let (reply, rest) = bytes.split_at(room as usize);
        let (end, behind) = rest.split_at(1);
        if behind.iter().any(|byte| *byte != POISON) {
            return Err("it has written behind its room".to_owned());
        }
        self.reply = reply.to_vec();
        Ok((end[0], used))
    }

    /// `REQUEST [type=] [sector=] [data=] [room=] [-> OK|IOERR|UNSUPP|none [BYTES]]`.
    fn request(&mut self, kind: u32, step: &mut Step) -> Result<(), String> {
        let kind = step.number("type", kind)?;
        let sector = step.number("sector", 0)?;
        let data = step.bytes("data")?.unwrap_or_default();
        let room = step.number("room", 0)?;
        let (end, used) = self.ask(&header(kind, sector), &data, room)?;
        let found = match (end, used) {
            (NO_END, None) => "none",
            (end, Some(_)) => ENDS.get(usize::from(end)).copied().unwrap_or("another end"),
            (_, None) => "an end that was not given back",
        };
        let expected = step.expected_word().unwrap_or("OK");
        if expected != found && expected != "any" {
            return Err(step.unlike(found));
        }
        // What failed has filled nothing.
        if found != "OK" && self.reply.iter().any(|byte| *byte != POISON) {
            return Err("a request that failed has an answer".to_owned());
        }
        match step.expected_values().first() {
            Some(word) if word.value.clone()? != Value::Bytes(self.reply.clone()) => {
                Err(step.unlike(Value::Bytes(self.reply.clone())))
            }
            _ => Ok(()),
        }
    }
}

fn disk(
    file: Option<&File>,
    read_only: bool,
    capacity: Option<u64>,
    failures: &Arc<AtomicU64>,
) -> Result<Disk, String> {
    let file = file.map(File::try_clone).transpose().map_err(say)?;
    let length = file.as_ref().map_or(Ok(0), |file| file.metadata().map(|data| data.len())).map_err(say)?;
    let failures = Arc::clone(failures);
    let failed = move |_: &std::io::Error| {
        failures.fetch_add(1, Ordering::Relaxed);
    };
    Disk::slot(file, "hostile", read_only, capacity.unwrap_or(length), failed).map_err(say)
}

impl Target for DiskTarget {
    fn act(&mut self, step: &mut Step) -> Result<(), String> {
        if self.rings.act(step)? {
            return Ok(());
        }
        match step.verb.as_str() {
            "kick" => {
                for _ in 0..step.number("times", 1_u64)? {
                    self.process()?;
                }
                self.rings.expect_kick(step)
            }
            "disk" => self.replace(step),
            "host" => {
                let file = self.file.as_ref().ok_or("there is no file")?;
                match step.word(0) {
                    "size" => file.set_len(step.number_at(1)?).map_err(say),
                    other => Err(format!("the host does not `{other}`")),
                }
            }
            "reset" => {
                Device::<()>::reset(&mut self.device);
                self.rings.renew(QUEUES)
            }
            "forget_driver" => {
                Device::<()>::reset(&mut self.device);
                Ok(())
            }
            verb => match REQUESTS.iter().find(|(name, _)| *name == verb) {
                Some((_, kind)) => self.request(*kind, step),
                None => Err(format!("`{verb}` is not known here")),
            },
        }
    }

    fn name(&self, name: &str) -> Option<Value> {
        match name {
            "reply" => Some(Value::Bytes(self.reply.clone())),
            _ => self.rings.name(name),
        }
    }

    fn call(&mut self, function: &str, arguments: &[Value]) -> Result<Value, String> {
        match (function, arguments) {
            ("file", [at, length]) => {
                let mut bytes = vec![0; length.to("file")?];
                let file = self.file.as_ref().ok_or("there is no file")?;
                file.read_exact_at(&mut bytes, at.to("file")?).map_err(say)?;
                Ok(Value::Bytes(bytes))
            }
            ("failures", []) => Ok(Value::from(self.failures.load(Ordering::Relaxed))),
            ("capacity", []) => {
                let sectors = Device::<()>::config(&self.device).first_chunk().copied();
                Ok(Value::from(u64::from_le_bytes(sectors.ok_or("there is no configuration")?)))
            }
            _ => self.rings.call(function, arguments),
        }
    }

    fn serve(&mut self) -> Result<(), String> {
        // A host that failed ends the machine: then a new one is asked.
        if self.failures.load(Ordering::Relaxed) > 0 || self.file.is_none() {
            self.file = Some(file()?);
            self.device = disk(self.file.as_ref(), false, None, &Arc::default())?;
        }
        Device::<()>::reset(&mut self.device);
        self.rings.renew(QUEUES)?;
        let answered = self.ask(&header(8, 0), &[], 20)?;
        match (answered, self.reply.starts_with(b"hostile\0")) {
            ((0, Some(21)), true) => Ok(()),
            other => Err(format!("a good request gets {other:?}")),
        }
    }
}
