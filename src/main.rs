//! The entry of the `kiln` command: a verb, or a run that can stay in the background.

use std::process::ExitCode;

use kiln::keeper::background;

fn main() -> ExitCode {
    match std::env::args_os().nth(1) {
        Some(word) if word == background::SUBCOMMAND => kiln::cli::main_that_can_stay(),
        _ => kiln::cli::main(),
    }
}
