//! Somebody at a terminal: a pair of this host's, a command on it that has it as its controlling terminal, and what is
//! typed and seen.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Termios, Winsize, tcgetattr, tcsetwinsize};

use super::host::started_by;

/// How long a machine may take to show something.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct Typist {
    keys: File,
    // Held open, so that the terminal's settings can be looked at to the end.
    terminal: Option<OwnedFd>,
    shown: Receiver<Vec<u8>>,
    seen: String,
    // All that was shown.
    all: Vec<u8>,
    child: Child,
}

impl Typist {
    /// Sits down at a terminal of `rows` and `columns` on which `command` runs.
    pub fn at(command: &Command, rows: u16, columns: u16) -> Self {
        let keys =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("a terminal");
        grantpt(&keys).and_then(|()| unlockpt(&keys)).expect("a terminal");
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let terminal = ioctl_tiocgptpeer(&keys, flags).expect("a terminal");
        let keys = File::from(keys);
        resize(&keys, rows, columns);
        // A session of its own, whose terminal this is.
        let mut session = started_by(&["setsid", "--ctty"], command);
        if command.get_envs().all(|(name, _)| name != "TERM") {
            session.env("TERM", "xterm");
        }
        let side = || terminal.try_clone().expect("a descriptor");
        let child = session.stdin(side()).stdout(side()).stderr(side()).spawn().expect("setsid is there");
        let (sender, shown) = channel();
        let mut screen = keys.try_clone().expect("a descriptor");
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = screen.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self { keys, terminal: Some(terminal), shown, seen: String::new(), all: Vec::new(), child }
    }

    pub fn types(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).expect("room");
    }

    pub fn resizes(&self, rows: u16, columns: u16) {
        resize(&self.keys, rows, columns);
    }

    /// Waits until `text` is shown after all that was waited for before, and gives what was shown up to its end.
    pub fn sees(&mut self, text: &str) -> String {
        let by = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.seen.find(text) {
                let rest = self.seen.split_off(at + text.len());
                return std::mem::replace(&mut self.seen, rest);
            }
            let left = by.saturating_duration_since(Instant::now());
            let bytes = self.shown.recv_timeout(left);
            assert!(bytes.is_ok(), "no {text:?} in {:?}", self.seen);
            self.takes(&bytes.unwrap_or_default());
        }
    }

    fn takes(&mut self, bytes: &[u8]) {
        self.all.extend_from_slice(bytes);
        self.seen.push_str(&String::from_utf8_lossy(bytes));
    }

    /// The terminal's settings.
    pub fn settings(&self) -> Termios {
        tcgetattr(self.terminal.as_ref().expect("it has not ended")).expect("a terminal")
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the command's end, and gives its status.
    pub fn leaves(self) -> Option<i32> {
        self.ends().0
    }

    /// The same, and all that was shown from the beginning on.
    pub fn ends(mut self) -> (Option<i32>, Vec<u8>) {
        let by = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("it is ours") {
                // With nobody left at the terminal, what it shows has an end.
                self.terminal = None;
                while let Ok(bytes) = self.shown.recv_timeout(by.saturating_duration_since(Instant::now())) {
                    self.takes(&bytes);
                }
                return (status.code(), std::mem::take(&mut self.all));
            }
            assert!(Instant::now() < by, "it does not end; shown: {:?}", self.seen);
            // What it still shows must not hold it up.
            if let Ok(bytes) = self.shown.recv_timeout(Duration::from_millis(20)) {
                self.takes(&bytes);
            }
        }
    }
}

impl Drop for Typist {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn resize(keys: &File, rows: u16, columns: u16) {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(keys, size).expect("a terminal");
}
