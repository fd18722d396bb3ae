//! Finds and makes places inside the step's root. Paths are resolved by the kernel as a process inside that root would
//! see them (openat2(2) `RESOLVE_IN_ROOT`), so `/lib -> usr/lib` and `/lib -> /usr/lib` both stay inside.
//!
//! What is made here must not look like the step's doing: a new folder takes the times of the one it is in, which keeps
//! its own.

use std::os::fd::OwnedFd;

use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, ResolveFlags, Timespec, Timestamps, fchmod, fstat, futimens, mkdirat, openat,
    openat2, utimensat,
};
use rustix::io::Errno;

use crate::failure::{Doing, Failure};

/// The step's root, for resolving paths in it.
pub struct StepRoot {
    top: OwnedFd,
}

impl StepRoot {
    /// Opens the root whose top is at `path`.
    ///
    /// # Errors
    /// There is no folder.
    pub fn open(path: &str) -> Result<Self, Failure> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let top = openat(CWD, path, flags, Mode::empty()).doing(|| format!("opening {path}"))?;
        Ok(Self { top })
    }

    /// The folder at `path`, made with mode 0755 where missing, as are those above it.
    ///
    /// # Errors
    /// Something on the way is not a folder, or cannot be made.
    pub fn folder(&self, path: &[u8]) -> Result<OwnedFd, Failure> {
        self.folder_with_mode(path, 0o755)
    }

    /// As `folder`, with another mode for the last one if it is missing.
    ///
    /// # Errors
    /// Those of `folder`.
    pub fn folder_with_mode(&self, path: &[u8], mode: u32) -> Result<OwnedFd, Failure> {
        let what = || format!("making the folder {} in the root", path.escape_ascii());
        if let Some(folder) = self.open_folder(path).doing(what)? {
            return Ok(folder);
        }
        let mut above = self.open_folder(b"/").doing(what)?.ok_or(Errno::NOENT).doing(what)?;
        for end in component_ends(path) {
            let here = path.get(..end).unwrap_or(path);
            above = match self.open_folder(here).doing(what)? {
                Some(folder) => folder,
                None => {
                    let mode = if end == path.len() { mode } else { 0o755 };
                    make_folder(&above, last_name(here), mode).doing(what)?
                }
            };
        }
        Ok(above)
    }

    /// An empty file at `path`, made where missing, for a device to be mounted on.
    ///
    /// # Errors
    /// The path has no name, or the file cannot be made.
    pub fn file(&self, path: &[u8]) -> Result<OwnedFd, Failure> {
        let what = || format!("making the file {} in the root", path.escape_ascii());
        let end = component_ends(path).last().ok_or(Errno::ISDIR).doing(what)?;
        let path = path.get(..end).unwrap_or(path);
        let name = last_name(path);
        let folder = self.folder(path.get(..end - name.len()).unwrap_or(b"/"))?;
        let times = times_of(&folder).doing(what)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = openat(&folder, name, flags, Mode::from_raw_mode(0o600)).doing(what)?;
        futimens(&folder, &times).doing(what)?;
        Ok(file)
    }

    fn open_folder(&self, path: &[u8]) -> Result<Option<OwnedFd>, Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        match openat2(&self.top, path, flags, Mode::empty(), resolve) {
            Ok(folder) => Ok(Some(folder)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn make_folder(above: &OwnedFd, name: &[u8], mode: u32) -> Result<OwnedFd, Errno> {
    let times = times_of(above)?;
    // EEXIST here is a dangling symbolic link: not ours to replace.
    mkdirat(above, name, Mode::from_raw_mode(mode))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = openat(above, name, flags, Mode::empty())?;
    // mkdir's mode is subject to the umask.
    fchmod(&folder, Mode::from_raw_mode(mode))?;
    utimensat(above, name, &times, AtFlags::SYMLINK_NOFOLLOW)?;
    futimens(above, &times)?;
    Ok(folder)
}

fn times_of(folder: &OwnedFd) -> Result<Timestamps, Errno> {
    let stat = fstat(folder)?;
    let nanoseconds = |value| i64::try_from(value).map_err(|_| Errno::RANGE);
    Ok(Timestamps {
        last_access: Timespec { tv_sec: stat.st_atime, tv_nsec: nanoseconds(stat.st_atime_nsec)? },
        last_modification: Timespec { tv_sec: stat.st_mtime, tv_nsec: nanoseconds(stat.st_mtime_nsec)? },
    })
}

/// Where each component of a path ends; slashes in a row count once.
fn component_ends(path: &[u8]) -> impl Iterator<Item = usize> {
    (1..=path.len()).filter(|&end| {
        path.get(end - 1).is_some_and(|&byte| byte != b'/') && path.get(end).is_none_or(|&byte| byte == b'/')
    })
}

/// The last component of a path that ends in one.
fn last_name(path: &[u8]) -> &[u8] {
    path.rsplit(|&byte| byte == b'/').next().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    fn root() -> (tempfile::TempDir, StepRoot) {
        let folder = tempfile::tempdir().expect("a folder");
        let root = StepRoot::open(folder.path().to_str().expect("a path")).expect("a root");
        (folder, root)
    }

    #[test]
    fn components_end_where_names_do() {
        let ends = |path: &[u8]| component_ends(path).collect::<Vec<_>>();
        assert_eq!(ends(b"/usr//lib/"), [4, 9]);
        assert_eq!(ends(b"a"), [1]);
        assert!(ends(b"//").is_empty() && ends(b"").is_empty());
    }

    #[test]
    fn missing_folders_are_made_through_links_that_stay_inside() {
        let (folder, root) = root();
        std::fs::create_dir_all(folder.path().join("usr/lib")).expect("folders");
        symlink("/usr/lib", folder.path().join("lib")).expect("a link");
        root.folder(b"/lib/modules/6.12/").expect("made");
        assert!(folder.path().join("usr/lib/modules/6.12").is_dir());
        root.folder(b"/../../ws").expect("made");
        assert!(folder.path().join("ws").is_dir());
        root.folder_with_mode(b"/var/tmp", 0o1777).expect("made");
        let mode =
            |path: &str| folder.path().join(path).metadata().expect("made").permissions().mode() & 0o7777;
        assert_eq!((mode("var"), mode("var/tmp")), (0o755, 0o1777));
    }

    #[test]
    fn making_a_folder_leaves_no_times_behind() {
        let (folder, root) = root();
        let then = Timespec { tv_sec: 1000, tv_nsec: 5 };
        let times = Timestamps { last_access: then, last_modification: then };
        utimensat(CWD, folder.path(), &times, AtFlags::empty()).expect("times");
        root.folder(b"/x/y").expect("made");
        root.file(b"/disk").expect("made");
        for path in ["", "x", "x/y"] {
            let stat = folder.path().join(path).metadata().expect("there");
            assert_eq!((stat.mtime(), stat.mtime_nsec()), (1000, 5), "{path:?}");
        }
    }

    #[test]
    fn what_is_in_the_way_is_an_error() {
        let (folder, root) = root();
        std::fs::write(folder.path().join("file"), "").expect("a file");
        symlink("nowhere", folder.path().join("dangling")).expect("a link");
        assert_eq!(root.folder(b"/file/x").expect_err("a file").errno, Errno::NOTDIR);
        assert_eq!(root.folder(b"/dangling").expect_err("a link").errno, Errno::EXIST);
        assert_eq!(root.file(b"/").expect_err("no name").errno, Errno::ISDIR);
    }
}
