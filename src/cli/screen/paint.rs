//! From lines to what a terminal is sent: what is drawn now in the place of what was drawn before, with plain lines above it that
//! scroll away. A function of values.
//!
//! The cursor is left in the first column of the row below. Lines are overwritten rather than cleared first, so that
//! nothing flickers, and the terminal's own wrapping is off while they are drawn: where it takes a character for wider than
//! kiln does, it cuts it off and breaks nothing.

use super::lines::{Line, Look, Room};

const CLEAR_LINE: &str = "\x1b[K";
const CLEAR_BELOW: &str = "\x1b[J";
const WRAP_OFF: &str = "\x1b[?7l";
const WRAP_ON: &str = "\x1b[?7h";

/// What is drawn.
#[derive(Debug, Default)]
pub(super) struct Drawn {
    lines: Vec<Line>,
    /// The terminal's size then.
    room: Option<Room>,
}

impl Drawn {
    /// What draws `lines` in the place of what is drawn, below the plain text `above`, which is empty or ends with a line's end;
    /// nothing where all is as it is.
    pub fn replace(
        &mut self,
        above: &str,
        lines: Vec<Line>,
        room: Room,
        with_colours: bool,
    ) -> Option<String> {
        if above.is_empty() && lines == self.lines && (self.room == Some(room) || lines.is_empty()) {
            return None;
        }
        let mut text = self.to_the_top(room);
        if !above.is_empty() {
            text += CLEAR_BELOW;
            text += above;
        }
        if !lines.is_empty() {
            text += WRAP_OFF;
            for line in &lines {
                for (look, piece) in &line.0 {
                    match code(*look).filter(|_| with_colours) {
                        Some(code) => text += &format!("\x1b[{code}m{piece}\x1b[m"),
                        None => text += piece,
                    }
                }
                text += CLEAR_LINE;
                text.push('\n');
            }
            text += WRAP_ON;
        }
        text += CLEAR_BELOW;
        self.lines = lines;
        self.room = Some(room);
        Some(text)
    }

    /// Forgets what was drawn: somebody else has written below it.
    pub fn forget(&mut self) {
        self.lines.clear();
    }

    /// To where the first line is. A terminal that was made narrower has broken the lines that do not fit any more.
    fn to_the_top(&self, room: Room) -> String {
        let rows = |line: &Line| line.width().div_ceil(room.columns.max(1)).max(1);
        let rows: usize = self.lines.iter().map(rows).sum();
        match rows.min(room.rows.saturating_sub(1)) {
            0 => "\r".to_owned(),
            up => format!("\r\x1b[{up}A"),
        }
    }
}

fn code(look: Look) -> Option<u8> {
    match look {
        Look::Plain => None,
        Look::Strong => Some(1),
        Look::Faint => Some(2),
        Look::Bad => Some(31),
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZero;

    use super::*;

    const ROOM: Room = Room { columns: 20, rows: 6 };

    fn line(text: &str) -> Line {
        Line(vec![(Look::Bad, text.to_owned())])
    }

    fn terminal(rows: u16, columns: u16) -> vt100::Parser {
        let some = |count| NonZero::new(count).expect("not 0");
        vt100::Parser::new(some(rows), some(columns), 0)
    }

    /// What is on a terminal's screen.
    fn screen(terminal: &vt100::Parser) -> Vec<String> {
        let columns = terminal.screen().size().1;
        let mut rows: Vec<String> = terminal.screen().rows(0, columns.into()).collect();
        while rows.last().is_some_and(String::is_empty) {
            rows.pop();
        }
        rows
    }

    fn replace(drawn: &mut Drawn, above: &str, lines: &[&str]) -> String {
        let lines = lines.iter().map(|text| line(text)).collect();
        drawn.replace(above, lines, ROOM, true).expect("something is another")
    }

    /// Sends it as a terminal gets it: a line's end moves to the first column, too.
    fn send(terminal: &mut vt100::Parser, text: &str) {
        terminal.process(text.replace('\n', "\r\n").as_bytes());
    }

    #[test]
    fn what_is_drawn_takes_the_place_of_what_was_and_plain_lines_scroll_above() {
        let mut terminal = terminal(6, 20);
        let mut drawn = Drawn::default();
        send(&mut terminal, "before\n");
        send(&mut terminal, &replace(&mut drawn, "", &["head", "a long line", "b"]));
        assert_eq!(screen(&terminal), ["before", "head", "a long line", "b"]);
        send(&mut terminal, &replace(&mut drawn, "done: 1\n", &["head 2", "b"]));
        assert_eq!(screen(&terminal), ["before", "done: 1", "head 2", "b"]);
        // At the bottom of the screen it scrolls; a plain line may be longer than the screen is wide.
        let long = "x".repeat(25);
        send(&mut terminal, &replace(&mut drawn, &format!("{long}\nlast\n"), &["head 3"]));
        assert_eq!(screen(&terminal), ["done: 1", &"x".repeat(20), "xxxxx", "last", "head 3"]);
        assert_eq!(drawn.replace("", vec![line("head 3")], ROOM, true), None);
        send(&mut terminal, &replace(&mut drawn, "", &[]));
        assert_eq!(screen(&terminal), ["done: 1", &"x".repeat(20), "xxxxx", "last"]);
        assert_eq!(terminal.screen().cursor_position(), (4, 0));
    }

    #[test]
    fn a_terminal_that_was_made_narrower_has_its_broken_lines_overwritten() {
        let mut drawn = Drawn::default();
        replace(&mut drawn, "", &[&"a".repeat(19), "b"]);
        let narrow = Room { columns: 10, rows: 6 };
        let mut terminal = terminal(6, 10);
        // As a terminal shows it that breaks lines when it is made narrower.
        send(&mut terminal, &format!("before\n{}\nb\n", "a".repeat(19)));
        let text = drawn.replace("", vec![line("head")], narrow, false).expect("it is narrower");
        send(&mut terminal, &text);
        assert_eq!(screen(&terminal), ["before", "head"]);
    }

    #[test]
    fn without_colours_only_the_cursor_is_moved() {
        let mut drawn = Drawn::default();
        let text = drawn.replace("", vec![line("x")], ROOM, false).expect("it is new");
        assert!(!text.contains('m') && text.contains('x'), "{text:?}");
        assert!(replace(&mut drawn, "above\n", &["x"]).contains("\x1b[31mx\x1b[m"));
    }
}
