//! Mounts as values: a file system or a part of one is opened, given its attributes while nobody sees it, and only then
//! attached (fsopen(2), open_tree(2), move_mount(2)). Targets are descriptors, so nothing is resolved twice.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use kiln_wire::{FILESYSTEMS_FOLDER, NOT_LISTED, SHARES_TAG};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_reconfigure, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, fspick, move_mount,
    open_tree,
};

use crate::failure::{Doing, Failure};
use crate::{modules, sys};

/// Mounts are read-only, and devices on them are dead, for whatever comes from outside the machine.
pub const READ_ONLY_SHARE: u64 = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NODEV;
/// For sysfs: nothing in it is to be executed either.
pub const READ_ONLY_KERNEL: u64 = READ_ONLY_SHARE | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;

/// A new file system of type `kind`. An option with an empty value is a flag.
///
/// # Errors
/// The kernel has no such type, refuses an option, or does not find the file system on its source.
pub fn filesystem(
    kind: &str,
    options: &[(&str, &str)],
    attributes: MountAttrFlags,
) -> Result<OwnedFd, Failure> {
    let what = || match options.iter().find(|(name, _)| *name == "source") {
        Some((_, source)) => format!("mounting {source} as {kind}"),
        None => format!("mounting {kind}"),
    };
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)
        .map_err(|errno| Failure::new(format!("{}{}", what(), kernel_state(kind)), errno))?;
    let configure = || -> Result<OwnedFd, Errno> {
        for (name, value) in options {
            if value.is_empty() {
                fsconfig_set_flag(&context, *name)?;
            } else {
                fsconfig_set_string(&context, *name, *value)?;
            }
        }
        fsconfig_create(&context)?;
        fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
    };
    configure().map_err(|errno| Failure::new(format!("{}{}", what(), kernel_words(&context)), errno))
}

/// Gives the tmpfs that `mount` is of another limit, in bytes; 0 is none. One that has none cannot be given any.
///
/// # Errors
/// More is in it, or the kernel refuses.
pub fn limit(mount: &OwnedFd, bytes: u64) -> Result<(), Failure> {
    let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH;
    let set = || {
        let context = fspick(mount, "", flags)?;
        fsconfig_set_string(&context, "size", bytes.to_string())?;
        fsconfig_reconfigure(&context)
    };
    set().doing(|| format!("limiting a tmpfs to {bytes} bytes"))
}

/// What the kernel says of a file system that it does not open: whether it lists it, and the state of its module.
fn kernel_state(kind: &str) -> String {
    let line_of = |path: &str, has: &dyn Fn(&str) -> bool| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines().find(|line| has(line)).map(str::to_owned)
    };
    let listed = line_of("/proc/filesystems", &|line| line.split_whitespace().last() == Some(kind)).is_some();
    let module = line_of("/proc/modules", &|line| line.split(' ').next() == Some(kind));
    let listed = if listed { "listed among the kernel's" } else { NOT_LISTED };
    format!(": {listed}, its module {}", module.as_deref().unwrap_or("not loaded"))
}

/// What the kernel has to say about a failed mount: messages wait in the context, one a read.
fn kernel_words(context: &OwnedFd) -> String {
    let mut words = String::new();
    let mut buffer = [0; 256];
    while let Ok(length) = rustix::io::read(context, &mut buffer) {
        let message = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default());
        words.push_str(": ");
        // "e " marks an error, "w " a warning, "i " information.
        words.push_str(message.trim_end().get(2..).unwrap_or_default());
        if words.len() > 1024 {
            break;
        }
    }
    words
}

/// Where the device of shares is mounted.
const SHARES: &str = "/run/kiln/shares";

/// The device whose top directory holds every share by name, mounted at a place of the agent's own.
///
/// # Errors
/// Those of [`filesystem`]: there is no such device.
pub fn shares() -> Result<OwnedFd, Failure> {
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV;
    let device = filesystem("virtiofs", &[("source", SHARES_TAG), ("ro", "")], attributes)?;
    attach_at(&device, SHARES)?;
    read_far_ahead(&device);
    Ok(device)
}

/// Lets the kernel ask a file system for as much at once as the device answers: a question costs an emulated machine as much
/// time as some hundred kilobytes. Of 128, 256, 512 and 1,024 KiB each reads a large file faster than the one before it, and
/// 2,048 and 4,096 no faster; what is read here and there, or in small files, takes the same time with all of them.
fn read_far_ahead(mount: &OwnedFd) {
    if let Ok(stat) = rustix::fs::fstat(mount) {
        let (major, minor) = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
        // Without it everything works as well.
        let _ = std::fs::write(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb"), "1024");
    }
}

/// The file system on a block device. Its modules are loaded first, where the initramfs has some.
///
/// # Errors
/// Those of [`filesystem`].
pub fn disk(device: &str, kind: &str, read_only: bool) -> Result<OwnedFd, Failure> {
    let complaints = modules::load_folder(&Path::new("/").join(FILESYSTEMS_FOLDER).join(kind));
    let mounted = if read_only {
        filesystem(kind, &[("source", device), ("ro", "")], MountAttrFlags::MOUNT_ATTR_RDONLY)
    } else {
        filesystem(kind, &[("source", device)], MountAttrFlags::empty())
    };
    // What could not be loaded explains why the kernel does not know the file system, and nothing else.
    match (mounted, complaints.into_iter().next()) {
        (Err(Failure { errno: Errno::NODEV, .. }), Some(complaint)) => Err(complaint),
        (mounted, _) => mounted,
    }
}

/// An overlay of `upper` over `lower`, paths without `:` or `,`. Features that leave traces in a layer which only
/// overlayfs understands are off: what a layer holds must be readable as it is.
///
/// # Errors
/// Those of [`filesystem`].
pub fn overlay(lower: &str, upper: &str, work: &str) -> Result<OwnedFd, Failure> {
    let mount = || filesystem("overlay", &overlay_options(lower, upper, work), MountAttrFlags::empty());
    match mount() {
        // Seen in one of some thousand emulated machines, all of whose modules had been loaded without an error.
        Err(Failure { errno: Errno::NODEV, .. }) => {
            let complaints = modules::load_folder(Path::new(modules::AT_START));
            mount().map_err(|failure| {
                let said: String = complaints.iter().map(|complaint| format!("; {complaint}")).collect();
                Failure::new(failure.what + &said, failure.errno)
            })
        }
        mounted => mounted,
    }
}

fn overlay_options<'a>(lower: &'a str, upper: &'a str, work: &'a str) -> [(&'a str, &'a str); 8] {
    [
        ("source", "layer"),
        ("lowerdir", lower),
        ("upperdir", upper),
        ("workdir", work),
        ("redirect_dir", "off"),
        ("metacopy", "off"),
        ("index", "off"),
        ("xino", "off"),
    ]
}

/// Another mount of what is at `path` beneath `folder`, without the mounts in it; `attributes` are `MOUNT_ATTR_…`.
///
/// # Errors
/// Nothing is there, or the kernel refuses.
pub fn bind(folder: impl AsFd, path: &str, attributes: u64) -> Result<OwnedFd, Failure> {
    let what = || format!("binding {path}");
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
    let mount = open_tree(folder, path, flags).doing(what)?;
    if attributes != 0 {
        sys::set_mount_attributes(&mount, attributes).doing(what)?;
    }
    Ok(mount)
}

/// Attaches a mount on what `target` refers to.
///
/// # Errors
/// The kernel refuses, as it does when one is a folder and the other is not.
pub fn attach(mount: &OwnedFd, target: impl AsFd) -> Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount, "", target, "", flags)
}

/// Attaches a mount on a new folder of the agent's own at `path`.
///
/// # Errors
/// The folder cannot be made, or the kernel refuses.
pub fn attach_at(mount: &OwnedFd, path: &str) -> Result<(), Failure> {
    let what = || format!("attaching {path}");
    std::fs::create_dir_all(path).doing(what)?;
    let target =
        openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).doing(what)?;
    attach(mount, &target).doing(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overlay_has_every_surprise_switched_off() {
        let options = overlay_options("/l", "/u", "/w");
        for surprise in ["redirect_dir", "metacopy", "index", "xino"] {
            assert!(options.contains(&(surprise, "off")));
        }
        assert_eq!(options[1..4], [("lowerdir", "/l"), ("upperdir", "/u"), ("workdir", "/w")]);
    }
}
