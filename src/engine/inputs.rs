//! What of the host a step is given: directories and files, opened and checked before anything starts.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use kiln_virtio::fs::kernel_filesystem;

use crate::apart::{self, Kept, Overlap};

/// Why an input cannot be given to a step.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    /// It is not there or cannot be opened.
    #[error("{what} `{path}` cannot be opened")]
    Open {
        /// SRCDIR, a mount, a disk.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// It is something else than a directory.
    #[error("{what} `{path}` is not a directory")]
    NotADirectory {
        /// SRCDIR, a mount.
        what: &'static str,
        /// Its path.
        path: PathBuf,
    },
    /// A disk that is neither a file nor a block device.
    #[error("disk `{0}` is neither a regular file nor a block device")]
    NotADisk(PathBuf),
    /// The guest would see signing keys, or see or write kiln's own store.
    #[error(transparent)]
    Overlap(#[from] Overlap),
    /// `HOST:GUEST` or `FILE:GUEST[:ro]` malformed.
    #[error("`{text}` is not {wanted}")]
    Malformed {
        /// The text.
        text: String,
        /// The form.
        wanted: &'static str,
    },
    /// It shows the kernel itself, and holds no files.
    #[error(
        "{what} `{path}` is on {filesystem}, a file system of the kernel's own, and can be neither shared nor filled"
    )]
    Kernel {
        /// SRCDIR, a mount.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// The file system.
        filesystem: &'static str,
    },
    /// Two things for one place in the guest.
    #[error("two trees or disks are to be at `{0}`")]
    SamePlace(String),
    /// A disk whose file system is not known.
    #[error("disk `{0}` holds no file system that kiln knows, and so cannot be mounted")]
    UnknownFilesystem(PathBuf),
    /// WORK cannot be written.
    #[error("WORK `{path}` cannot be written")]
    Work {
        /// WORK.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
}

impl InputError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Overlap(overlap) => Some(overlap.hint()),
            Self::Kernel { .. } => Some(
                "copy what the step needs of it into a folder, and share that; a machine has its own as well",
            ),
            Self::Open { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                Some("kiln opens it as the user who runs it")
            }
            Self::UnknownFilesystem(_) => {
                Some("attach it as a block device: give it a place below /dev, as in FILE:/dev/NAME")
            }
            Self::Work { .. } => Some("say --work DIR with a directory of yours, or set WORK"),
            _ => None,
        }
    }
}

/// `HOST:GUEST`: a host directory shown read-only at a path of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountArgument {
    /// The directory.
    pub host: PathBuf,
    /// Absolute path in the guest.
    pub guest: String,
}

/// `FILE:GUEST[:ro]`: a file as a disk, mounted at GUEST, or shown as a block device where GUEST is below `/dev`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskArgument {
    /// The file.
    pub file: PathBuf,
    /// Absolute path in the guest.
    pub guest: String,
    /// Whether the guest may only read it.
    pub read_only: bool,
}

fn is_guest_path(path: &str) -> bool {
    path.starts_with('/')
        && path.len() > 1
        && !path.split('/').any(|part| part == "..")
        && !path.contains('\0')
}

impl FromStr for MountArgument {
    type Err = InputError;

    fn from_str(text: &str) -> Result<Self, InputError> {
        match text.rsplit_once(':') {
            Some((host, guest)) if !host.is_empty() && is_guest_path(guest) => {
                Ok(Self { host: host.into(), guest: guest.to_owned() })
            }
            _ => Err(InputError::Malformed {
                text: text.to_owned(),
                wanted: "HOST:GUEST with an absolute GUEST",
            }),
        }
    }
}

impl FromStr for DiskArgument {
    type Err = InputError;

    fn from_str(text: &str) -> Result<Self, InputError> {
        let (rest, read_only) = text.strip_suffix(":ro").map_or((text, false), |rest| (rest, true));
        match rest.rsplit_once(':') {
            Some((file, guest)) if !file.is_empty() && is_guest_path(guest) => {
                Ok(Self { file: file.into(), guest: guest.to_owned(), read_only })
            }
            _ => {
                let wanted = "FILE:GUEST or FILE:GUEST:ro with an absolute GUEST";
                Err(InputError::Malformed { text: text.to_owned(), wanted })
            }
        }
    }
}

/// Opens the directory `path` to be shared, after checking that it shows no `secrets`.
///
/// # Errors
/// [`InputError`].
pub(super) fn open_share(what: &'static str, path: &Path, secrets: &Path) -> Result<OwnedFd, InputError> {
    let open = |source| InputError::Open { what, path: path.to_owned(), source };
    let real = fs::canonicalize(path).map_err(open)?;
    if !real.is_dir() {
        return Err(InputError::NotADirectory { what, path: path.to_owned() });
    }
    apart::refuse(what, &real, Kept::Secrets, secrets)?;
    let file = File::open(&real).map_err(open)?;
    match kernel_filesystem(&file).map_err(|errno| open(errno.into()))? {
        Some(filesystem) => Err(InputError::Kernel { what, path: path.to_owned(), filesystem }),
        None => Ok(file.into()),
    }
}

/// Opens the file of a disk, and finds what is on it where it will be mounted: its file system's name.
///
/// # Errors
/// [`InputError`].
pub(super) fn open_disk(disk: &DiskArgument, secrets: &Path) -> Result<(OwnedFd, String), InputError> {
    apart::refuse("disk", &disk.file, Kept::Secrets, secrets)?;
    let open = |source| InputError::Open { what: "disk", path: disk.file.clone(), source };
    // A FIFO in its place is not waited for.
    let mut options = File::options();
    options.read(true).write(!disk.read_only).custom_flags(libc::O_NONBLOCK);
    let mut file = options.open(&disk.file).map_err(open)?;
    let kind = file.metadata().map_err(open)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(InputError::NotADisk(disk.file.clone()));
    }
    if disk.guest.starts_with("/dev/") {
        return Ok((file.into(), String::new()));
    }
    let name = filesystem(&mut file).map_err(open)?;
    match name {
        Some(name) => Ok((file.into(), name.to_owned())),
        None => Err(InputError::UnknownFilesystem(disk.file.clone())),
    }
}

/// The file system on `file` by its magic numbers (linux/magic.h and each format's superblock).
fn filesystem(file: &mut File) -> io::Result<Option<&'static str>> {
    const KNOWN: [(u64, &[u8], &str); 5] = [
        (1024, &[0xe2, 0xe1, 0xf5, 0xe0], "erofs"),
        (0, b"hsqs", "squashfs"),
        (0x438, &[0x53, 0xef], "ext4"),
        (82, b"FAT32", "vfat"),
        (54, b"FAT", "vfat"),
    ];
    for (offset, magic, name) in KNOWN {
        let mut bytes = vec![0; magic.len()];
        file.seek(SeekFrom::Start(offset))?;
        match file.read_exact(&mut bytes) {
            Ok(()) if bytes == magic => return Ok(Some(name)),
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// Whether outputs could be merged into `work`, found out before the step runs.
///
/// # Errors
/// [`InputError::Work`].
pub(super) fn check_work(work: &Path) -> Result<(), InputError> {
    let fail = |source| InputError::Work { path: work.to_owned(), source };
    let existing = work.ancestors().find(|folder| fs::symlink_metadata(folder).is_ok());
    let Some(existing) = existing else { return Err(fail(io::ErrorKind::NotFound.into())) };
    if !existing.is_dir() {
        return Err(fail(io::ErrorKind::NotADirectory.into()));
    }
    let file = File::open(existing).map_err(fail)?;
    if let Some(filesystem) = kernel_filesystem(&file).map_err(|errno| fail(errno.into()))? {
        return Err(InputError::Kernel { what: "WORK", path: work.to_owned(), filesystem });
    }
    let access = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
    rustix::fs::access(existing, access).map_err(|errno| fail(errno.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_and_disks_are_read_as_people_write_them() {
        let mount: MountArgument = "/a:b:/c".parse().expect("a mount");
        assert_eq!((mount.host.to_str(), mount.guest.as_str()), (Some("/a:b"), "/c"));
        let disk: DiskArgument = "x.img:/mnt:ro".parse().expect("a disk");
        assert!(disk.read_only && disk.guest == "/mnt");
        for bad in ["/a", "/a:b", ":/c", "/a:/../c", "/a:/"] {
            assert!(bad.parse::<MountArgument>().is_err(), "{bad}");
            assert!(bad.parse::<DiskArgument>().is_err(), "{bad}");
        }
    }

    #[test]
    fn work_where_only_the_kernel_makes_files_is_refused() {
        let error = check_work(Path::new("/proc/self/work")).expect_err("nothing can be made there");
        assert!(matches!(error, InputError::Kernel { what: "WORK", filesystem: "proc", .. }), "{error}");
    }

    #[test]
    fn a_share_that_shows_secrets_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let secrets = folder.path().join("a/keys");
        fs::create_dir_all(&secrets).expect("folders");
        for path in [folder.path().to_owned(), folder.path().join("a"), secrets.clone()] {
            assert!(matches!(
                open_share("SRCDIR", &path, &secrets),
                Err(InputError::Overlap(Overlap { kept: Kept::Secrets, .. }))
            ));
        }
        let beside = folder.path().join("b");
        fs::create_dir(&beside).expect("a folder");
        assert!(open_share("SRCDIR", &beside, &secrets).is_ok());
        // Keys that are not there cannot be shown.
        assert!(open_share("SRCDIR", &beside, &beside.join("keys")).is_ok());
    }
}
