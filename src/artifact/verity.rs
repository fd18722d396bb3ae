//! dm-verity hash trees: SHA-256 over blocks of 4 KiB, with the superblock that veritysetup writes and reads.
//!
//! Salt and UUID come from the data's digest, so equal data has equal trees and one root hash. All processors hash.
//! The tree, a 128th of the data, is held in memory. Forward error correction is not written.
//!
//! Source: `Documentation/admin-guide/device-mapper/verity.rst`, and cryptsetup's wiki page *DMVerity* for the superblock.

use std::io::{self, Write};
use std::num::NonZero;
use std::sync::{Mutex, PoisonError};
use std::thread;

use kiln_digest::{Digest, Hasher};

use crate::image::{Fields, ReadAt};
use crate::uuid;

/// Length of a block of data, and of one of hashes.
pub const BLOCK_BYTES: usize = 4096;
const BLOCK: u64 = 4096;
const HASH_BYTES: usize = 32;
/// How many hashes a block has.
const FAN_OUT: u64 = 128;
/// The salt's field in the superblock.
const MAX_SALT_BYTES: usize = 256;
/// Data is read in pieces of this.
const PIECE_BYTES: usize = 1 << 20;
const MAGIC: &[u8; 8] = b"verity\0\0";
const ALGORITHM: &[u8; 32] = b"sha256\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// Why a hash tree could not be made, or data could not be verified.
#[derive(Debug, thiserror::Error)]
pub enum VerityError {
    /// The data cannot be read.
    #[error("the data cannot be read")]
    Data(#[source] io::Error),
    /// The hash tree cannot be read.
    #[error("the hash tree cannot be read")]
    Tree(#[source] io::Error),
    /// The output cannot be written.
    #[error("the hash tree cannot be written")]
    Write(#[source] io::Error),
    /// Data that is empty or does not consist of whole blocks.
    #[error("{0} bytes are not one or more blocks of 4096")]
    Length(u64),
    /// A file that begins with no verity superblock, or with one of another kind.
    #[error("it is no verity hash tree: {0}")]
    Superblock(&'static str),
    /// The data is shorter than the superblock says.
    #[error("the data is cut off: it has {found} of {expected} blocks")]
    CutOff {
        /// How many there are.
        found: u64,
        /// How many there should be.
        expected: u64,
    },
    /// A block of data is not what the tree says.
    #[error("block {0} of the data is corrupted")]
    CorruptData(u64),
    /// A block of the hash tree, its superblock being block 0, is not what its blocks below say.
    #[error("block {0} of the hash tree is corrupted")]
    CorruptTree(u64),
    /// Data and tree agree, but with another root hash.
    #[error("the root hash is {found}, not {expected}")]
    Root {
        /// Of these data.
        found: Digest,
        /// What was asked for.
        expected: Digest,
    },
}

/// What varies between trees of the same data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameters {
    /// Hashed before each block; at most 256 bytes.
    salt: Vec<u8>,
    /// Names the tree; no hash depends on it.
    uuid: [u8; 16],
}

impl Parameters {
    /// Those that follow from the digest of the data.
    pub fn derived(data: &Digest) -> Self {
        let salt = Digest::of(&[b"kiln verity salt ", &data.as_bytes()[..]].concat());
        let name = Digest::of(&[b"kiln verity uuid ", &data.as_bytes()[..]].concat());
        Self { salt: salt.as_bytes().into(), uuid: uuid::of(&name) }
    }

    /// The salt.
    pub fn salt(&self) -> &[u8] {
        &self.salt
    }

    fn superblock(&self, data_blocks: u64) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        // Superblock version 1, hash type 1: the salt comes first, and hashes fill a power of two.
        bytes.extend_from_slice(&[1, 0, 0, 0, 1, 0, 0, 0]);
        bytes.extend_from_slice(&self.uuid);
        bytes.extend_from_slice(ALGORITHM);
        for block_bytes in [4096_u32; 2] {
            bytes.extend_from_slice(&block_bytes.to_le_bytes());
        }
        bytes.extend_from_slice(&data_blocks.to_le_bytes());
        bytes.extend_from_slice(&u16::try_from(self.salt.len()).unwrap_or_default().to_le_bytes());
        bytes.extend_from_slice(&[0; 6]);
        bytes.extend_from_slice(&self.salt);
        bytes.resize(BLOCK_BYTES, 0);
        bytes
    }

    /// Reads a superblock: the parameters, and how many blocks of data there are.
    fn read(block: &[u8]) -> Result<(Self, u64), VerityError> {
        let fields = Fields(block);
        if !block.starts_with(MAGIC) {
            return Err(VerityError::Superblock("it does not begin with `verity`"));
        }
        if (fields.u32(8), fields.u32(12)) != (1, 1) {
            return Err(VerityError::Superblock("its version is not 1"));
        }
        if block.get(32..64) != Some(&ALGORITHM[..]) {
            return Err(VerityError::Superblock("its hash is not sha256"));
        }
        if (fields.u32(64), fields.u32(68)) != (4096, 4096) {
            return Err(VerityError::Superblock("its blocks are not of 4096 bytes"));
        }
        let salt_bytes = usize::from(fields.u16(80));
        let salt = block.get(88..88 + salt_bytes).filter(|salt| salt.len() <= MAX_SALT_BYTES);
        let salt = salt.ok_or(VerityError::Superblock("its salt is too long"))?;
        let data_blocks = fields.u64(72);
        if data_blocks == 0 || data_blocks > u64::MAX / BLOCK {
            return Err(VerityError::Superblock("its number of blocks is impossible"));
        }
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&block[16..32]);
        Ok((Self { salt: salt.into(), uuid }, data_blocks))
    }
}

/// Writes the superblock and the hash tree of `data` to `out`, as `veritysetup format` would, and returns the root
/// hash.
///
/// # Errors
/// [`VerityError`]; `out` then holds a part.
pub fn write(
    data: &(dyn ReadAt + Sync),
    parameters: &Parameters,
    mut out: impl Write,
) -> Result<Digest, VerityError> {
    let length = data.length().map_err(VerityError::Data)?;
    if length == 0 || !length.is_multiple_of(BLOCK) {
        return Err(VerityError::Length(length));
    }
    let tree = HashTree::of(data, length / BLOCK, &parameters.salt)?;
    out.write_all(&parameters.superblock(length / BLOCK)).map_err(VerityError::Write)?;
    for level in tree.levels.iter().rev() {
        out.write_all(level).map_err(VerityError::Write)?;
    }
    out.flush().map_err(VerityError::Write)?;
    Ok(tree.root)
}

/// Verifies `data` against a hash tree with its superblock, and the tree against its root hash.
///
/// # Errors
/// [`VerityError`], naming the first block that is not what it should be.
pub fn verify(data: &(dyn ReadAt + Sync), tree: &dyn ReadAt, root: &Digest) -> Result<(), VerityError> {
    let mut superblock = vec![0; BLOCK_BYTES];
    tree.read_exact_at(&mut superblock, 0).map_err(VerityError::Tree)?;
    let (parameters, data_blocks) = Parameters::read(&superblock)?;
    let found = data.length().map_err(VerityError::Data)? / BLOCK;
    if found < data_blocks {
        return Err(VerityError::CutOff { found, expected: data_blocks });
    }
    let computed = HashTree::of(data, data_blocks, &parameters.salt)?;
    let is_data_wrong = computed.root != *root;
    let mut wrong = None;
    let mut number = 1;
    let mut stored = vec![0; BLOCK_BYTES];
    for (height, level) in computed.levels.iter().enumerate().rev() {
        for (at, block) in level.chunks(BLOCK_BYTES).enumerate() {
            tree.read_exact_at(&mut stored, number * BLOCK).map_err(VerityError::Tree)?;
            if stored != block {
                // The lowest level is the last: where the data is wrong, it says which block of it.
                let differs =
                    stored.chunks(HASH_BYTES).zip(block.chunks(HASH_BYTES)).position(|(a, b)| a != b);
                let data_block = at as u64 * FAN_OUT + differs.unwrap_or_default() as u64;
                if !is_data_wrong {
                    return Err(VerityError::CorruptTree(number));
                } else if height == 0 {
                    return Err(VerityError::CorruptData(data_block));
                }
                wrong.get_or_insert(number);
            }
            number += 1;
        }
    }
    match wrong {
        Some(number) => Err(VerityError::CorruptTree(number)),
        None if is_data_wrong => Err(VerityError::Root { found: computed.root, expected: *root }),
        None => Ok(()),
    }
}

/// How many bytes of data the hash tree that begins with `superblock` covers. No device shows what lies behind them.
///
/// # Errors
/// [`VerityError::Superblock`].
pub fn covered_bytes(superblock: &[u8]) -> Result<u64, VerityError> {
    let block =
        superblock.get(..BLOCK_BYTES).ok_or(VerityError::Superblock("it ends before its first block"))?;
    Parameters::read(block).map(|(_, data_blocks)| data_blocks * BLOCK)
}

/// A computed tree: levels of whole blocks of hashes, the lowest first.
struct HashTree {
    levels: Vec<Vec<u8>>,
    root: Digest,
}

impl HashTree {
    /// The tree over the first `blocks` blocks, of which there is one at least.
    fn of(data: &(dyn ReadAt + Sync), blocks: u64, salt: &[u8]) -> Result<Self, VerityError> {
        let mut level = hashes(data, blocks, salt)?;
        let mut levels = Vec::new();
        // One hash is the root itself; a single block of data has no tree.
        while level.len() > HASH_BYTES {
            level.resize(level.len().next_multiple_of(BLOCK_BYTES), 0);
            let next = hashes(&&level[..], (level.len() / BLOCK_BYTES) as u64, salt)?;
            levels.push(std::mem::replace(&mut level, next));
        }
        let root = level.try_into().map_err(|_| VerityError::Length(blocks * BLOCK))?;
        Ok(Self { levels, root: Digest::from_bytes(root) })
    }
}

/// The hashes of `blocks` blocks, each thread taking a run of them.
fn hashes(data: &(dyn ReadAt + Sync), blocks: u64, salt: &[u8]) -> Result<Vec<u8>, VerityError> {
    let too_long = |_| VerityError::Length(blocks.saturating_mul(BLOCK));
    let count = usize::try_from(blocks).map_err(too_long)?;
    let bytes = count.checked_mul(HASH_BYTES).ok_or(VerityError::Length(blocks.saturating_mul(BLOCK)))?;
    let mut hashes = vec![0; bytes];
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    // Not less than a piece, so that few blocks cost no threads.
    let run = count.div_ceil(threads).next_multiple_of(PIECE_BYTES / BLOCK_BYTES);
    // Protects which runs nobody has taken yet.
    let runs = Mutex::new(hashes.chunks_mut(run * HASH_BYTES).enumerate());
    let hash_some = || {
        loop {
            let next = runs.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((index, hashes)) = next else { return Ok(()) };
            hash_run(data, index * run, hashes, salt)?;
        }
    };
    thread::scope(|scope| {
        let mut others = Vec::new();
        for _ in 1..count.div_ceil(run) {
            match thread::Builder::new().name("verity".to_owned()).spawn_scoped(scope, hash_some) {
                Ok(other) => others.push(other),
                // The host gives no more: those that there are do it.
                Err(_) => break,
            }
        }
        let mut result = hash_some();
        for other in others {
            // Threads that panic have a fault of ours, which goes on where they are awaited.
            let other = other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            result = result.and(other);
        }
        result.map_err(VerityError::Data)
    })?;
    Ok(hashes)
}

/// Hashes the blocks from `first` on, as many as there is room for.
fn hash_run(data: &dyn ReadAt, first: usize, hashes: &mut [u8], salt: &[u8]) -> io::Result<()> {
    let mut at = first as u64 * BLOCK;
    let mut piece = vec![0; PIECE_BYTES.min(hashes.len() / HASH_BYTES * BLOCK_BYTES)];
    let mut salted = Hasher::default();
    salted.update(salt);
    for hashes in hashes.chunks_mut(PIECE_BYTES / BLOCK_BYTES * HASH_BYTES) {
        let piece = &mut piece[..hashes.len() / HASH_BYTES * BLOCK_BYTES];
        data.read_exact_at(piece, at)?;
        at += piece.len() as u64;
        for (block, hash) in piece.chunks(BLOCK_BYTES).zip(hashes.chunks_mut(HASH_BYTES)) {
            let mut hasher = salted.clone();
            hasher.update(block);
            hash.copy_from_slice(hasher.finish().0.as_bytes());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(data: &[u8]) -> (Vec<u8>, Digest) {
        let mut tree = Vec::new();
        let root = write(&data, &Parameters::derived(&Digest::of(data)), &mut tree).expect("whole blocks");
        (tree, root)
    }

    fn data(blocks: usize) -> Vec<u8> {
        (0..blocks * BLOCK_BYTES).map(|at| (at / 7 % 253).to_le_bytes()[0]).collect()
    }

    #[test]
    fn a_flipped_byte_is_found_where_it_is() {
        let good = data(300);
        let (tree, root) = made(&good);
        // Three blocks of hashes over 300 of data, one over those.
        assert_eq!(tree.len(), 5 * BLOCK_BYTES);
        verify(&&good[..], &&tree[..], &root).expect("untouched");
        assert_eq!(covered_bytes(&tree).expect("a superblock"), 300 * BLOCK);
        for block in [0, 127, 128, 255, 299] {
            let mut bad = good.clone();
            bad[block * BLOCK_BYTES + 4095] ^= 1;
            let error = verify(&&bad[..], &&tree[..], &root).expect_err("flipped");
            assert!(matches!(error, VerityError::CorruptData(at) if at == block as u64), "{error}");
        }
        for block in 1..5 {
            // Padding is hashed too.
            for byte in [0, 50, 4095] {
                let mut bad = tree.clone();
                bad[block * BLOCK_BYTES + byte] ^= 0x80;
                let error = verify(&&good[..], &&bad[..], &root).expect_err("flipped");
                assert!(matches!(error, VerityError::CorruptTree(at) if at == block as u64), "{error}");
            }
        }
        let other = Digest::of(b"other");
        assert!(matches!(verify(&&good[..], &&tree[..], &other), Err(VerityError::Root { .. })));
    }

    #[test]
    fn a_superblock_that_lies_is_refused() {
        let good = data(3);
        let (tree, root) = made(&good);
        for (at, value) in [(0, 0), (8, 2), (12, 0), (32, b'b'), (65, 8), (69, 8), (81, 2), (79, 0xff)] {
            let mut bad = tree.clone();
            bad[at] = value;
            let error = verify(&&good[..], &&bad[..], &root).expect_err("a lie");
            assert!(matches!(error, VerityError::Superblock(_)), "{at}: {error}");
        }
        let mut bad = tree.clone();
        bad[72] = 4;
        assert!(matches!(
            verify(&&good[..], &&bad[..], &root),
            Err(VerityError::CutOff { found: 3, expected: 4 })
        ));
        for length in [0, 4095, 4096, 8191] {
            let error = verify(&&good[..], &&tree[..length], &root).expect_err("cut off");
            assert!(matches!(error, VerityError::Tree(_)), "{length}: {error}");
        }
    }

    #[test]
    fn data_that_is_no_whole_number_of_blocks_is_refused() {
        for length in [0, 1, 4095, 4097] {
            let data = vec![0; length];
            let result = write(&&data[..], &Parameters::derived(&Digest::of(b"")), Vec::new());
            assert!(matches!(result, Err(VerityError::Length(found)) if found == length as u64));
        }
    }
}
