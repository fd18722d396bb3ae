use std::sync::{Arc, Mutex};

use super::*;
use crate::memory::{LEAST_BYTES, make_file, map};

const FEATURES: u64 = VERSION_1 | 1 << 29;

/// Notes what it is told.
#[derive(Clone, Default)]
struct Noted(Arc<Mutex<Vec<String>>>);

impl Noted {
    fn note(&self, text: String) {
        self.0.lock().expect("a whole lock").push(text);
    }

    fn taken(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().expect("a whole lock"))
    }
}

impl Target for Noted {
    fn device_type(&self) -> u32 {
        26
    }

    fn queue_sizes(&self) -> &[u16] {
        &[128, 256]
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn config(&self) -> &[u8] {
        b"config"
    }

    fn connect(&mut self, _: Lines) -> io::Result<()> {
        Ok(())
    }

    fn start(&mut self, features: u64, queues: &[Option<Queue>]) -> io::Result<()> {
        let sizes: Vec<_> = queues.iter().map(|queue| queue.map(|queue| queue.size)).collect();
        self.note(format!("start {features:#x} {sizes:?}"));
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        self.note("stop".to_owned());
        Ok(())
    }

    fn freeze(&mut self) -> Result<Frozen, StateError> {
        let positions = vec![None, Some(Position { available: 3, used: 2 })];
        Ok(Frozen { positions, device: vec![9], has_interrupted: true })
    }

    fn thaw(&mut self, features: u64, queues: &[Option<Queue>], frozen: &Frozen) -> io::Result<()> {
        let sizes: Vec<_> = queues.iter().map(|queue| queue.map(|queue| queue.size)).collect();
        self.note(format!("thaw {features:#x} {sizes:?} {:?}", frozen.device));
        Ok(())
    }

    fn finish(&mut self) {
        self.note("finish".to_owned());
    }
}

struct Driver {
    device: Arc<Mutex<dyn Carried>>,
    interrupt: EventFd,
}

impl Driver {
    fn new(target: Noted) -> Self {
        let memory = map(&make_file(LEAST_BYTES).expect("memory"), LEAST_BYTES).expect("a mapping");
        let slot = Registers::slot(target, &memory).expect("registers");
        Self { device: slot.device, interrupt: slot.interrupt }
    }

    fn get(&self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.device.lock().expect("a whole lock").read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    fn set(&self, offset: u64, value: u32) {
        self.device.lock().expect("a whole lock").write(offset, &value.to_le_bytes());
    }

    fn negotiate(&self, features: u64) {
        self.set(0x70, 3);
        for page in [0, 1] {
            self.set(0x24, page);
            self.set(0x20, half(features, page));
        }
        self.set(0x70, 3 | FEATURES_OK);
    }

    fn lay_out(&self, queue: u32, size: u32, [descriptors, available, used]: [u32; 3]) {
        self.set(0x30, queue);
        self.set(0x38, size);
        self.set(0x80, descriptors);
        self.set(0x90, available);
        self.set(0xa0, used);
        self.set(0x44, 1);
    }
}

const RINGS: [u32; 3] = [0x10_0000, 0x11_0000, 0x12_0000];

#[test]
fn a_driver_that_does_as_it_should_is_served_until_it_resets() {
    let noted = Noted::default();
    let driver = Driver::new(noted.clone());
    assert_eq!([0, 4, 8].map(|offset| driver.get(offset)), [MAGIC, 2, 26]);
    driver.negotiate(FEATURES);
    assert_eq!(driver.get(0x70), 3 | FEATURES_OK);
    driver.lay_out(1, 256, RINGS);
    driver.set(0x70, 3 | FEATURES_OK | DRIVER_OK);
    assert_eq!(noted.taken(), ["start 0x120000000 [None, Some(256)]"]);
    driver.set(0x70, 0);
    assert_eq!(noted.taken(), ["stop"]);
    assert_eq!((driver.get(0x70), driver.get(0x44)), (0, 0));
}

#[test]
fn features_that_were_not_offered_or_are_too_old_are_not_agreed_to() {
    for features in [0, 1 << 29, FEATURES | 1, FEATURES | 1 << 33] {
        let driver = Driver::new(Noted::default());
        driver.negotiate(features);
        assert_eq!(driver.get(0x70) & FEATURES_OK, 0, "{features:#x}");
    }
}

#[test]
fn a_driver_that_does_not_keep_the_order_is_not_served() {
    let ok = FEATURES_OK | DRIVER_OK;
    // What is written to the status, one after the other, and what it is then.
    let orders: [(&[u32], u32); 8] = [
        (&[15], 3),
        (&[2], 0),
        (&[8, 4, 12], 0),
        (&[1, 9, 13], 1),
        (&[3, 7, 7], 3),
        (&[NEEDS_RESET, 3], 3),
        (&[0x83, 0x83 | FEATURES_OK, 0x83 | ok], 0x8b),
        (&[u32::MAX], 0x83),
    ];
    for (writes, status) in orders {
        let noted = Noted::default();
        let driver = Driver::new(noted.clone());
        for value in writes {
            driver.set(0x70, *value);
            // Features are there to be agreed on in each case where the driver may say them.
            for page in [0, 1] {
                driver.set(0x24, page);
                driver.set(0x20, half(FEATURES, page));
            }
        }
        assert_eq!(driver.get(0x70), status, "{writes:x?}");
        assert!(noted.taken().is_empty(), "{writes:x?}");
    }
}

#[test]
fn features_and_queues_are_said_when_it_is_their_turn() {
    let driver = Driver::new(Noted::default());
    // Features before there is a driver, and a queue before features are agreed on, are not heard.
    driver.set(0x24, 1);
    driver.set(0x20, 1);
    driver.set(0x70, 3);
    driver.lay_out(1, 256, RINGS);
    assert_eq!(driver.get(0x44), 0);
    driver.set(0x70, 3 | FEATURES_OK);
    assert_eq!(driver.get(0x70), 3, "no feature was said");
    driver.negotiate(FEATURES);
    // What was agreed on stays, and bits are not taken back.
    driver.set(0x24, 0);
    driver.set(0x20, u32::MAX);
    driver.set(0x70, 1);
    assert_eq!(driver.get(0x70), 3 | FEATURES_OK);
    driver.lay_out(1, 256, RINGS);
    assert_eq!(driver.get(0x44), 1);
}

#[test]
fn a_queue_that_cannot_be_served_is_answered_with_needs_reset() {
    let end = u32::try_from(LEAST_BYTES).expect("a small machine");
    let [descriptors, available, used] = RINGS;
    let cases = [
        (512, RINGS),
        (0, RINGS),
        (100, RINGS),
        (u32::MAX, RINGS),
        (256, [descriptors + 8, available, used]),
        (256, [descriptors, available + 1, used]),
        (256, [descriptors, available, used + 2]),
        (256, [end - 16, available, used]),
        (256, [descriptors, end, used]),
        (256, [descriptors, available, 0xffff_fffc]),
    ];
    for (size, rings) in cases {
        let noted = Noted::default();
        let driver = Driver::new(noted.clone());
        driver.negotiate(FEATURES);
        driver.lay_out(1, size, rings);
        driver.set(0x70, 3 | FEATURES_OK | DRIVER_OK);
        assert_eq!(driver.get(0x70) & NEEDS_RESET, NEEDS_RESET, "{size} {rings:x?}");
        assert_eq!(driver.get(0x60) & CONFIGURATION, CONFIGURATION);
        assert_eq!(driver.interrupt.read().expect("an interrupt"), 1);
        assert!(noted.taken().is_empty());
    }
}

#[test]
fn nothing_changes_under_a_queue_that_is_served() {
    let noted = Noted::default();
    let driver = Driver::new(noted.clone());
    driver.negotiate(FEATURES);
    driver.lay_out(1, 256, RINGS);
    driver.set(0x70, 15);
    driver.lay_out(0, 128, RINGS);
    driver.set(0x70, 15);
    assert_eq!(noted.taken().len(), 1, "it was started once");
    assert_eq!(driver.get(0x44), 0);
}

#[test]
fn the_configuration_is_read_in_pieces_of_any_width_and_ends() {
    let driver = Driver::new(Noted::default());
    let mut bytes = [0; 8];
    driver.device.lock().expect("a whole lock").read(CONFIG, &mut bytes);
    assert_eq!(&bytes, b"config\0\0");
    let mut byte = [9];
    driver.device.lock().expect("a whole lock").read(CONFIG + 5, &mut byte);
    assert_eq!(&byte, b"g");
    assert_eq!(driver.get(0xffc), 0);
}

#[test]
fn a_driver_that_writes_anything_anywhere_starts_nothing_that_does_not_lie_in_memory() {
    let noted = Noted::default();
    let driver = Driver::new(noted.clone());
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..100_000 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let width = [1, 2, 4, 4, 4, 8][usize::try_from(state % 6).expect("small")];
        let offset = (state >> 8) % 0x120;
        let bytes = (state >> 16).to_le_bytes();
        driver.device.lock().expect("a whole lock").write(offset, &bytes[..width]);
        driver.device.lock().expect("a whole lock").read(offset, &mut [0; 8][..width]);
    }
    driver.set(0x70, 0);
    assert_eq!(driver.get(0x70), 0);
}

#[test]
fn a_frozen_device_goes_on_with_what_its_driver_said() {
    let noted = Noted::default();
    let driver = Driver::new(noted.clone());
    driver.negotiate(FEATURES);
    driver.lay_out(1, 256, RINGS);
    driver.set(0x70, 3 | FEATURES_OK | DRIVER_OK);
    noted.taken();
    let state = driver.device.lock().expect("a whole lock").freeze().expect("a state");
    let copy = Driver::new(noted.clone());
    copy.device.lock().expect("a whole lock").thaw(&state).expect("its state");
    assert_eq!(noted.taken(), ["thaw 0x120000000 [None, Some(256)] [9]"]);
    assert_eq!(copy.get(0x70), driver.get(0x70));
    copy.set(0x70, 0);
    assert_eq!(noted.taken(), ["stop"]);
}

#[test]
fn a_device_that_no_driver_runs_is_frozen_as_it_is() {
    let noted = Noted::default();
    let driver = Driver::new(noted.clone());
    driver.negotiate(FEATURES);
    let state = driver.device.lock().expect("a whole lock").freeze().expect("a state");
    let copy = Driver::new(noted.clone());
    copy.device.lock().expect("a whole lock").thaw(&state).expect("its state");
    assert_eq!((copy.get(0x70), noted.taken().len()), (3 | FEATURES_OK, 0));
    copy.device.lock().expect("a whole lock").finish();
    assert_eq!(noted.taken(), ["finish"], "also without a driver");
}

#[test]
fn the_state_of_another_device_is_refused() {
    let noted = Noted::default();
    let driver = Driver::new(noted.clone());
    driver.negotiate(FEATURES);
    let state = driver.device.lock().expect("a whole lock").freeze().expect("a state");
    let changes: [fn(&mut DeviceState); 3] = [
        |state| state.device_type = 2,
        |state| state.registers.accepted |= 1,
        |state| state.registers.queues.truncate(1),
    ];
    for change in changes {
        let mut state = state.clone();
        change(&mut state);
        assert!(driver.device.lock().expect("a whole lock").thaw(&state).is_err());
    }
}
