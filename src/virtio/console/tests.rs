use std::io::{Read, Write};

use super::*;
use crate::testkit::{Ring, memory};

struct Guest {
    memory: GuestMemoryMmap,
    rings: [Ring; 4],
    device: Console,
    host: UnixStream,
}

impl Guest {
    fn new() -> Self {
        let (host, stream) = UnixStream::pair().expect("a socket pair");
        host.set_nonblocking(true).expect("a socket");
        let device = Console::new("wire", stream).expect("a device");
        // Of the test memory's two parts the rings' buffers fit in the first.
        Self { memory: memory(), rings: [0, 1, 2, 3].map(|number| Ring::new(number, 4)), device, host }
    }

    fn process(&mut self, wake: Wake) -> Outcome {
        let mut queues: Vec<Option<&mut Queue>> =
            self.rings.iter_mut().map(|ring| Some(&mut ring.queue)).collect();
        self.device.process(wake, &mut queues, &self.memory).expect("good rings")
    }

    /// Offers `room` bytes in ring `ring` for the device to write to, or `request` to read.
    fn offer(&mut self, ring: usize, request: &[u8], room: u32) {
        self.rings[ring].send(&self.memory, request, room);
    }

    /// What the device wrote to the first buffer of `ring` that it used.
    fn given(&mut self, ring: usize) -> Vec<u8> {
        let (_, length) = self.rings[ring].used(&self.memory).expect("a used buffer");
        let mut bytes = vec![0; length as usize];
        vm_memory::Bytes::read_slice(&self.memory, &mut bytes, GuestAddress(self.rings[ring].answer()))
            .expect("memory");
        bytes
    }

    fn say(&mut self, event: u16, value: u16) {
        self.offer(SAID, &Message::of(event, value), 0);
        self.process(Wake::Queue(SAID));
        self.rings[SAID].used(&self.memory).expect("it was taken");
    }
}

use vm_memory::GuestAddress;

#[test]
fn a_driver_is_told_of_the_port_and_its_name() {
    let mut guest = Guest::new();
    guest.say(DEVICE_READY, 1);
    guest.offer(TOLD, &[], 64);
    guest.process(Wake::Queue(TOLD));
    assert_eq!(guest.given(TOLD), Message::of(DEVICE_ADD, 1));
    guest.say(PORT_READY, 1);
    guest.offer(TOLD, &[], 64);
    guest.process(Wake::Queue(TOLD));
    assert!(guest.given(TOLD).ends_with(b"wire"));
    guest.offer(TOLD, &[], 64);
    guest.process(Wake::Queue(TOLD));
    assert_eq!(guest.given(TOLD), Message::of(PORT_OPEN, 1));
}

#[test]
fn bytes_go_both_ways_and_wait_until_the_port_is_open() {
    let mut guest = Guest::new();
    guest.host.write_all(b"hello").expect("a socket");
    guest.offer(RECEIVE, &[], 64);
    guest.process(Wake::Events);
    assert!(guest.rings[RECEIVE].used(&guest.memory).is_none(), "nobody holds it open");
    guest.say(PORT_OPEN, 1);
    assert_eq!(guest.given(RECEIVE), b"hello");
    guest.offer(TRANSMIT, b"answer", 0);
    guest.process(Wake::Queue(TRANSMIT));
    let mut heard = [0; 6];
    guest.host.read_exact(&mut heard).expect("an answer");
    assert_eq!(&heard, b"answer");
}

#[test]
fn room_stays_the_drivers_while_the_host_is_silent() {
    let mut guest = Guest::new();
    guest.say(PORT_OPEN, 1);
    guest.offer(RECEIVE, &[], 64);
    guest.process(Wake::Queue(RECEIVE));
    assert!(guest.rings[RECEIVE].used(&guest.memory).is_none());
    guest.host.write_all(b"x").expect("a socket");
    assert_eq!(guest.process(Wake::Events).interrupt, 1 << RECEIVE);
    assert_eq!(guest.given(RECEIVE), b"x");
}

#[test]
fn what_the_host_does_not_read_holds_the_guest_up_and_is_not_lost() {
    let mut guest = Guest::new();
    let piece = vec![7; 64 << 10];
    let mut sent = 0;
    while guest.device.unsent.is_empty() {
        guest.offer(TRANSMIT, &piece, 0);
        guest.process(Wake::Queue(TRANSMIT));
        guest.rings[TRANSMIT].used(&guest.memory).expect("it was taken");
        sent += piece.len();
    }
    guest.offer(TRANSMIT, &piece, 0);
    guest.process(Wake::Queue(TRANSMIT));
    assert!(guest.rings[TRANSMIT].used(&guest.memory).is_none(), "nothing more is taken");
    let (mut heard, mut buffer) = (0, vec![0; 1 << 20]);
    while heard < sent + piece.len() {
        match guest.host.read(&mut buffer) {
            Ok(count) => heard += count,
            Err(_) => drop(guest.process(Wake::Events)),
        }
    }
    assert_eq!(heard, sent + piece.len());
}

#[test]
fn a_host_that_hangs_up_is_told_once_and_wakes_nobody_again() {
    let mut guest = Guest::new();
    guest.say(PORT_OPEN, 1);
    guest.offer(RECEIVE, &[], 64);
    guest.process(Wake::Queue(RECEIVE));
    guest.host.shutdown(Shutdown::Both).expect("a socket");
    guest.process(Wake::Events);
    guest.offer(TOLD, &[], 64);
    guest.process(Wake::Queue(TOLD));
    assert_eq!(guest.given(TOLD), Message::of(PORT_OPEN, 0));
    let mut events = [epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    assert_eq!(epoll::wait(&guest.device.epoll, &mut events, Some(&at_once)).expect("epoll"), 0);
}

#[test]
fn the_last_words_of_a_guest_are_passed_on_before_the_end() {
    let mut guest = Guest::new();
    guest.offer(TRANSMIT, b"bye", 0);
    let Guest { memory, rings, device, host } = &mut guest;
    let mut queues: Vec<Option<&mut Queue>> = rings.iter_mut().map(|ring| Some(&mut ring.queue)).collect();
    device.finish(&mut queues, memory);
    let mut heard = Vec::new();
    host.set_nonblocking(false).expect("a socket");
    host.read_to_end(&mut heard).expect("its end");
    assert_eq!(heard, b"bye");
}

#[test]
fn a_frozen_port_is_open_again_and_one_in_use_is_not_frozen() {
    let mut guest = Guest::new();
    guest.say(PORT_OPEN, 1);
    let state = Device::<()>::freeze(&guest.device).expect("an idle device");
    let mut copy = Guest::new();
    Device::<()>::thaw(&mut copy.device, &state).expect("a state");
    assert!(copy.device.is_open);
    for bytes in [&[][..], &[2], &[0, 0]] {
        assert_eq!(Device::<()>::thaw(&mut copy.device, bytes), Err(StateError::Malformed));
    }
    guest.say(DEVICE_READY, 1);
    assert_eq!(Device::<()>::freeze(&guest.device), Err(StateError::InUse));
}

#[test]
fn nonsense_about_ports_does_no_harm_and_keeps_no_memory() {
    let mut guest = Guest::new();
    for number in 0..1000_u16 {
        guest.say(number % 12, number % 3);
        guest.offer(SAID, &[0xff; 3], 0);
        guest.process(Wake::Queue(SAID));
        guest.rings[SAID].used(&guest.memory).expect("it was taken");
    }
    assert!(guest.device.told.len() <= MOST_TOLD);
}
