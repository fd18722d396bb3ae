//! Parts and stubs of which no unified kernel image is made, and images that look like one and are not signed.

use super::*;
use crate::uefi::pe::sample;

const SBAT: &[u8] = b"sbat,1,SBAT Version,sbat,1,https://github.com/rhboot/shim/blob/main/SBAT.md\n";
/// How many sections the sample has.
const OWN: usize = 3;

fn parts<'a>(kernel: &'a [u8], initrds: &'a [&'a [u8]]) -> Parts<'a> {
    Parts {
        os_release: Some(b"ID=test\n"),
        release: Some("6.12"),
        command_line: "quiet",
        kernel,
        initrds,
        sbat: Some(SBAT),
    }
}

/// An image of six parts, in the order of their headers: `.osrel`, `.uname`, `.cmdline`, `.linux`, `.initrd`, `.sbat`.
fn unified() -> Vec<u8> {
    write(&sample::image(false), &parts(&sample::image(false), &[b"initrd"])).expect("a stub with room")
}

/// The image with another name for the section at `index`.
fn renamed(index: usize, name: &str) -> Vec<u8> {
    let mut bytes = unified();
    let header = sample::section(OWN + index).start;
    sample::put(&mut bytes, header, &[0; 8]);
    sample::put(&mut bytes, header, name.as_bytes());
    bytes
}

#[test]
fn the_image_that_is_changed_here_is_good() {
    let bytes = unified();
    let uki = Uki::read(&bytes).expect("complete");
    let names: Vec<&str> = uki.payloads().map(|(name, _)| name).collect();
    assert_eq!(names, [".osrel", ".uname", ".cmdline", ".linux", ".initrd", ".sbat"]);
    assert_eq!(uki.section(".linux"), Some(&sample::image(false)[..]));
    assert_eq!(uki.section(".initrd"), Some(&b"initrd"[..]));
}

#[test]
fn a_stub_without_room_for_headers_is_refused_and_nothing_there_is_overwritten() {
    // Something that lies behind so many free headers.
    for room in 0..6 {
        let mut stub = sample::image(false);
        sample::put(&mut stub, sample::section(OWN + room).end - 1, b"x");
        let refused = write(&stub, &parts(&sample::image(false), &[b"initrd"]));
        let Err(UkiError::NoRoom { room: found, needed: 6 }) = refused else { panic!("{refused:?}") };
        // The byte is the last of a header's place, which is free but for it.
        assert_eq!(found, room);
    }
    let mut stub = sample::image(false);
    sample::put(&mut stub, sample::section(OWN + 6).end - 1, b"x");
    let made = write(&stub, &parts(&sample::image(false), &[b"initrd"])).expect("room for all six");
    assert_eq!(made[sample::section(OWN + 6).end - 1], b'x');
}

#[test]
fn a_stubs_section_without_a_length_in_memory_keeps_its_addresses() {
    let mut stub = sample::image(false);
    let data = sample::section(1).start;
    // The last in memory, and over the end of a page.
    for (at, value) in [(sample::OPTIONAL + 56, 0x5000_u32), (data + 12, 0x3f00), (data + 8, 0)] {
        sample::put(&mut stub, at, &value.to_le_bytes());
    }
    let bytes = write(&stub, &parts(&sample::image(false), &[b"initrd"])).expect("a stub with room");
    let uki = Uki::read(&bytes).expect("nothing lies over it");
    assert_eq!(uki.image().sections()[OWN].virtual_address, 0x5000);
}

#[test]
fn a_table_behind_a_stubs_sections_keeps_its_addresses() {
    let mut stub = sample::image(false);
    // The exception table, of 256 bytes, far behind the last section.
    let directory = sample::OPTIONAL + 112 + 8 * 3;
    for (at, value) in [(sample::OPTIONAL + 56, 0x9000_u32), (directory, 0x8000), (directory + 4, 0x100)] {
        sample::put(&mut stub, at, &value.to_le_bytes());
    }
    let bytes = write(&stub, &parts(&sample::image(false), &[b"initrd"])).expect("a stub with room");
    let uki = Uki::read(&bytes).expect("the table is in the image");
    assert_eq!(uki.image().sections()[OWN].virtual_address, 0x9000);
}

#[test]
fn a_stub_that_is_signed_or_full_or_cannot_be_revoked_is_refused() {
    let kernel = sample::image(false);
    let initrds: &[&[u8]] = &[b"initrd"];
    assert!(matches!(write(&sample::image(true), &parts(&kernel, initrds)), Err(UkiError::Signed)));
    let full = write(&unified(), &parts(&kernel, initrds));
    assert!(matches!(full, Err(UkiError::NotEmpty(name)) if name == ".osrel"));
    let without = Parts { sbat: None, ..parts(&kernel, initrds) };
    assert!(matches!(write(&sample::image(false), &without), Err(UkiError::NoSbat)));
    let broken = Parts { sbat: Some(&SBAT[..SBAT.len() - 1]), ..parts(&kernel, initrds) };
    assert!(matches!(write(&sample::image(false), &broken), Err(UkiError::Sbat(SbatError::Text))));
}

#[test]
fn a_kernel_that_firmware_cannot_start_is_refused() {
    let refused = |kernel: &[u8]| write(&sample::image(false), &parts(kernel, &[b"initrd"])).err();
    let with = |at: usize, value: &[u8]| {
        let mut kernel = sample::image(false);
        sample::put(&mut kernel, at, value);
        kernel
    };
    // For AArch64, for i386, with a header of 32 bits, and without the stub that makes a kernel an image.
    let machine = |machine: u16| with(sample::PE + 4, &machine.to_le_bytes());
    for kernel in [
        machine(0xaa64),
        machine(0x014c),
        with(sample::OPTIONAL, &[0x0b, 0x01]),
        with(0, b"\x7fE"),
        Vec::new(),
    ] {
        let error = refused(&kernel);
        assert!(matches!(error, Some(UkiError::Kernel(_))), "{error:?}");
    }
    let error = refused(&unified());
    assert!(matches!(error, Some(UkiError::Nested)), "{error:?}");
}

#[test]
fn initrds_over_four_gibibytes_are_refused_before_they_are_put_together() {
    // The same archive again and again takes no memory as long as nobody copies it.
    let archive = vec![0; 64 << 20];
    let initrds = [&archive[..]; 64];
    let refused = write(&sample::image(false), &parts(&sample::image(false), &initrds));
    assert!(matches!(refused, Err(UkiError::TooLarge("initrd"))), "{refused:?}");
}

#[test]
fn an_image_without_a_part_that_must_be_signed_with_it_is_refused() {
    for (index, name) in [(2, ".cmdline"), (3, ".linux"), (4, ".initrd"), (5, ".sbat")] {
        let bytes = renamed(index, ".other");
        let refused = Uki::read(&bytes).err();
        assert!(matches!(&refused, Some(UkiError::Missing(missing)) if *missing == name), "{refused:?}");
    }
}

#[test]
fn an_image_that_says_something_twice_is_refused() {
    for name in [".linux", ".initrd", ".cmdline", ".sbat", ".text"] {
        let bytes = renamed(0, name);
        let refused = Uki::read(&bytes).err();
        assert!(matches!(&refused, Some(UkiError::Twice(twice)) if twice == name), "{refused:?}");
    }
}

#[test]
fn a_section_that_is_longer_in_memory_than_in_the_file_is_refused() {
    for index in 0..6 {
        let mut bytes = unified();
        // More than its bytes, and still before the next section's page.
        sample::put(&mut bytes, sample::section(OWN + index).start + 8, &0xf00_u32.to_le_bytes());
        let refused = Uki::read(&bytes).err();
        let outside =
            matches!(&refused, Some(UkiError::Part { fault, .. }) if fault.contains("outside of its bytes"));
        assert!(outside, "section {index}: {refused:?}");
    }
}

#[test]
fn a_command_line_that_a_kernel_would_not_take_whole_is_refused() {
    for (text, good) in [
        ("a".repeat(COMMAND_LINE_BYTES_MAX), true),
        ("a".repeat(COMMAND_LINE_BYTES_MAX + 1), false),
        ("quiet\0init=/bin/sh".to_owned(), false),
        ("quiet\ninit=/bin/sh".to_owned(), false),
        (" \t".to_owned(), false),
        (String::new(), false),
    ] {
        let kernel = sample::image(false);
        let given = Parts { command_line: &text, ..parts(&kernel, &[b"initrd"]) };
        let made = write(&sample::image(false), &given);
        let refused = matches!(made, Err(UkiError::Part { part: "command line", .. }));
        assert_eq!((made.is_ok(), refused), (good, !good), "{text:?}");
    }
}
