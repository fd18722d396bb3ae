//! What each step did last in each WORK: a pack for each WORK, to which every run adds a line.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use kiln_digest::Digest;
use serde::{Deserialize, Serialize};

use super::key::Key;
use super::pack::{Packs, Which};
use super::stock::Family;
use crate::store::Store;

/// What a step did last in one WORK: for `kiln why`, `kiln log` and `kiln inputs`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LastRun {
    /// Its name.
    pub step: String,
    /// Its key then.
    pub key: Key,
    /// How it ended, in words; none where it succeeded.
    pub failure: Option<String>,
    /// Why it ran, in words.
    pub why: String,
    /// Digest of what it printed.
    pub log: Option<Digest>,
    /// Digest of its outputs' manifest.
    pub outputs: Option<Digest>,
    /// Why its result was not kept, in words.
    pub not_kept: Option<String>,
    /// How long its command ran, milliseconds.
    pub command_ms: u64,
    /// How much of the host's memory its machine held at most, where that is known.
    #[serde(default)]
    pub held_bytes: Option<u64>,
}

/// The name of a step, alone of all that a line says.
#[derive(Deserialize)]
struct Named<'a> {
    #[serde(borrow)]
    step: Cow<'a, str>,
}

/// The step of a line. There may be anything after it.
pub(super) fn name_of(text: &[u8]) -> Option<Cow<'_, str>> {
    let named: Named<'_> = serde_json::Deserializer::from_slice(text).into_iter().next()?.ok()?;
    Some(named.step)
}

/// What a line says.
pub(super) fn read_line(text: &[u8]) -> Option<LastRun> {
    serde_json::from_slice(text).ok()
}

/// The notes of a store.
#[derive(Debug)]
pub(super) struct Notes {
    store: Store,
    packs: Packs,
    // Protects what is to be written.
    unwritten: Mutex<Unwritten>,
}

/// Notes on their way to a pack. Nobody waits for them while somebody writes others: that one writes them too, in one piece.
#[derive(Debug, Default)]
struct Unwritten {
    /// By the paths of their packs; each with its step.
    lines: BTreeMap<PathBuf, Vec<(String, Vec<u8>)>>,
    is_somebody_writing: bool,
}

impl Notes {
    /// Those of `store`.
    pub fn new(store: &Store) -> Self {
        Self { store: store.clone(), packs: Family::Notes.packs(store), unwritten: Mutex::default() }
    }

    fn path(&self, work: &[u8]) -> PathBuf {
        self.store.notes().join(Digest::of(&[b"notes of\0", work].concat()).to_string())
    }

    /// What the step `step` did last in the WORK that `work` names.
    pub fn last(&self, work: &[u8], step: &str) -> Option<LastRun> {
        self.packs.lines(&self.path(work), Which::Name(step)).pop().and_then(|line| read_line(&line.text))
    }

    /// Notes what a step did in the WORK that `work` names; another thread that is about it may write it.
    ///
    /// # Errors
    /// What locking and writing say, of all that this thread wrote.
    pub fn add(&self, work: &[u8], run: &LastRun) -> io::Result<()> {
        let line = (run.step.clone(), serde_json::to_vec(run)?);
        let unwritten = || self.unwritten.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let mut unwritten = unwritten();
            unwritten.lines.entry(self.path(work)).or_default().push(line);
            if std::mem::replace(&mut unwritten.is_somebody_writing, true) {
                return Ok(());
            }
        }
        let mut written = Ok(());
        loop {
            let next = {
                let mut unwritten = unwritten();
                let next = unwritten.lines.pop_first();
                unwritten.is_somebody_writing = next.is_some();
                next
            };
            let Some((path, lines)) = next else { return written };
            written = written.and(self.packs.change(&path, |pack| pack.append(lines)));
        }
    }
}
