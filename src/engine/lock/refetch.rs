//! What the store has lost and the lock names, fetched again: `kiln store repair`.

use std::collections::BTreeSet;

use kiln_digest::Digest;

use super::{RelockError, read};
use crate::engine::build::sources;
use crate::engine::host::Host;
use crate::fetch::lock::{Entry, Lock, LockedRoot};
use crate::plan::Plan;

/// A file that was lost.
#[derive(Debug)]
pub struct Refetched {
    /// What it is, for people.
    pub what: String,
    /// Its digest.
    pub digest: Digest,
    /// How fetching it went.
    pub result: Result<(), RelockError>,
}

/// Fetches what of `lost` the lock names. `plan` has the mirrors of sources.
///
/// # Errors
/// [`RelockError::Lock`]; what cannot be fetched is in what it gives.
pub fn refetch(
    host: &Host,
    plan: Option<&Plan>,
    lost: &BTreeSet<Digest>,
    progress: &mut dyn FnMut(&str),
) -> Result<Vec<Refetched>, RelockError> {
    let lock = read(host)?;
    let mut seen = BTreeSet::new();
    let mut all = Vec::new();
    for entry in lock.entries() {
        for (what, digest, _) in entry.files() {
            if lost.contains(&digest) && seen.insert(digest) {
                progress(&format!("fetching {what}"));
                all.push(Refetched { result: fetch(host, plan, entry, &digest), what, digest });
            }
        }
    }
    Ok(all)
}

/// Fetches the one file `digest` of `entry`.
fn fetch(host: &Host, plan: Option<&Plan>, entry: Entry<'_>, digest: &Digest) -> Result<(), RelockError> {
    let mut alone = Lock::default();
    match entry {
        Entry::Kernel(kernel) => return Ok(host.archive().fetch_kernel(kernel, &|_| {})?),
        Entry::Root(root) | Entry::Toolbox(root) => {
            let packages =
                root.packages.iter().filter(|package| package.sha256 == *digest).cloned().collect();
            return Ok(host.archive().fetch(&LockedRoot { packages, ..root.clone() }, &|_| {})?);
        }
        Entry::Source(source) => alone.set_source(source.clone()),
        Entry::Git(git) => alone.set_git(git.clone()),
    }
    let known = plan.map_or(&[][..], |plan| &plan.sources);
    Ok(sources::fetch_locked(&alone, known, &host.settings, &host.store, &host.permission().client)?)
}
