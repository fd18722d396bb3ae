//! dm-verity: the superblock in front of a hash tree, and the line that the kernel's target takes. Pure.
//!
//! Of the superblock (cryptsetup's `docs/on-disk-format` of dm-verity, version 1) nothing is trusted: it says how to read
//! the tree, and a tree read in another way has another root hash.

use std::fmt::Write;

/// What the kernel does when a block is not what the tree says (the kernel's `admin-guide/device-mapper/verity`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnCorruption {
    /// Restarts the machine.
    #[default]
    Restart,
    /// Panics.
    Panic,
    /// Whoever reads it has an error.
    Fail,
}

/// Why a tree cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VerityError {
    /// The superblock is not one, or of another kind than is written here.
    #[error("its hash tree has no superblock of the known kind")]
    Superblock,
    /// The data is shorter than the tree says.
    #[error("it is shorter than its hash tree says")]
    Short,
    /// The root hash is not one.
    #[error("the signed hash is no SHA-256 in hexadecimal")]
    Hash,
}

/// How a tree is to be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    data_block_bytes: u32,
    hash_block_bytes: u32,
    data_blocks: u64,
    salt: Vec<u8>,
}

/// Its bytes; the tree begins at the next hash block.
pub const SUPERBLOCK_BYTES: usize = 512;

impl Superblock {
    /// Reads it.
    ///
    /// # Errors
    /// [`VerityError::Superblock`].
    pub fn read(bytes: &[u8]) -> Result<Self, VerityError> {
        let part = |at: usize, length: usize| bytes.get(at..at + length).ok_or(VerityError::Superblock);
        let le32 = |at: usize| -> Result<u32, VerityError> {
            Ok(u32::from_le_bytes(part(at, 4)?.try_into().map_err(|_| VerityError::Superblock)?))
        };
        let le64 = |at: usize| -> Result<u64, VerityError> {
            Ok(u64::from(le32(at)?) | u64::from(le32(at + 4)?) << 32)
        };
        let mut algorithm = [0; 32];
        algorithm[..6].copy_from_slice(b"sha256");
        let known =
            part(0, 8)? == b"verity\0\0" && le32(8)? == 1 && le32(12)? == 1 && *part(32, 32)? == algorithm;
        let block = |bytes: u32| (512..=4096).contains(&bytes) && bytes.is_power_of_two();
        let (data_block_bytes, hash_block_bytes) = (le32(64)?, le32(68)?);
        let salt_bytes = usize::from(u16::from_le_bytes([part(80, 1)?[0], part(81, 1)?[0]]));
        if !known || !block(data_block_bytes) || !block(hash_block_bytes) || salt_bytes > 256 {
            return Err(VerityError::Superblock);
        }
        let salt = part(88, salt_bytes)?.to_vec();
        Ok(Self { data_block_bytes, hash_block_bytes, data_blocks: le64(72)?, salt })
    }

    /// How long the data is that the tree covers, in sectors of 512 bytes.
    ///
    /// # Errors
    /// The `data_bytes` that there are do not suffice.
    pub fn sectors(&self, data_bytes: u64) -> Result<u64, VerityError> {
        let covered = self.data_blocks.checked_mul(self.data_block_bytes.into());
        covered
            .filter(|covered| *covered > 0 && *covered <= data_bytes)
            .map(|covered| covered / 512)
            .ok_or(VerityError::Short)
    }

    /// The target's parameters for a tree with this root hash, on these devices.
    #[must_use]
    pub fn parameters(&self, data: &str, tree: &str, root: &RootHash, corruption: OnCorruption) -> String {
        let salt = if self.salt.is_empty() { "-".to_owned() } else { hex(&self.salt) };
        let corruption = match corruption {
            OnCorruption::Restart => " 1 restart_on_corruption",
            OnCorruption::Panic => " 1 panic_on_corruption",
            OnCorruption::Fail => "",
        };
        // The tree starts behind the block that the superblock is in.
        format!(
            "1 {data} {tree} {} {} {} 1 sha256 {} {salt}{corruption}",
            self.data_block_bytes, self.hash_block_bytes, self.data_blocks, root.0
        )
    }
}

/// Where the tables of a squashfs of `length` bytes begin that mounting reads beside the superblock, which its first `bytes` are: all
/// that lies behind its data is tables (the kernel's `filesystems/squashfs`).
#[must_use]
pub fn tables_start(bytes: &[u8], length: u64) -> u64 {
    const INODE_TABLE_START: usize = 64;
    let start = bytes.get(INODE_TABLE_START..INODE_TABLE_START + 8).and_then(|start| start.try_into().ok());
    start.map_or(0, u64::from_le_bytes).max(length.saturating_sub(MOST_TABLE_BYTES)).min(length)
}

/// What is read of tables at most, from their end, which mounting begins with.
const MOST_TABLE_BYTES: u64 = 8 << 20;

/// A root hash: SHA-256 in lower-case hexadecimal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootHash(String);

impl RootHash {
    /// Reads what a file of a hash holds.
    ///
    /// # Errors
    /// [`VerityError::Hash`].
    pub fn read(bytes: &[u8]) -> Result<Self, VerityError> {
        let text = bytes.trim_ascii();
        if text.len() == 64 && text.iter().all(u8::is_ascii_hexdigit) {
            return Ok(Self(String::from_utf8_lossy(text).to_ascii_lowercase()));
        }
        Err(VerityError::Hash)
    }

    /// Its first digits, for people.
    #[must_use]
    pub fn short(&self) -> &str {
        &self.0[..16]
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As veritysetup 2.6 writes it.
    fn superblock() -> Vec<u8> {
        let mut bytes = vec![0; SUPERBLOCK_BYTES];
        bytes[..8].copy_from_slice(b"verity\0\0");
        bytes[8] = 1;
        bytes[12] = 1;
        bytes[32..38].copy_from_slice(b"sha256");
        bytes[64..68].copy_from_slice(&4096u32.to_le_bytes());
        bytes[68..72].copy_from_slice(&4096u32.to_le_bytes());
        bytes[72..80].copy_from_slice(&10u64.to_le_bytes());
        bytes[80] = 2;
        bytes[88..90].copy_from_slice(&[0xab, 0x01]);
        bytes
    }

    #[test]
    fn a_good_superblock_gives_the_targets_line() {
        let read = Superblock::read(&superblock()).expect("a superblock");
        assert_eq!(read.sectors(40_960), Ok(80));
        assert_eq!(read.sectors(40_959), Err(VerityError::Short));
        let root = RootHash::read(format!("{}\n", "Ab".repeat(32)).as_bytes()).expect("a hash");
        assert_eq!(
            read.parameters("/dev/loop0", "/dev/loop1", &root, OnCorruption::Restart),
            format!(
                "1 /dev/loop0 /dev/loop1 4096 4096 10 1 sha256 {} ab01 1 restart_on_corruption",
                "ab".repeat(32)
            )
        );
    }

    #[test]
    fn a_device_that_is_looked_at_fails_reads_and_nothing_else() {
        let read = Superblock::read(&superblock()).expect("a superblock");
        let root = RootHash::read("ab".repeat(32).as_bytes()).expect("a hash");
        assert!(read.parameters("a", "b", &root, OnCorruption::Fail).ends_with(" ab01"));
    }

    #[test]
    fn the_tables_that_mounting_reads_lie_within_the_image() {
        let mut bytes = vec![0; 96];
        bytes[64..72].copy_from_slice(&9000_u64.to_le_bytes());
        assert_eq!(tables_start(&bytes, 10_000), 9000);
        assert_eq!(tables_start(&bytes, 8000), 8000);
        assert_eq!(tables_start(&[], 1000), 0);
        assert_eq!(tables_start(&bytes, 1 << 30), (1 << 30) - (8 << 20));
    }

    #[test]
    fn whatever_else_a_superblock_says_is_refused() {
        for (at, byte) in [(0, b'V'), (8, 2), (12, 0), (32, b'x'), (38, b'x'), (65, 0), (68, 1), (81, 9)] {
            let mut bytes = superblock();
            bytes[at] = byte;
            assert_eq!(Superblock::read(&bytes), Err(VerityError::Superblock), "byte {at}");
        }
        assert_eq!(Superblock::read(&superblock()[..80]), Err(VerityError::Superblock));
        assert_eq!(Superblock::read(b""), Err(VerityError::Superblock));
        let mut endless = superblock();
        endless[72..80].fill(0xff);
        let endless = Superblock::read(&endless).expect("a superblock");
        assert_eq!(endless.sectors(u64::MAX), Err(VerityError::Short));
    }

    #[test]
    fn only_a_whole_hash_is_a_hash() {
        for text in ["", "ab", &"g".repeat(64), &"a".repeat(63), &"a".repeat(65)] {
            assert_eq!(RootHash::read(text.as_bytes()), Err(VerityError::Hash), "{text}");
        }
    }
}
