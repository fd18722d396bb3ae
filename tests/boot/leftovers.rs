//! Nothing of a run outlives it: no process, no unfinished file, however kiln ends. Runs to a good end are held to the
//! same by every other test here.

use std::process::Stdio;

use rustix::process::{Pid, Signal};

use super::host::{Host, Running, members, soon};

#[test]
fn nothing_outlives_a_kiln_that_is_killed_in_the_middle_of_a_run() {
    for (signal, to_group) in
        [(Signal::KILL, false), (Signal::INT, true), (Signal::TERM, false), (Signal::HUP, true)]
    {
        let host = Host::new();
        host.file("work/old", "old");
        let script = "echo new > $WORK/old; echo going; sleep 1000";
        let mut child = Running::start(
            host.command(
                &["--wire", "vsock", "--src", "home", "--project", "other", "--out", "old"],
                &["sh", "-c", script],
            )
            .stdout(Stdio::piped())
            .stderr(Stdio::piped()),
        );
        child.read_until("going\n");
        let group = child.id();
        assert!(members(group).len() >= 3, "kiln, QEMU and the device process: {:?}", members(group));
        let pid = Pid::from_child(&child);
        // As a terminal does, or as `kill` does.
        let sent = if to_group {
            rustix::process::kill_process_group(pid, signal)
        } else {
            rustix::process::kill_process(pid, signal)
        };
        sent.expect("kiln runs");
        let told = child.end();
        if signal == Signal::KILL {
            assert_eq!(told.code, None, "{told:?}");
            host.is_swept(group);
        } else {
            // The machine's death, where it got the signal too, is not what is told.
            told.ends(
                128 + signal.as_raw(),
                &["interrupted by SIG", "while running the command", "unchanged"],
            );
            assert_eq!(told.stderr.matches("kiln: error: ").count(), 1, "{told:?}");
            host.is_clean(group);
        }
        assert_eq!(host.read("work/old"), "old");
    }
}

#[test]
fn a_machine_that_is_killed_ends_its_run() {
    let host = Host::new();
    let mut child = Running::start(
        host.command(&["--out", "x"], &["sh", "-c", "echo going; sleep 1000"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped()),
    );
    child.read_until("going\n");
    let group = child.id();
    let qemu = members(group).into_iter().find(|name| name.contains("qemu")).expect("QEMU");
    let qemu: i32 = qemu.split(' ').next().and_then(|text| text.parse().ok()).expect("a number");
    rustix::process::kill_process(Pid::from_raw(qemu).expect("not 0"), Signal::KILL).expect("QEMU runs");
    let told = child.end();
    told.ends(125, &["QEMU", "killed by signal 9"]);
    host.is_clean(group);
}

#[test]
fn a_device_process_that_is_killed_ends_its_run() {
    let host = Host::new();
    host.file("src/a", "1");
    let mut child = Running::start(
        host.command(&["--src", "src"], &["sh", "-c", "echo going; sleep 1000"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped()),
    );
    child.read_until("going\n");
    let group = child.id();
    let devices = members(group)
        .into_iter()
        .find(|name| !name.contains("qemu") && !name.starts_with(&format!("{group} ")));
    let devices: i32 = devices
        .expect("the device process")
        .split(' ')
        .next()
        .and_then(|text| text.parse().ok())
        .expect("a number");
    rustix::process::kill_process(Pid::from_raw(devices).expect("not 0"), Signal::KILL).expect("it runs");
    soon(60, "kiln noticed", || child.try_wait().expect("kiln is ours").is_some());
    let told = child.end();
    told.ends(125, &["device process", "signal 9"]);
    host.is_clean(group);
}

#[test]
fn a_run_whose_reader_hangs_up_ends_as_a_command_does() {
    let host = Host::new();
    let mut child =
        Running::start(host.command(&["--quiet"], &["yes"]).stdout(Stdio::piped()).stderr(Stdio::piped()));
    child.read_until("y\n");
    drop(child.stdout.take());
    let group = child.id();
    assert_eq!(child.end().code, Some(128 + 13));
    host.is_clean(group);
}

#[test]
fn a_kiln_that_is_killed_at_any_stage_leaves_no_process_and_one_state_of_work() {
    const FILES: usize = 50;
    let host = Host::new();
    let all_are = |what: &str| (0..FILES).all(|number| host.read(&format!("work/out/{number}")) == what);
    let make = |what: &str| {
        format!("mkdir -p $WORK/out; for i in $(seq 0 {}); do printf {what} > $WORK/out/$i; done", FILES - 1)
    };
    let start = |what: &str| {
        let script = make(what);
        let mut kiln = host.command(&["--json", "--out", "out"], &["sh", "-c", &script]);
        Running::start(kiln.stdout(Stdio::piped()).stderr(Stdio::piped()))
    };
    host.script(&["--quiet", "--out", "out"], &make("old")).ends(0, &[]);
    let mut before = "old".to_owned();
    for stage in ["", "prepare", "boot", "setup", "command", "collect", "record"] {
        let new = format!("new-{stage}");
        let mut child = start(&new);
        if !stage.is_empty() {
            child.read_until(&format!("\"phase\":\"{stage}\""));
        }
        let group = child.id();
        rustix::process::kill_process(Pid::from_child(&child), Signal::KILL).expect("kiln runs");
        let told = child.end();
        soon(5, "all processes of the run are gone", || members(group).is_empty());
        host.script(&["--quiet"], "true").ends(0, &[]);
        host.is_clean(group);
        // It may have come to its end before the signal did.
        if told.code == Some(0) || all_are(&new) {
            before = new;
        }
        assert!(all_are(&before), "{stage}: neither what was nor what was made");
    }
}
