//! Swap space: the header that mkswap(8) would write, for a disk whose pages are all still unused.

/// Bytes of the header: the first page of the space.
pub const HEADER_BYTES: usize = 4096;

/// The first page of a swap space of `size_bytes` (`union swap_header` of linux/swap.h): version 1, the number of the
/// last page, no bad pages, no UUID or label, and the magic at the page's end. The space may be smaller than the disk
/// it is on. `None`: no page beside the header.
pub fn header(size_bytes: u64) -> Option<[u8; HEADER_BYTES]> {
    const VERSION_AT: usize = 1024;
    const LAST_PAGE_AT: usize = 1028;
    const MAGIC: &[u8; 10] = b"SWAPSPACE2";
    let pages = size_bytes / 4096;
    // Past 16 TiB the field's limit is the space's limit.
    let last_page = u32::try_from(pages.checked_sub(1)?).unwrap_or(u32::MAX);
    if last_page == 0 {
        return None;
    }
    let mut page = [0; HEADER_BYTES];
    page[VERSION_AT..][..4].copy_from_slice(&1u32.to_le_bytes());
    page[LAST_PAGE_AT..][..4].copy_from_slice(&last_page.to_le_bytes());
    page[HEADER_BYTES - MAGIC.len()..].copy_from_slice(MAGIC);
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
