//! Finds a virtio-blk disk by the serial that the host gave it.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::failure::Failure;

/// A hot-plugged disk's device node appears within milliseconds; one that is not there by now was not attached.
const PATIENCE: Duration = Duration::from_secs(5);

/// The path of the device node of the disk with this serial, waiting for it a little.
///
/// # Errors
/// ENODEV: no disk has that serial.
pub fn find(serial: &str) -> Result<String, Failure> {
    let give_up = Instant::now() + PATIENCE;
    loop {
        if let Some(name) = with_serial(Path::new("/sys/block"), serial) {
            return Ok(format!("/dev/{name}"));
        }
        if Instant::now() >= give_up {
            return Err(Failure::new(format!("finding the disk with serial {serial:?}"), Errno::NODEV));
        }
        sleep(Duration::from_millis(5));
    }
}

fn with_serial(devices: &Path, serial: &str) -> Option<String> {
    std::fs::read_dir(devices).ok()?.filter_map(Result::ok).find_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        // The device tells 20 bytes without a terminator (virtio 1.3 §5.2.6); the kernel adds no newline.
        let matches =
            name.starts_with("vd") && std::fs::read_to_string(entry.path().join("serial")).ok()? == serial;
        matches.then_some(name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_found_by_its_whole_serial() {
        let devices = tempfile::tempdir().expect("a folder");
        for (name, serial) in [("vda", "root"), ("vdb", "root2"), ("sda", "scratch")] {
            std::fs::create_dir(devices.path().join(name)).expect("a device");
            std::fs::write(devices.path().join(name).join("serial"), serial).expect("a serial");
        }
        std::fs::create_dir(devices.path().join("vdc")).expect("a device without a serial");
        assert_eq!(with_serial(devices.path(), "root2"), Some("vdb".into()));
        assert_eq!(with_serial(devices.path(), "roo"), None);
        assert_eq!(with_serial(devices.path(), "scratch"), None, "only virtio disks count");
    }
}
