//! Devices of machines that were stopped, or frozen and taken over: what only our own VMM does with the devices on its bus.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use kiln_virtio::balloon::Balloon;
use kiln_virtio::device::Device;
use kiln_virtio::rng::Rng;
use kiln_vmm::vm::Slot;

use crate::driven::{Driven, PATIENCE, POISON, VERSION_1};
use crate::fs::{fuse, on_a_bus, shared};
use crate::testkit::WRITE;
use crate::transports::{over_mmio, slot};

#[test]
fn what_a_guest_that_was_stopped_had_asked_for_is_served_no_more() {
    let (_host, share) = shared();
    let mut driven = on_a_bus(&share, !0);
    let device = driven.carried.clone().expect("over mmio");
    let look_up = fuse(1, 1, 1, b"s\0");
    assert_ne!(driven.ask(1, &look_up, 1000), b"broken");
    device.lock().expect("a whole lock").halt();
    driven.rings[1].offer(&driven.memory, 0);
    driven.notified[1].write(1).expect("a notification");
    std::thread::sleep(Duration::from_millis(200));
    device.lock().expect("a whole lock").finish();
    assert_eq!(driven.rings[1].used(&driven.memory), None);
    assert!(!(driven.broken)());
}

/// The device in `driven` as a machine that is frozen has it, taken over by `device` in the same memory. The guest does no more.
fn thawed<D: Device<()> + 'static>(driven: &Driven, device: D) -> (Slot, Arc<AtomicBool>) {
    let carried = driven.carried.as_ref().expect("over mmio");
    let state = carried.lock().expect("a whole lock").freeze().expect("a state");
    let (slot, ended) = slot(device, &driven.memory);
    slot.device.lock().expect("a whole lock").thaw(&state).expect("its state");
    (slot, ended)
}

#[test]
fn a_copy_interrupts_a_driver_that_was_interrupted_before_and_spares_others() {
    for was_served in [false, true] {
        let mut driven = over_mmio(Balloon::new(), VERSION_1, ());
        if was_served {
            driven.ask(2, b"", 4096);
        }
        let (slot, _ended) = thawed(&driven, Balloon::new());
        assert_eq!(slot.interrupt.read().is_ok(), was_served);
    }
}

#[test]
fn a_request_for_random_numbers_waits_for_a_copy() {
    let mut driven = over_mmio(Rng::silent(), VERSION_1, ());
    let room = driven.rings[0].answer();
    driven.write(room, &[POISON; 1024]);
    driven.rings[0].describe(&driven.memory, 0, (room, 64), WRITE, 0);
    driven.rings[0].offer(&driven.memory, 0);
    driven.notified[0].write(1).expect("a notification");
    let (_slot, _ended) = thawed(&driven, Rng::silent());
    assert_eq!(driven.rings[0].used(&driven.memory), None);
    assert_eq!(driven.read(room, 1024), [POISON; 1024]);
    let mut driven = over_mmio(Rng::silent(), VERSION_1, ());
    driven.rings[0].describe(&driven.memory, 0, (room, 64), WRITE, 0);
    driven.rings[0].offer(&driven.memory, 0);
    let (slot, _ended) = thawed(&driven, Rng::new());
    assert_eq!(driven.used(0), Some((0, 64)));
    let deadline = Instant::now() + PATIENCE;
    while slot.interrupt.read().is_err() {
        assert!(Instant::now() < deadline, "the driver is not told");
        std::thread::yield_now();
    }
    // With numbers in its guest's memory, it is no template.
    let state = slot.device.lock().expect("a whole lock").freeze();
    assert!(state.is_err());
}
