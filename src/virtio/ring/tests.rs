use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::testkit::{END, INDIRECT, NEXT, REGIONS, Ring, SEAM, WRITE, describe_at, memory};

const LIMITS: Limits = Limits { readable_bytes: 1 << 20, writable_bytes: 1 << 20, slices: 64 };

/// What the device sees of a chain of descriptors `(address, length, flags, next)`.
fn walked(descriptors: &[(u64, u32, u16, u16)]) -> Result<(usize, usize), ChainError> {
    let (memory, mut ring) = (memory(), Ring::new(0, 16));
    for (index, (address, length, flags, next)) in descriptors.iter().enumerate() {
        let index = u16::try_from(index).expect("few");
        ring.describe(&memory, index, (*address, *length), *flags, *next);
    }
    ring.offer(&memory, 0);
    taken(&mut ring, &memory)
}

fn taken(ring: &mut Ring, memory: &GuestMemoryMmap) -> Result<(usize, usize), ChainError> {
    let taken = Chain::next_of(&mut ring.queue, memory, LIMITS).expect("ring").expect("offered");
    let chain = taken.chain?;
    Ok((chain.readable.remaining_bytes(), chain.writable.remaining_bytes()))
}

#[test]
fn a_good_chain_is_split_into_what_is_read_and_what_is_written() {
    assert_eq!(
        walked(&[(0x1000, 40, NEXT, 1), (0x2000, 8, NEXT, 2), (0x3000, 100, WRITE, 0)]),
        Ok((48, 100))
    );
}

#[test]
fn hv01_a_cycle_of_descriptors_ends() {
    assert_eq!(walked(&[(0x1000, 1, NEXT, 0)]), Err(ChainError::Unended));
    assert_eq!(walked(&[(0x1000, 1, NEXT, 1), (0x1000, 1, NEXT, 0)]), Err(ChainError::Unended));
    let whole: Vec<_> = (0..16).map(|index| (0x1000, 1, NEXT, (index + 1) % 16)).collect();
    assert_eq!(walked(&whole), Err(ChainError::Unended));
}

#[test]
fn hv02_empty_descriptors_are_nothing() {
    assert_eq!(walked(&[(0, 0, NEXT, 1), (u64::MAX, 0, NEXT, 2), (0x1000, 4, WRITE, 0)]), Ok((0, 4)));
    assert_eq!(walked(&[(0x1000, 0, 0, 0)]), Ok((0, 0)));
}

#[test]
fn hv03_hv04_buffers_outside_of_memory_are_refused() {
    for (address, length) in [(0x1000, u32::MAX), (0, u32::MAX)] {
        assert_eq!(walked(&[(address, length, 0, 0)]), Err(ChainError::TooLong));
        assert_eq!(walked(&[(address, length, WRITE, 0)]), Err(ChainError::TooLong));
    }
    for address in [u64::MAX, u64::MAX - 16, END, END - 16, 1 << 40] {
        assert_eq!(walked(&[(address, 17, 0, 0)]), Err(ChainError::Memory), "{address:x}");
        assert_eq!(walked(&[(address, 17, WRITE, 0)]), Err(ChainError::Memory), "{address:x}");
    }
    assert_eq!(walked(&[(END - 17, 17, WRITE, 0)]), Ok((0, 17)));
    // Two that are each short enough and together are not.
    assert_eq!(walked(&[(0, 1 << 20, NEXT, 1), (0, 1, 0, 0)]), Err(ChainError::TooLong));
}

#[test]
fn hv05_a_buffer_may_lie_across_two_regions() {
    let (memory, mut ring) = (memory(), Ring::new(0, 16));
    memory.write_slice(b"across the seam", GuestAddress(SEAM - 7)).expect("memory");
    ring.describe(&memory, 0, (SEAM - 7, 15), NEXT, 1);
    ring.describe(&memory, 1, (SEAM - 3, 6), WRITE, 0);
    ring.offer(&memory, 0);
    let taken = Chain::next_of(&mut ring.queue, &memory, LIMITS).expect("ring").expect("offered");
    let mut chain = taken.chain.expect("good");
    assert_eq!(chain.readable.read_array(), Some(*b"across the seam"));
    assert!(chain.writable.write(b"abcdef"));
    let mut back = [0; 6];
    memory.read_slice(&mut back, GuestAddress(SEAM - 3)).expect("memory");
    assert_eq!(&back, b"abcdef");
    assert_eq!(REGIONS[1].0, SEAM);
}

#[test]
fn hv06_hv07_a_broken_available_ring_is_an_error_and_no_loop() {
    for index in [17, 100, u16::MAX] {
        let (memory, mut ring) = (memory(), Ring::new(0, 16));
        ring.set_available(&memory, index);
        assert!(Chain::next_of(&mut ring.queue, &memory, LIMITS).is_err(), "{index}");
    }
    for head in [16, 17, u16::MAX] {
        let (memory, mut ring) = (memory(), Ring::new(0, 16));
        ring.offer(&memory, head);
        assert!(Chain::next_of(&mut ring.queue, &memory, LIMITS).is_err(), "{head}");
    }
}

#[test]
fn hv15_indirect_tables_are_followed_once_and_bounded() {
    let table = 0x40_0000;
    let walked = |length: u32, flags: u16, entries: &[(u64, u32, u16, u16)]| {
        let (memory, mut ring) = (memory(), Ring::new(0, 16));
        for (at, (address, length, flags, next)) in (table..).step_by(16).zip(entries) {
            describe_at(&memory, at, (*address, *length), *flags, *next);
        }
        ring.describe(&memory, 0, (table, length), flags, 1);
        ring.describe(&memory, 1, (0x1000, 1), 0, 0);
        ring.offer(&memory, 0);
        taken(&mut ring, &memory)
    };
    let good = [(0x1000, 40, NEXT, 1), (0x2000, 100, WRITE, 0)];
    assert_eq!(walked(32, INDIRECT, &good), Ok((40, 100)));
    // INDIRECT and NEXT: what follows does not count.
    assert_eq!(walked(32, INDIRECT | NEXT, &good), Ok((40, 100)));
    assert_eq!(walked(0, INDIRECT, &good), Err(ChainError::Unended));
    assert_eq!(walked(31, INDIRECT, &good), Err(ChainError::Unended));
    assert_eq!(walked(16, INDIRECT, &good), Err(ChainError::Unended));
    assert_eq!(walked(u32::MAX, INDIRECT, &good), Err(ChainError::Unended));
    assert_eq!(walked(16 * 65_536, INDIRECT, &good), Err(ChainError::Unended));
    let nested = [(table, 32, INDIRECT, 0), (0x2000, 100, WRITE, 0)];
    assert_eq!(walked(32, INDIRECT, &nested), Err(ChainError::Unended));
    let cycle = [(0x1000, 1, NEXT, 1), (0x1000, 1, NEXT, 0)];
    assert_eq!(walked(32, INDIRECT, &cycle), Err(ChainError::Unended));
    let long: Vec<_> = (0..100).map(|index| (0x1000, 1, NEXT, index + 1)).collect();
    assert_eq!(walked(16 * 100, INDIRECT, &long), Err(ChainError::TooLong));
    // The table itself outside of memory.
    let (memory, mut ring) = (memory(), Ring::new(0, 16));
    ring.describe(&memory, 0, (END - 8, 32), INDIRECT, 0);
    ring.offer(&memory, 0);
    assert_eq!(taken(&mut ring, &memory), Err(ChainError::Unended));
}

#[test]
fn hv16_readable_after_writable_is_refused() {
    assert_eq!(walked(&[(0x1000, 8, WRITE | NEXT, 1), (0x2000, 8, 0, 0)]), Err(ChainError::Order));
}

#[test]
fn hv17_one_byte_descriptors_make_up_a_header() {
    let (memory, mut ring) = (memory(), Ring::new(0, 64));
    for index in 0..40 {
        memory
            .write_obj(u8::try_from(index).expect("few"), GuestAddress(0x5000 + index * 2))
            .expect("memory");
        let index = u16::try_from(index).expect("few");
        let flags = if index == 39 { 0 } else { NEXT };
        ring.describe(&memory, index, (0x5000 + u64::from(index) * 2, 1), flags, index + 1);
    }
    ring.offer(&memory, 0);
    let taken = Chain::next_of(&mut ring.queue, &memory, LIMITS).expect("ring").expect("offered");
    let mut chain = taken.chain.expect("good");
    let bytes: [u8; 40] = chain.readable.read_array().expect("whole");
    assert!(bytes.iter().zip(0..).all(|(byte, expected)| *byte == expected));
    assert_eq!(chain.readable.read_array::<1>(), None);
}

#[test]
fn an_empty_ring_has_no_chain() {
    let (memory, mut ring) = (memory(), Ring::new(0, 16));
    assert!(Chain::next_of(&mut ring.queue, &memory, LIMITS).expect("ring").is_none());
}

#[test]
fn what_is_split_off_is_filled_from_a_file_first() {
    use std::io::Write as _;
    use std::os::fd::AsFd;
    let (memory, mut ring) = (memory(), Ring::new(0, 16));
    let mut file = tempfile::tempfile().expect("file");
    file.write_all(&(0..=255).collect::<Vec<u8>>()).expect("file");
    for (index, (address, length)) in (0_u16..).zip([(0x5000, 10), (0x6000, 3), (SEAM - 50, 100)]) {
        let flags = if index == 2 { WRITE } else { WRITE | NEXT };
        ring.describe(&memory, index, (address, length), flags, index + 1);
    }
    ring.offer(&memory, 0);
    let taken = Chain::next_of(&mut ring.queue, &memory, LIMITS).expect("ring").expect("offered");
    let mut chain = taken.chain.expect("good");
    let mut behind = chain.writable.split_off(12).expect("room");
    assert_eq!(chain.writable.remaining_bytes(), 12);
    // More than there is room for, then the end of the file.
    assert_eq!(behind.read_file_at(file.as_fd(), 200, usize::MAX).expect("read"), 56);
    assert_eq!(behind.read_file_at(file.as_fd(), 0, 1000).expect("read"), 45);
    assert!(!behind.write(b"x") && behind.write(b""));
    assert!(chain.writable.write(b"twelve bytes"));
    let mut first = [0; 1];
    memory.read_slice(&mut first, GuestAddress(0x6002)).expect("memory");
    assert_eq!(first, [200]);
    assert!(chain.writable.split_off(1).is_none());
}
