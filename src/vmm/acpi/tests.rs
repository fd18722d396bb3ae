use vm_memory::GuestMemoryBackend;

use super::*;
use crate::memory::{LEAST_BYTES, make_file, map};

fn machine() -> GuestMemoryMmap {
    map(&make_file(LEAST_BYTES).expect("memory"), LEAST_BYTES).expect("a mapping")
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn bytes(memory: &GuestMemoryMmap, at: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    memory.read_slice(&mut bytes, GuestAddress(at)).expect("memory");
    bytes
}

/// The table at `at`, whole and with a sum of zero.
fn table(memory: &GuestMemoryMmap, at: u64) -> Vec<u8> {
    let length: u32 = memory.read_obj(GuestAddress(at + 4)).expect("memory");
    let table = bytes(memory, at, usize::try_from(length).expect("a length"));
    assert_eq!(sum(&table), 0, "{}", String::from_utf8_lossy(&table[..4]));
    table
}

fn number(table: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(table[at..at + 8].try_into().expect("eight bytes"))
}

#[test]
fn every_table_is_reached_from_the_first_and_sums_up_to_zero() {
    let memory = machine();
    let first = write(&memory, 3, 4).expect("tables");
    let rsdp = bytes(&memory, first.0, 36);
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
    let xsdt = table(&memory, number(&rsdp, 24));
    let tables: Vec<_> = xsdt[36..].chunks(8).map(|entry| table(&memory, number(entry, 0))).collect();
    let names: Vec<_> = tables.iter().map(|table| &table[..4]).collect();
    assert_eq!(names, [b"FACP", b"APIC"]);
    let dsdt = table(&memory, number(&tables[0], 140));
    assert_eq!(&dsdt[..4], b"DSDT");
    assert_eq!(dsdt.windows(8).filter(|part| part == b"LNRO0005").count(), 4);
    // Local APICs are structures of type 0 with 8 bytes each; then comes the I/O APIC.
    assert_eq!(tables[1].len(), 44 + 3 * 8 + 12);
}

#[test]
fn the_platform_says_that_it_has_no_legacy_hardware() {
    let table = fadt(0x1234);
    let flags = u32::from_le_bytes(table[112..116].try_into().expect("four bytes"));
    assert_eq!(flags & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10);
    assert_eq!(table[109], 0x24);
    assert_eq!(number(&table, 120), 0x602, "the reset register");
    assert_eq!(number(&table, 248), 0x600, "the sleep control register");
}

#[test]
fn a_device_has_a_window_and_an_interrupt_of_its_own() {
    let places: Vec<_> = (0..MOST_DEVICES).map(|index| place(index).expect("a place")).collect();
    for pair in places.windows(2) {
        assert_eq!((pair[1].0.0 - pair[0].0.0, pair[1].1 - pair[0].1), (WINDOW_BYTES, 1));
    }
    assert!(place(MOST_DEVICES).is_none());
    assert!(matches!(write(&machine(), 1, MOST_DEVICES + 1), Err(AcpiError::TooManyDevices(19))));
    write(&machine(), u8::MAX, MOST_DEVICES).expect("the most there can be fits");
    assert_eq!(machine().num_regions(), 1);
}
