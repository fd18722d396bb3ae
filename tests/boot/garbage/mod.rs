//! A guest with a driver of its own that speaks garbage to its machine's devices: the run ends in time and by name, nothing
//! is left, and the next one is served.
//!
//! `driver.c` takes devices from the guest's kernel, and drives them by their registers.

use std::path::Path;
use std::process::Command;

use super::host::{Host, Told};

/// The numbers that PCI has for the devices of a machine: fs, vsock, disk and console (Virtual I/O Device Version 1.2,
/// section 4.1.2.1).
const FS: &str = "0x105a";
const VSOCK: &str = "0x1053";
const DISK: &str = "0x1001";
const CONSOLE: &str = "0x1003";

/// Seeds a device; each is some thousand chains, kicks and registers.
const SEEDS: std::ops::Range<u32> = 1..4;

fn host() -> Host {
    let host = Host::new();
    host.file("src/f", "content");
    let driver = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/boot/garbage/driver.c");
    let mut compiler = Command::new("cc");
    compiler.args(["-O1", "-static", "-o"]).arg(host.path("src/driver")).arg(driver);
    let output = compiler.output().expect("cc");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    host
}

fn drive(host: &Host, arguments: &[&str], seed: u32, devices: &str) -> Told {
    let script =
        format!("mount -o remount,rw /sys && cp $SRCDIR/driver /tmp && /tmp/driver {seed} 20 {devices}");
    let arguments = [&["--src", "src", "--out", "*", "--timeout", "2m"], arguments].concat();
    host.script(&arguments, &script)
}

fn serves(host: &Host) {
    let told = host.script(&["--src", "src", "--out", "copy"], "cat $SRCDIR/f > $WORK/copy");
    told.ends(0, &[]);
    assert_eq!(host.read("work/copy"), "content");
}

#[test]
fn an_fs_device_that_is_driven_by_garbage_ends_the_run_by_name() {
    let host = host();
    for seed in SEEDS {
        drive(&host, &[], seed, FS).ends(125, &["guest-misbehaved: fs: "]);
        assert!(!host.path("work/made").exists(), "nothing is merged of what was read through such a device");
    }
    serves(&host);
}

#[test]
fn disks_that_are_driven_by_garbage_are_the_guests_own_loss() {
    let host = host();
    for seed in SEEDS {
        let told = drive(&host, &[], seed, DISK);
        assert!(told.text().contains("rounds"), "{}", told.stderr);
    }
    serves(&host);
}

#[test]
fn a_wire_whose_device_is_driven_by_garbage_ends_the_run_by_name() {
    let host = host();
    for seed in SEEDS {
        drive(&host, &[], seed, CONSOLE).ends(125, &["the machine died while running the command"]);
    }
    drive(&host, &["--wire", "vsock"], 1, VSOCK).ends(125, &["the machine died while running the command"]);
    serves(&host);
}
