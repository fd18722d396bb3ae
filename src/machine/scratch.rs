//! The scratch disk: a sparse file that the guest swaps to, so that a step's layers may outgrow memory.

use std::fs::File;
use std::io;
use std::path::Path;

use super::{Disk, serial};

/// How large it is where nobody says, and how much of it a frozen machine swaps to.
pub const USUAL_BYTES: u64 = 16 << 30;

/// A scratch disk of `size_bytes`, in a file of `folder` that has no name and goes with its last descriptor.
///
/// # Errors
/// What making the file says.
pub fn disk(folder: &Path, size_bytes: u64) -> io::Result<Disk> {
    let file: File = tempfile::tempfile_in(folder)?;
    file.set_len(size_bytes)?;
    Ok(Disk { serial: serial::SCRATCH.to_owned(), file: file.into(), read_only: false })
}
