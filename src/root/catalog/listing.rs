//! The tree of a root in the store: from its manifest where that was kept, else by reading its image.

use std::collections::BTreeSet;

use kiln_artifact::image::{Image as ReadImage, Limits};
use kiln_artifact::tree::{Tree, TreePath};
use kiln_artifact::{erofs, squashfs};
use kiln_digest::Digest;

use super::{CatalogError, Entry, keep_manifest_of};
use crate::root::image::{Filesystem, Image};
use crate::store::Store;

/// What a root holds.
#[derive(Debug)]
pub struct Listing {
    /// Its tree.
    pub tree: Tree,
    /// Files whose content is compressed in a way that kiln does not read: their digests in `tree` mean nothing.
    pub unread: BTreeSet<TreePath>,
}

/// Lists the root `entry`.
///
/// # Errors
/// [`CatalogError`]; an image that another tool made may hold what kiln cannot read, or be damaged.
pub fn listing(store: &Store, entry: &Entry) -> Result<Listing, CatalogError> {
    if let Some(tree) = from_manifest(store, &entry.digest)? {
        return Ok(Listing { tree, unread: BTreeSet::new() });
    }
    let image = Image::open(store, &entry.digest, entry.filesystem);
    let image = image.map_err(CatalogError::io("open a root's image"))?;
    let image = image.ok_or_else(|| CatalogError::Missing(entry.digest.to_string()))?;
    let limits = Limits::default();
    let read = match entry.filesystem {
        Filesystem::Erofs => erofs::read(image.file(), &limits),
        Filesystem::Squashfs => squashfs::read(image.file(), &limits),
    };
    let ReadImage { tree, unread } =
        read.map_err(|source| CatalogError::Image { digest: entry.digest, source })?;
    if unread.is_empty() {
        keep_manifest_of(store, &entry.digest, &tree)?;
    }
    Ok(Listing { tree, unread })
}

fn from_manifest(store: &Store, root: &Digest) -> Result<Option<Tree>, CatalogError> {
    let Some(manifest) = store.records("manifest").get::<Digest>(root) else { return Ok(None) };
    // A manifest that is gone is found again in the image.
    let Ok(bytes) = std::fs::read(store.blobs().path(&manifest)) else { return Ok(None) };
    let tree = Tree::parse_manifest(&bytes);
    tree.map(Some).map_err(|source| CatalogError::Manifest { digest: *root, source })
}
