//! What kiln put into a WORK and is answerable for: a document a step, and in shards which step put what.
//!
//! A step's next run reads the step's own document, however much others put into that WORK. Whose a path is that is new to a step
//! is asked of the shards: what lies in one folder is in one of them, since a step has folders of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use kiln_digest::Digest;
use kiln_virtio::fs::record::PathBytes;
use serde::{Deserialize, Serialize};

use crate::store::{Records, Store};

/// The family of its records.
pub const FAMILY: &str = "work";

/// What identifies an output: its content (of a symbolic link, its text) and, for a file, its permissions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Digest of the content; of `link:TEXT` for a symbolic link.
    pub digest: Digest,
    /// The low nine bits of the mode; 0 for a symbolic link.
    pub mode: u32,
}

impl Identity {
    /// The identity of a file.
    pub fn file(digest: Digest, mode: u32) -> Self {
        Self { digest, mode: mode & 0o777 }
    }

    /// The identity of a symbolic link.
    pub fn link(text: &[u8]) -> Self {
        Self { digest: Digest::of(&[b"link:", text].concat()), mode: 0 }
    }
}

/// What one step put into a WORK: the paths, and what is there.
pub type Placed = BTreeMap<PathBytes, Identity>;

#[derive(Serialize, Deserialize)]
struct OfStep {
    work: PathBytes,
    placed: Placed,
}

#[derive(Serialize, Deserialize)]
struct Shard {
    work: PathBytes,
    owners: BTreeMap<PathBytes, String>,
}

/// What both kinds of documents have.
#[derive(Deserialize)]
struct OfWork {
    work: PathBytes,
}

/// How a merge changes a ledger. To make the same changes once more changes nothing.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Changes {
    /// The step whose outputs are merged.
    pub step: String,
    /// All that it has put out then.
    pub placed: Placed,
    /// What of that is new to it.
    pub claimed: Vec<PathBytes>,
    /// What other steps had put out and have no longer.
    pub taken: BTreeMap<String, BTreeSet<PathBytes>>,
    /// What is nobody's any more.
    pub gone: BTreeSet<PathBytes>,
}

/// The ledger of one WORK. Whoever changes it keeps other kilns out.
#[derive(Debug)]
pub struct Ledger<'a> {
    records: Records,
    work: &'a Path,
}

impl<'a> Ledger<'a> {
    /// That of the WORK at `work`, a canonical path.
    pub fn of(store: &Store, work: &'a Path) -> Self {
        Self { records: store.records(FAMILY), work }
    }

    fn key(&self, kind: &[u8], name: &[u8]) -> Digest {
        // No path has a zero byte in it.
        Digest::of(&[self.work.as_os_str().as_bytes(), b"\0", kind, b"\0", name].concat())
    }

    fn shard_key(&self, path: &PathBytes) -> Digest {
        let folder = path.0.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
        let shard = Digest::of(path.0.get(..folder).unwrap_or_default()).as_bytes()[0];
        self.key(b"shard", &[shard])
    }

    fn name(&self) -> PathBytes {
        PathBytes(self.work.as_os_str().as_bytes().to_vec())
    }

    /// What `step` put out and kiln is still answerable for.
    ///
    /// # Errors
    /// What reading says.
    pub fn placed_by(&self, step: &str) -> io::Result<Placed> {
        let document: Option<OfStep> = self.records.read(&self.key(b"step", step.as_bytes()))?;
        Ok(document.map(|document| document.placed).unwrap_or_default())
    }

    /// Those of `paths` that a step put out, with which one.
    ///
    /// # Errors
    /// What reading says.
    pub fn owners<'b>(
        &self,
        paths: impl IntoIterator<Item = &'b PathBytes>,
    ) -> io::Result<BTreeMap<PathBytes, String>> {
        let mut found = BTreeMap::new();
        for (key, paths) in self.by_shard(paths) {
            let Some(mut shard) = self.records.read::<Shard>(&key)? else { continue };
            found.extend(paths.into_iter().filter_map(|path| shard.owners.remove_entry(path)));
        }
        Ok(found)
    }

    fn by_shard<'b>(
        &self,
        paths: impl IntoIterator<Item = &'b PathBytes>,
    ) -> BTreeMap<Digest, Vec<&'b PathBytes>> {
        let mut shards: BTreeMap<Digest, Vec<_>> = BTreeMap::new();
        for path in paths {
            shards.entry(self.shard_key(path)).or_default().push(path);
        }
        shards
    }

    fn put(&self, step: &str, placed: &Placed) -> io::Result<()> {
        let key = self.key(b"step", step.as_bytes());
        match placed.is_empty() {
            true => self.records.remove(&key),
            false => self.records.put(&key, &OfStep { work: self.name(), placed: placed.clone() }),
        }
    }

    /// Makes `changes`.
    ///
    /// # Errors
    /// What writing says; they can be made again.
    pub fn change(&self, changes: &Changes) -> io::Result<()> {
        for (step, paths) in &changes.taken {
            let mut placed = self.placed_by(step)?;
            placed.retain(|path, _| !paths.contains(path));
            self.put(step, &placed)?;
        }
        for (key, paths) in self.by_shard(changes.claimed.iter().chain(&changes.gone)) {
            let shard = self.records.read::<Shard>(&key)?;
            let mut owners = shard.map(|shard| shard.owners).unwrap_or_default();
            let loses = |owner: &String, path: &PathBytes| {
                *owner == changes.step || changes.taken.get(owner).is_some_and(|taken| taken.contains(path))
            };
            for path in paths {
                if !changes.gone.contains(path) {
                    owners.insert(path.clone(), changes.step.clone());
                } else if owners.get(path).is_some_and(|owner| loses(owner, path)) {
                    owners.remove(path);
                }
            }
            match owners.is_empty() {
                true => self.records.remove(&key)?,
                false => self.records.put(&key, &Shard { work: self.name(), owners })?,
            }
        }
        self.put(&changes.step, &changes.placed)
    }
}

/// Of which WORK the record `key` of the family is; none where it cannot be read.
pub fn work_of(store: &Store, key: &Digest) -> Option<PathBuf> {
    let document: OfWork = store.records(FAMILY).peek(key)?;
    Some(std::ffi::OsString::from_vec(document.work.0).into())
}
