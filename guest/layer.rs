//! A private writable layer: what a step has written above a read-only tree, as entries of a listing and as contents.
//! The layer is read where overlayfs keeps it (its upper directory), so only what was changed is in it.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use kiln_wire::{Entry, EntryKind, FromAgent, MAX_DATA_BYTES, MAX_PATH_BYTES, MAX_XATTR_BYTES, MAX_XATTRS};
use rustix::buffer::spare_capacity;
use rustix::fs::{FileType, OFlags, SeekFrom, Statx, fstat, seek};
use rustix::io::{Errno, pread};

use crate::failure::{Doing, Failure};
use crate::walk::{Node, Walk, open_beneath};

/// The prefix of overlayfs' own extended attributes, which say how a layer is to be read and are no content.
const OVERLAY: &[u8] = b"trusted.overlay.";

/// A layer of a mounted tree.
pub struct Layer {
    target: Vec<u8>,
    top: OwnedFd,
    /// What was in the layer before the first command, mount points and the folders on the way to them, and when its
    /// inode was last changed in any way. What still has that time was not touched by a step.
    made: BTreeMap<Vec<u8>, (i64, u32)>,
}

/// Takes messages for the host, and waits when there are too many.
pub trait Sink {
    /// Sends one.
    ///
    /// # Errors
    /// The host is gone.
    fn send(&mut self, message: &FromAgent) -> Result<(), Failure>;
}

impl Layer {
    /// The layer at `top` of the tree mounted on `target`.
    pub fn new(target: Vec<u8>, top: OwnedFd) -> Self {
        Self { target, top, made: BTreeMap::new() }
    }

    /// Whether it belongs to the tree mounted on `target`.
    pub fn is_at(&self, target: &[u8]) -> bool {
        let trim = |path: &[u8]| path.iter().rposition(|&byte| byte != b'/').map_or(0, |last| last + 1);
        self.target[..trim(&self.target)] == target[..trim(target)]
    }

    /// Remembers what is in the layer now as not the step's.
    ///
    /// # Errors
    /// The layer cannot be read.
    pub fn remember(&mut self) -> Result<(), Failure> {
        let mut walk = Walk::new(&self.top);
        while let Some((path, time)) = walk.visit(|node| (node.path.to_vec(), change_time(&node.stat)))? {
            self.made.insert(path, time);
        }
        Ok(())
    }

    /// Sends an `Entry` for everything that a step put into the layer, the layer's top first.
    ///
    /// # Errors
    /// Something cannot be read or described.
    pub fn list(&self, sink: &mut impl Sink) -> Result<Listing, Failure> {
        let mut listing = Listing::default();
        let mut walk = Walk::new(&self.top);
        // Folders that the step did not touch, on the way to the current node: sent when something is in them.
        let mut held: Vec<Found> = Vec::new();
        while let Some(step) = walk.visit(|node| {
            let untouched = self.made.get(node.path) == Some(&change_time(&node.stat));
            let is_folder = file_type(&node.stat).is_dir();
            if untouched && !is_folder {
                return Ok(None);
            }
            let hold = untouched && node.depth > 0;
            Ok(Some((hold, Found::new(&node)?)))
        })? {
            let Some((hold, found)) = step? else { continue };
            while held.last().is_some_and(|above| above.depth >= found.depth) {
                held.pop();
            }
            held.push(found);
            if !hold {
                for found in held.drain(..) {
                    listing.send(found, sink)?;
                }
            }
        }
        sink.send(&FromAgent::ListDone { entries: listing.count()? })?;
        Ok(listing)
    }

    /// Sends the content of a regular file; holes are skipped.
    ///
    /// # Errors
    /// It cannot be read, or is no regular file (EINVAL).
    pub fn fetch(&self, ordinal: u32, path: &[u8], sink: &mut impl Sink) -> Result<(), Failure> {
        let what = || format!("reading the content of {}", path.escape_ascii());
        let file = open_beneath(self.top.as_fd(), path, OFlags::empty()).doing(what)?;
        let stat = fstat(&file).doing(what)?;
        if !FileType::from_raw_mode(stat.st_mode).is_file() {
            return Err(Errno::INVAL).doing(what);
        }
        sink.send(&FromAgent::FileStart { ordinal })?;
        let mut position = 0;
        loop {
            let start = match seek(&file, SeekFrom::Data(position)) {
                // No data after here.
                Err(Errno::NXIO) => break,
                result => result.doing(what)?,
            };
            let end = seek(&file, SeekFrom::Hole(start)).doing(what)?;
            position = start;
            while position < end {
                let room = usize::try_from(end - position).unwrap_or(usize::MAX).min(MAX_DATA_BYTES);
                let mut data = Vec::with_capacity(room);
                let length = pread(&file, spare_capacity(&mut data), position).doing(what)?;
                if length == 0 {
                    // Cut short since the seek; the next seek finds the end.
                    break;
                }
                let offset = position;
                position += u64::try_from(length).unwrap_or(0);
                sink.send(&FromAgent::FileData { offset, data })?;
            }
            if position < end {
                break;
            }
        }
        let size = fstat(&file).doing(what)?.st_size;
        // Not before what was sent, should the file have been cut meanwhile.
        let size = u64::try_from(size).unwrap_or(0).max(position);
        sink.send(&FromAgent::FileEnd { size })
    }
}

/// What a `List` sent, kept so that `Fetch` can name files by ordinal: for each entry its name and its folder's ordinal.
#[derive(Default)]
pub struct Listing {
    folders: Vec<u32>,
    name_ends: Vec<usize>,
    names: Vec<u8>,
    /// The ordinal under which an inode with several names was sent first.
    links: BTreeMap<u64, u32>,
    /// The ordinals of the folders on the way to the last entry.
    way: Vec<u32>,
}

impl Listing {
    fn count(&self) -> Result<u32, Failure> {
        u32::try_from(self.folders.len())
            .map_err(|_| Failure::new("counting the layer's entries", Errno::OVERFLOW))
    }

    /// The path of an entry; `None` if there is no such ordinal.
    pub fn path(&self, ordinal: u32) -> Option<Vec<u8>> {
        let mut names = Vec::new();
        let mut index = usize::try_from(ordinal).ok()?;
        // Also answers for an empty listing, which has not even a top.
        self.folders.get(index)?;
        while index > 0 {
            let start = *self.name_ends.get(index - 1)?;
            names.push(self.names.get(start..*self.name_ends.get(index)?)?);
            index = usize::try_from(*self.folders.get(index)?).ok()?;
        }
        names.reverse();
        Some(names.join(&b'/'))
    }

    /// Gives an entry its ordinal and sends it.
    fn send(&mut self, found: Found, sink: &mut impl Sink) -> Result<(), Failure> {
        let Found { depth, mut entry, linked_inode } = found;
        entry.ordinal = self.count()?;
        if let Some(inode) = linked_inode {
            let first = *self.links.entry(inode).or_insert(entry.ordinal);
            if first != entry.ordinal {
                entry.kind = EntryKind::HardLink { ordinal: first };
                entry.xattrs.clear();
            }
        }
        self.way.truncate(depth);
        self.folders.push(self.way.last().copied().unwrap_or(0));
        self.names.extend_from_slice(entry.path.rsplit(|&byte| byte == b'/').next().unwrap_or_default());
        self.name_ends.push(self.names.len());
        self.way.push(entry.ordinal);
        sink.send(&FromAgent::Entry(entry))
    }
}

/// A node as an entry whose ordinal is still open.
struct Found {
    depth: usize,
    entry: Entry,
    /// The inode's number if it has other names.
    linked_inode: Option<u64>,
}

impl Found {
    fn new(node: &Node<'_>) -> Result<Self, Failure> {
        let what = || format!("describing {}", node.path.escape_ascii());
        let stat = &node.stat;
        let mut attributes = Attributes::read(node).doing(what)?;
        let kind = kind(node, &attributes).doing(what)?;
        // Overlayfs gives many whiteouts one inode: they are no names of one file.
        let is_file = !matches!(kind, EntryKind::Whiteout | EntryKind::Directory { .. });
        if kind == EntryKind::Whiteout {
            attributes.content.clear();
        }
        let entry = Entry {
            ordinal: 0,
            path: node.path.to_vec(),
            kind,
            mode: stat.stx_mode & 0o7777,
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            mtime_seconds: stat.stx_mtime.tv_sec,
            mtime_nanoseconds: stat.stx_mtime.tv_nsec,
            xattrs: attributes.content,
        };
        let linked_inode = (is_file && stat.stx_nlink > 1).then_some(stat.stx_ino);
        Ok(Self { depth: node.depth, entry, linked_inode })
    }
}

fn kind(node: &Node<'_>, attributes: &Attributes) -> Result<EntryKind, Errno> {
    let stat = &node.stat;
    let (major, minor) = (stat.stx_rdev_major, stat.stx_rdev_minor);
    Ok(match file_type(stat) {
        FileType::Directory => EntryKind::Directory { opaque: attributes.opaque },
        FileType::CharacterDevice if (major, minor) == (0, 0) => EntryKind::Whiteout,
        FileType::RegularFile if attributes.whiteout && stat.stx_size == 0 => EntryKind::Whiteout,
        FileType::RegularFile => EntryKind::File { size: stat.stx_size },
        FileType::Symlink => {
            let text =
                rustix::fs::readlinkat(node.folder, node.name, Vec::with_capacity(MAX_PATH_BYTES + 1))?;
            EntryKind::Symlink(text.into_bytes())
        }
        FileType::CharacterDevice => EntryKind::CharDevice { major, minor },
        FileType::BlockDevice => EntryKind::BlockDevice { major, minor },
        FileType::Fifo => EntryKind::Fifo,
        FileType::Socket => EntryKind::Socket,
        FileType::Unknown => return Err(Errno::INVAL),
    })
}

fn file_type(stat: &Statx) -> FileType {
    FileType::from_raw_mode(stat.stx_mode.into())
}

fn change_time(stat: &Statx) -> (i64, u32) {
    (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec)
}

/// A node's extended attributes, overlayfs' own apart.
#[derive(Default)]
struct Attributes {
    content: Vec<(Vec<u8>, Vec<u8>)>,
    opaque: bool,
    whiteout: bool,
}

impl Attributes {
    fn read(node: &Node<'_>) -> Result<Self, Errno> {
        let path = node.proc_path();
        let mut found = Self::default();
        // Most nodes have none; the kernel's largest list is 64 KiB (XATTR_LIST_MAX).
        let mut few = [0; 1024];
        let mut many = Vec::new();
        let names = match rustix::fs::llistxattr(&*path, &mut few[..]) {
            Ok(length) => few.get(..length),
            Err(Errno::NOTSUP) => return Ok(found),
            Err(Errno::RANGE) => {
                many.resize(65_536, 0);
                let length = rustix::fs::llistxattr(&*path, &mut many[..])?;
                many.get(..length)
            }
            Err(error) => return Err(error),
        };
        for name in names.unwrap_or_default().split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
            match name.strip_prefix(OVERLAY) {
                Some(b"opaque") => found.opaque = value(&path, name)? == b"y",
                Some(b"whiteout") => found.whiteout = true,
                Some(_) => {}
                None => found.content.push((name.to_vec(), value(&path, name)?)),
            }
        }
        if found.content.len() > MAX_XATTRS {
            return Err(Errno::TOOBIG);
        }
        // The kernel's order is that of setting them.
        found.content.sort_unstable();
        Ok(found)
    }
}

fn value(path: &[u8], name: &[u8]) -> Result<Vec<u8>, Errno> {
    let mut value = vec![0; 256];
    let length = match rustix::fs::lgetxattr(path, name, &mut value[..]) {
        Err(Errno::RANGE) => {
            value.resize(MAX_XATTR_BYTES, 0);
            rustix::fs::lgetxattr(path, name, &mut value[..])?
        }
        result => result?,
    };
    value.truncate(length);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use std::fs::{File, create_dir, hard_link, write};
    use std::os::unix::fs::{FileExt, symlink};
    use std::path::Path;

    use rustix::fs::{CWD, Mode, XattrFlags, mkfifoat};

    use super::*;

    impl Sink for Vec<FromAgent> {
        fn send(&mut self, message: &FromAgent) -> Result<(), Failure> {
            self.push(message.clone());
            Ok(())
        }
    }

    fn layer(path: &Path) -> Layer {
        Layer::new(b"/".to_vec(), File::open(path).expect("a folder").into())
    }

    fn list(layer: &Layer) -> (Vec<Entry>, Listing) {
        let mut sent = Vec::new();
        let listing = layer.list(&mut sent).expect("readable");
        let count = sent.len() - 1;
        assert_eq!(sent.pop(), Some(FromAgent::ListDone { entries: u32::try_from(count).expect("few") }));
        let entry = |message| if let FromAgent::Entry(entry) = message { Some(entry) } else { None };
        let entries: Vec<_> = sent.into_iter().filter_map(entry).collect();
        assert_eq!(entries.len(), count);
        for (index, entry) in entries.iter().enumerate() {
            assert_eq!(usize::try_from(entry.ordinal), Ok(index));
            assert_eq!(listing.path(entry.ordinal), Some(entry.path.clone()));
        }
        assert_eq!(listing.path(u32::try_from(count).expect("few")), None);
        (entries, listing)
    }

    fn names(entries: &[Entry]) -> Vec<String> {
        entries.iter().map(|entry| String::from_utf8_lossy(&entry.path).into_owned()).collect()
    }

    #[test]
    fn every_kind_is_told_apart() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        create_dir(at("d")).expect("a folder");
        write(at("d/file"), "12345").expect("a file");
        hard_link(at("d/file"), at("e")).expect("a link");
        symlink("d/file", at("s")).expect("a link");
        mkfifoat(CWD, at("fifo"), Mode::RUSR).expect("a fifo");
        std::os::unix::net::UnixListener::bind(at("sock")).expect("a socket");
        let (entries, _) = list(&layer(folder.path()));
        assert_eq!(names(&entries), ["", "d", "d/file", "e", "fifo", "s", "sock"]);
        let kinds: Vec<_> = entries.iter().map(|entry| entry.kind.clone()).collect();
        assert_eq!(
            kinds[1..],
            [
                EntryKind::Directory { opaque: false },
                EntryKind::File { size: 5 },
                EntryKind::HardLink { ordinal: 2 },
                EntryKind::Fifo,
                EntryKind::Symlink(b"d/file".to_vec()),
                EntryKind::Socket,
            ]
        );
    }

    #[test]
    fn extended_attributes_are_told_and_overlayfs_own_are_not() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("f");
        write(&file, "").expect("a file");
        let set = |name: &str, value: &[u8]| rustix::fs::setxattr(&file, name, value, XattrFlags::empty());
        if set("user.b", &[7; 3000]).is_err() {
            return; // The file system under the temporary folder has none.
        }
        set("user.a", b"").expect("an attribute");
        // Only root may set this one.
        let _ = set("trusted.overlay.origin", b"x");
        let (entries, _) = list(&layer(folder.path()));
        assert_eq!(entries[1].xattrs, [(b"user.a".to_vec(), vec![]), (b"user.b".to_vec(), vec![7; 3000])]);
    }

    #[test]
    fn what_the_agent_made_is_left_out_until_something_is_in_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        for name in ["lib", "lib/modules", "ws", "x", "x/y"] {
            create_dir(at(name)).expect("a folder");
        }
        write(at("disk"), "").expect("a file");
        let mut layer = layer(folder.path());
        layer.remember().expect("readable");
        assert_eq!(names(&list(&layer).0), [""]);
        // Change times have the granularity of the kernel's tick.
        std::thread::sleep(std::time::Duration::from_millis(20));
        write(at("x/y/out"), "").expect("a file");
        rustix::fs::chmod(at("ws"), Mode::RWXU).expect("a mode");
        assert_eq!(names(&list(&layer).0), ["", "ws", "x", "x/y", "x/y/out"]);
    }

    #[test]
    fn holes_are_skipped_and_the_end_is_told() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("sparse");
        let file = File::create(&path).expect("a file");
        file.write_all_at(b"start", 0).expect("written");
        file.write_all_at(&[1; 5000], 10 << 20).expect("written");
        file.set_len(1 << 40).expect("room");
        let layer = layer(folder.path());
        let mut sent = Vec::new();
        layer.fetch(7, b"sparse", &mut sent).expect("readable");
        assert_eq!(sent.first(), Some(&FromAgent::FileStart { ordinal: 7 }));
        assert_eq!(sent.last(), Some(&FromAgent::FileEnd { size: 1 << 40 }));
        let mut bytes = 0;
        let mut last_end = 0;
        for message in &sent[1..sent.len() - 1] {
            let FromAgent::FileData { offset, data } = message else { continue };
            assert!(*offset >= last_end && !data.is_empty());
            last_end = offset + u64::try_from(data.len()).expect("small");
            bytes += data.len();
            if *offset == 0 {
                assert!(data.starts_with(b"start"));
            }
        }
        assert!((5005..1 << 20).contains(&bytes), "{bytes} bytes sent");
    }

    #[test]
    fn only_regular_files_beneath_the_layer_have_content() {
        let folder = tempfile::tempdir().expect("a folder");
        symlink("/etc/passwd", folder.path().join("link")).expect("a link");
        mkfifoat(CWD, folder.path().join("fifo"), Mode::RUSR).expect("a fifo");
        let layer = layer(folder.path());
        let mut sent = Vec::new();
        for (path, errno) in
            [("link", Errno::LOOP), ("fifo", Errno::INVAL), ("", Errno::INVAL), ("no", Errno::NOENT)]
        {
            assert_eq!(
                layer.fetch(0, path.as_bytes(), &mut sent).expect_err("no file").errno,
                errno,
                "{path}"
            );
        }
        assert!(sent.is_empty());
    }

    #[test]
    fn a_target_may_end_in_slashes() {
        let folder = tempfile::tempdir().expect("a folder");
        let top = || File::open(folder.path()).expect("a folder").into();
        assert!(Layer::new(b"/x/".to_vec(), top()).is_at(b"/x"));
        assert!(Layer::new(b"/".to_vec(), top()).is_at(b"/"));
        assert!(!Layer::new(b"/".to_vec(), top()).is_at(b"/x"));
    }
}
