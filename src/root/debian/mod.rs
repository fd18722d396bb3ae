//! Roots made of Debian packages, and Debian's kernels.
//!
//! From `debian:SUITE+PKG,…` to a tree in four steps, each verified against the one before it:
//! 1. [`Archive::resolve`]: the suite's signed indexes, and from them the packages of the root, for the lock;
//! 2. [`Archive::fetch`]: each locked .deb into the store, by digest;
//! 3. [`Archive::unpack`]: all of them as one tree, as dpkg leaves it after unpacking; no script of a package
//!    ever runs on the host;
//! 4. [`CONFIGURE_SCRIPT`], run in a machine on that tree, configures it.
//!
//! [`Archive::resolve_kernel`] and [`Archive::unpack_kernel`] do the same for a kernel, which needs no step 4, and
//! [`Archive::resolve_programs`] for programs that are only taken out of their packages.
//! Steps 2 and 3 need no index and, with everything in the store, no network and no mirror.

mod control;
mod database;
mod deb;
mod index;
mod kernel;
mod packages;
mod relation;
mod release;
mod resolve;
mod snapshot;
mod sources;
mod spec;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod unpack;
mod version;

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use jiff::Timestamp;
use kiln_artifact::tree::Tree;

pub use deb::DebError;
pub use index::IndexError;
pub use kernel::{DEFAULT_KERNEL_SUITE, KernelError, KernelTree, module_infos};
pub use packages::PackagesError;
pub use release::ReleaseError;
pub use resolve::ResolveError;
pub use snapshot::SnapshotError;
pub use sources::SourcesError;
pub use spec::{DebianSpec, SpecError};
pub use unpack::UnpackError;

use crate::fetch::http::{Client, Expected, FetchError, Progress};
use crate::fetch::lock::{LockedIndex, LockedPackage, LockedRoot};
use crate::store::Store;
use crate::threads;
use packages::Package;
use resolve::Universe;
use sources::Pocket;

/// The one architecture that roots are made for.
pub const ARCHITECTURE: &str = "amd64";

/// What the machine runs on an unpacked root to configure it: a `sh` script, the root being `/`.
pub const CONFIGURE_SCRIPT: &str = include_str!("configure.sh");

/// How many packages are fetched at once.
const CONNECTIONS: usize = 4;

/// What the user says about Debian's archives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArchiveSettings {
    /// A mirror instead of the host's APT sources (`--debian-mirror`).
    pub mirror: Option<String>,
    /// A mirror of the security archive beside it (`--debian-security-mirror`).
    pub security_mirror: Option<String>,
    /// An archive of old packages, asked for what is locked and the mirrors lack (`--debian-snapshot`).
    pub snapshot: Option<String>,
    /// A file of keys instead of the host's (`--debian-keyring`).
    pub keyring: Option<PathBuf>,
    /// Whether a Release may be used after its `Valid-Until` (`--debian-allow-expired`).
    pub allow_expired: bool,
    /// Below which folder the host's APT sources and keyrings lie: `/`.
    pub host_root: PathBuf,
}

impl Default for ArchiveSettings {
    fn default() -> Self {
        Self {
            mirror: None,
            security_mirror: None,
            snapshot: None,
            keyring: None,
            allow_expired: false,
            host_root: PathBuf::from("/"),
        }
    }
}

/// Why a root or a kernel cannot be had from Debian.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// A spec that is none.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// No archive or no key is known.
    #[error(transparent)]
    Sources(#[from] SourcesError),
    /// What is named as a snapshot archive is none.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A suite's indexes cannot be used.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// No set of packages will do.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// A package cannot be fetched.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// Packages cannot be unpacked.
    #[error(transparent)]
    Unpack(#[from] UnpackError),
    /// There is no kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

impl ArchiveError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Spec(error) => error.hint(),
            Self::Sources(error) => error.hint(),
            Self::Snapshot(error) => error.hint(),
            Self::Index(error) => error.hint(),
            Self::Resolve(error) => error.hint(),
            Self::Fetch(error) => error.hint(),
            Self::Unpack(error) => error.hint(),
            Self::Kernel(error) => error.hint(),
        }
    }
}

/// Debian's archives as this host reaches them, and the store that packages go to.
#[derive(Debug, Clone)]
pub struct Archive {
    settings: ArchiveSettings,
    client: Client,
    store: Store,
    now: Timestamp,
}

impl Archive {
    /// The archives that `settings` and the host name, as `client` reaches them. Nothing is read before it is needed.
    /// Signatures and dates are judged at the moment `now`.
    pub fn new(settings: ArchiveSettings, client: Client, store: &Store, now: Timestamp) -> Self {
        Self { settings, client, store: store.clone(), now }
    }

    /// The packages of a root for `spec`, for the lock. Fetches the suite's indexes. An index older than the one
    /// in `previous`, what was locked before, is refused.
    ///
    /// # Errors
    /// [`ArchiveError`], as its variants say.
    pub fn resolve(
        &self,
        spec: &DebianSpec,
        previous: Option<&LockedRoot>,
    ) -> Result<LockedRoot, ArchiveError> {
        let previous = previous.map_or(&[][..], |root| &root.indexes);
        self.with_packages(spec.suite(), previous, |universe, locate, indexes| {
            let chosen = match spec.is_files_only() {
                true => resolve::exact(universe, spec)?,
                false => resolve::resolve(universe, spec)?,
            };
            Ok(LockedRoot {
                spec: spec.to_string(),
                indexes,
                packages: chosen.into_iter().map(locate).collect(),
            })
        })
    }

    /// The packages that `spec` names and all they depend on, without those that make a root, for the lock. `previous`
    /// is as in [`Archive::resolve`].
    ///
    /// # Errors
    /// [`ArchiveError`], as its variants say.
    pub fn resolve_programs(
        &self,
        spec: &DebianSpec,
        previous: Option<&LockedRoot>,
    ) -> Result<LockedRoot, ArchiveError> {
        let previous = previous.map_or(&[][..], |root| &root.indexes);
        self.with_packages(spec.suite(), previous, |universe, locate, indexes| {
            let packages = resolve::closure(universe, spec)?.into_iter().map(locate).collect();
            Ok(LockedRoot { spec: spec.to_string(), indexes, packages })
        })
    }

    /// What each package of `locked`, which the store has, would unpack; contents go into the store.
    ///
    /// # Errors
    /// [`ArchiveError::Unpack`].
    pub fn unpack_programs(&self, locked: &LockedRoot) -> Result<Vec<Tree>, ArchiveError> {
        let read = |package| Ok(unpack::read(package, self.store.blobs())?.data);
        locked.packages.iter().map(read).collect()
    }

    /// Fetches the packages of `locked` that the store lacks. `progress` is told of bytes as they come; all
    /// together they are [`total_bytes`].
    ///
    /// # Errors
    /// [`ArchiveError::Fetch`], or [`ArchiveError::Sources`] where something is to be fetched.
    pub fn fetch(&self, locked: &LockedRoot, progress: Progress<'_>) -> Result<(), ArchiveError> {
        self.fetch_packages(&locked.packages, &locked.indexes, progress)
    }

    /// The packages of `locked`, which the store has, as one tree; contents go into the store.
    ///
    /// # Errors
    /// [`ArchiveError::Unpack`].
    pub fn unpack(&self, locked: &LockedRoot) -> Result<Tree, ArchiveError> {
        Ok(unpack::unpack(&locked.packages, self.store.blobs(), locked.source_date_epoch())?)
    }

    /// The files of the packages of `locked`, which the store has, as one tree with `/usr` merged, and what depmod would add
    /// to the kernels among them; contents go into the store.
    ///
    /// # Errors
    /// [`ArchiveError::Unpack`] and [`ArchiveError::Kernel`].
    pub fn unpack_files(&self, locked: &LockedRoot) -> Result<Tree, ArchiveError> {
        let epoch = locked.source_date_epoch();
        let tree = unpack::unpack_files(&locked.packages, self.store.blobs(), epoch)?;
        Ok(kernel::with_depmod(self.store.blobs(), tree, epoch)?)
    }

    /// The base URL from which `suite` would be fetched.
    ///
    /// # Errors
    /// [`ArchiveError::Sources`] where neither a setting nor the host names one.
    pub fn mirror(&self, suite: &str) -> Result<String, ArchiveError> {
        let pockets = self.pockets(suite)?;
        Ok(pockets.into_iter().flat_map(|pocket| pocket.uris).next().unwrap_or_default())
    }

    /// Asks the mirror of `suite` for its index, and gives the mirror's base URL if it answers within `patience`.
    ///
    /// # Errors
    /// [`ArchiveError::Sources`] as [`Archive::mirror`], [`ArchiveError::Fetch`] where it does not answer.
    pub fn probe(&self, suite: &str, patience: Duration) -> Result<String, ArchiveError> {
        let mirror = self.mirror(suite)?;
        let url = format!("{mirror}/dists/{suite}/InRelease");
        self.client.probe(&format!("the index of {suite}"), &url, patience)?;
        Ok(mirror)
    }

    fn pockets(&self, suite: &str) -> Result<Vec<Pocket>, SourcesError> {
        let settings = sources::Settings {
            mirror: self.settings.mirror.clone(),
            security_mirror: self.settings.security_mirror.clone(),
            keyring: self.settings.keyring.clone(),
        };
        sources::pockets(suite, ARCHITECTURE, &settings, &self.settings.host_root)
    }

    /// Runs `work` on all packages of `suite`, with what turns one into its place in the lock.
    fn with_packages<T>(
        &self,
        suite: &str,
        previous: &[LockedIndex],
        work: impl FnOnce(
            &Universe<'_>,
            &dyn Fn(&Package<'_>) -> LockedPackage,
            Vec<LockedIndex>,
        ) -> Result<T, ArchiveError>,
    ) -> Result<T, ArchiveError> {
        let pockets = self.pockets(suite)?;
        let indexes = thread::scope(|scope| {
            let index = |pocket| move || self.index(pocket, previous);
            let start = |pocket| (pocket, threads::start_in(scope, "index", index(pocket)));
            let started: Vec<_> = pockets.iter().map(start).collect();
            let join = |(pocket, thread): (_, std::io::Result<thread::ScopedJoinHandle<'_, _>>)| match thread
            {
                Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                // The caller's does what there was no thread for.
                Err(_) => index(pocket)(),
            };
            started.into_iter().map(join).collect::<Result<Vec<_>, IndexError>>()
        })?;
        let mut parsed: Vec<Vec<Package<'_>>> = Vec::new();
        for index in &indexes {
            let mut all = Vec::new();
            for text in &index.texts {
                let packages = packages::parse(text, ARCHITECTURE)
                    .map_err(|source| IndexError::Packages { suite: index.locked.suite.clone(), source })?;
                all.extend(packages);
            }
            parsed.push(all);
        }
        let locate = |package: &Package<'_>| {
            let is_here = |packages: &Vec<Package<'_>>| packages.iter().any(|one| std::ptr::eq(one, package));
            let suite = parsed.iter().position(is_here).map_or(suite, |pocket| &indexes[pocket].locked.suite);
            LockedPackage {
                name: package.name.into(),
                version: package.version.into(),
                architecture: package.architecture.into(),
                suite: suite.into(),
                path: package.path.into(),
                size: package.size,
                sha256: package.sha256,
            }
        };
        let universe = Universe::new(suite, parsed.iter().map(Vec::as_slice));
        work(&universe, &locate, indexes.iter().map(|index| index.locked.clone()).collect())
    }

    /// Fetches those of `packages`, which `indexes` named, that the store lacks.
    fn fetch_packages(
        &self,
        packages: &[LockedPackage],
        indexes: &[LockedIndex],
        progress: Progress<'_>,
    ) -> Result<(), ArchiveError> {
        let mut missing = Vec::new();
        for package in packages {
            // Where nothing is fetched, no mirror has to be known.
            let blobs = self.store.blobs();
            let expected = Expected { size: package.size, sha256: package.sha256 };
            let urls = match self.client.needs_no_url(&package.to_string(), expected, blobs)? {
                true => Vec::new(),
                false => self.urls(package, indexes)?,
            };
            missing.push((package, urls));
        }
        // Protects the first failure.
        let failure = Mutex::new(None);
        let next = AtomicUsize::new(0);
        let fetch_some = || {
            while let Some((package, urls)) = missing.get(next.fetch_add(1, Ordering::Relaxed)) {
                let what = package.to_string();
                let expected = Expected { size: package.size, sha256: package.sha256 };
                if let Err(error) = self.client.fetch(&what, urls, expected, self.store.blobs(), progress) {
                    next.store(missing.len(), Ordering::Relaxed);
                    let mut failure = failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    failure.get_or_insert(error);
                }
            }
        };
        threads::share(CONNECTIONS.min(missing.len()), "fetch", fetch_some);
        match failure.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
            Some(error) => Err(error.into()),
            None => Ok(()),
        }
    }

    /// Where `package`, which `indexes` named, may be fetched from: mirrors, and then the snapshot archive.
    fn urls(&self, package: &LockedPackage, indexes: &[LockedIndex]) -> Result<Vec<String>, ArchiveError> {
        let snapshot = self.settings.snapshot.as_ref();
        let old = snapshot.map(|template| snapshot::urls(template, package, indexes)).transpose()?;
        match (self.mirror_urls(package), old) {
            (Ok(urls), old) => Ok(urls.into_iter().chain(old.into_iter().flatten()).collect()),
            (Err(SourcesError::NoMirror { .. }), Some(old)) => Ok(old),
            (Err(error), _) => Err(error.into()),
        }
    }

    fn mirror_urls(&self, package: &LockedPackage) -> Result<Vec<String>, SourcesError> {
        // `bookworm-security` is a pocket of `bookworm`, `bookworm-backports` one of its own.
        let release = ["-security", "-updates", "/updates"]
            .iter()
            .find_map(|pocket| package.suite.strip_suffix(pocket))
            .unwrap_or(&package.suite);
        let pockets = self.pockets(release)?;
        let pocket = pockets.iter().find(|pocket| pocket.suite == package.suite);
        let pocket = pocket.ok_or_else(|| SourcesError::NoMirror { suite: package.suite.clone() })?;
        Ok(pocket.uris.iter().map(|uri| format!("{uri}/{}", package.path)).collect())
    }
}

/// The length of all `packages` together in bytes.
pub fn total_bytes(packages: &[LockedPackage]) -> u64 {
    packages.iter().map(|package| package.size).sum()
}
