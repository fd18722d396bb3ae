//! The entry of kiln's program for machines, which kiln starts: a process that a guest talks to, or one that holds a machine.

use std::process::ExitCode;

use kiln::keeper::ready;
use kiln::machine::{launch, program};

fn main() -> ExitCode {
    program::is_this();
    // It was executed by the number of a descriptor, which ps(1) and top(1) would show.
    let _ = rustix::thread::set_name(c"kiln-machine");
    match std::env::args_os().nth(1) {
        Some(word) if word == launch::SUBCOMMAND => launch::main(),
        Some(word) if word == ready::SUBCOMMAND => ready::main(),
        _ => {
            let _ = std::io::Write::write_all(
                &mut std::io::stderr(),
                b"kiln-machine: kiln starts this program\n",
            );
            ExitCode::from(2)
        }
    }
}
