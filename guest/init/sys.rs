//! The ioctls of loop devices and of device-mapper, which have no safe wrapper. Every `unsafe` of this init is here.
#![expect(unsafe_code, reason = "ioctls without a safe wrapper")]

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};

use rustix::io::Errno;

/// linux/loop.h.
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4c82;
const LOOP_CONFIGURE: libc::Ioctl = 0x4c0a;
/// `LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR`.
const LOOP_FLAGS: u32 = 1 | 4;

/// `struct loop_config` of linux/loop.h, with what is not used as zeros.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    before_flags: [u8; 52],
    flags: u32,
    rest: [u8; 240],
}

/// `struct dm_ioctl` of linux/dm-ioctl.h and, behind it, room for one target and its parameters.
#[repr(C)]
struct DmRequest {
    version: [u32; 3],
    data_size: u32,
    data_start: u32,
    target_count: u32,
    open_count: i32,
    flags: u32,
    event_nr: u32,
    padding: u32,
    dev: u64,
    name: [u8; 128],
    uuid: [u8; 129],
    data: [u8; 7],
    sector_start: u64,
    length: u64,
    status: i32,
    next: u32,
    target_type: [u8; 16],
    parameters: [u8; 1024],
}

/// The length of `struct dm_ioctl`, where a target begins.
const DM_IOCTL_BYTES: u32 = 312;
/// `DM_READONLY_FLAG`.
const DM_READ_ONLY: u32 = 1;

/// Steps in a device's life: `_IOWR(0xfd, NUMBER, struct dm_ioctl)`.
const DM_DEV_CREATE: libc::Ioctl = 0xc138_fd03;
const DM_DEV_REMOVE: libc::Ioctl = 0xc138_fd04;
const DM_DEV_SUSPEND: libc::Ioctl = 0xc138_fd06;
const DM_TABLE_LOAD: libc::Ioctl = 0xc138_fd09;

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Attaches `file`, read-only, to a free loop device, and gives its number. It is free again when nobody uses it.
///
/// # Errors
/// Those of the ioctls.
pub fn attach_loop(
    control: &File,
    file: &File,
    open: impl Fn(u32) -> Result<File, Errno>,
) -> Result<(u32, File), Errno> {
    loop {
        // SAFETY: takes no argument.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        let number = u32::try_from(number).map_err(|_| last_errno())?;
        let device = open(number)?;
        let config = LoopConfig {
            fd: u32::try_from(file.as_raw_fd()).map_err(|_| Errno::BADF)?,
            block_size: 0,
            before_flags: [0; 52],
            flags: LOOP_FLAGS,
            rest: [0; 240],
        };
        // SAFETY: reads a loop_config, which this is in length and layout, and keeps nothing of it.
        match unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) } {
            0 => return Ok((number, device)),
            _ if last_errno() == Errno::BUSY => {}
            _ => return Err(last_errno()),
        }
    }
}

fn request(
    control: RawFd,
    step: libc::Ioctl,
    name: &str,
    flags: u32,
    target: Option<(u64, &str)>,
) -> Result<u64, Errno> {
    let mut request = DmRequest {
        version: [4, 0, 0],
        data_size: u32::try_from(size_of::<DmRequest>()).map_err(|_| Errno::RANGE)?,
        data_start: DM_IOCTL_BYTES,
        target_count: u32::from(target.is_some()),
        open_count: 0,
        flags,
        event_nr: 0,
        padding: 0,
        dev: 0,
        name: text(name)?,
        uuid: [0; 129],
        data: [0; 7],
        sector_start: 0,
        length: 0,
        status: 0,
        next: 0,
        target_type: text("verity")?,
        parameters: [0; 1024],
    };
    if let Some((sectors, parameters)) = target {
        request.length = sectors;
        request.parameters = text(parameters)?;
    }
    // SAFETY: reads and writes `data_size` bytes at the pointer, which are all of the live request; every bit pattern is
    // a value of its integers.
    match unsafe { libc::ioctl(control, step, &raw mut request) } {
        0 => Ok(request.dev),
        _ => Err(last_errno()),
    }
}

/// A text with a zero byte behind it.
fn text<const LENGTH: usize>(text: &str) -> Result<[u8; LENGTH], Errno> {
    let mut bytes = [0; LENGTH];
    let room = bytes.get_mut(..text.len()).filter(|_| text.len() < LENGTH).ok_or(Errno::NAMETOOLONG)?;
    room.copy_from_slice(text.as_bytes());
    Ok(bytes)
}

/// Makes the read-only device `name` of one verity target, and gives its minor number.
///
/// # Errors
/// Those of the ioctls; nothing of the device is left then.
pub fn make_verity(control: &File, name: &str, sectors: u64, parameters: &str) -> Result<u32, Errno> {
    let control_fd = control.as_raw_fd();
    let dev = request(control_fd, DM_DEV_CREATE, name, DM_READ_ONLY, None)?;
    let made = request(control_fd, DM_TABLE_LOAD, name, DM_READ_ONLY, Some((sectors, parameters)))
        // Without the flag that suspends, it resumes.
        .and_then(|_| request(control_fd, DM_DEV_SUSPEND, name, DM_READ_ONLY, None));
    match made {
        // linux/kdev_t.h, new_encode_dev: the minor number is in bits 0-7 and 20-31.
        Ok(_) => u32::try_from((dev & 0xff) | ((dev >> 12) & 0xf_ff00)).map_err(|_| Errno::RANGE),
        Err(errno) => {
            remove(control, name);
            Err(errno)
        }
    }
}

/// Takes a device away, if nobody uses it.
pub fn remove(control: &File, name: &str) {
    let _ = request(control.as_raw_fd(), DM_DEV_REMOVE, name, 0, None);
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn structures_are_laid_out_as_the_kernels() {
        assert_eq!(offset_of!(DmRequest, sector_start), 312);
        assert_eq!(offset_of!(DmRequest, parameters) - 312, 40);
        assert_eq!((size_of::<LoopConfig>(), offset_of!(LoopConfig, flags)), (304, 60));
        assert_eq!(text::<4>("abcd"), Err(Errno::NAMETOOLONG));
    }
}
