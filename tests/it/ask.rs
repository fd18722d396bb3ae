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
        "m: up to date; it ran last because it had never run here\n"
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
fn a_question_takes_the_work_that_the_build_took_and_one_about_several_steps_names_them() {
    let host = host();
    host.file(
        "kiln.toml",
        "project = \"p\"\n[settings]\nsrcdir = \"src\"\n[steps.m]\nmatrix = { of = [\"a\", \"b\"] }\n\
         make = { files = \"m-%{of}\", from = [{ src = \"x\" }] }\n",
    );
    host.run(&["build", "--work", "there"]).succeeds();
    for verb in ["why", "log", "inputs"] {
        host.run(&[verb, "m-a", "--work", "there"]).succeeds();
        host.run(&[verb, "m"]).fails(2, &["`m` is no step but a name for several"]).hints(&["m-a, m-b"]);
    }
}

#[test]
fn nobody_has_to_read_what_is_said() {
    let host = host();
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let mut kiln = host.kiln();
    let status = kiln.arg("build").stdout(std::process::Stdio::null()).stderr(writer).status();
    assert_eq!(status.expect("kiln can be started").code(), Some(0));
    assert!(host.path("work/m").exists());
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
