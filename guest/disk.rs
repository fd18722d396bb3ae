//! Finds a virtio-blk disk by the serial that the host gave it.

use std::collections::BTreeMap;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::failure::Failure;

/// A hot-plugged disk's device node appears within milliseconds; one that is not there by now was not attached.
const PATIENCE: Duration = Duration::from_secs(5);

/// Disks that are there and stay, the names of their devices by their serials.
#[derive(Debug, Clone, Default)]
pub struct Disks(BTreeMap<String, String>);

impl Disks {
    /// Those that are there now.
    pub fn look() -> Self {
        Self::among(Path::new("/sys/block"))
    }

    fn among(devices: &Path) -> Self {
        let entries = std::fs::read_dir(devices).into_iter().flatten().filter_map(Result::ok);
        let disks = entries.filter_map(|entry| {
            let name = entry.file_name().into_string().ok().filter(|name| name.starts_with("vd"))?;
            // The device tells 20 bytes without a terminator (virtio 1.3 §5.2.6); the kernel adds no newline.
            let serial = std::fs::read_to_string(entry.path().join("serial")).ok()?;
            Some((serial, name))
        });
        Self(disks.collect())
    }

    /// The path of the device node of the disk with this serial. One that was not there is waited for a little.
    ///
    /// # Errors
    /// ENODEV: no disk has that serial.
    pub fn find(&self, serial: &str) -> Result<String, Failure> {
        let node = |disks: &Self| disks.0.get(serial).map(|name| format!("/dev/{name}"));
        let give_up = Instant::now() + PATIENCE;
        let mut found = node(self);
        loop {
            if let Some(path) = found {
                return Ok(path);
            }
            if Instant::now() >= give_up {
                return Err(Failure::new(format!("finding the disk with serial {serial:?}"), Errno::NODEV));
            }
            found = node(&Self::look());
            if found.is_none() {
                sleep(Duration::from_millis(5));
            }
        }
    }
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
        let disks = Disks::among(devices.path());
        assert_eq!(disks.find("root2").expect("a disk"), "/dev/vdb");
        assert_eq!(disks.0.get("roo"), None);
        assert_eq!(disks.0.get("scratch"), None, "only virtio disks count");
    }
}
