//! What a run tells whoever shows it, as it happens.

use std::io;
use std::time::Duration;

use kiln_wire::Stream;
use schemars::JsonSchema;
use serde::Serialize;

use crate::machine::Identity;

/// A part of a run, for saying where the time went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Kernel and root found or made.
    Prepare,
    /// From starting the machine to the agent's first word.
    Boot,
    /// The agent preparing the step's world.
    Setup,
    /// The command.
    Command,
    /// Outputs of a command that succeeded listed and fetched.
    Collect,
    /// What was read, hashed.
    Record,
    /// Outputs merged into WORK.
    Merge,
}

impl Phase {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::Boot => "boot",
            Self::Setup => "setup",
            Self::Command => "command",
            Self::Collect => "collect",
            Self::Record => "record",
            Self::Merge => "merge",
        }
    }
}

/// Something that happened.
#[derive(Debug)]
pub enum Event<'a> {
    /// Something slow is being done, in words.
    Progress(&'a str),
    /// Something the user should know, in words.
    Warning(&'a str),
    /// The machine runs.
    Machine(&'a Identity),
    /// The command wrote something.
    Output(Stream, &'a [u8]),
    /// A part of the run is over.
    Phase(Phase, Duration),
    /// Its machine stays under this name, and after the build for so long with nobody in it.
    Kept(&'a str, Duration),
}

/// Who is told. An error about an [`Event::Output`] ends the run: nobody takes what the command says any more. The command
/// begins when [`Phase::Setup`] was heard: a listener may let it wait there, and calls it off by the error `Interrupted`.
/// Other errors are the listener's own affair.
pub type Listener<'a> = &'a mut dyn FnMut(Event<'_>) -> io::Result<()>;
