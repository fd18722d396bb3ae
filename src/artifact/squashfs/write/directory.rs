//! A folder's listing: headers that name a block of inodes, each with the entries whose inodes lie there.

use super::SquashfsError;
use super::metadata::Position;
use crate::squashfs::metadata::BLOCK_BYTES;
use crate::squashfs::walk::MOST_ENTRIES;

/// Length of a header, and of an entry without its name.
const HEADER_BYTES: usize = 12;
const ENTRY_BYTES: usize = 8;

/// A name, and the inode it is for.
pub(super) struct Entry<'a> {
    pub name: &'a [u8],
    pub number: u32,
    pub at: Position,
    /// The inode's type in its short form.
    pub kind: u16,
}

/// Where in a listing a header is that begins with `name`.
pub(super) struct Mark<'a> {
    pub name: &'a [u8],
    pub offset: usize,
}

/// A listing, and marks in it by which a name is found without reading the whole: one for each 8 KiB but the first.
pub(super) struct Listing<'a> {
    pub bytes: Vec<u8>,
    pub marks: Vec<Mark<'a>>,
}

/// The header that entries are being added to.
struct Header {
    at: usize,
    block: u32,
    number: u32,
    count: u32,
}

impl<'a> Listing<'a> {
    /// The listing of entries in the order of their names.
    pub fn new(entries: &[Entry<'a>]) -> Result<Self, SquashfsError> {
        let mut listing = Self { bytes: Vec::new(), marks: Vec::new() };
        let mut header: Option<Header> = None;
        let mut marked = 0;
        for entry in entries {
            let length = listing.bytes.len() + HEADER_BYTES + ENTRY_BYTES + entry.name.len();
            let is_far = length - marked > BLOCK_BYTES;
            let delta = |header: &Header| {
                i16::try_from(i64::from(entry.number) - i64::from(header.number))
                    .ok()
                    .filter(|_| header.block == entry.at.block && header.count < MOST_ENTRIES && !is_far)
            };
            let (delta, header) = match header.take() {
                Some(open) if delta(&open).is_some() => {
                    (delta(&open).unwrap_or_default(), header.insert(open))
                }
                _ => {
                    let at = listing.bytes.len();
                    if is_far {
                        listing.marks.push(Mark { name: entry.name, offset: at });
                        marked = at;
                    }
                    listing.bytes.extend_from_slice(&[0; 4]);
                    listing.bytes.extend_from_slice(&entry.at.block.to_le_bytes());
                    listing.bytes.extend_from_slice(&entry.number.to_le_bytes());
                    let open = Header { at, block: entry.at.block, number: entry.number, count: 0 };
                    (0, header.insert(open))
                }
            };
            // The format counts from zero.
            listing.bytes[header.at..][..4].copy_from_slice(&header.count.to_le_bytes());
            header.count += 1;
            let name_bytes = u16::try_from(entry.name.len() - 1).map_err(|_| SquashfsError::TooLarge)?;
            listing.bytes.extend_from_slice(&entry.at.offset.to_le_bytes());
            listing.bytes.extend_from_slice(&delta.to_le_bytes());
            listing.bytes.extend_from_slice(&entry.kind.to_le_bytes());
            listing.bytes.extend_from_slice(&name_bytes.to_le_bytes());
            listing.bytes.extend_from_slice(entry.name);
        }
        Ok(listing)
    }
}
