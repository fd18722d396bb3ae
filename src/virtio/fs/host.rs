//! The host side of a read-only share: opening, listing and stating files beneath a directory descriptor.
//!
//! Every path here was put together from names that the host's own listings gave, never from a guest's.
//! Resolution stays beneath the descriptor and follows no symbolic link, whatever happens to the tree
//! meanwhile. Stateless but for [`Handles`], the bounded cache of open descriptors.

use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use kiln_digest::{Digest, Hasher};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, ResolveFlags, Stat};
use rustix::io::{Errno, Result};

use super::record::{Fingerprint, Kind};

const RESOLVE: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);
const READ: OFlags = OFlags::RDONLY.union(OFlags::NOFOLLOW).union(OFlags::NONBLOCK).union(OFlags::CLOEXEC);

/// Paths longer than this are resolved in pieces; the kernel takes 4,095 bytes at once (PATH_MAX).
const PIECE_BYTES: usize = 4000;

/// How a file is to be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Open {
    /// To list it and to open what is in it.
    Directory,
    /// To read it. What is not a regular file is not opened: an open may act on a device.
    Regular,
    /// Only to name it, for what is neither; a link is not followed.
    Name,
}

/// Opens `path`, names joined by `/`, beneath `directory`; the directory itself where it is empty.
pub fn open_beneath(directory: impl AsFd, path: &[u8], how: Open) -> Result<OwnedFd> {
    let mut rest = path;
    let mut base = None;
    while rest.len() > PIECE_BYTES {
        let cut = rest[..PIECE_BYTES].iter().rposition(|byte| *byte == b'/').ok_or(Errno::NAMETOOLONG)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let from = base.as_ref().map_or(directory.as_fd(), OwnedFd::as_fd);
        let piece = rustix::fs::openat2(from, &rest[..cut], flags, Mode::empty(), RESOLVE)?;
        base = Some(piece);
        rest = &rest[cut + 1..];
    }
    let from = base.as_ref().map_or(directory.as_fd(), OwnedFd::as_fd);
    let path = if rest.is_empty() { b"." } else { rest };
    let flags = match how {
        Open::Directory => READ | OFlags::DIRECTORY,
        Open::Regular => READ,
        Open::Name => OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
    };
    if how == Open::Name {
        return rustix::fs::openat2(from, path, flags, Mode::empty(), RESOLVE);
    }
    // Only the owner of a file may open it without leaving an access time.
    match rustix::fs::openat2(from, path, flags | OFlags::NOATIME, Mode::empty(), RESOLVE) {
        Err(Errno::PERM) => rustix::fs::openat2(from, path, flags, Mode::empty(), RESOLVE),
        result => result,
    }
}

/// States `name` in `directory`, without following it.
pub fn stat_at(directory: impl AsFd, name: &[u8]) -> Result<Stat> {
    settled(|| rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT))
}

/// States an open file or directory.
pub fn stat_of(file: impl AsFd) -> Result<Stat> {
    settled(|| rustix::fs::fstat(&file))
}

/// The longest tick of the clock that stamps changes (CONFIG_HZ=100). Kernels since 6.13 stamp finer where the file
/// system can.
const TICK: Duration = Duration::from_millis(10);

/// What `stat` says once a later change must show in the change time: a file that changed less than a tick ago is
/// stated again after it.
#[expect(
    clippy::disallowed_methods,
    reason = "compared with a file's time; nothing that is told depends on it"
)]
fn settled(stat: impl Fn() -> Result<Stat>) -> Result<Stat> {
    // Whoever changes a file all the time does so after the last time it is looked at, too.
    for _ in 0..3 {
        let now = SystemTime::now();
        let seen = stat()?;
        let nanos = u32::try_from(seen.st_ctime_nsec).unwrap_or(0);
        let changed = Duration::new(u64::try_from(seen.st_ctime).unwrap_or(0), nanos);
        // A change time in the future is one from before the clock was set back: no later change has it again.
        let age = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().checked_sub(changed);
        match age.and_then(|age| TICK.checked_sub(age)) {
            Some(rest) => std::thread::sleep(rest),
            None => return Ok(seen),
        }
    }
    stat()
}

/// The kind that a mode says.
pub fn kind_of(mode: u32) -> Option<Kind> {
    kind_of_type(FileType::from_raw_mode(mode))
}

fn kind_of_type(kind: FileType) -> Option<Kind> {
    Some(match kind {
        FileType::RegularFile => Kind::Regular,
        FileType::Directory => Kind::Directory,
        FileType::Symlink => Kind::Link,
        FileType::Fifo => Kind::Fifo,
        FileType::Socket => Kind::Socket,
        FileType::CharacterDevice => Kind::Character,
        FileType::BlockDevice => Kind::Block,
        FileType::Unknown => return None,
    })
}

/// What a stat says, in the form in which it is kept and compared.
pub fn fingerprint_of(stat: &Stat) -> Fingerprint {
    let nanos = |seconds: i64, nanos: u64| {
        seconds.saturating_mul(1_000_000_000).saturating_add(i64::try_from(nanos).unwrap_or(0))
    };
    Fingerprint {
        device: stat.st_dev,
        inode: stat.st_ino,
        size_bytes: u64::try_from(stat.st_size).unwrap_or(0),
        mtime_nanos: nanos(stat.st_mtime, stat.st_mtime_nsec),
        ctime_nanos: nanos(stat.st_ctime, stat.st_ctime_nsec),
        mode: stat.st_mode,
    }
}

/// Lists `directory`, which must be open for reading: `each` gets name, kind and inode number of every entry
/// but `.` and `..`, in the order of the host.
pub fn list(directory: impl AsFd + Copy, mut each: impl FnMut(&[u8], Kind, u64) -> Result<()>) -> Result<()> {
    rustix::fs::seek(directory, rustix::fs::SeekFrom::Start(0))?;
    let mut buffer = [MaybeUninit::uninit(); 32 << 10];
    let mut entries = RawDir::new(directory, &mut buffer);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name == b"." || name == b".." {
            continue;
        }
        // Some file systems do not say the type in listings.
        let kind = match kind_of_type(entry.file_type()) {
            Some(kind) => Some(kind),
            None => kind_of(stat_at(directory, name)?.st_mode),
        };
        each(name, kind.ok_or(Errno::IO)?, entry.ino())?;
    }
    Ok(())
}

/// The extended attributes of an open file: their names, sorted, each ended by a zero byte; the value of the one
/// called `wanted`; and the digest of all: for each, name, zero byte, length of the value in decimal, zero byte,
/// value. None where the file system has none.
pub fn xattrs(file: impl AsFd, wanted: &[u8]) -> Result<(Vec<u8>, Option<Vec<u8>>, Digest)> {
    let names = list_xattrs(&file)?;
    let mut sorted: Vec<&[u8]> = names.split_inclusive(|byte| *byte == 0).collect();
    sorted.sort_unstable();
    let (mut hasher, mut value) = (Hasher::default(), None);
    for name in &sorted {
        let name = name.strip_suffix(&[0]).unwrap_or(name);
        let one = xattr(&file, name)?;
        for piece in [name, b"\0", one.len().to_string().as_bytes(), b"\0", &one] {
            hasher.update(piece);
        }
        if name == wanted {
            value = Some(one);
        }
    }
    Ok((sorted.concat(), value, hasher.finish().0))
}

fn list_xattrs(file: impl AsFd) -> Result<Vec<u8>> {
    // XATTR_LIST_MAX.
    let mut names = vec![0; 64 << 10];
    match rustix::fs::flistxattr(file, &mut names[..]) {
        Ok(length) => {
            names.truncate(length);
            Ok(names)
        }
        Err(Errno::NOTSUP) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn xattr(file: impl AsFd, name: &[u8]) -> Result<Vec<u8>> {
    // XATTR_SIZE_MAX.
    let mut value = vec![0; 64 << 10];
    let length = rustix::fs::fgetxattr(file, name, &mut value[..])?;
    value.truncate(length);
    Ok(value)
}

/// Open descriptors by node, the least recently used given up first.
#[derive(Debug)]
pub struct Handles {
    open: BTreeMap<u32, (Arc<OwnedFd>, u64)>,
    uses: u64,
    capacity: usize,
}

impl Handles {
    /// A cache of at most `capacity` descriptors.
    pub fn new(capacity: usize) -> Self {
        Self { open: BTreeMap::new(), uses: 0, capacity: capacity.max(1) }
    }

    /// The descriptor of a node, if it is open.
    pub fn get(&mut self, node: u32) -> Option<Arc<OwnedFd>> {
        self.uses += 1;
        let (handle, used) = self.open.get_mut(&node)?;
        *used = self.uses;
        Some(handle.clone())
    }

    /// Keeps a descriptor. Call [`Handles::oldest`] first while [`Handles::full`].
    pub fn insert(&mut self, node: u32, handle: Arc<OwnedFd>) {
        self.uses += 1;
        self.open.insert(node, (handle, self.uses));
    }

    /// True where one more would be too many.
    pub fn full(&self) -> bool {
        self.open.len() >= self.capacity
    }

    /// Takes the least recently used descriptor out.
    pub fn oldest(&mut self) -> Option<(u32, Arc<OwnedFd>)> {
        let node = *self.open.iter().min_by_key(|(_, (_, used))| *used)?.0;
        self.open.remove(&node).map(|(handle, _)| (node, handle))
    }
}
