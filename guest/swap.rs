//! Swap space on a disk: the header that mkswap(8) would write, and the kernel's use of it.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use kiln_wire::Scratch;
use rustix::io::Errno;

use crate::beside::Beside;
use crate::failure::Failure;
use crate::stock::Stock;
use crate::sys;

const PAGE_BYTES: u64 = 4096;

/// Begins to swap to the disk. None where that is done already: a frozen machine swaps to a disk of the usual size, since
/// the kernel makes tables of all its pages, which are most of what a short step touches.
///
/// # Errors
/// There is no such disk, or there can be no process.
pub fn begin(scratch: &Scratch, stock: &Stock) -> Result<Option<Beside>, Failure> {
    if stock.swapped.as_ref() == Some(scratch) {
        return Ok(None);
    }
    Beside::swapping(&stock.disks.find(&scratch.serial)?, scratch.bytes).map(Some)
}

/// Does that, and makes sure that nothing is there yet: of a machine that is frozen, what was swapped out would be lost.
///
/// # Errors
/// Those of [`begin`] and [`to`]; `EBUSY` where something is.
pub fn begin_empty(scratch: &Scratch, stock: &mut Stock) -> Result<(), Failure> {
    begin(scratch, stock)?.map_or(Ok(()), Beside::join)?;
    stock.swapped = Some(scratch.clone());
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    match used(&swaps, &stock.disks.find(&scratch.serial)?) {
        Some(0) => Ok(()),
        _ => Err(Failure::new(format!("swapping to nothing but {:?}, unused", scratch.serial), Errno::BUSY)),
    }
}

/// Swaps to the first `bytes` of `device`, which has no swap header, and to no others of it any more.
///
/// # Errors
/// Those of the system; `EINVAL` where there is no room for a page beside the header.
pub fn to(device: &str, bytes: u64) -> Result<(), Errno> {
    let name = CString::new(device).map_err(|_| Errno::INVAL)?;
    match sys::swap_off(&name) {
        // It was not swapped to.
        Ok(()) | Err(Errno::INVAL) => {}
        Err(errno) => return Err(errno),
    }
    let header = header(bytes).ok_or(Errno::INVAL)?;
    let number = |error: std::io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
    // Held until the kernel has the disk: what was written stays in memory as long as somebody does.
    let disk = File::options().write(true).open(device).map_err(number)?;
    disk.write_all_at(&header, 0).map_err(number)?;
    sys::swap_on(&name)
}

/// How many bytes of `device` are in use as `swaps` has it, the text of /proc/swaps (proc(5)); none where it is not swapped to.
fn used(swaps: &str, device: &str) -> Option<u64> {
    let mut lines = swaps.lines().map(str::split_whitespace);
    let mut line = lines.find(|line| line.clone().next() == Some(device))?;
    line.nth(3)?.parse::<u64>().ok()?.checked_mul(1024)
}

/// The first page of a swap space of `size_bytes` (`union swap_header` of linux/swap.h): version 1, the number of the
/// last page, no bad pages, no UUID or label, and the magic at the page's end. The space may be smaller than the disk
/// it is on. `None`: no page beside the header.
fn header(size_bytes: u64) -> Option<[u8; 4096]> {
    const VERSION_AT: usize = 1024;
    const LAST_PAGE_AT: usize = 1028;
    const MAGIC: &[u8; 10] = b"SWAPSPACE2";
    let pages = size_bytes / PAGE_BYTES;
    // Past 16 TiB the field's limit is the space's limit.
    let last_page = u32::try_from(pages.checked_sub(1)?).unwrap_or(u32::MAX);
    if last_page == 0 {
        return None;
    }
    let mut page = [0; 4096];
    page[VERSION_AT..][..4].copy_from_slice(&1u32.to_le_bytes());
    page[LAST_PAGE_AT..][..4].copy_from_slice(&last_page.to_le_bytes());
    page[4096 - MAGIC.len()..].copy_from_slice(MAGIC);
    Some(page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_what_mkswap_writes() {
        let page = header(16 << 30).expect("large enough");
        assert_eq!(page[..1024], [0; 1024]);
        assert_eq!(page[1024..1028], [1, 0, 0, 0]);
        assert_eq!(page[1028..1032], ((16u32 << 18) - 1).to_le_bytes());
        assert_eq!(page[1032..4086], [0; 3054]);
        assert_eq!(&page[4086..], b"SWAPSPACE2");
    }

    #[test]
    fn a_disk_without_room_is_refused() {
        assert_eq!(header(0), None);
        assert_eq!(header(8191), None);
        assert!(header(8192).is_some());
    }

    #[test]
    fn what_is_swapped_to_is_told_by_device() {
        let swaps = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n\
                     /dev/vdb                                partition\t16777212\t0\t\t-2\n";
        assert_eq!(used(swaps, "/dev/vdb"), Some(0));
        assert_eq!(used(swaps, "/dev/vd"), None);
        assert_eq!(used("", "/dev/vdb"), None);
    }
}
