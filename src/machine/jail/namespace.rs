//! Namespaces: a root with nothing in it but what is named, no network, and no other process that has a number.
//!
//! Where kiln runs as root they are left as root, which then gives up its capabilities; another user gets them through
//! a user namespace that maps nobody but that user. Descriptors that the process holds keep working: a share's
//! directory belongs to the host's mounts and stays readable beneath.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_change,
    mount_remount, move_mount, open_tree, unmount,
};
use rustix::thread::UnshareFlags;

use super::{Reach, ReachKind, sys};

/// Where the new root is put together: it must exist on every host, and is seen there by nobody else.
const SITE: &str = "/tmp";

/// Leaves the host's namespaces, with all of its files; its network stays where `network` says so.
///
/// # Errors
/// What the host does not grant.
pub(super) fn leave(network: bool) -> io::Result<()> {
    let mut others = UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    others.set(UnshareFlags::NEWNET, !network);
    let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
    if user.is_root() {
        sys::unshare(others).map_err(in_words("unshare namespaces as root"))?;
    } else {
        sys::unshare(others | UnshareFlags::NEWUSER).map_err(in_words("make a user namespace"))?;
        let (user, group) = (user.as_raw(), group.as_raw());
        let write = |name: &str, text: String| {
            fs::write(format!("/proc/self/{name}"), text)
                .map_err(in_words("map a user into a user namespace"))
        };
        write("setgroups", "deny".to_owned())?;
        write("uid_map", format!("{user} {user} 1"))?;
        write("gid_map", format!("{group} {group} 1"))?;
    }
    Ok(())
}

/// Goes on in another process, the first of its namespace, whose number `tell` is given.
///
/// # Errors
/// What the host does not grant, or has not got: [`is_shortage`] tells.
pub(super) fn be_first(tell: impl FnOnce(i32) -> io::Result<()>) -> io::Result<()> {
    sys::go_on_as_first(tell)
}

/// Whether `error` says that there is no room for another process now.
pub(super) fn is_shortage(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::AGAIN | Errno::NOMEM))
}

/// Enters a root that holds `reach`, where the host's namespaces were left.
///
/// # Errors
/// What the host does not grant; the process then has the host's files.
pub(super) fn enter(reach: &[Reach]) -> io::Result<()> {
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(doing("keep mounts"))?;
    // Taken before the site covers anything.
    let mut parts = Vec::new();
    for reach in reach {
        parts.push((reach.at.clone(), part(reach)?));
    }
    mount("none", SITE, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, Some(c"size=64k,mode=0755"))
        .map_err(doing("mount an empty root"))?;
    for (at, part) in parts {
        place(&Path::new(SITE).join(at.strip_prefix("/").unwrap_or(&at)), part)?;
    }
    rustix::process::chdir(SITE).map_err(doing("enter the new root"))?;
    seal_root()?;
    rustix::process::pivot_root(".", ".").map_err(doing("pivot into the new root"))?;
    // The old root now lies over the new one.
    unmount(".", UnmountFlags::DETACH).map_err(doing("leave the old root"))?;
    rustix::process::chdir("/").map_err(doing("enter the new root"))?;
    Ok(())
}

/// Lets nothing be added to the new root, which is the current directory.
fn seal_root() -> io::Result<()> {
    let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
    mount_remount(".", flags, c"").map_err(doing("make the new root read-only"))
}

/// A piece of the new root.
enum Part {
    Mount {
        tree: OwnedFd,
        directory: bool,
    },
    /// A link, such as /lib where it is part of /usr.
    Link(PathBuf),
}

fn part(reach: &Reach) -> io::Result<Part> {
    let meta = fs::symlink_metadata(&reach.from)?;
    if meta.is_symlink() && reach.kind == ReachKind::Files {
        return Ok(Part::Link(fs::read_link(&reach.from)?));
    }
    // Of a descriptor the link itself is taken: a file without a name has no mount that could be.
    let tree = clone_of(&reach.from, meta.is_dir(), reach.kind != ReachKind::Descriptor)?;
    let writable = matches!(reach.kind, ReachKind::Device | ReachKind::Writable);
    sys::seal_mount(&tree, writable).map_err(in_words("seal a mount"))?;
    Ok(Part::Mount { tree, directory: meta.is_dir() })
}

fn clone_of(path: &Path, recursive: bool, follow: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_SYMLINK_NOFOLLOW, !follow);
    // A user namespace may not uncover what lies beneath a mount.
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    open_tree(CWD, path, flags).map_err(doing("clone a mount"))
}

fn place(target: &Path, part: Part) -> io::Result<()> {
    let parent = target.parent().unwrap_or(target);
    fs::create_dir_all(parent).map_err(in_words("lay out the new root"))?;
    match part {
        Part::Link(to) => std::os::unix::fs::symlink(to, target).map_err(in_words("lay out the new root")),
        Part::Mount { tree, directory } => {
            if directory {
                fs::create_dir_all(target).map_err(in_words("lay out the new root"))?;
            } else {
                let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
                rustix::fs::open(target, flags, Mode::from_raw_mode(0o444))
                    .map_err(doing("lay out the new root"))?;
            }
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            move_mount(tree.as_fd(), "", CWD, target, flags).map_err(doing("place a mount"))
        }
    }
}

fn in_words(what: &'static str) -> impl Fn(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("cannot {what}: {error}"))
}

fn doing(what: &'static str) -> impl Fn(rustix::io::Errno) -> io::Error {
    move |errno| in_words(what)(errno.into())
}
