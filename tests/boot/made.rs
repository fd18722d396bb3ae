//! A tree for our writers of file systems to write and a guest's kernel to show.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use kiln_artifact::archive::tar;
use kiln_artifact::tree::{Kind, Meta, Node, Timestamp, Tree, TreePath};
use kiln_digest::Digest;

/// A tree with its contents.
pub struct Made {
    pub tree: Tree,
    pub contents: BTreeMap<Digest, Vec<u8>>,
}

impl Made {
    /// One node of every kind that a folder of Linux may hold, attributes, and ten thousand files in one folder.
    pub fn new() -> Self {
        let mut made = Self { tree: Tree::new(), contents: BTreeMap::new() };
        made.put("bin", Kind::Directory, 0o1777).xattrs.insert(b"user.empty".to_vec(), vec![]);
        made.file("bin/tool", b"#!/bin/sh\n".to_vec()).mode = 0o4755;
        let holder = TreePath::new(b"bin/tool").expect("a good path");
        for name in ["bin/tool2", "zz"] {
            made.tree.insert(
                TreePath::new(name.as_bytes()).expect("a good path"),
                Node::hard_link(holder.clone()),
            );
        }
        made.file("owned", vec![7; 5000]).uid = 70_000;
        made.file("empty", vec![]).gid = 5;
        made.put("link", Kind::Symlink(b"../etc/motd"[..].into()), 0o777);
        made.put("longlink", Kind::Symlink([b't'; 4095].into()), 0o777);
        made.put("null", Kind::CharDevice { major: 1, minor: 3 }, 0o666).gid = 5;
        made.put("sda17", Kind::BlockDevice { major: 259, minor: 70_000 }, 0o660);
        made.put("fifo", Kind::Fifo, 0o600);
        let xattrs = &mut made.file("ping", vec![9; 9000]).xattrs;
        xattrs.insert(b"security.capability".to_vec(), [&[1, 0, 0, 2, 0, 4][..], &[0; 14]].concat());
        xattrs.insert(b"user.note".to_vec(), b"a\n=b".repeat(2000));
        xattrs.insert(b"trusted.overlay.opaque".to_vec(), b"y".to_vec());
        made.put("many", Kind::Directory, 0o755);
        // Every length up to some blocks, and names of every length that a directory block can meet.
        for number in 0..10_000 {
            let content = vec![u8::try_from(number % 251).expect("below 251"); number];
            made.file(&format!("many/{}{number}", "x".repeat(number % 200)), content);
        }
        made
    }

    /// Compares the tree with what a guest's GNU tar said of it.
    pub fn compare(&self, archive: &Path) {
        let archive = File::open(archive).expect("an output");
        let limits = tar::Limits { members: 1 << 20, content_bytes: 1 << 32 };
        let tree = tar::read(archive, &mut BTreeMap::new(), &limits).expect("a good archive");
        let differing: Vec<_> =
            tree.iter().filter(|(path, node)| self.tree.get(path) != Some(node)).collect();
        assert_eq!(differing, []);
        assert_eq!(tree.digest(), self.tree.digest());
    }

    pub fn put(&mut self, name: &str, kind: Kind, mode: u16) -> &mut Meta {
        let path = TreePath::new(name.as_bytes()).expect("a good path");
        let mtime = Timestamp { seconds: 1_700_000_000, nanoseconds: 0 };
        self.tree.insert(path.clone(), Node { kind, meta: Meta { mode, mtime, ..Meta::default() } });
        &mut self.tree.get_mut(&path).expect("inserted").meta
    }

    pub fn file(&mut self, name: &str, content: Vec<u8>) -> &mut Meta {
        let (digest, size) = (Digest::of(&content), content.len() as u64);
        self.contents.insert(digest, content);
        self.put(name, Kind::File { digest, size }, 0o644)
    }
}
