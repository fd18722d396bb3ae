//! The device against a model of it. A guest and a host do to connections what they may and what they may not; the model says
//! which packets each of them may see next, and what must have come of it all once nothing more happens. Both keep counts and
//! never contents: what is sent is a pattern of the connection's.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};

use proptest::prelude::*;

use super::connection::BUFFER_BYTES;
use super::packet::{Header, SHUT_RECEIVE, SHUT_SEND, STREAM, op};
use super::tests::{Guest, OPEN_PORT, packet};
use super::*;

/// Most connections of the device.
const MOST: usize = 6;
/// What a guest may send without being told of more room.
const WINDOW: u64 = BUFFER_BYTES as u64;

#[derive(Debug, Clone, Copy)]
enum Act {
    /// The guest asks for a connection, at the port that is open or at another.
    Request(Whose, bool),
    /// It sends as much as it may.
    Data(Whose, u32),
    /// It sends more than it may.
    Flood(Whose),
    /// It tells of its room and of what it took: of what it got since it told last, so many parts of four.
    Tell(Whose, u32, u64),
    /// It takes what it was never sent, or gives back what it took.
    Lie(Whose, bool),
    /// It ends directions.
    Shut(Whose, u32),
    /// A packet with nothing in it, of any operation.
    Bare(Whose, u16),
    /// A packet of another kind of socket.
    Kind(Whose),
    /// A packet from somebody else, or to somebody else.
    Stranger(Whose, bool),
    /// The host asks for a connection.
    Connect,
    /// It does, and the guest answers before it was asked.
    Early(u16),
    /// It writes.
    Write(Whose, usize),
    /// It writes no more.
    End(Whose),
    /// It is gone.
    Close(Whose),
    /// It reads no more, or again.
    Lag(Whose),
    /// The driver starts the device again.
    Restart,
}

/// A connection: one of four that the guest asks for, or one of those that the host asked for.
#[derive(Debug, Clone, Copy)]
enum Whose {
    Guest(u32),
    Host(usize),
}

/// Ports, the host's first.
type Ports = (u32, u32);

#[derive(Default)]
struct Line {
    /// The host's end.
    stream: Option<UnixStream>,
    /// The host asked, and the guest has not answered.
    answer: Option<Receiver<bool>>,
    /// The guest was asked, or was told that it was accepted.
    greeted: bool,
    /// Bytes that the guest sent, and of those that the host read, and that the guest was told of as taken.
    sent: u64,
    read: u64,
    told: u64,
    /// Bytes that the host wrote, that the guest got, and that it said it took; and its room.
    written: u64,
    got: u64,
    taken: u64,
    room: u32,
    /// Whether the guest was asked for room since.
    asked: bool,
    guest_shut: u32,
    host_shut: u32,
    /// The host writes no more.
    ended: bool,
    lags: bool,
    /// The host left with something unread: the connection ends in one way or the other.
    broken: bool,
    /// The host has read the guest's last byte.
    at_end: bool,
}

fn pattern(ports: Ports, to_host: bool, at: u64) -> u8 {
    ((at * 7 + u64::from(ports.1) + u64::from(to_host)) % 251).to_le_bytes()[0]
}

impl Line {
    fn credit(&self) -> u64 {
        (self.taken + u64::from(self.room)).saturating_sub(self.got)
    }

    /// The host reads all that is there.
    fn hear(&mut self, ports: Ports) -> bool {
        let Some(stream) = &mut self.stream else { return false };
        let (mut buffer, before) = ([0; 8192], self.read);
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => {
                    self.at_end = true;
                    break;
                }
                Ok(length) => {
                    for byte in &buffer[..length] {
                        assert_eq!(*byte, pattern(ports, true, self.read), "{ports:?} at {}", self.read);
                        self.read += 1;
                    }
                }
                Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                    self.at_end = true;
                    break;
                }
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    break;
                }
            }
        }
        assert!(self.read <= self.sent, "{ports:?}: more than was sent");
        self.read > before
    }
}

struct World {
    guest: Guest,
    lines: BTreeMap<Ports, Line>,
    /// Ports of connections that the host asked for.
    hosts: Vec<Ports>,
    /// Connections that the host asked for, of which the guest has not heard.
    asking: Vec<Line>,
    /// Refusals that the guest has earned.
    refusals: Vec<(Ports, u16)>,
    /// How many connections the host was given ports for.
    asked: u32,
}

impl World {
    fn new() -> Self {
        let guest = Guest::with_most(MOST);
        Self {
            guest,
            lines: BTreeMap::new(),
            hosts: Vec::new(),
            asking: Vec::new(),
            refusals: Vec::new(),
            asked: 0,
        }
    }

    fn ports(&self, whose: Whose) -> Ports {
        match whose {
            Whose::Guest(number) => (OPEN_PORT, 1000 + number),
            Whose::Host(number) if self.hosts.is_empty() => (77, 9000 + u32::try_from(number).expect("few")),
            Whose::Host(number) => self.hosts[number % self.hosts.len()],
        }
    }

    fn header(&self, ports: Ports, op: u16, length: u32) -> Header {
        let mut header = packet(op, ports.1, length);
        header.dst_port = ports.0.into();
        if let Some(line) = self.lines.get(&ports) {
            header.buf_alloc = line.room.into();
            header.fwd_cnt = wrapped(line.taken).into();
        }
        header
    }

    /// The guest's packet, and the model's word on it.
    fn send(&mut self, header: Header, data: &[u8]) {
        let ports = (header.dst_port.get(), header.src_port.get());
        self.guest.send(header, data);
        let (op, kind) = (header.op.get(), header.kind.get());
        let is_full = self.lines.len() + self.asking.len() >= MOST;
        let Some(line) = self.lines.get_mut(&ports) else {
            if op == op::REQUEST && kind == STREAM && ports.0 == OPEN_PORT && !is_full {
                let stream = self.guest.accepted.try_recv().expect("accepted");
                stream.set_nonblocking(true).expect("a stream");
                let room = header.buf_alloc.get();
                self.lines.insert(ports, Line { stream: Some(stream), room, ..Line::default() });
            } else if op != op::RST {
                self.refusals.push((ports, kind));
            }
            return;
        };
        let length = u64::from(header.length.get());
        let accepts = op == op::RESPONSE && line.answer.is_some() && line.greeted && kind == STREAM;
        let is_lie = header.fwd_cnt.get() != wrapped(line.taken) && line.answer.is_none();
        let is_allowed = match op {
            _ if kind != STREAM || is_lie => false,
            _ if line.answer.is_some() => accepts,
            op::RW => {
                let is_deaf = line.stream.is_none() && length > 0;
                // What leaves no doubt: a host that has gone may not have been noticed, and the window may be wider than was told.
                line.guest_shut & SHUT_SEND == 0 && !is_deaf && length <= WINDOW
            }
            op::CREDIT_UPDATE | op::CREDIT_REQUEST => true,
            op::SHUTDOWN => {
                line.guest_shut |= header.flags.get() & (SHUT_RECEIVE | SHUT_SEND);
                true
            }
            _ => false,
        };
        if accepts {
            let answer = line.answer.take().expect("it waits");
            assert_eq!(answer.try_recv(), Ok(true));
            line.room = header.buf_alloc.get();
        } else if is_allowed {
            line.room = header.buf_alloc.get();
            line.asked &= line.credit() == 0;
            line.sent += if op == op::RW { length } else { 0 };
        } else {
            self.gone(ports);
            if op != op::RST {
                self.refusals.push((ports, kind));
            }
        }
    }

    /// The connection is over: the host hears that, and nothing that was not sent.
    fn gone(&mut self, ports: Ports) -> Line {
        let mut line = self.lines.remove(&ports).expect("it was there");
        line.hear(ports);
        assert!(line.stream.is_none() || line.at_end, "{ports:?}: the host hears no end");
        if let Some(answer) = &line.answer {
            assert_eq!(answer.try_recv(), Ok(false));
        }
        line
    }

    /// One packet of the device's.
    fn see(&mut self, header: &Header, data: &[u8]) {
        let ports = (header.src_port.get(), header.dst_port.get());
        let op = header.op.get();
        if op == op::RST {
            if let Some(found) =
                self.refusals.iter().position(|refusal| *refusal == (ports, header.kind.get()))
            {
                self.refusals.swap_remove(found);
                return;
            }
            let line = self.gone(ports);
            let both = SHUT_RECEIVE | SHUT_SEND;
            let is_orderly = line.guest_shut == both && (line.read == line.sent || line.stream.is_none());
            let gave_up = line.answer.is_some() && line.stream.is_none();
            assert!(is_orderly || gave_up || line.broken, "{ports:?} ended for no reason");
            return;
        }
        if op == op::REQUEST {
            let mut line = self.asking.remove(0);
            line.greeted = true;
            self.hosts.push(ports);
            assert!(self.lines.insert(ports, line).is_none(), "{ports:?} twice");
            return;
        }
        let line = self.lines.get_mut(&ports).unwrap_or_else(|| panic!("{op} of no connection, {ports:?}"));
        assert!(line.answer.is_none(), "{op} before the guest answered");
        assert_eq!((header.kind.get(), header.buf_alloc.get()), (STREAM, BUFFER_BYTES));
        assert!(op == op::SHUTDOWN || header.flags.get() == 0, "{op} with flags");
        let told = line.told + u64::from(header.fwd_cnt.get().wrapping_sub(wrapped(line.told)));
        assert!(told <= line.sent, "{ports:?}: {told} of {} are taken", line.sent);
        line.told = told;
        match op {
            op::RESPONSE => assert!(!std::mem::replace(&mut line.greeted, true), "accepted twice"),
            op::RW => {
                assert!(line.guest_shut & SHUT_RECEIVE == 0 && line.host_shut & SHUT_SEND == 0);
                assert!(!data.is_empty() && data.len() as u64 <= line.credit(), "{ports:?}: beyond the room");
                for byte in data {
                    assert_eq!(*byte, pattern(ports, false, line.got), "{ports:?} at {}", line.got);
                    line.got += 1;
                }
                assert!(line.got <= line.written);
            }
            op::SHUTDOWN => {
                let flags = header.flags.get();
                assert!(flags & !(SHUT_SEND | SHUT_RECEIVE) == 0 && flags & line.host_shut == line.host_shut);
                assert!(
                    flags & SHUT_SEND == 0
                        || line.ended && (line.got == line.written || line.guest_shut != 0)
                );
                // Of a stream that both have ended nobody can tell whether the host is gone.
                let is_over = line.stream.is_none() || line.ended && line.guest_shut & SHUT_SEND != 0;
                assert!(flags & SHUT_RECEIVE == 0 || is_over);
                line.host_shut |= flags;
            }
            op::CREDIT_UPDATE => {}
            op::CREDIT_REQUEST => {
                assert!(line.credit() == 0 && !line.asked);
                line.asked = true;
            }
            _ => panic!("{op} is nothing to say"),
        }
    }

    /// Lets everything happen that does of itself, and holds what came of it against the model.
    fn settle(&mut self) {
        for round in 0.. {
            assert!(round < 1000, "no end");
            let mut moved = false;
            while let Some((header, data)) = self.guest.take() {
                self.see(&header, &data);
                moved = true;
            }
            for (ports, line) in self.lines.iter_mut().filter(|(_, line)| !line.lags) {
                moved |= line.hear(*ports);
            }
            if !moved {
                break;
            }
        }
        assert_eq!(self.refusals, [], "refusals that the guest never got");
        assert!(self.asking.is_empty(), "the guest was never asked");
        for (ports, line) in self.lines.iter().filter(|(_, line)| line.answer.is_none() && !line.broken) {
            assert!(line.greeted, "{ports:?}: the guest never heard that it was accepted");
            if line.guest_shut & SHUT_RECEIVE == 0 {
                assert_eq!(
                    line.got,
                    line.written.min(line.got + line.credit()),
                    "{ports:?}: bytes for the guest"
                );
                assert!(line.got == line.written || line.asked, "{ports:?}: nobody asks for room");
                // The end is found where something could be read.
                let is_heard = line.ended && line.got == line.written && line.credit() > 0;
                assert!(!is_heard || line.host_shut & SHUT_SEND != 0, "{ports:?}: the guest hears no end");
            }
            if !line.lags && line.stream.is_some() {
                assert_eq!(line.read, line.sent, "{ports:?}: bytes for the host");
                assert_eq!(line.guest_shut & SHUT_SEND != 0, line.at_end, "{ports:?}: the host's end");
                assert!(line.guest_shut != SHUT_RECEIVE | SHUT_SEND, "{ports:?}: it is over");
                assert!(
                    line.sent - line.told < WINDOW,
                    "{ports:?}: a guest that waits for room waits for ever"
                );
            }
        }
        assert_eq!(self.guest.device.muxer.connections(), self.lines.len());
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Request(whose, is_open) => {
                let (host, guest) = self.ports(whose);
                let ports = if is_open { (host, guest) } else { (host + 1, guest) };
                self.send(self.header(ports, op::REQUEST, 0), b"");
            }
            Act::Data(whose, wanted) => {
                let ports = self.ports(whose);
                let (start, free) = self
                    .lines
                    .get(&ports)
                    .map_or((0, WINDOW), |line| (line.sent, WINDOW - (line.sent - line.told)));
                let length = u64::from(wanted).min(free);
                let data: Vec<u8> = (start..start + length).map(|at| pattern(ports, true, at)).collect();
                self.send(self.header(ports, op::RW, wrapped(length)), &data);
            }
            Act::Flood(whose) => {
                let data = vec![0; BUFFER_BYTES as usize + 1];
                self.send(self.header(self.ports(whose), op::RW, BUFFER_BYTES + 1), &data);
            }
            Act::Tell(whose, room, parts) => {
                let ports = self.ports(whose);
                let mut header = self.header(ports, op::CREDIT_UPDATE, 0);
                if let Some(line) = self.lines.get_mut(&ports).filter(|line| line.answer.is_none()) {
                    line.taken += (line.got - line.taken) * parts / 4;
                    header.fwd_cnt = wrapped(line.taken).into();
                }
                header.buf_alloc = room.into();
                self.send(header, b"");
            }
            Act::Lie(whose, is_more) => {
                let ports = self.ports(whose);
                let mut header = self.header(ports, op::CREDIT_UPDATE, 0);
                let (taken, got) = self.lines.get(&ports).map_or((0, 0), |line| (line.taken, line.got));
                header.fwd_cnt =
                    if is_more { wrapped(got).wrapping_add(1) } else { wrapped(taken).wrapping_sub(1) }
                        .into();
                self.send(header, b"");
            }
            Act::Shut(whose, flags) => {
                let mut header = self.header(self.ports(whose), op::SHUTDOWN, 0);
                header.flags = flags.into();
                self.send(header, b"");
            }
            Act::Bare(whose, op) => self.send(self.header(self.ports(whose), op, 0), b""),
            Act::Kind(whose) => {
                let mut header = self.header(self.ports(whose), op::RW, 0);
                header.kind = 2.into();
                self.send(header, b"");
            }
            Act::Stranger(whose, is_from) => {
                let mut header = self.header(self.ports(whose), op::RST, 0);
                let cid = if is_from { &mut header.src_cid } else { &mut header.dst_cid };
                *cid = (cid.get() + 1).into();
                self.guest.send(header, b"");
            }
            Act::Connect => drop(self.connect()),
            Act::Early(op) => {
                let (has_buffer, Some(port)) = (self.guest.has_buffer(), self.connect()) else { return };
                if has_buffer {
                    return;
                }
                // The device has it, and no buffer for what it is to say.
                self.guest.process(Wake::Events);
                let ports = ((1 << 30) + self.asked - 1, port);
                let line = self.asking.remove(0);
                self.lines.insert(ports, line);
                self.send(self.header(ports, op, 0), b"");
            }
            Act::Write(whose, length) => self.write(self.ports(whose), length),
            Act::End(whose) => {
                if let Some((line, stream)) = self.ends(whose) {
                    // Not where the other end is gone as well.
                    let _ = stream.shutdown(Shutdown::Write);
                    line.ended = true;
                }
            }
            Act::Close(whose) => {
                let ports = self.ports(whose);
                if let Some(line) = self.lines.get_mut(&ports).filter(|line| line.stream.is_some()) {
                    line.broken |= line.read < line.sent;
                    line.ended = true;
                    line.stream = None;
                }
            }
            Act::Lag(whose) => {
                if let Some(line) = self.lines.get_mut(&self.ports(whose)) {
                    line.lags = !line.lags;
                }
            }
            Act::Restart => {
                Device::<()>::reset(&mut self.guest.device);
                for ports in self.lines.keys().copied().collect::<Vec<_>>() {
                    self.gone(ports);
                }
            }
        }
    }

    fn ends(&mut self, whose: Whose) -> Option<(&mut Line, UnixStream)> {
        let line = self.lines.get_mut(&self.ports(whose))?;
        let stream = line.stream.as_ref()?.try_clone().expect("descriptors");
        Some((line, stream))
    }

    /// The host asks for a connection: the guest's port of it, where there is room for one.
    fn connect(&mut self) -> Option<u32> {
        let (ours, theirs) = UnixStream::pair().expect("descriptors");
        ours.set_nonblocking(true).expect("a stream");
        let (sender, answer) = channel();
        let port = 9000 + u32::try_from(self.hosts.len()).expect("few");
        let tell = move |accepted| {
            let _ = sender.send(accepted);
        };
        self.guest.connector.connect_to_guest(port, theirs, tell);
        if self.lines.len() < MOST {
            self.asked += 1;
            self.asking.push(Line { stream: Some(ours), answer: Some(answer), ..Line::default() });
        } else {
            self.guest.process(Wake::Events);
            assert_eq!(answer.try_recv(), Ok(false));
            return None;
        }
        Some(port)
    }

    fn write(&mut self, ports: Ports, length: usize) {
        let Some(line) = self.lines.get_mut(&ports) else { return };
        let Some(stream) = &mut line.stream else { return };
        let data: Vec<u8> = (line.written..).take(length).map(|at| pattern(ports, false, at)).collect();
        match stream.write(&data) {
            Ok(written) => {
                assert!(!line.ended && line.guest_shut & SHUT_RECEIVE == 0, "nobody hears that");
                line.written += written as u64;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::BrokenPipe);
                assert!(line.ended || line.guest_shut & SHUT_RECEIVE != 0, "somebody hears that");
            }
        }
    }
}

fn wrapped(count: u64) -> u32 {
    u32::try_from(count % (1 << 32)).expect("a remainder")
}

fn whose() -> impl Strategy<Value = Whose> {
    prop_oneof![2 => (0..4_u32).prop_map(Whose::Guest), 1 => (0..4_usize).prop_map(Whose::Host)]
}

fn act() -> impl Strategy<Value = Act> {
    let room = || prop::sample::select(vec![0, 1, 100, 5000, 65_536, u32::MAX]);
    prop_oneof![
        6 => (whose(), prop::bool::weighted(0.9)).prop_map(|(whose, is_open)| Act::Request(whose, is_open)),
        12 => (whose(), prop_oneof![0..10_u32, 0..70_000_u32]).prop_map(|(whose, length)| Act::Data(whose, length)),
        1 => whose().prop_map(Act::Flood),
        8 => (whose(), room(), 0..5_u64).prop_map(|(whose, room, parts)| Act::Tell(whose, room, parts)),
        1 => (whose(), any::<bool>()).prop_map(|(whose, is_more)| Act::Lie(whose, is_more)),
        3 => (whose(), 0..8_u32).prop_map(|(whose, flags)| Act::Shut(whose, flags)),
        4 => (whose(), 0..9_u16).prop_map(|(whose, op)| Act::Bare(whose, op)),
        4 => whose().prop_map(|whose| Act::Bare(whose, op::RESPONSE)),
        1 => whose().prop_map(Act::Kind),
        1 => (whose(), any::<bool>()).prop_map(|(whose, is_from)| Act::Stranger(whose, is_from)),
        3 => Just(Act::Connect),
        1 => (2..8_u16).prop_map(Act::Early),
        12 => (whose(), prop_oneof![1..10_usize, 1..100_000_usize]).prop_map(|(whose, length)| Act::Write(whose, length)),
        1 => whose().prop_map(Act::End),
        1 => whose().prop_map(Act::Close),
        3 => whose().prop_map(Act::Lag),
        1 => Just(Act::Restart),
    ]
}

proptest! {
    // PROPTEST_CASES runs more of them.
    #![proptest_config(ProptestConfig::default())]

    #[test]
    fn the_device_does_what_its_model_does(acts in prop::collection::vec(act(), 1..80)) {
        let mut world = World::new();
        for act in acts {
            world.act(act);
            world.settle();
        }
    }
}
