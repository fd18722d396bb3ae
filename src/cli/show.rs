//! How things are written for people: errors, progress, and a guest's own output.

#![expect(clippy::print_stderr, reason = "this is where kiln speaks")]

use std::io::{self, IsTerminal, Write};

use kiln_wire::Stream;

use crate::plan::harmless;

/// An error and what it came from, each said once.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let more = inner.to_string();
        if !text.contains(more.trim()) {
            text = format!("{text}: {more}");
        }
        source = inner.source();
    }
    harmless(text.as_bytes())
}

/// What failed and what to do.
pub(super) fn failure(text: &str, hint: Option<&str>) {
    // A line that a guest had a word in must not look like two of kiln's.
    let quoted = |text: &str| harmless(text.trim_end().as_bytes()).replace('\n', "\n    ");
    eprintln!("kiln: error: {}", quoted(text));
    if let Some(hint) = hint {
        eprintln!("kiln: hint: {}", quoted(hint));
    }
}

/// A line on standard output.
pub(super) fn line(text: &str) {
    let _ = try_line(text);
}

/// A line on standard output, which somebody may have stopped reading.
pub(super) fn try_line(text: &str) -> io::Result<()> {
    writeln!(io::stdout().lock(), "{text}")
}

/// Lines about a run, on standard error. On a terminal, progress is one line that is written over.
pub(super) struct Narrator {
    terminal: bool,
    quiet: bool,
    over: bool,
    last: String,
}

impl Narrator {
    /// One for this process's standard error.
    pub fn new(quiet: bool) -> Self {
        Self { terminal: io::stderr().is_terminal(), quiet, over: false, last: String::new() }
    }

    /// Something slow is going on. In a log, figures that only count on are left out.
    pub fn progress(&mut self, text: &str) {
        if self.quiet {
            return;
        }
        let text = harmless(text.as_bytes());
        if self.terminal {
            eprint!("\r\x1b[2Kkiln: {text}");
            self.over = true;
        } else if skeleton(&text) != skeleton(&self.last) {
            eprintln!("kiln: {text}");
        }
        self.last = text;
    }

    /// A line that stays.
    pub fn say(&mut self, text: &str) {
        if !self.quiet {
            self.clear();
            eprintln!("kiln: {}", harmless(text.as_bytes()));
        }
    }

    /// A line that stays, also when all else is quiet.
    pub fn warn(&mut self, text: &str) {
        self.clear();
        eprintln!("kiln: warning: {}", harmless(text.as_bytes()));
    }

    /// Takes the progress line away.
    pub fn clear(&mut self) {
        if std::mem::take(&mut self.over) {
            eprint!("\r\x1b[2K");
        }
    }
}

/// The text without its numbers.
fn skeleton(text: &str) -> String {
    text.chars().filter(|c| !c.is_ascii_digit() && *c != '.').collect()
}

/// Writes a guest's output to the stream it belongs to: as it is into a file or pipe, made harmless on a terminal.
pub(super) struct GuestOutput {
    stdout: Sink,
    stderr: Sink,
}

struct Sink {
    terminal: bool,
    /// The start of a character whose end has not come yet.
    pending: Vec<u8>,
}

impl GuestOutput {
    /// For this process's standard streams.
    pub fn new() -> Self {
        let sink = |terminal| Sink { terminal, pending: Vec::new() };
        Self { stdout: sink(io::stdout().is_terminal()), stderr: sink(io::stderr().is_terminal()) }
    }

    /// Writes one piece.
    ///
    /// # Errors
    /// What writing says; `BrokenPipe` where the reader is gone.
    pub fn write(&mut self, stream: Stream, data: &[u8]) -> io::Result<()> {
        match stream {
            Stream::Stdout => self.stdout.write(&mut io::stdout().lock(), data),
            Stream::Stderr => self.stderr.write(&mut io::stderr().lock(), data),
        }
    }
}

impl Sink {
    fn write(&mut self, target: &mut dyn Write, data: &[u8]) -> io::Result<()> {
        if self.terminal {
            self.pending.extend_from_slice(data);
            let whole = self.pending.len() - incomplete_tail(&self.pending);
            let rest = self.pending.split_off(whole);
            let bytes = std::mem::replace(&mut self.pending, rest);
            target.write_all(harmless(&bytes).as_bytes())?;
        } else {
            target.write_all(data)?;
        }
        target.flush()
    }
}

/// How many bytes at the end are the start of a UTF-8 character that may still be completed.
fn incomplete_tail(bytes: &[u8]) -> usize {
    (1..=bytes.len().min(3))
        .find(|&back| {
            let length = match bytes[bytes.len() - back] {
                0xc2..=0xdf => 2,
                0xe0..=0xef => 3,
                0xf0..=0xf4 => 4,
                _ => return false,
            };
            length > back
        })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_character_that_is_cut_in_two_is_shown_whole() {
        let mut sink = Sink { terminal: true, pending: Vec::new() };
        let mut shown = Vec::new();
        for byte in "a\u{20ac}\x1bb".as_bytes() {
            sink.write(&mut shown, &[*byte]).expect("memory");
        }
        assert_eq!(String::from_utf8_lossy(&shown), "a\u{20ac}\u{241b}b");
    }
}
