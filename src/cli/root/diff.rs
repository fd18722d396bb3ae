//! `kiln root diff`: what differs between two roots, with the exit status of diff(1).

use std::collections::BTreeSet;
use std::process::ExitCode;

use kiln_artifact::tree::{Aspect, Difference, Kind, Node, Tree, TreePath};
use kiln_virtio::fs::record::PathBytes;
use schemars::JsonSchema;
use serde::Serialize;

use super::super::show::{self, try_line};
use super::super::{Failure, USAGE};
use super::show::{from_the_root, kind_name};
use crate::engine::Host;
use crate::plan::harmless;
use crate::root::catalog;

/// What is given where roots could not be compared.
pub(super) const TROUBLE: u8 = 2;

/// Prints what is another in `new` than in `old`, what differs in ignored aspects only left out.
pub(super) fn diff(
    host: &Host,
    old: &str,
    new: &str,
    ignore: &[String],
    json: bool,
) -> Result<ExitCode, Failure> {
    let ignored = ignore.iter().map(|word| aspect(word)).collect::<Result<BTreeSet<Aspect>, _>>()?;
    let (old, new) = (catalog::find(&host.store, old)?, catalog::find(&host.store, new)?);
    if old.digest == new.digest {
        return Ok(ExitCode::SUCCESS);
    }
    let old = catalog::listing(&host.store, &old)?;
    let new = catalog::listing(&host.store, &new)?;
    let mut uncompared = 0_u64;
    let mut differ = false;
    for (path, difference) in old.tree.differences(&new.tree) {
        let difference = match difference {
            Difference::Changed(mut aspects) => {
                let unread = old.unread.contains(path) || new.unread.contains(path);
                if unread && !sizes_differ(&old.tree, &new.tree, path) {
                    uncompared += u64::from(!ignored.contains(&Aspect::Content));
                    aspects.retain(|aspect| *aspect != Aspect::Content);
                }
                aspects.retain(|aspect| !ignored.contains(aspect));
                if aspects.is_empty() {
                    continue;
                }
                Difference::Changed(aspects)
            }
            other => other,
        };
        differ = true;
        let text = match json {
            true => serde_json::to_string(&Differing::of(path, &difference)).unwrap_or_default(),
            false => harmless(difference_row(path, &difference, &old.tree, &new.tree).as_bytes()),
        };
        if try_line(&text).is_err() {
            break;
        }
    }
    match (uncompared, differ) {
        (0, false) => Ok(ExitCode::SUCCESS),
        (0, true) => Ok(ExitCode::from(1)),
        (count, differ) => {
            let text = format!(
                "contents not compared, because kiln does not read how they are compressed: {count} files"
            );
            show::failure(&text, None);
            Ok(ExitCode::from(if differ { 1 } else { TROUBLE }))
        }
    }
}

fn aspect(word: &str) -> Result<Aspect, Failure> {
    let known = Aspect::ALL.into_iter().find(|aspect| aspect.name() == word);
    known.ok_or_else(|| {
        let names: Vec<&str> = Aspect::ALL.into_iter().map(Aspect::name).collect();
        Failure {
            text: format!("--ignore takes {}, not `{word}`", names.join(" or ")),
            hint: None,
            code: USAGE,
        }
    })
}

fn sizes_differ(old: &Tree, new: &Tree, path: &TreePath) -> bool {
    let size = |tree: &Tree| match tree.shown(path).map(|node| &node.kind) {
        Some(Kind::File { size, .. }) => Some(*size),
        _ => None,
    };
    size(old) != size(new)
}

fn difference_row(path: &TreePath, difference: &Difference, old: &Tree, new: &Tree) -> String {
    let aspects = match difference {
        Difference::Added => return format!("+ /{path}"),
        Difference::Removed => return format!("- /{path}"),
        Difference::Changed(aspects) => aspects,
    };
    let (Some(old), Some(new)) = (old.shown(path), new.shown(path)) else { return format!("~ /{path}") };
    let told: Vec<String> = aspects.iter().map(|aspect| told(*aspect, old, new)).collect();
    format!("~ /{path}: {}", told.join(", "))
}

/// An aspect, and its two values where they are short.
fn told(aspect: Aspect, old: &Node, new: &Node) -> String {
    let (a, b) = (&old.meta, &new.meta);
    let values = match aspect {
        Aspect::Kind => format!(" ({} -> {})", kind_name(&old.kind), kind_name(&new.kind)),
        Aspect::Mode => format!(" ({:04o} -> {:04o})", a.mode, b.mode),
        Aspect::Owner => format!(" ({}:{} -> {}:{})", a.uid, a.gid, b.uid, b.gid),
        Aspect::Xattrs => {
            let names: BTreeSet<_> = a.xattrs.keys().chain(b.xattrs.keys()).collect();
            let names = names.into_iter().filter(|name| a.xattrs.get(*name) != b.xattrs.get(*name));
            let names: Vec<String> = names.map(|name| name.escape_ascii().to_string()).collect();
            format!(" ({})", names.join(", "))
        }
        Aspect::Content | Aspect::Time | Aspect::Links => String::new(),
    };
    format!("{}{values}", aspect.name())
}

/// A path that differs, as `--json` has it.
#[derive(Debug, Serialize, JsonSchema)]
pub(in crate::cli) struct Differing {
    /// The path from the root on; `%NN` for a byte that is not UTF-8, and for `%`.
    #[schemars(with = "String")]
    path: PathBytes,
    /// How it differs.
    #[schemars(extend("enum" = ["added", "removed", "changed"]))]
    change: &'static str,
    /// In what, where it is in both.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Vec<String>>")]
    aspects: Option<Vec<&'static str>>,
}

impl Differing {
    fn of(path: &TreePath, difference: &Difference) -> Self {
        let (change, aspects) = match difference {
            Difference::Added => ("added", None),
            Difference::Removed => ("removed", None),
            Difference::Changed(aspects) => {
                ("changed", Some(aspects.iter().map(|aspect| aspect.name()).collect()))
            }
        };
        Self { path: from_the_root(path), change, aspects }
    }
}
