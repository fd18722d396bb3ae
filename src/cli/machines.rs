//! `kiln ps` and `kiln stop`: the machines of a store.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::show::{self, line};
use super::{FAILED, Failure};
use crate::engine::Host;
use crate::keeper::{Entry, Registry, ready};
use crate::plan::{harmless, quote, show_age, show_bytes};

/// How much of a command is shown.
const SHOWN_CHARACTERS: usize = 60;

/// Arguments of `kiln ps`.
#[derive(Debug, Args)]
#[command(after_help = "\
Lists the machines of the store: those whose step runs, those that were kept, and those that are ready for a run.

Examples:
  kiln ps
  kiln ps --json | jq -r .name")]
pub(super) struct PsArguments {
    /// Write one JSON object a line
    #[arg(long)]
    json: bool,
}

/// Arguments of `kiln stop`.
#[derive(Debug, Args)]
#[command(after_help = "\
A machine whose step runs ends too, and its run fails; nothing of it is merged.

Examples:
  kiln stop make-7f3a
  kiln stop --all")]
pub(super) struct StopArguments {
    /// The machines
    #[arg(value_name = "NAME", required_unless_present = "all")]
    names: Vec<String>,
    /// All machines of the store
    #[arg(long, conflicts_with = "names")]
    all: bool,
}

/// Lists machines.
pub(super) fn ps(arguments: &PsArguments, registry: &Registry) -> Result<ExitCode, Failure> {
    let machines = registry.machines()?;
    if arguments.json {
        for entry in &machines {
            line(&serde_json::to_string(entry).unwrap_or_default());
        }
        return Ok(ExitCode::SUCCESS);
    }
    let header = ["NAME", "STATE", "AGE", "MEMORY", "BACKEND", "PID", "COMMAND"].map(str::to_owned);
    let rows: Vec<[String; 7]> = std::iter::once(header).chain(machines.iter().map(row)).collect();
    let mut widths = [0; 7];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    for row in &rows {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}"));
        line(cells.collect::<Vec<_>>().join("  ").trim_end());
    }
    Ok(ExitCode::SUCCESS)
}

fn row(entry: &Entry) -> [String; 7] {
    let now = crate::clock::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let age = now.saturating_sub(Duration::from_secs(entry.started));
    let words: Vec<String> = entry.command.iter().map(|word| quote(word.as_bytes())).collect();
    let command = words.join(" ").replace('\n', " ");
    let mut shown: String = command.chars().take(SHOWN_CHARACTERS).collect();
    if shown.len() < command.len() {
        shown.push('…');
    }
    [
        entry.name.clone(),
        entry.state.name().to_owned(),
        show_age(age),
        show_bytes(entry.memory_bytes),
        harmless(format!("{} {}", entry.backend, entry.accelerator).as_bytes()),
        entry.pid.to_string(),
        shown,
    ]
}

/// Ends machines, each to its end.
pub(super) fn stop(arguments: &StopArguments, host: &Host) -> Result<ExitCode, Failure> {
    let registry = Registry::open(&host.store.run())?;
    if arguments.all {
        // Not to be able to costs no more than its time in the background.
        let _ = ready::call_off(&host.settings.store.value);
    }
    let names = match arguments.all {
        true => registry.machines()?.into_iter().map(|entry| entry.name).collect(),
        false => arguments.names.clone(),
    };
    let mut code = ExitCode::SUCCESS;
    for name in names {
        match registry.door(&name).and_then(|door| door.stop()) {
            Ok(()) => line(&format!("stopped {name}")),
            // With --all, one that ended by itself meanwhile is no failure.
            Err(crate::keeper::DoorError::Unknown { .. }) if arguments.all => {}
            Err(error) => {
                let failure = Failure::from(error);
                show::failure(&failure.text, failure.hint.as_deref());
                code = ExitCode::from(FAILED);
            }
        }
    }
    Ok(code)
}
