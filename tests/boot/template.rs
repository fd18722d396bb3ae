//! Copies of templates: they do as machines that boot, share no number, and come from nothing but what was frozen.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::host::{Host, Running, Told};

/// How the machine of a run with `--json` came to be.
pub fn origin(told: &Told) -> String {
    let events = told.events();
    let machine = events.iter().find(|event| event["event"] == "machine").expect("a machine");
    machine["origin"].as_str().expect("a word").to_owned()
}

/// The templates of `host`, without what lies beside them.
fn templates(host: &Host) -> Vec<PathBuf> {
    let entries = fs::read_dir(host.path("store/templates")).expect("a folder").flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

/// The one template of `host`.
fn template(host: &Host) -> PathBuf {
    let templates = templates(host);
    assert_eq!(templates.len(), 1, "{templates:?}");
    templates[0].clone()
}

/// Turns one bit of a file.
fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).expect("a file");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("it is long enough");
    byte[0] ^= 0x10;
    file.write_all_at(&byte, at).expect("room");
}

fn shorten(path: &Path) {
    let file = File::options().write(true).open(path).expect("a file");
    let length = file.metadata().expect("a file").len();
    file.set_len(length / 2).expect("shorter");
}

#[test]
fn a_copy_shows_a_step_what_a_machine_that_boots_does() {
    let script = r#"
        set -e
        env | sort; id; hostname; pwd; umask; date +%Y
        ls -lR . $WORK; cat a sub/b $WORK/before
        ls / /dev /sys/block /sys/class /sys/bus/pci/devices /proc/self/fd | grep -v '^[0-9]*$'
        cat /proc/cmdline /proc/filesystems /proc/modules /proc/partitions | sort | cut -d' ' -f1,2 | sed 's/ [0-9]*$//'
        cat /proc/mounts /proc/swaps; nproc; uname -a; ulimit -a
        grep -vE 'MHz|bogomips' /proc/cpuinfo; grep -E 'MemTotal|SwapTotal' /proc/meminfo
        for i in /sys/block/vd*; do echo $i $(cat $i/serial $i/ro); done
        mkdir $WORK/out; seq 1 1000 > $WORK/out/numbers; ln -s numbers $WORK/out/link; chmod 600 $WORK/out/numbers
    "#;
    for size in ["16G", "64M"] {
        shows_the_same(script, &format!("--scratch={size}"));
    }
}

/// Asserts that `script` shows the same in a machine that boots and in a copy, with a flag.
fn shows_the_same(script: &str, flag: &str) {
    let told = ["--no-template", "--overwrite"].map(|how| {
        let host = Host::new();
        host.file("src/a", "source");
        host.file("src/sub/b", "deep");
        host.file("work/before", "from before");
        let told = host.script(&["--json", "--src=src", "--out=out", flag, how], script);
        told.ends(0, &[]);
        let events = told.events();
        let shown = events.iter().filter(|event| event["event"] == "output");
        let shown: String = shown.filter_map(|event| event["text"].as_str()).collect();
        let end = events.last().expect("an end");
        (origin(&told), shown, ["outputs", "reads", "bundle"].map(|what| end[what].clone()))
    });
    let [(boot, booted, out), (copy, copied, same_out)] = told;
    assert_eq!((boot.as_str(), copy.as_str()), ("boot", "template"));
    assert!(booted.lines().count() > 100);
    for (copied, booted) in copied.lines().zip(booted.lines()) {
        assert_eq!(copied, booted);
    }
    assert_eq!((copied.len(), same_out), (booted.len(), out));
}

#[test]
fn the_kernel_of_a_copy_is_told_that_it_is_another_machine() {
    let host = Host::new();
    // By the generation id: the kernel says so itself.
    let told = host.script(&["--json"], "dmesg | grep 'crng reseeded due to virtual machine fork'");
    told.ends(0, &[]);
    assert_eq!(origin(&told), "template");
}

#[test]
fn copies_share_no_random_number_no_boot_id_and_no_temporary_name() {
    let host = Host::new();
    let script = "cat /proc/sys/kernel/random/boot_id; cat /proc/sys/kernel/random/uuid; mktemp; mktemp -d; \
                  head -c 16 /dev/urandom | od -An -tx1; head -c 16 /dev/random | od -An -tx1; \
                  od -An -tx1 -j 0 -N 0 /dev/null; tr -cd 'A-Za-z0-9' </dev/urandom | head -c 24; echo";
    let mut seen = BTreeSet::new();
    for _ in 0..4 {
        let told = host.script(&["--quiet"], script);
        told.ends(0, &[]);
        let lines: Vec<&str> = told.text().lines().filter(|line| !line.is_empty()).collect();
        assert_eq!(lines.len(), 7, "{told:?}");
        for line in lines {
            assert!(seen.insert(line.to_owned()), "{line} comes twice");
        }
    }
}

#[test]
fn the_clock_of_a_copy_is_the_hosts_whenever_its_template_was_made() {
    let host = Host::new();
    let now = || fs::metadata(host.file("now", "")).and_then(|meta| meta.modified()).expect("a time");
    let seconds = |time: std::time::SystemTime| {
        time.duration_since(std::time::UNIX_EPOCH).expect("a time of today").as_secs()
    };
    let before = seconds(now());
    let told = host.run(&["--quiet"], &["date", "+%s"]);
    let shown: u64 = told.text().trim().parse().expect("a number");
    assert!((before..=seconds(now())).contains(&shown), "{shown}");
    let told = host.run(&["--quiet", "--clock=fixed"], &["date", "+%Y-%m-%d"]);
    assert_eq!(told.text(), "1980-01-01\n");
}

#[test]
fn a_template_that_is_not_what_was_frozen_is_noticed_and_made_anew() {
    let host = Host::without(&["templates"]);
    let run = || host.script(&["--json"], "echo right");
    assert_eq!(origin(&run()), "template");
    let size = fs::metadata(template(&host).join("state")).expect("a state").len();
    let damages: [(&str, &dyn Fn(&Path)); 7] = [
        ("memory is damaged", &|path| flip(&path.join("ram"), 20 << 20)),
        ("memory is cut short", &|path| shorten(&path.join("ram"))),
        ("state is damaged", &|path| flip(&path.join("state"), size / 2)),
        ("state is damaged", &|path| shorten(&path.join("state"))),
        ("description is damaged", &|path| shorten(&path.join("about.json"))),
        ("a part of it is missing", &|path| fs::remove_file(path.join("ram")).expect("it is there")),
        ("description is damaged", &|path| {
            let about = fs::read_to_string(path.join("about.json")).expect("text");
            let (start, end) = about.split_once("\"version\": \"").expect("a version");
            fs::write(path.join("about.json"), format!("{start}\"version\": \"9.{end}")).expect("room");
        }),
    ];
    for (words, damage) in damages {
        let before = template(&host);
        damage(&before);
        let told = run();
        told.ends(0, &[]);
        let events = told.events();
        let warned = |event: &serde_json::Value| {
            event["event"] == "warning"
                && event["text"]
                    .as_str()
                    .is_some_and(|text| text.contains(words) && text.contains("thrown away"))
        };
        assert!(events.iter().any(warned), "{words}: {events:?}");
        assert!(events.iter().any(|event| event["text"] == "right\n"), "{words}: {events:?}");
        assert_eq!(origin(&told), "template", "{words}: {events:?}");
        // Made anew once, and good from then on.
        let told = run();
        assert_eq!(origin(&told), "template", "{words}: {told:?}");
        assert!(!told.events().iter().any(|event| event["event"] == "warning"), "{words}: {told:?}");
        assert_eq!(template(&host), before);
    }
}

#[test]
fn a_run_that_lacks_memory_costs_others_no_template() {
    let host = Host::new();
    host.run(&["--json"], &["true"]).ends(0, &[]);
    let kept = BTreeSet::from_iter(templates(&host));
    let whole = host.command(&["--quiet"], &["true"]);
    let mut short = Command::new("sh");
    short
        .args(["-c", "ulimit -v 2000000; exec \"$@\"", "sh"])
        .arg(whole.get_program())
        .args(whole.get_args());
    for (name, value) in whole.get_envs() {
        match value {
            Some(value) => short.env(name, value),
            None => short.env_remove(name),
        };
    }
    host.end(&mut short, &[]).ends(125, &["Cannot allocate memory"]);
    assert_eq!(BTreeSet::from_iter(templates(&host)), kept);
    let next = host.run(&["--json"], &["true"]);
    next.ends(0, &[]);
    assert_eq!(origin(&next), "template");
}

#[test]
fn a_store_that_was_copied_has_good_templates() {
    let host = Host::without(&["templates"]);
    host.run(&[], &["true"]).ends(0, &[]);
    let path = template(&host);
    let other = path.with_extension("copy");
    let status =
        std::process::Command::new("cp").args(["-a", "--sparse=always"]).args([&path, &other]).status();
    assert!(status.expect("cp").success());
    fs::remove_dir_all(&path).and_then(|()| fs::rename(other, &path)).expect("one folder");
    let told = host.run(&["--json"], &["true"]);
    assert_eq!(origin(&told), "template");
    assert!(!told.events().iter().any(|event| event["event"] == "warning"), "{told:?}");
}

#[test]
fn several_that_need_the_same_template_make_one() {
    let host = Host::without(&["templates"]);
    let start = |_| {
        let mut kiln = host.command(&["--json", "--memory=512M"], &["echo", "right"]);
        Running::start(kiln.stdout(Stdio::piped()).stderr(Stdio::piped()))
    };
    let running: Vec<Running> = (0..3).map(start).collect();
    for running in running {
        let told = running.end();
        told.ends(0, &[]);
        assert_eq!(origin(&told), "template");
    }
    let first = template(&host);
    // Another size is another machine.
    let told = host.run(&["--json", "--memory=600M"], &["true"]);
    assert_eq!(origin(&told), "template");
    assert_eq!(templates(&host).len(), 2);
    assert!(first.is_dir());
}

#[test]
fn what_no_template_has_a_place_for_boots() {
    let host = Host::new();
    host.file("disk", vec![7; 1 << 20]);
    for how in [&["--disk=disk:/dev/mine:ro"][..], &["--wire=vsock"], &["--nested"], &["--no-template"]] {
        let told = host.run(&[&["--json"], how].concat(), &["true"]);
        told.ends(0, &[]);
        assert_eq!(origin(&told), "boot", "{how:?}");
    }
    let mut kiln = host.command(&["--json"], &["true"]);
    assert_eq!(origin(&host.end(kiln.env("KILN_TEMPLATE", "off"), &[])), "boot");
}

#[test]
fn a_template_that_cannot_be_kept_costs_time_and_no_result() {
    let host = Host::without(&["templates"]);
    let templates = host.path("store/templates");
    fs::remove_dir(&templates).and_then(|()| fs::write(&templates, "a file")).expect("it is empty");
    let told = host.run(&[], &["echo", "right"]);
    told.ends(0, &["there is no template, so the machine booted"]);
    assert_eq!(told.text(), "right\n");
}
