//! The tar reader, on what GNU tar writes.

mod judge;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use judge::{path, run};
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
