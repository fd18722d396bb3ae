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

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::super::{Builder, Meta, sample};
    use super::*;

    fn path(text: &str) -> TreePath {
        TreePath::new(text.as_bytes()).expect("a good path")
    }

    fn node(kind: Kind, mode: u16) -> Node {
        Node { kind, meta: Meta { mode, ..Meta::default() } }
    }

    fn shown(tree: &Tree) -> Vec<String> {
        let show = |(path, node): (&TreePath, &Node)| match &node.kind {
            Kind::HardLink(target) => format!("{path}>{target}"),
            Kind::Directory => format!("{path}/{}", node.meta.mode),
            _ => format!("{path}={}", node.meta.mode),
        };
        tree.iter().skip(1).map(show).collect()
    }

    fn lower() -> Tree {
        let mut tree = Tree::new();
        for (name, kind) in [
            ("a", Kind::Directory),
            ("a/f", Kind::Fifo),
            ("a/g", Kind::Directory),
            ("a/g/h", Kind::HardLink(path("a/f"))),
            ("a-b", Kind::Fifo),
            ("z", Kind::HardLink(path("a/f"))),
        ] {
            let mode = if matches!(kind, Kind::HardLink(_)) { 0 } else { 1 };
            tree.insert(path(name), node(kind, mode));
        }
        tree.check().expect("a good tree");
        tree
    }

    fn over(change: impl FnOnce(&mut Layer)) -> Result<Vec<String>, TreeError> {
        let mut layer = Layer::new();
        change(&mut layer);
        lower().overlay(&layer).map(|tree| shown(&tree))
    }

    #[test]
    fn an_empty_layer_changes_nothing() {
        assert_eq!(over(|_| {}), Ok(shown(&lower())));
    }

    #[test]
    fn a_whiteout_hides_a_subtree_and_links_go_on() {
        let hidden = over(|layer| layer.whiteout(path("a"))).expect("a good tree");
        assert_eq!(hidden, ["a-b=1", "z=1"]);
        let hidden = over(|layer| layer.whiteout(path("a/f"))).expect("a good tree");
        assert_eq!(hidden, ["a/1", "a/g/1", "a/g/h=1", "a-b=1", "z>a/g/h"]);
        assert_eq!(over(|layer| layer.whiteout(path("missing/x"))), Ok(shown(&lower())));
        assert_eq!(over(|layer| layer.whiteout(TreePath::root())), Err(TreeError::BadRoot));
    }

    #[test]
    fn an_opaque_folder_stays_and_shows_only_the_layers_own() {
        let opaque = over(|layer| {
            layer.opaque(path("a"));
            layer.insert(path("a/new"), node(Kind::Fifo, 2));
        });
        assert_eq!(opaque.expect("a good tree"), ["a/1", "a/new=2", "a-b=1", "z=1"]);
        let everything = over(|layer| layer.opaque(TreePath::root()));
        assert_eq!(everything.expect("a good tree"), [""; 0]);
    }

    #[test]
    fn a_whiteout_never_hides_what_its_own_layer_brings() {
        let replaced = over(|layer| {
            layer.whiteout(path("a"));
            layer.insert(path("a"), node(Kind::Directory, 2));
            layer.insert(path("a/new"), node(Kind::Fifo, 2));
        });
        assert_eq!(replaced.expect("a good tree"), ["a/2", "a/new=2", "a-b=1", "z=1"]);
    }

    #[test]
    fn files_replace_folders_and_folders_files() {
        let file = over(|layer| drop(layer.insert(path("a"), node(Kind::Fifo, 2))));
        assert_eq!(file.expect("a good tree"), ["a=2", "a-b=1", "z=1"]);
        let folder = over(|layer| drop(layer.insert(path("a-b"), node(Kind::Directory, 2))));
        assert_eq!(folder.expect("a good tree"), ["a/1", "a/f=1", "a/g/1", "a/g/h>a/f", "a-b/2", "z>a/f"]);
        let merged = over(|layer| drop(layer.insert(path("a"), node(Kind::Directory, 2))));
        assert_eq!(merged.expect("a good tree"), ["a/2", "a/f=1", "a/g/1", "a/g/h>a/f", "a-b=1", "z>a/f"]);
    }

    #[test]
    fn a_replaced_name_leaves_its_set_which_keeps_the_old_content() {
        let replaced = over(|layer| drop(layer.insert(path("a/f"), node(Kind::Socket, 2))));
        assert_eq!(replaced.expect("a good tree"), ["a/1", "a/f=2", "a/g/1", "a/g/h=1", "a-b=1", "z>a/g/h"]);
        let linked = over(|layer| {
            layer.insert(path("a/f"), Node::hard_link(path("a-b")));
            layer.insert(path("0"), Node::hard_link(path("z")));
        });
        assert_eq!(
            linked.expect("a good tree"),
            ["0=1", "a/1", "a/f=1", "a/g/1", "a/g/h>0", "a-b>a/f", "z>0"]
        );
    }

    #[test]
    fn what_has_no_parent_or_links_to_nothing_is_refused() {
        assert!(over(|layer| drop(layer.insert(path("q/r"), node(Kind::Fifo, 2)))).is_err());
        assert!(over(|layer| drop(layer.insert(path("a-b/r"), node(Kind::Fifo, 2)))).is_err());
        assert!(over(|layer| drop(layer.insert(path("q"), Node::hard_link(path("r"))))).is_err());
        let gone = over(|layer| {
            layer.whiteout(path("a-b"));
            layer.insert(path("q"), Node::hard_link(path("a-b")));
        });
        assert!(gone.is_err());
    }

    #[derive(Debug, Clone)]
    enum Change {
        Whiteout,
        Opaque,
        Node(Node),
        Link(usize),
    }

    fn changes() -> impl Strategy<Value = Vec<(TreePath, Change)>> {
        let kinds = prop_oneof![2 => Just(Kind::Directory), 3 => Just(Kind::Fifo), 1 => Just(Kind::Socket)];
        let change = prop_oneof![
            2 => Just(Change::Whiteout),
            1 => Just(Change::Opaque),
            5 => (kinds, 0..8_u16).prop_map(|(kind, mode)| Change::Node(node(kind, mode))),
            2 => any::<usize>().prop_map(Change::Link),
        ];
        vec((sample::paths(), change), 0..12)
    }

    /// What the rules say, one name after the other on a file system: lower names are deleted with everything
    /// beneath them, then the layer's are made. Nothing where a parent is missing.
    fn model(lower: &Tree, layer: &Layer) -> Option<Tree> {
        let mut system = Builder::new();
        for (path, node) in lower.iter() {
            match &node.kind {
                Kind::HardLink(holder) => assert!(system.link(path.clone(), holder)),
                _ => system.put(path.clone(), node.clone()),
            }
        }
        for path in &layer.whiteouts {
            system.remove(path);
        }
        for path in lower.iter().map(|(path, _)| path) {
            let is_hidden = |folder: &TreePath| path.is_within(folder) && path != folder;
            if layer.opaque.iter().any(is_hidden) {
                system.remove(path);
            }
        }
        for (path, node) in &layer.nodes {
            let is_folder = |node: &Node| matches!(node.kind, Kind::Directory);
            if !(is_folder(node) && system.get(path).is_some_and(is_folder)) {
                system.remove(path);
            }
        }
        for (path, node) in layer.nodes.iter().filter(|(_, node)| !matches!(node.kind, Kind::HardLink(_))) {
            system.put(path.clone(), node.clone());
        }
        // Links last, and again until none is left whose target is one that is not made yet.
        let mut links: Vec<_> = layer
            .nodes
            .iter()
            .filter_map(|(path, node)| match &node.kind {
                Kind::HardLink(target) => Some((path, target)),
                _ => None,
            })
            .collect();
        while !links.is_empty() {
            let before = links.len();
            links.retain(|(path, target)| {
                let is_made =
                    layer.nodes.get(*target).is_none_or(|node| !matches!(node.kind, Kind::HardLink(_)));
                let waits = links_wait(&system, target, is_made);
                waits || !system.link((*path).clone(), target)
            });
            if links.len() == before {
                return None;
            }
        }
        system.finish().ok()
    }

    /// Whether a link must wait: its target is itself a link of the layer that no name has been made for.
    fn links_wait(system: &Builder, target: &TreePath, is_made: bool) -> bool {
        !is_made && system.get(target).is_none()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn overlay_does_what_a_file_system_would(lower in sample::shapes(), changes in changes()) {
            let mut layer = Layer::new();
            let names: Vec<TreePath> =
                lower.iter().map(|(path, _)| path.clone()).chain(changes.iter().map(|(path, _)| path.clone())).collect();
            for (path, change) in changes {
                match change {
                    Change::Whiteout => layer.whiteout(path),
                    Change::Opaque => layer.opaque(path),
                    Change::Node(node) => drop(layer.insert(path, node)),
                    Change::Link(at) => drop(layer.insert(path, Node::hard_link(names[at % names.len()].clone()))),
                }
            }
            let result = lower.clone().overlay(&layer);
            prop_assert_eq!(result.ok(), model(&lower, &layer));
        }

        #[test]
        fn retain_does_what_deleting_does(tree in sample::shapes(), pattern in any::<u64>()) {
            let mut bits = (0..tree.len()).map(|at| pattern >> (at % 64) & 1 == 1);
            let doomed: Vec<TreePath> =
                tree.iter().filter(|(path, _)| bits.next() == Some(true) && !path.is_root()).map(|(path, _)| path.clone()).collect();
            let mut system = Builder::new();
            for (path, node) in tree.iter() {
                match &node.kind {
                    Kind::HardLink(holder) => assert!(system.link(path.clone(), holder)),
                    _ => system.put(path.clone(), node.clone()),
                }
            }
            doomed.iter().for_each(|path| system.remove(path));
            let expected = system.finish().expect("whole subtrees went");
            let mut kept = tree.clone();
            kept.retain(|path, _| !doomed.iter().any(|folder| path.is_within(folder)));
            prop_assert_eq!(&kept, &expected);
            let mut one_by_one = tree;
            doomed.iter().for_each(|path| one_by_one.remove_subtree(path));
            prop_assert_eq!(&one_by_one, &expected);
        }
    }
}
