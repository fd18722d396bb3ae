//! The erofs writer: trees of every shape, well formed and not, written as images and read back.
//!
//! An input is choices: each byte decides one thing about the tree, and what is missing is zeros.

use std::collections::BTreeMap;
use std::fs;
use std::io::Cursor;
use std::process::{Command, Stdio};

use kiln_artifact::erofs;
use kiln_artifact::image::Limits;
use kiln_artifact::tree::{Kind, Meta, Node, Timestamp, Tree, TreePath};
use kiln_digest::Digest;
use tempfile::TempDir;

use crate::driver::{Seen, Target, campaign};
use crate::random::Random;

/// One of so many images is given to `fsck.erofs`, which is a process each time.
const JUDGED: u64 = 4096;
/// Most nodes that an input makes.
const MOST_NODES: usize = 64;
const LIMITS: Limits = Limits { names: 1000, text_bytes: 8 << 20, content_bytes: 8 << 20 };

/// Lengths round the boundaries of blocks, and of the room for ends that lie beside an inode.
const LENGTHS: [usize; 16] =
    [0, 1, 31, 100, 2016, 2048, 3900, 4000, 4032, 4064, 4095, 4096, 4097, 8191, 8192, 20_000];

struct Trees {
    folder: TempDir,
    judge: bool,
    written: u64,
}

/// Takes choices off an input.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::from(self.byte()) % bound
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes([self.byte(), self.byte(), self.byte(), self.byte()])
    }

    fn name(&mut self) -> Vec<u8> {
        match self.byte() {
            choice @ 0..=0xbf => vec![b'a' + choice % 6],
            choice @ 0xc0..=0xdf => vec![choice; usize::from(choice - 0xbf) * 8 - 1],
            0xe0..=0xef => vec![self.byte(), self.byte()],
            _ => [b"...", &b"+-"[..], b" \n", b".a"][self.below(4)].to_vec(),
        }
    }

    fn path(&mut self) -> Option<TreePath> {
        let parts = 1 + self.below(4);
        let names: Vec<_> = (0..parts).map(|_| self.name()).collect();
        TreePath::new(&names.join(&b'/')).ok()
    }

    fn meta(&mut self) -> Meta {
        let choice = self.byte();
        let mut meta = Meta { mode: 0o644 | u16::from(choice & 7) << 9, ..Meta::default() };
        if choice & 0x08 != 0 {
            (meta.uid, meta.gid) = (self.u32(), self.u32());
        }
        if choice & 0x10 != 0 {
            let seconds = i64::from(self.u32()) - (1 << 31);
            meta.mtime = Timestamp { seconds, nanoseconds: self.u32() >> 2 };
        }
        for _ in 0..if choice & 0xe0 == 0xe0 { self.below(6) } else { 0 } {
            let name = match self.below(7) {
                0 => b"security.capability".to_vec(),
                1 => b"system.posix_acl_access".to_vec(),
                2 => b"system.posix_acl_default".to_vec(),
                3 => b"trusted.overlay.opaque".to_vec(),
                4 => [b"user.".to_vec(), vec![b'u'; usize::from(self.byte())]].concat(),
                5 => b"unknown.x".to_vec(),
                _ => b"user.a".to_vec(),
            };
            let length = match self.below(8) {
                0 => 65_535 + self.below(3),
                1 => 4096,
                _ => usize::from(self.byte()),
            };
            meta.xattrs.insert(name, vec![self.byte(); length]);
        }
        meta
    }

    fn kind(&mut self, given: &[TreePath], contents: &mut BTreeMap<Digest, Vec<u8>>) -> Kind {
        match self.below(16) {
            0..=3 => Kind::Directory,
            4..=9 => {
                let length = LENGTHS[self.below(LENGTHS.len())];
                let content = vec![self.byte() % 3; length];
                let digest = Digest::of(&content);
                contents.insert(digest, content);
                Kind::File { digest, size: length as u64 }
            }
            10 => {
                let length = LENGTHS[self.below(LENGTHS.len())].min(4096);
                Kind::Symlink(vec![self.byte(); length].into())
            }
            11 => Kind::CharDevice { major: self.u32() >> 19, minor: self.u32() >> 11 },
            12 => Kind::BlockDevice { major: self.u32() >> 20, minor: self.u32() >> 12 },
            13 => [Kind::Fifo, Kind::Socket][self.below(2)].clone(),
            _ if given.is_empty() => Kind::Fifo,
            _ => Kind::HardLink(given[self.below(given.len())].clone()),
        }
    }

    /// A tree, and the contents of its files. With most choices it is well formed.
    fn tree(mut self) -> (Tree, BTreeMap<Digest, Vec<u8>>) {
        let (mut tree, mut contents, mut given) = (Tree::new(), BTreeMap::new(), Vec::new());
        let careless = self.byte() > 0xf0;
        tree.insert(TreePath::root(), Node { kind: Kind::Directory, meta: self.meta() });
        while !self.0.is_empty() && tree.len() < MOST_NODES {
            let Some(path) = self.path() else { continue };
            let kind = self.kind(&given, &mut contents);
            let is_link = matches!(kind, Kind::HardLink(_));
            let meta = if is_link { Meta::default() } else { self.meta() };
            if !careless && !fits(&mut tree, &path, &kind) {
                continue;
            }
            given.push(path.clone());
            tree.insert(path, Node { kind, meta });
        }
        (tree, contents)
    }
}

/// Makes the folders that `path` needs, and says whether the tree is well formed with such a node there.
fn fits(tree: &mut Tree, path: &TreePath, kind: &Kind) -> bool {
    if tree.get(path).is_some() {
        return false;
    }
    if let Kind::HardLink(target) = kind
        && (target >= path
            || matches!(
                tree.get(target).map(|node| &node.kind),
                None | Some(Kind::Directory | Kind::HardLink(_))
            ))
    {
        return false;
    }
    let mut missing = Vec::new();
    let mut folder = path.parent();
    while let Some(ancestor) = folder {
        match tree.get(&ancestor).map(|node| &node.kind) {
            Some(Kind::Directory) => break,
            Some(_) => return false,
            None => folder = ancestor.parent(),
        }
        missing.push(ancestor);
    }
    for ancestor in missing {
        tree.insert(ancestor, Node { kind: Kind::Directory, meta: Meta { mode: 0o755, ..Meta::default() } });
    }
    true
}

impl Target for Trees {
    const NAME: &'static str = "erofs";
    const MOST_BYTES: usize = 1024;

    fn new() -> Self {
        let judge = Command::new("fsck.erofs").arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status();
        Self { folder: tempfile::tempdir().expect("a folder"), judge: judge.is_ok(), written: 0 }
    }

    fn generate(&mut self, random: &mut Random, input: &mut Vec<u8>) {
        let length = random.pick(&[10, 40, 150, 600]);
        input.extend(random.bytes(length));
    }

    fn run(&mut self, input: &[u8], seen: &mut Seen) {
        let (tree, contents) = Choices(input).tree();
        let well_formed = tree.check();
        let mut image = Cursor::new(Vec::new());
        let written = match erofs::write(&tree, &contents, &mut image) {
            Ok(written) => written,
            Err(error) => {
                assert_eq!(well_formed.is_err(), matches!(error, erofs::ErofsError::Tree(_)), "{error}");
                let words =
                    error.to_string().bytes().take(20).fold(1, |hash: u64, byte| hash * 3 + u64::from(byte));
                return seen.note(words);
            }
        };
        let image = image.into_inner();
        assert_eq!(written.bytes, image.len() as u64);
        let back = erofs::read(&image.as_slice(), &LIMITS).expect("an image of our own");
        assert!(back.unread.is_empty());
        assert!(back.tree == tree, "the image is not the tree");
        for (_, node) in tree.iter() {
            let Meta { uid, gid, xattrs, .. } = &node.meta;
            let kind = match &node.kind {
                Kind::Directory => 0,
                Kind::File { size, .. } => 16 + size / 1024,
                Kind::Symlink(text) => 64 + text.len() as u64 / 1024,
                Kind::HardLink(_) => 1,
                Kind::CharDevice { .. } | Kind::BlockDevice { .. } => 2,
                Kind::Fifo | Kind::Socket => 3,
            };
            seen.note(1 << 32 | kind << 8 | u64::from(*uid.max(gid) > 65_535) << 4 | xattrs.len() as u64);
        }
        self.written += 1;
        if self.judge && self.written % JUDGED == 1 {
            let path = self.folder.path().join("image");
            fs::write(&path, &image).expect("room");
            let output = Command::new("fsck.erofs").arg(&path).output().expect("the judge");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
    }

    fn memory_limit(_: usize) -> usize {
        // 64 files of at most 20,000 bytes and attributes of at most 256 KiB each; the image twice while it grows.
        128 << 20
    }
}

#[test]
fn every_tree_is_refused_or_comes_back_from_its_image() {
    campaign::<Trees>();
}
