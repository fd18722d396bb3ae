//! Names and links that are legal and odd, from end to end: as inputs in a share, in the record of what was read, as outputs
//! in WORK and in their manifest, byte for byte.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use kiln_artifact::tree::{Kind, Tree, TreePath};
use kiln_digest::Digest;
use kiln_virtio::fs::record::PathBytes;
use kiln_virtio::fs::{Open, open_beneath};
use rustix::fs::{Mode, OFlags, XattrFlags};
use serde_json::Value;

use super::host::Host;
use super::reads::of_share;

/// Names of files; each has its own bytes for a content.
fn names() -> Vec<Vec<u8>> {
    let mut names: Vec<Vec<u8>> = [
        &b"new\nline"[..],
        b"\xff\xfe",
        b"-rf",
        b"--",
        b" ",
        b"tab\t",
        b"%41",
        b"back\\slash",
        b"quote'\"$HOME`",
        b"*?[a]{b}",
        b"\x1b[31m\x07",
        b"\xe2\x80\xaetxt.exe",
        b"...",
        b".wh.not-a-whiteout",
        "\u{fc} and u\u{308}".as_bytes(),
    ]
    .map(<[u8]>::to_vec)
    .to_vec();
    names.push(vec![b'n'; 255]);
    names
}

/// A path of the most bytes that there can be, below `first`: folders of the longest names, and a file.
fn longest(first: &str) -> Vec<u8> {
    let mut path = first.as_bytes().to_vec();
    while path.len() + 256 < 4095 {
        path.push(b'/');
        path.extend(vec![b'd'; 255.min(4095 - 2 - path.len())]);
    }
    path.push(b'/');
    path.resize(4095, b'f');
    path
}

/// Makes the folders on the way to `path` beneath `folder`, step by step, and the file.
fn make(folder: &Path, path: &[u8], content: &[u8]) {
    let mut at = OwnedFd::from(File::open(folder).expect("a folder"));
    let mut names = path.split(|byte| *byte == b'/').peekable();
    while let Some(name) = names.next() {
        if names.peek().is_none() {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
            let file = rustix::fs::openat(&at, name, flags, Mode::from_raw_mode(0o644)).expect("a file");
            io::Write::write_all(&mut File::from(file), content).expect("room");
            return;
        }
        let _ = rustix::fs::mkdirat(&at, name, Mode::from_raw_mode(0o755));
        at = rustix::fs::openat(&at, name, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())
            .expect("a folder");
    }
}

fn content(folder: &Path, path: &[u8]) -> Vec<u8> {
    let folder = File::open(folder).expect("a folder");
    let file = open_beneath(&folder, path, Open::Regular)
        .unwrap_or_else(|error| panic!("{}: {error}", path.escape_ascii()));
    let mut bytes = Vec::new();
    File::from(file).read_to_end(&mut bytes).expect("a file");
    bytes
}

/// Symbolic links: name and text.
fn links() -> Vec<(&'static str, Vec<u8>)> {
    // The longest text of a link that Linux has, on most file systems.
    let long = [b"x/".repeat(2047), b"x".to_vec()].concat();
    vec![
        ("dangling", b"no/where".to_vec()),
        ("absolute", b"/etc/no-such-file".to_vec()),
        ("loop", b"loop".to_vec()),
        ("to-folder", b"deep".to_vec()),
        ("up", b"../../../..".to_vec()),
        ("odd", b"new\nline \xff".to_vec()),
        ("long", long),
    ]
}

/// What the document says of the entries of SRCDIR, by the bytes of their paths.
fn recorded(report: &Value) -> BTreeMap<Vec<u8>, &Value> {
    let entries = of_share(report, "src")["entries"].as_array().expect("entries");
    let path =
        |entry: &Value| PathBytes::from_escaped(entry["path"].as_str().expect("a path")).expect("a path").0;
    entries.iter().map(|entry| (path(entry), entry)).collect()
}

#[test]
fn odd_names_and_links_come_in_are_recorded_and_go_out_as_they_are() {
    let host = Host::new();
    let src = host.folder("src");
    for name in names() {
        make(&src, &[b"deep/", &name[..]].concat(), &name);
    }
    for (name, text) in links() {
        symlink(std::ffi::OsStr::from_bytes(&text), src.join("deep").join(name)).expect("a link");
    }
    let long = longest("long");
    assert_eq!(long.len(), 4095);
    make(&src, &long, b"far down");
    for (name, mode) in [("deep/setuid", 0o4755), ("deep/setgid", 0o2711)] {
        let path = host.file(&format!("src/{name}"), name);
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("a mode");
    }
    let sticky = host.folder("src/deep/sticky");
    fs::set_permissions(sticky, fs::Permissions::from_mode(0o1777)).expect("a mode");
    let pipe = src.join("deep/pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, Mode::from_raw_mode(0o644), 0)
        .expect("a FIFO");

    // What is copied is read, and the copies are the outputs. Nothing reads a FIFO.
    let script = r#"
        mkdir $WORK/o && cp -a deep $WORK/o/ && rm $WORK/o/deep/pipe && [ -p deep/pipe ] &&
            cat "$1" >/tmp/far && cd $WORK && mkdir -p "${2%/*}" && cat /tmp/far >"$2" &&
            mkdir o/a o/b && echo linked >o/a/one && ln o/a/one o/b/two &&
            printf dash >-out && printf line >"$3" && ls -A o/deep | wc -l
    "#;
    let out = longest("o");
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("text");
    let told = host.run(
        &["--json", "--src", "src", "--reads", "reads.json", "--out=-out", "--out=o", "--out=new\nline"],
        &["sh", "-c", script, "sh", &text(&long), &text(&out), "new\nline"],
    );
    assert_eq!(told.code, Some(0), "{told:?}");

    let work = host.path("work");
    let report: Value = serde_json::from_str(&host.read("reads.json")).expect("JSON");
    assert_eq!(report["complete"], true);
    let recorded = recorded(&report);
    let end = told.events().pop().expect("an end");
    let digest = end["outputs"]["manifest"].as_str().expect("a digest");
    let manifest = fs::read(host.path("store/blobs").join(&digest[..2]).join(&digest[2..])).expect("a blob");
    let manifest = Tree::parse_manifest(&manifest).expect("a manifest");
    let node = |path: &[u8]| {
        let found = manifest.get(&TreePath::new(path).expect("a path"));
        found.unwrap_or_else(|| panic!("not in the manifest: {}", path.escape_ascii()))
    };
    let is_file = |path: &[u8], content: &[u8]| {
        let expected = (Digest::of(content), content.len() as u64);
        assert!(
            matches!(node(path).kind, Kind::File { digest, size, .. } if (digest, size) == expected),
            "{}: {:?}",
            path.escape_ascii(),
            node(path).kind
        );
    };

    for name in names() {
        let inside = [b"deep/", &name[..]].concat();
        let outside = [b"o/", &inside[..]].concat();
        assert_eq!(content(&work, &outside), name, "{}", name.escape_ascii());
        is_file(&outside, &name);
        let entry = recorded[&inside];
        assert_eq!(entry["content"]["digest"], Digest::of(&name).to_string(), "{}", name.escape_ascii());
    }
    for (name, text) in links() {
        let path = format!("deep/{name}");
        let found = fs::read_link(work.join("o").join(&path)).expect(name);
        assert_eq!(found.as_os_str().as_bytes(), text, "{name}");
        assert_eq!(node(format!("o/{path}").as_bytes()).kind, Kind::Symlink(text.clone().into()), "{name}");
        assert_eq!(recorded[path.as_bytes()]["target"]["digest"], Digest::of(&text).to_string(), "{name}");
    }
    assert_eq!(content(&work, &out), b"far down");
    is_file(&out, b"far down");
    assert_eq!(recorded[&long]["content"]["digest"], Digest::of(b"far down").to_string());
    for (path, mode) in [("deep/setuid", 0o4755), ("deep/setgid", 0o2711), ("deep/sticky", 0o1777)] {
        assert_eq!(recorded[path.as_bytes()]["metadata"]["mode"], format!("{mode:04o}"), "{path}");
        assert_eq!(node(format!("o/{path}").as_bytes()).meta.mode, mode, "{path}");
        let kept = fs::metadata(work.join("o").join(path)).expect("it is there").permissions().mode();
        assert_eq!(kept & 0o7000, 0, "WORK holds no special bits: {path}");
    }
    assert_eq!(recorded[&b"deep/pipe"[..]]["kind"], "fifo");
    assert_eq!(node(b"o/b/two").kind, Kind::HardLink(TreePath::new(b"o/a/one").expect("a path")));
    assert_eq!(
        (host.read("work/o/a/one"), host.read("work/o/b/two")),
        ("linked\n".into(), "linked\n".into())
    );
    assert_eq!((host.read("work/-out"), host.read("work/new\nline")), ("dash".into(), "line".into()));

    // And nothing else: what is in WORK is what the manifest says.
    let listed: BTreeSet<Vec<u8>> = fs::read_dir(work.join("o/deep"))
        .expect("a folder")
        .flatten()
        .map(|entry| entry.file_name().as_bytes().to_vec())
        .collect();
    let said = manifest.iter().filter_map(|(path, _)| {
        let rest = path.as_bytes().strip_prefix(b"o/deep/")?;
        (!rest.contains(&b'/')).then(|| rest.to_vec())
    });
    assert_eq!(listed, said.collect::<BTreeSet<_>>());
}

#[test]
fn what_work_cannot_hold_of_a_file_goes_into_the_manifest_from_a_layer_too() {
    let host = Host::new();
    let path = host.file("work/kept", "before");
    let value = b"\x00 and \xff";
    match rustix::fs::setxattr(&path, "user.kiln-test", value, XattrFlags::empty()) {
        Err(rustix::io::Errno::OPNOTSUPP) => {
            eprintln!("skipped: files in {} have no attributes", host.root().display());
            return;
        }
        set => set.expect("an attribute"),
    }
    // The guest's kernel copies the file up into the layer, with all that it has.
    let script = "cd $WORK; echo after >> kept; chown 70000:5 kept; chmod 6755 kept; mknod null c 1 3; ls";
    let told = host.script(&["--json", "--out", "kept", "--overwrite"], script);
    assert_eq!(told.code, Some(0), "{told:?}");
    let end = told.events().pop().expect("an end");
    let digest = end["outputs"]["manifest"].as_str().expect("a digest");
    let manifest = fs::read(host.path("store/blobs").join(&digest[..2]).join(&digest[2..])).expect("a blob");
    let manifest = Tree::parse_manifest(&manifest).expect("a manifest");
    let meta = &manifest.get(&TreePath::new(b"kept").expect("a path")).expect("an output").meta;
    assert_eq!(meta.xattrs.get(&b"user.kiln-test"[..]).map(Vec::as_slice), Some(&value[..]), "{meta:?}");
    assert_eq!((meta.uid, meta.gid, meta.mode), (70_000, 5, 0o6755));
    assert_eq!(host.read("work/kept"), "beforeafter\n");
    // One that is declared is refused by what it is.
    let told = host.script(&["--out", "node"], "mknod $WORK/node c 1 3");
    told.ends(125, &["`node`", "is a device"]);
}
