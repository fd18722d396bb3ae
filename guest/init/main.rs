//! The init of an initOS initrd: PID 1 from the kernel until the root's own init takes over. It finds the partition with the
//! images that the signed initrd names, opens them through dm-verity and starts what is in them.
//!
//! It is the same program under Secure Boot and without; there is no shell in it, and it reads no key. One process, one
//! thread. What it decides is in [`boot`], pure; [`linux`] does it.

mod boot;
mod devices;
mod efi;
mod fat;
mod linux;
mod modules;
mod report;
mod sys;
mod verity;

use std::process::ExitCode;

use boot::{Fatal, Orders, System, boot, fail};
use linux::Linux;

fn main() -> ExitCode {
    if !rustix::process::getpid().is_init() {
        // Nobody is meant to start it but a kernel.
        return ExitCode::FAILURE;
    }
    let mut linux = Linux::prepare();
    let command_line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let orders = Orders::read(linux.release(), &command_line);
    let fatal = match boot(&mut linux, &orders) {
        Ok(init) => match linux.hand_over(init) {
            Ok(never) => match never {},
            Err(why) => Fatal::Prepare(why),
        },
        Err(fatal) => fatal,
    };
    fail(&mut linux, &fatal);
    linux.say("Restarting");
    linux.restart()
}
