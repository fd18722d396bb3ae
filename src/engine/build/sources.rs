//! Sources: files and commits from outside that a recipe names, as the lock has them and as the store holds them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use kiln_artifact::tree::{Kind, Meta, Node, Tree, TreePath};
use kiln_digest::Digest;

use crate::fetch::git::{Git, GitError, Repository};
use crate::fetch::http::{Client, Expected, FetchError};
use crate::fetch::lock::{Lock, LockError, LockedGit, LockedSource};
use crate::plan::graph::{Source, SourceOrigin};
use crate::settings::{Settings, host_variable};
use crate::sign::Leaks;
use crate::store::Store;

/// Most bytes of a source whose size is not known yet.
const MOST_BYTES: u64 = 16 << 30;
/// Variables of the host's by which git, too, finds proxies and certificates.
const GIT_VARIABLES: [&str; 9] = [
    "http_proxy",
    "https_proxy",
    "HTTPS_PROXY",
    "all_proxy",
    "ALL_PROXY",
    "no_proxy",
    "NO_PROXY",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
];

/// Why a source cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The lock.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The fetch.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// git.
    #[error("source `{name}` cannot be had")]
    Git {
        /// The source.
        name: String,
        /// Why.
        #[source]
        source: GitError,
    },
    /// A place for git cannot be made.
    #[error("there is no place to fetch source `{name}` to")]
    Place {
        /// The source.
        name: String,
        /// The system's word.
        #[source]
        source: std::io::Error,
    },
    /// The lock says another digest than the recipe.
    #[error("source `{name}` has digest {recipe} in the recipe and {lock} in the lock ({from})")]
    Contradiction {
        /// The source.
        name: String,
        /// Where it comes from.
        from: String,
        /// The recipe's word.
        recipe: Digest,
        /// The lock's.
        lock: Digest,
    },
    /// The lock says another commit than the recipe.
    #[error("source `{name}` is commit {recipe} in the recipe and {lock} in the lock")]
    OtherCommit {
        /// The source.
        name: String,
        /// The recipe's word.
        recipe: String,
        /// The lock's.
        lock: String,
    },
    /// A commit's archive is another than the lock says, or the recipe.
    #[error("source `{name}`, commit {commit}, gives digest {found}, not {expected}")]
    Archive {
        /// The source.
        name: String,
        /// The commit.
        commit: String,
        /// What it should be.
        expected: Digest,
        /// What it is.
        found: Digest,
    },
    /// A copy of a signing key, which the step would see.
    #[error("source `{name}` has the key `{key}` of SECRETS in it")]
    Private {
        /// The source.
        name: String,
        /// The key.
        key: String,
        /// Whether the store has no copy any more.
        is_gone: bool,
    },
    /// What was fetched cannot be read again.
    #[error("source `{name}` cannot be read in the store")]
    Read {
        /// The source.
        name: String,
        /// The system's word.
        #[source]
        source: std::io::Error,
    },
    /// It would have to be locked.
    #[error("source `{name}` is not in the lock file `{path}`, and {flag} refuses anything else ({from})")]
    NotLocked {
        /// The source.
        name: String,
        /// Where it comes from.
        from: String,
        /// The lock file.
        path: PathBuf,
        /// What refuses it.
        flag: &'static str,
    },
}

impl SourceError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Lock(error) => error.hint(),
            Self::Fetch(error) => error.hint(),
            Self::Git { source, .. } => source.hint(),
            Self::Contradiction { name, .. } | Self::OtherCommit { name, .. } => {
                Some(format!("correct the recipe, or take its word: `kiln lock update {name}`"))
            }
            Self::NotLocked { name, .. } => Some(format!(
                "lock it where there is a network: `kiln lock update {name}`; and keep kiln.lock"
            )),
            Self::Archive { name, .. } => Some(format!(
                "the lock or the recipe is of another kiln, or was changed: `kiln lock update {name}`"
            )),
            Self::Private { is_gone, .. } => {
                let store = if *is_gone { "; kiln's store keeps no copy" } else { "" };
                Some(format!(
                    "take it out there; whoever can fetch that has the key, so make other keys{store}"
                ))
            }
            Self::Place { .. } | Self::Read { .. } => None,
        }
    }

    /// Whether recipe and lock do not go together, rather than something failing.
    pub fn is_the_users(&self) -> bool {
        matches!(self, Self::Contradiction { .. } | Self::OtherCommit { .. } | Self::NotLocked { .. })
    }
}

/// A source as it is locked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LockedAs {
    /// Its length in bytes.
    pub size: u64,
    /// Its digest.
    pub sha256: Digest,
    origin: Origin,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Origin {
    Urls(Vec<String>),
    Git { url: String, commit: String },
}

/// Sources by name, as they are locked.
#[derive(Debug, Clone, Default)]
pub struct Locked(BTreeMap<String, LockedAs>);

impl Locked {
    /// The source `name`.
    pub fn get(&self, name: &str) -> Option<&LockedAs> {
        self.0.get(name)
    }

    /// The sources `names` as a step is shown them: files in a folder.
    pub fn tree<'a>(&self, names: impl Iterator<Item = &'a str>) -> Tree {
        let mut tree = Tree::new();
        for name in names {
            let (Some(locked), Ok(path)) = (self.0.get(name), TreePath::new(name.as_bytes())) else {
                continue;
            };
            let kind = Kind::File { digest: locked.sha256, size: locked.size };
            tree.insert(path, Node { kind, meta: Meta { mode: 0o444, ..Meta::default() } });
        }
        tree
    }
}

/// What may be done to have sources, and by whom.
#[derive(Debug, Clone, Default)]
pub struct Permission {
    /// The flag that refuses what is not locked, where one does.
    pub locked: Option<&'static str>,
    /// What fetches.
    pub client: Client,
}

/// What a lock has of a source.
#[derive(Debug, Clone)]
pub enum NewEntry {
    /// A file.
    Source(LockedSource),
    /// A commit.
    Git(LockedGit),
}

impl NewEntry {
    /// Puts it into `lock`.
    pub fn set(self, lock: &mut Lock) {
        match self {
            Self::Source(source) => lock.set_source(source),
            Self::Git(git) => lock.set_git(git),
        }
    }
}

/// Where a source comes from, for people.
fn place(origin: &SourceOrigin) -> String {
    match origin {
        SourceOrigin::Url { url, .. } => url.clone(),
        SourceOrigin::Git { url, rev } => format!("{rev} of {url}"),
    }
}

/// What `lock` has of `source`, which must not contradict the recipe.
fn known(lock: &Lock, source: &Source) -> Result<Option<LockedAs>, SourceError> {
    let found = match &source.origin {
        SourceOrigin::Url { url, mirrors } => lock.source(url).map(|locked| LockedAs {
            size: locked.size,
            sha256: locked.sha256,
            origin: Origin::Urls(std::iter::once(url).chain(mirrors).cloned().collect()),
        }),
        SourceOrigin::Git { url, rev } => {
            let locked = lock.git(url, rev);
            if let Some(locked) = locked.filter(|locked| crate::plan::is_commit(rev) && locked.commit != *rev)
            {
                let (name, recipe, lock) = (source.name.clone(), rev.clone(), locked.commit.clone());
                return Err(SourceError::OtherCommit { name, recipe, lock });
            }
            locked.map(|locked| LockedAs {
                size: locked.size,
                sha256: locked.sha256,
                origin: Origin::Git { url: url.clone(), commit: locked.commit.clone() },
            })
        }
    };
    match (&found, source.sha256) {
        (Some(found), Some(recipe)) if found.sha256 != recipe => Err(SourceError::Contradiction {
            name: source.name.clone(),
            from: place(&source.origin),
            recipe,
            lock: found.sha256,
        }),
        _ => Ok(found),
    }
}

/// What fetches sources: a client, and git where one is a commit.
struct Fetching<'a> {
    settings: &'a Settings,
    store: &'a Store,
    client: &'a Client,
}

impl Fetching<'_> {
    /// Git, the repository that the recipe calls `url`, and a place to work in.
    fn git(&self, name: &str, url: &str) -> Result<(Git, Repository, tempfile::TempDir), SourceError> {
        let failed = |source| SourceError::Git { name: name.to_owned(), source };
        let variable =
            |name: &&str| Some(((*name).to_owned(), String::from_utf8(host_variable(name)?).ok()?));
        let variables = GIT_VARIABLES.iter().filter_map(variable).collect();
        let mut git = Git::find(&self.settings.search_path, variables).map_err(failed)?;
        if let Some(path) = &self.settings.ca_file.value {
            git = git.trusting(path);
        }
        let folder = self.settings.recipe.as_ref().and_then(|recipe| recipe.path.parent());
        let folder = folder.unwrap_or(&self.settings.directory);
        let local = url.strip_prefix("file:").map(|path| folder.join(path));
        let local = local.map(|path| std::fs::canonicalize(&path).unwrap_or(path));
        let place = tempfile::tempdir_in(self.store.temporary())
            .map_err(|source| SourceError::Place { name: name.to_owned(), source })?;
        Ok((git, Repository { url: url.to_owned(), local }, place))
    }

    fn commit(&self, name: &str, url: &str, commit: &str) -> Result<(Digest, u64), SourceError> {
        let (git, repository, place) = self.git(name, url)?;
        let archive = git.archive(&repository, commit, place.path(), self.store.blobs());
        archive.map_err(|source| SourceError::Git { name: name.to_owned(), source })
    }

    /// What is to be locked for `source`, fetched for it.
    fn look_up(&self, source: &Source) -> Result<NewEntry, SourceError> {
        let what = format!("source {}", source.name);
        match &source.origin {
            SourceOrigin::Url { url, mirrors } => {
                let here = source.sha256.and_then(|digest| {
                    Some((digest, self.store.blobs().file(&digest).ok()?.metadata().ok()?.len()))
                });
                let (sha256, size) = match here {
                    Some(here) => here,
                    None => {
                        let urls: Vec<String> = std::iter::once(url).chain(mirrors).cloned().collect();
                        self.client.fetch_new(&what, &urls, MOST_BYTES, source.sha256, self.store.blobs())?
                    }
                };
                Ok(NewEntry::Source(LockedSource { url: url.clone(), size, sha256 }))
            }
            SourceOrigin::Git { url, rev } => {
                if self.client.is_offline() {
                    self.client.fetch_new(&what, &[], 0, source.sha256, self.store.blobs())?;
                }
                let (git, repository, place) = self.git(&source.name, url)?;
                let commit = git.resolve(&repository, rev, place.path());
                let commit =
                    commit.map_err(|error| SourceError::Git { name: source.name.clone(), source: error })?;
                let (sha256, size) = self.commit(&source.name, url, &commit)?;
                hold(&source.name, &commit, source.sha256, sha256)?;
                Ok(NewEntry::Git(LockedGit { url: url.clone(), rev: rev.clone(), commit, size, sha256 }))
            }
        }
    }
}

/// Holds the archive of `commit` against the digest that is expected of it.
fn hold(name: &str, commit: &str, expected: Option<Digest>, found: Digest) -> Result<(), SourceError> {
    match expected {
        Some(expected) if expected != found => {
            Err(SourceError::Archive { name: name.to_owned(), commit: commit.to_owned(), expected, found })
        }
        _ => Ok(()),
    }
}

/// What is to be locked for `source`, whatever was locked for it: fetched anew where the recipe has no digest.
///
/// # Errors
/// [`SourceError`].
pub fn look_up(
    source: &Source,
    settings: &Settings,
    store: &Store,
    client: &Client,
) -> Result<NewEntry, SourceError> {
    Fetching { settings, store, client }.look_up(source)
}

/// Has all `sources` locked; those that are not are fetched for it.
///
/// # Errors
/// [`SourceError`].
pub fn lock<'a>(
    sources: impl Iterator<Item = &'a Source>,
    settings: &Settings,
    store: &Store,
    permission: &Permission,
    progress: &mut dyn FnMut(&str),
) -> Result<Locked, SourceError> {
    let path = &settings.lock.value;
    let lock = Lock::load(path)?;
    let mut all = Locked::default();
    for source in sources {
        if all.0.contains_key(&source.name) {
            continue;
        }
        let name = source.name.clone();
        let locked = match (known(&lock, source)?, permission.locked) {
            (Some(known), _) => known,
            (None, Some(flag)) => {
                let from = place(&source.origin);
                return Err(SourceError::NotLocked { name, from, path: path.clone(), flag });
            }
            (None, None) => {
                progress(&format!("fetching source {name}"));
                let entry = look_up(source, settings, store, &permission.client)?;
                let locked = Lock::change(path, |lock| {
                    // Another kiln may have locked it meanwhile: that is what counts.
                    if known(lock, source)?.is_none() {
                        entry.set(lock);
                    }
                    known(lock, source)
                })??;
                progress(&format!("locked source {name} in {}", path.display()));
                locked.ok_or_else(|| SourceError::NotLocked {
                    name: name.clone(),
                    from: place(&source.origin),
                    path: path.clone(),
                    flag: "kiln",
                })?
            }
        };
        all.0.insert(name, locked);
    }
    Ok(all)
}

/// Puts the sources `names` into the store, where they are not there, for a step to see, which sees no signing key in them:
/// what `leaks` finds one in is not in the store afterwards.
///
/// # Errors
/// [`SourceError`].
pub fn fetch<'a>(
    names: impl Iterator<Item = &'a str>,
    all: &Locked,
    settings: &Settings,
    store: &Store,
    client: &Client,
    leaks: impl Fn() -> &'a Leaks,
) -> Result<(), SourceError> {
    for name in names {
        if let Some(locked) = all.get(name) {
            fetch_one(name, locked, settings, store, client)?;
            let found = leaks().find(&locked.sha256, || store.blobs().file(&locked.sha256));
            let found = found.map_err(|source| SourceError::Read { name: name.to_owned(), source })?;
            if let Some(key) = found {
                let is_gone = store.blobs().discard(&locked.sha256).is_ok();
                return Err(SourceError::Private { name: name.to_owned(), key: key.to_owned(), is_gone });
            }
        }
    }
    Ok(())
}

fn fetch_one(
    name: &str,
    locked: &LockedAs,
    settings: &Settings,
    store: &Store,
    client: &Client,
) -> Result<(), SourceError> {
    let expected = Expected { size: locked.size, sha256: locked.sha256 };
    let urls: &[String] = match &locked.origin {
        Origin::Urls(urls) => urls,
        Origin::Git { .. } => &[],
    };
    let fetched = client.fetch(&format!("source {name}"), urls, expected, store.blobs(), &|_| {});
    match (fetched, &locked.origin) {
        (Err(FetchError::NoSource { .. }), Origin::Git { url, commit }) => {
            let (found, _) = Fetching { settings, store, client }.commit(name, url, commit)?;
            hold(name, commit, Some(locked.sha256), found)
        }
        (fetched, _) => Ok(fetched?),
    }
}

/// Puts the sources that `lock` names into the store, where they are not there. `recipe` has their mirrors.
///
/// # Errors
/// [`SourceError`].
pub fn fetch_locked(
    lock: &Lock,
    recipe: &[Source],
    settings: &Settings,
    store: &Store,
    client: &Client,
) -> Result<(), SourceError> {
    let one = |name: &str, locked: &LockedAs| fetch_one(name, locked, settings, store, client);
    for locked in lock.sources() {
        let mirrors = recipe.iter().find_map(|source| match &source.origin {
            SourceOrigin::Url { url, mirrors } if *url == locked.url => Some(mirrors.as_slice()),
            _ => None,
        });
        let urls = std::iter::once(&locked.url).chain(mirrors.unwrap_or_default()).cloned().collect();
        let LockedSource { url, size, sha256 } = locked;
        one(url, &LockedAs { size: *size, sha256: *sha256, origin: Origin::Urls(urls) })?;
    }
    for LockedGit { url, rev, commit, size, sha256 } in lock.gits() {
        let origin = Origin::Git { url: url.clone(), commit: commit.clone() };
        one(&format!("{rev} of {url}"), &LockedAs { size: *size, sha256: *sha256, origin })?;
    }
    Ok(())
}
