//! What a step is given of the host: SRCDIR, mounts, disks and WORK, checked before anything starts; SECRETS never.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;

use super::host::{Host, Told};

fn run(host: &Host, arguments: &[&str]) -> Told {
    let told = host.run(&[&["run"], arguments, &["--", "false"]].concat());
    host.is_untouched();
    told
}

#[test]
fn a_source_tree_that_is_not_there_is_named() {
    run(&Host::new(), &["--src", "nowhere"]).fails(2, &["SRCDIR", "nowhere`", "No such file"]);
}

#[test]
fn a_source_tree_that_is_a_file_is_refused() {
    let host = Host::new();
    host.file("source", "");
    run(&host, &["--src", "source"]).fails(2, &["SRCDIR", "source`", "not a directory"]);
}

#[test]
fn a_source_tree_named_by_the_environment_is_checked_alike() {
    let host = Host::new();
    let told = Told::by(host.kiln().env("SRCDIR", "/no/where").args(["run", "--", "true"]));
    told.fails(2, &["SRCDIR", "`/no/where`"]);
}

#[test]
fn whatever_shows_secrets_to_a_guest_is_refused() {
    let host = Host::new();
    let keys = host.folder("home/.ssh/project");
    host.folder("home/.ssh/project/sub");
    host.file("home/.ssh/project/key.img", [0; 4096]);
    symlink(&keys, host.path("innocent")).expect("a link");
    for arguments in [
        &["--src", "home"][..],
        &["--src", "home/.ssh/project"],
        &["--src", "home/.ssh/project/sub"],
        &["--src", "innocent"],
        &["--work", "home/.ssh/project"],
        &["--work", "home"],
        &["--mount", "home/.ssh:/m"],
        &["--mount", "innocent:/m"],
    ] {
        run(&host, arguments).fails(2, &["SECRETS", "home/.ssh/project`"]).hints(&["SECRETS"]);
    }
}

/// kiln where kernel, agent and QEMU are there, so that only what is asked for can be wrong.
fn with_kernel(host: &Host) -> Command {
    host.file("agent", "an agent");
    host.file("kernel", super::qemu::kernel());
    host.folder("root");
    host.script("qemu", "exit 1");
    let mut command = host.kiln();
    command.env("KILN_AGENT", host.path("agent")).env("KILN_QEMU", host.path("qemu"));
    command
}

fn run_with_kernel(host: &Host, arguments: &[&str]) -> Told {
    let all = [&["run", "--kernel", "kernel"], arguments, &["--", "true"]].concat();
    Told::by(with_kernel(host).args(all))
}

#[test]
fn a_live_root_that_shows_secrets_is_refused() {
    let host = Host::new();
    host.folder("home/.ssh/project");
    for root in ["live:home", "live:home/.ssh/project", "live:."] {
        run_with_kernel(&host, &["--root", root]).fails(2, &["root", "SECRETS"]).hints(&["SECRETS"]);
    }
}

#[test]
fn an_imported_root_that_shows_secrets_is_refused() {
    let host = Host::new();
    host.file("home/.ssh/project/key.tar", [0; 4096]);
    for root in ["dir:home", "dir:home/.ssh/project", "dir:.", "file:home/.ssh/project/key.tar"] {
        run_with_kernel(&host, &["--root", root]).fails(2, &["root", "SECRETS"]).hints(&["SECRETS"]);
    }
}

#[test]
fn a_disk_that_lies_in_secrets_is_refused() {
    let host = Host::new();
    host.file("home/.ssh/project/key.img", [0; 4096]);
    symlink(host.path("home/.ssh/project/key.img"), host.path("innocent.img")).expect("a link");
    for disk in ["home/.ssh/project/key.img:/dev/key", "innocent.img:/dev/key:ro"] {
        let told = run_with_kernel(&host, &["--root", "dir:root", "--disk", disk]);
        told.fails(2, &["disk", "SECRETS"]).hints(&["SECRETS"]);
    }
}

#[test]
fn secrets_may_be_named_elsewhere() {
    let host = Host::new();
    host.folder("src/keys");
    let told = Told::by(host.kiln().env("SECRETS", "src/keys").args(["run", "--src", "src", "--", "true"]));
    told.fails(2, &["SRCDIR", "SECRETS"]);
}

#[test]
fn malformed_mounts_are_refused_with_their_form() {
    let host = Host::new();
    for mount in ["src", "src:", ":/m", "src:m", "src:/", "src:/a/../../m"] {
        run(&host, &["--mount", mount]).fails(2, &[&format!("`{mount}`"), "HOST:GUEST"]);
    }
}

#[test]
fn a_mount_that_is_not_there_or_no_folder_is_named() {
    let host = Host::new();
    host.file("file", "");
    run(&host, &["--mount", "nowhere:/m"]).fails(2, &["mount", "nowhere`", "No such file"]);
    run(&host, &["--mount", "file:/m"]).fails(2, &["mount", "file`", "not a directory"]);
}

#[test]
fn malformed_disks_are_refused_with_their_form() {
    let host = Host::new();
    for disk in ["disk.img", "disk.img:", ":/m", "disk.img:m", "disk.img:/m/..", "disk.img:/m:rw"] {
        run(&host, &["--disk", disk]).fails(2, &[&format!("`{disk}`"), "FILE:GUEST"]);
    }
}

#[test]
fn a_disk_that_is_not_there_or_no_disk_is_named() {
    let host = Host::new();
    host.folder("folder");
    run(&host, &["--disk", "nowhere.img:/m"]).fails(2, &["disk", "nowhere.img`", "No such file"]);
    run(&host, &["--disk", "folder:/m"]).fails(2, &["disk", "folder`"]);
    run(&host, &["--disk", "folder:/m:ro"])
        .fails(2, &["folder`", "neither a regular file nor a block device"]);
}

#[test]
fn a_disk_without_a_file_system_is_refused_with_the_way_to_attach_it() {
    let host = Host::new();
    for (name, content) in [("empty.img", Vec::new()), ("zeros.img", vec![0; 1 << 20])] {
        host.file(name, content);
        let told = run(&host, &["--disk", &format!("{name}:/m")]);
        told.fails(2, &[name, "no file system"]).hints(&["/dev/"]);
    }
}

#[test]
fn a_work_that_cannot_be_made_is_refused_before_the_step_runs() {
    let host = Host::new();
    host.file("file", "");
    for work in ["file", "file/below", "file/far/below"] {
        let told = run(&host, &["--work", work, "--out", "x"]);
        told.fails(2, &["WORK", "cannot be written", work]).hints(&["--work"]);
    }
}

#[test]
fn a_work_that_is_a_file_is_refused_without_outputs_too() {
    let host = Host::new();
    host.file("file", "");
    run(&host, &["--work", "file"]).fails(2, &["WORK", "not a directory"]);
}

#[test]
fn a_report_that_cannot_be_written_is_refused_before_the_step_runs() {
    let host = Host::new();
    host.file("file", "");
    run(&host, &["--reads", "nowhere/reads.json"]).fails(2, &["nowhere/reads.json", "No such file"]);
    run(&host, &["--reads", "file/reads.json"]).fails(2, &["file/reads.json", "Not a directory"]);
}

#[test]
fn two_trees_at_one_place_are_refused() {
    let host = Host::new();
    host.folder("a");
    host.folder("b");
    run(&host, &["--mount", "a:/m", "--mount", "b:/m"]).fails(2, &["/m"]);
    run(&host, &["--mount", "a:/x/project"]).fails(2, &["/x/project"]);
}

#[test]
fn a_run_that_fails_before_its_machine_leaves_the_sources_alone() {
    let host = Host::new();
    host.file("src/a", "1");
    run(&host, &["--src", "src", "--src-writable", "--work", "nowhere/else", "--mount", "gone:/m"])
        .fails(2, &[]);
    let names: Vec<_> = fs::read_dir(host.path("src")).expect("it is there").flatten().collect();
    assert_eq!(names.len(), 1);
    assert!(!host.path("nowhere").exists());
}

#[test]
fn a_kernel_in_secrets_and_modules_around_them_are_refused() {
    let host = Host::new();
    host.file("home/.ssh/project/bzImage", super::qemu::kernel());
    for (kernel, modules) in [("home/.ssh/project/bzImage", "root"), ("kernel", "home")] {
        let arguments = ["run", "--root", "dir:root", "--kernel", kernel, "--modules", modules, "--", "true"];
        let told = Told::by(with_kernel(&host).args(arguments));
        told.fails(2, &["contains SECRETS", "or lies in it"]).hints(&["set SECRETS"]);
    }
}

#[test]
fn a_folder_around_secrets_is_no_root_of_a_build_and_nothing_of_it_is_kept() {
    let host = Host::new();
    host.file("home/.ssh/project/db.key", "a private key");
    for step in [
        "make = { squashfs = \"x\", from = [{ root = \"dir:home\" }] }",
        "run = \"true\"\nroot = \"dir:home\"\nkernel = \"file:kernel\"",
    ] {
        host.file("kiln.toml", format!("project = \"project\"\n[steps.s]\n{step}\n"));
        // Of SRCDIR nothing would be refused.
        let told = Told::by(with_kernel(&host).env("SRCDIR", host.folder("src")).arg("build"));
        assert!(told.code != Some(0), "{step}");
        for word in ["root `", "home` contains SECRETS", "home/.ssh/project`) or lies in it"] {
            assert!(told.stderr.contains(word), "{step}: no `{word}` in {}", told.stderr);
        }
        let search = ["-rl", "a private key", "store"];
        let found = Command::new("grep").args(search).current_dir(host.root()).output().expect("grep");
        assert_eq!(String::from_utf8_lossy(&found.stdout), "", "{step}");
    }
}
