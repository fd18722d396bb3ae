//! A command's terminal: a pair of the step's own devpts (pty(7)). The agent holds the master; the other side becomes the
//! command's controlling terminal and its standard streams.

use std::os::fd::{AsFd, OwnedFd};

use kiln_wire::TerminalSize;
use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// What is typed at the end of input: the character that Linux gives a new terminal as its VEOF (termios(3)).
pub const END_OF_FILE: u8 = 4;

/// A terminal that a command has or had.
pub struct Terminal {
    /// What is written here is typed, what is read was shown.
    pub master: OwnedFd,
    /// The command's side, held so that one which closes all its streams can still open `/dev/tty`: the last close would
    /// end the master.
    pub slave: OwnedFd,
}

impl Terminal {
    /// A new pair of the devpts `terminals`.
    ///
    /// # Errors
    /// There are no more, or the step broke what it was given.
    pub fn open(terminals: impl AsFd, size: TerminalSize) -> Result<Self, Errno> {
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        // By the file system itself: a path would lead through folders that a step may have changed.
        let master = openat(terminals, "ptmx", flags, Mode::empty())?;
        unlockpt(&master)?;
        let slave =
            ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        let terminal = Self { master, slave };
        terminal.resize(size)?;
        Ok(terminal)
    }

    /// Gives it another size; the kernel tells the processes in its foreground.
    ///
    /// # Errors
    /// Those of `TIOCSWINSZ`.
    pub fn resize(&self, size: TerminalSize) -> Result<(), Errno> {
        let TerminalSize { rows, columns } = size;
        tcsetwinsize(&self.master, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 })
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};

    use rustix::termios::tcgetwinsize;

    use super::*;

    #[test]
    fn a_terminal_shows_what_is_typed_and_has_the_size_it_was_given() {
        let terminals = File::open("/dev/pts").expect("a devpts");
        let size = TerminalSize { rows: 7, columns: 300 };
        let terminal = Terminal::open(&terminals, size).expect("a terminal");
        let seen = tcgetwinsize(&terminal.slave).expect("it is a terminal");
        assert_eq!((seen.ws_row, seen.ws_col), (7, 300));
        terminal.resize(TerminalSize { rows: 1, columns: 2 }).expect("it is a terminal");
        assert_eq!(tcgetwinsize(&terminal.slave).expect("it is a terminal").ws_col, 2);

        let Terminal { master, slave } = terminal;
        let (mut master, mut slave) = (File::from(master), File::from(slave));
        master.write_all(b"hello\n").expect("room");
        let mut line = [0; 6];
        slave.read_exact(&mut line).expect("a line");
        assert_eq!(&line, b"hello\n");
        slave.write_all(b"\n").expect("room");
        let mut shown = [0; 64];
        let length = master.read(&mut shown).expect("an echo");
        assert!(shown[..length].starts_with(b"hello\r\n"), "{:?}", &shown[..length]);
    }
}
