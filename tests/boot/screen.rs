//! `kiln build` on a terminal: what is drawn while it runs, and that what is left when it is over, however it ends, is plain.

use std::num::NonZero;
use std::process::Command;

use super::build::recipe;
use super::host::Host;
use super::typist::Typist;

const ROWS: u16 = 40;
const COLUMNS: u16 = 100;

/// What a terminal of that size has on its screen in the end, and where its cursor is.
fn screen(shown: &[u8], columns: u16) -> (Vec<String>, (u16, u16)) {
    let some = |count| NonZero::new(count).expect("not 0");
    let mut terminal = vt100::Parser::new(some(ROWS), some(columns), 0);
    terminal.process(shown);
    let rows = terminal.screen().rows(0, columns).map(|row| row.trim_end().to_owned());
    let mut rows: Vec<String> = rows.collect();
    while rows.last().is_some_and(String::is_empty) {
        rows.pop();
    }
    (rows, terminal.screen().cursor_position())
}

/// Asserts that nothing is left of what was drawn: plain lines, and the cursor below them.
fn is_plain(shown: &[u8], columns: u16) -> Vec<String> {
    let (rows, cursor) = screen(shown, columns);
    let text = rows.join("\n");
    let is_drawn = |row: &&String| row.starts_with("  ") || row.starts_with("kiln: [0/");
    assert_eq!(rows.iter().find(is_drawn), None, "{text}");
    assert_eq!((usize::from(cursor.0), cursor.1), (rows.len(), 0), "{text}");
    let text = String::from_utf8_lossy(shown);
    assert_eq!(text.matches("\x1b[?7l").count(), text.matches("\x1b[?7h").count(), "lines are not wrapped");
    rows
}

fn build(host: &Host) -> Command {
    let mut kiln = host.kiln();
    kiln.arg("build");
    kiln
}

fn is_like(rows: &[String], starts: &[&str]) {
    assert_eq!(rows.len(), starts.len(), "{rows:?}");
    for (row, start) in rows.iter().zip(starts) {
        assert!(row.starts_with(start), "{rows:?}");
    }
}

#[test]
fn a_build_is_drawn_while_it_runs_and_ends_with_plain_lines() {
    let host = Host::new();
    recipe(
        &host,
        "[steps.first]\nrun = \"printf 'nasty \\\\033[2J\\\\033[31m text\\\\n'; sleep 2\"\n\
         [steps.second]\nneeds = [\"first\"]\nrun = \"echo 2 > $WORK/second\"\noutputs = [\"second\"]\n",
    );
    host.folder("src");
    let mut terminal = Typist::at(&build(&host), ROWS, COLUMNS);
    terminal.sees("1 running");
    terminal.sees("1 waiting");
    terminal.sees("nasty \u{241b}[2J\u{241b}[31m text");
    // Narrower: it is drawn anew, within what there is.
    terminal.resizes(ROWS, 12);
    terminal.sees("kiln: [0/2…");
    terminal.resizes(ROWS, COLUMNS);
    terminal.sees("1 running");
    let (code, shown) = terminal.ends();
    let rows = is_plain(&shown, COLUMNS);
    let ends = ["kiln: 2 run in ", "kiln: time, ", "kiln: longest: "];
    let report = rows.iter().position(|row| row.starts_with(ends[0])).expect("a report");
    is_like(&rows[report - 2..report], &["kiln: [1/2] first: done in ", "kiln: [2/2] second: done in "]);
    assert!(rows[report + 1].starts_with(ends[1]), "{rows:?}");
    assert_eq!(code, Some(0));
    assert!(!rows.join("\n").contains("nasty"), "{rows:?}");
    // With nothing to do it is over before it is drawn.
    let (code, shown) = Typist::at(&build(&host), ROWS, COLUMNS).ends();
    assert_eq!(code, Some(0));
    is_like(&is_plain(&shown, COLUMNS), &["kiln: 2 up to date in "]);
}

#[test]
fn a_build_that_is_interrupted_leaves_a_clean_screen() {
    let host = Host::new();
    recipe(&host, "[steps.slow]\nrun = \"echo begun; sleep 100\"\n");
    host.folder("src");
    let mut terminal = Typist::at(&build(&host), ROWS, COLUMNS);
    terminal.sees("begun");
    terminal.types("\x03");
    let (code, shown) = terminal.ends();
    assert_eq!(code, Some(130));
    let rows = is_plain(&shown, COLUMNS);
    let error = rows.iter().position(|row| row.starts_with("kiln: error: interrupted by SIGINT"));
    assert!(error.is_some() && !rows.join("\n").contains("^C"), "{rows:?}");
}

#[test]
fn all_that_a_failed_step_printed_is_left_and_nothing_of_the_others() {
    let host = Host::new();
    let script = "for n in 1 2 3 4 5 6 7 8 9; do echo line $n; done; printf '\\\\033[Hno end'; exit 3";
    recipe(
        &host,
        &format!(
            "[steps.good]\nrun = \"echo unheard\"\n[steps.bad]\nneeds = [\"good\"]\nrun = \"{script}\"\n\
             [steps.after]\nneeds = [\"bad\"]\nrun = \"true\"\n"
        ),
    );
    host.folder("src");
    let (code, shown) = Typist::at(&build(&host), ROWS, COLUMNS).ends();
    assert_eq!(code, Some(1));
    let rows = is_plain(&shown, COLUMNS);
    let printed: Vec<&String> = rows.iter().filter(|row| row.starts_with("bad | ")).collect();
    assert_eq!(printed.len(), 10, "{rows:?}");
    assert_eq!((printed[0].as_str(), printed[9].as_str()), ("bad | line 1", "bad | \u{241b}[Hno end"));
    let text = rows.join("\n");
    for word in ["kiln: error: step `bad` exited with status 3", "1 run, 1 failed, 1 skipped"] {
        assert!(text.contains(word), "no {word} in {text}");
    }
    assert!(!text.contains("unheard"), "{text}");
}

#[test]
fn a_terminal_that_cannot_be_drawn_on_gets_lines_and_one_without_colours_none() {
    let host = Host::new();
    recipe(&host, "[steps.s]\nrun = \"echo said; sleep 1; exit 3\"\n");
    host.folder("src");
    let (code, shown) = Typist::at(build(&host).env("TERM", "dumb"), ROWS, COLUMNS).ends();
    let text = String::from_utf8_lossy(&shown);
    assert!(code == Some(1) && !text.contains('\x1b') && text.contains("s | said"), "{text}");
    let colours = |text: &[u8]| String::from_utf8_lossy(text).contains("\x1b[1m");
    let (code, shown) = Typist::at(build(&host).env("NO_COLOR", "1"), ROWS, COLUMNS).ends();
    assert!(code == Some(1) && !colours(&shown), "{}", String::from_utf8_lossy(&shown));
    assert!(String::from_utf8_lossy(&shown).contains("\x1b[?7l"), "it is drawn");
    let (code, shown) = Typist::at(build(&host).env_remove("NO_COLOR"), ROWS, COLUMNS).ends();
    assert!(code == Some(1) && colours(&shown), "{}", String::from_utf8_lossy(&shown));
    // A script's step is drawn, too.
    let mut run = host.command(&["--step", "t"], &["sh", "-c", "echo said; sleep 1"]);
    let (code, shown) = Typist::at(run.env_remove("NO_COLOR"), ROWS, COLUMNS).ends();
    assert!(code == Some(0) && colours(&shown), "{}", String::from_utf8_lossy(&shown));
    is_plain(&shown, COLUMNS);
}
