//! Guest memory as the device process takes it: a file in memory whose size stays, so that nobody who maps it can lose it.

use std::fs::File;
use std::io;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

/// Memory for a guest, all zero.
///
/// # Errors
/// What memfd_create(2) and ftruncate(2) say.
pub fn new(size_bytes: u64) -> io::Result<File> {
    let ram = memfd_create("kiln-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let ram = File::from(ram);
    ram.set_len(size_bytes)?;
    fcntl_add_seals(&ram, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(ram)
}
