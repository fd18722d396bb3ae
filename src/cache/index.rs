//! Where traces are kept: a pack for each scope, in which a key has several lines; and where outputs were put: a pack for
//! each WORK.
//!
//! A trace that holds is dated before anybody goes by it: it stays then, with all that it names, for as long as this
//! process lives.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use kiln_digest::Digest;
use kiln_virtio::fs::record::Kind;

use super::notes::{LastRun, Notes};
use super::pack::{Line, Packs, Which};
use super::stock::{Family, SUFFIX};
use super::trace::{Entry, Trace, line, read_line};
use crate::store::Store;

/// Most traces of one key: each has one of so many names.
const MOST: usize = 8;

/// Who may trust an entry: runs of one scope read each other's.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Scope(String);

/// A text that names no scope.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` names no scope: write lower-case letters, digits, `-` and `_`, 40 at most")]
pub struct ScopeError(String);

impl FromStr for Scope {
    type Err = ScopeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_');
        match (1..=40).contains(&text.len()) && text.chars().all(good) && !text.starts_with('-') {
            true => Ok(Self(text.to_owned())),
            false => Err(ScopeError(text.chars().take(80).collect())),
        }
    }
}

impl Default for Scope {
    fn default() -> Self {
        Self("trusted".to_owned())
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The traces that a run may read and write.
#[derive(Debug, Clone)]
pub struct Index {
    store: Store,
    own: Scope,
    others: Vec<Scope>,
    notes: Arc<Notes>,
    traces: Arc<Packs>,
    placed: Arc<Packs>,
}

/// A trace as it was found.
#[derive(Debug)]
pub struct Found {
    /// Whose it is.
    pub scope: Scope,
    /// It.
    pub trace: Trace,
    line: Line,
}

/// What the name of a step's line begins with among those that say what WORK looks like: no step's name alone may be what
/// a pack means something by.
const PLACED: &str = "step ";

/// The step whose outputs a line of this name tells of.
pub fn step_of(placed: &str) -> &str {
    placed.strip_prefix(PLACED).unwrap_or(placed)
}

/// What the names of the lines of a key begin with.
fn names_of(key: &Digest) -> String {
    format!("{key}.")
}

impl Index {
    /// Those in `store` of the scope `own`, which is written, and of `others`, which are only read.
    pub fn new(store: &Store, own: Scope, others: Vec<Scope>) -> Self {
        let notes = Arc::new(Notes::new(store));
        let [traces, placed] = [Family::Traces, Family::Placed].map(|family| Arc::new(family.packs(store)));
        Self { store: store.clone(), own, others, notes, traces, placed }
    }

    /// The scope that is written.
    pub fn scope(&self) -> &Scope {
        &self.own
    }

    fn path(&self, scope: &Scope) -> PathBuf {
        self.store.traces().join(format!("{scope}{SUFFIX}"))
    }

    /// The traces under `key`, those of the own scope first, the one used last before others. A collection may take one that is
    /// not held.
    pub fn traces(&self, key: &Digest) -> Vec<Found> {
        let names = names_of(key);
        let scopes = [&self.own].into_iter().chain(&self.others);
        scopes
            .flat_map(|scope| {
                let lines = self.traces.lines(&self.path(scope), Which::Beginning(&names));
                let found =
                    |line: Line| Some(Found { scope: scope.clone(), trace: read_line(&line.text)?, line });
                lines.into_iter().filter_map(found)
            })
            .collect()
    }

    /// Says that `found` is used now; whether it is still there. It and all that it names stay then for as long as this
    /// process lives.
    pub fn hold(&self, found: &Found) -> bool {
        self.traces.mark(&self.path(&found.scope), &found.line)
    }

    /// Adds `trace` to those under `key`, in place of what was read alike, or of the one that was not used for longest where there
    /// are many. The caller has synced what it names.
    ///
    /// # Errors
    /// What locking and writing say.
    pub fn add(&self, key: &Digest, trace: &Trace) -> io::Result<()> {
        let names = names_of(key);
        self.traces.change(&self.path(&self.own), |pack| {
            let lines = pack.lines(Which::Beginning(&names));
            let is_alike = |line: &&Line| read_line(&line.text).is_some_and(|old| read_alike(&old, trace));
            let is_free = |name: &String| lines.iter().all(|line| line.name != *name);
            let free = || (0..MOST).map(|number| format!("{names}{number}")).find(is_free);
            let alike = lines.iter().find(is_alike).map(|line| line.name.clone());
            let name = alike.or_else(free).or_else(|| Some(lines.last()?.name.clone()));
            let name = name.unwrap_or_else(|| format!("{names}0"));
            let text = line(&name, trace);
            pack.append([(name, text)])
        })
    }

    /// Takes the traces under `key` away whose outputs are `outputs`: the store does not have them any more.
    ///
    /// # Errors
    /// What locking and writing say.
    pub fn forget(&self, key: &Digest, outputs: &Digest) -> io::Result<()> {
        let names = names_of(key);
        let is_lost = |line: &Line| {
            line.name.starts_with(&names)
                && read_line(&line.text).is_some_and(|trace| trace.outputs == *outputs)
        };
        let path = self.path(&self.own);
        match self.traces.lines(&path, Which::Beginning(&names)).iter().any(is_lost) {
            true => self.traces.rewrite(&path, |line| !is_lost(line)),
            false => Ok(()),
        }
    }

    /// What the step `step` did last in the WORK that `work` names.
    pub fn last_run(&self, work: &[u8], step: &str) -> Option<LastRun> {
        self.notes.last(work, step)
    }

    /// Notes what a step did in the WORK that `work` names.
    ///
    /// # Errors
    /// What writing says.
    pub fn note_run(&self, work: &[u8], run: &LastRun) -> io::Result<()> {
        self.notes.add(work, run)
    }

    fn placed_path(&self, work: &[u8]) -> PathBuf {
        self.store.placed().join(format!("{}{SUFFIX}", Digest::of(&[b"placed in\0", work].concat())))
    }

    /// What the outputs of the step `step` look like in the WORK that `work` names: a trace whose one share is WORK. None where
    /// a run of a scope put them there that is not read.
    pub fn placed(&self, work: &[u8], step: &str) -> Option<Trace> {
        let name = [PLACED, step].concat();
        let placed = read_line(&self.placed.lines(&self.placed_path(work), Which::Name(&name)).pop()?.text)?;
        let is_read = [&self.own].into_iter().chain(&self.others).any(|scope| scope.0 == placed.machine);
        is_read.then_some(placed)
    }

    /// Notes that, with the scope that is written in place of a machine.
    ///
    /// # Errors
    /// What locking and writing say.
    pub fn note_placed(&self, work: &[u8], step: &str, placed: Trace) -> io::Result<()> {
        let name = [PLACED, step].concat();
        let text = line(&name, &Trace { machine: self.own.0.clone(), ..placed });
        self.placed.change(&self.placed_path(work), |pack| pack.append([(name, text)]))
    }

    /// Notes that it is not known what the outputs of the step `step` look like in the WORK that `work` names.
    ///
    /// # Errors
    /// What locking, reading and writing say.
    pub fn forget_placed(&self, work: &[u8], step: &str) -> io::Result<()> {
        let name = [PLACED, step].concat();
        self.placed.rewrite(&self.placed_path(work), |line| line.name != name)
    }
}

/// Whether two traces tell of the same answers to the same questions: only the stamps may differ.
fn read_alike(one: &Trace, other: &Trace) -> bool {
    let answer = |entry: &Entry| {
        let is_sized = matches!(entry.kind, Kind::Regular | Kind::Link);
        let size = is_sized.then_some(entry.fingerprint.size_bytes);
        (entry.kind, entry.observed, entry.fingerprint.mode, size, entry.content, entry.listing, entry.xattrs)
    };
    let are_alike = |(a, b): (&Entry, &Entry)| a.path == b.path && answer(a) == answer(b);
    one.outputs == other.outputs
        && one.shares.len() == other.shares.len()
        && one.shares.iter().zip(&other.shares).all(|(one, other)| {
            one.name == other.name
                && one.missed == other.missed
                && one.entries.len() == other.entries.len()
                && one.entries.iter().zip(&other.entries).all(are_alike)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placed() -> Trace {
        Trace {
            stamped_nanos: 1,
            shares: Vec::new(),
            outputs: Digest::of(b"outputs"),
            log: None,
            command_ms: 0,
            machine: "trusted".to_owned(),
        }
    }

    #[test]
    fn a_step_may_be_called_what_a_pack_means_something_by() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path()).expect("a store");
        let index = || Index::new(&store, Scope::default(), Vec::new());
        let names = ["used", "used x", "step", "step used", "a\nb"];
        for step in names {
            index().note_placed(b"work", step, placed()).expect("room");
        }
        for step in names {
            assert_eq!(index().placed(b"work", step), Some(placed()), "{step}");
        }
        assert_eq!(index().placed(b"work", "x"), None);
        index().forget_placed(b"work", "used").expect("room");
        assert_eq!(index().placed(b"work", "used"), None);
        assert_eq!(index().placed(b"work", "used x"), Some(placed()));
    }

    #[test]
    fn what_another_scope_put_into_work_is_not_seen_unless_that_is_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path()).expect("a store");
        let scope = |name: &str| name.parse::<Scope>().expect("a scope");
        let index = |own, others| Index::new(&store, scope(own), others);
        index("pr", Vec::new()).note_placed(b"work", "deps", placed()).expect("room");
        assert_eq!(index("trusted", Vec::new()).placed(b"work", "deps"), None);
        let seen = index("trusted", vec![scope("pr")]).placed(b"work", "deps");
        assert_eq!(seen.map(|placed| placed.machine), Some("pr".to_owned()));
        index("trusted", Vec::new()).note_placed(b"work", "deps", placed()).expect("room");
        assert_eq!(index("trusted", Vec::new()).placed(b"work", "deps"), Some(placed()));
    }
}
