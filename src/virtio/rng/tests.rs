use std::collections::BTreeSet;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::testkit::{NEXT, Ring, WRITE, memory};

const POISON: u8 = 0xa5;

struct Guest {
    memory: GuestMemoryMmap,
    ring: Ring,
    device: Rng,
}

impl Guest {
    fn new(device: Rng) -> Self {
        Self { memory: memory(), ring: Ring::new(0, 16), device }
    }

    fn process(&mut self) -> Outcome {
        self.device
            .process(Wake::Queue(0), &mut [Some(&mut self.ring.queue)], &self.memory)
            .expect("a good ring")
    }

    /// Offers `room` bytes at the ring's place for data, which are poison before.
    fn offer(&mut self, room: u32) {
        self.memory.write_slice(&[POISON; 4096], GuestAddress(self.ring.data())).expect("memory");
        self.ring.describe(&self.memory, 0, (self.ring.data(), room), WRITE, 0);
        self.ring.offer(&self.memory, 0);
    }

    fn data(&self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(self.ring.data())).expect("memory");
        bytes
    }
}

#[test]
fn each_request_gets_other_numbers_and_nothing_is_written_behind_them() {
    let mut guest = Guest::new(Rng::new());
    let mut seen = BTreeSet::new();
    for _ in 0..100 {
        guest.offer(64);
        assert_eq!(guest.process().interrupt, 1);
        assert_eq!(guest.ring.used(&guest.memory), Some((0, 64)));
        let bytes = guest.data(128);
        assert_eq!(bytes[64..], [POISON; 64]);
        assert!(seen.insert(bytes[..64].to_vec()));
    }
}

#[test]
fn all_bytes_of_the_room_are_random() {
    let mut guest = Guest::new(Rng::new());
    // Each byte is something else than at first in one of these, but for once in 2^240 runs.
    let mut changed = [false; MOST_BYTES];
    for _ in 0..30 {
        guest.offer(u32::try_from(MOST_BYTES).expect("few"));
        guest.process();
        guest.ring.used(&guest.memory).expect("it was taken");
        for (changed, byte) in changed.iter_mut().zip(guest.data(MOST_BYTES)) {
            *changed |= byte != POISON;
        }
    }
    assert_eq!(changed, [true; MOST_BYTES]);
}

#[test]
fn more_room_than_a_request_may_ask_for_is_filled_as_far() {
    let mut guest = Guest::new(Rng::new());
    for (room, given) in [(1, 1), (255, 255), (256, 256), (257, 256), (1 << 20, 256), (1 << 21, 0), (0, 0)] {
        guest.offer(room);
        guest.process();
        assert_eq!(guest.ring.used(&guest.memory), Some((0, given)), "room for {room}");
        assert_eq!(guest.data(4096)[given as usize..], [POISON; 4096][given as usize..]);
    }
}

#[test]
fn room_behind_what_is_to_be_read_gets_nothing() {
    let mut guest = Guest::new(Rng::new());
    guest.offer(64);
    guest.ring.describe(&guest.memory, 0, (guest.ring.data(), 8), NEXT, 1);
    guest.ring.describe(&guest.memory, 1, (guest.ring.data() + 8, 8), WRITE, 0);
    guest.process();
    assert_eq!(guest.ring.used(&guest.memory), Some((0, 0)));
    assert_eq!(guest.data(64), [POISON; 64]);
}

#[test]
fn a_round_ends_with_what_the_queue_holds() {
    let mut guest = Guest::new(Rng::new());
    for _ in 0..16 {
        guest.offer(8);
    }
    let outcome = guest.process();
    assert!(outcome.again, "a driver that offers on and on lets others have their turn");
    assert!(!guest.process().again);
}

#[test]
fn a_silent_device_gives_nothing_that_copies_could_share_and_each_copy_gets_its_own() {
    let mut template = Guest::new(Rng::silent());
    template.offer(64);
    assert_eq!(template.process(), Outcome::default());
    assert_eq!(template.ring.used(&template.memory), None);
    assert_eq!(template.data(64), [POISON; 64]);
    let state = Device::<()>::freeze(&template.device).expect("a device that gave nothing");
    let (available, used) = (template.ring.queue.next_avail(), template.ring.queue.next_used());
    let mut numbers = BTreeSet::new();
    for _ in 0..2 {
        // The copy has the memory of before, and goes on where the queue was.
        let mut copy = Guest::new(Rng::new());
        copy.offer(64);
        Device::<()>::thaw(&mut copy.device, &state).expect("a state");
        copy.ring.queue.set_next_avail(available);
        copy.ring.queue.set_next_used(used);
        assert_eq!(copy.process().interrupt, 1);
        assert_eq!(copy.ring.used(&copy.memory), Some((0, 64)));
        assert!(numbers.insert(copy.data(64)));
    }
}

#[test]
fn a_device_that_has_given_numbers_is_not_frozen_also_when_its_driver_is_gone() {
    let mut guest = Guest::new(Rng::new());
    assert_eq!(Device::<()>::freeze(&guest.device), Ok(Vec::new()));
    guest.offer(8);
    guest.process();
    assert_eq!(Device::<()>::freeze(&guest.device), Err(StateError::InUse));
    Device::<()>::reset(&mut guest.device);
    assert_eq!(Device::<()>::freeze(&guest.device), Err(StateError::InUse));
    assert_eq!(Device::<()>::thaw(&mut guest.device, &[0]), Err(StateError::Malformed));
}
