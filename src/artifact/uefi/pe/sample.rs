//! A small image to break: two sections with bytes, one without, and a certificate table whose contents are not looked at.

use std::ops::Range;

/// Where the PE header begins.
pub const PE: usize = 0x40;
/// Where the optional header begins.
pub const OPTIONAL: usize = PE + 24;
/// Where the section table begins.
pub const TABLE: usize = OPTIONAL + 112 + 16 * 8;
/// SizeOfHeaders.
pub const HEADERS: usize = 0x400;
/// Where the last section ends and the certificates begin.
pub const END: usize = 0x800;
/// What is in the certificate table.
pub const TABLE_BYTES: usize = 24;

/// The image, with certificates where that is asked for.
pub fn image(certificates: bool) -> Vec<u8> {
    let mut bytes = vec![0; END];
    put(&mut bytes, 0, b"MZ");
    put(&mut bytes, 0x3c, &0x40_u32.to_le_bytes());
    put(&mut bytes, PE, b"PE\0\0");
    put(&mut bytes, PE + 4, &0x8664_u16.to_le_bytes());
    put(&mut bytes, PE + 6, &3_u16.to_le_bytes());
    put(&mut bytes, PE + 20, &240_u16.to_le_bytes());
    put(&mut bytes, PE + 22, &0x0206_u16.to_le_bytes());
    put(&mut bytes, OPTIONAL, &0x020b_u16.to_le_bytes());
    for (at, value) in [(16, 0x1000_u32), (32, 0x1000), (36, 0x200), (56, 0x4000), (60, 0x400), (108, 16)] {
        put(&mut bytes, OPTIONAL + at, &value.to_le_bytes());
    }
    put(&mut bytes, OPTIONAL + 68, &10_u16.to_le_bytes());
    let sections =
        [(".text", 0x1ff_u32, 0x1000_u32, 0x200_u32, 0x400_u32), (".data", 0x200, 0x2000, 0x200, 0x600)];
    for (index, (name, length, address, size, pointer)) in
        sections.into_iter().chain([(".bss", 0x80, 0x3000, 0, 0)]).enumerate()
    {
        put(&mut bytes, section(index).start, name.as_bytes());
        for (at, value) in [(8, length), (12, address), (16, size), (20, pointer)] {
            put(&mut bytes, section(index).start + at, &value.to_le_bytes());
        }
    }
    bytes[HEADERS..END].fill(0xcc);
    if certificates {
        put(&mut bytes, OPTIONAL + 112 + 32, &0x800_u32.to_le_bytes());
        put(&mut bytes, OPTIONAL + 112 + 36, &24_u32.to_le_bytes());
        bytes.extend(20_u32.to_le_bytes());
        bytes.extend([0, 2, 2, 0]);
        bytes.extend(b"certificates\0\0\0\0");
    }
    bytes
}

/// Where a section's header is.
pub fn section(index: usize) -> Range<usize> {
    TABLE + 40 * index..TABLE + 40 * (index + 1)
}

/// Writes `value` at `at`.
pub fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}
