//! `kiln.lock`: every byte that came from outside, by suite, pool path and digest, whatever the mirror.
//!
//! TOML that a person can read and diff: one package a line, entries in a fixed order, so that equal contents are equal
//! bytes ([`text`]). It is replaced by rename, whole or not at all, and by one kiln at a time ([`file`]). Comments in it do
//! not survive. [`difference`] says what one lock has that another has not.
//!
//! How the format grows: a file says its version before anything else, and one of a later version is refused by that
//! number, whatever else is in it. Within a version, a table or key that is not known is an error, so that no kiln drops
//! what it does not understand when it writes. What is new gets a table of its own (`[[request]]` is kept for requests that
//! steps make) and raises [`VERSION`]; what a version could say stays readable.

pub mod difference;
mod file;
mod text;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

use jiff::Timestamp;
use kiln_digest::Digest;
use serde::{Deserialize, Serialize};

/// The version of the format. A file of a later version is refused.
pub const VERSION: u32 = 1;

/// Why a lock file cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// The file could not be read or replaced.
    #[error("lock file `{path}` cannot be used")]
    Io {
        /// The lock file.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// The file is not what kiln writes.
    #[error("lock file `{path}`, line {line}, column {column}: {reason}")]
    Malformed {
        /// The lock file.
        path: PathBuf,
        /// The line, counted from one.
        line: usize,
        /// The column, characters from one.
        column: usize,
        /// What is wrong there.
        reason: String,
    },
    /// The file comes from a later kiln.
    #[error("lock file `{path}` has version {found}; this kiln knows version {VERSION}")]
    Version {
        /// The lock file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
}

impl LockError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Io { .. } => None,
            Self::Malformed { path, reason, .. } if reason == text::BOTH_SIDES => Some(format!(
                "take one side of `{}`, then run `kiln lock update` or build again",
                path.display()
            )),
            Self::Malformed { path, .. } => Some(format!(
                "restore `{}` from version control, or delete it to lock everything anew",
                path.display()
            )),
            Self::Version { .. } => Some("use a newer kiln".into()),
        }
    }
}

/// One Debian package: where it lies in an archive, and what it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedPackage {
    /// The package's name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// `amd64` or `all`.
    pub architecture: String,
    /// The suite whose index named it: `bookworm`, `bookworm-security`, ….
    pub suite: String,
    /// Its path in the archive: `pool/…`.
    pub path: String,
    /// Length of the .deb in bytes.
    pub size: u64,
    /// Digest of the .deb.
    pub sha256: Digest,
}

/// A signed index that packages were taken from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedIndex {
    /// The suite as it was asked for.
    pub suite: String,
    /// The index's own date.
    pub date: Timestamp,
    /// Digest of the InRelease file (of Release, where an archive has no InRelease).
    pub sha256: Digest,
}

/// A root or a toolbox, and the packages it is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedRoot {
    /// What was asked for: `debian:SUITE+PKG,PKG…`.
    pub spec: String,
    /// The indexes, by suite.
    pub indexes: Vec<LockedIndex>,
    /// The packages, by name.
    pub packages: Vec<LockedPackage>,
}

impl LockedRoot {
    /// The date of the newest index: the root's `SOURCE_DATE_EPOCH`, in seconds since 1970-01-01 UTC.
    pub fn source_date_epoch(&self) -> i64 {
        self.indexes.iter().map(|index| index.date.as_second()).max().unwrap_or(0)
    }
}

/// A kernel: one package.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedKernel {
    /// What was asked for: `debian:SUITE`.
    pub spec: String,
    /// The kernel's release, the name of its folder of modules: `6.12.57+deb13-cloud-amd64`.
    pub release: String,
    /// The indexes, by suite.
    pub indexes: Vec<LockedIndex>,
    /// The package.
    pub package: LockedPackage,
}

impl LockedKernel {
    /// As [`LockedRoot::source_date_epoch`].
    pub fn source_date_epoch(&self) -> i64 {
        self.indexes.iter().map(|index| index.date.as_second()).max().unwrap_or(0)
    }
}

/// A file that a recipe names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedSource {
    /// Where it is fetched from.
    pub url: String,
    /// Its length in bytes.
    pub size: u64,
    /// Its digest.
    pub sha256: Digest,
}

/// The tree of a commit, as an archive that kiln makes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedGit {
    /// The repository, as the recipe names it.
    pub url: String,
    /// What the recipe names in it: a commit or a tag.
    pub rev: String,
    /// The commit that this is: 40 or 64 hexadecimal digits.
    pub commit: String,
    /// Length of the archive in bytes.
    pub size: u64,
    /// Digest of the archive.
    pub sha256: Digest,
}

/// What a lock file says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Lock {
    roots: BTreeMap<String, LockedRoot>,
    kernels: BTreeMap<String, LockedKernel>,
    toolboxes: BTreeMap<String, LockedRoot>,
    sources: BTreeMap<String, LockedSource>,
    gits: BTreeMap<(String, String), LockedGit>,
}

impl Lock {
    /// The source locked for `url`.
    pub fn source(&self, url: &str) -> Option<&LockedSource> {
        self.sources.get(url)
    }

    /// Locks `source`; what was locked for its URL is replaced.
    pub fn set_source(&mut self, source: LockedSource) {
        self.sources.insert(source.url.clone(), source);
    }

    /// The root locked for `spec`.
    pub fn root(&self, spec: &str) -> Option<&LockedRoot> {
        self.roots.get(spec)
    }

    /// Locks `root`; what was locked for its spec is replaced.
    pub fn set_root(&mut self, root: LockedRoot) {
        self.roots.insert(root.spec.clone(), root);
    }

    /// The toolbox locked for `spec`.
    pub fn toolbox(&self, spec: &str) -> Option<&LockedRoot> {
        self.toolboxes.get(spec)
    }

    /// Locks `toolbox`; what was locked for its spec is replaced.
    pub fn set_toolbox(&mut self, toolbox: LockedRoot) {
        self.toolboxes.insert(toolbox.spec.clone(), toolbox);
    }

    /// The kernel locked for `spec`.
    pub fn kernel(&self, spec: &str) -> Option<&LockedKernel> {
        self.kernels.get(spec)
    }

    /// Locks `kernel`; what was locked for its spec is replaced.
    pub fn set_kernel(&mut self, kernel: LockedKernel) {
        self.kernels.insert(kernel.spec.clone(), kernel);
    }

    /// The commit locked for `rev` of the repository `url`.
    pub fn git(&self, url: &str, rev: &str) -> Option<&LockedGit> {
        self.gits.get(&(url.to_owned(), rev.to_owned()))
    }

    /// Locks `git`; what was locked for its repository and rev is replaced.
    pub fn set_git(&mut self, git: LockedGit) {
        self.gits.insert((git.url.clone(), git.rev.clone()), git);
    }

    /// All roots, by spec.
    pub fn roots(&self) -> impl Iterator<Item = &LockedRoot> {
        self.roots.values()
    }

    /// All kernels, by spec.
    pub fn kernels(&self) -> impl Iterator<Item = &LockedKernel> {
        self.kernels.values()
    }

    /// All toolboxes, by spec.
    pub fn toolboxes(&self) -> impl Iterator<Item = &LockedRoot> {
        self.toolboxes.values()
    }

    /// All sources, by URL.
    pub fn sources(&self) -> impl Iterator<Item = &LockedSource> {
        self.sources.values()
    }

    /// All commits, by repository and rev.
    pub fn gits(&self) -> impl Iterator<Item = &LockedGit> {
        self.gits.values()
    }

    /// Whether nothing is locked.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Takes out what `keep` does not want, asked with [`Entry`] by entry.
    pub fn retain(&mut self, keep: impl Fn(Entry<'_>) -> bool) {
        self.roots.retain(|_, root| keep(Entry::Root(root)));
        self.kernels.retain(|_, kernel| keep(Entry::Kernel(kernel)));
        self.toolboxes.retain(|_, toolbox| keep(Entry::Toolbox(toolbox)));
        self.sources.retain(|_, source| keep(Entry::Source(source)));
        self.gits.retain(|_, git| keep(Entry::Git(git)));
    }

    /// Every entry, in the order of the file.
    pub fn entries(&self) -> impl Iterator<Item = Entry<'_>> {
        let kernels = self.kernels().map(Entry::Kernel);
        let sources = self.sources().map(Entry::Source).chain(self.gits().map(Entry::Git));
        let roots = self.roots().map(Entry::Root).chain(self.toolboxes().map(Entry::Toolbox));
        kernels.chain(sources).chain(roots)
    }

    /// Every file that the lock names, by digest: what it is, for people, and its length in bytes.
    pub fn files(&self) -> BTreeMap<Digest, (String, u64)> {
        let mut files = BTreeMap::new();
        for entry in self.entries() {
            for (what, digest, size) in entry.files() {
                files.entry(digest).or_insert((what, size));
            }
        }
        files
    }
}

/// One entry of a lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry<'a> {
    /// A kernel.
    Kernel(&'a LockedKernel),
    /// A source.
    Source(&'a LockedSource),
    /// A commit.
    Git(&'a LockedGit),
    /// A root.
    Root(&'a LockedRoot),
    /// A toolbox.
    Toolbox(&'a LockedRoot),
}

impl<'a> Entry<'a> {
    /// What kind of entry it is, in one word.
    pub fn kind(self) -> &'static str {
        match self {
            Self::Kernel(_) => "kernel",
            Self::Source(_) => "source",
            Self::Git(_) => "git",
            Self::Root(_) => "root",
            Self::Toolbox(_) => "toolbox",
        }
    }

    /// What it is locked under: a spec, a URL, or a repository and a rev.
    pub fn name(self) -> String {
        match self {
            Self::Kernel(kernel) => kernel.spec.clone(),
            Self::Source(source) => source.url.clone(),
            Self::Git(git) => format!("{} {}", git.url, git.rev),
            Self::Root(root) | Self::Toolbox(root) => root.spec.clone(),
        }
    }

    /// Its packages; none of a source.
    pub fn packages(self) -> &'a [LockedPackage] {
        match self {
            Self::Kernel(kernel) => std::slice::from_ref(&kernel.package),
            Self::Root(root) | Self::Toolbox(root) => &root.packages,
            Self::Source(_) | Self::Git(_) => &[],
        }
    }

    /// Its indexes; none of a source.
    pub fn indexes(self) -> &'a [LockedIndex] {
        match self {
            Self::Kernel(kernel) => &kernel.indexes,
            Self::Root(root) | Self::Toolbox(root) => &root.indexes,
            Self::Source(_) | Self::Git(_) => &[],
        }
    }

    /// Its files: what each is, for people, its digest and its length in bytes.
    pub fn files(self) -> Vec<(String, Digest, u64)> {
        match self {
            Self::Source(source) => vec![(source.url.clone(), source.sha256, source.size)],
            Self::Git(git) => {
                vec![(format!("commit {} of {}", git.commit, git.url), git.sha256, git.size)]
            }
            _ => self
                .packages()
                .iter()
                .map(|package| (package.to_string(), package.sha256, package.size))
                .collect(),
        }
    }

    /// The length of its files together, in bytes.
    pub fn total_bytes(self) -> u64 {
        self.files().iter().map(|(_, _, size)| size).sum()
    }
}

impl std::fmt::Display for LockedPackage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "package {} {}", self.name, self.version)
    }
}

#[cfg(test)]
mod tests;
