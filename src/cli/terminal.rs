//! This process's terminal: its size, and handing its keys over as they are.

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, OwnedFd};

use kiln_wire::TerminalSize;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use crate::settings::host_variable;

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

/// The size of the one that is drawn on; as large as most were, where it does not know.
pub(super) fn size_of(drawn_on: impl AsFd) -> TerminalSize {
    match tcgetwinsize(drawn_on) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => {
            TerminalSize { rows: size.ws_row, columns: size.ws_col }
        }
        _ => TerminalSize { rows: 24, columns: 80 },
    }
}

/// Whether standard error is one on which the cursor can be moved.
pub(super) fn is_drawn_on() -> bool {
    let kind = host_variable("TERM").unwrap_or_default();
    io::stderr().is_terminal() && !kind.is_empty() && kind != b"dumb"
}

/// Whether colours are wanted (no-color.org).
pub(super) fn has_colours() -> bool {
    host_variable("NO_COLOR").is_none_or(|value| value.is_empty())
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
