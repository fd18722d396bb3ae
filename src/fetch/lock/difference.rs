//! What one lock has that another has not, entry by entry and package by package.

use std::collections::BTreeMap;

use jiff::Timestamp;
use kiln_digest::Digest;

use super::{Entry, Lock, LockedPackage};

/// What became of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EntryChange {
    /// Its kind, as [`Entry::kind`] has it.
    pub kind: &'static str,
    /// What it is locked under.
    pub name: String,
    /// Whether it came, went, or is another.
    pub fate: Fate,
    /// Length of its files before, in bytes.
    pub bytes_before: u64,
    /// Length of its files after, in bytes.
    pub bytes_after: u64,
    /// How many of its packages are the same.
    pub unchanged: usize,
    /// What is different in it.
    pub details: Vec<Detail>,
}

/// What became of an entry as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It is new.
    Added,
    /// It is gone.
    Removed,
    /// It is another.
    Changed,
}

/// A single difference in an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Detail {
    /// An index of another date.
    Index {
        /// Its suite.
        suite: String,
        /// Its date before; none where it was not there.
        before: Option<Timestamp>,
        /// Its date after; none where it is not there.
        after: Option<Timestamp>,
    },
    /// A package that is new.
    Added(LockedPackage),
    /// A package that is gone.
    Removed(LockedPackage),
    /// A package in another version.
    Version {
        /// As it was.
        before: LockedPackage,
        /// As it is.
        after: LockedPackage,
    },
    /// Other bytes under the same version: nobody should ever do that.
    SameVersion {
        /// As it was.
        before: LockedPackage,
        /// As it is.
        after: LockedPackage,
    },
    /// A package that lies elsewhere and is the same.
    Moved(LockedPackage),
    /// A source that has other bytes at the same URL.
    Bytes {
        /// Its digest before.
        before: Digest,
        /// Its digest after.
        after: Digest,
    },
    /// A tag that names another commit than before.
    Commit {
        /// Before.
        before: String,
        /// After.
        after: String,
    },
}

impl Detail {
    /// Whether it should never happen: bytes that changed under a name that promised to stay.
    pub fn is_alarming(&self) -> bool {
        matches!(self, Self::SameVersion { .. } | Self::Bytes { .. } | Self::Commit { .. })
    }
}

/// What makes `after` of `before`, in the order of the file.
pub fn between(before: &Lock, after: &Lock) -> Vec<EntryChange> {
    fn keyed(lock: &Lock) -> BTreeMap<(&'static str, String), Entry<'_>> {
        lock.entries().map(|entry| ((entry.kind(), entry.name()), entry)).collect()
    }
    let (old, new) = (keyed(before), keyed(after));
    let mut keys: Vec<&(&'static str, String)> = old.keys().chain(new.keys()).collect();
    keys.sort();
    keys.dedup();
    let change = |key: &(&'static str, String)| {
        let (old, new) = (old.get(key).copied(), new.get(key).copied());
        if old == new {
            return None;
        }
        let fate = match (old, new) {
            (None, _) => Fate::Added,
            (_, None) => Fate::Removed,
            _ => Fate::Changed,
        };
        let mut change = EntryChange {
            kind: key.0,
            name: key.1.clone(),
            fate,
            bytes_before: old.map_or(0, Entry::total_bytes),
            bytes_after: new.map_or(0, Entry::total_bytes),
            unchanged: 0,
            details: Vec::new(),
        };
        if let (Some(old), Some(new)) = (old, new) {
            inside(old, new, &mut change);
        }
        Some(change)
    };
    keys.into_iter().filter_map(change).collect()
}

fn inside(old: Entry<'_>, new: Entry<'_>, change: &mut EntryChange) {
    let details = &mut change.details;
    match (old, new) {
        (Entry::Source(old), Entry::Source(new)) => {
            details.push(Detail::Bytes { before: old.sha256, after: new.sha256 });
        }
        (Entry::Git(old), Entry::Git(new)) => details.push(match old.commit == new.commit {
            true => Detail::Bytes { before: old.sha256, after: new.sha256 },
            false => Detail::Commit { before: old.commit.clone(), after: new.commit.clone() },
        }),
        _ => {}
    }
    let dates = |entry: Entry<'_>| -> BTreeMap<String, (Timestamp, Digest)> {
        entry.indexes().iter().map(|index| (index.suite.clone(), (index.date, index.sha256))).collect()
    };
    let (before, after) = (dates(old), dates(new));
    let mut suites: Vec<&String> = before.keys().chain(after.keys()).collect();
    suites.sort();
    suites.dedup();
    for suite in suites.into_iter().filter(|suite| before.get(*suite) != after.get(*suite)) {
        let date = |dates: &BTreeMap<String, (Timestamp, Digest)>| dates.get(suite).map(|(date, _)| *date);
        details.push(Detail::Index { suite: suite.clone(), before: date(&before), after: date(&after) });
    }
    fn by_name(entry: Entry<'_>) -> BTreeMap<&str, &LockedPackage> {
        // A kernel is one package, whose name has its version in it.
        let is_kernel = matches!(entry, Entry::Kernel(_));
        let name = |package: &LockedPackage| if is_kernel { 0 } else { package.name.len() };
        entry.packages().iter().map(|package| (&package.name[..name(package)], package)).collect()
    }
    let (before, after) = (by_name(old), by_name(new));
    for (name, old) in &before {
        match after.get(name) {
            None => details.push(Detail::Removed((*old).clone())),
            Some(new) if new == old => change.unchanged += 1,
            Some(new) => {
                let (before, after) = ((*old).clone(), (*new).clone());
                let same_name = before.name == after.name && before.architecture == after.architecture;
                details.push(
                    match (same_name && before.version == after.version, before.sha256 == after.sha256) {
                        (true, false) => Detail::SameVersion { before, after },
                        (true, true) => Detail::Moved(after),
                        (false, _) => Detail::Version { before, after },
                    },
                );
            }
        }
    }
    let added = after.iter().filter(|(name, _)| !before.contains_key(*name));
    details.extend(added.map(|(_, package)| Detail::Added((*package).clone())));
}
