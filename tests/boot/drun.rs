//! `kiln drun`: steps by their names, and commands in the layout of initOS's scripts, whose every write arrives or none.

use std::fs;
use std::process::Command;

use super::acceptance::held;
use super::host::{Host, Told, busybox, greeter};

/// A host with a recipe of initOS's name, whose root is busybox.
fn host() -> Host {
    let host = Host::new();
    let root = busybox().display();
    host.file(
        "kiln.toml",
        &format!(
            "project = \"initos\"\n[roots.recovery]\nfrom = \"dir:{root}\"\n\
             [steps.version]\nroot = \"recovery\"\nrun = 'echo 6.12 >$WORK/version'\noutputs = [\"version\"]\n\
             [steps.other]\nroot = \"recovery\"\nrun = 'echo x >$WORK/other'\noutputs = [\"other\"]\n"
        ),
    );
    host.file("tool.sh", "echo sourced >/boot/of-script\n");
    host
}

fn drun(host: &Host, words: &[&str]) -> Told {
    let mut kiln: Command = host.kiln();
    host.end(kiln.arg("drun").args(words), &[])
}

#[test]
fn what_a_command_writes_in_the_layouts_places_is_merged_into_work_on_success() {
    let host = host();
    host.file("work/boot/old", "old");
    host.file("work/boot/gone", "gone");
    host.file("work/boot/efi/deep", "deep");
    host.file("work/modules/1/kept", "kept");
    let script = r#"
        set -e
        test "$WORK $SRCDIR" = "/x/initos /ws/initos"
        mkdir -p /lib/modules/6.12 /x/initos/sub
        echo boot > /boot/x; echo module > /lib/modules/6.12/y; echo work > /x/initos/sub/z
        echo package > /etc/apk/cache/p; echo blob > /lib/firmware/f
        echo more >> /boot/old; rm /boot/gone; rm -r /boot/efi
        test "$(cat /x/initos/boot/x)" = boot; test "$(cat /lib/modules/1/kept)" = kept
        sh /ws/initos/tool.sh
        echo lost > /root-file
    "#;
    let told = drun(&host, &["sh", "-c", script]);
    told.ends(0, &["output files"]);
    for (name, text) in [
        ("boot/x", "boot\n"),
        ("boot/old", "oldmore\n"),
        ("boot/of-script", "sourced\n"),
        ("modules/6.12/y", "module\n"),
        ("modules/1/kept", "kept"),
        ("firmware/f", "blob\n"),
        ("sub/z", "work\n"),
        ("work/cache/p", "package\n"),
    ] {
        assert_eq!(host.read(&format!("work/{name}")), text, "{name}");
    }
    for gone in ["boot/gone", "boot/efi", "root-file"] {
        assert!(!host.path(&format!("work/{gone}")).exists(), "{gone}");
    }
    // The next one sees it, and what it does not touch stays.
    drun(&host, &["sh", "-ec", "test -s /boot/x; echo again >/boot/second"]).ends(0, &[]);
    assert_eq!((host.read("work/boot/x").as_str(), host.read("work/sub/z").as_str()), ("boot\n", "work\n"));
}

#[test]
fn a_command_of_drun_that_fails_changes_nothing() {
    let host = host();
    host.file("work/boot/old", "old");
    let script = "echo new >/boot/old; echo x >/x/initos/x; rm -r /x/initos/boot/old; exit 3";
    drun(&host, &["sh", "-c", script]).ends(3, &[]);
    assert_eq!(host.read("work/boot/old"), "old");
    assert_eq!(fs::read_dir(host.path("work")).expect("it is there").count(), 1);
}

#[test]
fn a_name_of_a_step_is_built_and_any_other_word_is_a_command() {
    let host = host();
    drun(&host, &["version"]).ends(0, &[]);
    assert_eq!(host.read("work/version"), "6.12\n");
    assert!(!host.path("work/other").exists());
    let told = drun(&host, &["versoin"]);
    told.ends(127, &["`versoin` was not found", "no step of that name", "did you mean `version`?"]);
    drun(&host, &["--memory", "1G", "version"])
        .ends(2, &["`version` is a step of the recipe", "--memory is for commands"]);
    drun(&host, &["--directory", "no/where", "version"]).ends(2, &["--directory no/where"]);
    drun(&host, &["--root", "recovry", "true"]).ends(2, &["no root `recovry`", "did you mean `recovery`?"]);
}

#[test]
fn net_full_reaches_a_server_of_this_host_and_says_so_and_without_it_there_is_none() {
    let host = host();
    let port = greeter();
    let script = format!("nc -w 10 10.0.2.2 {port} </dev/null >/x/initos/said && cat /etc/resolv.conf");
    let told = drun(&host, &["--net", "full", "--reads", "reads.json", "sh", "-c", &script]);
    told.ends(0, &["warning: the network is open"]);
    assert_eq!(told.text(), "nameserver 10.0.2.3\n");
    assert_eq!(host.read("work/said"), "from the host\n");
    assert!(host.read("reads.json").contains("\"the network\""), "{}", host.read("reads.json"));
    let told = drun(&host, &["sh", "-c", &format!("ls /sys/class/net; nc -w 2 10.0.2.2 {port} </dev/null")]);
    assert_eq!(told.text(), "lo\n");
    assert_eq!(told.code, Some(1), "{}", told.stderr);
    assert!(!told.stderr.contains("the network is open"), "{}", told.stderr);
    held("hermetic-step");
}
