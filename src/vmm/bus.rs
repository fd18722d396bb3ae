//! Which device an address belongs to. Devices take windows of addresses that do not overlap; what no device has reads
//! as ones, and writes to it go nowhere, as on a bus of real wires.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// What a guest does by touching an address may end its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// It runs on.
    Nothing,
    /// It is switched off.
    PowerOff,
    /// It starts again.
    Reset,
}

/// A window of registers. Offsets are below its length, and data are 1 to 8 bytes that end within it.
pub trait Window: Send {
    /// Fills `data` with what is at `offset`.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Takes `data` at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]) -> Effect;
}

struct Place {
    bytes: u64,
    // Protects the registers from processors that touch them at once.
    window: Arc<Mutex<dyn Window>>,
}

/// One space of addresses: ports or memory.
#[derive(Default)]
pub struct Bus {
    places: BTreeMap<u64, Place>,
}

impl Bus {
    /// Puts `window` at `start`. What overlaps another is a mistake of the caller's, and is refused.
    #[must_use]
    pub fn insert(&mut self, start: u64, bytes: u64, window: Arc<Mutex<dyn Window>>) -> bool {
        let Some(end) = start.checked_add(bytes) else { return false };
        let before = self.places.range(..end).next_back();
        let free = before.is_none_or(|(other, place)| other + place.bytes <= start);
        if free && bytes > 0 {
            self.places.insert(start, Place { bytes, window });
        }
        free && bytes > 0
    }

    fn find(&self, address: u64, length: usize) -> Option<(u64, &Place)> {
        let (start, place) = self.places.range(..=address).next_back()?;
        let offset = address - start;
        let end = offset.checked_add(u64::try_from(length).ok()?)?;
        (end <= place.bytes).then_some((offset, place))
    }

    /// Reads from whatever is at `address`.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((offset, place)) => {
                place.window.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
            }
            None => data.fill(0xff),
        }
    }

    /// Writes to whatever is at `address`.
    pub fn write(&self, address: u64, data: &[u8]) -> Effect {
        match self.find(address, data.len()) {
            Some((offset, place)) => {
                place.window.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data)
            }
            None => Effect::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u64);

    impl Window for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset + self.0).expect("a small offset"));
        }

        fn write(&mut self, _offset: u64, _data: &[u8]) -> Effect {
            Effect::Reset
        }
    }

    fn bus() -> Bus {
        let mut bus = Bus::default();
        assert!(bus.insert(0x10, 4, Arc::new(Mutex::new(Echo(0)))));
        assert!(bus.insert(0x14, 2, Arc::new(Mutex::new(Echo(100)))));
        bus
    }

    #[test]
    fn each_address_belongs_to_the_window_around_it() {
        let (bus, mut byte) = (bus(), [0]);
        for (address, expected) in [(0xf, 0xff), (0x10, 0), (0x13, 3), (0x14, 100), (0x15, 101), (0x16, 0xff)]
        {
            bus.read(address, &mut byte);
            assert_eq!(byte[0], expected, "{address:#x}");
        }
        assert_eq!(bus.write(0x15, &[0]), Effect::Reset);
        assert_eq!(bus.write(0x16, &[0]), Effect::Nothing);
    }

    #[test]
    fn what_reaches_beyond_a_window_touches_none() {
        let (bus, mut bytes) = (bus(), [0; 4]);
        bus.read(0x12, &mut bytes);
        assert_eq!(bytes, [0xff; 4]);
        assert_eq!(bus.write(u64::MAX, &[0; 8]), Effect::Nothing);
    }

    #[test]
    fn windows_do_not_overlap() {
        let mut bus = bus();
        for (start, bytes) in [(0xe, 4), (0x10, 4), (0x12, 1), (0, 0x100), (0x15, 4), (u64::MAX, 2), (0, 0)] {
            assert!(!bus.insert(start, bytes, Arc::new(Mutex::new(Echo(0)))), "{start:#x}+{bytes}");
        }
    }
}
