//! A command: its streams, its status, and the ways in which it may end.

use std::time::{Duration, Instant};

use super::host::Host;

#[test]
fn streams_are_apart_and_the_status_is_the_commands() {
    let told = Host::new().script(&[], "echo out; echo err >&2; exit 7");
    told.ends(7, &["err\n", "`sh` exited with status 7"]);
    assert_eq!(told.text(), "out\n");
    // The first line says how strong the boundary is.
    let first = told.stderr.lines().next().expect("a line");
    assert!(first.starts_with("kiln: qemu ") && first.contains("jail: "), "{first}");
}

#[test]
fn a_quiet_run_says_nothing_but_what_the_command_says() {
    let told = Host::new().run(&["--quiet"], &["echo", "a  b"]);
    told.ends(0, &[]);
    assert_eq!((told.text(), told.stderr.as_str()), ("a  b\n", ""));
}

#[test]
fn a_program_that_is_not_there_is_127() {
    Host::new().run(&[], &["no-such-program"]).ends(127, &["`no-such-program`", "not found", "root dir:"]);
}

#[test]
fn a_program_that_cannot_be_executed_is_126() {
    Host::new().run(&[], &["/bin"]).ends(126, &["`/bin`", "cannot be executed"]);
}

#[test]
fn a_working_directory_that_is_not_there_is_named() {
    let told = Host::new().run(&["-C", "/no/where"], &["true"]);
    told.ends(125, &["/no/where"]);
    assert!(!told.stderr.contains("`true` was not found"), "{}", told.stderr);
}

#[test]
fn a_working_directory_may_be_one_of_srcdir() {
    let host = Host::new();
    host.file("src/inner/a", "text");
    let told = host.run(&["--src", "src", "-C", "inner"], &["cat", "a"]);
    told.ends(0, &[]);
    assert_eq!(told.stdout, b"text");
}

#[test]
fn a_signal_is_128_and_its_number() {
    let told = Host::new().script(&["--json"], "echo 1; kill -SEGV $$");
    assert_eq!(told.code, Some(128 + 11));
    let events = told.events();
    let machine = events.iter().find(|event| event["event"] == "machine").expect("a machine");
    assert!(machine["backend"].as_str().expect("text").starts_with("qemu "));
    let output = events.iter().find(|event| event["event"] == "output").expect("output");
    assert_eq!((&output["stream"], &output["text"]), (&"stdout".into(), &"1\n".into()));
    let end = events.last().expect("an end");
    assert_eq!((&end["event"], &end["code"]), (&"end".into(), &139.into()));
    assert_eq!(end["ended"]["signal"], 11);
    assert!(end["usage"]["wall_us"].as_u64().expect("a number") > 0);
}

#[test]
fn a_command_that_ignores_its_end_is_stopped_after_its_time() {
    let started = Instant::now();
    let script = "trap '' TERM INT; echo going; (trap '' TERM; sleep 1000) & while :; do sleep 1; done";
    let told = Host::new().script(&["--timeout", "1s", "--grace", "500ms"], script);
    told.ends(124, &["--timeout 1s"]);
    assert_eq!(told.text(), "going\n");
    assert!(started.elapsed() < Duration::from_secs(90), "{:?}", started.elapsed());
}

#[test]
fn a_command_that_ends_in_its_grace_has_timed_out_all_the_same() {
    let script = "trap 'echo tidy; exit 0' TERM; while :; do sleep 0.1; done";
    let told = Host::new().script(&["--timeout", "1s"], script);
    told.ends(124, &["--timeout 1s"]);
    assert_eq!(told.text(), "tidy\n");
}

#[test]
fn bytes_go_through_the_machine_as_they_are() {
    let host = Host::new();
    let input: Vec<u8> =
        (0..700_000_u32).flat_map(|number| (number.wrapping_mul(2_654_435_761)).to_le_bytes()).collect();
    let told = host.end(&mut host.command(&["--stdin", "--quiet"], &["cat"]), &input);
    told.ends(0, &[]);
    assert!(told.stdout == input, "{} bytes of {}", told.stdout.len(), input.len());
}

#[test]
fn arguments_are_taken_as_they_are() {
    let arguments = ["", " ", "a b", "$HOME", "`id`", "new\nline", "*", "--", "-x", "\u{fc}"];
    let told = Host::new().run(&["--quiet"], &[&["printf", "%s\\0"], &arguments[..]].concat());
    told.ends(0, &[]);
    let expected: Vec<u8> = arguments.iter().flat_map(|text| [text.as_bytes(), b"\0"].concat()).collect();
    assert_eq!(told.stdout.escape_ascii().to_string(), expected.escape_ascii().to_string());
}

#[test]
fn much_output_comes_whole_over_either_wire() {
    let host = Host::new();
    for wire in ["serial", "vsock"] {
        let told =
            host.script(&["--quiet", "--wire", wire], "dd if=/dev/zero bs=1M count=96 2>/dev/null; echo end");
        told.ends(0, &[]);
        assert_eq!(told.stdout.len(), (96 << 20) + 4, "over {wire}");
        assert!(told.stdout.ends_with(b"\0end\n"));
    }
}
