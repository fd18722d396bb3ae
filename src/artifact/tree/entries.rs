//! A tree's nodes by number: who is in whom, which names are one inode. What writers of file systems lay out from.

use std::ops::Deref;

use super::{Kind, Node, Tree, TreePath};

/// A name of the tree.
pub(crate) struct Entry<'a> {
    pub path: &'a TreePath,
    pub node: &'a Node,
    /// Index of the folder it is in; the root's is its own.
    pub parent: usize,
    /// Index of the entry that holds the node: its own but for hard links.
    pub holder: usize,
}

/// All names of a tree, in path order.
pub(crate) struct Entries<'a> {
    list: Vec<Entry<'a>>,
    children: Vec<usize>,
    /// Where in `children` those of an entry begin.
    children_at: Vec<usize>,
}

impl<'a> Entries<'a> {
    /// Numbers a tree that is well formed.
    pub fn new(tree: &'a Tree) -> Self {
        let mut list: Vec<Entry<'_>> = Vec::with_capacity(tree.len());
        // In path order a folder's subtree follows it, so its ancestors are a stack.
        let mut folders: Vec<usize> = Vec::new();
        for (path, node) in tree.iter() {
            let index = list.len();
            while folders.last().is_some_and(|&folder| !path.is_within(list[folder].path)) {
                folders.pop();
            }
            let parent = folders.last().copied().unwrap_or(index);
            if matches!(node.kind, Kind::Directory) {
                folders.push(index);
            }
            let holder = match &node.kind {
                Kind::HardLink(holder) => list
                    .binary_search_by(|entry| entry.path.cmp(holder))
                    .expect("a well-formed tree has a link's holder before it"),
                _ => index,
            };
            list.push(Entry { path, node, parent, holder });
        }
        let (children_at, children) = children(&list);
        Self { list, children, children_at }
    }

    /// Whether the entry is an inode's first name.
    pub fn holds_inode(&self, index: usize) -> bool {
        self.list[index].holder == index
    }

    /// Indices of what is in a folder, by name.
    pub fn children(&self, index: usize) -> &[usize] {
        &self.children[self.children_at[index]..self.children_at[index + 1]]
    }

    /// The link count of each inode, by its first name; zero for the others. A folder has one for its own `.` and one
    /// for the `..` of each folder in it.
    pub fn links(&self) -> Vec<u32> {
        let mut links = vec![0; self.list.len()];
        for (index, entry) in self.list.iter().enumerate() {
            links[entry.holder] += 1;
            if matches!(entry.node.kind, Kind::Directory) {
                links[index] += 1;
                // The root is no entry of anything.
                if index > 0 {
                    links[entry.parent] += 1;
                }
            }
        }
        links
    }
}

impl<'a> Deref for Entries<'a> {
    type Target = [Entry<'a>];

    fn deref(&self) -> &[Entry<'a>] {
        &self.list
    }
}

/// The children of all folders one after the other, in path order, and where those of each entry begin.
fn children(entries: &[Entry<'_>]) -> (Vec<usize>, Vec<usize>) {
    let mut starts = vec![0; entries.len() + 1];
    for entry in &entries[1..] {
        starts[entry.parent + 1] += 1;
    }
    for index in 1..starts.len() {
        starts[index] += starts[index - 1];
    }
    let mut next = starts.clone();
    let mut children = vec![0; entries.len() - 1];
    for (index, entry) in entries.iter().enumerate().skip(1) {
        children[next[entry.parent]] = index;
        next[entry.parent] += 1;
    }
    (starts, children)
}
