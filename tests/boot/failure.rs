//! Machines that fail under a command: each failure is told from the others, in words, and is kiln's or the command's.

use std::fs;
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};

use super::host::{Host, Running, members};

#[test]
fn a_command_that_outgrows_its_machine_is_told_so() {
    // 1 MiB of scratch: there is no room beyond memory.
    let hog = ["awk", "BEGIN { s = \"x\"; while (1) s = s s }"];
    let told = Host::new().run(&["--memory", "160M", "--scratch", "1M"], &hog);
    told.ends(137, &["`awk` was killed by signal 9", "ran out of memory", "--memory is 160M"]);
}

#[test]
fn a_command_that_starts_too_many_processes_is_told_so_and_ends_in_time() {
    let script = "bomb() { bomb | bomb & }; bomb; sleep 1000";
    let told = Host::new().script(&["--timeout", "5", "--grace", "1", "--limit", "processes=100"], script);
    told.ends(124, &["stopped after --timeout 5", "as many processes as it may (--limit processes=100)"]);
}

#[test]
fn what_leaves_a_machine_has_limits_that_are_named() {
    let host = Host::new();
    let told = host.script(&["--quiet", "--limit", "printed=1K"], "yes | head -c 100000");
    told.ends(125, &["printed more than 1.0 KiB", "--limit printed=SIZE"]);
    assert_eq!(told.text().len(), 1024, "as much as it may is shown");
    let script = "mkdir $WORK/o; head -c 3000000 /dev/zero > $WORK/o/big";
    host.script(&["--quiet", "--out", "o", "--limit", "outputs=1M"], script).ends(125, &["--limit outputs="]);
    let script = "mkdir $WORK/o; for i in $(seq 20); do : > $WORK/o/$i; done";
    host.script(&["--quiet", "--out", "o", "--limit", "files=10"], script).ends(125, &["--limit files="]);
    assert!(!host.path("work/o").exists());
}

#[test]
fn a_clock_that_the_guest_sets_is_its_own_alone() {
    let host = Host::new();
    let script = "date -s 1990-01-01 >/dev/null; date +%Y; echo back > $WORK/out; date -s 2100-01-01 >/dev/null; date +%Y";
    let told = host.script(&["--quiet", "--out", "out", "--timeout", "60"], script);
    told.ends(0, &[]);
    assert_eq!(told.text(), "1990\n2100\n");
    assert_eq!(fs::read(host.path("work/out")).expect("an output"), b"back\n");
}

#[test]
fn a_command_may_use_more_than_memory_where_there_is_scratch() {
    let script = "dd if=/dev/zero of=/tmp/big bs=1M count=200 2>/dev/null; sha256sum < /tmp/big";
    let told = Host::new().script(&["--quiet", "--memory", "160M"], script);
    told.ends(0, &[]);
    let zeros = kiln_digest::Digest::of(&vec![0; 200 << 20]);
    assert_eq!(told.text(), format!("{zeros}  -\n"));
}

#[test]
fn a_kernel_that_panics_is_named_with_its_last_words() {
    let host = Host::new();
    let script = "echo before; echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger; sleep 100";
    let told = host.script(&["--out", "x"], script);
    told.ends(125, &["running the command", "kernel panicked", "sysrq triggered crash"]);
    assert_eq!(told.text(), "before\n");
    assert!(!host.path("work/x").exists());
}

#[test]
fn a_step_cannot_end_its_machine_in_silence() {
    let told = Host::new()
        .script(&[], "echo o > /proc/sysrq-trigger; poweroff -f; reboot -f; sleep 5; echo still here");
    assert_ne!(told.code, Some(0), "{told:?}");
    assert!(told.stderr.contains("kiln: error: "), "{told:?}");
}

#[test]
fn a_kernel_that_qemu_refuses_is_told_in_qemus_words() {
    let host = Host::new();
    let mut elf = [0; 64];
    elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
    elf[18] = 62;
    elf[54] = 56;
    host.file("kernel", [&elf[..], b"Linux version 6.1.0-test (somebody)"].concat());
    host.run(&["--kernel", "kernel"], &["true"]).ends(125, &["died at start", "QEMU", "exit status 1"]);
}

#[test]
fn a_kernel_without_what_a_machine_needs_is_told_what() {
    let host = Host::new();
    let told = host.end(host.kiln().arg("kernel"), &[]);
    let path =
        told.text().lines().find_map(|line| line.strip_prefix("kernel ")).expect("a path").trim().to_owned();
    fs::copy(path, host.path("kernel")).expect("room");
    host.run(&["--kernel", "kernel"], &["true"]).ends(125, &["virtio_blk", "--modules"]);
}

#[test]
fn outputs_beyond_the_scratch_fail_the_command_not_the_machine() {
    let script = "dd if=/dev/zero of=$WORK/big bs=1M count=300";
    let told = Host::new().script(&["--memory", "256M", "--scratch", "16M", "--out", "big"], script);
    assert!(told.code.is_some_and(|code| (1..=137).contains(&code) && code != 125), "{told:?}");
    assert!(
        told.stderr.contains("No space left on device") || told.stderr.contains("out of memory"),
        "{told:?}"
    );
}

/// It takes the minute that a late agent is given, which is what it is about.
#[test]
fn a_machine_that_hangs_has_taken_longer_than_the_time_out() {
    let host = Host::new();
    let script = "echo going; sleep 1000";
    let mut command = host.command(&["--timeout", "0m1s", "--grace", "0"], &["sh", "-c", script]);
    let mut run = Running::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    run.read_until("going\n");
    let group = run.id();
    for member in members(group).iter().filter(|member| member.contains("(qemu")) {
        let pid = member.split(' ').next().and_then(|pid| Pid::from_raw(pid.parse().ok()?));
        kill_process(pid.expect("a process"), Signal::STOP).expect("it is ours");
    }
    run.end().ends(124, &["its machine did not stop it", "`sh` was stopped after --timeout 0m1s"]);
    host.is_clean(group);
}
