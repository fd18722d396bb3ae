//! `kiln build` in real machines: what runs again is what the fs device saw read something that changed.

use std::fs;
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use super::host::{Host, Running, Told, busybox, greeter};
use super::judge;

/// A recipe in the host's folder, with SRCDIR and WORK below it.
pub fn recipe(host: &Host, steps: &str) {
    let root = busybox().display();
    host.file(
        "kiln.toml",
        format!("project = \"p\"\n[settings]\nsrcdir = \"src\"\n[roots.b]\nfrom = \"dir:{root}\"\n{steps}"),
    );
}

const STEPS: &str = r#"
[steps.compile]
run = """
[ ! -e include/b.h ] || exec cat include/b.h > $WORK/lib/object
cat main.c > /tmp/object
mkdir $WORK/lib && mv /tmp/object $WORK/lib/object
echo compiled
"""
outputs = ["lib"]
[steps.link]
needs = ["compile"]
run = """
ls -R $WORK
tr a-z A-Z < $WORK/lib/object > $WORK/program
chmod 755 $WORK/program
"""
outputs = ["program"]
[steps.test]
needs = ["link"]
script = "test.sh"
"#;

fn build(host: &Host, arguments: &[&str]) -> Told {
    host.end(host.kiln().arg("build").args(arguments), &[])
}

/// The steps that ran, by the events of a build with `--json`.
fn ran(told: &Told) -> Vec<String> {
    let events = told.ends(0, &[]).events();
    let run = events.iter().filter(|event| event["event"] == "step" && event["outcome"] == "run");
    run.map(|event| event["step"].as_str().expect("a name").to_owned()).collect()
}

#[test]
fn steps_run_again_where_what_they_read_changed_and_not_where_it_did_not() {
    let host = Host::new();
    recipe(&host, STEPS);
    host.file("src/main.c", "int main\n");
    host.file("src/unread", "x");
    host.file("src/include/a.h", "x");
    host.file("src/test.sh", "test -x $WORK/program && cat $WORK/program\n");
    let told = build(&host, &[]);
    told.ends(0, &["compile: it never ran here", "compile | compiled", "test | INT MAIN", "3 run"]);
    assert_eq!(host.read("work/program"), "INT MAIN\n");
    build(&host, &[]).ends(0, &["3 up to date"]);
    for (path, text, runs, why) in [
        ("src/unread", "y", &[][..], "test: up to date"),
        ("src/test.sh", "cat $WORK/program $WORK/program >&2\n", &["test"], "`/ws/p/test.sh` changed"),
        // What comes of it is the same.
        ("src/main.c", "int main\n", &[], "test: up to date"),
        ("src/main.c", "int MAIN\n", &["compile", "link"], "compile: `/ws/p/main.c` changed: content"),
        ("src/include/c.h", "", &[], "test: up to date"),
        ("src/include/b.h", "INT main\n", &["compile"], "`/ws/p/include/b.h`, which it looked for in vain"),
    ] {
        host.file(path, text);
        let told = host.end(host.kiln().args(["why", "test"]), &[]);
        assert!(told.ends(0, &[]).text().contains(why), "{path}: {told:?}");
        if path == "src/include/b.h" {
            // The script writes into a folder that is not there.
            let told = build(&host, &[]);
            told.ends(1, &["step `compile` exited with status 1", "1 failed, 2 skipped"]);
            assert_eq!(host.read("work/lib/object"), "int MAIN\n");
            let told = host.end(host.kiln().args(["log", "compile"]), &[]);
            assert!(
                told.ends(0, &["exited with status 1"]).text().contains("nonexistent directory"),
                "{told:?}"
            );
            fs::remove_file(host.path(path)).expect("there");
            build(&host, &[]).ends(0, &["3 up to date"]);
            continue;
        }
        assert_eq!(ran(&build(&host, &["--json"])), runs, "{path}");
        build(&host, &[]).ends(0, &["3 up to date"]);
    }
    let told = host.end(host.kiln().args(["inputs", "--all", "compile"]), &[]);
    let text = told.ends(0, &[]).text();
    assert!(text.contains("looked for in vain") && text.contains("/ws/p/include/b.h"), "{text}");
    assert!(!text.contains("unread"), "{text}");
}

#[test]
fn a_build_that_is_interrupted_keeps_what_is_done_and_goes_on_from_there() {
    let host = Host::new();
    recipe(
        &host,
        "[steps.first]\nrun = \"echo 1 > $WORK/first\"\noutputs = [\"first\"]\n\
         [steps.second]\nneeds = [\"first\"]\nrun = \"echo begun; [ ! -e slow ] || sleep 100; echo 2 > $WORK/second\"\n\
         outputs = [\"second\"]\n",
    );
    host.file("src/slow", "");
    // As `kill` does, and as a terminal does.
    for send in [kill_process, kill_process_group] {
        let mut command = host.kiln();
        command
            .args(["build", "--json", "--trace-out", "trace.json"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut running = Running::start(&mut command);
        let group = running.id();
        running.read_until("begun");
        send(Pid::from_child(&running), Signal::INT).expect("it is ours");
        let told = running.end();
        told.ends(130, &["interrupted by SIGINT"]);
        assert_eq!(told.stderr.matches("kiln: error: ").count(), 1, "{told:?}");
        assert_eq!(told.events().last().expect("events")["event"], "error");
        let spans = judge::timeline(&host.read("trace.json"));
        let second = spans.iter().find(|span| span.name == "second" && span.process == "steps");
        let second = second.expect("the step that ran");
        assert_eq!(second.arguments["outcome"], "unfinished");
        host.is_clean(group);
    }
    assert_eq!(host.read("work/first"), "1\n");
    assert!(!host.path("work/second").exists());
    fs::remove_file(host.path("src/slow")).expect("there");
    assert_eq!(ran(&build(&host, &["--json"])), ["second"]);
}

#[test]
fn a_recipe_that_was_just_begun_builds() {
    let host = Host::new();
    host.end(host.kiln().arg("init"), &[]).ends(0, &["kiln build"]);
    let text = host.read("kiln.toml").replace("debian:bookworm", &format!("dir:{}", busybox().display()));
    host.file("kiln.toml", text);
    let trace = host.path("trace.json");
    let told = build(&host, &["--trace-out", &trace.display().to_string()]);
    told.ends(0, &["2 run"]);
    assert!(host.read("work/hello.txt").contains("hello from a machine"));
    let spans = judge::timeline(&host.read("trace.json"));
    let hello = spans.iter().find(|span| span.name == "hello" && span.process == "steps").expect("it ran");
    assert_eq!((&hello.arguments["outcome"], hello.depth), (&"run".into(), 0));
    let phases = spans.iter().filter(|span| span.depth == 1 && span.arguments["step"] == "hello");
    let phases: Vec<&str> = phases.map(|span| span.name.as_str()).collect();
    assert_eq!(phases, ["prepare", "boot", "setup", "command", "collect", "record", "merge"]);
    assert_eq!(spans.iter().filter(|span| span.process == "checks").count(), 2);
}

#[test]
fn the_end_of_a_build_says_where_the_time_went_and_what_was_read() {
    let host = Host::new();
    recipe(
        &host,
        "[steps.reader]\nrun = \"cat a b; test -e missing || echo there\"\n\
         [steps.bad]\nneeds = [\"reader\"]\nrun = \"cat a; exit 3\"\n\
         [steps.after]\nneeds = [\"bad\"]\nrun = \"true\"\n",
    );
    host.file("src/a", "a".repeat(1000));
    host.file("src/b", "b".repeat(3000));
    let trace = host.path("trace.json");
    let told = build(&host, &["--trace-out", &trace.display().to_string()]);
    told.ends(
        1,
        &[
            "kiln: 1 run, 1 failed, 1 skipped in ",
            "kiln: time, all steps together: ",
            "commands ",
            "kiln: longest: ",
            "; most: reader 2 files (3.9 KiB, ",
        ],
    );
    let spans = judge::timeline(&host.read("trace.json"));
    assert!(spans.iter().any(|span| span.name == "bad" && span.arguments["outcome"] == "failed"));
    // The same, for programs: the reader is up to date now.
    let events = build(&host, &["--json"]).ends(1, &[]).events();
    assert_eq!((&events[0]["event"], &events[0]["steps"]), (&"begin".into(), &3.into()));
    let end = events.last().expect("an end");
    assert_eq!((&end["up_to_date"], &end["failed"], &end["skipped"]), (&1.into(), &1.into(), &1.into()));
    assert_eq!((&end["read"]["files"], &end["read"]["bytes"]), (&1.into(), &1000.into()));
    assert!(end["phase_seconds"]["command"].as_f64() > Some(0.0), "{end}");
}

#[test]
fn a_script_that_is_run_again_runs_only_what_has_something_new_to_read() {
    let host = Host::new();
    let root = format!("dir:{}", busybox().display());
    host.file("src/main.c", "int main\n");
    host.file("src/unread", "x");
    let step = |name: &str, more: &[&str], out: &str, shell: &str| {
        let mut kiln = host.kiln();
        kiln.args(["run", "--step", name, "--src", "src", "--root", &root, "--out", out]).args(more);
        host.end(kiln.args(["--", "sh", "-euc", shell]), &[])
    };
    let compile = || step("compile", &[], "object", "cat main.c > $WORK/object");
    let link = || {
        step(
            "link",
            &["--needs", "compile"],
            "program",
            "ls $WORK; tr a-z A-Z < $WORK/object > $WORK/program",
        )
    };
    link().ends(2, &["step `compile` has put nothing into WORK", "run it before"]);
    compile().ends(0, &["compile: it never ran here"]);
    link().ends(0, &["link: it never ran here", "link | object"]);
    assert_eq!(host.read("work/program"), "INT MAIN\n");
    host.file("src/unread", "y");
    compile().ends(0, &["compile: up to date"]);
    link().ends(0, &["link: up to date"]);
    host.file("src/main.c", "int f\n");
    compile().ends(0, &["compile: ", "/main.c` changed"]);
    link().ends(0, &["/object` changed"]);
    assert_eq!(host.read("work/program"), "INT F\n");
    let failed = step("compile", &[], "object", "echo no; exit 7");
    failed.ends(7, &["step `compile` exited with status 7", "again: "]);
    assert_eq!(host.read("work/object"), "int f\n");
    // Asked about without a recipe.
    host.end(host.kiln().args(["log", "compile"]), &[]).ends(0, &["exited with status 7"]);
    let told = host.end(host.kiln().args(["why", "compile"]), &[]);
    assert!(told.ends(0, &[]).text().contains("compile: it ran last because"), "{told:?}");
    let told = host.end(host.kiln().args(["inputs", "link", "--all", "--json"]), &[]);
    let inputs = told.ends(0, &[]).lines_of("inputs");
    let asked = |path: &str| {
        let input = inputs.iter().find(|input| input["path"].as_str().is_some_and(|it| it.ends_with(path)));
        input.expect(path).clone()
    };
    assert_eq!((&asked("/object")["asked"], &asked("/object")["share"]), (&"content".into(), &"work".into()));
    assert_eq!(asked("/object")["digest"].as_str().map(str::len), Some(64));
    let told = host.end(host.kiln().args(["inputs", "link"]), &[]);
    assert!(told.ends(0, &[]).text().contains("/object"), "{told:?}");
}

#[test]
fn a_result_is_not_kept_where_the_steps_root_changed_before_it_ran() {
    let host = Host::new();
    host.folder("own/bin");
    fs::copy(busybox().join("bin/busybox"), host.path("own/bin/sh")).expect("room");
    host.file("own/text", "one\n");
    recipe(
        &host,
        "[roots.own]\nfrom = \"dir:own\"\n[steps.a]\nroot = \"b\"\nrun = \"echo begun; sleep 5\"\n\
         [steps.o]\nroot = \"own\"\nneeds = [\"a\"]\nrun = \"read -r t < /text; echo \\\"$t\\\" > $WORK/o\"\noutputs = [\"o\"]\n",
    );
    host.file("src/x", "");
    let mut command = host.kiln();
    command.args(["build", "--json"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut running = Running::start(&mut command);
    running.read_until("begun");
    host.file("own/text", "two\n");
    let told = running.end();
    told.ends(0, &[]);
    let said = String::from_utf8_lossy(&told.stdout).into_owned();
    assert!(said.contains("own` was modified before the step ran"), "{told:?}");
    assert_eq!(host.read("work/o"), "two\n");
    assert_eq!(ran(&build(&host, &["--json"])), ["o"]);
    build(&host, &[]).ends(0, &["2 up to date"]);
}

#[test]
fn a_step_with_the_network_runs_each_time_and_what_needs_it_only_where_it_gave_something_else() {
    let host = Host::new();
    host.file("src/script", "x");
    let fetched = |words: &str| {
        let port = greeter();
        let get = format!("nc -w 10 10.0.2.2 {port} </dev/null >$WORK/got; echo {words} >>$WORK/got");
        recipe(
            &host,
            &format!(
                "[steps.fetch]\nrun = '{get}'\nnetwork = \"full\"\noutputs = [\"got\"]\n\
                 [steps.use]\nneeds = [\"fetch\"]\nrun = 'cat $WORK/got >$WORK/used'\noutputs = [\"used\"]\n"
            ),
        );
    };
    fetched("once");
    // Nobody has it who was not given it by whoever calls kiln.
    build(&host, &[])
        .ends(2, &["step `fetch` asks for the network", "does not have by itself", "--net full"]);
    build(&host, &["use", "--net", "full", "--offline"]).ends(2, &["step `fetch`", "--offline shuts"]);
    host.end(host.kiln().args(["exec", "fetch", "--", "true"]), &[])
        .ends(2, &["step `fetch` asks for the network"]);
    assert!(!host.path("work/used").exists() && !host.path("work/got").exists());
    build(&host, &["-n"]).ends(0, &["fetch"]);
    let build = |host: &Host, arguments: &[&str]| build(host, &[&["--net", "full"], arguments].concat());
    let told = build(&host, &["--json"]);
    assert_eq!(ran(&told), ["fetch", "use"]);
    assert!(told.text().contains("the network is open to this command"), "{told:?}");
    assert_eq!(host.read("work/used"), "from the host\nonce\n");
    assert_eq!(ran(&build(&host, &["--json"])), ["fetch"]);
    let told = host.end(host.kiln().args(["why", "fetch"]), &[]);
    assert!(told.ends(0, &[]).text().contains("the network"), "{told:?}");
    fetched("twice");
    assert_eq!(ran(&build(&host, &["--json"])), ["fetch", "use"]);
    assert_eq!(host.read("work/used"), "from the host\ntwice\n");
}
