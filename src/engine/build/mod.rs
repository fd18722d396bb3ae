//! `kiln build`: the steps of a recipe, those that must run in machines of their own and the others not at all.
//!
//! ```text
//! plan ─▶ lower (a step as `run` takes it, and its key)
//!           │
//!           ▼ for each step, when all it needs is done
//!         check: does a trace under its key hold?  ── yes ─▶ WORK gets what it lacks of the outputs
//!           │ no
//!           ▼
//!         stage (its view: what it sees in WORK) ─▶ run ─▶ outputs merged, trace kept
//! ```
//!
//! `schedule` decides what comes next; `check` and `stage` prepare it; a [`Runner`] does it. That a step whose inputs are
//! the same as before is not run again although what made them was, follows from the traces: nothing else knows of it.

mod admission;
mod boot_step;
mod check;
mod gate;
mod host_step;
mod late;
mod lower;
mod reservations;
mod runner;
mod schedule;
pub mod sources;
mod stage;
mod tamper;
mod tasks;
mod timeline;
mod turns;
mod view;
mod worker;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use kiln_digest::Digest;

use super::error::RunError;
use super::event::Event;
use super::make::MakeError;
use super::merge::MergeError;
use crate::cache::{Index, Scope};
use crate::plan::{EnvError, Plan, StepId};
use crate::settings::Settings;
use crate::sign::SignError;
use crate::store::Store;

pub use boot_step::BootStepError;
pub use check::{Explained, NEVER_RAN, Standing, work_name};
pub use gate::Gate;
pub use lower::Lowered;
pub use runner::{KeptStep, Machines, Ran, Runner};
pub use tamper::TamperError;
pub use timeline::Timeline;

/// How a build goes about it.
#[derive(Debug, Clone)]
pub struct Options {
    /// Most steps that run at once.
    pub jobs: usize,
    /// Whether steps that do not need a failed one still run.
    pub keep_going: bool,
    /// Whether nothing is run, only said.
    pub dry_run: bool,
    /// Whether outputs may replace files in WORK that kiln did not put there.
    pub overwrite: bool,
    /// The scope that is written.
    pub scope: Scope,
    /// Scopes that are only read.
    pub read_scopes: Vec<Scope>,
}

/// Why a step, or a build, could not be carried through.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A run failed.
    #[error(transparent)]
    Run(#[from] RunError),
    /// WORK cannot be given outputs.
    #[error(transparent)]
    Merge(#[from] MergeError),
    /// A source.
    #[error(transparent)]
    Source(#[from] sources::SourceError),
    /// A signature.
    #[error(transparent)]
    Sign(Box<SignError>),
    /// An artifact.
    #[error(transparent)]
    Make(Box<MakeError>),
    /// A boot that was not judged.
    #[error(transparent)]
    Boot(Box<BootStepError>),
    /// What a step should have put out for another.
    #[error("`{output}` is no {what} for step `{step}`")]
    NotPutOut {
        /// Who needs it.
        step: String,
        /// As what.
        what: &'static str,
        /// What is named, as it was written.
        output: String,
    },
    /// What a step is given of the host's environment.
    #[error("the environment of step `{step}` cannot be made")]
    Environment {
        /// The step.
        step: String,
        /// Why not.
        #[source]
        source: EnvError,
    },
    /// WORK is SRCDIR.
    #[error("WORK and SRCDIR are one folder, `{path}`: what steps put out would be among what they read")]
    OnePlace {
        /// The folder.
        path: PathBuf,
    },
    /// Two steps put out the same path.
    #[error("steps `{one}` and `{other}` both put out `{path}`")]
    SamePath {
        /// A step.
        one: String,
        /// The other.
        other: String,
        /// The path in WORK.
        path: String,
    },
    /// Outputs that the store should have are damaged or gone.
    #[error("the store has lost `{path}`, which step `{step}` put out ({digest})")]
    Lost {
        /// Whose output it is.
        step: String,
        /// Its path in WORK.
        path: String,
        /// Its digest.
        digest: Digest,
    },
    /// What a step takes from elsewhere is damaged or gone in the store.
    #[error("the store has lost `{path}` of {place} ({digest})")]
    LostOf {
        /// Where that is.
        place: String,
        /// Its path there.
        path: String,
        /// Its digest.
        digest: Digest,
    },
    /// The store or a view cannot be written.
    #[error("cannot {what} `{path}`")]
    Io {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
}

impl From<MakeError> for BuildError {
    fn from(error: MakeError) -> Self {
        Self::Make(Box::new(error))
    }
}

impl From<SignError> for BuildError {
    fn from(error: SignError) -> Self {
        Self::Sign(Box::new(error))
    }
}

impl BuildError {
    /// Whether a step failed whose command had begun, or could have: not for want of what it runs in.
    pub fn is_of_a_command(&self) -> bool {
        matches!(
            self,
            Self::Merge(_)
                | Self::Run(
                    RunError::Session(_)
                        | RunError::Died { .. }
                        | RunError::Stopped { .. }
                        | RunError::RecordFull
                        | RunError::Transfer(_)
                        | RunError::Printed { .. }
                        | RunError::MissingOutputs(_)
                        | RunError::Merge(_)
                )
        )
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Run(error) => error.hint(),
            Self::Merge(error) => error.hint(),
            Self::Source(error) => error.hint(),
            Self::Make(error) => error.hint(),
            Self::Sign(error) => error.hint(),
            Self::Boot(error) => error.hint(),
            Self::NotPutOut { what: "kernel", .. } => Some(
                "a kernel is one file vmlinuz-RELEASE, with its modules in modules/RELEASE; step:NAME/PATH names one of several"
                    .to_owned(),
            ),
            Self::NotPutOut { .. } => {
                Some("step:NAME/PATH names an image, an archive or a folder among what the step puts out".to_owned())
            }
            Self::Environment { source: EnvError::Unset(name), .. } => {
                Some(format!("set {name} where kiln is called, or take it out of the step's `pass-env`"))
            }
            Self::Environment { .. } => None,
            Self::OnePlace { .. } => Some(
                "name a folder for WORK, in SRCDIR or elsewhere: --work DIR, or work in [settings]".to_owned(),
            ),
            Self::SamePath { .. } => Some("give their outputs names or folders of their own".to_owned()),
            Self::Lost { .. } => Some("build again: the step runs anew, and puts it back".to_owned()),
            Self::LostOf { .. } => Some("build again: it is taken in anew".to_owned()),
            Self::Io { .. } => None,
        }
    }
}

/// What became of a step.
#[derive(Debug)]
pub enum Outcome {
    /// A trace holds: nothing was done. Whether something that it needs did run, and whether WORK lacked outputs.
    UpToDate {
        /// A step that it needs ran and gave the same as before, as far as this one reads it.
        cut_off: bool,
        /// Outputs that WORK lacked.
        restored: usize,
    },
    /// It ran, and its outputs are in WORK.
    Ran {
        /// How it went.
        ran: Box<Ran>,
        /// Why its result was not kept.
        not_kept: Option<String>,
        /// Whether its outputs are the same as those of the last time.
        same: bool,
    },
    /// It would run: with `dry_run`.
    WouldRun,
    /// Its command failed.
    CommandFailed(Box<Ran>),
    /// kiln could not carry it through.
    Failed(Box<BuildError>),
    /// Something that it needs failed, or the build was ended before.
    Skipped,
}

impl Outcome {
    /// Its name in timelines.
    pub fn name(&self) -> &'static str {
        match self {
            Self::UpToDate { .. } => "up-to-date",
            Self::Ran { .. } => "run",
            Self::WouldRun => "would-run",
            Self::CommandFailed(_) | Self::Failed(_) => "failed",
            Self::Skipped => "skipped",
        }
    }

    /// Whether steps that need it can go on.
    pub fn is_good(&self) -> bool {
        matches!(self, Self::UpToDate { .. } | Self::Ran { .. } | Self::WouldRun)
    }
}

/// What a build tells whoever shows it.
#[derive(Debug)]
pub enum News<'a> {
    /// Whether a step has to run is being found out.
    Checks(&'a str),
    /// That is found out, and took so long.
    Checked(&'a str, Duration),
    /// A step starts: its name, and why it must.
    Starts(&'a str, &'a str),
    /// Something happens in it.
    Event(&'a str, &'a Event<'a>),
    /// It is over.
    Ends(&'a str, &'a Outcome),
}

/// What a build came to.
#[derive(Debug, Default)]
pub struct Summary {
    /// What became of each step, in the order in which they ended.
    pub outcomes: Vec<(String, Outcome)>,
    /// How long it took.
    pub total: Duration,
    /// How long the commands ran, all together.
    pub commands: Duration,
    /// What the good steps have put out, and those that were given: digests of manifests.
    pub outputs: BTreeMap<StepId, Digest>,
}

impl Summary {
    /// Whether every step is good.
    pub fn is_good(&self) -> bool {
        self.outcomes.iter().all(|(_, outcome)| outcome.is_good())
    }

    /// How many outcomes are as `is` says.
    pub fn count(&self, is: impl Fn(&Outcome) -> bool) -> usize {
        self.outcomes.iter().filter(|(_, outcome)| is(outcome)).count()
    }
}

/// A build: all it goes by.
pub struct Build<'a, R> {
    /// The plan.
    pub plan: &'a Plan,
    /// The settings.
    pub settings: &'a Settings,
    /// The store.
    pub store: &'a Store,
    /// What runs steps.
    pub runner: &'a R,
    /// Steps that are not built, because what they put out is known: each with the digest of its outputs' manifest.
    pub given: BTreeMap<StepId, Digest>,
    /// Where the recipe lies: paths in it are relative to this.
    pub folder: PathBuf,
    /// Sources by name, as they are locked.
    pub sources: sources::Locked,
    /// What may be done to have sources.
    pub permission: sources::Permission,
    /// How it goes about it.
    pub options: Options,
}

impl<R> Build<'_, R> {
    fn index(&self) -> Index {
        Index::new(self.store, self.options.scope.clone(), self.options.read_scopes.clone())
    }
}
