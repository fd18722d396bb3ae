//! What the record says of what a guest did.

use std::os::unix::fs::symlink;

use super::*;
use crate::fs::record::{Change, Kind, Observed, PathBytes};

fn observed(record: &ShareRecord) -> Vec<(String, Observed)> {
    record.entries.iter().map(|entry| (entry.path.to_string(), entry.observed)).collect()
}

const META: Observed = Observed::METADATA;
const CONTENT: Observed = Observed::METADATA.union(Observed::CONTENT);

#[test]
fn each_question_is_noted_as_what_it_is() {
    let host = tempfile::tempdir().expect("directory");
    for directory in ["listed", "passed"] {
        std::fs::create_dir(host.path().join(directory)).expect("directory");
        std::fs::write(host.path().join(directory).join("f"), "x").expect("file");
    }
    for file in ["read", "stated", "unseen", "asked"] {
        std::fs::write(host.path().join(file), file).expect("file");
    }
    std::fs::write(host.path().join("empty"), "").expect("file");
    symlink("target", host.path().join("link")).expect("link");
    symlink("target", host.path().join("unread")).expect("link");
    let mut guest = Guest::of(host.path(), EPOCH);
    let read = guest.walk("s/read");
    guest.read(read, 0, 1).expect("read");
    let link = guest.walk("s/link");
    guest.ask(op::READLINK, link, b"").expect("text");
    let listed = guest.walk("s/listed");
    guest.names(listed);
    let asked = guest.walk("s/asked");
    guest.ask(op::LISTXATTR, asked, &[0; 8]).expect("attributes");
    for path in ["s/stated", "s/empty", "s/unread", "s/passed/f"] {
        guest.walk(path);
    }
    let root = guest.walk("s");
    let passed = guest.walk("s/passed");
    for (directory, name) in [(root, "no"), (passed, "neither"), (root, "a-no"), (root, "no")] {
        guest.lookup(directory, name.as_bytes()).expect("absent");
    }
    let record = guest.share_record();
    let expected = [
        ("", META),
        ("asked", META | Observed::XATTRS),
        ("empty", CONTENT),
        ("link", CONTENT),
        ("listed", META | Observed::LISTING),
        ("passed", META),
        ("passed/f", META),
        ("read", CONTENT),
        ("stated", META),
        ("unread", META),
    ];
    assert_eq!(observed(&record), expected.map(|(path, what)| (path.to_owned(), what)));
    let missed: Vec<_> = record.missed.iter().map(PathBytes::to_string).collect();
    assert_eq!(missed, ["a-no", "no", "passed/neither"]);
    assert_eq!(record.changed, []);
    let read = &record.entries[7];
    assert_eq!((read.kind, read.fingerprint.size_bytes), (Kind::Regular, 4));
    let record = guest.record();
    assert!(record.complete);
    let text = serde_json::to_string(&record).expect("text");
    assert_eq!(serde_json::from_str::<Record>(&text).expect("record"), record);
}

#[test]
fn a_listing_alone_does_not_ask_about_the_entries() {
    let host = tempfile::tempdir().expect("directory");
    std::fs::write(host.path().join("f"), "x").expect("file");
    let mut guest = Guest::of(host.path(), EPOCH);
    let root = guest.walk("s");
    guest.names(root);
    assert_eq!(observed(&guest.share_record()), [(String::new(), META | Observed::LISTING)]);
}

#[test]
fn an_empty_share_that_nobody_entered_has_an_empty_record() {
    let host = tempfile::tempdir().expect("directory");
    let guest = Guest::of(host.path(), EPOCH);
    let record = guest.share_record();
    assert_eq!((record.entries, record.missed, record.changed), (vec![], vec![], vec![]));
    assert_eq!(record.name.0, b"s");
}

#[test]
fn what_changes_while_it_is_served_spoils_the_record() {
    type Act = fn(&std::path::Path);
    let cases: [(&str, Act, Option<Change>); 6] = [
        ("left alone", |_| {}, None),
        ("written", |path| std::fs::write(path.join("f"), "other").expect("file"), Some(Change::Modified)),
        (
            "replaced",
            |path| {
                std::fs::write(path.join("new"), "content").expect("file");
                std::fs::rename(path.join("new"), path.join("f")).expect("rename");
            },
            None,
        ),
        (
            "touched",
            |path| {
                let file = File::options().write(true).open(path.join("f")).expect("file");
                file.set_modified(std::time::UNIX_EPOCH).expect("time");
            },
            Some(Change::Modified),
        ),
        ("removed", |path| std::fs::remove_file(path.join("f")).expect("remove"), Some(Change::Modified)),
        ("a new neighbour", |path| std::fs::write(path.join("new"), "").expect("file"), None),
    ];
    for (name, act, expected) in cases {
        let host = tempfile::tempdir().expect("directory");
        std::fs::write(host.path().join("f"), "content").expect("file");
        let mut guest = Guest::of(host.path(), EPOCH);
        let node = guest.walk("s/f");
        guest.read(node, 0, 100).expect("read");
        act(host.path());
        let changed = guest.share_record().changed;
        // A file that was replaced is still what was read: the fingerprint tells it from the new one. (Its
        // link count, and so its change time, differ.)
        let expected = if name == "replaced" { Some(Change::Modified) } else { expected };
        assert_eq!(changed.iter().map(|entry| entry.what).next(), expected, "{name}");
    }
}

#[test]
fn a_change_between_stat_and_read_is_noticed() {
    let host = tempfile::tempdir().expect("directory");
    for name in ["written", "removed", "swapped"] {
        std::fs::write(host.path().join(name), "content").expect("file");
    }
    let mut guest = Guest::of(host.path(), EPOCH);
    let nodes = ["written", "removed", "swapped"].map(|name| guest.walk(&format!("s/{name}")));
    std::fs::write(host.path().join("written"), "different").expect("file");
    std::fs::remove_file(host.path().join("removed")).expect("remove");
    std::fs::rename(host.path().join("written"), host.path().join("swapped")).expect("rename");
    std::fs::write(host.path().join("written"), "another").expect("file");
    assert_eq!(guest.read(nodes[0], 0, 100), Err(libc::ESTALE));
    assert_eq!(guest.read(nodes[1], 0, 100), Err(libc::ENOENT));
    assert_eq!(guest.read(nodes[2], 0, 100), Err(libc::ESTALE));
    let changed = guest.share_record().changed;
    let changed: Vec<_> = changed.iter().map(|entry| (entry.path.to_string(), entry.what)).collect();
    let expected =
        [("removed", Change::Vanished), ("swapped", Change::Replaced), ("written", Change::Replaced)];
    assert_eq!(changed, expected.map(|(path, what)| (path.to_owned(), what)));
}

#[test]
fn a_listed_directory_that_changes_spoils_the_record() {
    for listed in [false, true] {
        let host = tempfile::tempdir().expect("directory");
        std::fs::create_dir(host.path().join("d")).expect("directory");
        std::fs::write(host.path().join("d/f"), "x").expect("file");
        let mut guest = Guest::of(host.path(), EPOCH);
        let directory = guest.walk("s/d");
        guest.walk("s/d/f");
        if listed {
            guest.names(directory);
        }
        std::fs::write(host.path().join("d/new"), "x").expect("file");
        // The index is of one moment: what came later is not there.
        assert_eq!(guest.lookup(directory, b"new").expect("absent").nodeid.get(), 0);
        let changed = guest.share_record().changed;
        assert_eq!(changed.first().map(|entry| entry.what), listed.then_some(Change::Modified));
    }
}

#[test]
fn taking_the_record_leaves_the_guest_served() {
    let host = tempfile::tempdir().expect("directory");
    std::fs::write(host.path().join("f"), "content").expect("file");
    let mut guest = Guest::of(host.path(), EPOCH);
    let node = guest.walk("s/f");
    guest.read(node, 0, 100).expect("read");
    let first = guest.record();
    assert_eq!(guest.read(node, 0, 100), Ok(b"content".to_vec()));
    assert_eq!(guest.record(), first);
}

#[test]
fn escaped_paths_come_back_and_malformed_ones_do_not() {
    for bytes in [b"".as_slice(), b"plain", b"%", b"100%25", b"\xff\xfe", "é\u{1}".as_bytes(), b"%\xc3"] {
        let path = PathBytes(bytes.to_vec());
        assert_eq!(PathBytes::from_escaped(&path.to_string()), Some(path));
    }
    for text in ["%", "%2", "%zz", "a%+1", "%é"] {
        assert_eq!(PathBytes::from_escaped(text), None, "{text}");
    }
}
