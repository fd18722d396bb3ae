//! What a build came to, in figures: what became of its steps, where the time went, and what was read.

use std::collections::BTreeMap;
use std::time::Duration;

use super::events::{Counts, EndOfBuild, Read, VERSION};
use crate::engine::build::{News, Outcome, Summary};
use crate::engine::{Event, Phase};
use crate::plan::{show_bytes, show_duration};

/// How many steps are named as those that took longest, or read most.
const NAMED: usize = 3;
/// What took less is not worth a word.
const WORTH_A_WORD: Duration = Duration::from_millis(10);
/// The phases as people are told of them, and checking before them.
const PARTS: [(&str, &str); 8] = [
    ("check", "checking"),
    ("prepare", "preparing"),
    ("boot", "machines"),
    ("setup", "setting up"),
    ("command", "commands"),
    ("collect", "collecting"),
    ("record", "recording"),
    ("merge", "merging"),
];

/// The figures so far.
#[derive(Debug, Default)]
pub(super) struct Totals {
    phases: BTreeMap<&'static str, Duration>,
    /// Each step that ran or failed: how long its command took, and what it read.
    steps: Vec<(String, Duration, Read)>,
}

impl Totals {
    /// Takes the news in.
    pub fn note(&mut self, news: &News<'_>) {
        match news {
            News::Checked(_, time) => self.took("check", *time),
            News::Event(_, Event::Phase(phase, time)) => self.took(Phase::name(*phase), *time),
            News::Ends(step, Outcome::Ran { ran, .. } | Outcome::CommandFailed(ran)) => {
                self.steps.push(((*step).to_owned(), ran.command, Read::of(&ran.shares)));
            }
            _ => {}
        }
    }

    fn took(&mut self, phase: &'static str, time: Duration) {
        *self.phases.entry(phase).or_default() += time;
    }

    fn read(&self) -> Read {
        self.steps.iter().fold(Read::default(), |all, (_, _, read)| all + *read)
    }

    /// As the last event has them.
    pub fn event(&self, summary: &Summary, code: u8) -> EndOfBuild<'static> {
        EndOfBuild {
            version: VERSION,
            code,
            counts: counts(summary),
            seconds: summary.total.as_secs_f64(),
            command_seconds: summary.commands.as_secs_f64(),
            phase_seconds: self.phases.iter().map(|(phase, time)| (*phase, time.as_secs_f64())).collect(),
            read: self.read(),
        }
    }

    /// Lines for people: where the time went and what was read. None where no step ran.
    pub fn lines(&self) -> Vec<String> {
        if self.steps.is_empty() {
            return Vec::new();
        }
        let time = |(phase, word): &(&str, &str)| {
            let time = self.phases.get(phase).filter(|time| **time >= WORTH_A_WORD)?;
            Some(format!("{word} {}", show_duration(*time)))
        };
        let parts: Vec<String> = PARTS.iter().filter_map(time).collect();
        let mut lines = Vec::new();
        if !parts.is_empty() {
            lines.push(format!("time, all steps together: {}", parts.join(", ")));
        }
        if self.steps.len() > 1 {
            let mut longest: Vec<_> = self.steps.iter().collect();
            longest.sort_by_key(|(_, time, _)| std::cmp::Reverse(*time));
            let longest = longest.iter().take(NAMED);
            let longest: Vec<String> =
                longest.map(|(step, time, _)| format!("{step} {}", show_duration(*time))).collect();
            lines.push(format!("longest: {}", longest.join(", ")));
        }
        let all = self.read();
        if all != Read::default() {
            let mut text = format!("read {}", in_words(&all));
            if self.steps.len() > 1 {
                let mut most: Vec<_> =
                    self.steps.iter().filter(|(_, _, read)| *read != Read::default()).collect();
                most.sort_by_key(|(_, _, read)| std::cmp::Reverse((read.bytes, read.files, read.missed)));
                let most = most.iter().take(NAMED);
                let most: Vec<String> =
                    most.map(|(step, _, read)| format!("{step} {}", in_words(read))).collect();
                text += &format!("; most: {}", most.join(", "));
            }
            lines.push(text);
        }
        lines
    }
}

/// As "12 files (3.4 KiB, 5 names missed)".
fn in_words(read: &Read) -> String {
    let plural = |count: u64| if count == 1 { "" } else { "s" };
    let missed = match read.missed {
        0 => String::new(),
        count => format!(", {count} name{} missed", plural(count)),
    };
    format!("{} file{} ({}{missed})", read.files, plural(read.files), show_bytes(read.bytes))
}

/// What became of how many steps.
pub(super) fn counts(summary: &Summary) -> Counts {
    let mut counts = Counts::default();
    for (_, outcome) in &summary.outcomes {
        *match outcome {
            Outcome::Ran { .. } => &mut counts.run,
            Outcome::UpToDate { cut_off: true, .. } => &mut counts.cut_off,
            Outcome::UpToDate { cut_off: false, .. } => &mut counts.up_to_date,
            Outcome::WouldRun => &mut counts.would_run,
            Outcome::Failed(_) | Outcome::CommandFailed(_) => &mut counts.failed,
            Outcome::Skipped => &mut counts.skipped,
        } += 1;
    }
    counts
}

/// The counts that are not zero, in words.
pub(super) fn counted(counts: &Counts) -> String {
    let parts = [
        (counts.would_run, "would run"),
        (counts.run, "run"),
        (counts.cut_off, "cut off"),
        (counts.up_to_date, "up to date"),
        (counts.failed, "failed"),
        (counts.skipped, "skipped"),
    ];
    let parts = parts.iter().filter(|(count, _)| *count > 0);
    let parts: Vec<String> = parts.map(|(count, what)| format!("{count} {what}")).collect();
    if parts.is_empty() { "nothing to do".to_owned() } else { parts.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn totals(steps: &[(&str, u64, Read)]) -> Totals {
        let steps =
            steps.iter().map(|(step, ms, read)| ((*step).to_owned(), Duration::from_millis(*ms), *read));
        Totals { steps: steps.collect(), ..Totals::default() }
    }

    #[test]
    fn a_report_says_where_the_time_went_and_which_steps_read_most() {
        let read = |files, bytes, missed| Read { files, bytes, missed };
        let mut totals = totals(&[
            ("a", 20, read(1, 10, 0)),
            ("b", 3000, read(2, 5000, 7)),
            ("c", 400, Read::default()),
            ("d", 1, read(9, 10, 1)),
        ]);
        for (phase, ms) in [("merge", 9), ("command", 3421), ("check", 10), ("boot", 61_000)] {
            totals.took(phase, Duration::from_millis(ms));
        }
        assert_eq!(
            totals.lines(),
            [
                "time, all steps together: checking 0.01 s, machines 1 m 1 s, commands 3.42 s",
                "longest: b 3.00 s, c 0.40 s, a 0.02 s",
                "read 12 files (4.9 KiB, 8 names missed); most: b 2 files (4.8 KiB, 7 names missed), \
                 d 9 files (10 B, 1 name missed), a 1 file (10 B)",
            ]
        );
    }

    #[test]
    fn a_report_of_one_step_names_no_longest_and_one_of_none_says_nothing() {
        let one = totals(&[("a", 20, Read { files: 1, bytes: 0, missed: 0 })]);
        assert_eq!(one.lines(), ["read 1 file (0 B)"]);
        assert!(totals(&[]).lines().is_empty());
    }

    #[test]
    fn every_phase_has_a_word() {
        let phases = [
            Phase::Prepare,
            Phase::Boot,
            Phase::Setup,
            Phase::Command,
            Phase::Collect,
            Phase::Record,
            Phase::Merge,
        ];
        for phase in phases {
            assert!(PARTS.iter().any(|(name, _)| *name == phase.name()), "{phase:?}");
        }
        assert_eq!(PARTS.len(), phases.len() + 1);
    }
}
