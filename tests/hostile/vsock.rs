//! The vsock device as a target: packets by name, and what is at the host's ends of streams.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};

use kiln_virtio::device::{Device, Wake};
use kiln_virtio::vsock::{Backend, Connector, Vsock};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::layout;
use super::rings::{Driver, Rings};
use super::script::{Step, Target};
use super::value::Value;

/// Receive, transmit, events.
const QUEUES: usize = 3;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// The guest's context id, as the default of `src_cid` has it.
const CID: u64 = 77;
/// The only port at which the host accepts.
const OPEN_PORT: u32 = 5000;
/// Bytes of a receive buffer.
const ROOM: u32 = 4096;
/// How many of them have a place of their own.
const BUFFERS: u64 = 128;

/// struct virtio_vsock_hdr behind which data may follow; `length` is that of the data unless given.
const PACKET: &str = "src_cid:8=77 dst_cid:8=2 src_port:4=1000 dst_port:4=5000 length:4 kind:2=1 op:2 flags:4 \
                      buf_alloc:4=65536 fwd_cnt:4";
const HEADER_BYTES: usize = 44;
const OPS: [&str; 8] =
    ["INVALID", "REQUEST", "RESPONSE", "RST", "SHUTDOWN", "RW", "CREDIT_UPDATE", "CREDIT_REQUEST"];

/// Accepts at one port, and hands out the host's ends.
struct OnePort(Sender<UnixStream>);

impl Backend for OnePort {
    fn connect_from_guest(&mut self, port: u32) -> Option<UnixStream> {
        let (ours, theirs) = UnixStream::pair().ok()?;
        theirs.set_nonblocking(true).ok()?;
        (port == OPEN_PORT).then(|| self.0.send(theirs).ok())??;
        Some(ours)
    }
}

/// A device and its driver.
pub struct VsockTarget {
    device: Vsock,
    connector: Connector,
    accepted: Receiver<UnixStream>,
    rings: Rings,
    /// How many receive buffers were posted.
    posted: u64,
    /// The host's ends, by the guest's port.
    streams: BTreeMap<u32, UnixStream>,
    answers: BTreeMap<u32, Receiver<bool>>,
    /// The last packet from the device.
    last: Vec<u8>,
}

impl VsockTarget {
    /// A device without connections. `most_connections` as its process would have it.
    pub fn new(driver: Driver) -> Result<Self, String> {
        let (sender, accepted) = channel();
        let made = Vsock::new(CID, usize::MAX, Box::new(OnePort(sender)));
        let (device, connector) = made.map_err(|error| error.to_string())?;
        Ok(Self {
            device,
            connector,
            accepted,
            rings: Rings::new(QUEUES, driver)?,
            posted: 0,
            streams: BTreeMap::new(),
            answers: BTreeMap::new(),
            last: Vec::new(),
        })
    }

    fn process(&mut self, wake: Wake) -> Result<(), String> {
        self.rings.process(&mut self.device, wake)?;
        match &self.rings.broken {
            None => Ok(()),
            Some(why) => Err(format!("the queue is not served any more: {why}")),
        }
    }

    /// Sends bytes as a packet.
    fn send(&mut self, packet: &[u8]) -> Result<(), String> {
        let current = std::mem::replace(&mut self.rings.current, TRANSMIT);
        let (data, _) = self.rings.places()?;
        self.rings.write(data, packet)?;
        let length = u32::try_from(packet.len()).map_err(|error| error.to_string())?;
        self.rings.describe(0, (data, length), 0, 0)?;
        self.rings.offer(0)?;
        self.process(Wake::Queue(TRANSMIT))?;
        let used = self.rings.used()?;
        self.rings.current = current;
        match used {
            Some((0, 0)) => Ok(()),
            None => Err("the packet is not taken".to_owned()),
            Some((head, length)) => Err(format!("used head {head} with {length} bytes")),
        }
    }

    /// Posts receive buffers of `length` bytes, and lets the device use them.
    fn post(&mut self, count: u64, length: u32) -> Result<(), String> {
        let current = std::mem::replace(&mut self.rings.current, RECEIVE);
        for _ in 0..count {
            let index = self.posted % BUFFERS;
            let at = self.rings.places()?.0 + index * u64::from(ROOM);
            self.rings.describe(index, (at, length), 2, 0)?;
            self.rings.offer(u16::try_from(index).map_err(|error| error.to_string())?)?;
            self.posted += 1;
        }
        self.rings.current = current;
        self.process(Wake::Queue(RECEIVE))
    }

    /// The next packet that the device has put into a receive buffer, checked for what all of them have.
    fn received(&mut self) -> Result<bool, String> {
        let current = std::mem::replace(&mut self.rings.current, RECEIVE);
        let used = self.rings.used()?;
        let data = self.rings.places()?.0;
        self.rings.current = current;
        let Some((head, length)) = used else { return Ok(false) };
        let length = usize::try_from(length).map_err(|error| error.to_string())?;
        self.last = self.rings.read(data + u64::from(head) * u64::from(ROOM), length.min(ROOM as usize))?;
        let field = |name| layout::number(PACKET, &self.last, name);
        let data = length.checked_sub(HEADER_BYTES).map(|data| data as i128);
        let sound = (field("src_cid"), field("dst_cid")) == (Some(2), Some(CID.into()))
            && field("length") == data
            && field("kind") == Some(1);
        // Refusals are sent with the kind of socket that was asked for.
        let sound = sound || (field("op") == Some(3) && data == Some(0));
        if sound { Ok(true) } else { Err(format!("a malformed packet: {}", self.last.escape_ascii())) }
    }

    /// Lets the device look at its streams, gives it a buffer, and takes the packet it sends, if any.
    fn take(&mut self) -> Result<bool, String> {
        self.process(Wake::Events)?;
        if self.received()? {
            return Ok(true);
        }
        let current = std::mem::replace(&mut self.rings.current, RECEIVE);
        let waiting = self.rings.untaken()?;
        self.rings.current = current;
        // Where nothing was to be sent, the buffer is still there from the last time.
        if waiting == 0 {
            self.post(1, ROOM)?;
        }
        self.received()
    }

    fn op(&self) -> String {
        let op = layout::number(PACKET, &self.last, "op").unwrap_or(0);
        let known = usize::try_from(op).ok().and_then(|op| OPS.get(op));
        known.map_or_else(|| format!("operation {op}"), |name| (*name).to_owned())
    }

    fn payload(&self) -> &[u8] {
        self.last.get(HEADER_BYTES..).unwrap_or_default()
    }

    /// Takes a packet and compares it with what is expected: `-> OP field=… data=…`, or `-> silent`.
    fn expect_packet(&mut self, step: &mut Step) -> Result<(), String> {
        let expected = step.expected_word().unwrap_or_default().to_owned();
        if !self.take()? {
            let holds = matches!(expected.as_str(), "silent" | "any");
            return if holds { Ok(()) } else { Err(step.unlike("silence")) };
        }
        if expected == "any" {
            return Ok(());
        }
        if expected != self.op() {
            return Err(step.unlike(format!("{} {}", self.op(), Value::Bytes(self.last.clone()))));
        }
        for (key, value) in step.expected_keys()? {
            let found = if key == "data" {
                Some(Value::Bytes(self.payload().to_vec()))
            } else {
                layout::number(PACKET, &self.last, &key).map(Value::Number)
            };
            if found.as_ref() != Some(&value) {
                return Err(step.unlike(format!("{key}={}", found.map_or("none".into(), |v| v.to_string()))));
            }
        }
        Ok(())
    }

    /// A packet of the language: `OP field=… data=… cut=… [-> answer]`.
    fn packet(&mut self, op: usize, step: &mut Step) -> Result<(), String> {
        let data = step.bytes("data")?.unwrap_or_default();
        let length = step.number("length", i128::try_from(data.len()).unwrap_or(0))?;
        let op = step.number("op", op as i128)?;
        // The fields around these two, which have other defaults than the layout's.
        let mut packet = layout::encode("src_cid:8=77 dst_cid:8=2 src_port:4=1000 dst_port:4=5000", step)?;
        packet.extend(super::value::little_endian(length, 4, "length")?);
        packet.extend(layout::encode("kind:2=1", step)?);
        packet.extend(super::value::little_endian(op, 2, "op")?);
        packet.extend(layout::encode("flags:4 buf_alloc:4=65536 fwd_cnt:4", step)?);
        packet.extend(data);
        let cut = step.number("cut", packet.len())?;
        packet.truncate(cut);
        self.send(&packet)?;
        self.collect();
        if step.expected_word().is_some() { self.expect_packet(step) } else { Ok(()) }
    }

    /// Keeps streams that were accepted until somebody asks for them by port.
    fn collect(&mut self) {
        while let Ok(stream) = self.accepted.try_recv() {
            let port =
                self.streams.keys().rev().find(|port| **port >= UNCLAIMED).map_or(UNCLAIMED, |port| port + 1);
            self.streams.insert(port, stream);
        }
    }

    /// A connection from the guest's `port`, whose host end goes by that port from now on.
    fn connect(&mut self, port: u32) -> Result<(), String> {
        let mut packet = [CID, 2].map(u64::to_le_bytes).concat();
        packet.extend([port, OPEN_PORT, 0].map(u32::to_le_bytes).concat());
        packet.extend([1_u16, 1].map(u16::to_le_bytes).concat());
        packet.extend([0_u32, 65_536, 0].map(u32::to_le_bytes).concat());
        self.send(&packet)?;
        if !self.take()? || self.op() != "RESPONSE" {
            return Err(format!("a connection gets {} {}", self.op(), Value::Bytes(self.last.clone())));
        }
        let stream = self.accepted.try_recv().map_err(|_| "nothing was accepted".to_owned())?;
        self.streams.insert(port, stream);
        Ok(())
    }

    /// What the host's end of a stream does: `host VERB PORT …`.
    fn host(&mut self, step: &mut Step) -> Result<(), String> {
        let (verb, port) = (step.word(0).to_owned(), step.number_at::<u32>(1)?);
        if verb == "connect" {
            let (ours, theirs) = UnixStream::pair().map_err(|error| error.to_string())?;
            ours.set_nonblocking(true).map_err(|error| error.to_string())?;
            let (sender, answer) = channel();
            self.connector
                .connect_to_guest(port, theirs, move |accepted| sender.send(accepted).unwrap_or_default());
            self.streams.insert(port, ours);
            self.answers.insert(port, answer);
            return Ok(());
        }
        if verb == "answer" {
            let found = match self.answers.get(&port).map(Receiver::try_recv) {
                Some(Ok(true)) => "accepted",
                Some(Ok(false)) => "refused",
                Some(Err(TryRecvError::Empty)) => "waiting",
                _ => "nothing",
            };
            return if step.expected_word() == Some(found) { Ok(()) } else { Err(step.unlike(found)) };
        }
        if verb == "close" {
            let stream = self.streams.remove(&port);
            return stream.map(drop).ok_or_else(|| "there is no such stream".to_owned());
        }
        let stream = self.streams.get_mut(&port).ok_or("there is no such stream")?;
        let found = match verb.as_str() {
            "shut" => {
                stream.shutdown(Shutdown::Write).map_or_else(|_| "broken".to_owned(), |()| "ok".to_owned())
            }
            "write" => match stream.write(&step.bytes_at(2)?) {
                Ok(_) => "ok".to_owned(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => "full".to_owned(),
                Err(_) => "broken".to_owned(),
            },
            "read" => {
                let (bytes, end) = read_all(stream)?;
                let expected = step.expected().first().and_then(|(_, word)| word.value.as_ref().ok());
                if expected == Some(&Value::Bytes(bytes.clone())) {
                    return Ok(());
                }
                match (bytes.is_empty(), end) {
                    (true, true) => "end".to_owned(),
                    (true, false) => "nothing".to_owned(),
                    _ => Value::Bytes(bytes).to_string(),
                }
            }
            _ => return Err(format!("the host does not `{verb}`")),
        };
        let expected = step.expected_word().unwrap_or("ok");
        if expected == "any" || expected == found { Ok(()) } else { Err(step.unlike(found)) }
    }

    fn readable(&self) -> Result<bool, String> {
        let events = Device::<()>::events(&self.device).ok_or("the device has no events")?;
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let ready = poll(&mut [PollFd::new(&events, PollFlags::IN)], Some(&now));
        ready.map(|count| count > 0).map_err(|error| error.to_string())
    }

    fn renew(&mut self) -> Result<(), String> {
        Device::<()>::reset(&mut self.device);
        self.posted = 0;
        self.rings.renew(QUEUES)
    }
}

/// Where the numbers of streams begin that no `connect` has given a port.
const UNCLAIMED: u32 = 1 << 31;

/// All that is there now, and whether the stream has ended.
fn read_all(stream: &mut UnixStream) -> Result<(Vec<u8>, bool), String> {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => Ok((bytes, true)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok((bytes, false)),
        // The device has dropped what it could not pass on.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok((bytes, true)),
        Err(error) => Err(error.to_string()),
    }
}

impl Target for VsockTarget {
    fn act(&mut self, step: &mut Step) -> Result<(), String> {
        if self.rings.act(step)? {
            return Ok(());
        }
        match step.verb.as_str() {
            "kick" => {
                let wake = Wake::Queue(self.rings.current);
                let times = step.number("times", 1_u64)?;
                (0..times).try_for_each(|_| self.rings.process(&mut self.device, wake))?;
                self.rings.expect_kick(step)
            }
            "look" => self.process(Wake::Events),
            "take" => self.expect_packet(step),
            "packet" => {
                self.send(&step.bytes_at(0)?)?;
                if step.expected_word().is_some() { self.expect_packet(step) } else { Ok(()) }
            }
            "post" => {
                let length = step.number("len", ROOM)?;
                self.post(step.number_at(0)?, length)
            }
            // As many as are missing.
            "refill" => {
                let current = std::mem::replace(&mut self.rings.current, RECEIVE);
                let waiting = self.rings.untaken();
                self.rings.current = current;
                self.post(step.number_at::<u64>(0)?.saturating_sub(waiting?), ROOM)
            }
            // Takes what was sent into buffers that were posted.
            "drain" => {
                let mut data = Vec::new();
                while self.received()? {
                    data.extend_from_slice(self.payload());
                }
                step.bound.push((step.word(0).to_owned(), Value::Bytes(data)));
                Ok(())
            }
            "connect" => self.connect(step.number_at(0)?),
            "host" => self.host(step),
            "reset" => self.renew(),
            "forget_driver" => {
                Device::<()>::reset(&mut self.device);
                Ok(())
            }
            verb => match OPS.iter().position(|name| *name == verb) {
                Some(op) => self.packet(op, step),
                None => Err(format!("`{verb}` is not known here")),
            },
        }
    }

    fn name(&self, name: &str) -> Option<Value> {
        match name {
            "RECEIVE" => Some(Value::from(1_u64)),
            "SEND" => Some(Value::from(2_u64)),
            "BOTH" => Some(Value::from(3_u64)),
            "last.data" => Some(Value::Bytes(self.payload().to_vec())),
            _ => match name.strip_prefix("last.") {
                Some(field) => layout::number(PACKET, &self.last, field).map(Value::Number),
                None => self.rings.name(name),
            },
        }
    }

    fn call(&mut self, function: &str, arguments: &[Value]) -> Result<Value, String> {
        match function {
            "readable" => self.readable().map(|ready| Value::from(u64::from(ready))),
            "accepted" => {
                self.collect();
                Ok(Value::from(self.streams.range(UNCLAIMED..).count()))
            }
            _ => self.rings.call(function, arguments),
        }
    }

    fn serve(&mut self) -> Result<(), String> {
        self.renew()?;
        self.streams.clear();
        self.collect();
        self.connect(1)?;
        let stream = self.streams.get_mut(&1).ok_or("no stream")?;
        stream.write_all(b"to the guest").map_err(|error| error.to_string())?;
        if !self.take()? || self.payload() != b"to the guest" {
            return Err(format!("a good stream gives `{}`", self.last.escape_ascii()));
        }
        let mut packet = [CID, 2].map(u64::to_le_bytes).concat();
        packet.extend([1, OPEN_PORT, 11].map(u32::to_le_bytes).concat());
        packet.extend([1_u16, 5].map(u16::to_le_bytes).concat());
        packet.extend([0_u32, 65_536, 12].map(u32::to_le_bytes).concat());
        packet.extend(b"to the host");
        self.send(&packet)?;
        let stream = self.streams.get_mut(&1).ok_or("no stream")?;
        match read_all(stream)?.0.as_slice() {
            b"to the host" => Ok(()),
            other => Err(format!("a good stream takes `{}`", other.escape_ascii())),
        }
    }
}
