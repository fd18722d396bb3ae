//! Which step comes next, and when: each as soon as what it needs is there, as many at once as jobs and memory allow, and
//! some more that are got ready for their turn.
//!
//! One thread, the caller's, owns the state of the build and tells the news. Workers check and run steps and send messages;
//! what a worker changes for others is on disk, whole or not at all.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::iter;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use kiln_digest::Digest;

use super::admission::Admission;
use super::check::{Checker, Standing};
use super::gate::Gate;
use super::runner::Runner;
use super::tasks::{AWAKE, Ending, Queue, Task, Tasks, soon};
use super::turns::Turns;
use super::worker::{Checked, Kept, Keys, Message, Told, Worker};
use super::{Build, BuildError, News, Outcome, Summary, Timeline, boot_step, lower};
use crate::engine::error::RunError;
use crate::engine::event::{Event, Phase};
use crate::engine::host::network_of;
use crate::plan::StepId;
use crate::plan::graph::Command;
use crate::plan::recipe::NetworkWord;
use crate::threads;
use crate::writes;

/// Most messages under way: a step that prints faster than that is told waits.
const MESSAGES: usize = 256;

/// Most steps that are checked as one task.
const MOST_CHECKS: usize = 16;

/// How many roots with their kernels are kept in mind while keys are made.
const MOST_WORLDS: usize = 64;

/// How long checks wait for more of them, while all jobs are taken.
const GATHERING: Duration = Duration::from_millis(3);

/// Where each step is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Unwanted,
    /// It waits for so many that it needs.
    Waits(usize),
    Checks,
    /// It has to run, and waits for its turn.
    Queued,
    Runs,
    Good,
    Bad,
}

struct Schedule<'b, 'a, R> {
    build: &'b Build<'a, R>,
    memory: &'b BTreeMap<StepId, u64>,
    processors: usize,
    states: Vec<State>,
    outputs: Vec<Option<Digest>>,
    /// Whether it ran, or would.
    ran: Vec<bool>,
    needed_by: Vec<Vec<StepId>>,
    queue: VecDeque<(StepId, String)>,
    checks: VecDeque<StepId>,
    /// Steps that were handed out to be run, each with its lane.
    running: BTreeMap<StepId, usize>,
    /// Those of them that need no machine any more.
    leaving: BTreeSet<StepId>,
    checking: usize,
    failed: bool,
    /// What steps that have to run took of memory the last time.
    took: BTreeMap<StepId, u64>,
    admission: Admission,
    summary: Summary,
}

impl<R: Runner> Build<'_, R> {
    /// Builds the steps `wanted`, which have all that they need among them, and tells `news` how it goes. An error of `news`
    /// about output ends the build.
    ///
    /// # Errors
    /// [`BuildError`] of what concerns no single step; what does is in the summary.
    pub fn run(
        &self,
        wanted: &BTreeSet<StepId>,
        gate: &Gate,
        timeline: &mut Timeline,
        news: &mut dyn FnMut(News<'_>) -> io::Result<()>,
    ) -> Result<Summary, BuildError> {
        let work = &self.settings.work.value;
        if !self.options.dry_run {
            let mut steps = wanted.iter().map(|id| self.plan.step(*id));
            if let Some(step) = steps.find(|step| step.network == NetworkWord::Full) {
                network_of(self.settings, &step.name).map_err(RunError::from)?;
            }
            let made = writes::make_folders(work);
            made.map_err(|source| BuildError::Io { what: "make", path: work.clone(), source })?;
            crate::engine::merge::recover(self.store, work)?;
        }
        let hidden = lower::hidden(self.settings, &self.plan.ignore)?;
        let checker = Checker::new(self, hidden);
        let processors = thread::available_parallelism().map_or(1, usize::from);
        let keys = Keys::new(self.plan.steps.len());
        self.make_keys(wanted, &keys, processors, news)?;
        let memory = wanted.iter().map(|id| {
            let planned = self.plan.step(*id);
            let bytes = match &planned.command {
                Command::Boot(_) => boot_step::memory_bytes(planned),
                command if command.is_run() => lower::memory_bytes(planned),
                _ => 0,
            };
            (*id, bytes)
        });
        let memory = memory.collect();
        let jobs = self.options.jobs;
        let mut schedule = Schedule::new(self, wanted, &memory, processors);
        let turns = Turns::new(jobs);
        let tasks = Tasks::default();
        // As many steps may be over and not kept yet as run.
        let runners = jobs.saturating_add(self.runner.ahead(jobs)).saturating_add(jobs);
        let (sender, messages) = sync_channel(MESSAGES);
        let hidden = OnceLock::new();
        thread::scope(|scope| {
            // The workers end when all is done.
            let _ending = Ending(&tasks, &turns);
            for (queue, workers) in [(&tasks.checks, processors), (&tasks.runs, runners)] {
                for count in 0..workers.min(wanted.len()) {
                    let (messages, turns, hidden) = (sender.clone(), &turns, &hidden);
                    let worker = Worker { checker: &checker, keys: &keys, gate, turns, messages, hidden };
                    // Fewer check and run fewer at once; without any, nothing would ever be done.
                    match threads::start_in(scope, "worker", move || worker.work(queue)) {
                        Ok(_) => {}
                        Err(_) if count > 0 => break,
                        Err(source) => return Err(RunError::Io { what: "start a worker", source }.into()),
                    }
                }
            }
            drop(sender);
            let result = schedule.attend(&tasks, &turns, &messages, timeline, news);
            // Whoever still has something to say must not wait for somebody to hear it.
            drop(messages);
            result
        })?;
        schedule.summary.total = timeline.elapsed();
        let outputs = schedule.outputs.iter().enumerate();
        schedule.summary.outputs = outputs.filter_map(|(id, out)| out.map(|out| (StepId(id), out))).collect();
        Ok(schedule.summary)
    }

    /// Makes the keys of those steps `wanted` that have one before anything else is done.
    fn make_keys(
        &self,
        wanted: &BTreeSet<StepId>,
        keys: &Keys,
        processors: usize,
        news: &mut dyn FnMut(News<'_>) -> io::Result<()>,
    ) -> Result<(), BuildError> {
        let make = |id: StepId, progress: &mut dyn FnMut(&str)| {
            keys.set(id, Arc::new(self.lower(id, progress)?.key));
            Ok(())
        };
        // Whatever takes long, and is told, is done for the first of each root and kernel.
        let mut seen = Vec::new();
        let mut rest = VecDeque::new();
        let known = wanted.iter().map(|id| (*id, self.plan.step(*id)));
        for (id, planned) in known.filter(|(_, planned)| !planned.follows_outputs()) {
            let world = (&planned.root, &planned.kernel, planned.untrusted);
            if seen.contains(&world) {
                rest.push_back(id);
            } else {
                make(id, &mut |text| {
                    let _ = news(News::Event(&planned.name, &Event::Progress(text)));
                })?;
                seen.truncate(MOST_WORLDS - 1);
                seen.push(world);
            }
        }
        let (rest, failure) = (Mutex::new(rest), Mutex::new(None));
        let next = || rest.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        threads::share(processors, "keys", || {
            while let Some(id) = next() {
                if let Err(error) = make(id, &mut |_| {}) {
                    failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    break;
                }
            }
        });
        failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    /// The step `id` as it is run, without its view, and its key.
    ///
    /// # Errors
    /// [`BuildError`] where its root or kernel cannot be had, or its environment not be made.
    pub fn lower(&self, id: StepId, progress: &mut dyn FnMut(&str)) -> Result<lower::Lowered, BuildError> {
        let planned = self.plan.step(id);
        let step = lower::lower(
            planned,
            self.settings,
            &self.folder,
            self.options.overwrite,
            &lower::Found::default(),
        );
        let host = self.runner.identify(&step, progress)?;
        let key = lower::key(planned, &step, self.settings, &self.plan.ignore, &self.sources, host);
        let of_step = |source| BuildError::Environment { step: planned.name.clone(), source };
        Ok(lower::Lowered { key: key.map_err(of_step)?, step })
    }
}

impl<'b, 'a, R: Runner> Schedule<'b, 'a, R> {
    fn new(
        build: &'b Build<'a, R>,
        wanted: &BTreeSet<StepId>,
        memory: &'b BTreeMap<StepId, u64>,
        processors: usize,
    ) -> Self {
        let count = build.plan.steps.len();
        let mut schedule = Self {
            build,
            memory,
            processors,
            states: vec![State::Unwanted; count],
            outputs: vec![None; count],
            ran: vec![false; count],
            needed_by: vec![Vec::new(); count],
            queue: VecDeque::new(),
            checks: VecDeque::new(),
            running: BTreeMap::new(),
            leaving: BTreeSet::new(),
            checking: 0,
            failed: false,
            took: BTreeMap::new(),
            admission: Admission::new(build.store.run()),
            summary: Summary::default(),
        };
        for (id, outputs) in &build.given {
            schedule.outputs[id.0] = Some(*outputs);
            schedule.states[id.0] = State::Good;
        }
        for id in wanted {
            let needs = build.plan.step(*id).needs.iter().filter(|need| !build.given.contains_key(need));
            let mut open = 0;
            for need in needs {
                schedule.needed_by[need.0].push(*id);
                open += 1;
            }
            schedule.states[id.0] = State::Waits(open);
            if open == 0 {
                schedule.checks.push_back(*id);
            }
        }
        schedule
    }

    /// Whether no further step begins.
    fn stops(&self) -> bool {
        self.failed && !self.build.options.keep_going
    }

    /// What the steps that `id` needs have put out.
    fn needs(&self, id: StepId) -> Vec<(StepId, Digest)> {
        let needs = self.build.plan.step(id).needs.iter();
        needs.filter_map(|need| self.outputs[need.0].map(|outputs| (*need, outputs))).collect()
    }

    /// Hands out what can be done, until all is done.
    fn attend(
        &mut self,
        tasks: &Tasks,
        turns: &Turns,
        messages: &Receiver<Message>,
        timeline: &mut Timeline,
        news: &mut dyn FnMut(News<'_>) -> io::Result<()>,
    ) -> Result<(), BuildError> {
        let mut is_late = false;
        loop {
            let stops = self.stops();
            if !stops && (is_late || !self.may_gather_checks()) {
                self.hand_out_checks(&tasks.checks, timeline, news);
            }
            while !stops && let Some((id, why)) = self.next_to_run() {
                let name = &self.build.plan.step(id).name;
                let _ = news(News::Starts(name, &why));
                self.states[id.0] = State::Runs;
                self.running.insert(id, timeline.begin(name));
                tasks.runs.push(Task::Run(id, self.needs(id), why));
            }
            if self.running.is_empty() && self.checking == 0 {
                break;
            }
            self.admission.settle();
            let gathers = !stops && !self.checks.is_empty();
            let first = soon(AWAKE, || messages.try_recv().ok()).map_or_else(
                || match gathers {
                    true => messages.recv_timeout(GATHERING),
                    false => messages.recv().map_err(RecvTimeoutError::from),
                },
                Ok,
            );
            is_late = matches!(first, Err(RecvTimeoutError::Timeout));
            match first {
                Ok(first) => {
                    // All that is there, before anything more is handed out.
                    for message in iter::once(first).chain(messages.try_iter().take(MESSAGES)) {
                        self.hear(message, turns, timeline, news)?;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        for index in 0..self.states.len() {
            if matches!(self.states[index], State::Waits(_) | State::Checks | State::Queued) {
                self.end(StepId(index), Outcome::Skipped, timeline, news);
            }
        }
        Ok(())
    }

    /// Whether checks may wait for more of them: every processor has what to do, and so it will be when a step is over.
    fn may_gather_checks(&self) -> bool {
        self.checks.len() < MOST_CHECKS && !self.queue.is_empty() && !self.running.is_empty()
    }

    /// What a worker says.
    fn hear(
        &mut self,
        message: Message,
        turns: &Turns,
        timeline: &mut Timeline,
        news: &mut dyn FnMut(News<'_>) -> io::Result<()>,
    ) -> Result<(), BuildError> {
        let told = |source| RunError::Session(crate::agent::SessionError::Output(source));
        let mut over = None;
        match message {
            Message::Event(id, event) => self.tell(id, event, timeline, news).map_err(told)?,
            Message::Checked(steps) => {
                for Checked { id, standing, took, lasted } in steps {
                    self.checking -= 1;
                    self.took.extend(took.map(|took| (id, took)));
                    let name = &self.build.plan.step(id).name;
                    timeline.check(name, lasted);
                    let _ = news(News::Checked(name, lasted));
                    self.checked(id, standing, timeline, news);
                }
            }
            Message::Ran(id, kept) => {
                over = Some(id);
                self.over(id, kept, timeline, news);
            }
            Message::CalledOff(id) => self.end(id, Outcome::Skipped, timeline, news),
        }
        if self.stops() {
            turns.end();
        }
        // Only now: nobody begins who would have waited for a step that failed.
        if let Some(id) = over {
            turns.give_back(id);
        }
        Ok(())
    }

    /// Hands out all checks that can be done: some at a time, but enough pieces for all processors.
    fn hand_out_checks(
        &mut self,
        checks: &Queue<Task>,
        timeline: &mut Timeline,
        news: &mut dyn FnMut(News<'_>) -> io::Result<()>,
    ) {
        let pieces = 4 * self.processors;
        let at_once = self.checks.len().div_ceil(pieces).clamp(1, MOST_CHECKS);
        let mut piece = Vec::new();
        while let Some(id) = self.checks.pop_front() {
            if self.is_to_be_checked(id, timeline, news) {
                piece.push((id, self.needs(id)));
            }
            if piece.len() == at_once || self.checks.is_empty() && !piece.is_empty() {
                checks.push(Task::Check(std::mem::take(&mut piece)));
            }
        }
    }

    /// Whether the step `id` is to be checked: a dry run knows of some that they would run.
    fn is_to_be_checked(
        &mut self,
        id: StepId,
        timeline: &mut Timeline,
        news: &mut dyn FnMut(News<'_>) -> io::Result<()>,
    ) -> bool {
        self.states[id.0] = State::Checks;
        let step = self.build.plan.step(id);
        let would_run = step.needs.iter().find(|need| self.ran[need.0]);
        if let (true, Some(need)) = (self.build.options.dry_run, would_run) {
            // What it will see is not known before.
            let name = &self.build.plan.step(*need).name;
            // That one may put out what it put out before, as signing does, and then this one does not run.
            let why = format!(
                "step `{name}`, which it needs, has to run first, and whether this one has to is known then"
            );
            let _ = news(News::Starts(&step.name, &why));
            self.ran[id.0] = true;
            self.end(id, Outcome::WouldRun, timeline, news);
            return false;
        }
        self.checking += 1;
        let _ = news(News::Checks(&step.name));
        true
    }

    /// The next step that has to run, if one may now.
    fn next_to_run(&mut self) -> Option<(StepId, String)> {
        let jobs = self.build.options.jobs;
        if self.running.len() - self.leaving.len() >= jobs.saturating_add(self.build.runner.ahead(jobs)) {
            return None;
        }
        let (next, _) = self.queue.front()?;
        let declared_bytes = self.memory.get(next).copied().unwrap_or(0);
        match self.admission.admit(*next, declared_bytes, self.took.get(next).copied()) {
            true => self.queue.pop_front(),
            false => None,
        }
    }

    fn tell(
        &mut self,
        id: StepId,
        told: Told,
        timeline: &mut Timeline,
        news: &mut dyn FnMut(News<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        let name = &self.build.plan.step(id).name;
        let event = match &told {
            Told::Progress(text) => Event::Progress(text),
            Told::Warning(text) => Event::Warning(text),
            Told::Machine(identity) => Event::Machine(identity),
            Told::Output(stream, data) => Event::Output(*stream, data),
            Told::Phase(phase, time, ended) => {
                if *phase == Phase::Collect {
                    self.leaving.insert(id);
                }
                if let Some(lane) = self.running.get(&id) {
                    timeline.phase(*lane, *phase, *time, *ended);
                }
                Event::Phase(*phase, *time)
            }
            Told::Kept(name, idle) => Event::Kept(name, *idle),
        };
        news(News::Event(name, &event))
    }

    fn checked(
        &mut self,
        id: StepId,
        standing: Result<Standing, BuildError>,
        timeline: &mut Timeline,
        news: &mut dyn FnMut(News<'_>) -> io::Result<()>,
    ) {
        match standing {
            Ok(Standing::Holds { outputs, restored, .. }) => {
                self.outputs[id.0] = Some(outputs);
                let cut_off = self.build.plan.step(id).needs.iter().any(|need| self.ran[need.0]);
                self.end(id, Outcome::UpToDate { cut_off, restored }, timeline, news);
            }
            Ok(Standing::Must(why)) if self.build.options.dry_run => {
                self.ran[id.0] = true;
                let _ = news(News::Starts(&self.build.plan.step(id).name, &why));
                self.end(id, Outcome::WouldRun, timeline, news);
            }
            Ok(Standing::Must(why)) => {
                self.states[id.0] = State::Queued;
                self.queue.push_back((id, why));
            }
            Err(error) => self.end(id, Outcome::Failed(Box::new(error)), timeline, news),
        }
    }

    fn over(
        &mut self,
        id: StepId,
        kept: Result<Kept, BuildError>,
        timeline: &mut Timeline,
        news: &mut dyn FnMut(News<'_>) -> io::Result<()>,
    ) {
        self.ran[id.0] = true;
        let outcome = match kept {
            Err(error) => Outcome::Failed(Box::new(error)),
            Ok(Kept { ran, not_kept, same }) => {
                self.summary.commands += ran.command;
                self.outputs[id.0] = ran.outputs;
                match ran.failure() {
                    Some(_) => Outcome::CommandFailed(ran),
                    None => Outcome::Ran { ran, not_kept, same },
                }
            }
        };
        self.end(id, outcome, timeline, news);
    }

    /// A step is over, however: those that need it can go on, or cannot.
    fn end(
        &mut self,
        id: StepId,
        outcome: Outcome,
        timeline: &mut Timeline,
        news: &mut dyn FnMut(News<'_>) -> io::Result<()>,
    ) {
        let name = &self.build.plan.step(id).name;
        self.leaving.remove(&id);
        let held_bytes = match &outcome {
            Outcome::Ran { ran, .. } | Outcome::CommandFailed(ran) => ran.held_bytes,
            _ => None,
        };
        self.admission.release(id, held_bytes);
        if let Some(lane) = self.running.remove(&id) {
            timeline.end(lane, &outcome);
        }
        let _ = news(News::Ends(name, &outcome));
        let is_good = outcome.is_good();
        self.states[id.0] = if is_good { State::Good } else { State::Bad };
        self.failed |= matches!(outcome, Outcome::Failed(_) | Outcome::CommandFailed(_));
        self.summary.outcomes.push((name.clone(), outcome));
        if is_good {
            for next in self.needed_by[id.0].clone() {
                if let State::Waits(count) = self.states[next.0] {
                    self.states[next.0] = State::Waits(count - 1);
                    if count == 1 {
                        self.checks.push_back(next);
                    }
                }
            }
            return;
        }
        // On a list, not by recursion: a chain may be long.
        let mut open = self.needed_by[id.0].clone();
        while let Some(next) = open.pop() {
            if matches!(self.states[next.0], State::Waits(_)) {
                self.states[next.0] = State::Bad;
                let name = &self.build.plan.step(next).name;
                let _ = news(News::Ends(name, &Outcome::Skipped));
                self.summary.outcomes.push((name.clone(), Outcome::Skipped));
                open.extend(&self.needed_by[next.0]);
            }
        }
    }
}
