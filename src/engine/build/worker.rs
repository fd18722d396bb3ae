//! What is done for a step on a thread of its own: the check, and the run from its view to its trace.

use std::io::{self, Write};
use std::sync::mpsc::{Receiver, SyncSender};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use kiln_digest::Digest;
use kiln_wire::Stream;

use super::BuildError;
use super::check::{Checker, Standing, now_nanos};
use super::gate::Gate;
use super::runner::{Ran, Runner};
use crate::cache::Key;
use crate::engine::event::{Event, Phase};
use crate::machine::{Identity, PathBytes};
use crate::plan::StepId;
use std::collections::BTreeMap;

/// An event of a step, on its way to the thread that tells it.
pub(super) enum Told {
    Progress(String),
    Warning(String),
    Machine(Identity),
    Output(Stream, Vec<u8>),
    Phase(Phase, Duration),
    Kept(String, Duration),
}

pub(super) enum Message {
    Checked(StepId, Result<Standing, BuildError>),
    Event(StepId, Told),
    Ran(StepId, Result<Kept, BuildError>),
}

/// A run and what became of it.
pub(super) struct Kept {
    pub ran: Ran,
    pub not_kept: Option<String>,
    pub same: bool,
}

pub(super) enum Task {
    Check(StepId, Vec<(StepId, Digest)>),
    Run(StepId, Vec<(StepId, Digest)>, String),
}

/// One that does tasks until there are no more.
pub(super) struct Worker<'b, 'a, R> {
    pub checker: &'b Checker<'a, R>,
    pub keys: &'b BTreeMap<StepId, Key>,
    pub gate: &'b Gate,
    pub messages: SyncSender<Message>,
    /// What of SRCDIR no step is shown, found by whoever needs it first.
    pub hidden: &'b OnceLock<Vec<PathBytes>>,
}

impl<R: Runner> Worker<'_, '_, R> {
    /// Does them.
    pub fn work(&self, tasks: &Mutex<Receiver<Task>>) {
        loop {
            // Who waits for a task holds the lock; who has one has let go of it.
            let task = tasks.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let message = match task {
                Err(_) => return,
                Ok(Task::Check(id, needs)) => {
                    let standing = self.check(id, &needs);
                    Message::Checked(id, standing.inspect_err(|error| self.forget(error, &needs)))
                }
                Ok(Task::Run(id, needs, why)) => {
                    let kept = self.run(id, &needs, &why);
                    self.gate.leave(id);
                    Message::Ran(id, kept.inspect_err(|error| self.forget(error, &needs)))
                }
            };
            if self.messages.send(message).is_err() {
                return;
            }
        }
    }

    /// Where outputs of a needed step are lost, that step runs again next time, and puts them back.
    fn forget(&self, error: &BuildError, needs: &[(StepId, Digest)]) {
        self.checker.forget(error, needs, |need| self.keys.get(&need).map(Key::digest));
    }

    fn check(&self, id: StepId, needs: &[(StepId, Digest)]) -> Result<Standing, BuildError> {
        let Some(key) = self.keys.get(&id) else { return Ok(Standing::Must("it has no key".to_owned())) };
        let merges = || {
            self.gate.enter(id);
            Passed(self.gate, id)
        };
        self.checker.check(self.checker.build.plan.step(id), key, needs, &merges)
    }

    fn run(&self, id: StepId, needs: &[(StepId, Digest)], why: &str) -> Result<Kept, BuildError> {
        let build = self.checker.build;
        let planned = build.plan.step(id);
        let stamped_nanos = now_nanos();
        let mut step = self.checker.stage(id, needs, self.hidden)?;
        step.keep = build.runner.keep();

        let io = |source| BuildError::Io { what: "write a log in", path: build.store.temporary(), source };
        let mut log = build.store.blobs().writer().map_err(io)?;
        let mut log_error = None;
        let mut listen = |event: Event<'_>| {
            let told = match event {
                Event::Progress(text) => Told::Progress(text.to_owned()),
                Event::Warning(text) => Told::Warning(text.to_owned()),
                Event::Machine(identity) => Told::Machine(identity.clone()),
                Event::Output(stream, data) => {
                    log_error = log_error.take().or(log.write_all(data).err());
                    Told::Output(stream, data.to_vec())
                }
                Event::Phase(phase, time) => {
                    if phase == Phase::Record {
                        self.gate.enter(id);
                    }
                    Told::Phase(phase, time)
                }
                Event::Kept(name, idle) => Told::Kept(name.to_owned(), idle),
            };
            self.messages.send(Message::Event(id, told)).map_err(|_| io::ErrorKind::BrokenPipe.into())
        };
        let ran = build.runner.run(&step, &mut listen)?;
        if let Some(error) = log_error {
            return Err(io(error));
        }
        let (log, _) = log.finish().map_err(io)?;
        let key = self.keys.get(&id).cloned().unwrap_or_default();
        let (not_kept, same) = self.checker.keep(planned, &key, &ran, Some(log), why, stamped_nanos)?;
        Ok(Kept { ran, not_kept, same })
    }
}

/// Somebody who is inside the gate.
pub(super) struct Passed<'a>(&'a Gate, StepId);

impl Drop for Passed<'_> {
    fn drop(&mut self) {
        self.0.leave(self.1);
    }
}
