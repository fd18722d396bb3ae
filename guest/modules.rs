//! Kernel modules: those in the initramfs, and those a step asks for with what they depend on.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::system::finit_module;

use crate::failure::{Doing, Failure};

/// `MODULE_INIT_COMPRESSED_FILE` of linux/module.h: the kernel unpacks the file itself.
const COMPRESSED: libc::c_int = 4;

/// Where the initramfs keeps the modules that are loaded at start.
pub const AT_START: &str = "/modules";

/// Loads all modules of a folder, in the order of their names. What fails is returned, not fatal: which of them a
/// machine needs shows when it needs it.
pub fn load_folder(folder: &Path) -> Vec<Failure> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut paths: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    let load = |path: &Path| {
        let what = || format!("loading module {}", path.display());
        let file = File::open(path).doing(what)?;
        insert(&file.into(), &path.to_string_lossy()).doing(what)
    };
    paths.iter().filter_map(|path| load(path).err()).collect()
}

/// Loads the drivers of the virtio devices that the machine has, of those in `drivers`, a folder each by a device's number as sysfs
/// has it in `devices`. What fails is returned, not fatal.
pub fn load_drivers(drivers: &Path, devices: &Path) -> Vec<Failure> {
    let numbers = std::fs::read_dir(devices).into_iter().flatten().flatten();
    // As `0x0004`; nothing else names a folder.
    let number = |path: &Path| std::fs::read_to_string(path.join("device")).ok();
    let numbers: BTreeSet<String> = numbers.filter_map(|device| number(&device.path())).collect();
    numbers.iter().flat_map(|number| load_folder(&drivers.join(number.trim_end()))).collect()
}

fn insert(file: &OwnedFd, name: &str) -> Result<(), Errno> {
    let flags = if name.ends_with(".ko") { 0 } else { COMPRESSED };
    match finit_module(file, c"", flags) {
        Err(Errno::EXIST) => Ok(()),
        result => result,
    }
}

/// A tree as `/lib/modules/RELEASE` is one.
pub struct ModuleTree {
    top: OwnedFd,
    dependencies: String,
    builtin: String,
}

impl ModuleTree {
    /// Reads the indexes of the tree at `top`.
    ///
    /// # Errors
    /// There is no `modules.dep`.
    pub fn open(top: OwnedFd) -> Result<Self, Failure> {
        let read = |name: &str| -> Result<String, Failure> {
            let what = || format!("reading {name} of the module tree");
            let file = openat(&top, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).doing(what)?;
            let mut text = String::new();
            File::from(file).read_to_string(&mut text).doing(what)?;
            Ok(text)
        };
        let dependencies = read("modules.dep")?;
        // An absent list of built-in modules only makes the error for one of them less clear.
        let builtin = read("modules.builtin").unwrap_or_default();
        Ok(Self { top, dependencies, builtin })
    }

    /// Loads a module and, before it, what it depends on.
    ///
    /// # Errors
    /// The tree has no such module, or the kernel refuses one of the files.
    pub fn load(&self, name: &str) -> Result<(), Failure> {
        let Some(files) = load_order(&self.dependencies, name) else {
            let built_in = self.builtin.lines().any(|path| is_module(path, name));
            return if built_in {
                Ok(())
            } else {
                Err(Failure::new(format!("loading module {name}"), Errno::NOENT))
            };
        };
        for path in files {
            let what = || format!("loading module {name}: {path}");
            let file =
                openat(&self.top, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).doing(what)?;
            insert(&file, path).doing(what)?;
        }
        Ok(())
    }
}

/// The files to load for `name`, in order, from the text of a `modules.dep`. Its lines name a file and all that it
/// depends on, directly or not, the deepest last (modules.dep(5)).
fn load_order<'a>(dependencies: &'a str, name: &str) -> Option<Vec<&'a str>> {
    dependencies.lines().find_map(|line| {
        let (file, needed) = line.split_once(':')?;
        let files = || needed.split_ascii_whitespace().rev().chain([file]).collect();
        is_module(file, name).then(files)
    })
}

/// Whether the file at `path` is the module `name`; `-` and `_` are the same in names of modules.
fn is_module(path: &str, name: &str) -> bool {
    let file = path.rsplit('/').next().unwrap_or(path);
    let Some((stem, "" | ".xz" | ".zst" | ".gz")) = file.split_once(".ko") else {
        return false;
    };
    let dashed = |text: &str| text.replace('_', "-");
    dashed(stem) == dashed(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEPENDENCIES: &str = "kernel/fs/fat/fat.ko.xz:\n\
        kernel/fs/fat/vfat.ko.xz: kernel/fs/fat/fat.ko.xz\n\
        kernel/net/vmw_vsock/vmw_vsock_virtio_transport.ko: kernel/c.ko kernel/b.ko kernel/a.ko\n";

    #[test]
    fn the_deepest_dependency_is_loaded_first() {
        assert_eq!(load_order(DEPENDENCIES, "fat"), Some(vec!["kernel/fs/fat/fat.ko.xz"]));
        assert_eq!(
            load_order(DEPENDENCIES, "vmw-vsock_virtio-transport"),
            Some(vec![
                "kernel/a.ko",
                "kernel/b.ko",
                "kernel/c.ko",
                "kernel/net/vmw_vsock/vmw_vsock_virtio_transport.ko"
            ])
        );
        assert_eq!(load_order(DEPENDENCIES, "at"), None);
        assert_eq!(load_order(DEPENDENCIES, "c"), None);
    }

    #[test]
    fn only_module_files_are_modules() {
        assert!(is_module("kernel/drivers/md/dm-verity.ko.xz", "dm_verity"));
        assert!(is_module("dm-verity.ko", "dm-verity"));
        assert!(!is_module("dm-verity.ko.txt", "dm-verity"));
        assert!(!is_module("dm-verity", "dm-verity"));
    }

    #[test]
    fn a_folder_that_is_not_there_has_no_modules() {
        assert!(load_folder(Path::new("/nonexistent")).is_empty());
    }

    #[test]
    fn drivers_are_those_of_devices_that_are_there() {
        let folder = tempfile::tempdir().expect("a folder");
        let (drivers, devices) = (folder.path().join("drivers"), folder.path().join("devices"));
        for (device, number) in [("virtio0", "0x0004\n"), ("virtio1", "0x001a\n"), ("virtio2", "0x0004\n")] {
            std::fs::create_dir_all(devices.join(device)).expect("a folder");
            std::fs::write(devices.join(device).join("device"), number).expect("a file");
        }
        for number in ["0x0004", "0x0005"] {
            std::fs::create_dir_all(drivers.join(number)).expect("a folder");
            std::fs::write(drivers.join(number).join("000-driver.ko"), "no module").expect("a file");
        }
        let complaints: Vec<_> =
            load_drivers(&drivers, &devices).into_iter().map(|failure| failure.to_string()).collect();
        assert!(matches!(&complaints[..], [one] if one.contains("0x0004/000-driver.ko")), "{complaints:?}");
        assert!(load_drivers(&drivers, Path::new("/nonexistent")).is_empty());
    }
}
