//! A reader of erofs images for tests. It follows the kernel's documentation and shares nothing with the writer, so
//! that the two can disagree; like the kernel, it finds names by bisection and refuses inline content across blocks.

use std::collections::BTreeMap;
use std::io;

use kiln_digest::Digest;
use proptest::prelude::*;

use super::write;
use crate::tree::{Builder, Kind, Meta, Node, Timestamp, Tree, TreePath, sample};

struct Reader<'a>(&'a [u8]);

struct Inode {
    nid: u64,
    is_inline: bool,
    mode: u16,
    links: u32,
    size: usize,
    union: u32,
    meta: Meta,
    /// Where attributes end and inline content begins.
    end: usize,
}

impl Reader<'_> {
    fn number(&self, at: usize, bytes: usize) -> u64 {
        self.0[at..at + bytes].iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
    }

    fn u16(&self, at: usize) -> u16 {
        self.number(at, 2).try_into().expect("two bytes")
    }

    fn u32(&self, at: usize) -> u32 {
        self.number(at, 4).try_into().expect("four bytes")
    }

    fn size(&self, at: usize, bytes: usize) -> usize {
        self.number(at, bytes).try_into().expect("an address in memory")
    }

    fn timestamp(&self, at: usize) -> Timestamp {
        Timestamp { seconds: self.number(at, 8).cast_signed(), nanoseconds: self.u32(at + 8) }
    }

    fn inode(&self, nid: u64) -> Inode {
        let at = usize::try_from(nid).expect("in memory") * 32 + 4096 * self.size(1024 + 40, 4);
        let format = self.u16(at);
        let xattr_count = usize::from(self.u16(at + 2));
        let mode = self.u16(at + 4);
        let is_extended = format & 1 == 1;
        let (length, size, union, uid, gid, links, mtime) = if is_extended {
            let (uid, gid, links) = (self.u32(at + 24), self.u32(at + 28), self.u32(at + 44));
            (64, self.size(at + 8, 8), self.u32(at + 16), uid, gid, links, self.timestamp(at + 32))
        } else {
            let [uid, gid, links] = [24, 26, 6].map(|field| u32::from(self.u16(at + field)));
            (32, self.size(at + 8, 4), self.u32(at + 16), uid, gid, links, self.timestamp(1024 + 24))
        };
        assert!(at % 4096 + length <= 4096, "an inode lies in one block");
        let mut xattrs = BTreeMap::new();
        let mut end = at + length;
        if xattr_count > 0 {
            assert_eq!(self.0[end + 4], 0, "no shared attributes");
            let last = end + 12 + 4 * (xattr_count - 1);
            end += 12;
            while end < last {
                let name_bytes = usize::from(self.0[end]);
                let value_bytes = usize::from(self.u16(end + 2));
                let prefix: &[u8] = match self.0[end + 1] {
                    1 => b"user.",
                    2 => b"system.posix_acl_access",
                    3 => b"system.posix_acl_default",
                    4 => b"trusted.",
                    6 => b"security.",
                    index => unreachable!("attribute index {index}"),
                };
                let name = [prefix, &self.0[end + 4..end + 4 + name_bytes]].concat();
                end += 4 + name_bytes;
                xattrs.insert(name, self.0[end..end + value_bytes].to_vec());
                end = (end + value_bytes).next_multiple_of(4);
            }
            assert_eq!(end, last, "attributes are as long as the inode says");
        }
        let layout = format >> 1 & 7;
        assert!(matches!(layout, 0 | 2), "a flat layout");
        let meta = Meta { mode: mode & 0o7777, uid, gid, mtime, xattrs };
        Inode { nid, is_inline: layout == 2, mode, links, size, union, meta, end }
    }

    fn content(&self, inode: &Inode) -> Vec<u8> {
        let first = 4096 * usize::try_from(inode.union).expect("in memory");
        if !inode.is_inline {
            return if inode.size == 0 { vec![] } else { self.0[first..first + inode.size].to_vec() };
        }
        let in_blocks = (inode.size - 1) / 4096 * 4096;
        let tail = inode.size - in_blocks;
        assert!(inode.end % 4096 + tail <= 4096, "inline content lies in one block");
        let blocks = if in_blocks == 0 { &[] } else { &self.0[first..first + in_blocks] };
        [blocks, &self.0[inode.end..inode.end + tail]].concat()
    }

    /// Names, inode numbers and types of a block of a directory.
    fn dirents(block: &[u8]) -> Vec<(&[u8], u64, u8)> {
        let reader = Reader(block);
        let count = usize::from(reader.u16(8)) / 12;
        let name_at = |index| usize::from(reader.u16(index * 12 + 8));
        (0..count)
            .map(|index| {
                let end = if index + 1 < count { name_at(index + 1) } else { block.len() };
                let name = block[name_at(index)..end].split(|&byte| byte == 0).next().expect("one part");
                (name, reader.number(index * 12, 8), block[index * 12 + 10])
            })
            .collect()
    }

    /// The inode of `name`, found as the kernel does: the block by its first name, then the entry in it.
    fn lookup(&self, folder: &[u8], name: &[u8]) -> Option<(u64, u8)> {
        let blocks: Vec<_> = folder.chunks(4096).map(Self::dirents).collect();
        let block = blocks.partition_point(|block| block[0].0 <= name).checked_sub(1)?;
        let entry = blocks[block].binary_search_by(|entry| entry.0.cmp(name)).ok()?;
        Some((blocks[block][entry].1, blocks[block][entry].2))
    }

    /// The whole tree with its contents, checking what a tree does not show on the way.
    fn tree(&self) -> (Tree, BTreeMap<Digest, Vec<u8>>) {
        let mut builder = Builder::new();
        let mut contents = BTreeMap::new();
        let mut seen: BTreeMap<u64, (TreePath, u32)> = BTreeMap::new();
        let root = u64::from(self.u16(1024 + 14));
        let mut folders = vec![(TreePath::root(), root, root)];
        let mut folder_count = 0;
        while let Some((path, nid, parent)) = folders.pop() {
            folder_count += 1;
            let inode = self.inode(nid);
            assert_eq!(inode.mode >> 12, 0o4);
            builder.put(path.clone(), Node { kind: Kind::Directory, meta: inode.meta.clone() });
            let listing = self.content(&inode);
            let entries: Vec<_> = listing.chunks(4096).flat_map(Self::dirents).collect();
            assert!(entries.is_sorted_by(|one, other| one.0 < other.0), "{path} is sorted");
            assert_eq!(self.lookup(&listing, b"."), Some((nid, 2)));
            assert_eq!(self.lookup(&listing, b".."), Some((parent, 2)));
            let mut subfolders = 0;
            for (name, child, file_type) in
                entries.into_iter().filter(|(name, ..)| !matches!(*name, b"." | b".."))
            {
                assert_eq!(self.lookup(&listing, name), Some((child, file_type)));
                let path = path.join(name).expect("a good name");
                if file_type == 2 {
                    subfolders += 1;
                    folders.push((path, child, nid));
                } else if let Some((first, count)) = seen.get_mut(&child) {
                    *count += 1;
                    assert!(builder.link(path, first));
                } else {
                    let node = self.node(child, file_type, &mut contents);
                    builder.put(path.clone(), node);
                    seen.insert(child, (path, 1));
                }
            }
            assert_eq!(inode.links, 2 + subfolders, "{path}");
        }
        for (nid, (path, count)) in &seen {
            assert_eq!(self.inode(*nid).links, *count, "{path}");
        }
        assert_eq!(self.number(1024 + 16, 8), folder_count + seen.len() as u64, "inodes");
        assert_eq!(self.0.len(), 4096 * self.size(1024 + 36, 4), "blocks");
        (builder.finish().expect("a good tree"), contents)
    }

    fn node(&self, nid: u64, file_type: u8, contents: &mut BTreeMap<Digest, Vec<u8>>) -> Node {
        let inode = self.inode(nid);
        assert_eq!(inode.nid, nid);
        let device = || (inode.union >> 8 & 0xfff, inode.union & 0xff | inode.union >> 12 & 0xf_ff00);
        let kind = match (inode.mode >> 12, file_type) {
            (0o10, 1) => {
                let content = self.content(&inode);
                let digest = Digest::of(&content);
                contents.insert(digest, content);
                Kind::File { digest, size: inode.size as u64 }
            }
            (0o2, 3) => Kind::CharDevice { major: device().0, minor: device().1 },
            (0o6, 4) => Kind::BlockDevice { major: device().0, minor: device().1 },
            (0o1, 5) => Kind::Fifo,
            (0o14, 6) => Kind::Socket,
            (0o12, 7) => Kind::Symlink(self.content(&inode).into()),
            types => unreachable!("types {types:?}"),
        };
        Node { kind, meta: inode.meta }
    }
}

fn image(tree: &Tree, contents: &BTreeMap<Digest, Vec<u8>>) -> Vec<u8> {
    let mut out = io::Cursor::new(Vec::new());
    let written = write(tree, contents, &mut out).expect("a good tree");
    let image = out.into_inner();
    assert_eq!(written.bytes, image.len() as u64);
    image
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_tree_comes_back_from_its_image((tree, contents) in sample::trees_with_contents()) {
        let bytes = image(&tree, &contents);
        let (back, back_contents) = Reader(&bytes).tree();
        prop_assert_eq!(&back, &tree);
        for (_, node) in tree.iter() {
            if let Kind::File { digest, .. } = &node.kind {
                prop_assert!(back_contents.get(digest) == contents.get(digest));
            }
        }
        prop_assert!(image(&back, &back_contents) == bytes);
    }
}

#[test]
fn attributes_longer_than_a_block_come_back_with_content_after_them() {
    let mut tree = Tree::new();
    let mut contents = BTreeMap::new();
    for (name, value_bytes) in [(&b"a"[..], 65_535), (b"b", 4000), (b"c", 4096), (b"d", 1), (b"e", 0)] {
        let content = vec![b'c'; 100 + value_bytes % 4096];
        let digest = Digest::of(&content);
        let size = content.len() as u64;
        contents.insert(digest, content);
        let xattrs = [
            (b"security.capability".to_vec(), vec![1; 20]),
            (b"trusted.overlay.opaque".to_vec(), b"y".to_vec()),
            (b"user.long".to_vec(), vec![2; value_bytes]),
        ];
        let meta = Meta { xattrs: xattrs.into(), ..Meta::default() };
        let path = TreePath::new(name).expect("a good path");
        tree.insert(path, Node { kind: Kind::File { digest, size }, meta });
    }
    let bytes = image(&tree, &contents);
    assert_eq!(Reader(&bytes).tree(), (tree, contents));
}

#[test]
fn files_of_equal_content_share_their_blocks() {
    let mut tree = Tree::new();
    let content = [vec![b'x'; 20_000], vec![b'y'; 3_000]].concat();
    let digest = Digest::of(&content);
    for name in 0..100 {
        let kind = Kind::File { digest, size: content.len() as u64 };
        // Inodes of two lengths, so that the same end is inline in some only.
        let meta = Meta { uid: name % 2 * 100_000, ..Meta::default() };
        tree.insert(TreePath::new(name.to_string().as_bytes()).expect("a good path"), Node { kind, meta });
    }
    let contents = [(digest, content)].into();
    let bytes = image(&tree, &contents);
    assert!(bytes.len() < 20 * 4096, "{}", bytes.len());
    assert_eq!(Reader(&bytes).tree(), (tree, contents));
}
