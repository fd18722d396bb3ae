use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zerocopy::IntoBytes;

use super::connection::BUFFER_BYTES;
use super::packet::{HOST_CID, SHUT_RECEIVE, SHUT_SEND, STREAM, op};
use super::*;
use crate::testkit::{NEXT, Ring, WRITE, memory};

const CID: u64 = 77;
const OPEN_PORT: u32 = 5000;

/// Accepts at one port, and hands out the host's ends.
struct OnePort(Sender<UnixStream>);

impl Backend for OnePort {
    fn connect_from_guest(&mut self, port: u32) -> Option<UnixStream> {
        let (ours, theirs) = UnixStream::pair().ok()?;
        (port == OPEN_PORT).then(|| self.0.send(theirs).ok())??;
        Some(ours)
    }
}

struct Guest {
    memory: GuestMemoryMmap,
    receive: Ring,
    transmit: Ring,
    device: Vsock,
    connector: Connector,
    accepted: Receiver<UnixStream>,
    posted: u16,
}

const ROOM: u32 = 4096;

impl Guest {
    fn new() -> Self {
        Self::with_most(usize::MAX)
    }

    fn with_most(connections: usize) -> Self {
        let (sender, accepted) = channel();
        let (device, connector) = Vsock::new(CID, connections, Box::new(OnePort(sender))).expect("device");
        let (receive, transmit) = (Ring::new(0, 64), Ring::new(1, 64));
        Self { memory: memory(), receive, transmit, device, connector, accepted, posted: 0 }
    }

    fn process(&mut self, wake: Wake) {
        let mut queues = [Some(&mut self.receive.queue), Some(&mut self.transmit.queue), None];
        let mut rounds = 0;
        while Device::<()>::process(&mut self.device, wake, &mut queues, &self.memory).expect("rings").again {
            rounds += 1;
            assert!(rounds < 1000, "no end");
        }
    }

    /// Posts receive buffers, and lets the device use them.
    fn post(&mut self, count: u16) {
        for _ in 0..count {
            let index = self.posted % 64;
            let at = self.receive.data() + u64::from(index) * u64::from(ROOM);
            self.receive.describe(&self.memory, index, (at, ROOM), WRITE, 0);
            self.receive.offer(&self.memory, index);
            self.posted += 1;
        }
        self.process(Wake::Queue(RECEIVE));
    }

    /// Sends a packet as it is.
    fn send_raw(&mut self, bytes: &[u8]) {
        self.transmit.send(&self.memory, bytes, 0);
        self.process(Wake::Queue(TRANSMIT));
        assert_eq!(self.transmit.used(&self.memory), Some((0, 0)));
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        self.send_raw(&[header.as_bytes(), data].concat());
    }

    /// The next packet the device has put into a receive buffer.
    fn next(&mut self) -> Option<(Header, Vec<u8>)> {
        let (head, length) = self.receive.used(&self.memory)?;
        let at = self.receive.data() + u64::from(head) * u64::from(ROOM);
        let mut bytes = vec![0; length as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).expect("memory");
        let (header, data) = Header::read_from_prefix(&bytes).expect("header");
        assert_eq!((header.src_cid.get(), header.dst_cid.get()), (HOST_CID, CID));
        assert_eq!(header.length.get() as usize, data.len());
        Some((header, data.to_vec()))
    }

    /// Lets the device look at its streams, gives it a buffer, and takes the packet it sends.
    fn take(&mut self) -> Option<(Header, Vec<u8>)> {
        self.process(Wake::Events);
        if let Some(packet) = self.next() {
            return Some(packet);
        }
        // Where nothing was to be sent, the buffer is still there from the last time.
        if self.receive.queue.next_avail() == self.posted {
            self.post(1);
        }
        self.next()
    }

    fn op(&mut self) -> Option<u16> {
        self.take().map(|(header, _)| header.op.get())
    }

    /// An open connection from the guest's `port`, and the host's end of it.
    fn connect(&mut self, port: u32) -> UnixStream {
        self.send(packet(op::REQUEST, port, 0), b"");
        assert_eq!(self.op(), Some(op::RESPONSE));
        let stream = self.accepted.try_recv().expect("accepted");
        stream.set_nonblocking(true).expect("stream");
        stream
    }
}

/// A packet from the guest's `port` to the open port, with 64 KiB of credit.
fn packet(op: u16, port: u32, length: u32) -> Header {
    Header {
        src_cid: CID.into(),
        dst_cid: HOST_CID.into(),
        src_port: port.into(),
        dst_port: OPEN_PORT.into(),
        length: length.into(),
        kind: STREAM.into(),
        op: op.into(),
        buf_alloc: 65_536.into(),
        ..Header::default()
    }
}

fn rw(port: u32, data: &[u8]) -> Vec<u8> {
    let header = packet(op::RW, port, u32::try_from(data.len()).expect("short"));
    [header.as_bytes(), data].concat()
}

fn read_all(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => bytes,
        Err(error) => {
            assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
            bytes
        }
    }
}

#[test]
fn a_guest_connects_sends_and_receives() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(1000);
    guest.send_raw(&rw(1000, b"to the host"));
    assert_eq!(read_all(&mut stream), b"to the host");
    stream.write_all(b"to the guest").expect("stream");
    let (header, data) = guest.take().expect("packet");
    assert_eq!((header.op.get(), &data[..]), (op::RW, b"to the guest".as_slice()));
    assert_eq!((header.src_port.get(), header.dst_port.get()), (OPEN_PORT, 1000));
    // 11 bytes were taken, and the whole buffer is offered.
    assert_eq!((header.fwd_cnt.get(), header.buf_alloc.get()), (11, BUFFER_BYTES));
    assert!(guest.take().is_none());
}

#[test]
fn the_host_connects_and_hears_what_the_guest_says() {
    for (answer_op, accepted) in [(op::RESPONSE, true), (op::RST, false), (op::RW, false)] {
        let mut guest = Guest::new();
        let (mut ours, theirs) = UnixStream::pair().expect("pair");
        let (sender, answer) = channel();
        guest
            .connector
            .connect_to_guest(9000, theirs, move |accepted| sender.send(accepted).expect("waiting"));
        let (request, _) = guest.take().expect("request");
        assert_eq!((request.op.get(), request.dst_port.get()), (op::REQUEST, 9000));
        assert!(answer.try_recv().is_err());
        let mut header = packet(answer_op, 9000, 0);
        header.dst_port = request.src_port;
        guest.send(header, b"");
        assert_eq!(answer.try_recv(), Ok(accepted));
        if accepted {
            ours.write_all(b"hello").expect("stream");
            assert_eq!(guest.take().expect("packet").1, b"hello");
        } else {
            assert_eq!(ours.read(&mut [0; 1]).expect("ended"), 0);
        }
    }
}

#[test]
fn giving_up_on_a_guest_that_does_not_answer_frees_the_connection() {
    let mut guest = Guest::new();
    let (ours, theirs) = UnixStream::pair().expect("pair");
    let (sender, answer) = channel();
    guest.connector.connect_to_guest(9000, theirs, move |accepted| sender.send(accepted).expect("waiting"));
    assert_eq!(guest.op(), Some(op::REQUEST));
    drop(ours);
    assert_eq!(guest.op(), Some(op::RST));
    assert_eq!(answer.try_recv(), Ok(false));
}

#[test]
fn vs01_credit_that_jumps_is_a_broken_connection() {
    for (sent, forwarded) in [(0, 1), (0, u32::MAX), (10, 11), (10, u32::MAX)] {
        let mut guest = Guest::new();
        let mut stream = guest.connect(1000);
        if sent > 0 {
            stream.write_all(&vec![7; sent]).expect("stream");
            assert_eq!(guest.op(), Some(op::RW));
        }
        let mut header = packet(op::CREDIT_UPDATE, 1000, 0);
        header.fwd_cnt = forwarded.into();
        guest.send(header, b"");
        assert_eq!(guest.op(), Some(op::RST), "{sent} {forwarded}");
    }
    // Back to what it was before.
    let mut guest = Guest::new();
    let mut stream = guest.connect(1000);
    stream.write_all(&[7; 10]).expect("stream");
    assert_eq!(guest.op(), Some(op::RW));
    for (forwarded, answer) in [(10, None), (9, Some(op::RST))] {
        let mut header = packet(op::CREDIT_UPDATE, 1000, 0);
        header.fwd_cnt = forwarded.into();
        guest.send(header, b"");
        assert_eq!(guest.op(), answer);
    }
}

#[test]
fn counters_wrap_without_harm() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(1000);
    let id = 0;
    guest.device.muxer.set_counters(id, u32::MAX - 5);
    let mut forwarded = u32::MAX - 5;
    for round in 0..4_u8 {
        guest.send_raw(&{
            let mut header = packet(op::RW, 1000, 4);
            header.fwd_cnt = forwarded.into();
            [header.as_bytes(), &[round; 4]].concat()
        });
        assert_eq!(read_all(&mut stream), [round; 4]);
        stream.write_all(&[round; 3]).expect("stream");
        let (header, data) = guest.take().expect("packet");
        assert_eq!((header.op.get(), data), (op::RW, vec![round; 3]));
        forwarded = forwarded.wrapping_add(3);
    }
}

#[test]
fn vs02_a_guest_that_claims_endless_credit_costs_no_memory() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(1000);
    let mut header = packet(op::CREDIT_UPDATE, 1000, 0);
    header.buf_alloc = u32::MAX.into();
    guest.send(header, b"");
    let mut sent = 0;
    while let Ok(count) = stream.write(&[1; 4096]) {
        sent += count;
    }
    let mut received = 0;
    while let Some((_, data)) = guest.take() {
        assert!(data.len() <= ROOM as usize - HEADER_BYTES);
        received += data.len();
    }
    assert_eq!(received, sent);
}

#[test]
fn vs02_a_guest_that_sends_more_than_its_credit_is_cut_off() {
    let mut guest = Guest::new();
    let stream = guest.connect(1000);
    // Whatever the stream takes, the host reads nothing: at most that and the buffer fit.
    let mut total = 0_usize;
    let mut reset = false;
    for _ in 0..1000 {
        guest.send_raw(&rw(1000, &[7; 4096]));
        total += 4096;
        while let Some((header, _)) = guest.take() {
            reset |= header.op.get() == op::RST;
        }
        if reset {
            break;
        }
    }
    assert!(reset && total < 1 << 20, "{total}");
    drop(stream);
}

#[test]
fn vs03_without_credit_the_host_asks_once_and_waits() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(1000);
    let mut header = packet(op::CREDIT_UPDATE, 1000, 0);
    header.buf_alloc = 0.into();
    guest.send(header, b"");
    stream.write_all(b"waits").expect("stream");
    assert_eq!(guest.op(), Some(op::CREDIT_REQUEST));
    for _ in 0..10 {
        assert!(guest.take().is_none());
        guest.send(header, b"");
    }
    assert!(!is_readable(&guest), "nothing to wake up for");
    guest.send(packet(op::CREDIT_UPDATE, 1000, 0), b"");
    assert_eq!(guest.take().expect("packet").1, b"waits");
}

#[test]
fn vs04_vs05_connections_are_capped_and_freed() {
    // Fewer than the 1,023 of the real thing: each takes two of the descriptors that all tests share.
    let mut guest = Guest::with_most(150);
    let mut streams = Vec::new();
    for port in 0..2000 {
        guest.send(packet(op::REQUEST, port, 0), b"");
        let expected = if port < 150 { op::RESPONSE } else { op::RST };
        assert_eq!(guest.op(), Some(expected), "{port}");
        streams.extend(guest.accepted.try_iter());
    }
    assert_eq!(streams.len(), 150);
    for port in 0..2000 {
        guest.send(packet(op::RST, port, 0), b"");
    }
    for mut stream in streams {
        assert_eq!(stream.read(&mut [0; 1]).expect("ended"), 0);
    }
    assert!(guest.take().is_none());
    guest.connect(1);
}

#[test]
fn vs07_half_close_lets_the_other_direction_go_on() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(1000);
    guest.send_raw(&rw(1000, b"last words"));
    let mut shutdown = packet(op::SHUTDOWN, 1000, 0);
    shutdown.flags = SHUT_SEND.into();
    guest.send(shutdown, b"");
    // All data, then the end, and not an error.
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).expect("end");
    assert_eq!(bytes, b"last words");
    stream.write_all(b"answer").expect("stream");
    assert_eq!(guest.take().expect("packet").1, b"answer");
    stream.shutdown(std::net::Shutdown::Write).expect("stream");
    let (header, _) = guest.take().expect("packet");
    // Nothing will be said in either direction any more.
    assert_eq!((header.op.get(), header.flags.get()), (op::SHUTDOWN, SHUT_SEND | SHUT_RECEIVE));
    // The guest ends the rest; RST confirms it.
    shutdown.flags = (SHUT_SEND | SHUT_RECEIVE).into();
    guest.send(shutdown, b"");
    assert_eq!(guest.op(), Some(op::RST));
}

#[test]
fn vs07_a_host_that_says_no_more_still_hears_the_guest() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(1000);
    stream.write_all(b"last words").expect("stream");
    stream.shutdown(std::net::Shutdown::Write).expect("stream");
    assert_eq!(guest.take().expect("packet").1, b"last words");
    let (header, _) = guest.take().expect("packet");
    assert_eq!((header.op.get(), header.flags.get()), (op::SHUTDOWN, SHUT_SEND));
    guest.send_raw(&rw(1000, b"answer"));
    assert_eq!(read_all(&mut stream), b"answer");
    assert!(guest.take().is_none());
}

#[test]
fn vs07_data_after_the_end_is_a_broken_connection() {
    let mut guest = Guest::new();
    let _stream = guest.connect(1000);
    let mut shutdown = packet(op::SHUTDOWN, 1000, 0);
    shutdown.flags = SHUT_SEND.into();
    guest.send(shutdown, b"");
    guest.send_raw(&rw(1000, b"more"));
    assert_eq!(guest.op(), Some(op::RST));
}

#[test]
fn vs07_a_guest_that_receives_no_more_ends_the_hosts_writing() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(1000);
    let mut shutdown = packet(op::SHUTDOWN, 1000, 0);
    shutdown.flags = SHUT_RECEIVE.into();
    guest.send(shutdown, b"");
    assert_eq!(stream.write(b"x").map_err(|error| error.kind()), Err(std::io::ErrorKind::BrokenPipe));
    guest.send_raw(&rw(1000, b"still sends"));
    assert_eq!(read_all(&mut stream), b"still sends");
    assert!(guest.take().is_none());
}

#[test]
fn vs07_what_the_stream_did_not_take_yet_is_delivered_before_the_end() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(1000);
    // Fill the stream, so that the rest waits in the buffer.
    let mut sent = Vec::new();
    while guest.device.muxer.buffered(0) == 0 {
        let block = vec![u8::try_from(sent.len() / 4096 % 251).expect("small"); 4096];
        guest.send_raw(&rw(1000, &block));
        sent.extend(block);
        while guest.take().is_some() {}
    }
    let mut shutdown = packet(op::SHUTDOWN, 1000, 0);
    shutdown.flags = (SHUT_SEND | SHUT_RECEIVE).into();
    guest.send(shutdown, b"");
    assert!(guest.take().is_none());
    let mut received = Vec::new();
    while received.len() < sent.len() {
        received.extend(read_all(&mut stream));
        guest.process(Wake::Events);
    }
    assert_eq!(received, sent);
    assert_eq!(guest.op(), Some(op::RST));
    assert_eq!(stream.read(&mut [0; 1]).expect("ended"), 0);
}

#[test]
fn vs08_packets_with_forged_addresses_are_dropped() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(1000);
    for cid in [0, 1, 2, 3, CID - 1, u64::MAX] {
        for op in [op::REQUEST, op::RST, op::RW, op::SHUTDOWN] {
            let mut header = packet(op, 1000, 0);
            header.src_cid = cid.into();
            header.flags = 3.into();
            guest.send(header, b"");
            let mut header = packet(op, 1000, 0);
            header.dst_cid = (cid + u64::from(cid == HOST_CID)).into();
            header.flags = 3.into();
            guest.send(header, b"");
        }
    }
    assert!(guest.take().is_none());
    guest.send_raw(&rw(1000, b"still here"));
    assert_eq!(read_all(&mut stream), b"still here");
}

#[test]
fn vs09_vs10_what_is_not_offered_is_refused() {
    let mut guest = Guest::new();
    for port in [0, 1, OPEN_PORT + 1, u32::MAX] {
        let mut header = packet(op::REQUEST, 1000, 0);
        header.dst_port = port.into();
        guest.send(header, b"");
        let (answer, _) = guest.take().expect("answer");
        assert_eq!((answer.op.get(), answer.src_port.get(), answer.dst_port.get()), (op::RST, port, 1000));
    }
    for kind in [0, 2, 3, u16::MAX] {
        let mut header = packet(op::REQUEST, 1000, 0);
        header.kind = kind.into();
        guest.send(header, b"");
        assert_eq!(guest.op(), Some(op::RST));
    }
    // Nothing is answered with RST but RST itself.
    for op in [0, op::RESPONSE, op::SHUTDOWN, op::RW, op::CREDIT_UPDATE, op::CREDIT_REQUEST, 8, u16::MAX] {
        guest.send(packet(op, 1000, 0), b"");
        assert_eq!(guest.op(), Some(op::RST), "{op}");
    }
    guest.send(packet(op::RST, 1000, 0), b"");
    assert!(guest.take().is_none());
    // An operation that does not exist, and a second request, end the connection there is.
    for op in [0, 8, u16::MAX, op::RESPONSE, op::REQUEST] {
        let mut stream = guest.connect(2000);
        guest.send(packet(op, 2000, 0), b"");
        assert_eq!(guest.op(), Some(op::RST), "{op}");
        assert_eq!(stream.read(&mut [0; 1]).expect("ended"), 0);
    }
}

#[test]
fn vs11_lengths_that_lie_and_data_in_pieces() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(1000);
    guest.send(packet(op::RW, 1000, 0), b"");
    // More bytes than the header says: the rest is nothing.
    guest.send(packet(op::RW, 1000, 3), b"abcdef");
    assert_eq!(read_all(&mut stream), b"abc");
    // One-byte descriptors.
    let bytes = rw(1000, b"in pieces");
    guest.memory.write_slice(&bytes, GuestAddress(guest.transmit.data())).expect("memory");
    for (index, _) in (0_u16..).zip(&bytes) {
        let last = usize::from(index) == bytes.len() - 1;
        let at = guest.transmit.data() + u64::from(index);
        guest.transmit.describe(&guest.memory, index, (at, 1), if last { 0 } else { NEXT }, index + 1);
    }
    guest.transmit.offer(&guest.memory, 0);
    guest.process(Wake::Queue(TRANSMIT));
    assert!(guest.transmit.used(&guest.memory).is_some());
    assert_eq!(read_all(&mut stream), b"in pieces");
    // Fewer bytes than the header says.
    for length in [7, 65_536, u32::MAX] {
        guest.connect(length);
        guest.send(packet(op::RW, length, length), b"abcdef");
        assert_eq!(guest.op(), Some(op::RST), "{length}");
    }
    // Less than a header.
    for length in 0..HEADER_BYTES {
        guest.send_raw(&bytes[..length]);
    }
    assert!(guest.take().is_none());
}

#[test]
fn vs12_the_host_going_away_ends_the_connection() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(1000);
    stream.write_all(b"bye").expect("stream");
    drop(stream);
    assert_eq!(guest.take().expect("packet").1, b"bye");
    let (header, _) = guest.take().expect("packet");
    assert_eq!((header.op.get(), header.flags.get()), (op::SHUTDOWN, SHUT_SEND | SHUT_RECEIVE));
    assert!(guest.take().is_none());
    guest.send_raw(&rw(1000, b"to nobody"));
    assert_eq!(guest.op(), Some(op::RST));
    // With data in the guest's direction stuck, too.
    let stream = guest.connect(1001);
    while guest.device.muxer.buffered(1) == 0 {
        guest.send_raw(&rw(1001, &[7; 4096]));
        while guest.take().is_some() {}
    }
    drop(stream);
    assert_eq!(guest.op(), Some(op::RST));
}

fn is_readable(guest: &Guest) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let events = Device::<()>::events(&guest.device).expect("events");
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(&events, PollFlags::IN)], Some(&now)).expect("poll") > 0
}

#[test]
fn vs13_a_guest_without_receive_buffers_keeps_nothing_busy() {
    let mut guest = Guest::new();
    let mut streams: Vec<_> = (0..20).map(|port| guest.connect(port)).collect();
    for stream in &mut streams {
        stream.write_all(&[9; 1000]).expect("stream");
    }
    guest.process(Wake::Events);
    assert!(!is_readable(&guest), "one look is enough");
    drop(streams);
    guest.process(Wake::Events);
    assert!(!is_readable(&guest), "the end of a stream is no news twice");
    // When there are buffers, everything comes.
    guest.post(60);
    let mut bytes = 0;
    while let Some((_, data)) = guest.next() {
        bytes += data.len();
    }
    assert_eq!(bytes, 20 * 1000);
}

#[test]
fn refusals_that_nobody_takes_do_not_pile_up() {
    let mut guest = Guest::new();
    let request = packet(op::RW, 1000, 0);
    guest.memory.write_slice(request.as_bytes(), GuestAddress(guest.transmit.data())).expect("memory");
    guest.transmit.describe(&guest.memory, 0, (guest.transmit.data(), 44), 0, 0);
    let mut used = 0;
    for _ in 0..5000 {
        guest.transmit.offer(&guest.memory, 0);
        guest.process(Wake::Queue(TRANSMIT));
        match guest.transmit.used(&guest.memory) {
            Some(_) => used += 1,
            // The device takes no more of them. That is as far as this goes.
            None => break,
        }
    }
    assert_eq!(used, super::muxer::MOST_RESETS);
    // With room for answers it goes on.
    guest.post(64);
    assert!(guest.transmit.used(&guest.memory).is_some());
}

#[test]
fn receive_buffers_without_room_for_a_header_are_given_back() {
    let mut guest = Guest::new();
    guest.send(packet(op::REQUEST, 1000, 0), b"");
    for (length, flags) in [(0, WRITE), (43, WRITE), (ROOM, 0)] {
        guest.receive.describe(&guest.memory, 0, (guest.receive.data(), length), flags, 0);
        guest.receive.offer(&guest.memory, 0);
        guest.posted += 1;
        guest.process(Wake::Queue(RECEIVE));
        assert_eq!(guest.receive.used(&guest.memory), Some((0, 0)));
    }
    // Exactly a header.
    guest.receive.describe(&guest.memory, 0, (guest.receive.data(), 44), WRITE, 0);
    guest.receive.offer(&guest.memory, 0);
    guest.posted += 1;
    guest.process(Wake::Queue(RECEIVE));
    assert_eq!(guest.next().map(|(header, _)| header.op.get()), Some(op::RESPONSE));
}

#[test]
fn vs15_reset_ends_all_streams_and_starts_anew() {
    let mut guest = Guest::new();
    let streams: Vec<_> = (0..100).map(|port| guest.connect(port)).collect();
    let (_ours, theirs) = UnixStream::pair().expect("pair");
    let (sender, answer) = channel();
    guest.connector.connect_to_guest(9000, theirs, move |accepted| sender.send(accepted).expect("waiting"));
    guest.process(Wake::Events);
    Device::<()>::reset(&mut guest.device);
    assert_eq!(answer.try_recv(), Ok(false));
    for mut stream in streams {
        assert_eq!(stream.read(&mut [0; 1]).expect("ended"), 0);
    }
    assert!(!is_readable(&guest));
    (guest.receive, guest.transmit, guest.posted) = (Ring::new(0, 64), Ring::new(1, 64), 0);
    guest.memory = memory();
    guest.connect(0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn no_packets_are_too_much(
        packets in prop::collection::vec((
            (0..10_u16, 0..4_u32, prop_oneof![Just(OPEN_PORT), any::<u32>()], 0..4_u32),
            prop_oneof![Just(0_u32), 0..70_000_u32, any::<u32>()],
            prop_oneof![Just(0_u32), Just(65_536), any::<u32>()],
            prop_oneof![Just(0_u32), 0..5000_u32, any::<u32>()],
            0..600_usize,
            0..4_u8,
        ), 1..60),
    ) {
        let mut guest = Guest::new();
        let mut streams = Vec::new();
        for ((op, port, dst_port, flags), length, buf_alloc, fwd_cnt, data, host) in packets {
            let mut header = packet(op, port, length);
            header.dst_port = dst_port.into();
            header.flags = flags.into();
            header.buf_alloc = buf_alloc.into();
            header.fwd_cnt = fwd_cnt.into();
            guest.send(header, &vec![5; data]);
            streams.extend(guest.accepted.try_iter());
            match (host, streams.last_mut()) {
                (0, Some(stream)) => drop(stream.set_nonblocking(true).and_then(|()| stream.write(&[1; 100]))),
                (1, Some(_)) => drop(streams.pop()),
                (2, Some(stream)) => drop(stream.shutdown(std::net::Shutdown::Write)),
                _ => {}
            }
            for _ in 0..5 {
                guest.take();
            }
            prop_assert!((0..60).all(|id| guest.device.muxer.buffered(id) <= BUFFER_BYTES as usize));
        }
        Device::<()>::reset(&mut guest.device);
    }
}
