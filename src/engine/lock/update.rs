//! Making entries of the lock anew: roots, kernels and toolboxes by the archive's newest indexes, sources by what their
//! URLs and tags give now.
//!
//! Nothing is written before all of it is known. An index that is older than the one in the lock is refused.

use super::target::{Target, targets};
use super::{RelockError, check_refused, read};
use crate::engine::build::sources::{self, NewEntry};
use crate::engine::host::Host;
use crate::fetch::lock::difference::{self, EntryChange};
use crate::fetch::lock::{Lock, LockedKernel, LockedRoot};
use crate::plan::Plan;
use crate::plan::graph::Source;

/// An entry that was made anew.
enum Fresh {
    Kernel(LockedKernel),
    Root(LockedRoot),
    Toolbox(LockedRoot),
    Source(NewEntry),
}

/// Locks `names` anew, or all that the lock has and `plan` names; with `dry_run` only says what would change. Gives what
/// changed, and how many entries were looked at.
///
/// # Errors
/// [`RelockError`]; the lock is as it was then.
pub fn update(
    host: &Host,
    plan: Option<&Plan>,
    names: &[String],
    dry_run: bool,
    progress: &mut dyn FnMut(&str),
) -> Result<(Vec<EntryChange>, usize), RelockError> {
    if !dry_run {
        check_refused(host)?;
    }
    let lock = read(host)?;
    let targets = targets(&lock, plan, names)?;
    let mut fresh = Vec::new();
    for target in &targets {
        fresh.push(match target {
            Target::Kernel(spec) => {
                progress(&format!("looking up the kernel of Debian {}", spec.suite()));
                let previous = lock.kernel(&spec.to_string());
                Fresh::Kernel(host.archive().resolve_kernel(spec.suite(), previous)?)
            }
            Target::Root(spec) => {
                progress(&format!("resolving {spec}"));
                let previous = lock.root(&spec.to_string());
                Fresh::Root(host.archive().resolve(spec, previous)?)
            }
            Target::Toolbox(spec) => {
                progress("looking up the toolbox");
                let previous = lock.toolbox(&spec.to_string());
                Fresh::Toolbox(host.archive().resolve_programs(spec, previous)?)
            }
            Target::Source(source) => {
                progress(&format!("fetching source {}", source.name));
                Fresh::Source(look_up(host, source)?)
            }
        });
    }
    let set = |lock: &mut Lock| {
        let before = lock.clone();
        for entry in fresh {
            match entry {
                Fresh::Kernel(kernel) => lock.set_kernel(kernel),
                Fresh::Root(root) => lock.set_root(root),
                Fresh::Toolbox(toolbox) => lock.set_toolbox(toolbox),
                Fresh::Source(source) => source.set(lock),
            }
        }
        difference::between(&before, lock)
    };
    let changes = match dry_run {
        true => set(&mut lock.clone()),
        false => Lock::change(host.lock_path(), set)?,
    };
    Ok((changes, targets.len()))
}

fn look_up(host: &Host, source: &Source) -> Result<NewEntry, RelockError> {
    Ok(sources::look_up(source, &host.settings, &host.store, &host.permission().client)?)
}
