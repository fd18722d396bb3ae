//! The disks of a machine, from what the user named: opened, put on a FAT disk where it is no disk, and with a layer over
//! it that takes what the guest writes.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use super::image::{self, Subject};
use super::{BootError, DiskChoice, folder, layer};
use crate::machine::qemu::firmware::{BootDisk, Format};

/// The disk for `choice`; what is made for it lies in `scratch`.
pub(super) fn disk(choice: &DiskChoice, scratch: &Path) -> Result<BootDisk, BootError> {
    let subject = image::look(&choice.path, choice.format, choice.keep_writes)?;
    let (file, format): (OwnedFd, Format) = match subject {
        Subject::Disk(file, format) => (file.into(), format),
        Subject::Folder => (folder::disk_of_folder(&choice.path, choice.label, scratch)?, Format::Raw),
        Subject::Program(_) => (folder::disk_of_program(&choice.path, scratch)?, Format::Raw),
    };
    let layer = match choice.keep_writes {
        true => None,
        false => {
            let size = disk_size(&file, format).map_err(BootError::io("read the size of a disk"))?;
            let bytes = layer::empty(size).ok_or_else(|| BootError::TooLarge(choice.path.clone()))?;
            Some(nameless(scratch, &bytes).map_err(BootError::io("write a file of the machine's"))?.into())
        }
    };
    Ok(BootDisk { file, format, bus: choice.bus, read_only: false, layer })
}

/// A file of these bytes that has no name.
pub(super) fn nameless(folder: &Path, bytes: &[u8]) -> io::Result<File> {
    let mut file = tempfile::tempfile_in(folder)?;
    file.write_all(bytes)?;
    Ok(file)
}

/// How large a guest sees the disk: a multiple of a sector, as QEMU rounds.
fn disk_size(file: &OwnedFd, format: Format) -> io::Result<u64> {
    let mut file = File::from(file.try_clone()?);
    match format {
        // A block device has its size at its end.
        Format::Raw => Ok(io::Seek::seek(&mut file, io::SeekFrom::End(0))?.next_multiple_of(512)),
        Format::Qcow2 => {
            let mut size = [0; 8];
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut size, 24)?;
            Ok(u64::from_be_bytes(size))
        }
    }
}
