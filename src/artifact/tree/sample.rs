//! Random well-formed trees with their contents, for property tests.

use std::collections::BTreeMap;

use kiln_digest::Digest;
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

use super::{Builder, Kind, Meta, Node, Timestamp, Tree, TreePath};

/// A name: often one of few, so that paths meet; sometimes any bytes.
pub(crate) fn names() -> impl Strategy<Value = Vec<u8>> {
    let any_bytes = vec(any::<u8>(), 1..=255).prop_map(|bytes| {
        let name: Vec<u8> =
            bytes.into_iter().map(|byte| if matches!(byte, 0 | b'/') { 0xff } else { byte }).collect();
        if matches!(&name[..], b"." | b"..") { b"dots".to_vec() } else { name }
    });
    prop_oneof![8 => "[a-c]".prop_map(String::into_bytes), 1 => "[ -.0-~]{3,9}".prop_map(String::into_bytes), 1 => any_bytes]
}

/// A path up to four components deep, never the root.
pub(crate) fn paths() -> impl Strategy<Value = TreePath> {
    vec(names(), 1..=4)
        .prop_map(|names| TreePath::new(&names.join(&b'/')).expect("good names make a good path"))
}

/// Metadata, attributes in every namespace that file systems know.
pub(crate) fn metas() -> impl Strategy<Value = Meta> {
    let xattr_names = prop_oneof![
        "user\\.[a-z=\\\\ ]{1,40}",
        "trusted\\.overlay\\.[a-z]{1,4}",
        Just("security.capability".to_owned()),
        Just("system.posix_acl_access".to_owned()),
        Just("system.posix_acl_default".to_owned()),
    ]
    .prop_map(String::into_bytes);
    let values = prop_oneof![4 => vec(any::<u8>(), 0..40), 1 => vec(any::<u8>(), 0..6000)];
    let owners = || prop_oneof![2 => Just(0_u32), 1 => any::<u32>(), 1 => 65_534..65_538_u32];
    let mtimes =
        prop_oneof![3 => Just((1_700_000_000_i64, 0_u32)), 1 => (any::<i64>(), 0..1_000_000_000_u32)];
    (
        0..=0o7777_u16,
        owners(),
        owners(),
        mtimes,
        prop_oneof![3 => Just(BTreeMap::new()), 1 => btree_map(xattr_names, values, 0..4)],
    )
        .prop_map(|(mode, uid, gid, (seconds, nanoseconds), xattrs)| Meta {
            mode,
            uid,
            gid,
            mtime: Timestamp { seconds, nanoseconds },
            xattrs,
        })
}

/// What a name gets: a node with its content, or a link to another name.
#[derive(Debug, Clone)]
pub(crate) enum Entry {
    /// A node; for a file its content.
    Node(Node, Vec<u8>),
    /// A hard link to the n-th name before it, counted round.
    Link(usize),
}

/// Entries of every kind; file sizes gather round block boundaries.
pub(crate) fn entries() -> impl Strategy<Value = Entry> {
    let lengths = prop_oneof![
        4 => 0..200_usize,
        2 => prop_oneof![Just(4095_usize), Just(4096), Just(4097), Just(4032), Just(4064), 3900..4200_usize],
        1 => 0..20_000_usize,
    ];
    // Few fillings, so that equal contents and whole blocks of zeros occur.
    let contents = (lengths, 0..3_u8).prop_map(|(length, filling)| vec![filling; length]);
    let devices = || (0..=0xfff_u32, 0..=0xf_ffff_u32);
    let kinds = prop_oneof![
        4 => Just((Kind::Directory, vec![])),
        6 => contents.prop_map(|content| {
            (Kind::File { digest: Digest::of(&content), size: content.len() as u64 }, content)
        }),
        1 => vec(1..=255_u8, 1..=4095).prop_map(|text| (Kind::Symlink(text.into()), vec![])),
        2 => "[a-z./]{1,40}".prop_map(|text| (Kind::Symlink(text.into_bytes().into()), vec![])),
        1 => devices().prop_map(|(major, minor)| (Kind::CharDevice { major, minor }, vec![])),
        1 => devices().prop_map(|(major, minor)| (Kind::BlockDevice { major, minor }, vec![])),
        1 => Just((Kind::Fifo, vec![])),
        1 => Just((Kind::Socket, vec![])),
    ];
    prop_oneof![
        6 => (kinds, metas()).prop_map(|((kind, content), meta)| Entry::Node(Node { kind, meta }, content)),
        1 => any::<usize>().prop_map(Entry::Link),
    ]
}

/// A tree and the contents of its files.
pub(crate) fn trees_with_contents() -> impl Strategy<Value = (Tree, BTreeMap<Digest, Vec<u8>>)> {
    (metas(), vec((paths(), entries()), 0..40)).prop_map(|(root, named)| assembled(root, named))
}

/// A tree alone.
pub(crate) fn trees() -> impl Strategy<Value = Tree> {
    trees_with_contents().prop_map(|(tree, _)| tree)
}

/// A tree whose shape is all that matters: many folders, FIFOs and hard links under few names.
pub(crate) fn shapes() -> impl Strategy<Value = Tree> {
    let node = |kind: Kind| {
        let kinds = Just(kind);
        (kinds, 0..8_u16).prop_map(|(kind, mode)| {
            Entry::Node(Node { kind, meta: Meta { mode, ..Meta::default() } }, vec![])
        })
    };
    let entries = prop_oneof![2 => node(Kind::Directory), 3 => node(Kind::Fifo), 3 => any::<usize>().prop_map(Entry::Link)];
    vec((paths(), entries), 0..30).prop_map(|named| assembled(Meta::default(), named).0)
}

/// Puts entries into a tree one after the other, with the folders they need.
fn assembled(root: Meta, named: Vec<(TreePath, Entry)>) -> (Tree, BTreeMap<Digest, Vec<u8>>) {
    let mut builder = Builder::new();
    builder.put(TreePath::root(), Node { kind: Kind::Directory, meta: root });
    let mut contents = BTreeMap::new();
    let mut given: Vec<TreePath> = Vec::new();
    for (path, entry) in named {
        let mut missing = Vec::new();
        let mut folder = path.parent();
        while let Some(ancestor) = folder {
            folder = ancestor.parent();
            missing.push(ancestor);
        }
        for ancestor in missing.into_iter().rev() {
            if !matches!(builder.get(&ancestor), Some(Node { kind: Kind::Directory, .. })) {
                let meta = Meta { mode: 0o755, ..Meta::default() };
                builder.put(ancestor, Node { kind: Kind::Directory, meta });
            }
        }
        match entry {
            Entry::Node(node, content) => {
                if let Kind::File { digest, .. } = node.kind {
                    contents.insert(digest, content);
                }
                builder.put(path.clone(), node);
            }
            // A name that is gone again, or a folder's, makes no link.
            Entry::Link(back) if !given.is_empty() => {
                let _ = builder.link(path.clone(), &given[back % given.len()]);
            }
            Entry::Link(_) => {}
        }
        given.push(path);
    }
    (builder.finish().expect("parents were made"), contents)
}
