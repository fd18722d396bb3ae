//! Sources: files from outside that a recipe names, as the lock has them and as the store holds them.

use std::collections::BTreeMap;

use kiln_artifact::tree::{Kind, Meta, Node, Tree, TreePath};
use kiln_digest::Digest;

use crate::fetch::http::{Client, Expected, FetchError};
use crate::fetch::lock::{Lock, LockError, LockedSource};
use crate::plan::graph::Source;
use crate::settings::Settings;
use crate::store::Store;

/// Most bytes of a source whose size is not known yet.
const MOST_BYTES: u64 = 16 << 30;

/// Why a source cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The lock.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The fetch.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The lock says another digest than the recipe.
    #[error("source `{name}` has digest {recipe} in the recipe and {lock} in the lock ({url})")]
    Contradiction {
        /// The source.
        name: String,
        /// Its URL.
        url: String,
        /// The recipe's word.
        recipe: Digest,
        /// The lock's.
        lock: Digest,
    },
    /// It would have to be locked.
    #[error("source `{name}` is not in the lock, and --locked refuses anything else ({url})")]
    NotLocked {
        /// The source.
        name: String,
        /// Its URL.
        url: String,
    },
    /// It would have to be fetched.
    #[error("source `{name}` is not in the store, and --offline fetches nothing ({url})")]
    Offline {
        /// The source.
        name: String,
        /// Its URL.
        url: String,
    },
}

impl SourceError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Lock(error) => error.hint(),
            Self::Fetch(error) => error.hint(),
            Self::Contradiction { name, .. } => {
                Some(format!("correct the recipe, or take `{name}` out of the lock to have it locked anew"))
            }
            Self::NotLocked { .. } => Some("build once without --locked, and keep kiln.lock".to_owned()),
            Self::Offline { .. } => Some("build once without --offline".to_owned()),
        }
    }
}

/// Sources by name, as they are locked.
#[derive(Debug, Clone, Default)]
pub struct Locked(BTreeMap<String, LockedSource>);

impl Locked {
    /// The source `name`.
    pub fn get(&self, name: &str) -> Option<&LockedSource> {
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

/// What may be done to have sources.
#[derive(Debug, Clone, Copy, Default)]
pub struct Permission {
    /// Nothing may be locked that is not.
    pub locked: bool,
    /// Nothing may be fetched.
    pub offline: bool,
}

/// Has all `sources` locked; those that are not are fetched for it.
///
/// # Errors
/// [`SourceError`].
pub fn lock<'a>(
    sources: impl Iterator<Item = &'a Source>,
    settings: &Settings,
    store: &Store,
    permission: Permission,
    progress: &mut dyn FnMut(&str),
) -> Result<Locked, SourceError> {
    let path = &settings.lock.value;
    let mut lock = Lock::load(path)?;
    let mut all = Locked::default();
    for source in sources {
        if all.0.contains_key(&source.name) {
            continue;
        }
        let (name, url) = (source.name.clone(), source.url.clone());
        let known = lock.source(&url).cloned();
        let locked = match (known, source.sha256) {
            (Some(known), Some(recipe)) if known.sha256 != recipe => {
                return Err(SourceError::Contradiction { name, url, recipe, lock: known.sha256 });
            }
            (Some(known), _) => known,
            (None, _) if permission.locked => return Err(SourceError::NotLocked { name, url }),
            (None, wanted) => {
                let here = wanted.and_then(|digest| Some((digest, store.blobs().file(&digest).ok()?)));
                let (size, sha256) =
                    match here.and_then(|(digest, file)| Some((file.metadata().ok()?.len(), digest))) {
                        Some(here) => here,
                        None if permission.offline => return Err(SourceError::Offline { name, url }),
                        None => {
                            progress(&format!("fetching source {name}"));
                            let urls = [url.clone()];
                            let (sha256, size) =
                                Client::new().fetch_new(&name, &urls, MOST_BYTES, wanted, store.blobs())?;
                            (size, sha256)
                        }
                    };
                let locked = LockedSource { url, size, sha256 };
                lock.set_source(locked.clone());
                lock.save(path)?;
                progress(&format!("locked source {name} in {}", path.display()));
                locked
            }
        };
        all.0.insert(name, locked);
    }
    Ok(all)
}

/// Puts the sources `names` into the store, where they are not there.
///
/// # Errors
/// [`SourceError`].
pub fn fetch<'a>(
    names: impl Iterator<Item = &'a str>,
    all: &Locked,
    store: &Store,
    permission: Permission,
) -> Result<(), SourceError> {
    for name in names {
        let Some(locked) = all.get(name) else { continue };
        if store.blobs().contains(&locked.sha256) {
            continue;
        }
        if permission.offline {
            return Err(SourceError::Offline { name: name.to_owned(), url: locked.url.clone() });
        }
        let expected = Expected { size: locked.size, sha256: locked.sha256 };
        Client::new().fetch(name, std::slice::from_ref(&locked.url), expected, store.blobs(), &|_| {})?;
    }
    Ok(())
}
