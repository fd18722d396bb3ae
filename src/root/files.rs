//! Roots as files: of packages that no script configures, and the trees and contents of roots that are there.

use kiln_artifact::erofs;
use kiln_artifact::image::Limits;
use kiln_artifact::tree::{Kind, Tree};
use kiln_digest::Digest;

use super::catalog::{self, CatalogError, Provenance};
use super::debian::{Archive, total_bytes};
use super::image::{Filesystem, Image};
use super::{Root, RootError};
use crate::fetch::lock::LockedRoot;
use crate::plan::{RootSpec, show_bytes};
use crate::store::Store;

/// Changes with what is made of the same packages.
const FORMAT: u32 = 1;

/// The root of the files of `locked`'s packages: remembered, or made now.
///
/// # Errors
/// [`RootError`].
pub fn of_files(
    store: &Store,
    archive: &Archive,
    locked: &LockedRoot,
    progress: &mut dyn FnMut(&str),
) -> Result<Root, RootError> {
    let mut text = format!("debian files {FORMAT} {}\n", locked.source_date_epoch());
    locked.packages.iter().for_each(|package| text.push_str(&format!("{}\n", package.sha256)));
    let key = Digest::of(text.as_bytes());
    let io = |what| move |source| RootError::Io { what, source };
    let spec: RootSpec = locked.spec.parse().unwrap_or_else(|_| RootSpec::Packages(locked.spec.clone()));
    let note = |image: &Image| catalog::note(store, image, &spec, || Provenance::of_debian(locked, None));
    if let Some(tree) = store.records("root").get::<Digest>(&key)
        && let Some(image) =
            Image::open(store, &tree, Filesystem::Erofs).map_err(io("open a root's image"))?
    {
        note(&image)?;
        return Ok(Root::Image(image));
    }
    let total = show_bytes(total_bytes(&locked.packages));
    progress(&format!("fetching {} packages ({total})", locked.packages.len()));
    archive.fetch(locked, &|_| {})?;
    progress(&format!("unpacking {} packages", locked.packages.len()));
    let tree = archive.unpack_files(locked)?;
    let root = Root::image(store, &tree)?;
    if let Root::Image(image) = &root {
        store.records("root").put(&key, &image.digest).map_err(io("remember a root"))?;
        note(image)?;
    }
    Ok(root)
}

/// The tree of a root, all of whose contents the store has as blobs then: they are read out of its image where they were
/// collected.
///
/// # Errors
/// [`RootError`]; a live root has no tree, and an image that others compressed no contents.
pub fn tree(store: &Store, root: &Root) -> Result<Tree, RootError> {
    let Root::Image(image) = root else { return Err(RootError::NoTree) };
    let entry = catalog::peek(store, &image.digest);
    let entry = entry.ok_or_else(|| CatalogError::Missing(image.digest.to_string()))?;
    let tree = catalog::listing(store, &entry)?.tree;
    let contents = tree.iter().filter_map(|(_, node)| match &node.kind {
        Kind::File { digest, .. } => Some(digest),
        _ => None,
    });
    if store.blobs().contains_all(contents) {
        return Ok(tree);
    }
    if image.filesystem != Filesystem::Erofs {
        return Err(RootError::NoTree);
    }
    let read = erofs::extract(image.file(), &Limits::default(), &mut store.blobs());
    let read = read.map_err(|source| CatalogError::Image { digest: image.digest, source })?;
    match read.unread.is_empty() {
        true => Ok(tree),
        false => Err(RootError::NoTree),
    }
}
