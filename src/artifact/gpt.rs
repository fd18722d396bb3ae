//! GUID partition tables: a disk's first and last sectors, and a whole disk whose one partition firmware boots from.
//!
//! GUIDs are functions of a digest, so there is nothing random in a disk. Partitions begin at whole MiB. What is in
//! them is written by others, through a [`Window`].
//!
//! Source: UEFI 2.10 §5.3 (GPT) and §5.2.3 (protective MBR).

use std::io::{self, Seek, SeekFrom, Write};

use kiln_digest::Digest;

use crate::fat::{self, FatError};
use crate::tree::{Contents, Tree};
use crate::uuid;

const SECTOR: u64 = 512;
const SECTOR_BYTES: usize = 512;
/// What partitions begin at a multiple of.
const ALIGNMENT_SECTORS: u64 = 2048;
/// The table of entries: the fewest there may be (§5.3.1: 16 KiB).
const ENTRIES: usize = 128;
const ENTRY_BYTES: usize = 128;
const TABLE_SECTORS: u64 = (ENTRIES * ENTRY_BYTES) as u64 / SECTOR;
const HEADER_BYTES: u32 = 92;
/// Units of a partition's name.
const NAME_UNITS: usize = 36;

/// A GUID, its bytes in the order in which it is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Guid(pub [u8; 16]);

impl Guid {
    /// The type of an EFI system partition (§5.3.3).
    pub const EFI_SYSTEM: Self = Self(*b"\xc1\x2a\x73\x28\xf8\x1f\x11\xd2\xba\x4b\x00\xa0\xc9\x3e\xc9\x3b");
    /// The type of a partition with a file system of Linux.
    pub const LINUX: Self = Self(*b"\x0f\xc6\x3d\xaf\x84\x83\x47\x72\x8e\x79\x3d\x69\xd8\x47\x7d\xe4");

    /// As it is on disk: the first three fields little-endian (UEFI 2.10 appendix A).
    fn on_disk(self) -> [u8; 16] {
        let mut bytes = self.0;
        bytes[..4].reverse();
        bytes[4..6].reverse();
        bytes[6..8].reverse();
        bytes
    }
}

/// A partition as it is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// What it is for.
    pub kind: Guid,
    /// Its name: at most 36 UTF-16 units.
    pub name: String,
    /// Its length, a multiple of 512 above zero.
    pub bytes: u64,
}

/// Why a table could not be made or written.
#[derive(Debug, thiserror::Error)]
pub enum GptError {
    /// More partitions than the table has entries.
    #[error("a partition table has 128 entries, not {0}")]
    TooMany(usize),
    /// A name that is too long, or has a NUL.
    #[error("a partition cannot have the name `{}`", .0.escape_debug())]
    Name(String),
    /// A length that is zero, not in whole sectors, or beyond what a disk can have.
    #[error("the partition `{}` cannot be {bytes} bytes long", .name.escape_debug())]
    Length {
        /// Its name.
        name: String,
        /// The length.
        bytes: u64,
    },
    /// The output fails.
    #[error("the partition table could not be written")]
    Write(#[source] io::Error),
    /// The partition's own image.
    #[error(transparent)]
    Fat(#[from] FatError),
}

/// A disk's layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Where each partition begins, in bytes.
    pub starts: Vec<u64>,
    /// The length of the disk.
    pub bytes: u64,
    guid: Guid,
    table: Vec<u8>,
}

impl Disk {
    /// Lays out the shortest disk with `partitions` one after the other. GUIDs come from `seed`.
    ///
    /// # Errors
    /// [`GptError`] of a partition that cannot be.
    pub fn new(seed: &Digest, partitions: &[Partition]) -> Result<Self, GptError> {
        if partitions.len() > ENTRIES {
            return Err(GptError::TooMany(partitions.len()));
        }
        let guid = |index: usize| {
            let text = [b"kiln gpt ", &index.to_string().into_bytes()[..], b" ", seed.as_bytes()].concat();
            Guid(uuid::of(&Digest::of(&text)))
        };
        let mut disk = Self { starts: Vec::new(), bytes: 0, guid: guid(0), table: Vec::new() };
        let mut next = ALIGNMENT_SECTORS;
        for (index, Partition { kind, name, bytes }) in partitions.iter().enumerate() {
            let bad_length = || GptError::Length { name: name.clone(), bytes: *bytes };
            if *bytes == 0 || !bytes.is_multiple_of(SECTOR) || *bytes > i64::MAX.unsigned_abs() / 256 {
                return Err(bad_length());
            }
            let mut units: Vec<u16> = name.encode_utf16().collect();
            if units.len() > NAME_UNITS || units.contains(&0) {
                return Err(GptError::Name(name.clone()));
            }
            units.resize(NAME_UNITS, 0);
            let last = next + bytes / SECTOR - 1;
            disk.table.extend_from_slice(&kind.on_disk());
            disk.table.extend_from_slice(&guid(index + 1).on_disk());
            // No attributes.
            for number in [next, last, 0] {
                disk.table.extend_from_slice(&number.to_le_bytes());
            }
            disk.table.extend(units.iter().flat_map(|unit| unit.to_le_bytes()));
            disk.starts.push(next * SECTOR);
            next = (last + 1).next_multiple_of(ALIGNMENT_SECTORS);
        }
        disk.table.resize(ENTRIES * ENTRY_BYTES, 0);
        // The second table has the last MiB to itself.
        disk.bytes = (next + ALIGNMENT_SECTORS) * SECTOR;
        Ok(disk)
    }

    /// Writes both tables to `out`, leaving alone what is between them.
    ///
    /// # Errors
    /// [`GptError::Write`].
    pub fn write(&self, mut out: impl Write + Seek) -> Result<(), GptError> {
        let last = self.bytes / SECTOR - 1;
        let mut put = |sector: u64, bytes: &[u8]| {
            out.seek(SeekFrom::Start(sector * SECTOR))?;
            out.write_all(bytes)
        };
        let tables_at = [2, last - TABLE_SECTORS];
        // The first last, so that a disk which was not finished is none.
        put(tables_at[1], &self.table)
            .and_then(|()| put(last, &self.header(last, 1, tables_at[1])))
            .and_then(|()| put(tables_at[0], &self.table))
            .and_then(|()| put(1, &self.header(1, last, tables_at[0])))
            .and_then(|()| put(0, &protective_mbr(last)))
            .and_then(|()| out.flush())
            .map_err(GptError::Write)
    }

    /// The header at sector `at` (§5.3.2), the other one being at `other`.
    fn header(&self, at: u64, other: u64, table_at: u64) -> Vec<u8> {
        let last = self.bytes / SECTOR - 1;
        let mut header = b"EFI PART".to_vec();
        // Revision 1.0, and a sum that is zero while it is made.
        for number in [0x0001_0000, HEADER_BYTES, 0, 0] {
            header.extend_from_slice(&number.to_le_bytes());
        }
        for number in [at, other, 2 + TABLE_SECTORS, last - TABLE_SECTORS - 1] {
            header.extend_from_slice(&number.to_le_bytes());
        }
        header.extend_from_slice(&self.guid.on_disk());
        header.extend_from_slice(&table_at.to_le_bytes());
        for number in [128_u32, 128, crc32(&self.table)] {
            header.extend_from_slice(&number.to_le_bytes());
        }
        let sum = crc32(&header);
        header[16..20].copy_from_slice(&sum.to_le_bytes());
        header.resize(SECTOR_BYTES, 0);
        header
    }
}

/// The sector that tells those who know no GPT that the disk is full.
fn protective_mbr(last: u64) -> [u8; SECTOR_BYTES] {
    let mut sector = [0; SECTOR_BYTES];
    let length = u32::try_from(last).unwrap_or(u32::MAX);
    sector[446..462].copy_from_slice(&[0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0, 0, 0, 0]);
    sector[458..462].copy_from_slice(&length.to_le_bytes());
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// An output whose start is a place in another, as a partition's is in a disk.
pub struct Window<W> {
    out: W,
    start: u64,
}

impl<W: Write + Seek> Window<W> {
    /// The output that begins at byte `start` of `out`, and is positioned there.
    ///
    /// # Errors
    /// What seeking says.
    pub fn new(mut out: W, start: u64) -> io::Result<Self> {
        out.seek(SeekFrom::Start(start))?;
        Ok(Self { out, start })
    }
}

impl<W: Write> Write for Window<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl<W: Seek> Seek for Window<W> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let to = match to {
            SeekFrom::Start(at) => {
                SeekFrom::Start(self.start.checked_add(at).ok_or(io::ErrorKind::InvalidInput)?)
            }
            relative => relative,
        };
        let at = self.out.seek(to)?;
        Ok(at.checked_sub(self.start).ok_or(io::ErrorKind::InvalidInput)?)
    }
}

/// Writes a disk whose one partition is an EFI system partition with `tree`, and returns the disk's length. `out` is
/// empty; `options` are the partition's, but for what is before it.
///
/// # Errors
/// [`GptError`]; `out` then holds a part of the disk, without a table.
pub fn write_esp(
    tree: &Tree,
    contents: &dyn Contents,
    mut out: impl Write + Seek,
    options: &fat::Options,
) -> Result<u64, GptError> {
    let bytes = options.size_bytes.map_or_else(|| fat::least_bytes(tree), Ok)?;
    let partition = Partition { kind: Guid::EFI_SYSTEM, name: "EFI system partition".to_owned(), bytes };
    let disk = Disk::new(&tree.digest(), &[partition])?;
    let [start] = disk.starts[..] else { return Err(GptError::TooMany(disk.starts.len())) };
    let hidden_sectors = u32::try_from(start / SECTOR).unwrap_or(u32::MAX);
    let options = fat::Options { size_bytes: Some(bytes), hidden_sectors, ..*options };
    fat::write(tree, contents, Window::new(&mut out, start).map_err(GptError::Write)?, &options)?;
    disk.write(out)?;
    Ok(disk.bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn partition(name: &str, bytes: u64) -> Partition {
        Partition { kind: Guid::LINUX, name: name.to_owned(), bytes }
    }

    #[test]
    fn partitions_that_cannot_be_are_refused() {
        let made = |partitions: &[Partition]| Disk::new(&Digest::of(b""), partitions);
        for bytes in [0, 1, 511, 513, u64::MAX, u64::MAX - 511] {
            assert!(matches!(made(&[partition("p", bytes)]), Err(GptError::Length { .. })), "{bytes}");
        }
        for name in ["n".repeat(37), "a\0b".to_owned(), "\u{1f600}".repeat(19)] {
            assert!(matches!(made(&[partition(&name, 512)]), Err(GptError::Name(_))), "{name}");
        }
        let many = vec![partition("p", 512); 129];
        assert!(made(&many[..128]).is_ok());
        assert!(matches!(made(&many), Err(GptError::TooMany(129))));
        let largest = vec![partition("p", i64::MAX.unsigned_abs() / 256 / 512 * 512); 128];
        assert!(made(&largest).is_ok());
    }

    #[test]
    fn a_window_is_where_it_says() {
        let mut disk = io::Cursor::new(vec![0; 8]);
        let mut window = Window::new(&mut disk, 4).expect("within");
        window.write_all(b"ab").expect("room");
        assert_eq!(window.seek(SeekFrom::Start(3)).expect("within"), 3);
        window.write_all(b"d").expect("room");
        assert_eq!(window.stream_position().expect("known"), 4);
        assert!(window.seek(SeekFrom::Current(-5)).is_err(), "before its start");
        assert_eq!(disk.into_inner(), b"\0\0\0\0ab\0d");
    }
}
