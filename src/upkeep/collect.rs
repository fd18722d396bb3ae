//! Collection: what nothing names and was not used for long, and what was used least recently, down to a size.
//!
//! What an earlier kiln left that this one does not read goes in any case.
//!
//! What a process that lives has used since it began stays, with all that it names (`store::lease`); so does an image
//! that is held. All that names blobs goes for good before the blobs that only it names, so that no trace is believed whose
//! outputs are gone; a kill in between leaves blobs that nothing names, which the next collection takes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use kiln_digest::Digest;

use super::UpkeepError;
use super::census::{Census, Unit, What};
use crate::cache::stock::{Kept, left_behind, rewrite};
use crate::root::catalog::{self, CatalogError};
use crate::store::{Store, StoreError, Sweep};
use crate::writes;

/// What is to go.
#[derive(Debug, Clone, Copy)]
pub struct Order {
    /// How much may be left, in bytes on the disk; none: no ceiling.
    pub most_bytes: Option<u64>,
    /// Blobs that nothing names, and what is noted of locks and of WORKs that are gone, go when they were not used for so long;
    /// none: blobs only for the ceiling, and the rest not at all.
    pub unused: Option<Duration>,
    /// Whether nothing is taken, only said.
    pub dry_run: bool,
    /// Whether what this process used may go too.
    pub own: bool,
}

/// What went.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// What each of these was, with its bytes on the disk.
    pub taken: Vec<(String, u64)>,
    /// Bytes that are left.
    pub left_bytes: u64,
    /// How much more would have gone, were it not in use.
    pub in_use_bytes: u64,
}

impl Collected {
    /// How much went.
    pub fn bytes(&self) -> u64 {
        self.taken.iter().map(|(_, bytes)| bytes).sum()
    }
}

enum Candidate {
    Unit(usize),
    Blob(Digest),
}

/// Collects what `order` says.
///
/// # Errors
/// [`UpkeepError`].
pub fn collect(store: &Store, order: &Order) -> Result<Collected, UpkeepError> {
    let sweep = store.sweep(order.own).map_err(UpkeepError::at("lock", store.path()))?;
    if !order.dry_run {
        for path in left_behind(store).map_err(UpkeepError::at("list", store.path()))? {
            let removed = if path.is_dir() { writes::remove_tree(&path) } else { writes::remove(&path) };
            removed.map_err(UpkeepError::at("remove", &path))?;
        }
        if order.own && sweep.since.is_none() {
            for path in store.lock_paths().map_err(UpkeepError::at("list", &store.run()))? {
                writes::remove(&path).map_err(UpkeepError::at("remove", &path))?;
            }
        }
    }
    let mut census = Census::take(store)?;
    let mut left_bytes = census.total();
    let mut collected = Collected::default();
    let mut loose = Vec::new();
    let mut lines: BTreeMap<PathBuf, BTreeMap<String, SystemTime>> = BTreeMap::new();
    let now = crate::clock::now();
    let mut candidates: Vec<(SystemTime, Candidate)> = census
        .units
        .iter()
        .enumerate()
        .map(|(number, unit)| (unit.used, Candidate::Unit(number)))
        .chain(
            census
                .blobs
                .iter()
                .filter(|(_, blob)| blob.named == 0)
                .map(|(digest, blob)| (blob.used, Candidate::Blob(*digest))),
        )
        .collect();
    candidates.sort_by_key(|(used, _)| *used);
    for (used, candidate) in candidates {
        let too_much = order.most_bytes.is_some_and(|most| left_bytes > most);
        let (goes_by_age, goes_for_room) = match candidate {
            Candidate::Blob(_) => (true, true),
            Candidate::Unit(number) => match census.units[number].what {
                What::Aged => (true, false),
                _ => (false, true),
            },
        };
        let is_old =
            || order.unused.is_some_and(|unused| now.duration_since(used).is_ok_and(|age| age >= unused));
        if !(too_much && goes_for_room || goes_by_age && is_old()) {
            continue;
        }
        match candidate {
            Candidate::Blob(digest) => {
                left_bytes -= take_blob(&mut census, &digest, &sweep, &mut collected, &mut loose);
            }
            Candidate::Unit(number) => {
                if !sweep.may_take(used) {
                    collected.in_use_bytes += census.units[number].size_bytes;
                    continue;
                }
                let unit = census.units[number].clone();
                if let What::Trace(name) | What::Note(name) = &unit.what {
                    lines.entry(unit.path.clone()).or_default().insert(name.clone(), used);
                } else if !order.dry_run && !remove(store, &unit)? {
                    collected.in_use_bytes += unit.size_bytes;
                    continue;
                }
                left_bytes -= unit.size_bytes;
                collected.taken.push((unit.name, unit.size_bytes));
                for digest in unit.names.keys() {
                    let Some(blob) = census.blobs.get_mut(digest) else { continue };
                    blob.named = blob.named.saturating_sub(1);
                    if blob.named == 0 {
                        left_bytes -= take_blob(&mut census, digest, &sweep, &mut collected, &mut loose);
                    }
                }
            }
        }
    }
    collected.left_bytes = left_bytes;
    if !order.dry_run {
        for (path, taken) in &lines {
            // A step that ran meanwhile was noted anew.
            let keeps = |line: &Kept| taken.get(&line.name) != Some(&line.when);
            rewrite(store, path, keeps).map_err(UpkeepError::at("write", path))?;
        }
    }
    if order.dry_run || loose.is_empty() {
        return Ok(collected);
    }
    if collected.taken.len() > loose.len() {
        let synced = store.sync().map_err(std::io::Error::other);
        synced.map_err(UpkeepError::at("sync", store.path()))?;
    }
    for digest in &loose {
        let path = store.blobs().path(digest);
        writes::remove(&path).map_err(UpkeepError::at("remove", &path))?;
    }
    Ok(collected)
}

/// Takes a blob that nothing names, unless it is in use, to those that are `loose`, and says how much that was.
fn take_blob(
    census: &mut Census,
    digest: &Digest,
    sweep: &Sweep,
    collected: &mut Collected,
    loose: &mut Vec<Digest>,
) -> u64 {
    let Some(blob) = census.blobs.get(digest) else { return 0 };
    if !sweep.may_take(blob.used) {
        collected.in_use_bytes += blob.size_bytes;
        return 0;
    }
    let size_bytes = blob.size_bytes;
    census.blobs.remove(digest);
    collected.taken.push((format!("blob {digest}"), size_bytes));
    loose.push(*digest);
    size_bytes
}

/// Removes a unit; false where it is held.
fn remove(store: &Store, unit: &Unit) -> Result<bool, UpkeepError> {
    let failed = |source| UpkeepError::at("remove", &unit.path)(source);
    match &unit.what {
        // Lines of one pack go together, in the end.
        What::Trace(_) | What::Note(_) => {}
        What::Record | What::Aged => writes::remove(&unit.path).map_err(failed)?,
        What::Template => remove_template(store, &unit.path).map_err(failed)?,
        What::Image(digest, filesystem) => match catalog::remove(store, digest, *filesystem) {
            Ok(()) => {}
            Err(CatalogError::InUse(_)) => return Ok(false),
            Err(error) => return Err(failed(std::io::Error::other(error))),
        },
    }
    Ok(true)
}

/// Takes a template from its name at once: whoever has opened it keeps all of it.
pub(super) fn remove_template(store: &Store, path: &Path) -> std::io::Result<()> {
    let gone = store.temporary().join(path.file_name().unwrap_or_default());
    writes::rename(path, &gone)?;
    writes::remove_tree(&gone)
}

/// Gives `store` the ceiling `limit_bytes`: before a write would go beyond it, what may go does.
///
/// # Errors
/// As [`Store::set_limit`].
pub fn set_limit(store: &Store, limit_bytes: u64) -> Result<(), StoreError> {
    let looked_after = store.clone();
    store.set_limit(
        limit_bytes,
        Box::new(move |wanted_bytes, ahead_bytes| {
            let free_after = |room_bytes: u64, dry_run| {
                let most_bytes = limit_bytes.checked_sub(room_bytes).unwrap_or(limit_bytes);
                let order = Order { most_bytes: Some(most_bytes), unused: None, dry_run, own: false };
                let collected = collect(&looked_after, &order).map_err(std::io::Error::other)?;
                Ok::<_, std::io::Error>(limit_bytes.saturating_sub(collected.left_bytes))
            };
            // Nothing goes for what there is no room for in the end.
            if wanted_bytes > ahead_bytes {
                let free_bytes = free_after(wanted_bytes, true)?;
                if free_bytes < wanted_bytes {
                    return Ok(free_bytes);
                }
            }
            free_after(wanted_bytes.saturating_add(ahead_bytes), false)
        }),
    )
}
