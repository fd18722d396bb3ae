//! Whether a store is what was written: every blob by its name, everything else by its digests; and repair.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use kiln_artifact::tree::Tree;
use kiln_digest::Digest;

use super::UpkeepError;
use super::census::{Census, What, blob_digest, folders, image_name};
use super::collect::remove_template;
use crate::cache::stock::{Content, Kept, Stored, files, reread, rewrite, stock};
use crate::machine::template;
use crate::root::catalog;
use crate::root::image::{self, Filesystem};
use crate::store::{Store, unseal};
use crate::writes;

/// Something that is not what was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Its path in the store.
    pub name: String,
    /// What is wrong with it.
    pub what: String,
    place: Place,
}

impl Damage {
    /// The blob that is damaged; none where it is something else.
    pub fn blob(&self) -> Option<Digest> {
        match &self.place {
            Place::File(path) if self.name.starts_with("blobs/") => blob_digest(path),
            _ => None,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    File(PathBuf),
    Pack(PathBuf),
    Template(PathBuf),
    Image(Digest, Filesystem),
}

/// What was looked at and what was found.
#[derive(Debug, Default)]
pub struct Verified {
    /// How many files and templates.
    pub checked: usize,
    /// What is wrong.
    pub damage: Vec<Damage>,
}

struct Verifier<'a> {
    store: &'a Store,
    found: Verified,
}

/// Looks at everything in the store.
///
/// # Errors
/// What listing the store's folders says.
pub fn verify(store: &Store) -> Result<Verified, UpkeepError> {
    let mut verifier = Verifier { store, found: Verified::default() };
    let bad = verifier.blobs()?;
    verifier.images()?;
    verifier.templates()?;
    verifier.records()?;
    verifier.stock(&bad)?;
    verifier.found.damage.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(verifier.found)
}

impl Verifier<'_> {
    fn list(&self, name: &str) -> Result<Vec<PathBuf>, UpkeepError> {
        let folder = self.store.path().join(name);
        files(&folder).map_err(UpkeepError::at("list", &folder))
    }

    /// Notes what is wrong with `path`, unless a collection has taken it meanwhile.
    fn bad(&mut self, path: &Path, what: impl Into<String>, place: Place) {
        if fs::symlink_metadata(path).is_err() {
            return;
        }
        let name = path.strip_prefix(self.store.path()).unwrap_or(path).to_string_lossy().into_owned();
        self.found.damage.push(Damage { name, what: what.into(), place });
    }

    fn blobs(&mut self) -> Result<BTreeSet<Digest>, UpkeepError> {
        let mut bad = BTreeSet::new();
        for path in self.list("blobs")? {
            self.found.checked += 1;
            let place = Place::File(path.clone());
            match (blob_digest(&path), fs::File::open(&path).and_then(Digest::of_reader)) {
                (Some(name), Ok((found, _))) if name == found => {}
                // A collection has taken it.
                (Some(_), Err(error)) if error.kind() == io::ErrorKind::NotFound => {}
                (Some(name), found) => {
                    bad.insert(name);
                    let what = found.map_or_else(
                        |error| format!("cannot be read: {error}"),
                        |(found, _)| format!("holds what has the digest {found}"),
                    );
                    self.bad(&path, what, place);
                }
                (None, _) => self.bad(&path, "has no name that a blob has", place),
            }
        }
        Ok(bad)
    }

    fn images(&mut self) -> Result<(), UpkeepError> {
        for path in self.list("images")? {
            self.found.checked += 1;
            let Some((digest, filesystem)) = image_name(&path) else {
                self.bad(&path, "has no name that an image has", Place::File(path.clone()));
                continue;
            };
            let judge =
                || match (image::sum(self.store, &digest), fs::File::open(&path).and_then(Digest::of_reader))
                {
                    (Some(sum), Ok((found, _))) if sum == found => None,
                    (Some(_), Ok(_)) => Some("is not what was written".to_owned()),
                    (None, Ok(_)) => Some("has no digest of its bytes on record".to_owned()),
                    (_, Err(error)) => Some(format!("cannot be read: {error}")),
                };
            // It may have been taken, and made anew, between the two.
            if let Some(what) = judge().and_then(|_| judge()) {
                self.bad(&path, what, Place::Image(digest, filesystem));
            }
        }
        Ok(())
    }

    fn templates(&mut self) -> Result<(), UpkeepError> {
        for path in folders(&self.store.templates())? {
            self.found.checked += 1;
            if let Err(error) = template::verify(&path) {
                self.bad(&path, error.to_string(), Place::Template(path.clone()));
            }
        }
        Ok(())
    }

    fn records(&mut self) -> Result<(), UpkeepError> {
        for path in self.list("records")? {
            self.found.checked += 1;
            let name = path.strip_prefix(self.store.path()).unwrap_or(&path).with_extension("");
            let bytes = match fs::read(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                bytes => bytes.unwrap_or_default(),
            };
            if unseal(&name.to_string_lossy(), &bytes).is_none() {
                self.bad(&path, "is not what was written", Place::File(path.clone()));
            }
        }
        Ok(())
    }

    /// Traces and notes, and whether what they name is there. `damaged` are the blobs that are not what they should be.
    fn stock(&mut self, damaged: &BTreeSet<Digest>) -> Result<(), UpkeepError> {
        let store = self.store;
        let is_whole = |digest: &Digest| !damaged.contains(digest) && store.blobs().path(digest).is_file();
        for stored in stock(store).map_err(UpkeepError::at("list the traces of", store.path()))? {
            self.found.checked += 1;
            let Some(what) = wrong(store, &stored, &is_whole) else { continue };
            // A collection may have taken it, and a build have written it anew, since it was read: what is there now counts.
            let now = reread(store, &stored).map_err(UpkeepError::at("lock", &stored.path))?;
            if now.is_some_and(|now| wrong(store, &now, &is_whole).is_some()) {
                self.bad(&stored.path, what, Place::Pack(stored.path.clone()));
            }
        }
        Ok(())
    }
}

/// What is wrong with a pack; none where nothing is.
fn wrong(store: &Store, stored: &Stored, is_whole: &dyn Fn(&Digest) -> bool) -> Option<String> {
    if !stored.is_whole {
        return Some("is not what was written".to_owned());
    }
    let lost = stored.lines.iter().find_map(|line| lost_of(store, line, is_whole));
    lost.map(|lost| format!("names {lost}, which is damaged or gone"))
}

/// What the store has lost of what a line names.
fn lost_of(store: &Store, line: &Kept, is_whole: &dyn Fn(&Digest) -> bool) -> Option<Digest> {
    match &line.content {
        Content::Trace(trace) => {
            trace.log.filter(|log| !is_whole(log)).or_else(|| lost(store, &trace.outputs, is_whole))
        }
        Content::Note(run) => run.log.filter(|log| !is_whole(log)),
        Content::Placed(_) => None,
    }
}

/// What the store has lost of the outputs `manifest`.
fn lost(store: &Store, manifest: &Digest, is_whole: &dyn Fn(&Digest) -> bool) -> Option<Digest> {
    if !is_whole(manifest) {
        return Some(*manifest);
    }
    let tree = Tree::parse_manifest(&fs::read(store.blobs().path(manifest)).ok()?).ok()?;
    tree.iter().find_map(|(_, node)| match &node.kind {
        kiln_artifact::tree::Kind::File { digest, .. } => Some(*digest).filter(|digest| !is_whole(digest)),
        _ => None,
    })
}

/// Removes what is damaged and what names it: the next build that needs it makes or fetches it anew. Gives what is left
/// because a running kiln holds it.
///
/// # Errors
/// [`UpkeepError`].
pub fn repair(store: &Store, damage: &[Damage]) -> Result<Vec<Damage>, UpkeepError> {
    let _sweep = store.sweep(true).map_err(UpkeepError::at("lock", store.path()))?;
    let census = Census::take(store)?;
    let mut held = Vec::new();
    let mut lost = BTreeSet::new();
    let blobs = store.blobs();
    for one in damage {
        let failed = |source| UpkeepError::at("remove", &store.path().join(&one.name))(source);
        match &one.place {
            Place::File(path) => {
                let blob = one.blob();
                let found = fs::File::open(path).and_then(Digest::of_reader);
                // A build may have made it anew meanwhile.
                if blob.is_some_and(|blob| found.is_ok_and(|(found, _)| found == blob)) {
                    continue;
                }
                lost.extend(blob);
                writes::remove(path).map_err(failed)?;
            }
            // What is whole stays. Blobs come before it, so those that were damaged are gone.
            Place::Pack(path) => {
                let is_there = |digest: &Digest| blobs.path(digest).is_file();
                let keeps = |line: &Kept| lost_of(store, line, &is_there).is_none();
                rewrite(store, path, keeps).map_err(failed)?;
            }
            Place::Template(path) => remove_template(store, path).map_err(failed)?,
            Place::Image(digest, filesystem) => match catalog::remove(store, digest, *filesystem) {
                Ok(()) => {}
                Err(catalog::CatalogError::InUse(_)) => held.push(one.clone()),
                Err(error) => return Err(failed(io::Error::other(error))),
            },
        }
    }
    // Traces that name it were found too; records that would lead to it are not damaged themselves.
    for unit in census.units.iter().filter(|unit| unit.what == What::Record) {
        if unit.names.keys().any(|digest| lost.contains(digest)) {
            writes::remove(&unit.path).map_err(UpkeepError::at("remove", &unit.path))?;
        }
    }
    Ok(held)
}
