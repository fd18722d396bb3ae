//! `kiln run --step NAME`: a step of a shell script, kept and reported as one of a recipe is.
//!
//! It is a build of one step. What it needs is what steps of those names have put into WORK before, in the same way; so a
//! script that is run again runs nothing that has nothing new to read.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use super::build::{ScopeFlags, Watch, looking};
use super::code_of_build;
use super::report::{Manner, Reporter};
use super::run::{KILN_FAILED, RunArguments};
use super::show::{self, line};
use super::trace::TraceOut;
use super::{CANNOT, Failure, USAGE, again, recipe, verdict};
use crate::cache::Index;
use crate::engine::build::sources::{Locked, Permission};
use crate::engine::build::{Build, Gate, Machines, News, Outcome, Timeline, work_name};
use crate::engine::{Clock, Host, KernelChoice, Step};
use crate::plan::graph::{Command, Kernel, Limits, Root};
use crate::plan::recipe::{ClockWord, NAMES, NetworkWord, is_name};
use crate::plan::{Plan, PlannedStep, RootSpec, StepId};
use crate::settings::{Flags, Settings};

/// What a run is called, and what it needs.
#[derive(Debug, Args)]
pub(super) struct NameFlags {
    /// Make it a step: it runs only when it is another step than before or something that it read has changed, and sees
    /// in WORK what --needs names and nothing else
    #[arg(
        long,
        value_name = "NAME",
        conflicts_with_all = [
            "mount", "disk", "stdin", "grace", "attributes", "module", "module_tree", "cpu", "nested", "wire", "keep",
            "keep_for", "toolbox", "require", "output", "reads", "net",
        ]
    )]
    pub step: Option<String>,
    /// A step that ran before with --step: what it put into WORK is seen
    #[arg(long, value_name = "NAME", requires = "step")]
    needs: Vec<String>,
    /// The scope whose results the step reads and writes [default: trusted]
    #[arg(long, value_name = "NAME", requires = "step")]
    scope: Option<String>,
    /// Another scope whose results it may read
    #[arg(long, value_name = "NAME", requires = "step")]
    read_scope: Vec<String>,
}

/// Runs the step `name` where it must, and gives its command's status.
pub(super) fn run(arguments: &RunArguments, name: &str, flags: Flags) -> ExitCode {
    match try_run(arguments, name, flags) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            if arguments.json {
                line(&failure.event().to_string());
            }
            show::failure(&failure.text, failure.hint.as_deref());
            ExitCode::from(status(failure.code))
        }
    }
}

/// The status of a run whose command was not carried through.
fn status(code: u8) -> u8 {
    match code {
        code @ (USAGE | CANNOT) => code,
        _ => KILN_FAILED,
    }
}

fn usage(text: String, hint: Option<&str>) -> Failure {
    Failure { text, hint: hint.map(ToOwned::to_owned), code: USAGE }
}

fn try_run(arguments: &RunArguments, name: &str, flags: Flags) -> Result<u8, Failure> {
    let named = &arguments.named;
    let step = super::run::step(arguments)?;
    if let Some(bad) = [name].into_iter().chain(named.needs.iter().map(String::as_str)).find(|n| !is_name(n))
    {
        return Err(usage(format!("`{}` is no name for a step", bad.escape_debug()), Some(NAMES)));
    }
    if named.needs.iter().any(|need| need == name) {
        return Err(usage(format!("step `{name}` cannot need itself"), None));
    }
    let settings = Settings::read(flags)?;
    let recipe = settings.recipe.as_ref().map(recipe::plan).transpose()?;
    if recipe.as_ref().is_some_and(|plan| plan.named(name).is_some()) {
        let hint = format!("`kiln build {name}` runs it; give this one another name");
        return Err(usage(format!("step `{name}` is one of the recipe's"), Some(&hint)));
    }
    let host = Host::open(settings)?;
    let standard = ScopeFlags::trusted();
    let scopes = ScopeFlags {
        scope: named.scope.clone().unwrap_or(standard.scope),
        read_scope: named.read_scope.clone(),
    };
    let mut options = looking(&scopes)?;
    (options.jobs, options.dry_run, options.overwrite) = (1, false, arguments.overwrite);
    let index = Index::new(&host.store, options.scope.clone(), options.read_scopes.clone());

    let planned = plan_step(name, &step)?;
    let mut plan = Plan::default();
    plan.ignore = recipe.map(|plan| plan.ignore).unwrap_or_default();
    let work = &host.settings.work.value;
    let given = needed(&named.needs, &index, work, &planned, &mut plan)?;
    let id = StepId(plan.steps.len());
    plan.steps.push(PlannedStep { needs: given.keys().copied().collect(), ..planned });

    let gate = Gate::default();
    let mut reporter = Reporter::begin(Manner::of(arguments.json, arguments.quiet), 1, &host);
    let watch = Watch::start(&gate, &host, reporter.leaving(arguments.json, TraceOut::default()))?;
    let machines = Machines::new(&host);
    let build = Build {
        plan: &plan,
        settings: &host.settings,
        store: &host.store,
        runner: &machines,
        given,
        // As of any other run: from where it was called.
        folder: PathBuf::new(),
        sources: Locked::default(),
        permission: Permission::default(),
        options,
    };
    let summary = build.run(&[id].into(), &gate, &mut Timeline::default(), &mut |news: News<'_>| {
        watch.settle();
        reporter.tell(&news)
    })?;
    let code = match summary.outcomes.first() {
        Some((_, Outcome::CommandFailed(ran))) => verdict::exit_code(&ran.ended),
        Some((_, Outcome::Failed(error))) => status(code_of_build(error)),
        _ => 0,
    };
    match summary.outcomes.first() {
        Some((_, Outcome::UpToDate { .. })) if !arguments.json => {
            reporter.say(&format!("{name}: up to date"));
        }
        _ => reporter.end(&summary, code, &host.settings),
    }
    drop(reporter);
    if code != 0 && !arguments.json {
        show::note(&format!("again: {}", again::command()));
    }
    Ok(code)
}

/// Puts the steps that are needed into `plan`, and gives what they have put out.
fn needed(
    names: &[String],
    index: &Index,
    work: &Path,
    step: &PlannedStep,
    plan: &mut Plan,
) -> Result<BTreeMap<StepId, kiln_digest::Digest>, Failure> {
    let mut given = BTreeMap::new();
    for need in names {
        if plan.named(need).is_some() {
            continue;
        }
        let placed = index.placed(&work_name(work), need).ok_or_else(|| {
            let text = format!(
                "step `{need}` has put nothing into WORK `{}` in a scope that this run reads",
                work.display()
            );
            usage(text, Some("run it before the step that needs it: `kiln run --step`, or `kiln build`"))
        })?;
        given.insert(StepId(plan.steps.len()), placed.outputs);
        // Only its name counts: it is not built.
        plan.steps.push(PlannedStep { name: need.clone(), ..step.clone() });
    }
    Ok(given)
}

/// The step as a plan has it.
fn plan_step(name: &str, step: &Step) -> Result<PlannedStep, Failure> {
    if let RootSpec::Live(_) = step.root {
        let text = "a live root has no digest that a step could be known by".to_owned();
        return Err(usage(text, Some("import it: --root dir:PATH")));
    }
    let words = step.argv.iter().map(|word| {
        std::str::from_utf8(word).map(ToOwned::to_owned).map_err(|_| {
            usage(format!("`{}` is not UTF-8, which words of a step are", word.escape_ascii()), None)
        })
    });
    let mut words = words.collect::<Result<Vec<String>, Failure>>()?;
    let last = words.pop().unwrap_or_default();
    Ok(PlannedStep {
        name: name.to_owned(),
        root: Root::Spec(step.root.clone()),
        kernel: Some(match &step.kernel {
            KernelChoice::Debian(suite) => Kernel::Debian(suite.clone()),
            KernelChoice::File { kernel, modules } => {
                Kernel::File { kernel: kernel.clone(), modules: modules.clone() }
            }
            KernelChoice::Blob { .. } => {
                let text = "a step of a script has no kernel that another step puts out".to_owned();
                return Err(usage(text, Some("--kernel FILE names one in WORK")));
            }
        }),
        command: Command::Text(last),
        interpreter: words,
        needs: Vec::new(),
        inputs: crate::plan::Outputs::default(),
        outputs: step.outputs.clone(),
        sources: Vec::new(),
        env: step.env.clone(),
        directory: step.directory.clone(),
        writable_source: step.source_layer,
        network: if step.network { NetworkWord::Full } else { NetworkWord::None },
        clock: match step.clock {
            Clock::Host => ClockWord::Host,
            Clock::Fixed => ClockWord::Fixed,
        },
        limits: Limits {
            memory_bytes: Some(step.memory_bytes),
            cpus: Some(step.cpus),
            scratch_bytes: Some(step.scratch_bytes),
            timeout: step.timeout,
            printed_bytes: Some(step.limits.printed_bytes),
            outputs_bytes: Some(step.limits.total_bytes),
            files: Some(u64::from(step.limits.entries)),
            processes: Some(step.limits.processes),
        },
        untrusted: step.boundary.untrusted,
    })
}
