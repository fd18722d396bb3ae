use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::{
    HOLE, HOLE_END, LEAST_BYTES, MOST_BYTES as MOST_MEMORY_BYTES, make_file, map, map_private,
};

fn set(memory_bytes: u64, ranges: &[(u64, u64, Access)]) -> WorkingSet {
    let range = |&(first, pages, access)| Range { first, pages, access };
    WorkingSet { memory_bytes, ranges: ranges.iter().map(range).collect() }
}

/// What comes of it as bytes.
fn again(set: &WorkingSet) -> Result<WorkingSet, WorkingSetError> {
    WorkingSet::decode(&set.encode(), set.memory_bytes)
}

const HOLE_PAGE: u64 = HOLE.0 / PAGE_BYTES;
const AFTER_HOLE: u64 = HOLE_END.0 / PAGE_BYTES;

#[test]
fn what_was_encoded_is_decoded() {
    let bytes = HOLE.0 + (1 << 20);
    for ranges in [
        &[][..],
        &[(0, 1, Access::Read)],
        &[(0, 2, Access::Write), (2, 1, Access::Read), (9, 3, Access::Read)],
        &[(HOLE_PAGE - 1, 1, Access::Write), (AFTER_HOLE, 256, Access::Read)],
    ] {
        let set = set(bytes, ranges);
        assert_eq!(again(&set).as_ref(), Ok(&set));
    }
}

#[test]
fn one_that_is_cut_short_or_changed_anywhere_is_refused() {
    let bytes = set(LEAST_BYTES, &[(1, 2, Access::Write), (5, 1, Access::Read)]).encode();
    for length in 0..bytes.len() {
        assert!(WorkingSet::decode(&bytes[..length], LEAST_BYTES).is_err(), "{length}");
    }
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << bit;
            assert!(WorkingSet::decode(&changed, LEAST_BYTES).is_err(), "{at}, {bit}");
        }
    }
    assert!(WorkingSet::decode(&[&bytes[..], &[0]].concat(), LEAST_BYTES).is_err());
}

#[test]
fn one_of_another_machine_is_refused() {
    let bytes = set(LEAST_BYTES, &[(1, 2, Access::Write)]).encode();
    assert_eq!(WorkingSet::decode(&bytes, LEAST_BYTES * 2), Err(WorkingSetError::OtherMachine));
    let mut newer = bytes.clone();
    newer[8] += 1;
    assert_eq!(WorkingSet::decode(&newer, LEAST_BYTES), Err(WorkingSetError::Foreign));
}

#[test]
fn pages_outside_memory_out_of_order_or_too_many_are_refused() {
    let last = LEAST_BYTES / PAGE_BYTES;
    let large = HOLE.0 + (1 << 20);
    let all = MOST_PAGES;
    for (bytes, ranges) in [
        (LEAST_BYTES, &[(last, 1, Access::Read)][..]),
        (LEAST_BYTES, &[(last - 1, 2, Access::Write)]),
        (LEAST_BYTES, &[(u64::MAX, 1, Access::Write)]),
        (LEAST_BYTES, &[(1, (u64::MAX >> 1) - 1, Access::Write)]),
        (LEAST_BYTES, &[(3, 0, Access::Write)]),
        (LEAST_BYTES, &[(3, 2, Access::Write), (4, 1, Access::Read)]),
        (LEAST_BYTES, &[(3, 2, Access::Write), (1, 1, Access::Read)]),
        (large, &[(HOLE_PAGE, 1, Access::Read)]),
        (large, &[(HOLE_PAGE - 1, 2, Access::Read)]),
        (large, &[(AFTER_HOLE - 1, 2, Access::Read)]),
        (large, &[(AFTER_HOLE + 256, 1, Access::Read)]),
        (1 << 30, &[(0, all + 1, Access::Read)]),
        (1 << 30, &[(0, all, Access::Read), (all, 1, Access::Write)]),
        (0, &[(0, 1, Access::Read)]),
        (MOST_MEMORY_BYTES + 4096, &[(0, 1, Access::Read)]),
    ] {
        assert_eq!(again(&set(bytes, ranges)), Err(WorkingSetError::Damaged), "{ranges:?}");
    }
    assert!(again(&set(1 << 30, &[(0, all, Access::Read)])).is_ok());
    let many: Vec<_> = (0..=MOST_RANGES as u64).map(|index| (index * 2, 1, Access::Read)).collect();
    assert_eq!(again(&set(1 << 30, &many)), Err(WorkingSetError::Damaged));
    let most = set(1 << 30, &many[1..]);
    assert!(again(&most).is_ok());
    assert_eq!(most.encode().len() as u64, MOST_BYTES);
}

/// What this process has of `memory`.
fn present(memory: &GuestMemoryMmap) -> WorkingSet {
    WorkingSet::of(&File::open("/proc/self/pagemap").expect("/proc"), memory).expect("few pages")
}

/// Bytes of a file in which each page is another, and not zero.
fn filled() -> File {
    let file = make_file(LEAST_BYTES).expect("memory");
    let all = map(&file, LEAST_BYTES).expect("a mapping");
    for page in 0..LEAST_BYTES / PAGE_BYTES {
        all.write_obj(!page, GuestAddress(page * PAGE_BYTES)).expect("memory");
    }
    file
}

#[test]
fn a_copy_shows_what_it_touched_and_another_has_it_before_it_touches_anything() {
    let file = filled();
    let memory = map_private(&file, LEAST_BYTES).expect("a mapping");
    assert_eq!(present(&memory), WorkingSet::empty(LEAST_BYTES));
    for page in [3, 4, 700] {
        memory.write_obj(7_u64, GuestAddress(page * PAGE_BYTES)).expect("memory");
    }
    let page: u64 = memory.read_obj(GuestAddress(2000 * PAGE_BYTES)).expect("memory");
    assert_eq!(page, !2000);
    let touched = present(&memory);
    let written = |set: &WorkingSet| {
        let written = set.ranges.iter().filter(|range| range.access == Access::Write);
        written.map(|range| (range.first, range.pages)).collect::<Vec<_>>()
    };
    assert_eq!(written(&touched), [(3, 2), (700, 1)]);
    let reads_of = |set: &WorkingSet, page: u64| {
        let mut read = set.ranges.iter().filter(|range| range.access == Access::Read);
        read.any(|range| (range.first..range.end()).contains(&page))
    };
    assert!(reads_of(&touched, 2000) && !reads_of(&touched, 1900), "{touched:?}");

    let kept = again(&touched).expect("a working set");
    let copy = map_private(&file, LEAST_BYTES).expect("a mapping");
    kept.populate(&copy);
    let there = present(&copy);
    assert_eq!(written(&there), written(&kept));
    assert!(reads_of(&there, 2000), "{there:?}");
    for page in [3, 4, 700, 2000] {
        let holds: u64 = copy.read_obj(GuestAddress(page * PAGE_BYTES)).expect("memory");
        assert_eq!(holds, !page, "nothing is written by it");
    }
}

#[test]
fn a_copy_that_touched_too_much_has_no_working_set() {
    let bytes = (MOST_PAGES + 1) * PAGE_BYTES;
    let memory = map_private(&make_file(bytes).expect("memory"), bytes).expect("a mapping");
    for page in 0..=MOST_PAGES {
        memory.write_obj(7_u8, GuestAddress(page * PAGE_BYTES)).expect("memory");
    }
    let error =
        WorkingSet::of(&File::open("/proc/self/pagemap").expect("/proc"), &memory).expect_err("too much");
    assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
}

#[test]
fn what_is_no_part_of_a_smaller_memory_is_left_alone() {
    let memory = map_private(&filled(), LEAST_BYTES).expect("a mapping");
    set(1 << 40, &[(LEAST_BYTES / PAGE_BYTES - 1, 2, Access::Write), (1 << 27, 4, Access::Read)])
        .populate(&memory);
    assert_eq!(present(&memory).pages(), 0);
}

#[test]
fn pages_one_behind_the_other_are_mapped_into_the_guest_at_once() {
    let set = set(LEAST_BYTES, &[(1, 2, Access::Write), (3, 1, Access::Read), (9, 3, Access::Read)]);
    assert_eq!(set.stretches(), [(1, 4), (9, 12)]);
    assert_eq!((set.pages(), set.written_pages()), (6, 2));
}
