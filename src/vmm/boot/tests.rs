use std::io::Write;

use super::*;
use crate::memory::{HOLE, HOLE_END, LEAST_BYTES, make_file, map};

fn machine(bytes: u64) -> GuestMemoryMmap {
    map(&make_file(bytes).expect("memory"), bytes).expect("a mapping")
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(bytes).expect("room");
    file
}

/// An ELF file with one segment, `bytes` at 16 MiB and entered there.
fn elf(bytes: &[u8], entry: u64, memory_bytes: u64) -> Vec<u8> {
    let mut file = vec![0; 64 + 56];
    file[..4].copy_from_slice(&ELF_MAGIC);
    (file[4], file[5], file[6]) = (2, 1, 1);
    file[16..20].copy_from_slice(&[2, 0, 62, 0]);
    file[24..32].copy_from_slice(&entry.to_le_bytes());
    file[32..40].copy_from_slice(&64_u64.to_le_bytes());
    file[52..58].copy_from_slice(&[64, 0, 56, 0, 1, 0]);
    file[64] = 1;
    file[72..80].copy_from_slice(&120_u64.to_le_bytes());
    file[88..96].copy_from_slice(&0x0100_0000_u64.to_le_bytes());
    file[96..104].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
    file[104..112].copy_from_slice(&memory_bytes.to_le_bytes());
    file.extend_from_slice(bytes);
    file
}

/// A bzImage of one setup sector more than none, with `payload`.
fn bz_image(payload: &[u8], flags: u16, init_size: u32) -> Vec<u8> {
    let mut file = vec![0; 1024];
    file[0x1f1] = 1;
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
    file[0x211] = 1;
    file[0x214..0x218].copy_from_slice(&0x0010_0000_u32.to_le_bytes());
    file[0x236..0x238].copy_from_slice(&flags.to_le_bytes());
    file[0x260..0x264].copy_from_slice(&init_size.to_le_bytes());
    file.extend_from_slice(payload);
    file
}

fn try_load(memory: &GuestMemoryMmap, kernel: &[u8], initramfs: &[u8]) -> Result<GuestAddress, BootError> {
    load(memory, &mut file(kernel), &mut file(initramfs), "console=ttyS0")
}

#[test]
fn an_elf_kernel_and_its_initramfs_are_where_the_parameters_say() {
    let memory = machine(LEAST_BYTES);
    let entry = try_load(&memory, &elf(b"kernel", 0x0100_0000, 4096), b"initramfs").expect("a boot");
    assert_eq!(entry.0, 0x0100_0000);
    let parameters: boot_params = memory.read_obj(ZERO_PAGE).expect("memory");
    let header = parameters.hdr;
    let mut bytes = vec![0; header.ramdisk_size as usize];
    memory.read_slice(&mut bytes, GuestAddress(header.ramdisk_image.into())).expect("memory");
    assert_eq!(bytes, b"initramfs");
    assert_eq!(header.ramdisk_image % 4096, 0);
    let mut line = [0; 14];
    memory.read_slice(&mut line, GuestAddress(header.cmd_line_ptr.into())).expect("memory");
    assert_eq!(&line, b"console=ttyS0\0");
    assert_eq!({ parameters.acpi_rsdp_addr }, ACPI.0);
}

#[test]
fn a_big_image_is_entered_at_its_64_bit_entry() {
    let memory = machine(LEAST_BYTES);
    let entry = try_load(&memory, &bz_image(b"packed", KERNEL_64, 4096), b"").expect("a boot");
    assert_eq!(entry.0, 0x0010_0200);
    assert!(matches!(try_load(&memory, &bz_image(b"packed", 0, 4096), b""), Err(BootError::No64Bit)));
}

#[test]
fn what_is_no_kernel_is_called_that() {
    let memory = machine(LEAST_BYTES);
    let bz = bz_image(b"packed", KERNEL_64, 4096);
    for kernel in [&b""[..], b"MZ", &[0; 4096], &bz[..0x203], &bz[..0x220], b"#!/bin/sh\n"] {
        assert!(matches!(try_load(&memory, kernel, b""), Err(BootError::NoKernel)), "{} bytes", kernel.len());
    }
}

#[test]
fn a_kernel_that_is_cut_off_anywhere_is_refused() {
    let whole = elf(&[0x90; 64], 0x0100_0000, 64);
    for length in 4..whole.len() {
        let result = try_load(&machine(LEAST_BYTES), &whole[..length], b"");
        assert!(matches!(result, Err(BootError::Load(_))), "{length} bytes");
    }
}

#[test]
fn a_kernel_whose_header_says_anything_is_entered_in_memory_or_refused() {
    let memory = machine(LEAST_BYTES);
    let (initramfs, mut entered, mut refused) = ([0x55; 5000], 0, 0);
    let kernels = [
        (elf(&[0x90; 64], 0x0100_0000, 64), 0..120),
        (bz_image(&[0x90; 4096], KERNEL_64, 8192), 0x1f1..0x270),
    ];
    for (kernel, header) in kernels {
        for (at, width) in header.flat_map(|at| [1, 2, 4, 8].map(|width| (at, width))) {
            for value in [0, 1, 0x0fff, 1 << 31, (1 << 31) - 1, 1 << 63, (1 << 63) - 1, u64::MAX] {
                let mut kernel = kernel.clone();
                kernel[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
                let Ok(entry) = try_load(&memory, &kernel, &initramfs) else {
                    refused += 1;
                    continue;
                };
                entered += 1;
                let what = format!("{value:#x} in {width} bytes at {at:#x}");
                assert!(memory.address_in_range(entry), "{what}: entered at {entry:?}");
                let parameters: boot_params = memory.read_obj(ZERO_PAGE).expect("memory");
                let place = { parameters.hdr.ramdisk_image };
                let mut bytes = [0; 5000];
                memory.read_slice(&mut bytes, GuestAddress(place.into())).expect(&what);
                assert!(bytes == initramfs, "{what}: another initramfs at {place:#x}");
            }
        }
    }
    assert!(entered > 500 && refused > 500, "{entered} entered, {refused} refused");
}

#[test]
fn a_kernel_that_reaches_beyond_memory_or_is_entered_outside_is_refused() {
    let memory = machine(LEAST_BYTES);
    for size in [LEAST_BYTES, 1 << 40] {
        let result = try_load(&memory, &elf(b"kernel", 0x0100_0000, size), b"");
        assert!(matches!(result, Err(BootError::KernelTooLarge { .. })), "{size:#x}");
    }
    for entry in [0, 0x1000, 0x0200_0000, u64::MAX] {
        assert!(matches!(try_load(&memory, &elf(b"kernel", entry, 64), b""), Err(BootError::Load(_))));
    }
    assert!(matches!(
        try_load(&memory, &elf(b"kernel", 0x0100_0000, u64::MAX), b""),
        Err(BootError::Load(_))
    ));
    let result = try_load(&memory, &bz_image(b"packed", KERNEL_64, u32::MAX), b"");
    assert!(matches!(result, Err(BootError::KernelTooLarge { .. })));
}

#[test]
fn an_initramfs_that_does_not_fit_beside_the_kernel_is_refused() {
    let memory = machine(LEAST_BYTES);
    let kernel = elf(b"kernel", 0x0100_0000, 15 << 20);
    let initramfs = |bytes: u64| {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(bytes).expect("room");
        file
    };
    for bytes in [(1 << 20) + 1, LEAST_BYTES, LEAST_BYTES * 3, 1 << 42] {
        let result = load(&memory, &mut file(&kernel), &mut initramfs(bytes), "");
        assert!(matches!(result, Err(BootError::InitramfsTooLarge { .. })), "{bytes}");
    }
    load(&memory, &mut file(&kernel), &mut initramfs(1 << 20), "").expect("it fits exactly");
}

#[test]
fn a_command_line_that_the_kernel_would_cut_is_refused() {
    let (memory, kernel) = (machine(LEAST_BYTES), elf(b"kernel", 0x0100_0000, 64));
    for line in ["x".repeat(MOST_COMMAND_LINE_BYTES), "a\0b".to_owned()] {
        let result = load(&memory, &mut file(&kernel), &mut file(b""), &line);
        assert!(matches!(result, Err(BootError::CommandLine)));
    }
}

#[test]
fn the_kernel_may_use_all_memory_but_what_is_not_its_own() {
    let map = memory_map(&machine(HOLE.0 + (1 << 20)));
    let list: Vec<_> = map.iter().map(|entry| (entry.addr, entry.size, entry.r#type)).collect();
    assert_eq!(
        list,
        [
            (0, GENERATION_ID.0, RAM),
            (GENERATION_ID.0, HIGH_MEMORY.0 - GENERATION_ID.0, RESERVED),
            (HIGH_MEMORY.0, HOLE.0 - HIGH_MEMORY.0, RAM),
            (HOLE_END.0, 1 << 20, RAM),
        ]
    );
}
