use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::testkit::{INDIRECT, NEXT, Ring, SEAM, WRITE, memory};

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

/// What a descriptor of the small model is: it ends the chain or goes on at `next`, and is readable, writable or a table.
#[derive(Debug, Clone, Copy)]
struct Piece {
    flags: u16,
    next: u16,
}

/// Descriptors of the small model, and one index that is none of them.
const SMALL: u16 = 4;

/// All that a descriptor of the small model can be.
fn pieces() -> Vec<Piece> {
    let ends = [0, WRITE, INDIRECT].map(|flags| Piece { flags, next: 0 });
    let goes_on = [NEXT, NEXT | WRITE].into_iter();
    let goes_on = goes_on.flat_map(|flags| (0..=SMALL).map(move |next| Piece { flags, next }));
    ends.into_iter().chain(goes_on).collect()
}

/// How the chain from `head` has to be taken: its readable and writable bytes, one of each piece.
fn expected(table: &[Piece], head: u16) -> Result<(usize, usize), ChainError> {
    let (mut index, mut readable, mut writable) = (head, 0, 0);
    for _ in 0..SMALL {
        let Some(piece) = table.get(usize::from(index)) else { return Err(ChainError::Unended) };
        if piece.flags & WRITE != 0 {
            writable += 1;
        } else if writable > 0 {
            return Err(ChainError::Order);
        } else {
            readable += 1;
        }
        if piece.flags & NEXT == 0 {
            return Ok((readable, writable));
        }
        index = piece.next;
    }
    Err(ChainError::Unended)
}

#[test]
fn every_chain_of_a_small_table_ends_as_the_model_has_it() {
    let (memory, mut ring, pieces) = (memory(), Ring::new(0, SMALL), pieces());
    // A table of one readable byte, for those that are tables.
    let [indirect, data] = [ring.data(), ring.data() + 0x1000];
    crate::testkit::describe_at(&memory, indirect, (data, 1), 0, 0);
    let mut counts = [0; 2];
    for number in 0..pieces.len().pow(SMALL.into()) {
        let mut rest = number;
        let table: Vec<Piece> = (0..SMALL)
            .map(|index| {
                let piece = pieces[rest % pieces.len()];
                rest /= pieces.len();
                let place = if piece.flags & INDIRECT != 0 { (indirect, 16) } else { (data, 1) };
                ring.describe(&memory, index, place, piece.flags, piece.next);
                piece
            })
            .collect();
        let head = u16::try_from(number % usize::from(SMALL)).expect("small");
        ring.offer(&memory, head);
        let taken = Chain::next_of(&mut ring.queue, &memory, LIMITS).expect("a ring").expect("a chain");
        assert_eq!(taken.head, head);
        let found =
            taken.chain.map(|chain| (chain.readable.remaining_bytes(), chain.writable.remaining_bytes()));
        let expected = expected(&table, head);
        counts[usize::from(expected.is_ok())] += 1;
        assert_eq!(found, expected, "{table:?} from {head}");
        ring.queue.add_used(&memory, head, 0).expect("a ring");
    }
    assert!(counts[0] > 1000 && counts[1] > 1000, "{counts:?}");
}

#[test]
fn a_buffer_is_taken_where_all_of_it_is_in_memory_and_nowhere_else() {
    let memory = memory();
    let end = SEAM + (1 << 20);
    let edges = [0, SEAM, end, 1 << 32, 1 << 63, u64::MAX - (1 << 32), u64::MAX];
    let addresses = edges.into_iter().flat_map(|edge| {
        (0..=17).flat_map(move |near| [edge.checked_sub(near), edge.checked_add(near)]).flatten()
    });
    let limit = LIMITS.readable_bytes.min(LIMITS.writable_bytes) as u64;
    for address in addresses {
        for length in [0, 1, 2, 15, 16, 17, 18, 4096, 1 << 31, u32::MAX - 1, u32::MAX] {
            for flags in [0, WRITE] {
                let mut ring = Ring::new(0, SMALL);
                ring.set_available(&memory, 0);
                ring.describe(&memory, 0, (address, length), flags, 0);
                ring.offer(&memory, 0);
                let taken =
                    Chain::next_of(&mut ring.queue, &memory, LIMITS).expect("a ring").expect("a chain");
                let inside = u128::from(address) + u128::from(length) <= u128::from(end);
                let fits = length == 0 || inside && u64::from(length) <= limit;
                assert_eq!(taken.chain.is_ok(), fits, "{address:#x} {length:#x} {flags}");
                if let Ok(chain) = taken.chain {
                    let bytes = chain.readable.remaining_bytes() + chain.writable.remaining_bytes();
                    assert_eq!(bytes as u64, u64::from(length));
                }
            }
        }
    }
}

#[test]
fn every_available_index_is_a_chain_none_or_a_broken_ring() {
    let memory = memory();
    let mut ring = Ring::new(0, SMALL);
    for behind in [0_u16, 1, 65_533, 65_535] {
        for index in 0..=u16::MAX {
            ring.queue.set_next_avail(behind);
            ring.set_available(&memory, index);
            let waiting = index.wrapping_sub(behind);
            match Chain::next_of(&mut ring.queue, &memory, LIMITS) {
                Ok(None) => assert_eq!(waiting, 0),
                Ok(Some(_)) => assert!((1..=SMALL).contains(&waiting), "{behind} {index}"),
                Err(_) => assert!(waiting > SMALL, "{behind} {index}"),
            }
        }
    }
}

#[test]
fn indexes_go_around_and_every_used_element_is_in_its_place() {
    let memory = memory();
    let mut ring = Ring::new(0, SMALL);
    for index in 0..SMALL {
        ring.describe(&memory, index, (ring.data(), 1), 0, 0);
    }
    for round in 0..200_000_u32 {
        let head = u16::try_from(round * 7 % u32::from(SMALL)).expect("small");
        ring.offer(&memory, head);
        let taken = Chain::next_of(&mut ring.queue, &memory, LIMITS).expect("a ring").expect("a chain");
        assert_eq!((taken.head, taken.chain.is_ok()), (head, true), "{round}");
        ring.queue.add_used(&memory, head, round).expect("a ring");
        assert_eq!(ring.used(&memory), Some((head.into(), round)), "{round}");
        assert_eq!(ring.used(&memory), None);
    }
}
