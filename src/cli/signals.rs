//! Signals passed on to a command in a machine instead of ending this process.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGWINCH};
use signal_hook::iterator::Signals;

use super::terminal;
use crate::agent::Controls;
use crate::threads;

/// The thread that passes signals on. Without a terminal a signal reaches the command as it is. With one, only its size
/// does: what is typed is the command's anyway, and a signal from elsewhere is meant for this process, which hangs up so
/// that the terminal can be given back.
pub(super) struct PassedOn {
    // Whom signals concern now. The reading thread looks, the one that runs commands changes it.
    target: Arc<Mutex<Target>>,
}

#[derive(Default)]
struct Target {
    command: Option<Controls>,
    hung_up_by: Option<u8>,
}

/// While this lives, signals concern one command.
pub(super) struct Passing<'a>(&'a PassedOn);

impl PassedOn {
    /// Holds signals back from now on.
    ///
    /// # Errors
    /// What registering for signals says.
    pub fn start(with_terminal: bool) -> io::Result<Self> {
        let mut signals = Signals::new([if with_terminal { SIGWINCH } else { SIGINT }, SIGTERM, SIGHUP])?;
        let target = Arc::<Mutex<Target>>::default();
        let shared = Arc::clone(&target);
        threads::start("signals", move || {
            for signal in signals.forever() {
                lock(&shared).take(signal, with_terminal);
            }
        })?;
        Ok(Self { target })
    }

    /// Signals concern `command` now.
    pub fn to(&self, command: Controls) -> Passing<'_> {
        *lock(&self.target) = Target { command: Some(command), hung_up_by: None };
        Passing(self)
    }
}

impl Passing<'_> {
    /// The signal over which the conversation was ended.
    pub fn hung_up_by(&self) -> Option<u8> {
        lock(&self.0.target).hung_up_by
    }
}

impl Drop for Passing<'_> {
    fn drop(&mut self) {
        lock(&self.0.target).command = None;
    }
}

fn lock(target: &Mutex<Target>) -> MutexGuard<'_, Target> {
    target.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Target {
    fn take(&mut self, signal: i32, with_terminal: bool) {
        let number = u8::try_from(signal).unwrap_or_default();
        // Where sending fails, the conversation is over, and whoever waits in it knows.
        match &self.command {
            Some(command) if signal == SIGWINCH => drop(command.resize(terminal::size())),
            Some(command) if with_terminal => {
                self.hung_up_by = Some(number);
                command.hang_up();
            }
            Some(command) => drop(command.signal(number)),
            None if signal == SIGWINCH => {}
            // As if it had not been held back.
            None => std::process::exit(128 + signal),
        }
    }
}
