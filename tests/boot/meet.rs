//! Two steps that run at once and would talk to each other: they find no way, where two processes of one step find several.

use std::process::Command;

use super::build::recipe;
use super::host::Host;
use super::judge;

/// How long each looks for the other.
const SECONDS: u32 = 8;

#[test]
fn two_steps_that_run_at_once_cannot_meet() {
    let host = Host::new();
    host.folder("src");
    let program = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/boot/meet.c");
    let made =
        Command::new("cc").args(["-static", "-O1", "-o"]).arg(host.path("src/meet")).arg(program).status();
    assert!(made.expect("cc is installed").success());
    let looks = |own: u32, other: u32| {
        format!(
            "[steps.s{own}]\nrun = \"./meet {own} {other} {SECONDS} > $WORK/{own}; cat $WORK/{own}\"\noutputs = [\"{own}\"]\n"
        )
    };
    let both = "[steps.x]\nneeds = [\"s1\", \"s2\"]\nrun = \"./meet 3 4 2 > $WORK/3 & ./meet 4 3 2; wait\"\noutputs = [\"3\"]\n";
    recipe(&host, &format!("{}{}{both}", looks(1, 2), looks(2, 1)));
    let mut kiln = host.kiln();
    host.end(kiln.args(["build", "--jobs", "2", "--trace-out", "trace.json"]), &[]).ends(0, &["3 run"]);
    // They did run at once, longer than it takes to meet.
    let spans = judge::timeline(&host.read("trace.json"));
    let commands: Vec<_> = ["s1", "s2"]
        .iter()
        .map(|step| {
            let span = spans.iter().find(|span| span.name == *step && span.process == "steps");
            let span = span.expect("a step that ran");
            (span.start, span.end)
        })
        .collect();
    let together = commands[0].1.min(commands[1].1).saturating_sub(commands[0].0.max(commands[1].0));
    assert!(together > u64::from(SECONDS) * 500_000, "{commands:?}");
    for own in ["1", "2"] {
        assert_eq!(host.read(&format!("work/{own}")), "looks\n");
    }
    // What each tries does work.
    let met = host.read("work/3");
    for way in ["abstract socket", "/dev/shm", "/tmp", "System V memory"] {
        assert!(met.contains(way), "{met}");
    }
}
