//! A boundary that is demanded and not there: exit code 3, before anything starts.

use std::process::Command;

use kiln::store::Store;
use kiln_digest::Digest;

use super::host::{Host, Told, in_own_mounts};

/// `command` where /dev has the devices that every program needs, and in the place of KVM's what `kvm` makes of `dev/kvm`.
fn with_device(host: &Host, command: &Command, kvm: &str) -> Command {
    std::fs::create_dir_all(host.path("dev")).expect("a folder");
    let script = format!(
        "mount -t tmpfs none dev
        for name in null zero random urandom; do
            touch dev/$name
            mount --bind /dev/$name dev/$name
        done
        {kvm}
        mount --rbind dev /dev
        exec \"$@\""
    );
    in_own_mounts(command, &script)
}

const NOTHING: &str = "";
const FORBIDDEN: &str =
    "touch dev/kvm && mount --bind /dev/null dev/kvm && mount -o remount,bind,nodev dev/kvm";
const A_FILE: &str = "touch dev/kvm";
const ANOTHER_DEVICE: &str = "touch dev/kvm && mount --bind /dev/null dev/kvm";

#[test]
fn each_reason_why_there_is_no_kvm_has_a_way_out_of_its_own() {
    for (kvm, why, fix) in [
        (NOTHING, "No such file", "load kvm_intel or kvm_amd"),
        (FORBIDDEN, "Permission denied", "usermod -aG kvm"),
        (A_FILE, "interface has version -1", "remove what lies at /dev/kvm"),
        (ANOTHER_DEVICE, "interface has version -1", "remove what lies at /dev/kvm"),
    ] {
        let host = Host::new();
        let told = Told::by(&mut with_device(&host, host.kiln().arg("doctor"), kvm));
        let mut lines = told.stdout.lines().skip_while(|line| !line.contains("  kvm "));
        let line = lines.next().unwrap_or_else(|| panic!("nothing of kvm: {} {}", told.stdout, told.stderr));
        assert!(line.starts_with("note") && line.contains(why), "{line}");
        assert!(
            lines.next().is_some_and(|line| line.contains("fix: ") && line.contains(fix)),
            "{}",
            told.stdout
        );
        let mut command = host.kiln();
        command.env("KILN_BACKEND", "auto").args(["run", "--require", "kvm", "--", "true"]);
        let told = Told::by(&mut with_device(&host, &command, kvm));
        told.fails(3, &["--require kvm was demanded", why]).hints(&[fix]);
    }
}

#[test]
fn kvm_that_was_there_since_the_host_booted_is_believed_only_while_it_can_be_opened() {
    let host = Host::new();
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("a boot");
    let key = Digest::of(format!("kvm-probe 2 {boot} {}", env!("CARGO_PKG_VERSION")).as_bytes());
    let usable = serde_json::json!({ "verdict": { "usable": { "mips": 1000.0 } } });
    let store = Store::open(&host.path("store")).expect("a store");
    store.records("probe").put(&key, &usable).expect("room");
    let qemu = host.script("qemu", "exit 1");
    let run = |kvm: &str, backend: &str, arguments: &[&str]| {
        let mut command = host.kiln();
        command.env("KILN_BACKEND", backend).env("KILN_QEMU", &qemu).env("KILN_AGENT", &qemu);
        command.arg("run").args(arguments).args(["--", "true"]);
        Told::by(&mut with_device(&host, &command, kvm))
    };
    let told = run(ANOTHER_DEVICE, "vmm", &["--require", "kvm"]);
    assert!(!told.stderr.contains("was demanded"), "it is remembered: {}", told.stderr);
    for (backend, arguments) in [("vmm", &[][..]), ("kvm", &[]), ("auto", &["--require", "kvm"])] {
        run(NOTHING, backend, arguments)
            .fails(3, &["was demanded", "No such file"])
            .hints(&["load kvm_intel"]);
    }
    let told = run(FORBIDDEN, "auto", &[]);
    assert!(told.stderr.contains("this host had KVM that can be used, and has none now"), "{}", told.stderr);
    assert!(!told.stderr.contains("was demanded"), "{}", told.stderr);
}

#[test]
fn a_demand_that_this_host_does_not_meet_is_refused() {
    for (arguments, demand) in [
        (&["--require", "kvm"][..], "--require kvm"),
        (&["--require", "jail", "--require", "kvm"], "--require"),
        (&["--untrusted"], "--untrusted"),
    ] {
        let host = Host::new();
        let told = host.run(&[&["run"], arguments, &["--", "true"]].concat());
        told.fails(3, &[demand, "was demanded"]).hints(&["kiln doctor"]);
        host.is_untouched();
    }
}

#[test]
fn untrusted_work_is_told_that_emulation_is_no_boundary() {
    Host::new().run(&["run", "--untrusted", "--", "true"]).fails(3, &["no security boundary"]);
}

#[test]
fn bad_usage_comes_before_a_boundary_that_is_missing() {
    for (flags, words) in [
        (["--out", "../x"], "escapes WORK"),
        (["--net", "full"], "--untrusted and --net full contradict each other"),
    ] {
        let arguments = [&["run", "--untrusted"][..], &flags, &["--", "true"]].concat();
        Host::new().run(&arguments).fails(2, &[words]);
    }
}

/// kiln in a user namespace in which nobody may make mount namespaces.
fn without_namespaces(host: &Host, arguments: &[&str]) -> Told {
    let kiln = host.kiln();
    let mut command = Command::new("unshare");
    let script = "echo 0 > /proc/sys/user/max_mnt_namespaces && exec \"$@\"";
    command
        .args(["--user", "--map-root-user", "sh", "-c", script, "sh"])
        .arg(kiln.get_program())
        .args(arguments);
    command.env_clear().envs(kiln.get_envs().filter_map(|(name, value)| Some((name, value?))));
    Told::by(command.current_dir(host.root()))
}

#[test]
fn a_jail_that_is_not_whole_is_refused_where_it_is_demanded_and_said_where_not() {
    let host = Host::new();
    let told = without_namespaces(&host, &["run", "--require", "jail", "--", "true"]);
    told.fails(3, &["--require jail was demanded", "no namespaces"]).hints(&["kiln doctor"]);
    host.is_untouched();
    let told = without_namespaces(&host, &["doctor"]);
    for word in ["missing: namespaces", "so a process taken over by a guest", "fix: allow user namespaces"] {
        assert!(told.stdout.contains(word), "no `{word}` in: {}", told.stdout);
    }
}
