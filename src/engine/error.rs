//! Why a run could not be carried through: kiln's own failures, not the command's.

use std::io;

use kiln_virtio::fs::MISSED_BYTES;

use super::host::HostError;
use super::inputs::InputError;
use super::merge::MergeError;
use crate::agent::{SessionError, TransferError};
use crate::keeper::RegistryError;
use crate::machine::{Death, MachineError};
use crate::plan::{EnvError, OutputError, show_bytes};
use crate::root::Filesystem;

impl RunError {
    /// A root that cannot be had.
    pub(super) fn of_root(error: crate::root::RootError) -> Self {
        Self::Host(Box::new(HostError::Root(error)))
    }
}

/// A run that kiln could not carry through.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// This host cannot do it.
    #[error(transparent)]
    Host(Box<HostError>),
    /// An input is not what it should be.
    #[error(transparent)]
    Input(#[from] InputError),
    /// An output glob is malformed.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// The environment is malformed.
    #[error(transparent)]
    Env(#[from] EnvError),
    /// The machine cannot be driven.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The conversation with the agent failed while the machine stood.
    #[error(transparent)]
    Session(SessionError),
    /// The machine died under the run.
    #[error("the machine died while {doing}: {death}")]
    Died {
        /// What was going on.
        doing: &'static str,
        /// How it went.
        death: Death,
    },
    /// Somebody ended it.
    #[error("the machine was ended by `kiln stop` while {doing}")]
    Stopped {
        /// What was going on.
        doing: &'static str,
    },
    /// The machine cannot be registered.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The step's world could not be prepared with a kernel whose modules are not known.
    #[error("the machine cannot be prepared: its kernel has no module tree, and needs {needed} built in")]
    BareKernel {
        /// What a machine needs.
        needed: String,
        /// What failed for want of it, as it seems.
        #[source]
        source: SessionError,
    },
    /// The record has no room for what the step asked.
    #[error("the step looked for more absent files than can be recorded ({} MiB of names)", MISSED_BYTES >> 20)]
    RecordFull,
    /// The guest's kernel does not mount the root.
    #[error("the root `{root}` cannot be mounted")]
    Root {
        /// The root, as the step names it.
        root: String,
        /// What is on its image.
        filesystem: Filesystem,
        /// What the guest's kernel says.
        #[source]
        source: SessionError,
    },
    /// Outputs could not be carried out.
    #[error(transparent)]
    Transfer(TransferError),
    /// The command wrote more to its output than it may.
    #[error("the command printed more than {}, and was stopped", show_bytes(*.limit))]
    Printed {
        /// The limit, in bytes.
        limit: u64,
    },
    /// Declared outputs that the command did not make.
    #[error("the command succeeded but made no output that matches {}", quoted(.0))]
    MissingOutputs(Vec<String>),
    /// Outputs could not be merged.
    #[error(transparent)]
    Merge(#[from] MergeError),
    /// The host cannot keep the run's own files.
    #[error("cannot {what}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The system's word.
        #[source]
        source: io::Error,
    },
}

impl From<HostError> for RunError {
    fn from(error: HostError) -> Self {
        Self::Host(Box::new(error))
    }
}

fn quoted(globs: &[String]) -> String {
    globs.iter().map(|glob| format!("`{glob}`")).collect::<Vec<_>>().join(", ")
}

impl RunError {
    /// Whether the agent may be asked for more after this: it has answered whatever it was asked.
    pub(super) fn leaves_session_usable(&self) -> bool {
        matches!(self, Self::MissingOutputs(_) | Self::Session(SessionError::Failed { .. }))
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Host(error) => error.hint(),
            Self::Input(error) => error.hint().map(str::to_owned),
            Self::Machine(error) => error.hint(),
            Self::Merge(error) => error.hint(),
            Self::MissingOutputs(_) => Some(
                "outputs are paths below WORK, which is $WORK in the step; nothing was merged".to_owned(),
            ),
            Self::Printed { .. } => Some("--limit printed=SIZE, or printed in a step's `limits`, allows more".to_owned()),
            Self::Transfer(TransferError::TooMany { .. } | TransferError::TooMuch { .. }) => {
                Some(
                    "--limit outputs=SIZE and --limit files=COUNT, or outputs and files in a step's `limits`, allow more"
                        .to_owned(),
                )
            }
            Self::RecordFull => Some(
                "past that it got errors instead of answers, so nothing was merged; a step that searches less, or \
                 several steps, stay below"
                    .to_owned(),
            ),
            Self::BareKernel { .. } => Some("name the folder of its modules with --modules DIR".to_owned()),
            Self::Root { filesystem, source: SessionError::Failed { errno, .. }, .. } => {
                Some(match errno.raw_os_error() {
                    Some(libc::ENODEV) => format!("this kernel has no {filesystem}: see --kernel and --modules"),
                    _ => {
                        format!("the image is damaged, or uses what this kernel's {filesystem} does not know")
                    }
                })
            }
            Self::Died { death, .. } if death.shortage().is_some() => death.hint(),
            Self::Died { death: Death::Panicked(line), .. } if line.to_lowercase().contains("memory") => {
                Some("--memory, or memory in a step's `limits`, gives the machine more".to_owned())
            }
            Self::Session(SessionError::Silent { .. }) => Some(
                "the machine's last console lines are above; fewer --cpus boot faster under emulation"
                    .to_owned(),
            ),
            _ => None,
        }
    }
}
