//! What a step read, held against what it did, and the file server's bytes against the host's.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use kiln_digest::Digest;
use serde_json::Value;

use super::host::{Host, Running, started_by};

/// The document's entries of a share, by path.
pub fn entries<'a>(report: &'a Value, share: &str) -> BTreeMap<&'a str, &'a Value> {
    let entries = of_share(report, share)["entries"].as_array().expect("entries");
    entries.iter().map(|entry| (entry["path"].as_str().expect("a path"), entry)).collect()
}

/// What the document says of a share.
pub fn of_share<'a>(report: &'a Value, share: &str) -> &'a Value {
    let shares = report["shares"].as_array().expect("shares");
    shares.iter().find(|other| other["name"] == share).expect("the share")
}

/// What was asked about an entry, beyond its path and kind.
fn asked(entry: &Value) -> Vec<&str> {
    let members = entry.as_object().expect("an object").keys().map(String::as_str);
    members.filter(|member| !matches!(*member, "path" | "kind")).collect()
}

#[test]
fn a_report_says_what_was_read_asked_about_listed_and_missed() {
    let host = Host::new();
    host.file("src/read.txt", "content");
    host.file("src/stat.txt", "only looked at");
    host.file("src/unread.txt", "not touched");
    host.file("src/listed/inside.txt", "its name is seen");
    host.file("src/listed/z-", "and this one's");
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
    assert_eq!((&report["format"], &report["version"]), (&"kiln-reads".into(), &1.into()));
    assert_eq!((&report["complete"], &report["unrecorded"]), (&true.into(), &Value::Array(Vec::new())));
    let entries = entries(&report, "src");
    for (path, text) in [("read.txt", "content"), ("deep/er/file", "deep"), ("odd %25\u{fc}", "odd")] {
        let entry = entries[path];
        assert_eq!(entry["content"]["digest"], Digest::of(text.as_bytes()).to_string(), "{path}");
        assert_eq!(entry["content"]["size"], text.len());
    }
    assert_eq!(asked(entries["stat.txt"]), ["metadata"]);
    assert_eq!(asked(entries["listed"]), ["listing", "metadata"]);
    assert!(!asked(entries["deep"]).contains(&"listing"));
    assert!(!entries.contains_key("unread.txt"), "{entries:?}");
    let missed = of_share(&report, "src")["missed"].as_array().expect("a list");
    let missed: Vec<&str> = missed.iter().filter_map(Value::as_str).collect();
    for path in ["missing.h", "deep/missing", "deep/er/no"] {
        assert!(missed.contains(&path), "{missed:?}");
    }
    for digest in ["root", "bundle"] {
        assert_eq!(report[digest].as_str().expect("a digest").len(), 64);
    }
    // As docs/reads.md has it.
    for (path, member, command) in [
        ("stat.txt", "metadata", r"find stat.txt -maxdepth 0 -printf '%y %m %s\n' | sha256sum"),
        ("listed", "metadata", r"find listed -maxdepth 0 -printf '%y %m\n' | sha256sum"),
        (
            "listed",
            "listing",
            r"find listed -mindepth 1 -maxdepth 1 -printf '%y%f\0' | LC_ALL=C sort -z | sha256sum",
        ),
        ("link", "target", "find link -maxdepth 0 -printf '%l' | sha256sum"),
        ("read.txt", "content", "sha256sum <read.txt"),
    ] {
        let printed = Command::new("sh").args(["-c", command]).current_dir(host.path("src")).output();
        let printed = String::from_utf8(printed.expect("a shell").stdout).expect("text");
        let digest = entries[path][member]["digest"].as_str().expect("a digest");
        assert_eq!(printed.split(' ').next(), Some(digest), "{path} {member}");
    }
}

#[test]
#[ignore = "takes minutes: `ci/test slow` runs it"]
fn what_no_share_carries_is_named_and_endless_missing_names_end_the_run() {
    let host = Host::new();
    host.file("src/f", "x");
    // Names in an order of their own, none twice: each costs the record 64 + 250 + 16 bytes of 64 MiB.
    let program = "BEGIN { for (i = 0; i < 210000; i++) { n = sprintf(\"%0250d\", i); getline < n } }";
    let mut command = host.command(
        &["--src", "src", "--stdin", "--reads", "reads.json", "--work", "work", "--out", "made"],
        &["sh", "-c", "awk \"$1\"; : > $WORK/made", "sh", program],
    );
    let told = host.end(&mut command, b"input");
    told.ends(
        125,
        &["looked for more absent files than can be recorded (64 MiB of names)", "nothing was merged"],
    );
    assert!(!host.path("work/made").exists() && !host.path("reads.json").exists());
    let told = host.script(&["--src", "src", "--stdin", "--reads", "reads.json"], "cat f");
    told.ends(0, &[]);
    let report: Value = serde_json::from_str(&host.read("reads.json")).expect("JSON");
    assert_eq!(report["unrecorded"], serde_json::json!(["standard input"]));
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
    assert_eq!(of_share(&report, "src")["changed"][0]["path"], "a");
    host.is_clean(group);
}

#[test]
fn what_is_mounted_below_a_share_is_shown_unless_it_is_the_hosts_kernel_itself() {
    let host = Host::new();
    host.folder("src/disk");
    for name in ["src/bound", "src/version"] {
        host.file(name, "beneath");
    }
    host.file("elsewhere", "above");
    let mounts =
        "mount -t tmpfs none src/disk && echo there >src/disk/file && mount --bind elsewhere src/bound &&
        mount --bind /proc/version src/version && exec \"$@\" || exit 77";
    let script = "cat disk/file bound; echo; cat version || echo refused";
    let run = host.command(&["--src", "src", "--reads", "reads.json"], &["sh", "-c", script]);
    let mut command = started_by(&["unshare", "-m", "sh", "-c", mounts, "sh"], &run);
    let told = host.end(command.process_group(0), &[]);
    if told.cannot_mount() {
        return;
    }
    told.ends(0, &["Operation not supported"]);
    assert_eq!(told.text(), "there\nabove\nrefused\n");
    let report: Value = serde_json::from_str(&host.read("reads.json")).expect("JSON");
    let entries = entries(&report, "src");
    for (path, text) in [("disk/file", "there\n"), ("bound", "above")] {
        assert_eq!(entries[path]["content"]["digest"], Digest::of(text.as_bytes()).to_string(), "{path}");
    }
    assert!(entries.get("version").is_none_or(|entry| entry.get("content").is_none()), "{entries:?}");
}

/// Root may read everything; the stage of users runs this too.
#[test]
fn what_kiln_may_not_read_the_step_may_not_either_and_the_record_says_so() {
    let host = Host::new();
    host.file("src/open", "1");
    host.file("src/closed/inside", "2");
    let secret = host.file("src/secret", "3");
    if rustix::process::geteuid().is_root() {
        return;
    }
    let closed = host.path("src/closed");
    for path in [&secret, &closed] {
        fs::set_permissions(path, PermissionsExt::from_mode(0o000)).expect("a mode");
    }
    let told = host.script(
        &["--src", "src", "--reads", "reads.json"],
        "cat open; echo; cat secret || echo refused; cat closed/inside || echo refused",
    );
    fs::set_permissions(&closed, PermissionsExt::from_mode(0o755)).expect("a mode");
    told.ends(0, &["Permission denied", "could not be read"]);
    assert_eq!(told.text(), "1\nrefused\nrefused\n");
    let report: Value = serde_json::from_str(&host.read("reads.json")).expect("JSON");
    assert_eq!(report["complete"], false);
}

#[test]
fn a_folder_on_which_the_hosts_kernel_shows_itself_is_empty_and_the_run_says_so() {
    let host = Host::new();
    host.file("src/sub/a", "1");
    host.folder("src/sub/system");
    host.folder("src/other");
    // Two mounts, of which the step comes upon one.
    let mounts =
        "mount -t proc none src/sub/system && mount -t proc none src/other && exec \"$@\" || exit 77";
    let run =
        host.command(&["--src", "src", "--reads", "reads.json"], &["sh", "-c", "cat sub/a; ls sub/system"]);
    let mut command = started_by(&["unshare", "-m", "sh", "-c", mounts, "sh"], &run);
    let told = host.end(command.process_group(0), &[]);
    if told.cannot_mount() {
        return;
    }
    let said =
        "`/ws/project/sub/system` was an empty folder for the step: a proc of the host's is mounted there";
    told.ends(0, &[said]);
    assert_eq!((told.text(), told.stderr.matches("warning: ").count()), ("1", 1), "{told:?}");
    let report: Value = serde_json::from_str(&host.read("reads.json")).expect("JSON");
    assert_eq!(report["complete"], true);
    let empty = &of_share(&report, "src")["empty"];
    assert_eq!(*empty, serde_json::json!([{"path": "sub/system", "filesystem": "proc"}]));
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
        assert_eq!(entries[path]["content"]["digest"], digest, "{path}");
    }
    let folders = entries.values().filter(|entry| entry["kind"] == "directory").count();
    let listed = entries.values().filter(|entry| !entry["listing"].is_null()).count();
    assert_eq!(folders, listed, "every folder was listed");
    assert!(fs::metadata(host.path("reads.json")).expect("it is there").len() > 100_000);
}
