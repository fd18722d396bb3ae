//! What the record says of what a guest did.

use std::os::unix::fs::symlink;

use kiln_digest::Digest;

use super::*;
use crate::fs::record::{Change, Entry, Extra, Fingerprint, Kind, Observed, PathBytes, RecordPart};

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
    let missed: Vec<_> = record.missed.iter().map(|path| path.to_string()).collect();
    assert_eq!(missed, ["a-no", "no", "passed/neither"]);
    assert_eq!(record.changed, []);
    let read = record.entries.iter().nth(7).expect("it is there");
    assert_eq!((read.kind, read.fingerprint.size_bytes), (Kind::Regular, 4));
    let record = guest.record();
    assert!(!record.full);
    let text = serde_json::to_string(&record).expect("text");
    assert_eq!(serde_json::from_str::<Record>(&text).expect("record"), record);
}

#[test]
fn what_was_shown_is_in_the_record_as_the_host_has_it() {
    use std::os::unix::fs::MetadataExt;
    let host = tempfile::tempdir().expect("directory");
    for name in ["b", "a-b", "a"] {
        std::fs::write(host.path().join(name), name).expect("file");
    }
    std::fs::create_dir(host.path().join("a.d")).expect("directory");
    symlink("a", host.path().join("link")).expect("link");
    for (attributes, is_real) in [(EPOCH, false), (Attributes::Real, true)] {
        let mut guest = Guest::of(host.path(), attributes);
        let root = guest.walk("s");
        guest.names(root);
        for path in ["s/a-b", "s/a.d", "s/link"] {
            guest.walk(path);
        }
        let record = guest.share_record();
        let number = |name: &str| match host.path().join(name).symlink_metadata() {
            Ok(meta) if is_real => format!("/{}", meta.ino()),
            _ => String::new(),
        };
        let listed = ["da.d", "fa", "fa-b", "fb", "llink"];
        let listed: String = listed.iter().map(|item| format!("{item}{}\0", number(&item[1..]))).collect();
        let listing = record.entries.iter().next().and_then(|root| root.listing);
        assert_eq!(listing, Some(Digest::of(listed.as_bytes())));
        let lines: Vec<_> = record.entries.iter().map(|entry| entry.metadata_line(attributes)).collect();
        let expected = ["", "a-b", "a.d", "link"].map(|name| {
            let meta = host.path().join(name).symlink_metadata().expect("it is there");
            let kind = if meta.is_dir() {
                'd'
            } else if meta.is_symlink() {
                'l'
            } else {
                'f'
            };
            let real = format!(
                " {} {} {} {} {} {}.{:09} {}.{:09} {}.{:09}",
                meta.uid(),
                meta.gid(),
                meta.nlink(),
                meta.ino(),
                meta.blocks(),
                meta.atime(),
                meta.atime_nsec(),
                meta.mtime(),
                meta.mtime_nsec(),
                meta.ctime(),
                meta.ctime_nsec()
            );
            let size = if is_real || kind != 'd' { format!(" {}", meta.size()) } else { String::new() };
            format!("{kind} {:o}{size}{}\n", meta.mode() & 0o7777, if is_real { &real } else { "" })
        });
        assert_eq!(lines, expected);
    }
}

#[test]
fn a_device_node_is_shown_with_its_number() {
    let mut entry = Entry {
        path: PathBytes(b"null".to_vec()),
        kind: Kind::Character,
        observed: Observed::METADATA,
        fingerprint: Fingerprint { mode: 0o20_666, ..Fingerprint::default() },
        extra: Some(Extra { rdev: 1 << 8 | 3, ..Extra::default() }),
        listing: None,
        xattrs: None,
    };
    assert_eq!(entry.metadata_line(EPOCH), "c 666 1:3\n");
    // new_encode_dev() of 4095:1048575.
    entry.extra = Some(Extra { rdev: 0xffff_ffff, ..Extra::default() });
    assert_eq!(entry.metadata_line(EPOCH), "c 666 4095:1048575\n");
}

#[test]
fn an_absence_for_which_there_is_no_room_is_not_told() {
    let host = tempfile::tempdir().expect("directory");
    std::fs::write(host.path().join("f"), "x").expect("file");
    let mut guest = Guest::with(Settings { missed_bytes: 300, ..Settings::default() });
    guest.share("s", host.path(), EPOCH);
    guest.init();
    let root = guest.walk("s");
    let mut lookup = |name: &str| guest.lookup(root, name.as_bytes()).map(|entry| entry.nodeid.get() != 0);
    for name in ["no-1", "no-2", "no-3", "no-1"] {
        assert_eq!(lookup(name), Ok(false), "{name}");
    }
    assert_eq!(lookup("no-4"), Err(libc::EIO));
    assert_eq!((lookup("no-2"), lookup("f")), (Ok(false), Ok(true)), "what is noted stays answered");
    let record = guest.record();
    assert!(record.full);
    assert_eq!(record.shares[0].missed.len(), 3);
}

#[test]
fn a_file_that_shrinks_while_it_is_read_spoils_the_record() {
    let host = tempfile::tempdir().expect("directory");
    std::fs::write(host.path().join("f"), "content").expect("file");
    let mut guest = Guest::of(host.path(), EPOCH);
    let node = guest.walk("s/f");
    assert_eq!(guest.read(node, 0, 100), Ok(b"content".to_vec()));
    assert!(guest.share_record().changed.is_empty(), "the end of a file is no change");
    let file = File::options().write(true).open(host.path().join("f")).expect("file");
    guest.read(node, 0, 1).expect("it is open");
    file.set_len(3).expect("length");
    assert_eq!(guest.read(node, 0, 100), Ok(b"con".to_vec()));
    let noted = guest.shares.with_tree(|tree| {
        let mut changed = Vec::new();
        // Before what is open is looked at again.
        let exported: Result<(), ()> = tree.export(|part| {
            if let RecordPart::Changed(part) = part {
                changed.extend(part);
            }
            Ok(())
        });
        exported.map(|()| changed)
    });
    assert_eq!(noted.expect("parts")[0].what, Change::Modified);
}

#[test]
fn extended_attributes_that_change_between_two_questions_spoil_the_record() {
    let host = tempfile::tempdir().expect("directory");
    let path = host.path().join("f");
    std::fs::write(&path, "x").expect("file");
    let set = |value: &[u8]| rustix::fs::setxattr(&path, "user.k", value, rustix::fs::XattrFlags::empty());
    if set(b"one").is_err() {
        eprintln!("skipped: no extended attributes here");
        return;
    }
    let mut guest = Guest::of(host.path(), EPOCH);
    let node = guest.walk("s/f");
    let ask = |guest: &mut Guest| guest.ask(op::GETXATTR, node, b"\x10\0\0\0\0\0\0\0user.k\0");
    assert_eq!(ask(&mut guest), Ok(b"one".to_vec()));
    let record = guest.share_record();
    assert!(record.changed.is_empty());
    let shown = record.entries.iter().find_map(|entry| entry.xattrs);
    assert_eq!(shown, Some(Digest::of(b"user.k\x003\0one")));
    set(b"two").expect("attribute");
    assert_eq!(ask(&mut guest), Ok(b"two".to_vec()));
    assert_eq!(guest.share_record().changed[0].what, Change::Modified);
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
    assert!(record.entries.is_empty() && record.missed.is_empty() && record.changed.is_empty());
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
        assert_eq!(path.clone().into_text(), path.to_string());
        assert_eq!(PathBytes::from_escaped(&path.to_string()), Some(path));
    }
    for text in ["%", "%2", "%zz", "a%+1", "%é"] {
        assert_eq!(PathBytes::from_escaped(text), None, "{text}");
    }
}
