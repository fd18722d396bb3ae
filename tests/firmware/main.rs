//! `kiln boot` on real firmware: a unified kernel image of Debian's stub and kernel, from folders, disks and a CD, under
//! Secure Boot and without, and asked over ssh. Each refusal stands beside a boot that differs in nothing else and succeeds.
//!
//! `ci/test firmware` runs them: a boot takes some ten seconds under emulation.

#![allow(clippy::disallowed_methods, reason = "a test fails by panicking")]
#![allow(clippy::panic, reason = "a test fails by panicking")]

#[path = "../acceptance/held.rs"]
mod acceptance;
#[path = "../canary/mod.rs"]
#[expect(dead_code, reason = "texts are searched elsewhere")]
mod canary;
mod debian;
#[path = "../folder/mod.rs"]
#[expect(dead_code, reason = "files are copied into place here")]
mod folder;
#[path = "../boot/host.rs"]
#[expect(dead_code, reason = "what machines with an agent are asked for is not asked here")]
mod host;
mod initos;
#[path = "../judge/schema.rs"]
mod judge;
mod uki;
#[path = "../unsigned/mod.rs"]
mod unsigned;
mod verdicts;

use std::fs;
use std::path::Path;
use std::process::Command;

use acceptance::held;
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

fn shell(folder: &Path, script: &str) {
    let output = Command::new("sh").args(["-euc", script]).current_dir(folder).output().expect("sh");
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
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
        &["esp", "--bus", "nvme", "--tpm", "--report", "report", "--junit", "report/junit.xml"],
        &[
            "within 100s",
            "reject Kernel panic",
            "expect MARKER",
            "expect TPM2",
            "screenshot started",
            "send hello",
            "expect /^got h.llo$/",
            "send off",
            "poweroff",
        ],
    );
    told.ends(0, &["met: expect MARKER", "as the script wants it"]);
    let xml = host.read("report/junit.xml");
    assert!(xml.contains("tests=\"8\" failures=\"0\""), "{xml}");
    assert!(is_png(&host.path("report/started.png")));
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
    // The guest itself reads that Secure Boot is on. A signature of somebody unknown beside the right one does no harm.
    run(&uki::signed("both"), &[within, "expect MARKER", "expect /6 +0 +0 +0 +1$/"]).ends(0, &[]);
    run(&uki::signed("other"), &refused).ends(0, &[]);
    run(&uki::unsigned(), &refused).ends(0, &[]);
    // It is the signature that is missed: the same two start where nobody asks for one.
    for image in [uki::signed("other"), uki::unsigned()] {
        boot(&host, &[image.to_str().expect("text")], &[within, "expect MARKER", IS_OFF]).ends(0, &[]);
    }
    held("boot-unsigned-refused");
    held("boot-foreign-key");
}

/// What an owner signs is nobody's to machines as they are sold.
#[test]
fn the_vendors_keys_refuse_what_an_owner_signed() {
    let host = Host::new();
    let image = uki::signed("db");
    let script = ["within 100s", "reject MARKER", "expect /Access Denied|Security Violation/"];
    let vendors = [image.to_str().expect("text"), "--secure-boot", "vendor"];
    boot(&host, &vendors, &script).ends(0, &[]);
    // Variables that were named and have no keys would start everything.
    let named = [
        "--firmware",
        "/usr/share/OVMF/OVMF_CODE_4M.secboot.fd",
        "--firmware-vars",
        "/usr/share/OVMF/OVMF_VARS_4M.fd",
    ];
    boot(&host, &[&vendors[..], &named].concat(), &script)
        .ends(3, &["no variables with the keys that machines are sold with"]);
}

/// One start of one firmware: disks that it must not start come before the one that it must.
#[test]
fn what_the_firmware_forbids_is_refused_whoever_else_signed_it() {
    let host = Host::new();
    let [keys, other, both, forbidden, good] = [
        uki::forbidding_keys(),
        uki::signed("other"),
        uki::signed("both"),
        uki::signed("forbidden"),
        uki::signed("db"),
    ]
    .map(|path| path.to_str().expect("text").to_owned());
    let mut arguments = vec![other.as_str(), "--bus", "nvme", "--secure-boot", &keys];
    // Signed by whom db has and dbx too; by him and by db's key; by db's key alone, with its digest in dbx.
    arguments.extend(["--disk", &both, "--disk", &forbidden, "--disk", &good]);
    let refused = |disk| format!("expect /failed to load Boot.*kiln{disk} .*Access Denied/");
    let refused = [0, 1, 2].map(refused);
    let mut script = vec!["within 100s"];
    script.extend(refused.iter().map(String::as_str));
    script.extend(["expect /starting Boot.*kiln3 /", "expect MARKER", IS_ON]);
    boot(&host, &arguments, &script).ends(0, &["as the script wants it"]);
    held("boot-foreign-key");
}

/// What the guest prints of the variable `SecureBoot` where it is on, and off.
const IS_ON: &str = "expect /6 +0 +0 +0 +1$/";
const IS_OFF: &str = "expect /6 +0 +0 +0 +0$/";

#[test]
fn a_guest_enrolls_keys_in_setup_mode_and_restarts_under_secure_boot() {
    let host = Host::new();
    let image = uki::signed("db");
    let script = [
        "within 100s",
        IS_OFF,
        "send enroll",
        "expect enrolled db",
        "expect enrolled KEK",
        "expect enrolled PK",
        "send again",
        "reboot",
        IS_ON,
        "send off",
        "poweroff",
    ];
    boot(&host, &[image.to_str().expect("text"), "--secure-boot", "setup"], &script)
        .ends(0, &["the guest restarted its machine", "as the script wants it"]);
}

#[test]
fn the_firmware_takes_auth_files_and_its_variables_are_kept() {
    let host = Host::new();
    let (unsigned, signed) = (uki::unsigned(), uki::signed("db"));
    let (unsigned, signed) = (unsigned.to_str().expect("text"), signed.to_str().expect("text"));
    let (keys, stolen) = (uki::enrolment(), uki::stolen_enrolment());
    let enroll =
        |folder: &Path| ["--enroll", folder.to_str().expect("text"), "--vars", "vars.fd"].map(str::to_owned);
    let run = |image: &str, options: &[String], script: &[&str]| {
        let options: Vec<&str> = [image].into_iter().chain(options.iter().map(String::as_str)).collect();
        boot(&host, &options, script)
    };
    run(signed, &enroll(&stolen), &["expect MARKER"]).ends(
        1,
        &["the firmware does not take the keys of", "the guest printed: Failed to write PK secure boot"],
    );
    fs::remove_file(host.path("vars.fd")).expect("it was made");
    run(signed, &enroll(&keys), &["within 100s", IS_ON, "send off", "poweroff"])
        .ends(0, &["the firmware took the keys of"]);
    // Also where nothing else is asked for: the file has the keys.
    let kept = ["--secure-boot", "setup", "--vars", "vars.fd"].map(str::to_owned);
    run(unsigned, &kept, &["within 100s", "reject MARKER", "expect /Access Denied|Security Violation/"])
        .ends(0, &["variables as vars.fd has them, with the keys that are in them"]);
    held("auth-chain");
}

#[test]
fn what_the_guest_writes_goes_nowhere_unless_it_is_kept() {
    let host = Host::new();
    let script = ["within 100s", "expect READY", "send write", "expect WRITTEN", "send off", "poweroff"];
    let copy = |name: &str| {
        fs::copy(uki::image(name), host.path(name)).expect("room");
        fs::read(host.path(name)).expect("an image")
    };
    let before = copy("disk.qcow2");
    boot(&host, &["disk.qcow2"], &[]).ends(2, &["--format qcow2"]);
    boot(&host, &["disk.qcow2", "--format", "qcow2"], &script).ends(0, &[]);
    assert!(fs::read(host.path("disk.qcow2")).expect("an image") == before, "the image was changed");
    let before = copy("disk.img");
    boot(&host, &["disk.img", "--keep-writes"], &script).ends(0, &[]);
    let after = fs::read(host.path("disk.img")).expect("an image");
    assert!(after != before && after[4 * 512..].starts_with(b"written\n"), "nothing was kept");
}

#[test]
fn a_cd_image_boots_from_a_usb_stick_and_what_does_not_boot_is_said() {
    let host = Host::new();
    let cd = uki::image("cd.iso");
    let cd = cd.to_str().expect("text");
    boot(&host, &[cd, "--bus", "usb"], &["within 100s", "expect READY"]).ends(0, &[]);
    // Nothing to boot on it: firmware says so, and its word is handed on.
    fs::create_dir(host.path("nothing")).expect("a folder");
    let script = ["within 100s", "expect /Shell>|No bootable/", "within 1s", "expect MARKER"];
    boot(&host, &["nothing"], &script).ends(1, &["not within 1", "the firmware does not boot the image"]);
}

#[test]
fn commands_go_in_over_ssh_and_what_they_print_and_end_with_is_judged() {
    let host = Host::new();
    let (image, key, strange, host_key) =
        (uki::with_ssh(), uki::ssh_key(), uki::strange_ssh_key(), uki::host_key());
    let run = |key: &Path, host_key: &Path, script: &[&str]| {
        let [image, key, host_key] = [&image, key, host_key].map(|path| path.to_str().expect("text"));
        let all = ["within 100s", "expect READY", "send net", "expect NET UP"];
        let script: Vec<&str> = all.into_iter().chain(script.iter().copied()).collect();
        boot(&host, &[image, "--ssh-key", key, "--ssh-host-key", host_key], &script)
    };
    let script = [
        "ssh cat /proc/version; echo aside >&2",
        "output /^Linux version [0-9.]+/",
        "output aside",
        "ssh=3 exit 3",
        "ssh=0 false",
    ];
    run(&key, &host_key, &script).ends(
        1,
        &["the guest's host key is ssh-ed25519 SHA256:", "met: ssh=3 exit 3", "`false` exited with status 1"],
    );
    // Another key, and another guest than was expected.
    run(&strange, &host_key, &["ssh true"]).ends(1, &["the guest does not take the key for root"]);
}
