//! Devices that take nothing but room: the source of random numbers, and the balloon's reports of free memory.
//!
//! An input is [`steps`].

use std::marker::PhantomData;

use kiln_virtio::balloon::Balloon;
use kiln_virtio::device::{Device, Wake};
use kiln_virtio::ring::Limits;
use kiln_virtio::rng::Rng;

use crate::chains::{Arena, Offered, Queue, pieces};
use crate::driver::{Seen, Target, campaign};
use crate::random::Random;
use crate::steps;

/// Most steps of one input that are done.
const MOST_STEPS: usize = 48;
/// Most numbers for one request.
const MOST_NUMBERS: usize = 256;
/// The first of the balloon's queues that is for reports.
const FIRST_OF_REPORTS: usize = 2;

/// What is held against a device.
trait Oracle: Device<()> {
    const NAME: &'static str;
    const LIMITS: Limits;
    /// One that nothing was said to.
    fn fresh() -> Self;
    /// A chain came back from `queue`; the arena has to be as that leaves it.
    fn came_back(arena: &mut Arena, queue: usize, offered: &Offered, written: usize, seen: &mut Seen);
}

impl Oracle for Rng {
    const NAME: &'static str = "rng";
    const LIMITS: Limits = Limits { readable_bytes: 0, writable_bytes: 1 << 20, slices: 64 };

    fn fresh() -> Self {
        Self::new()
    }

    fn came_back(arena: &mut Arena, _: usize, offered: &Offered, written: usize, seen: &mut Seen) {
        let wanted = if offered.is_good { offered.room_bytes().min(MOST_NUMBERS) } else { 0 };
        assert_eq!(written, wanted, "all the room up to the most");
        let differs = arena.accept(&offered.room, written);
        // That 16 bytes are those that were there is as likely as a key that is guessed.
        assert!(differs || written < 16, "the numbers are there");
        let how_much = u64::from(written > 0) + u64::from(written == MOST_NUMBERS);
        seen.note(u64::from(offered.is_good) << 16 | how_much << 8 | offered.room.len() as u64);
    }
}

impl Oracle for Balloon {
    const NAME: &'static str = "balloon";
    const LIMITS: Limits = Limits { readable_bytes: 4096, writable_bytes: 128 << 20, slices: 128 };

    fn fresh() -> Self {
        Self::new()
    }

    fn came_back(arena: &mut Arena, queue: usize, offered: &Offered, written: usize, seen: &mut Seen) {
        assert_eq!(written, 0, "nothing is written that a driver could read");
        let is_report = offered.is_good && queue >= FIRST_OF_REPORTS;
        if is_report {
            arena.expect_gone(&offered.room);
        }
        seen.note(u64::from(is_report) << 8 | u64::from(offered.is_good) << 7 | offered.room.len() as u64);
    }
}

/// A driver of such a device.
struct Guest<'a, D> {
    arena: &'a mut Arena,
    device: D,
    queues: Vec<Queue>,
    /// The driver sent descriptors as they came, so that nobody knows what it said.
    blind: bool,
}

impl<D: Oracle> Guest<'_, D> {
    /// Lets the device work; false where the driver has broken a queue.
    fn process(&mut self, queue: usize, seen: &mut Seen) -> bool {
        for round in 0.. {
            assert!(round < 1000, "the device has no end of things to do");
            let mut queues: Vec<_> =
                self.queues.iter_mut().map(|queue| Some(&mut queue.ring.queue)).collect();
            let Ok(outcome) = self.device.process(Wake::Queue(queue), &mut queues, &self.arena.memory) else {
                return false;
            };
            self.arena.check_guards();
            let mut came_back = 0_u64;
            while !self.blind
                && let Some((offered, written)) = self.queues[queue].used(self.arena)
            {
                D::came_back(self.arena, queue, &offered, written, seen);
                came_back = 1;
            }
            if !self.blind {
                assert_eq!(outcome.interrupt, came_back << queue, "the driver is told of what came back");
                self.arena.check();
                if came_back > 0 {
                    self.arena.restore();
                }
            }
            if !outcome.again {
                break;
            }
        }
        assert!(self.blind || self.queues[queue].pending.is_empty(), "all that was offered comes back");
        true
    }

    fn step(&mut self, (action, argument, bytes): steps::Step<'_>, seen: &mut Seen) -> bool {
        let index = usize::from(argument) % self.queues.len();
        let queue = &mut self.queues[index];
        match action % 16 {
            0..=8 => queue.offer(self.arena, bytes, D::LIMITS),
            // With the next.
            9 | 10 => {
                queue.offer(self.arena, bytes, D::LIMITS);
                return true;
            }
            11 => self.device.reset(),
            12 | 13 => {
                self.blind = true;
                queue.offer_blindly(self.arena, bytes);
            }
            14 => queue.send(self.arena, &bytes[..bytes.len().min(1024)]),
            _ => {
                let index = bytes.first_chunk().map_or(0, |bytes| u16::from_le_bytes(*bytes));
                self.blind = true;
                queue.ring.set_available(&self.arena.memory, index);
            }
        }
        self.process(index, seen)
    }
}

fn run<D: Oracle>(arena: &mut Arena, device: D, input: &[u8], seen: &mut Seen) {
    arena.restore();
    let queues = (0..).take(device.queue_sizes().len()).map(|number| Queue::new(number, arena)).collect();
    let mut guest = Guest { arena, device, queues, blind: false };
    let mut rest = input;
    for _ in 0..MOST_STEPS {
        let Some((step, behind)) = steps::next(rest) else { break };
        rest = behind;
        if !guest.step(step, seen) {
            return seen.note(1 << 32);
        }
    }
    for index in 0..guest.queues.len() {
        guest.process(index, seen);
    }
}

fn generate(random: &mut Random, input: &mut Vec<u8>) {
    for _ in 0..=random.below(8) {
        let action = if random.once_in(12) { random.byte() } else { random.byte() % 11 };
        let readable = if random.once_in(4) { random.below(3) } else { 0 };
        let room = random.below(9);
        let bytes = match action % 16 {
            12 | 13 => random.bytes(64),
            14 | 15 => random.bytes(2),
            _ => pieces(random, readable, room),
        };
        steps::push(input, action, random.byte(), &bytes);
    }
}

/// Chains that are walked, and the arena once more where it is looked at.
const MEMORY_LIMIT: usize = 512 << 10;

/// The target of such a device.
struct Rooms<D> {
    arena: Arena,
    device: PhantomData<D>,
}

impl<D: Oracle> Target for Rooms<D> {
    const NAME: &'static str = D::NAME;

    fn new() -> Self {
        Self { arena: Arena::new(), device: PhantomData }
    }

    fn parts(input: &[u8]) -> Vec<usize> {
        steps::ends(input)
    }

    fn generate(&mut self, random: &mut Random, input: &mut Vec<u8>) {
        generate(random, input);
    }

    fn run(&mut self, input: &[u8], seen: &mut Seen) {
        run(&mut self.arena, D::fresh(), input, seen);
    }

    fn memory_limit(_: usize) -> usize {
        MEMORY_LIMIT
    }
}

mod rng {
    #[test]
    fn no_driver_gets_random_numbers_but_in_its_room() {
        super::campaign::<super::Rooms<super::Rng>>();
    }
}

mod balloon {
    #[test]
    fn no_report_gives_back_but_whole_pages_of_its_own() {
        super::campaign::<super::Rooms<super::Balloon>>();
    }
}
