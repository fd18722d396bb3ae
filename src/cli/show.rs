//! How things are written for people: errors, progress, and a guest's own output.

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::sync::OnceLock;

use kiln_wire::Stream;

use super::screen::cut;
use super::terminal;
use crate::engine::OPEN_NETWORK;
use crate::machine::in_full;
use crate::plan::{harmless, without_commands};

/// An error and what it came from, each said once.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    harmless(in_full(error).as_bytes())
}

/// What failed and what to do.
pub(super) fn failure(text: &str, hint: Option<&str>) {
    told(format_args!("{}", failure_lines(text, hint)));
}

/// The lines that say what failed and what to do, each with its end.
pub(super) fn failure_lines(text: &str, hint: Option<&str>) -> String {
    let hint = hint.map_or_else(String::new, |hint| format!("kiln: hint: {}\n", quoted(hint)));
    error_line(text) + &hint
}

/// The line that says what failed.
pub(super) fn error_line(text: &str) -> String {
    format!("kiln: error: {}\n", quoted(text))
}

/// A text that a guest may have had a word in must not look like two lines of kiln's.
fn quoted(text: &str) -> String {
    for_people(text.trim_end()).replace('\n', "\n    ")
}

/// A line of kiln's own on standard error, which nobody else had a word in.
pub(super) fn note(text: &str) {
    told(format_args!("kiln: {text}\n"));
}

/// Writes to standard error. Where nobody reads it any more, what kiln does goes on.
fn told(text: fmt::Arguments<'_>) {
    let _ = io::stderr().lock().write_fmt(text);
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
        Self { terminal: terminal::is_drawn_on(), quiet, over: false, last: String::new() }
    }

    /// Something slow is going on. In a log, figures that only count on are left out.
    pub fn progress(&mut self, text: &str) {
        if self.quiet {
            return;
        }
        let text = for_people(text);
        if self.terminal {
            // Of a line that the terminal breaks, only the last part could be taken away.
            let columns = usize::from(terminal::size_of(io::stderr()).columns);
            told(format_args!("\r\x1b[2K{}", cut(&format!("kiln: {text}"), columns.saturating_sub(1))));
            self.over = true;
        } else if skeleton(&text) != skeleton(&self.last) {
            told(format_args!("kiln: {text}\n"));
        }
        self.last = text;
    }

    /// A line that stays.
    pub fn say(&mut self, text: &str) {
        if !self.quiet {
            self.clear();
            told(format_args!("kiln: {}\n", for_people(text)));
        }
    }

    /// A line that stays and is not kiln's own, also when all else is quiet.
    pub fn show(&mut self, text: &str) {
        self.clear();
        told(format_args!("{}\n", for_people(text)));
    }

    /// A line that stays, also when all else is quiet.
    pub fn warn(&mut self, text: &str) {
        if text.ends_with(OPEN_NETWORK) {
            return self.alarm(text);
        }
        self.clear();
        told(format_args!("kiln: warning: {}\n", for_people(text)));
    }

    /// A warning about what the user gave up, in red on a terminal.
    fn alarm(&mut self, text: &str) {
        self.clear();
        let (red, plain) = if io::stderr().is_terminal() { ("\x1b[31m", "\x1b[0m") } else { ("", "") };
        told(format_args!("{red}kiln: warning: {}{plain}\n", for_people(text)));
    }

    /// Takes the progress line away.
    pub fn clear(&mut self) {
        if std::mem::take(&mut self.over) {
            told(format_args!("\r\x1b[2K"));
        }
    }
}

/// The text without its numbers.
fn skeleton(text: &str) -> String {
    text.chars().filter(|c| !c.is_ascii_digit() && *c != '.').collect()
}

/// How a guest's output is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Byte for byte.
    Raw,
    /// With its control characters made harmless.
    Harmless,
    /// Line by line, with control characters and what CI systems obey made harmless.
    Log,
}

impl Form {
    /// What suits a stream: a terminal and the log of a CI system obey what they read, a file or pipe does not.
    fn of(is_terminal: bool) -> Self {
        match is_terminal {
            true => Self::Harmless,
            false if is_in_ci() => Self::Log,
            false => Self::Raw,
        }
    }
}

/// Whether this process's output is a log that a CI system reads for commands.
pub(super) fn is_in_ci() -> bool {
    static IN_CI: OnceLock<bool> = OnceLock::new();
    let is_set = |name: &&str| {
        let value = crate::settings::host_variable(name);
        value.is_some_and(|value| !value.is_empty() && value != b"false" && value != b"0")
    };
    *IN_CI.get_or_init(|| ["CI", "GITHUB_ACTIONS", "TF_BUILD", "TEAMCITY_VERSION"].iter().any(is_set))
}

/// Text for standard error, where a guest may have had a word in it.
pub(super) fn for_people(text: &str) -> String {
    let text = harmless(text.as_bytes());
    match is_in_ci() {
        true => text.split('\n').map(without_commands).collect::<Vec<_>>().join("\n"),
        false => text,
    }
}

/// Writes a guest's output to the stream it belongs to, in the form that suits the stream.
pub(super) struct GuestOutput {
    stdout: Sink,
    stderr: Sink,
}

struct Sink {
    form: Form,
    /// The start of a character, or of a line, whose end has not come yet.
    pending: Vec<u8>,
}

/// A line of a log that is longer is broken.
const LONGEST_LINE_BYTES: usize = 64 << 10;

impl GuestOutput {
    /// For this process's standard streams, in `form` or as suits each.
    pub fn new(form: Option<Form>) -> Self {
        let sink =
            |is_terminal| Sink { form: form.unwrap_or_else(|| Form::of(is_terminal)), pending: Vec::new() };
        Self { stdout: sink(io::stdout().is_terminal()), stderr: sink(io::stderr().is_terminal()) }
    }

    /// Whether bytes of standard output do not come out as they are.
    pub fn is_changed(&self) -> bool {
        self.stdout.form == Form::Log
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

    /// Writes what was held back until more of it came.
    ///
    /// # Errors
    /// What writing says.
    pub fn finish(&mut self) -> io::Result<()> {
        self.stdout.finish(&mut io::stdout().lock())?;
        self.stderr.finish(&mut io::stderr().lock())
    }
}

impl Sink {
    fn write(&mut self, target: &mut dyn Write, data: &[u8]) -> io::Result<()> {
        match self.form {
            Form::Raw => target.write_all(data)?,
            Form::Harmless => {
                self.pending.extend_from_slice(data);
                let whole = self.pending.len() - incomplete_tail(&self.pending);
                let rest = self.pending.split_off(whole);
                let bytes = std::mem::replace(&mut self.pending, rest);
                target.write_all(harmless(&bytes).as_bytes())?;
            }
            Form::Log => {
                for piece in data.split_inclusive(|byte| *byte == b'\n') {
                    self.pending.extend_from_slice(piece);
                    if piece.ends_with(b"\n") || self.pending.len() > LONGEST_LINE_BYTES {
                        self.finish(target)?;
                    }
                }
            }
        }
        target.flush()
    }

    fn finish(&mut self, target: &mut dyn Write) -> io::Result<()> {
        let bytes = std::mem::take(&mut self.pending);
        if bytes.is_empty() {
            return Ok(());
        }
        let text = harmless(&bytes);
        match self.form {
            Form::Log => writeln!(target, "{}", without_commands(text.trim_end_matches('\n')))?,
            _ => target.write_all(text.as_bytes())?,
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
        let mut sink = Sink { form: Form::Harmless, pending: Vec::new() };
        let mut shown = Vec::new();
        for byte in "a\u{20ac}\x1bb".as_bytes() {
            sink.write(&mut shown, &[*byte]).expect("memory");
        }
        assert_eq!(String::from_utf8_lossy(&shown), "a\u{20ac}\u{241b}b");
    }

    #[test]
    fn a_line_of_a_log_is_seen_whole_before_it_is_written() {
        let mut sink = Sink { form: Form::Log, pending: Vec::new() };
        let mut shown = Vec::new();
        for byte in b"a\n::warning::b\n#" {
            sink.write(&mut shown, &[*byte]).expect("memory");
        }
        sink.write(&mut shown, b"#[group]\x1b[2J").expect("memory");
        sink.finish(&mut shown).expect("memory");
        assert_eq!(String::from_utf8_lossy(&shown), "a\n: :warning::b\n# #[group]\u{241b}[2J\n");
        // What is broken off a line begins one.
        shown.clear();
        sink.write(&mut shown, &[&[b'x'; LONGEST_LINE_BYTES + 1][..]].concat()).expect("memory");
        sink.write(&mut shown, b"::error::y\n").expect("memory");
        assert!(shown.ends_with(b"x\n: :error::y\n"));
    }
}
