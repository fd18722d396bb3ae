//! Where everything in an image is, counted anew: what is held against the reader of images.

use std::ops::Range;

use kiln_artifact::uefi::authenticode;
use kiln_artifact::uefi::pe::{Image, Section};
use kiln_digest::Digest;

/// From the optional header on: CheckSum, and the directory entry of the certificate table.
pub const CHECKSUM: usize = 64;
pub const DIRECTORY: usize = 112 + 8 * 4;
pub const SIZE_OF_IMAGE: usize = 56;
pub const SIZE_OF_HEADERS: usize = 60;

pub fn le32(bytes: &[u8], at: usize) -> usize {
    bytes[at..at + 4].iter().rev().fold(0, |value, byte| value << 8 | usize::from(*byte))
}

/// Where an image's CheckSum, directory entry and table of certificates are.
pub fn excluded(bytes: &[u8]) -> [Range<usize>; 3] {
    let optional = le32(bytes, 0x3c) + 24;
    let (checksum, directory) = (optional + CHECKSUM, optional + DIRECTORY);
    let (begin, length) = (le32(bytes, directory), le32(bytes, directory + 4));
    let begin = if length == 0 { bytes.len() } else { begin };
    [checksum..checksum + 4, directory..directory + 8, begin..begin + length]
}

pub fn digest_of_all_but(bytes: &[u8], [checksum, directory, table]: &[Range<usize>; 3]) -> Digest {
    assert_eq!(table.end, bytes.len());
    let parts = [
        &bytes[..checksum.start],
        &bytes[checksum.end..directory.start],
        &bytes[directory.end..table.start],
        &[0; 8][..table.start.next_multiple_of(8) - table.start],
    ];
    Digest::of(&parts.concat())
}

/// Flips bits at places that follow from the image.
pub fn a_flipped_bit_is_seen(
    bytes: &[u8],
    digest: &Digest,
    [checksum, directory, table]: &[Range<usize>; 3],
) {
    let mut flipped = bytes.to_vec();
    for place in digest.as_bytes().chunks_exact(8).take(2) {
        let at = match place[4] % 8 {
            0 => checksum.start + usize::from(place[5] % 4),
            1 => directory.start + usize::from(place[5] % 8),
            2 if !table.is_empty() => table.start + le32(place, 0) % table.len(),
            _ => le32(place, 0) % bytes.len(),
        };
        flipped[at] ^= 1 << (place[6] % 8);
        match Image::parse(&flipped) {
            Ok(image) if checksum.contains(&at) || table.contains(&at) => {
                assert_eq!(authenticode::digest(&image), *digest, "byte {at:#x} is not covered");
            }
            Ok(image) => assert_ne!(authenticode::digest(&image), *digest, "byte {at:#x} is covered"),
            Err(error) => assert!(!checksum.contains(&at), "nobody reads byte {at:#x}: {error}"),
        }
        assert!(!directory.contains(&at) || Image::parse(&flipped).is_err(), "a table elsewhere");
        flipped[at] = bytes[at];
    }
}

/// Headers, sections, symbols and certificates follow one another, and what is between is zero. Says whether there are symbols.
pub fn every_byte_has_one_place(image: &Image<'_>) -> u64 {
    let bytes = image.bytes();
    let (header, [.., table]) = (le32(bytes, 0x3c), excluded(bytes));
    let (symbols, count) = (le32(bytes, header + 12), le32(bytes, header + 16));
    let (image_bytes, headers) =
        (le32(bytes, header + 24 + SIZE_OF_IMAGE), le32(bytes, header + 24 + SIZE_OF_HEADERS));
    let mut places = vec![0..headers, table];
    places
        .extend(image.sections().iter().map(|section| section.file.clone()).filter(|file| !file.is_empty()));
    if symbols != 0 {
        let strings = symbols + 18 * count;
        places.push(symbols..strings + le32(bytes, strings));
    }
    let in_memory = |section: &Section| {
        let length = section.virtual_size_bytes as usize;
        let begin = section.virtual_address as usize;
        begin..begin + if length == 0 { section.file.len() } else { length }
    };
    let mut addresses = vec![0..headers, image_bytes..image_bytes];
    addresses.extend(image.sections().iter().map(in_memory));
    for (what, ranges) in [("file", &mut places), ("memory", &mut addresses)] {
        ranges.sort_by_key(|range| (range.start, range.end));
        for pair in ranges.windows(2) {
            assert!(pair[0].end <= pair[1].start, "two share bytes in {what}: {pair:x?}");
        }
    }
    for pair in places.windows(2) {
        let between = &bytes[pair[0].end..pair[1].start];
        assert!(between.iter().all(|byte| *byte == 0), "something is hidden before {:#x}", pair[1].start);
    }
    for section in image.sections() {
        let content = image.content(section);
        assert!(bytes[section.file.clone()].starts_with(content));
    }
    u64::from(symbols != 0)
}
