//! A boundary that is demanded and not there: exit code 3, before anything starts.

use std::process::Command;

use super::host::{Host, Told};

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
    Host::new().run(&["run", "--untrusted", "--out", "../x", "--", "true"]).fails(2, &["escapes WORK"]);
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
