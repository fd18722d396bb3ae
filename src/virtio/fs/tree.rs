//! The tree a guest sees: shares by name in a synthetic directory, the index beneath them, the record.
//!
//! Works on nodes and names and knows no FUSE. A guest's name is compared with names in the index and goes
//! nowhere else. What a guest may be told leaves as [`Recorded`] or [`Refusal`] only, errors of the host
//! included. Called by the server (for the guest) and by the control side (shares come and go, the record is
//! taken).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use kiln_digest::Digest;
use rustix::fs::Stat;
use rustix::io::Errno;

use super::abi;
use super::host::{self, Handles, Open};
use super::index::{Full, Index, NodeId};
use super::kernel::Kernels;
use super::missed::Missed;
use super::record::{Change, Fingerprint, Kind, Observed};
use super::recorded::{Changes, Recorded, Refusal};
use super::share::{Attributes, Extra, InodeNames, Share, is_name};
use super::walks::Walks;

mod export;
mod list;

pub use list::Page;

/// Why a share cannot be added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AddShareError {
    /// Not one path component of at most 255 bytes.
    #[error("not a name for a share")]
    Name,
    /// There is one of that name.
    #[error("a share of that name exists")]
    Exists,
    /// The descriptor is not a directory.
    #[error("not a directory")]
    NotDirectory,
    /// More shares, or more files, than can be numbered.
    #[error("too many shares")]
    TooMany,
    /// The directory cannot be looked at.
    #[error("cannot stat the directory")]
    Stat(#[source] Errno),
}

struct Mounted {
    name: Box<[u8]>,
    directory: Option<OwnedFd>,
    attributes: Attributes,
    /// Paths that are there on the host and that the guest is not shown.
    hidden: BTreeSet<Box<[u8]>>,
    root: NodeId,
}

/// What a name stands for.
pub enum Found {
    /// A node, counted as a lookup.
    Node {
        /// The number by which the driver knows it from now on.
        nodeid: u64,
        /// What stat(2) shows.
        attr: abi::Attr,
        /// True for the directory of a share, whose name may come and go.
        is_share: bool,
    },
    /// Nothing, and there will be nothing.
    Absent,
    /// Nothing, but there may be a share of that name one day.
    NoShare,
}

/// Everything behind one fs device.
pub struct Tree {
    index: Index,
    shares: Vec<Mounted>,
    by_name: BTreeMap<Box<[u8]>, u16>,
    handles: Handles,
    extras: BTreeMap<u32, Extra>,
    /// Inode numbers that a listing shows, where stat(2) shows another: mount points.
    listed_inodes: BTreeMap<NodeId, u64>,
    missed: Missed,
    changes: Changes,
    /// What extended attributes were shown, of nodes that have any.
    xattrs: BTreeMap<NodeId, Digest>,
    kernels: Kernels,
    walks: Walks,
    generation: u32,
}

impl Tree {
    /// A tree without shares, that keeps at most `open_files` descriptors of theirs open, and `missed_bytes` of
    /// names that are not there.
    pub fn new(open_files: usize, missed_bytes: usize) -> Self {
        Self {
            index: Index::new(),
            shares: Vec::new(),
            by_name: BTreeMap::new(),
            handles: Handles::new(open_files),
            extras: BTreeMap::new(),
            listed_inodes: BTreeMap::new(),
            missed: Missed::new(missed_bytes),
            changes: Changes::default(),
            xattrs: BTreeMap::new(),
            kernels: Kernels::default(),
            walks: Walks::default(),
            generation: 0,
        }
    }

    /// Lets `share` appear as `name`.
    ///
    /// # Errors
    /// See [`AddShareError`].
    pub fn add_share(&mut self, name: &[u8], share: Share) -> Result<(), AddShareError> {
        if !is_name(name) {
            return Err(AddShareError::Name);
        }
        if self.by_name.contains_key(name) {
            return Err(AddShareError::Exists);
        }
        let stat = host::stat_of(&share.directory).map_err(AddShareError::Stat)?;
        if host::kind_of(stat.st_mode) != Some(Kind::Directory) {
            return Err(AddShareError::NotDirectory);
        }
        let place = u16::try_from(self.shares.len()).ok().filter(|place| *place < u16::MAX);
        let place = place.ok_or(AddShareError::TooMany)?;
        let root = self.index.add_share(place).map_err(|_| AddShareError::TooMany)?;
        let name: Box<[u8]> = name.into();
        self.shares.push(Mounted {
            name: name.clone(),
            directory: Some(share.directory),
            attributes: share.attributes,
            hidden: BTreeSet::new(),
            root,
        });
        self.keep_stat(root, &stat).map_err(|_| AddShareError::TooMany)?;
        self.by_name.insert(name, place);
        self.generation = self.generation.wrapping_add(1);
        Ok(())
    }

    /// Leaves `paths` out of what the share `name` shows. To be called before the guest has entered it: what was
    /// listed stays shown. False where there is no such share.
    pub fn hide(&mut self, name: &[u8], paths: impl IntoIterator<Item = Box<[u8]>>) -> bool {
        let place = self.by_name.get(name).copied().map(usize::from);
        let Some(share) = place.and_then(|place| self.shares.get_mut(place)) else { return false };
        share.hidden.extend(paths);
        true
    }

    /// Whether something of the share of `directory` is hidden; then the path of `directory` itself, to be joined.
    fn hides_in(&self, directory: NodeId) -> Option<Vec<u8>> {
        self.share(directory).filter(|share| !share.hidden.is_empty())?;
        let mut path = self.index.path(directory);
        if !path.is_empty() {
            path.push(b'/');
        }
        Some(path)
    }

    /// Lets the share `name` disappear. What the guest still holds of it answers ESTALE from now on. False
    /// where there is none.
    pub fn remove_share(&mut self, name: &[u8]) -> bool {
        let Some(place) = self.by_name.remove(name) else { return false };
        self.settle();
        while self.handles.oldest().is_some() {}
        if let Some(share) = self.shares.get_mut(usize::from(place)) {
            share.directory = None;
        }
        self.generation = self.generation.wrapping_add(1);
        true
    }

    /// Whether a share was ever added.
    pub fn had_shares(&self) -> bool {
        !self.shares.is_empty()
    }

    /// The node the driver calls `nodeid`. It was told what stat(2) shows of it and of all directories above.
    ///
    /// # Errors
    /// ESTALE where the driver does not hold it, or its share is gone.
    pub fn held(&self, nodeid: u64) -> Result<NodeId, Refusal> {
        let stale = Refusal::constant(Errno::STALE);
        let node = self.index.held(nodeid).ok_or(stale)?;
        let gone = node != NodeId::TOP && self.share(node).is_none_or(|share| share.directory.is_none());
        if gone { Err(stale) } else { Ok(node) }
    }

    /// Gives lookups back. A number that names nothing is ignored, as FORGET has no answer.
    pub fn forget(&mut self, nodeid: u64, count: u64) {
        if let Some(node) = self.index.held(nodeid) {
            self.index.forget(node, count);
        }
    }

    /// The driver holds nothing any more: it starts anew.
    pub fn forget_all(&mut self) {
        self.index.forget_all();
    }

    /// What is called `name` in `directory`, for the guest's process `process`.
    ///
    /// # Errors
    /// ENOTDIR where it is no directory, EIO where an absence cannot be noted, or what the host said where it
    /// would not answer.
    pub fn lookup(
        &mut self,
        directory: NodeId,
        name: &[u8],
        process: u32,
    ) -> Result<Recorded<Found>, Refusal> {
        if directory == NodeId::TOP {
            let root = self.by_name.get(name).map(|place| self.shares[usize::from(*place)].root);
            return root.map_or(Ok(Recorded::constant(Found::NoShare)), |root| self.found(root));
        }
        self.fill(directory)?;
        match self.index.child(directory, name) {
            Some(node) => {
                self.walks.asked(process, node);
                self.found(node)
            }
            None => Recorded::absence(&mut self.missed, directory, name, Found::Absent),
        }
    }

    fn found(&mut self, node: NodeId) -> Result<Recorded<Found>, Refusal> {
        let attr = self.attributes(node)?;
        self.index.hold(node);
        let is_share = self.index.parent(node) == NodeId::TOP;
        Ok(attr.map(|attr| Found::Node { nodeid: node.to_fuse(), attr, is_share }))
    }

    /// The attributes of a node.
    ///
    /// # Errors
    /// What the host said where it would not answer.
    pub fn attributes(&mut self, node: NodeId) -> Result<Recorded<abi::Attr>, Refusal> {
        if node == NodeId::TOP {
            return Ok(Recorded::constant(abi::Attr {
                ino: 1.into(),
                mode: 0o40555.into(),
                nlink: 1.into(),
                // A listing the driver has cached holds as long as the modification time does.
                mtime_nanos: (self.generation % 1_000_000_000).into(),
                block_size: 4096.into(),
                ..Default::default()
            }));
        }
        let seen = self.state(node)?;
        let kind = self.index.kind(node);
        let mut observed = Observed::METADATA;
        observed.set(Observed::CONTENT, kind == Kind::Regular && seen.size_bytes == 0);
        let extra = self.extras.get(&node.place()).copied().unwrap_or_default();
        let inode = self.inode(node);
        let share = self.share(node).ok_or(Refusal::constant(Errno::STALE))?;
        let attr = share.attributes.show(inode, &seen, kind, extra);
        Ok(Recorded::observation(&mut self.index, node, observed, attr))
    }

    /// Lets `read` read at most `wanted` bytes at `offset` of a regular file, and gives how many it says came.
    ///
    /// # Errors
    /// EISDIR and EINVAL where it is none, otherwise as [`Tree::attributes`].
    pub fn read(
        &mut self,
        node: NodeId,
        offset: u64,
        wanted: usize,
        read: impl FnOnce(BorrowedFd<'_>) -> io::Result<usize>,
    ) -> Result<Recorded<usize>, Refusal> {
        match self.index.kind(node) {
            Kind::Regular => {}
            Kind::Directory => return Err(Refusal::constant(Errno::ISDIR)),
            _ => return Err(Refusal::constant(Errno::INVAL)),
        }
        let recorded = Recorded::observation(&mut self.index, node, Observed::CONTENT, ());
        let file = self.open(node)?;
        let count = read(file.as_fd()).map_err(|error| {
            let error = Errno::from_io_error(&error).unwrap_or(Errno::IO);
            Refusal::change(&mut self.changes, node, Change::Unreadable, error)
        })?;
        let size_bytes = self.index.fingerprint(node).map_or(0, |seen| seen.size_bytes);
        if (count as u64) < (wanted as u64).min(size_bytes.saturating_sub(offset)) {
            // The driver fills up with zeroes what a file lacks.
            self.changes.note(node, Change::Modified);
        }
        Ok(recorded.map(|()| count))
    }

    /// The text of a link.
    ///
    /// # Errors
    /// EINVAL where it is none, otherwise as [`Tree::attributes`].
    pub fn link_text(&mut self, node: NodeId) -> Result<Recorded<Vec<u8>>, Refusal> {
        if self.index.kind(node) != Kind::Link {
            return Err(Refusal::constant(Errno::INVAL));
        }
        let recorded = Recorded::observation(&mut self.index, node, Observed::CONTENT, ());
        let link = self.open_uncached(node, Open::Name)?;
        let text = rustix::fs::readlinkat(&link, "", Vec::new()).map_err(|error| self.failed(node, error))?;
        Ok(recorded.map(|()| text.into_bytes()))
    }

    /// The names of a node's extended attributes, sorted, each ended by a zero byte.
    ///
    /// # Errors
    /// As [`Tree::attributes`].
    pub fn xattrs(&mut self, node: NodeId) -> Result<Recorded<Vec<u8>>, Refusal> {
        Ok(self.all_xattrs(node, b"")?.map(|(names, _)| names))
    }

    /// The value of the extended attribute `name` of a node, `None` where it has none of that name. The name
    /// is compared with the host's list; only names from there are asked for.
    ///
    /// # Errors
    /// As [`Tree::attributes`].
    pub fn xattr(&mut self, node: NodeId, name: &[u8]) -> Result<Recorded<Option<Vec<u8>>>, Refusal> {
        Ok(self.all_xattrs(node, name)?.map(|(_, value)| value))
    }

    /// The names of a node's extended attributes, and the value of the one called `name`. All are read and
    /// hashed each time, so that the record has what was shown.
    fn all_xattrs(&mut self, node: NodeId, name: &[u8]) -> Result<Recorded<Xattrs>, Refusal> {
        if node == NodeId::TOP {
            return Ok(Recorded::constant((Vec::new(), None)));
        }
        let recorded = Recorded::observation(&mut self.index, node, Observed::XATTRS, ());
        let can_have = matches!(self.index.kind(node), Kind::Regular | Kind::Directory);
        if !can_have || self.index.no_xattrs(node) {
            return Ok(recorded.map(|()| (Vec::new(), None)));
        }
        let file = self.open(node)?;
        let (names, value, digest) = host::xattrs(&file, name).map_err(|error| self.failed(node, error))?;
        let shown = self.xattrs.get(&node).copied();
        if names.is_empty() && shown.is_none() {
            self.index.set_no_xattrs(node);
        } else if *self.xattrs.entry(node).or_insert(digest) != digest {
            self.changes.note(node, Change::Modified);
        }
        Ok(recorded.map(|()| (names, value)))
    }

    fn share(&self, node: NodeId) -> Option<&Mounted> {
        self.shares.get(usize::from(self.index.share(node)))
    }

    fn inode(&self, node: NodeId) -> u64 {
        match self.share(node) {
            Some(share) if share.attributes != Attributes::Real => {
                let path = self.index.path(node);
                InodeNames::within(&share.name, b"").number(&path)
            }
            _ => self.index.inode(node),
        }
    }

    /// Makes sure the children of a directory are known.
    fn fill(&mut self, directory: NodeId) -> Result<(), Refusal> {
        if self.index.kind(directory) != Kind::Directory {
            return Err(Refusal::constant(Errno::NOTDIR));
        }
        if directory == NodeId::TOP || self.index.filled(directory) {
            return Ok(());
        }
        let handle = self.open(directory)?;
        let names = self.index.name_bytes();
        self.fill_from(directory, &handle).map_err(|error| {
            self.index.drop_names(names);
            Refusal::change(&mut self.changes, directory, Change::Unreadable, error)
        })
    }

    fn fill_from(&mut self, directory: NodeId, handle: &OwnedFd) -> Result<(), Errno> {
        // What is compared at the end is what stood there when the listing began.
        let stat = host::stat_of(handle)?;
        if self.kernels.has(stat.st_dev, || Ok(handle))? {
            self.index.set_fingerprint(directory, &host::fingerprint_of(&stat))?;
            return Ok(self.index.fill(directory, Vec::new())?);
        }
        let before = self.index.fingerprint(directory);
        if self.is_real(directory) || before.is_some_and(|before| before.mode != stat.st_mode) {
            self.compare(directory, &stat);
        } else {
            self.index.set_fingerprint(directory, &host::fingerprint_of(&stat))?;
        }
        let mut children = Vec::new();
        let above = self.hides_in(directory);
        host::list(handle.as_fd(), |name, kind, inode| {
            let path = above.as_ref().map(|above| [above, name].concat());
            let hidden = |path: &Vec<u8>| {
                self.share(directory).is_some_and(|share| share.hidden.contains(path.as_slice()))
            };
            if path.as_ref().is_some_and(hidden) {
                return Ok(());
            }
            children.push(self.index.listed(name, kind, inode)?);
            Ok(())
        })?;
        Ok(self.index.fill(directory, children)?)
    }

    /// Makes sure it is known what a file looks like.
    fn state(&mut self, node: NodeId) -> Result<Fingerprint, Refusal> {
        self.look(node).map_err(|unseen| match unseen {
            Unseen::Refused(refusal) => refusal,
            Unseen::Failed(error) => self.failed(node, error),
        })
    }

    /// What a file looks like. That it cannot be told is not noted yet: nobody may have asked.
    fn look(&mut self, node: NodeId) -> Result<Fingerprint, Unseen> {
        if let Some(seen) = self.index.fingerprint(node) {
            return Ok(seen);
        }
        let directory = self.open(self.index.parent(node)).map_err(Unseen::Refused)?;
        let stat = host::stat_at(&directory, self.index.name(node)).map_err(Unseen::Failed)?;
        if host::kind_of(stat.st_mode) != Some(self.index.kind(node)) {
            return Err(Unseen::Failed(Errno::STALE));
        }
        if self.index.kind(node) == Kind::Regular {
            // A single file of the kernel's may be mounted over another.
            let file = || host::open_beneath(&directory, self.index.name(node), Open::Name);
            if self.kernels.has(stat.st_dev, file).map_err(Unseen::Failed)? {
                return Err(Unseen::Failed(Errno::OPNOTSUPP));
            }
        }
        self.keep_stat(node, &stat).map_err(|full| Unseen::Failed(full.into()))?;
        Ok(host::fingerprint_of(&stat))
    }

    fn keep_stat(&mut self, node: NodeId, stat: &Stat) -> Result<(), Full> {
        let listed = self.index.inode(node);
        self.index.set_fingerprint(node, &host::fingerprint_of(stat))?;
        if self.is_real(node) {
            self.extras.insert(node.place(), Extra::of(stat));
            if listed != stat.st_ino && self.index.parent(node) != NodeId::TOP {
                self.listed_inodes.insert(node, listed);
            }
        } else if matches!(self.index.kind(node), Kind::Character | Kind::Block) {
            let rdev = Extra::of(stat).rdev;
            self.extras.insert(node.place(), Extra { rdev, ..Default::default() });
        }
        Ok(())
    }

    fn is_real(&self, node: NodeId) -> bool {
        self.share(node).is_some_and(|share| share.attributes == Attributes::Real)
    }

    /// A regular file or directory, open, from the cache or opened now.
    fn open(&mut self, node: NodeId) -> Result<Arc<OwnedFd>, Refusal> {
        if let Some(handle) = self.handles.get(node.place()) {
            return Ok(handle);
        }
        let how = if self.index.kind(node) == Kind::Directory { Open::Directory } else { Open::Regular };
        let handle = Arc::new(self.open_uncached(node, how)?);
        while self.handles.full() {
            self.close_oldest();
        }
        self.handles.insert(node.place(), handle.clone());
        Ok(handle)
    }

    fn open_uncached(&mut self, node: NodeId, how: Open) -> Result<OwnedFd, Refusal> {
        let parent = self.index.parent(node);
        let beside = how != Open::Directory && parent != NodeId::TOP;
        let directory = if beside { Some(self.open(parent)?) } else { None };
        let opened = loop {
            let share = self.share(node).and_then(|share| share.directory.as_ref());
            let opened = match (&directory, share) {
                (Some(directory), _) => host::open_beneath(directory, self.index.name(node), how),
                (None, Some(share)) => host::open_beneath(share, &self.index.path(node), how),
                (None, None) => return Err(Refusal::constant(Errno::STALE)),
            };
            match opened {
                // The process has no descriptor left: give up one of ours, and fail only when there is none.
                Err(Errno::MFILE | Errno::NFILE) if self.close_oldest() => {}
                Err(error) => return Err(self.failed(node, error)),
                Ok(opened) => break opened,
            }
        };
        let stat = rustix::fs::fstat(&opened).map_err(|error| self.failed(node, error))?;
        let seen = self.index.fingerprint(node);
        let same = seen.is_none_or(|seen| (seen.device, seen.inode) == (stat.st_dev, stat.st_ino));
        if !same || host::kind_of(stat.st_mode) != Some(self.index.kind(node)) {
            return Err(Refusal::change(&mut self.changes, node, Change::Replaced, Errno::STALE));
        }
        // A directory's times say that entries came or went, which matters only where it was listed.
        if how != Open::Directory {
            self.compare(node, &stat);
        }
        Ok(opened)
    }

    fn close_oldest(&mut self) -> bool {
        let Some((place, file)) = self.handles.oldest() else { return false };
        self.look_again(place, &file);
        true
    }

    /// Notes whether an open file has changed, before it is closed.
    fn look_again(&mut self, place: u32, file: &OwnedFd) {
        let Some(node) = self.index.at(place) else { return };
        if self.index.kind(node) == Kind::Regular
            && let Ok(stat) = rustix::fs::fstat(file)
        {
            self.compare(node, &stat);
        }
    }

    fn compare(&mut self, node: NodeId, stat: &Stat) {
        let now = host::fingerprint_of(stat);
        if self.index.fingerprint(node).is_some_and(|seen| seen != now) {
            self.changes.note(node, Change::Modified);
        }
    }

    /// Notes that the host refused, and says what the guest is told.
    fn failed(&mut self, node: NodeId, error: Errno) -> Refusal {
        let (what, error) = match error {
            Errno::NOENT => (Change::Vanished, error),
            // A link or something else stands where a file or directory was listed.
            Errno::LOOP | Errno::NOTDIR | Errno::XDEV | Errno::STALE => (Change::Replaced, Errno::STALE),
            _ => (Change::Unreadable, error),
        };
        Refusal::change(&mut self.changes, node, what, error)
    }
}

/// Why it is not known what a file looks like.
enum Unseen {
    /// Its directory could not be opened, which is noted.
    Refused(Refusal),
    /// The host's word on the file itself, which is not.
    Failed(Errno),
}

/// Names of extended attributes, each ended by a zero byte, and the value that was asked for.
type Xattrs = (Vec<u8>, Option<Vec<u8>>);

impl From<Full> for Errno {
    fn from(_: Full) -> Self {
        Errno::NFILE
    }
}
