//! The toolbox: a shell, strace and the usual small programs on a disk of their own, so that a machine can be entered
//! whose root has none of them.
//!
//! busybox is one static program. strace is not static, so its libraries and their loader come along, and a script calls
//! the loader by its place in the toolbox: what the root's own libraries are does not matter. Nothing of it runs here.

use std::io;
use std::path::{Path, PathBuf};

use kiln_artifact::tree::{Kind, Meta, Node, PathError, Timestamp, Tree, TreePath};
use kiln_digest::Digest;

use super::debian::{Archive, ArchiveError, DebianSpec, SpecError};
use super::directory::{self, DirectoryError};
use super::image::{self, Filesystem, Image, ImageError};
use crate::fetch::lock::LockedRoot;
use crate::store::{Store, StoreError};

/// Where a machine that has the toolbox shows it.
pub const PLACE: &str = "/toolbox";
/// Where its programs are.
pub const PROGRAMS: &str = "/toolbox/bin";
/// Its shell.
pub const SHELL: &str = "/toolbox/bin/sh";

/// Changes with what is made of the same packages.
const FORMAT: u32 = 1;
const PACKAGES: [&str; 2] = ["busybox-static", "strace"];
/// Debian's folder of libraries, in packages before and after `/usr` was merged.
const LIBRARIES: [&[u8]; 2] = [b"usr/lib/x86_64-linux-gnu", b"lib/x86_64-linux-gnu"];
const LOADER: &str = "ld-linux-x86-64.so.2";

/// What busybox is called by: of what Debian's static one can do, that which helps to look into a machine.
const APPLETS: &[&str] = &[
    "[",
    "ar",
    "awk",
    "basename",
    "bc",
    "blockdev",
    "bunzip2",
    "bzip2",
    "cat",
    "chgrp",
    "chmod",
    "chown",
    "chroot",
    "clear",
    "cmp",
    "cp",
    "cpio",
    "cut",
    "date",
    "dd",
    "df",
    "diff",
    "dirname",
    "dmesg",
    "du",
    "echo",
    "ed",
    "egrep",
    "env",
    "expr",
    "false",
    "fgrep",
    "find",
    "fold",
    "free",
    "getopt",
    "grep",
    "groups",
    "gunzip",
    "gzip",
    "head",
    "hexdump",
    "hostname",
    "id",
    "ifconfig",
    "insmod",
    "ip",
    "kill",
    "killall",
    "less",
    "link",
    "ln",
    "ls",
    "lsmod",
    "lzma",
    "md5sum",
    "mkdir",
    "mkfifo",
    "mknod",
    "mktemp",
    "modinfo",
    "modprobe",
    "more",
    "mount",
    "mv",
    "nc",
    "nl",
    "nproc",
    "od",
    "paste",
    "patch",
    "pidof",
    "ping",
    "printf",
    "ps",
    "pwd",
    "readlink",
    "realpath",
    "reset",
    "rev",
    "rm",
    "rmdir",
    "sed",
    "seq",
    "setsid",
    "sh",
    "sha256sum",
    "sha512sum",
    "sleep",
    "sort",
    "stat",
    "strings",
    "stty",
    "switch_root",
    "sync",
    "tac",
    "tail",
    "tar",
    "tee",
    "test",
    "time",
    "timeout",
    "top",
    "touch",
    "tr",
    "true",
    "truncate",
    "tty",
    "umount",
    "uname",
    "unexpand",
    "uniq",
    "unlink",
    "unlzma",
    "unxz",
    "unzip",
    "uptime",
    "vi",
    "wc",
    "wget",
    "which",
    "whoami",
    "xargs",
    "xxd",
    "xz",
    "yes",
    "zcat",
];

/// Why there is no toolbox.
#[derive(Debug, thiserror::Error)]
pub enum ToolboxError {
    /// Its packages cannot be had.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// A suite that is none.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The packages do not hold what they should.
    #[error("the toolbox's packages have no `{0}`")]
    Missing(&'static str),
    /// The directory that was named cannot be read.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// A path in it cannot be.
    #[error("the toolbox cannot be laid out")]
    Path(#[from] PathError),
    /// Its image cannot be made.
    #[error("the toolbox's image cannot be made")]
    Image(#[from] ImageError),
    /// The store cannot keep it.
    #[error("the store cannot keep the toolbox")]
    Io(#[from] io::Error),
    /// The store fails.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl ToolboxError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Archive(error) => error.hint(),
            Self::Missing(_) => Some("KILN_TOOLBOX names a directory to be the toolbox".to_owned()),
            _ => None,
        }
    }
}

/// What is asked of the archive for a toolbox of `suite`.
///
/// # Errors
/// [`ToolboxError::Spec`].
pub fn spec(suite: &str) -> Result<DebianSpec, ToolboxError> {
    let mut spec = DebianSpec::essential(suite)?;
    for package in PACKAGES {
        spec.add(package)?;
    }
    Ok(spec)
}

/// The image of the toolbox of `locked`: remembered, or made now.
///
/// # Errors
/// [`ToolboxError`].
pub fn of_packages(
    store: &Store,
    archive: &Archive,
    locked: &LockedRoot,
    progress: &mut dyn FnMut(&str),
) -> Result<PathBuf, ToolboxError> {
    let key = key(locked);
    if let Some(tree) = store.records("toolbox").get::<Digest>(&key)
        && Image::open(store, &tree, Filesystem::Erofs)?.is_some()
    {
        return Ok(image::path(store, &tree));
    }
    progress("fetching the toolbox");
    archive.fetch(locked, &|_| {})?;
    let tree = lay_out(store, &archive.unpack_programs(locked)?, locked.source_date_epoch())?;
    let tree = image::make(store, &tree)?;
    store.sync()?;
    store.records("toolbox").put(&key, &tree)?;
    Ok(image::path(store, &tree))
}

/// The image of a directory that a user wants to be the toolbox.
///
/// # Errors
/// [`ToolboxError`].
pub fn of_directory(store: &Store, path: &Path) -> Result<PathBuf, ToolboxError> {
    let tree = image::make(store, &directory::import(store, path)?)?;
    Ok(image::path(store, &tree))
}

fn key(locked: &LockedRoot) -> Digest {
    let mut text = format!("toolbox {FORMAT} {}\n{}{APPLETS:?}\n", locked.source_date_epoch(), strace());
    for package in &locked.packages {
        text.push_str(&format!("{}\n", package.sha256));
    }
    Digest::of(text.as_bytes())
}

/// The strace of the toolbox: the loader is told where its libraries are.
fn strace() -> String {
    let loader = format!("{PLACE}/lib/{LOADER} --library-path {PLACE}/lib");
    format!("#!{SHELL}\nexec {loader} {PLACE}/libexec/strace \"$@\"\n")
}

/// Picks what the toolbox holds out of what its packages would unpack.
fn lay_out(store: &Store, packages: &[Tree], epoch: i64) -> Result<Tree, ToolboxError> {
    let mtime = Timestamp { seconds: epoch, nanoseconds: 0 };
    let meta = || Meta { mode: 0o755, mtime, ..Meta::default() };
    let node = |kind| Node { kind, meta: meta() };
    let mut tree = Tree::new();
    tree.insert(TreePath::root(), node(Kind::Directory));
    for folder in ["bin", "lib", "libexec"] {
        tree.insert(TreePath::new(folder.as_bytes())?, node(Kind::Directory));
    }
    for (place, name, found) in [
        ("bin/busybox", "busybox", [&b"usr/bin/busybox"[..], b"bin/busybox"]),
        ("libexec/strace", "strace", [b"usr/bin/strace", b"bin/strace"]),
    ] {
        let kind = packages.iter().find_map(|package| {
            let file = found.iter().find_map(|path| package.get(&TreePath::new(path).ok()?))?;
            matches!(file.kind, Kind::File { .. }).then(|| file.kind.clone())
        });
        tree.insert(TreePath::new(place.as_bytes())?, node(kind.ok_or(ToolboxError::Missing(name))?));
    }
    for (path, file) in packages.iter().flat_map(Tree::iter) {
        let folder = path.parent().unwrap_or_else(TreePath::root);
        let is_library = path.name().windows(3).any(|part| part == b".so");
        if !is_library || !LIBRARIES.contains(&folder.as_bytes()) {
            continue;
        }
        // Links among libraries are to names beside them.
        let stays = matches!(&file.kind, Kind::Symlink(text) if !text.contains(&b'/'));
        if stays || matches!(file.kind, Kind::File { .. }) {
            let place = [b"lib/", path.name()].concat();
            tree.insert(TreePath::new(&place)?, node(file.kind.clone()));
        }
    }
    if tree.get(&TreePath::new(format!("lib/{LOADER}").as_bytes())?).is_none() {
        return Err(ToolboxError::Missing(LOADER));
    }
    let (digest, size) = store.blobs().put(strace().as_bytes())?;
    tree.insert(TreePath::new(b"bin/strace")?, node(Kind::File { digest, size }));
    for applet in APPLETS {
        let path = TreePath::new(format!("bin/{applet}").as_bytes())?;
        tree.insert(path, node(Kind::Symlink((*b"busybox").into())));
    }
    Ok(tree)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(store: &Store, files: &[(&str, Option<&str>)]) -> Tree {
        let mut tree = Tree::new();
        for (path, link) in files {
            let kind = match link {
                Some(text) => Kind::Symlink(text.as_bytes().into()),
                None => {
                    let (digest, size) = store.blobs().put(path.as_bytes()).expect("room");
                    Kind::File { digest, size }
                }
            };
            let path = TreePath::new(path.as_bytes()).expect("a path");
            tree.insert(path, Node { kind, meta: Meta::default() });
        }
        tree
    }

    fn has(tree: &Tree, path: &str) -> bool {
        tree.get(&TreePath::new(path.as_bytes()).expect("a path")).is_some()
    }

    #[test]
    fn programs_and_libraries_are_picked_out_of_their_packages() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path()).expect("a store");
        let libraries = package(
            &store,
            &[
                ("usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", None),
                ("usr/lib/x86_64-linux-gnu/libc.so.6", None),
                ("usr/lib/x86_64-linux-gnu/libx.so.1", Some("libx.so.1.2")),
                ("usr/lib/x86_64-linux-gnu/liby.so.1", Some("/etc/alternatives/liby")),
                ("usr/lib/x86_64-linux-gnu/gconv/UTF-16.so", None),
                ("usr/share/doc/libc6/copyright", None),
            ],
        );
        let programs = package(&store, &[("usr/bin/busybox", None), ("usr/bin/strace", None)]);
        let tree = lay_out(&store, &[libraries.clone(), programs.clone()], 7).expect("all is there");
        tree.check().expect("a tree");
        for path in ["bin/busybox", "bin/sh", "bin/vi", "bin/strace", "libexec/strace", "lib/libx.so.1"] {
            assert!(has(&tree, path), "{path}");
        }
        for path in ["lib/liby.so.1", "lib/UTF-16.so", "lib/copyright"] {
            assert!(!has(&tree, path), "{path}");
        }
        assert!(tree.iter().all(|(_, node)| node.meta.mtime.seconds == 7));

        assert!(matches!(lay_out(&store, &[programs], 7), Err(ToolboxError::Missing(LOADER))));
        assert!(matches!(lay_out(&store, &[libraries], 7), Err(ToolboxError::Missing("busybox"))));
    }

    #[test]
    fn programs_are_named_once_and_none_stands_in_for_strace() {
        let names: std::collections::BTreeSet<&str> = APPLETS.iter().copied().collect();
        assert_eq!(names.len(), APPLETS.len());
        assert!(!names.contains("strace") && !names.contains("busybox"));
    }
}
