//! All that a store has of traces and of what steps did, for whoever looks after the store; nothing is dated.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use kiln_digest::Digest;

use super::notes::{self, LastRun};
use super::pack::{self, Line, Packs};
use super::trace::{self, Trace};
use crate::store::Store;

/// What the names of packs of traces end with: what else is there is of an earlier kiln.
pub(super) const SUFFIX: &str = ".pack";

/// What the lines of a pack are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    /// Traces of a scope.
    Traces,
    /// What steps did last in a WORK.
    Notes,
    /// What outputs look like in a WORK.
    Placed,
}

impl Family {
    const ALL: [Self; 3] = [Self::Traces, Self::Notes, Self::Placed];

    fn folder(self, store: &Store) -> PathBuf {
        match self {
            Self::Traces => store.traces(),
            Self::Notes => store.notes(),
            Self::Placed => store.placed(),
        }
    }

    /// That of the pack at `path`.
    fn of(store: &Store, path: &Path) -> Option<Self> {
        let folder = path.parent()?;
        let is_pack =
            |family: &Self| *family == Self::Notes || path.extension().is_some_and(|end| SUFFIX[1..] == *end);
        Self::ALL.into_iter().find(|family| family.folder(store) == folder).filter(is_pack)
    }

    fn name_of(self) -> pack::NameOf {
        match self {
            Self::Traces | Self::Placed => trace::name_of,
            Self::Notes => notes::name_of,
        }
    }

    /// Those of `store`.
    pub fn packs(self, store: &Store) -> Packs {
        let lock = match self {
            Self::Traces => "traces.lock",
            Self::Notes => "notes.lock",
            Self::Placed => "placed.lock",
        };
        Packs::new(store, lock, self.name_of())
    }

    fn content(self, text: &[u8]) -> Option<Content> {
        match self {
            Self::Traces => trace::read_line(text).map(Content::Trace),
            Self::Notes => notes::read_line(text).map(Content::Note),
            Self::Placed => trace::read_line(text).map(Content::Placed),
        }
    }

    fn kept(self, line: &Line) -> Option<Kept> {
        let Line { name, when, size_bytes, text, .. } = line;
        let content = self.content(text)?;
        Some(Kept { name: name.clone(), when: *when, size_bytes: *size_bytes, content })
    }
}

/// What a line says.
#[derive(Debug)]
pub enum Content {
    /// A trace.
    Trace(Trace),
    /// What a step did last.
    Note(LastRun),
    /// What a step's outputs look like in a WORK.
    Placed(Trace),
}

/// A line of a pack.
#[derive(Debug)]
pub struct Kept {
    /// Its name in the pack.
    pub name: String,
    /// When it was written or used last.
    pub when: SystemTime,
    /// What it takes up.
    pub size_bytes: u64,
    /// What it says.
    pub content: Content,
}

/// A pack.
#[derive(Debug)]
pub struct Stored {
    /// Where it lies.
    pub path: PathBuf,
    /// Its path in the store.
    pub name: String,
    /// The lines that count.
    pub lines: Vec<Kept>,
    /// Whether all else that is there is as it was written too.
    pub is_whole: bool,
}

/// All files beneath `folder`; those of a folder that is not there are none.
///
/// # Errors
/// What reading a folder says.
pub fn files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let (mut found, mut open) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(folder) = open.pop() {
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            match entry.file_type()?.is_dir() {
                true => open.push(entry.path()),
                false => found.push(entry.path()),
            }
        }
    }
    found.sort();
    Ok(found)
}

/// All packs.
///
/// # Errors
/// What reading folders says.
pub fn stock(store: &Store) -> io::Result<Vec<Stored>> {
    let mut stock = Vec::new();
    for family in Family::ALL {
        for path in files(&family.folder(store))? {
            if Family::of(store, &path) == Some(family) {
                stock.extend(read(store, path, family));
            }
        }
    }
    Ok(stock)
}

/// What earlier kilns left in a store, which this one does not read: files and folders.
///
/// # Errors
/// What reading folders says.
pub fn left_behind(store: &Store) -> io::Result<Vec<PathBuf>> {
    let mut left: Vec<PathBuf> =
        Some(store.path().join("last")).into_iter().filter(|last| last.exists()).collect();
    for family in [Family::Traces, Family::Placed] {
        let entries = match fs::read_dir(family.folder(store)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        let paths = entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
        left.extend(paths.into_iter().filter(|path| Family::of(store, path).is_none()));
    }
    left.sort();
    Ok(left)
}

/// What one pack holds now, while nobody changes it; none where it is gone.
///
/// # Errors
/// What locking says.
pub fn reread(store: &Store, stored: &Stored) -> io::Result<Option<Stored>> {
    let Some(family) = Family::of(store, &stored.path) else { return Ok(None) };
    family.packs(store).alone(|| read(store, stored.path.clone(), family))
}

/// Writes the pack at `path` anew, with the lines that `keeps` says.
///
/// # Errors
/// What locking, reading and writing say.
pub fn rewrite(store: &Store, path: &Path, keeps: impl Fn(&Kept) -> bool) -> io::Result<()> {
    let Some(family) = Family::of(store, path) else { return Ok(()) };
    family.packs(store).rewrite(path, |line| family.kept(line).is_some_and(|kept| keeps(&kept)))
}

fn read(store: &Store, path: PathBuf, family: Family) -> Option<Stored> {
    let name = path.strip_prefix(store.path()).unwrap_or(&path).to_string_lossy().into_owned();
    let bytes = match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        bytes => bytes.unwrap_or_default(),
    };
    let (read, is_whole) = pack::read_all(&name, &bytes, family.name_of());
    let lines: Vec<Kept> = read.iter().filter_map(|line| family.kept(line)).collect();
    let is_whole = is_whole && lines.len() == read.len();
    Some(Stored { path, name, lines, is_whole })
}

/// The scope of the pack of traces `pack`, and the key of its line `line`.
pub fn key_of(pack: &str, line: &str) -> Option<(String, Digest)> {
    let scope = pack.strip_prefix("traces/")?.strip_suffix(SUFFIX)?;
    let (key, _) = line.split_once('.')?;
    Some((scope.to_owned(), key.parse().ok()?))
}
