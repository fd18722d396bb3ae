//! What PID 1 does before it can hear the host: the kernel's file systems, modules, its own limits.

use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::Path;

use kiln_wire::DRIVERS_FOLDER;
use rustix::fs::Mode;
use rustix::mm::{MlockAllFlags, mlockall};
use rustix::mount::MountAttrFlags;
use rustix::process::{Resource, Rlimit, setrlimit, umask};

use crate::failure::{Doing, Failure};
use crate::{modules, mounts, sys};

/// The virtio devices that the kernel has found.
const VIRTIO_DEVICES: &str = "/sys/bus/virtio/devices";

/// What a machine has before it hears of a step.
pub struct Booted {
    /// The device of shares, mounted. None where there is no such device; a share that is asked for then fails with
    /// the reason.
    pub shares: Option<OwnedFd>,
    /// What went wrong and is not fatal.
    pub complaints: Vec<Failure>,
}

/// Makes the machine usable.
///
/// # Errors
/// A file system without which nothing works could not be mounted.
pub fn prepare() -> Result<Booted, Failure> {
    umask(Mode::from_raw_mode(0o022));
    let quiet = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NOEXEC
        | MountAttrFlags::MOUNT_ATTR_NODEV;
    let device_flags = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let run = mounts::filesystem("tmpfs", &[("source", "run"), ("mode", "0755")], quiet)?;
    for (mount, path) in [
        (mounts::filesystem("devtmpfs", &[("source", "dev"), ("mode", "0755")], device_flags)?, "/dev"),
        (mounts::filesystem("proc", &[("source", "proc")], quiet)?, "/proc"),
        (mounts::filesystem("sysfs", &[("source", "sys")], quiet)?, "/sys"),
        (run, "/run"),
    ] {
        mounts::attach_at(&mount, path)?;
    }
    link_devices()?;
    // The machine is useless without its agent; whatever a step starts is the better victim.
    std::fs::write("/proc/self/oom_score_adj", "-1000").doing(|| "setting oom_score_adj")?;
    sys::run_first().doing(|| "raising the agent's priority")?;
    // Nor is it to wait for the swap disk; only what it uses counts.
    let all = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    mlockall(all).doing(|| "locking the agent's memory")?;
    // What programs expect of a Linux system today; the kernel's own hard limit of 4096 is too low for some linkers.
    let files = Rlimit { current: Some(1024), maximum: Some(524_288) };
    setrlimit(Resource::Nofile, files).doing(|| "setting the limit of open files")?;
    sys::loopback_up().doing(|| "bringing up the loopback interface")?;
    let complaints = modules::load_folder(Path::new(modules::AT_START));
    // Now, so that a frozen machine has it.
    Ok(Booted { shares: mounts::shares().ok(), complaints })
}

/// What programs expect in /dev beside devices, which every step sees.
fn link_devices() -> Result<(), Failure> {
    let links = [
        ("fd", "/proc/self/fd"),
        ("stdin", "fd/0"),
        ("stdout", "fd/1"),
        ("stderr", "fd/2"),
        ("core", "/proc/kcore"),
    ];
    links.into_iter().try_for_each(|(name, text)| {
        symlink(text, Path::new("/dev").join(name)).doing(|| format!("linking /dev/{name}"))
    })
}

/// Loads the drivers that nobody waits for, of the devices that are there. Returns what went wrong.
pub fn load_drivers() -> Vec<Failure> {
    modules::load_drivers(&Path::new("/").join(DRIVERS_FOLDER), Path::new(VIRTIO_DEVICES))
}
