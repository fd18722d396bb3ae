//! A host whose QEMU, agent or kernel is not what it should be, played by scripts; and that whatever was started ends
//! with kiln, however kiln ends.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

use super::host::{Host, Told};

/// The least that passes for an uncompressed kernel: an ELF header for x86-64 without segments, and a banner.
pub fn kernel() -> Vec<u8> {
    let mut elf = [0; 64];
    elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
    elf[18] = 62;
    elf[54] = 56;
    [&elf[..], b"Linux version 6.1.0-test (somebody)"].concat()
}

/// The part of a script that makes it a QEMU of today.
const VERSION_10: &str = "[ \"$1\" = --version ] && echo 'QEMU emulator version 10.0.2' && exit";

/// A host where only QEMU is missing: kernel, agent, root and source tree are there.
fn host() -> Host {
    let host = Host::new();
    host.file("kernel", kernel());
    host.file("agent", "an agent");
    host.file("root/etc/os-release", "ID=test");
    host.file("src/a", "1");
    host
}

/// A run that only lacks `qemu`.
fn command(host: &Host, qemu: &Path) -> Command {
    let mut command = host.kiln();
    command.env("KILN_QEMU", qemu).env("KILN_AGENT", host.path("agent"));
    command.args(["run", "--kernel", "kernel", "--root", "dir:root", "--src", "src", "--", "true"]);
    command
}

/// What a QEMU does that reports `version` and otherwise does `rest`.
fn qemu(host: &Host, version: &str, rest: &str) -> Told {
    let version = format!("[ \"$1\" = --version ] && echo 'QEMU emulator version {version}' && exit");
    let program = host.script("qemu", &format!("{version}\n{rest}"));
    let told = Told::by(&mut command(host, &program));
    host.is_untouched();
    told
}

#[test]
fn a_missing_qemu_is_named_with_the_package_that_has_it() {
    let host = host();
    for (missing, path) in [("/nonexistent/qemu", "/usr/bin"), ("qemu-system-x86_64", "/nonexistent")] {
        let told = Told::by(command(&host, Path::new(missing)).env("PATH", path));
        told.fails(3, &[&format!("`{missing}`"), "not found"]).hints(&[
            "qemu-system-x86",
            "8.2",
            "KILN_QEMU",
        ]);
    }
    host.is_untouched();
}

#[test]
fn a_qemu_that_cannot_be_executed_counts_as_missing() {
    let host = host();
    let plain = host.file("plain", "no program");
    Told::by(&mut command(&host, &plain)).fails(3, &["plain`", "not found"]);
    Told::by(&mut command(&host, &host.path("root"))).fails(3, &["root`", "not found"]);
}

#[test]
fn a_qemu_that_is_too_old_is_named_with_its_version() {
    let told = qemu(&host(), "7.2.0 (Debian 1:7.2+dfsg-7)", "echo unknown option >&2; exit 1");
    told.fails(3, &["7.2.0", "too old", "8.2"]).hints(&["bookworm-backports", "KILN_QEMU"]);
}

#[test]
fn a_qemu_that_dies_at_start_is_quoted() {
    let told = qemu(&host(), "10.0.2", "echo 'cannot set up guest memory' >&2; exit 3");
    told.fails(125, &["died at start", "QEMU", "exit status 3", "cannot set up guest memory"]);
}

#[test]
fn a_qemu_that_is_killed_is_told_from_one_that_exits() {
    let host = host();
    let told = Hanging::start(&host).without_qemu();
    told.fails(125, &["died at start", "QEMU", "killed by signal 9"]);
}

#[test]
fn a_qemu_that_is_no_qemu_is_an_error() {
    qemu(&host(), "", "exit 0").fails(125, &["died at start", "exit status 0"]);
}

#[test]
fn a_missing_agent_is_named_with_the_command_that_builds_it() {
    let host = host();
    let qemu = host.script("qemu", "exit 1");
    // Away from the build's own folder, where an agent may lie beside kiln.
    let kiln = host.installed("bin/kiln");
    let mut command = host.program(&kiln);
    command.env("KILN_QEMU", qemu).args(["run", "--kernel", "kernel", "--root", "dir:root", "--", "true"]);
    Told::by(&mut command).fails(3, &["agent", "KILN_AGENT"]).hints(&["ci/build"]);
}

#[test]
fn a_kiln_without_its_program_for_machines_names_it_with_the_command_that_builds_it() {
    let host = host();
    let kiln = host.executable("bin/kiln", Path::new(env!("CARGO_BIN_EXE_kiln")));
    let command = |arguments: &[&str]| {
        let mut command = host.program(&kiln);
        command.env("KILN_QEMU", host.script("qemu", "exit 1")).env("KILN_AGENT", host.path("agent"));
        command.args(arguments);
        command
    };
    let run = ["run", "--kernel", "kernel", "--root", "dir:root", "--", "true"];
    Told::by(&mut command(&run)).fails(3, &["kiln-machine"]).hints(&["ci/build"]);
    let told = Told::by(&mut command(&["doctor"]));
    assert!(told.stdout.contains("program    kiln's program for machines was not found"), "{}", told.stdout);
}

#[test]
fn an_agent_that_the_environment_names_and_that_is_missing_is_alike() {
    let host = host();
    let qemu = host.script("qemu", "exit 1");
    let told = Told::by(command(&host, &qemu).env("KILN_AGENT", "/nonexistent/agent"));
    told.fails(3, &["/nonexistent/agent", "KILN_AGENT"]).hints(&["ci/build"]);
}

#[test]
fn a_kernel_that_is_none_is_refused_by_name() {
    let host = host();
    let qemu = host.script("qemu", "exit 1");
    for (content, word) in [
        (&b"#!/bin/sh"[..], "neither a Linux bzImage nor an ELF file"),
        (b"", "neither a Linux bzImage nor an ELF file"),
        (b"\x7fELF\x01\x01 of 32 bits, which is not long enough for a header of 64", "x86-64"),
    ] {
        host.file("kernel", content);
        let told = Told::by(&mut command(&host, &qemu));
        told.fails(2, &["kernel`", "cannot be booted", word]);
    }
    fs::remove_file(host.path("kernel")).expect("it was there");
    Told::by(&mut command(&host, &qemu)).fails(2, &["kernel`", "No such file"]);
}

#[test]
fn modules_that_are_not_this_kernels_are_refused() {
    let host = host();
    host.folder("modules/6.12.0-other");
    let told = host.run(&["kernel", "--kernel", "kernel", "--modules", "modules"]);
    // Without an agent no bundle is made: what is missing is the same for both verbs.
    assert_ne!(told.code, Some(0));
    let mut command = host.kiln();
    command.env("KILN_AGENT", host.path("agent"));
    let told = Told::by(command.args(["kernel", "--kernel", "kernel", "--modules", "modules"]));
    told.fails(2, &["modules`", "6.1.0-test"]);
}

#[test]
fn a_bundle_is_the_same_whoever_makes_it() {
    let bundles = ["one", "other"].map(|name| {
        let host = host();
        let mut command = host.kiln();
        command.env("KILN_AGENT", host.path("agent")).env("KILN_STORE", host.path(name));
        let told = Told::by(command.args(["kernel", "--kernel", "kernel"]));
        told.succeeds();
        assert!(told.stdout.contains("release    6.1.0-test\n"), "{}", told.stdout);
        told.stdout.lines().find(|line| line.starts_with("bundle ")).expect("a digest").to_owned()
    });
    assert_eq!(bundles[0], bundles[1]);
}

#[test]
fn a_root_that_cannot_be_read_is_named() {
    let host = host();
    let qemu = host.script("qemu", "exit 1");
    host.file("no.tar", "this is no archive, and long enough to be looked at as if it were one".repeat(20));
    host.file("cut.tar.gz", [0x1f, 0x8b, 8, 0]);
    for (root, words) in [
        ("dir:nowhere", &["nowhere`", "No such file"][..]),
        ("dir:kernel", &["kernel`", "not a directory"]),
        ("file:nowhere.tar", &["nowhere.tar`", "No such file"]),
        ("file:no.tar", &["no.tar`", "not a root archive"]),
        ("file:cut.tar.gz", &["cut.tar.gz`"]),
        ("file:root", &["root`", "Is a directory"]),
        ("live:nowhere", &["nowhere`"]),
        ("live:kernel", &["kernel`", "not a directory"]),
    ] {
        let mut command = host.kiln();
        command.env("KILN_QEMU", &qemu).env("KILN_AGENT", host.path("agent"));
        let told = Told::by(command.args(["run", "--kernel", "kernel", "--root", root, "--", "true"]));
        told.fails(2, words);
        host.is_untouched();
    }
}

/// All processes beneath `pid`, as /proc tells.
fn descendants(pid: u32) -> Vec<u32> {
    let mut found = Vec::new();
    let mut left = vec![pid];
    while let Some(pid) = left.pop() {
        for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            left.extend(children.split_whitespace().filter_map(|word| word.parse::<u32>().ok()));
        }
        found.push(pid);
    }
    found.split_off(1)
}

/// The process beneath `kiln` that [`Hanging`]'s QEMU has become.
fn qemu_of(kiln: u32) -> Option<u32> {
    let is_sleep =
        |pid: &u32| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|words| words == b"sleep\x001000\0");
    descendants(kiln).into_iter().find(is_sleep)
}

pub fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // A zombie is dead; whoever inherited it takes its time.
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

/// Asks again until `condition` holds, at most `seconds` long.
pub fn soon(seconds: u64, what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    while !condition() {
        assert!(Instant::now() < deadline, "not within {seconds} s: {what}");
        std::thread::yield_now();
    }
}

/// `command`, started by another program.
fn through(wrapper: &[&str], command: &Command, host: &Host) -> Command {
    let mut wrapped = Command::new(wrapper[0]);
    wrapped.args(&wrapper[1..]).arg(command.get_program()).args(command.get_args());
    wrapped.current_dir(host.root()).env_clear();
    wrapped.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    wrapped
}

/// A run whose QEMU says nothing and does not end, once it has started.
pub struct Hanging {
    /// kiln.
    pub child: Child,
    /// All processes beneath kiln.
    processes: Vec<u32>,
}

impl Hanging {
    /// Starts it on a host that has a kernel, an agent, a root and a source tree.
    pub fn start(host: &Host) -> Self {
        // Whoever runs the tests in the background may ignore what Ctrl-C sends.
        Self::start_through(&["env", "--default-signal=HUP,INT,TERM"], host)
    }

    /// The same, started by another program.
    fn start_through(wrapper: &[&str], host: &Host) -> Self {
        // In its jail it can only show that it has come so far by what it becomes.
        let program = host.script("qemu", &format!("{VERSION_10}\nexec sleep 1000"));
        let mut run = command(host, &program);
        // One QEMU is enough.
        run.env("KILN_TEMPLATE", "off");
        let child = through(wrapper, &run, host)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("kiln can be started");
        soon(60, "QEMU is started", || qemu_of(child.id()).is_some());
        let processes = descendants(child.id());
        assert!(processes.len() >= 2, "QEMU and the device process: {processes:?}");
        Self { child, processes }
    }

    /// Kills kiln, and nothing beneath it.
    pub fn kill(&mut self) {
        self.child.kill().expect("kiln runs");
        self.child.wait().expect("kiln is ours");
    }

    /// Waits for kiln to end.
    fn end(&mut self) -> Told {
        let mut stderr = String::new();
        let stream = self.child.stderr.take().expect("it is piped");
        std::io::Read::read_to_string(&mut std::io::BufReader::new(stream), &mut stderr).expect("text");
        let code = self.child.wait().expect("kiln is ours").code();
        Told { code, stdout: String::new(), stderr }
    }

    /// Kills QEMU, as no process in its jail could, and waits for kiln to end.
    fn without_qemu(&mut self) -> Told {
        let qemu = qemu_of(self.child.id()).expect("it was started").cast_signed();
        rustix::process::kill_process(Pid::from_raw(qemu).expect("not 0"), Signal::KILL).expect("QEMU runs");
        self.end()
    }

    /// Asserts that all that was started ends within two seconds.
    pub fn is_gone(&self) {
        for process in &self.processes {
            soon(2, &format!("process {process} is gone"), || !is_alive(*process));
        }
    }
}

#[test]
fn nothing_outlives_kiln_whatever_ends_it() {
    for signal in [Signal::KILL, Signal::INT, Signal::TERM, Signal::HUP] {
        let host = host();
        let mut running = Hanging::start(&host);
        let pid = Pid::from_child(&running.child);
        rustix::process::kill_process(pid, signal).expect("kiln runs");
        let status = running.child.wait().expect("kiln is ours");
        assert!(!status.success(), "{status}");
        running.is_gone();
        host.is_swept();
    }
}

#[test]
fn an_interrupted_run_says_what_it_was_doing_and_that_work_is_unchanged() {
    for (signal, name, code) in
        [(Signal::INT, "SIGINT", 130), (Signal::TERM, "SIGTERM", 143), (Signal::HUP, "SIGHUP", 129)]
    {
        let host = host();
        let mut running = Hanging::start(&host);
        rustix::process::kill_process(Pid::from_child(&running.child), signal).expect("kiln runs");
        let told = running.end();
        assert_eq!(told.code, Some(code), "{}", told.stderr);
        running.is_gone();
        let work = host.path("work").display().to_string();
        assert_eq!(
            told.stderr,
            format!(
                "kiln: error: interrupted by {name} while booting the machine; WORK `{work}` is unchanged\n"
            )
        );
        // Not even for the next kiln to sweep.
        host.is_untouched();
    }
}

#[test]
fn a_signal_that_was_ignored_when_kiln_was_started_is_ignored() {
    let host = host();
    let mut running = Hanging::start_through(&["nohup"], &host);
    let kiln = Pid::from_child(&running.child);
    rustix::process::kill_process(kiln, Signal::HUP).expect("kiln runs");
    running.without_qemu().fails(125, &["died at start"]);
}

#[test]
fn a_machine_that_is_gone_takes_its_device_process_along() {
    let host = host();
    let mut running = Hanging::start(&host);
    assert_eq!(running.without_qemu().code, Some(125));
    running.is_gone();
    host.is_untouched();
}
