//! The scratch disk: a sparse file that the guest swaps to, so that a step's layers may outgrow memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use kiln_artifact::swap;

use super::{Disk, serial};

/// A scratch disk of `size_bytes`, in a file of `folder` that has no name and goes with its last descriptor. It has its
/// swap header: how large the disk is, the guest learns from that and not from its device.
///
/// # Errors
/// `InvalidInput` where there is no room for a page beside the header; what making the file says.
pub fn disk(folder: &Path, size_bytes: u64) -> io::Result<Disk> {
    let header = swap::header(size_bytes).ok_or(io::ErrorKind::InvalidInput)?;
    let file: File = tempfile::tempfile_in(folder)?;
    file.set_len(size_bytes)?;
    file.write_all_at(&header, 0)?;
    Ok(Disk { serial: serial::SCRATCH.to_owned(), file: file.into(), read_only: false })
}
