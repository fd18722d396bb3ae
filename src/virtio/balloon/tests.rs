use std::fs::File;
use std::os::fd::AsFd;

use proptest::prelude::*;
use vm_memory::{Bytes, FileOffset, GuestAddress};

use super::*;
use crate::testkit::{NEXT, REGIONS, Ring, SEAM, WRITE, memory, shared_memory};

const PAGE: u64 = 4096;
const END: u64 = SEAM + (1 << 20);
/// Where no ring is.
const START: u64 = 1 << 20;
/// A report that touches the pages of the ring, and gives none back.
const NOTHING: &[(u64, u32)] = &[(START, 1)];

struct Guest {
    memory: GuestMemoryMmap,
    ring: Ring,
    index: usize,
    device: Balloon,
}

/// Memory that begins as `file` is, as the copy of a template has it.
fn private_memory(file: &File) -> GuestMemoryMmap {
    let mut offset = 0;
    let regions = REGIONS.map(|(start, length)| {
        let part = FileOffset::new(file.try_clone().expect("a descriptor"), offset);
        offset += length as u64;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let mapped =
            vm_memory::MmapRegion::build(Some(part), length, access, libc::MAP_PRIVATE).expect("a mapping");
        vm_memory::GuestRegionMmap::new(mapped, GuestAddress(start)).expect("a region")
    });
    GuestMemoryMmap::from_regions(regions.into()).expect("memory")
}

impl Guest {
    /// Whose reports come in queue `index`.
    fn new(memory: GuestMemoryMmap, index: usize) -> Self {
        Self { memory, ring: Ring::new(0, 64), index, device: Balloon::new() }
    }

    fn process(&mut self) -> Outcome {
        let mut queues: Vec<Option<&mut Queue>> = (0..QUEUE_SIZES.len()).map(|_| None).collect();
        queues[self.index] = Some(&mut self.ring.queue);
        self.device.process(Wake::Queue(self.index), &mut queues, &self.memory).expect("a good ring")
    }

    fn report(&mut self, pieces: &[(u64, u32)]) {
        for (number, piece) in (0_u16..).zip(pieces) {
            let more = if usize::from(number) + 1 < pieces.len() { NEXT } else { 0 };
            self.ring.describe(&self.memory, number, *piece, WRITE | more, number + 1);
        }
        self.ring.offer(&self.memory, 0);
        assert_eq!(self.process().interrupt, 1 << self.index);
        assert_eq!(self.ring.used(&self.memory), Some((0, 0)));
    }

    fn fill(&self, from: u64, to: u64, byte: u8) {
        for at in (from..to).step_by(4096) {
            self.memory.write_slice(&[byte; 4096], GuestAddress(at)).expect("memory");
        }
    }

    /// Whether each byte there is `byte`.
    fn is(&self, from: u64, to: u64, byte: u8) -> bool {
        let mut bytes = vec![0; usize::try_from(to - from).expect("short")];
        self.memory.read_slice(&mut bytes, GuestAddress(from)).expect("memory");
        bytes.iter().all(|found| *found == byte)
    }
}

/// What this process has of the memory `address` lies in, in KiB.
fn resident_kib(memory: &GuestMemoryMmap, address: u64) -> u64 {
    let host = memory.get_host_address(GuestAddress(address)).expect("an address") as u64;
    let maps = std::fs::read_to_string("/proc/self/smaps").expect("maps");
    let mut within = false;
    for line in maps.lines() {
        let range = line.split_once(' ').and_then(|(range, _)| range.split_once('-'));
        let number = |text| u64::from_str_radix(text, 16).ok();
        if let Some((from, to)) = range.and_then(|(from, to)| Some((number(from)?, number(to)?))) {
            within = (from..to).contains(&host);
        } else if let Some(size) = line.strip_prefix("Rss:").filter(|_| within) {
            return size.trim().trim_end_matches(" kB").parse().expect("a number");
        }
    }
    panic!("the memory is not mapped");
}

/// What the file behind `memory`'s regions takes, in bytes.
fn stored_bytes(memory: &GuestMemoryMmap) -> u64 {
    let regions = memory.iter().filter_map(|region| region.file_offset());
    let blocks = |file: &File| rustix::fs::fstat(file.as_fd()).expect("a file").st_blocks;
    regions.map(|offset| u64::try_from(blocks(offset.file())).expect("a number") * 512).sum()
}

#[test]
fn what_is_reported_goes_back_to_the_host_and_is_there_again_when_it_is_touched() {
    // Of a machine that booted, of a copy of a template, and one with no file at all.
    let template = rustix::fs::memfd_create("template", rustix::fs::MemfdFlags::CLOEXEC).expect("a file");
    let template = File::from(template);
    template.set_len(END).expect("room");
    for memory in [shared_memory(), private_memory(&template), memory()] {
        let mut guest = Guest::new(memory, 2);
        guest.fill(START, SEAM, 7);
        guest.report(NOTHING);
        let before = resident_kib(&guest.memory, START);
        assert!(before >= (SEAM - START) >> 10, "{before} KiB");
        guest.report(&[(START, 2 << 20), (START + (2 << 20), 4 << 20)]);
        let after = resident_kib(&guest.memory, START);
        assert!(after + (6 << 10) <= before, "{before} KiB before and {after} KiB after");
        assert!(guest.is(START, START + (6 << 20), 0));
        assert!(guest.is(START + (6 << 20), SEAM, 7), "what was not reported stays");
        guest.fill(START, START + PAGE, 8);
        assert!(guest.is(START, START + PAGE, 8));
    }
}

#[test]
fn a_machine_that_booted_gives_its_files_pages_back() {
    let mut guest = Guest::new(shared_memory(), 2);
    guest.fill(START, END, 7);
    guest.report(NOTHING);
    let before = stored_bytes(&guest.memory);
    guest.report(&[(START, 1 << 20)]);
    assert_eq!(stored_bytes(&guest.memory) + (1 << 20), before);
}

#[test]
fn a_copy_that_reports_gets_its_templates_pages_and_the_template_and_other_copies_stay() {
    let shared = rustix::fs::memfd_create("template", rustix::fs::MemfdFlags::CLOEXEC).expect("a file");
    let template = File::from(shared);
    template.set_len(END).expect("room");
    std::os::unix::fs::FileExt::write_all_at(&template, &[3; 4096], START).expect("a page");
    let [mut one, other] = [(); 2].map(|()| Guest::new(private_memory(&template), 2));
    for guest in [&one, &other] {
        guest.fill(START, START + 2 * PAGE, 7);
    }
    one.report(&[(START, 8192)]);
    assert!(one.is(START, START + PAGE, 3), "the template's page");
    assert!(one.is(START + PAGE, START + 2 * PAGE, 0));
    assert!(other.is(START, START + 2 * PAGE, 7));
    let mut page = [0; 4096];
    std::os::unix::fs::FileExt::read_exact_at(&template, &mut page, START).expect("a page");
    assert_eq!(page, [3; 4096]);
}

#[test]
fn only_whole_pages_within_a_report_go() {
    let mut guest = Guest::new(shared_memory(), 2);
    guest.fill(START, START + 8 * PAGE, 7);
    guest.report(&[
        (START + 1, 4095),
        (START + PAGE + 1, 8191),
        (START + 4 * PAGE, 4095),
        (START + 5 * PAGE, 1),
    ]);
    assert!(guest.is(START, START + 2 * PAGE, 7));
    assert!(guest.is(START + 2 * PAGE, START + 3 * PAGE, 0));
    assert!(guest.is(START + 3 * PAGE, START + 8 * PAGE, 7));
}

#[test]
fn a_report_that_is_not_all_in_memory_or_too_large_gives_nothing_back() {
    let mut guest = Guest::new(shared_memory(), 2);
    guest.fill(START, END, 7);
    for bad in [(END - PAGE, 8192), (END, 4096), (u64::MAX - 4095, 4096), (1 << 40, 4096), (START, u32::MAX)]
    {
        guest.report(&[(START, 4096), bad]);
        guest.report(&[bad]);
    }
    // More in all than one report may have.
    guest.report(&[(START, 4 << 20); 33]);
    assert!(guest.is(START, END, 7));
    guest.report(&[(START, 4 << 20); 32]);
    assert!(guest.is(START, START + (4 << 20), 0));
    // Across two regions.
    guest.report(&[(SEAM - PAGE, 8192)]);
    assert!(guest.is(SEAM - PAGE, SEAM + PAGE, 0) && guest.is(SEAM + PAGE, END, 7));
}

#[test]
fn a_report_that_is_to_be_read_gives_nothing_back() {
    let mut guest = Guest::new(shared_memory(), 2);
    guest.fill(START, START + PAGE, 7);
    guest.ring.describe(&guest.memory, 0, (START, 4096), 0, 0);
    guest.ring.offer(&guest.memory, 0);
    guest.process();
    assert_eq!(guest.ring.used(&guest.memory), Some((0, 0)));
    assert!(guest.is(START, START + PAGE, 7));
}

#[test]
fn reports_come_in_whatever_queue_a_driver_has_for_them_and_the_balloons_own_give_nothing_back() {
    for index in 0..QUEUE_SIZES.len() {
        let mut guest = Guest::new(shared_memory(), index);
        guest.fill(START, START + PAGE, 7);
        guest.report(&[(START, 4096)]);
        let expected = if index < FIRST_OF_REPORTS { 7 } else { 0 };
        assert!(guest.is(START, START + PAGE, expected), "queue {index}");
    }
}

#[test]
fn a_round_ends_with_what_a_report_may_have() {
    let mut guest = Guest::new(shared_memory(), 2);
    for number in 0..32 {
        guest.ring.describe(&guest.memory, number, (START, 4 << 20), WRITE | NEXT, number + 1);
    }
    guest.ring.describe(&guest.memory, 32, (START, 0), WRITE, 0);
    for _ in 0..3 {
        guest.ring.offer(&guest.memory, 0);
    }
    assert!(guest.process().again);
    assert_eq!(guest.ring.used(&guest.memory), Some((0, 0)));
    assert_eq!(guest.ring.used(&guest.memory), None, "others have their turn");
    while guest.process().again {}
    assert!(guest.ring.used(&guest.memory).is_some() && guest.ring.used(&guest.memory).is_some());
}

/// Where pieces of made-up reports lie: pages on either side of where two regions touch.
const WINDOW: [u64; 2] = [SEAM - 16 * PAGE, SEAM + 16 * PAGE];

fn piece() -> impl Strategy<Value = (u64, u32)> {
    let near = (0..40 * PAGE, prop_oneof![Just(0), Just(PAGE), Just(2 * PAGE), 0..9 * PAGE]);
    let near = (near, any::<bool>()).prop_map(|((at, length), aligned)| {
        let at = WINDOW[0] - 4 * PAGE + if aligned { at / PAGE * PAGE } else { at };
        (at, u32::try_from(length).expect("short"))
    });
    let far = (
        prop_oneof![Just(0_u64), Just(END - PAGE), Just(END), Just(u64::MAX - PAGE)],
        prop_oneof![Just(1), Just(2 * 4096), Just(u32::MAX)],
    );
    prop_oneof![20 => near, 1 => far]
}

proptest! {
    #[test]
    fn whatever_is_reported_whole_pages_within_it_go_and_nothing_else(
        pieces in proptest::collection::vec((piece(), proptest::bool::weighted(0.95)), 1..8),
        is_shared in any::<bool>(),
    ) {
        let mut guest = Guest::new(if is_shared { shared_memory() } else { memory() }, 2);
        guest.fill(WINDOW[0], WINDOW[1], 7);
        for (number, (piece, is_room)) in (0_u16..).zip(&pieces) {
            let more = if usize::from(number) + 1 < pieces.len() { NEXT } else { 0 };
            let flags = more | if *is_room { WRITE } else { 0 };
            guest.ring.describe(&guest.memory, number, *piece, flags, number + 1);
        }
        guest.ring.offer(&guest.memory, 0);
        guest.process();
        prop_assert_eq!(guest.ring.used(&guest.memory), Some((0, 0)));
        // What is to be read comes first, and no more of it than numbers of pages take; all of it lies in memory.
        let rooms = || pieces.iter().skip_while(|((_, length), is_room)| !is_room || *length == 0);
        let (mut readable, mut room) = (0, 0);
        for ((_, length), is_room) in &pieces {
            *(if *is_room { &mut room } else { &mut readable }) += u64::from(*length);
        }
        let is_good = rooms().all(|(_, is_room)| *is_room)
            && pieces.iter().all(|((at, length), _)| *length == 0 || at.saturating_add((*length).into()) <= END)
            && readable <= 4096
            && room <= MOST_BYTES as u64;
        for page in (WINDOW[0]..WINDOW[1]).step_by(4096) {
            let went = rooms().any(|((at, length), _)| *at <= page && page + PAGE <= at + u64::from(*length));
            prop_assert!(guest.is(page, page + PAGE, if is_good && went { 0 } else { 7 }), "{page:#x} {is_good}");
        }
    }
}
