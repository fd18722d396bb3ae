//! From a recipe to a graph of steps that can be run: what names what, in which order, and what must not be.
//!
//! Everything that can be refused without looking at a file is refused here, before anything starts.

mod apart;
mod boot;
mod make;
mod reader;
mod sources;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use globset::GlobSet;
use kiln_digest::Digest;

use super::boot::Boot;
use super::make::{Make, Origin};
use super::recipe::{ClockWord, Fault, NetworkWord, Recipe, Steps, expand, nearest};
use super::{Outputs, RootSpec};
use reader::Reader;

/// The root of a step where a recipe has none.
pub const DEFAULT_ROOT: &str = "debian:bookworm";

/// Which step: its place in the plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StepId(pub usize);

/// What a step does.
#[derive(Debug, Clone)]
pub enum Command {
    /// A text for the interpreter.
    Text(String),
    /// A script file in SRCDIR.
    Script(String),
    /// Artifacts that are made on the host.
    Make(Vec<Make>),
    /// Signatures of what it needs.
    Sign,
    /// An image on real firmware.
    Boot(Box<Boot>),
}

impl Command {
    /// Whether it takes a machine.
    pub fn is_run(&self) -> bool {
        matches!(self, Self::Text(_) | Self::Script(_))
    }
}

/// The root of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Root {
    /// From elsewhere.
    Spec(RootSpec),
    /// What a step puts out.
    Step(Output),
}

/// Something that a step puts out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// The step.
    pub step: StepId,
    /// Its name, and the path behind it, as they were written.
    pub shown: String,
    /// A file or folder of what it puts out; all of it where this is empty.
    pub path: String,
}

/// The kernel of a step. Paths are relative to the recipe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kernel {
    /// The cloud kernel of this Debian suite.
    Debian(String),
    /// vmlinux or bzImage.
    File {
        /// The kernel.
        kernel: PathBuf,
        /// A folder with its modules.
        modules: Option<PathBuf>,
    },
    /// What a step puts out.
    Step(Output),
}

impl PlannedStep {
    /// The suite of its kernel, which is `default` unless said; none where its kernel is a file, or it takes no machine.
    pub fn kernel_suite<'a>(&'a self, default: &'a str) -> Option<&'a str> {
        match &self.kernel {
            _ if !self.command.is_run() => None,
            None => Some(default),
            Some(Kernel::Debian(suite)) => Some(suite),
            Some(Kernel::File { .. } | Kernel::Step(_)) => None,
        }
    }

    /// The roots that it has or takes files of.
    pub fn roots(&self) -> impl Iterator<Item = &RootSpec> {
        let own = match &self.root {
            Root::Spec(spec) if self.command.is_run() => Some(spec),
            _ => None,
        };
        let makes = match &self.command {
            Command::Make(makes) => &makes[..],
            _ => &[],
        };
        let taken = makes.iter().flat_map(Make::parts).filter_map(|part| match &part.origin {
            Origin::Root { spec, .. } => Some(spec),
            _ => None,
        });
        own.into_iter().chain(taken)
    }

    /// Whether it is known only by what steps that it needs put out, so that it has no key before.
    pub fn follows_outputs(&self) -> bool {
        !self.command.is_run()
            || matches!(self.root, Root::Step(_))
            || matches!(self.kernel, Some(Kernel::Step(_)))
    }
}

/// A source and how it is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Its name.
    pub name: String,
    /// Where it comes from.
    pub origin: SourceOrigin,
    /// Its digest, where the recipe says it.
    pub sha256: Option<Digest>,
}

/// Where a source comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceOrigin {
    /// A file.
    Url {
        /// Where it is fetched from, and what it is locked under.
        url: String,
        /// Where else it may be had, in this order.
        mirrors: Vec<String>,
    },
    /// The tree of a commit.
    Git {
        /// The repository: a URL, or `file:` and a path relative to the recipe.
        url: String,
        /// A commit or a tag.
        rev: String,
    },
}

/// Whether `text` is the whole name of a commit, in SHA-1 or SHA-256.
pub fn is_commit(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// What a step may use, as numbers; nothing where the recipe does not say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits {
    /// Memory of the machine, bytes.
    pub memory_bytes: Option<u64>,
    /// Processors of the machine.
    pub cpus: Option<u16>,
    /// Scratch disk, bytes.
    pub scratch_bytes: Option<u64>,
    /// Time for the command.
    pub timeout: Option<std::time::Duration>,
    /// What it prints, bytes.
    pub printed_bytes: Option<u64>,
    /// Its outputs, bytes.
    pub outputs_bytes: Option<u64>,
    /// Its outputs, files.
    pub files: Option<u64>,
    /// Its processes.
    pub processes: Option<u32>,
}

/// A step of a plan.
#[derive(Debug, Clone)]
pub struct PlannedStep {
    /// Its name.
    pub name: String,
    /// Its root.
    pub root: Root,
    /// Its kernel; the default bundle's where it names none.
    pub kernel: Option<Kernel>,
    /// What it runs.
    pub command: Command,
    /// What runs that.
    pub interpreter: Vec<String>,
    /// The steps it needs.
    pub needs: Vec<StepId>,
    /// What it sees of their outputs.
    pub inputs: Outputs,
    /// What it puts out.
    pub outputs: Outputs,
    /// The sources it sees, by name.
    pub sources: Vec<Source>,
    /// `NAME=VALUE`, and `NAME` for what is the host's.
    pub env: Vec<String>,
    /// Its working directory.
    pub directory: Option<String>,
    /// Whether its view of SRCDIR has a writable layer.
    pub writable_source: bool,
    /// Its network.
    pub network: NetworkWord,
    /// Its clock.
    pub clock: ClockWord,
    /// What it may use.
    pub limits: Limits,
    /// Whether hardware virtualisation and a whole jail are demanded.
    pub untrusted: bool,
}

/// What of SRCDIR no step sees.
#[derive(Debug, Clone, Default)]
pub struct Ignore {
    globs: Vec<String>,
    set: GlobSet,
}

impl Ignore {
    /// Whether the entry at `path`, whose folder is not ignored, is.
    pub fn hides(&self, path: &[u8]) -> bool {
        use std::os::unix::ffi::OsStrExt;
        !self.globs.is_empty() && self.set.is_match(std::ffi::OsStr::from_bytes(path))
    }

    /// The globs as they were written.
    pub fn globs(&self) -> &[String] {
        &self.globs
    }
}

/// Steps, each after all it needs, and what the recipe says beside them.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// The steps.
    pub steps: Vec<PlannedStep>,
    /// What of SRCDIR no step sees.
    pub ignore: Ignore,
    /// The roots that have a name, whether or not a step has them.
    pub roots: BTreeMap<String, RootSpec>,
    /// The sources, whether or not a step sees them.
    pub sources: Vec<Source>,
    targets: BTreeMap<String, Vec<StepId>>,
    families: BTreeMap<String, Vec<StepId>>,
}

/// A name that is neither a target nor a step.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no step or target `{name}`")]
pub struct UnknownTarget {
    /// The name.
    pub name: String,
    /// The known name that was most likely meant.
    pub meant: Option<String>,
}

impl Plan {
    /// The plan of `recipe`, whose text is `text` and whose errors call it `file`.
    ///
    /// # Errors
    /// [`Fault`] for the first thing that is wrong.
    pub fn of(recipe: &Recipe, text: &str, file: &str) -> Result<Self, Fault> {
        let reader = Reader { recipe, text, file };
        let Steps { all: mut expanded, left_out } = expand(recipe, text, file)?;
        let needs = reader.order(&mut expanded)?;
        let mut plan = Self { ignore: reader.ignore()?, sources: reader.all_sources()?, ..Self::default() };
        for (name, table) in &recipe.roots {
            plan.roots.insert(name.get_ref().clone(), reader.named_root(table)?);
        }
        let names: Vec<&str> = expanded.iter().map(|step| step.name.as_str()).collect();
        for (index, (step, needs)) in expanded.iter().zip(needs).enumerate() {
            plan.families.entry(step.family.to_owned()).or_default().push(StepId(index));
            plan.families.entry(step.name.clone()).or_default().push(StepId(index));
            plan.steps.push(reader.step(step, needs, &names)?);
        }
        for ids in plan.families.values_mut() {
            ids.dedup();
        }
        reader.outputs_apart(&plan, &expanded)?;
        for (name, members) in &recipe.targets {
            let mut steps = Vec::new();
            for member in members.iter().filter(|member| !left_out.contains(member.get_ref())) {
                let ids = plan.families.get(member.get_ref());
                steps.extend(ids.ok_or_else(|| {
                    reader.unknown(member, "step", plan.families.keys().map(String::as_str))
                })?);
            }
            if plan.families.contains_key(name.get_ref()) {
                let message = format!("`{}` is a step and cannot be a target as well", name.get_ref());
                return Err(reader.fault(name.span(), message));
            }
            plan.targets.insert(name.get_ref().clone(), steps);
        }
        Ok(plan)
    }

    /// The step `id`.
    pub fn step(&self, id: StepId) -> &PlannedStep {
        &self.steps[id.0]
    }

    /// The step of this very name.
    pub fn named(&self, name: &str) -> Option<StepId> {
        self.steps.iter().position(|step| step.name == name).map(StepId)
    }

    /// The names of the steps that `name`, a target or a step with a matrix, stands for, without what they need.
    pub fn members(&self, name: &str) -> Vec<&str> {
        let ids = self.targets.get(name).or_else(|| self.families.get(name));
        ids.into_iter().flatten().map(|id| self.step(*id).name.as_str()).collect()
    }

    /// The steps that `names` (targets, steps, or steps with a matrix) stand for, and all they need, in order. Without
    /// names: the target `default`, or every step.
    ///
    /// # Errors
    /// [`UnknownTarget`].
    pub fn wanted(&self, names: &[String]) -> Result<BTreeSet<StepId>, UnknownTarget> {
        let mut open: Vec<StepId> = Vec::new();
        if names.is_empty() {
            match self.targets.get("default") {
                Some(steps) => open.extend(steps),
                None => open.extend((0..self.steps.len()).map(StepId)),
            }
        }
        for name in names {
            let Some(ids) = self.targets.get(name).or_else(|| self.families.get(name)) else {
                let known = self.targets.keys().chain(self.families.keys()).map(String::as_str);
                let meant = nearest(name, known).map(ToOwned::to_owned);
                return Err(UnknownTarget { name: name.clone(), meant });
            };
            open.extend(ids);
        }
        let mut wanted = BTreeSet::new();
        while let Some(id) = open.pop() {
            if wanted.insert(id) {
                open.extend(&self.step(id).needs);
            }
        }
        Ok(wanted)
    }
}

#[cfg(test)]
mod tests;
