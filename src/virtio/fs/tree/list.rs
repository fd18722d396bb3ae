//! Listings of directories, and what comes along with them.

use super::{Found, Tree};
use crate::fs::index::NodeId;
use crate::fs::record::{Kind, Observed};
use crate::fs::recorded::{Recorded, Refusal};
use crate::fs::share::{Attributes, InodeNames};

/// What a listing is written to.
pub trait Page {
    /// Takes an entry: name, inode number, kind, and the position behind it. False where it wants no more.
    fn push(&mut self, name: &[u8], inode: u64, kind: Kind, next: u64) -> bool;

    /// Takes what is known of the entry that was pushed last.
    fn describe(&mut self, found: Recorded<Found>);
}

impl Tree {
    /// Entries of a directory from position `from` on. Position 0 is before `.`, 1 after it, 2 after `..`, then come
    /// the children in their order. For `walker`, a process of the guest's that can be told more than names, they are
    /// described where it is likely to ask for that of all of them.
    ///
    /// # Errors
    /// As [`Tree::lookup`].
    pub fn list(
        &mut self,
        directory: NodeId,
        from: u64,
        walker: Option<u32>,
        page: &mut impl Page,
    ) -> Result<Recorded<()>, Refusal> {
        self.fill(directory)?;
        let recorded = if directory == NodeId::TOP {
            // The numbers of directories are told here.
            self.by_name.values().for_each(|place| {
                self.index.observe(self.shares[usize::from(*place)].root, Observed::METADATA);
            });
            Recorded::constant(())
        } else {
            Recorded::observation(&mut self.index, directory, Observed::LISTING, ())
        };
        if let (0, Some(process)) = (from, walker) {
            self.walks.enters(process, directory, &self.index);
        }
        let mut next = from;
        let dots = [b".".as_slice(), b".."].into_iter().zip(self.dot_inodes(directory));
        for (dot, inode) in dots.skip(usize::try_from(from).unwrap_or(2)) {
            next = next.saturating_add(1);
            if !page.push(dot, inode, Kind::Directory, next) {
                return Ok(recorded);
            }
        }
        let first = from.saturating_sub(2);
        if directory == NodeId::TOP {
            for (name, place) in self.by_name.iter().skip(usize::try_from(first).unwrap_or(usize::MAX)) {
                let inode = self.inode(self.shares[usize::from(*place)].root);
                next = next.saturating_add(1);
                if !page.push(name, inode, Kind::Directory, next) {
                    break;
                }
            }
            return Ok(recorded);
        }
        let numbers = match self.share(directory) {
            Some(share) if share.attributes != Attributes::Real => {
                Some(InodeNames::within(&share.name, &self.index.path(directory)))
            }
            _ => None,
        };
        for child in self.index.children(directory, first) {
            let name = self.index.name(child);
            let inode = numbers.as_ref().map_or_else(|| self.listed_inode(child), |names| names.number(name));
            next = next.saturating_add(1);
            if !page.push(name, inode, self.index.kind(child), next) {
                break;
            }
            if walker.is_some_and(|process| self.walks.foresees(process, directory, child))
                && let Some(found) = self.foresee(child)
            {
                page.describe(found);
            }
        }
        Ok(recorded)
    }

    /// What [`Tree::lookup`] would say of a child, where nothing is in the way: whoever asks for it will hear of that.
    fn foresee(&mut self, child: NodeId) -> Option<Recorded<Found>> {
        self.look(child).ok()?;
        self.found(child).ok()
    }

    /// The inode number that stat(2) shows for a directory, and for its parent.
    fn dot_inodes(&self, directory: NodeId) -> [u64; 2] {
        let number = |node| if node == NodeId::TOP { 1 } else { self.inode(node) };
        [number(directory), number(self.index.parent(directory))]
    }

    /// The inode number that a listing of a share with real attributes shows.
    pub(super) fn listed_inode(&self, node: NodeId) -> u64 {
        self.listed_inodes.get(&node).copied().unwrap_or_else(|| self.index.inode(node))
    }
}
