//! Which step comes next, and when: each as soon as what it needs is there, as many at once as jobs and memory allow.
//!
//! One thread, the caller's, owns the state of the build and tells the news. Workers check and run steps and send messages;
//! what a worker changes for others is on disk, whole or not at all.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::sync::{Mutex, OnceLock};
use std::thread;

use kiln_digest::Digest;
use serde_json::json;

use super::check::{Checker, Standing};
use super::gate::Gate;
use super::meminfo::available_bytes;
use super::runner::Runner;
use super::worker::{Kept, Message, Task, Told, Worker};
use super::{Build, BuildError, News, Outcome, Summary, Timeline, lower};
use crate::engine::error::RunError;
use crate::engine::event::Event;
use crate::plan::StepId;

/// Most messages under way: a step that prints faster than that is told waits.
const MESSAGES: usize = 256;

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
    states: Vec<State>,
    outputs: Vec<Option<Digest>>,
    /// Whether it ran, or would.
    ran: Vec<bool>,
    needed_by: Vec<Vec<StepId>>,
    queue: VecDeque<(StepId, String)>,
    checks: VecDeque<StepId>,
    running: BTreeMap<StepId, usize>,
    checking: usize,
    failed: bool,
    available_bytes: u64,
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
            let made = std::fs::create_dir_all(work);
            made.map_err(|source| BuildError::Io { what: "make", path: work.clone(), source })?;
            crate::engine::merge::recover(self.store, work)?;
        }
        let hidden = lower::hidden(self.settings, &self.plan.ignore);
        let checker = Checker::new(self, hidden);
        let mut keys = BTreeMap::new();
        let mut memory = BTreeMap::new();
        for id in wanted {
            let lowered = self.lower(*id, &mut |text| {
                let _ = news(News::Event(&self.plan.step(*id).name, &Event::Progress(text)));
            })?;
            memory.insert(*id, lowered.step.memory_bytes);
            keys.insert(*id, lowered.key);
        }
        let mut schedule = Schedule::new(self, wanted, &memory);
        let workers = self.options.jobs.max(thread::available_parallelism().map_or(1, usize::from));
        let (task_sender, tasks) = channel::<Task>();
        let tasks = Mutex::new(tasks);
        let (sender, messages) = sync_channel(MESSAGES);
        let hidden_paths = OnceLock::new();
        thread::scope(|scope| {
            for _ in 0..workers.min(wanted.len()) {
                let messages = sender.clone();
                let worker = Worker { checker: &checker, keys: &keys, gate, messages, hidden: &hidden_paths };
                let tasks = &tasks;
                scope.spawn(move || worker.work(tasks));
            }
            drop(sender);
            // Given away, so that the workers end when all is done.
            let result = schedule.attend(task_sender, &messages, timeline, news);
            // Whoever still has something to say must not wait for somebody to hear it.
            drop(messages);
            result
        })?;
        schedule.summary.total = timeline.elapsed();
        let outputs = schedule.outputs.iter().enumerate();
        schedule.summary.outputs = outputs.filter_map(|(id, out)| out.map(|out| (StepId(id), out))).collect();
        Ok(schedule.summary)
    }

    /// The step `id` as it is run, without its view, and its key.
    ///
    /// # Errors
    /// [`BuildError`] where its root or kernel cannot be had, or its environment not be made.
    pub fn lower(&self, id: StepId, progress: &mut dyn FnMut(&str)) -> Result<lower::Lowered, BuildError> {
        let planned = self.plan.step(id);
        let step = lower::lower(planned, self.settings, &self.folder, self.options.overwrite);
        let host = self.runner.identify(&step, progress)?;
        let key = lower::key(planned, &step, self.settings, &self.plan.ignore, &self.sources, host);
        Ok(lower::Lowered { key: key.map_err(RunError::from)?, step })
    }
}

impl<'b, 'a, R: Runner> Schedule<'b, 'a, R> {
    fn new(build: &'b Build<'a, R>, wanted: &BTreeSet<StepId>, memory: &'b BTreeMap<StepId, u64>) -> Self {
        let count = build.plan.steps.len();
        let mut schedule = Self {
            build,
            memory,
            states: vec![State::Unwanted; count],
            outputs: vec![None; count],
            ran: vec![false; count],
            needed_by: vec![Vec::new(); count],
            queue: VecDeque::new(),
            checks: VecDeque::new(),
            running: BTreeMap::new(),
            checking: 0,
            failed: false,
            available_bytes: available_bytes(),
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

    /// What the steps that `id` needs have put out.
    fn needs(&self, id: StepId) -> Vec<(StepId, Digest)> {
        let needs = self.build.plan.step(id).needs.iter();
        needs.filter_map(|need| self.outputs[need.0].map(|outputs| (*need, outputs))).collect()
    }

    /// Hands out what can be done, until all is done.
    fn attend(
        &mut self,
        tasks: Sender<Task>,
        messages: &Receiver<Message>,
        timeline: &mut Timeline,
        news: &mut dyn FnMut(News<'_>) -> io::Result<()>,
    ) -> Result<(), BuildError> {
        let told = |source| RunError::Session(crate::agent::SessionError::Output(source));
        loop {
            let stops = self.failed && !self.build.options.keep_going;
            while !stops && let Some(id) = self.checks.pop_front() {
                self.hand_out_check(id, &tasks, timeline, news);
            }
            while !stops && let Some((id, why)) = self.next_to_run() {
                let _ = news(News::Starts(&self.build.plan.step(id).name, &why));
                self.states[id.0] = State::Runs;
                self.running.insert(id, timeline.take_lane());
                let _ = tasks.send(Task::Run(id, self.needs(id), why));
            }
            if self.running.is_empty() && self.checking == 0 {
                break;
            }
            let Ok(message) = messages.recv() else { break };
            match message {
                Message::Event(id, event) => self.tell(id, event, timeline, news).map_err(told)?,
                Message::Checked(id, standing) => {
                    self.checking -= 1;
                    self.checked(id, standing, timeline, news);
                }
                Message::Ran(id, kept) => self.over(id, kept, timeline, news),
            }
        }
        for index in 0..self.states.len() {
            if matches!(self.states[index], State::Waits(_) | State::Checks | State::Queued) {
                self.end(StepId(index), Outcome::Skipped, timeline, news);
            }
        }
        Ok(())
    }

    fn hand_out_check(
        &mut self,
        id: StepId,
        tasks: &Sender<Task>,
        timeline: &mut Timeline,
        news: &mut dyn FnMut(News<'_>) -> io::Result<()>,
    ) {
        self.states[id.0] = State::Checks;
        let step = self.build.plan.step(id);
        let would_run = step.needs.iter().find(|need| self.ran[need.0]);
        if let (true, Some(need)) = (self.build.options.dry_run, would_run) {
            // What it will see is not known before.
            let name = &self.build.plan.step(*need).name;
            let _ =
                news(News::Starts(&step.name, &format!("step `{name}`, which it needs, has to run first")));
            self.ran[id.0] = true;
            self.end(id, Outcome::WouldRun, timeline, news);
            return;
        }
        self.checking += 1;
        let _ = tasks.send(Task::Check(id, self.needs(id)));
    }

    /// The next step that has to run, if one may now.
    fn next_to_run(&mut self) -> Option<(StepId, String)> {
        if self.running.len() >= self.build.options.jobs {
            return None;
        }
        let memory = |id: &StepId| self.memory.get(id).copied().unwrap_or(0);
        let (next, _) = self.queue.front()?;
        let taken: u64 = self.running.keys().map(memory).sum();
        let room = self.available_bytes.saturating_sub(taken).min(available_bytes());
        if !self.running.is_empty() && memory(next) > room {
            return None;
        }
        self.queue.pop_front()
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
            Told::Phase(phase, time) => {
                let lane = self.running.get(&id).copied().unwrap_or(0);
                timeline.span(phase.name(), "phase", lane, *time, json!({"step": name}));
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
                    Some(_) => Outcome::CommandFailed(Box::new(ran)),
                    None => Outcome::Ran { ran: Box::new(ran), not_kept, same },
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
        if let Some(lane) = self.running.remove(&id) {
            timeline.free_lane(lane);
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
