//! From a signed archive to a tree, and what bad archives get.

#![allow(clippy::panic, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::thread;

use kiln_artifact::tree::{Contents, Kind, Node, Tree, TreePath};
use kiln_openpgp::VerifyError;
use kiln_openpgp::testing::{SignOptions, TestKey};

use super::testing::{File, SUITE, TestArchive, ar, deb, spec, tar_of};
use super::*;

fn path(text: &str) -> TreePath {
    TreePath::new(text.as_bytes()).expect("a path")
}

fn node<'a>(tree: &'a Tree, at: &str) -> &'a Node {
    tree.get(&path(at)).unwrap_or_else(|| panic!("`{at}` is not in the tree"))
}

fn text(tree: &Tree, store: &Store, at: &str) -> String {
    let Kind::File { digest, .. } = &node(tree, at).kind else { panic!("`{at}` is no file") };
    let mut text = String::new();
    store.blobs().open(digest).expect("stored").read_to_string(&mut text).expect("text");
    text
}

const ROOT: (&str, File<'static>) = ("./", File::Folder(0o755));

/// An archive with an essential package and two more.
fn archive() -> TestArchive {
    let mut archive = TestArchive::new();
    let folder = File::Folder(0o755);
    archive.add(
        "base-files",
        "Essential: yes\nPriority: required\nMaintainer: x\nDescription: y\n z\n",
        &[
            ("./postinst", File::Plain(0o755, b"#!/bin/sh\n")),
            ("./conffiles", File::Plain(0o644, b"/etc/issue\n")),
        ],
        &[
            ROOT,
            ("./etc/", folder),
            ("./etc/issue", File::Plain(0o644, b"hello\n")),
            ("./tmp/", File::Folder(0o1777)),
            ("./usr/share/base-passwd/passwd.master", File::Plain(0o644, b"root:x:0:0::/root:/bin/sh\n")),
            ("./usr/share/base-passwd/group.master", File::Plain(0o644, b"root:x:0:\n")),
            ("./bin", File::Symlink("usr/bin")),
            ("./var/lock", File::Symlink("/run/lock")),
            ("./run/lock/", folder),
        ],
    );
    archive.add(
        "shell",
        "Depends: libshell (= 1-1)\n",
        &[("./triggers", File::Plain(0o644, b"interest-noawait /usr/lib/x\n"))],
        &[
            ROOT,
            ("./bin/", folder),
            ("./bin/sh", File::Plain(0o4755, b"elf")),
            ("./bin/bash", File::Link("./bin/sh")),
            ("./tmp/", folder),
            ("./var/lock/", folder),
            ("./var/lock/sh", File::Plain(0o600, b"")),
        ],
    );
    archive.add(
        "libshell",
        "Multi-Arch: same\n",
        &[],
        &[ROOT, ("./lib/libshell.so", File::Plain(0o644, b"so"))],
    );
    archive
}

fn fails(archive: &TestArchive) -> ArchiveError {
    archive.open().resolve(&spec("+shell"), None).expect_err("it must be refused")
}

fn message(error: &ArchiveError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}

#[test]
fn programs_come_with_what_they_need_and_without_a_root() {
    let test = archive();
    test.publish();
    let archive = test.open();
    let locked = archive.resolve_programs(&spec("+shell"), None).expect("resolved");
    let names: Vec<_> = locked.packages.iter().map(|package| package.name.as_str()).collect();
    assert_eq!(names, ["libshell", "shell"]);
    archive.fetch(&locked, &|_| {}).expect("fetched");
    let trees = archive.unpack_programs(&locked).expect("unpacked");
    assert!(trees[0].get(&path("lib/libshell.so")).is_some());
    // As the package has it: nothing is merged.
    assert!(trees[1].get(&path("bin/sh")).is_some());
}

#[test]
fn a_spec_becomes_a_lock_and_a_tree() {
    let test = archive();
    test.publish();
    let archive = test.open();
    let locked = archive.resolve(&spec("+shell"), None).expect("resolved");
    let names: Vec<_> = locked.packages.iter().map(|package| package.name.as_str()).collect();
    assert_eq!(names, ["base-files", "libshell", "shell"]);
    assert_eq!(locked.packages[0].suite, SUITE);
    assert_eq!(locked.source_date_epoch(), test.date);
    let came = std::sync::atomic::AtomicU64::new(0);
    let progress = |bytes| {
        came.fetch_add(bytes, Ordering::Relaxed);
    };
    archive.fetch(&locked, &progress).expect("fetched");
    assert_eq!(came.load(Ordering::Relaxed), total_bytes(&locked.packages));
    let tree = archive.unpack(&locked).expect("unpacked");
    assert_eq!(node(&tree, "bin").kind, Kind::Symlink(b"usr/bin"[..].into()));
    assert_eq!(node(&tree, "lib64").kind, Kind::Symlink(b"usr/lib64"[..].into()));
    assert_eq!(node(&tree, "usr/bin/bash").meta.mode, 0o4755);
    assert_eq!(node(&tree, "usr/bin/sh").kind, Kind::HardLink(path("usr/bin/bash")));
    assert!(tree.get(&path("usr/lib/libshell.so")).is_some() && tree.get(&path("lib32")).is_none());
    assert_eq!(node(&tree, "tmp").meta.mode, 0o1777, "base-files has the say");
    assert!(tree.get(&path("run/lock/sh")).is_some(), "a link on the way is followed");
    let store = test.store();
    assert!(tree.get(&path("etc/issue")).is_none());
    assert_eq!(text(&tree, &store, "etc/issue.dpkg-new"), "hello\n");
    assert_eq!(text(&tree, &store, "etc/passwd"), "root:x:0:0::/root:/bin/sh\n");
    assert_eq!(node(&tree, "etc/passwd").meta.mtime.seconds, test.date);
    let status = text(&tree, &store, "var/lib/dpkg/status");
    assert_eq!(status.matches("Status: install ok unpacked\n").count(), 3);
    assert!(status.contains("Conffiles:\n /etc/issue newconffile\n"));
    assert!(text(&tree, &store, "var/lib/dpkg/info/shell.list").contains("/bin/sh\n"));
    assert_eq!(node(&tree, "var/lib/dpkg/info/base-files.postinst").meta.mode, 0o755);
    assert!(tree.get(&path("var/lib/dpkg/info/libshell:amd64.list")).is_some());
    assert_eq!(archive.unpack(&locked).expect("again").digest(), tree.digest());
    assert_eq!(archive.resolve(&spec("+shell"), Some(&locked)).expect("again"), locked);
}

#[test]
fn what_is_in_the_store_needs_no_archive() {
    let test = archive();
    test.publish();
    let archive = test.open();
    let locked = archive.resolve(&spec("+shell"), None).expect("resolved");
    archive.fetch(&locked, &|_| {}).expect("fetched");
    fs::remove_dir_all(test.path("")).expect("gone");
    let nowhere = Archive::new(
        ArchiveSettings { host_root: "/nonexistent".into(), ..ArchiveSettings::default() },
        Client::new(),
        &test.store(),
        Timestamp::now(),
    );
    nowhere.fetch(&locked, &|_| {}).expect("nothing to fetch");
    nowhere.unpack(&locked).expect("unpacked");
    let error = nowhere.resolve(&spec("+shell"), None).expect_err("no mirror");
    assert!(error.hint().is_some_and(|hint| hint.contains("--debian-mirror")), "{error}");
    let error = archive.resolve(&spec("+shell"), None).expect_err("no archive");
    assert!(error.to_string().contains("there is no suite `testing`"), "{error}");
}

/// Serves the folder of `test` to `count` requests, each on a connection of its own.
fn serve(test: &TestArchive, count: usize) -> (String, thread::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = format!("http://{}/debian/", listener.local_addr().expect("bound"));
    let folder = test.path("");
    let server = thread::spawn(move || {
        for _ in 0..count {
            let (mut stream, _) = listener.accept().expect("a client");
            let mut lines = BufReader::new(stream.try_clone().expect("a descriptor")).lines();
            let asked = lines.next().and_then(Result::ok).unwrap_or_default();
            while lines.next().and_then(Result::ok).is_some_and(|line| !line.is_empty()) {}
            let file =
                asked.split(' ').nth(1).and_then(|path| path.strip_prefix("/debian/")).expect("a path");
            let (status, body) = match fs::read(folder.join(file)) {
                Ok(body) => ("200 OK", body),
                Err(_) => ("404 Not Found", Vec::new()),
            };
            let head =
                format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
            // The client may hang up first.
            let _ = stream.write_all(&[head.into_bytes(), body].concat());
        }
    });
    (address, server)
}

#[test]
fn an_archive_is_read_over_http() {
    let test = archive();
    test.publish();
    let (mirror, server) = serve(&test, 5);
    let archive = test.open_at(&mirror);
    let locked = archive.resolve(&spec("+shell"), None).expect("resolved");
    archive.fetch(&locked, &|_| {}).expect("fetched");
    server.join().expect("an InRelease, an index and three packages");
    archive.unpack(&locked).expect("unpacked");
}

#[test]
fn a_release_signed_apart_will_do() {
    let test = archive();
    let release = test.release();
    test.write("dists/testing/Release", release.as_bytes());
    assert!(fails(&test).to_string().contains("Release.gpg"));
    let signature = test.key.sign_detached(release.as_bytes(), SignOptions::default());
    test.write("dists/testing/Release.gpg", &signature);
    test.open().resolve(&spec("+shell"), None).expect("resolved");
    test.write("dists/testing/Release", release.replace("test\n", "tost\n").as_bytes());
    assert!(matches!(fails(&test), ArchiveError::Index(IndexError::Verify { .. })));
}

#[test]
fn an_inrelease_that_is_not_the_archives_own_is_refused() {
    let test = archive();
    test.publish();
    let good = fs::read_to_string(test.path("dists/testing/InRelease")).expect("there");
    let verify = |bytes: &[u8]| {
        test.write("dists/testing/InRelease", bytes);
        match fails(&test) {
            ArchiveError::Index(IndexError::Verify { source, .. }) => source,
            other => panic!("{other:?}"),
        }
    };
    assert!(matches!(
        verify(good.replace("Codename: test", "Codename: tost").as_bytes()),
        VerifyError::Bad { .. }
    ));
    assert_eq!(verify(test.release().as_bytes()), VerifyError::Unsigned);
    assert_eq!(verify(format!("Suite: testing\n{good}").as_bytes()), VerifyError::Outside);
    let other = TestKey::generate().sign_cleartext(&test.release(), SignOptions::default());
    assert!(matches!(verify(&other), VerifyError::UnknownKey { .. }));
    for length in [0, 1, good.len() / 2, good.len() - 2] {
        verify(&good.as_bytes()[..length]);
    }
}

#[test]
fn a_release_of_another_time_or_suite_is_refused() {
    let mut test = archive();
    test.valid_seconds = Some(1800);
    test.publish();
    let error = fails(&test);
    assert!(message(&error).contains("expired on"), "{}", message(&error));
    assert!(error.hint().is_some_and(|hint| hint.contains("--debian-allow-expired")));
    test.valid_seconds = None;
    test.publish();
    let locked = test.open().resolve(&spec("+shell"), None).expect("resolved");
    test.date -= 60;
    test.publish();
    let error = test.open().resolve(&spec("+shell"), Some(&locked)).expect_err("older");
    assert!(message(&error).contains("before the one of"), "{}", message(&error));
    fs::rename(test.path("dists/testing"), test.path("dists/stable")).expect("moved");
    let error =
        test.open().resolve(&"debian:stable".parse().expect("a spec"), None).expect_err("another suite");
    assert!(message(&error).contains("is of suite `testing`"), "{}", message(&error));
}

#[test]
fn a_flipped_byte_in_an_index_or_a_package_is_noticed_and_not_kept() {
    let test = archive();
    test.publish();
    let flip = |at: &str| {
        let mut bytes = fs::read(test.path(at)).expect("there");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        test.write(at, &bytes);
    };
    let index = "dists/testing/main/binary-amd64/Packages.zst";
    flip(index);
    assert!(matches!(fails(&test), ArchiveError::Index(IndexError::Fetch(FetchError::Digest { .. }))));
    flip(index);
    let archive = test.open();
    let locked = archive.resolve(&spec("+shell"), None).expect("resolved");
    flip("pool/main/shell_1-1_amd64.deb");
    let error = archive.fetch(&locked, &|_| {}).expect_err("another digest");
    assert!(matches!(error, ArchiveError::Fetch(FetchError::Digest { .. })), "{error}");
    let shell = locked.packages.iter().find(|package| package.name == "shell").expect("there");
    assert!(!test.store().blobs().contains(&shell.sha256));
    let error = archive.unpack(&locked).expect_err("not fetched");
    assert!(matches!(error, ArchiveError::Unpack(UnpackError::Missing { .. })), "{error}");
}

#[test]
fn a_package_that_is_damaged_in_the_store_is_not_unpacked_and_is_fetched_again() {
    let test = archive();
    test.publish();
    let archive = test.open();
    let locked = archive.resolve(&spec("+shell"), None).expect("resolved");
    archive.fetch(&locked, &|_| {}).expect("fetched");
    let shell = locked.packages.iter().find(|package| package.name == "shell").expect("there");
    let path = test.store().blobs().path(&shell.sha256);
    let whole = fs::read(&path).expect("there");
    let damage = || {
        let mut bytes = whole.clone();
        // Behind what is read of it.
        bytes.extend([0; 9]);
        fs::remove_file(&path).expect("there");
        fs::write(&path, bytes).expect("room");
    };
    damage();
    let error = archive.unpack(&locked).expect_err("damaged");
    assert!(matches!(error, ArchiveError::Unpack(UnpackError::Missing { .. })) && !path.exists(), "{error}");
    archive.fetch(&locked, &|_| {}).expect("fetched");
    damage();
    archive.fetch(&locked, &|_| {}).expect("fetched");
    assert_eq!(fs::read(&path).expect("there"), whole);
    archive.unpack(&locked).expect("unpacked");
}

#[test]
fn a_package_that_is_another_than_its_index_says_is_refused() {
    let mut test = archive();
    let bytes = deb("Package: evil\nVersion: 1-1\nArchitecture: amd64\n", &[], &[ROOT]);
    test.add_bytes("good", "Package: good\nVersion: 1-1\nArchitecture: amd64\n", &bytes);
    test.add_bytes("junk", "Package: junk\nVersion: 1-1\nArchitecture: amd64\n", b"no package");
    test.publish();
    for name in ["good", "junk"] {
        let archive = test.open();
        let locked = archive.resolve(&spec(&format!("+{name}")), None).expect("resolved");
        archive.fetch(&locked, &|_| {}).expect("fetched");
        let error = message(&archive.unpack(&locked).expect_err("another package"));
        assert!(
            error.contains("says that its Package is `evil`") || error.contains("package `junk`"),
            "{error}"
        );
    }
}

#[test]
fn two_packages_with_one_file_need_a_replaces() {
    let mut test = archive();
    let file = |bytes| ("./usr/bin/tool", File::Plain(0o755, bytes));
    test.add("tool-a", "", &[], &[ROOT, file(b"a")]);
    test.add("tool-b", "", &[], &[ROOT, file(b"b")]);
    test.add("tool-c", "Replaces: tool-a (<< 2), tool-d\n", &[], &[ROOT, file(b"c")]);
    test.add("tool-d", "", &[], &[ROOT, file(b"d")]);
    test.add("tool-e", "", &[], &[ROOT, ("./usr/bin/tool/x", File::Plain(0o755, b""))]);
    test.publish();
    let unpack = |packages: &str| test.unpack(packages);
    let error = message(&unpack("+tool-a,tool-b").expect_err("both"));
    assert_eq!(
        error,
        "packages `tool-a` and `tool-b` both hold `usr/bin/tool`, and neither replaces the other"
    );
    let error = unpack("+tool-a,tool-e").expect_err("a file is no folder");
    assert!(matches!(error, ArchiveError::Unpack(UnpackError::Overwrite { .. })), "{error}");
    let store = test.store();
    for (packages, loser) in [("+tool-a,tool-c", "tool-a"), ("+tool-c,tool-d", "tool-d")] {
        let tree = unpack(packages).expect("one replaces the other");
        assert_eq!(text(&tree, &store, "usr/bin/tool"), "c");
        let list = |name: &str| text(&tree, &store, &format!("var/lib/dpkg/info/{name}.list"));
        assert!(list("tool-c").contains("/usr/bin/tool\n") && !list(loser).contains("/usr/bin/tool\n"));
    }
}

#[test]
fn hostile_members_stay_in_the_tree() {
    let mut test = archive();
    test.add("climber", "", &[], &[ROOT, ("./opt", File::Symlink("../../../.."))]);
    test.add("guest", "Depends: climber\n", &[], &[ROOT, ("./opt/etc/evil", File::Plain(0o644, b""))]);
    test.add("looper", "", &[], &[ROOT, ("./a", File::Symlink("b")), ("./b", File::Symlink("a"))]);
    test.add("zlost", "Depends: looper\n", &[], &[ROOT, ("./a/x", File::Plain(0o644, b""))]);
    test.publish();
    let unpack = |packages: &str| test.unpack(packages);
    let tree = unpack("+guest").expect("the tree's root has no parent");
    assert!(tree.get(&path("etc/evil")).is_some());
    let error = unpack("+zlost").expect_err("a loop leads to no folder");
    assert!(matches!(error, ArchiveError::Unpack(UnpackError::Overwrite { .. })), "{error}");
}

#[test]
fn a_kernel_package_becomes_a_kernel_tree() {
    let mut test = archive();
    let release = "6.12.1+deb13-cloud-amd64";
    let name = format!("linux-image-{release}");
    test.add(
        "linux-image-cloud-amd64",
        &format!("Depends: {name} (= 1-1)\n"),
        &[],
        &[ROOT, ("./usr/share/doc/", File::Folder(0o755))],
    );
    let module = |modinfo: &[u8]| crate::root::modules::testing::module(modinfo);
    let (blk, virtio) = (module(b"depends=virtio\0alias=virtio:d2v*\0"), module(b"depends=\0"));
    let at = |file: &str| format!("./usr/lib/modules/{release}/{file}");
    let paths = [
        format!("./boot/vmlinuz-{release}"),
        at("kernel/virtio_blk.ko"),
        at("kernel/virtio.ko"),
        at("modules.order"),
        at("modules.builtin"),
        at("modules.builtin.modinfo"),
    ];
    let contents: [&[u8]; 6] = [b"bzImage", &blk, &virtio, b"kernel/virtio.ko\n", b"kernel/fuse.ko\n", b""];
    let files = paths.iter().zip(contents).map(|(path, bytes)| (path.as_str(), File::Plain(0o644, bytes)));
    let files: Vec<_> = std::iter::once(ROOT).chain(files).collect();
    test.add(&name, "", &[], &files);
    test.publish();
    let archive = test.open();
    let locked = archive.resolve_kernel(SUITE, None).expect("resolved");
    assert_eq!((locked.spec.as_str(), locked.release.as_str()), ("debian:testing", release));
    archive.fetch_kernel(&locked, &|_| {}).expect("fetched");
    let kernel = archive.unpack_kernel(&locked).expect("unpacked");
    assert_eq!(
        kernel.modules.load_order(&["virtio-blk", "fuse"]).expect("an order"),
        ["kernel/virtio.ko", "kernel/virtio_blk.ko"]
    );
    assert_eq!(text(&kernel.tree, &test.store(), &kernel.image.to_string()), "bzImage");
    let dep = text(&kernel.tree, &test.store(), &format!("{}/modules.dep", kernel.modules_folder));
    assert_eq!(dep, "kernel/virtio.ko:\nkernel/virtio_blk.ko: kernel/virtio.ko\n");
    let mut none = TestArchive::new();
    none.add("base-files", "Essential: yes\n", &[], &[ROOT]);
    none.publish();
    let error = none.open().resolve_kernel(SUITE, None).expect_err("no kernel");
    assert!(matches!(error, ArchiveError::Kernel(KernelError::None { .. })), "{error}");
}

/// The judge is dpkg-deb: what it builds must read, whatever it compresses with.
#[test]
fn packages_that_dpkg_deb_builds_read() {
    let folder = tempfile::tempdir().expect("a folder");
    let root = folder.path().join("root");
    fs::create_dir_all(root.join("DEBIAN")).expect("made");
    fs::create_dir_all(root.join("usr/share").join("n".repeat(120))).expect("made");
    fs::write(
        root.join("DEBIAN/control"),
        "Package: hello\nVersion: 1-1\nArchitecture: all\nMaintainer: x <x@x>\nDescription: y\n",
    )
    .expect("written");
    let long = root.join("usr/share").join("n".repeat(120)).join("a-file");
    fs::write(&long, "hello").expect("written");
    fs::hard_link(&long, root.join("usr/share/linked")).expect("linked");
    for compression in ["gzip", "xz", "zstd", "none"] {
        let out = folder.path().join(format!("{compression}.deb"));
        let built = std::process::Command::new("dpkg-deb")
            .args(["--root-owner-group", "-Z", compression, "--build"])
            .args([&root, &out])
            .output();
        // A host that is not Debian's has no such judge.
        let Ok(built) = built else { return };
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        let mut contents = BTreeMap::new();
        let read = deb::Deb::read(fs::File::open(&out).expect("built"), &mut contents).expect(compression);
        assert_eq!(read.field("Package").expect("there"), "hello");
        assert!(matches!(node(&read.data, "usr/share/linked").kind, Kind::File { .. } | Kind::HardLink(_)));
        assert!(contents.values().any(|bytes| bytes == b"hello"));
    }
    let other = ar(&[("debian-binary", b"2.0\n"), ("control.tar", &tar_of(&[ROOT]))]);
    assert!(deb::Deb::read(&other[..], &mut BTreeMap::new()).is_err());
}
