//! What a person names to have it locked anew: by the recipe's name for it, or by what it is locked under.

use crate::fetch::lock::{Entry, Lock};
use crate::plan::Plan;
use crate::plan::graph::{Source, SourceOrigin};
use crate::plan::nearest;
use crate::root::debian::{DEFAULT_KERNEL_SUITE, DebianSpec};
use crate::root::toolbox;

use super::RelockError;

/// A name that nothing in lock or recipe has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("neither the lock nor the recipe has `{name}`")]
pub struct UnknownName {
    /// The name.
    pub name: String,
    /// The known name that was most likely meant.
    pub meant: Option<String>,
}

impl UnknownName {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match &self.meant {
            Some(meant) => format!("did you mean `{meant}`?"),
            None => {
                "name a root or source of the recipe, `kernel`, `toolbox`, or what `kiln lock show` shows"
                    .to_owned()
            }
        })
    }
}

/// Something that can be locked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Target {
    Kernel(DebianSpec),
    Root(DebianSpec),
    Toolbox(DebianSpec),
    Source(Source),
}

/// All that `lock` has and `plan` names, each with the names that a person may use for it.
fn all(lock: &Lock, plan: Option<&Plan>) -> Result<Vec<(Target, Vec<String>)>, RelockError> {
    let mut found: Vec<(Target, Vec<String>)> = Vec::new();
    let mut add =
        |target: Target, names: Vec<String>| match found.iter_mut().find(|(known, _)| *known == target) {
            Some((_, known)) => known.extend(names),
            None => found.push((target, names)),
        };
    if let Some(plan) = plan {
        let named = plan.roots.iter().map(|(name, root)| (Some(name), root));
        for (name, root) in
            named.chain(plan.steps.iter().flat_map(|step| step.roots().map(|root| (None, root))))
        {
            let text = root.to_string();
            if root.is_debian() {
                let spec: DebianSpec = text.parse()?;
                let names = [Some(spec.to_string()), Some(text), name.cloned()].into_iter().flatten();
                add(Target::Root(spec), names.collect());
            }
        }
        for suite in plan.steps.iter().filter_map(|step| step.kernel_suite(DEFAULT_KERNEL_SUITE)) {
            let spec = DebianSpec::essential(suite)?;
            let names = vec![spec.to_string(), "kernel".to_owned()];
            add(Target::Kernel(spec), names);
        }
        for source in &plan.sources {
            let mut names = vec![source.name.clone()];
            names.extend(match &source.origin {
                SourceOrigin::Url { url, .. } => vec![url.clone()],
                SourceOrigin::Git { url, rev } => vec![url.clone(), format!("{url} {rev}")],
            });
            add(Target::Source(source.clone()), names);
        }
    }
    for entry in lock.entries() {
        let mut names = vec![entry.name()];
        let target = match entry {
            Entry::Kernel(kernel) => {
                names.push("kernel".to_owned());
                Target::Kernel(kernel.spec.parse()?)
            }
            Entry::Root(root) => Target::Root(root.spec.parse()?),
            Entry::Toolbox(toolbox) => {
                names.push("toolbox".to_owned());
                Target::Toolbox(toolbox.spec.parse()?)
            }
            // Another URL or rev in the lock is another source, which the recipe has no more.
            Entry::Source(_) | Entry::Git(_) => continue,
        };
        add(target, names);
    }
    Ok(found)
}

/// What `names` stand for; all that there is, where there are none.
pub(super) fn targets(
    lock: &Lock,
    plan: Option<&Plan>,
    names: &[String],
) -> Result<Vec<Target>, RelockError> {
    let all = all(lock, plan)?;
    if names.is_empty() {
        return Ok(all.into_iter().map(|(target, _)| target).collect());
    }
    let mut wanted: Vec<Target> = Vec::new();
    for name in names {
        let mut found: Vec<Target> =
            all.iter().filter(|(_, known)| known.contains(name)).map(|(target, _)| target.clone()).collect();
        if found.is_empty() {
            found.push(match name.as_str() {
                "kernel" => Target::Kernel(DebianSpec::essential(DEFAULT_KERNEL_SUITE)?),
                "toolbox" => Target::Toolbox(toolbox::spec(DEFAULT_KERNEL_SUITE)?),
                spec if spec.starts_with("debian:") || spec.starts_with("deb:") => {
                    Target::Root(spec.parse()?)
                }
                _ => {
                    let known = all.iter().flat_map(|(_, names)| names.iter().map(String::as_str));
                    let meant = nearest(name, known.chain(["kernel", "toolbox"])).map(ToOwned::to_owned);
                    return Err(UnknownName { name: name.clone(), meant }.into());
                }
            });
        }
        found.retain(|target| !wanted.contains(target));
        wanted.extend(found);
    }
    Ok(wanted)
}
