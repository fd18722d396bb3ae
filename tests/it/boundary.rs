//! A boundary that is demanded and not there: exit code 3, before anything starts.

use super::host::Host;

#[test]
fn a_demand_that_this_host_does_not_meet_is_refused() {
    for (arguments, demand) in [
        (&["--require", "kvm"][..], "--require kvm"),
        (&["--require", "jail"], "--require jail"),
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
