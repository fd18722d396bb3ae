//! What differs between two trees, path by path.

use std::cmp::Ordering;
use std::iter::Peekable;

use super::{Kind, Meta, Node, Tree, TreePath};

/// How a path of two trees differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Difference {
    /// Only the second tree has it.
    Added,
    /// Only the first tree has it.
    Removed,
    /// Both have it; in what it differs, in the order of [`Aspect`].
    Changed(Vec<Aspect>),
}

/// In what a path may differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Aspect {
    /// What it is: a file, a folder, a link, ….
    Kind,
    /// A file's bytes, a link's text, a device's number.
    Content,
    /// Permissions.
    Mode,
    /// User or group.
    Owner,
    /// Modification time.
    Time,
    /// Extended attributes.
    Xattrs,
    /// Of which names it is another one.
    Links,
}

impl Aspect {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Kind, Self::Content, Self::Mode, Self::Owner, Self::Time, Self::Xattrs, Self::Links];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kind => "kind",
            Self::Content => "content",
            Self::Mode => "mode",
            Self::Owner => "owner",
            Self::Time => "time",
            Self::Xattrs => "xattrs",
            Self::Links => "links",
        }
    }
}

impl Tree {
    /// What is another in `new` than in this tree, in path order. A hard link is compared as the file that it is.
    pub fn differences<'a>(&'a self, new: &'a Self) -> impl Iterator<Item = (&'a TreePath, Difference)> {
        Differences { old: self, new, left: self.nodes.iter().peekable(), right: new.nodes.iter().peekable() }
    }

    /// The node that `path` shows: a hard link's is its holder's.
    pub fn shown(&self, path: &TreePath) -> Option<&Node> {
        match self.nodes.get(path) {
            Some(Node { kind: Kind::HardLink(holder), .. }) => self.nodes.get(holder),
            node => node,
        }
    }
}

type Nodes<'a> = Peekable<std::collections::btree_map::Iter<'a, TreePath, Node>>;

struct Differences<'a> {
    old: &'a Tree,
    new: &'a Tree,
    left: Nodes<'a>,
    right: Nodes<'a>,
}

impl<'a> Iterator for Differences<'a> {
    type Item = (&'a TreePath, Difference);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let order = match (self.left.peek(), self.right.peek()) {
                (None, None) => return None,
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some((old, _)), Some((new, _))) => old.cmp(new),
            };
            match order {
                Ordering::Less => return self.left.next().map(|(path, _)| (path, Difference::Removed)),
                Ordering::Greater => return self.right.next().map(|(path, _)| (path, Difference::Added)),
                Ordering::Equal => {
                    let ((path, old), (_, new)) = self.left.next().zip(self.right.next())?;
                    let aspects = self.aspects(path, old, new);
                    if !aspects.is_empty() {
                        return Some((path, Difference::Changed(aspects)));
                    }
                }
            }
        }
    }
}

impl Differences<'_> {
    fn aspects(&self, path: &TreePath, old: &Node, new: &Node) -> Vec<Aspect> {
        let (Some(shown_old), Some(shown_new)) = (self.old.shown(path), self.new.shown(path)) else {
            return Vec::new();
        };
        let mut aspects = Vec::new();
        if std::mem::discriminant(&shown_old.kind) != std::mem::discriminant(&shown_new.kind) {
            aspects.push(Aspect::Kind);
        } else if shown_old.kind != shown_new.kind {
            aspects.push(Aspect::Content);
        }
        let (a, b): (&Meta, &Meta) = (&shown_old.meta, &shown_new.meta);
        let differs = [
            (Aspect::Mode, a.mode != b.mode),
            (Aspect::Owner, (a.uid, a.gid) != (b.uid, b.gid)),
            (Aspect::Time, a.mtime != b.mtime),
            (Aspect::Xattrs, a.xattrs != b.xattrs),
            (Aspect::Links, holder(old) != holder(new)),
        ];
        aspects.extend(differs.into_iter().filter(|(_, differs)| *differs).map(|(aspect, _)| aspect));
        aspects
    }
}

fn holder(node: &Node) -> Option<&TreePath> {
    match &node.kind {
        Kind::HardLink(holder) => Some(holder),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use kiln_digest::Digest;
    use proptest::prelude::*;

    use super::super::{Timestamp, sample};
    use super::*;

    fn path(text: &str) -> TreePath {
        TreePath::new(text.as_bytes()).expect("a good path")
    }

    fn file(text: &str) -> Node {
        let kind = Kind::File { digest: Digest::of(text.as_bytes()), size: text.len() as u64 };
        Node { kind, meta: Meta { mode: 0o644, ..Meta::default() } }
    }

    #[test]
    fn every_aspect_is_told_from_the_others() {
        let mut old = Tree::new();
        for name in ["a", "b", "c", "d", "e", "f", "g", "h", "removed", "same"] {
            old.insert(path(name), file("old"));
        }
        old.insert(path("i"), Node::hard_link(path("h")));
        let mut new = old.clone();
        let mut change = |name: &str, with: &dyn Fn(&mut Node)| {
            with(new.get_mut(&path(name)).expect("it is there"));
        };
        change("a", &|node| node.kind = Kind::Fifo);
        change("b", &|node| node.kind = file("new").kind);
        change("c", &|node| node.meta.mode = 0o755);
        change("d", &|node| node.meta.gid = 1);
        change("e", &|node| node.meta.mtime = Timestamp { seconds: 0, nanoseconds: 1 });
        change("f", &|node| drop(node.meta.xattrs.insert(b"user.a".to_vec(), vec![])));
        change("g", &|node| {
            *node = file("newer");
            node.meta.uid = 7;
        });
        change("i", &|node| *node = file("old"));
        new.nodes.remove(&path("removed"));
        new.insert(path("added"), file("x"));
        let found: Vec<(String, Difference)> =
            old.differences(&new).map(|(path, difference)| (path.to_string(), difference)).collect();
        let changed = |aspects: &[Aspect]| Difference::Changed(aspects.to_vec());
        let expected = [
            ("a", changed(&[Aspect::Kind])),
            ("added", Difference::Added),
            ("b", changed(&[Aspect::Content])),
            ("c", changed(&[Aspect::Mode])),
            ("d", changed(&[Aspect::Owner])),
            ("e", changed(&[Aspect::Time])),
            ("f", changed(&[Aspect::Xattrs])),
            ("g", changed(&[Aspect::Content, Aspect::Owner])),
            ("i", changed(&[Aspect::Links])),
            ("removed", Difference::Removed),
        ];
        assert_eq!(found, expected.map(|(path, difference)| (path.to_owned(), difference)));
    }

    #[test]
    fn a_link_to_a_file_that_changed_has_changed_too() {
        let mut old = Tree::new();
        old.insert(path("a"), file("old"));
        old.insert(path("b"), Node::hard_link(path("a")));
        let mut new = old.clone();
        new.insert(path("a"), file("new"));
        let found: Vec<&TreePath> = old.differences(&new).map(|(path, _)| path).collect();
        assert_eq!(found, [&path("a"), &path("b")]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn trees_differ_where_their_digests_do(old in sample::trees(), new in sample::trees()) {
            prop_assert_eq!(old.differences(&old).next(), None);
            prop_assert_eq!(old.differences(&new).next().is_none(), old.digest() == new.digest());
            let back: Vec<_> = new.differences(&old).map(|(path, _)| path.clone()).collect();
            let forth: Vec<_> = old.differences(&new).map(|(path, _)| path.clone()).collect();
            prop_assert_eq!(back, forth);
        }
    }
}
