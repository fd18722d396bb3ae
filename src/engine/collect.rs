//! From what a step wrote to what it declared: the layer of WORK, split into outputs and writes that nobody declared.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use kiln_artifact::tree::{Builder, Node, Timestamp, Tree, TreePath};
use kiln_wire::EntryKind;

use super::error::RunError;
use crate::agent::{Limits, Listing, Session, TransferError};
use crate::plan::Outputs;
use crate::store::Blobs;

/// What is to leave a machine, and how much of it may.
#[derive(Debug)]
pub struct Collect<'a> {
    /// Where WORK is in the guest.
    pub target: &'a [u8],
    /// What the step declared.
    pub outputs: &'a Outputs,
    /// How much may leave.
    pub limits: &'a Limits,
    /// Modification time of everything, seconds since 1970.
    pub epoch: i64,
}

/// What left the machine.
#[derive(Debug)]
pub struct Collection {
    /// The declared outputs and the folders above them.
    pub outputs: Tree,
    /// Paths that were written, or removed, and that nobody declared.
    pub undeclared: Vec<TreePath>,
    /// What the step took away, where its outputs are everything: what lies at or below these paths and is no output.
    pub removed: Vec<TreePath>,
}

/// Carries the declared outputs out of the layer over WORK, their contents into `blobs`.
///
/// # Errors
/// [`RunError::MissingOutputs`] names the globs that nothing matches, [`RunError::Transfer`] what went wrong.
pub fn collect(what: &Collect<'_>, session: &mut Session, blobs: &Blobs) -> Result<Collection, RunError> {
    let Collect { target, outputs, limits, epoch } = *what;
    let mut listing = Listing::receive(session, target, limits).map_err(transfer)?;

    // Which globs declare an entry: those of its folder, and those that match it itself. Folders come first.
    let mut declared: BTreeMap<&TreePath, Vec<usize>> = BTreeMap::new();
    let mut undeclared = Vec::new();
    let mut removed = Vec::new();
    let mut wanted = BTreeSet::new();
    for (path, entry) in listing.entries().filter(|(path, _)| !path.is_root()) {
        if outputs.are_everything() {
            // All but a folder that adds to what is there hides what is beneath its path.
            if !matches!(entry.kind, EntryKind::Directory { opaque: false }) {
                removed.push(path.clone());
            }
            if entry.kind != EntryKind::Whiteout {
                wanted.insert(entry.ordinal);
            }
            continue;
        }
        if entry.kind == EntryKind::Whiteout {
            // What was removed is no output, whatever matches its name.
            undeclared.push(path.clone());
            continue;
        }
        let above = path.parent().and_then(|parent| declared.get(&parent));
        let globs = match above {
            Some(globs) if !globs.is_empty() => globs.clone(),
            _ => outputs.matching(path).collect(),
        };
        let is_folder = matches!(entry.kind, EntryKind::Directory { .. });
        if globs.is_empty() {
            // A folder is undeclared only as the way to what is in it, which is named itself.
            if !is_folder {
                undeclared.push(path.clone());
            }
        } else {
            wanted.insert(entry.ordinal);
        }
        if is_folder || !globs.is_empty() {
            declared.insert(path, globs);
        }
    }
    let matched: BTreeSet<usize> = declared.values().flatten().copied().collect();
    let globs = outputs.globs().enumerate();
    let missing: Vec<String> =
        globs.filter(|(index, _)| !matched.contains(index)).map(|(_, glob)| glob.to_owned()).collect();
    if !missing.is_empty() {
        return Err(RunError::MissingOutputs(missing));
    }
    drop(declared);
    listing.fetch(session, blobs, limits, &wanted).map_err(transfer)?;

    let folders: BTreeMap<&TreePath, u32> = listing
        .entries()
        .filter(|(_, entry)| matches!(entry.kind, EntryKind::Directory { .. }))
        .map(|(path, entry)| (path, entry.ordinal))
        .collect();
    let mut tree = Builder::new();
    let mut holders: BTreeMap<u32, TreePath> = BTreeMap::new();
    for &ordinal in &wanted {
        let (Some(path), Some(node)) = (listing.path(ordinal), output_node(&listing, ordinal, epoch)) else {
            continue;
        };
        let mut above = path.parent().filter(|parent| !parent.is_root() && tree.get(parent).is_none());
        while let Some(folder) = above {
            if let Some(node) =
                folders.get(&folder).and_then(|&ordinal| output_node(&listing, ordinal, epoch))
            {
                tree.put(folder.clone(), node);
            }
            above = folder.parent().filter(|parent| !parent.is_root() && tree.get(parent).is_none());
        }
        // A file's first name among the outputs holds it; what it was first called need not be an output.
        let inode = listing.entry(ordinal).map_or(ordinal, |entry| match entry.kind {
            EntryKind::HardLink { ordinal } => ordinal,
            _ => ordinal,
        });
        match holders.entry(inode) {
            Entry::Occupied(holder) if tree.link(path.clone(), holder.get()) => {}
            holder => {
                holder.insert_entry(path.clone());
                tree.put(path.clone(), node);
            }
        }
    }
    let outputs = tree.finish().map_err(|error| {
        transfer(TransferError::Session(crate::agent::SessionError::Violation(error.to_string())))
    })?;
    Ok(Collection { outputs, undeclared, removed })
}

fn transfer(error: TransferError) -> RunError {
    match error {
        TransferError::Session(error) => RunError::Session(error),
        other => RunError::Transfer(other),
    }
}

/// An output as its node; of a further name of a file, that file's.
fn output_node(listing: &Listing, ordinal: u32, epoch: i64) -> Option<Node> {
    let mut node = match listing.entry(ordinal)?.kind {
        EntryKind::HardLink { ordinal } => listing.node(ordinal)?,
        _ => listing.node(ordinal)?,
    };
    // When a file was made is no part of what it is.
    node.meta.mtime = Timestamp { seconds: epoch, nanoseconds: 0 };
    Some(node)
}
