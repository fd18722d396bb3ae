use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use kiln_virtio::fs::record::{Assembler, Extra, Fingerprint, RecordPart};

use super::*;
use crate::machine::jail::{Held, Layer};
use crate::machine::{Accelerator, Identity, Origin};

const META: Observed = Observed::METADATA;
const FIXED: Attributes = Attributes::Fixed { mtime_seconds: 315_532_800 };

/// What a device would say of `path` beneath `share`.
fn entry(share: &Path, path: &[u8], kind: Kind, observed: Observed) -> Entry {
    let stat = rustix::fs::lstat(share.join(std::ffi::OsStr::from_bytes(path))).expect("it is there");
    let shown = |what, text: &[u8]| observed.contains(what).then(|| Digest::of(text));
    Entry {
        path: PathBytes(path.to_vec()),
        kind,
        observed,
        fingerprint: fingerprint_of(&stat),
        extra: None,
        listing: shown(Observed::LISTING, b"what a listing shows"),
        xattrs: shown(Observed::XATTRS, b""),
    }
}

fn share(name: &str, path: &Path, attributes: Attributes) -> Observable {
    let directory = fs::File::open(path).expect("directory").into();
    Observable { name: name.to_owned(), guest: format!("/ws/{name}"), attributes, directory }
}

fn record(parts: Vec<RecordPart>) -> Record {
    let mut assembler = Assembler::default();
    parts
        .into_iter()
        .chain([RecordPart::End { full: false }])
        .find_map(|part| assembler.push(part).expect("in order"))
        .expect("an end")
}

fn named(name: &str) -> PathBytes {
    PathBytes(name.as_bytes().to_vec())
}

fn written(report: &ReadsReport) -> String {
    let mut bytes = Vec::new();
    report.write(&mut bytes).expect("memory");
    String::from_utf8(bytes).expect("JSON is UTF-8")
}

/// A tree with a file of each kind, and modes that do not depend on who runs the test.
fn tree() -> tempfile::TempDir {
    let host = tempfile::tempdir().expect("a directory");
    fs::create_dir(host.path().join("d")).expect("a directory");
    for (name, content) in
        [(&b"d/empty"[..], ""), (b"d/read.c", "int x;\n"), (b"d/100%\xff", "odd"), (b"stated", "1234567")]
    {
        let path = host.path().join(std::ffi::OsStr::from_bytes(name));
        fs::write(&path, content).expect("a file");
        fs::set_permissions(&path, PermissionsExt::from_mode(0o4640)).expect("a mode");
    }
    symlink("d/read.c", host.path().join("link")).expect("a link");
    for directory in ["", "d"] {
        fs::set_permissions(host.path().join(directory), PermissionsExt::from_mode(0o755)).expect("a mode");
    }
    host
}

/// Pins the format: a change here is a change for all who read it, to docs/reads.md and maybe to the version.
#[test]
fn the_document_is_as_it_was() {
    let host = tree();
    let of = |path: &[u8], kind, observed| entry(host.path(), path, kind, observed);
    let mut null = of(b"stated", Kind::Regular, META);
    null.path = named("null");
    null.kind = Kind::Character;
    null.fingerprint = Fingerprint { mode: 0o20_666, ..Fingerprint::default() };
    null.extra = Some(Extra { rdev: 1 << 8 | 3, ..Extra::default() });
    let real = Entry {
        fingerprint: Fingerprint {
            device: 1,
            inode: 22,
            size_bytes: 333,
            mtime_nanos: 1_700_000_000_000_000_007,
            ctime_nanos: -1,
            mode: 0o100_755,
        },
        extra: Some(Extra { uid: 1000, gid: 100, nlink: 2, rdev: 0, blocks: 8, atime: (1, 2) }),
        ..of(b"stated", Kind::Regular, META)
    };
    let record = record(vec![
        RecordPart::Share(named("src")),
        RecordPart::Entries(vec![
            of(b"", Kind::Directory, META),
            of(b"d", Kind::Directory, META | Observed::LISTING | Observed::XATTRS),
            of(b"d/100%\xff", Kind::Regular, META | Observed::CONTENT),
            of(b"d/empty", Kind::Regular, META | Observed::CONTENT),
            of(b"d/read.c", Kind::Regular, META | Observed::CONTENT | Observed::XATTRS),
            of(b"link", Kind::Link, META | Observed::CONTENT),
            null,
            of(b"stated", Kind::Regular, META),
        ]),
        RecordPart::Missed(vec![named("d/none.h"), PathBytes(b"no\xfe%".to_vec())]),
        RecordPart::Share(named("host")),
        RecordPart::Entries(vec![real]),
    ]);
    let shares = [share("src", host.path(), FIXED), share("host", host.path(), Attributes::Real)];
    let held = Held {
        layers: vec![Layer::Seccomp],
        missing: vec![(Layer::Landlock, "none".to_owned())],
        landlock_abi: None,
    };
    let beside = Beside {
        machine: Some(Identity {
            backend: "qemu 10.0.2".to_owned(),
            accelerator: Accelerator::Tcg,
            jail: held,
            origin: Origin::Boot,
        }),
        root: Some(Digest::of(b"root")),
        bundle: Some(Digest::of(b"bundle")),
        unrecorded: vec!["disk /data".to_owned(), "standard input".to_owned()],
    };
    let report = report(record, &shares, beside, Some(&mut |_| {}));
    assert_eq!((report.contents(), report.paths()), ((3, 10), (9, 2)));
    assert_eq!(report.spoiled(), None);
    let document = written(&report);
    assert_eq!(document, include_str!("golden.json"), "{document}");
    serde_json::from_str::<serde_json::Value>(&document).expect("JSON");
}

#[test]
fn what_is_not_what_was_served_has_no_digest_and_spoils_the_report() {
    type Act = fn(&Path);
    let cases: [(&str, &str, Act, &str); 5] = [
        ("stated", "was modified", |path| fs::write(path, "7654321").expect("a file"), "of the same size"),
        ("stated", "vanished", |path| fs::remove_file(path).expect("it was there"), "removed"),
        (
            "link",
            "was modified",
            |path| {
                fs::remove_file(path).expect("it was there");
                symlink("d/READ.c", path).expect("a link");
            },
            "another link",
        ),
        (
            "stated",
            "was modified",
            |path| {
                fs::remove_file(path).expect("it was there");
                fs::create_dir(path).expect("a directory");
            },
            "a directory",
        ),
        (
            "d/read.c",
            "could not be read",
            |path| {
                let d = path.parent().expect("it has one");
                fs::rename(d, d.with_file_name("elsewhere")).expect("the name is free");
                symlink("elsewhere", d).expect("a link");
            },
            "a link above",
        ),
    ];
    for (path, what, act, name) in cases {
        let host = tree();
        let kind = if path == "link" { Kind::Link } else { Kind::Regular };
        let read = entry(host.path(), path.as_bytes(), kind, META | Observed::CONTENT);
        act(&host.path().join(path));
        let record = record(vec![RecordPart::Share(named("src")), RecordPart::Entries(vec![read])]);
        let report =
            report(record, &[share("src", host.path(), FIXED)], Beside::default(), Some(&mut |_| {}));
        assert_eq!(report.spoiled(), Some(format!("`/ws/src/{path}` {what} while the step ran")), "{name}");
        let document: serde_json::Value = serde_json::from_str(&written(&report)).expect("JSON");
        let share = &document["shares"][0];
        assert_eq!(
            (&document["complete"], &share["changed"][0]["path"]),
            (&false.into(), &path.into()),
            "{name}"
        );
        let of = if path == "link" { "target" } else { "content" };
        assert!(share["entries"][0][of]["digest"].is_null(), "{name}: {share}");
    }
}

#[test]
fn a_share_that_the_device_does_not_speak_of_spoils_the_report() {
    let host = tree();
    let report =
        report(Record::default(), &[share("src", host.path(), FIXED)], Beside::default(), Some(&mut |_| {}));
    assert_eq!(report.spoiled().as_deref(), Some("`/ws/src` was not recorded while the step ran"));
    assert!(!report.is_complete());
}

#[test]
fn a_content_below_a_path_longer_than_the_kernel_takes_has_its_digest() {
    let host = tempfile::tempdir().expect("a directory");
    let name = "n".repeat(200);
    let mut at = OwnedFd::from(fs::File::open(host.path()).expect("a directory"));
    let mut path = Vec::new();
    let (flags, mode) = (rustix::fs::OFlags::DIRECTORY, rustix::fs::Mode::RWXU);
    while path.len() < 5000 {
        rustix::fs::mkdirat(&at, name.as_str(), mode).expect("a directory");
        at = rustix::fs::openat(&at, name.as_str(), flags, mode).expect("a directory");
        path.extend(name.bytes().chain([b'/']));
    }
    let create = rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY;
    let file = rustix::fs::openat(&at, "deep", create, mode).expect("a file");
    rustix::io::write(&file, b"found").expect("room");
    path.extend(b"deep");
    let fingerprint = fingerprint_of(&rustix::fs::fstat(&file).expect("it is open"));
    let read = Entry {
        path: PathBytes(path),
        fingerprint,
        ..entry(host.path(), b"", Kind::Regular, META | Observed::CONTENT)
    };
    let record = record(vec![RecordPart::Share(named("src")), RecordPart::Entries(vec![read])]);
    let report = report(record, &[share("src", host.path(), FIXED)], Beside::default(), Some(&mut |_| {}));
    assert_eq!(report.spoiled(), None);
    assert_eq!(report.shares[0].contents, [Some(Digest::of(b"found"))]);
}

#[test]
fn without_hashing_counts_are_the_same() {
    let host = tree();
    let read = entry(host.path(), b"stated", Kind::Regular, META | Observed::CONTENT);
    let record = record(vec![RecordPart::Share(named("src")), RecordPart::Entries(vec![read])]);
    let report = report(record, &[share("src", host.path(), FIXED)], Beside::default(), None);
    assert_eq!((report.contents(), report.is_complete()), ((1, 7), true));
}

#[test]
fn a_folder_on_which_the_hosts_kernel_shows_itself_is_named_and_none_that_the_guest_covers() {
    let top = Path::new("/");
    let entries = || {
        RecordPart::Entries(vec![
            entry(top, b"", Kind::Directory, META),
            entry(top, b"proc", Kind::Directory, META | Observed::LISTING),
            entry(top, b"usr", Kind::Directory, META),
        ])
    };
    let record =
        record(vec![RecordPart::Share(named("src")), entries(), RecordPart::Share(named("root")), entries()]);
    let mut root = share("root", top, Attributes::Real);
    root.guest = "/".to_owned();
    let report = report(record, &[share("src", top, FIXED), root], Beside::default(), None);
    let said: Vec<String> = report.empty().collect();
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].starts_with("`/ws/src/proc` was an empty folder for the step: a proc "), "{said:?}");
    let document: serde_json::Value = serde_json::from_str(&written(&report)).expect("JSON");
    let empty = |share: usize| document["shares"][share]["empty"].clone();
    assert_eq!(empty(0), serde_json::json!([{"path": "proc", "filesystem": "proc"}]));
    assert_eq!(empty(1), serde_json::json!([]));
    assert!(report.is_complete());
}
