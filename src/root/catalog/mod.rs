//! What is known of the roots in the store: where each came from, when it was made and used, and its tree.
//!
//! A root is noted here whenever a step gets it, under the digest that names it. The record is beside the image and
//! not needed for using it: a store without these records works, and gets them as its roots are used.

mod listing;

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use kiln_artifact::image::ImageError as ReadImageError;
use kiln_artifact::tree::{ManifestError, Tree};
use kiln_digest::Digest;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use listing::{Listing, listing};

use super::debian::DebianSpec;
use super::image::{self, Filesystem, Image, Removal};
use crate::fetch::lock::LockedRoot;
use crate::plan::{ParseRootError, RootSpec};
use crate::root::bundle::Bundle;
use crate::store::{Store, StoreError};

/// The version of a record.
const VERSION: u32 = 1;
/// Most names by which a root is remembered, the last used ones.
const MOST_ORIGINS: usize = 16;
/// Fewest digits of a digest that stand for it.
const FEWEST_DIGITS: usize = 4;

/// Why a root cannot be shown or removed.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// Text that is neither a root's name nor digits of a digest.
    #[error(
        "`{text}` names no root: write its digest, {FEWEST_DIGITS} digits of it at least, or what it was made of"
    )]
    NotAName {
        /// The text.
        text: String,
        /// Why it is no root's name.
        #[source]
        source: ParseRootError,
    },
    /// The store has no such root.
    #[error("there is no root `{0}` in the store")]
    Missing(String),
    /// Several roots begin with these digits.
    #[error("`{text}` could be {}", .candidates.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or "))]
    Ambiguous {
        /// The digits.
        text: String,
        /// The roots.
        candidates: Vec<Digest>,
    },
    /// A step runs in it.
    #[error("root {0} is in use by a kiln that runs")]
    InUse(Digest),
    /// Its image cannot be read.
    #[error("the image of root {digest} cannot be listed")]
    Image {
        /// The root.
        digest: Digest,
        /// What is wrong with it.
        #[source]
        source: ReadImageError,
    },
    /// Its manifest is none.
    #[error("the manifest of root {digest} is damaged")]
    Manifest {
        /// The root.
        digest: Digest,
        /// What is wrong with it.
        #[source]
        source: ManifestError,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The store's file system fails.
    #[error("cannot {what}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The system's word.
        #[source]
        source: io::Error,
    },
}

impl CatalogError {
    fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }

    /// Whether what was named cannot be a root, wherever it is looked for.
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::NotAName { .. })
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Missing(_) => Some(
                "`kiln root ls` shows those that are there; a root comes into the store with the first step that has it"
                    .to_owned(),
            ),
            Self::Ambiguous { .. } => Some("give more digits".to_owned()),
            Self::InUse(_) => Some("wait for the step to end".to_owned()),
            Self::Manifest { .. } => Some("`kiln root rm` takes the root away, the next step makes it anew".to_owned()),
            Self::Store(error) => error.hint(),
            _ => None,
        }
    }
}

/// What a root was made of, beyond its name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Provenance {
    /// Signed indexes that its packages were taken from.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub indexes: Vec<Index>,
    /// Its packages.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub packages: Vec<Package>,
    /// The boot bundle of the machine that configured it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub bundle: Option<Digest>,
}

/// A signed index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Index {
    /// The suite.
    pub suite: String,
    /// Its own date.
    #[schemars(with = "String")]
    pub date: Timestamp,
    /// Digest of the signed file.
    #[schemars(with = "String")]
    pub sha256: Digest,
}

/// A package.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Digest of its file.
    #[schemars(with = "String")]
    pub sha256: Digest,
}

impl Provenance {
    /// Of a root of Debian packages. `bundle` is known only to who configured it.
    pub(super) fn of_debian(locked: &LockedRoot, bundle: Option<&Bundle>) -> Self {
        let index = |index: &crate::fetch::lock::LockedIndex| Index {
            suite: index.suite.clone(),
            date: index.date,
            sha256: index.sha256,
        };
        let package = |package: &crate::fetch::lock::LockedPackage| Package {
            name: package.name.clone(),
            version: package.version.clone(),
            sha256: package.sha256,
        };
        Self {
            indexes: locked.indexes.iter().map(index).collect(),
            packages: locked.packages.iter().map(package).collect(),
            bundle: bundle.map(Bundle::digest),
        }
    }
}

/// What is recorded of a root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    version: u32,
    filesystem: Filesystem,
    made: Timestamp,
    /// The names by which steps asked for it, the last one last.
    origins: Vec<String>,
    #[serde(flatten)]
    provenance: Provenance,
}

/// A root in the store.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its digest.
    pub digest: Digest,
    /// What is on its image.
    pub filesystem: Filesystem,
    /// Length of its image.
    pub size_bytes: u64,
    /// When the image was made.
    pub made: Timestamp,
    /// When a step got it last.
    pub used: Timestamp,
    /// The names by which steps asked for it, the last one first.
    pub origins: Vec<String>,
    /// What it was made of.
    pub provenance: Provenance,
}

impl Entry {
    /// How long ago the image was made.
    pub fn age(&self) -> Duration {
        since(self.made)
    }

    /// How long ago a step got it last.
    pub fn idle(&self) -> Duration {
        since(self.used)
    }
}

fn since(then: Timestamp) -> Duration {
    // A clock that was set back makes nothing younger than now.
    crate::clock::timestamp().duration_since(then).try_into().unwrap_or_default()
}

/// Notes that a step gets `image` for `spec`. `provenance` is asked where the root is not known by that name yet.
///
/// # Errors
/// [`CatalogError::Io`].
pub(super) fn note(
    store: &Store,
    image: &Image,
    spec: &RootSpec,
    provenance: impl FnOnce() -> Provenance,
) -> Result<(), CatalogError> {
    let records = store.records("roots");
    let origin = origin(spec);
    let known: Option<Record> = records.get(&image.digest);
    if known.as_ref().is_some_and(|record| record.origins.last() == Some(&origin)) {
        return records.touch(&image.digest).map_err(CatalogError::io("note the use of a root"));
    }
    let meta = image.file().metadata().and_then(|meta| meta.modified());
    let made = meta.ok().and_then(|made| Timestamp::try_from(made).ok()).unwrap_or_default();
    let mut record = known.unwrap_or_else(|| Record {
        version: VERSION,
        filesystem: image.filesystem,
        made,
        origins: Vec::new(),
        provenance: Provenance::default(),
    });
    record.origins.retain(|other| *other != origin);
    record.origins.push(origin);
    let excess = record.origins.len().saturating_sub(MOST_ORIGINS);
    record.origins.drain(..excess);
    let provenance = provenance();
    if provenance != Provenance::default() {
        // Who finds a root made does not know which machine configured it.
        let bundle = provenance.bundle.or(record.provenance.bundle);
        record.provenance = Provenance { bundle, ..provenance };
    }
    records.put(&image.digest, &record).map_err(CatalogError::io("note a root"))
}

/// Keeps the manifest of a tree whose image was made, for showing it without reading the image.
///
/// # Errors
/// [`CatalogError`].
pub(super) fn keep_manifest(store: &Store, tree: &Tree) -> Result<(), CatalogError> {
    keep_manifest_of(store, &tree.digest(), tree)
}

fn keep_manifest_of(store: &Store, root: &Digest, tree: &Tree) -> Result<(), CatalogError> {
    let records = store.records("manifest");
    if records.get::<Digest>(root).is_some_and(|manifest| store.blobs().contains(&manifest)) {
        return Ok(());
    }
    let (manifest, _) =
        store.blobs().put(&tree.manifest()[..]).map_err(CatalogError::io("keep a root's manifest"))?;
    store.sync()?;
    records.put(root, &manifest).map_err(CatalogError::io("keep a root's manifest"))
}

/// The name of a root, the same wherever it is written: paths are absolute, packages in order.
fn origin(spec: &RootSpec) -> String {
    let place = |path: &Path| fs::canonicalize(path).or_else(|_| std::path::absolute(path)).ok();
    match spec {
        RootSpec::Debian(_) | RootSpec::Packages(_) => match spec.to_string().parse::<DebianSpec>() {
            Ok(spec) => spec.to_string(),
            Err(_) => spec.to_string(),
        },
        RootSpec::Directory(path) => {
            RootSpec::Directory(place(path).unwrap_or_else(|| path.clone())).to_string()
        }
        RootSpec::File(path) => RootSpec::File(place(path).unwrap_or_else(|| path.clone())).to_string(),
        RootSpec::Live(_) => spec.to_string(),
    }
}

/// All roots in the store, the last used first.
///
/// # Errors
/// [`CatalogError::Io`].
pub fn list(store: &Store) -> Result<Vec<Entry>, CatalogError> {
    let records = store.records("roots");
    let keys = records.keys().map_err(CatalogError::io("list the store's roots"))?;
    let mut entries: Vec<Entry> = keys.iter().filter_map(|digest| entry(store, digest)).collect();
    entries.sort_by(|one, other| other.used.cmp(&one.used).then(one.digest.cmp(&other.digest)));
    Ok(entries)
}

/// What is known of the root `digest`; none where it is no root, or has no image. Nothing is dated.
pub fn peek(store: &Store, digest: &Digest) -> Option<Entry> {
    entry(store, digest)
}

/// The root `digest`, if there is a record of it and an image.
fn entry(store: &Store, digest: &Digest) -> Option<Entry> {
    let records = store.records("roots");
    let record: Record = records.peek(digest)?;
    let meta = fs::metadata(image::image_path(store, digest, record.filesystem)).ok()?;
    let used = records.touched(digest).and_then(|used| Timestamp::try_from(used).ok());
    Some(Entry {
        digest: *digest,
        filesystem: record.filesystem,
        size_bytes: meta.len(),
        made: record.made,
        used: used.unwrap_or(record.made),
        origins: record.origins.into_iter().rev().collect(),
        provenance: record.provenance,
    })
}

/// The root that `text` names: digits with which its digest begins, or what it was made of. Of several roots that
/// were made of one source, the one that was used last.
///
/// # Errors
/// [`CatalogError`].
pub fn find(store: &Store, text: &str) -> Result<Entry, CatalogError> {
    let digits = text.strip_prefix("sha256:").unwrap_or(text).to_ascii_lowercase();
    let is_digits =
        (FEWEST_DIGITS..=64).contains(&digits.len()) && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    let entries = list(store)?;
    if is_digits {
        let mut found: Vec<Entry> =
            entries.into_iter().filter(|entry| entry.digest.to_string().starts_with(&digits)).collect();
        return match (found.pop(), found.is_empty()) {
            (None, _) => Err(CatalogError::Missing(text.to_owned())),
            (Some(entry), true) => Ok(entry),
            (Some(entry), false) => {
                found.push(entry);
                let candidates = found.iter().map(|entry| entry.digest).collect();
                Err(CatalogError::Ambiguous { text: text.to_owned(), candidates })
            }
        };
    }
    let spec: RootSpec =
        text.parse().map_err(|source| CatalogError::NotAName { text: text.to_owned(), source })?;
    let origin = origin(&spec);
    let found = entries.into_iter().find(|entry| entry.origins.contains(&origin));
    found.ok_or_else(|| CatalogError::Missing(text.to_owned()))
}

/// Takes a root out of the store: its image, and every record that names it. Contents that other roots share stay.
///
/// # Errors
/// [`CatalogError::InUse`] while any step runs in it.
pub fn remove(store: &Store, digest: &Digest, filesystem: Filesystem) -> Result<(), CatalogError> {
    let forget = || {
        // What makes others find it goes first: a record that names nothing would be worse than an image without one.
        let configured = store.records("root");
        for key in configured.keys()? {
            if configured.peek::<Digest>(&key) == Some(*digest) {
                configured.remove(&key)?;
            }
        }
        store.records("manifest").remove(digest)?;
        store.records("roots").remove(digest)
    };
    match Image::remove(store, digest, filesystem, forget).map_err(CatalogError::io("remove a root"))? {
        Removal::Done | Removal::Missing => Ok(()),
        Removal::InUse => Err(CatalogError::InUse(*digest)),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::super::{Root, import};
    use super::*;

    /// A store, and a folder with one file whose text is `text`, imported.
    fn imported(store: &Store, folder: &Path, text: &str) -> (RootSpec, Digest) {
        fs::create_dir_all(folder).expect("a folder");
        fs::write(folder.join("file"), text).expect("room");
        let spec = RootSpec::Directory(folder.to_owned());
        let root = import(store, &spec).expect("a root");
        (spec, root.digest().expect("an image"))
    }

    #[test]
    fn roots_are_found_by_digits_and_by_what_they_were_made_of() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(&folder.path().join("store")).expect("a store");
        assert_eq!(list(&store).expect("a store").len(), 0);
        let (spec, first) = imported(&store, &folder.path().join("one"), "1");
        let (other, second) = imported(&store, &folder.path().join("other"), "2");
        assert_eq!(list(&store).expect("a store").len(), 2);
        for text in [first.to_string(), first.to_string()[..8].to_owned(), format!("sha256:{first}")] {
            assert_eq!(find(&store, &text).expect("it is there").digest, first);
        }
        assert_eq!(find(&store, &spec.to_string()).expect("it is there").digest, first);
        let roundabout = RootSpec::Directory(folder.path().join("one/../other"));
        assert_eq!(find(&store, &roundabout.to_string()).expect("it is there").digest, second);
        // What a folder is now comes before what it was.
        let (_, newer) = imported(&store, &folder.path().join("one"), "3");
        let entry = find(&store, &spec.to_string()).expect("it is there");
        assert_eq!((entry.digest, entry.filesystem), (newer, Filesystem::Erofs));
        assert!(entry.size_bytes > 0 && entry.used >= entry.made);
        assert_eq!(entry.origins, [spec.to_string()]);
        assert!(matches!(find(&store, "moon"), Err(CatalogError::NotAName { .. })));
        assert!(matches!(find(&store, "dir:/nowhere"), Err(CatalogError::Missing(_))));
        assert!(matches!(find(&store, "0000000000"), Err(CatalogError::Missing(_))));
        assert!(matches!(find(&store, &other.to_string()[..3]), Err(CatalogError::NotAName { .. })));
    }

    #[test]
    fn equal_roots_are_one_with_two_names() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(&folder.path().join("store")).expect("a store");
        let (one, first) = imported(&store, &folder.path().join("one"), "same");
        let copy = folder.path().join("other");
        let mut cp = std::process::Command::new("cp");
        cp.arg("-a").arg(folder.path().join("one")).arg(&copy);
        assert!(cp.status().expect("cp").success());
        let other = RootSpec::Directory(copy);
        assert_eq!(import(&store, &other).expect("a root").digest(), Some(first));
        let entry = find(&store, &first.to_string()).expect("it is there");
        assert_eq!(entry.origins, [other.to_string(), one.to_string()]);
    }

    #[test]
    fn a_root_that_was_removed_is_gone_and_can_be_made_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(&folder.path().join("store")).expect("a store");
        let (spec, digest) = imported(&store, &folder.path().join("one"), "1");
        store.records("root").put(&Digest::of(b"key"), &digest).expect("room");
        store.records("root").put(&Digest::of(b"other"), &Digest::of(b"another")).expect("room");
        let entry = find(&store, &spec.to_string()).expect("it is there");
        let held = Image::open(&store, &digest, entry.filesystem).expect("a store").expect("it is there");
        assert!(matches!(remove(&store, &digest, entry.filesystem), Err(CatalogError::InUse(_))));
        assert!(find(&store, &spec.to_string()).is_ok());
        drop(held);
        remove(&store, &digest, entry.filesystem).expect("nobody has it");
        assert!(matches!(find(&store, &spec.to_string()), Err(CatalogError::Missing(_))));
        assert_eq!(store.records("root").keys().expect("a store"), [Digest::of(b"other")]);
        assert!(!image::path(&store, &digest).exists());
        assert!(matches!(import(&store, &spec), Ok(Root::Image(image)) if image.digest == digest));
        assert!(find(&store, &spec.to_string()).is_ok());
    }

    #[test]
    fn digits_that_two_roots_begin_with_name_both() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(&folder.path().join("store")).expect("a store");
        // As if their digests began alike.
        let record = |digits: &str| {
            let digest: Digest =
                format!("{digits}{}", "0".repeat(64 - digits.len())).parse().expect("digits");
            let record = Record {
                version: VERSION,
                filesystem: Filesystem::Squashfs,
                made: Timestamp::default(),
                origins: vec![],
                provenance: Provenance::default(),
            };
            store.records("roots").put(&digest, &record).expect("room");
            let path: PathBuf = image::image_path(&store, &digest, Filesystem::Squashfs);
            fs::write(path, "image").expect("room");
            digest
        };
        let (one, other) = (record("abcd1"), record("abcd2"));
        assert_eq!(find(&store, "abcd1").expect("one").digest, one);
        let error = find(&store, "abcd").expect_err("two").to_string();
        assert!(error.contains(&one.to_string()) && error.contains(&other.to_string()), "{error}");
    }
}
