//! What is left of a trial for people and CI systems: JUnit XML, and a timeline of one JSON object a line. Pure.

use std::fmt::Write;
use std::time::Duration;

use serde_json::{Value, json};

use super::trial::{Moment, What};
use crate::plan::harmless;
use crate::plan::script::Statement;

/// The timeline's line of `moment`: milliseconds since the start, and what happened. A guest's text is harmless.
#[must_use]
pub fn timeline(moment: &Moment, script: &[Statement]) -> Value {
    let at_ms = u64::try_from(moment.at.as_millis()).unwrap_or(u64::MAX);
    match &moment.what {
        What::Line(line) => json!({"at_ms": at_ms, "event": "line", "text": harmless(line)}),
        What::Output(line) => json!({"at_ms": at_ms, "event": "output", "text": harmless(line)}),
        What::HostKey(key) => json!({"at_ms": at_ms, "event": "host-key", "key": key}),
        What::Reset => json!({"at_ms": at_ms, "event": "reset"}),
        What::PowerOff => json!({"at_ms": at_ms, "event": "poweroff"}),
        What::Verdict { index, failure, .. } => {
            let statement = script.get(*index);
            json!({
                "at_ms": at_ms,
                "event": "verdict",
                "place": statement.map(|statement| &statement.place),
                "statement": statement.map(|statement| &statement.text),
                "failure": failure,
            })
        }
    }
}

/// The trial as JUnit XML, which CI systems read: a case for each statement that was judged, and those that were not come
/// to as skipped.
#[must_use]
pub fn junit(name: &str, script: &[Statement], moments: &[Moment], total: Duration) -> String {
    document(name, script, moments, total, None)
}

/// As [`junit`], where no statement is to blame for the failure, but `why`: an error, in a case of its own.
#[must_use]
pub fn junit_of_error(
    name: &str,
    script: &[Statement],
    moments: &[Moment],
    total: Duration,
    why: &str,
) -> String {
    document(name, script, moments, total, Some(why))
}

fn document(
    name: &str,
    script: &[Statement],
    moments: &[Moment],
    total: Duration,
    error: Option<&str>,
) -> String {
    let mut cases = String::new();
    let (mut failures, mut judged) = (0, vec![false; script.len()]);
    for moment in moments {
        let What::Verdict { index, failure, took } = &moment.what else { continue };
        let Some(statement) = script.get(*index) else { continue };
        judged[*index] = true;
        let _ = write!(cases, "  {}", case(name, statement, *took));
        match failure {
            None => cases.push_str("/>\n"),
            Some(why) => {
                failures += 1;
                let _ = writeln!(cases, "><failure message=\"{}\"/></testcase>", escaped(why));
            }
        }
    }
    if let Some(why) = error {
        let _ = writeln!(
            cases,
            "  <testcase classname=\"{}\" name=\"boot\" time=\"{:.3}\"><error message=\"{}\"/></testcase>",
            escaped(name),
            total.as_secs_f64(),
            escaped(why)
        );
    }
    let errors = usize::from(error.is_some());
    let mut skipped = 0;
    for (statement, _) in
        script.iter().zip(judged).filter(|(statement, judged)| !judged && statement.is_judged())
    {
        skipped += 1;
        let _ = writeln!(cases, "  {}><skipped/></testcase>", case(name, statement, Duration::ZERO));
    }
    let tests = cases.matches("<testcase").count();
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
         <testsuite name=\"{}\" tests=\"{tests}\" failures=\"{failures}\" errors=\"{errors}\" \
         skipped=\"{skipped}\" time=\"{:.3}\">\n{cases}</testsuite>\n",
        escaped(name),
        total.as_secs_f64()
    )
}

fn case(name: &str, statement: &Statement, took: Duration) -> String {
    format!(
        "<testcase classname=\"{}\" name=\"{}: {}\" time=\"{:.3}\"",
        escaped(name),
        escaped(&statement.place),
        escaped(&statement.text),
        took.as_secs_f64()
    )
}

/// Text as XML 1.0 holds it in an attribute (§2.2, §2.4).
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\t' | '\n' | '\r' => {
                let _ = write!(escaped, "&#{};", u32::from(c));
            }
            '\0'..='\x1f' | '\u{fffe}' | '\u{ffff}' => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::script::parse;

    fn verdict(index: usize, failure: Option<&str>) -> Moment {
        let what =
            What::Verdict { index, failure: failure.map(str::to_owned), took: Duration::from_millis(1500) };
        Moment { at: Duration::from_secs(2), what }
    }

    #[test]
    fn a_report_counts_what_was_met_what_was_not_and_what_was_not_come_to() {
        let script = parse("s", "within 5s\nexpect \"<a> & b\"\nexpect c\nexpect d").expect("a good script");
        let moments = [verdict(1, None), verdict(2, Some("not within 5s: \u{1b}\"x\""))];
        let xml = junit("disk.img", &script, &moments, Duration::from_secs(7));
        assert_eq!(
            xml,
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
             <testsuite name=\"disk.img\" tests=\"3\" failures=\"1\" errors=\"0\" skipped=\"1\" time=\"7.000\">\n  \
             <testcase classname=\"disk.img\" name=\"s line 2: expect &quot;&lt;a&gt; &amp; b&quot;\" time=\"1.500\"/>\n  \
             <testcase classname=\"disk.img\" name=\"s line 3: expect c\" time=\"1.500\">\
             <failure message=\"not within 5s: \u{fffd}&quot;x&quot;\"/></testcase>\n  \
             <testcase classname=\"disk.img\" name=\"s line 4: expect d\" time=\"0.000\"><skipped/></testcase>\n\
             </testsuite>\n"
        );
    }

    #[test]
    fn what_no_statement_is_to_blame_for_is_an_error_of_its_own() {
        let script = parse("s", "expect a\nexpect b").expect("a good script");
        let xml =
            junit_of_error("disk.img", &script, &[verdict(0, None)], Duration::from_secs(7), "QEMU <ended>");
        assert_eq!(
            xml,
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
             <testsuite name=\"disk.img\" tests=\"3\" failures=\"0\" errors=\"1\" skipped=\"1\" time=\"7.000\">\n  \
             <testcase classname=\"disk.img\" name=\"s line 1: expect a\" time=\"1.500\"/>\n  \
             <testcase classname=\"disk.img\" name=\"boot\" time=\"7.000\"><error message=\"QEMU &lt;ended&gt;\"/></testcase>\n  \
             <testcase classname=\"disk.img\" name=\"s line 2: expect b\" time=\"0.000\"><skipped/></testcase>\n\
             </testsuite>\n"
        );
    }

    #[test]
    fn a_guests_text_is_harmless_in_a_timeline() {
        let moment = Moment { at: Duration::from_millis(12), what: What::Line(b"a\x1b[2Jb".to_vec()) };
        let line = timeline(&moment, &[]);
        assert_eq!(line, json!({"at_ms": 12, "event": "line", "text": "a\u{241b}[2Jb"}));
    }
}
