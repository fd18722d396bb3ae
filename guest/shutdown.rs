//! The end of a machine: every process ended, every disk that steps wrote to left clean, power off.

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount_remount, unmount};
use rustix::system::{RebootCommand, reboot};

use crate::failure::{Doing, Failure};
use crate::setup::ROOT;
use crate::sys;

/// Ends all processes but this one, and makes the disks mounted at `direct` clean. Returns what went wrong.
pub fn end_all(direct: &[String]) -> Vec<Failure> {
    // ESRCH: there was none.
    let _ = sys::kill_everyone(9);
    while matches!(sys::wait(None, true), Ok(_) | Err(Errno::INTR)) {}
    let mut failures = Vec::new();
    if !direct.is_empty() {
        failures.extend(unmount(ROOT, UnmountFlags::DETACH).doing(|| "detaching the step's root").err());
    }
    for path in direct {
        // Whoever still holds the file system, this writes it out and marks it clean.
        let clean = mount_remount(path, MountFlags::RDONLY, c"").doing(|| format!("making {path} read-only"));
        let gone = unmount(path, UnmountFlags::empty()).doing(|| format!("unmounting {path}"));
        failures.extend(clean.err().into_iter().chain(gone.err()));
    }
    rustix::fs::sync();
    failures
}

/// Switches the machine off. Should the kernel refuse, there is nobody left to tell: PID 1 waits for the host to end
/// the machine.
pub fn power_off() -> ! {
    let _ = reboot(RebootCommand::PowerOff);
    loop {
        std::thread::park();
    }
}
