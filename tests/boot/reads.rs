//! What a step read, held against what it did, and the file server's bytes against the host's.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};

use kiln_digest::Digest;
use serde_json::Value;

use super::host::{Host, Running};

/// The report's entries of a share, by path.
fn entries<'a>(report: &'a Value, share: &str) -> BTreeMap<&'a str, &'a Value> {
    let shares = report["shares"].as_array().expect("shares");
    let share = shares.iter().find(|other| other["name"] == share).expect("the share");
    let entries = share["entries"].as_array().expect("entries");
    entries.iter().map(|entry| (entry["path"].as_str().expect("a path"), entry)).collect()
}

fn observed(entry: &Value) -> Vec<&str> {
    entry["observed"].as_array().expect("a list").iter().map(|word| word.as_str().expect("a word")).collect()
}

#[test]
fn a_report_says_what_was_read_asked_about_listed_and_missed() {
    let host = Host::new();
    host.file("src/read.txt", "content");
    host.file("src/stat.txt", "only looked at");
    host.file("src/unread.txt", "not touched");
    host.file("src/listed/inside.txt", "its name is seen");
    host.file("src/deep/er/file", "deep");
    host.file("src/odd %\u{fc}", "odd");
    symlink("read.txt", host.path("src/link")).expect("a link");
    let script = "
        cat read.txt deep/er/file 'odd %\u{fc}'; [ -s stat.txt ]; readlink link; ls listed
        [ -e missing.h ]; [ -e deep/missing/file ]; cat deep/er/no; true";
    let told = host.script(
        &["--src", "src", "--reads", "reads.json", "--out", "made"],
        &format!("{script}; : > $WORK/made"),
    );
    told.ends(0, &["read 3 files"]);
    let report: Value = serde_json::from_str(&host.read("reads.json")).expect("JSON");
    assert_eq!((&report["version"], &report["complete"]), (&1.into(), &true.into()));
    let entries = entries(&report, "src");
    for (path, text) in [("read.txt", "content"), ("deep/er/file", "deep"), ("odd %25\u{fc}", "odd")] {
        let entry = entries[path];
        assert!(observed(entry).contains(&"content"), "{entry}");
        assert_eq!(entry["digest"], Digest::of(text.as_bytes()).to_string(), "{path}");
        assert_eq!(entry["size"], text.len());
    }
    let looked_at = entries["stat.txt"];
    assert_eq!(observed(looked_at), ["metadata"], "{looked_at}");
    assert!(looked_at["digest"].is_null(), "{looked_at}");
    assert!(observed(entries["listed"]).contains(&"listing"));
    assert!(!observed(entries["deep"]).contains(&"listing"));
    assert_eq!(entries["link"]["digest"], Digest::of(b"read.txt").to_string());
    assert!(!entries.contains_key("unread.txt"), "{entries:?}");
    let missed = &report["shares"][0]["missed"];
    let missed: Vec<&str> = missed.as_array().expect("a list").iter().filter_map(Value::as_str).collect();
    for path in ["missing.h", "deep/missing", "deep/er/no"] {
        assert!(missed.contains(&path), "{missed:?}");
    }
    assert!(report["root"].as_str().expect("a digest").len() >= 64);
}

#[test]
fn a_file_that_changes_while_it_is_read_spoils_the_report() {
    let host = Host::new();
    host.file("src/a", "1");
    let mut command = host.command(
        &["--src", "src", "--reads", "reads.json", "--stdin"],
        &["sh", "-c", "cat a; echo; read go; cat a"],
    );
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = Running::start(&mut command);
    child.read_until("1\n");
    host.file("src/a", "another");
    child.stdin.as_mut().expect("it is piped").write_all(b"go\n").expect("a pipe");
    let group = child.id();
    child.end().ends(0, &["spoiled", "/ws/project/a"]);
    let report: Value = serde_json::from_str(&host.read("reads.json")).expect("JSON");
    assert_eq!(report["complete"], false);
    assert_eq!(report["shares"][0]["changed"][0]["path"], "a");
    host.is_clean(group);
}

#[test]
fn a_large_tree_reads_as_it_does_on_the_host() {
    let host = Host::new();
    let mut state = 1_u64;
    let mut random = move |limit: u64| {
        // Knuth's MMIX generator.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % limit
    };
    for number in 0..2000_u64 {
        let bytes = match number {
            0 => 5_000_003,
            1..50 => 0,
            50..60 => 4096 * (number - 49),
            _ => random(9000),
        };
        let content: Vec<u8> = (0..bytes).map(|_| random(256).to_le_bytes()[0]).collect();
        let folder = match number % 7 {
            0 => "wide".to_owned(),
            1 => format!(
                "deep/{}",
                (0..number % 40).map(|level| level.to_string()).collect::<Vec<_>>().join("/")
            ),
            rest => format!("d{rest}/with space {}", random(30)),
        };
        host.file(
            &format!("src/{folder}/f{number} {}", "n".repeat(usize::try_from(number % 100).expect("small"))),
            content,
        );
    }
    let walk = "find . -type f -print0 | sort -z | xargs -0 sha256sum; find . | sort | sha256sum";
    let ours = Command::new("/bin/busybox").args(["sh", "-c", walk]).current_dir(host.path("src")).output();
    let ours = String::from_utf8(ours.expect("busybox").stdout).expect("text");
    assert_eq!(ours.lines().count(), 2001);
    let told = host.script(&["--src", "src", "--reads", "reads.json"], walk);
    told.ends(0, &["read 2000 files"]);
    for (ours, theirs) in ours.lines().zip(told.text().lines()) {
        assert_eq!(theirs, ours);
    }
    assert_eq!(told.text().len(), ours.len());
    let report: Value = serde_json::from_str(&host.read("reads.json")).expect("JSON");
    let entries = entries(&report, "src");
    for line in ours.lines().take(2000) {
        let (digest, path) = line.split_once("  ./").expect("a line of sha256sum");
        assert_eq!(entries[path]["digest"], digest, "{path}");
    }
    let folders = entries.values().filter(|entry| entry["kind"] == "directory").count();
    let listed = entries.values().filter(|entry| observed(entry).contains(&"listing")).count();
    assert_eq!(folders, listed, "every folder was listed");
    assert!(fs::metadata(host.path("reads.json")).expect("it is there").len() > 100_000);
}
