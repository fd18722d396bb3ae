//! Ready machines: taken by the next run, the same to a step as any other, and never needed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::UNIX_EPOCH;

use rustix::process::{Pid, Signal, kill_process};

use super::host::{Host, Running, Told, soon, started_by};
use super::template::origin;

fn with_keeper(host: &Host, arguments: &[&str], script: &str) -> Told {
    let mut kiln = host.command(arguments, &["sh", "-c", script]);
    Host::told(kiln.env("KILN_KEEPER", "on"), &[]).0
}

/// The keepers of `host`.
fn keepers(host: &Host) -> Vec<String> {
    let (told, _) = Host::told(host.kiln().args(["ps", "--json"]), &[]);
    let entries = told.lines_of("ps");
    entries.iter().filter(|entry| entry["state"] == "ready").map(|entry| entry["pid"].to_string()).collect()
}

/// Waits for the keeper that the last run ordered.
fn keeper(host: &Host) -> String {
    let mut found = Vec::new();
    soon(90, "a machine is ready", || {
        found = keepers(host);
        found.len() == 1
    });
    found.remove(0)
}

fn signal(signal: Signal, pid: &str) {
    let pid = pid.parse().ok().and_then(Pid::from_raw).expect("a process number");
    kill_process(pid, signal).expect("it is ours");
}

/// The processes that the process `pid` started.
fn children(pid: &str) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("it lives").flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists.flat_map(|list| list.split_whitespace().map(str::to_owned).collect::<Vec<_>>()).collect()
}

/// Ends what is ready; nothing is left of it.
fn end(host: &Host) {
    host.end(host.kiln().args(["stop", "--all"]), &[]);
    assert_eq!(keepers(host), [""; 0]);
}

#[test]
fn the_next_run_takes_a_machine_that_is_ready_and_sees_what_any_other_would() {
    let host = Host::new();
    host.file("src/a", "source");
    let script = "set -e; env | sort; id; hostname; pwd; umask; ls -lR . $WORK; cat a; ls / /dev /sys/block; \
                  cut -d' ' -f2-4 /proc/mounts; cut -f1-4 /proc/swaps; nproc; ulimit -a; echo $$; \
                  mkdir $WORK/out; seq 1 1000 > $WORK/out/numbers";
    let mut shown = BTreeSet::new();
    for expected in ["template", "ready", "ready"] {
        let told = with_keeper(&host, &["--json", "--src=src", "--out=out", "--overwrite"], script);
        told.ends(0, &[]);
        assert_eq!(origin(&told), expected);
        let events = told.events();
        let output: String = events.iter().filter_map(|event| event["text"].as_str()).collect();
        let end = events.last().expect("an end");
        shown.insert((output, end["outputs"].to_string(), end["reads"].to_string()));
        fs::remove_dir_all(host.path("work/out")).expect("outputs");
        keeper(&host);
    }
    assert_eq!(shown.len(), 1, "{shown:#?}");
    end(&host);
}

#[test]
fn a_run_that_follows_another_at_once_has_a_machine_made_beside_it() {
    let host = Host::new();
    host.file("src/a", "source");
    let script = "cat a; cut -d' ' -f2-4 /proc/mounts; cut -f1-4 /proc/swaps; echo $$; sleep 2";
    let mut shown = BTreeSet::new();
    // How soon a machine is there depends on the host; that the second run has one made, and what the third sees, does not.
    for expected in [&["template"][..], &["template", "ready"], &["ready"]] {
        let told = with_keeper(&host, &["--json", "--src=src"], script);
        told.ends(0, &[]);
        assert!(expected.contains(&origin(&told).as_str()), "{told:?}");
        let events = told.events();
        shown.insert(events.iter().filter_map(|event| event["text"].as_str()).collect::<String>());
        if expected.len() == 2 {
            keeper(&host);
        }
    }
    assert_eq!(shown.len(), 1, "{shown:#?}");
    end(&host);
}

#[test]
fn machines_that_were_ready_share_no_random_number_and_no_boot_id() {
    let host = Host::new();
    let script = "cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid; mktemp; \
                  head -c 16 /dev/urandom | od -An -tx1";
    let mut seen = BTreeSet::new();
    for _ in 0..3 {
        let told = with_keeper(&host, &["--quiet"], script);
        told.ends(0, &[]);
        assert_eq!(told.text().lines().count(), 4, "{told:?}");
        for line in told.text().lines() {
            assert!(seen.insert(line.to_owned()), "{line} comes twice");
        }
        keeper(&host);
    }
    end(&host);
}

#[test]
fn a_keeper_that_was_killed_or_stopped_or_lost_its_machine_costs_time_only() {
    let host = Host::new();
    let run = || with_keeper(&host, &["--json"], "echo right");
    run().ends(0, &[]);
    signal(Signal::KILL, &keeper(&host));
    let told = run();
    told.ends(0, &[]);
    assert_eq!(origin(&told), "template");

    let stopped = keeper(&host);
    signal(Signal::STOP, &stopped);
    let told = run();
    told.ends(0, &[]);
    assert_eq!(origin(&told), "template");
    // It was ended, and another has come.
    assert_ne!(keeper(&host), stopped);

    let children = children(&keeper(&host));
    assert!(!children.is_empty());
    for child in children {
        signal(Signal::KILL, &child);
    }
    soon(5, "the keeper has noticed", || keepers(&host).is_empty());
    let told = run();
    told.ends(0, &[]);
    assert_eq!(origin(&told), "template");
    keeper(&host);
    end(&host);
}

/// The host's clock, in seconds.
fn now(host: &Host) -> u64 {
    let time = fs::metadata(host.file("now", "")).and_then(|meta| meta.modified()).expect("a time");
    time.duration_since(UNIX_EPOCH).expect("a time of today").as_secs()
}

#[test]
fn a_machine_that_stood_still_while_it_was_ready_has_the_clock_of_the_host() {
    let host = Host::new();
    with_keeper(&host, &["--quiet"], "true").ends(0, &[]);
    let keeper_of_it = keeper(&host);
    let all = [children(&keeper_of_it), vec![keeper_of_it]].concat();
    assert!(all.len() >= 2, "a keeper and kiln's VMM, or QEMU and a device process: {all:?}");
    for pid in &all {
        signal(Signal::STOP, pid);
    }
    // Time passes.
    Host::told(&mut host.command(&["--quiet"], &["sleep", "2"]), &[]).0.ends(0, &[]);
    for pid in &all {
        signal(Signal::CONT, pid);
    }
    let before = now(&host);
    let told = with_keeper(&host, &["--json"], "date +%s; sleep 2; date +%s");
    let after = now(&host);
    assert_eq!(origin(&told), "ready");
    let events = told.events();
    let shown: String = events.iter().filter_map(|event| event["text"].as_str()).collect();
    let shown: Vec<u64> = shown.lines().map(|line| line.parse().expect("a number")).collect();
    assert_eq!(shown.len(), 2, "{told:?}");
    assert!(
        before <= shown[0] && shown[0] + 2 <= shown[1] && shown[1] <= after,
        "{before} {shown:?} {after}"
    );
    // One clock in a step is not that of the next.
    keeper(&host);
    let told = with_keeper(&host, &["--json", "--clock=fixed"], "date +%Y");
    assert_eq!(origin(&told), "ready");
    assert!(told.events().iter().any(|event| event["text"] == "1980\n"), "{told:?}");
    keeper(&host);
    let told = with_keeper(&host, &["--json"], "date +%s");
    assert_eq!(origin(&told), "ready");
    let events = told.events();
    let shown = events.iter().find_map(|event| event["text"].as_str()?.trim().parse::<u64>().ok());
    assert!(shown.is_some_and(|shown| (after..=now(&host)).contains(&shown)), "{told:?}");
    keeper(&host);
    end(&host);
}

#[test]
fn a_machine_that_is_ready_and_does_not_answer_costs_time_only() {
    let host = Host::new();
    with_keeper(&host, &["--quiet"], "true").ends(0, &[]);
    let name = |pid: &String| fs::read_to_string(format!("/proc/{pid}/comm")).expect("it lives");
    let children = children(&keeper(&host));
    // kiln's VMM, or QEMU beside its device process.
    let runs = children.iter().find(|pid| name(pid).starts_with("qemu")).or(children.first());
    let runs = runs.expect("a child");
    signal(Signal::STOP, runs);
    let told = with_keeper(&host, &["--json"], "echo right");
    told.ends(0, &[]);
    assert_eq!(origin(&told), "template");
    assert!(told.events().iter().any(|event| event["text"] == "right\n"), "{told:?}");
    soon(10, "it is gone", || !Path::new(&format!("/proc/{runs}")).exists());
    keeper(&host);
    end(&host);
}

/// Whoever reads what kiln was started with, beside its standard streams, is not kept waiting while a machine waits.
#[test]
fn a_keeper_has_nothing_open_of_whoever_called_kiln() {
    let host = Host::new();
    let mut command = host.command(&["--quiet"], &["true"]);
    command.env("KILN_KEEPER", "on");
    // This reads to the end of what descriptor 3 leads to.
    let mut shell = started_by(&["sh", "-c", "exec 3>&1; \"$@\"", "sh"], &command);
    Host::told(shell.process_group(0), &[]).0.ends(0, &[]);
    keeper(&host);
    end(&host);
}

/// A run in a machine that was ready, whose command has begun; and the keeper of the machine.
fn lent(host: &Host, script: &str) -> (Running, String) {
    with_keeper(host, &["--quiet"], "true").ends(0, &[]);
    let pid = keeper(host);
    let mut kiln = host.command(&["--json"], &["sh", "-c", script]);
    kiln.env("KILN_KEEPER", "on").stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut run = Running::start(&mut kiln);
    run.read_until("begun");
    (run, pid)
}

fn is_gone(pid: &str) {
    soon(10, "it is gone", || !Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn a_keeper_that_is_stopped_while_its_machine_is_lent_goes_on_at_the_end() {
    let host = Host::new();
    let (run, keeper) = lent(&host, "echo begun; sleep 2; echo right");
    signal(Signal::STOP, &keeper);
    let told = run.end();
    told.ends(0, &[]);
    assert!(told.events().iter().any(|event| event["text"] == "right\n"), "{told:?}");
    is_gone(&keeper);
    // Of the run that was last.
    self::keeper(&host);
    end(&host);
}

#[test]
fn a_keeper_that_is_killed_while_its_machine_is_lent_ends_the_run_by_name() {
    let host = Host::new();
    let (run, keeper) = lent(&host, "echo begun; sleep 100");
    let machine = children(&keeper);
    signal(Signal::KILL, &keeper);
    run.end().ends(125, &["the process that held the machine"]);
    machine.iter().for_each(|pid| is_gone(pid));
    // Of the run that was last.
    self::keeper(&host);
    end(&host);
}

/// kiln's VMM, or QEMU and the device process, each killed in its turn; and a guest whose kernel panics.
#[test]
fn a_machine_that_dies_while_it_is_lent_is_told_of_as_any_other() {
    let host = Host::new();
    for turn in 0..2 {
        let (run, keeper) = lent(&host, "echo begun; sleep 100");
        let machine = children(&keeper);
        let Some(child) = machine.get(turn) else { break };
        signal(Signal::KILL, child);
        run.end().ends(125, &["killed by signal 9"]);
        machine.iter().for_each(|pid| is_gone(pid));
        self::keeper(&host);
        end(&host);
    }
    let (run, _) =
        lent(&host, "echo begun; echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger; sleep 100");
    run.end().ends(125, &["kernel panicked", "sysrq triggered crash"]);
    self::keeper(&host);
    end(&host);
}

#[test]
fn a_run_that_is_killed_takes_the_machine_that_it_borrowed_with_it_and_is_nobodys_failure() {
    let host = Host::new();
    let (mut run, keeper) = lent(&host, "echo begun; sleep 100");
    let all = [children(&keeper), vec![keeper]].concat();
    run.kill().expect("it is ours");
    drop(run);
    all.iter().for_each(|pid| is_gone(pid));
    let told = with_keeper(&host, &["--json"], "echo right");
    told.ends(0, &[]);
    assert!(!told.stderr.contains("no machine was made ready"), "{told:?}");
    // Of the run that was last.
    self::keeper(&host);
    end(&host);
}

/// A template has to be made first, which takes seconds.
#[test]
fn a_step_begins_with_the_time_of_the_host_however_long_its_machine_took() {
    let host = Host::without(&["templates"]);
    let told = with_keeper(&host, &["--json"], "date +%s");
    let after = now(&host);
    assert_eq!(origin(&told), "template");
    let events = told.events();
    let shown = events.iter().find_map(|event| event["text"].as_str()?.trim().parse::<u64>().ok());
    // The run has ended since then, and other tests run.
    assert!(shown.is_some_and(|shown| (after - 2..=after).contains(&shown)), "{after} {told:?}");
    // Of the run that was last.
    self::keeper(&host);
    end(&host);
}

/// What a process has in its memory.
fn memory(pid: &str) -> Vec<u8> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("it lives");
    let memory = File::open(format!("/proc/{pid}/mem")).expect("it is ours");
    let mut all = Vec::new();
    for line in maps.lines().filter(|line| !line.contains("[v")) {
        let (range, rest) = line.split_once(' ').expect("a range");
        let (start, end) = range.split_once('-').expect("a range");
        let number = |text| u64::from_str_radix(text, 16).expect("an address");
        if rest.starts_with('r') {
            let length = usize::try_from(number(end) - number(start)).expect("it fits");
            let mut bytes = vec![0; length];
            memory.read_exact_at(&mut bytes, number(start)).expect(line);
            all.extend(bytes);
        }
    }
    all
}

#[test]
fn a_keeper_has_nothing_of_a_step_in_its_memory() {
    let host = Host::new();
    let marks = ["mark-command", "mark-name", "mark-value", "mark-source", "mark-work", "mark-content"];
    host.file("mark-source/file", "mark-content\n");
    host.file("mark-work/before", "");
    let run = || {
        let script = "cat file; echo mark-command; read line";
        let options = ["--src=mark-source", "--env=mark-name=mark-value", "--stdin", "--out=after"];
        let mut kiln = host.command(&options, &["sh", "-c", script]);
        kiln.env("KILN_KEEPER", "on").env("WORK", host.path("mark-work"));
        let mut running =
            Running::start(kiln.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()));
        running.read_until("mark-command");
        running
    };
    let has = |memory: &[u8], mark: &str| memory.windows(mark.len()).any(|bytes| bytes == mark.as_bytes());
    let check = |pid: &str, doing: &str| {
        let memory = memory(pid);
        for mark in marks {
            assert!(!has(&memory, mark), "{mark}, {doing}");
        }
        // What it does know is found.
        assert!(has(&memory, host.path("store").to_str().expect("text")), "{doing}");
    };
    let end_of = |mut running: Running| {
        drop(running.stdin.take());
        assert_eq!(running.end().code, Some(1));
    };
    end_of(run());
    let waiting = keeper(&host);
    check(&waiting, "while it waits");
    let running = run();
    assert!(has(&memory(&running.id().to_string()), marks[0]), "kiln itself knows its command");
    check(&waiting, "while a step has its machine");
    end_of(running);
    keeper(&host);
    end(&host);
}

#[test]
#[ignore = "takes minutes: `ci/test slow` runs it"]
fn a_real_build_gives_the_same_bytes_in_a_machine_that_boots_a_copy_and_one_that_was_ready() {
    let host = Host::new();
    host.file("src/words.h", "const char *word(int);\n");
    host.file(
        "src/words.c",
        "#include <stdio.h>\n#include \"words.h\"\nconst char *word(int n) { static char text[99]; \
         snprintf(text, sizeof text, \"%s %d\", __FILE__, n); return text; }\n",
    );
    host.file(
        "src/main.c",
        "#include <stdio.h>\n#include \"words.h\"\nint main(void) { return puts(word(6 * 7)) < 0; }\n",
    );
    host.file(
        "src/Makefile",
        "CFLAGS = -O2 -g\nbuilt: main.o words.o\n\tmkdir $(WORK)/built\n\tar rc $(WORK)/built/words.a words.o\n\
         \tgcc -o $(WORK)/built/program $^\n\t$(WORK)/built/program > $(WORK)/built/printed\n\tcp *.o $(WORK)/built\n",
    );
    let mut built = Vec::new();
    for (how, expected) in [("--no-template", "boot"), ("--overwrite", "template"), ("--overwrite", "ready")]
    {
        let mut kiln: Command = host.kiln();
        kiln.args(["run", "--json", "--root=debian:bookworm+gcc,libc6-dev,make", "--project=p", "--src=src"]);
        kiln.args(["--src-writable", "--out=built", how, "--", "make", "-s", "-j2"]);
        let keeper_of_next = if expected == "boot" { "off" } else { "on" };
        let told = Host::told(kiln.env("KILN_KEEPER", keeper_of_next), &[]).0;
        told.ends(0, &[]);
        assert_eq!(origin(&told), expected);
        let end = told.events().pop().expect("an end");
        let files = fs::read_dir(host.path("work/built")).expect("outputs").flatten();
        let files: BTreeMap<_, _> =
            files.map(|file| (file.file_name(), fs::read(file.path()).expect("a file"))).collect();
        assert_eq!(files.len(), 5, "{files:?}");
        assert_eq!(files[std::ffi::OsStr::new("printed")], b"words.c 42\n");
        built.push((files, end["outputs"].clone(), end["reads"].clone()));
        fs::remove_dir_all(host.path("work/built")).expect("outputs");
        if expected != "boot" {
            keeper(&host);
        }
    }
    assert!(built[0] == built[1] && built[1] == built[2], "bytes differ");
    end(&host);
}

#[test]
fn a_keeper_ends_by_itself_when_nobody_comes() {
    let host = Host::new();
    with_keeper(&host, &["--quiet", "--keeper-idle=1s"], "true").ends(0, &[]);
    keeper(&host);
    soon(10, "the keeper has ended", || keepers(&host).is_empty());
    let told = host.script(&["--json"], "true");
    assert_eq!(origin(&told), "template");
    assert_eq!(keepers(&host), [""; 0]);
}
