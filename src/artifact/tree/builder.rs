//! Building a tree from names that come in any order, as archives and collectors give them.

use std::collections::BTreeMap;
use std::mem;

use super::{Kind, Node, Tree, TreeError, TreePath, within};

/// Builds a tree the way a file system does: names come, are replaced and linked in any order, and a hard link
/// is a second name of what the first names at that moment. For unpackers and collectors.
#[derive(Debug, Clone, Default)]
pub struct Builder {
    inodes: Vec<Option<Node>>,
    names: BTreeMap<TreePath, usize>,
}

impl Builder {
    /// A builder that holds only the root folder of [`Tree::new`].
    pub fn new() -> Self {
        let mut builder = Self::default();
        for (path, node) in Tree::new().nodes {
            builder.put(path, node);
        }
        builder
    }

    /// Puts `node` at `path`. A folder over a folder changes its metadata; anything else replaces what is there
    /// with all beneath it, while other names of it stay. `node` is no [`Kind::HardLink`]: see [`Self::link`].
    pub fn put(&mut self, path: TreePath, node: Node) {
        let is_folder = |node: &Node| matches!(node.kind, Kind::Directory);
        let merges = is_folder(&node) && self.get(&path).is_some_and(is_folder);
        if !merges {
            self.clear(&path);
        }
        self.names.insert(path, self.inodes.len());
        self.inodes.push(Some(node));
    }

    /// Makes `path` another name of what `existing` names now. Returns false, and does nothing, where that is
    /// missing or a folder.
    #[must_use]
    pub fn link(&mut self, path: TreePath, existing: &TreePath) -> bool {
        match self.get(existing) {
            None | Some(Node { kind: Kind::Directory, .. }) => return false,
            Some(_) => {}
        }
        let inode = self.names[existing];
        if path != *existing {
            self.clear(&path);
            self.names.insert(path, inode);
        }
        true
    }

    /// Takes out `path` and everything beneath it; other names of it stay.
    pub fn remove(&mut self, path: &TreePath) {
        self.clear(path);
        self.names.remove(path);
    }

    /// The node that `path` names.
    pub fn get(&self, path: &TreePath) -> Option<&Node> {
        self.names.get(path).and_then(|&inode| self.inodes[inode].as_ref())
    }

    /// How many names there are.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there is not even a root.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// The tree.
    ///
    /// # Errors
    /// [`TreeError`] where it is not well formed.
    pub fn finish(mut self) -> Result<Tree, TreeError> {
        let mut holders: BTreeMap<usize, TreePath> = BTreeMap::new();
        // In path order the first name of an inode is its smallest, which holds the node.
        let held = mem::take(&mut self.names).into_iter().filter_map(|(path, inode)| {
            match self.inodes[inode].take() {
                Some(node) => {
                    if !matches!(node.kind, Kind::Directory) {
                        holders.insert(inode, path.clone());
                    }
                    Some((path, node))
                }
                None => holders.get(&inode).map(|holder| (path, Node::hard_link(holder.clone()))),
            }
        });
        let tree = Tree { nodes: held.collect() };
        tree.check()?;
        Ok(tree)
    }

    /// Drops the names beneath `path`.
    fn clear(&mut self, path: &TreePath) {
        if !matches!(self.get(path), Some(Node { kind: Kind::Directory, .. })) {
            return;
        }
        let doomed: Vec<TreePath> = within(&self.names, path)
            .map(|(inner, _)| inner)
            .filter(|inner| *inner != path)
            .cloned()
            .collect();
        for inner in doomed {
            self.names.remove(&inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Meta;
    use super::*;

    fn path(text: &str) -> TreePath {
        TreePath::new(text.as_bytes()).expect("a good path")
    }

    fn node(kind: Kind, mode: u16) -> Node {
        Node { kind, meta: Meta { mode, ..Meta::default() } }
    }

    #[test]
    fn a_link_is_to_what_the_name_held_then() {
        let mut builder = Builder::new();
        builder.put(path("m"), node(Kind::Fifo, 1));
        assert!(builder.link(path("a"), &path("m")));
        builder.put(path("m"), node(Kind::Fifo, 2));
        assert!(builder.link(path("z"), &path("m")));
        assert!(builder.link(path("q"), &path("a")));
        builder.remove(&path("a"));
        assert!(!builder.link(path("x"), &path("missing")));
        assert!(!builder.link(path("x"), &TreePath::root()));
        let tree = builder.finish().expect("a good tree");
        let kinds: Vec<_> =
            tree.iter().skip(1).map(|(path, node)| (path.to_string(), node.clone())).collect();
        let expected =
            [("m", node(Kind::Fifo, 2)), ("q", node(Kind::Fifo, 1)), ("z", Node::hard_link(path("m")))];
        assert_eq!(kinds, expected.map(|(name, node)| (name.to_owned(), node)));
    }

    #[test]
    fn a_file_replaces_a_folder_whole_and_a_folder_merges() {
        let mut builder = Builder::new();
        builder.put(path("a"), node(Kind::Directory, 1));
        builder.put(path("a/b"), node(Kind::Fifo, 2));
        builder.put(path("a-b"), node(Kind::Fifo, 3));
        builder.put(path("a"), node(Kind::Directory, 4));
        assert_eq!(builder.len(), 4);
        assert_eq!(builder.get(&path("a")).map(|node| node.meta.mode), Some(4));
        builder.put(path("a"), node(Kind::Fifo, 5));
        assert_eq!(builder.get(&path("a/b")), None);
        builder.put(path("a"), node(Kind::Directory, 6));
        let tree = builder.finish().expect("a good tree");
        assert_eq!(tree.iter().skip(1).map(|(_, node)| node.meta.mode).collect::<Vec<_>>(), [6, 3]);
    }

    #[test]
    fn a_name_without_a_parent_fails_at_the_end() {
        let mut builder = Builder::new();
        builder.put(path("a/b"), node(Kind::Fifo, 0));
        assert_eq!(builder.finish(), Err(TreeError::NoParent(path("a/b"))));
    }
}
