//! The entry of the `kiln` command: a verb, or a child that kiln starts of itself.

use std::process::ExitCode;

use kiln::machine::launch;

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|argument| argument == launch::SUBCOMMAND) {
        return launch::main();
    }
    kiln::cli::main()
}
