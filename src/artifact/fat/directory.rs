//! Folders: entries of 32 bytes, those of a long name before the one that it is for.

use super::layout::{Layout, ROOT_CLUSTER};
use super::name::{self, Name};
use super::{FatError, time};
use crate::tree::{Entries, Kind, Timestamp};

/// Length of an entry.
pub(super) const ENTRY_BYTES: usize = 32;
/// Attributes of entries.
const VOLUME_LABEL: u8 = 0x08;
const FOLDER: u8 = 0x10;
const ARCHIVE: u8 = 0x20;
const LONG_NAME: u8 = 0x0f;
/// Units of a long name in an entry, and the bit of the entry that has the last ones.
const UNITS: usize = 13;
const LAST_OF_NAME: u8 = 0x40;

/// How many bytes the entries of a folder take. The root has one for the volume's name in any case, so that there is
/// no folder without any.
pub(super) fn length(entries: &Entries<'_>, folder: usize) -> Result<u64, FatError> {
    let names = name::names(entries, folder)?;
    let own = if folder == 0 { 1 } else { 2 };
    let count = own + names.values().map(name::entry_count).sum::<usize>();
    Ok((count * ENTRY_BYTES) as u64)
}

/// The entries of a folder.
pub(super) fn bytes(
    entries: &Entries<'_>,
    layout: &Layout,
    folder: usize,
    label: Option<[u8; 11]>,
) -> Result<Vec<u8>, FatError> {
    let mut bytes = Vec::new();
    let meta = &entries[folder].node.meta;
    if folder == 0 {
        if let Some(label) = label {
            put(&mut bytes, &label, VOLUME_LABEL, meta.mtime, 0, 0);
        }
    } else {
        let parent = layout.first_clusters[entries[folder].parent];
        // A parent that is the root is named by no cluster.
        let parent = if parent == ROOT_CLUSTER { 0 } else { parent };
        put(&mut bytes, b".          ", FOLDER, meta.mtime, layout.first_clusters[folder], 0);
        put(&mut bytes, b"..         ", FOLDER, meta.mtime, parent, 0);
    }
    for (child, name) in name::names(entries, folder)? {
        let node = entries[entries[child].holder].node;
        let (attribute, size) = match node.kind {
            // The layout has refused larger ones.
            Kind::File { size, .. } => (ARCHIVE, u32::try_from(size).unwrap_or(u32::MAX)),
            _ => (FOLDER, 0),
        };
        put_long(&mut bytes, &name);
        put(&mut bytes, &name.short, attribute, node.meta.mtime, layout.first_clusters[child], size);
    }
    Ok(bytes)
}

fn put(bytes: &mut Vec<u8>, short: &[u8; 11], attribute: u8, mtime: Timestamp, cluster: u32, size: u32) {
    let (time, date) = time::words(mtime);
    let [low, high, higher, highest] = cluster.to_le_bytes();
    bytes.extend_from_slice(short);
    bytes.extend_from_slice(&[attribute, 0, 0]);
    // Made, read and changed at one time.
    for word in [time, date, date] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.extend_from_slice(&[higher, highest]);
    for word in [time, date] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.extend_from_slice(&[low, high]);
    bytes.extend_from_slice(&size.to_le_bytes());
}

/// The entries of a long name, the last part of it first.
fn put_long(bytes: &mut Vec<u8>, name: &Name) {
    let checksum = name.short.iter().fold(0_u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte));
    let mut parts: Vec<&[u16]> = name.long.chunks(UNITS).collect();
    let mut last = LAST_OF_NAME;
    while let Some(part) = parts.pop() {
        // At most twenty parts.
        let number = u8::try_from(parts.len() + 1).unwrap_or_default();
        // A NUL ends a name that leaves room for it; behind that there are ones.
        let mut units = [0xffff_u16; UNITS];
        units[..part.len()].copy_from_slice(part);
        if let Some(end) = units.get_mut(part.len()) {
            *end = 0;
        }
        let units: Vec<u8> = units.iter().flat_map(|unit| unit.to_le_bytes()).collect();
        bytes.push(number | last);
        bytes.extend_from_slice(&units[..10]);
        bytes.extend_from_slice(&[LONG_NAME, 0, checksum]);
        bytes.extend_from_slice(&units[10..22]);
        bytes.extend_from_slice(&[0, 0]);
        bytes.extend_from_slice(&units[22..]);
        last = 0;
    }
}
