//! Directories as erofs lays them out: blocks, each an array of entries and then their names, in one order of names
//! throughout (`Documentation/filesystems/erofs.rst`, "Directories").

use super::format::{BLOCK, BLOCK_BYTES, DIRENT_BYTES, write_dirent};

/// An entry of a directory.
#[derive(Clone, Copy)]
pub(super) struct Entry<'a> {
    pub name: &'a [u8],
    pub nid: u64,
    pub file_type: u8,
}

/// How long a directory of these names, in order, is. Every block but the last counts whole.
pub(super) fn size<'a>(names: impl IntoIterator<Item = &'a [u8]>) -> u64 {
    let (mut full_blocks, mut used) = (0, 0);
    for name in names {
        if !fits(used, name) {
            full_blocks += 1;
            used = 0;
        }
        used += DIRENT_BYTES + name.len();
    }
    full_blocks * BLOCK + used as u64
}

fn fits(used_bytes: usize, name: &[u8]) -> bool {
    used_bytes + DIRENT_BYTES + name.len() <= BLOCK_BYTES
}

/// Writes the directory's bytes, as many as [`size`] says, block by block into `take`.
pub(super) fn write<E>(entries: &[Entry<'_>], mut take: impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
    let mut rest = entries;
    let mut block = Vec::with_capacity(BLOCK_BYTES);
    while !rest.is_empty() {
        let mut used = 0;
        let count = rest.iter().take_while(|entry| {
            let is_here = fits(used, entry.name);
            used += DIRENT_BYTES + entry.name.len();
            is_here
        });
        let (here, later) = rest.split_at(count.count());
        block.clear();
        // The first entry's name offset tells how many entries there are.
        let mut name_at = here.len() * DIRENT_BYTES;
        for entry in here {
            write_dirent(&mut block, entry.nid, name_at, entry.file_type);
            name_at += entry.name.len();
        }
        for entry in here {
            block.extend_from_slice(entry.name);
        }
        if !later.is_empty() {
            // A name ends where the next begins, the last one at a NUL or the block's end.
            block.resize(BLOCK_BYTES, 0);
        }
        take(&block)?;
        rest = later;
    }
    Ok(())
}
