//! The machine of a step for somebody who looks into it, in place of the step's command. It is what the step gets, and what
//! happens in it is nobody's result: nothing is collected, merged or kept of what it reads.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use kiln_wire::Exec;

use super::error::RunError;
use super::event::Listener;
use super::host::Host;
use super::run::{Started, Stopwatch, Talk, explain, start, with_toolbox};
use super::step::Step;
use crate::agent::{RUNNING, Session, SessionError};
use crate::keeper::Kept;

/// A machine with a step's world in it, and a toolbox. It ends when this is dropped.
pub struct Entered {
    kept: Kept,
    stopped: Arc<AtomicBool>,
}

/// Starts the machine of `step`, which is to be kept, and makes the step's world in it.
///
/// # Errors
/// [`RunError`].
pub fn enter(step: &Step, host: &Host, events: Listener<'_>) -> Result<Entered, RunError> {
    let mut stopwatch = Stopwatch::start();
    let Started { prepared, setup, exec, mut machine, wire, registration, stopped, .. } =
        start(step, host, None, &mut stopwatch, events)?;
    let mut talk = Talk::new(step, host, &prepared, &mut stopwatch);
    let opened = talk.open(wire, setup, events);
    let doing = talk.doing;
    let session = opened.map_err(|error| explain(error, doing, &mut *machine, &stopped, events))?;
    let kept = Kept {
        machine,
        session,
        registration,
        environment: exec.env,
        directory: exec.cwd,
        has_toolbox: prepared.toolbox.is_some(),
        writes_disks: step.writes_disks(),
    };
    Ok(Entered { kept: with_toolbox(kept, step, events), stopped })
}

impl Entered {
    /// The conversation with its agent, in which one command after another can be run.
    pub fn session(&mut self) -> &mut Session {
        &mut self.kept.session
    }

    /// `exec` with what it leaves out of what the step's command runs in.
    pub fn complete(&self, exec: Exec) -> Exec {
        self.kept.complete(exec)
    }

    /// Why the conversation ended with `error` while a command ran.
    pub fn explain(&mut self, error: SessionError, events: Listener<'_>) -> RunError {
        explain(RunError::Session(error), RUNNING, &mut *self.kept.machine, &self.stopped, events)
    }
}
