//! File systems in which the kernel shows itself: proc, sysfs and their like.
//!
//! What lies in them are no files to be shared. Their sizes are not those of what reading gives, so a guest would
//! see them empty; they change without their times saying so, so no record of them could be held against
//! anything; and some act when they are read. A share that has one below it shows an empty folder there.

use std::collections::BTreeMap;
use std::os::fd::AsFd;

use rustix::io::Result;

/// Magic numbers (linux/magic.h, and the file systems themselves) and names.
const KERNELS: [(u32, &str); 20] = [
    (0x0000_9fa0, "proc"),
    (0x6265_6572, "sysfs"),
    (0x6462_6720, "debugfs"),
    (0x7472_6163, "tracefs"),
    (0x7363_6673, "securityfs"),
    (0xf97c_ff8c, "selinuxfs"),
    (0x4341_5d53, "smackfs"),
    (0x5a3c_69f0, "apparmorfs"),
    (0x0027_e0eb, "cgroup"),
    (0x6367_7270, "cgroup2"),
    (0x0765_5821, "resctrl"),
    (0xcafe_4a11, "bpf"),
    (0x6165_676c, "pstore"),
    (0xde5e_81e4, "efivarfs"),
    (0x6265_6570, "configfs"),
    (0x4249_4e4d, "binfmt_misc"),
    (0x6e73_6673, "nsfs"),
    (0x6573_5543, "fusectl"),
    (0x6759_6969, "rpc_pipefs"),
    (0x1980_0202, "mqueue"),
];

/// The name of the kernel's file system that `file` is on; none where it is on one that holds files.
///
/// # Errors
/// What fstatfs(2) says.
pub fn kernel_filesystem(file: impl AsFd) -> Result<Option<&'static str>> {
    let magic = rustix::fs::fstatfs(file)?.f_type;
    let known = KERNELS.iter().find(|(known, _)| i64::from(*known) == magic);
    Ok(known.map(|(_, name)| *name))
}

/// Devices, and whether they are file systems of the kernel's own: a question is asked once for each.
#[derive(Debug, Default)]
pub(super) struct Kernels(BTreeMap<u64, bool>);

impl Kernels {
    /// Whether `device` is one, as `file` on it tells where it is not known yet.
    ///
    /// # Errors
    /// Those of `file`, and what fstatfs(2) says.
    pub fn has<F: AsFd>(&mut self, device: u64, file: impl FnOnce() -> Result<F>) -> Result<bool> {
        if let Some(known) = self.0.get(&device) {
            return Ok(*known);
        }
        let is_the_kernels = kernel_filesystem(file()?)?.is_some();
        self.0.insert(device, is_the_kernels);
        Ok(is_the_kernels)
    }

    /// Whether `device` was found to be one.
    pub fn knows(&self, device: u64) -> bool {
        self.0.get(&device) == Some(&true)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn the_kernels_own_are_told_from_those_that_hold_files() {
        let name = |path: &str| kernel_filesystem(File::open(path).expect(path)).expect("fstatfs");
        assert_eq!((name("/proc"), name("/proc/self/status")), (Some("proc"), Some("proc")));
        assert_eq!(name("/sys"), Some("sysfs"));
        assert_eq!(kernel_filesystem(tempfile::tempfile().expect("a file")).expect("fstatfs"), None);
    }
}
