//! Guest memory: one file, a sealed memfd or the memory of a frozen machine, mapped as a low and a high part around the hole
//! below 4 GiB; and the addresses at which a machine has what is no device of virtio's.

use std::fs::File;
use std::io;

use kiln_virtio::ram;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

/// The descriptor table that the boot protocol asks for.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// The kernel's boot parameters.
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// Page tables that map the first 4 GiB as they are: one page of each of the upper levels, four of the third.
pub const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
/// The kernel's command line.
pub const COMMAND_LINE: GuestAddress = GuestAddress(0x20000);
/// Longest command line with its final zero (COMMAND_LINE_SIZE of x86).
pub const MOST_COMMAND_LINE_BYTES: usize = 2048;
/// The page with the machine's generation id; here memory that the kernel may use as it likes ends.
pub const GENERATION_ID: GuestAddress = GuestAddress(0x9f000);
/// The ACPI tables, where the kernel looks for them too.
pub const ACPI: GuestAddress = GuestAddress(0xe0000);
/// Where the tables have to end, and where memory goes on.
pub const HIGH_MEMORY: GuestAddress = GuestAddress(0x10_0000);
/// Where the windows of virtio-mmio devices begin.
pub const WINDOWS: GuestAddress = GuestAddress(0xd000_0000);
/// Bytes of such a window.
pub const WINDOW_BYTES: u64 = 0x1000;
/// The hole that no memory is in: windows, the interrupt controllers, and what KVM needs for itself.
pub const HOLE: GuestAddress = GuestAddress(0xc000_0000);
/// The end of the hole.
pub const HOLE_END: GuestAddress = GuestAddress(0x1_0000_0000);

/// Least memory of a machine: less holds no kernel.
pub const LEAST_BYTES: u64 = 32 << 20;
/// Most memory of a machine: a region of KVM's has fewer than 2^31 pages, and this is in two.
pub const MOST_BYTES: u64 = 1 << 43;
/// Memory comes in whole pages.
const PAGE_BYTES: u64 = 4096;

/// Why a machine has no memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Too little, too much, or not in pages.
    #[error("{bytes} bytes are no size of a machine's memory")]
    Size {
        /// What was asked for.
        bytes: u64,
    },
    /// The host's processor does not address as much.
    #[error("{bytes} bytes are more memory than this processor can address in a machine: at most {most}")]
    Beyond {
        /// What was asked for.
        bytes: u64,
        /// The most.
        most: u64,
    },
    /// The system gives none.
    #[error("cannot make guest memory")]
    Make(#[source] io::Error),
    /// It cannot be mapped.
    #[error("cannot map guest memory: {0}")]
    Map(String),
}

impl MemoryError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Size { .. } => Some(format!(
                "give it whole pages of {PAGE_BYTES} bytes, {} MiB to {} TiB",
                LEAST_BYTES >> 20,
                MOST_BYTES >> 40
            )),
            Self::Beyond { .. } | Self::Make(_) | Self::Map(_) => {
                Some("give the machine less memory".to_owned())
            }
        }
    }

    /// Whether the host is in the way, and not what was asked for.
    pub fn is_hosts(&self) -> bool {
        !matches!(self, Self::Size { .. })
    }
}

/// The parts of `bytes` of memory: where each starts, and its length in bytes.
///
/// # Errors
/// [`MemoryError::Size`] for what no machine can have.
pub fn parts(bytes: u64) -> Result<Vec<(GuestAddress, u64)>, MemoryError> {
    if !(LEAST_BYTES..=MOST_BYTES).contains(&bytes) || !bytes.is_multiple_of(PAGE_BYTES) {
        return Err(MemoryError::Size { bytes });
    }
    let low = bytes.min(HOLE.0);
    let mut parts = vec![(GuestAddress(0), low)];
    if bytes > low {
        parts.push((HOLE_END, bytes - low));
    }
    Ok(parts)
}

/// Whether a processor whose physical addresses have `bits` reaches all of `memory`.
///
/// # Errors
/// [`MemoryError::Beyond`].
pub fn check_reach(memory: &GuestMemoryMmap, bits: u8) -> Result<(), MemoryError> {
    let end = 1_u64.checked_shl(bits.into()).unwrap_or(u64::MAX);
    if memory.last_addr().0 < end {
        return Ok(());
    }
    let bytes = memory.iter().map(GuestMemoryRegion::len).sum();
    // The hole takes its addresses, too.
    Err(MemoryError::Beyond { bytes, most: end.saturating_sub(HOLE_END.0 - HOLE.0) })
}

/// A memory file of `bytes` that can neither shrink nor grow, so that nobody who touches it can die of it.
///
/// # Errors
/// [`MemoryError`] for what no machine can have, or the system does not give.
pub fn make_file(bytes: u64) -> Result<File, MemoryError> {
    parts(bytes)?;
    ram::new(bytes).map_err(MemoryError::Make)
}

/// Guest memory of `bytes` in `file`, shared with whoever else maps it.
///
/// # Errors
/// [`MemoryError`] for what no machine can have, or that cannot be mapped.
pub fn map(file: &File, bytes: u64) -> Result<GuestMemoryMmap, MemoryError> {
    map_with(file, bytes, libc::MAP_SHARED)
}

/// Guest memory of `bytes` that begins as `file` is. What is written to it stays in this process, and what is only read is
/// shared with all who map the file.
///
/// # Errors
/// [`MemoryError`] for what no machine can have, or a file that cannot be mapped or is shorter.
pub fn map_private(file: &File, bytes: u64) -> Result<GuestMemoryMmap, MemoryError> {
    map_with(file, bytes, libc::MAP_PRIVATE)
}

fn map_with(file: &File, bytes: u64, how: libc::c_int) -> Result<GuestMemoryMmap, MemoryError> {
    let text = |error: &dyn std::error::Error| MemoryError::Map(error.to_string());
    let there = file.metadata().map_err(MemoryError::Make)?.len();
    if there < bytes {
        return Err(MemoryError::Map(format!("its file has {there} bytes")));
    }
    let mut regions = Vec::new();
    let mut offset = 0;
    for (start, length) in parts(bytes)? {
        let file = FileOffset::new(file.try_clone().map_err(MemoryError::Make)?, offset);
        let length_here = usize::try_from(length).map_err(|error| text(&error))?;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let mapped = MmapRegion::build(Some(file), length_here, access, libc::MAP_NORESERVE | how);
        let region = GuestRegionMmap::new(mapped.map_err(|error| text(&error))?, start);
        regions.push(region.ok_or_else(|| MemoryError::Map("it has no such addresses".to_owned()))?);
        offset += length;
    }
    GuestMemoryMmap::from_regions(regions).map_err(|error| text(&error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn memory_that_no_machine_can_have_is_refused() {
        for bytes in [0, 1, 4096, LEAST_BYTES - 4096, LEAST_BYTES + 1, MOST_BYTES + 4096, u64::MAX] {
            assert!(matches!(make_file(bytes), Err(MemoryError::Size { .. })), "{bytes}");
        }
    }

    #[test]
    fn memory_goes_on_behind_the_hole() {
        assert_eq!(parts(LEAST_BYTES).expect("a size"), [(GuestAddress(0), LEAST_BYTES)]);
        assert_eq!(parts(HOLE.0).expect("a size").len(), 1);
        assert_eq!(parts(HOLE.0 + 8192).expect("a size"), [(GuestAddress(0), HOLE.0), (HOLE_END, 8192)]);
    }

    #[test]
    fn memory_that_the_processor_does_not_address_is_refused() {
        let bytes = HOLE.0 + (2 << 20);
        let memory = map(&make_file(bytes).expect("memory"), bytes).expect("a mapping");
        check_reach(&memory, 33).expect("8 GiB");
        check_reach(&memory, 64).expect("all");
        let refused = check_reach(&memory, 32);
        assert!(
            matches!(refused, Err(MemoryError::Beyond { bytes: all, most }) if all == bytes && most == HOLE.0),
            "{refused:?}"
        );
    }

    #[test]
    fn what_is_written_on_either_side_of_the_hole_stays_apart() {
        let bytes = HOLE.0 + 4096;
        let memory = map(&make_file(bytes).expect("memory"), bytes).expect("a mapping");
        memory.write_obj(1_u64, GuestAddress(HOLE.0 - 8)).expect("memory");
        memory.write_obj(2_u64, HOLE_END).expect("memory");
        assert_eq!(memory.read_obj::<u64>(GuestAddress(HOLE.0 - 8)).expect("memory"), 1);
        assert!(memory.write_obj(3_u64, HOLE).is_err());
        assert_eq!(memory.num_regions(), 2);
    }

    #[test]
    fn a_private_mapping_begins_as_its_file_is_and_changes_nothing_there() {
        let file = make_file(LEAST_BYTES).expect("memory");
        let shared = map(&file, LEAST_BYTES).expect("a mapping");
        shared.write_obj(7_u64, GuestAddress(4096)).expect("memory");
        let copies = [(); 2].map(|()| map_private(&file, LEAST_BYTES).expect("a mapping"));
        copies[0].write_obj(8_u64, GuestAddress(4096)).expect("memory");
        for (memory, value) in [(&shared, 7), (&copies[0], 8), (&copies[1], 7)] {
            assert_eq!(memory.read_obj::<u64>(GuestAddress(4096)).expect("memory"), value);
        }
        assert!(map_private(&file, LEAST_BYTES + 4096).is_err(), "it is shorter");
    }

    #[test]
    fn nobody_can_take_memory_away() {
        let file = make_file(LEAST_BYTES).expect("memory");
        assert!(file.set_len(0).is_err());
    }
}
