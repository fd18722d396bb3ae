use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zerocopy::IntoBytes;

use super::connection::BUFFER_BYTES;
use super::packet::{HOST_CID, SHUT_RECEIVE, SHUT_SEND, STREAM, op};
use super::*;
use crate::testkit::{Ring, WRITE, memory};

const CID: u64 = 77;
pub const OPEN_PORT: u32 = 5000;

/// Accepts at one port, and hands out the host's ends.
struct OnePort(Sender<UnixStream>);

impl Backend for OnePort {
    fn connect_from_guest(&mut self, port: u32) -> Option<UnixStream> {
        let (ours, theirs) = UnixStream::pair().ok()?;
        (port == OPEN_PORT).then(|| self.0.send(theirs).ok())??;
        Some(ours)
    }
}

pub struct Guest {
    memory: GuestMemoryMmap,
    receive: Ring,
    transmit: Ring,
    pub device: Vsock,
    pub connector: Connector,
    pub accepted: Receiver<UnixStream>,
    posted: u16,
}

const ROOM: u32 = 4096;

impl Guest {
    fn new() -> Self {
        Self::with_most(usize::MAX)
    }

    pub fn with_most(connections: usize) -> Self {
        let (sender, accepted) = channel();
        let (device, connector) = Vsock::new(CID, connections, Box::new(OnePort(sender))).expect("device");
        let (receive, transmit) = (Ring::new(0, 64), Ring::new(1, 64));
        Self { memory: memory(), receive, transmit, device, connector, accepted, posted: 0 }
    }

    pub fn process(&mut self, wake: Wake) {
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

    pub fn send(&mut self, header: Header, data: &[u8]) {
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

    /// Whether the device has a buffer that it can use.
    pub fn has_buffer(&self) -> bool {
        self.receive.queue.next_avail() != self.posted
    }

    /// Lets the device look at its streams, gives it a buffer, and takes the packet it sends.
    pub fn take(&mut self) -> Option<(Header, Vec<u8>)> {
        self.process(Wake::Events);
        if let Some(packet) = self.next() {
            return Some(packet);
        }
        // Where nothing was to be sent, the buffer is still there from the last time.
        if !self.has_buffer() {
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
pub fn packet(op: u16, port: u32, length: u32) -> Header {
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
fn what_a_guest_that_ended_had_sent_arrives_and_then_its_streams_end() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(1000);
    guest.transmit.send(&guest.memory, &rw(1000, b"last words"), 0);
    let mut queues = [Some(&mut guest.receive.queue), Some(&mut guest.transmit.queue), None];
    Device::<()>::finish(&mut guest.device, &mut queues, &guest.memory);
    let mut heard = Vec::new();
    stream.read_to_end(&mut heard).expect("an end");
    assert_eq!(heard, b"last words");
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

proptest! {
    // PROPTEST_CASES runs more of them.
    #![proptest_config(ProptestConfig::default())]

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
