//! Putting a tree together from an image's inodes, with a count of all that it costs.

use std::collections::{BTreeMap, BTreeSet};

use kiln_digest::{Digest, Hasher};

use super::{Image, ImageError, Limits};
use crate::tree::{Builder, Kind, Meta, Node, TreePath};

/// Collects nodes by path. Inodes are known by whatever number the format gives them.
pub(crate) struct Collector<'a> {
    builder: Builder,
    limits: &'a Limits,
    names: u64,
    text_bytes: u64,
    content_bytes: u64,
    folders: BTreeSet<u64>,
    /// The first name of everything that is no folder.
    first: BTreeMap<u64, TreePath>,
    unread: BTreeSet<TreePath>,
}

fn spend(spent: &mut u64, more: u64, limit: u64, what: &'static str) -> Result<(), ImageError> {
    *spent = spent.saturating_add(more);
    if *spent > limit { Err(ImageError::Limit { what, limit }) } else { Ok(()) }
}

impl<'a> Collector<'a> {
    pub fn new(limits: &'a Limits) -> Self {
        Self {
            builder: Builder::new(),
            limits,
            names: 0,
            text_bytes: 0,
            content_bytes: 0,
            folders: BTreeSet::new(),
            first: BTreeMap::new(),
            unread: BTreeSet::new(),
        }
    }

    /// Counts a name, before it is kept.
    pub fn count_name(&mut self) -> Result<(), ImageError> {
        spend(&mut self.names, 1, self.limits.names, "names")
    }

    /// The path of `name` in `folder`, which must be its only one.
    pub fn name(&mut self, folder: &TreePath, name: &[u8]) -> Result<TreePath, ImageError> {
        let path = folder.join(name)?;
        self.text(path.as_bytes().len())?;
        if self.builder.get(&path).is_some() {
            return Err(ImageError::Corrupt("two entries of one name"));
        }
        Ok(path)
    }

    /// Counts a link's text or an attribute.
    pub fn text(&mut self, bytes: usize) -> Result<(), ImageError> {
        spend(&mut self.text_bytes, bytes as u64, self.limits.text_bytes, "bytes of names and attributes")
    }

    /// Counts a content of `bytes`, before it is read.
    pub fn content(&mut self, bytes: u64) -> Result<(), ImageError> {
        spend(&mut self.content_bytes, bytes, self.limits.content_bytes, "bytes of content")
    }

    /// Puts the folder that is inode `number` at `path`. One that is reached twice could be its own parent.
    pub fn folder(&mut self, path: TreePath, number: u64, meta: Meta) -> Result<(), ImageError> {
        if !self.folders.insert(number) {
            return Err(ImageError::Corrupt("a folder with two names"));
        }
        self.builder.put(path, Node { kind: Kind::Directory, meta });
        Ok(())
    }

    /// Makes `path` another name of inode `number`, if that has one already.
    pub fn link(&mut self, path: &TreePath, number: u64) -> bool {
        self.first.get(&number).is_some_and(|first| self.builder.link(path.clone(), first))
    }

    /// Puts what is no folder at `path`.
    pub fn leaf(&mut self, path: TreePath, number: u64, kind: Kind, meta: Meta) {
        self.first.insert(number, path.clone());
        self.builder.put(path, Node { kind, meta });
    }

    /// A file of `size` bytes whose content is not read.
    pub fn unread(&mut self, path: &TreePath, size: u64) -> Kind {
        self.unread.insert(path.clone());
        Kind::File { digest: Digest::of(b""), size }
    }

    pub fn finish(self) -> Result<Image, ImageError> {
        let tree = self.builder.finish()?;
        // What was found first need not be the name that holds the node, and all names of it are meant.
        let holder = |path: &TreePath| match tree.get(path).map(|node| &node.kind) {
            Some(Kind::HardLink(holder)) => holder.clone(),
            _ => path.clone(),
        };
        let held: BTreeSet<TreePath> = self.unread.iter().map(holder).collect();
        let mut unread = BTreeSet::new();
        if !held.is_empty() {
            let paths = tree.iter().map(|(path, _)| path);
            unread.extend(paths.filter(|path| held.contains(&holder(path))).cloned());
        }
        Ok(Image { tree, unread })
    }
}

/// Hashes a content that comes in pieces, some of them holes.
#[derive(Default)]
pub(crate) struct ContentHasher(Hasher);

impl ContentHasher {
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub fn zeros(&mut self, mut count: u64) {
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        while count > 0 {
            let piece = usize::try_from(count).unwrap_or(usize::MAX).min(ZEROS.len());
            self.0.update(&ZEROS[..piece]);
            count -= piece as u64;
        }
    }

    pub fn finish(self) -> Kind {
        let (digest, size) = self.0.finish();
        Kind::File { digest, size }
    }
}
