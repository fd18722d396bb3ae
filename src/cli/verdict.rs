//! How a command ended, as `kiln run` passes it on: its exit status, and what kiln has to say about it.

use std::io;

use kiln_wire::{Outcome, Usage};

use super::run::RunArguments;
use crate::engine::{Ended, Step};
use crate::plan::recipe::is_name;
use crate::plan::{harmless, nearest};

/// The status of a command that took longer than its time-out.
pub(super) const TIMED_OUT: u8 = 124;

/// The status by which kiln ends: as `timeout`, `env` and container tools do.
pub(super) fn exit_code(ended: &Ended) -> u8 {
    match ended {
        Ended::Ran(Outcome::Exit(code), _) => *code,
        Ended::Ran(Outcome::Signal(signal), _) => 128_u8.saturating_add(*signal),
        Ended::Ran(Outcome::TimedOut, _) => TIMED_OUT,
        Ended::NotStarted { error, .. } if error.kind() == io::ErrorKind::NotFound => 127,
        Ended::NotStarted { .. } => 126,
    }
}

/// What there is to say, and what the user can do about it; nothing where the command's own status says all.
pub(super) fn complaint(
    step: &Step,
    arguments: &RunArguments,
    ended: &Ended,
) -> Option<(String, Option<String>)> {
    let program = harmless(arguments.command.first().map(|word| word.as_encoded_bytes()).unwrap_or_default());
    let root = &arguments.root;
    let text = match ended {
        Ended::Ran(Outcome::Exit(0), _) => return None,
        Ended::Ran(Outcome::Exit(code), usage) => {
            format!("`{program}` exited with status {code}{}", exhausted(step, arguments, usage))
        }
        Ended::Ran(Outcome::Signal(signal), usage) => {
            format!("`{program}` was killed by signal {signal}{}", exhausted(step, arguments, usage))
        }
        Ended::Ran(Outcome::TimedOut, usage) => {
            let limit = arguments.timeout.as_deref().unwrap_or_default();
            format!("`{program}` was stopped after --timeout {limit}{}", exhausted(step, arguments, usage))
        }
        Ended::NotStarted { why, .. } if !why.is_empty() => {
            let text = format!("`{program}` cannot be executed in the root {root}: {why}");
            let hint = why.contains("loader").then(|| {
                "a program that is linked dynamically needs its libraries in the root: add them, or link it statically"
                    .to_owned()
            });
            return Some((text, hint));
        }
        Ended::NotStarted { error, .. } if error.kind() == io::ErrorKind::NotFound => {
            let hint = step.covers_programs().map(|place| {
                format!("what is mounted at `{place}` covers the root's own: mount it elsewhere, or set PATH")
            });
            let hint = hint.or_else(|| no_such_step(&program, arguments));
            return Some((format!("`{program}` was not found in the root {root}"), hint));
        }
        Ended::NotStarted { error, .. } => {
            format!("`{program}` cannot be executed in the root {root}: {error}")
        }
    };
    Some((text, None))
}

/// What there is to say of a command of `kiln drun` that may have been meant to be a step.
fn no_such_step(word: &str, arguments: &RunArguments) -> Option<String> {
    if !arguments.layout || !is_name(word) || arguments.steps.is_empty() {
        return None;
    }
    let meant = match nearest(word, arguments.steps.iter().map(String::as_str)) {
        Some(meant) => format!("did you mean `{meant}`?"),
        None => "`kiln graph` shows those it has".to_owned(),
    };
    Some(format!("the recipe has no step of that name: {meant}"))
}

/// What the machine ran out of while the command ran, and which option gives more of it.
fn exhausted(step: &Step, arguments: &RunArguments, usage: &Usage) -> String {
    let mut text = match usage.oom_kills {
        0 => String::new(),
        count => format!(
            "; the machine ran out of memory and killed {count} process{} (--memory is {})",
            if count == 1 { "" } else { "es" },
            arguments.memory
        ),
    };
    if usage.refused_processes > 0 {
        let limit = step.limits.processes;
        text += &format!("; it had as many processes as it may (--limit processes={limit})");
    }
    text
}
