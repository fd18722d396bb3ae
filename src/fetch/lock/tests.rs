//! What is written reads back, and what cannot be a lock is refused with its line.

use std::fs;
use std::path::Path;
use std::sync::Barrier;
use std::thread;

use super::difference::{Detail, Fate, between};
use super::*;

fn package(name: &str) -> LockedPackage {
    LockedPackage {
        name: name.into(),
        version: "1:2.3-4+b1".into(),
        architecture: "amd64".into(),
        suite: "bookworm".into(),
        path: format!("pool/main/{name}.deb"),
        size: 12,
        sha256: Digest::of(name.as_bytes()),
    }
}

fn git(rev: &str, digit: char) -> LockedGit {
    LockedGit {
        url: "https://example.org/r.git".into(),
        rev: rev.into(),
        commit: digit.to_string().repeat(40),
        size: 3,
        sha256: Digest::of(&[u8::try_from(digit).expect("a digit")]),
    }
}

fn lock() -> Lock {
    let index = LockedIndex {
        suite: "bookworm".into(),
        date: Timestamp::from_second(1_795_252_544).expect("a time"),
        sha256: Digest::of(b"index"),
    };
    let mut lock = Lock::default();
    lock.set_root(LockedRoot {
        spec: "debian:bookworm+make".into(),
        indexes: vec![index.clone()],
        packages: vec![package("base-files"), package("make")],
    });
    lock.set_toolbox(LockedRoot {
        spec: "debian:trixie+strace".into(),
        indexes: vec![index.clone()],
        packages: vec![package("strace")],
    });
    lock.set_kernel(LockedKernel {
        spec: "debian:trixie".into(),
        release: "6.12".into(),
        indexes: vec![index],
        package: package("linux-image"),
    });
    lock.set_git(git("v1", 'a'));
    lock.set_source(LockedSource {
        url: "https://example.org/a?b=\"c\"".into(),
        size: 12,
        sha256: Digest::of(b"source"),
    });
    lock
}

#[test]
fn what_is_written_reads_back() {
    let lock = lock();
    assert_eq!(Lock::parse(&lock.to_text(), Path::new("kiln.lock")).expect("own text"), lock);
    assert_eq!(lock.root("debian:bookworm+make").expect("locked").source_date_epoch(), 1_795_252_544);
}

#[test]
fn saving_replaces_the_file_whole_and_loading_nothing_is_empty() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("kiln.lock");
    assert_eq!(Lock::load(&path).expect("none"), Lock::default());
    Lock::change(&path, |old| *old = lock()).expect("written");
    assert_eq!(Lock::load(&path).expect("read"), lock());
    assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 1, "no temporary file is left");
}

#[test]
fn errors_name_the_line() {
    let text = lock().to_text();
    let path = Path::new("kiln.lock");
    let line_of_size = text.lines().position(|line| line.contains("make.deb")).expect("there") + 1;
    let broken = text.replace("make.deb\", size = 12", "make.deb\", size = true");
    let error = Lock::parse(&broken, path).expect_err("a flag is no size");
    assert!(error.to_string().contains(&format!("line {line_of_size}")), "{error}");
    let error = Lock::parse(&text.replace("version = 1\n", "version = 9\n"), path).expect_err("later");
    assert!(matches!(error, LockError::Version { found: 9, .. }));
    for path_in_archive in ["../../etc/passwd", "/etc/passwd", "pool/a b", "pool/\\u0007"] {
        let evil = text.replace("pool/main/make.deb", path_in_archive);
        assert!(matches!(Lock::parse(&evil, path), Err(LockError::Malformed { .. })), "{path_in_archive}");
    }
    let cut = &text[..text.len() - 40];
    assert!(matches!(Lock::parse(cut, path), Err(LockError::Malformed { .. })));
}

#[test]
fn what_a_merge_left_a_later_table_and_a_commit_that_is_none_are_refused_by_line() {
    let text = lock().to_text();
    let path = Path::new("kiln.lock");
    let error = Lock::parse(&text.replacen("[[kernel]]", "<<<<<<< ours\n[[kernel]]", 1), path)
        .expect_err("two sides");
    assert!(
        error.to_string().contains("line 4") && error.hint().expect("one").contains("one side"),
        "{error}"
    );
    let error = Lock::parse(&format!("{text}\n[[request]]\nurl = \"x\"\n"), path).expect_err("not yet");
    assert!(error.to_string().contains("request"), "{error}");
    // Of a later version nothing else is looked at.
    let later = format!("{}\n[[request]]\n", text.replace("version = 1\n", "version = 2\n"));
    assert!(matches!(Lock::parse(&later, path), Err(LockError::Version { found: 2, .. })));
    for commit in ["main", &"A".repeat(40), &"a".repeat(39)] {
        let evil = text.replace(&"a".repeat(40), commit);
        assert!(matches!(Lock::parse(&evil, path), Err(LockError::Malformed { .. })), "{commit}");
    }
    let twice = format!(
        "{text}\n[[git]]{}",
        text.split("[[git]]").nth(1).expect("one").split("[[").next().expect("it")
    );
    assert!(Lock::parse(&twice, path).expect_err("twice").to_string().contains("locked twice"));
}

#[test]
fn of_many_that_lock_different_things_at_once_none_takes_away_what_another_wrote() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("kiln.lock");
    let start = Barrier::new(16);
    thread::scope(|scope| {
        for number in 0..16 {
            let (path, start) = (&path, &start);
            scope.spawn(move || {
                start.wait();
                for round in 0..5 {
                    let rev = format!("v{number}.{round}");
                    Lock::change(path, |lock| lock.set_git(git(&rev, 'b'))).expect("written");
                }
            });
        }
    });
    assert_eq!(Lock::load(&path).expect("read").gits().count(), 80);
    assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 1);
}

#[test]
fn a_lock_that_is_a_link_stays_one_and_one_that_is_the_same_is_not_written() {
    let folder = tempfile::tempdir().expect("a folder");
    let (link, real) = (folder.path().join("kiln.lock"), folder.path().join("real.lock"));
    fs::write(&real, Lock::default().to_text()).expect("room");
    std::os::unix::fs::symlink("real.lock", &link).expect("room");
    Lock::change(&link, |old| *old = lock()).expect("written");
    assert!(fs::symlink_metadata(&link).expect("there").is_symlink());
    assert_eq!(Lock::load(&real).expect("read"), lock());
    fs::write(&real, format!("{}# a note\n", lock().to_text())).expect("room");
    Lock::change(&link, |_| ()).expect("nothing to write");
    assert!(fs::read_to_string(&real).expect("there").ends_with("# a note\n"));
}

#[test]
fn a_difference_names_every_package_that_is_another_and_what_should_never_be() {
    let before = lock();
    let mut after = lock();
    let mut root = after.root("debian:bookworm+make").expect("locked").clone();
    root.indexes[0].date = Timestamp::from_second(1_795_252_999).expect("a time");
    root.packages[0].sha256 = Digest::of(b"other bytes");
    root.packages[1].version = "9".into();
    root.packages[1].sha256 = Digest::of(b"9");
    root.packages.push(package("zlib"));
    after.set_root(root);
    after.set_git(git("v1", 'c'));
    let mut source = after.source("https://example.org/a?b=\"c\"").expect("locked").clone();
    source.sha256 = Digest::of(b"other");
    after.set_source(source);
    after.retain(|entry| entry.kind() != "toolbox");

    let changes = between(&before, &after);
    let of = |kind: &str| changes.iter().find(|change| change.kind == kind).expect("changed");
    let root = &of("root").details;
    assert!(matches!(&root[0], Detail::Index { before: Some(_), after: Some(_), .. }), "{root:?}");
    assert!(matches!(&root[1], Detail::SameVersion { after, .. } if after.name == "base-files"), "{root:?}");
    assert!(matches!(&root[2], Detail::Version { after, .. } if after.version == "9"), "{root:?}");
    assert!(matches!(&root[3], Detail::Added(package) if package.name == "zlib"), "{root:?}");
    assert_eq!((root.len(), of("toolbox").fate, changes.len()), (4, Fate::Removed, 4));
    assert!(matches!(of("git").details[..], [Detail::Commit { .. }]));
    assert!(matches!(of("source").details[..], [Detail::Bytes { .. }]));
    let alarms =
        changes.iter().flat_map(|change| &change.details).filter(|detail| detail.is_alarming()).count();
    assert_eq!(alarms, 3);
    assert!(between(&after, &after).is_empty());
}
