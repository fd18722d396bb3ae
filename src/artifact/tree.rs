//! A file tree as data: what a root, a layer or a collected output *is*, apart from where its bytes lie.
//!
//! A [`Tree`] maps paths to nodes; contents are named by digest and fetched through [`Contents`]. Its canonical
//! text ([`Tree::manifest`]) has one form, so the digest of that text is the tree's identity. Every path in a
//! tree has been checked by [`TreePath`], so no writer need look for `..` again.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read};

use kiln_digest::Digest;

/// A path inside a tree: components joined by `/`, none of them empty, `.` or `..`, none with a NUL; no leading
/// slash. The empty path is the tree's root. Order is that of the components, so a folder comes before
/// what is in it and siblings sort by name.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct TreePath(Box<[u8]>);

/// Linux's limits (`limits.h`), which a path from a guest or an archive must respect as well.
pub const MAX_NAME_BYTES: usize = 255;
/// As [`MAX_NAME_BYTES`], for a whole path without its terminating NUL.
pub const MAX_PATH_BYTES: usize = 4095;

/// Why some bytes are not a [`TreePath`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// An empty component, `.` or `..`, or a leading or trailing slash.
    #[error("a path component is empty, `.` or `..`")]
    Component,
    /// A NUL byte.
    #[error("a path holds a NUL byte")]
    Nul,
    /// A component over 255 bytes or a path over 4,095.
    #[error("a path is longer than Linux allows")]
    TooLong,
}

impl TreePath {
    /// The root of a tree.
    pub fn root() -> Self {
        Self(Box::from([]))
    }

    /// Checks `bytes`, which have no leading slash.
    ///
    /// # Errors
    /// [`PathError`], as its variants say.
    pub fn new(bytes: &[u8]) -> Result<Self, PathError> {
        if bytes.is_empty() {
            return Ok(Self::root());
        }
        if bytes.len() > MAX_PATH_BYTES {
            return Err(PathError::TooLong);
        }
        for component in bytes.split(|&byte| byte == b'/') {
            Self::check_name(component)?;
        }
        Ok(Self(bytes.into()))
    }

    fn check_name(name: &[u8]) -> Result<(), PathError> {
        if matches!(name, b"" | b"." | b"..") {
            return Err(PathError::Component);
        }
        if name.contains(&0) {
            return Err(PathError::Nul);
        }
        if name.len() > MAX_NAME_BYTES {
            return Err(PathError::TooLong);
        }
        Ok(())
    }

    /// Checks a path as archives write it: a leading `/` or `./` and a trailing `/` are taken off first.
    ///
    /// # Errors
    /// [`PathError`], as its variants say.
    pub fn from_archive(bytes: &[u8]) -> Result<Self, PathError> {
        let mut rest = bytes;
        loop {
            rest = match rest {
                [b'.', b'/', tail @ ..] | [b'/', tail @ ..] => tail,
                [b'.'] => &[],
                [head @ .., b'/'] => head,
                _ => return Self::new(rest),
            };
        }
    }

    /// The path of `name` in this folder.
    ///
    /// # Errors
    /// [`PathError`] when `name` is not one good component, or the whole grows too long.
    pub fn join(&self, name: &[u8]) -> Result<Self, PathError> {
        Self::check_name(name)?;
        if name.contains(&b'/') {
            return Err(PathError::Component);
        }
        let mut bytes = self.0.to_vec();
        if !bytes.is_empty() {
            bytes.push(b'/');
        }
        bytes.extend_from_slice(name);
        if bytes.len() > MAX_PATH_BYTES {
            return Err(PathError::TooLong);
        }
        Ok(Self(bytes.into()))
    }

    /// The bytes, without a leading slash.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether this is the tree's root.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// The components in order; none for the root.
    pub fn components(&self) -> impl Iterator<Item = &[u8]> {
        self.0.split(|&byte| byte == b'/').filter(|name| !name.is_empty())
    }

    /// The folder that holds this path; none for the root.
    pub fn parent(&self) -> Option<Self> {
        if self.is_root() {
            return None;
        }
        let end = self.0.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
        Some(Self(self.0[..end].into()))
    }

    /// The last component; empty for the root.
    pub fn name(&self) -> &[u8] {
        self.0.rsplit(|&byte| byte == b'/').next().unwrap_or_default()
    }

    /// Whether `self` is `folder` or lies beneath it.
    pub fn is_within(&self, folder: &Self) -> bool {
        folder.is_root()
            || self.0.strip_prefix(folder.as_bytes()).is_some_and(|rest| matches!(rest, [] | [b'/', ..]))
    }
}

impl Ord for TreePath {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.components().cmp(other.components())
    }
}

impl PartialOrd for TreePath {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// Shows the path with bytes that are not printable ASCII escaped, so that it is safe on a terminal.
impl fmt::Display for TreePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match std::str::from_utf8(&self.0) {
            Ok(text) if !text.chars().any(char::is_control) => f.write_str(text),
            _ => write!(f, "{}", self.0.escape_ascii()),
        }
    }
}

impl fmt::Debug for TreePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TreePath({self})")
    }
}

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
    /// Another name of a file, device, FIFO or socket: the smallest path of the set, whose node holds the rest.
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

/// Why a tree would not be well formed.
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

    /// `path` and everything beneath it, in path order.
    pub fn subtree<'a>(&'a self, path: &'a TreePath) -> impl Iterator<Item = (&'a TreePath, &'a Node)> {
        self.nodes.range(path..).take_while(move |(candidate, _)| candidate.is_within(path))
    }
}
