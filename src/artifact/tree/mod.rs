//! A file tree as data: what a root, a layer or a collected output *is*, apart from where its bytes lie.
//!
//! A [`Tree`] maps paths to nodes; contents are named by digest and fetched through [`Contents`]. Its canonical
//! text ([`Tree::manifest`]) has one form, so the digest of that text is the tree's identity. Every path in a
//! tree has been checked by [`TreePath`], so no writer need look for `..` again.

mod builder;
mod check;
mod difference;
mod entries;
mod layer;
mod links;
mod manifest;
mod path;
#[cfg(test)]
pub(crate) mod sample;

use std::collections::BTreeMap;
use std::io::{self, Read};

use kiln_digest::Digest;

pub use builder::Builder;
pub use check::TreeError;
pub use difference::{Aspect, Difference};
pub(crate) use entries::{Entries, Entry};
pub use layer::Layer;
pub use manifest::ManifestError;
pub use path::{MAX_NAME_BYTES, MAX_PATH_BYTES, PathError, TreePath};

/// A time stamp as file systems keep it: seconds since 1970-01-01 UTC and nanoseconds below 10^9.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Timestamp {
    /// Seconds since the epoch; negative before it.
    pub seconds: i64,
    /// Nanoseconds within the second, below 10^9.
    pub nanoseconds: u32,
}

/// What a node shows beside its content.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Meta {
    /// Permission bits with set-id and sticky bits: the low twelve bits of `st_mode`.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Timestamp,
    /// Extended attributes by full name (`user.x`, `security.capability`).
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// What a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A folder; what it holds are the paths beneath it.
    Directory,
    /// A regular file with its whole content, holes read as zeros.
    File {
        /// Digest of the content.
        digest: Digest,
        /// Length in bytes.
        size: u64,
    },
    /// A symbolic link with its text, at most 4,095 bytes, without NUL.
    Symlink(Box<[u8]>),
    /// Another name of anything but a folder: the smallest path of the set, whose node holds the rest.
    HardLink(TreePath),
    /// A character device.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A FIFO.
    Fifo,
    /// A socket.
    Socket,
}

/// One node. A [`Kind::HardLink`] has the default `meta`: what it shows is its target's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// What it is.
    pub kind: Kind,
    /// What it shows.
    pub meta: Meta,
}

/// A file tree: nodes by path. Construction does not check the whole; [`Tree::check`] does, and every
/// writer calls it first.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tree {
    nodes: BTreeMap<TreePath, Node>,
}

/// Where the bytes of a tree's files come from.
pub trait Contents {
    /// A reader over the whole content named `digest`.
    ///
    /// # Errors
    /// What opening it fails with; `NotFound` where the content is unknown.
    fn open(&self, digest: &Digest) -> io::Result<Box<dyn Read + '_>>;
}

/// Contents held in memory.
impl Contents for BTreeMap<Digest, Vec<u8>> {
    fn open(&self, digest: &Digest) -> io::Result<Box<dyn Read + '_>> {
        let bytes = self.get(digest).ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(&bytes[..]))
    }
}

impl Tree {
    /// A tree with nothing but its root folder, mode 0755, owned by 0:0, time zero.
    pub fn new() -> Self {
        let mut tree = Self::default();
        tree.insert(
            TreePath::root(),
            Node { kind: Kind::Directory, meta: Meta { mode: 0o755, ..Meta::default() } },
        );
        tree
    }

    /// Puts `node` at `path` and returns what was there.
    pub fn insert(&mut self, path: TreePath, node: Node) -> Option<Node> {
        self.nodes.insert(path, node)
    }

    /// The node at `path`.
    pub fn get(&self, path: &TreePath) -> Option<&Node> {
        self.nodes.get(path)
    }

    /// The node at `path`, to be changed.
    pub fn get_mut(&mut self, path: &TreePath) -> Option<&mut Node> {
        self.nodes.get_mut(path)
    }

    /// All nodes in path order.
    pub fn iter(&self) -> impl Iterator<Item = (&TreePath, &Node)> {
        self.nodes.iter()
    }

    /// All nodes in path order, to be changed.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&TreePath, &mut Node)> {
        self.nodes.iter_mut()
    }

    /// How many nodes there are, the root included.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there is not even a root.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Whether `path` is a folder other than the root that holds nothing.
    pub fn is_empty_folder(&self, path: &TreePath) -> bool {
        let is_folder = self.get(path).is_some_and(|node| node.kind == Kind::Directory);
        is_folder && !path.is_root() && self.subtree(path).nth(1).is_none()
    }

    /// `path` and everything beneath it, in path order.
    pub fn subtree<'a>(&'a self, path: &'a TreePath) -> impl Iterator<Item = (&'a TreePath, &'a Node)> {
        within(&self.nodes, path)
    }
}

/// The entry of `path` and all beneath it, in path order.
fn within<'a, T>(
    names: &'a BTreeMap<TreePath, T>,
    path: &'a TreePath,
) -> impl Iterator<Item = (&'a TreePath, &'a T)> {
    names.range(path..).take_while(move |(candidate, _)| candidate.is_within(path))
}
