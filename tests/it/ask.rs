//! What `kiln why`, `log` and `inputs` say of a step that is up to date.

use super::host::{Host, Told};

fn host() -> Host {
    let host = Host::new();
    host.file(
        "kiln.toml",
        "project = \"p\"\n[settings]\nsrcdir = \"src\"\n[steps.m]\nmake = { files = \"m\", from = [{ src = \"x\" }] }\n",
    );
    host.file("src/x", "text");
    host
}

/// kiln with a WORK of another name.
fn elsewhere(host: &Host, arguments: &[&str]) -> Told {
    Told::by(host.kiln().args(arguments).env("WORK", host.path("other")))
}

#[test]
fn a_step_that_is_up_to_date_says_why_it_ran_last() {
    let host = host();
    host.run(&["build"]).succeeds();
    assert_eq!(
        host.run(&["why", "m"]).succeeds().stdout,
        "m: up to date; it ran last because it never ran here\n"
    );
    host.file("src/x", "other");
    host.run(&["build"]).succeeds();
    let told = host.run(&["why", "m"]);
    assert!(
        told.succeeds().stdout.starts_with("m: up to date; it ran last because `x` in SRCDIR was "),
        "{}",
        told.stdout
    );
}

#[test]
fn a_step_whose_result_came_from_another_work_has_its_log_and_inputs_all_the_same() {
    let host = host();
    host.run(&["build"]).succeeds();
    for verb in ["log", "inputs"] {
        // Before a build too: what it says is kept under the step's key.
        elsewhere(&host, &[verb, "m"]).succeeds();
    }
    elsewhere(&host, &["build"]).succeeds();
    assert_eq!(elsewhere(&host, &["why", "m"]).succeeds().stdout, "m: up to date\n");
    for verb in ["log", "inputs"] {
        elsewhere(&host, &[verb, "m"]).succeeds();
    }
    host.file("src/x", "other");
    for verb in ["log", "inputs"] {
        elsewhere(&host, &[verb, "m"]).fails(1, &["step `m` never ran with WORK"]);
    }
}
