//! `kiln boot` on real firmware: a unified kernel image of Debian's stub and kernel, from a folder, under Secure Boot and
//! without. Each refusal stands beside a boot that differs in nothing else and succeeds.
//!
//! `ci/test firmware` runs them: a boot takes some ten seconds under emulation.

#![allow(clippy::panic, reason = "a test fails by panicking")]

#[path = "../folder/mod.rs"]
#[expect(dead_code, reason = "files are copied into place here")]
mod folder;
#[path = "../boot/host.rs"]
#[expect(dead_code, reason = "what machines with an agent are asked for is not asked here")]
mod host;
#[path = "../judge/schema.rs"]
mod judge;
mod uki;

use std::fs;
use std::path::Path;

use host::{Host, Told};

/// `kiln boot` with one statement for each of `script`.
fn boot(host: &Host, arguments: &[&str], script: &[&str]) -> Told {
    let mut kiln = host.kiln();
    kiln.arg("boot").args(arguments);
    for statement in script {
        kiln.args(["-e", statement]);
    }
    host.end(&mut kiln, &[])
}

fn is_png(path: &Path) -> bool {
    fs::read(path).expect("a picture").starts_with(b"\x89PNG\r\n")
}

#[test]
fn a_folder_with_a_uki_boots_answers_and_is_reported() {
    let host = Host::new();
    fs::create_dir_all(host.path("esp/EFI/BOOT")).expect("a folder");
    fs::copy(uki::unsigned(), host.path("esp/EFI/BOOT/BOOTX64.EFI")).expect("room");
    let told = boot(
        &host,
        &["esp", "--bus", "nvme", "--report", "report", "--junit", "report/junit.xml"],
        &[
            "within 100s",
            "reject Kernel panic",
            "expect MARKER",
            "send hello",
            "expect /^got h.llo$/",
            "send off",
            "poweroff",
        ],
    );
    told.ends(0, &["met: expect MARKER", "as the script wants it"]);
    let xml = host.read("report/junit.xml");
    assert!(xml.contains("tests=\"6\" failures=\"0\""), "{xml}");
    let timeline = host.read("report/timeline.jsonl");
    assert!(timeline.lines().any(|line| line.contains("\"text\":\"MARKER") && line.contains("\"at_ms\":")));
    let pictures = fs::read_dir(host.path("report")).expect("a report").flatten();
    let pictures: Vec<_> =
        pictures.map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "png")).collect();
    assert!(!pictures.is_empty() && pictures.iter().all(|picture| is_png(picture)), "{pictures:?}");
}

#[test]
fn what_is_rejected_and_what_never_comes_fail_by_name() {
    let host = Host::new();
    let uki = uki::unsigned();
    let uki = uki.to_str().expect("text");
    boot(&host, &[uki, "--junit", "j.xml"], &["within 100s", "reject MARKER", "expect READY"])
        .ends(1, &["-e 2, line 1 `reject MARKER`", "the guest printed: MARKER"]);
    assert!(
        host.read("j.xml").contains("failures=\"1\" errors=\"0\" skipped=\"1\""),
        "{}",
        host.read("j.xml")
    );
    boot(&host, &[uki], &["within 100s", "expect READY", "within 2s", "expect never printed"])
        .ends(1, &["`expect never printed`: not within 2"]);
}

#[test]
fn secure_boot_starts_what_the_db_key_signed_and_nothing_else() {
    let host = Host::new();
    let keys = uki::keys();
    let keys = keys.to_str().expect("text");
    let run = |image: &Path, script: &[&str]| {
        boot(&host, &[image.to_str().expect("text"), "--secure-boot", keys], script)
    };
    let within = "within 100s";
    let refused = [within, "reject MARKER", "expect /Access Denied|Security Violation/"];
    // The guest itself reads that Secure Boot is on.
    run(&uki::signed("db"), &[within, "expect MARKER", "expect /6 +0 +0 +0 +1$/"]).ends(0, &[]);
    run(&uki::signed("other"), &refused).ends(0, &[]);
    run(&uki::unsigned(), &refused).ends(0, &[]);
}
