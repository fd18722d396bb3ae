//! Walks a tree: folders before what is in them, siblings in the order of their names' bytes. Everything is relative to
//! descriptors and no link is followed. Depth costs memory, never stack, and few descriptors.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::vec::IntoIter;

use kiln_wire::MAX_PATH_BYTES;
use rustix::fs::{AtFlags, Dir, Mode, OFlags, ResolveFlags, Statx, StatxFlags, openat2, statx};
use rustix::io::Errno;

use crate::failure::{Doing, Failure};

/// How many of the folders on the way down stay open. Deeper ones are opened again when the walk returns to them, so a
/// tree of any depth needs no more descriptors than this.
const OPEN_FOLDERS: usize = 64;

/// A walk under way.
pub struct Walk<'a> {
    top: BorrowedFd<'a>,
    frames: Vec<Frame>,
    /// The path of the last node; its start is that of the folder above it.
    path: Vec<u8>,
    next: Next,
}

/// What the walk does next.
enum Next {
    Top,
    Enter,
    Sibling,
}

/// A folder that the walk is in.
struct Frame {
    /// `None`: closed to save descriptors.
    folder: Option<OwnedFd>,
    path_length: usize,
    names: IntoIter<CString>,
}

/// Something the walk came by.
pub struct Node<'a> {
    /// From the top, no leading slash; empty for the top itself.
    pub path: &'a [u8],
    /// How many components the path has.
    pub depth: usize,
    /// Type, mode, owner, size, times, device, links.
    pub stat: Statx,
    /// The folder it is in (the top itself for the top).
    pub folder: BorrowedFd<'a>,
    /// Its name in the folder (`.` for the top).
    pub name: &'a CStr,
}

impl Node<'_> {
    /// A path by which calls without a folder argument reach the node itself (the last component is not resolved).
    pub fn proc_path(&self) -> Vec<u8> {
        let folder = format!("/proc/self/fd/{}/", self.folder.as_raw_fd());
        [folder.as_bytes(), self.name.to_bytes()].concat()
    }
}

impl<'a> Walk<'a> {
    /// A walk of the tree whose top folder is `top`.
    pub fn new(top: &'a impl AsFd) -> Self {
        Self { top: top.as_fd(), frames: Vec::new(), path: Vec::new(), next: Next::Top }
    }

    /// Goes to the next node and shows it; `None` at the end. What vanishes meanwhile is left out.
    ///
    /// # Errors
    /// A folder cannot be read, or a path is longer than a message can hold. The walk is over then.
    pub fn visit<T>(&mut self, show: impl FnOnce(Node<'_>) -> T) -> Result<Option<T>, Failure> {
        match self.next {
            Next::Top => {
                let stat = stat(self.top, c".").doing(|| "reading the layer's top")?;
                self.next = Next::Enter;
                return Ok(Some(show(Node { path: b"", depth: 0, stat, folder: self.top, name: c"." })));
            }
            Next::Enter => self.enter()?,
            Next::Sibling => {}
        }
        self.next = Next::Sibling;
        loop {
            let depth = self.frames.len();
            let Some(frame) = self.frames.last_mut() else {
                return Ok(None);
            };
            self.path.truncate(frame.path_length);
            let Some(name) = frame.names.next() else {
                self.frames.pop();
                continue;
            };
            let folder = match frame.folder.take() {
                Some(folder) => folder,
                None => open_folder(self.top, &self.path)?,
            };
            let folder: &OwnedFd = frame.folder.insert(folder);
            let folder = folder.as_fd();
            let stat = match stat(folder, &name) {
                Err(Errno::NOENT) => continue,
                result => result.doing(|| format!("reading {}", joined(&self.path, &name).escape_ascii()))?,
            };
            self.path = joined(&self.path, &name);
            if self.path.len() > MAX_PATH_BYTES {
                return Err(Failure::new(
                    format!("listing {}…", self.path[..200].escape_ascii()),
                    Errno::NAMETOOLONG,
                ));
            }
            if is_folder(&stat) {
                self.next = Next::Enter;
            }
            return Ok(Some(show(Node { path: &self.path, depth, stat, folder, name: &name })));
        }
    }

    fn enter(&mut self) -> Result<(), Failure> {
        let what = || format!("reading the folder /{}", self.path.escape_ascii());
        let folder = open_folder(self.top, &self.path)?;
        let mut names = Vec::new();
        for entry in Dir::read_from(&folder).doing(what)? {
            let entry = entry.doing(what)?;
            let name = entry.file_name();
            if name != c"." && name != c".." {
                names.push(name.to_owned());
            }
        }
        names.sort_unstable();
        if let Some(index) = self.frames.len().checked_sub(1).filter(|&index| index >= OPEN_FOLDERS) {
            self.frames[index].folder = None;
        }
        self.frames.push(Frame {
            folder: Some(folder),
            path_length: self.path.len(),
            names: names.into_iter(),
        });
        Ok(())
    }
}

fn joined(folder: &[u8], name: &CStr) -> Vec<u8> {
    let separator: &[u8] = if folder.is_empty() { b"" } else { b"/" };
    [folder, separator, name.to_bytes()].concat()
}

fn stat(folder: BorrowedFd<'_>, name: &CStr) -> Result<Statx, Errno> {
    statx(folder, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT, StatxFlags::BASIC_STATS)
}

fn is_folder(stat: &Statx) -> bool {
    rustix::fs::FileType::from_raw_mode(stat.stx_mode.into()).is_dir()
}

fn open_folder(top: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd, Failure> {
    open_beneath(top, path, OFlags::DIRECTORY)
        .doing(|| format!("opening the folder /{}", path.escape_ascii()))
}

/// Opens for reading what is at `path` (empty: the top itself) beneath `top`, through no link of any kind.
///
/// # Errors
/// Those of openat2(2).
pub fn open_beneath(top: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    let path = if path.is_empty() { b"." } else { path };
    // NONBLOCK: a FIFO that takes a file's place must not hold the agent.
    let flags = flags | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    openat2(top, path, flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use rustix::fs::{mkdirat, openat};

    use super::*;

    fn paths(top: &File) -> Vec<String> {
        let mut walk = Walk::new(top);
        let mut paths = Vec::new();
        while let Some(path) =
            walk.visit(|node| String::from_utf8_lossy(node.path).into_owned()).expect("readable")
        {
            paths.push(path);
        }
        paths
    }

    #[test]
    fn folders_come_before_contents_and_siblings_by_bytes() {
        let folder = tempfile::tempdir().expect("a folder");
        for path in ["b/x", "a/z", "a.b", "B"] {
            std::fs::create_dir_all(folder.path().join(path)).expect("folders");
        }
        std::os::unix::fs::symlink("/", folder.path().join("a/link")).expect("a link");
        let top = File::open(folder.path()).expect("a folder");
        assert_eq!(paths(&top), ["", "B", "a", "a/link", "a/z", "a.b", "b", "b/x"]);
    }

    #[test]
    fn two_thousand_levels_need_little_stack_and_few_descriptors() {
        let folder = tempfile::tempdir().expect("a folder");
        let top = File::open(folder.path()).expect("a folder");
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut deepest: OwnedFd = top.try_clone().expect("a descriptor").into();
        for _ in 0..2040 {
            for name in ["d", "e"] {
                mkdirat(&deepest, name, Mode::RWXU).expect("a folder");
            }
            deepest = openat(&deepest, "d", flags, Mode::empty()).expect("a folder");
        }
        let before = std::fs::read_dir("/proc/self/fd").expect("proc").count();
        let mut walk = Walk::new(&top);
        let (mut nodes, mut most) = (0, 0);
        while walk.visit(|_| ()).expect("readable").is_some() {
            nodes += 1;
            most = most.max(walk.frames.iter().filter(|frame| frame.folder.is_some()).count());
        }
        assert_eq!(nodes, 1 + 2 * 2040);
        assert!(most <= OPEN_FOLDERS + 2, "{most} folders open, {before} before");
        for name in ["d", "d"] {
            // The path would be longer than a message holds: an error, not a hang or a panic.
            deepest = {
                mkdirat(&deepest, name, Mode::RWXU).expect("a folder");
                openat(&deepest, name, flags, Mode::empty()).expect("a folder")
            };
        }
        for _ in 0..10 {
            mkdirat(&deepest, "d", Mode::RWXU).expect("a folder");
            deepest = openat(&deepest, "d", flags, Mode::empty()).expect("a folder");
        }
        let mut walk = Walk::new(&top);
        let failure = loop {
            if let Err(failure) = walk.visit(|_| ()) {
                break failure;
            }
        };
        assert_eq!(failure.errno, Errno::NAMETOOLONG);
    }
}
