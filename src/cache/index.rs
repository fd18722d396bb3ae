//! Where traces are kept: a file for each scope and key, replaced whole; and where outputs were put.
//!
//! Plain files, because that is what measures best: a key is looked up by one open(2), several kilns need no lock to read
//! it, and a kill at any moment leaves the old file or the new one. Who changes one holds a lock, so that of two that add to
//! one key at once neither loses what the other, or a third, goes by. A file is dated before it is read: what was read
//! stays, with all that it names, for as long as this process lives.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use kiln_digest::Digest;

use super::alone::Alone;
use super::notes::{LastRun, Notes};
use super::trace::{Trace, read_all, write_all};
use crate::store::Store;

/// The lock's name among what runs.
const LOCK: &str = "traces.lock";
/// Most traces of one key.
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
    /// Of who changes traces.
    alone: Arc<Alone>,
}

impl Index {
    /// Those in `store` of the scope `own`, which is written, and of `others`, which are only read.
    pub fn new(store: &Store, own: Scope, others: Vec<Scope>) -> Self {
        let notes = Arc::new(Notes::new(store));
        let alone = Arc::new(Alone::new(store.run().join(LOCK)));
        Self { store: store.clone(), own, others, notes, alone }
    }

    /// The scope that is written.
    pub fn scope(&self) -> &Scope {
        &self.own
    }

    fn path(&self, scope: &Scope, key: &Digest) -> PathBuf {
        let name = key.to_string();
        self.store.traces().join(&scope.0).join(&name[..2]).join(&name[2..])
    }

    fn read(&self, scope: &Scope, key: &Digest) -> Vec<Trace> {
        let path = self.path(scope, key);
        if !self.store.mark(&path) {
            return Vec::new();
        }
        fs::read(&path).ok().and_then(|bytes| read_all(&self.name(&path), &bytes)).unwrap_or_default()
    }

    /// What a file of the store is called in its own digest.
    fn name(&self, path: &Path) -> String {
        path.strip_prefix(self.store.path()).unwrap_or(path).to_string_lossy().into_owned()
    }

    fn write(&self, path: &Path, traces: &[Trace]) -> io::Result<()> {
        self.store.replace(path, &write_all(&self.name(path), traces))
    }

    /// The traces under `key`, the newest of the own scope first, each with its scope. They and all that they name stay for as
    /// long as this process lives.
    pub fn traces(&self, key: &Digest) -> Vec<(Scope, Trace)> {
        let scopes = [&self.own].into_iter().chain(&self.others);
        scopes
            .flat_map(|scope| self.read(scope, key).into_iter().map(|trace| (scope.clone(), trace)))
            .collect()
    }

    /// Puts `trace` before the others under `key`, in place of what was read alike. The caller has synced what it names.
    ///
    /// # Errors
    /// What writing says.
    pub fn add(&self, key: &Digest, trace: Trace) -> io::Result<()> {
        let _alone = self.alone.hold()?;
        let mut traces = self.read(&self.own, key);
        traces.retain(|old| !read_alike(old, &trace));
        traces.insert(0, trace);
        traces.truncate(MOST);
        self.write(&self.path(&self.own, key), &traces)
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

    /// Takes the traces under `key` away whose outputs are `outputs`: the store does not have them any more.
    ///
    /// # Errors
    /// What writing says.
    pub fn forget(&self, key: &Digest, outputs: &Digest) -> io::Result<()> {
        let _alone = self.alone.hold()?;
        let mut traces = self.read(&self.own, key);
        traces.retain(|trace| trace.outputs != *outputs);
        self.write(&self.path(&self.own, key), &traces)
    }
}

fn placed_key(work: &[u8], step: &str) -> Digest {
    Digest::of(&[b"placed\0", work, b"\0", step.as_bytes()].concat())
}

impl Index {
    /// What the outputs of the step `step` look like in the WORK that `work` names: a trace whose one share is WORK.
    pub fn placed(&self, work: &[u8], step: &str) -> Option<Trace> {
        let path = self.placed_path(work, step);
        read_all(&self.name(&path), &fs::read(&path).ok()?)?.pop()
    }

    /// Notes that.
    ///
    /// # Errors
    /// What writing says.
    pub fn note_placed(&self, work: &[u8], step: &str, placed: Trace) -> io::Result<()> {
        self.write(&self.placed_path(work, step), &[placed])
    }

    fn placed_path(&self, work: &[u8], step: &str) -> PathBuf {
        self.store.placed().join(placed_key(work, step).to_string())
    }
}

/// Whether two traces tell of the same answers to the same questions: only the stamps may differ.
fn read_alike(one: &Trace, other: &Trace) -> bool {
    one.outputs == other.outputs
        && one.shares.len() == other.shares.len()
        && one.shares.iter().zip(&other.shares).all(|(one, other)| {
            let digests =
                |entry: &super::Entry| (entry.observed, entry.content, entry.listing, entry.fingerprint.mode);
            one.name == other.name
                && one.missed == other.missed
                && one.entries.len() == other.entries.len()
                && one
                    .entries
                    .iter()
                    .zip(&other.entries)
                    .all(|(a, b)| a.path == b.path && digests(a) == digests(b))
        })
}
