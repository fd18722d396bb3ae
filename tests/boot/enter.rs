//! Machines of a recipe's steps, entered before their commands run and after they failed.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::host::{Host, Told, busybox, members, soon};
use super::typist::Typist;

/// A recipe in the host's folder, with SRCDIR and WORK below it.
fn recipe(host: &Host, steps: &str) {
    let root = busybox().display();
    host.file(
        "kiln.toml",
        format!(
            "project = \"p\"\n[settings]\nsrcdir = \"src\"\n[roots.b]\nfrom = \"dir:{root}\"\n\
             [roots.bare]\nfrom = \"dir:bare\"\n{steps}"
        ),
    );
}

fn kiln(host: &Host, arguments: &[&str]) -> Told {
    host.end(host.kiln().args(arguments), &[])
}

#[test]
fn a_step_is_entered_before_it_ever_ran_in_a_machine_as_it_gets_it() {
    let host = Host::new();
    recipe(
        &host,
        r#"
[steps.compile]
root = "b"
run = "tr a-z A-Z < main.c > $WORK/object; echo noise"
outputs = ["object"]
[steps.link]
root = "bare"
needs = ["compile"]
interpreter = ["make"]
run = "all"
outputs = ["program"]
env = { WORD = "a b" }
clock = "fixed"
limits = { memory = "200M", processes = 50, timeout = "1s" }
"#,
    );
    host.file("src/main.c", "int main\n");
    host.file("bare/etc/hello", "hello\n");
    // A root without a shell, or anything else.
    let script = "cat $WORK/object main.c /etc/hello; echo $WORD $(date +%Y) $PWD
        echo lost > $WORK/program; sleep 2; exit 9";
    let told = kiln(&host, &["exec", "link", "--", "/toolbox/bin/sh", "-c", script]);
    told.ends(9, &["compile | noise", "in a machine as step `link` gets it"]);
    assert_eq!(told.text(), "INT MAIN\nint main\nhello\na b 1980 /ws/p\n");
    // What it needs was built, and nothing became of it.
    assert_eq!(host.read("work/object"), "INT MAIN\n");
    assert!(!host.path("work/program").exists());
    let told = kiln(&host, &["why", "link"]);
    assert_eq!(told.ends(0, &[]).text(), "link: it never ran here\n");

    let mut shell = Typist::at(host.kiln().args(["shell", "link"]), 24, 200);
    shell.sees("# ");
    shell.types("[ $(free -m | grep Mem | tr -s ' ' | cut -d' ' -f2) -lt 210 ] && echo sma''ll; exit 5\n");
    shell.sees("small\r\n");
    let group = shell.pid();
    assert_eq!(shell.leaves(), Some(5));
    host.is_clean(group);
    kiln(&host, &["exec", "link", "--", "nothing"]).ends(127, &["not found in the machine of step `link`"]);

    host.file("src/main.c", "");
    fs::remove_file(host.path("src/main.c")).expect("there");
    let told = kiln(&host, &["exec", "link", "--", "true"]);
    told.ends(125, &["step `link` cannot be entered: step `compile`, which it needs, failed"]);
}

#[test]
fn the_machines_of_failed_steps_stay_each_for_itself() {
    let host = Host::new();
    recipe(
        &host,
        "[steps.first]\nroot = \"b\"\nrun = \"cat main.c > $WORK/first\"\noutputs = [\"first\"]\n\
         [steps.one]\nroot = \"b\"\nneeds = [\"first\"]\nrun = \"cp $WORK/first $WORK/one; exit 3\"\n\
         [steps.two]\nroot = \"b\"\nneeds = [\"first\"]\nrun = \"true\"\noutputs = [\"missing\"]\n",
    );
    host.file("src/main.c", "int\n");
    let told = Host::told(host.kiln().args(["build", "-k", "--keep", "-j", "1"]), &[]).0;
    let words =
        ["again: kiln build one", "kiln shell one", "kept as one-", "again: kiln build two", "kept as two-"];
    told.ends(1, &words).ends(1, &["made no output that matches `missing`", "1 run, 2 failed"]);
    let machines = || Host::told(host.kiln().args(["ps", "--json"]), &[]).0.lines_of("ps");
    let name = |machine: &Value| machine["name"].as_str().expect("a name").to_owned();
    let mut kept = machines();
    kept.sort_by_key(name);
    let [one, two] = &kept[..] else { panic!("{kept:?}") };
    assert!(name(one).starts_with("one-") && name(two).starts_with("two-"), "{kept:?}");
    let holder = u32::try_from(one["pid"].as_u64().expect("a process")).expect("a process");
    // They see what their steps saw, although another build goes on beside them.
    host.file("src/main.c", "float\n");
    Host::told(host.kiln().args(["build", "first"]), &[]).0.ends(0, &["1 run"]);
    let cat = ["exec", &name(one), "--", "sh", "-c", "cat $WORK/first $WORK/one; ls /toolbox/bin/strace"];
    let told = Host::told(host.kiln().args(cat), &[]).0;
    assert_eq!(told.ends(0, &[]).text(), "int\nint\n/toolbox/bin/strace\n");
    let started = Instant::now();
    Host::told(host.kiln().args(["stop", &name(one)]), &[]).0.ends(0, &[]);
    assert!(started.elapsed() < Duration::from_secs(20), "it waited for the other machine");
    assert_eq!(machines().iter().map(name).collect::<Vec<_>>(), [name(two)]);
    Host::told(host.kiln().args(["exec", &name(two), "--", "true"]), &[]).0.ends(0, &[]);
    // The holder may still be leaving when `stop` is over.
    Host::told(host.kiln().args(["stop", &name(two)]), &[]).0.ends(0, &[]);
    soon(10, "its holder is gone", || members(holder).is_empty());
    host.is_clean(holder);
}
