//! What `--json` writes of builds and runs, one event a line, as types: `kiln schema events` prints their JSON schema, and
//! docs/events.md tells of them.
//!
//! An event of a step of a build has `step`; of `kiln run`, which has but one, it has none.

use std::collections::BTreeMap;
use std::time::Duration;

use kiln_digest::Digest;
use kiln_wire::{Outcome as Exit, Stream};
use schemars::JsonSchema;
use serde::Serialize;

use super::{FAILED, Failure};
use crate::engine::build::{News, Outcome};
use crate::engine::{Ended, Event, Phase, Report};
use crate::machine::Identity;

/// The version of what is written: another where a member is gone or means something else.
pub(super) const VERSION: u32 = 1;

/// An event of a build or of a run, one a line. Who reads them passes over events and members that it does not know: a later
/// kiln of the same version may write more.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub(super) enum Line<'a> {
    /// A build begins; its first event.
    Begin {
        /// The version of what is written.
        #[schemars(extend("const" = VERSION))]
        version: u32,
        /// The version of kiln.
        kiln: &'a str,
        /// How many steps the build is about.
        steps: usize,
    },
    /// A step has to run, or would have to.
    Start {
        /// Its name.
        step: &'a str,
        /// Why, in words.
        why: &'a str,
    },
    /// Something slow is going on.
    Progress {
        /// In which step; none where it is before all.
        #[serde(skip_serializing_if = "Option::is_none")]
        step: Option<&'a str>,
        /// What, in words.
        text: &'a str,
    },
    /// Something that the user should know.
    Warning {
        /// Of which step.
        #[serde(skip_serializing_if = "Option::is_none")]
        step: Option<&'a str>,
        /// What, in words.
        text: &'a str,
    },
    /// A machine runs.
    Machine {
        /// Whose.
        #[serde(skip_serializing_if = "Option::is_none")]
        step: Option<&'a str>,
        /// The version of what is written.
        #[schemars(extend("const" = VERSION))]
        version: u32,
        /// What runs it, and its version.
        backend: &'a str,
        /// How it is run: emulation is no boundary.
        #[schemars(extend("enum" = ["kvm", "tcg"]))]
        accelerator: String,
        /// How it came to be.
        #[schemars(extend("enum" = ["boot", "template", "ready"]))]
        origin: String,
        /// The layers of its jail that hold.
        #[schemars(with = "Vec<String>")]
        jail: &'a [crate::machine::jail::Layer],
        /// Those that the host does not grant.
        #[schemars(with = "Vec<String>")]
        jail_missing: Vec<crate::machine::jail::Layer>,
    },
    /// A command wrote something.
    Output {
        /// Whose.
        #[serde(skip_serializing_if = "Option::is_none")]
        step: Option<&'a str>,
        /// To where.
        #[schemars(extend("enum" = ["stdout", "stderr"]))]
        stream: &'static str,
        #[serde(flatten)]
        written: Written<'a>,
    },
    /// A part of a run is over.
    Phase {
        /// Of which step.
        #[serde(skip_serializing_if = "Option::is_none")]
        step: Option<&'a str>,
        /// Which part.
        phase: Phase,
        /// How long it took.
        seconds: f64,
    },
    /// A step is over.
    Step {
        /// Its name.
        step: &'a str,
        #[serde(flatten)]
        outcome: StepOutcome<'a>,
    },
    /// A build is over; its last event.
    #[serde(rename = "end")]
    EndOfBuild(EndOfBuild<'a>),
    /// A run is over.
    #[serde(rename = "end")]
    EndOfRun(Box<EndOfRun>),
    /// kiln failed, or was interrupted; nothing follows.
    Error {
        /// What failed, on what and why.
        text: &'a str,
        /// What the user can do about it.
        hint: Option<&'a str>,
        /// The command that does it again.
        #[serde(skip_serializing_if = "Option::is_none")]
        again: Option<&'a str>,
    },
    /// The machine of a run stays.
    Kept {
        /// The step that failed in it, of a build.
        #[serde(skip_serializing_if = "Option::is_none")]
        step: Option<&'a str>,
        /// Its name.
        name: &'a str,
        /// How long it stays with nobody in it.
        idle_seconds: u64,
        /// The process that holds it, where it is not kiln's own.
        #[serde(skip_serializing_if = "Option::is_none")]
        pid: Option<i32>,
    },
}

/// What a command wrote: a piece, which may end anywhere.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Written<'a> {
    /// Where it is UTF-8.
    Text(&'a str),
    /// Where it is not: `\xNN` for each byte that is not printable ASCII, and `\t`, `\r`, `\n`, `\'`, `\"` and `\\`.
    Escaped(String),
}

/// What became of a step.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub(super) enum StepOutcome<'a> {
    /// Nothing that it read has changed.
    UpToDate {
        /// A step that it needs did run, and put out what it read before.
        cut_off: bool,
        /// How many outputs were put back into WORK.
        restored: usize,
    },
    /// It ran, and its outputs are in WORK.
    Run {
        /// Digest of their manifest.
        #[schemars(with = "Option<String>")]
        outputs: Option<Digest>,
        /// They are those of the last time.
        same: bool,
        /// How many paths in WORK changed.
        changed: usize,
        /// How long its command ran.
        seconds: f64,
        /// What it read.
        read: Read,
        /// Why the next build runs it again.
        not_kept: Option<&'a str>,
        /// What it wrote in WORK and nobody declared.
        undeclared: Vec<String>,
    },
    /// It would run, were it not for `--dry-run`.
    WouldRun,
    /// Its command failed, or kiln.
    Failed {
        /// How, in words.
        how: String,
        /// What the user can do about it.
        hint: Option<String>,
        /// The command that does it again, of a step of a recipe.
        #[serde(skip_serializing_if = "Option::is_none")]
        again: Option<String>,
        /// The command that opens a shell in a machine as it gets it.
        #[serde(skip_serializing_if = "Option::is_none")]
        shell: Option<String>,
    },
    /// Something that it needs failed, or the build was over before.
    Skipped,
}

/// What was read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub(super) struct Read {
    /// Files whose content was read.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Names that were looked for in vain.
    pub missed: u64,
}

/// How a build ended.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct EndOfBuild<'a> {
    /// The version of what is written.
    #[schemars(extend("const" = VERSION))]
    pub version: u32,
    /// kiln's exit code.
    pub code: u8,
    #[serde(flatten)]
    pub counts: Counts,
    /// How long it took.
    pub seconds: f64,
    /// How long its commands ran, all together.
    pub command_seconds: f64,
    /// How long each part of its steps took, all together, and `check`: finding out whether they have to run.
    pub phase_seconds: BTreeMap<&'a str, f64>,
    /// What its steps read, all together.
    pub read: Read,
}

/// What became of how many steps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub(super) struct Counts {
    /// They ran.
    pub run: usize,
    /// Up to date, though a step that they need did run.
    pub cut_off: usize,
    /// Up to date.
    pub up_to_date: usize,
    /// They would run, were it not for `--dry-run`.
    pub would_run: usize,
    /// They failed.
    pub failed: usize,
    /// Something that they need failed, or the build was over before.
    pub skipped: usize,
}

/// How a run ended.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct EndOfRun {
    /// The version of what is written.
    #[schemars(extend("const" = VERSION))]
    version: u32,
    /// kiln's exit code.
    code: u8,
    /// The command that does it again, where it failed.
    again: Option<String>,
    /// How the command ended.
    ended: HowItEnded,
    /// The root.
    #[schemars(with = "Option<String>")]
    root: Option<Digest>,
    /// The boot bundle: kernel, modules and initramfs.
    #[schemars(with = "String")]
    bundle: Digest,
    /// What the command used, where it could be started.
    usage: Option<Usage>,
    /// What it put out, where that was collected.
    outputs: Option<Outputs>,
    /// What it read.
    reads: Reads,
    /// How long all of it took.
    seconds: f64,
}

/// How a command ended.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum HowItEnded {
    /// With this status.
    Exit(u8),
    /// By this signal.
    Signal(u8),
    /// It took longer than it may.
    #[serde(rename = "timed out")]
    TimedOut,
    /// It could not be started: why, in words.
    NotStarted(String),
}

/// What a command used.
#[derive(Debug, Serialize, JsonSchema)]
struct Usage {
    /// Time that passed, in microseconds.
    wall_us: u64,
    /// Processor time in user mode, in microseconds.
    user_us: u64,
    /// Processor time in the kernel, in microseconds.
    system_us: u64,
    /// Most memory of its largest process.
    max_rss_bytes: u64,
    /// Most memory of all its processes.
    peak_memory_bytes: u64,
    /// Processes that were killed because the machine ran out of memory.
    oom_kills: u32,
    /// Processes that it was not given, because it had as many as it may.
    refused_processes: u32,
}

/// What a run put out.
#[derive(Debug, Serialize, JsonSchema)]
struct Outputs {
    /// Digest of the manifest.
    #[schemars(with = "String")]
    manifest: Digest,
    /// Regular files.
    files: u64,
    /// Their bytes.
    bytes: u64,
    /// Paths in WORK that changed.
    changed: Vec<String>,
    /// What was written in WORK and not declared.
    undeclared: Vec<String>,
}

/// What a run read.
#[derive(Debug, Serialize, JsonSchema)]
struct Reads {
    /// Files whose content was read.
    files: u64,
    /// Their bytes.
    bytes: u64,
    /// Why the record does not say all, in words.
    spoiled: Option<String>,
}

impl std::fmt::Display for Line<'_> {
    /// As one line of JSON.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&serde_json::to_string(self).map_err(|_| std::fmt::Error)?)
    }
}

impl<'a> Line<'a> {
    /// The first event of a build of so many steps.
    pub fn begin(steps: usize) -> Self {
        Self::Begin { version: VERSION, kiln: env!("CARGO_PKG_VERSION"), steps }
    }

    /// What happened in `step`, or in the one that `kiln run` runs.
    pub fn of_event(step: Option<&'a str>, event: &Event<'a>) -> Self {
        match event {
            Event::Progress(text) => Self::Progress { step, text },
            Event::Warning(text) => Self::Warning { step, text },
            Event::Kept(name, idle) => Self::Kept {
                step,
                name,
                idle_seconds: idle.as_secs(),
                pid: i32::try_from(std::process::id()).ok(),
            },
            Event::Machine(identity) => Self::of_machine(step, identity),
            Event::Output(stream, data) => Self::Output {
                step,
                stream: match stream {
                    Stream::Stdout => "stdout",
                    Stream::Stderr => "stderr",
                },
                written: match std::str::from_utf8(data) {
                    Ok(text) => Written::Text(text),
                    Err(_) => Written::Escaped(data.escape_ascii().to_string()),
                },
            },
            Event::Phase(phase, time) => Self::Phase { step, phase: *phase, seconds: time.as_secs_f64() },
        }
    }

    fn of_machine(step: Option<&'a str>, identity: &'a Identity) -> Self {
        Self::Machine {
            step,
            version: VERSION,
            backend: &identity.backend,
            accelerator: identity.accelerator.name().to_owned(),
            origin: format!("{:?}", identity.origin).to_lowercase(),
            jail: &identity.jail.layers,
            jail_missing: identity.jail.missing_layers(),
        }
    }

    /// The news of a build, where they are an event.
    ///
    /// `commands` do a failed step again, and enter it.
    pub fn of_news(news: &'a News<'a>, commands: Option<(String, Option<String>)>) -> Option<Self> {
        Some(match news {
            // Each is followed by what came of it.
            News::Checks(_) | News::Checked(..) => return None,
            News::Starts(step, why) => Self::Start { step, why },
            News::Event(step, event) => Self::of_event(Some(step), event),
            News::Ends(step, outcome) => Self::Step { step, outcome: StepOutcome::of(outcome, commands) },
        })
    }

    /// How a run ended.
    pub fn of_report(
        report: &'a Report,
        phases: &[(Phase, Duration)],
        code: u8,
        again: Option<String>,
    ) -> Self {
        let (ended, usage) = match &report.ended {
            Ended::Ran(Exit::Exit(code), usage) => (HowItEnded::Exit(*code), Some(usage)),
            Ended::Ran(Exit::Signal(signal), usage) => (HowItEnded::Signal(*signal), Some(usage)),
            Ended::Ran(Exit::TimedOut, usage) => (HowItEnded::TimedOut, Some(usage)),
            Ended::NotStarted { error, why } if why.is_empty() => {
                (HowItEnded::NotStarted(error.to_string()), None)
            }
            Ended::NotStarted { error, why } => (HowItEnded::NotStarted(format!("{error}: {why}")), None),
        };
        let (files, bytes) = report.reads.contents();
        Self::EndOfRun(Box::new(EndOfRun {
            version: VERSION,
            code,
            again,
            ended,
            root: report.reads.beside.root,
            bundle: report.bundle,
            usage: usage.map(|usage| Usage {
                wall_us: usage.wall_us,
                user_us: usage.user_us,
                system_us: usage.system_us,
                max_rss_bytes: usage.max_rss_bytes,
                peak_memory_bytes: usage.peak_memory_bytes,
                oom_kills: usage.oom_kills,
                refused_processes: usage.refused_processes,
            }),
            outputs: report.collected.as_ref().map(|collected| Outputs {
                manifest: collected.manifest,
                files: collected.files.0,
                bytes: collected.files.1,
                changed: collected.changed.iter().map(ToString::to_string).collect(),
                undeclared: collected.undeclared.iter().map(ToString::to_string).collect(),
            }),
            reads: Reads { files, bytes, spoiled: report.reads.spoiled() },
            seconds: phases.iter().map(|(_, time)| time.as_secs_f64()).sum(),
        }))
    }
}

impl<'a> StepOutcome<'a> {
    fn of(outcome: &'a Outcome, commands: Option<(String, Option<String>)>) -> Self {
        let (again, shell) = commands.unzip();
        let shell = shell.flatten();
        match outcome {
            Outcome::UpToDate { cut_off, restored } => {
                Self::UpToDate { cut_off: *cut_off, restored: *restored }
            }
            Outcome::Ran { ran, not_kept, same } => Self::Run {
                outputs: ran.outputs,
                same: *same,
                changed: ran.changed,
                seconds: ran.command.as_secs_f64(),
                read: Read::of(&ran.shares),
                not_kept: not_kept.as_deref(),
                undeclared: ran.undeclared.iter().map(ToString::to_string).collect(),
            },
            Outcome::WouldRun => Self::WouldRun,
            Outcome::CommandFailed(ran) => {
                let how = ran.failure().unwrap_or_else(|| "failed".to_owned());
                Self::Failed { how, hint: None, again, shell }
            }
            Outcome::Failed(error) => {
                let failure = Failure::new(error.as_ref(), error.hint(), FAILED);
                Self::Failed { how: failure.text, hint: failure.hint, again, shell }
            }
            Outcome::Skipped => Self::Skipped,
        }
    }
}

impl Read {
    /// What was read of `shares`.
    pub fn of(shares: &[crate::cache::ShareTrace]) -> Self {
        shares.iter().fold(Self::default(), |all, share| {
            let (files, bytes) = share.contents();
            let missed = u64::try_from(share.missed.len()).unwrap_or(u64::MAX);
            all + Self { files, bytes, missed }
        })
    }
}

impl std::ops::Add for Read {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            files: self.files + other.files,
            bytes: self.bytes.saturating_add(other.bytes),
            missed: self.missed + other.missed,
        }
    }
}

#[cfg(test)]
#[path = "../../tests/judge/schema.rs"]
mod judge;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::RunError;
    use crate::engine::build::{BuildError, Ran, Summary};
    use crate::machine::jail::{Held, Layer};
    use crate::machine::{Accelerator, Origin};

    fn ran(ended: Ended) -> Box<Ran> {
        Box::new(Ran {
            ended,
            outputs: Some(Digest::of(b"x")),
            unmerged: None,
            looks: None,
            log: None,
            shares: Vec::new(),
            spoiled: None,
            undeclared: vec![kiln_artifact::tree::TreePath::new(b"a/b").expect("a path")],
            changed: 1,
            command: Duration::from_millis(1500),
            held_bytes: None,
            machine: String::new(),
        })
    }

    /// One of each kind, and of each thing that may be there or not.
    #[test]
    fn whatever_is_written_is_as_the_schema_says() {
        let identity = Identity {
            backend: "qemu 10.0.2".into(),
            accelerator: Accelerator::Tcg,
            jail: Held {
                layers: Layer::ALL.to_vec(),
                missing: vec![(Layer::Namespaces, "no".into())],
                ..Held::default()
            },
            origin: Origin::Template,
        };
        let exit = |code| Ended::Ran(Exit::Exit(code), kiln_wire::Usage::default());
        let lost = || BuildError::Lost { step: "a".into(), path: "b".into(), digest: Digest::of(b"c") };
        let outcomes = [
            Outcome::UpToDate { cut_off: true, restored: 2 },
            Outcome::Ran { ran: ran(exit(0)), not_kept: Some("why".into()), same: false },
            Outcome::Ran { ran: ran(exit(0)), not_kept: None, same: true },
            Outcome::WouldRun,
            Outcome::CommandFailed(ran(exit(3))),
            Outcome::Failed(Box::new(lost())),
            Outcome::Failed(Box::new(RunError::Printed { limit: 1 }.into())),
            Outcome::Skipped,
        ];
        let events = [
            Event::Progress("fetching"),
            Event::Warning("careful"),
            Event::Machine(&identity),
            Event::Output(Stream::Stdout, b"text\n"),
            Event::Output(Stream::Stderr, b"\xff\"\n"),
            Event::Phase(Phase::Record, Duration::from_micros(7)),
        ];
        let mut lines = vec![Line::begin(3).to_string()];
        let mut news: Vec<News<'_>> = vec![News::Starts("a", "it never ran here")];
        news.extend(events.iter().map(|event| News::Event("a", event)));
        news.extend(outcomes.iter().map(|outcome| News::Ends("a", outcome)));
        lines.extend(
            news.iter()
                .filter_map(|news| {
                    Line::of_news(news, Some(("kiln build s".to_owned(), Some("kiln shell s".to_owned()))))
                })
                .map(|line| line.to_string()),
        );
        lines.extend(events.iter().map(|event| Line::of_event(None, event).to_string()));
        assert_eq!(lines.len(), 1 + news.len() + events.len());
        let totals = super::super::totals::Totals::default();
        lines.push(Line::EndOfBuild(totals.event(&Summary::default(), 1)).to_string());
        for ended in [
            HowItEnded::Exit(1),
            HowItEnded::Signal(9),
            HowItEnded::TimedOut,
            HowItEnded::NotStarted("no such file".to_owned()),
        ] {
            lines.push(Line::EndOfRun(Box::new(end_of_run(ended))).to_string());
        }
        lines.push(Line::Error { text: "no", hint: Some("do"), again: Some("kiln run") }.to_string());
        lines.push(Line::Error { text: "no", hint: None, again: None }.to_string());
        lines.push(Line::Kept { step: None, name: "sh-1234", idle_seconds: 1800, pid: Some(7) }.to_string());
        let schema = serde_json::to_string(&super::super::schema::of::<Line<'static>>()).expect("JSON");
        judge::holds(&schema, &lines.join("\n"));
    }

    fn end_of_run(ended: HowItEnded) -> EndOfRun {
        let is_started = matches!(ended, HowItEnded::Exit(_));
        EndOfRun {
            version: VERSION,
            code: 1,
            again: is_started.then(|| "kiln run".to_owned()),
            ended,
            root: is_started.then(|| Digest::of(b"r")),
            bundle: Digest::of(b"b"),
            usage: is_started.then_some(Usage {
                wall_us: 1,
                user_us: 2,
                system_us: 3,
                max_rss_bytes: 4,
                peak_memory_bytes: 5,
                oom_kills: 0,
                refused_processes: 0,
            }),
            outputs: is_started.then(|| Outputs {
                manifest: Digest::of(b"m"),
                files: 1,
                bytes: 2,
                changed: vec!["a".to_owned()],
                undeclared: Vec::new(),
            }),
            reads: Reads { files: 1, bytes: 2, spoiled: None },
            seconds: 0.5,
        }
    }
}
