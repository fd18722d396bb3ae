//! initOS's own programs in machines: what the initrd's init opens, passes over and refuses, and what is started then. Each
//! refusal is waited for by what the console says of it, beside a boot that differs in nothing else and succeeds.
//!
//! `ci/test firmware` runs them. The kernel is booted directly where firmware is not the point: some five seconds under
//! emulation.

#![allow(clippy::disallowed_methods, reason = "a test fails by panicking")]
#![allow(clippy::panic, reason = "a test fails by panicking")]

#[path = "../acceptance/held.rs"]
mod acceptance;
#[path = "../folder/mod.rs"]
#[expect(dead_code, reason = "files are written by others here")]
mod folder;
#[path = "../boot/host.rs"]
#[expect(dead_code, reason = "what machines with an agent are asked for is not asked here")]
mod host;
mod images;
#[path = "../judge/schema.rs"]
mod judge;
mod machine;
mod slots;
mod standalone;

use std::path::{Path, PathBuf};
use std::process::Command;

use acceptance::held;
use host::Host;
use images::{
    Image, Separate, disk, disk_labelled_in_its_root, initrd, initrd_of, kernel, single, single_layout,
};
use machine::{Bus, Machine, Shape};

/// What other systems take on their command line for a shell. Here nobody signed it, and it is asked for all the same.
const WORDS_FOR_A_SHELL: &str =
    "break=premount break init=/bin/sh single emergency initos_debug_initrd=1 debug_init -- -s";
/// How shells show that they listen.
const PROMPTS: [&str; 8] =
    ["SH2ELL", "~ # ", "/ # ", "sh-5", "bash-", "(initramfs)", "BusyBox v1", "Press Enter for maintenance"];

/// Asserts that no shell listened in all that was printed.
fn has_no_shell(printed: &str) {
    // What was typed comes back as it was typed, and the command line has its words.
    for prompt in PROMPTS {
        assert!(!printed.contains(prompt), "`{prompt}` in: {printed}");
    }
}

/// Typed at every opportunity. A shell would answer with SH2ELL, and a program that restarts by key would restart.
const TYPED: &str = "\x03\x1b\radrc\r\recho SH$((1+1))ELL\r";

fn start(initrd: &Path, disks: &[(&Path, Bus)], command_line: &str) -> Machine {
    start_with(initrd, disks, command_line, false)
}

fn start_with(initrd: &Path, disks: &[(&Path, Bus)], command_line: &str, keeps_writes: bool) -> Machine {
    // A quiet kernel shows warnings at this level, and the init's words are of that kind.
    let command_line = format!("quiet loglevel=5 {command_line}");
    let kernel = &kernel().image;
    Machine::start(&Shape {
        kernel,
        initrd,
        command_line: &command_line,
        disks,
        keeps_writes,
        has_network: false,
    })
}

#[test]
fn one_image_of_all_on_a_virtio_disk_starts_its_init_whatever_is_typed() {
    let disk = disk(&single_layout(single()), "BOOTA");
    let mut machine = start(&initrd_of(single()), &[(&disk, Bus::Virtio)], WORDS_FOR_A_SHELL);
    let milestones = [
        "INITOS: Starting INITOS initramfs 6.",
        "INITOS: INSECURE: Secure Boot is off",
        "INITOS: Found InitOS partition vda ",
        "INITOS: Mounting overlay",
        "INITOS: Mounted verity root",
        "INITOS: Handing over to /sbin/init\r",
    ];
    for milestone in milestones {
        machine.expect(milestone);
        machine.types(TYPED);
    }
    machine.expect("ROOT is 1 with 0 of the initrd");
    for said in
        ["CURRENT=\r", "NEXT=B", "SECURE=0", "DEVICE=vda", "local: of this machine", "firmware: inside"]
    {
        machine.expect(said);
    }
    let (printed, virtio) = machine.ends_with_both_consoles();
    assert!(printed.contains("END of it"), "{printed}");
    has_no_shell(&printed);
    // The virtio console, which no word of the command line names, has the init's milestones in their order and nothing else.
    let mut rest = virtio.as_str();
    for milestone in milestones {
        let (_, after) =
            rest.split_once(milestone).unwrap_or_else(|| panic!("no `{milestone}` in: {virtio}"));
        rest = after;
    }
    assert!(virtio.lines().all(|line| line.starts_with("INITOS: ")), "{virtio}");
    held("secure-no-shell");
}

#[test]
fn separate_images_on_an_nvme_disk_are_put_together() {
    let separate = Separate::new();
    let disk = disk(&separate.layout(), "BOOTA");
    let mut machine = start(&initrd(&separate.hashes()), &[(&disk, Bus::Nvme)], "");
    machine.expect("Found InitOS partition nvme0n1 ");
    for role in ["root", "modules", "firmware"] {
        machine.expect(&format!("Mounted verity {role}"));
    }
    machine.expect("modules: drivers net");
    machine.expect("firmware: separate");
    machine.ends();
}

/// A disk of an image that this initrd does not name.
fn disk_of_another_version() -> PathBuf {
    let other = Image { hash: "b".repeat(64), ..single().clone() };
    disk(&single_layout(&other), "BOOTA")
}

#[test]
fn an_image_of_another_version_is_passed_over_for_the_signed_one() {
    let other = disk_of_another_version();
    let right = disk_labelled_in_its_root(&single_layout(single()), "BOOTB");
    let mut machine = start(&initrd_of(single()), &[(&other, Bus::Virtio), (&right, Bus::Virtio)], "");
    machine.expect("Skipping vda (BOOTA): initos/initos.hash is of another version");
    machine.expect("Found InitOS partition vdb ");
    machine.expect("DEVICE=vdb");
    machine.ends();
    held("wrong-hash-file");
    held("ab-select");
}

#[test]
fn with_no_image_left_it_fails_and_restarts_and_no_key_gives_a_shell() {
    let other = disk_of_another_version();
    let mut machine = start_with(&initrd_of(single()), &[(&other, Bus::Virtio)], "", true);
    for milestone in [
        "initos.hash is of another version",
        "FAILED: boot partition not found",
        "Leaving logs on vda (BOOTA)",
        "Rebooting in 20 sec",
    ] {
        machine.expect(milestone);
        machine.types(TYPED);
    }
    // It waits, in which time it might listen, and ends by itself.
    let (printed, virtio) = machine.ends_with_both_consoles();
    assert!(printed.contains("INITOS: Restarting"), "{printed}");
    assert!(virtio.contains("INITOS: FAILED: boot partition not found: no BOOTA"), "{virtio}");
    has_no_shell(&printed);
    assert!(!printed.contains("Kernel panic") && !printed.contains("ROOT is"), "{printed}");
    // What explains it is on the partition, read by another's reader.
    for (name, words) in [
        ("dmesg.log", "INITOS: FAILED: boot partition not found"),
        ("blkid.log", "vda BOOTA\n"),
        ("devices", " vda\n"),
        ("filesystems", "\tvfat\n"),
        ("lsmod.log", "vfat "),
    ] {
        let mut mtype = Command::new("mtype");
        let output = mtype.arg("-i").arg(&other).arg(format!("::/log/{name}")).output().expect("mtools");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains(words), "{name}: {text}");
    }
    let fsck = Command::new("sh")
        .args(["-c", "PATH=$PATH:/usr/sbin:/sbin exec fsck.vfat -n \"$1\"", "sh"])
        .arg(&other)
        .output();
    let fsck = fsck.expect("sh");
    assert!(fsck.status.success(), "{}", String::from_utf8_lossy(&fsck.stdout));
    held("wrong-hash-file");
    held("secure-no-shell");
}

#[test]
fn one_flipped_bit_of_the_image_or_of_its_hashes_restarts_the_machine() {
    let right = single();
    let initrd = initrd_of(right);
    // What mounting reads first and last, and the hash of hashes: the partition is passed over, and says why.
    let last = right.data.len() - 20;
    for (image, said) in [
        (right.with_flipped_data(64), "data block 0 is corrupted"),
        (right.with_flipped_data(last), "is corrupted"),
        (right.with_flipped_tree(4096 + 1), "metadata block 1 is corrupted"),
    ] {
        let disk = disk(&single_layout(&image), "BOOTA");
        let mut machine = start_with(&initrd, &[(&disk, Bus::Virtio)], "", true);
        for milestone in [
            "Found InitOS partition vda ",
            "device-mapper: verity: ",
            said,
            "Skipping vda (BOOTA): initos/initos.sqfs: it is not what its hash tree says: ",
            "FAILED: boot partition not found",
            "Leaving logs on vda (BOOTA)",
            "Rebooting in 20 sec",
        ] {
            machine.expect(milestone);
        }
        let printed = machine.ends();
        assert!(printed.contains("INITOS: Restarting") && !printed.contains("ROOT is"), "{printed}");
        has_no_shell(&printed);
        let mut mtype = Command::new("mtype");
        let output = mtype.arg("-i").arg(&disk).arg("::/log/dmesg.log").output().expect("mtools");
        let log = String::from_utf8_lossy(&output.stdout);
        assert!(log.contains("is corrupted") && log.contains("INITOS: FAILED"), "{log}");
    }
    // The start of busybox, which only the root's init reads: nothing is believed any more.
    let disk = disk(&single_layout(&right.with_flipped_data(16 << 10)), "BOOTA");
    let mut machine = start(&initrd, &[(&disk, Bus::Virtio)], "");
    machine.expect("Found InitOS partition vda ");
    machine.expect("data block 4 is corrupted");
    let printed = machine.ends();
    assert!(printed.contains("dm-verity device corrupted"), "{printed}");
    assert!(!printed.contains("ROOT is") && !printed.contains("INITOS: FAILED"), "{printed}");
    has_no_shell(&printed);
    held("flip-sqfs-byte");
}

#[test]
fn a_slot_whose_image_is_damaged_is_passed_over_for_the_other() {
    let damaged = disk(&single_layout(&single().with_flipped_data(64)), "BOOTA");
    let right = disk(&single_layout(single()), "BOOTB");
    let mut machine = start(&initrd_of(single()), &[(&damaged, Bus::Virtio), (&right, Bus::Virtio)], "");
    machine.expect("Skipping vda (BOOTA): initos/initos.sqfs: it is not what its hash tree says: ");
    machine.expect("Found InitOS partition vdb ");
    machine.expect("DEVICE=vdb");
    machine.ends();
    held("ab-select");
}

#[test]
fn a_tree_or_an_image_that_is_cut_off_is_passed_over_at_last_for_a_disk_without_a_label() {
    let right = single();
    let mut short = right.clone();
    short.data.truncate(right.data.len() - 4096);
    let mut without_tree = right.clone();
    without_tree.tree.truncate(100);
    let disks = [(&short, "BOOTA"), (&without_tree, "BOOTA"), (right, "")]
        .map(|(image, label)| disk(&single_layout(image), label));
    let disks = disks.each_ref().map(|disk| (disk.as_path(), Bus::Virtio));
    let mut machine = start(&initrd_of(right), &disks, "");
    machine.expect("Skipping vda (BOOTA): initos/initos.sqfs: it is shorter than its hash tree says");
    machine.expect("Skipping vdb (BOOTA): initos/initos.sqfs: ");
    machine.expect("Looking at partitions of any label");
    machine.expect("Found InitOS partition vdc ");
    machine.expect("DEVICE=vdc");
    machine.ends();
}

#[test]
fn the_image_for_sticks_takes_a_stick_first_and_programs_of_the_initrd_before_the_roots() {
    let (slot, stick) = (disk(&single_layout(single()), "BOOTA"), disk(&single_layout(single()), "BOOTUSB"));
    let initrd = initrd(&[
        ("local/initos.hash".to_owned(), single().hash.clone()),
        ("sbin/initos-init-insecure".to_owned(), "#!/bin/sh\necho OF THE INITRD\npoweroff -f\n".to_owned()),
    ]);
    let mut machine = start(&initrd, &[(&slot, Bus::Virtio), (&stick, Bus::Virtio)], "initos=usb");
    machine.expect("Found InitOS partition vdb ");
    machine.expect("Handing over to /sbin/initos-init-insecure");
    machine.expect("OF THE INITRD");
    machine.ends();
}

/// Real firmware, with keys: that it is on is read, modules are what a kernel under lockdown loads, and the entry that was
/// taken decides. The root makes the second entry and asks for it. That has load options, which Secure Boot keeps from the
/// kernel; without it, it looks for its init where they say, and there is none.
#[test]
fn under_secure_boot_the_firmwares_entry_decides_the_slot_and_nothing_of_the_command_line() {
    let host = Host::new();
    let disk = slots::disk();
    let boot = |arguments: &[&str], script: &[&str]| {
        let mut kiln = host.kiln();
        kiln.arg("boot").arg(&disk.image).args(arguments);
        for statement in script {
            kiln.args(["-e", statement]);
        }
        host.end(&mut kiln, &[]).ends(0, &["as the script wants it"]);
    };
    let secure = [
        "within 200s",
        "reject FAILED",
        "reject Unable to mount root fs",
        "reject /cmdline: .*(stranger|break|init=|single)/",
        "expect SECURE: Secure Boot is on",
        "expect Found InitOS partition vda1",
        "expect BOOT_NEXT=B",
        "expect BOOT_SECURE=1",
        "reboot",
        "expect Found InitOS partition vda2",
        "expect BOOT_CURRENT=1002",
        "expect BOOT_NEXT=A",
        "expect /cmdline: console=ttyS0 quiet .*no_timer_check/",
        "poweroff",
    ];
    boot(&["--secure-boot", disk.keys.to_str().expect("text")], &secure);
    let insecure =
        ["within 200s", "expect BOOT_SECURE=0", "reboot", "reject INITOS", "expect Unable to mount root fs"];
    boot(&[], &insecure);
    held("boot-secure-ok");
    held("ab-select");
    held("secure-no-shell");
}
