//! The init of an initOS root that no disk replaces: what the initrd hands over to as `/sbin/initos-init-manual`, `-tpm2` or
//! `-insecure`. It prepares the machine ([`start`]), keeps an ssh server and logins running ([`services`]), holds the
//! network ([`network`]), reaps what is orphaned, and switches off or restarts when it is told to by a signal.
//!
//! The main thread owns the services. Others tell it what happened over a channel: signals, and nothing else. The network has
//! a thread, which starts no program, so that what ends is the main thread's alone.

#![expect(
    clippy::disallowed_methods,
    reason = "the init of a machine whose kernel gives no thread has nobody to tell"
)]

mod config;
#[path = "../devices.rs"]
mod devices;
mod dhcp;
mod linux;
mod netlink;
mod network;
#[path = "../report.rs"]
mod report;
mod services;
mod start;
mod sys;

use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{WaitOptions, wait};
use rustix::system::{RebootCommand, reboot};
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGKILL, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;

use linux::Linux;
use report::say;
use services::Services;
use start::{Mode, Standalone, start};

/// Said by some when power fails.
const SIGPWR: i32 = libc::SIGPWR;
/// How long programs have to end before the machine does.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// Between looks at what has ended then.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// How long sshd may take to listen; keys are slow on slow machines.
const SSHD_PATIENCE: Duration = Duration::from_secs(120);
const SSH_PORT: u16 = 22;

fn main() -> ExitCode {
    if !rustix::process::getpid().is_init() {
        // Nobody is meant to start it but an initrd.
        return ExitCode::FAILURE;
    }
    // From the first moment on, so that none is missed.
    let signals = Signals::new([SIGCHLD, SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGPWR]);
    // Ctrl-Alt-Del is a signal to this program instead of a restart without a word.
    let _ = std::fs::write("/proc/sys/kernel/ctrl-alt-del", "0");
    let mode = Mode::of(&std::env::args().next().unwrap_or_default());
    let Standalone { services, interfaces, variables, has_sshd } = start(&mut Linux, mode);
    thread::spawn(move || network::run(&interfaces));
    if has_sshd {
        thread::spawn(watch_sshd);
    }
    let (sender, told) = mpsc::channel();
    match signals {
        Ok(mut signals) => {
            thread::spawn(move || signals.forever().try_for_each(|signal| sender.send(signal)));
        }
        // Then nothing is reaped and nothing restarted, but whoever is in is in.
        Err(error) => say(&format!("no signals: {error}")),
    }
    end(run(services, &variables, &told))
}

/// Says when there is something to connect to.
fn watch_sshd() {
    let give_up = Instant::now() + SSHD_PATIENCE;
    while Instant::now() < give_up {
        let tables = ["tcp", "tcp6"].map(|name| std::fs::read_to_string(format!("/proc/net/{name}")));
        let tables: String = tables.into_iter().flatten().collect();
        if linux::listens(SSH_PORT, &tables) {
            say("sshd is up");
            return;
        }
        thread::sleep(LOOK_AGAIN);
    }
    say("sshd does not come up");
}

/// Keeps the services running until the machine is to end, and gives how.
fn run(
    services: Vec<services::Service>,
    variables: &[(String, String)],
    told: &Receiver<i32>,
) -> RebootCommand {
    let mut services = Services::new(services);
    let began = Instant::now();
    loop {
        while let Some((index, service)) = services.due(began.elapsed()) {
            let pid = linux::spawn(service, variables);
            if let Err(why) = &pid {
                say(why);
            }
            services.started(index, pid.ok(), began.elapsed());
        }
        let signal = match services.until_due(began.elapsed()) {
            Some(patience) => told.recv_timeout(patience),
            None => told.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match signal.as_ref().map(|signal| meaning(*signal)) {
            Ok(Some(command)) => return command,
            Err(RecvTimeoutError::Disconnected) => thread::park(),
            Ok(None) | Err(RecvTimeoutError::Timeout) => {}
        }
        while let Ok(Some((pid, _))) = wait(WaitOptions::NOHANG) {
            services.ended(pid.as_raw_nonzero().get(), began.elapsed());
        }
    }
}

/// How a machine ends by a signal: what busybox's `poweroff`, `halt` and `reboot`, and the kernel's Ctrl-Alt-Del send.
fn meaning(signal: i32) -> Option<RebootCommand> {
    match signal {
        SIGUSR2 | SIGPWR => Some(RebootCommand::PowerOff),
        SIGUSR1 => Some(RebootCommand::Halt),
        SIGTERM | SIGINT => Some(RebootCommand::Restart),
        _ => None,
    }
}

/// Ends all programs, and then the machine.
fn end(command: RebootCommand) -> ExitCode {
    say(match command {
        RebootCommand::PowerOff => "Switching off",
        RebootCommand::Halt => "Halting",
        _ => "Restarting",
    });
    sys::signal_all(SIGTERM);
    let give_up = Instant::now() + LAST_WORDS;
    // ECHILD: nobody is left.
    while Instant::now() < give_up {
        match wait(WaitOptions::NOHANG) {
            Ok(Some(_)) => {}
            Ok(None) => thread::sleep(LOOK_AGAIN),
            Err(_) => break,
        }
    }
    sys::signal_all(SIGKILL);
    rustix::fs::sync();
    let _ = rustix::mount::unmount("/boot/efi", rustix::mount::UnmountFlags::DETACH);
    rustix::fs::sync();
    let _ = reboot(command);
    ExitCode::FAILURE
}
