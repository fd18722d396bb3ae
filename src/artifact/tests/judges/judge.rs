//! Running the tools that judge our formats, and trees to give them.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
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
    // Where a user's PATH need not lead.
    let for_root = Path::new("/usr/sbin").join(tool);
    let program = if for_root.exists() { for_root.as_os_str() } else { OsStr::new(tool) };
    let mut child = Command::new(program)
        .args(arguments)
        .current_dir(folder)
        // mtools takes names in the encoding of the locale.
        .env("LC_ALL", "C.UTF-8")
        .env("TZ", "UTC")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| {
            unreachable!("this test needs `{tool}` to judge by: {error} (Debian: cpio, tar, attr, erofs-utils, squashfs-tools, cryptsetup-bin, dosfstools, mtools, gdisk, fdisk, zstd)")
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

    /// One node of every kind that whoever runs the test may make: only root makes devices.
    pub fn that_we_may_unpack() -> Self {
        let mut made = Self::of_every_kind();
        if !is_root() {
            made.tree.retain(|path, _| !matches!(path.as_bytes(), b"null" | b"sda17"));
        }
        made
    }

    /// Compares what a tool unpacked to `folder` with the tree: all but attributes.
    pub fn compare(&self, folder: &Path) {
        let privileged = is_root();
        for (path, node) in self.tree.iter() {
            let holder = if let Kind::HardLink(holder) = &node.kind { holder } else { path };
            let node = self.tree.get(holder).expect("held");
            let on_disk = folder.join(OsStr::from_bytes(path.as_bytes()));
            let metadata = fs::symlink_metadata(&on_disk).expect("unpacked");
            let file_type = metadata.file_type();
            match &node.kind {
                Kind::File { digest, .. } => {
                    assert!(fs::read(&on_disk).expect("readable") == self.contents[digest], "{path}")
                }
                Kind::Directory => assert!(file_type.is_dir(), "{path}"),
                Kind::Symlink(text) => {
                    let found = fs::read_link(&on_disk).expect("a link");
                    assert_eq!(found.as_os_str().as_bytes(), &text[..], "{path}");
                }
                Kind::Fifo => assert!(file_type.is_fifo(), "{path}"),
                Kind::Socket => assert!(file_type.is_socket(), "{path}"),
                Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor } => {
                    assert_eq!(metadata.rdev(), device_number(*major, *minor), "{path}");
                }
                Kind::HardLink(_) => unreachable!("resolved"),
            }
            assert_eq!(
                (metadata.mtime(), metadata.mtime_nsec()),
                (node.meta.mtime.seconds, i64::from(node.meta.mtime.nanoseconds)),
                "{path}"
            );
            if privileged && !file_type.is_symlink() {
                // A tool that changes the owner last takes the set-id bits off files.
                assert_eq!(metadata.mode() & 0o777, u32::from(node.meta.mode & 0o777), "{path}");
            }
            if privileged {
                assert_eq!((metadata.uid(), metadata.gid()), (node.meta.uid, node.meta.gid), "{path}");
            }
        }
    }
}

/// Whether root runs the test.
pub fn is_root() -> bool {
    fs::metadata("/proc/self").expect("procfs").uid() == 0
}

/// As user space has it (`makedev(3)`), which for twelve bits of major is the kernel's encoding widened.
fn device_number(major: u32, minor: u32) -> u64 {
    u64::from(minor & 0xff) | u64::from(major) << 8 | u64::from(minor & !0xff) << 12
}
