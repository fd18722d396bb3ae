//! What a build shows: a line for what matters, each step's output with its name before it, and a report at the end.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use kiln_wire::Stream;
use serde_json::{Value, json};

use super::again::StepCommands;
use super::keep;
use super::run::as_json;
use super::show::{self, Narrator, chain, line, try_line};
use super::{Failure, USAGE};
use crate::engine::build::{BuildError, News, Outcome, Ran, Summary};
use crate::engine::{Event, Phase};
use crate::plan::{show_bytes, show_duration};
use crate::settings::Settings;

/// How much of a failed step's output is shown again where it was not shown before.
const TAIL_LINES: usize = 20;
/// The longest line that is held back until its end comes.
const LONGEST_LINE_BYTES: usize = 8 << 10;
/// How many steps the end report names as those that took longest.
const SLOWEST: usize = 3;

/// Shows a build.
pub(super) struct Reporter {
    narrator: Narrator,
    quiet: bool,
    json: bool,
    steps: usize,
    ended: usize,
    /// Output whose line has not ended yet, by step and stream.
    pending: BTreeMap<(String, bool), Vec<u8>>,
    tails: BTreeMap<String, Vec<String>>,
    phases: BTreeMap<&'static str, Duration>,
    read: (u64, u64),
    has_named_machine: bool,
    /// What to say of failed steps of a recipe.
    commands: Option<(StepCommands, String)>,
    /// Machines of failed steps, by step.
    kept: BTreeMap<String, (String, Duration)>,
}

/// The exit code that says what failed.
pub(super) fn code_of(error: &BuildError) -> u8 {
    match error {
        BuildError::Run(crate::engine::RunError::Host(host)) => match host.as_ref() {
            crate::engine::HostError::Boundary { .. } | crate::engine::HostError::NoAgent { .. } => {
                super::CANNOT
            }
            _ => super::FAILED,
        },
        BuildError::Run(crate::engine::RunError::Input(_)) => USAGE,
        _ => super::FAILED,
    }
}

impl Reporter {
    /// One for a build of so many steps.
    pub fn new(quiet: bool, json: bool, steps: usize) -> Self {
        Self {
            narrator: Narrator::new(quiet || json),
            quiet,
            json,
            steps,
            ended: 0,
            pending: BTreeMap::new(),
            tails: BTreeMap::new(),
            phases: BTreeMap::new(),
            read: (0, 0),
            has_named_machine: false,
            commands: None,
            kept: BTreeMap::new(),
        }
    }

    /// Says of failed steps how they are done again and entered. `store` are the words that name the store.
    pub fn with_commands(self, commands: StepCommands, store: String) -> Self {
        Self { commands: Some((commands, store)), ..self }
    }

    /// Something slow is going on before the first step.
    pub fn progress(&mut self, text: &str) {
        self.narrator.progress(text);
    }

    /// A line that stays.
    pub fn say(&mut self, text: &str) {
        self.narrator.say(text);
    }

    /// Shows the news.
    pub fn tell(&mut self, news: &News<'_>) -> io::Result<()> {
        if let News::Event(_, Event::Phase(phase, time)) = news {
            *self.phases.entry(phase.name()).or_default() += *time;
        }
        if let News::Ends(_, Outcome::Ran { ran, .. }) = news {
            let contents = ran.shares.iter().flat_map(|share| &share.entries).filter(|entry| {
                entry.kind == kiln_virtio::fs::record::Kind::Regular && entry.content.is_some()
            });
            for entry in contents {
                self.read = (self.read.0 + 1, self.read.1 + entry.fingerprint.size_bytes);
            }
        }
        if self.json {
            return try_line(&self.json_of(news).to_string());
        }
        match news {
            News::Starts(step, why) => self.narrator.say(&format!("{step}: {why}")),
            News::Event(step, event) => self.event(step, event)?,
            News::Ends(step, outcome) => self.ends(step, outcome),
        }
        Ok(())
    }

    fn event(&mut self, step: &str, event: &Event<'_>) -> io::Result<()> {
        match event {
            Event::Progress(text) => self.narrator.progress(&format!("{step}: {text}")),
            Event::Warning(text) => self.narrator.warn(&format!("{step}: {text}")),
            // One line says it for all.
            Event::Machine(identity) if !std::mem::replace(&mut self.has_named_machine, true) => {
                self.narrator.say(&identity.to_string());
            }
            Event::Output(stream, data) => {
                let key = (step.to_owned(), *stream == Stream::Stderr);
                let mut pending = self.pending.remove(&key).unwrap_or_default();
                for piece in data.split_inclusive(|byte| *byte == b'\n') {
                    pending.extend_from_slice(piece);
                    if piece.ends_with(b"\n") || pending.len() > LONGEST_LINE_BYTES {
                        self.output(step, &std::mem::take(&mut pending));
                    }
                }
                if !pending.is_empty() {
                    self.pending.insert(key, pending);
                }
            }
            Event::Kept(name, idle) => {
                self.kept.insert(step.to_owned(), ((*name).to_owned(), *idle));
            }
            Event::Machine(_) | Event::Phase(Phase::Prepare, _) | Event::Phase(..) => {}
        }
        Ok(())
    }

    fn output(&mut self, step: &str, bytes: &[u8]) {
        let text = String::from_utf8_lossy(bytes);
        let text = text.trim_end_matches(['\n', '\r']);
        if self.quiet {
            let tail = self.tails.entry(step.to_owned()).or_default();
            if tail.len() == TAIL_LINES {
                tail.remove(0);
            }
            tail.push(text.to_owned());
        } else {
            self.narrator.show(&format!("{step} | {text}"));
        }
    }

    fn ends(&mut self, step: &str, outcome: &Outcome) {
        self.ended += 1;
        for stream in [false, true] {
            if let Some(rest) = self.pending.remove(&(step.to_owned(), stream)) {
                self.output(step, &rest);
            }
        }
        let tail = self.tails.remove(step).unwrap_or_default();
        let of = format!("[{}/{}]", self.ended, self.steps);
        match outcome {
            Outcome::UpToDate { restored: 0, .. } | Outcome::Skipped | Outcome::WouldRun => {}
            Outcome::UpToDate { restored, .. } => {
                self.narrator.say(&format!("{of} {step}: up to date; {restored} outputs put back into WORK"));
            }
            Outcome::Ran { ran, not_kept, same } => {
                let same = if *same { ", as before" } else { "" };
                let took = show_duration(ran.command);
                self.narrator
                    .say(&format!("{of} {step}: done in {took}, {} changed in WORK{same}", ran.changed));
                if let Some(first) = ran.undeclared.first() {
                    let more = ran.undeclared.len() - 1;
                    let rest = if more == 0 { String::new() } else { format!(" and {more} more") };
                    self.narrator.say(&format!("{step}: written but not declared, dropped: {first}{rest}"));
                }
                if let Some(why) = not_kept {
                    self.narrator
                        .warn(&format!("{step}: its result is not kept, so it runs again next time: {why}"));
                }
            }
            Outcome::CommandFailed(ran) => {
                self.narrator.clear();
                for text in tail {
                    self.narrator.show_always(&format!("{step} | {text}"));
                }
                show::failure(
                    &format!("step `{step}` {}", how(ran)),
                    Some(&format!("`kiln log {step}` prints all it said")),
                );
                self.tell_commands(step, outcome);
            }
            Outcome::Failed(error) => {
                self.narrator.clear();
                show::failure(&format!("step `{step}`: {}", chain(error.as_ref())), error.hint().as_deref());
                self.tell_commands(step, outcome);
            }
        }
    }

    /// What does a failed step again, and what enters it: where there is a machine to enter.
    fn commands(&self, step: &str, outcome: &Outcome) -> Option<(String, String)> {
        let (commands, _) = self.commands.as_ref()?;
        let began = match outcome {
            Outcome::CommandFailed(_) => true,
            Outcome::Failed(error) => error.is_of_a_command(),
            _ => false,
        };
        began.then(|| (commands.build(step), commands.shell(step)))
    }

    fn tell_commands(&mut self, step: &str, outcome: &Outcome) {
        if let Some((again, shell)) = self.commands(step, outcome) {
            show::note(&format!("again: {again}"));
            show::note(&format!("a shell in a machine as it gets it: {shell}"));
        }
        if let (Some((name, idle)), Some((_, store))) = (self.kept.remove(step), &self.commands) {
            keep::tell(&name, idle, store);
        }
    }

    /// The end report.
    pub fn end(&mut self, summary: &Summary, code: u8, settings: &Settings) {
        let count = |is: fn(&Outcome) -> bool| summary.count(is);
        let ran = count(|outcome| matches!(outcome, Outcome::Ran { .. }));
        let cut_off = count(|outcome| matches!(outcome, Outcome::UpToDate { cut_off: true, .. }));
        let up_to_date = count(|outcome| matches!(outcome, Outcome::UpToDate { cut_off: false, .. }));
        let would_run = count(|outcome| matches!(outcome, Outcome::WouldRun));
        let failed = count(|outcome| matches!(outcome, Outcome::Failed(_) | Outcome::CommandFailed(_)));
        let skipped = count(|outcome| matches!(outcome, Outcome::Skipped));
        if self.json {
            line(
                &json!({
                    "event": "end", "version": 1, "code": code, "run": ran, "cut_off": cut_off,
                    "up_to_date": up_to_date, "would_run": would_run, "failed": failed, "skipped": skipped,
                    "seconds": summary.total.as_secs_f64(), "command_seconds": summary.commands.as_secs_f64(),
                    "read": {"files": self.read.0, "bytes": self.read.1},
                })
                .to_string(),
            );
            return;
        }
        let parts = [
            (would_run, "would run"),
            (ran, "run"),
            (cut_off, "cut off"),
            (up_to_date, "up to date"),
            (failed, "failed"),
            (skipped, "skipped"),
        ];
        let parts: Vec<String> = parts
            .iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, what)| format!("{count} {what}"))
            .collect();
        let parts = if parts.is_empty() { "nothing to do".to_owned() } else { parts.join(", ") };
        self.narrator.say(&format!(
            "{parts} in {}; WORK is {}",
            show_duration(summary.total),
            settings.work.value.display()
        ));
        if ran > 0 {
            let mut slowest: Vec<(&str, Duration)> = summary
                .outcomes
                .iter()
                .filter_map(|(name, outcome)| match outcome {
                    Outcome::Ran { ran, .. } => Some((name.as_str(), ran.command)),
                    _ => None,
                })
                .collect();
            slowest.sort_by_key(|(_, time)| std::cmp::Reverse(*time));
            let slowest: Vec<String> = slowest
                .iter()
                .take(SLOWEST)
                .map(|(name, time)| format!("{name} {}", show_duration(*time)))
                .collect();
            let phases: Vec<String> = self
                .phases
                .iter()
                .filter(|(_, time)| **time >= Duration::from_millis(10))
                .map(|(phase, time)| format!("{phase} {}", show_duration(*time)))
                .collect();
            self.narrator.say(&format!(
                "time: {}; longest: {}; read {} files ({})",
                phases.join(", "),
                slowest.join(", "),
                self.read.0,
                show_bytes(self.read.1)
            ));
        }
    }

    fn json_of(&self, news: &News<'_>) -> Value {
        match news {
            News::Starts(step, why) => json!({"event": "start", "step": step, "why": why}),
            News::Event(step, event) => {
                let mut value = as_json(event);
                value["step"] = json!(step);
                value
            }
            News::Ends(step, outcome) => {
                let mut value = match outcome {
                    Outcome::UpToDate { cut_off, restored } => {
                        json!({"outcome": "up-to-date", "cut_off": cut_off, "restored": restored})
                    }
                    Outcome::Ran { ran, not_kept, same } => json!({
                        "outcome": "run", "outputs": ran.outputs, "same": same, "changed": ran.changed,
                        "seconds": ran.command.as_secs_f64(), "not_kept": not_kept,
                        "undeclared": ran.undeclared.iter().map(ToString::to_string).collect::<Vec<_>>(),
                    }),
                    Outcome::WouldRun => json!({"outcome": "would-run"}),
                    Outcome::CommandFailed(ran) => json!({"outcome": "failed", "how": how(ran)}),
                    Outcome::Failed(error) => {
                        let failure = Failure::new(error.as_ref(), error.hint(), super::FAILED);
                        json!({"outcome": "failed", "how": failure.text, "hint": failure.hint})
                    }
                    Outcome::Skipped => json!({"outcome": "skipped"}),
                };
                if let Some((again, shell)) = self.commands(step, outcome) {
                    value["again"] = json!(again);
                    value["shell"] = json!(shell);
                }
                value["event"] = json!("step");
                value["step"] = json!(step);
                value
            }
        }
    }
}

fn how(ran: &Ran) -> String {
    ran.failure().unwrap_or_else(|| "failed".to_owned())
}
