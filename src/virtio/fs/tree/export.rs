//! How the record leaves the tree: what was read is looked at once more, and what was noted is given in parts, in
//! the order of a walk.

use kiln_digest::{Digest, Hasher};

use super::super::missed::ByDirectory;
use super::super::record::{Changed, Entry, Observed, PART_BYTES, PART_PATHS, PathBytes, RecordPart};
use super::{Mounted, NodeId, Tree};

impl Tree {
    /// Looks again at everything that is open or was listed, and notes what has changed since the guest was
    /// told. To be called when the guest's run is over, before [`Tree::export`].
    pub fn settle(&mut self) {
        for node in self.index.all() {
            if self.index.observed(node).contains(Observed::LISTING)
                && self.share(node).is_some_and(|share| share.directory.is_some())
                && let Ok(directory) = self.open(node)
                && let Ok(stat) = rustix::fs::fstat(&directory)
                // What of the kernel's is shown empty stays so, whatever its times say.
                && !self.kernels.knows(stat.st_dev)
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
        let missed = self.missed.by_directory();
        for share in &self.shares {
            give(RecordPart::Share(PathBytes(share.name.to_vec())))?;
            let mut entries = Parts::new(|part| give(RecordPart::Entries(part)));
            self.walk(share, None, |path, node| match node {
                Some(node) if !self.index.observed(node).is_empty() => {
                    entries.push(self.entry(path, node), path.len())
                }
                _ => Ok(()),
            })?;
            entries.end()?;
            let mut absent = Parts::new(|part| give(RecordPart::Missed(part)));
            self.walk(share, Some(&missed), |path, node| match node {
                Some(_) => Ok(()),
                None => absent.push(PathBytes(path.to_vec()), path.len()),
            })?;
            absent.end()?;
            let mut changed = Parts::new(|part| give(RecordPart::Changed(part)));
            if !self.changes.is_empty() {
                self.walk(share, None, |path, node| match node.and_then(|node| self.changes.of(node)) {
                    Some(what) => changed.push(Changed { path: PathBytes(path.to_vec()), what }, path.len()),
                    None => Ok(()),
                })?;
            }
            changed.end()?;
        }
        give(RecordPart::End { full: self.missed.full() })
    }

    /// Visits all nodes of a share with their paths, a directory before its children and they in their order.
    /// Where `missed` is given, what was missed is visited in its place, without a node.
    fn walk<E>(
        &self,
        share: &Mounted,
        missed: Option<&ByDirectory<'_>>,
        mut visit: impl FnMut(&[u8], Option<NodeId>) -> Result<(), E>,
    ) -> Result<(), E> {
        let inside = |node: NodeId, path_bytes: usize| {
            let absent = missed.map(|missed| missed.of(node.place())).unwrap_or_default();
            (path_bytes, self.index.children(node, 0).peekable(), absent.into_iter().peekable())
        };
        let mut path = Vec::new();
        visit(&path, Some(share.root))?;
        // A stack of its own: how deep a tree is, is for the host's files to say.
        let mut above = vec![inside(share.root, 0)];
        while let Some((path_bytes, children, absent)) = above.last_mut() {
            path.truncate(*path_bytes);
            if !path.is_empty() {
                path.push(b'/');
            }
            let child = children.peek().map(|child| self.index.name(*child));
            match absent.next_if(|name| child.is_none_or(|child| *name < child)) {
                Some(name) => {
                    path.extend(name);
                    visit(&path, None)?;
                }
                None => match children.next() {
                    Some(child) => {
                        path.extend(self.index.name(child));
                        visit(&path, Some(child))?;
                        if self.index.filled(child) {
                            above.push(inside(child, path.len()));
                        }
                    }
                    None => drop(above.pop()),
                },
            }
        }
        Ok(())
    }

    fn entry(&self, path: &[u8], node: NodeId) -> Entry {
        let observed = self.index.observed(node);
        let xattrs = observed.contains(Observed::XATTRS).then(|| match self.xattrs.get(&node) {
            Some(shown) => *shown,
            None => Digest::of(b""),
        });
        Entry {
            path: PathBytes(path.to_vec()),
            kind: self.index.kind(node),
            observed,
            fingerprint: self.index.fingerprint(node).unwrap_or_default(),
            extra: self.extras.get(&node.place()).copied(),
            listing: observed.contains(Observed::LISTING).then(|| self.listing(node)),
            xattrs,
        }
    }

    /// See [`Entry::listing`].
    fn listing(&self, directory: NodeId) -> Digest {
        let mut children: Vec<(char, NodeId)> =
            self.index.children(directory, 0).map(|child| (self.index.kind(child).letter(), child)).collect();
        // They are in the order of names.
        children.sort_by_key(|(letter, _)| *letter);
        let is_real = self.is_real(directory);
        let mut hasher = Hasher::default();
        for (letter, child) in children {
            hasher.update(letter.encode_utf8(&mut [0; 4]).as_bytes());
            hasher.update(self.index.name(child));
            if is_real {
                hasher.update(format!("/{}", self.listed_inode(child)).as_bytes());
            }
            hasher.update(b"\0");
        }
        hasher.finish().0
    }
}

/// Items, given on in parts of at most [`PART_PATHS`] and about [`PART_BYTES`].
struct Parts<T, F> {
    part: Vec<T>,
    bytes: usize,
    give: F,
}

impl<T, E, F: FnMut(Vec<T>) -> Result<(), E>> Parts<T, F> {
    fn new(give: F) -> Self {
        Self { part: Vec::new(), bytes: 0, give }
    }

    fn push(&mut self, item: T, bytes: usize) -> Result<(), E> {
        self.part.push(item);
        self.bytes += bytes;
        if self.part.len() < PART_PATHS && self.bytes < PART_BYTES {
            return Ok(());
        }
        self.bytes = 0;
        (self.give)(std::mem::take(&mut self.part))
    }

    fn end(mut self) -> Result<(), E> {
        if self.part.is_empty() { Ok(()) } else { (self.give)(self.part) }
    }
}
