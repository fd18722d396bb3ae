//! `kiln root show`: where a root came from, and every file in it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::process::ExitCode;

use kiln_artifact::tree::{Kind, Node, TreePath};
use kiln_digest::Digest;
use kiln_virtio::fs::record::PathBytes;
use schemars::JsonSchema;
use serde::Serialize;

use super::super::Failure;
use super::super::show::{line, try_line};
use super::{Listed, digits};
use crate::engine::Host;
use crate::plan::{harmless, show_age, show_bytes};
use crate::root::catalog::{self, Listing, Provenance};

/// Prints lines until their reader has gone.
fn print(lines: impl IntoIterator<Item = String>) -> io::Result<()> {
    lines.into_iter().try_for_each(|text| try_line(&harmless(text.as_bytes())))
}

/// Prints the root that `name` names.
pub(super) fn show(host: &Host, name: &str, json: bool) -> Result<ExitCode, Failure> {
    let entry = catalog::find(&host.store, name)?;
    let listing = catalog::listing(&host.store, &entry)?;
    if json {
        let shown = Shown {
            root: Listed::of(&entry),
            provenance: &entry.provenance,
            tree: listing.tree.iter().map(|(path, node)| Name::of(path, node, &listing)).collect(),
        };
        line(&serde_json::to_string(&shown).unwrap_or_default());
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
pub(super) fn from_the_root(path: &TreePath) -> PathBytes {
    PathBytes([b"/", path.as_bytes()].concat())
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

/// A root and what is in it, as `--json` has it.
#[derive(Debug, Serialize, JsonSchema)]
pub(in crate::cli) struct Shown<'a> {
    #[serde(flatten)]
    root: Listed<'a>,
    /// What it was made of.
    provenance: &'a Provenance,
    /// Every name in it, in the order of a walk.
    tree: Vec<Name>,
}

/// A name in a root. Paths begin at the root; in them and in names, `%NN` stands for a byte that is not UTF-8, and for `%`.
#[derive(Debug, Default, Serialize, JsonSchema)]
struct Name {
    /// Its path.
    #[schemars(with = "String")]
    path: PathBytes,
    /// What it is.
    kind: &'static str,
    /// Where a symbolic link leads, or the name of which this hard link is another; that has the rest.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    target: Option<PathBytes>,
    /// Permissions, in octal digits.
    #[serde(skip_serializing_if = "Option::is_none")]
    mode: Option<String>,
    /// Its owner.
    #[serde(skip_serializing_if = "Option::is_none")]
    uid: Option<u32>,
    /// Its group.
    #[serde(skip_serializing_if = "Option::is_none")]
    gid: Option<u32>,
    /// When its content changed: seconds since 1970-01-01 UTC, with nine digits after the point.
    #[serde(skip_serializing_if = "Option::is_none")]
    mtime: Option<String>,
    /// A file's bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    /// A file's digest, where kiln reads how it is compressed.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    digest: Option<Digest>,
    /// A device's number.
    #[serde(skip_serializing_if = "Option::is_none")]
    major: Option<u32>,
    /// A device's number.
    #[serde(skip_serializing_if = "Option::is_none")]
    minor: Option<u32>,
    /// Extended attributes.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(with = "BTreeMap<String, String>")]
    xattrs: BTreeMap<String, PathBytes>,
}

impl Name {
    fn of(path: &TreePath, node: &Node, listing: &Listing) -> Self {
        let name = Self { path: from_the_root(path), kind: kind_name(&node.kind), ..Self::default() };
        if let Kind::HardLink(holder) = &node.kind {
            return Self { target: Some(from_the_root(holder)), ..name };
        }
        let meta = &node.meta;
        let xattrs = meta.xattrs.iter();
        let xattrs =
            xattrs.map(|(name, value)| (PathBytes(name.clone()).to_string(), PathBytes(value.clone())));
        let mut name = Self {
            mode: Some(format!("{:04o}", meta.mode)),
            uid: Some(meta.uid),
            gid: Some(meta.gid),
            mtime: Some(format!("{}.{:09}", meta.mtime.seconds, meta.mtime.nanoseconds)),
            xattrs: xattrs.collect(),
            ..name
        };
        match &node.kind {
            Kind::File { digest, size } => {
                name.size = Some(*size);
                name.digest = (!listing.unread.contains(path)).then_some(*digest);
            }
            Kind::Symlink(target) => name.target = Some(PathBytes(target.to_vec())),
            Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor } => {
                (name.major, name.minor) = (Some(*major), Some(*minor));
            }
            _ => {}
        }
        name
    }
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
