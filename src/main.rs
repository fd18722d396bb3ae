//! The entry of the `kiln` command: a verb, a child that kiln starts of itself, or a run that can stay in the background.

use std::process::ExitCode;

use kiln::keeper::{background, ready};
use kiln::machine::launch;

fn main() -> ExitCode {
    match std::env::args_os().nth(1) {
        Some(word) if word == launch::SUBCOMMAND => launch::main(),
        Some(word) if word == ready::SUBCOMMAND => ready::main(),
        Some(word) if word == background::SUBCOMMAND => kiln::cli::main_that_can_stay(),
        _ => kiln::cli::main(),
    }
}
