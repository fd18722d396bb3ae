//! `kiln lock`: the lock as a whole, held against the recipe, made anew, and its bytes taken along.
//!
//! A build adds to the lock what it misses and changes nothing in it; what is here changes it, when a person asks.

mod refetch;
mod target;
mod update;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use kiln_digest::Digest;

use super::build::sources::{self, SourceError};
use super::host::Host;
use crate::fetch::lock::difference;
use crate::fetch::lock::{Lock, LockError};
use crate::fetch::vendor::{self, VendorError, Written};
use crate::plan::graph::SourceOrigin;
use crate::plan::{Plan, PlannedStep};
use crate::root::debian::{ArchiveError, DEFAULT_KERNEL_SUITE, DebianSpec, SpecError};
use crate::root::toolbox::{self, ToolboxError};

pub use crate::fetch::lock::difference::{Detail, EntryChange, Fate};
pub use crate::fetch::lock::{Entry, LockedPackage};
pub use refetch::{Refetched, refetch};
pub use target::UnknownName;
pub use update::update;

/// Why the lock cannot be made anew, or its bytes not be taken along.
#[derive(Debug, thiserror::Error)]
pub enum RelockError {
    /// The lock.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A name that nothing in lock or recipe has.
    #[error(transparent)]
    Name(#[from] UnknownName),
    /// A root that cannot be one.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Debian's archive.
    #[error(transparent)]
    Debian(#[from] ArchiveError),
    /// The toolbox.
    #[error(transparent)]
    Toolbox(#[from] ToolboxError),
    /// A source.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Vendored bytes.
    #[error(transparent)]
    Vendor(#[from] VendorError),
    /// The lock may not be changed.
    #[error("{flag} lets nothing change the lock file")]
    Refused {
        /// What refuses it.
        flag: &'static str,
    },
    /// There is nothing to be taken along.
    #[error("nothing is locked")]
    Empty,
}

impl RelockError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Lock(error) => error.hint(),
            Self::Name(error) => error.hint(),
            Self::Spec(error) => error.hint(),
            Self::Debian(error) => error.hint(),
            Self::Toolbox(error) => error.hint(),
            Self::Source(error) => error.hint(),
            Self::Vendor(error) => error.hint(),
            Self::Refused { flag } => Some(format!("leave {flag} out, or unset the setting of that name")),
            Self::Empty => Some("`kiln lock update` locks what the recipe names".to_owned()),
        }
    }

    /// Whether what was asked for cannot be, rather than something failing.
    pub fn is_the_users(&self) -> bool {
        match self {
            Self::Name(_) | Self::Spec(_) | Self::Refused { .. } | Self::Empty => true,
            Self::Source(error) => error.is_the_users(),
            Self::Vendor(error) => {
                matches!(error, VendorError::Occupied { .. } | VendorError::NotVendored { .. })
            }
            _ => false,
        }
    }
}

/// What a recipe needs to be locked, by what it is locked under.
#[derive(Debug, Default)]
pub struct Named {
    roots: BTreeSet<String>,
    kernels: BTreeSet<String>,
    toolboxes: BTreeSet<String>,
    sources: BTreeSet<String>,
    gits: BTreeSet<(String, String)>,
}

impl Named {
    /// What `plan` names, and the toolbox, which any of its machines may need.
    ///
    /// # Errors
    /// [`RelockError::Spec`].
    pub fn of(plan: &Plan) -> Result<Self, RelockError> {
        let mut named = Self::default();
        let roots = plan.steps.iter().flat_map(PlannedStep::roots).chain(plan.roots.values());
        for root in roots.filter(|root| root.is_debian()) {
            named.roots.insert(root.to_string().parse::<DebianSpec>()?.to_string());
        }
        for suite in plan.steps.iter().filter_map(|step| step.kernel_suite(DEFAULT_KERNEL_SUITE)) {
            named.kernels.insert(DebianSpec::essential(suite)?.to_string());
        }
        named.toolboxes.insert(toolbox::spec(DEFAULT_KERNEL_SUITE)?.to_string());
        for source in &plan.sources {
            match &source.origin {
                SourceOrigin::Url { url, .. } => drop(named.sources.insert(url.clone())),
                SourceOrigin::Git { url, rev } => drop(named.gits.insert((url.clone(), rev.clone()))),
            }
        }
        Ok(named)
    }

    /// Whether `entry` is among it.
    pub fn has(&self, entry: Entry<'_>) -> bool {
        match entry {
            Entry::Root(root) => self.roots.contains(&root.spec),
            Entry::Kernel(kernel) => self.kernels.contains(&kernel.spec),
            Entry::Toolbox(toolbox) => self.toolboxes.contains(&toolbox.spec),
            Entry::Source(source) => self.sources.contains(&source.url),
            Entry::Git(git) => self.gits.contains(&(git.url.clone(), git.rev.clone())),
        }
    }
}

/// The lock of this host's settings.
///
/// # Errors
/// [`RelockError::Lock`].
pub fn read(host: &Host) -> Result<Lock, RelockError> {
    Ok(Lock::load(host.lock_path())?)
}

/// The files that the lock of this host's settings names whose digests begin with `digits`: each with the entry it is of,
/// and what it is.
///
/// # Errors
/// [`RelockError::Lock`].
pub fn names(host: &Host, digits: &str) -> Result<BTreeMap<Digest, String>, RelockError> {
    let digits = digits.trim_start_matches("sha256:").to_ascii_lowercase();
    let mut names = BTreeMap::new();
    for entry in read(host)?.entries() {
        for (what, digest, _) in entry.files() {
            if digest.to_string().starts_with(&digits) {
                let name = match what == entry.name() {
                    true => format!("{} {what}", entry.kind()),
                    false => format!("{what} of {} {}", entry.kind(), entry.name()),
                };
                names.entry(digest).or_insert(name);
            }
        }
    }
    Ok(names)
}

/// Whether the store has all files of `entry`.
pub fn is_here(host: &Host, entry: Entry<'_>) -> bool {
    let is_there = |digest: &Digest| host.store.blobs().contains(digest);
    entry.files().iter().all(|(_, digest, _)| is_there(digest))
}

fn check_refused(host: &Host) -> Result<(), RelockError> {
    // Offline, what is fetched is refused by what fetches.
    match host.settings.locked.value {
        true => Err(RelockError::Refused { flag: "--locked" }),
        false => Ok(()),
    }
}

/// Takes out of the lock what `plan` does not name; with `dry_run` only says what that is.
///
/// # Errors
/// [`RelockError`].
pub fn prune(host: &Host, plan: &Plan, dry_run: bool) -> Result<Vec<EntryChange>, RelockError> {
    let named = Named::of(plan)?;
    let prune = |lock: &mut Lock| {
        let before = lock.clone();
        lock.retain(|entry| named.has(entry));
        difference::between(&before, lock)
    };
    if dry_run {
        return Ok(prune(&mut read(host)?));
    }
    check_refused(host)?;
    Ok(Lock::change(host.lock_path(), prune)?)
}

/// Fetches all that the lock names, and puts it into `path`: an archive where its name ends in `.tar`, else a directory.
/// `plan` has the mirrors of sources.
///
/// # Errors
/// [`RelockError`].
pub fn vendor(
    host: &Host,
    plan: Option<&Plan>,
    path: &Path,
    progress: &mut dyn FnMut(&str),
) -> Result<Written, RelockError> {
    let lock = read(host)?;
    if lock.is_empty() {
        return Err(RelockError::Empty);
    }
    let archive = host.archive();
    for kernel in lock.kernels() {
        progress(&format!("fetching {}", kernel.package.name));
        archive.fetch_kernel(kernel, &|_| {})?;
    }
    for root in lock.roots().chain(lock.toolboxes()) {
        progress(&format!("fetching the packages of {}", root.spec));
        archive.fetch(root, &|_| {})?;
    }
    progress("fetching sources");
    let known = plan.map_or(&[][..], |plan| &plan.sources);
    sources::fetch_locked(&lock, known, &host.settings, &host.store, &host.permission().client)?;
    progress(&format!("writing {}", path.display()));
    let (text, files, blobs) = (lock.to_text(), lock.files(), host.store.blobs());
    let is_archive = path.extension().is_some_and(|extension| extension == "tar") && !path.is_dir();
    Ok(match is_archive {
        true => vendor::write_archive(path, &text, &files, blobs)?,
        false => vendor::write_directory(path, &text, &files, blobs)?,
    })
}
