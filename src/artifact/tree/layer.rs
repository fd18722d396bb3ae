//! Layers: what is put over a tree, what it hides there, and the tree that results.
//!
//! The rules are those of the OCI image layer format ("Whiteouts", "Opaque whiteout") and of overlayfs: whiteouts
//! and opaque folders act on the tree below only, never on what the same layer brings.

use std::collections::{BTreeMap, BTreeSet};

use super::{Kind, Node, Tree, TreeError, TreePath};

/// Changes to a tree. A path may be both hidden and given a node: then the node replaces what was there whole.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Layer {
    nodes: BTreeMap<TreePath, Node>,
    whiteouts: BTreeSet<TreePath>,
    opaque: BTreeSet<TreePath>,
}

impl Layer {
    /// A layer that changes nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `node` at `path`. A folder over a folder changes its metadata and keeps what it holds; anything else
    /// replaces what is there with all beneath it. A hard link may name any path of the resulting tree.
    pub fn insert(&mut self, path: TreePath, node: Node) -> Option<Node> {
        self.nodes.insert(path, node)
    }

    /// Hides `path` of the tree below, and everything beneath it.
    pub fn whiteout(&mut self, path: TreePath) {
        self.whiteouts.insert(path);
    }

    /// Hides everything beneath the folder `path` of the tree below, and keeps the folder.
    pub fn opaque(&mut self, path: TreePath) {
        self.opaque.insert(path);
    }

    /// The node that this layer brings at `path`.
    pub fn get(&self, path: &TreePath) -> Option<&Node> {
        self.nodes.get(path)
    }

    /// The nodes that this layer brings, in path order.
    pub fn iter(&self) -> impl Iterator<Item = (&TreePath, &Node)> {
        self.nodes.iter()
    }
}

impl Tree {
    /// The tree that shows when `layer` lies over `self`. Hard links of `self` whose first path is hidden or
    /// replaced go on, with their old content, under their next path.
    ///
    /// # Errors
    /// [`TreeError`] where the result is not well formed: a node whose parent neither has, a link to nothing.
    pub fn overlay(mut self, layer: &Layer) -> Result<Self, TreeError> {
        let mut hidden = BTreeMap::new();
        for path in &layer.whiteouts {
            self.hide(path, true, &mut hidden);
        }
        for path in &layer.opaque {
            self.hide(path, false, &mut hidden);
        }
        for (path, node) in &layer.nodes {
            let is_folder = |node: &Node| matches!(node.kind, Kind::Directory);
            if !(is_folder(node) && self.nodes.get(path).is_some_and(is_folder)) {
                self.hide(path, true, &mut hidden);
            }
        }
        self.rehome(hidden);
        self.nodes.extend(layer.nodes.iter().map(|(path, node)| (path.clone(), node.clone())));
        self.canonicalise_hard_links()?;
        self.check()?;
        Ok(self)
    }

    /// Moves what is at (if `with_itself`) and beneath `path` into `hidden`.
    fn hide(&mut self, path: &TreePath, with_itself: bool, hidden: &mut BTreeMap<TreePath, Node>) {
        if self.nodes.get(path).is_some_and(|node| !matches!(node.kind, Kind::Directory)) {
            // Nothing lies beneath what is no folder.
            if with_itself {
                hidden.extend(self.nodes.remove_entry(path));
            }
            return;
        }
        let doomed: Vec<TreePath> = self
            .subtree(path)
            .map(|(inner, _)| inner.clone())
            .filter(|inner| with_itself || inner != path)
            .collect();
        hidden.extend(doomed.iter().filter_map(|inner| self.nodes.remove_entry(inner)));
    }
}
