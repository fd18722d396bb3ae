//! `--keep` of `kiln run` and `kiln build`: what is said of machines that stay, and staying with them.

use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use clap::Args;

use super::choice::Choice;
use super::events::Line;
use super::show::{self, line};
use super::{Failure, USAGE};
use crate::engine::Keep;
use crate::engine::build::KeptStep;
use crate::keeper::Kept;
use crate::keeper::background::Caller;
use crate::plan::{parse_duration, quote, show_age};
use crate::settings::{Origin, Settings};
use crate::threads;

/// When a machine stays after its run, and with what in it.
#[derive(Debug, Args)]
pub(super) struct KeepFlags {
    /// Keep the machine for `kiln shell` and `kiln exec`: on `failure` of the command, or `always`
    #[arg(long, value_name = "WHEN", num_args = 0..=1, require_equals = true, default_missing_value = "failure", value_parser = Choice(&["failure", "always"]))]
    keep: Option<String>,
    #[command(flatten)]
    idle: IdleFlag,
    /// Show the command a shell, strace and other small programs at /toolbox; a kept machine gets them anyway
    #[arg(long)]
    pub toolbox: bool,
}

/// When machines of a build's steps stay.
#[derive(Debug, Args)]
pub(super) struct KeepFailedFlags {
    /// Keep the machines of failed steps for `kiln shell` and `kiln exec`
    #[arg(long)]
    keep: bool,
    #[command(flatten)]
    idle: IdleFlag,
}

impl KeepFailedFlags {
    /// For how long they stay; none where they do not.
    pub fn idle(&self) -> Result<Option<Duration>, Failure> {
        let idle = self.idle.parse()?;
        Ok(self.keep.then_some(idle))
    }
}

/// How long a machine stays.
#[derive(Debug, Args)]
struct IdleFlag {
    /// How long a kept machine stays with nobody in it
    #[arg(long, value_name = "TIME", default_value = "30m")]
    keep_for: String,
}

impl IdleFlag {
    fn parse(&self) -> Result<Duration, Failure> {
        parse_duration(&self.keep_for).map_err(|error| Failure {
            text: format!("--keep-for: {error}"),
            hint: None,
            code: USAGE,
        })
    }
}

impl KeepFlags {
    /// When the machine stays.
    pub fn keep(&self) -> Result<Keep, Failure> {
        let Some(when) = &self.keep else { return Ok(Keep::Never) };
        super::run::one_of("keep", when, &[("failure", Keep::OnFailure), ("always", Keep::Always)])
    }

    /// For how long.
    pub fn idle(&self) -> Result<Duration, Failure> {
        self.idle.parse()
    }

    /// Whether it may stay at all.
    pub fn may_stay(&self) -> bool {
        self.keep.is_some()
    }
}

/// The words that name this store on a command line where it was not found by itself.
pub(super) fn store_words(settings: &Settings) -> String {
    use std::os::unix::ffi::OsStrExt;
    match settings.store.origin {
        Origin::Default | Origin::Recipe => String::new(),
        _ => format!(" --store {}", quote(settings.store.value.as_os_str().as_bytes())),
    }
}

/// How the machine `name` is entered. `store` are the words that name its store.
pub(super) fn tell(name: &str, idle: Duration, store: &str) -> [String; 4] {
    [
        format!("kept as {name}; it ends after {} with nobody in it", show_age(idle)),
        format!("look into it:  kiln shell{store} {name}"),
        format!("run something: kiln exec{store} {name} -- CMD"),
        format!("end it:        kiln stop{store} {name}"),
    ]
}

/// Gives the caller `code`, and stays with the machines of a build until they are of no more use.
pub(super) fn stay_with(mut kept: Vec<KeptStep>, caller: Caller, code: u8) -> ExitCode {
    if caller.leave(code).is_ok()
        && let Some(last) = kept.pop()
    {
        thread::scope(|scope| {
            for kept in kept {
                // Where there is no thread to wait with it, the machine ends here.
                let _ = threads::start_in(scope, "keep", || kept.stay());
            }
            last.stay();
        });
    }
    ExitCode::from(code)
}

/// Tells how `kept` is entered, gives the caller `code`, and stays with the machine until it is of no more use.
pub(super) fn stay(
    kept: Kept,
    caller: Caller,
    idle: Duration,
    store: &str,
    as_json: bool,
    code: u8,
) -> ExitCode {
    let keeper = match kept.open(idle) {
        Ok(keeper) => keeper,
        Err(error) => {
            show::failure(&format!("the machine cannot be kept: {error}"), None);
            return ExitCode::from(code);
        }
    };
    let name = &keeper.entry().name;
    let entry = keeper.entry();
    match as_json {
        true => {
            let kept = Line::Kept { step: None, name, idle_seconds: idle.as_secs(), pid: Some(entry.pid) };
            line(&kept.to_string());
        }
        false => tell(name, idle, store).iter().for_each(|text| show::note(text)),
    }
    // Where the caller is gone, somebody wanted an end of all of it.
    if caller.leave(code).is_ok() {
        keeper.stay();
    }
    ExitCode::from(code)
}
