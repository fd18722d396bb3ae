//! `kiln boot` where no machine has to start: what it does not take, and what the host lacks.

use std::fs;

use super::host::{Host, Told, in_own_mounts};

#[test]
fn a_script_that_cannot_be_read_is_refused_with_line_and_column() {
    let host = Host::new();
    host.file("disk.img", "x");
    host.run(&["boot", "disk.img", "-e", "expect a", "-e", "exspect b"])
        .fails(2, &["-e 2, line 1, column 1", "`exspect`"]);
    let script = host.file("boot.txt", "within 5s\n  send \"open\n");
    let script = script.to_str().expect("text");
    host.run(&["boot", "disk.img", "--script", script]).fails(2, &["boot.txt line 2, column 8", "quotes"]);
    host.run(&["boot", "disk.img", "--script", "absent"]).fails(2, &["absent"]);
}

#[test]
fn settings_of_the_machine_that_cannot_be_are_refused() {
    let host = Host::new();
    for (arguments, word) in [
        (&["--bus", "floppy"][..], "`floppy`"),
        (&["--disk", "a:b"], "`b`"),
        (&["--memory", "much"], "`much`"),
        (&["--memory", "1M"], "128M"),
        (&["--memory", "18446744073709551615"], "8T"),
        (&["--format", "vmdk"], "`vmdk`"),
    ] {
        host.run(&[&["boot", "x"], arguments].concat()).fails(2, &[word]);
    }
}

#[test]
fn what_is_no_image_is_refused_with_what_would_be() {
    let host = Host::new();
    host.file("text", "hello");
    host.run(&["boot", "text"]).fails(2, &["text", "neither"]).hints(&["FAT"]);
    host.run(&["boot", "absent.img"]).fails(2, &["absent.img"]);
    host.file("disk.qcow2", b"QFI\xfb\0\0\0\x03");
    host.run(&["boot", "disk.qcow2"]).fails(2, &["qcow2", "raw"]).hints(&["qemu-img convert"]);
}

#[test]
fn a_report_of_verdicts_is_not_last_times_where_nothing_could_be_judged() {
    let host = host_with_a_disk("");
    host.file("text", "hello");
    host.folder("bin");
    for (image, code, word) in [("text", 2, "neither"), ("disk.img", 3, "qemu-system-x86_64")] {
        host.file("j.xml", "<testsuite errors=\"0\"/>");
        let mut kiln = host.kiln();
        kiln.env("PATH", host.path("bin")).args(["boot", image, "-e", "expect x", "--junit", "j.xml"]);
        Told::by(&mut kiln).fails(code, &[word]);
        let xml = fs::read_to_string(host.path("j.xml")).expect("a report");
        assert!(
            xml.contains("tests=\"2\" failures=\"0\" errors=\"1\" skipped=\"1\"") && xml.contains(word),
            "{xml}"
        );
    }
}

#[test]
fn names_that_fat_cannot_hold_are_named() {
    let host = Host::new();
    host.file("esp/a:b", "x");
    host.run(&["boot", "esp"]).fails(2, &["a:b", "FAT"]);
}

#[test]
fn a_disk_that_would_show_secrets_is_refused_before_firmware_is_looked_for() {
    let host = Host::new();
    let key = host.file("home/.ssh/project/uefi-keys/db.key", "a key");
    std::os::unix::fs::symlink(key.parent().expect("a folder"), host.path("innocent")).expect("a link");
    host.folder("esp");
    for arguments in [
        &["home"][..],
        &["home/.ssh/project"],
        &["innocent"],
        &["."],
        &["home/.ssh/project/uefi-keys/db.key"],
        &["esp", "--disk", "home/.ssh"],
    ] {
        let mut kiln = host.kiln();
        kiln.env("SECRETS", host.path("home/.ssh/project")).arg("boot").args(arguments);
        Told::by(&mut kiln)
            .fails(2, &["disk `", "contains SECRETS", "home/.ssh/project`", "or lies in it"])
            .hints(&["set SECRETS"]);
    }
    host.is_untouched();
}

#[test]
fn ssh_without_a_key_and_keys_that_are_not_there_are_refused() {
    let host = Host::new();
    let mut disk = vec![0; 1024];
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    host.file("disk.img", disk);
    host.run(&["boot", "disk.img", "-e", "ssh true"]).fails(2, &["ssh", "key"]).hints(&["--ssh-key"]);
    let of_nothing = ["boot", "disk.img", "--ssh-key", "key", "-e", "output x"];
    host.run(&of_nothing).fails(2, &["-e 1, line 1", "no command over ssh before it"]);
    host.run(&["boot", "disk.img", "-e", "screenshot x"]).fails(2, &["a folder"]).hints(&["--report"]);
    fs::create_dir(host.path("keys")).expect("a folder");
    host.run(&["boot", "disk.img", "--secure-boot", "keys"]).fails(2, &["no db in keys"]).hints(&["db.esl"]);
    host.run(&["boot", "disk.img", "--enroll", "keys"])
        .fails(2, &["no db.auth in keys"])
        .hints(&["kiln sign"]);
    let both = ["boot", "disk.img", "--enroll", "keys", "--secure-boot", "keys"];
    host.run(&both).fails(2, &["--enroll"]);
}

/// A disk that looks like one, and a recipe with a step that boots.
fn host_with_a_disk(more: &str) -> Host {
    let host = Host::new();
    let mut disk = vec![0; 1024];
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    host.file("disk.img", disk);
    host.file(
        "kiln.toml",
        format!(
            "[steps.made]\nmake = {{ files = 'esp', from = [{{ text = 'x', at = 'a' }}] }}\n\
             [steps.test]\nneeds = ['made']\nboot = {{ image = 'esp', expect = 'expect x'{more} }}\n"
        ),
    );
    host
}

#[test]
fn without_swtpm_or_qemu_both_who_boots_and_who_builds_are_told_what_to_install() {
    let host = host_with_a_disk(", tpm = true");
    let only = |programs: &[&str]| {
        let bin = host.path("bin");
        let _ = fs::remove_dir_all(&bin);
        fs::create_dir(&bin).expect("a folder");
        for program in programs {
            std::os::unix::fs::symlink(format!("/usr/bin/{program}"), bin.join(program)).expect("a link");
        }
        bin
    };
    for (programs, words, hint) in [
        (&["qemu-system-x86_64"][..], "swtpm", "apt install swtpm"),
        (&["swtpm"], "qemu-system-x86_64", "qemu-system-x86"),
    ] {
        let bin = only(programs);
        for arguments in [&["boot", "disk.img", "--tpm"][..], &["build", "test"]] {
            let mut kiln = host.kiln();
            let told = Told::by(kiln.env("PATH", &bin).args(arguments));
            told.fails(3, &[words]).hints(&[hint]);
        }
    }
}

#[test]
fn without_firmware_both_who_boots_and_who_builds_are_told_what_to_install() {
    let host = host_with_a_disk(", secure-boot = 'setup'");
    for arguments in
        [&["boot", "disk.img"][..], &["boot", "disk.img", "--secure-boot", "setup"], &["build", "test"]]
    {
        let mut kiln = host.kiln();
        // The folders of firmware are empty.
        let script = "for f in /usr/share/OVMF /usr/share/edk2; do
            [ ! -d $f ] || mount -t tmpfs none $f
        done; exec \"$@\"";
        let told = Told::by(&mut in_own_mounts(kiln.args(arguments), script));
        told.fails(3, &["no UEFI firmware"]).hints(&["apt install ovmf", "--firmware CODE.fd"]);
    }
}
