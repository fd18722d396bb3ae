//! What somebody wants to have booted: a disk image, an EFI program, or a folder. Told by its first bytes, never by its
//! name.

use std::fs::{File, FileType};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::machine::qemu::firmware::Format;

/// What it is.
#[derive(Debug)]
pub enum Subject {
    /// A folder whose contents go onto a FAT disk.
    Folder,
    /// A program for x86-64 firmware, such as a unified kernel image.
    Program(File),
    /// The image of a disk.
    Disk(File, Format),
}

/// Why it cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It cannot be read.
    #[error("cannot read {}", .path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// It has no bytes that stay where they are.
    #[error("{} is {kind}, and neither a file nor a block device", .path.display())]
    Kind {
        /// Which.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// It is a container for disks that is not read unless it is said to be one.
    #[error("{} is a {kind} image, and disks are raw", .path.display())]
    Container {
        /// Which.
        path: PathBuf,
        /// Its kind.
        kind: &'static str,
    },
    /// It was said to be qcow2.
    #[error("{} is no qcow2 image", .0.display())]
    NotQcow2(PathBuf),
    /// The disk is in another file, which only this one names.
    #[error("{} is a qcow2 image whose data are in another file, and no file that an image names is opened", .0.display())]
    DataFile(PathBuf),
    /// Its machine is another.
    #[error("{} is an EFI program for another processor than x86-64", .0.display())]
    OtherProcessor(PathBuf),
    /// It is nothing that firmware boots.
    #[error("{} is neither the image of a disk nor an EFI program", .0.display())]
    Unknown(PathBuf),
}

impl ImageError {
    /// What the user can do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Container { path, kind } => {
                let convert = format!("convert it: qemu-img convert -O raw {} disk.img", path.display());
                Some(match *kind {
                    "qcow2" => format!("{convert}; or say --format qcow2 where you trust who made it"),
                    _ => convert,
                })
            }
            Self::DataFile(path) => Some(format!(
                "convert it where you trust who made it: qemu-img convert -O raw {} disk.img",
                path.display()
            )),
            Self::Unknown(_) => Some(
                "a disk has a partition table, a FAT or an ISO 9660 file system; a folder is put on a disk"
                    .to_owned(),
            ),
            _ => None,
        }
    }
}

/// First bytes of containers for disks.
const CONTAINERS: [(&str, &[u8]); 5] = [
    ("qcow2", b"QFI\xfb"),
    ("VMDK", b"KDMV"),
    ("VMDK", b"# Disk DescriptorFile"),
    ("VHDX", b"vhdxfile"),
    ("VirtualBox", b"<<< "),
];

/// Of a qcow2 image's incompatible features, which version 3 has (qcow2 specification, "Header"): the disk is in another
/// file.
const EXTERNAL_DATA_FILE: u64 = 1 << 2;

/// Of what is read at the beginning: up to the descriptor of an ISO 9660 file system.
const HEAD_BYTES: usize = 36 << 10;

/// `IMAGE_FILE_MACHINE_AMD64`, and `IMAGE_SUBSYSTEM_EFI_APPLICATION` (PE/COFF §3.3.1, §3.4.2).
const AMD64: [u8; 2] = [0x64, 0x86];
const EFI_APPLICATION: [u8; 2] = [10, 0];

/// Looks at what is at `path`. `format` is what its bytes were said to be; `writable` opens it for writing.
///
/// # Errors
/// [`ImageError`] where it cannot be booted.
pub fn look(path: &Path, format: Option<Format>, writable: bool) -> Result<Subject, ImageError> {
    let read = |source| ImageError::Read { path: path.to_owned(), source };
    let meta = path.metadata().map_err(read)?;
    if meta.is_dir() {
        return Ok(Subject::Folder);
    }
    // Before it is opened, which may set a device going; and a FIFO that has come in its place meanwhile is not waited for.
    let odd = |kind| ImageError::Kind { path: path.to_owned(), kind };
    check_kind(meta.file_type()).map_err(odd)?;
    let mut options = File::options();
    options.read(true).write(writable).custom_flags(libc::O_NONBLOCK);
    let file = options.open(path).map_err(read)?;
    check_kind(file.metadata().map_err(read)?.file_type()).map_err(odd)?;
    let mut head = vec![0; HEAD_BYTES];
    let mut length = 0;
    while length < head.len() {
        match file.read_at(&mut head[length..], u64::try_from(length).unwrap_or(u64::MAX)).map_err(read)? {
            0 => break,
            count => length += count,
        }
    }
    head.truncate(length);
    let container = CONTAINERS.iter().find(|(_, magic)| head.starts_with(magic)).map(|(kind, _)| *kind);
    match (format, container) {
        (Some(Format::Qcow2), Some("qcow2")) if has_data_file(&head) == Some(true) => {
            return Err(ImageError::DataFile(path.to_owned()));
        }
        (Some(Format::Qcow2), Some("qcow2")) => return Ok(Subject::Disk(file, Format::Qcow2)),
        (Some(Format::Qcow2), _) => return Err(ImageError::NotQcow2(path.to_owned())),
        (Some(Format::Raw), _) => return Ok(Subject::Disk(file, Format::Raw)),
        (None, Some(kind)) => return Err(ImageError::Container { path: path.to_owned(), kind }),
        (None, None) => {}
    }
    if let Some((machine, subsystem)) = efi_program(&head) {
        return match (machine == AMD64, subsystem == EFI_APPLICATION) {
            (true, true) => Ok(Subject::Program(file)),
            (false, _) => Err(ImageError::OtherProcessor(path.to_owned())),
            (true, false) => Err(ImageError::Unknown(path.to_owned())),
        };
    }
    let has = |at: usize, bytes: &[u8]| head.get(at..at + bytes.len()) == Some(bytes);
    let is_disk =
        has(510, &[0x55, 0xaa]) || has(512, b"EFI PART") || has(4096, b"EFI PART") || has(32_769, b"CD001");
    if is_disk { Ok(Subject::Disk(file, Format::Raw)) } else { Err(ImageError::Unknown(path.to_owned())) }
}

/// Refuses what has no bytes that stay where they are, with what it is.
fn check_kind(kind: FileType) -> Result<(), &'static str> {
    match kind {
        kind if kind.is_file() || kind.is_block_device() => Ok(()),
        kind if kind.is_fifo() => Err("a FIFO"),
        kind if kind.is_socket() => Err("a socket"),
        kind if kind.is_char_device() => Err("a character device"),
        _ => Err("something else"),
    }
}

/// Whether a qcow2 image names a file that the disk is in; none where its header is too short to.
fn has_data_file(head: &[u8]) -> Option<bool> {
    let version = u32::from_be_bytes(head.get(4..8)?.try_into().ok()?);
    let features = u64::from_be_bytes(head.get(72..80)?.try_into().ok()?);
    Some(version >= 3 && features & EXTERNAL_DATA_FILE != 0)
}

/// Machine and subsystem of a PE file (PE/COFF §2 to §3.4); none where it is no such file.
fn efi_program(head: &[u8]) -> Option<([u8; 2], [u8; 2])> {
    if !head.starts_with(b"MZ") {
        return None;
    }
    let at = usize::try_from(u32::from_le_bytes(head.get(0x3c..0x40)?.try_into().ok()?)).ok()?;
    let part = |from: usize, length: usize| {
        let from = at.checked_add(from)?;
        head.get(from..from.checked_add(length)?)
    };
    (part(0, 4)? == b"PE\0\0").then_some(())?;
    Some((part(4, 2)?.try_into().ok()?, part(24 + 68, 2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look_at(bytes: &[u8], format: Option<Format>) -> Result<Subject, ImageError> {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), bytes).expect("room");
        look(file.path(), format, false)
    }

    fn program(machine: [u8; 2], subsystem: u8) -> Vec<u8> {
        let mut bytes = vec![0; 512];
        bytes[..2].copy_from_slice(b"MZ");
        bytes[0x3c] = 0x80;
        bytes[0x80..0x84].copy_from_slice(b"PE\0\0");
        bytes[0x84..0x86].copy_from_slice(&machine);
        bytes[0x80 + 24 + 68] = subsystem;
        bytes
    }

    #[test]
    fn each_kind_is_told_by_its_bytes() {
        let mut disk = vec![0; 1024];
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        assert!(matches!(look_at(&disk, None), Ok(Subject::Disk(_, Format::Raw))));
        assert!(matches!(look_at(&program(AMD64, 10), None), Ok(Subject::Program(_))));
        assert!(matches!(look(Path::new("/"), None, false), Ok(Subject::Folder)));
    }

    #[test]
    fn what_firmware_does_not_boot_is_refused_by_its_kind() {
        assert!(matches!(look_at(b"", None), Err(ImageError::Unknown(_))));
        assert!(matches!(look_at(&[7; 40_000], None), Err(ImageError::Unknown(_))));
        assert!(matches!(look_at(&program([0x64, 0xaa], 10), None), Err(ImageError::OtherProcessor(_))));
        assert!(matches!(look_at(&program(AMD64, 3), None), Err(ImageError::Unknown(_))));
        assert!(matches!(look_at(b"MZ", None), Err(ImageError::Unknown(_))));
        assert!(matches!(look(Path::new("/nonexistent"), None, false), Err(ImageError::Read { .. })));
    }

    #[test]
    fn a_qcow2_image_is_read_only_where_it_is_said_to_be_one() {
        let qcow2 = b"QFI\xfb\0\0\0\x03";
        assert!(matches!(look_at(qcow2, None), Err(ImageError::Container { kind: "qcow2", .. })));
        assert!(matches!(look_at(qcow2, Some(Format::Qcow2)), Ok(Subject::Disk(_, Format::Qcow2))));
        assert!(matches!(look_at(b"x", Some(Format::Qcow2)), Err(ImageError::NotQcow2(_))));
    }

    #[test]
    fn a_qcow2_image_that_names_a_file_for_its_data_is_refused() {
        let header = |version: u8, features: u8| {
            let mut bytes = [0; 104];
            bytes[..4].copy_from_slice(b"QFI\xfb");
            bytes[7] = version;
            bytes[79] = features;
            look_at(&bytes, Some(Format::Qcow2))
        };
        assert!(matches!(header(3, 4), Err(ImageError::DataFile(_))));
        assert!(matches!(header(3, 3), Ok(Subject::Disk(_, Format::Qcow2))));
        // Version 2 ends before there, and what follows is no feature.
        assert!(matches!(header(2, 4), Ok(Subject::Disk(_, Format::Qcow2))));
    }

    #[test]
    fn what_an_open_would_wait_for_is_refused_by_its_kind() {
        let folder = tempfile::tempdir().expect("a folder");
        let (fifo, socket) = (folder.path().join("fifo"), folder.path().join("socket"));
        let mode = rustix::fs::Mode::from_raw_mode(0o644);
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).expect("a FIFO");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).expect("a socket");
        for (path, shown) in
            [(&*fifo, "a FIFO"), (&*socket, "a socket"), (Path::new("/dev/null"), "a character device")]
        {
            for (format, writable) in [(None, false), (Some(Format::Raw), true)] {
                let error = look(path, format, writable).expect_err("it is refused");
                assert!(matches!(error, ImageError::Kind { kind, .. } if kind == shown), "{error}");
            }
        }
    }
}
