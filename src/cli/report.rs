//! What a build shows: lines that are drawn over and over on a terminal, plain ones elsewhere, or events; and a report at the end.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::{self, Read, Seek, SeekFrom};
use std::time::Duration;

use kiln_digest::Digest;
use kiln_wire::Stream;

use super::again::StepCommands;
use super::build::Leaving;
use super::events::Line;
use super::keep;
use super::screen::{Change, Doing, Screen};
use super::show::{self, Narrator, chain, for_people, line, try_line};
use super::totals::{Totals, counted, counts};
use super::trace::TraceOut;
use crate::engine::build::{News, Outcome, Summary};
use crate::engine::{Event, Host, Phase};
use crate::plan::{show_bytes, show_duration};
use crate::settings::Settings;
use crate::shortage::Shortage;

/// How many lines of a step's output are remembered where they are not shown, for when kiln fails to carry it through.
const TAIL_LINES: usize = 20;
/// The longest line that is held back until its end comes.
const LONGEST_LINE_BYTES: usize = 8 << 10;
/// How much of a failed step's output is shown where it was not shown before.
const LONGEST_LOG_BYTES: u64 = 1 << 20;

/// How a build is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Manner {
    /// As events.
    Json,
    /// Nothing but errors and what failed steps printed.
    Quiet,
    /// Line by line.
    Plain,
    /// Drawn, where there is a terminal; else line by line.
    Drawn,
}

impl Manner {
    /// What flags ask for.
    pub fn of(json: bool, quiet: bool) -> Self {
        match (json, quiet) {
            (true, _) => Self::Json,
            (false, true) => Self::Quiet,
            (false, false) => Self::Drawn,
        }
    }
}

/// Where lines go.
enum Shown {
    Json,
    Quiet(Narrator),
    Plain(Narrator),
    Drawn(Screen),
}

/// What is said of failed steps of a recipe.
pub(super) struct Commands {
    /// How they are done again and entered.
    pub words: StepCommands,
    /// Those that no machine is taken for.
    pub without_machine: BTreeSet<String>,
    /// The words that name the store.
    pub store: String,
}

/// Shows a build.
pub(super) struct Reporter<'a> {
    shown: Shown,
    host: &'a Host,
    steps: usize,
    ended: usize,
    /// Output whose line has not ended yet, by step and stream.
    pending: BTreeMap<(String, bool), Vec<u8>>,
    tails: BTreeMap<String, VecDeque<String>>,
    totals: Totals,
    has_named_machine: bool,
    /// What to say of failed steps of a recipe.
    commands: Option<Commands>,
    /// Machines of failed steps, by step.
    kept: BTreeMap<String, (String, Duration)>,
}

impl<'a> Reporter<'a> {
    /// One for a build of so many steps, which begins.
    pub fn begin(manner: Manner, steps: usize, host: &'a Host) -> Self {
        let shown = match manner {
            Manner::Json => {
                line(&Line::begin(steps).to_string());
                Shown::Json
            }
            Manner::Quiet => Shown::Quiet(Narrator::new(true)),
            Manner::Plain => Shown::Plain(Narrator::new(false)),
            // What a CI system reads is a log, also where it looks like a terminal.
            Manner::Drawn if show::is_in_ci() => Shown::Plain(Narrator::new(false)),
            Manner::Drawn => match Screen::take(steps) {
                Some(screen) => Shown::Drawn(screen),
                None => Shown::Plain(Narrator::new(false)),
            },
        };
        Self {
            shown,
            host,
            steps,
            ended: 0,
            pending: BTreeMap::new(),
            tails: BTreeMap::new(),
            totals: Totals::default(),
            has_named_machine: false,
            commands: None,
            kept: BTreeMap::new(),
        }
    }

    /// The screen that is drawn on: whoever ends the build from outside leaves it first.
    pub fn screen(&self) -> Option<Screen> {
        match &self.shown {
            Shown::Drawn(screen) => Some(screen.clone()),
            _ => None,
        }
    }

    /// What whoever ends the build from outside does first.
    pub fn leaving(&self, json: bool, trace: TraceOut) -> Leaving {
        Leaving { json, screen: self.screen(), trace }
    }

    /// Says of failed steps how they are done again and entered.
    pub fn with_commands(mut self, commands: Commands) -> Self {
        self.commands = Some(commands);
        self
    }

    /// Something slow is going on before the first step.
    pub fn progress(&mut self, text: &str) {
        match &mut self.shown {
            Shown::Json => line(&Line::Progress { step: None, text }.to_string()),
            Shown::Quiet(narrator) | Shown::Plain(narrator) => narrator.progress(text),
            Shown::Drawn(screen) => screen.change(Change::Note(for_people(text))),
        }
    }

    /// A line that stays.
    pub fn say(&mut self, text: &str) {
        match &mut self.shown {
            Shown::Json => {}
            Shown::Quiet(narrator) | Shown::Plain(narrator) => narrator.say(text),
            Shown::Drawn(screen) => screen.above(&format!("kiln: {}", for_people(text))),
        }
    }

    /// What is said of a failure, also where nothing else is.
    fn note(&mut self, text: &str) {
        match &mut self.shown {
            Shown::Json => {}
            Shown::Quiet(narrator) | Shown::Plain(narrator) => {
                narrator.clear();
                show::note(text);
            }
            Shown::Drawn(screen) => screen.above(&format!("kiln: {}", for_people(text))),
        }
    }

    fn warn(&mut self, text: &str) {
        match &mut self.shown {
            Shown::Json => {}
            Shown::Quiet(narrator) | Shown::Plain(narrator) => narrator.warn(text),
            Shown::Drawn(screen) => screen.above(&format!("kiln: warning: {}", for_people(text))),
        }
    }

    fn fail(&mut self, text: &str, hint: Option<&str>) {
        match &mut self.shown {
            Shown::Json => {}
            Shown::Quiet(narrator) | Shown::Plain(narrator) => {
                narrator.clear();
                show::failure(text, hint);
            }
            Shown::Drawn(screen) => screen.above(show::failure_lines(text, hint).trim_end()),
        }
    }

    /// A line of a step's output that stays, whatever else does.
    fn show(&mut self, step: &str, text: &str) {
        let text = format!("{step} | {text}");
        match &mut self.shown {
            Shown::Json => {}
            Shown::Quiet(narrator) | Shown::Plain(narrator) => narrator.show(&text),
            Shown::Drawn(screen) => screen.above(&for_people(&text)),
        }
    }

    /// What is drawn is another now.
    fn change(&self, change: impl FnOnce() -> Change) {
        if let Shown::Drawn(screen) = &self.shown {
            screen.change(change());
        }
    }

    /// Shows the news.
    pub fn tell(&mut self, news: &News<'_>) -> io::Result<()> {
        self.totals.note(news);
        if let Shown::Json = self.shown {
            let commands = match news {
                News::Ends(step, outcome) => self.commands(step, outcome),
                _ => None,
            };
            return Line::of_news(news, commands).map_or(Ok(()), |event| try_line(&event.to_string()));
        }
        match news {
            News::Checks(step) => self.change(|| Change::Is((*step).to_owned(), Doing::Checking)),
            News::Checked(step, _) => self.change(|| Change::Waits((*step).to_owned())),
            News::Starts(step, why) => match &self.shown {
                Shown::Drawn(screen) => {
                    screen.change(Change::Is((*step).to_owned(), Doing::Preparing));
                    screen.change(Change::Says((*step).to_owned(), for_people(why)));
                }
                _ => self.say(&format!("{step}: {why}")),
            },
            News::Event(step, event) => self.event(step, event),
            News::Ends(step, outcome) => {
                self.ends(step, outcome);
                self.change(|| Change::Ends((*step).to_owned(), (*outcome).into()));
            }
        }
        Ok(())
    }

    fn event(&mut self, step: &str, event: &Event<'_>) {
        match event {
            Event::Progress(text) => match &mut self.shown {
                Shown::Drawn(screen) => screen.change(Change::Says(step.to_owned(), for_people(text))),
                _ => self.progress(&format!("{step}: {text}")),
            },
            Event::Warning(text) => self.warn(&format!("{step}: {text}")),
            // One line says it for all.
            Event::Machine(identity) if !std::mem::replace(&mut self.has_named_machine, true) => {
                self.say(&identity.to_string());
            }
            Event::Machine(_) => {}
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
            Event::Phase(phase, _) => {
                let doing = match phase {
                    Phase::Setup => Doing::Running,
                    Phase::Command => Doing::Collecting,
                    Phase::Record => Doing::Merging,
                    Phase::Prepare | Phase::Boot | Phase::Collect | Phase::Merge => return,
                };
                self.change(|| Change::Is(step.to_owned(), doing));
            }
            Event::Kept(name, idle) => {
                self.kept.insert(step.to_owned(), ((*name).to_owned(), *idle));
            }
        }
    }

    /// A whole line that a step wrote.
    fn output(&mut self, step: &str, bytes: &[u8]) {
        let text = String::from_utf8_lossy(bytes);
        let text = text.trim_end_matches(['\n', '\r']);
        if let Shown::Plain(_) = self.shown {
            return self.show(step, text);
        }
        let tail = self.tails.entry(step.to_owned()).or_default();
        if tail.len() == TAIL_LINES {
            tail.pop_front();
        }
        tail.push_back(text.to_owned());
        // What a line was written over with is what a terminal would show of it.
        let last = text.rsplit('\r').find(|part| !part.trim().is_empty());
        if let Some(last) = last {
            self.change(|| Change::Says(step.to_owned(), for_people(last)));
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
                let outputs = if *restored == 1 { "output" } else { "outputs" };
                self.say(&format!("{of} {step}: up to date; {restored} {outputs} put back into WORK"));
            }
            Outcome::Ran { ran, not_kept, same } => {
                let same = if *same { ", as before" } else { "" };
                let took = show_duration(ran.command);
                self.say(&format!("{of} {step}: done in {took}, {} changed in WORK{same}", ran.changed));
                if let Some(first) = ran.undeclared.first() {
                    let more = ran.undeclared.len() - 1;
                    let rest = if more == 0 { String::new() } else { format!(" and {more} more") };
                    self.say(&format!("{step}: written but not declared, dropped: {first}{rest}"));
                }
                if let Some(why) = not_kept {
                    self.warn(&format!("{step}: its result is not kept, so it runs again next time: {why}"));
                }
            }
            Outcome::CommandFailed(ran) => {
                let is_all_shown = self.whole_output(step, ran.log, tail);
                let command = self.commands.as_ref().map(|commands| commands.words.log(step));
                let hint =
                    format!("`{}` prints all it said", command.unwrap_or_else(|| format!("kiln log {step}")));
                let how = ran.failure().unwrap_or_else(|| "failed".to_owned());
                self.fail(&format!("step `{step}` {how}"), (!is_all_shown).then_some(hint.as_str()));
                self.tell_commands(step, outcome);
            }
            Outcome::Failed(error) => {
                self.lines(step, tail);
                let text = format!("step `{step}`: {}", chain(error.as_ref()));
                let lack = Shortage::behind(error.as_ref()).map(Shortage::hint);
                self.fail(&text, lack.or(error.hint().as_deref()));
                self.tell_commands(step, outcome);
            }
        }
    }

    fn lines(&mut self, step: &str, lines: impl IntoIterator<Item = String>) {
        for text in lines {
            self.show(step, &text);
        }
    }

    /// Shows what a step whose command failed has printed, where it was not shown as it came. Whether all of it was shown together.
    fn whole_output(&mut self, step: &str, log: Option<Digest>, tail: VecDeque<String>) -> bool {
        match self.shown {
            Shown::Json | Shown::Plain(_) => false,
            Shown::Quiet(_) | Shown::Drawn(_) => match self.log(log) {
                Ok((left_out, log)) => {
                    if left_out > 0 {
                        self.show(step, &format!("… {} before", show_bytes(left_out)));
                    }
                    let text = String::from_utf8_lossy(&log);
                    self.lines(step, text.lines().map(ToOwned::to_owned));
                    left_out == 0
                }
                Err(_) => {
                    self.lines(step, tail);
                    false
                }
            },
        }
    }

    /// The end of the `log` of a step, and how many bytes are before it.
    fn log(&self, log: Option<Digest>) -> io::Result<(u64, Vec<u8>)> {
        let mut file = self.host.store.blobs().file(&log.ok_or(io::ErrorKind::NotFound)?)?;
        let left_out = file.metadata()?.len().saturating_sub(LONGEST_LOG_BYTES);
        file.seek(SeekFrom::Start(left_out))?;
        let mut bytes = Vec::new();
        file.take(LONGEST_LOG_BYTES).read_to_end(&mut bytes)?;
        Ok((left_out, bytes))
    }

    /// What does a failed step again, and what enters it: where there is a machine to enter.
    fn commands(&self, step: &str, outcome: &Outcome) -> Option<(String, Option<String>)> {
        let Commands { words, without_machine, .. } = self.commands.as_ref()?;
        let has_machine = !without_machine.contains(step);
        let began = match outcome {
            Outcome::CommandFailed(_) => true,
            Outcome::Failed(error) => error.is_of_a_command() || !has_machine,
            _ => false,
        };
        began.then(|| (words.build(step), has_machine.then(|| words.shell(step))))
    }

    fn tell_commands(&mut self, step: &str, outcome: &Outcome) {
        if let Some((again, shell)) = self.commands(step, outcome) {
            self.note(&format!("again: {again}"));
            if let Some(shell) = shell {
                self.note(&format!("a shell in a machine as it gets it: {shell}"));
            }
        }
        let kept = self.kept.remove(step);
        let lines = kept
            .zip(self.commands.as_ref())
            .map(|(kept, commands)| keep::tell(&kept.0, kept.1, &commands.store));
        for text in lines.into_iter().flatten() {
            self.note(&text);
        }
    }

    /// The end report.
    pub fn end(&mut self, summary: &Summary, code: u8, settings: &Settings) {
        if let Shown::Json = self.shown {
            return line(&Line::EndOfBuild(self.totals.event(summary, code)).to_string());
        }
        let parts = counted(&counts(summary));
        let (total, work) = (show_duration(summary.total), settings.work.value.display());
        self.say(&format!("{parts} in {total}; WORK is {work}"));
        for text in self.totals.lines() {
            self.say(&text);
        }
        self.leave();
    }

    /// Leaves the screen, where there is one: what follows is plain.
    fn leave(&mut self) {
        if let Shown::Drawn(screen) = &self.shown {
            screen.leave();
            self.shown = Shown::Plain(Narrator::new(false));
        }
    }
}

impl Drop for Reporter<'_> {
    fn drop(&mut self) {
        self.leave();
    }
}
