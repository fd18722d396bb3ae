//! Images that are malformed, ambiguous or tampered with, each a field away from a good one.

use proptest::prelude::*;

use super::sample::{END, HEADERS, OPTIONAL, PE, TABLE, TABLE_BYTES, image, put, section};
use super::{Image, PeError, SectionFault};
use crate::uefi::uki::Uki;

fn refusal(bytes: &[u8]) -> Option<PeError> {
    Image::parse(bytes).err()
}

fn fault(bytes: &[u8]) -> Option<SectionFault> {
    match refusal(bytes) {
        Some(PeError::Section { fault, .. }) => Some(fault),
        _ => None,
    }
}

#[test]
fn the_image_that_is_broken_here_is_good() {
    for certificates in [false, true] {
        let bytes = image(certificates);
        let image = Image::parse(&bytes).expect("a good image");
        assert_eq!(image.certificates().len(), usize::from(certificates));
        assert_eq!(image.sections().len(), 3);
        assert_eq!(image.content(&image.sections()[0]).len(), 0x1ff);
    }
}

/// A width in bytes, and values that no field of that width may have at a place.
type Case = (&'static str, usize, usize, &'static [u64]);

const BAD: &[Case] = &[
    ("MZ", 0, 2, &[0, 0x4d5a, 0x5a00]),
    (
        "e_lfanew",
        0x3c,
        4,
        &[0, 4, 0x3f, 0x41, 0x48, 0x200, 0x7f0, 0x800, 0x1000, 0x7fff_ffff, 0xffff_ffff, 0xffff_fff0],
    ),
    ("signature", PE, 4, &[0, 0x4550_0000, 0x4e45, 0x0001_4550]),
    ("machine", PE + 4, 2, &[0, 0x14c, 0x1c0, 0xaa64, 0x200, 0x5064, 0x6486, 0xffff]),
    ("sections", PE + 6, 2, &[0, 4, 17, 96, 97, 0x7fff, 0xffff]),
    ("symbols", PE + 12, 4, &[1, 0x400, 0x7ff, 0x800, 0x801, 0xffff_ffff]),
    ("optional size", PE + 20, 2, &[0, 1, 112, 224, 232, 239, 241, 248, 0x7fff, 0xffff]),
    ("characteristics", PE + 22, 2, &[0, 0x2002, 0x2206, 0x0204]),
    ("magic", OPTIONAL, 2, &[0, 0x10b, 0x107, 0x20c, 0xffff]),
    ("section alignment", OPTIONAL + 32, 4, &[0, 1, 0x100, 0x1001, 0x1800, 0xffff_ffff]),
    ("file alignment", OPTIONAL + 36, 4, &[0, 1, 2, 0x10, 0x201, 0x300, 0x800, 0x2_0000, 0xffff_ffff]),
    ("image size", OPTIONAL + 56, 4, &[0, 1, 0x400, 0x1000, 0x2000, 0x3000, 0x307f]),
    (
        "header size",
        OPTIONAL + 60,
        4,
        &[0, 1, 0x40, 0x1a0, 0x1c0, 0x200, 0x3ff, 0x401, 0x600, 0x800, 0x801, 0x1000, 0xffff_ffff],
    ),
    ("subsystem", OPTIONAL + 68, 2, &[0, 1, 2, 3, 9, 14, 16, 0xffff]),
    ("directories", OPTIONAL + 108, 4, &[0, 1, 4, 5, 15, 17, 32, 0x7fff_ffff, 0xffff_ffff]),
    ("export directory", OPTIONAL + 112, 4, &[0x4001, 0xffff_ffff]),
    ("relocation directory", OPTIONAL + 112 + 44, 4, &[0x4001, 0xffff_ffff]),
    (
        "certificate table",
        OPTIONAL + 112 + 32,
        4,
        &[
            0,
            1,
            4,
            0x40,
            0x400,
            0x600,
            0x7f8,
            0x801,
            0x804,
            0x808,
            0x810,
            0x818,
            0x820,
            0xffff_fff8,
            0xffff_ffff,
        ],
    ),
    (
        "certificate size",
        OPTIONAL + 112 + 36,
        4,
        &[0, 1, 7, 8, 16, 20, 23, 25, 32, 0x800, 0xffff_ffe8, 0xffff_ffff],
    ),
    ("entry length", END, 4, &[0, 1, 7, 8, 9, 15, 16, 17, 25, 32, 0x7fff_ffff, 0xffff_fff9, 0xffff_ffff]),
    ("entry revision", END + 4, 2, &[0, 0x100, 0x201, 2, 0xffff]),
    ("entry type", END + 6, 2, &[0, 1, 3, 4, 0xef0, 0xef1, 0xffff]),
    ("entry padding", END + 20, 1, &[1, 0xff]),
    ("name", TABLE, 1, &[0, 1, 0x20, 0x7f, 0x80, 0xff]),
    ("name's end", TABLE + 7, 1, &[1, 0x2e, 0xff]),
    ("virtual size", TABLE + 8, 4, &[0x1001, 0x2000, 0x3001, 0x7fff_ffff, 0xffff_f000, 0xffff_ffff]),
    ("address", TABLE + 12, 4, &[0, 1, 0x3ff, 0x1e02, 0x2000, 0x3000, 0x4000, 0xffff_f000, 0xffff_ffff]),
    ("raw size", TABLE + 16, 4, &[0, 0x201, 0x400, 0x401, 0x600, 0x7fff_ffff, 0xffff_ffff, 0xffff_fc00]),
    (
        "raw pointer",
        TABLE + 20,
        4,
        &[0, 1, 0x200, 0x3ff, 0x401, 0x500, 0x600, 0x800, 0x1000, 0x7fff_ffff, 0xffff_ffff, 0xffff_fe00],
    ),
    ("relocations", TABLE + 24, 4, &[1, 0x400]),
    ("line numbers", TABLE + 28, 4, &[1, 0x400]),
    ("relocation count", TABLE + 32, 2, &[1, 0xffff]),
    ("line number count", TABLE + 34, 2, &[1, 0xffff]),
    ("second address", TABLE + 40 + 12, 4, &[0x1000, 0x11fe, 0x3000, 0x3001]),
    ("second raw pointer", TABLE + 40 + 20, 4, &[0x400, 0x500, 0x800, 0x601]),
    ("third virtual size", TABLE + 80 + 8, 4, &[0, 0x1001]),
];

#[test]
fn every_field_with_a_value_that_it_cannot_have_is_refused() {
    let mut cases = 0;
    for (what, at, width, values) in BAD {
        for value in *values {
            let mut bytes = image(true);
            let before = bytes.clone();
            put(&mut bytes, *at, &value.to_le_bytes()[..*width]);
            assert_ne!(bytes, before, "{what} is {value:#x} in a good image");
            assert!(refusal(&bytes).is_some(), "{what} of {value:#x} was taken");
            cases += 1;
        }
    }
    assert!(cases > 200, "{cases}");
}

#[test]
fn a_file_that_ends_early_is_refused_wherever_that_is() {
    let bytes = image(true);
    assert_eq!(bytes.len(), END + TABLE_BYTES);
    for length in 0..bytes.len() {
        assert!(refusal(&bytes[..length]).is_some(), "{length} bytes");
    }
}

#[test]
fn bytes_behind_the_sections_are_certificates_symbols_padding_or_refused() {
    let with = |more: &[u8]| [image(false), more.to_vec()].concat();
    // The sections end at a multiple of eight, and no signer pads.
    for bytes in [1, 7, 8] {
        assert_eq!(refusal(&with(&vec![0; bytes])), Some(PeError::Trailing { bytes: bytes as u64 }));
    }
    assert_eq!(refusal(&with(&[1])), Some(PeError::Trailing { bytes: 1 }));
    let after = [image(true), vec![0; 8]].concat();
    assert_eq!(refusal(&after), Some(PeError::Certificates("is followed by bytes that no signature covers")));
    // Between the image and its certificates.
    let mut before = image(true);
    before.splice(END..END, [0; 8]);
    put(&mut before, OPTIONAL + 112 + 32, &0x808_u32.to_le_bytes());
    assert_eq!(refusal(&before), Some(PeError::Trailing { bytes: 8 }));
    let mut symbols = with(&[&[0; 18][..], &4_u32.to_le_bytes()].concat());
    put(&mut symbols, PE + 12, &0x800_u32.to_le_bytes());
    put(&mut symbols, PE + 16, &1_u32.to_le_bytes());
    assert_eq!(refusal(&symbols), None);
    let padded = |bytes| refusal(&[&symbols[..], &vec![0; bytes]].concat());
    assert_eq!((padded(2), padded(3)), (None, Some(PeError::Trailing { bytes: 3 })));
    put(&mut symbols, PE + 16, &2_u32.to_le_bytes());
    assert_eq!(refusal(&symbols), Some(PeError::Truncated("symbol table")));
}

#[test]
fn sections_that_share_bytes_or_addresses_or_leave_gaps_are_named() {
    let changed = |index: usize, at: usize, value: u32| {
        let mut bytes = image(true);
        put(&mut bytes, section(index).start + at, &value.to_le_bytes());
        bytes
    };
    assert_eq!(fault(&changed(1, 20, 0x400)), Some(SectionFault::OverlapsInFile));
    assert_eq!(fault(&changed(1, 12, 0x1100)), Some(SectionFault::OverlapsInMemory));
    assert_eq!(fault(&changed(0, 12, 0x200)), Some(SectionFault::OverlapsInMemory));
    assert_eq!(fault(&changed(0, 16, 0)), Some(SectionFault::Gap));
    assert_eq!(fault(&changed(1, 16, 0x8000)), Some(SectionFault::OutsideFile));
    assert_eq!(fault(&changed(2, 8, 0x2000)), Some(SectionFault::OutsideImage));
    assert_eq!(fault(&changed(2, 8, 0)), Some(SectionFault::Empty));
    // Without a length in memory it has that of the file.
    let mut last = changed(1, 12, 0x3f00);
    put(&mut last, section(1).start + 8, &0_u32.to_le_bytes());
    assert_eq!(fault(&last), Some(SectionFault::OutsideImage));
    assert_eq!(fault(&changed(0, 20, 0x3f0)), Some(SectionFault::Unaligned));
    assert_eq!(fault(&changed(0, 24, 1)), Some(SectionFault::Relocations));
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(
        changes in prop::collection::vec((0..END + TABLE_BYTES, any::<u8>()), 0..40),
        header in prop::collection::vec((0..HEADERS, prop::sample::select(vec![0_u8, 1, 4, 8, 0x7f, 0x80, 0xff])), 0..6),
        length in 0..=END + TABLE_BYTES,
        cut in any::<bool>(),
    ) {
        let mut bytes = image(true);
        for (at, value) in changes.into_iter().chain(header) {
            bytes[at] = value;
        }
        if cut {
            bytes.truncate(length);
        }
        if let Ok(image) = Image::parse(&bytes) {
            let total: usize = image.covered().iter().map(std::iter::ExactSizeIterator::len).sum();
            let table: usize = image.certificates.as_ref().map_or(0, ExactSizeIterator::len);
            prop_assert_eq!(total + table + 12, bytes.len());
            for section in image.sections() {
                prop_assert!(image.content(section).len() <= bytes.len());
            }
        }
        prop_assert!(Uki::read(&bytes).is_err());
    }
}
