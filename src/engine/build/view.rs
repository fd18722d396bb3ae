//! What a step sees in WORK: the outputs of the steps it needs, and of these what it takes as inputs, in a directory of its
//! own. A step that ends meanwhile changes WORK and not this.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use kiln_artifact::tree::{Kind, Tree, TreePath};
use kiln_digest::{Digest, HashingReader};
use kiln_virtio::fs::record::Kind as FileKind;

use super::BuildError;
use crate::cache::verify::shown;
use crate::plan::Outputs;
use crate::store::{Room, Store};
use crate::writes::{self, Act, Folder, Through};

/// The mode of a view's top, where nothing says another.
const TOP_MODE: u32 = 0o755;

/// The outputs of the steps `needs`, each with the step's name, as one tree: what of it `inputs` names, or all.
///
/// # Errors
/// [`BuildError::SamePath`].
pub(super) fn union(needs: &[(&str, Arc<Tree>)], inputs: &Outputs) -> Result<Arc<Tree>, BuildError> {
    if let ([(_, tree)], true) = (needs, inputs.is_empty()) {
        return Ok(Arc::clone(tree));
    }
    let mut union = Tree::new();
    for (number, (name, tree)) in needs.iter().enumerate() {
        for (path, node) in tree.iter() {
            let is_folder = node.kind == Kind::Directory;
            if path.is_root() || !inputs.is_empty() && !inputs.declare(path) {
                continue;
            }
            match union.get(path) {
                // The first says what a folder is like that several put something into.
                Some(there) if is_folder && there.kind == Kind::Directory => continue,
                Some(_) => {
                    let owner = needs[..number].iter().find(|(_, tree)| tree.get(path).is_some());
                    return Err(BuildError::SamePath {
                        one: owner.map_or("", |(name, _)| *name).to_owned(),
                        other: (*name).to_owned(),
                        path: path.to_string(),
                    });
                }
                None => {}
            }
            let mut above = path.parent();
            while let Some(folder) = above.filter(|folder| union.get(folder).is_none()) {
                if let Some(node) = tree.get(&folder) {
                    union.insert(folder.clone(), node.clone());
                }
                above = folder.parent();
            }
            // A further name of a file stands for itself here: its holder may not be among the inputs.
            if let Some(node) = tree.shown(path) {
                union.insert(path.clone(), node.clone());
            }
        }
    }
    Ok(Arc::new(union))
}

/// Whether `tree` shows nothing but an ordinary folder.
pub(super) fn is_nothing(tree: &Tree) -> bool {
    tree.iter().all(|(path, node)| path.is_root() && shown(node) == Some((FileKind::Directory, TOP_MODE, 0)))
}

/// Writes `tree` into a directory of its own, as a step is shown it. `owner` names the step that put out a path.
///
/// # Errors
/// [`BuildError::Lost`] where the store lacks a content or has another in its place; [`BuildError::Io`].
pub(super) fn write(
    tree: &Tree,
    store: &Store,
    owner: impl Fn(&TreePath) -> String,
) -> Result<Folder, BuildError> {
    let area = store.temporary();
    let folder = Folder::new_in(&area, "view-");
    let folder = folder.map_err(|source| BuildError::Io { what: "make a folder in", path: area, source })?;
    // For all contents, from the first that is not cloned on.
    let mut room = None;
    let mut take_room = || {
        if room.is_none() {
            room = reserve(tree, store)?;
        }
        Ok(())
    };
    for (path, node) in tree.iter().filter(|(path, _)| !path.is_root()) {
        let place = folder.join(OsStr::from_bytes(path.as_bytes()));
        let node = tree.shown(path).unwrap_or(node);
        let Some((_, mode, _)) = shown(node) else { continue };
        let done = match &node.kind {
            Kind::Directory => writes::make_folder(&place, 0o700),
            Kind::Symlink(text) => writes::make_link(OsStr::from_bytes(text), &place),
            Kind::File { digest, .. } => match copy(store, digest, &place, mode, &mut take_room) {
                Ok(true) => Ok(()),
                Ok(false) => {
                    let (step, path) = (owner(path), path.to_string());
                    return Err(BuildError::Lost { step, path, digest: *digest });
                }
                Err(error) => Err(error),
            },
            _ => Ok(()),
        };
        done.map_err(|source| BuildError::Io { what: "write", path: place, source })?;
    }
    // Folders last: nobody may be kept from writing into them before.
    for (path, node) in tree.iter().filter(|(path, node)| !path.is_root() && node.kind == Kind::Directory) {
        let place = folder.join(OsStr::from_bytes(path.as_bytes()));
        if let Some((_, mode, _)) = shown(node) {
            let set = writes::set_folder_mode(&place, mode);
            set.map_err(|source| BuildError::Io { what: "set the mode of", path: place, source })?;
        }
    }
    let top = tree.get(&TreePath::root()).and_then(shown).map_or(TOP_MODE, |(_, mode, _)| mode);
    let set = writes::set_folder_mode(&folder, top);
    set.map_err(|source| BuildError::Io { what: "set the mode of", path: folder.to_owned(), source })?;
    Ok(folder)
}

/// Takes room for copies of all contents of `tree`, which are in use from here on, so that none goes for another.
fn reserve(tree: &Tree, store: &Store) -> io::Result<Option<Room>> {
    if !store.has_limit() {
        return Ok(None);
    }
    let mut bytes = 0;
    for (_, node) in tree.iter() {
        if let Kind::File { digest, size } = &node.kind {
            // One that is not there is told of when its turn comes.
            drop(store.blobs().file(digest));
            bytes += size.next_multiple_of(4096);
        }
    }
    store.reserve(bytes).map(Some)
}

/// Copies a blob, by cloning where the file system can; where it cannot, room is taken first. False where the store does not
/// have it as it was.
fn copy(
    store: &Store,
    digest: &Digest,
    place: &Path,
    mode: u32,
    take_room: impl FnOnce() -> io::Result<()>,
) -> io::Result<bool> {
    let source = match store.blobs().file(digest) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        source => source?,
    };
    let target = writes::create_new(place, 0o600)?;
    let clone = || Ok(rustix::fs::ioctl_ficlone(&target, &source)?);
    let is_whole = if writes::through(Act::Set(place), clone).is_ok() {
        // What was cloned is what is read here, and nobody can write it any more.
        Digest::of_reader(File::open(place)?)?.0 == *digest
    } else {
        take_room()?;
        let mut reader = HashingReader::new(source);
        io::copy(&mut reader, &mut Through::new(&target, place))?;
        reader.finish().0 == *digest
    };
    writes::set_mode(&target, place, mode)?;
    Ok(is_whole)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use kiln_artifact::tree::{Meta, Node, TreePath};

    use super::*;

    /// A step's outputs: what is at each path, with the folders above.
    fn tree(nodes: &[(&str, Kind)]) -> Arc<Tree> {
        let mut tree = Tree::new();
        let meta = Meta { mode: 0o755, ..Meta::default() };
        for (path, kind) in nodes {
            let path = TreePath::new(path.as_bytes()).expect("a good path");
            let mut above = path.parent();
            while let Some(folder) = above {
                above = folder.parent();
                tree.insert(folder, Node { kind: Kind::Directory, meta: meta.clone() });
            }
            tree.insert(path, Node { kind: kind.clone(), meta: meta.clone() });
        }
        Arc::new(tree)
    }

    #[test]
    fn a_link_of_one_step_is_no_way_for_the_files_of_another() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(&folder.path().join("store")).expect("a store");
        let outside = folder.path().join("outside");
        fs::create_dir(&outside).expect("a folder");
        let (digest, size) = store.blobs().put(&b"text"[..]).expect("room");
        let link = Kind::Symlink(outside.as_os_str().as_bytes().into());
        let (one, two) = (tree(&[("d", link)]), tree(&[("d/x", Kind::File { digest, size })]));
        let mut written = 0;
        for needs in [[("one", &one), ("two", &two)], [("two", &two), ("one", &one)]] {
            let needs = needs.map(|(name, tree)| (name, Arc::clone(tree)));
            for globs in [&[][..], &["d"], &["d/x"], &["d*"], &["**"], &["d", "d/x"], &["d/**"]] {
                let inputs = Outputs::parse(globs.iter().copied()).expect("good globs");
                // Refused, or the link is not among what is shown.
                let Ok(shown) = union(&needs, &inputs) else { continue };
                let view = write(&shown, &store, |_| String::new()).expect("a view");
                assert!(view.join("d").is_dir() && !view.join("d").is_symlink(), "{globs:?}");
                assert_eq!(fs::read_dir(&outside).expect("a folder").count(), 0, "{globs:?}");
                written += 1;
            }
        }
        assert!(written >= 2, "nothing is shown of what may be shown");
    }
}
