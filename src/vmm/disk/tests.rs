use std::io::Write;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::bus::Window;
use crate::local::{Local, Thread};
use crate::memory::{LEAST_BYTES, make_file, map};
use crate::mmio::Registers;
use crate::vcpu::End;

/// Where the driver has its things.
const TABLE: u64 = 0x10_0000;
const AVAILABLE: u64 = 0x11_0000;
const USED: u64 = 0x12_0000;
const HEADER: u64 = 0x13_0000;
const DATA: u64 = 0x14_0000;
const STATUS: u64 = 0x15_0000;
const WRITE: u16 = 2;
const NEXT: u16 = 1;

/// A driver of a disk behind registers, as a guest is one.
struct Driver {
    memory: GuestMemoryMmap,
    window: Arc<Mutex<dyn Window>>,
    slot: crate::vm::Slot,
    asked: u16,
    ends: mpsc::Receiver<End>,
}

impl Driver {
    fn new(file: File, read_only: bool) -> Self {
        let bytes = file.metadata().expect("metadata").len();
        Self::slot(Some(file), read_only, bytes)
    }

    fn slot(file: Option<File>, read_only: bool, capacity_bytes: u64) -> Self {
        let memory = map(&make_file(LEAST_BYTES).expect("memory"), LEAST_BYTES).expect("a mapping");
        let (sender, ends) = mpsc::channel();
        let failed = sender.clone();
        let failed = move |error: &std::io::Error| {
            failed.send(End::Device { what: error.to_string() }).expect("somebody hears");
        };
        let disk = Disk::slot(file, "root", read_only, capacity_bytes, failed).expect("a disk");
        let thread = Thread { name: "disk", confine: || Ok(()), narrowing: None };
        let on_end = Arc::new(move |end| drop(sender.send(end)));
        let local = Local::new(thread, disk, &memory, on_end).expect("a thread");
        let slot = Registers::slot(local, &memory).expect("registers");
        let driver = Self { memory, window: Arc::clone(&slot.device) as _, slot, asked: 0, ends };
        driver.set(0x70, 3);
        driver.set(0x24, 1);
        driver.set(0x20, 1);
        driver.set(0x70, 11);
        driver.set(0x38, 32);
        for (register, address) in [(0x80, TABLE), (0x90, AVAILABLE), (0xa0, USED)] {
            driver.set(register, u32::try_from(address).expect("low"));
        }
        driver.set(0x44, 1);
        driver.set(0x70, 15);
        driver
    }

    fn set(&self, offset: u64, value: u32) {
        self.window.lock().expect("a whole lock").write(offset, &value.to_le_bytes());
    }

    fn descriptor(&self, index: u64, address: u64, length: u32, flags: u16, next: u16) {
        let at = TABLE + index * 16;
        self.memory.write_obj(address, GuestAddress(at)).expect("memory");
        self.memory.write_obj(length, GuestAddress(at + 8)).expect("memory");
        self.memory.write_obj([flags, next], GuestAddress(at + 12)).expect("memory");
    }

    /// One request over `length` bytes at DATA, and its status: 0xee where none was written.
    fn ask(&mut self, kind: u32, sector: u64, length: u32) -> u8 {
        self.send(kind, sector, length);
        while self.memory.read_obj::<u16>(GuestAddress(USED + 2)).expect("memory") != self.asked {
            std::thread::yield_now();
        }
        self.memory.read_obj(GuestAddress(STATUS)).expect("memory")
    }

    fn send(&mut self, kind: u32, sector: u64, length: u32) {
        self.memory.write_obj([kind, 0], GuestAddress(HEADER)).expect("memory");
        self.memory.write_obj(sector, GuestAddress(HEADER + 8)).expect("memory");
        self.memory.write_obj(0xee_u8, GuestAddress(STATUS)).expect("memory");
        let data = if [OUT, DISCARD, WRITE_ZEROES].contains(&kind) { NEXT } else { NEXT | WRITE };
        self.descriptor(0, HEADER, 16, NEXT, 1);
        self.descriptor(1, DATA, length, data, 2);
        self.descriptor(2, STATUS, 1, WRITE, 0);
        self.memory
            .write_obj(0_u16, GuestAddress(AVAILABLE + 4 + u64::from(self.asked % 32) * 2))
            .expect("memory");
        self.asked += 1;
        self.memory.write_obj(self.asked, GuestAddress(AVAILABLE + 2)).expect("memory");
        self.slot.notified[0].write(1).expect("a notification");
    }

    /// Discards or zeroes what `segments` say: sector, number of sectors, flags.
    fn ask_of(&mut self, kind: u32, segments: &[(u64, u32, u32)]) -> u8 {
        let bytes: Vec<u8> = segments
            .iter()
            .flat_map(|(sector, count, flags)| {
                [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
            })
            .collect();
        self.memory.write_slice(&bytes, GuestAddress(DATA)).expect("memory");
        self.ask(kind, 0, u32::try_from(bytes.len()).expect("few"))
    }

    fn data(&self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(DATA)).expect("memory");
        bytes
    }
}

fn file() -> File {
    let mut file = tempfile::tempfile().expect("a file");
    for number in 0..4_u8 {
        file.write_all(&[number; 512]).expect("room");
    }
    file.write_all(b"no whole sector").expect("room");
    file
}

#[test]
fn what_is_written_is_in_the_file_and_is_read_again() {
    let file = file();
    let mut driver = Driver::new(file.try_clone().expect("a file"), false);
    assert_eq!(driver.ask(IN, 1, 1024), OK);
    assert_eq!(driver.data(1024), [[1; 512], [2; 512]].concat());
    driver.memory.write_slice(&[9; 512], GuestAddress(DATA)).expect("memory");
    assert_eq!(driver.ask(OUT, 3, 512), OK);
    let mut sector = [0; 512];
    file.read_exact_at(&mut sector, 3 * 512).expect("a sector");
    assert_eq!(sector, [9; 512]);
    assert_eq!(driver.ask(GET_ID, 0, 20), OK);
    assert_eq!(&driver.data(5), b"root\0");
}

#[test]
fn requests_that_are_there_at_once_are_answered_in_their_order() {
    let file = file();
    let driver = Driver::new(file.try_clone().expect("a file"), false);
    driver.memory.write_slice(&[9; 512], GuestAddress(DATA)).expect("memory");
    // Sector 1 as it was, as the second request leaves it and as the fourth does; and what no sector is.
    let asked = [(IN, 1, 1), (OUT, 1, 0), (IN, 1, 2), (DISCARD, 0, 3), (IN, 1, 4), (IN, 4, 5)];
    driver.memory.write_obj([1_u64, 1], GuestAddress(DATA + 3 * 512)).expect("memory");
    for (number, (kind, sector, place)) in (0..).zip(asked) {
        let (header, status) = (HEADER + number * 16, STATUS + number);
        driver.memory.write_obj([kind, 0], GuestAddress(header)).expect("memory");
        driver.memory.write_obj::<u64>(sector, GuestAddress(header + 8)).expect("memory");
        driver.memory.write_obj(0xee_u8, GuestAddress(status)).expect("memory");
        let first = u16::try_from(number * 3).expect("few");
        let (length, data) = match kind {
            DISCARD => (16, NEXT),
            OUT => (512, NEXT),
            _ => (512, NEXT | WRITE),
        };
        driver.descriptor(number * 3, header, 16, NEXT, first + 1);
        driver.descriptor(number * 3 + 1, DATA + place * 512, length, data, first + 2);
        driver.descriptor(number * 3 + 2, status, 1, WRITE, 0);
        driver.memory.write_obj(first, GuestAddress(AVAILABLE + 4 + number * 2)).expect("memory");
    }
    driver.memory.write_obj(6_u16, GuestAddress(AVAILABLE + 2)).expect("memory");
    driver.slot.notified[0].write(1).expect("a notification");
    while driver.memory.read_obj::<u16>(GuestAddress(USED + 2)).expect("memory") != 6 {
        std::thread::yield_now();
    }
    let statuses: [u8; 6] = driver.memory.read_obj(GuestAddress(STATUS)).expect("memory");
    assert_eq!(statuses, [OK, OK, OK, OK, OK, FAILED]);
    let data = driver.data(5 * 512);
    let sector = |place: usize| data[place * 512..][..512].to_vec();
    assert_eq!([sector(1), sector(2), sector(4)], [[1; 512], [9; 512], [0; 512]]);
}

#[test]
fn nothing_beyond_the_last_whole_sector_is_reached() {
    let file = file();
    let before = file.metadata().expect("metadata").len();
    let mut driver = Driver::new(file.try_clone().expect("a file"), false);
    for kind in [IN, OUT] {
        for (sector, length) in [(4, 512), (3, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 100)] {
            assert_eq!(driver.ask(kind, sector, length), FAILED, "{kind} {sector} {length}");
        }
    }
    assert_eq!(file.metadata().expect("metadata").len(), before);
}

#[test]
fn a_disk_that_is_read_only_is_not_written() {
    let file = file();
    let mut driver = Driver::new(file.try_clone().expect("a file"), true);
    assert_eq!(driver.ask(OUT, 0, 512), FAILED);
    let mut sector = [7; 512];
    file.read_exact_at(&mut sector, 0).expect("a sector");
    assert_eq!(sector, [0; 512]);
    for kind in [FLUSH, DISCARD, WRITE_ZEROES] {
        assert_eq!(driver.ask_of(kind, &[(1, 1, 0)]), UNSUPPORTED, "{kind}");
    }
    assert_eq!(Device::<()>::features(&Disk::new(file, "", true, |_| ()).expect("a disk")) & WRITES, 0);
}

/// A file of `sectors` sectors of ones.
fn ones(sectors: usize) -> File {
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(&vec![1; sectors * 512]).expect("room");
    file
}

/// Which sectors of `file` are zeroes; all others are still ones.
fn zeroes(file: &File) -> Vec<u64> {
    let sectors = file.metadata().expect("metadata").len() / 512;
    let mut sector = [0; 512];
    (0..sectors)
        .filter(|number| {
            file.read_exact_at(&mut sector, number * 512).expect("a sector");
            assert!(sector == [0; 512] || sector == [1; 512], "sector {number}");
            sector == [0; 512]
        })
        .collect()
}

#[test]
fn what_is_discarded_or_zeroed_is_so_and_nothing_else() {
    for (kind, flags) in [(DISCARD, 0), (WRITE_ZEROES, 0), (WRITE_ZEROES, UNMAP)] {
        let file = ones(64);
        let mut driver = Driver::new(file.try_clone().expect("a file"), false);
        assert_eq!(driver.ask_of(kind, &[(7, 20, flags)]), OK, "{kind} {flags}");
        assert_eq!(zeroes(&file), (7..27).collect::<Vec<_>>(), "{kind} {flags}");
        assert_eq!(driver.ask_of(kind, &[(63, 1, flags)]), OK);
        assert_eq!(driver.ask_of(kind, &[(3, 0, flags)]), OK, "nothing of nothing");
        assert_eq!(zeroes(&file).len(), 21);
        assert_eq!(driver.ask(FLUSH, 0, 512), OK);
    }
    let file = ones(64);
    let mut driver = Driver::new(file.try_clone().expect("a file"), false);
    assert_eq!(driver.ask_of(DISCARD, &[(8, 8, 0), (32, 8, 0)]), OK);
    assert_eq!(zeroes(&file), (8..16).chain(32..40).collect::<Vec<_>>());
}

#[test]
fn what_is_discarded_gives_its_room_back() {
    use std::os::unix::fs::MetadataExt;
    let file = ones(2048);
    let blocks = || file.metadata().expect("metadata").blocks();
    let before = blocks();
    let mut driver = Driver::new(file.try_clone().expect("a file"), false);
    assert_eq!(driver.ask_of(DISCARD, &[(0, 1024, 0)]), OK);
    let half = blocks();
    assert!(half < before, "{before} {half}");
    assert_eq!(driver.ask_of(WRITE_ZEROES, &[(1024, 1024, UNMAP)]), OK);
    assert!(blocks() < half);
}

#[test]
fn a_part_that_cannot_be_discarded_leaves_all_as_it_was() {
    let file = ones(64);
    let mut driver = Driver::new(file.try_clone().expect("a file"), false);
    let most = DISCARDS.1;
    for kind in [DISCARD, WRITE_ZEROES] {
        for bad in [(64, 1, 0), (60, 5, 0), (u64::MAX, 1, 0), (u64::MAX / 512, 2, 0), (0, u32::MAX, 0)] {
            assert_eq!(driver.ask_of(kind, &[bad]), FAILED, "{kind} {bad:?}");
        }
        assert_eq!(driver.ask_of(kind, &[(0, 1, 2)]), UNSUPPORTED);
        assert_eq!(driver.ask_of(kind, &[]), FAILED);
        assert_eq!(driver.ask(kind, 0, 15), FAILED);
        assert_eq!(driver.ask_of(kind, &[(0, 1, 0); 17]), FAILED);
    }
    assert_eq!(driver.ask_of(DISCARD, &[(0, 1, 0), (64, 1, 0), (2, 1, 0)]), FAILED);
    assert_eq!(driver.ask_of(DISCARD, &[(0, 1, UNMAP)]), UNSUPPORTED);
    assert_eq!(zeroes(&file), [0_u64; 0]);
    // More than a request may say, of a disk that is large enough.
    file.set_len(u64::from(most) * 1024).expect("a long file");
    let mut driver = Driver::new(file.try_clone().expect("a file"), false);
    assert_eq!(driver.ask_of(DISCARD, &[(64, most + 1, 0)]), FAILED);
    assert_eq!(driver.ask_of(DISCARD, &[(64, most, 0)]), OK);
}

#[test]
fn where_a_file_cannot_be_zeroed_zeroes_are_written() {
    // tmpfs and memfds make holes, and know no zeroed range.
    let mut file = kiln_virtio::ram::new(1 << 20).expect("a file in memory");
    file.write_all(&vec![1; 1 << 20]).expect("room");
    let mut driver = Driver::new(file.try_clone().expect("a file"), false);
    assert_eq!(driver.ask_of(WRITE_ZEROES, &[(3, 600, 0)]), OK);
    assert_eq!(zeroes(&file), (3..603).collect::<Vec<_>>());
}

#[test]
fn a_disk_may_say_that_it_is_larger_than_its_file_and_answers_what_there_is() {
    let capacity = 16_u64 << 40;
    let mut driver = Driver::slot(Some(file()), false, capacity);
    let mut sectors = [0; 8];
    driver.window.lock().expect("a whole lock").read(0x100, &mut sectors);
    assert_eq!(u64::from_le_bytes(sectors), capacity / 512);
    assert_eq!(driver.ask(IN, 3, 512), OK);
    for kind in [IN, OUT] {
        assert_eq!(driver.ask(kind, 4, 512), FAILED);
        assert_eq!(driver.ask(kind, (capacity >> 9) - 1, 512), FAILED);
    }
    assert_eq!(driver.ask_of(DISCARD, &[(4, 1, 0)]), FAILED);
    assert!(driver.ends.try_recv().is_err(), "the machine goes on");
    assert_eq!(driver.ask(IN, 3, 512), OK);
}

#[test]
fn a_disk_without_a_file_has_a_name_and_reads_as_zeros() {
    let mut driver = Driver::slot(None, false, 1 << 40);
    assert_eq!(driver.ask(IN, 7, 512), OK);
    assert_eq!(driver.data(512), [0; 512]);
    for kind in [OUT, FLUSH] {
        assert_eq!(driver.ask(kind, 0, 512), OK, "{kind}");
    }
    for kind in [DISCARD, WRITE_ZEROES] {
        assert_eq!(driver.ask_of(kind, &[(0, 1, 0)]), FAILED, "{kind}");
    }
    assert_eq!(driver.ask(OUT, 8, 512), FAILED, "a page that is swapped out");
    let mut read_only = Driver::slot(None, true, 1 << 40);
    assert_ne!(read_only.ask(OUT, 0, 512), OK);
    assert_eq!(driver.ask(GET_ID, 0, 20), OK);
    assert_eq!(&driver.data(5), b"root\0");
    assert!(driver.ends.try_recv().is_err(), "the machine goes on");
}

#[test]
fn the_configuration_has_the_limits_where_the_specification_puts_them() {
    let disk = Disk::new(file(), "root", false, |_| ()).expect("a disk");
    let config = Device::<()>::config(&disk);
    assert_eq!(config.len(), 60);
    let number = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().expect("four bytes"));
    assert_eq!((number(36), number(40)), (DISCARDS.1, DISCARDS.0));
    assert_eq!((number(48), number(52)), (ZEROES.1, ZEROES.0));
    assert_eq!((number(44), config[56]), (HOLE_SECTORS, 1));
}

#[test]
fn a_request_that_nobody_knows_is_answered_so() {
    let mut driver = Driver::new(file(), false);
    for kind in [2, 3, 5, 10, 12, 14, u32::MAX] {
        assert_eq!(driver.ask(kind, 0, 512), UNSUPPORTED, "{kind}");
    }
}

#[test]
fn a_driver_that_breaks_its_ring_ends_the_machine() {
    let mut driver = Driver::new(file(), false);
    assert_eq!(driver.ask(IN, 0, 512), OK);
    driver.memory.write_obj(9_999_u16, GuestAddress(AVAILABLE + 2)).expect("memory");
    driver.slot.notified[0].write(1).expect("a notification");
    let end = driver.ends.recv_timeout(Duration::from_secs(20)).expect("an end");
    assert!(matches!(end, End::Device { .. }), "{end}");
}

#[test]
fn what_the_host_cannot_read_ends_the_machine_and_is_not_answered() {
    let file = file();
    let mut driver = Driver::new(file.try_clone().expect("a file"), false);
    file.set_len(512).expect("a shorter file");
    driver.send(IN, 2, 512);
    let end = driver.ends.recv_timeout(Duration::from_secs(20)).expect("an end");
    assert!(matches!(end, End::Device { .. }), "{end}");
    driver.send(IN, 0, 512);
    assert_eq!(driver.memory.read_obj::<u16>(GuestAddress(USED + 2)).expect("memory"), 0);
}

#[test]
fn the_largest_request_that_a_driver_is_allowed_is_taken() {
    let disk = Disk::new(file(), "root", false, |_| ()).expect("a disk");
    let word = |at: usize| {
        let bytes = disk.config()[at..at + 4].try_into().expect("four bytes");
        usize::try_from(u32::from_le_bytes(bytes)).expect("it fits")
    };
    assert!(word(8) * word(12) <= MOST_BYTES);
    assert_eq!(Device::<()>::features(&disk) & SIZES, SIZES);
}

#[test]
fn a_disk_that_is_slow_goes_on_with_what_it_has_taken_in_the_next_round() {
    let memory = map(&make_file(LEAST_BYTES).expect("memory"), LEAST_BYTES).expect("a mapping");
    let mut disk = Disk::new(file(), "root", true, |_| ()).expect("a disk");
    disk.round_time = Duration::ZERO;
    let put = |at, value: u64| memory.write_obj(value, GuestAddress(at)).expect("memory");
    // Three reads, of a sector each.
    for number in 0..3_u64 {
        let header = HEADER + number * 16;
        put(header, u64::from(IN));
        put(header + 8, number + 1);
        let pieces =
            [(header, 16, NEXT), (DATA + number * 512, 512, NEXT | WRITE), (STATUS + number, 1, WRITE)];
        for (index, (address, length, flags)) in (number * 3..).zip(pieces) {
            put(TABLE + index * 16, address);
            put(TABLE + index * 16 + 8, length | u64::from(flags) << 32 | (index + 1) << 48);
        }
        let head = u16::try_from(number * 3).expect("few");
        memory.write_obj(head, GuestAddress(AVAILABLE + 4 + number * 2)).expect("memory");
    }
    memory.write_obj(3_u16, GuestAddress(AVAILABLE + 2)).expect("memory");
    let mut queue = Queue::new(32).expect("a queue");
    queue.try_set_desc_table_address(GuestAddress(TABLE)).expect("a table");
    queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).expect("a ring");
    queue.try_set_used_ring_address(GuestAddress(USED)).expect("a ring");
    queue.set_ready(true);
    for answered in 1..=3_u16 {
        let outcome = disk.process(Wake::Queue(0), &mut [Some(&mut queue)], &memory).expect("it is served");
        assert!(outcome.again);
        assert_eq!(memory.read_obj::<u16>(GuestAddress(USED + 2)).expect("memory"), answered);
        assert_eq!(queue.next_avail(), answered, "what is not answered is not taken");
    }
    let mut data = vec![0; 1536];
    memory.read_slice(&mut data, GuestAddress(DATA)).expect("memory");
    assert_eq!(data, [[1; 512], [2; 512], [3; 512]].concat());
}
