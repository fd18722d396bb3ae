//! What is done for a step on a thread of its own: the check, and the run from its view to its trace.

use std::io::{self, Write};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use kiln_digest::Digest;
use kiln_wire::Stream;

use super::BuildError;
use super::check::{Checker, Standing};
use super::gate::Gate;
use super::runner::{Ran, Runner};
use super::tasks::{Queue, Task};
use super::turns::Turns;
use crate::cache::Key;
use crate::clock::now_nanos;
use crate::engine::event::{Event, Phase};
use crate::machine::{Identity, PathBytes};
use crate::plan::StepId;
use crate::plan::graph::Command;

/// How long results of checks are kept back until others are there.
const SOON: Duration = Duration::from_millis(3);

/// An event of a step, on its way to the thread that tells it.
pub(super) enum Told {
    Progress(String),
    Warning(String),
    Machine(Identity),
    Output(Stream, Vec<u8>),
    /// With the moment at which it was over.
    Phase(Phase, Duration, Instant),
    Kept(String, Duration),
}

pub(super) enum Message {
    Checked(Vec<Checked>),
    Event(StepId, Told),
    Ran(StepId, Result<Kept, BuildError>),
    /// Its command did not begin, as the build ended before.
    CalledOff(StepId),
}

/// How a step stands.
pub(super) struct Checked {
    pub id: StepId,
    pub standing: Result<Standing, BuildError>,
    /// How much memory it took the last time, where it has to run.
    pub took: Option<u64>,
    /// How long it took to say so.
    pub lasted: Duration,
}

/// A run and what became of it.
pub(super) struct Kept {
    pub ran: Box<Ran>,
    pub not_kept: Option<String>,
    pub same: bool,
}

/// The keys of steps: of those that follow what others put out, once that is known.
pub(super) struct Keys(Vec<OnceLock<Arc<Key>>>);

impl Keys {
    /// Of so many steps, none of which is known yet.
    pub fn new(count: usize) -> Self {
        Self(vec![OnceLock::new(); count])
    }

    pub fn get(&self, id: StepId) -> Option<Arc<Key>> {
        self.0.get(id.0)?.get().cloned()
    }

    /// The first counts: a step has one key.
    pub fn set(&self, id: StepId, key: Arc<Key>) {
        let _ = self.0.get(id.0).map(|place| place.set(key));
    }
}

/// One that does tasks until there are no more.
pub(super) struct Worker<'b, 'a, R> {
    pub checker: &'b Checker<'a, R>,
    pub keys: &'b Keys,
    pub gate: &'b Gate,
    pub turns: &'b Turns,
    pub messages: SyncSender<Message>,
    /// What of SRCDIR no step is shown, found by whoever needs it first.
    pub hidden: &'b OnceLock<Vec<PathBytes>>,
}

impl<R: Runner> Worker<'_, '_, R> {
    /// Does them.
    pub fn work(&self, tasks: &Queue<Task>) {
        while let Some(task) = tasks.pop() {
            let message = match task {
                Task::Check(steps) => {
                    let (mut began, mut checked) = (Instant::now(), Vec::with_capacity(steps.len()));
                    for (id, needs) in steps {
                        checked.push(self.checked(id, &needs));
                        // Whoever can go on meanwhile is not kept waiting for those that take long.
                        if began.elapsed() > SOON {
                            began = Instant::now();
                            if self.messages.send(Message::Checked(std::mem::take(&mut checked))).is_err() {
                                return;
                            }
                        }
                    }
                    Message::Checked(checked)
                }
                Task::Run(id, needs, why) => {
                    // What is done here has a turn from the start; a machine takes one when it is set up.
                    let is_here = !self.checker.build.plan.step(id).command.is_run();
                    let may = if is_here { self.turns.take(id) } else { self.turns.prepare(id) };
                    let mut untold = Vec::new();
                    let kept = may.then(|| self.run(id, &needs, &why, &mut untold));
                    self.checker.let_go(&self.checker.build.plan.step(id).name);
                    self.gate.leave(id);
                    for told in untold {
                        // Nobody hears it where the build is over.
                        let _ = self.messages.send(Message::Event(id, told));
                    }
                    match kept {
                        Some(kept) if !self.turns.has_refused(id) => {
                            Message::Ran(id, kept.inspect_err(|error| self.forget(error, &needs)))
                        }
                        _ => Message::CalledOff(id),
                    }
                }
            };
            if self.messages.send(message).is_err() {
                return;
            }
        }
    }

    /// Where outputs of a needed step are lost, that step runs again next time, and puts them back.
    fn forget(&self, error: &BuildError, needs: &[(StepId, Digest)]) {
        self.checker.forget(error, needs, |need| self.keys.get(need).map(|key| key.digest()));
    }

    fn checked(&self, id: StepId, needs: &[(StepId, Digest)]) -> Checked {
        let began = Instant::now();
        let standing = self.check(id, needs).inspect_err(|error| self.forget(error, needs));
        if !matches!(standing, Ok(Standing::Must(_))) {
            self.checker.let_go(&self.checker.build.plan.step(id).name);
        }
        let took = match &standing {
            Ok(Standing::Must(_)) => self.checker.last_held_bytes(self.checker.build.plan.step(id)),
            _ => None,
        };
        Checked { id, standing, took, lasted: began.elapsed() }
    }

    fn check(&self, id: StepId, needs: &[(StepId, Digest)]) -> Result<Standing, BuildError> {
        let step = self.checker.build.plan.step(id);
        if matches!(step.command, Command::Sign) {
            return Ok(Standing::Must("signatures are made anew".to_owned()));
        }
        let key = match self.keys.get(id) {
            Some(key) => key,
            None => {
                let key = Arc::new(self.checker.late_key(id, needs)?);
                self.keys.set(id, Arc::clone(&key));
                key
            }
        };
        let merges = || Passed::enter(self.gate, id);
        self.checker.check(step, &key, needs, &merges)
    }

    /// Runs the step `id`. What there was to tell while it was inside the gate is left in `untold`.
    fn run(
        &self,
        id: StepId,
        needs: &[(StepId, Digest)],
        why: &str,
        untold: &mut Vec<Told>,
    ) -> Result<Kept, BuildError> {
        let build = self.checker.build;
        let planned = build.plan.step(id);
        let stamped_nanos = now_nanos();
        match &planned.command {
            Command::Make(makes) => return self.make(id, makes, needs, why),
            Command::Sign => return self.sign(id),
            Command::Boot(boot) => return self.boot(id, boot, needs, why),
            Command::Text(_) | Command::Script(_) => {}
        }
        let mut step = self.checker.stage(id, needs, self.hidden)?;
        step.keep = build.runner.keep();

        let io = |source| BuildError::Io { what: "write a log in", path: build.store.temporary(), source };
        let mut log = build.store.blobs().writer().map_err(io)?;
        let (mut log_error, mut is_inside) = (None, false);
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
                    match phase {
                        // All that its machine was for is done.
                        Phase::Collect => self.turns.give_back(id),
                        Phase::Record => {
                            self.gate.enter(id);
                            is_inside = true;
                        }
                        _ => {}
                    }
                    Told::Phase(phase, time, Instant::now())
                }
                Event::Kept(name, idle) => Told::Kept(name.to_owned(), idle),
            };
            if is_inside {
                untold.push(told);
                return Ok(());
            }
            let is_ready = matches!(told, Told::Phase(Phase::Setup, ..));
            let sent = self.messages.send(Message::Event(id, told));
            if is_ready && !self.turns.take(id) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            sent.map_err(|_| io::ErrorKind::BrokenPipe.into())
        };
        let ran = build.runner.run(&step, &mut listen);
        let log = match log_error {
            Some(error) => Err(error),
            None => log.finish().map(|(log, _)| log),
        };
        match ran {
            Ok(ran) => {
                let log = log.map_err(io)?;
                self.keep(id, ran, Some(log), why, stamped_nanos)
            }
            Err(error) => {
                let error = BuildError::from(error);
                // What it printed may be lost too: that it failed is what is told.
                if let Ok(log) = log
                    && error.is_of_a_command()
                    && !self.turns.has_refused(id)
                {
                    self.gate.enter(id);
                    self.checker.note_error(
                        planned,
                        &self.keys.get(id).unwrap_or_default(),
                        log,
                        why,
                        &error,
                    );
                }
                Err(error)
            }
        }
    }

    /// Keeps what came of the step `id`, which began at `stamped_nanos` and printed `log`; also where WORK refuses its outputs: it
    /// need not run again for WORK to have them.
    pub(super) fn keep(
        &self,
        id: StepId,
        ran: Ran,
        log: Option<Digest>,
        why: &str,
        stamped_nanos: i64,
    ) -> Result<Kept, BuildError> {
        let (step, key) = (self.checker.build.plan.step(id), self.keys.get(id).unwrap_or_default());
        let mut ran = Ran { log, ..ran };
        let kept = self.checker.keep(step, &key, &ran, why, stamped_nanos);
        if let Some(error) = ran.unmerged.take() {
            return Err(error.into());
        }
        let (not_kept, same) = kept?;
        Ok(Kept { ran: Box::new(ran), not_kept, same })
    }
}

/// Somebody who is inside the gate.
pub(super) struct Passed<'a>(&'a Gate, StepId);

impl<'a> Passed<'a> {
    /// `id`, once it has entered.
    pub fn enter(gate: &'a Gate, id: StepId) -> Self {
        gate.enter(id);
        Self(gate, id)
    }
}

impl Drop for Passed<'_> {
    fn drop(&mut self) {
        self.0.leave(self.1);
    }
}
