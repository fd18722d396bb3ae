//! The tar reader, on what GNU tar writes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use super::judge::{path, run};
use kiln_artifact::archive::tar::{self, Limits, TarError};
use kiln_artifact::tree::{Kind, Timestamp, Tree};
use kiln_digest::Digest;

const LIMITS: Limits = Limits { members: 1000, content_bytes: 64 << 20 };

fn read(archive: &[u8]) -> Result<(Tree, BTreeMap<Digest, Vec<u8>>), TarError> {
    let mut contents = BTreeMap::new();
    let tree = tar::read(archive, &mut contents, &LIMITS)?;
    Ok((tree, contents))
}

/// A folder with something of everything that needs no privileges.
fn source(folder: &Path) {
    fs::create_dir_all(folder.join("d/deep")).expect("made");
    fs::write(folder.join("d/file"), b"content").expect("made");
    fs::set_permissions(folder.join("d/file"), fs::Permissions::from_mode(0o4750)).expect("set");
    fs::hard_link(folder.join("d/file"), folder.join("d/again")).expect("made");
    symlink("d/file", folder.join("link")).expect("made");
    let long = "n".repeat(200);
    fs::create_dir(folder.join(&long)).expect("made");
    fs::write(folder.join(&long).join(&long), b"long").expect("made");
    symlink("t".repeat(300), folder.join("longlink")).expect("made");
    fs::hard_link(folder.join(&long).join(&long), folder.join("hardlong")).expect("made");
    fs::write(folder.join("caf\u{e9} \n=\\"), b"").expect("made");
    run("mkfifo", ["fifo"], folder, b"");
    let sparse = File::create(folder.join("sparse")).expect("made");
    for part in 0..40 {
        sparse.write_all_at(&[b'a' + part; 4096], u64::from(part) * 65_536).expect("written");
    }
    sparse.set_len(40 * 65_536 + 5).expect("grown");
}

fn archived(arguments: &[&str]) -> (Vec<u8>, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    source(folder.path());
    let fixed =
        ["--sort=name", "--owner=12345", "--group=54321", "--mtime=@1700000000.123456789", "-cf", "-"];
    let archive = run("tar", fixed.iter().chain(arguments).chain(&["."]), folder.path(), b"");
    (archive, folder)
}

#[test]
fn every_gnu_tar_format_gives_the_same_tree() {
    for arguments in [
        &["--format=gnu"][..],
        &["--format=gnu", "--sparse"],
        &["--format=posix"],
        &["--format=posix", "--sparse"],
        &["--format=posix", "--sparse", "--sparse-version=0.1"],
        &["--format=posix", "--sparse", "--sparse-version=0.0"],
    ] {
        let (archive, folder) = archived(arguments);
        let (tree, contents) = read(&archive).unwrap_or_else(|error| unreachable!("{arguments:?}: {error}"));
        assert_eq!(tree.len(), 13, "{arguments:?}");
        let nanoseconds = if arguments[0] == "--format=posix" { 123_456_789 } else { 0 };
        for (path, node) in tree.iter() {
            let on_disk = folder.path().join(str::from_utf8(path.as_bytes()).expect("text"));
            match &node.kind {
                Kind::HardLink(_) => continue,
                Kind::File { digest, size } => {
                    assert_eq!(
                        fs::read(&on_disk).expect("readable"),
                        contents[digest],
                        "{arguments:?} {path}"
                    );
                    assert_eq!(contents[digest].len() as u64, *size);
                }
                Kind::Symlink(text) => {
                    let target = fs::read_link(&on_disk).expect("a link");
                    assert_eq!(target.as_os_str().as_encoded_bytes(), &text[..]);
                }
                _ => {}
            }
            assert_eq!((node.meta.uid, node.meta.gid), (12345, 54321), "{path}");
            assert_eq!(
                node.meta.mtime,
                Timestamp { seconds: 1_700_000_000, nanoseconds },
                "{arguments:?} {path}"
            );
        }
        let long = "n".repeat(200);
        assert_eq!(tree.get(&path("d/file")).expect("there").kind, Kind::HardLink(path("d/again")));
        assert_eq!(tree.get(&path("d/again")).expect("there").meta.mode, 0o4750);
        assert_eq!(
            tree.get(&path(&format!("{long}/{long}"))).expect("there").kind,
            Kind::HardLink(path("hardlong"))
        );
    }
}

#[test]
fn v7_and_ustar_archives_are_read() {
    for format in ["v7", "ustar", "oldgnu"] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        fs::create_dir_all(folder.path().join("d/e")).expect("made");
        fs::write(folder.path().join("d/e/f"), b"content").expect("made");
        symlink("f", folder.path().join("d/e/l")).expect("made");
        if format != "v7" {
            fs::create_dir(folder.path().join("p".repeat(90))).expect("made");
            fs::write(folder.path().join("p".repeat(90)).join("f".repeat(90)), b"").expect("made");
        }
        let archive = run("tar", ["-c", &format!("--format={format}"), "."], folder.path(), b"");
        let (tree, _) = read(&archive).expect("a good archive");
        assert_eq!(tree.len(), if format == "v7" { 5 } else { 7 });
        assert!(matches!(tree.get(&path("d/e/f")).expect("there").kind, Kind::File { size: 7, .. }));
        assert_eq!(tree.get(&path("d/e")).expect("there").kind, Kind::Directory);
    }
}

#[test]
fn extended_attributes_come_along() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    // tar writes the attributes that it is told of no other way than by a file that has them.
    let record = |key: &str, value: &[u8]| {
        let mut length = key.len() + value.len() + 3;
        length += length.to_string().len();
        length = key.len() + value.len() + 3 + length.to_string().len();
        [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
    };
    let records = [
        record("SCHILY.xattr.user.a%3Db", b"1"),
        record("SCHILY.xattr.security.capability", b"\x01\0\n\0=\n"),
        record("comment", b"ignored"),
    ]
    .concat();
    let archive =
        [header(b'x', "pax", records.len()), padded(&records), header(b'0', "f", 0), vec![0; 1024]].concat();
    run("tar", ["-tf", "-"], folder.path(), &archive);
    let (tree, _) = read(&archive).expect("a good archive");
    let xattrs = &tree.get(&path("f")).expect("there").meta.xattrs;
    let expected: [(&[u8], &[u8]); 2] = [(b"security.capability", b"\x01\0\n\0=\n"), (b"user.a=b", b"1")];
    assert_eq!(xattrs, &expected.map(|(name, value)| (name.to_vec(), value.to_vec())).into());
}

/// A ustar header by hand, check sum included.
fn header(kind: u8, name: &str, size: usize) -> Vec<u8> {
    let mut block = vec![0; 512];
    block[..name.len()].copy_from_slice(name.as_bytes());
    block[100..108].copy_from_slice(b"0000644\0");
    block[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    block[156] = kind;
    block[257..265].copy_from_slice(b"ustar\x0000");
    summed(block)
}

fn summed(mut block: Vec<u8>) -> Vec<u8> {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

fn padded(body: &[u8]) -> Vec<u8> {
    let mut body = body.to_vec();
    body.resize(body.len().next_multiple_of(512), 0);
    body
}

#[test]
fn an_archive_cut_anywhere_is_refused() {
    for arguments in [&["--format=gnu", "--sparse"][..], &["--format=posix", "--sparse"]] {
        let (archive, _folder) = archived(arguments);
        let end =
            archive.chunks(512).rposition(|block| block.iter().any(|&byte| byte != 0)).expect("a member");
        for blocks in 0..=end {
            for cut in [blocks * 512, blocks * 512 + 1, blocks * 512 + 511] {
                let result = read(&archive[..cut]);
                assert!(matches!(result, Err(TarError::Truncated { .. })), "{arguments:?} cut at {cut}");
            }
        }
    }
}

/// The members one after the other, and the end mark.
fn archive(members: &[Vec<u8>]) -> Vec<u8> {
    [members.concat(), vec![0; 1024]].concat()
}

fn with_field(header: &[u8], at: usize, field: &[u8]) -> Vec<u8> {
    let mut block = header.to_vec();
    block[at..at + field.len()].copy_from_slice(field);
    summed(block)
}

fn pax(records: &[(&str, &str)]) -> Vec<u8> {
    let mut body = Vec::new();
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        let length = (rest..).find(|length| *length == rest + length.to_string().len()).expect("a length");
        body.extend(format!("{length} {key}={value}\n").bytes());
    }
    [header(b'x', "pax", body.len()), padded(&body)].concat()
}

fn long(kind: u8, name: &[u8]) -> Vec<u8> {
    let name = [name, b"\0"].concat();
    [header(kind, "././@LongLink", name.len()), padded(&name)].concat()
}

fn file(name: &str, content: &[u8]) -> Vec<u8> {
    [header(b'0', name, content.len()), padded(content)].concat()
}

fn link(kind: u8, name: &str, target: &str) -> Vec<u8> {
    with_field(&header(kind, name, 0), 157, target.as_bytes())
}

fn error(members: &[Vec<u8>]) -> String {
    match read(&archive(members)) {
        Ok((tree, _)) => unreachable!("accepted: {}", tree.manifest().escape_ascii()),
        Err(error) => error.to_string(),
    }
}

#[test]
fn the_later_of_two_members_wins_and_links_keep_what_they_named() {
    let (tree, contents) = read(&archive(&[
        file("a", b"first"),
        link(b'1', "b", "./a"),
        file("./a", b"second"),
        file("d", b"a file, then a folder"),
        header(b'5', "d/", 0),
        file("d/e", b"in it"),
        link(b'1', "c", "a"),
        link(b'1', "0", "b"),
        file("x/y/z", b"parents are made"),
    ]))
    .expect("a good archive");
    let content = |name: &str| match &tree.get(&path(name)).expect(name).kind {
        Kind::File { digest, .. } => contents[digest].clone(),
        other => unreachable!("{name} is {other:?}"),
    };
    assert_eq!(content("a"), b"second");
    assert_eq!(content("0"), b"first");
    assert_eq!(tree.get(&path("b")).expect("there").kind, Kind::HardLink(path("0")));
    assert_eq!(tree.get(&path("c")).expect("there").kind, Kind::HardLink(path("a")));
    assert_eq!(content("d/e"), b"in it");
    let made = tree.get(&path("x/y")).expect("made");
    assert_eq!((made.kind.clone(), made.meta.mode, made.meta.mtime.seconds), (Kind::Directory, 0o755, 0));
}

#[test]
fn devices_and_old_folders_are_read() {
    let device =
        |kind, name| with_field(&with_field(&header(kind, name, 0), 329, b"0000403\0"), 337, b"0210560\0");
    let negative = with_field(&header(b'0', "old", 0), 136, &[0xff; 12]);
    let (tree, _) = read(&archive(&[
        device(b'3', "c"),
        device(b'4', "b"),
        header(b'6', "p", 0),
        header(0, "folder/", 0),
        negative,
    ]))
    .expect("a good archive");
    let kind = |name| tree.get(&path(name)).expect(name).kind.clone();
    assert_eq!(kind("c"), Kind::CharDevice { major: 259, minor: 70_000 });
    assert_eq!(kind("b"), Kind::BlockDevice { major: 259, minor: 70_000 });
    assert_eq!(kind("p"), Kind::Fifo);
    assert_eq!(kind("folder"), Kind::Directory);
    assert_eq!(tree.get(&path("old")).expect("there").meta.mtime.seconds, -1);
}

#[test]
fn names_that_leave_the_tree_are_errors_that_name_the_member() {
    for name in ["../a", "a/../../b", "a/..", "..", "a/./b"] {
        assert!(error(&[file(name, b"")]).contains(&format!("`{name}`")), "{name}");
    }
    assert!(error(&[long(b'L', &[b'n'; 256]), file("short", b"")]).contains("nnnn"));
    assert!(error(&[pax(&[("path", "x/../../y")]), file("good", b"")]).contains("x/../../y"));
    // An absolute name is the tree's own.
    assert!(read(&archive(&[file("/etc/passwd", b"")])).expect("good").0.get(&path("etc/passwd")).is_some());
}

#[test]
fn nothing_goes_through_a_symbolic_link_or_a_file() {
    let through = error(&[link(b'2', "l", "/etc"), file("l/passwd", b"")]);
    assert!(through.contains("`l/passwd`") && through.contains("beneath `l`"), "{through}");
    assert!(error(&[file("f", b""), file("f/x", b"")]).contains("beneath `f`"));
    assert!(error(&[link(b'2', "l", "."), link(b'1', "h", "l/../x")]).contains("hard link"));
}

#[test]
fn hard_links_lead_only_to_files_before_them() {
    for target in ["missing", "later", "d", "../x", "/", "self"] {
        let refused = error(&[header(b'5', "d", 0), link(b'1', "self", target), file("later", b"")]);
        assert!(refused.contains("`self` is a hard link"), "{target}: {refused}");
    }
    assert!(
        error(&[file("a", b""), with_field(&link(b'1', "b", "a"), 124, b"00000000004\0")]).contains("body")
    );
}

#[test]
fn what_readers_disagree_about_is_refused() {
    let records: &[(&str, &str)] = &[("path", "one")];
    for (members, expected) in [
        // pax and GNU names for one member; two of a kind; one without a member.
        (vec![pax(records), long(b'L', b"two"), file("three", b"")], "a pax and a GNU name"),
        (vec![pax(records), pax(records), file("a", b"")], "two extension headers"),
        (vec![long(b'L', b"a"), long(b'L', b"b"), file("c", b"")], "two extension headers"),
        (vec![file("a", b""), pax(records)], "no member after it"),
        (vec![long(b'K', b"target")], "no member after it"),
        // Bodies where some readers expect none.
        (vec![[header(b'5', "d", 512), vec![0; 512]].concat()], "body"),
        (
            vec![[link(b'2', "l", "t"), vec![]].concat(), [header(b'3', "c", 5), padded(b"12345")].concat()],
            "body",
        ),
        (vec![header(b'Z', "vendor", 0)], "not supported"),
        (vec![header(b'M', "volume", 0)], "not supported"),
        (vec![file(".", b"")], "root's name"),
        (vec![link(b'2', "./", "x")], "root's name"),
    ] {
        let refused = error(&members);
        assert!(refused.contains(expected), "{refused}, not {expected}");
    }
}

#[test]
fn sizes_that_lie_are_refused() {
    // pax says a size: it counts, for the member's body and for nothing else.
    let grown = [pax(&[("size", "512")]), header(b'0', "a", 0), padded(&[b'x'; 512]), file("b", b"")];
    let (tree, _) = read(&archive(&grown)).expect("a good archive");
    assert!(matches!(tree.get(&path("a")).expect("there").kind, Kind::File { size: 512, .. }));
    assert!(tree.get(&path("b")).is_some());
    // A header hidden in a body stays hidden, though the header's own size is zero.
    let hidden = [pax(&[("size", "512")]), header(b'0', "a", 0), file("hidden", b""), file("b", b"")];
    assert!(read(&archive(&hidden)).expect("a good archive").0.get(&path("hidden")).is_none());
    for size in ["-1", "+5", "1e3", "0x10", " 5", "18446744073709551616"] {
        assert!(error(&[pax(&[("size", size)]), file("a", b"")]).contains("value is malformed"), "{size}");
    }
    for field in
        [&b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"[..], b"-0000000001\0", b"0000000008 \0"]
    {
        assert!(error(&[with_field(&header(b'0', "a", 0), 124, field)]).contains("size is not a number"));
    }
    let huge = with_field(&header(b'0', "a", 0), 124, b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff");
    assert!(error(&[huge]).contains("more than 67108864 bytes"));
    let huge_extension =
        with_field(&header(b'x', "a", 0), 124, b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff");
    assert!(error(&[huge_extension]).contains("longer than 1 MiB"));
}

#[test]
fn check_sums_and_numbers_are_held_to() {
    let mut flipped = file("a", b"content");
    flipped[0] ^= 1;
    assert!(error(&[flipped]).contains("check sum"));
    assert!(error(&[vec![b'x'; 512]]).contains("check sum"));
    for (at, what) in [(100, "mode"), (108, "owner"), (116, "group"), (136, "modification time")] {
        let refused = error(&[with_field(&header(b'0', "a", 0), at, b"0009\0")]);
        assert!(refused.contains(what), "{refused}");
    }
    assert!(error(&[pax(&[("uid", "4294967296")]), file("a", b"")]).contains("owner"));
    assert!(error(&[with_field(&header(b'3', "a", 0), 329, b"00x0000\0")]).contains("device"));
}

#[test]
fn limits_hold_for_members_folders_and_holes() {
    let limited = |members: &[Vec<u8>], limits: Limits| {
        tar::read(&archive(members)[..], &mut BTreeMap::new(), &limits).map(|tree| tree.len())
    };
    let four = [file("a", b"12"), file("b", b"34"), file("c", b""), header(b'5', "d", 0)];
    assert_eq!(limited(&four, Limits { members: 4, content_bytes: 4 }).expect("just enough"), 5);
    assert!(matches!(limited(&four, Limits { members: 3, content_bytes: 4 }), Err(TarError::Limit { .. })));
    assert!(matches!(limited(&four, Limits { members: 4, content_bytes: 3 }), Err(TarError::Limit { .. })));
    let deep = [file("a/b/c/d", b"")];
    assert!(matches!(limited(&deep, Limits { members: 3, content_bytes: 0 }), Err(TarError::Limit { .. })));
    assert_eq!(limited(&deep, Limits { members: 4, content_bytes: 0 }).expect("just enough"), 5);
    // 2^60 bytes, none of them stored.
    let records: &[(&str, &str)] = &[
        ("GNU.sparse.size", "1152921504606846976"),
        ("GNU.sparse.map", "1152921504606846976,0"),
        ("GNU.sparse.name", "huge"),
    ];
    let sparse = [pax(records), file("made-up", b"")];
    assert!(matches!(limited(&sparse, LIMITS), Err(TarError::Limit { .. })));
}

#[test]
fn sparse_maps_that_lie_are_refused() {
    let with_map = |map: &str, size: &str, content: &[u8]| {
        let records = [("GNU.sparse.size", size), ("GNU.sparse.map", map), ("GNU.sparse.name", "s")];
        read(&archive(&[pax(&records), file("made-up", content)])).map(|(tree, contents)| {
            match tree.get(&path("s")).expect("there").kind {
                Kind::File { digest, .. } => contents[&digest].clone(),
                _ => unreachable!("a file"),
            }
        })
    };
    assert_eq!(with_map("1,2,5,1,8,0", "8", b"abc").expect("a good map"), b"\0ab\0\0c\0\0");
    assert_eq!(with_map("0,3", "3", b"abc").expect("a good map"), b"abc");
    for (map, size) in [
        ("1,2,5,1", "5"),                                       // beyond the end
        ("1,2,2,1", "8"),                                       // overlapping
        ("5,1,1,2", "8"),                                       // out of order
        ("1,2", "8"),                                           // less than is stored
        ("1,4", "8"),                                           // more than is stored
        ("1,2,5", "8"),                                         // half an extent
        ("1,18446744073709551615", "8"),                        // past 2^64
        ("1,18446744073709551615,1,4", "18446744073709551615"), // sums past 2^64
        ("a,b", "8"),
        ("", "8"),
    ] {
        assert!(with_map(map, size, b"abc").is_err(), "{map} of {size}");
    }
    let version_1 = |body: &[u8]| {
        let records = [
            ("GNU.sparse.major", "1"),
            ("GNU.sparse.minor", "0"),
            ("GNU.sparse.name", "s"),
            ("GNU.sparse.realsize", "9"),
        ];
        read(&archive(&[pax(&records), file("made-up", body)]))
    };
    version_1(&[padded(b"1\n4\n3\n"), b"abc".to_vec()].concat()).expect("a good map");
    for map in [
        &b""[..],
        b"1",
        b"1\n4\n",
        b"99999999999\n",
        b"-1\n",
        b"1\n4\n4\n",
        b"\n",
        b"1\n\n\n",
        b"1\n0000000000000000000000004\n3\n",
    ] {
        assert!(version_1(&[padded(map), b"abc".to_vec()].concat()).is_err(), "{}", map.escape_ascii());
        assert!(version_1(map).is_err(), "{}", map.escape_ascii());
    }
    let unknown = [("GNU.sparse.major", "2"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "9")];
    assert!(error(&[pax(&unknown), file("a", b"")]).contains("sparse format"));
}

#[test]
fn a_sinks_failure_is_told_from_the_archives() {
    struct Full;
    impl kiln_artifact::archive::ContentSink for Full {
        fn store(&mut self, _: &mut dyn std::io::Read) -> std::io::Result<(Digest, u64)> {
            Err(std::io::ErrorKind::StorageFull.into())
        }
    }
    struct Lazy;
    impl kiln_artifact::archive::ContentSink for Lazy {
        fn store(&mut self, reader: &mut dyn std::io::Read) -> std::io::Result<(Digest, u64)> {
            let mut byte = [0];
            reader.read_exact(&mut byte)?;
            Ok((Digest::of(&byte), 1))
        }
    }
    let members = archive(&[file("a", b"content")]);
    assert!(matches!(tar::read(&members[..], &mut Full, &LIMITS), Err(TarError::Store { .. })));
    assert!(matches!(tar::read(&members[..], &mut Lazy, &LIMITS), Err(TarError::Store { .. })));
    assert!(matches!(
        tar::read(&members[..515], &mut BTreeMap::new(), &LIMITS),
        Err(TarError::Truncated { at: 515 })
    ));
}

#[test]
fn an_archive_may_go_over_what_is_there() {
    let mut builder = kiln_artifact::tree::Builder::new();
    let mut contents = BTreeMap::new();
    for members in [
        archive(&[with_field(&header(b'5', "usr/", 0), 100, b"0000700\0"), file("usr/a", b"a")]),
        archive(&[file("usr/b", b"b"), link(b'1', "usr/c", "usr/a")]),
    ] {
        tar::read_into(&mut builder, &members[..], &mut contents, &LIMITS).expect("a good archive");
    }
    let tree = builder.finish().expect("a good tree");
    assert_eq!(tree.get(&path("usr")).expect("there").meta.mode, 0o700);
    assert_eq!(tree.get(&path("usr/c")).expect("there").kind, Kind::HardLink(path("usr/a")));
}

proptest::proptest! {
    #[test]
    fn hostile_headers_never_panic(
        changes in proptest::collection::vec((0..8_usize, 0..512_usize, proptest::prelude::any::<u8>()), 1..12),
    ) {
        let mut blocks: Vec<Vec<u8>> = [
            pax(&[("mtime", "1.5"), ("GNU.sparse.size", "9"), ("GNU.sparse.map", "1,2,5,1")]),
            file("a/b", b"abc"),
            long(b'L', b"long/name"),
            link(b'1', "c", "a/b"),
            header(b'S', "sparse", 0),
        ]
        .concat()
        .chunks(512)
        .map(<[u8]>::to_vec)
        .collect();
        for (block, at, byte) in changes {
            let index = block % blocks.len();
            let changed = &mut blocks[index];
            // Headers stay headers, so that the change is looked at.
            if &changed[257..262] == b"ustar" {
                *changed = with_field(changed, at, &[byte]);
            } else {
                changed[at] = byte;
            }
        }
        if let Ok((tree, _)) = read(&archive(&blocks)) {
            proptest::prop_assert_eq!(tree.check(), Ok(()));
        }
    }
}
