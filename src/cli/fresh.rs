//! The machine of a recipe's step, started for `kiln shell STEP` and `kiln exec STEP`: what the step needs is built first, as
//! `kiln build` does.

use std::path::PathBuf;

use clap::Args;
use kiln_wire::Exec;

use super::build::{self, Opened, ScopeFlags, Watch, looking};
use super::choice::Choice;
use super::report::{Manner, Reporter};
use super::run::{FULL, KILN_FAILED};
use super::show::Narrator;
use super::trace::TraceOut;
use super::{FAILED, Failure, USAGE, recipe};
use crate::agent::{Session, SessionError};
use crate::engine::build::sources;
use crate::engine::build::{Gate, Machines, Timeline};
use crate::engine::{Entered, Event, Step, enter};
use crate::keeper::DoorError;
use crate::settings::{Flags, Settings};

/// What counts only where a step of the recipe is entered.
#[derive(Debug, Args)]
#[command(next_help_heading = "For a step of the recipe")]
pub(super) struct StepFlags {
    /// Where outputs of the steps that it needs go [env: WORK] [default: as of `kiln build`]
    #[arg(long, value_name = "DIR")]
    work: Option<PathBuf>,
    /// The network of a step that asks for it: none, with which it is refused, or full: this host's
    #[arg(long, value_name = "NETWORK", default_value = "none", value_parser = Choice(&["none", FULL]))]
    net: String,
    #[command(flatten)]
    scopes: ScopeFlags,
}

/// The machine, and what it is shown for as long as it lives.
pub(super) struct Fresh {
    // Dropped in this order.
    entered: Entered,
    _step: Step,
    _opened: Opened,
    /// Commands that were run.
    commands: u32,
}

/// Whether the recipe that counts here has a step of this name. One that cannot be read has none.
pub(super) fn is_step(name: &str, flags: Flags) -> bool {
    let plan = Settings::read(flags).ok().and_then(|settings| recipe::plan(settings.recipe.as_ref()?).ok());
    plan.is_some_and(|plan| plan.named(name).is_some())
}

/// Starts the machine that the step `name` would get, where `unknown` says that no machine is called so.
pub(super) fn start(
    name: &str,
    step_flags: &StepFlags,
    mut flags: Flags,
    unknown: &DoorError,
) -> Result<Fresh, Failure> {
    flags.work.clone_from(&step_flags.work);
    flags.network = step_flags.net == FULL;
    let settings = Settings::read(flags.clone())?;
    if settings.recipe.is_none() {
        return Err(Failure::new(unknown, unknown.hint(), FAILED));
    }
    let opened = build::open(flags)?;
    let id = opened.step(name).map_err(|failure| Failure {
        text: format!("`{name}` is no machine and no step of the recipe"),
        hint: failure.hint.or_else(|| unknown.hint()),
        ..failure
    })?;
    if !opened.plan.step(id).command.is_run() {
        return Err(Failure {
            text: format!("step `{name}` has no machine that could be entered: kiln does it itself"),
            hint: Some(format!("kiln build {name} does it; steps with run or script have machines")),
            code: USAGE,
        });
    }
    let mut wanted = opened.plan.wanted(&[name.to_owned()])?;
    let mut options = looking(&step_flags.scopes)?;
    (options.keep_going, options.dry_run) = (false, false);

    let gate = Gate::default();
    let mut reporter = Reporter::begin(Manner::Plain, wanted.len(), &opened.host);
    let watch = Watch::start(&gate, &opened.host, reporter.leaving(false, TraceOut::default()))?;
    let mut narrator = Narrator::new(false);
    let permission = opened.host.permission();
    let steps = wanted.iter().flat_map(|id| &opened.plan.step(*id).sources);
    let (settings, store) = (&opened.host.settings, &opened.host.store);
    let sources = sources::lock(steps, settings, store, &permission, &mut |text| narrator.progress(text))?;
    wanted.remove(&id);
    let machines = Machines::new(&opened.host);
    let build = opened.build(&machines, sources, permission, options);
    let summary = build.run(&wanted, &gate, &mut Timeline::default(), &mut |news| {
        watch.settle();
        reporter.tell(&news)
    })?;
    if let Some((failed, _)) = summary.outcomes.iter().find(|(_, outcome)| !outcome.is_good()) {
        return Err(Failure {
            text: format!("step `{name}` cannot be entered: step `{failed}`, which it needs, failed"),
            hint: None,
            code: KILN_FAILED,
        });
    }
    drop(reporter);
    let step = build.stage(id, &summary.outputs)?;
    let entered = enter(&step, &opened.host, &mut |event| {
        watch.settle();
        tell(&mut narrator, &event);
        Ok(())
    })?;
    narrator.say(&format!(
        "in a machine as step `{name}` gets it; it ends with this command, and nothing of it is kept"
    ));
    watch.call_off();
    Ok(Fresh { entered, _step: step, _opened: opened, commands: 0 })
}

fn tell(narrator: &mut Narrator, event: &Event<'_>) {
    match event {
        Event::Progress(text) => narrator.progress(text),
        Event::Warning(text) => narrator.warn(text),
        Event::Machine(identity) => narrator.say(&identity.to_string()),
        Event::Output(..) | Event::Phase(..) | Event::Kept(..) => {}
    }
}

impl Fresh {
    /// The conversation with the machine's agent, and `exec` as the next command in it.
    pub fn next(&mut self, exec: Exec) -> (&mut Session, Exec) {
        self.commands += 1;
        let exec = Exec { id: self.commands, ..self.entered.complete(exec) };
        (self.entered.session(), exec)
    }

    /// Why the conversation ended with `error`.
    pub fn explain(&mut self, error: SessionError) -> Failure {
        let mut narrator = Narrator::new(false);
        let error = self.entered.explain(error, &mut |event| {
            tell(&mut narrator, &event);
            Ok(())
        });
        error.into()
    }
}
