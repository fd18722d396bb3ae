//! `kiln build`: its flags, and the recipe opened for it and for the verbs that ask about a build.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use clap::Args;
use signal_hook::SigId;
use signal_hook::iterator::{Handle, Signals};

use super::again::StepCommands;
use super::choice::Choice;
use super::events::Line;
use super::interrupt::{heeded_signals, write_now};
use super::keep::{self, KeepFailedFlags};
use super::report::{Commands, Manner, Reporter};
use super::run::FULL;
use super::screen::Screen;
use super::trace::TraceOut;
use super::{FAILED, Failure, USAGE, recipe, show};
use crate::cache::Scope;
use crate::engine::Host;
use crate::engine::build::sources::{self, Locked, Permission};
use crate::engine::build::{Build, Gate, KeptStep, Machines, Options, Outcome, Timeline};
use crate::keeper::background::Caller;
use crate::plan::Plan;
use crate::plan::graph::UnknownTarget;
use crate::settings::{Flags, Settings};
use crate::threads;

/// Arguments of `kiln build`.
#[derive(Debug, Args)]
#[command(after_help = "\
A step runs when something that it read the last time is another now, or when it is another step: its command, root,
kernel or environment. `kiln why STEP` says what. Its outputs are merged into WORK when it succeeds.

Examples:
  kiln build                  the target `default`, or every step
  kiln build -n package       what would run for that step, and why
  kiln build -k -j 4          go on after a failure; four steps at once
  kiln build --keep           keep the machine of a step that fails
  kiln build --set layout=single    with another value of a variable of the recipe
  kiln build --locked         refuse what kiln.lock does not name")]
pub(super) struct BuildArguments {
    /// Targets and steps
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
    /// Most steps that run at once [default: as many as processors]
    #[arg(long, short, value_name = "N")]
    jobs: Option<usize>,
    /// When a step fails, still run those that do not need it
    #[arg(long, short)]
    keep_going: bool,
    /// Run nothing: say what would run, and why. Roots and sources are fetched where they are not there yet
    #[arg(long, short = 'n')]
    dry_run: bool,
    /// Where outputs go [env: WORK] [default: /x/PROJECT, else $HOME/.cache/PROJECT]
    #[arg(long, value_name = "DIR")]
    pub work: Option<PathBuf>,
    /// Let outputs replace files in WORK that kiln did not put there
    #[arg(long)]
    overwrite: bool,
    /// The network of steps that ask for it (network = "full"): none, with which they are refused, or full: this host's
    #[arg(long, value_name = "NETWORK", default_value = "none", value_parser = Choice(&["none", FULL]))]
    pub net: String,
    #[command(flatten)]
    keep: KeepFailedFlags,
    #[command(flatten)]
    scopes: ScopeFlags,
    /// Write events as JSON, one a line, to standard output
    #[arg(long)]
    pub json: bool,
    /// Write a timeline that trace viewers open
    #[arg(long, value_name = "FILE")]
    trace_out: Option<PathBuf>,
    /// Boot machines, rather than copy one that was booted before [env: KILN_TEMPLATE=off]
    #[arg(long)]
    pub no_template: bool,
    /// Say nothing but errors and what failed steps printed
    #[arg(long, short)]
    pub quiet: bool,
}

/// Whose results may be used.
#[derive(Debug, Args, Default, Clone)]
pub(super) struct ScopeFlags {
    /// The scope whose results this run reads and writes
    #[arg(long, value_name = "NAME", default_value = "trusted")]
    pub scope: String,
    /// Another scope whose results it may read
    #[arg(long, value_name = "NAME")]
    pub read_scope: Vec<String>,
}

impl ScopeFlags {
    /// As without flags.
    pub fn trusted() -> Self {
        Self { scope: Scope::default().to_string(), read_scope: Vec::new() }
    }
}

/// A recipe opened for a build.
pub(super) struct Opened {
    pub host: Host,
    pub plan: Plan,
    folder: PathBuf,
}

impl From<UnknownTarget> for Failure {
    fn from(error: UnknownTarget) -> Self {
        let hint = error.meant.as_ref().map(|meant| format!("did you mean `{meant}`?"));
        Self::new(&error, hint, USAGE)
    }
}

/// As [`open`]; without a recipe, one without steps: scripts have some.
pub(super) fn open_for_scripts(flags: Flags) -> Result<Opened, Failure> {
    let settings = Settings::read(flags)?;
    if settings.recipe.is_some() {
        return of_recipe(settings);
    }
    let folder = settings.directory.clone();
    Ok(Opened { host: Host::open(settings)?, plan: Plan::default(), folder })
}

/// Reads the recipe, and opens the store.
pub(super) fn open(flags: Flags) -> Result<Opened, Failure> {
    of_recipe(Settings::read(flags)?)
}

fn of_recipe(settings: Settings) -> Result<Opened, Failure> {
    let file = recipe::found(&settings)?;
    let plan = recipe::plan(file)?;
    let folder = file.path.parent().unwrap_or(Path::new("/")).to_owned();
    Ok(Opened { host: Host::open(settings)?, plan, folder })
}

/// The options of a build that only looks.
pub(super) fn looking(scopes: &ScopeFlags) -> Result<Options, Failure> {
    let scope = |text: &String| text.parse::<Scope>().map_err(|error| Failure::new(&error, None, USAGE));
    Ok(Options {
        jobs: thread::available_parallelism().map_or(1, usize::from),
        keep_going: true,
        dry_run: true,
        overwrite: false,
        scope: scope(&scopes.scope)?,
        read_scopes: scopes.read_scope.iter().map(scope).collect::<Result<_, _>>()?,
    })
}

impl Opened {
    /// The build of this recipe.
    pub fn build<'a>(
        &'a self,
        machines: &'a Machines<'a>,
        sources: Locked,
        permission: Permission,
        options: Options,
    ) -> Build<'a, Machines<'a>> {
        Build {
            plan: &self.plan,
            settings: &self.host.settings,
            store: &self.host.store,
            runner: machines,
            folder: self.folder.clone(),
            given: BTreeMap::new(),
            sources,
            permission,
            options,
        }
    }
}

impl BuildArguments {
    /// Whether this build may have to outlive its caller. One that says something wrong will not get so far.
    pub fn may_stay(&self) -> bool {
        !self.dry_run && matches!(self.keep.idle(), Ok(Some(_)))
    }
}

/// `kiln build`; with a `caller`, whom it gives its status where machines stay.
pub(super) fn build(
    arguments: &BuildArguments,
    flags: Flags,
    caller: Option<Caller>,
) -> Result<ExitCode, Failure> {
    let timeline = Timeline::default();
    let built = TraceOut::create(arguments.trace_out.as_deref(), &timeline).and_then(|trace| {
        let built = carry_out(arguments, flags, timeline, &trace);
        // Of a build that failed, too; which is what is said then.
        let written = trace.write();
        built.and_then(|built| written.map(|()| built))
    });
    // What was opened holds the store's place for the views that kept machines still serve.
    let (code, kept, _opened) = built.inspect_err(|failure| {
        if arguments.json {
            show::line(&failure.event().to_string());
        }
    })?;
    match caller {
        Some(caller) if !kept.is_empty() => Ok(keep::stay_with(kept, caller, code)),
        _ => Ok(ExitCode::from(code)),
    }
}

/// Carries the build out; gives its exit code, and the machines of failed steps that stay.
fn carry_out(
    arguments: &BuildArguments,
    mut flags: Flags,
    mut timeline: Timeline,
    trace: &TraceOut,
) -> Result<(u8, Vec<KeptStep>, Opened), Failure> {
    flags.work.clone_from(&arguments.work);
    flags.no_template = arguments.no_template;
    flags.network = arguments.net == FULL;
    let idle = arguments.keep.idle()?;
    let commands = StepCommands::new(&flags, &arguments.scopes, arguments.overwrite);
    let opened = open(flags)?;
    if arguments.jobs == Some(0) {
        return Err(Failure { text: "--jobs takes 1 or more".to_owned(), hint: None, code: USAGE });
    }
    let mut options = looking(&arguments.scopes)?;
    options.jobs = arguments.jobs.unwrap_or(options.jobs);
    options.keep_going = arguments.keep_going || arguments.dry_run;
    options.dry_run = arguments.dry_run;
    options.overwrite = arguments.overwrite;
    let wanted = opened.plan.wanted(&arguments.targets)?;

    let manner = match Manner::of(arguments.json, arguments.quiet) {
        // What would run, and why, is all there is to say.
        Manner::Drawn if arguments.dry_run => Manner::Plain,
        manner => manner,
    };
    let (settings, store) = (&opened.host.settings, &opened.host.store);
    let mut reporter = Reporter::begin(manner, wanted.len(), &opened.host);
    let gate = Gate::default();
    let without_machine = opened.plan.steps.iter().filter(|step| !step.command.is_run());
    reporter = reporter.with_commands(Commands {
        words: commands,
        without_machine: without_machine.map(|step| step.name.clone()).collect(),
        store: keep::store_words(settings),
    });
    let watch = Watch::start(&gate, &opened.host, reporter.leaving(arguments.json, trace.clone()))?;
    let permission = opened.host.permission();
    let steps = wanted.iter().flat_map(|id| &opened.plan.step(*id).sources);
    let sources = sources::lock(steps, settings, store, &permission, &mut |text| reporter.progress(text))?;
    let machines = Machines::new(&opened.host).keeping(idle);
    let build = opened.build(&machines, sources, permission, options);
    let summary = build.run(&wanted, &gate, &mut timeline, &mut |news| {
        watch.settle();
        reporter.tell(&news)
    })?;
    let failed_to_start = summary.outcomes.iter().find_map(|(_, outcome)| match outcome {
        Outcome::Failed(error) => Some(super::code_of_build(error)),
        _ => None,
    });
    let code = if summary.is_good() { 0 } else { failed_to_start.unwrap_or(FAILED) };
    reporter.end(&summary, code, settings);
    drop(reporter);
    let kept = machines.into_kept();
    Ok((code, kept, opened))
}

/// How a build is left on Ctrl-C and its like.
pub(super) struct Leaving {
    /// Whether an event is written.
    pub json: bool,
    /// What is drawn on.
    pub screen: Option<Screen>,
    /// Where the timeline goes.
    pub trace: TraceOut,
}

/// Ends the build on Ctrl-C and its like: between two merges, and with a word on what stays.
pub(super) struct Watch {
    // Set by the signal's handler itself: whatever fails because of the signal fails after that.
    is_interrupted: Arc<AtomicBool>,
    flags: Vec<SigId>,
    signals: Handle,
}

impl Watch {
    /// Watches from now on; where there is a signal, `leaving` says what is done first.
    ///
    /// # Errors
    /// What registering for signals says; there is no thread.
    pub fn start(gate: &Gate, host: &Host, leaving: Leaving) -> Result<Self, Failure> {
        let failure = |error: io::Error| Failure::new(&error, None, FAILED);
        let is_interrupted = Arc::<AtomicBool>::default();
        let heeded = heeded_signals();
        let mut signals = Signals::new(&heeded).map_err(failure)?;
        let handle = signals.handle();
        let flag = |signal| signal_hook::flag::register(signal, Arc::clone(&is_interrupted));
        let flags = heeded.into_iter().map(flag).collect::<io::Result<_>>().map_err(failure)?;
        let gate = gate.clone();
        let (temporary, work) = (host.store.temporary(), host.settings.work.value.clone());
        threads::start("interrupts", move || {
            let Some(signal) = signals.forever().next() else { return };
            gate.shut();
            let name = signal_hook::low_level::signal_name(signal).unwrap_or("a signal");
            let text = format!(
                "interrupted by {name}; what ended before is done and its outputs are in WORK `{}`, nothing else is",
                work.display()
            );
            let _ = std::fs::remove_dir_all(&temporary);
            let _ = leaving.trace.write();
            if leaving.json {
                let event = Line::Error { text: &text, hint: None, again: None };
                write_now(io::stdout(), &format!("{event}\n"));
            }
            // Else there may be a line of progress, and what the terminal shows of the key.
            let before = match &leaving.screen {
                Some(screen) => {
                    screen.leave();
                    ""
                }
                None => "\n",
            };
            write_now(io::stderr(), &format!("{before}{}", show::error_line(&text)));
            std::process::exit(128 + signal)
        })
        .map_err(failure)?;
        Ok(Self { is_interrupted, flags, signals: handle })
    }

    /// Returns only where there was no signal. A terminal sends its own to the machines as well: what ends because of that
    /// is not news, and the watcher ends all of it.
    pub fn settle(&self) {
        while self.is_interrupted.load(Ordering::SeqCst) {
            thread::park();
        }
    }

    /// Watches no longer: signals are another's.
    pub fn call_off(self) {
        self.settle();
        self.signals.close();
        for flag in self.flags {
            signal_hook::low_level::unregister(flag);
        }
    }
}
