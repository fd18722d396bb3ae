//! Chains of a hostile driver, and what of them is good by the specification: a model beside the devices' own way in
//! (`src/virtio/ring.rs`). They lie in a guest's memory whose surroundings no device may touch.
//!
//! A chain is pieces of four bytes: of what kind, where, and how long (two bytes).
#![expect(unsafe_code, reason = "guest memory in the midst of a mapping of this process's")]

use std::collections::VecDeque;
use std::ops::Range;

use kiln_virtio::ring::Limits;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};

use crate::random::Random;
use crate::testkit::{INDIRECT, NEXT, REGIONS, Ring, SEAM, WRITE, describe_at};

pub const PAGE_BYTES: u64 = 4096;
const END: u64 = REGIONS[1].0 + REGIONS[1].1 as u64;
/// Where pieces begin, on either side of where two regions touch, and how far those reach that devices copy.
const ARENA: Range<u64> = SEAM - 8 * PAGE_BYTES..SEAM + 40 * PAGE_BYTES;
/// The end of memory.
const TAIL: Range<u64> = END - PAGE_BYTES..END;
/// What lies before, between and behind the regions in the host, and is nobody's.
const GUARD_BYTES: usize = 2 * 4096;
const GUARD: u8 = 0xc3;
/// Descriptors of a queue, of which a chain has a half.
pub const QUEUE_SIZE: u16 = 64;
const MOST_PIECES: usize = 31;
/// Where indirect tables and messages lie.
const TABLES: u64 = 1 << 20;
const MESSAGES: u64 = 3 << 19;

/// Bits of a piece's kind: room, where it lies, how its length is meant, and links that are special.
const IS_ROOM: u8 = 1;
const BEGINS_TABLE: u8 = 0x40;
const LEADS_ASTRAY: u8 = 0x80;

/// A guest's memory, and what has to be in the parts of it that chains name.
pub struct Arena {
    pub memory: GuestMemoryMmap,
    /// All of the host's mapping, guards included.
    outer: GuestMemoryMmap,
    guards: [u64; 3],
    /// What is in [`ARENA`] and [`TAIL`].
    expected: Vec<u8>,
    pattern: Vec<u8>,
}

/// A part of [`Arena::expected`], as it is counted there.
fn places(address: u64, length: usize) -> Range<usize> {
    let from = match address.checked_sub(TAIL.start) {
        Some(behind) => ARENA.end - ARENA.start + behind,
        None => address - ARENA.start,
    };
    let from = usize::try_from(from).expect("below 2 MiB");
    from..from + length
}

impl Arena {
    pub fn new() -> Self {
        let sizes = REGIONS.map(|(_, length)| length);
        let total = sizes.iter().sum::<usize>() + 3 * GUARD_BYTES;
        let file = kiln_virtio::ram::new(total as u64).expect("a file");
        let outer = [(GuestAddress(0), total, Some(FileOffset::new(file, 0)))];
        let outer = GuestMemoryMmap::from_ranges_with_files(outer).expect("memory");
        let flags = outer.iter().next().expect("a region").flags();
        let (mut at, mut guards, mut regions) = (0, vec![0], Vec::new());
        for (start, length) in REGIONS {
            at += GUARD_BYTES as u64;
            let within = outer.get_host_address(GuestAddress(at)).expect("an address");
            // SAFETY: `length` bytes from there lie in the mapping of `outer`, which is readable and writable, and is dropped
            // behind `memory`, with which alone the region is used. Both are only ever looked at through volatile slices.
            let region = unsafe { MmapRegionBuilder::new(length).with_raw_mmap_pointer(within) };
            let region = region.with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE).with_mmap_flags(flags);
            let region = region.build().expect("a region");
            regions.push(GuestRegionMmap::new(region, GuestAddress(start)).expect("a region"));
            at += length as u64;
            guards.push(at);
        }
        for guard in &guards {
            outer.write_slice(&[GUARD; GUARD_BYTES], GuestAddress(*guard)).expect("memory");
        }
        let memory = GuestMemoryMmap::from_regions(regions).expect("memory");
        // No page of it is like another, and none is zeros.
        let length = ARENA.end - ARENA.start + PAGE_BYTES;
        let pattern: Vec<u8> = (0..length).map(|at| (at * 31 + (at >> 8) * 7).to_le_bytes()[0] | 1).collect();
        let mut arena =
            Self { memory, outer, guards: guards.try_into().expect("three"), expected: Vec::new(), pattern };
        arena.expected.clone_from(&arena.pattern);
        arena.restore();
        arena
    }

    /// Puts everything back where it was.
    pub fn restore(&mut self) {
        self.expected.copy_from_slice(&self.pattern);
        for range in [ARENA, TAIL] {
            let length = usize::try_from(range.end - range.start).expect("below 2 MiB");
            let bytes = &self.expected[places(range.start, length)];
            self.memory.write_slice(bytes, GuestAddress(range.start)).expect("memory");
        }
    }

    /// What has to lie in these pieces.
    pub fn content(&self, pieces: &[(u64, u32)]) -> Vec<u8> {
        let mut content = Vec::new();
        for (at, length) in pieces.iter().filter(|(_, length)| *length > 0) {
            content.extend_from_slice(&self.expected[places(*at, *length as usize)]);
        }
        content
    }

    /// The device has to have written `bytes` to these pieces.
    pub fn expect(&mut self, pieces: &[(u64, u32)], mut bytes: &[u8]) {
        for (at, length) in pieces {
            let (piece, rest) = bytes.split_at(bytes.len().min(*length as usize));
            if !piece.is_empty() {
                self.expected[places(*at, piece.len())].copy_from_slice(piece);
            }
            bytes = rest;
        }
    }

    /// The device may have written what it liked to the first `count` bytes of these pieces; whether it did.
    pub fn accept(&mut self, pieces: &[(u64, u32)], mut count: usize) -> bool {
        let mut differs = false;
        for (at, length) in pieces {
            let length = count.min(*length as usize);
            if length > 0 {
                let piece = places(*at, length);
                self.memory.read_slice(&mut self.expected[piece.clone()], GuestAddress(*at)).expect("memory");
                differs |= self.expected[piece.clone()] != self.pattern[piece];
            }
            count -= length;
        }
        differs
    }

    /// The device has to have given each whole page in one of these pieces back.
    pub fn expect_gone(&mut self, pieces: &[(u64, u32)]) {
        for page in ARENA.chain(TAIL).step_by(4096) {
            let within =
                |&(at, length): &(u64, u32)| at <= page && page + PAGE_BYTES <= at + u64::from(length);
            if pieces.iter().any(within) {
                self.expected[places(page, 4096)].fill(0);
            }
        }
    }

    /// Only what was expected is otherwise than before.
    pub fn check(&self) {
        let mut found = vec![0; self.expected.len()];
        for range in [ARENA, TAIL] {
            let length = usize::try_from(range.end - range.start).expect("below 2 MiB");
            let bytes = &mut found[places(range.start, length)];
            self.memory.read_slice(bytes, GuestAddress(range.start)).expect("memory");
        }
        assert!(found == self.expected, "what chains name has what it should");
    }

    /// Nothing outside of the guest's memory was touched.
    pub fn check_guards(&self) {
        for guard in self.guards {
            let mut found = [0; GUARD_BYTES];
            self.outer.read_slice(&mut found, GuestAddress(guard)).expect("memory");
            assert!(found == [GUARD; GUARD_BYTES], "only the guest's memory changes");
        }
    }
}

/// A chain that the driver offered.
#[derive(Default)]
pub struct Offered {
    /// Its pieces to be read, where it is good.
    pub readable: Vec<(u64, u32)>,
    /// Its room, where it is good.
    pub room: Vec<(u64, u32)>,
    pub is_good: bool,
    head: u16,
    message: Option<Vec<u8>>,
}

impl Offered {
    /// What the driver sends by it.
    pub fn content(&self, arena: &Arena) -> Vec<u8> {
        self.message.clone().unwrap_or_else(|| arena.content(&self.readable))
    }

    pub fn room_bytes(&self) -> usize {
        self.room.iter().map(|(_, length)| *length as usize).sum()
    }
}

/// A queue, and the chains in it that are the device's.
pub struct Queue {
    pub ring: Ring,
    pub pending: VecDeque<Offered>,
    number: u64,
    offered: u16,
}

impl Queue {
    pub fn new(number: u64, arena: &Arena) -> Self {
        let ring = Ring::new(number, QUEUE_SIZE);
        let [_, available, used] = ring.addresses();
        for at in [available, used] {
            arena.memory.write_slice(&[0; 4], GuestAddress(at)).expect("memory");
        }
        Self { ring, pending: VecDeque::new(), number, offered: 0 }
    }

    /// Whether a chain can be offered: the descriptors of two that are the device's stay as they are.
    pub fn has_place(&self) -> bool {
        self.pending.len() < 2
    }

    /// Offers the chain that `bytes` are, where there is a place.
    pub fn offer(&mut self, arena: &Arena, bytes: &[u8], limits: Limits) {
        let pieces: Vec<&[u8; 4]> = bytes.as_chunks().0.iter().take(MOST_PIECES).collect();
        let pieces = if pieces.is_empty() { vec![&[0, 0, 0, 0]] } else { pieces };
        if !self.has_place() {
            return;
        }
        let place = u64::from(self.offered % 2);
        let head = self.offered % 2 * (QUEUE_SIZE / 2);
        let table = TABLES + self.number * 0x1000 + place * 0x400;
        let mut offered = Offered { head, is_good: true, ..Offered::default() };
        let mut table_begins = None;
        for (number, piece) in (0_u16..).zip(&pieces) {
            let (address, length) = lies(piece);
            let is_last = usize::from(number) + 1 == pieces.len();
            let mut flags = if is_last { 0 } else { NEXT };
            if piece[0] & BEGINS_TABLE != 0 {
                if table_begins.is_none() {
                    let left = u32::try_from(pieces.len()).expect("few") - u32::from(number);
                    self.ring.describe(&arena.memory, head + number, (table, 16 * left), INDIRECT, 0);
                    table_begins = Some(number);
                } else {
                    // A table within a table.
                    flags |= INDIRECT;
                    offered.is_good = false;
                }
            }
            let first = table_begins.unwrap_or(0);
            let base = if table_begins.is_some() { 0 } else { head };
            let mut next = base + number - first + 1;
            if piece[0] & LEADS_ASTRAY != 0 {
                (flags, next) = (flags | NEXT, if piece[1] & 1 == 0 { base } else { u16::MAX });
                offered.is_good = false;
            }
            if piece[0] & IS_ROOM != 0 {
                flags |= WRITE;
                offered.room.push((address, length));
            } else {
                // What is to be read comes first.
                offered.is_good &= offered.room_bytes() == 0;
                offered.readable.push((address, length));
            }
            let in_memory = address.checked_add(length.into()).is_some_and(|end| end <= END);
            offered.is_good &= length == 0 || in_memory;
            match table_begins {
                Some(_) => {
                    let at = table + u64::from(number - first) * 16;
                    describe_at(&arena.memory, at, (address, length), flags, next);
                }
                None => self.ring.describe(&arena.memory, head + number, (address, length), flags, next),
            }
        }
        let total = |pieces: &[(u64, u32)]| pieces.iter().map(|(_, length)| *length as usize).sum::<usize>();
        offered.is_good &= total(&offered.readable) <= limits.readable_bytes
            && total(&offered.room) <= limits.writable_bytes;
        self.push(arena, offered);
    }

    /// Offers `bytes` in one piece, where there is a place.
    pub fn send(&mut self, arena: &Arena, bytes: &[u8]) {
        if !self.has_place() {
            return;
        }
        let head = self.offered % 2 * (QUEUE_SIZE / 2);
        let at = MESSAGES + self.number * 0x1000 + u64::from(self.offered % 2) * 0x800;
        arena.memory.write_slice(bytes, GuestAddress(at)).expect("memory");
        let length = u32::try_from(bytes.len()).expect("short");
        self.ring.describe(&arena.memory, head, (at, length), 0, 0);
        let message = Some(bytes.to_vec());
        self.push(arena, Offered { head, is_good: true, message, ..Offered::default() });
    }

    fn push(&mut self, arena: &Arena, offered: Offered) {
        self.ring.offer(&arena.memory, offered.head);
        self.pending.push_back(offered);
        self.offered = self.offered.wrapping_add(1);
    }

    /// Writes descriptors as they come, and offers the first.
    pub fn offer_blindly(&mut self, arena: &Arena, bytes: &[u8]) {
        let table = &bytes[..bytes.len().min(1024)];
        arena.memory.write_slice(table, GuestAddress(self.ring.addresses()[0])).expect("memory");
        self.ring.offer(&arena.memory, 0);
    }

    /// The next chain that came back, and how much was written to it.
    pub fn used(&mut self, arena: &Arena) -> Option<(Offered, usize)> {
        let (head, written) = self.ring.used(&arena.memory)?;
        let offered = self.pending.pop_front().expect("nothing comes back that was not offered");
        assert_eq!(head, u32::from(offered.head), "in order");
        assert!(offered.is_good || written == 0, "a bad chain is given back as it is");
        Some((offered, written as usize))
    }
}

/// Where a piece lies, and how long it is.
fn lies(&[kind, place, low, high]: &[u8; 4]) -> (u64, u32) {
    let (place, length) = (u64::from(place), u32::from(u16::from_le_bytes([low, high])));
    let address = match kind >> 1 & 7 {
        0..=3 => ARENA.start + place * 256,
        4 => ARENA.start + place % 16 * PAGE_BYTES,
        5 => SEAM - place,
        6 => END - place,
        _ => u64::MAX - place,
    };
    let length = match kind >> 4 & 3 {
        0 => length,
        1 => length % 9 * 4096,
        2 => 0,
        _ => length << 8,
    };
    (address, length)
}

/// Pieces, most of which make a chain that is good: what is to be read, then room.
pub fn pieces(random: &mut Random, readable: usize, room: usize) -> Vec<u8> {
    let (mut bytes, astray) = (Vec::new(), random.once_in(16));
    for number in 0..readable + room {
        let is_room = if random.once_in(32) { random.byte() & 1 } else { u8::from(number >= readable) };
        let place = if random.once_in(24) { 12 } else { random.pick(&[0, 0, 2, 4, 6, 8, 8, 10]) };
        let longest = if random.once_in(8) { 0x30 } else { 0 };
        let long = random.pick(&[0, 0, 0, 0, 0x10, 0x10, 0x20, longest]);
        let link = match random.below(16) {
            0 | 1 => BEGINS_TABLE,
            2 if astray => LEADS_ASTRAY,
            _ => 0,
        };
        let (small, any) = (u16::from(random.byte()), random.u16());
        let length = random.pick(&[small, small, 1, 8, 4096, any]);
        bytes.extend([is_room | place | long | link, random.byte()]);
        bytes.extend(length.to_le_bytes());
    }
    bytes
}
