use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::testkit::{NEXT, Ring, SEAM, WRITE, memory};

const LIMITS: Limits = Limits { readable_bytes: 1 << 20, writable_bytes: 1 << 20, slices: 64 };

#[test]
fn a_good_chain_is_split_into_what_is_read_and_what_is_written() {
    let (memory, mut ring) = (memory(), Ring::new(0, 16));
    for (index, (address, length, flags)) in
        (0..).zip([(0x1000, 40, NEXT), (0x2000, 8, NEXT), (0x3000, 100, WRITE)])
    {
        ring.describe(&memory, index, (address, length), flags, index + 1);
    }
    ring.offer(&memory, 0);
    let taken = Chain::next_of(&mut ring.queue, &memory, LIMITS).expect("ring").expect("offered");
    let chain = taken.chain.expect("good");
    assert_eq!((chain.readable.remaining_bytes(), chain.writable.remaining_bytes()), (48, 100));
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
