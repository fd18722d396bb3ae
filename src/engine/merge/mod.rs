//! Merging a step's outputs into WORK: all of them or none, one rename an output, under a journal.
//!
//! Outputs are first written whole into a staging folder inside WORK (so that a rename stays on one file system),
//! synced, and named in a journal; from then on the merge is completed, by this kiln or by the next one at
//! this WORK. Before that moment a crash leaves WORK as it was, and the next kiln removes the staging folder.
//! What is in WORK belongs to kiln only where the ledger says so: a file that a person made or changed is
//! never overwritten.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use kiln_artifact::tree::{Kind, Node, Tree, TreePath};
use kiln_virtio::fs::record::{Fingerprint, PathBytes};

use crate::cache::ledger::{Changes, Identity, Ledger, Placed};
use crate::store::Store;
use crate::writes::{self, Through};

mod staging;
mod work;

use staging::{Journal, Locked, Staging, name_of};
pub use staging::{STAGING, recover};
use work::Seen;

/// Why outputs cannot be merged. WORK is as it was.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// Something in WORK cannot be read or written.
    #[error("cannot {what} `{path}`")]
    Io {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// A file that kiln did not put there, or that was changed since.
    #[error("`{path}` in WORK is not what kiln put there")]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// A kind of file that WORK does not hold.
    #[error("output `{path}` is a {kind}, which WORK does not hold")]
    Kind {
        /// The output.
        path: TreePath,
        /// What it is.
        kind: &'static str,
    },
    /// What an interrupted merge had yet to do.
    #[error("cannot make out what an interrupted merge had yet to do: `{}/journal` is none of this kiln's", staging.display())]
    Unreadable {
        /// The folder.
        staging: PathBuf,
    },
    /// Somebody put a file where an interrupted merge has something yet to do.
    #[error("`{path}` is in the way of a merge that was interrupted, and is not what stood there then")]
    InTheWay {
        /// The file.
        path: PathBuf,
    },
    /// Something that is no folder has the staging folder's name.
    #[error("`{path}` is in the place of the folder in which kiln gets outputs ready")]
    NoStaging {
        /// What it is called.
        path: PathBuf,
    },
    /// A name that kiln needs for itself.
    #[error("output `{path}` lies in {STAGING}, which kiln keeps for itself")]
    Reserved {
        /// The output.
        path: TreePath,
    },
}

impl MergeError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Changed { path } => Some(format!(
                "move `{}` away, or say --overwrite to let this step's outputs replace files that are there",
                path.display()
            )),
            Self::Kind { .. } => {
                Some("declare the outputs without it, or pack it into an archive".to_owned())
            }
            Self::Reserved { .. } => Some("give the output another name".to_owned()),
            Self::Unreadable { staging } => Some(format!(
                "complete it with the kiln that began it, or remove `{}` and say --overwrite: some outputs in WORK are of \
                 before it and some of after it",
                staging.display()
            )),
            Self::InTheWay { path } => Some(format!(
                "move `{}` away; kiln completes the merge then, and you can put it back",
                path.display()
            )),
            Self::NoStaging { path } => Some(format!("move `{}` away", path.display())),
            Self::Io { path, source, .. } if path.ends_with(STAGING) && is_denied(source) => Some(
                "another user's kiln merges there, or was killed: wait for it, or let that user run kiln at this WORK"
                    .to_owned(),
            ),
            Self::Io { .. } => None,
        }
    }
}

fn is_denied(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::PermissionDenied
}

fn at(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> MergeError + use<> {
    let path = path.to_owned();
    move |source| MergeError::Io { what, path, source }
}

/// What WORK looks like where a merge put outputs, while no kiln can merge anything else there.
#[derive(Debug, Clone)]
pub struct Looks {
    /// When that was at the earliest, nanoseconds since 1970.
    pub stamped_nanos: i64,
    /// Of files, links and empty folders. What somebody changed since it was put there, or found there and read, is not among
    /// them.
    pub fingerprints: BTreeMap<TreePath, Fingerprint>,
}

/// What a merge came to.
#[derive(Debug)]
pub struct Merged {
    /// Files that it placed.
    pub placed: Vec<TreePath>,
    /// What the outputs look like then.
    pub looks: Looks,
}

/// One step's outputs, on their way into WORK.
#[derive(Debug)]
pub struct Merge<'a> {
    /// Where contents come from.
    pub store: &'a Store,
    /// The directory.
    pub work: &'a Path,
    /// Who puts them there: what this step put out before and no longer does is removed.
    pub step: &'a str,
    /// Whether files that kiln did not put there may be replaced.
    pub overwrite: bool,
}

fn on_host(work: &Path, path: &TreePath) -> PathBuf {
    work.join(OsStr::from_bytes(path.as_bytes()))
}

fn bytes(path: &TreePath) -> PathBytes {
    PathBytes(path.as_bytes().to_vec())
}

/// What `step` put into `work` before and kiln is still answerable for: its own next run does not see it, so that
/// what it puts out then is all that it puts out.
///
/// # Errors
/// [`MergeError::Io`].
pub fn placed_by(store: &Store, work: &Path, step: &str) -> Result<Vec<PathBytes>, MergeError> {
    let Ok(path) = fs::canonicalize(work) else { return Ok(Vec::new()) };
    let placed = Ledger::of(store, &path).placed_by(step).map_err(at(LEDGER, work))?;
    Ok(placed.into_keys().collect())
}

/// What is done when a ledger cannot be read.
const LEDGER: &str = "read what kiln put into";

/// Whether a path has the name of the staging folder in it, of this WORK or of one below it, also where capitals count for nothing.
fn is_reserved(path: &TreePath) -> bool {
    path.components().any(|name| name.eq_ignore_ascii_case(STAGING.as_bytes()))
}

impl Merge<'_> {
    /// Merges `outputs` (every node a declared output or a folder above one).
    ///
    /// # Errors
    /// [`MergeError`]; nothing was changed then.
    pub fn run(&self, outputs: &Tree) -> Result<Merged, MergeError> {
        self.carry_out(outputs, None)
    }

    /// Merges `outputs` into what is there, whatever put it there: what this step put out before stays. What lies at or
    /// beneath the paths `removed` and is no output goes.
    ///
    /// # Errors
    /// [`MergeError`]; nothing was changed then.
    pub fn run_upon(&self, outputs: &Tree, removed: &[TreePath]) -> Result<Merged, MergeError> {
        let over = Merge { overwrite: true, ..*self };
        over.carry_out(outputs, Some(removed))
    }

    fn carry_out(&self, outputs: &Tree, removed: Option<&[TreePath]>) -> Result<Merged, MergeError> {
        let locked = Locked::open(self.store, self.work)?;
        let mut wanted = BTreeMap::new();
        for (path, node) in outputs.iter() {
            if is_reserved(path) {
                return Err(MergeError::Reserved { path: path.clone() });
            }
            if let Some(identity) = identity(path, node, outputs)? {
                wanted.insert(path.clone(), identity);
            }
        }
        let staging = locked.begin(self.store)?;
        let planned = self.plan(&locked, outputs, &wanted, removed).and_then(|planned| {
            self.stage(&staging, outputs, &planned.places)?;
            staging.write(&planned.journal)?;
            Ok(planned)
        });
        let Planned { journal, places, mut seen } = match planned {
            Ok(planned) => planned,
            Err(error) => {
                staging.discard()?;
                return Err(error);
            }
        };
        let placed = locked.complete(self.store, &staging, &journal)?;
        seen.extend(places.iter().zip(placed).filter_map(|(path, placed)| Some((path.clone(), placed?))));
        let looks = looks(&locked, outputs, &wanted, &seen);
        staging.remove()?;
        Ok(Merged { placed: places, looks })
    }

    /// What has to be done for WORK to have the outputs, or why it must not be.
    fn plan(
        &self,
        locked: &Locked,
        outputs: &Tree,
        wanted: &BTreeMap<TreePath, Identity>,
        removed: Option<&[TreePath]>,
    ) -> Result<Planned, MergeError> {
        let look = |path: &TreePath| locked.work.look(path).map_err(at("read", &on_host(&locked.path, path)));
        let changed = |path: &TreePath| MergeError::Changed { path: on_host(&locked.path, path) };
        let ledger = Ledger::of(self.store, &locked.path);
        let unread = || at(LEDGER, &locked.path);
        let own = ledger.placed_by(self.step).map_err(unread())?;
        let new_to_it: Vec<PathBytes> =
            wanted.keys().map(bytes).filter(|path| !own.contains_key(path)).collect();
        let owners = ledger.owners(&new_to_it).map_err(unread())?;
        let mut of_others: BTreeMap<String, Placed> = BTreeMap::new();
        // What kiln put at a path, whichever step's it was.
        let mut known = |path: &PathBytes| match (own.get(path), owners.get(path)) {
            (Some(identity), _) => Ok(Some(*identity)),
            (None, None) => Ok(None),
            (None, Some(step)) => {
                if !of_others.contains_key(step) {
                    of_others.insert(step.clone(), ledger.placed_by(step).map_err(unread())?);
                }
                Ok(of_others.get(step).and_then(|placed| placed.get(path)).copied())
            }
        };
        let (mut stood, mut seen) = (BTreeMap::new(), BTreeMap::new());
        let (mut removals, mut cleared) = match removed {
            None => {
                let removals = self.removals(locked, (&ledger, &own), wanted)?;
                stood.extend(removals.iter().map(|(path, found)| (bytes(path), *found)));
                (removals.into_keys().collect(), Vec::new())
            }
            Some(removed) => taken_away(locked, wanted, removed)?,
        };
        let mut places = Vec::new();
        // Whether what stands at a path goes away, so that something else may take its place.
        let gives_way = |path: &TreePath, removals: &mut BTreeSet<TreePath>| {
            removals.contains(path) || (self.overwrite && removals.insert(path.clone()))
        };
        for (path, identity) in wanted {
            match look(path)? {
                Seen::Nothing => places.push(path.clone()),
                Seen::Leaf(found, looks) if found == *identity => {
                    seen.insert(path.clone(), looks);
                }
                Seen::Leaf(found, _)
                    if self.overwrite
                        || found.digest == identity.digest
                        || known(&bytes(path))?.is_some_and(|placed| placed.digest == found.digest) =>
                {
                    stood.insert(bytes(path), found);
                    places.push(path.clone());
                }
                Seen::Blocked(above) if gives_way(&above, &mut removals) => places.push(path.clone()),
                Seen::Folder => {
                    // Outputs of this step that go away may leave an empty folder; anything else is a person's.
                    let leaves =
                        locked.work.leaves(path).map_err(at("read", &on_host(&locked.path, path)))?;
                    if (leaves.is_empty() && removed.is_none())
                        || !leaves.iter().all(|leaf| removals.contains(leaf))
                    {
                        return Err(changed(path));
                    }
                    cleared.push(path.clone());
                    places.push(path.clone());
                }
                Seen::Leaf(..) | Seen::Other => return Err(changed(path)),
                Seen::Blocked(above) => return Err(changed(&above)),
            }
        }
        let mut folders = Vec::new();
        for (path, node) in
            outputs.iter().filter(|(path, node)| node.kind == Kind::Directory && !path.is_root())
        {
            match look(path)? {
                Seen::Nothing | Seen::Folder => {}
                Seen::Blocked(at) if gives_way(&at, &mut removals) => {}
                Seen::Leaf(found, _) if gives_way(path, &mut removals) => {
                    stood.insert(bytes(path), found);
                }
                Seen::Leaf(..) | Seen::Other => return Err(changed(path)),
                Seen::Blocked(at) => return Err(changed(&at)),
            }
            folders.push((bytes(path), u32::from(node.meta.mode)));
        }
        // A file that was there before, and is a person's, does not become kiln's by being equal to an output, unless it may be
        // replaced.
        let is_kilns = |path: &TreePath, name: &PathBytes| {
            self.overwrite
                || own.contains_key(name)
                || owners.contains_key(name)
                || places.binary_search(path).is_ok()
        };
        let mut placed: Placed = wanted
            .iter()
            .map(|(path, identity)| (path, bytes(path), *identity))
            .filter(|(path, name, _)| is_kilns(path, name))
            .map(|(_, name, identity)| (name, identity))
            .collect();
        let removed_names: BTreeSet<PathBytes> = removals.iter().map(bytes).collect();
        if removed.is_some() {
            for (name, identity) in own.iter().filter(|(name, _)| !removed_names.contains(name)) {
                placed.entry(name.clone()).or_insert(*identity);
            }
        }
        let changes = changes(&ledger, self.step, &own, placed, owners, &removed_names).map_err(unread())?;
        let journal = Journal {
            removals: removals.iter().map(bytes).collect(),
            cleared: cleared.iter().map(bytes).collect(),
            folders,
            places: places.iter().map(bytes).collect(),
            changes,
            stood: Some(stood.into_iter().collect()),
            store: Some(name_of(self.store)),
        };
        Ok(Planned { journal, places, seen })
    }

    /// What this step put out before, is still as it was, and is no longer among its outputs; and what that is.
    fn removals(
        &self,
        locked: &Locked,
        (ledger, own): (&Ledger<'_>, &Placed),
        wanted: &BTreeMap<TreePath, Identity>,
    ) -> Result<BTreeMap<TreePath, Identity>, MergeError> {
        let mut removals = BTreeMap::new();
        let paths = own.iter().map(|(name, placed)| (TreePath::new(&name.0), name, placed));
        let dropped: Vec<_> = paths
            .filter_map(|(path, name, placed)| path.ok().map(|path| (path, name, placed)))
            .filter(|(path, ..)| !wanted.contains_key(path))
            .collect();
        // Where the ledger was damaged, another step may have put out what this one believes is its own.
        let owners =
            ledger.owners(dropped.iter().map(|(_, name, _)| *name)).map_err(at(LEDGER, &locked.path))?;
        for (path, name, placed) in dropped {
            if owners.get(name).is_some_and(|owner| owner != self.step) {
                continue;
            }
            let host = on_host(&locked.path, &path);
            match locked.work.look(&path).map_err(at("read", &host))? {
                Seen::Leaf(found, _) if self.overwrite || found.digest == placed.digest => {
                    removals.insert(path, found);
                }
                Seen::Leaf(..) => return Err(MergeError::Changed { path: host }),
                // A person removed it, moved it, or put something else there: not kiln's any more.
                Seen::Nothing | Seen::Blocked(_) | Seen::Folder | Seen::Other => {}
            }
        }
        Ok(removals)
    }

    fn stage(&self, staging: &Staging, outputs: &Tree, places: &[TreePath]) -> Result<(), MergeError> {
        for (number, path) in places.iter().enumerate() {
            let Some(node) = outputs.get(path) else { continue };
            let node = resolve(outputs, node);
            let staged = staging.path.join(number.to_string());
            match &node.kind {
                Kind::File { digest, size } => {
                    let mode = mode_in_work(node);
                    let mut target = writes::create_new(&staged, mode).map_err(at("write", &staged))?;
                    let mut source = self.store.blobs().file(digest).map_err(at("read", &staged))?;
                    copy_sparse(&mut source, &mut target, &staged, *size)
                        .map_err(at("write", &on_host(self.work, path)))?;
                    writes::set_mode(&target, &staged, mode).map_err(at("set the mode of", &staged))?;
                }
                Kind::Symlink(text) => {
                    writes::make_link(OsStr::from_bytes(text), &staged).map_err(at("write", &staged))?;
                }
                _ => {}
            }
        }
        writes::sync_all(&staging.folder, &staging.path).map_err(at("sync", &staging.path))
    }
}

/// What has to be done, and what need not be.
struct Planned {
    journal: Journal,
    places: Vec<TreePath>,
    /// What the outputs that are there already looked like before they were read.
    seen: BTreeMap<TreePath, Fingerprint>,
}

/// What the outputs look like now, of those whose content is known: `seen` is what they looked like when it was.
fn looks(
    locked: &Locked,
    outputs: &Tree,
    wanted: &BTreeMap<TreePath, Identity>,
    seen: &BTreeMap<TreePath, Fingerprint>,
) -> Looks {
    let stamped_nanos = crate::clock::now_nanos();
    let look = |path: &TreePath| Some((path.clone(), locked.work.fingerprint(path)?));
    // A file system that keeps whole seconds shows no change of the same second.
    let is_coarse = |looks: &Fingerprint| looks.ctime_nanos % 1_000_000_000 == 0;
    let is_known = |(path, looks): &(TreePath, _)| seen.get(path) == Some(looks) && !is_coarse(looks);
    let leaves = wanted.keys().filter_map(look).filter(is_known);
    let folders = outputs.iter().map(|(path, _)| path).filter(|path| outputs.is_empty_folder(path));
    Looks { stamped_nanos, fingerprints: leaves.chain(folders.filter_map(look)).collect() }
}

/// Of what lies at or beneath the paths `removed` and is not `wanted`: the leaves, and the folders that go with them.
fn taken_away(
    locked: &Locked,
    wanted: &BTreeMap<TreePath, Identity>,
    removed: &[TreePath],
) -> Result<(BTreeSet<TreePath>, Vec<TreePath>), MergeError> {
    let (mut leaves, mut folders) = (BTreeSet::new(), Vec::new());
    for path in removed.iter().filter(|path| !is_reserved(path)) {
        let failed = |source| at("read", &on_host(&locked.path, path))(source);
        match locked.work.look(path).map_err(failed)? {
            Seen::Leaf(..) => leaves.extend(Some(path.clone())),
            Seen::Folder => {
                leaves.extend(locked.work.leaves(path).map_err(failed)?);
                folders.push(path.clone());
            }
            Seen::Nothing | Seen::Other | Seen::Blocked(_) => {}
        }
    }
    // What is put in a leaf's place replaces it in one rename.
    leaves.retain(|path| !wanted.contains_key(path));
    folders.retain(|path| !wanted.contains_key(path));
    Ok((leaves, folders))
}

/// What becomes of the ledger where a step that had put out `own` now has `placed` there, of which other steps were the
/// `owners` of some, and all that is `removed` goes.
fn changes(
    ledger: &Ledger<'_>,
    step: &str,
    own: &Placed,
    placed: Placed,
    owners: BTreeMap<PathBytes, String>,
    removed: &BTreeSet<PathBytes>,
) -> io::Result<Changes> {
    let claimed: Vec<PathBytes> = placed.keys().filter(|name| !own.contains_key(*name)).cloned().collect();
    let mut gone: BTreeSet<PathBytes> =
        own.keys().filter(|name| !placed.contains_key(*name)).cloned().collect();
    let mut taken: BTreeMap<String, BTreeSet<PathBytes>> = BTreeMap::new();
    let lost = ledger.owners(removed.iter().filter(|name| !own.contains_key(*name)))?;
    gone.extend(lost.keys().cloned());
    for (name, owner) in owners.into_iter().chain(lost).filter(|(_, owner)| owner != step) {
        taken.entry(owner).or_default().insert(name);
    }
    Ok(Changes { step: step.to_owned(), placed, claimed, taken, gone })
}

/// The permissions of a file in WORK: as the step set them, but nobody else may write it and its owner always may.
fn mode_in_work(node: &Node) -> u32 {
    u32::from(node.meta.mode & 0o755) | 0o600
}

/// The node that holds a hard link's content.
fn resolve<'a>(outputs: &'a Tree, node: &'a Node) -> &'a Node {
    match &node.kind {
        Kind::HardLink(target) => outputs.get(target).unwrap_or(node),
        _ => node,
    }
}

/// What an output will be in WORK; none for a folder.
fn identity(path: &TreePath, node: &Node, outputs: &Tree) -> Result<Option<Identity>, MergeError> {
    let node = resolve(outputs, node);
    let kind = match &node.kind {
        Kind::Directory => return Ok(None),
        Kind::File { digest, .. } => return Ok(Some(Identity::file(*digest, mode_in_work(node)))),
        Kind::Symlink(text) => return Ok(Some(Identity::link(text))),
        Kind::HardLink(_) => "hard link to nothing",
        Kind::CharDevice { .. } | Kind::BlockDevice { .. } => "device",
        Kind::Fifo => "FIFO",
        Kind::Socket => "socket",
    };
    Err(MergeError::Kind { path: path.clone(), kind })
}

/// Copies a blob's data and leaves its holes.
fn copy_sparse(source: &mut File, target: &mut File, path: &Path, size: u64) -> io::Result<()> {
    use rustix::fs::SeekFrom as Seek2;
    let mut position = 0;
    while position < size {
        let data = match rustix::fs::seek(&*source, Seek2::Data(position)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let hole = rustix::fs::seek(&*source, Seek2::Hole(data))?;
        source.seek(SeekFrom::Start(data))?;
        target.seek(SeekFrom::Start(data))?;
        io::copy(&mut Read::by_ref(source).take(hole - data), &mut Through::new(target, path))?;
        position = hole;
    }
    writes::set_length(target, path, size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_artifact::tree::Meta;

    struct World {
        folder: tempfile::TempDir,
        store: Store,
    }

    impl World {
        fn new() -> Self {
            let folder = tempfile::tempdir().expect("a temporary folder");
            let store = Store::open(&folder.path().join("store")).expect("a store");
            Self { folder, store }
        }

        fn work(&self) -> PathBuf {
            self.folder.path().join("work")
        }

        fn outputs(&self, files: &[(&str, &str)]) -> Tree {
            let mut tree = Tree::new();
            for (path, text) in files {
                let path = TreePath::new(path.as_bytes()).expect("a good path");
                let mut folder = path.parent();
                while let Some(inner) = folder {
                    let meta = Meta { mode: 0o755, ..Meta::default() };
                    tree.insert(inner.clone(), Node { kind: Kind::Directory, meta });
                    folder = inner.parent();
                }
                let (digest, size) = self.store.blobs().put(text.as_bytes()).expect("room");
                let meta = Meta { mode: 0o644, ..Meta::default() };
                tree.insert(path, Node { kind: Kind::File { digest, size }, meta });
            }
            tree
        }

        fn merge(&self, files: &[(&str, &str)]) -> Result<Vec<TreePath>, MergeError> {
            let merge = Merge { store: &self.store, work: &self.work(), step: "s", overwrite: false };
            Ok(merge.run(&self.outputs(files))?.placed)
        }

        fn read(&self, path: &str) -> Option<String> {
            fs::read_to_string(self.work().join(path)).ok()
        }
    }

    #[test]
    fn outputs_arrive_and_what_is_no_longer_put_out_goes() {
        let world = World::new();
        world.merge(&[("a/b", "1"), ("c", "2")]).expect("a first merge");
        assert_eq!(world.read("a/b").as_deref(), Some("1"));
        let changed = world.merge(&[("c", "3")]).expect("a second merge");
        assert_eq!(changed.len(), 1);
        assert_eq!(world.read("c").as_deref(), Some("3"));
        assert!(!world.work().join("a").exists());
        assert!(!world.work().join(STAGING).exists());
    }

    #[test]
    fn a_file_that_a_person_changed_is_not_overwritten_and_nothing_else_is_merged() {
        let world = World::new();
        world.merge(&[("a", "1"), ("b", "1")]).expect("a first merge");
        fs::write(world.work().join("b"), "mine").expect("a person's change");
        assert!(matches!(world.merge(&[("a", "2"), ("b", "2")]), Err(MergeError::Changed { .. })));
        assert_eq!(world.read("a").as_deref(), Some("1"));
        assert_eq!(world.read("b").as_deref(), Some("mine"));
    }

    #[test]
    fn what_is_merged_upon_replaces_and_removes_what_it_names_and_leaves_all_else() {
        let world = World::new();
        world.merge(&[("a", "1"), ("d/x", "1"), ("d/y", "1"), ("k", "1")]).expect("a first merge");
        fs::create_dir_all(world.work().join("mine/empty")).expect("a folder");
        fs::write(world.work().join("mine/file"), "mine").expect("a person's file");
        fs::write(world.work().join("a"), "changed").expect("a person's change");
        let path = |text: &str| TreePath::new(text.as_bytes()).expect("a good path");
        let upon = |files: &[(&str, &str)], removed: &[&str]| {
            let merge = Merge { store: &world.store, work: &world.work(), step: "s", overwrite: false };
            let removed: Vec<TreePath> = removed.iter().map(|text| path(text)).collect();
            merge.run_upon(&world.outputs(files), &removed).expect("a merge")
        };
        // `d` was removed and made anew; `mine` became a file, as the layer says by its name alone.
        upon(&[("a", "2"), ("d/z", "2"), ("mine", "2")], &["a", "d", "mine", "none/at/all"]);
        assert_eq!(world.read("a").as_deref(), Some("2"));
        assert_eq!(world.read("d/z").as_deref(), Some("2"));
        assert_eq!((world.read("d/x"), world.read("d/y")), (None, None));
        assert_eq!(world.read("mine").as_deref(), Some("2"));
        assert_eq!(world.read("k").as_deref(), Some("1"), "it was put out before, and stays");
        upon(&[], &["mine", STAGING]);
        assert!(!world.work().join("mine").exists());
        assert_eq!(world.read("k").as_deref(), Some("1"));
    }

    #[test]
    fn an_interrupted_merge_is_completed_from_its_journal() {
        let world = World::new();
        let outputs = world.outputs(&[("a", "1"), ("b", "2")]);
        fs::create_dir_all(world.work().join(STAGING)).expect("a folder");
        let staging = world.work().join(STAGING);
        let held = || Staging { path: staging.clone(), folder: File::open(&staging).expect("a folder") };
        let merge = Merge { store: &world.store, work: &world.work(), step: "s", overwrite: false };
        let places: Vec<TreePath> =
            ["a", "b"].map(|name| TreePath::new(name.as_bytes()).expect("good")).into();
        merge.stage(&held(), &outputs, &places).expect("staged");
        // Killed before the journal: undone.
        recover(&world.store, &world.work()).expect("recovered");
        assert_eq!(world.read("a"), None);
        fs::create_dir(&staging).expect("a folder");
        merge.stage(&held(), &outputs, &places).expect("staged");
        let journal = Journal {
            removals: Vec::new(),
            cleared: Vec::new(),
            folders: Vec::new(),
            places: places.iter().map(bytes).collect(),
            changes: Changes::default(),
            stood: None,
            store: None,
        };
        held().write(&journal).expect("written");
        fs::rename(staging.join("0"), world.work().join("a")).expect("one rename done");
        // Killed after the first rename: completed.
        recover(&world.store, &world.work()).expect("recovered");
        assert_eq!(world.read("a").as_deref(), Some("1"));
        assert_eq!(world.read("b").as_deref(), Some("2"));
        assert!(!staging.exists());
    }

    /// A merge of `files` by the step `s` of `world` that ends when its journal is written.
    fn interrupted(world: &World, files: &[(&str, &str)]) {
        let outputs = world.outputs(files);
        let merge = Merge { store: &world.store, work: &world.work(), step: "s", overwrite: false };
        let locked = Locked::open(&world.store, &world.work()).expect("nobody has it");
        let staging = locked.begin(&world.store).expect("nobody has it");
        let identities = outputs.iter().filter_map(|(path, node)| {
            Some((path.clone(), identity(path, node, &outputs).expect("a file")?))
        });
        let planned =
            merge.plan(&locked, &outputs, &identities.collect(), None).expect("nothing is in the way");
        merge.stage(&staging, &outputs, &planned.places).expect("staged");
        staging.write(&planned.journal).expect("written");
    }

    #[test]
    fn what_a_person_puts_where_an_interrupted_merge_has_something_to_do_stays() {
        for name in ["gone", "changed", "new"] {
            let world = World::new();
            world.merge(&[("gone", "1"), ("changed", "1")]).expect("a first merge");
            interrupted(&world, &[("changed", "2"), ("new", "2")]);
            let file = world.work().join(name);
            fs::write(&file, "mine").expect("room");
            let error = recover(&world.store, &world.work()).expect_err("it is a person's");
            assert!(matches!(&error, MergeError::InTheWay { path } if path.ends_with(name)), "{error}");
            let was = |name: &str| (name != "new").then(|| "1".to_owned());
            for other in ["gone", "changed", "new"].into_iter().filter(|other| *other != name) {
                assert_eq!(world.read(other), was(other), "{other} was changed all the same");
            }
            fs::rename(&file, world.folder.path().join("away")).expect("as the hint says");
            recover(&world.store, &world.work()).expect("nothing is in the way");
            let now = ["gone", "changed", "new"].map(|name| world.read(name));
            assert_eq!(now, [None, Some("2".to_owned()), Some("2".to_owned())]);
        }
    }

    #[test]
    fn a_kiln_of_another_store_completes_a_merge_in_the_ledger_of_who_began_it() {
        let world = World::new();
        let store = Store::open(&world.folder.path().join("other")).expect("a store");
        let other = World { folder: tempfile::tempdir().expect("a folder"), store };
        let merge = Merge { store: &other.store, work: &world.work(), step: "s", overwrite: false };
        merge.run(&other.outputs(&[("theirs", "1")])).expect("nothing is in the way");
        interrupted(&world, &[("ours", "1")]);
        recover(&other.store, &world.work()).expect("it completes it");
        assert_eq!(world.read("ours").as_deref(), Some("1"));
        let placed = |store| placed_by(store, &world.work(), "s").expect("a ledger");
        assert_eq!(placed(&other.store), [PathBytes(b"theirs".to_vec())]);
        assert_eq!(placed(&world.store), [PathBytes(b"ours".to_vec())]);
        world.merge(&[("ours", "2")]).expect("nothing is in the way");
        assert_eq!(world.read("ours").as_deref(), Some("2"));
    }

    #[test]
    fn a_merge_that_is_given_up_after_its_journal_was_written_is_not_completed() {
        let world = World::new();
        interrupted(&world, &[("a", "1")]);
        let locked = Locked::open(&world.store, &world.work()).expect("nobody has it");
        let path = world.work().join(STAGING);
        Staging { folder: File::open(&path).expect("a folder"), path }.discard().expect("removed");
        drop(locked);
        recover(&world.store, &world.work()).expect("nothing is left");
        assert!(world.read("a").is_none() && !world.work().join(STAGING).exists());
    }

    #[test]
    fn a_journal_that_cannot_be_read_is_an_error_and_stays() {
        let world = World::new();
        let staging = world.work().join(STAGING);
        fs::create_dir_all(&staging).expect("a folder");
        fs::write(staging.join("journal"), "of another kiln").expect("room");
        let error = world.merge(&[("a", "1")]).expect_err("nobody knows what is half done");
        assert!(error.to_string().contains("none of this kiln's") && error.hint().is_some(), "{error}");
        assert!(staging.join("journal").exists() && world.read("a").is_none());
        fs::remove_dir_all(&staging).expect("as the hint says");
        world.merge(&[("a", "1")]).expect("a merge");
    }
}
