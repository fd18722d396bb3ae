//! Running the tools that judge our formats, and trees to give them.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use kiln_artifact::tree::{Kind, Meta, Node, Timestamp, Tree, TreePath};
use kiln_digest::Digest;

/// Runs `tool` in `folder` with `input`, and returns its standard output. A tool that is missing fails the test:
/// a judge that did not sit has not agreed.
pub fn run(
    tool: &str,
    arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
    folder: &Path,
    input: &[u8],
) -> Vec<u8> {
    let mut child = Command::new(tool)
        .args(arguments)
        .current_dir(folder)
        .env("LC_ALL", "C")
        .env("TZ", "UTC")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| {
            unreachable!("this test needs `{tool}` to judge by: {error} (Debian: cpio, tar, attr, erofs-utils, squashfs-tools)")
        });
    let mut stdin = child.stdin.take().expect("piped");
    let output = std::thread::scope(|scope| {
        // A tool may leave its input before the end.
        scope.spawn(move || drop(stdin.write_all(input)));
        child.wait_with_output().expect("the tool runs")
    });
    assert!(
        output.status.success(),
        "`{tool}` fails: {}\nand says: {}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

pub fn path(text: &str) -> TreePath {
    TreePath::new(text.as_bytes()).expect("a good path")
}

/// A tree with its contents, put together by hand.
#[derive(Default)]
pub struct Made {
    pub tree: Tree,
    pub contents: BTreeMap<Digest, Vec<u8>>,
}

impl Made {
    pub fn new() -> Self {
        Self { tree: Tree::new(), contents: BTreeMap::new() }
    }

    pub fn put(&mut self, name: &[u8], kind: Kind, mode: u16) -> &mut Meta {
        let path = TreePath::new(name).expect("a good path");
        let mtime = Timestamp { seconds: 1_700_000_000, nanoseconds: 0 };
        self.tree.insert(path.clone(), Node { kind, meta: Meta { mode, mtime, ..Meta::default() } });
        &mut self.tree.get_mut(&path).expect("inserted").meta
    }

    pub fn folder(&mut self, name: &str) -> &mut Meta {
        self.put(name.as_bytes(), Kind::Directory, 0o755)
    }

    pub fn file(&mut self, name: &str, content: &[u8]) -> &mut Meta {
        let digest = Digest::of(content);
        self.contents.insert(digest, content.to_vec());
        self.put(name.as_bytes(), Kind::File { digest, size: content.len() as u64 }, 0o644)
    }

    pub fn link(&mut self, name: &str, holder: &str) {
        self.tree.insert(path(name), Node::hard_link(path(holder)));
    }

    /// One node of every kind, hard links among them.
    pub fn of_every_kind() -> Self {
        let mut made = Self::new();
        made.folder("bin").mode = 0o1777;
        made.file("bin/tool", b"#!/bin/sh\n").mode = 0o4755;
        made.link("bin/tool2", "bin/tool");
        made.link("zz", "bin/tool");
        made.file("bin/owned", &[7; 5000]).uid = 70_000;
        made.put(b"bin/link", Kind::Symlink(b"../etc/motd"[..].into()), 0o777);
        made.put(b"null", Kind::CharDevice { major: 1, minor: 3 }, 0o666).gid = 5;
        made.put(b"sda17", Kind::BlockDevice { major: 259, minor: 70_000 }, 0o660);
        made.put(b"fifo", Kind::Fifo, 0o600);
        made.put(b"socket", Kind::Socket, 0o700);
        made.folder("empty");
        made.file("empty.txt", b"");
        made
    }
}
