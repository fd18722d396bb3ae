//! This process's terminal: its size, and handing its keys over as they are.

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, OwnedFd};

use kiln_wire::TerminalSize;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// Whether there is one to type on and to show things.
pub(super) fn is_there() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal()
}

/// Its size, or what a terminal has that does not know.
pub(super) fn size() -> TerminalSize {
    match tcgetwinsize(io::stdout()) {
        Ok(size) => TerminalSize { rows: size.ws_row, columns: size.ws_col },
        Err(_) => TerminalSize::default(),
    }
}

/// The terminal with its keys handed over as they are: no line editing, no echo, no Ctrl-C of its own. Dropping this gives
/// it back as it was.
pub(super) struct Raw {
    terminal: OwnedFd,
    before: Termios,
}

impl Raw {
    /// Takes the terminal.
    ///
    /// # Errors
    /// Standard input is none.
    pub fn take() -> io::Result<Self> {
        let terminal = io::stdin().as_fd().try_clone_to_owned()?;
        let before = tcgetattr(&terminal)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&terminal, OptionalActions::Drain, &raw)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(&self.terminal, OptionalActions::Drain, &self.before);
    }
}
