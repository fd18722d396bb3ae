//! The agent: PID 1 of every machine. It prepares the guest, listens to the host, runs a step's commands in namespaces of
//! their own and hands over what they wrote. It trusts neither the commands nor the host's bytes; when it cannot go on,
//! it says so on the console and switches the machine off.
//!
//! One process, one thread, one poll loop ([`session`]); the only other code of ours that runs is a command's init
//! ([`reap`]), and what is done [`beside`] the making of a step's world.

#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "a test fails by panicking"))]

mod beside;
mod boot;
mod command;
mod disk;
mod failure;
mod group;
mod layer;
mod link;
mod meter;
mod modules;
mod mounts;
mod network;
mod obstacle;
mod place;
mod program;
mod reap;
mod session;
mod setup;
mod shutdown;
mod stock;
mod swap;
mod sys;
mod terminal;
mod walk;

use std::fs::File;
use std::io::Write;
use std::process::ExitCode;

use crate::link::Link;
use crate::session::SessionError;

fn main() -> ExitCode {
    if !rustix::process::getpid().is_init() {
        // Not even a usage text: nobody is meant to start it but a kernel.
        return ExitCode::FAILURE;
    }
    // PID 1 must not unwind out of main, and a command's init is PID 1 of its own namespace, which this ends likewise.
    std::panic::set_hook(Box::new(|panic| {
        say(&panic.to_string());
        shutdown::power_off();
    }));
    if let Err(error) = live() {
        say(&error.to_string());
    }
    shutdown::power_off()
}

fn live() -> Result<(), SessionError> {
    let booted = boot::prepare()?;
    session::run(Link::open()?, booted)
}

/// Says something on the machine's console, if it has one.
fn say(text: &str) {
    let console = File::options().write(true).open("/dev/console");
    if let Ok(mut console) = console.or_else(|_| File::options().write(true).open("/dev/kmsg")) {
        // One write, so that a line of the kernel's does not get in between.
        let _ = console.write_all(format!("kiln agent: {text}\n").as_bytes());
    }
}
