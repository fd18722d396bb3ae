//! The vsock device: packets and descriptors of a hostile driver, buffers for it or none, and streams of the host that
//! speak, stop and close meanwhile.
//!
//! An input is [`steps`].

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use kiln_virtio::device::{Device, Wake};
use kiln_virtio::vsock::{Backend, Connector, Vsock};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::driver::{Seen, Target, campaign};
use crate::random::Random;
use crate::steps;
use crate::testkit::{Ring, WRITE, memory};

const CID: u64 = 77;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Most connections at a time in this device.
const MOST_CONNECTIONS: usize = 8;
/// Most steps of one input that are done.
const MOST_STEPS: usize = 96;
/// Length of a packet's header.
const HEADER_BYTES: usize = 44;
/// Room in one receive buffer.
const MOST_ROOM: u32 = 4096;

/// The host's ends of the streams, as the device's backend makes them.
#[derive(Clone, Default)]
struct Streams(Arc<Mutex<Vec<UnixStream>>>);

impl Streams {
    fn add(&self) -> UnixStream {
        let (device, host) = UnixStream::pair().expect("a pair");
        host.set_nonblocking(true).expect("a socket");
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(host);
        device
    }

    fn with(&self, index: u8, act: impl FnOnce(&mut Vec<UnixStream>, usize)) {
        let mut streams = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !streams.is_empty() {
            let index = usize::from(index) % streams.len();
            act(&mut streams, index);
        }
    }
}

impl Backend for Streams {
    fn connect_from_guest(&mut self, port: u32) -> Option<UnixStream> {
        (port < 4).then(|| self.add())
    }
}

/// What the guest has said of its buffer for one connection, and what it was sent of it.
#[derive(Default)]
struct Credit {
    buffer: u32,
    taken: u32,
    sent: u32,
}

struct Guest<'a> {
    memory: &'a GuestMemoryMmap,
    receive: Ring,
    transmit: Ring,
    device: Vsock,
    connector: Connector,
    streams: Streams,
    posted: u16,
    /// By the host's and the guest's port.
    credits: BTreeMap<(u32, u32), Credit>,
    /// The driver sent descriptors as they came, so that nobody knows what it said.
    blind: bool,
    /// The operation of the packet that came last.
    last: u16,
}

fn field(header: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(header[at..at + 4].try_into().expect("four"))
}

fn half(header: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(header[at..at + 2].try_into().expect("two"))
}

impl Guest<'_> {
    /// Lets the device work; false where the driver has broken a queue.
    fn process(&mut self, wake: Wake) -> bool {
        let mut queues = [Some(&mut self.receive.queue), Some(&mut self.transmit.queue), None];
        for round in 0.. {
            assert!(round < 1000, "the device has no end of things to do");
            match Device::<()>::process(&mut self.device, wake, &mut queues, self.memory) {
                Ok(outcome) if outcome.again => {}
                Ok(_) => return true,
                Err(_) => return false,
            }
        }
        false
    }

    fn post(&mut self, count: u8, room: u32) -> bool {
        for _ in 0..count {
            let index = self.posted % 64;
            let at = self.receive.data() + u64::from(index) * u64::from(MOST_ROOM);
            self.receive.describe(self.memory, index, (at, room), WRITE, 0);
            self.receive.offer(self.memory, index);
            self.posted = self.posted.wrapping_add(1);
        }
        self.process(Wake::Queue(RECEIVE))
    }

    /// Sends a packet as it is.
    fn send(&mut self, bytes: &[u8]) -> bool {
        if let Some(header) = bytes.first_chunk::<HEADER_BYTES>()
            && header[..16] == [CID.to_le_bytes(), 2_u64.to_le_bytes()].concat()
        {
            let ports = (field(header, 20), field(header, 16));
            let op = half(header, 30);
            // A connection starts with nothing sent, and ends with a refusal.
            if matches!(op, 1 | 3) {
                self.credits.remove(&ports);
            }
            let credit = self.credits.entry(ports).or_default();
            credit.buffer = field(header, 36);
            credit.taken = if matches!(op, 1 | 2) { 0 } else { field(header, 40) };
        }
        self.transmit.send(self.memory, bytes, 0);
        if !self.process(Wake::Queue(TRANSMIT)) {
            return false;
        }
        // While refusals are in the way nothing is taken.
        while let Some((head, written)) = self.transmit.used(self.memory) {
            assert!(self.blind || (head, written) == (0, 0));
        }
        true
    }

    /// Checks every packet that the device has sent.
    fn take_all(&mut self, seen: &mut Seen) {
        while let Some((head, written)) = self.receive.used(self.memory) {
            assert!(head < 64 && written <= MOST_ROOM);
            if written == 0 {
                seen.note(1);
                continue;
            }
            let mut bytes = vec![0; written as usize];
            let at = self.receive.data() + u64::from(head) * u64::from(MOST_ROOM);
            self.memory.read_slice(&mut bytes, GuestAddress(at)).expect("memory");
            let (header, data) = bytes.split_first_chunk::<HEADER_BYTES>().expect("a header");
            let cids =
                [&header[..8], &header[8..16]].map(|cid| u64::from_le_bytes(cid.try_into().expect("eight")));
            assert_eq!(cids, [2, CID]);
            assert_eq!(field(header, 24) as usize, data.len(), "the header says how long the packet is");
            let (kind, op) = (half(header, 28), half(header, 30));
            assert!((1..=7).contains(&op), "operation {op}");
            assert!(op == 5 || data.is_empty(), "only data carries data");
            assert!(op == 3 || kind == 1, "only a refusal is of another kind");
            let ports = (field(header, 16), field(header, 20));
            if op == 3 {
                self.credits.remove(&ports);
            } else if op == 5 {
                assert!(!data.is_empty());
                if let Some(credit) = self.credits.get_mut(&ports) {
                    credit.sent = credit.sent.wrapping_add(field(header, 24));
                    let under_way = credit.sent.wrapping_sub(credit.taken);
                    assert!(
                        self.blind || under_way <= credit.buffer,
                        "{under_way} bytes over {}",
                        credit.buffer
                    );
                }
            }
            seen.note(u64::from(self.last) << 16 | u64::from(op) << 8 | u64::from(field(header, 32) & 3));
            self.last = op;
        }
    }

    fn step(&mut self, action: u8, argument: u8, bytes: &[u8]) -> bool {
        match action % 16 {
            0..=7 => return self.send(bytes),
            8 => return self.post(argument % 16, u32::from(argument) * 32 % MOST_ROOM),
            9 => return self.process(Wake::Events),
            10 => self.streams.with(argument, |streams, index| {
                // A full socket takes less.
                let _ = streams[index].write(bytes);
            }),
            11 => self.streams.with(argument, |streams, index| drop(streams.swap_remove(index))),
            12 => self.streams.with(argument, |streams, index| {
                let how = [Shutdown::Read, Shutdown::Write, Shutdown::Both][usize::from(argument) % 3];
                let _ = streams[index].shutdown(how);
            }),
            13 => self.streams.with(argument, |streams, index| {
                let mut buffer = [0; 8192];
                let _ = streams[index].read(&mut buffer);
            }),
            14 => {
                let stream = self.streams.add();
                self.connector.connect_to_guest(argument.into(), stream, |_| ());
            }
            _ if argument < 16 => {
                Device::<()>::reset(&mut self.device);
                self.credits.clear();
            }
            // Descriptors as they come.
            _ => {
                let table = &bytes[..bytes.len().min(1024)];
                self.memory.write_slice(table, GuestAddress(self.transmit.addresses()[0])).expect("memory");
                self.transmit.offer(self.memory, 0);
                self.blind = true;
                return self.process(Wake::Queue(TRANSMIT));
            }
        }
        true
    }
}

struct Muxer {
    memory: GuestMemoryMmap,
}

impl Target for Muxer {
    const NAME: &'static str = "vsock";

    fn new() -> Self {
        Self { memory: memory() }
    }

    fn generate(&mut self, random: &mut Random, input: &mut Vec<u8>) {
        let mut push = |action: u8, argument: u8, bytes: &[u8]| steps::push(input, action, argument, bytes);
        for _ in 0..=random.below(16) {
            let action = random.byte() % 16;
            let argument = random.byte();
            match action {
                0..=7 => push(action, argument, &packet(random)),
                10 => {
                    let length = random.pick(&[1, 10, 1000]);
                    push(action, argument, &vec![argument; length]);
                }
                15 if argument >= 16 && !random.once_in(8) => push(9, 0, b""),
                15 => {
                    let length = random.below(64);
                    push(action, argument, &random.bytes(length));
                }
                _ => push(action, argument, b""),
            }
        }
    }

    fn parts(input: &[u8]) -> Vec<usize> {
        steps::ends(input)
    }

    fn run(&mut self, input: &[u8], seen: &mut Seen) {
        let streams = Streams::default();
        let device = Vsock::new(CID, MOST_CONNECTIONS, Box::new(streams.clone()));
        let (device, connector) = device.expect("descriptors");
        let (receive, transmit) = (Ring::new(0, 64), Ring::new(1, 64));
        for address in [receive.addresses(), transmit.addresses()].iter().flat_map(|ring| &ring[1..]) {
            self.memory.write_slice(&[0; 4], GuestAddress(*address)).expect("memory");
        }
        let credits = BTreeMap::new();
        let mut guest = Guest {
            memory: &self.memory,
            receive,
            transmit,
            device,
            connector,
            streams,
            posted: 0,
            credits,
            blind: false,
            last: 0,
        };
        let (mut rest, mut sound) = (input, true);
        for _ in 0..MOST_STEPS {
            let Some(((action, argument, bytes), behind)) = steps::next(rest) else { break };
            rest = behind;
            // A table as it comes lets the device read anywhere; writing is for receive buffers only.
            sound = guest.step(action, argument, bytes);
            guest.take_all(seen);
            if !sound {
                seen.note(2);
                break;
            }
        }
        // With buffers for everything, all of it comes to an end.
        for _ in 0..8 {
            if sound && guest.posted < 32 {
                sound = guest.post(8, MOST_ROOM) && guest.process(Wake::Events);
                guest.take_all(seen);
            }
        }
    }

    fn memory_limit(_: usize) -> usize {
        // A buffer for each connection, twice while it grows.
        2 * MOST_CONNECTIONS * (64 << 10) + (256 << 10)
    }
}

/// A packet of a driver that knows what it does, mostly.
fn packet(random: &mut Random) -> Vec<u8> {
    let data_length = random.pick(&[0, 0, 1, 1, 1, 100, 100, 3000]);
    let op = random.pick(&[1_u16, 1, 2, 3, 4, 5, 5, 5, 6, 7, 0, 8]);
    let length = if op == 5 { data_length } else { 0 };
    let host_port = random.pick(&[0_u32, 1, 2, 3, 5, 1 << 30, (1 << 30) + 1]);
    let claimed = if random.once_in(16) { random.edge32() } else { u32::try_from(length).expect("short") };
    let mut bytes = random.pick(&[CID, CID, CID, CID, CID, CID, 2, 0]).to_le_bytes().to_vec();
    bytes.extend(random.pick(&[2_u64, 2, 2, 2, 2, 2, CID, u64::MAX]).to_le_bytes());
    bytes.extend(u32::from(random.byte() % 8).to_le_bytes());
    bytes.extend(host_port.to_le_bytes());
    bytes.extend(claimed.to_le_bytes());
    bytes.extend(random.pick(&[1_u16, 1, 1, 1, 1, 1, 1, 2]).to_le_bytes());
    bytes.extend(op.to_le_bytes());
    bytes.extend(random.pick(&[0_u32, 1, 2, 3, u32::MAX]).to_le_bytes());
    bytes.extend(random.pick(&[0_u32, 1, 100, 65_536, u32::MAX]).to_le_bytes());
    bytes.extend(random.pick(&[0_u32, 0, 1, 1000, u32::MAX]).to_le_bytes());
    bytes.extend(vec![0xda; length]);
    bytes
}

#[test]
fn no_driver_breaks_the_vsock_device() {
    campaign::<Muxer>();
}
