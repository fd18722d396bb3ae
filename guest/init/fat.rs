//! What a FAT file system is called: by its boot sector or, where that says nothing, by the entry for it in the root
//! directory (Microsoft's FAT specification, §3, §4 and §6). Nothing vouches for the disk: its numbers decide where is
//! read, and never how much. Pure, over a reader.

use std::io;
use std::ops::ControlFlow::{self, Break, Continue};

/// Fills the bytes from an offset of the disk.
pub type Read<'a> = dyn Fn(u64, &mut [u8]) -> io::Result<()> + 'a;

/// The smallest sector, which is read at a time.
const SECTOR_BYTES: usize = 512;
const ENTRY_BYTES: usize = 32;
/// The most of a root directory that is read: 2048 entries, where a partition of initOS has a dozen.
const MOST_BYTES: u64 = 64 << 10;
/// Attributes of entries. One with all of the last is a part of a long name.
const LABEL: u8 = 0x08;
const FOLDER: u8 = 0x10;
const LONG_NAME: u8 = 0x0f;
/// The first byte of an entry that was removed.
const REMOVED: u8 = 0xe5;
/// The first cluster that there is, and the first number of FAT32 that is none.
const FIRST_CLUSTER: u64 = 2;
const NO_CLUSTER: u64 = 0x0fff_fff7;

/// The label of the file system that `read` reads, empty where it has none; nothing where it is no FAT.
#[must_use]
pub fn label(read: &Read<'_>) -> Option<String> {
    let mut sector = [0; SECTOR_BYTES];
    read(0, &mut sector).ok()?;
    let label = boot_sector_label(&sector)?;
    if !label.is_empty() {
        return Some(label);
    }
    Some(Root::of(&sector).and_then(|root| root.label(read)).unwrap_or_default())
}

fn boot_sector_label(sector: &[u8; SECTOR_BYTES]) -> Option<String> {
    if sector[510..] != [0x55, 0xaa] {
        return None;
    }
    let fat32 = &sector[82..87] == b"FAT32" && sector[66] == 0x29;
    let fat16 = &sector[54..57] == b"FAT" && sector[38] == 0x29;
    match (fat32, fat16) {
        (true, _) => Some(text(&sector[71..82])),
        (false, true) => Some(text(&sector[43..54])),
        (false, false) => None,
    }
}

/// A label as it may be shown: nothing in it is obeyed by a terminal. Empty where it says that there is none.
fn text(label: &[u8]) -> String {
    let shown = |byte: &u8| if byte.is_ascii_graphic() || *byte == b' ' { char::from(*byte) } else { '?' };
    let length = label.iter().rposition(|byte| !matches!(byte, b' ' | 0)).map_or(0, |last| last + 1);
    match &label[..length] {
        b"NO NAME" => String::new(),
        label => label.iter().map(shown).collect(),
    }
}

/// Where a root directory is. All numbers are of bytes from the start of the disk, or lengths in bytes, but for clusters'.
enum Root {
    /// Of FAT12 and FAT16: in one piece.
    Area { start: u64, bytes: u64 },
    /// Of FAT32: in clusters, of which each is followed by the one that the table says.
    Chain { first: u64, table: u64, clusters: u64, data: u64, cluster_bytes: u64 },
}

impl Root {
    /// From a boot sector; nothing where its numbers are not those of a file system.
    fn of(sector: &[u8; SECTOR_BYTES]) -> Option<Self> {
        let half = |at: usize| u64::from(u16::from_le_bytes([sector[at], sector[at + 1]]));
        let whole = |at: usize| half(at) | (half(at + 2) << 16);
        let (sector_bytes, cluster_sectors) = (half(11), u64::from(sector[13]));
        let (reserved, tables, entries) = (half(14), u64::from(sector[16]), half(17));
        let is_sound = (512..=4096).contains(&sector_bytes)
            && sector_bytes.is_power_of_two()
            && cluster_sectors.is_power_of_two()
            && reserved > 0
            && tables > 0;
        if !is_sound {
            return None;
        }
        // Of at most 12, 16, 8 and 32 bits: no sum or product of these reaches 64.
        let is_fat32 = half(22) == 0;
        let table_sectors = if is_fat32 { whole(36) } else { half(22) };
        let table = reserved * sector_bytes;
        let after_tables = table + tables * table_sectors * sector_bytes;
        if !is_fat32 {
            return Some(Self::Area { start: after_tables, bytes: entries * ENTRY_BYTES as u64 });
        }
        Some(Self::Chain {
            first: whole(44),
            table,
            clusters: (table_sectors * sector_bytes / 4).min(NO_CLUSTER),
            data: after_tables,
            cluster_bytes: cluster_sectors * sector_bytes,
        })
    }

    fn label(&self, read: &Read<'_>) -> Option<String> {
        match *self {
            Self::Area { start, bytes } => {
                look_through(read, start, bytes.min(MOST_BYTES)).break_value().flatten()
            }
            Self::Chain { first, table, clusters, data, cluster_bytes } => {
                let (mut cluster, mut left) = (first, MOST_BYTES);
                // A chain may lead back into itself, and has its length all the same.
                while left > 0 && (FIRST_CLUSTER..clusters).contains(&cluster) {
                    let bytes = cluster_bytes.min(left);
                    let start = data + (cluster - FIRST_CLUSTER) * cluster_bytes;
                    if let Break(label) = look_through(read, start, bytes) {
                        return label;
                    }
                    left -= bytes;
                    let mut next = [0; 4];
                    read(table + cluster * 4, &mut next).ok()?;
                    // Four bits are not the cluster's.
                    cluster = u64::from(u32::from_le_bytes(next) & 0x0fff_ffff);
                }
                None
            }
        }
    }
}

/// Looks through a part of a directory. Breaks with the label, or without one where the directory ends.
fn look_through(read: &Read<'_>, start: u64, bytes: u64) -> ControlFlow<Option<String>> {
    let mut sector = [0; SECTOR_BYTES];
    for at in (0..bytes).step_by(SECTOR_BYTES) {
        let length = usize::try_from(bytes - at).map_or(SECTOR_BYTES, |left| left.min(SECTOR_BYTES));
        let part = &mut sector[..length];
        if read(start + at, part).is_err() {
            return Break(None);
        }
        for entry in part.chunks_exact(ENTRY_BYTES) {
            let attributes = entry[11];
            let is_label = attributes & (LABEL | FOLDER) == LABEL && attributes & LONG_NAME != LONG_NAME;
            match entry[0] {
                0 => return Break(None),
                REMOVED => {}
                _ if is_label => return Break(Some(text(&entry[..11]))),
                _ => {}
            }
        }
    }
    Continue(())
}

#[cfg(test)]
#[path = "fat_tests.rs"]
mod tests;
