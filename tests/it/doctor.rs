//! `kiln doctor`: what it finds by doing, and that nothing it asks can keep it.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use super::host::{Host, Told};

/// The line about `what`, and the fix after it.
fn about<'a>(told: &'a Told, what: &str) -> (&'a str, &'a str) {
    let mut lines = told.stdout.lines().skip_while(|line| line.split_whitespace().nth(1) != Some(what));
    let line = lines.next().unwrap_or_else(|| panic!("nothing about {what} in: {}", told.stdout));
    (line, lines.next().unwrap_or_default())
}

#[test]
fn a_mirror_that_does_not_answer_is_noted_and_needed_for_nothing_that_is_there() {
    let host = Host::new();
    let told = host.run(&["doctor"]);
    let (line, fix) = about(&told, "debian");
    assert!(line.starts_with("note") && line.contains(super::host::NOWHERE), "{line}");
    assert!(line.contains("only what is in the store"), "{line}");
    assert!(fix.contains("fix:") && fix.contains("network"), "{fix}");
}

#[test]
fn a_mirror_that_answers_is_said_to() {
    let host = Host::new();
    host.file("mirror/dists/trixie/InRelease", "an index");
    let mirror = format!("file://{}", host.path("mirror").display());
    let told = host.run(&["doctor", "--debian-mirror", &mirror]);
    let (line, _) = about(&told, "debian");
    assert!(line.starts_with("ok") && line.contains(&mirror) && line.contains("answers"), "{line}");
}

#[test]
fn a_mirror_that_takes_calls_and_says_nothing_is_given_up() {
    let host = Host::new();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let mirror = format!("http://{}/debian", listener.local_addr().expect("an address"));
    let start = Instant::now();
    let told = host.run(&["doctor", "--debian-mirror", &mirror]);
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    let (line, _) = about(&told, "debian");
    assert!(line.starts_with("note") && line.contains("timeout"), "{line}");
}

#[test]
fn without_a_mirror_the_setting_is_named() {
    let host = Host::new();
    let told = Told::by(host.kiln().env("KILN_DEBIAN_MIRROR", "gopher://x").arg("doctor"));
    let (line, _) = about(&told, "debian");
    assert!(line.contains("gopher://x") && line.contains("not an http"), "{line}");
}

#[test]
fn a_backend_that_is_asked_for_and_cannot_be_is_missing_and_one_that_can_be_says_why() {
    let host = Host::new();
    let qemu = host.script("qemu", "echo QEMU emulator version 10.0.2");
    let doctor = |backend: &str| {
        Told::by(
            host.kiln()
                .env("KILN_QEMU", &qemu)
                .env("KILN_AGENT", &qemu)
                .env("KILN_BACKEND", backend)
                .arg("doctor"),
        )
    };
    let told = doctor("tcg");
    assert!(
        told.stdout.contains("backend  qemu with emulation, because the setting says so"),
        "{}",
        told.stdout
    );
    let told = doctor("vmm");
    let (line, fix) = about(&told, if told.code == Some(0) { "kiln's" } else { "backend" });
    // On a host with KVM it can be.
    let good = line.starts_with("backend") && line.contains("own VMM on KVM");
    let missing = line.starts_with("MISSING") && line.contains("the backend vmm") && fix.contains("fix: ");
    assert!(good && told.code == Some(0) || missing && told.code == Some(3), "{}", told.stdout);
}

#[test]
fn a_qemu_that_never_says_its_version_is_given_up_with_all_it_started() {
    let host = Host::new();
    let started = host.path("started");
    let qemu = host.script("qemu", &format!("sleep 1000 & echo $! >{}; wait", started.display()));
    let start = Instant::now();
    let told = Told::by(host.kiln().env("KILN_QEMU", &qemu).arg("doctor"));
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    assert_eq!(told.code, Some(3), "{}", told.stdout);
    let (line, fix) = about(&told, "qemu");
    assert!(line.starts_with("MISSING") && line.contains("does not say its version"), "{line}");
    assert!(fix.contains("KILN_QEMU"), "{fix}");
    let sleep: u32 = std::fs::read_to_string(started).expect("it ran").trim().parse().expect("a number");
    super::qemu::soon(2, "its child is gone", || !super::qemu::is_alive(sleep));
}
