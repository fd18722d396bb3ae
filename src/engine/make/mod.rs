//! Steps that make artifacts: on the host, by kiln's own writers, from what is known by digest. No machine, no foreign
//! tool, no foreign code.
//!
//! [`select`] takes files out of WORK, SRCDIR, roots and kiln's programs; this file puts them together and writes. All
//! that goes in is in the step's key ([`Bench::ingredients`]), so its trace has nothing to say but what came out.

mod error;
mod record;
mod select;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};

use kiln_artifact::tree::{Kind, Layer, Meta, Node, Timestamp, Tree, TreePath};
use kiln_artifact::uefi::uki::{self, UkiError};
use kiln_artifact::{cpio, erofs, fat, squashfs, verity};
use kiln_digest::Digest;

use crate::plan::make::{From, Make, Origin, Pattern, Unified, What, fill};
use crate::sign::Leaks;
use crate::sign::record::command_line;
use crate::store::Store;

pub use error::MakeError;
pub use select::{Materials, Source};

/// Changes with what is made of the same ingredients.
const FORMAT: u32 = 1;
/// Parts of a unified kernel image are held in memory.
const PART_BYTES_MAX: u64 = 1 << 32;

/// Where things are made.
pub struct Bench<'a> {
    /// Contents, and what is made.
    pub store: &'a Store,
    /// What there is to make them of.
    pub materials: &'a dyn Materials,
    /// What the step sees in WORK.
    pub view: &'a Tree,
    /// What made files are dated, seconds since 1970.
    pub epoch: i64,
    /// What finds the signing keys, which go into nothing that is made.
    pub leaks: &'a Leaks,
}

impl Bench<'_> {
    /// What goes into `makes`, for a key: names, and digests of what they stand for now.
    ///
    /// # Errors
    /// [`MakeError`].
    pub fn ingredients(&self, makes: &[Make]) -> Result<Vec<(String, String)>, MakeError> {
        let mut parts = vec![
            ("the form of what is made".to_owned(), FORMAT.to_string()),
            ("what is made".to_owned(), format!("{makes:?}")),
            ("the date of what is made".to_owned(), self.epoch.to_string()),
        ];
        let mut seen = BTreeSet::new();
        for from in makes.iter().flat_map(Make::parts) {
            let name = match &from.origin {
                Origin::Work(path) => format!("`{}` in WORK", path.text()),
                Origin::Source(path) => format!("`{}` in SRCDIR", path.text()),
                Origin::Root { spec, .. } => format!("root {spec}"),
                Origin::Program(name) => format!("kiln's program `{name}`"),
                Origin::Text(_) => continue,
            };
            if seen.insert((name.clone(), format!("{from:?}"))) {
                parts.push((name, self.known(from)?));
            }
        }
        Ok(parts)
    }

    /// What `from` stands for, as a digest; of what an earlier make makes nothing is known yet, and its own ingredients
    /// say all.
    fn known(&self, from: &From) -> Result<String, MakeError> {
        let stars = match from.origin.pattern() {
            Some(pattern) if pattern.has_star() => self.stars(from, &Tree::new())?,
            _ => vec![String::new()],
        };
        let mut text = String::new();
        // Which modules are taken says the recipe, and of what the folder.
        let from = &From { modules: Vec::new(), ..from.clone() };
        for star in stars {
            let digest = match self.take(from, &star, &Tree::new()) {
                Ok(tree) => tree.digest().to_string(),
                Err(MakeError::Missing { .. }) => "nothing".to_owned(),
                Err(error) => return Err(error),
            };
            text.push_str(&format!("{star} {digest}\n"));
        }
        Ok(text.trim().to_owned())
    }

    /// Makes it all, and gives the tree of what was made; the contents are in the store.
    ///
    /// # Errors
    /// [`MakeError`].
    pub fn make(&self, makes: &[Make], progress: &mut dyn FnMut(&str)) -> Result<Tree, MakeError> {
        let mut made = Tree::new();
        for make in makes {
            if let What::Record(recorded) = &make.what {
                // Several makes of one step add to one record.
                let path = TreePath::new(make.path.text().as_bytes())?;
                let record = self.record(recorded, make.range(), &made, &path)?;
                made.remove_subtree(&path);
                self.put(&mut made, make.path.text(), &mut &record[..])?;
                continue;
            }
            let stars = match make.range() {
                Some(range) => self.stars(range, &made)?,
                None => vec![String::new()],
            };
            if stars.is_empty() && !make.optional {
                let range = make.range().map(|range| format!("{range:?}")).unwrap_or_default();
                let pattern = make.range().and_then(|range| range.origin.pattern());
                return Err(MakeError::Nothing(pattern.map_or(range, |path| path.text().to_owned())));
            }
            let is_single = make.globs().iter().all(|glob| !glob.contains('*') || glob.contains("**"));
            if let (true, [one, other, ..]) = (is_single, &stars[..]) {
                let pattern = make.range().and_then(|range| range.origin.pattern());
                let pattern = pattern.map_or_else(String::new, |pattern| pattern.text().to_owned());
                let (path, one, other) = (make.globs().join("`, `"), one.clone(), other.clone());
                return Err(MakeError::Several { path, pattern, one, other });
            }
            for star in &stars {
                // What is missing shows before anything is made of the rest.
                match self.make_one(make, star, &mut made, progress) {
                    Err(MakeError::Missing { .. } | MakeError::Empty(_)) if make.optional => {}
                    done => done?,
                }
            }
        }
        Ok(made)
    }

    fn make_one(
        &self,
        make: &Make,
        star: &str,
        made: &mut Tree,
        progress: &mut dyn FnMut(&str),
    ) -> Result<(), MakeError> {
        let path = make.path.bind(star);
        match &make.what {
            What::Unified(parts) => {
                progress(&format!("making {path}"));
                let image = self.unified(parts, star, made, &path)?;
                return self.put(made, &path, &mut &image[..]);
            }
            What::Verity { hash } => {
                progress(&format!("making {path}"));
                return self.verity(&make.from, hash.as_ref(), &path, star, made);
            }
            _ => {}
        }
        let mut tree = self.folder_tree();
        for from in &make.from {
            let part = match self.take(from, star, made) {
                Err(MakeError::Missing { .. }) if from.optional => continue,
                part => part?,
            };
            let mut layer = Layer::new();
            for (path, node) in part.iter().filter(|(path, _)| !path.is_root()) {
                layer.insert(path.clone(), node.clone());
            }
            if let Some(root) = part.get(&TreePath::root()).filter(|_| from.at.is_none() && part.len() > 1) {
                layer.insert(TreePath::root(), root.clone());
            }
            tree = tree.overlay(&layer)?;
        }
        if tree.len() < 2 {
            return Err(MakeError::Empty(path));
        }
        self.refuse_keys(&tree, &make.from, star, made, &path)?;
        let contents = self.store.blobs();
        let mut file = match &make.what {
            What::Files => return self.keep(made, &path, &tree),
            _ => {
                progress(&format!("making {path}"));
                tempfile::tempfile_in(self.store.temporary())
                    .map_err(MakeError::io("make a file in the store"))?
            }
        };
        match &make.what {
            What::Squashfs { codec, block_bytes } => {
                let without = without_lists(&mut tree);
                if without > 0 {
                    progress(&format!(
                        "{path} is without the access control lists of {without} files: squashfs has none"
                    ));
                }
                let options = squashfs::Options {
                    codec: *codec,
                    block_bytes: *block_bytes,
                    mkfs_time: u32::try_from(self.epoch).unwrap_or_default(),
                    ..squashfs::Options::default()
                };
                squashfs::write(&tree, contents, &mut file, &options)
                    .map_err(|source| MakeError::Squashfs { path: path.clone(), source })?;
            }
            What::Erofs => {
                erofs::write(&tree, contents, &mut file)
                    .map_err(|source| MakeError::Erofs { path: path.clone(), source })?;
            }
            What::Cpio(encoding) => {
                let options = cpio::Options { omit_root: true, drop_xattrs: true };
                let mut out = io::BufWriter::new(&mut file);
                cpio::write_encoded(&tree, contents, &mut out, options, *encoding)
                    .map_err(|source| MakeError::Cpio { path: path.clone(), source })?;
                out.flush().map_err(MakeError::io("write an archive"))?;
            }
            What::Fat { label, size_bytes } => {
                let options =
                    fat::Options { size_bytes: *size_bytes, label: *label, ..fat::Options::default() };
                fat::write(&tree, contents, &mut file, &options)
                    .map_err(|source| MakeError::Fat { path: path.clone(), source })?;
            }
            What::Files | What::Verity { .. } | What::Unified(_) | What::Record(_) => {}
        }
        self.put_file(made, &path, file)
    }

    /// Refuses to make `artifact` of `tree`, which is taken `from` where that lies, if it has one of the owner's private keys
    /// in it. The store has no copy then that it took in for this.
    fn refuse_keys(
        &self,
        tree: &Tree,
        from: &[From],
        star: &str,
        made: &Tree,
        artifact: &str,
    ) -> Result<(), MakeError> {
        let Some((path, digest, key)) = self.keys(tree)?.into_iter().next() else { return Ok(()) };
        let mut copies = BTreeSet::from([digest]);
        for from in from {
            // What was joined has its parts in the store, too.
            if let Ok(parts) = self.take(&From { join: false, ..from.clone() }, star, made) {
                copies.extend(self.keys(&parts)?.into_iter().map(|(_, digest, _)| digest));
            }
        }
        // A root, and what a step put out, are others' as well.
        let is_of_root = from.iter().any(|from| matches!(from.origin, Origin::Root { .. }));
        let put_out: BTreeSet<Digest> = self.view.iter().filter_map(|(_, node)| content(node)).collect();
        let mut is_gone = true;
        for copy in &copies {
            is_gone &= !is_of_root && !put_out.contains(copy) && self.store.blobs().discard(copy).is_ok();
        }
        Err(MakeError::Private { path, key: key.to_owned(), artifact: artifact.to_owned(), is_gone })
    }

    /// The files of `tree` that have keys in them, each content once, and the keys.
    fn keys(&self, tree: &Tree) -> Result<Vec<(TreePath, Digest, &'static str)>, MakeError> {
        let (mut seen, mut found) = (BTreeSet::new(), Vec::new());
        for (path, node) in tree.iter() {
            let Some(digest) = content(node).filter(|digest| seen.insert(*digest)) else { continue };
            let key = self.leaks.find(&digest, || self.store.blobs().file(&digest));
            let key = key.map_err(MakeError::io("look for keys in what is made"))?;
            found.extend(key.map(|key| (path.clone(), digest, key)));
        }
        Ok(found)
    }

    fn verity(
        &self,
        from: &[From],
        hash: Option<&Pattern>,
        path: &str,
        star: &str,
        made: &mut Tree,
    ) -> Result<(), MakeError> {
        let Some(from) = from.first() else { return Err(MakeError::Empty(path.to_owned())) };
        let Part { digest, name, .. } = file_in(&self.take(from, star, made)?, from, star)?;
        let data = self.store.blobs().file(&digest).map_err(MakeError::io("read an image"))?;
        if Digest::of_reader(&data).map_err(MakeError::io("read an image"))?.0 != digest {
            return Err(MakeError::io("read an image")(io::ErrorKind::InvalidData.into()));
        }
        let mut out = tempfile::tempfile_in(self.store.temporary())
            .map_err(MakeError::io("make a file in the store"))?;
        let root = verity::write(&data, &verity::Parameters::derived(&digest), &mut out)
            .map_err(|source| MakeError::Verity { path: name, source })?;
        self.put_file(made, path, out)?;
        match hash {
            Some(hash) => self.put(made, &hash.bind(star), &mut root.to_string().as_bytes()),
            None => Ok(()),
        }
    }

    fn unified(
        &self,
        parts: &Unified,
        star: &str,
        made: &Tree,
        artifact: &str,
    ) -> Result<Vec<u8>, MakeError> {
        let find = |from: &From| {
            let tree = self.take(from, star, made)?;
            self.refuse_keys(&tree, std::slice::from_ref(from), star, made, artifact)?;
            let part = file_in(&tree, from, star)?;
            match part.size_bytes >= PART_BYTES_MAX {
                true => Err(MakeError::TooLong(shown(from, star))),
                false => Ok(part),
            }
        };
        let read = |from: &From| self.bytes(&find(from)?, from, star);
        let some = |from: &Option<From>| from.as_ref().map(read).transpose();
        // Long ones are all found before any is read: this host may have less memory than they take together.
        let kernel = find(&parts.linux)?;
        let mut initrds = Vec::with_capacity(parts.initrds.len());
        for from in &parts.initrds {
            match find(from) {
                Err(MakeError::Missing { .. }) if from.optional => {}
                initrd => initrds.push((from, initrd?)),
            }
        }
        let lengths = initrds.iter().map(|(_, initrd)| initrd.size_bytes);
        if lengths.fold(kernel.size_bytes, u64::saturating_add) >= PART_BYTES_MAX {
            return Err(UkiError::TooLarge("initrd").into());
        }
        let (stub, kernel) = (read(&parts.stub)?, self.bytes(&kernel, &parts.linux, star)?);
        let initrds = initrds.into_iter().map(|(from, initrd)| self.bytes(&initrd, from, star));
        let initrds = initrds.collect::<Result<Vec<_>, _>>()?;
        let (os_release, sbat) = (some(&parts.os_release)?, some(&parts.sbat)?);
        let written = String::from_utf8(read(&parts.command_line)?).map_err(|_| MakeError::CommandLine)?;
        let command_line = command_line(&written);
        let release = parts.release.as_ref().map(|text| fill(text, star));
        let initrds: Vec<&[u8]> = initrds.iter().map(Vec::as_slice).collect();
        let parts = uki::Parts {
            os_release: os_release.as_deref(),
            release: release.as_deref(),
            command_line: &command_line,
            kernel: &kernel,
            initrds: &initrds,
            sbat: sbat.as_deref(),
        };
        Ok(uki::write(&stub, &parts)?)
    }

    /// The content of `part`, the one file that `from` stands for.
    fn bytes(&self, part: &Part, from: &From, star: &str) -> Result<Vec<u8>, MakeError> {
        let digest = part.digest;
        let file = self.store.blobs().file(&digest).map_err(MakeError::io("read a part"))?;
        let length = file.metadata().map_err(MakeError::io("read a part"))?.len();
        // Before it is read: this host may have less memory.
        if length >= PART_BYTES_MAX {
            return Err(MakeError::TooLong(shown(from, star)));
        }
        let mut bytes = Vec::new();
        file.take(PART_BYTES_MAX).read_to_end(&mut bytes).map_err(MakeError::io("read a part"))?;
        match Digest::of(&bytes) == digest {
            true => Ok(bytes),
            false => Err(MakeError::io("read a part")(io::ErrorKind::InvalidData.into())),
        }
    }

    fn meta(&self, mode: u16) -> Meta {
        Meta { mode, mtime: Timestamp { seconds: self.epoch, nanoseconds: 0 }, ..Meta::default() }
    }

    fn folder_tree(&self) -> Tree {
        let mut tree = Tree::new();
        tree.insert(TreePath::root(), Node { kind: Kind::Directory, meta: self.meta(0o755) });
        tree
    }

    /// Puts a finished file into the store, and into `made` at `path`.
    fn put_file(&self, made: &mut Tree, path: &str, mut file: File) -> Result<(), MakeError> {
        file.seek(SeekFrom::Start(0)).map_err(MakeError::io("read what was made"))?;
        self.put(made, path, &mut file)
    }

    fn put(&self, made: &mut Tree, path: &str, content: &mut dyn Read) -> Result<(), MakeError> {
        let (digest, size) = self.store.blobs().put(content).map_err(MakeError::io("keep what was made"))?;
        let path = TreePath::new(path.as_bytes())?;
        self.add(made, path, Node { kind: Kind::File { digest, size }, meta: self.meta(0o644) })
    }

    /// Puts `tree` into `made`, below `folder`.
    fn keep(&self, made: &mut Tree, folder: &str, tree: &Tree) -> Result<(), MakeError> {
        for (path, node) in tree.iter().filter(|(path, _)| !path.is_root()) {
            let mut node = tree.shown(path).unwrap_or(node).clone();
            // When a file was made is no part of what it is.
            node.meta.mtime = self.meta(0).mtime;
            let place = match folder {
                "" => path.clone(),
                folder => TreePath::new(&[folder.as_bytes(), b"/", path.as_bytes()].concat())?,
            };
            if node.kind == Kind::Directory
                && made.get(&place).is_some_and(|node| node.kind == Kind::Directory)
            {
                continue;
            }
            self.add(made, place, node)?;
        }
        Ok(())
    }

    /// Puts one node into `made`, with the folders above it. Nothing is made twice.
    fn add(&self, made: &mut Tree, path: TreePath, node: Node) -> Result<(), MakeError> {
        let mut above = path.parent();
        while let Some(folder) = above.filter(|folder| !folder.is_root()) {
            match made.get(&folder).map(|node| &node.kind) {
                None => {
                    made.insert(folder.clone(), Node { kind: Kind::Directory, meta: self.meta(0o755) });
                }
                Some(Kind::Directory) => {}
                Some(_) => return Err(MakeError::Twice(folder)),
            }
            above = folder.parent();
        }
        if made.get(&path).is_some() {
            return Err(MakeError::Twice(path));
        }
        made.insert(path, node);
        Ok(())
    }
}

/// Takes away attributes that squashfs has no place for, as mksquashfs does, and counts the files that had some: modes stay,
/// lists of access control go. Capabilities and other `security.` attributes stay.
fn without_lists(tree: &mut Tree) -> usize {
    let mut files = 0;
    for (_, node) in tree.iter_mut() {
        let before = node.meta.xattrs.len();
        node.meta.xattrs.retain(|name, _| !name.starts_with(b"system."));
        files += usize::from(node.meta.xattrs.len() < before);
    }
    files
}

/// One file that something is made of.
struct Part {
    digest: Digest,
    size_bytes: u64,
    name: String,
}

/// The one file of `tree`, which is what `from` stands for.
fn file_in(tree: &Tree, from: &From, star: &str) -> Result<Part, MakeError> {
    let mut files = tree.iter().filter(|(path, node)| !path.is_root() && node.kind != Kind::Directory);
    match (files.next(), files.next()) {
        (Some((path, Node { kind: Kind::File { digest, size }, .. })), None) => {
            Ok(Part { digest: *digest, size_bytes: *size, name: path.to_string() })
        }
        _ => Err(MakeError::NotAFile(shown(from, star))),
    }
}

/// What is in a regular file.
fn content(node: &Node) -> Option<Digest> {
    match &node.kind {
        Kind::File { digest, .. } => Some(*digest),
        _ => None,
    }
}

/// What `from` is called in errors.
fn shown(from: &From, star: &str) -> String {
    from.origin.pattern().map_or_else(String::new, |pattern| pattern.bind(star))
}

#[cfg(test)]
mod tests;
