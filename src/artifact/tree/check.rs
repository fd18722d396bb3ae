//! Whether a [`Tree`] is well formed: every writer asks this first, so that formats need not.

use super::{Kind, Meta, Node, Tree, TreePath};

/// Linux's `XATTR_NAME_MAX` and `XATTR_SIZE_MAX` (`limits.h`).
const MAX_XATTR_NAME_BYTES: usize = 255;
const MAX_XATTR_VALUE_BYTES: usize = 65_536;
/// A device number is twelve bits of major and twenty of minor (`kdev_t.h`).
const MAX_MAJOR: u32 = 0xfff;
const MAX_MINOR: u32 = 0xf_ffff;

/// Why a tree is not well formed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// A path whose parent is missing or not a folder.
    #[error("`{0}` is not in a folder of the tree")]
    NoParent(TreePath),
    /// A hard link whose target is missing, a folder, a link itself or not smaller than the link.
    #[error("`{path}` is a hard link to `{target}`, which is not a file before it")]
    BadLink {
        /// The link.
        path: TreePath,
        /// What it names.
        target: TreePath,
    },
    /// The root is missing or not a folder.
    #[error("the tree's root is not a folder")]
    BadRoot,
    /// A symbolic link that is empty, too long or holds a NUL.
    #[error("`{0}` is a symbolic link with an impossible target")]
    BadSymlink(TreePath),
    /// Metadata that no Linux file has.
    #[error("`{path}` has an impossible {what}")]
    BadMeta {
        /// The node.
        path: TreePath,
        /// Which part of it.
        what: &'static str,
    },
}

impl Tree {
    /// Checks that the tree is well formed: one root folder, every node in a folder, canonical hard links, and
    /// nothing that no Linux file could be.
    ///
    /// # Errors
    /// [`TreeError`] for the first node, in path order, that is not.
    pub fn check(&self) -> Result<(), TreeError> {
        match self.nodes.first_key_value() {
            Some((path, Node { kind: Kind::Directory, .. })) if path.is_root() => {}
            _ => return Err(TreeError::BadRoot),
        }
        // In path order a folder's subtree follows it, so its ancestors are a stack.
        let mut folders: Vec<&TreePath> = Vec::new();
        for (path, node) in &self.nodes {
            if let Some(parent) = path.parent_bytes() {
                while folders.last().is_some_and(|folder| !path.is_within(folder)) {
                    folders.pop();
                }
                if folders.last().is_none_or(|folder| folder.as_bytes() != parent) {
                    return Err(TreeError::NoParent(path.clone()));
                }
            }
            if matches!(node.kind, Kind::Directory) {
                folders.push(path);
            }
            self.check_node(path, node)?;
        }
        Ok(())
    }

    fn check_node(&self, path: &TreePath, node: &Node) -> Result<(), TreeError> {
        let bad = |what| TreeError::BadMeta { path: path.clone(), what };
        check_meta(&node.meta).map_err(bad)?;
        match &node.kind {
            Kind::HardLink(target) => {
                let holder = self.nodes.get(target).map(|node| &node.kind);
                if target >= path || matches!(holder, None | Some(Kind::Directory | Kind::HardLink(_))) {
                    return Err(TreeError::BadLink { path: path.clone(), target: target.clone() });
                }
                if node.meta != Meta::default() {
                    return Err(bad("metadata: a hard link shows its target's"));
                }
            }
            Kind::Symlink(text) => {
                if text.is_empty() || text.len() > super::MAX_PATH_BYTES || text.contains(&0) {
                    return Err(TreeError::BadSymlink(path.clone()));
                }
            }
            Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor } => {
                if *major > MAX_MAJOR || *minor > MAX_MINOR {
                    return Err(bad("device number"));
                }
            }
            // The kernel's `loff_t` is signed.
            Kind::File { size, .. } if i64::try_from(*size).is_err() => return Err(bad("size")),
            Kind::File { .. } | Kind::Directory | Kind::Fifo | Kind::Socket => {}
        }
        Ok(())
    }
}

fn check_meta(meta: &Meta) -> Result<(), &'static str> {
    if meta.mode > 0o7777 {
        return Err("mode");
    }
    if meta.mtime.nanoseconds >= 1_000_000_000 {
        return Err("modification time");
    }
    for (name, value) in &meta.xattrs {
        if name.is_empty() || name.len() > MAX_XATTR_NAME_BYTES || name.contains(&0) {
            return Err("extended attribute's name");
        }
        if value.len() > MAX_XATTR_VALUE_BYTES {
            return Err("extended attribute's size");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::{Timestamp, TreePath};
    use super::*;
    use kiln_digest::Digest;

    fn path(text: &str) -> TreePath {
        TreePath::new(text.as_bytes()).expect("a good path")
    }

    fn with(entries: &[(&str, Kind)]) -> Tree {
        let mut tree = Tree::new();
        for (name, kind) in entries {
            tree.insert(path(name), Node { kind: kind.clone(), meta: Meta::default() });
        }
        tree
    }

    #[test]
    fn a_tree_needs_a_root_folder_and_every_parent() {
        assert_eq!(Tree::new().check(), Ok(()));
        assert_eq!(Tree::default().check(), Err(TreeError::BadRoot));
        let mut tree = Tree::new();
        tree.insert(TreePath::root(), Node { kind: Kind::Fifo, meta: Meta::default() });
        assert_eq!(tree.check(), Err(TreeError::BadRoot));
        assert_eq!(with(&[("a/b", Kind::Fifo)]).check(), Err(TreeError::NoParent(path("a/b"))));
        let under_file = [("a", Kind::Fifo), ("a/b", Kind::Fifo)];
        assert_eq!(with(&under_file).check(), Err(TreeError::NoParent(path("a/b"))));
        let beside =
            [("a", Kind::Directory), ("a/b", Kind::Directory), ("a/b/c", Kind::Fifo), ("a/d", Kind::Fifo)];
        assert_eq!(with(&beside).check(), Ok(()));
        let skipped = [("a", Kind::Directory), ("a/b/c", Kind::Fifo)];
        assert_eq!(with(&skipped).check(), Err(TreeError::NoParent(path("a/b/c"))));
    }

    #[test]
    fn a_hard_link_names_a_smaller_file_and_has_no_metadata() {
        let good = with(&[("a", Kind::Fifo), ("b", Kind::HardLink(path("a")))]);
        assert_eq!(good.check(), Ok(()));
        for (name, target, other) in [
            ("b", "a", Kind::Directory),
            ("b", "a", Kind::HardLink(TreePath::root())),
            ("a", "b", Kind::Fifo),
            ("a", "a", Kind::Fifo),
            ("b", "c", Kind::Fifo),
        ] {
            let tree =
                with(&[(if target == "a" { "a" } else { "b" }, other), (name, Kind::HardLink(path(target)))]);
            assert!(matches!(tree.check(), Err(TreeError::BadLink { .. })), "{name} -> {target}");
        }
        let mut tree = good;
        tree.get_mut(&path("b")).expect("inserted").meta.mode = 0o644;
        assert!(matches!(tree.check(), Err(TreeError::BadMeta { .. })));
    }

    #[test]
    fn what_no_linux_file_can_be_is_refused() {
        for text in [&b""[..], b"a\0b", &[b'a'; 4096]] {
            assert!(with(&[("a", Kind::Symlink(text.into()))]).check().is_err());
        }
        assert_eq!(with(&[("a", Kind::Symlink([b'a'; 4095].into()))]).check(), Ok(()));
        for (major, minor, good) in [(0xfff, 0xf_ffff, true), (0x1000, 0, false), (0, 0x10_0000, false)] {
            assert_eq!(with(&[("a", Kind::CharDevice { major, minor })]).check().is_ok(), good);
            assert_eq!(with(&[("a", Kind::BlockDevice { major, minor })]).check().is_ok(), good);
        }
        let digest = Digest::of(b"");
        assert!(with(&[("a", Kind::File { digest, size: u64::MAX })]).check().is_err());
        let meta = |change: fn(&mut Meta)| {
            let mut tree = with(&[("a", Kind::Fifo)]);
            change(&mut tree.get_mut(&path("a")).expect("inserted").meta);
            tree.check()
        };
        assert_eq!(meta(|_| {}), Ok(()));
        assert!(meta(|meta| meta.mode = 0o10_000).is_err());
        assert!(meta(|meta| meta.mtime = Timestamp { seconds: 0, nanoseconds: 1_000_000_000 }).is_err());
        for (name, length) in [(&b""[..], 0), (b"user.\0", 0), (&[b'u'; 256], 0), (b"user.a", 65_537)] {
            let mut tree = with(&[("a", Kind::Fifo)]);
            tree.get_mut(&path("a")).expect("inserted").meta.xattrs.insert(name.into(), vec![0; length]);
            assert!(tree.check().is_err(), "{}", name.escape_ascii());
        }
    }
}
