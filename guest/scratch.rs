//! Swap on the scratch disk: the header that mkswap would write, and nothing else, since the disk is sparse.

use std::ffi::CString;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use rustix::io::Errno;

use crate::failure::{Doing, Failure};
use crate::sys;

const PAGE_BYTES: usize = 4096;

/// Makes the block device at `path` swap space and uses it.
///
/// # Errors
/// The disk cannot be written, is too small, or the kernel refuses it.
pub fn swap_on(path: &str) -> Result<(), Failure> {
    let what = || format!("making {path} swap");
    let mut disk = File::options().read(true).write(true).open(path).doing(what)?;
    let size = disk.seek(SeekFrom::End(0)).doing(what)?;
    let header = header(size).ok_or(Errno::NOSPC).doing(what)?;
    disk.write_all_at(&header, 0).doing(what)?;
    let name = CString::new(path).map_err(|_| Errno::INVAL).doing(what)?;
    sys::swap_on(&name).doing(what)
}

/// The first page of a swap space of `size_bytes` (`union swap_header` of linux/swap.h): version 1, the number of the
/// last page, no bad pages, no UUID or label, and the magic at the page's end. `None`: no page beside the header.
fn header(size_bytes: u64) -> Option<[u8; PAGE_BYTES]> {
    const VERSION_AT: usize = 1024;
    const LAST_PAGE_AT: usize = 1028;
    const MAGIC: &[u8; 10] = b"SWAPSPACE2";
    let pages = size_bytes / 4096;
    // Past 16 TiB the field's limit is the space's limit.
    let last_page = u32::try_from(pages.checked_sub(1)?).unwrap_or(u32::MAX);
    if last_page == 0 {
        return None;
    }
    let mut page = [0; PAGE_BYTES];
    page[VERSION_AT..][..4].copy_from_slice(&1u32.to_le_bytes());
    page[LAST_PAGE_AT..][..4].copy_from_slice(&last_page.to_le_bytes());
    page[PAGE_BYTES - MAGIC.len()..].copy_from_slice(MAGIC);
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
}
