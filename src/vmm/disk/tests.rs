use std::io::Write;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::bus::Window;
use crate::local::Local;
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
        let memory = map(&make_file(LEAST_BYTES).expect("memory"), LEAST_BYTES).expect("a mapping");
        let (sender, ends) = mpsc::channel();
        let failed = sender.clone();
        let failed = move |error: &std::io::Error| {
            failed.send(End::Device { what: error.to_string() }).expect("somebody hears");
        };
        let disk = Disk::new(file, "root", read_only, failed).expect("a disk");
        let local = Local::new("disk", disk, &memory, || Ok(()), sender).expect("a thread");
        let slot = Registers::slot(local, &memory).expect("registers");
        let driver = Self { memory, window: Arc::clone(&slot.window), slot, asked: 0, ends };
        driver.set(0x70, 3);
        driver.set(0x24, 1);
        driver.set(0x20, 1);
        driver.set(0x70, 11);
        driver.set(0x38, 16);
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
        let data = if kind == OUT { NEXT } else { NEXT | WRITE };
        self.descriptor(0, HEADER, 16, NEXT, 1);
        self.descriptor(1, DATA, length, data, 2);
        self.descriptor(2, STATUS, 1, WRITE, 0);
        self.memory
            .write_obj(0_u16, GuestAddress(AVAILABLE + 4 + u64::from(self.asked % 16) * 2))
            .expect("memory");
        self.asked += 1;
        self.memory.write_obj(self.asked, GuestAddress(AVAILABLE + 2)).expect("memory");
        self.slot.notified[0].write(1).expect("a notification");
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
}

#[test]
fn a_request_that_nobody_knows_is_answered_so() {
    let mut driver = Driver::new(file(), false);
    for kind in [2, 4, 11, 13, u32::MAX] {
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
