//! From what is known of a build to the lines that are seen of it: a head that counts, and below it a line for each step that runs
//! with the last that it said. A function of values: neither clock nor terminal.

use std::time::Duration;

use super::board::{Board, Busy, Doing, TAIL};
use super::columns::{cut, fill, width};

/// How a piece of a line looks, where colours are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Look {
    Plain,
    /// What matters.
    Strong,
    /// What a step said.
    Faint,
    /// What went wrong.
    Bad,
}

/// A line, piece by piece.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Line(pub Vec<(Look, String)>);

impl Line {
    fn of(look: Look, text: String) -> Self {
        Self(vec![(look, text)])
    }

    /// How many columns it takes.
    pub fn width(&self) -> usize {
        self.0.iter().map(|(_, text)| width(text)).sum()
    }

    /// The same, in at most `columns`.
    fn cut(self, columns: usize) -> Self {
        if self.width() <= columns {
            return self;
        }
        let mut left = columns;
        let mut pieces = Vec::new();
        for (look, text) in self.0 {
            let wide = width(&text);
            if wide < left {
                left -= wide;
                pieces.push((look, text));
                continue;
            }
            // With something after it, which does not fit, so that the mark stands here.
            pieces.push((look, cut(&format!("{text} "), left)));
            break;
        }
        Self(pieces)
    }
}

/// A terminal, as far as this goes: nothing is drawn in its last column, where some wrap before there is more, nor on its
/// last row, where what is drawn is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Room {
    pub columns: usize,
    pub rows: usize,
}

/// A check that takes no longer is over before anybody could read of it.
const CHECK_WORTH_A_LINE: Duration = Duration::from_secs(1);
/// Columns of the longest name of a step that is not cut.
const NAME_COLUMNS: usize = 24;
/// Columns of the longest word for what a step does.
const WORD_COLUMNS: usize = "collecting".len();
/// Columns of a time, as long as it is below 100 minutes.
const TIME_COLUMNS: usize = "99 m 59 s".len();
/// With fewer, a time takes no more columns than it has.
const ALIGNED_COLUMNS: usize = 50;
/// With fewer left, what a step says is left out rather than cut to nothing.
const WORTH_SAYING_COLUMNS: usize = 8;

/// What is seen `now` after the build began.
pub(super) fn lines(board: &Board, now: Duration, room: Room) -> Vec<Line> {
    let columns = room.columns.saturating_sub(1);
    // A third is left for what is said above.
    let most = (room.rows * 2 / 3).clamp(1, room.rows.saturating_sub(1).max(1));
    let mut busy: Vec<&Busy> = board
        .busy
        .iter()
        .filter(|busy| busy.doing != Doing::Checking || now.saturating_sub(busy.since) >= CHECK_WORTH_A_LINE)
        .collect();
    // Those that run before those that are checked; else, the longest at the top.
    busy.sort_by_key(|busy| (busy.doing == Doing::Checking, busy.since));
    let mut lines = vec![head(board, now)];
    lines.extend(board.note.iter().map(|note| Line::of(Look::Faint, format!("  {note}"))));
    let left = most.saturating_sub(lines.len());
    let shown = if busy.len() <= left { busy.len() } else { left.saturating_sub(1) };
    let tail = match shown {
        1 if left > TAIL => TAIL,
        _ if shown == busy.len() && shown * 2 <= left => 1,
        _ => 0,
    };
    let names = busy.iter().take(shown).map(|busy| width(&busy.step)).max().unwrap_or(0);
    let names = names.min(NAME_COLUMNS).min(columns / 3);
    for step in busy.iter().take(shown) {
        let mut line = row(step, now, names, columns);
        let taken = line.width() + 2;
        if tail == 0
            && let Some(said) = step.tail.back()
            && columns.saturating_sub(taken) >= WORTH_SAYING_COLUMNS
        {
            line.0.push((Look::Faint, format!("  {said}")));
        }
        lines.push(line);
        let said = step.tail.iter().rev().take(tail).rev();
        lines.extend(said.map(|said| Line::of(Look::Faint, format!("    {said}"))));
    }
    if shown < busy.len() && lines.len() < most {
        lines.push(Line::of(Look::Plain, format!("  and {} more", busy.len() - shown)));
    }
    lines.truncate(most);
    lines.into_iter().map(|line| line.cut(columns)).collect()
}

/// What is most worth knowing first: the end is what a narrow terminal cuts off.
fn head(board: &Board, now: Duration) -> Line {
    let mut line = Line::default();
    line.0.push((Look::Strong, format!("kiln: [{}/{}] {}", board.ended(), board.steps, clock(now))));
    let counts = [
        (board.failed, "failed", Look::Bad),
        (board.running(), "running", Look::Strong),
        (board.busy.len() - board.running(), "checking", Look::Plain),
        (board.waiting(), "waiting", Look::Plain),
        (board.ran, "ran", Look::Plain),
        (board.would_run, "would run", Look::Plain),
        (board.cut_off, "cut off", Look::Plain),
        (board.up_to_date, "up to date", Look::Plain),
        (board.skipped, "skipped", Look::Plain),
    ];
    for (count, word, look) in counts.into_iter().filter(|(count, ..)| *count > 0) {
        line.0.push((Look::Plain, if line.0.len() == 1 { ": " } else { ", " }.to_owned()));
        line.0.push((look, format!("{count} {word}")));
    }
    line
}

fn row(busy: &Busy, now: Duration, names: usize, columns: usize) -> Line {
    let time = clock(now.saturating_sub(busy.since));
    let time = if columns < ALIGNED_COLUMNS { time } else { format!("{time:>TIME_COLUMNS$}") };
    let (name, word) = (fill(&busy.step, names), fill(busy.doing.word(), WORD_COLUMNS));
    Line(vec![(Look::Strong, format!("  {name}")), (Look::Plain, format!("  {word}  {time}"))])
}

/// A time that counts on: whole seconds.
fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    if seconds < 60 { format!("{seconds} s") } else { format!("{} m {:02} s", seconds / 60, seconds % 60) }
}

#[cfg(test)]
mod tests {
    use super::super::board::{Change, End};
    use super::*;
    use proptest::prelude::*;

    const ROOM: Room = Room { columns: 80, rows: 24 };

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    fn board(steps: usize, changes: &[(u64, Change)]) -> Board {
        let mut board = Board::new(steps);
        for (at, change) in changes {
            board.change(change.clone(), seconds(*at));
        }
        board
    }

    fn is(step: &str, doing: Doing) -> Change {
        Change::Is(step.to_owned(), doing)
    }

    fn says(step: &str, text: &str) -> Change {
        Change::Says(step.to_owned(), text.to_owned())
    }

    fn text(lines: &[Line]) -> Vec<String> {
        let text = |line: &Line| line.0.iter().map(|(_, text)| text.as_str()).collect::<String>();
        lines.iter().map(|line| text(line).trim_end().to_owned()).collect()
    }

    #[test]
    fn a_build_is_a_line_that_counts_and_one_for_each_step_that_runs() {
        let board = board(
            9,
            &[
                (0, Change::Ends("x".into(), End::UpToDate)),
                (0, Change::Ends("y".into(), End::CutOff)),
                (0, is("compile", Doing::Checking)),
                (0, is("link", Doing::Checking)),
                (1, Change::Waits("compile".into())),
                (2, is("compile", Doing::Preparing)),
                (3, is("compile", Doing::Running)),
                (3, says("compile", "cc a.c")),
                (4, says("compile", "cc b.c")),
                (5, is("test", Doing::Preparing)),
                (6, Change::Ends("z".into(), End::Failed)),
                (6, Change::Ends("u".into(), End::Ran)),
            ],
        );
        assert_eq!(
            text(&lines(&board, seconds(72), ROOM)),
            [
                "kiln: [4/9] 1 m 12 s: 1 failed, 2 running, 1 checking, 2 waiting, 1 ran, 1 cut…",
                "  compile  running      1 m 10 s",
                "    cc b.c",
                "  test     preparing    1 m 07 s",
                "  link     checking     1 m 12 s",
            ]
        );
    }

    #[test]
    fn one_step_alone_is_shown_with_more_of_what_it_says() {
        let mut changes = vec![(0, is("only", Doing::Running))];
        changes.extend((0..9).map(|n| (1, says("only", &format!("line {n}")))));
        let board = board(1, &changes);
        assert_eq!(
            text(&lines(&board, seconds(1), ROOM)),
            [
                "kiln: [0/1] 1 s: 1 running",
                "  only  running           1 s",
                "    line 6",
                "    line 7",
                "    line 8"
            ]
        );
    }

    #[test]
    fn where_there_is_no_room_for_all_steps_the_rest_is_counted() {
        let mut changes = Vec::new();
        for n in 0..20 {
            changes.push((n, is(&format!("s{n}"), Doing::Running)));
            changes.push((n, says(&format!("s{n}"), "said")));
        }
        let board = board(20, &changes);
        let few = text(&lines(&board, seconds(30), Room { columns: 60, rows: 9 }));
        assert_eq!(
            few,
            [
                "kiln: [0/20] 30 s: 20 running",
                "  s0  running          30 s  said",
                "  s1  running          29 s  said",
                "  s2  running          28 s  said",
                "  s3  running          27 s  said",
                "  and 16 more",
            ]
        );
        // What a step says goes first, then the end of each line.
        let narrow = text(&lines(&board, seconds(30), Room { columns: 23, rows: 4 }));
        assert_eq!(narrow, ["kiln: [0/20] 30 s: 20…", "  and 20 more"]);
        assert_eq!(text(&lines(&board, seconds(30), Room { columns: 5, rows: 1 })), ["kil…"]);
    }

    #[test]
    fn a_check_is_shown_once_it_takes_a_while_and_a_note_until_a_step_runs() {
        let mut board = board(2, &[(0, Change::Note("fetching".into())), (0, is("a", Doing::Checking))]);
        let shown = text(&lines(&board, Duration::from_millis(900), ROOM));
        assert_eq!(shown, ["kiln: [0/2] 0 s: 1 checking, 1 waiting", "  fetching"]);
        assert_eq!(lines(&board, seconds(1), ROOM).len(), 3);
        board.change(is("a", Doing::Preparing), seconds(2));
        assert_eq!(
            text(&lines(&board, seconds(2), ROOM)),
            ["kiln: [0/2] 2 s: 1 running, 1 waiting", "  a  preparing         2 s"]
        );
    }

    proptest! {
        #[test]
        fn no_line_is_too_long_and_there_are_not_too_many(
            columns in 0_usize..100,
            rows in 0_usize..30,
            steps in proptest::collection::vec(("\\PC{0,40}", "\\PC{0,90}"), 0..20),
        ) {
            let mut board = Board::new(steps.len());
            for (step, said) in &steps {
                board.change(is(step, Doing::Running), seconds(0));
                board.change(says(step, said), seconds(0));
            }
            let lines = lines(&board, seconds(1), Room { columns, rows });
            prop_assert!(lines.len() <= rows.saturating_sub(1).max(1));
            for line in lines {
                prop_assert!(line.width() <= columns.saturating_sub(1));
            }
        }
    }
}
