//! A serial console as lines: what a terminal would obey is taken out, and what is left is kept until an expectation has
//! looked at it. Pure.
//!
//! Firmware draws its console with cursor movements, so a jump of the cursor ends a line as a newline does. A line is
//! searched while it still grows: a prompt has no end.

use std::collections::VecDeque;

use regex::bytes::Regex;

/// A longer line is cut into lines of this many bytes.
const LONGEST_LINE_BYTES: usize = 16 << 10;
/// How much is kept that no expectation has looked at; the oldest goes first.
const MOST_KEPT_BYTES: usize = 8 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Text,
    /// After a carriage return, which ends a line unless a newline follows and does.
    Return,
    Escape,
    /// A control sequence (ECMA-48 §5.4), up to its final byte.
    Sequence,
    /// A string that a terminal takes, up to BEL or ESC.
    String,
}

/// A line that ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Where it begins, in bytes of all text of the console.
    pub start: usize,
    /// What is in it. A guest's bytes.
    pub text: Vec<u8>,
}

/// The console so far.
#[derive(Debug)]
pub struct Console {
    state: State,
    current: Vec<u8>,
    // Where `current` begins, in bytes of all text.
    current_start: usize,
    // Lines that ended and that no expectation has looked at.
    lines: VecDeque<Line>,
    kept_bytes: usize,
    // How much of the first of `lines`, or of `current` where there are none, was matched.
    matched: usize,
}

impl Default for Console {
    fn default() -> Self {
        Self {
            state: State::Text,
            current: Vec::new(),
            current_start: 0,
            lines: VecDeque::new(),
            kept_bytes: 0,
            matched: 0,
        }
    }
}

impl Console {
    /// Takes what was printed, and gives the lines that ended with it.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<Line> {
        let mut ended = Vec::new();
        for byte in bytes {
            self.take(*byte, &mut ended);
        }
        ended
    }

    fn take(&mut self, byte: u8, ended: &mut Vec<Line>) {
        match self.state {
            State::Escape => {
                self.state = match byte {
                    b'[' => State::Sequence,
                    b']' | b'P' | b'X' | b'^' | b'_' => State::String,
                    // An intermediate byte; the next one ends it.
                    0x20..=0x2f => State::Escape,
                    _ => State::Text,
                };
                return;
            }
            State::Sequence => {
                if matches!(byte, 0x40..=0x7e) {
                    self.state = State::Text;
                    if matches!(byte, b'H' | b'f' | b'J') {
                        self.end_line(ended);
                    }
                } else if !matches!(byte, 0x20..=0x3f) {
                    self.state = State::Text;
                }
                return;
            }
            State::String => {
                self.state = match byte {
                    0x07 | b'\n' => State::Text,
                    0x1b => State::Escape,
                    _ => State::String,
                };
                return;
            }
            State::Return if byte != b'\r' => {
                self.state = State::Text;
                if byte != b'\n' && byte != 0x1b {
                    self.end_line(ended);
                }
            }
            State::Return | State::Text => {}
        }
        match byte {
            0x1b => self.state = State::Escape,
            b'\r' => self.state = State::Return,
            b'\n' => self.end_line(ended),
            b'\t' | 0x20..=0x7e | 0x80.. => {
                self.current.push(byte);
                if self.current.len() >= LONGEST_LINE_BYTES {
                    self.end_line(ended);
                }
            }
            _ => {}
        }
    }

    fn end_line(&mut self, ended: &mut Vec<Line>) {
        let line = Line { start: self.current_start, text: std::mem::take(&mut self.current) };
        self.current_start += line.text.len();
        if line.text.iter().all(u8::is_ascii_whitespace) {
            if self.lines.is_empty() {
                self.matched = 0;
            }
            return;
        }
        self.kept_bytes += line.text.len();
        self.lines.push_back(line.clone());
        ended.push(line);
        while self.kept_bytes > MOST_KEPT_BYTES {
            self.forget_first();
        }
    }

    fn forget_first(&mut self) {
        self.matched = 0;
        self.kept_bytes -= self.lines.pop_front().map_or(0, |line| line.text.len());
    }

    /// The line that has not ended.
    pub fn current(&self) -> &[u8] {
        &self.current
    }

    /// Where the line begins that has not ended, in bytes of all text.
    pub fn current_start(&self) -> usize {
        self.current_start
    }

    /// Where what was matched last ends, in bytes of all text; where nothing was, what no expectation has looked at begins.
    pub fn position(&self) -> usize {
        self.lines.front().map_or(self.current_start, |line| line.start) + self.matched
    }

    /// Lines that ended and that no expectation has looked at, and the one that has not ended: where each begins, in bytes
    /// of all text, and what is in it.
    pub fn unseen(&self) -> impl Iterator<Item = (usize, &[u8])> {
        let ended = self.lines.iter().map(|line| (line.start, line.text.as_slice()));
        ended.chain([(self.current_start, self.current.as_slice())])
    }

    /// Looks for `regex` behind what was matched last. Lines without it have been looked at then.
    pub fn find(&mut self, regex: &Regex) -> bool {
        while let Some(line) = self.lines.front() {
            if let Some(found) = regex.find_at(&line.text, self.matched.min(line.text.len())) {
                self.matched = found.end();
                return true;
            }
            self.forget_first();
        }
        match regex.find_at(&self.current, self.matched.min(self.current.len())) {
            Some(found) => {
                self.matched = found.end();
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(bytes: &[u8]) -> Vec<String> {
        let mut console = Console::default();
        let ended = console.feed(bytes);
        ended.into_iter().map(|line| String::from_utf8_lossy(&line.text).into_owned()).collect()
    }

    fn finds(console: &mut Console, text: &str) -> bool {
        console.find(&Regex::new(text).expect("a pattern"))
    }

    #[test]
    fn what_a_terminal_obeys_is_no_text() {
        assert_eq!(lines(b"\x1b[1;31mred\x1b[0m\r\nplain\n"), ["red", "plain"]);
        assert_eq!(lines(b"\x1b]0;title\x07shown\n\x1b]0;other\x1b\\too\n"), ["shown", "too"]);
        assert_eq!(lines(b"a\x00\x08\x7fb\n\n \n"), ["ab"]);
    }

    #[test]
    fn a_jump_of_the_cursor_and_a_bare_return_end_a_line() {
        assert_eq!(lines(b"\x1b[01;01Hfirst\x1b[02;01Hsecond\x1b[2J"), ["first", "second"]);
        assert_eq!(lines(b"10%\r20%\rdone\r\r\n"), ["10%", "20%", "done"]);
    }

    #[test]
    fn expectations_are_met_in_their_order_and_within_a_line() {
        let mut console = Console::default();
        console.feed(b"one two three\nfour\nlogin: ");
        assert!(finds(&mut console, "two"));
        assert!(!finds(&mut console, "one"), "it came before");
        assert!(finds(&mut console, "login: $"), "a prompt has no end");
        assert!(!finds(&mut console, "login"));
        console.feed(b"root\nlogin: ");
        assert!(finds(&mut console, "root") && finds(&mut console, "login"));
    }

    #[test]
    fn a_text_that_comes_in_pieces_is_found() {
        let mut console = Console::default();
        console.feed(b"lo");
        assert!(!finds(&mut console, "login"));
        console.feed(b"gin");
        assert!(finds(&mut console, "login"));
    }

    #[test]
    fn an_endless_line_takes_no_endless_memory() {
        let mut console = Console::default();
        for _ in 0..1000 {
            console.feed(&[b'x'; 64 << 10]);
        }
        let kept: usize = console.unseen().map(|(_, text)| text.len()).sum();
        assert!(kept <= MOST_KEPT_BYTES + LONGEST_LINE_BYTES);
    }

    #[test]
    fn where_a_match_ends_is_told_in_bytes_of_all_text() {
        let mut console = Console::default();
        assert_eq!(console.position(), 0);
        console.feed(b"\x1b[1mone\n  \nhost login: ");
        assert_eq!(console.position(), 0, "nothing was looked for");
        assert!(finds(&mut console, "login:"));
        // "one", two blanks, and what was matched.
        assert_eq!((console.current_start(), console.position()), (5, 16));
        let ended = console.feed(b"root\nnext");
        assert_eq!(ended, [Line { start: 5, text: b"host login: root".to_vec() }]);
        assert_eq!((console.current_start(), console.position()), (21, 16));
        let unseen: Vec<(usize, &[u8])> = console.unseen().collect();
        assert_eq!(unseen, [(5, &b"host login: root"[..]), (21, &b"next"[..])]);
        // A line of nothing but blanks is dropped, and takes its place all the same.
        assert!(finds(&mut console, "next"));
        console.feed(b"\n \n");
        assert!(!finds(&mut console, "x"));
        assert_eq!(console.position(), 26);
    }
}
