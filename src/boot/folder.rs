//! A disk with a FAT file system that holds a folder, made when it is booted.
//!
//! Written by mkfs.vfat and mcopy; what they need to be told is decided here.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Why a folder cannot be put on a disk.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// Something cannot be read or written.
    #[error("cannot {what} {}", .path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To which.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// FAT has no such names.
    #[error("FAT cannot hold the name of {}: {why}", .path.display())]
    Name {
        /// Which.
        path: PathBuf,
        /// Why not.
        why: &'static str,
    },
    /// Two names are one to FAT.
    #[error("{} and {} are one name to FAT", .0.display(), .1.display())]
    Twice(PathBuf, PathBuf),
    /// It is neither a file nor a folder.
    #[error("{} is neither a file nor a folder, and FAT has nothing else", .0.display())]
    Kind(PathBuf),
    /// FAT has no files of that size.
    #[error("{} is larger than 4 GiB, and FAT has no such files", .0.display())]
    TooLarge(PathBuf),
    /// A tool is missing.
    #[error("`{0}` was not found")]
    NoTool(&'static str),
    /// A tool failed.
    #[error("{tool} failed: {said}")]
    Tool {
        /// Which.
        tool: &'static str,
        /// What it said.
        said: String,
    },
}

impl FolderError {
    /// What the user can do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NoTool(_) => Some("install dosfstools and mtools".to_owned()),
            _ => None,
        }
    }
}

/// The largest file that FAT has (Microsoft's FAT specification, §6).
const LARGEST_FILE_BYTES: u64 = u32::MAX as u64;
/// A file takes whole clusters, and a folder at least one; that many bytes each are allowed for.
const CLUSTER_BYTES: u64 = 4096;
/// FAT32 needs at least 65,525 clusters; with clusters of a sector, that is what firmware reads from the smallest disk.
const SMALLEST_DISK_BYTES: u64 = 64 << 20;
/// The time of everything on the disk, and its serial number, are fixed.
const SERIAL: &str = "4b494c4e";

/// Makes the disk in `scratch`, in a file without a name.
///
/// # Errors
/// FAT cannot hold what is in the folder, or it cannot be written.
pub fn disk_of_folder(folder: &Path, scratch: &Path) -> Result<OwnedFd, FolderError> {
    let mut needed = CLUSTER_BYTES;
    measure(folder, &mut needed)?;
    let entries = children(folder)?;
    disk(needed, scratch, |image| {
        if entries.is_empty() {
            return Ok(());
        }
        let mut copy = mcopy(image);
        copy.args(&entries).arg("::");
        run("mcopy", copy)
    })
}

/// Makes a disk that holds one program where firmware looks for it (UEFI 2.10 §3.5.1.1).
///
/// # Errors
/// As [`disk_of_folder`].
pub fn disk_of_program(program: &Path, scratch: &Path) -> Result<OwnedFd, FolderError> {
    let size = fs::metadata(program).map_err(io_error("read", program))?.len();
    disk(size + 8 * CLUSTER_BYTES, scratch, |image| {
        let mut folders = Command::new("mmd");
        folders.arg("-i").arg(image).args(["::EFI", "::EFI/BOOT"]);
        run("mmd", folders)?;
        let mut copy = mcopy(image);
        copy.arg(program).arg("::EFI/BOOT/BOOTX64.EFI");
        run("mcopy", copy)
    })
}

fn disk(
    needed: u64,
    scratch: &Path,
    fill: impl FnOnce(&Path) -> Result<(), FolderError>,
) -> Result<OwnedFd, FolderError> {
    let file = tempfile::NamedTempFile::new_in(scratch).map_err(io_error("write in", scratch))?;
    // The tables take 4 bytes a cluster, twice.
    let size = (needed + needed / 64 + (1 << 20)).max(SMALLEST_DISK_BYTES).next_multiple_of(1 << 20);
    file.as_file().set_len(size).map_err(io_error("write", file.path()))?;
    let mut format = Command::new("mkfs.vfat");
    let sectors = if size < 512 << 20 { "1" } else { "8" };
    format.args(["-F", "32", "-s", sectors, "-i", SERIAL, "-n", "KILN"]).arg(file.path());
    run("mkfs.vfat", format)?;
    fill(file.path())?;
    // Opened anew: the tools may have replaced the file.
    let image = File::open(file.path()).map_err(io_error("read", file.path()))?;
    Ok(image.into())
}

fn mcopy(image: &Path) -> Command {
    let mut command = Command::new("mcopy");
    command.args(["-s", "-Q", "-o", "-i"]).arg(image);
    command
}

/// Runs a tool with the system's folders for programs behind the caller's, where mkfs is not in everybody's path.
fn run(tool: &'static str, mut command: Command) -> Result<(), FolderError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => FolderError::NoTool(tool),
        _ => FolderError::Io { what: "start", path: tool.into(), source },
    };
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/bin").env("MTOOLS_SKIP_CHECK", "1");
    let output = command.stdin(Stdio::null()).output().map_err(failed)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
    Err(FolderError::Tool { tool, said })
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FolderError + use<> {
    let path = path.to_owned();
    move |source| FolderError::Io { what, path, source }
}

fn children(folder: &Path) -> Result<Vec<PathBuf>, FolderError> {
    let entries = fs::read_dir(folder).map_err(io_error("read", folder))?;
    let paths: Result<Vec<PathBuf>, io::Error> = entries.map(|entry| Ok(entry?.path())).collect();
    let mut paths = paths.map_err(io_error("read", folder))?;
    paths.sort();
    Ok(paths)
}

/// Whether FAT can hold all beneath `folder`.
///
/// # Errors
/// What it cannot hold.
pub fn check(folder: &Path) -> Result<(), FolderError> {
    measure(folder, &mut 0)
}

/// The same; adds up what it needs.
fn measure(folder: &Path, needed: &mut u64) -> Result<(), FolderError> {
    let mut seen: BTreeMap<String, PathBuf> = BTreeMap::new();
    for path in children(folder)? {
        let name = path.file_name().unwrap_or_default();
        if let Some(why) = unfit(name) {
            return Err(FolderError::Name { path, why });
        }
        if let Some(other) = seen.insert(name.to_string_lossy().to_uppercase(), path.clone()) {
            return Err(FolderError::Twice(other, path));
        }
        let meta = fs::symlink_metadata(&path).map_err(io_error("read", &path))?;
        // Entries of long names: at most 21 of 32 bytes.
        *needed += CLUSTER_BYTES + 672;
        if meta.is_dir() {
            measure(&path, needed)?;
        } else if !meta.is_file() {
            return Err(FolderError::Kind(path));
        } else if meta.len() > LARGEST_FILE_BYTES {
            return Err(FolderError::TooLarge(path));
        } else {
            *needed += meta.len();
        }
    }
    Ok(())
}

/// Why FAT cannot hold `name` (Microsoft's FAT specification, §7).
fn unfit(name: &OsStr) -> Option<&'static str> {
    let Some(name) = name.to_str() else { return Some("it is not UTF-8") };
    if name.chars().any(|c| c.is_control() || "\"*/:<>?\\|".contains(c)) {
        Some("it has one of \" * / : < > ? \\ | or a control character")
    } else if name.ends_with(['.', ' ']) {
        Some("it ends in a dot or a space")
    } else if name.encode_utf16().count() > 255 {
        Some("it is longer than 255 characters")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fat_cannot_hold_is_named() {
        for name in ["a:b", "a?", "end.", "end ", "tab\t", &"x".repeat(256)] {
            assert!(unfit(OsStr::new(name)).is_some(), "{name}");
        }
        for name in ["BOOTX64.EFI", "über", "a+b,c;d=[e]", ".hidden", &"x".repeat(255)] {
            assert_eq!(unfit(OsStr::new(name)), None, "{name}");
        }
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("Name"), "x").expect("room");
        check(folder.path()).expect("FAT holds it");
        std::os::unix::fs::symlink("Name", folder.path().join("link")).expect("a link");
        assert!(matches!(check(folder.path()), Err(FolderError::Kind(_))));
        fs::remove_file(folder.path().join("link")).expect("it was made");
        fs::write(folder.path().join("NAME"), "x").expect("room");
        assert!(matches!(check(folder.path()), Err(FolderError::Twice(..))));
    }
}
