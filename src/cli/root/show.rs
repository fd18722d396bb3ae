//! `kiln root show`: where a root came from, and every file in it.

use std::fmt::Write as _;
use std::io;
use std::process::ExitCode;

use kiln_artifact::tree::{Kind, Node, TreePath};
use kiln_virtio::fs::record::PathBytes;
use serde_json::{Map, Value, json};

use super::super::Failure;
use super::super::show::{line, try_line};
use super::{digits, entry_as_json};
use crate::engine::Host;
use crate::plan::{harmless, show_age, show_bytes};
use crate::root::catalog::{self, Listing};

/// Prints lines until their reader has gone.
fn print(lines: impl IntoIterator<Item = String>) -> io::Result<()> {
    lines.into_iter().try_for_each(|text| try_line(&harmless(text.as_bytes())))
}

/// Prints the root that `name` names.
pub(super) fn show(host: &Host, name: &str, json: bool) -> Result<ExitCode, Failure> {
    let entry = catalog::find(&host.store, name)?;
    let listing = catalog::listing(&host.store, &entry)?;
    if json {
        let mut all = entry_as_json(&entry);
        all["provenance"] = json!(entry.provenance);
        all["tree"] = listing.tree.iter().map(|(path, node)| node_as_json(path, node, &listing)).collect();
        line(&all.to_string());
        return Ok(ExitCode::SUCCESS);
    }
    let mut head = vec![
        format!("digest    sha256:{}", entry.digest),
        format!(
            "image     {}, {}, made {:.0}, used {} ago",
            entry.filesystem,
            show_bytes(entry.size_bytes),
            entry.made,
            show_age(entry.idle())
        ),
    ];
    head.extend(entry.origins.iter().map(|origin| format!("made of   {origin}")));
    let provenance = &entry.provenance;
    head.extend(provenance.indexes.iter().map(|index| {
        format!("index     {} of {:.0}, sha256:{}", index.suite, index.date, digits(&index.sha256))
    }));
    head.extend(provenance.bundle.iter().map(|bundle| format!("set up by bundle sha256:{bundle}")));
    if !provenance.packages.is_empty() {
        let names = provenance.packages.iter().map(|one| format!("{} {}", one.name, one.version));
        head.push(format!("packages  {}: {}", names.len(), names.collect::<Vec<_>>().join(", ")));
    }
    head.push(format!("names     {}", listing.tree.len()));
    head.push(String::new());
    let rows = listing.tree.iter().map(|(path, node)| row(path, node, &listing));
    // Whoever stops reading has seen enough.
    let _ = print(head.into_iter().chain(rows));
    Ok(ExitCode::SUCCESS)
}

/// The letter by which ls(1) shows a kind.
fn letter(kind: &Kind) -> char {
    match kind {
        Kind::Directory => 'd',
        Kind::File { .. } | Kind::HardLink(_) => '-',
        Kind::Symlink(_) => 'l',
        Kind::CharDevice { .. } => 'c',
        Kind::BlockDevice { .. } => 'b',
        Kind::Fifo => 'p',
        Kind::Socket => 's',
    }
}

/// Permissions as ls(1) shows them.
fn permissions(mode: u16) -> String {
    let mut text = String::new();
    for (shift, special, executable, not) in
        [(6, 0o4000, 's', 'S'), (3, 0o2000, 's', 'S'), (0, 0o1000, 't', 'T')]
    {
        let bits = mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (bits & 1 != 0, mode & special != 0) {
            (true, true) => executable,
            (false, true) => not,
            (true, false) => 'x',
            (false, false) => '-',
        });
    }
    text
}

fn row(path: &TreePath, node: &Node, listing: &Listing) -> String {
    let shown = listing.tree.shown(path).unwrap_or(node);
    let (size, digest) = match &shown.kind {
        Kind::File { size, .. } if listing.unread.contains(path) => {
            (size.to_string(), "compressed".to_owned())
        }
        Kind::File { digest, size } => (size.to_string(), digits(digest)),
        Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor } => {
            (format!("{major},{minor}"), "-".to_owned())
        }
        _ => ("-".to_owned(), "-".to_owned()),
    };
    let meta = &shown.meta;
    let owner = format!("{}:{}", meta.uid, meta.gid);
    let mut text = format!(
        "{}{} {owner:<9} {size:>10} {digest:<12} /{path}",
        letter(&shown.kind),
        permissions(meta.mode)
    );
    // Writing into a string does not fail.
    let _ = match (&node.kind, &shown.kind) {
        (Kind::HardLink(holder), _) => write!(text, " = /{holder}"),
        (_, Kind::Symlink(target)) => write!(text, " -> {}", String::from_utf8_lossy(target)),
        _ => Ok(()),
    };
    for name in meta.xattrs.keys() {
        let _ = write!(text, " [{}]", name.escape_ascii());
    }
    text
}

/// A path from the root on, as JSON has it.
pub(super) fn path_as_json(path: &TreePath) -> Value {
    json!(PathBytes([b"/", path.as_bytes()].concat()))
}

/// A kind's name.
pub(super) fn kind_name(kind: &Kind) -> &'static str {
    match kind {
        Kind::Directory => "directory",
        Kind::File { .. } => "file",
        Kind::Symlink(_) => "symlink",
        Kind::HardLink(_) => "hardlink",
        Kind::CharDevice { .. } => "character device",
        Kind::BlockDevice { .. } => "block device",
        Kind::Fifo => "fifo",
        Kind::Socket => "socket",
    }
}

fn node_as_json(path: &TreePath, node: &Node, listing: &Listing) -> Value {
    let mut all = Map::new();
    all.insert("path".to_owned(), path_as_json(path));
    all.insert("kind".to_owned(), json!(kind_name(&node.kind)));
    if let Kind::HardLink(holder) = &node.kind {
        all.insert("target".to_owned(), path_as_json(holder));
        return Value::Object(all);
    }
    let meta = &node.meta;
    all.insert("mode".to_owned(), json!(format!("{:04o}", meta.mode)));
    all.insert("uid".to_owned(), json!(meta.uid));
    all.insert("gid".to_owned(), json!(meta.gid));
    all.insert("mtime".to_owned(), json!(format!("{}.{:09}", meta.mtime.seconds, meta.mtime.nanoseconds)));
    match &node.kind {
        Kind::File { digest, size } => {
            all.insert("size".to_owned(), json!(size));
            if !listing.unread.contains(path) {
                all.insert("digest".to_owned(), json!(digest));
            }
        }
        Kind::Symlink(target) => drop(all.insert("target".to_owned(), json!(PathBytes(target.to_vec())))),
        Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor } => {
            all.insert("major".to_owned(), json!(major));
            all.insert("minor".to_owned(), json!(minor));
        }
        _ => {}
    }
    if !meta.xattrs.is_empty() {
        let xattrs = meta
            .xattrs
            .iter()
            .map(|(name, value)| (PathBytes(name.clone()).to_string(), json!(PathBytes(value.clone()))));
        all.insert("xattrs".to_owned(), Value::Object(xattrs.collect()));
    }
    Value::Object(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_are_shown_as_ls_does() {
        for (mode, text) in [
            (0o755, "rwxr-xr-x"),
            (0o4755, "rwsr-xr-x"),
            (0o2644, "rw-r-Sr--"),
            (0o1777, "rwxrwxrwt"),
            (0o1770, "rwxrwx--T"),
            (0, "---------"),
        ] {
            assert_eq!(permissions(mode), text, "{mode:o}");
        }
    }
}
