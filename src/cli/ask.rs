//! The verbs that ask about a build: why, inputs, log and graph. None of them runs a step.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use kiln_digest::Digest;
use kiln_virtio::fs::record::{Observed, PathBytes};
use schemars::JsonSchema;
use serde::Serialize;

use super::build::{Opened, ScopeFlags, looking, open_for_scripts};
use super::show::{self, line};
use super::{FAILED, Failure, USAGE, recipe};
use crate::cache::{Index, LastRun, Trace};
use crate::engine::build::sources;
use crate::engine::build::{Gate, Machines, NEVER_RAN, News, Outcome, Timeline, work_name};
use crate::plan::{Plan, StepId, harmless, show_bytes};
use crate::settings::{Flags, Settings};

/// Of so many steps at most all are named to whoever asked about one.
const MOST_NAMED: usize = 8;

/// Which WORK a question is about.
#[derive(Debug, Args)]
struct WorkFlag {
    /// Where outputs went [env: WORK] [default: as of `kiln build`]
    #[arg(long, value_name = "DIR")]
    work: Option<PathBuf>,
}

impl WorkFlag {
    fn among(&self, flags: Flags) -> Flags {
        Flags { work: self.work.clone().or(flags.work), ..flags }
    }
}

/// Arguments of `kiln why`.
#[derive(Debug, Args)]
pub(super) struct WhyArguments {
    /// The step
    #[arg(value_name = "STEP")]
    step: String,
    #[command(flatten)]
    work: WorkFlag,
    #[command(flatten)]
    scopes: ScopeFlags,
}

/// Arguments of `kiln inputs`.
#[derive(Debug, Args)]
pub(super) struct InputsArguments {
    /// The step
    #[arg(value_name = "STEP")]
    step: String,
    /// Also what it only asked about, and what it looked for in vain
    #[arg(long, short)]
    all: bool,
    /// Write one JSON object a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    work: WorkFlag,
    #[command(flatten)]
    scopes: ScopeFlags,
}

/// Arguments of `kiln log`.
#[derive(Debug, Args)]
pub(super) struct LogArguments {
    /// The step
    #[arg(value_name = "STEP")]
    step: String,
    #[command(flatten)]
    work: WorkFlag,
}

/// Arguments of `kiln graph`.
#[derive(Debug, Args)]
pub(super) struct GraphArguments {
    /// Targets and steps [default: all]
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
    /// In Graphviz's language
    #[arg(long)]
    dot: bool,
}

impl Opened {
    /// The step of this very name.
    pub fn step(&self, name: &str) -> Result<StepId, Failure> {
        if let Some(id) = self.plan.named(name) {
            return Ok(id);
        }
        let names = match self.plan.wanted(&[name.to_owned()]) {
            Err(error) => return Err(error.into()),
            Ok(_) => self.plan.members(name),
        };
        let hint = match names.len() {
            0 => None,
            1..=MOST_NAMED => Some(format!("one of {}", names.join(", "))),
            count => {
                Some(format!("one of {} and {} more", names[..MOST_NAMED].join(", "), count - MOST_NAMED))
            }
        };
        Err(Failure { text: format!("`{name}` is no step but a name for several"), hint, code: USAGE })
    }

    /// The step of this very name: of the recipe, or none where it is a script's that ran here.
    fn step_or_script(&self, index: &Index, name: &str) -> Result<Option<StepId>, Failure> {
        match self.step(name) {
            Ok(id) => Ok(Some(id)),
            Err(_) if index.last_run(&work_name(&self.host.settings.work.value), name).is_some() => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    fn index(&self, scopes: &ScopeFlags) -> Result<Index, Failure> {
        let options = looking(scopes)?;
        Ok(Index::new(&self.host.store, options.scope, options.read_scopes))
    }

    /// What the step did last here.
    fn last_run(&self, index: &Index, step: &str) -> Result<LastRun, Failure> {
        self.ran(index, step).ok_or_else(|| self.never_ran(step))
    }

    fn ran(&self, index: &Index, step: &str) -> Option<LastRun> {
        index.last_run(&work_name(&self.host.settings.work.value), step)
    }

    fn never_ran(&self, step: &str) -> Failure {
        Failure {
            text: format!("step `{step}` never ran with WORK `{}`", self.host.settings.work.value.display()),
            hint: Some(format!("`kiln build {step}` runs it")),
            code: FAILED,
        }
    }

    /// What a build of the step would do.
    fn foresee(&self, id: StepId, scopes: &ScopeFlags) -> Result<Foreseen, Failure> {
        let wanted = self.plan.wanted(std::slice::from_ref(&self.plan.step(id).name))?;
        let steps = wanted.iter().flat_map(|id| &self.plan.step(*id).sources);
        let (settings, store) = (&self.host.settings, &self.host.store);
        let permission = self.host.permission();
        let locked = sources::lock(steps, settings, store, &permission, &mut |text| show::note(text))?;
        let machines = Machines::new(&self.host);
        let build = self.build(&machines, locked, permission, looking(scopes)?);
        let mut reasons = BTreeMap::new();
        let summary = build.run(&wanted, &Gate::default(), &mut Timeline::default(), &mut |news| {
            if let News::Starts(step, why) = news {
                reasons.insert(step.to_owned(), why.to_owned());
            }
            Ok(())
        })?;
        for (name, outcome) in summary.outcomes {
            if let Outcome::Failed(error) = outcome {
                return Err(Failure::from(*error).about(&format!("check step `{name}`")));
            }
        }
        let trace = build.trace(id, &summary.outputs)?;
        Ok(Foreseen { wanted, reasons, trace })
    }
}

/// What a build of a step would do.
struct Foreseen {
    /// It and all that it needs.
    wanted: BTreeSet<StepId>,
    /// Why steps of these would run.
    reasons: BTreeMap<String, String>,
    /// By what it would not run itself.
    trace: Option<Trace>,
}

/// Why a step ran last, and how that ended where nothing came of it.
fn last(last: LastRun) -> String {
    let ended = last.failure.or(last.not_kept.map(|why| format!("was not kept: {why}")));
    let ended = ended.map_or_else(String::new, |how| format!("; it {how}"));
    // When it is told, it has run.
    let why = if last.why == NEVER_RAN { "it had never run here" } else { &last.why };
    format!("it ran last because {why}{ended}")
}

/// `kiln why`.
pub(super) fn why(arguments: &WhyArguments, flags: Flags) -> Result<ExitCode, Failure> {
    let opened = open_for_scripts(arguments.work.among(flags))?;
    let index = opened.index(&arguments.scopes)?;
    let Some(id) = opened.step_or_script(&index, &arguments.step)? else {
        // Only the script knows what the step is now.
        let ran = opened.last_run(&index, &arguments.step)?;
        line(&harmless(format!("{}: {}", arguments.step, last(ran)).as_bytes()));
        return Ok(ExitCode::SUCCESS);
    };
    let Foreseen { wanted, reasons, .. } = opened.foresee(id, &arguments.scopes)?;
    // What has to run before comes before.
    let plan = &opened.plan;
    let mut needed: Vec<StepId> = wanted.into_iter().filter(|other| *other != id).collect();
    needed.push(id);
    let mut any = false;
    for id in needed {
        let name = &plan.step(id).name;
        if let Some(why) = reasons.get(name) {
            any = true;
            line(&harmless(format!("{name}: {why}").as_bytes()));
        }
    }
    if !any {
        let before = opened.ran(&index, &arguments.step).map(|ran| format!("; {}", last(ran)));
        let said = format!("{}: up to date{}", arguments.step, before.unwrap_or_default());
        line(&harmless(said.as_bytes()));
    }
    Ok(ExitCode::SUCCESS)
}

/// `kiln log`.
pub(super) fn log(arguments: &LogArguments, flags: Flags) -> Result<ExitCode, Failure> {
    let opened = open_for_scripts(arguments.work.among(flags))?;
    let scopes = ScopeFlags::trusted();
    let index = opened.index(&scopes)?;
    let id = opened.step_or_script(&index, &arguments.step)?;
    let (log, failed) = match (opened.ran(&index, &arguments.step), id) {
        (Some(ran), _) => (ran.log, ran.failure),
        // It may have run elsewhere, with another WORK.
        (None, Some(id)) => match opened.foresee(id, &scopes)?.trace {
            Some(trace) => (trace.log, None),
            None => return Err(opened.never_ran(&arguments.step)),
        },
        (None, None) => return Err(opened.never_ran(&arguments.step)),
    };
    let failure = |error: io::Error| Failure {
        text: format!("the log of step `{}` cannot be read: {error}", arguments.step),
        hint: None,
        code: FAILED,
    };
    if let Some(log) = log {
        let mut file = opened.host.store.blobs().file(&log).map_err(failure)?;
        let mut output = show::GuestOutput::new(None);
        let mut buffer = vec![0; 64 << 10];
        loop {
            match io::Read::read(&mut file, &mut buffer).map_err(failure)? {
                0 => break,
                count => output.write(kiln_wire::Stream::Stdout, &buffer[..count]).map_err(failure)?,
            }
        }
        output.finish().map_err(failure)?;
    }
    if let Some(how) = failed {
        show::note(&format!("step `{}` {how}", arguments.step));
    }
    Ok(ExitCode::SUCCESS)
}

/// `kiln inputs`.
pub(super) fn inputs(arguments: &InputsArguments, flags: Flags) -> Result<ExitCode, Failure> {
    let opened = open_for_scripts(arguments.work.among(flags))?;
    let index = opened.index(&arguments.scopes)?;
    let id = opened.step_or_script(&index, &arguments.step)?;
    let trace = match (opened.ran(&index, &arguments.step), id) {
        (Some(last), _) => {
            let trace = index.traces(&last.key.digest()).into_iter().map(|found| found.trace).next();
            trace.ok_or_else(|| Failure {
                text: format!("nothing is kept of what step `{}` read", arguments.step),
                hint: last.not_kept.or(last.failure),
                code: FAILED,
            })?
        }
        // It may have run elsewhere, with another WORK.
        (None, Some(id)) => {
            let trace = opened.foresee(id, &arguments.scopes)?.trace;
            trace.ok_or_else(|| opened.never_ran(&arguments.step))?
        }
        (None, None) => return Err(opened.never_ran(&arguments.step)),
    };
    let mut out = io::stdout().lock();
    let printed = print_inputs(&mut out, &trace, arguments).and_then(|()| out.flush());
    if printed.is_err() {
        // Who reads it has enough.
        return Ok(ExitCode::SUCCESS);
    }
    drop(out);
    let (files, bytes) = trace.contents();
    show::note(&format!("it read {files} files ({})", show_bytes(bytes)));
    if let Some(id) = id {
        unread(&opened.plan, id, &trace);
    }
    Ok(ExitCode::SUCCESS)
}

/// Something that a step asked about, as `--json` has it.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Input<'a> {
    /// Its path in the guest; `%NN` for a byte that is not UTF-8, and for `%`.
    #[schemars(with = "String")]
    path: PathBytes,
    /// Of what it is a part: `src`, `work` or `sources`.
    share: &'a str,
    /// What was asked.
    asked: Asked,
    /// Digest of the content, of a link's text or of the listing.
    #[schemars(with = "Option<String>")]
    digest: Option<Digest>,
}

/// The most that was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Asked {
    /// What is in it.
    Content,
    /// Which names are in it.
    Listing,
    /// What it is.
    Metadata,
    /// It is not there.
    Missed,
}

impl Input<'_> {
    fn row(&self) -> String {
        let how = match (self.asked, &self.digest) {
            (Asked::Content, Some(digest)) => digest.to_string(),
            (Asked::Content | Asked::Metadata, _) => "asked about".to_owned(),
            (Asked::Listing, _) => "listed".to_owned(),
            (Asked::Missed, _) => "looked for in vain".to_owned(),
        };
        format!("{how:64}  {}", harmless(self.path.to_string().as_bytes()))
    }
}

/// What a step read; with `all`, also what it only asked about.
fn inputs_of(trace: &Trace, all: bool) -> impl Iterator<Item = Input<'_>> {
    trace.shares.iter().flat_map(move |share| {
        let input = |path: &[u8], asked, digest| {
            let slash: &[u8] = if path.is_empty() { b"" } else { b"/" };
            let path = PathBytes([share.guest.as_bytes(), slash, path].concat());
            Input { path, share: &share.name, asked, digest }
        };
        let entries = share.entries.iter().map(move |entry| {
            let (asked, digest) = match (entry.content, entry.observed.contains(Observed::LISTING)) {
                (Some(digest), _) => (Asked::Content, Some(digest)),
                (None, true) => (Asked::Listing, entry.listing),
                (None, false) => (Asked::Metadata, None),
            };
            input(&entry.path, asked, digest)
        });
        let entries = entries.filter(move |input| all || input.asked != Asked::Metadata);
        let missed = share.missed.iter().filter(move |_| all);
        entries.chain(missed.map(move |path| input(path, Asked::Missed, None)))
    })
}

fn print_inputs(out: &mut impl Write, trace: &Trace, arguments: &InputsArguments) -> io::Result<()> {
    for input in inputs_of(trace, arguments.all) {
        match arguments.json {
            true => writeln!(out, "{}", serde_json::to_string(&input)?)?,
            false => writeln!(out, "{}", input.row())?,
        }
    }
    Ok(())
}

/// Says what the step declares to need and did not read.
fn unread(plan: &Plan, id: StepId, trace: &Trace) {
    let step = plan.step(id);
    let read = |share: &str| -> BTreeSet<&[u8]> {
        let shares = trace.shares.iter().filter(|found| found.name == share);
        let entries = shares.flat_map(|share| &share.entries).filter(|entry| entry.content.is_some());
        entries.map(|entry| entry.path.as_slice()).collect()
    };
    let sources = read("sources");
    for source in step.sources.iter().filter(|source| !sources.contains(source.name.as_bytes())) {
        show::note(&format!("it sees source `{}` and did not read it", source.name));
    }
    let work = read("work");
    for need in &step.needs {
        let need = plan.step(*need);
        let is_read = |path: &&[u8]| {
            kiln_artifact::tree::TreePath::new(path).is_ok_and(|path| need.outputs.declare(&path))
        };
        if !need.outputs.is_empty() && !work.iter().any(is_read) {
            show::note(&format!("it needs step `{}` and read no content of its outputs", need.name));
        }
    }
}

/// `kiln graph`.
pub(super) fn graph(arguments: &GraphArguments, flags: Flags) -> Result<ExitCode, Failure> {
    let settings = Settings::read(flags)?;
    let plan = recipe::plan(recipe::found(&settings)?)?;
    let wanted = match arguments.targets.is_empty() {
        true => (0..plan.steps.len()).map(StepId).collect(),
        false => plan.wanted(&arguments.targets)?,
    };
    let text = if arguments.dot { dot(&plan, &wanted) } else { drawing(&plan, &wanted) };
    let _ = show::try_line(text.trim_end());
    Ok(ExitCode::SUCCESS)
}

fn dot(plan: &Plan, wanted: &BTreeSet<StepId>) -> String {
    let mut text = "digraph kiln {\n  rankdir = LR;\n  node [shape = box];\n".to_owned();
    for id in wanted {
        let step = plan.step(*id);
        text += &format!("  \"{}\";\n", step.name);
        for need in &step.needs {
            text += &format!("  \"{}\" -> \"{}\";\n", plan.step(*need).name, step.name);
        }
    }
    text + "}\n"
}

/// Each step that no other needs, and below it what it needs; what was drawn before is only named.
fn drawing(plan: &Plan, wanted: &BTreeSet<StepId>) -> String {
    let needed: BTreeSet<StepId> = wanted.iter().flat_map(|id| plan.step(*id).needs.clone()).collect();
    let mut text = String::new();
    let mut drawn = BTreeSet::new();
    for top in wanted.iter().filter(|id| !needed.contains(id)) {
        // A step, what is drawn before it, and what before those below it.
        let mut open = vec![(*top, String::new(), String::new())];
        while let Some((id, before, below)) = open.pop() {
            let step = plan.step(id);
            let is_new = drawn.insert(id);
            let more = if is_new || step.needs.is_empty() { "" } else { " …" };
            text += &format!("{before}{}{more}\n", step.name);
            if !is_new {
                continue;
            }
            for (number, need) in step.needs.iter().enumerate().rev() {
                let (branch, bar) = match number + 1 == step.needs.len() {
                    true => ("└─ ", "   "),
                    false => ("├─ ", "│  "),
                };
                open.push((*need, format!("{below}{branch}"), format!("{below}{bar}")));
            }
        }
    }
    text
}
