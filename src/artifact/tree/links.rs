//! Hard links: bringing them into the one canonical form, where the smallest path of a set holds the node.

use std::collections::BTreeMap;
use std::mem;

use super::{Kind, Meta, Node, Tree, TreeError, TreePath};

impl Node {
    /// A further name of what `holder` holds.
    pub fn hard_link(holder: TreePath) -> Self {
        Self { kind: Kind::HardLink(holder), meta: Meta::default() }
    }
}

impl Tree {
    /// Makes hard links canonical. Before, a [`Kind::HardLink`] may name any other member of its set, a link
    /// included, and its `meta` is ignored; afterwards the smallest path holds the node and the others name it.
    ///
    /// # Errors
    /// [`TreeError::BadLink`] where a link ends at nothing, at a folder or in a circle; the tree is then unchanged.
    pub fn canonicalise_hard_links(&mut self) -> Result<(), TreeError> {
        let holders = self.resolve_links()?;
        let mut smallest: BTreeMap<&TreePath, &TreePath> = BTreeMap::new();
        for (link, holder) in &holders {
            // Links come in path order: the first of a set is its smallest.
            smallest.entry(holder).or_insert_with(|| link.min(holder));
        }
        for (holder, first) in &smallest {
            if first != holder
                && let Some(node) = self.nodes.insert((*holder).clone(), Node::hard_link((*first).clone()))
            {
                self.nodes.insert((*first).clone(), node);
            }
        }
        for (link, holder) in &holders {
            let first = smallest[holder];
            if link != first {
                self.nodes.insert(link.clone(), Node::hard_link(first.clone()));
            }
        }
        Ok(())
    }

    /// Every hard link with the path where its chain ends.
    fn resolve_links(&self) -> Result<BTreeMap<TreePath, TreePath>, TreeError> {
        let mut holders: BTreeMap<TreePath, TreePath> = BTreeMap::new();
        let mut chain = Vec::new();
        for (path, node) in &self.nodes {
            let Kind::HardLink(target) = &node.kind else { continue };
            let (mut link, mut next) = (path, target);
            let holder = loop {
                let bad = || TreeError::BadLink { path: link.clone(), target: next.clone() };
                if let Some(holder) = holders.get(link) {
                    break holder.clone();
                }
                chain.push(link);
                match self.nodes.get(next).map(|node| &node.kind) {
                    // A chain with more links than there are nodes has met one twice.
                    None | Some(Kind::Directory) => return Err(bad()),
                    Some(_) if chain.len() > self.nodes.len() => return Err(bad()),
                    Some(Kind::HardLink(further)) => (link, next) = (next, further),
                    Some(_) => break next.clone(),
                }
            };
            holders.extend(chain.drain(..).map(|link| (link.clone(), holder.clone())));
        }
        Ok(holders)
    }

    /// Takes out `path` and everything beneath it; the root cannot be taken out, only what is in it. A hard-link
    /// set that loses its first path goes on under its next. Costs a pass over the tree: for many, [`Self::retain`].
    pub fn remove_subtree(&mut self, path: &TreePath) {
        let doomed: Vec<TreePath> =
            self.subtree(path).map(|(path, _)| path.clone()).filter(|path| !path.is_root()).collect();
        let removed = doomed.iter().filter_map(|path| self.nodes.remove_entry(path)).collect();
        self.rehome(removed);
    }

    /// What lies at and beneath `folder`, as a tree of its own. A further name of a file whose node stays behind has the
    /// node itself.
    pub fn below(&self, folder: &TreePath) -> Self {
        let start = if folder.is_root() { 0 } else { folder.as_bytes().len() + 1 };
        // The end of a good path is a good path.
        let place = |path: &TreePath| TreePath::new(path.as_bytes().get(start..).unwrap_or_default()).ok();
        let mut below = Self::default();
        for (path, node) in self.subtree(folder) {
            let mut node = node.clone();
            if let Kind::HardLink(holder) = &node.kind {
                let holder = holder.clone();
                match self.shown(path).filter(|_| !holder.is_within(folder)) {
                    Some(shown) => node = shown.clone(),
                    None => node.kind = Kind::HardLink(place(&holder).unwrap_or(holder)),
                }
            }
            if let Some(place) = place(path) {
                below.insert(place, node);
            }
        }
        below
    }

    /// Keeps the nodes for which `keep` is true. What lies beneath a folder that goes must go too, or
    /// [`Tree::check`] fails afterwards. Hard-link sets go on under their smallest path that stays.
    pub fn retain(&mut self, mut keep: impl FnMut(&TreePath, &Node) -> bool) {
        let mut removed = BTreeMap::new();
        let nodes = mem::take(&mut self.nodes);
        self.nodes = nodes
            .into_iter()
            .filter_map(|(path, node)| {
                if keep(&path, &node) {
                    return Some((path, node));
                }
                removed.insert(path, node);
                None
            })
            .collect();
        self.rehome(removed);
    }

    /// Mends the links of a tree that was canonical before `removed` was taken out of it.
    pub(super) fn rehome(&mut self, mut removed: BTreeMap<TreePath, Node>) {
        removed.retain(|_, node| !matches!(node.kind, Kind::HardLink(_) | Kind::Directory));
        if removed.is_empty() {
            return;
        }
        let mut moved: BTreeMap<TreePath, TreePath> = BTreeMap::new();
        for (path, node) in &mut self.nodes {
            let Kind::HardLink(target) = &mut node.kind else { continue };
            if let Some(heir) = moved.get(target) {
                *target = heir.clone();
            } else if let Some((old, inherited)) = removed.remove_entry(target) {
                moved.insert(old, path.clone());
                *node = inherited;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> TreePath {
        TreePath::new(text.as_bytes()).expect("a good path")
    }

    /// A tree of FIFOs (`name`) and hard links (`name>target`), each FIFO with a mode of its own.
    fn tree(entries: &[&str]) -> Tree {
        let mut tree = Tree::new();
        for (entry, mode) in entries.iter().zip(1..) {
            match entry.split_once('>') {
                Some((link, target)) => tree.insert(path(link), Node::hard_link(path(target))),
                None => tree.insert(
                    path(entry),
                    Node { kind: Kind::Fifo, meta: Meta { mode: mode & 0o7777, ..Meta::default() } },
                ),
            };
        }
        tree
    }

    #[test]
    fn what_lies_below_a_folder_is_a_tree_with_links_that_hold() {
        let mut tree = tree(&["a", "d/b>a", "d/c", "d/d>d/c", "d/e/f>d/c", "da"]);
        let folder = Node { kind: Kind::Directory, meta: Meta { mode: 0o700, ..Meta::default() } };
        tree.insert(path("d"), folder.clone());
        tree.insert(path("d/e"), folder.clone());
        let below = tree.below(&path("d"));
        assert_eq!(shown(&below), ["b=1", "c=3", "d>c", "e=448", "e/f>c"]);
        assert_eq!(below.get(&TreePath::root()), Some(&folder));
        assert_eq!(below.check(), Ok(()));
        assert_eq!(tree.below(&TreePath::root()), tree);
    }

    fn shown(tree: &Tree) -> Vec<String> {
        tree.iter()
            .filter(|(path, _)| !path.is_root())
            .map(|(path, node)| match &node.kind {
                Kind::HardLink(target) => format!("{path}>{target}"),
                _ => format!("{path}={}", node.meta.mode),
            })
            .collect()
    }

    #[test]
    fn links_in_any_order_become_canonical() {
        let mut tree = tree(&["m", "a>m", "z>a", "b>z", "q>b", "other", "c>other"]);
        tree.canonicalise_hard_links().expect("good links");
        assert_eq!(shown(&tree), ["a=1", "b>a", "c=6", "m>a", "other>c", "q>a", "z>a"]);
        assert_eq!(tree.check(), Ok(()));
        let before = tree.clone();
        tree.canonicalise_hard_links().expect("good links");
        assert_eq!(tree, before);
    }

    #[test]
    fn links_to_nothing_folders_and_in_circles_are_refused() {
        for entries in [&["a>b"][..], &["a>a"], &["a>b", "b>a"], &["a>b", "b>c", "c>b"], &["x", "a>"]] {
            let mut tree = tree(entries);
            let before = tree.clone();
            assert!(matches!(tree.canonicalise_hard_links(), Err(TreeError::BadLink { .. })), "{entries:?}");
            assert_eq!(tree, before);
        }
    }

    #[test]
    fn a_long_chain_costs_no_more_than_its_length() {
        let mut entries: Vec<String> = (0..20_000).map(|n| format!("{n:05}>{:05}", n + 1)).collect();
        entries.push("20000".into());
        let mut tree = tree(&entries.iter().map(String::as_str).collect::<Vec<_>>());
        tree.canonicalise_hard_links().expect("good links");
        assert_eq!(tree.check(), Ok(()));
        assert_eq!(tree.get(&path("19999")).map(|node| &node.kind), Some(&Kind::HardLink(path("00000"))));
    }

    #[test]
    fn a_set_that_loses_its_first_path_goes_on_under_the_next() {
        let mut tree = tree(&["a", "b>a", "c>a", "d", "e>d"]);
        tree.retain(|path, _| !matches!(path.as_bytes(), b"a" | b"e"));
        assert_eq!(shown(&tree), ["b=1", "c>b", "d=4"]);
        tree.remove_subtree(&path("b"));
        assert_eq!(shown(&tree), ["c=1", "d=4"]);
        tree.remove_subtree(&TreePath::root());
        assert_eq!(tree, Tree::new());
    }

    #[test]
    fn a_subtree_goes_whole_and_its_neighbours_stay() {
        let mut tree = tree(&["a-b", "a.b", "ab", "z"]);
        for folder in ["a", "a/x", "a/x/y"] {
            tree.insert(path(folder), Node { kind: Kind::Directory, meta: Meta::default() });
        }
        tree.insert(path("a/f"), Node::hard_link(path("z")));
        tree.canonicalise_hard_links().expect("good links");
        tree.remove_subtree(&path("a"));
        assert_eq!(shown(&tree), ["a-b=1", "a.b=2", "ab=3", "z=4"]);
        assert_eq!(tree.check(), Ok(()));
    }
}
