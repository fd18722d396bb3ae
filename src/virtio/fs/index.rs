//! The index: every node of every share that the guest may name, in 64 bytes each.
//!
//! Children of a directory are made all at once, from one host listing, and lie next to each other sorted by
//! name: a lookup is a binary search and a listing position is a number that never shifts. Nodes are never
//! freed or moved while the device lives, so an inode number (the FUSE one) means one node for ever. Plain
//! data: nothing here talks to the host.

use super::record::{Fingerprint, Kind, Observed};

/// Which node: its place in the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeId(u32);

impl NodeId {
    /// The synthetic directory in which shares appear.
    pub const TOP: Self = Self(0);

    /// The number by which the driver knows the node: its place, counted from one (FUSE_ROOT_ID).
    pub fn to_fuse(self) -> u64 {
        u64::from(self.0) + 1
    }

    /// The place, for keys of tables.
    pub fn place(self) -> u32 {
        self.0
    }
}

/// A node's flags, [`Observed`] in the low bits.
mod flag {
    pub const STATED: u8 = 1 << 4;
    pub const FILLED: u8 = 1 << 5;
    pub const NO_XATTRS: u8 = 1 << 6;
}

/// One file, directory or whatever else, beneath a share. Owner, group and the like are not here: a share with
/// fixed attributes does not show them, and for others they are kept beside the index.
#[derive(Debug, Clone, Copy)]
struct Node {
    inode: u64,
    size_bytes: u64,
    mtime_nanos: i64,
    ctime_nanos: i64,
    name_start: u32,
    parent: u32,
    first_child: u32,
    child_count: u32,
    lookups: u32,
    mode: u16,
    device: u16,
    share: u16,
    name_length: u8,
    kind: Kind,
    flags: u8,
}

const _: () = assert!(size_of::<Node>() == 64);

/// What a listing says of one child.
#[derive(Debug, Clone, Copy)]
pub struct Listed {
    name_start: u32,
    name_length: u8,
    kind: Kind,
    inode: u64,
}

/// The index would outgrow its 32-bit numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full;

/// All nodes.
#[derive(Debug)]
pub struct Index {
    nodes: Vec<Node>,
    names: Vec<u8>,
    devices: Vec<u64>,
}

impl Index {
    /// An index with nothing but the top.
    pub fn new() -> Self {
        let top = Node {
            inode: 1,
            size_bytes: 0,
            mtime_nanos: 0,
            ctime_nanos: 0,
            name_start: 0,
            parent: 0,
            first_child: 0,
            child_count: 0,
            lookups: 0,
            mode: 0,
            device: 0,
            share: u16::MAX,
            name_length: 0,
            kind: Kind::Directory,
            flags: 0,
        };
        Self { nodes: vec![top], names: Vec::new(), devices: Vec::new() }
    }

    /// The node the driver calls `nodeid`, if it holds it (or it is the top, which is always held).
    pub fn held(&self, nodeid: u64) -> Option<NodeId> {
        let place = u32::try_from(nodeid.checked_sub(1)?).ok()?;
        let node = self.nodes.get(place as usize)?;
        (place == 0 || node.lookups > 0).then_some(NodeId(place))
    }

    /// True where the driver knows the node.
    pub fn is_held(&self, node: NodeId) -> bool {
        self.node(node).lookups > 0
    }

    /// Counts one more lookup. A count that reaches the end stays there: such a node is never given back.
    pub fn hold(&mut self, node: NodeId) {
        let lookups = &mut self.node_mut(node).lookups;
        *lookups = lookups.saturating_add(1);
    }

    /// Gives `count` lookups back, or all there are.
    pub fn forget(&mut self, node: NodeId, count: u64) {
        let lookups = &mut self.node_mut(node).lookups;
        if *lookups != u32::MAX {
            *lookups = lookups.saturating_sub(u32::try_from(count).unwrap_or(u32::MAX));
        }
    }

    /// The driver holds nothing any more.
    pub fn forget_all(&mut self) {
        self.nodes.iter_mut().for_each(|node| node.lookups = 0);
    }

    /// A new node for the directory of share `share`. It has no name: the table of shares has it.
    pub fn add_share(&mut self, share: u16) -> Result<NodeId, Full> {
        let place = u32::try_from(self.nodes.len()).map_err(|_| Full)?;
        let node = Node { inode: 0, share, ..self.nodes[0] };
        self.nodes.push(Node { lookups: 0, flags: 0, ..node });
        Ok(NodeId(place))
    }

    /// Keeps the name of a child to come.
    pub fn listed(&mut self, name: &[u8], kind: Kind, inode: u64) -> Result<Listed, Full> {
        let name_start = u32::try_from(self.names.len()).map_err(|_| Full)?;
        let name_length = u8::try_from(name.len()).map_err(|_| Full)?;
        self.names.extend_from_slice(name);
        Ok(Listed { name_start, name_length, kind, inode })
    }

    /// How many bytes of names there are, for [`Index::drop_names`].
    pub fn name_bytes(&self) -> usize {
        self.names.len()
    }

    /// Drops the names kept since there were `name_bytes`, whose children will not be made after all.
    pub fn drop_names(&mut self, name_bytes: usize) {
        self.names.truncate(name_bytes);
    }

    /// Makes the children of `directory`.
    pub fn fill(&mut self, directory: NodeId, mut children: Vec<Listed>) -> Result<(), Full> {
        let first_child = u32::try_from(self.nodes.len()).map_err(|_| Full)?;
        let child_count = u32::try_from(children.len()).map_err(|_| Full)?;
        first_child.checked_add(child_count).filter(|end| *end < u32::MAX).ok_or(Full)?;
        let names = &self.names;
        children.sort_unstable_by_key(|child| bytes(names, child.name_start, child.name_length));
        let share = self.nodes[directory.0 as usize].share;
        self.nodes.extend(children.iter().map(|child| Node {
            inode: child.inode,
            size_bytes: 0,
            mtime_nanos: 0,
            ctime_nanos: 0,
            name_start: child.name_start,
            parent: directory.0,
            first_child: 0,
            child_count: 0,
            lookups: 0,
            mode: 0,
            device: 0,
            share,
            name_length: child.name_length,
            kind: child.kind,
            flags: 0,
        }));
        let node = self.node_mut(directory);
        (node.first_child, node.child_count) = (first_child, child_count);
        node.flags |= flag::FILLED;
        Ok(())
    }

    /// True where the children of `directory` are known.
    pub fn filled(&self, directory: NodeId) -> bool {
        self.node(directory).flags & flag::FILLED != 0
    }

    /// The child called `name` of a directory that is filled.
    pub fn child(&self, directory: NodeId, name: &[u8]) -> Option<NodeId> {
        let node = self.node(directory);
        let first = node.first_child as usize;
        let children = self.nodes.get(first..first + node.child_count as usize)?;
        let found = children
            .binary_search_by_key(&name, |child| bytes(&self.names, child.name_start, child.name_length));
        found.ok().and_then(|at| u32::try_from(at).ok()).map(|at| NodeId(node.first_child + at))
    }

    /// Children of a filled directory from position `from` on, in order.
    pub fn children(&self, directory: NodeId, from: u64) -> impl DoubleEndedIterator<Item = NodeId> + use<> {
        let node = self.node(directory);
        let from = u32::try_from(from).unwrap_or(u32::MAX).min(node.child_count);
        (node.first_child + from..node.first_child + node.child_count).map(NodeId)
    }

    /// All nodes but the top.
    pub fn all(&self) -> impl Iterator<Item = NodeId> + use<> {
        (1..u32::try_from(self.nodes.len()).unwrap_or(u32::MAX)).map(NodeId)
    }

    /// The node at a place that [`NodeId::place`] gave.
    pub fn at(&self, place: u32) -> Option<NodeId> {
        ((place as usize) < self.nodes.len()).then_some(NodeId(place))
    }

    /// The node's name; empty for a share's directory.
    pub fn name(&self, node: NodeId) -> &[u8] {
        let node = self.node(node);
        bytes(&self.names, node.name_start, node.name_length)
    }

    /// The directory the node is in.
    pub fn parent(&self, node: NodeId) -> NodeId {
        NodeId(self.node(node).parent)
    }

    /// The share the node is in, by its place in the table of shares.
    pub fn share(&self, node: NodeId) -> u16 {
        self.node(node).share
    }

    /// What the node is.
    pub fn kind(&self, node: NodeId) -> Kind {
        self.node(node).kind
    }

    /// The inode number that the host's listing or stat gave.
    pub fn inode(&self, node: NodeId) -> u64 {
        self.node(node).inode
    }

    /// The path within the share, names joined by `/`; empty for the share's own directory.
    pub fn path(&self, node: NodeId) -> Vec<u8> {
        let mut names = Vec::new();
        let mut at = node;
        while self.parent(at) != NodeId::TOP {
            names.push(self.name(at));
            at = self.parent(at);
        }
        names.reverse();
        names.join(&b'/')
    }

    /// What the host's file looked like first, if it was asked.
    pub fn fingerprint(&self, node: NodeId) -> Option<Fingerprint> {
        let node = self.node(node);
        (node.flags & flag::STATED != 0).then(|| Fingerprint {
            device: self.devices.get(usize::from(node.device)).copied().unwrap_or(0),
            inode: node.inode,
            size_bytes: node.size_bytes,
            mtime_nanos: node.mtime_nanos,
            ctime_nanos: node.ctime_nanos,
            mode: u32::from(node.mode),
        })
    }

    /// Sets what the host's file looks like.
    pub fn set_fingerprint(&mut self, node: NodeId, seen: &Fingerprint) -> Result<(), Full> {
        let place = self.devices.iter().position(|device| *device == seen.device).unwrap_or_else(|| {
            self.devices.push(seen.device);
            self.devices.len() - 1
        });
        let device = u16::try_from(place).map_err(|_| Full)?;
        let mode = u16::try_from(seen.mode).map_err(|_| Full)?;
        let node = self.node_mut(node);
        (node.device, node.inode, node.size_bytes, node.mode) = (device, seen.inode, seen.size_bytes, mode);
        (node.mtime_nanos, node.ctime_nanos) = (seen.mtime_nanos, seen.ctime_nanos);
        node.flags |= flag::STATED;
        Ok(())
    }

    /// Notes what was asked about the node.
    pub fn observe(&mut self, node: NodeId, what: Observed) {
        self.node_mut(node).flags |= what.bits();
    }

    /// What was asked about the node.
    pub fn observed(&self, node: NodeId) -> Observed {
        Observed::from_bits_truncate(self.node(node).flags)
    }

    /// Notes that the file has no extended attributes.
    pub fn set_no_xattrs(&mut self, node: NodeId) {
        self.node_mut(node).flags |= flag::NO_XATTRS;
    }

    /// True where the file is known to have no extended attributes.
    pub fn no_xattrs(&self, node: NodeId) -> bool {
        self.node(node).flags & flag::NO_XATTRS != 0
    }

    fn node(&self, node: NodeId) -> &Node {
        &self.nodes[node.0 as usize]
    }

    fn node_mut(&mut self, node: NodeId) -> &mut Node {
        &mut self.nodes[node.0 as usize]
    }
}

fn bytes(names: &[u8], start: u32, length: u8) -> &[u8] {
    let start = start as usize;
    names.get(start..start + usize::from(length)).unwrap_or_default()
}
