//! From locked packages in the store to one tree, laid out as `dpkg --unpack` would have left it.
//!
//! `/usr` is merged: the links `/bin`, `/sbin`, `/lib` and `/lib64` come first and what packages ship below them
//! lands in `/usr`. Conffiles stand as `NAME.dpkg-new`, `passwd` and `group` come from base-passwd's masters, and
//! dpkg's database says that everything is unpacked. No script of any package has run.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;

use kiln_artifact::archive::tar::TarError;
use kiln_artifact::tree::{Builder, Kind, Meta, Node, PathError, Timestamp, Tree, TreeError, TreePath};
use kiln_digest::HashingReader;

use super::database::{self, Unpacked};
use super::deb::{Deb, DebError};
use super::relation;
use crate::fetch::lock::LockedPackage;
use crate::store::Blobs;
use crate::threads;

/// Links at the top that make `/usr` merged, and whether they are there without anything that needs them.
const MERGED: [(&str, bool); 6] =
    [("bin", true), ("sbin", true), ("lib", true), ("lib64", true), ("lib32", false), ("libx32", false)];
/// The package whose folders' modes hold: `/tmp`, `/root` and their like are its own.
const FIRST_PACKAGE: &str = "base-files";
/// Linux's limit on links in one path (path_resolution(7)).
const MAX_LINKS: usize = 40;
const MASTERS: [(&str, &str); 2] = [
    ("usr/share/base-passwd/passwd.master", "etc/passwd"),
    ("usr/share/base-passwd/group.master", "etc/group"),
];

/// Why packages cannot be laid out as a tree.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// A package that was not fetched, or is gone from the store.
    #[error("package `{package}` cannot be read from the store")]
    Missing {
        /// The package.
        package: String,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// A package that is not sound.
    #[error("package `{package}`")]
    Deb {
        /// The package.
        package: String,
        /// What is wrong.
        #[source]
        source: DebError,
    },
    /// A package that is another than its index says.
    #[error("package `{package}` says that its {field} is `{found}`, and its index says `{expected}`")]
    Identity {
        /// The package by its index.
        package: String,
        /// The field.
        field: &'static str,
        /// What the index says.
        expected: String,
        /// What the package says.
        found: String,
    },
    /// Two packages with one file.
    #[error("packages `{first}` and `{second}` both hold `{path}`, and neither replaces the other")]
    Overwrite {
        /// The file.
        path: TreePath,
        /// The package unpacked first.
        first: String,
        /// The other.
        second: String,
    },
    /// A file below something that is no folder.
    #[error("package `{package}` holds `{path}`, which lies below something that is no folder")]
    NoFolder {
        /// The package.
        package: String,
        /// The file.
        path: TreePath,
    },
    /// A path that grew too long.
    #[error("package `{package}` holds a file with an impossible name")]
    Path {
        /// The package.
        package: String,
        /// What is wrong with it.
        #[source]
        source: PathError,
    },
    /// The store did not take a file.
    #[error("the store cannot be written")]
    Store(#[source] io::Error),
    /// The whole is no tree.
    #[error("the packages together are no file tree")]
    Tree(#[from] TreeError),
}

impl UnpackError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Overwrite { first, second, .. } => Some(format!("leave out `{first}` or `{second}`")),
            Self::Missing { .. } => Some("fetch it again".into()),
            // The package is well; the store is not.
            Self::Deb { source: DebError::Tar { source: TarError::Store { .. }, .. }, .. } => {
                Some("--store or KILN_STORE names another place for the store".into())
            }
            Self::Identity { .. } | Self::Deb { .. } => {
                Some("lock the root again, perhaps from another mirror".into())
            }
            _ => None,
        }
    }
}

/// Reads the package `locked` from the store; its contents go into the store.
///
/// # Errors
/// [`UnpackError`], as its variants say.
pub fn read(locked: &LockedPackage, blobs: &Blobs) -> Result<Deb, UnpackError> {
    let file: File = blobs
        .file(&locked.sha256)
        .map_err(|source| UnpackError::Missing { package: locked.name.clone(), source })?;
    let missing = |source| UnpackError::Missing { package: locked.name.clone(), source };
    let failed = |source| UnpackError::Deb { package: locked.name.clone(), source };
    let mut file = HashingReader::new(file);
    let read = Deb::read(&mut file, &mut { blobs });
    io::copy(&mut file, &mut io::sink()).map_err(missing)?;
    if file.finish().0 != locked.sha256 {
        blobs.discard_damaged(&locked.sha256);
        return Err(missing(io::ErrorKind::InvalidData.into()));
    }
    let deb = read.map_err(failed)?;
    for (field, expected) in
        [("Package", &locked.name), ("Version", &locked.version), ("Architecture", &locked.architecture)]
    {
        let found = deb.field(field).map_err(failed)?;
        if found != expected {
            let (expected, found) = (expected.clone(), found.to_owned());
            return Err(UnpackError::Identity { package: locked.name.clone(), field, expected, found });
        }
    }
    Ok(deb)
}

/// Reads all `packages`, several at once, in the order given.
fn read_all(packages: &[LockedPackage], blobs: &Blobs) -> Result<Vec<Deb>, UnpackError> {
    // Large packages first, so that no thread is left with the largest at the end.
    let mut order: Vec<usize> = (0..packages.len()).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(packages[index].size));
    let read = |&index: &usize| read(&packages[index], blobs).map(|deb| (index, deb));
    let read: BTreeMap<usize, Deb> = threads::map(&order, "unpack", read)?.into_iter().collect();
    Ok(read.into_values().collect())
}

/// The tree of `packages`, which are sorted by name. What kiln itself writes is dated `epoch` (seconds since
/// 1970-01-01 UTC).
///
/// # Errors
/// [`UnpackError`], as its variants say.
pub fn unpack(packages: &[LockedPackage], blobs: &Blobs, epoch: i64) -> Result<Tree, UnpackError> {
    let debs = read_all(packages, blobs)?;
    lay_out(&debs, blobs, epoch)
}

/// As [`unpack`], without what makes a root of it: the database, and files that scripts would make.
///
/// # Errors
/// [`UnpackError`], as its variants say.
pub fn unpack_files(packages: &[LockedPackage], blobs: &Blobs, epoch: i64) -> Result<Tree, UnpackError> {
    let debs = read_all(packages, blobs)?;
    Ok(laid_out(&debs, epoch)?.builder.finish()?)
}

fn lay_out(debs: &[Deb], blobs: &Blobs, epoch: i64) -> Result<Tree, UnpackError> {
    let mut layout = laid_out(debs, epoch)?;
    layout.add_masters();
    layout.add_database(blobs)?;
    Ok(layout.builder.finish()?)
}

fn laid_out(debs: &[Deb], epoch: i64) -> Result<Layout<'_>, UnpackError> {
    let mtime = Timestamp { seconds: epoch, nanoseconds: 0 };
    let mut layout = Layout {
        builder: Builder::new(),
        owners: BTreeMap::new(),
        debs,
        paths: vec![Vec::new(); debs.len()],
        mtime,
    };
    layout.merge_usr();
    let is_later = |&index: &usize| debs[index].field("Package").is_ok_and(|name| name != FIRST_PACKAGE);
    let mut order: Vec<usize> = (0..debs.len()).collect();
    order.sort_by_key(is_later);
    for index in order {
        layout.add(index)?;
    }
    Ok(layout)
}

struct Layout<'a> {
    builder: Builder,
    /// Which package a file is of, and what that package calls it, by where it lies.
    owners: BTreeMap<TreePath, (usize, String)>,
    debs: &'a [Deb],
    /// The files of each package by the names it gave them.
    paths: Vec<Vec<String>>,
    mtime: Timestamp,
}

/// A path that is written here and known to be sound.
fn known(path: &str) -> TreePath {
    TreePath::new(path.as_bytes()).unwrap_or_else(|_| TreePath::root())
}

/// How a file list writes `path`. Debian's packages hold no name that is not UTF-8.
fn listed(path: &TreePath) -> String {
    String::from_utf8_lossy(path.as_bytes()).into_owned()
}

impl Layout<'_> {
    fn node(&self, kind: Kind, mode: u16) -> Node {
        Node { kind, meta: Meta { mode, mtime: self.mtime, ..Meta::default() } }
    }

    fn name(&self, index: usize) -> String {
        self.debs[index].field("Package").unwrap_or_default().to_owned()
    }

    fn merge_usr(&mut self) {
        let folder = self.node(Kind::Directory, 0o755);
        self.builder.put(known("usr"), folder.clone());
        for (name, always) in MERGED {
            let path = known(name);
            if always || self.debs.iter().any(|deb| deb.data.get(&path).is_some()) {
                let target = format!("usr/{name}");
                self.builder.put(known(&target), folder.clone());
                let link = self.node(Kind::Symlink(target.into_bytes().into()), 0o777);
                self.builder.put(path, link);
            }
        }
    }

    /// Where `path` lies once the links on the way to it are followed. Its last component is not.
    fn resolve(&self, path: &TreePath) -> Result<Option<TreePath>, PathError> {
        let mut left: Vec<Vec<u8>> =
            path.as_bytes().split(|&byte| byte == b'/').rev().map(<[u8]>::to_vec).collect();
        let mut at = TreePath::root();
        let mut links = 0;
        while let Some(component) = left.pop() {
            match &component[..] {
                b"" | b"." => continue,
                b".." => {
                    at = at.parent().unwrap_or_else(TreePath::root);
                    continue;
                }
                _ => {}
            }
            let next = at.join(&component)?;
            match self.builder.get(&next).map(|node| &node.kind) {
                Some(Kind::Symlink(target)) if !left.is_empty() => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Ok(None);
                    }
                    if target.starts_with(b"/") {
                        at = TreePath::root();
                    }
                    left.extend(target.split(|&byte| byte == b'/').rev().map(<[u8]>::to_vec));
                }
                Some(Kind::Directory) | None => at = next,
                Some(_) if left.is_empty() => at = next,
                Some(_) => return Ok(None),
            }
        }
        Ok(Some(at))
    }

    /// Whether `path`, a link, leads to a folder.
    fn leads_to_folder(&self, path: &TreePath) -> bool {
        // One more component makes the last one a link on the way.
        let inside = path.join(b"x").and_then(|inside| self.resolve(&inside));
        let folder = inside.ok().flatten().and_then(|inside| inside.parent());
        folder.and_then(|folder| self.builder.get(&folder)).is_some_and(|node| node.kind == Kind::Directory)
    }

    fn add(&mut self, index: usize) -> Result<(), UnpackError> {
        let deb = &self.debs[index];
        let bad_path = |source| UnpackError::Path { package: self.name(index), source };
        let mut conffiles = BTreeSet::new();
        for path in database::conffiles(deb) {
            conffiles.insert(TreePath::from_archive(path.as_bytes()).map_err(bad_path)?);
        }
        for (path, node) in deb.data.iter().filter(|(path, _)| !path.is_root()) {
            let place = self.place(index, path, conffiles.contains(path))?;
            if self.put(index, path, place, node, &conffiles)? {
                self.paths[index].push(listed(path));
            }
        }
        Ok(())
    }

    /// Where a file of package `index` lies in the tree.
    fn place(&self, index: usize, path: &TreePath, is_conffile: bool) -> Result<TreePath, UnpackError> {
        let bad_path = |source| UnpackError::Path { package: self.name(index), source };
        let place = self.resolve(path).map_err(bad_path)?;
        let place =
            place.ok_or_else(|| UnpackError::NoFolder { package: self.name(index), path: path.clone() })?;
        if !is_conffile {
            return Ok(place);
        }
        let name = [place.name(), b".dpkg-new"].concat();
        place.parent().unwrap_or_else(TreePath::root).join(&name).map_err(bad_path)
    }

    /// Puts one file of package `index`; whether it is the package's afterwards.
    fn put(
        &mut self,
        index: usize,
        path: &TreePath,
        place: TreePath,
        node: &Node,
        conffiles: &BTreeSet<TreePath>,
    ) -> Result<bool, UnpackError> {
        let is_folder = node.kind == Kind::Directory;
        let there = self.builder.get(&place).map(|there| there.kind.clone());
        match there {
            Some(Kind::Directory) if is_folder => return Ok(true),
            // As dpkg: a folder stays where a link to one is shipped, and the other way round.
            Some(Kind::Directory) if matches!(node.kind, Kind::Symlink(_)) => return Ok(true),
            Some(Kind::Symlink(_)) if is_folder && self.leads_to_folder(&place) => return Ok(true),
            Some(_) if !self.may_take(index, &place)? => return Ok(false),
            _ => {}
        }
        if let Kind::HardLink(target) = &node.kind {
            let target = self.place(index, target, conffiles.contains(target))?;
            if !self.builder.link(place.clone(), &target) {
                return Err(UnpackError::NoFolder { package: self.name(index), path: path.clone() });
            }
        } else {
            self.builder.put(place.clone(), node.clone());
        }
        if !is_folder {
            self.owners.insert(place, (index, listed(path)));
        }
        Ok(true)
    }

    /// Whether package `index` may have the file at `place`, which is there already.
    fn may_take(&mut self, index: usize, place: &TreePath) -> Result<bool, UnpackError> {
        // What kiln laid down itself gives way.
        let Some((owner, named)) = self.owners.get(place).cloned() else { return Ok(true) };
        if self.replaces(index, owner)? {
            self.paths[owner].retain(|listed| *listed != named);
            return Ok(true);
        }
        if self.replaces(owner, index)? {
            return Ok(false);
        }
        Err(UnpackError::Overwrite { path: place.clone(), first: self.name(owner), second: self.name(index) })
    }

    /// Whether package `a` says that it replaces files of `b`.
    fn replaces(&self, a: usize, b: usize) -> Result<bool, UnpackError> {
        let failed = |source| UnpackError::Deb { package: self.name(a), source };
        let (a, b) = (&self.debs[a], &self.debs[b]);
        let text = a.optional_field("Replaces").map_err(failed)?.unwrap_or_default();
        let groups = relation::parse(text)
            .map_err(|_| failed(DebError::Layout("its control file has a `Replaces` that does not read")))?;
        let name = b.field("Package").map_err(failed)?;
        let version = b.field("Version").map_err(failed)?;
        Ok(groups.iter().flatten().any(|relation| relation.name == name && relation.admits(version)))
    }

    /// `passwd` and `group` from base-passwd's masters: chown in a maintainer script needs names before
    /// base-passwd's own script has run.
    fn add_masters(&mut self) {
        for (master, place) in MASTERS {
            if let Some(Kind::File { digest, size }) =
                self.builder.get(&known(master)).map(|node| node.kind.clone())
                && self.builder.get(&known("etc")).is_some()
                && self.builder.get(&known(place)).is_none()
            {
                let node = self.node(Kind::File { digest, size }, 0o644);
                self.builder.put(known(place), node);
            }
        }
    }

    fn add_database(&mut self, blobs: &Blobs) -> Result<(), UnpackError> {
        let paths = std::mem::take(&mut self.paths);
        let packages: Vec<_> =
            self.debs.iter().zip(paths).map(|(deb, paths)| Unpacked { deb, paths }).collect();
        let files =
            database::files(&packages).map_err(|(package, source)| UnpackError::Deb { package, source })?;
        let mut folders = vec!["var".to_owned(), "var/lib".to_owned(), database::FOLDER.to_owned()];
        folders.extend(database::FOLDERS.map(|name| format!("{}/{name}", database::FOLDER)));
        for folder in folders {
            if self.builder.get(&known(&folder)).is_none() {
                let node = self.node(Kind::Directory, 0o755);
                self.builder.put(known(&folder), node);
            }
        }
        for file in files {
            let (digest, size) = blobs.put(&file.bytes[..]).map_err(UnpackError::Store)?;
            let path = format!("{}/{}", database::FOLDER, file.path);
            let path = TreePath::new(path.as_bytes())
                .map_err(|source| UnpackError::Path { package: file.path.clone(), source })?;
            let node = self.node(Kind::File { digest, size }, file.mode);
            self.builder.put(path, node);
        }
        Ok(())
    }
}
