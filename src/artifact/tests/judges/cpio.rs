//! The cpio writer, judged by GNU cpio.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};

use super::judge::{Made, path, run};
use kiln_artifact::cpio::{self, CpioError, Encoding, Options};
use kiln_artifact::tree::Kind;

fn written(made: &Made) -> Vec<u8> {
    let mut archive = Vec::new();
    cpio::write(&made.tree, &made.contents, &mut archive, Options::default()).expect("a good tree");
    archive
}

#[test]
fn cpio_lists_every_kind_as_it_is() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let listing = run("cpio", ["-itvn", "--quiet"], folder.path(), &written(&Made::of_every_kind()));
    let listing = String::from_utf8(listing).expect("text");
    let squeezed: Vec<String> =
        listing.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(
        squeezed,
        [
            "drwxr-xr-x 2 0 0 0 Jan 1 1970 .",
            "drwxrwxrwt 2 0 0 0 Nov 14 2023 bin",
            "lrwxrwxrwx 1 0 0 11 Nov 14 2023 bin/link -> ../etc/motd",
            "-rw-r--r-- 1 70000 0 5000 Nov 14 2023 bin/owned",
            "-rwsr-xr-x 3 0 0 0 Nov 14 2023 bin/tool",
            "-rwsr-xr-x 3 0 0 0 Nov 14 2023 bin/tool2",
            "drwxr-xr-x 2 0 0 0 Nov 14 2023 empty",
            "-rw-r--r-- 1 0 0 0 Nov 14 2023 empty.txt",
            "prw------- 1 0 0 0 Nov 14 2023 fifo",
            "crw-rw-rw- 1 0 5 1, 3 Nov 14 2023 null",
            "brw-rw---- 1 0 0 259, 70000 Nov 14 2023 sda17",
            "srwx------ 1 0 0 0 Nov 14 2023 socket",
            "-rwsr-xr-x 3 0 0 10 Nov 14 2023 zz",
        ]
    );
}

#[test]
fn cpio_unpacks_contents_and_hard_links() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut made = Made::of_every_kind();
    // Device nodes need privileges that a test may lack.
    made.tree.retain(|path, _| !matches!(path.as_bytes(), b"null" | b"sda17"));
    for length in [1, 2, 3, 4, 5, 70_000] {
        made.file(&format!("length-{length}"), &vec![b'x'; length]);
    }
    let one = written(&made);
    assert_eq!(one.len() % 4, 0);
    assert_eq!(one, written(&made), "equal trees give equal bytes");
    run("cpio", ["-im", "--quiet", "--no-preserve-owner"], folder.path(), &one);
    for (path, node) in made.tree.iter() {
        let node =
            if let Kind::HardLink(holder) = &node.kind { made.tree.get(holder).expect("held") } else { node };
        let on_disk = folder.path().join(str::from_utf8(path.as_bytes()).expect("text"));
        let metadata = fs::symlink_metadata(&on_disk).expect("unpacked");
        match &node.kind {
            Kind::File { digest, .. } => {
                assert_eq!(fs::read(&on_disk).expect("readable"), made.contents[digest])
            }
            Kind::Directory => assert!(metadata.is_dir()),
            Kind::Fifo => assert!(metadata.file_type().is_fifo()),
            Kind::Socket => assert!(metadata.file_type().is_socket()),
            _ => assert!(metadata.is_symlink()),
        }
    }
    let inode = |name: &str| fs::metadata(folder.path().join(name)).expect("unpacked").ino();
    assert_eq!(inode("bin/tool"), inode("zz"));
    assert_eq!(inode("bin/tool"), inode("bin/tool2"));
}

#[test]
fn archives_may_follow_one_another() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut added = Made::new();
    added.file("added", b"late");
    let mut both = written(&Made::of_every_kind());
    let length = both.len();
    let options = Options { omit_root: true, ..Options::default() };
    cpio::write(&added.tree, &added.contents, &mut both, options).expect("a good tree");
    let listing = run("cpio", ["-it", "--quiet"], folder.path(), &both[length..]);
    assert_eq!(listing, b"added\n");
}

#[test]
fn what_newc_cannot_hold_is_an_error_and_never_cut() {
    let fails = |change: fn(&mut Made)| {
        let mut made = Made::new();
        change(&mut made);
        cpio::write(&made.tree, &made.contents, std::io::sink(), Options::default())
    };
    assert!(fails(|_| {}).is_ok());
    for change in [
        (|made: &mut Made| made.file("a", b"").mtime.seconds = -1) as fn(&mut Made),
        |made| made.file("a", b"").mtime.seconds = 1 << 32,
        |made| {
            let _ = made.file("TRAILER!!!", b"");
        },
        |made| {
            let _ = made.file("a", b"").xattrs.insert(b"user.a".into(), b"".into());
        },
        |made| {
            let _ = made.put(b"a", Kind::File { digest: kiln_digest::Digest::of(b""), size: 1 << 32 }, 0);
        },
    ] {
        assert!(matches!(fails(change), Err(CpioError::Unrepresentable { .. })));
    }
    assert!(fails(|made| made.file("d/TRAILER!!!", b"").uid = 1).is_err(), "the folder is missing");
    let mut made = Made::new();
    made.file("a", b"content").xattrs.insert(b"user.a".into(), b"".into());
    let options = Options { drop_xattrs: true, ..Options::default() };
    assert!(cpio::write(&made.tree, &made.contents, std::io::sink(), options).is_ok());
    let Kind::File { digest, size: 7 } = made.tree.get(&path("a")).expect("there").kind else {
        unreachable!()
    };
    made.contents.insert(digest, b"another".into());
    let lied = cpio::write(&made.tree, &made.contents, std::io::sink(), options);
    assert!(matches!(lied, Err(CpioError::Content(_))));
}

/// The tree's archive in an encoding, alone.
fn encoded(made: &Made, encoding: Encoding) -> Vec<u8> {
    let mut archive = Vec::new();
    cpio::write_encoded(&made.tree, &made.contents, &mut archive, Options::default(), encoding)
        .expect("a good tree");
    archive
}

#[test]
fn gzip_and_zstd_unpack_what_was_encoded() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let made = Made::of_every_kind();
    let plain = encoded(&made, Encoding::Plain);
    assert_eq!(plain, written(&made));
    for (tool, encoding) in [("gzip", Encoding::Gzip { level: 9 }), ("zstd", Encoding::Zstd { level: 19 })] {
        let archive = encoded(&made, encoding);
        assert!(archive.len() < plain.len());
        assert_eq!(archive, encoded(&made, encoding), "equal trees give equal bytes");
        assert!(run(tool, ["-dc"], folder.path(), &archive) == plain, "{tool}");
    }
    for encoding in [Encoding::Gzip { level: 10 }, Encoding::Zstd { level: 20 }, Encoding::Zstd { level: 0 }]
    {
        let result =
            cpio::write_encoded(&made.tree, &made.contents, std::io::sink(), Options::default(), encoding);
        assert!(matches!(result, Err(CpioError::Level(_))), "{encoding:?}");
    }
}

#[test]
fn archives_of_any_encoding_follow_one_another_at_multiples_of_four() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let made = Made::of_every_kind();
    let parts = [Encoding::Zstd { level: 3 }, Encoding::Plain, Encoding::Gzip { level: 1 }, Encoding::Plain]
        .map(|encoding| encoded(&made, encoding));
    let mut whole = Vec::new();
    let length = cpio::concatenate(parts.iter().map(|part| &part[..]), &mut whole).expect("room");
    assert_eq!(length, whole.len() as u64);
    let mut rest = &whole[..];
    for (part, tool) in parts.iter().zip([Some("zstd"), None, Some("gzip"), None]) {
        let (here, later) = rest.split_at(part.len());
        let archive = tool.map_or_else(|| here.to_vec(), |tool| run(tool, ["-dc"], folder.path(), here));
        let listing = run("cpio", ["-it", "--quiet"], folder.path(), &archive);
        assert_eq!(listing.split(|byte| *byte == b'\n').count() - 1, made.tree.len());
        let padding = (4 - part.len() % 4) % 4;
        rest = later.get(padding..).unwrap_or_default();
        assert!(later.iter().take(padding).all(|byte| *byte == 0));
    }
}
