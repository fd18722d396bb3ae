//! Taking files out of WORK, SRCDIR, roots and kiln's own programs.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use kiln_artifact::tree::{Kind, Node, Tree, TreePath};
use kiln_digest::{Digest, HashingReader};

use super::{Bench, MakeError};
use crate::plan::RootSpec;
use crate::plan::make::{From, Origin, Pattern, fill};
use crate::root::debian;
use crate::root::modules::{Modules, Profile};

/// Linux's limit on links in one path (path_resolution(7)).
const MOST_LINKS: usize = 40;
/// What the kernel has without modules.
const BUILTIN: &[u8] = b"modules.builtin";

/// Something in SRCDIR.
#[derive(Debug, Clone)]
pub enum Source {
    /// A folder as a tree; contents are in the store.
    Folder(Tree),
    /// A regular file with its permission bits.
    File(Digest, u64, u16),
}

/// What there is to make artifacts of, beside WORK.
pub trait Materials {
    /// The file or folder at `path` in SRCDIR, without what steps are not shown; nothing where there is none.
    ///
    /// # Errors
    /// [`MakeError`].
    fn source(&self, path: &str) -> Result<Option<Source>, MakeError>;

    /// The files of a root.
    ///
    /// # Errors
    /// [`MakeError`].
    fn root(&self, spec: &RootSpec) -> Result<Arc<Tree>, MakeError>;

    /// A program that comes with kiln, in the store: its digest and its length in bytes.
    ///
    /// # Errors
    /// [`MakeError::Program`] where there is none.
    fn program(&self, name: &str) -> Result<(Digest, u64), MakeError>;
}

impl Bench<'_> {
    /// What the star of `from`'s path matches now, in order.
    pub(super) fn stars(&self, from: &From, made: &Tree) -> Result<Vec<String>, MakeError> {
        let Some(pattern) = from.origin.pattern() else { return Ok(vec![String::new()]) };
        let mut found: Vec<String> = Vec::new();
        let mut look = |tree: &Tree, pattern: &Pattern| {
            let paths = tree.iter().filter_map(|(path, _)| std::str::from_utf8(path.as_bytes()).ok());
            found.extend(paths.filter_map(|path| pattern.matches(path)).map(str::to_owned));
        };
        match &from.origin {
            Origin::Work(pattern) => {
                look(self.view, pattern);
                look(made, pattern);
            }
            Origin::Root { spec, .. } => {
                let tree = self.materials.root(spec)?;
                let folder = pattern.text().rsplit_once('/').map_or("", |(folder, _)| folder);
                match folder.contains('*') {
                    true => look(&tree, pattern),
                    // The folder may be reached by links.
                    false => {
                        let resolved =
                            resolve(&tree, folder).map(|path| path.to_string()).unwrap_or_default();
                        let name = pattern.text().rsplit('/').next().unwrap_or_default();
                        let text =
                            if resolved.is_empty() { name.to_owned() } else { format!("{resolved}/{name}") };
                        if let Ok(pattern) = Pattern::parse(&text) {
                            look(&tree, &pattern);
                        }
                    }
                }
            }
            Origin::Source(pattern) => {
                let (folder, below) = above_star(pattern.text());
                if let Some(Source::Folder(tree)) = self.materials.source(folder)?
                    && let Ok(pattern) = Pattern::parse(below)
                {
                    look(&tree, &pattern);
                }
            }
            Origin::Program(_) | Origin::Text(_) => {}
        }
        found.sort();
        found.dedup();
        Ok(found)
    }

    /// What `from` stands for, laid out as it goes into an artifact.
    pub(super) fn take(&self, from: &From, star: &str, made: &Tree) -> Result<Tree, MakeError> {
        let path = from.origin.pattern().map(|pattern| pattern.bind(star)).unwrap_or_default();
        let missing = |place: &str| MakeError::Missing { path: path.clone(), place: place.to_owned() };
        let found = match &from.origin {
            Origin::Work(_) => {
                // What is being made lies above what was there.
                let at = TreePath::new(path.as_bytes())?;
                let tree = if made.get(&at).is_some() { made } else { self.view };
                cut(tree, &path).ok_or_else(|| missing("WORK, as this step sees it"))?
            }
            Origin::Root { spec, .. } => {
                let tree = self.materials.root(spec)?;
                cut(&tree, &path).ok_or_else(|| missing(&format!("root {spec}")))?
            }
            Origin::Source(_) => match self.materials.source(&path)? {
                Some(Source::Folder(tree)) => tree,
                Some(Source::File(digest, size, mode)) => {
                    let name = path.rsplit('/').next().unwrap_or(&path);
                    self.single(name, digest, size, mode)?
                }
                None => return Err(missing("SRCDIR")),
            },
            Origin::Program(name) => {
                let (digest, size) = self.materials.program(name)?;
                self.single(name, digest, size, 0o755)?
            }
            Origin::Text(text) => {
                let text = fill(text, star);
                let put = self.store.blobs().put(text.as_bytes()).map_err(MakeError::io("keep a text"))?;
                self.single("text", put.0, put.1, 0o644)?
            }
        };
        let found = match from.modules.is_empty() {
            true => found,
            false => self.modules(found, &from.modules)?,
        };
        self.laid_out(found, from, star)
    }

    /// A tree with one file.
    fn single(&self, name: &str, digest: Digest, size: u64, mode: u16) -> Result<Tree, MakeError> {
        let mut tree = Tree::default();
        let path = TreePath::new(name.as_bytes())?;
        tree.insert(path, Node { kind: Kind::File { digest, size }, meta: self.meta(mode) });
        Ok(tree)
    }

    /// Leaves out what `from` does not take of `tree`, and moves the rest to where it goes. A tree without a root folder is
    /// one file.
    fn laid_out(&self, tree: Tree, from: &From, star: &str) -> Result<Tree, MakeError> {
        let at = from.at.as_ref().map(|at| at.bind(star));
        let is_file = tree.get(&TreePath::root()).is_none();
        let is_taken = |path: &TreePath| {
            (from.only.is_empty() || from.only.declare(path)) && !from.exclude.declare(path)
        };
        let mut kept = tree.clone();
        if !is_file {
            kept.retain(|path, _| path.is_root() || is_taken(path));
        }
        if from.join {
            return self.joined(&kept, &at.unwrap_or_default());
        }
        let place = |path: &TreePath| match &at {
            None => Ok(path.clone()),
            Some(at) if is_file || path.is_root() => TreePath::new(at.as_bytes()),
            Some(at) if at.is_empty() => Ok(path.clone()),
            Some(at) => TreePath::new(&[at.as_bytes(), b"/", path.as_bytes()].concat()),
        };
        let mut out = self.folder_tree();
        for (path, node) in kept.iter() {
            let mut node = node.clone();
            if let Kind::HardLink(holder) = &node.kind {
                node.kind = Kind::HardLink(place(holder)?);
            }
            if let (Kind::File { .. }, Some(mode)) = (&node.kind, from.mode) {
                node.meta.mode = mode;
            }
            let place = place(path)?;
            // Folders on the way: the tree's own, or plain ones.
            let mut above = place.parent();
            while let Some(folder) = above.filter(|folder| out.get(folder).is_none()) {
                out.insert(folder.clone(), Node { kind: Kind::Directory, meta: self.meta(0o755) });
                above = folder.parent();
            }
            out.insert(place, node);
        }
        if !from.only.is_empty() && !is_file {
            for (path, node) in tree.iter().filter(|(_, node)| node.kind == Kind::Directory) {
                if let Ok(place) = place(path)
                    && let Some(there) = out.get_mut(&place)
                {
                    there.meta = node.meta.clone();
                }
            }
        }
        Ok(out)
    }

    /// All files of `tree`, one behind the other, as one file at `at`.
    fn joined(&self, tree: &Tree, at: &str) -> Result<Tree, MakeError> {
        let mut out = self.folder_tree();
        let mut writer = self.store.blobs().writer().map_err(MakeError::io("keep what was joined"))?;
        let mut is_empty = true;
        for (path, node) in tree.iter() {
            if let Kind::File { digest, .. } = &tree.shown(path).unwrap_or(node).kind {
                let file = self.store.blobs().file(digest).map_err(MakeError::io("read what is joined"))?;
                let mut file = HashingReader::new(file);
                std::io::copy(&mut file, &mut writer).map_err(MakeError::io("keep what was joined"))?;
                if file.finish().0 != *digest {
                    return Err(MakeError::io("read what is joined")(io::ErrorKind::InvalidData.into()));
                }
                is_empty = false;
            }
        }
        if is_empty {
            return Err(MakeError::Empty(at.to_owned()));
        }
        let (digest, size) = writer.finish().map_err(MakeError::io("keep what was joined"))?;
        let path = TreePath::new(at.as_bytes())?;
        self.add(&mut out, path, Node { kind: Kind::File { digest, size }, meta: self.meta(0o644) })?;
        Ok(out)
    }

    /// Of a folder of modules those that `wanted` names and all they need, with depmod's lists of these.
    fn modules(&self, tree: Tree, wanted: &[String]) -> Result<Tree, MakeError> {
        let bytes = |name: &[u8]| -> Result<Vec<u8>, MakeError> {
            match TreePath::root().join(name).ok().and_then(|path| tree.shown(&path)).map(|node| &node.kind) {
                Some(Kind::File { digest, .. }) => {
                    self.store.blobs().read(digest).map_err(MakeError::io("read a list of modules"))
                }
                _ => Err(MakeError::Missing {
                    path: String::from_utf8_lossy(name).into_owned(),
                    place: "the folder of modules".to_owned(),
                }),
            }
        };
        let text = |name: &[u8]| bytes(name).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let infos = debian::module_infos(self.store.blobs(), &tree, &TreePath::root())
            .map_err(debian::ArchiveError::from);
        let infos = infos.map_err(MakeError::Kernel)?;
        let (order, builtin) = (text(b"modules.order").unwrap_or_default(), text(BUILTIN)?);
        let all = Modules::from_infos(
            infos,
            &order,
            &builtin,
            &bytes(b"modules.builtin.modinfo").unwrap_or_default(),
        );
        let mut taken: BTreeSet<&str> = BTreeSet::new();
        for name in wanted {
            let (name, may_lack) = name.strip_suffix('?').map_or((name.as_str(), false), |name| (name, true));
            let found = match name {
                "profile:cloud" => all.for_initrd(Profile::Cloud),
                "profile:host" => all.for_initrd(Profile::Host),
                name => all.load_order(&[name]),
            };
            match found {
                Ok(paths) => taken.extend(paths),
                Err(_) if may_lack => {}
                Err(error) => return Err(error.into()),
            }
        }
        let mut kept = tree.clone();
        kept.retain(|path, node| {
            let text = String::from_utf8_lossy(path.as_bytes());
            let is_above = || {
                taken
                    .iter()
                    .any(|module| module.strip_prefix(&*text).is_some_and(|rest| rest.starts_with('/')))
            };
            path.is_root()
                || path.as_bytes() == BUILTIN
                || taken.contains(&*text)
                || (node.kind == Kind::Directory && is_above())
        });
        let files: Vec<&str> = taken.iter().copied().collect();
        for (name, bytes) in all.only(&files).depmod_files()? {
            let put = self.store.blobs().put(&bytes[..]).map_err(MakeError::io("keep a list of modules"))?;
            let node = Node { kind: Kind::File { digest: put.0, size: put.1 }, meta: self.meta(0o644) };
            kept.insert(TreePath::root().join(name.as_bytes())?, node);
        }
        Ok(kept)
    }
}

/// The folder of a pattern above its star, and what is below.
fn above_star(text: &str) -> (&str, &str) {
    let star = text.find('*').unwrap_or(text.len());
    match text[..star].rfind('/') {
        Some(slash) => (&text[..slash], &text[slash + 1..]),
        None => ("", text),
    }
}

/// What is at `path` of `tree`, from there on; a file as a tree without a root folder, under its own name.
fn cut(tree: &Tree, path: &str) -> Option<Tree> {
    let at = resolve(tree, path)?;
    let node = tree.shown(&at)?;
    let mut out = Tree::default();
    if node.kind != Kind::Directory {
        let name = path.rsplit('/').next()?;
        out.insert(TreePath::root().join(name.as_bytes()).ok()?, node.clone());
        return Some(out);
    }
    Some(tree.below(&at))
}

/// Where `path` lies in `tree`, once links on the way to it are followed, and the last one where it leads to a folder.
fn resolve(tree: &Tree, path: &str) -> Option<TreePath> {
    let mut left: Vec<String> =
        path.split('/').rev().filter(|part| !part.is_empty()).map(str::to_owned).collect();
    let mut at = TreePath::root();
    let mut links = 0;
    while let Some(part) = left.pop() {
        match part.as_str() {
            "." => continue,
            ".." => {
                at = at.parent().unwrap_or_else(TreePath::root);
                continue;
            }
            _ => {}
        }
        let next = at.join(part.as_bytes()).ok()?;
        let node = tree.shown(&next)?;
        let Kind::Symlink(target) = &node.kind else {
            at = next;
            continue;
        };
        links += 1;
        let target = std::str::from_utf8(target).ok()?;
        if left.is_empty() {
            let folder = if target.starts_with('/') { String::new() } else { format!("{at}/") };
            let followed =
                (links < MOST_LINKS).then(|| resolve(tree, &format!("{folder}{target}"))).flatten();
            let is_folder = followed
                .as_ref()
                .and_then(|path| tree.shown(path))
                .is_some_and(|node| node.kind == Kind::Directory);
            return Some(if is_folder { followed? } else { next });
        }
        if links > MOST_LINKS {
            return None;
        }
        if target.starts_with('/') {
            at = TreePath::root();
        }
        left.extend(target.split('/').rev().filter(|part| !part.is_empty()).map(str::to_owned));
    }
    Some(at)
}
