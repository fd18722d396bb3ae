//! A disk that loses power: the operations that go through `kiln::writes` are noted, and at one of them a folder becomes what
//! the disk may hold then. What was synced is there. Of the rest each file may have lost its end or have zeros in it, and
//! each name that was made, changed or removed may be as it was before: all from some moment on, as in a journal, or any.
//! What does not go through the door, such as folders for unfinished files, is on the disk as it is.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use kiln::writes::{Act, Watcher};
use kiln_digest::Digest;

use super::workload::PANICKED;

/// A file or a folder, whatever its name is. The morgue has files under theirs.
type Number = usize;

/// What has a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Node {
    Leaf(Number),
    Folder(Number),
}

/// A name in a folder. Another folder of that path is another one; of one that is not followed there is no number.
#[derive(Debug, Clone)]
struct Name {
    path: PathBuf,
    folder: Option<Number>,
}

/// An operation on names.
#[derive(Debug)]
enum Naming {
    Make(Name, Node),
    Rename(Name, Name, Node),
    Remove(Name, Node),
}

impl Naming {
    /// Whether it changes what is in `folder`.
    fn is_in(&self, folder: &Path) -> bool {
        let is_in = |name: &Name| name.path.parent() == Some(folder);
        match self {
            Self::Make(name, _) | Self::Remove(name, _) => is_in(name),
            Self::Rename(from, to, _) => is_in(from) || is_in(to),
        }
    }

    /// Does it to the names on a disk.
    fn apply(&self, names: &mut Names) {
        match self {
            Self::Make(name, node) => names.put(name, *node, Vec::new()),
            Self::Remove(name, node) => drop(names.take(name, *node)),
            Self::Rename(from, to, node) => {
                let beneath = names.take(from, *node);
                names.put(to, *node, beneath);
            }
        }
    }
}

/// All names that are followed.
#[derive(Debug, Default, Clone)]
struct Names(BTreeMap<PathBuf, Node>);

impl Names {
    fn name(&self, path: &Path) -> Name {
        let folder = match path.parent().and_then(|folder| self.0.get(folder)) {
            Some(Node::Folder(number)) => Some(*number),
            _ => None,
        };
        Name { path: path.to_owned(), folder }
    }

    /// What is beneath `path`, relative to it.
    fn beneath(&self, path: &Path) -> Vec<(PathBuf, Node)> {
        let all = self.0.range(path.to_owned()..).take_while(|(name, _)| name.starts_with(path));
        all.skip(1)
            .filter_map(|(name, node)| Some((name.strip_prefix(path).ok()?.to_owned(), *node)))
            .collect()
    }

    /// Gives `node`, with what is beneath it, a name in place of what has it. In a folder that is gone it has none.
    fn put(&mut self, name: &Name, node: Node, beneath: Vec<(PathBuf, Node)>) {
        if self.name(&name.path).folder != name.folder {
            return;
        }
        self.0.retain(|path, _| !path.starts_with(&name.path));
        self.0.extend(beneath.into_iter().map(|(path, node)| (name.path.join(path), node)));
        self.0.insert(name.path.clone(), node);
    }

    /// Takes the name from `node`, where it is that one's, with what is beneath it.
    fn take(&mut self, name: &Name, node: Node) -> Vec<(PathBuf, Node)> {
        if self.0.get(&name.path) != Some(&node) {
            return Vec::new();
        }
        let beneath = self.beneath(&name.path);
        self.0.retain(|path, _| !path.starts_with(&name.path));
        beneath
    }
}

/// What was done so far.
#[derive(Debug, Default)]
struct Log {
    /// As it was before the first operation: on the disk for good.
    before: Names,
    now: Names,
    /// Each with whether it is on the disk for good.
    namings: Vec<(Naming, bool)>,
    /// How many bytes of each file are on the disk for good.
    synced: Vec<u64>,
}

impl Log {
    fn push(&mut self, naming: Naming) {
        naming.apply(&mut self.now);
        self.namings.push((naming, false));
    }
}

/// Stands in the door until the power fails.
pub struct Power {
    /// The number of the operation before which it fails.
    at: usize,
    seed: u64,
    top: PathBuf,
    /// Where each file has one more name, so that its content stays.
    morgue: PathBuf,
    count: AtomicUsize,
    // Protects the log, and keeps the order of operations.
    log: Mutex<Log>,
    end: fn() -> !,
}

/// Numbers that a seed and what they are for decide.
pub fn lot(seed: u64, what: &str, below: u64) -> u64 {
    let digest = Digest::of(format!("{seed} {what}").as_bytes());
    let bytes = digest.as_bytes()[..8].try_into().expect("eight");
    u64::from_le_bytes(bytes) % below.max(1)
}

/// One that counts things.
pub fn lot_of(seed: u64, what: &str, below: usize) -> usize {
    usize::try_from(lot(seed, what, below as u64)).expect("less than a count")
}

impl Power {
    /// Fails before operation `at` in the folder `top`; `morgue` is an empty one beside it. Then `end` is what happens.
    pub fn new(at: usize, seed: u64, top: &Path, morgue: &Path, end: fn() -> !) -> Self {
        let power = Self {
            at,
            seed,
            top: top.to_owned(),
            morgue: morgue.to_owned(),
            count: AtomicUsize::new(0),
            log: Mutex::default(),
            end,
        };
        let mut log = Log::default();
        for path in walk(top) {
            let node = power.node(&mut log, &path);
            log.before.0.insert(path, node);
        }
        log.synced = (0..log.synced.len()).map(|number| power.length(number)).collect();
        log.now = log.before.clone();
        *power.log.lock().expect("no panic") = log;
        power
    }

    /// How many operations there were.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }

    fn place(&self, number: Number) -> PathBuf {
        self.morgue.join(number.to_string())
    }

    fn length(&self, number: Number) -> u64 {
        fs::symlink_metadata(self.place(number)).map_or(0, |meta| meta.len())
    }

    /// What has the name `path` now, which nothing had before.
    fn node(&self, log: &mut Log, path: &Path) -> Node {
        let number = log.synced.len();
        log.synced.push(0);
        if fs::symlink_metadata(path).expect("it was made").is_dir() {
            return Node::Folder(number);
        }
        fs::hard_link(path, self.place(number)).expect("one more name");
        Node::Leaf(number)
    }

    fn note(&self, act: &Act<'_>) {
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let is_ours = |path: &Path| path.starts_with(&self.top);
        match *act {
            // A folder that was there already is no news.
            Act::Make(path) if is_ours(path) && !matches!(log.now.0.get(path), Some(Node::Folder(_))) => {
                let node = self.node(&mut log, path);
                let name = log.now.name(path);
                log.push(Naming::Make(name, node));
            }
            Act::Rename(from, to) if is_ours(to) => {
                // What was renamed before, when a merge is completed, is no news either.
                let Some(node) = log.now.0.get(from).copied() else { return };
                let (from, to) = (log.now.name(from), log.now.name(to));
                log.push(Naming::Rename(from, to, node));
            }
            // What could not be removed, such as a folder that is not empty, is still there.
            Act::Remove(path) if is_ours(path) && fs::symlink_metadata(path).is_err() => {
                // A tree goes one name after another, in an order that nobody knows, and folders after what they hold.
                let seed = self.seed + log.namings.len() as u64;
                let mut beneath = log.now.beneath(path);
                beneath.sort_by_key(|(path, node)| {
                    let depth = path.components().count();
                    (
                        matches!(node, Node::Folder(_)).then_some(usize::MAX - depth),
                        lot(seed, &format!("{path:?}"), u64::MAX),
                    )
                });
                let all = beneath.into_iter().map(|(name, node)| (path.join(name), node));
                let all: Vec<_> =
                    all.chain(log.now.0.get(path).map(|node| (path.to_owned(), *node))).collect();
                for (path, node) in all {
                    let name = log.now.name(&path);
                    log.push(Naming::Remove(name, node));
                }
            }
            Act::Sync(path) => match log.now.0.get(path).copied() {
                Some(Node::Leaf(number)) => log.synced[number] = self.length(number),
                // Also of a folder that is not followed.
                _ => {
                    for (naming, is_there) in &mut log.namings {
                        *is_there |= naming.is_in(path);
                    }
                }
            },
            Act::SyncAll(_) => {
                log.namings.iter_mut().for_each(|(_, is_there)| *is_there = true);
                log.synced = (0..log.synced.len()).map(|number| self.length(number)).collect();
            }
            _ => {}
        }
    }

    /// The folder becomes what the disk holds.
    fn fail(&self) -> ! {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let synced = log.namings.iter().rposition(|(_, is_there)| *is_there).map_or(0, |last| last + 1);
        let until = lot_of(self.seed, "until", log.namings.len() - synced + 1) + synced;
        // In eight: how many of the others are on the disk.
        let share = [0, 1, 4, 7][lot_of(self.seed, "share", 4)];
        let is_journal = lot(self.seed, "journal", 3) == 0;
        let mut names = log.before.clone();
        for (number, (naming, is_there)) in log.namings.iter().enumerate() {
            let has_luck = match is_journal {
                true => number < until,
                false => lot(self.seed, &format!("name {number}"), 8) < share,
            };
            if *is_there || has_luck {
                naming.apply(&mut names);
            }
        }
        // A thread that panics would leave the others waiting for the end.
        if catch_unwind(AssertUnwindSafe(|| self.become_those(&log, &names))).is_err() {
            std::process::exit(PANICKED);
        }
        (self.end)()
    }

    fn become_those(&self, log: &Log, names: &Names) {
        let known = |path: &Path| {
            log.before.0.contains_key(path)
                || log.namings.iter().any(|(naming, _)| match naming {
                    Naming::Make(name, _) => name.path == path,
                    Naming::Rename(from, to, _) => from.path == path || path.starts_with(&to.path),
                    Naming::Remove(..) => false,
                })
        };
        for path in walk(&self.top) {
            if !known(&path) || matches!(names.0.get(&path), Some(Node::Folder(_))) {
                continue;
            }
            match fs::symlink_metadata(&path) {
                // It went with the folder that it was in.
                Err(_) => {}
                Ok(meta) if meta.is_dir() => remove_folder(&path),
                Ok(_) => fs::remove_file(&path).expect("a file"),
            }
        }
        for (path, node) in &names.0 {
            // Without the folder that it is in it is nowhere.
            if !path.parent().is_some_and(Path::is_dir) {
                continue;
            }
            match node {
                Node::Folder(_) => fs::create_dir(path).or_else(|error| match path.is_dir() {
                    true => Ok(()),
                    false => Err(error),
                }),
                Node::Leaf(number) => {
                    self.lose(*number, log.synced[*number]);
                    name_again(&self.place(*number), path)
                }
            }
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        }
        fs::remove_dir_all(&self.morgue).expect("a folder");
    }

    /// A file loses something of what nobody synced.
    fn lose(&self, number: Number, synced: u64) {
        let place = self.place(number);
        let Ok(meta) = fs::symlink_metadata(&place) else { return };
        let length = meta.size();
        if !meta.is_file() || synced >= length {
            return;
        }
        let kept = synced + lot(self.seed, &format!("kept {number}"), length - synced);
        fs::set_permissions(&place, fs::Permissions::from_mode(meta.mode() | 0o200)).expect("mine");
        let file = OpenOptions::new().write(true).open(&place).expect("mine");
        match lot(self.seed, &format!("loss {number}"), 4) {
            0 => {}
            1 => file.set_len(synced).expect("shorter"),
            2 => file.set_len(kept).expect("shorter"),
            _ => {
                let zeros = vec![0; usize::try_from(length - kept).expect("a small file")];
                file.write_all_at(&zeros, kept).expect("room");
            }
        }
        fs::set_permissions(&place, meta.permissions()).expect("mine");
    }
}

/// Gives the file `from` the name `to`. A lock of that name, which does not go through the door, may be made again meanwhile.
fn name_again(from: &Path, to: &Path) -> io::Result<()> {
    loop {
        match fs::hard_link(from, to) {
            Err(error)
                if error.kind() == io::ErrorKind::AlreadyExists && to.to_string_lossy().ends_with("lock") =>
            {
                fs::remove_file(to)?;
            }
            named => return named,
        }
    }
}

/// Removes a folder and all in it. What does not go through the door may still be made in it meanwhile, such as reservations
/// of memory, by the thread that schedules.
fn remove_folder(path: &Path) {
    const MOST_TRIES: usize = 1000;
    let mut tries = 0;
    while let Err(error) = fs::remove_dir_all(path) {
        let may_end = matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotFound);
        tries += 1;
        assert!(may_end && tries < MOST_TRIES, "{}: {error}", path.display());
        if error.kind() == io::ErrorKind::NotFound && !path.exists() {
            return;
        }
        std::thread::yield_now();
    }
}

/// All that is beneath `top`, folders before what they hold.
fn walk(top: &Path) -> Vec<PathBuf> {
    let (mut found, mut next) = (vec![top.to_owned()], 0);
    while let Some(folder) = found.get(next).cloned() {
        next += 1;
        if fs::symlink_metadata(&folder).is_ok_and(|meta| meta.is_dir()) {
            found.extend(fs::read_dir(&folder).expect("a folder").flatten().map(|entry| entry.path()));
        }
    }
    found.remove(0);
    found
}

impl Watcher for Power {
    fn before(&self, _: &Act<'_>) -> io::Result<usize> {
        match self.count.fetch_add(1, Ordering::SeqCst) {
            number if number < self.at => Ok(usize::MAX),
            number if number == self.at => self.fail(),
            // Nobody does anything any more.
            _ => loop {
                std::thread::park();
            },
        }
    }

    fn after(&self, act: &Act<'_>) {
        self.note(act);
    }
}
