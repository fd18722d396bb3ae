//! The jail of a running machine, read from /proc.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::process::Stdio;

use super::host::{Host, Running, TOKEN};

/// The machine's processes other than kiln itself: number and command line.
fn processes(kiln: u32) -> Vec<(u32, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&words).replace('\0', " ");
        if words.contains(&format!("kiln-{kiln} ")) {
            let pid = entry.file_name().to_string_lossy().parse().expect("a process");
            found.push((pid, words));
        }
    }
    found
}

/// The value of `field` in a thread's status.
fn status(folder: &str, field: &str) -> String {
    let text = fs::read_to_string(format!("{folder}/status")).expect("it runs");
    let line = text.lines().find(|line| line.starts_with(&format!("{field}:"))).expect(field);
    line.split_whitespace().nth(1).expect("a value").to_owned()
}

#[test]
fn the_processes_of_a_machine_have_no_powers_no_environment_and_what_they_need() {
    let host = Host::new();
    host.folder("source");
    // A descriptor that whoever called kiln left open.
    let leak = host.file("leak", "a secret");
    let script = format!("exec 9<{} \"$@\"", leak.display());
    let kiln = host.command(&["--stdin", "--src", "source"], &["sh", "-c", "echo ready; read line"]);
    let mut command = std::process::Command::new("sh");
    command.args(["-c", &script, "sh"]).arg(kiln.get_program()).args(kiln.get_args());
    command.envs(kiln.get_envs().filter_map(|(name, value)| Some((name, value?)))).current_dir(host.root());
    command.env(TOKEN.0, TOKEN.1).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut running = Running::start(&mut command);
    running.read_until("ready");
    let processes = processes(running.id());
    assert_eq!(processes.len(), 2, "QEMU and the device process: {processes:?}");
    for (pid, words) in &processes {
        let folder = format!("/proc/{pid}");
        let devices = words.contains("__launch");
        // Root's kiln can read files of any owner, and so can what serves them.
        let reads_all = devices && rustix::process::geteuid().is_root();
        for task in fs::read_dir(format!("{folder}/task")).expect("it runs").flatten() {
            let task = task.path().display().to_string();
            assert_eq!(status(&task, "Seccomp"), "2", "{words}");
            assert_eq!(status(&task, "NoNewPrivs"), "1", "{words}");
            let capabilities = if reads_all { "0000000000000004" } else { "0000000000000000" };
            for set in ["CapPrm", "CapEff"] {
                assert_eq!(status(&task, set), capabilities, "{set} of {words}");
            }
            for set in ["CapInh", "CapAmb"] {
                assert_eq!(status(&task, set), "0000000000000000", "{set} of {words}");
            }
        }
        if devices && !rustix::process::geteuid().is_root() {
            // It hides from other processes of its own user: there is nothing more to read.
            fs::read_dir(format!("{folder}/fd"))
                .expect_err("the device process is open to its user's others");
            continue;
        }
        assert_eq!(fs::read(format!("{folder}/environ")).expect("it runs"), b"", "{words}");
        let limits = fs::read_to_string(format!("{folder}/limits")).expect("it runs");
        let core = limits.lines().find(|line| line.starts_with("Max core")).expect("a limit");
        assert!(core.split_whitespace().skip(4).take(2).all(|limit| limit == "0"), "{core}");
        for namespace in ["mnt", "net", "ipc", "uts", "pid"] {
            let mine = fs::read_link(format!("/proc/self/ns/{namespace}")).expect("a namespace");
            let its = fs::read_link(format!("{folder}/ns/{namespace}")).expect("it runs");
            assert_ne!(its, mine, "{namespace} of {words}");
        }
        // The first of its namespace, where nobody else has a number.
        let numbers = fs::read_to_string(format!("{folder}/status")).expect("it runs");
        let numbers = numbers.lines().find(|line| line.starts_with("NSpid:")).expect("a number");
        assert_eq!(numbers.split_whitespace().last(), Some("1"), "{numbers}");
        let root: Vec<_> = fs::read_dir(format!("{folder}/root/")).expect("it runs").flatten().collect();
        let root: Vec<_> = root.iter().map(|entry| entry.file_name().display().to_string()).collect();
        if devices {
            assert_eq!(root, [""; 0], "the device process sees files by name");
        }
        assert!(
            !root.iter().any(|name| ["home", "root", "tmp", "proc", "var"].contains(&name.as_str())),
            "{root:?}"
        );
        for entry in fs::read_dir(format!("{folder}/fd")).expect("it runs").flatten() {
            let to = fs::read_link(entry.path()).map(|to| to.display().to_string()).unwrap_or_default();
            assert!(!to.contains("leak"), "{words} holds {to}");
            let kind = fs::metadata(entry.path()).map(|meta| meta.file_type());
            // Sockets, pipes and event counters have names that are no paths; null is QEMU's standard input.
            let named = to.starts_with('/') && to != "/dev/null" && !to.starts_with("/memfd:");
            let expected = if devices {
                to.ends_with("/source") || to.contains("/empty") || to.contains("/work")
            } else {
                // Roots, scratch and modules are disks of the machine.
                to.contains("store") || to.contains("(deleted)")
            };
            let terminal = kind.is_ok_and(|kind| kind.is_char_device() && to.contains("tty"));
            assert!(!terminal && (!named || expected), "{words} holds {to}");
        }
    }
    drop(running.stdin.take());
    running.end().ends(1, &["jail: namespaces, capabilities, landlock, seccomp"]);
}
