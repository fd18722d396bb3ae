//! Ready machines: taken by the next run, the same to a step as any other, and never needed.

use std::collections::BTreeSet;
use std::fs;

use rustix::process::{Pid, Signal, kill_process};

use super::host::{Host, Told, soon};
use super::template::origin;

fn with_keeper(host: &Host, arguments: &[&str], script: &str) -> Told {
    let mut kiln = host.command(arguments, &["sh", "-c", script]);
    Host::told(kiln.env("KILN_KEEPER", "on"), &[]).0
}

/// The keepers of `host`.
fn keepers(host: &Host) -> Vec<String> {
    let (told, _) = Host::told(host.kiln().args(["ps", "--json"]), &[]);
    let entries = told.events();
    entries.iter().filter(|entry| entry["state"] == "ready").map(|entry| entry["pid"].to_string()).collect()
}

/// Waits for the keeper that the last run ordered.
fn keeper(host: &Host) -> String {
    let mut found = Vec::new();
    soon(30, "a machine is ready", || {
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
