//! The tree a guest sees: shares by name in a synthetic directory, the index beneath them, the record.
//!
//! Works on nodes and names and knows no FUSE. A guest's name is compared with names in the index and goes
//! nowhere else. Every function that gives something away notes it in the record first. Called by the server
//! (for the guest) and by the control side (shares come and go, the record is taken).

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::Stat;
use rustix::io::Errno;

use super::abi;
use super::host::{self, Handles, Open};
use super::index::{Full, Index, NodeId};
use super::record::{
    Change, Changed, Entry, Fingerprint, Kind, Missed, Observed, PART_BYTES, PART_PATHS, PathBytes,
    RecordPart,
};
use super::share::{Attributes, Extra, InodeNames, Share, is_name};

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

/// Everything behind one fs device.
pub struct Tree {
    index: Index,
    shares: Vec<Mounted>,
    by_name: BTreeMap<Box<[u8]>, u16>,
    handles: Handles,
    extras: BTreeMap<u32, Extra>,
    missed: Missed,
    changed: BTreeMap<NodeId, Change>,
    generation: u32,
}

impl From<Full> for Errno {
    fn from(_: Full) -> Self {
        Errno::NFILE
    }
}

impl Tree {
    /// A tree without shares, that keeps at most `open_files` descriptors of theirs open.
    pub fn new(open_files: usize) -> Self {
        Self {
            index: Index::new(),
            shares: Vec::new(),
            by_name: BTreeMap::new(),
            handles: Handles::new(open_files),
            extras: BTreeMap::new(),
            missed: Missed::default(),
            changed: BTreeMap::new(),
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
        let stat = rustix::fs::fstat(&share.directory).map_err(AddShareError::Stat)?;
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

    /// The node the driver calls `nodeid`.
    ///
    /// # Errors
    /// ESTALE where the driver does not hold it, or its share is gone.
    pub fn held(&self, nodeid: u64) -> Result<NodeId, Errno> {
        let node = self.index.held(nodeid).ok_or(Errno::STALE)?;
        let gone = node != NodeId::TOP && self.share(node).is_none_or(|share| share.directory.is_none());
        if gone { Err(Errno::STALE) } else { Ok(node) }
    }

    /// Counts one lookup, for an answer that names the node.
    pub fn hold(&mut self, node: NodeId) {
        self.index.hold(node);
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

    /// The node called `name` in `directory`; `None` where there is none, which is noted too.
    ///
    /// # Errors
    /// What the host said where it would not answer; this is noted as well.
    pub fn lookup(&mut self, directory: NodeId, name: &[u8]) -> Result<Option<NodeId>, Errno> {
        if directory == NodeId::TOP {
            return Ok(self.by_name.get(name).map(|place| self.shares[usize::from(*place)].root));
        }
        self.fill(directory)?;
        let Some(node) = self.index.child(directory, name) else {
            self.missed.insert(directory.place(), name);
            return Ok(None);
        };
        self.state(node)?;
        Ok(Some(node))
    }

    /// The attributes of a node.
    ///
    /// # Errors
    /// As [`Tree::lookup`].
    pub fn attributes(&mut self, node: NodeId) -> Result<abi::Attr, Errno> {
        if node == NodeId::TOP {
            return Ok(abi::Attr {
                ino: 1.into(),
                mode: 0o40555.into(),
                nlink: 1.into(),
                // A listing the driver has cached holds as long as the modification time does.
                mtime_nanos: (self.generation % 1_000_000_000).into(),
                block_size: 4096.into(),
                ..Default::default()
            });
        }
        let seen = self.state(node)?;
        let kind = self.index.kind(node);
        let mut observed = Observed::METADATA;
        observed.set(Observed::CONTENT, kind == Kind::Regular && seen.size_bytes == 0);
        self.index.observe(node, observed);
        let extra = self.extras.get(&node.place()).copied().unwrap_or_default();
        let inode = self.inode(node);
        let share = self.share(node).ok_or(Errno::STALE)?;
        Ok(share.attributes.show(inode, &seen, kind, extra))
    }

    /// Entries of a directory from position `from` on: `each` gets name, inode number and kind, and returns
    /// false when it wants no more.
    ///
    /// # Errors
    /// As [`Tree::lookup`]; ENOTDIR where it is not a directory.
    pub fn list(
        &mut self,
        directory: NodeId,
        from: u64,
        mut each: impl FnMut(&[u8], u64, Kind) -> bool,
    ) -> Result<(), Errno> {
        if directory == NodeId::TOP {
            let from = usize::try_from(from).unwrap_or(usize::MAX);
            for (name, place) in self.by_name.iter().skip(from) {
                let inode = self.inode(self.shares[usize::from(*place)].root);
                if !each(name, inode, Kind::Directory) {
                    break;
                }
            }
            return Ok(());
        }
        self.fill(directory)?;
        self.index.observe(directory, Observed::LISTING);
        let numbers = match self.share(directory) {
            Some(share) if share.attributes != Attributes::Real => {
                Some(InodeNames::within(&share.name, &self.index.path(directory)))
            }
            _ => None,
        };
        for child in self.index.children(directory, from) {
            let name = self.index.name(child);
            let inode = match &numbers {
                Some(numbers) => numbers.number(name),
                None => self.index.inode(child),
            };
            if !each(name, inode, self.index.kind(child)) {
                break;
            }
        }
        Ok(())
    }

    /// The inode number that stat(2) shows for a directory, and for its parent.
    pub fn dot_inodes(&self, directory: NodeId) -> [u64; 2] {
        if directory == NodeId::TOP {
            return [1, 1];
        }
        let parent = self.index.parent(directory);
        [self.inode(directory), if parent == NodeId::TOP { 1 } else { self.inode(parent) }]
    }

    /// A regular file, opened for reading.
    ///
    /// # Errors
    /// EISDIR and EINVAL where it is none, otherwise as [`Tree::lookup`].
    pub fn content(&mut self, node: NodeId) -> Result<Arc<OwnedFd>, Errno> {
        match self.kind(node) {
            Kind::Regular => {}
            Kind::Directory => return Err(Errno::ISDIR),
            _ => return Err(Errno::INVAL),
        }
        self.index.observe(node, Observed::CONTENT);
        self.open(node)
    }

    /// The text of a link.
    ///
    /// # Errors
    /// EINVAL where it is none, otherwise as [`Tree::lookup`].
    pub fn link_text(&mut self, node: NodeId) -> Result<Vec<u8>, Errno> {
        if self.kind(node) != Kind::Link {
            return Err(Errno::INVAL);
        }
        self.index.observe(node, Observed::CONTENT);
        let link = self.open_uncached(node, Open::Name)?;
        let text = rustix::fs::readlinkat(&link, "", Vec::new())?;
        Ok(text.into_bytes())
    }

    /// The names of a node's extended attributes, sorted, each ended by a zero byte.
    ///
    /// # Errors
    /// As [`Tree::lookup`].
    pub fn xattrs(&mut self, node: NodeId) -> Result<Vec<u8>, Errno> {
        let Some(file) = self.xattr_file(node)? else { return Ok(Vec::new()) };
        let names = host::list_xattrs(&file)?;
        let mut sorted: Vec<&[u8]> = names.split_inclusive(|byte| *byte == 0).collect();
        sorted.sort_unstable();
        Ok(sorted.concat())
    }

    /// The value of the extended attribute `name` of a node, `None` where it has none of that name. The name
    /// is compared with the host's list; only a name from there is asked for.
    ///
    /// # Errors
    /// As [`Tree::lookup`].
    pub fn xattr(&mut self, node: NodeId, name: &[u8]) -> Result<Option<Vec<u8>>, Errno> {
        let Some(file) = self.xattr_file(node)? else { return Ok(None) };
        let names = host::list_xattrs(&file)?;
        match names.split(|byte| *byte == 0).find(|listed| !name.is_empty() && *listed == name) {
            Some(listed) => host::xattr(&file, listed).map(Some),
            None => Ok(None),
        }
    }

    fn xattr_file(&mut self, node: NodeId) -> Result<Option<Arc<OwnedFd>>, Errno> {
        if node == NodeId::TOP {
            return Ok(None);
        }
        self.index.observe(node, Observed::XATTRS);
        let can_have = matches!(self.kind(node), Kind::Regular | Kind::Directory);
        if !can_have || self.index.no_xattrs(node) {
            return Ok(None);
        }
        let file = self.open(node)?;
        if host::list_xattrs(&file)?.is_empty() {
            self.index.set_no_xattrs(node);
            return Ok(None);
        }
        Ok(Some(file))
    }

    /// What a node is.
    pub fn kind(&self, node: NodeId) -> Kind {
        self.index.kind(node)
    }

    /// True for the directory of a share, whose name may come and go.
    pub fn is_share(&self, node: NodeId) -> bool {
        node != NodeId::TOP && self.index.parent(node) == NodeId::TOP
    }

    /// Looks again at everything that is open or was listed, and notes what has changed since the guest was
    /// told. To be called when the guest's run is over, before [`Tree::export`].
    pub fn settle(&mut self) {
        let listed: Vec<NodeId> =
            self.index.all().filter(|node| self.index.observed(*node).contains(Observed::LISTING)).collect();
        for node in listed {
            if self.share(node).is_some_and(|share| share.directory.is_some())
                && let Ok(directory) = self.open(node)
                && let Ok(stat) = rustix::fs::fstat(&directory)
            {
                self.compare(node, &stat);
            }
        }
        while let Some((place, file)) = self.handles.oldest() {
            self.look_again(place, &file);
        }
    }

    /// Gives the record to `give`, in parts, and stops at its first error.
    ///
    /// # Errors
    /// What `give` fails with.
    pub fn export<E>(&self, mut give: impl FnMut(RecordPart) -> Result<(), E>) -> Result<(), E> {
        let in_share = |place: usize, node: NodeId| usize::from(self.index.share(node)) == place;
        for (place, share) in self.shares.iter().enumerate() {
            give(RecordPart::Share(PathBytes(share.name.to_vec())))?;
            let entries = self.index.all().filter(|node| in_share(place, *node));
            let entries = entries.filter(|node| !self.index.observed(*node).is_empty());
            let entries = entries.map(|node| Entry {
                path: PathBytes(self.index.path(node)),
                kind: self.index.kind(node),
                observed: self.index.observed(node),
                fingerprint: self.index.fingerprint(node).unwrap_or_default(),
            });
            in_parts(entries, |entry| entry.path.0.len(), |part| give(RecordPart::Entries(part)))?;
            let missed = self.missed.iter().filter_map(|(directory, name)| {
                let directory = self.index.at(directory).filter(|node| in_share(place, *node))?;
                let path = self.index.path(directory);
                let separator: &[u8] = if path.is_empty() { b"" } else { b"/" };
                Some(PathBytes([&path, separator, name].concat()))
            });
            in_parts(missed, |path| path.0.len(), |part| give(RecordPart::Missed(part)))?;
            let changed = self.changed.iter().filter(|(node, _)| in_share(place, **node));
            let changed =
                changed.map(|(node, what)| Changed { path: PathBytes(self.index.path(*node)), what: *what });
            in_parts(changed, |entry| entry.path.0.len(), |part| give(RecordPart::Changed(part)))?;
        }
        give(RecordPart::End { complete: !self.missed.overflowed() })
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
    fn fill(&mut self, directory: NodeId) -> Result<(), Errno> {
        if self.kind(directory) != Kind::Directory {
            return Err(Errno::NOTDIR);
        }
        if self.index.filled(directory) {
            return Ok(());
        }
        let handle = self.open(directory)?;
        let names = self.index.name_bytes();
        let result = (|| {
            // What is compared at the end is what stood there when the listing began.
            let stat = rustix::fs::fstat(&handle)?;
            let before = self.index.fingerprint(directory);
            let shows_times = self.share(directory).is_some_and(|share| share.attributes == Attributes::Real);
            if shows_times || before.is_some_and(|before| before.mode != stat.st_mode) {
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
        })();
        result.inspect_err(|_| {
            self.index.drop_names(names);
            self.note_change(directory, Change::Unreadable);
        })
    }

    /// Makes sure it is known what a file looks like.
    fn state(&mut self, node: NodeId) -> Result<Fingerprint, Errno> {
        if let Some(seen) = self.index.fingerprint(node) {
            return Ok(seen);
        }
        let directory = self.open(self.index.parent(node))?;
        let stat = match host::stat_at(&directory, self.index.name(node)) {
            Ok(stat) => stat,
            Err(error) => return Err(self.failed(node, error)),
        };
        if host::kind_of(stat.st_mode) != Some(self.kind(node)) {
            self.note_change(node, Change::Replaced);
            return Err(Errno::STALE);
        }
        self.keep_stat(node, &stat)?;
        Ok(host::fingerprint_of(&stat))
    }

    fn keep_stat(&mut self, node: NodeId, stat: &Stat) -> Result<(), Full> {
        self.index.set_fingerprint(node, &host::fingerprint_of(stat))?;
        let real = self.share(node).is_some_and(|share| share.attributes == Attributes::Real);
        if real {
            self.extras.insert(node.place(), Extra::of(stat));
        } else if matches!(self.kind(node), Kind::Character | Kind::Block) {
            let rdev = Extra::of(stat).rdev;
            self.extras.insert(node.place(), Extra { rdev, ..Default::default() });
        }
        Ok(())
    }

    /// A regular file or directory, open, from the cache or opened now.
    fn open(&mut self, node: NodeId) -> Result<Arc<OwnedFd>, Errno> {
        if let Some(handle) = self.handles.get(node.place()) {
            return Ok(handle);
        }
        let how = if self.kind(node) == Kind::Directory { Open::Directory } else { Open::Regular };
        let handle = Arc::new(self.open_uncached(node, how)?);
        while self.handles.full() {
            self.close_oldest();
        }
        self.handles.insert(node.place(), handle.clone());
        Ok(handle)
    }

    fn open_uncached(&mut self, node: NodeId, how: Open) -> Result<OwnedFd, Errno> {
        let opened = loop {
            match self.open_once(node, how) {
                // The process has no descriptor left: give up one of ours, and fail only when there is none.
                Err(Errno::MFILE | Errno::NFILE) if self.close_oldest() => {}
                Err(error) => return Err(self.failed(node, error)),
                Ok(opened) => break opened,
            }
        };
        let stat = rustix::fs::fstat(&opened)?;
        let seen = self.index.fingerprint(node);
        let same = seen.is_none_or(|seen| (seen.device, seen.inode) == (stat.st_dev, stat.st_ino));
        if !same || host::kind_of(stat.st_mode) != Some(self.kind(node)) {
            self.note_change(node, Change::Replaced);
            return Err(Errno::STALE);
        }
        // A directory's times say that entries came or went, which matters only where it was listed.
        if how != Open::Directory {
            self.compare(node, &stat);
        }
        Ok(opened)
    }

    fn open_once(&mut self, node: NodeId, how: Open) -> Result<OwnedFd, Errno> {
        let parent = self.index.parent(node);
        if how != Open::Directory && parent != NodeId::TOP {
            let directory = self.open(parent)?;
            return host::open_beneath(&directory, self.index.name(node), how);
        }
        let share = self.share(node).and_then(|share| share.directory.as_ref()).ok_or(Errno::STALE)?;
        host::open_beneath(share, &self.index.path(node), how)
    }

    fn close_oldest(&mut self) -> bool {
        let Some((place, file)) = self.handles.oldest() else { return false };
        self.look_again(place, &file);
        true
    }

    /// Notes whether an open file has changed, before it is closed.
    fn look_again(&mut self, place: u32, file: &OwnedFd) {
        let Some(node) = self.index.at(place) else { return };
        if self.kind(node) == Kind::Regular
            && let Ok(stat) = rustix::fs::fstat(file)
        {
            self.compare(node, &stat);
        }
    }

    fn compare(&mut self, node: NodeId, stat: &Stat) {
        let now = host::fingerprint_of(stat);
        if self.index.fingerprint(node).is_some_and(|seen| seen != now) {
            self.note_change(node, Change::Modified);
        }
    }

    fn note_change(&mut self, node: NodeId, what: Change) {
        self.changed.entry(node).or_insert(what);
    }

    /// Notes that the host refused, and says what the guest is told.
    fn failed(&mut self, node: NodeId, error: Errno) -> Errno {
        match error {
            Errno::NOENT => self.note_change(node, Change::Vanished),
            // A link or something else stands where a file or directory was listed.
            Errno::LOOP | Errno::NOTDIR | Errno::XDEV => {
                self.note_change(node, Change::Replaced);
                return Errno::STALE;
            }
            Errno::STALE => {}
            _ => self.note_change(node, Change::Unreadable),
        }
        error
    }
}

/// Gives `items` in parts of at most [`PART_PATHS`] and about [`PART_BYTES`].
fn in_parts<T, E>(
    items: impl Iterator<Item = T>,
    length_of: impl Fn(&T) -> usize,
    mut give: impl FnMut(Vec<T>) -> Result<(), E>,
) -> Result<(), E> {
    let (mut part, mut bytes) = (Vec::new(), 0);
    for item in items {
        bytes += length_of(&item);
        part.push(item);
        if part.len() == PART_PATHS || bytes >= PART_BYTES {
            give(std::mem::take(&mut part))?;
            bytes = 0;
        }
    }
    if part.is_empty() { Ok(()) } else { give(part) }
}
