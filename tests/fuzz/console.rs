//! The console device: chains and messages of a hostile driver, room or none, and a host that speaks, reads, is slow and hangs
//! up meanwhile.
//!
//! An input is [`steps`].

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use kiln_virtio::console::Console;
use kiln_virtio::device::{Device, Wake};
use kiln_virtio::ring::Limits;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::chains::{Arena, Queue, pieces};
use crate::driver::{Seen, Target, campaign};
use crate::random::Random;
use crate::steps;

/// Most steps of one input that are done.
const MOST_STEPS: usize = 64;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const TOLD: usize = 2;
const SAID: usize = 3;
const LIMITS: Limits = Limits { readable_bytes: 128 << 10, writable_bytes: 128 << 10, slices: 64 };
/// Messages that the device keeps for a driver that has no room.
const MOST_TOLD: usize = 16;
const NAME: &str = "wire";
/// Pieces in the arena: room of a page, and pages to be read; and a message that opens the port.
const A_PAGE: [u8; 4] = [1, 0, 0, 16];
const EIGHT_PAGES: [u8; 4] = [0x10, 0, 8, 0];
const OPEN: [u8; 8] = [0, 0, 0, 0, 6, 0, 1, 0];

/// What the host has written that the guest has not, and the other way round.
struct Streams {
    to_guest: VecDeque<u8>,
    to_host: VecDeque<u8>,
}

/// A driver of the device, and the host.
struct Guest<'a> {
    arena: &'a mut Arena,
    streams: &'a mut Streams,
    queues: [Queue; 4],
    device: Console,
    host: UnixStream,
    /// Messages that the driver is owed.
    told: VecDeque<Vec<u8>>,
    is_open: bool,
    /// The host writes no more, so whatever is sent to it may be lost.
    hung_up: bool,
    /// The driver sent descriptors as they came, so that nobody knows what it said.
    blind: bool,
}

fn message(event: u8, value: u8) -> Vec<u8> {
    vec![0, 0, 0, 0, event, 0, value, 0]
}

impl Guest<'_> {
    /// Lets the device work; false where the driver has broken a queue.
    fn process(&mut self, wake: Wake, seen: &mut Seen) -> bool {
        for round in 0.. {
            assert!(round < 1000, "the device has no end of things to do");
            let mut queues = self.queues.each_mut().map(|queue| Some(&mut queue.ring.queue));
            let Ok(outcome) = self.device.process(wake, &mut queues, &self.arena.memory) else {
                return false;
            };
            self.arena.check_guards();
            if !self.blind {
                let came_back = self.take_all(seen);
                assert_eq!(outcome.interrupt, came_back, "the driver is told of what came back");
            }
            if !outcome.again {
                break;
            }
        }
        true
    }

    /// Takes what came back, in the order in which the device does it, and gives the queues that it came back in.
    fn take_all(&mut self, seen: &mut Seen) -> u64 {
        let mut came_back = 0;
        while let Some((offered, written)) = self.queues[SAID].used(self.arena) {
            came_back |= 1 << SAID;
            assert_eq!(written, 0);
            if offered.is_good
                && let Some(said) = offered.content(self.arena).first_chunk()
            {
                self.hear(*said, seen);
            }
        }
        while let Some((offered, written)) = self.queues[TRANSMIT].used(self.arena) {
            came_back |= 1 << TRANSMIT;
            assert_eq!(written, 0);
            if offered.is_good {
                self.streams.to_host.extend(offered.content(self.arena));
            }
            seen.note(2 << 16 | u64::from(offered.is_good) << 8 | offered.readable.len().min(3) as u64);
        }
        seen.note(6 << 16 | u64::from(self.queues[TRANSMIT].pending.is_empty()));
        let mut changed = false;
        while let Some((offered, written)) = self.queues[RECEIVE].used(self.arena) {
            came_back |= 1 << RECEIVE;
            assert!(self.is_open, "nothing comes through a port that nobody holds open");
            let room = if offered.is_good { offered.room_bytes() } else { 0 };
            assert!(written <= room && (written > 0 || room == 0), "{written} of {room}");
            assert!(written <= self.streams.to_guest.len(), "the host has not said so much");
            self.arena.expect(&offered.room, &self.streams.to_guest.make_contiguous()[..written]);
            self.streams.to_guest.drain(..written);
            changed |= written > 0;
            seen.note(3 << 16 | u64::from(written == room) << 8 | offered.room.len().min(3) as u64);
        }
        while let Some((offered, written)) = self.queues[TOLD].used(self.arena) {
            came_back |= 1 << TOLD;
            // When the host's end was noticed among the others is not known.
            if !self.hung_up {
                let told = self.told.pop_front().expect("nothing is told that is not owed");
                let fits = offered.is_good && offered.room_bytes() >= told.len();
                assert_eq!(written, if fits { told.len() } else { 0 });
                self.arena.expect(&offered.room, &told[..written]);
            } else {
                assert!(written <= 8 + NAME.len());
                self.arena.accept(&offered.room, written);
            }
            changed |= written > 0;
            seen.note(4 << 16 | written as u64);
        }
        self.arena.check();
        if changed && self.queues.iter().all(|queue| queue.pending.is_empty()) {
            self.arena.restore();
        }
        came_back
    }

    /// What the device does about a message (virtio 1.3 §5.3.6.2).
    fn hear(&mut self, said: [u8; 8], seen: &mut Seen) {
        let [port @ .., event, event_high, value, value_high] = said;
        let answers = match (port, [event, event_high], [value, value_high]) {
            (_, [0, 0], [1, 0]) => vec![message(1, 1)],
            ([0, 0, 0, 0], [3, 0], [1, 0]) => {
                vec![[&message(7, 1)[..], NAME.as_bytes()].concat(), message(6, 1)]
            }
            ([0, 0, 0, 0], [6, 0], value) => {
                self.is_open = value == [1, 0];
                Vec::new()
            }
            _ => Vec::new(),
        };
        seen.note(1 << 16 | u64::from(event.min(8)) << 8 | answers.len() as u64);
        self.told.extend(answers);
        self.told.truncate(MOST_TOLD);
    }

    /// The host reads up to `most` bytes, which are what the guest sent next.
    fn read(&mut self, most: usize) -> usize {
        let (mut buffer, mut total) = ([0; 8192], 0);
        while total < most {
            let room = buffer.len().min(most - total);
            let Ok(count @ 1..) = self.host.read(&mut buffer[..room]) else { break };
            if !self.blind {
                assert!(count <= self.streams.to_host.len(), "the guest has not said so much");
                assert!(self.streams.to_host.make_contiguous()[..count] == buffer[..count], "in order");
                self.streams.to_host.drain(..count);
            }
            total += count;
        }
        total
    }

    fn step(&mut self, (action, argument, bytes): steps::Step<'_>, seen: &mut Seen) -> bool {
        let index = usize::from(argument) % self.queues.len();
        match action % 16 {
            0..=3 => self.queues[index].offer(self.arena, bytes, LIMITS),
            // With the next.
            4 => {
                self.queues[index].offer(self.arena, bytes, LIMITS);
                return true;
            }
            5..=7 => self.queues[SAID].send(self.arena, &bytes[..bytes.len().min(16)]),
            8 => self.queues[TRANSMIT].send(self.arena, &bytes[..bytes.len().min(2048)]),
            9 | 10 if !self.hung_up => {
                let bytes = bytes.repeat(if argument % 8 == 7 { 100 } else { 1 });
                // A full socket takes less.
                let count = self.host.write(&bytes).unwrap_or(0);
                self.streams.to_guest.extend(&bytes[..count]);
            }
            11 | 12 => {
                self.read(usize::from(argument) << 10);
            }
            13 => return self.process(Wake::Events, seen),
            14 if argument < 16 => {
                // Of what the device kept nobody hears any more.
                self.read(usize::MAX);
                self.streams.to_host.clear();
                Device::<()>::reset(&mut self.device);
                self.told.clear();
                self.is_open = false;
                self.queues = [0, 1, 2, 3].map(|number| Queue::new(number, self.arena));
            }
            15 if argument < 8 => {
                let how = [Shutdown::Write, Shutdown::Both][usize::from(argument) % 2];
                let _ = self.host.shutdown(how);
                self.hung_up = true;
            }
            15 if argument < 24 => {
                self.blind = true;
                self.queues[index].offer_blindly(self.arena, bytes);
            }
            15 if argument < 28 => {
                let index_to = bytes.first_chunk().map_or(0, |bytes| u16::from_le_bytes(*bytes));
                self.blind = true;
                self.queues[index].ring.set_available(&self.arena.memory, index_to);
            }
            _ => {}
        }
        self.process(Wake::Queue(index), seen)
    }

    /// Whether the device wants to be called.
    fn has_events(&self) -> bool {
        let events = Device::<()>::events(&self.device).unwrap_or(self.host.as_fd());
        let mut wait = [PollFd::from_borrowed_fd(events, PollFlags::IN)];
        poll(&mut wait, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|count| count > 0)
    }

    /// With a host that reads and a driver that has room, all that was said arrives, the last words too.
    fn finish(mut self, seen: &mut Seen) {
        if !self.process(Wake::Queue(TRANSMIT), seen) || self.blind || self.hung_up {
            return;
        }
        self.read(usize::MAX);
        while self.has_events() {
            self.process(Wake::Events, seen);
            self.read(usize::MAX);
        }
        assert!(self.streams.to_host.is_empty(), "{} bytes are kept", self.streams.to_host.len());
        assert!(self.queues[TRANSMIT].pending.is_empty(), "a chain is kept");
        self.queues[SAID].send(self.arena, &OPEN);
        self.process(Wake::Queue(SAID), seen);
        while !self.streams.to_guest.is_empty() {
            let before = self.streams.to_guest.len();
            self.queues[RECEIVE].offer(self.arena, &A_PAGE, LIMITS);
            self.process(Wake::Queue(RECEIVE), seen);
            assert!(self.streams.to_guest.len() < before, "{before} bytes are kept");
        }
        self.queues[RECEIVE].offer(self.arena, &A_PAGE, LIMITS);
        self.process(Wake::Queue(RECEIVE), seen);
        self.streams.to_guest.push_back(7);
        assert_eq!(self.host.write(&[7]).ok(), Some(1));
        assert!(self.has_events(), "the host is listened to");
        self.process(Wake::Events, seen);
        assert!(self.streams.to_guest.is_empty(), "the last byte is kept");

        let last_words = b"and that was all";
        self.queues[TRANSMIT].send(self.arena, last_words);
        self.streams.to_host.extend(last_words);
        let mut queues = self.queues.each_mut().map(|queue| Some(&mut queue.ring.queue));
        self.device.finish(&mut queues, &self.arena.memory);
        self.read(usize::MAX);
        assert!(self.streams.to_host.is_empty(), "the last words are kept");
    }
}

struct Port {
    arena: Arena,
    streams: Streams,
}

impl Target for Port {
    const NAME: &'static str = "console";

    fn new() -> Self {
        // With room for all that a socket and the device can hold, so that it is not the model that is measured.
        let [to_guest, to_host] = [(); 2].map(|()| VecDeque::with_capacity(1 << 20));
        Self { arena: Arena::new(), streams: Streams { to_guest, to_host } }
    }

    fn generate(&mut self, random: &mut Random, input: &mut Vec<u8>) {
        if !random.once_in(4) {
            steps::push(input, 5, 0, &OPEN);
        }
        // More than a socket takes whose host does not read.
        for _ in 0..if random.once_in(6) { random.below(6) } else { 0 } {
            steps::push(input, 0, 1, &EIGHT_PAGES.repeat(4));
        }
        for _ in 0..=random.below(16) {
            let action = random.byte() % 16;
            let argument = random.byte();
            let (readable, room) = match usize::from(argument) % 4 {
                RECEIVE | TOLD => (random.below(2), 1 + random.below(6)),
                _ => (random.below(8), random.below(2)),
            };
            let bytes = match action {
                0..=4 => pieces(random, readable, room),
                5..=7 => {
                    let (port, event) =
                        (random.pick(&[0, 0, 0, 0, 1]), random.pick(&[0, 3, 3, 6, 6, 6, 1, 7]));
                    let said = [port, 0, 0, 0, event, 0, random.pick(&[0, 1, 1, 1, 1, 2]), 0];
                    said[..if random.once_in(12) { 5 } else { 8 }].to_vec()
                }
                8..=10 => {
                    let length = random.pick(&[1, 10, 1000, 1500]);
                    random.bytes(length)
                }
                15 => random.bytes(48),
                _ => Vec::new(),
            };
            steps::push(input, action, argument, &bytes);
        }
    }

    fn parts(input: &[u8]) -> Vec<usize> {
        steps::ends(input)
    }

    fn run(&mut self, input: &[u8], seen: &mut Seen) {
        let (host, stream) = UnixStream::pair().expect("a pair");
        host.set_nonblocking(true).expect("a socket");
        let Self { arena, streams } = self;
        arena.restore();
        streams.to_guest.clear();
        streams.to_host.clear();
        let queues = [0, 1, 2, 3].map(|number| Queue::new(number, arena));
        let device = Console::new(NAME, stream).expect("descriptors");
        let told = VecDeque::new();
        let (is_open, hung_up, blind) = (false, false, false);
        let mut guest = Guest { arena, streams, queues, device, host, told, is_open, hung_up, blind };
        let mut rest = input;
        for _ in 0..MOST_STEPS {
            let Some((step, behind)) = steps::next(rest) else { break };
            rest = behind;
            if !guest.step(step, seen) {
                return seen.note(5 << 16);
            }
        }
        guest.finish(seen);
    }

    fn memory_limit(_: usize) -> usize {
        // What the device holds of the guest's, twice while it is copied out and again in the model; the arena once more
        // where it is looked at; and what the host writes at a time.
        4 * LIMITS.readable_bytes + (512 << 10)
    }
}

#[test]
fn no_driver_and_no_host_break_the_console() {
    campaign::<Port>();
}
