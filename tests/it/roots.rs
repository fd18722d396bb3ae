//! `kiln root`, and images as roots: what is in the store, what it holds, how it differs, and who may remove it. The
//! machines here are scripts that end or hang, so roots are made and never booted.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use super::host::{Host, Told};
use super::qemu::{Hanging, kernel};

/// A host with two trees that differ in every way a file can.
fn host() -> Host {
    let host = Host::new();
    host.file("kernel", kernel());
    host.file("agent", "an agent");
    for (tree, changed) in [("one", false), ("other", true)] {
        host.file(&format!("{tree}/same"), "same");
        host.file(&format!("{tree}/bin/tool"), if changed { "new" } else { "old" });
        let mode = fs::Permissions::from_mode(if changed { 0o4755 } else { 0o755 });
        fs::set_permissions(host.path(&format!("{tree}/bin/tool")), mode).expect("a mode");
        symlink(if changed { "there" } else { "here" }, host.path(&format!("{tree}/link"))).expect("a link");
        host.file(&format!("{tree}/only-{tree}"), "x");
        let attribute = if changed { "2" } else { "1" };
        let same = host.path(&format!("{tree}/same"));
        let mut setfattr = Command::new("setfattr");
        setfattr.args(["-n", "user.note", "-v", attribute]).arg(same);
        assert!(setfattr.status().expect("setfattr").success());
        // All times alike: what differs is what is said to differ.
        let mut touch = Command::new("find");
        touch.arg(host.path(tree)).args(["-exec", "touch", "-h", "-d", "@1600000000", "{}", "+"]);
        assert!(touch.status().expect("touch").success());
    }
    host
}

/// Makes the root `spec` by a run whose QEMU ends at once.
fn make(host: &Host, spec: &str) -> Told {
    let qemu =
        host.script("qemu", "[ \"$1\" = --version ] && echo 'QEMU emulator version 10.0.2' && exit\nexit 1");
    let mut command = host.kiln();
    command.env("KILN_QEMU", qemu).env("KILN_AGENT", host.path("agent"));
    Told::by(command.args(["run", "--kernel", "kernel", "--root", spec, "--", "true"]))
}

/// As [`make`], where it is made.
fn made(host: &Host, spec: &str) {
    make(host, spec).fails(125, &["died at start"]);
}

/// What `kiln root ls --json` says.
fn list(host: &Host) -> Vec<Value> {
    let told = host.run(&["root", "ls", "--json"]);
    host.is_as_the_schema_says("root-ls", told.succeeds());
    serde_json::from_str(&told.stdout).expect("JSON")
}

fn pack(tool: &str, arguments: &[&str], folder: &Path) {
    let output = Command::new(tool).args(arguments).current_dir(folder).output().expect(tool);
    assert!(output.status.success(), "{tool}: {}", String::from_utf8_lossy(&output.stderr));
}

/// An image of the tree `one`.
fn squashfs(host: &Host, image: &str, options: &[&str]) {
    let fixed = ["one", image, "-noappend", "-quiet", "-no-progress"];
    pack("mksquashfs", &[&fixed, options].concat(), host.root());
}

#[test]
fn a_store_without_roots_lists_none() {
    let host = Host::new();
    assert_eq!(host.run(&["root", "ls"]).succeeds().stdout.lines().count(), 1);
    assert_eq!(list(&host), Vec::<Value>::new());
    host.run(&["root", "show", "debian:bookworm"]).fails(1, &["`debian:bookworm`"]).hints(&["kiln root ls"]);
}

#[test]
fn roots_are_listed_with_what_they_were_made_of() {
    let host = host();
    made(&host, "dir:one");
    made(&host, "dir:other");
    let all = list(&host);
    assert_eq!(all.len(), 2);
    assert_eq!(all[0]["made-of"][0], format!("dir:{}", host.path("other").display()));
    assert_eq!((&all[0]["image"], &all[0]["packages"]), (&"erofs".into(), &0.into()));
    assert!(all[0]["size"].as_u64().expect("a number") >= 4096);
    assert_ne!(all[0]["digest"], all[1]["digest"]);
    let told = host.run(&["root", "ls"]);
    let digits = &all[0]["digest"].as_str().expect("a digest")[..12];
    assert!(told.stdout.lines().nth(1).expect("a root").starts_with(digits), "{}", told.stdout);
    // What is used comes first.
    made(&host, "dir:one");
    assert_eq!(list(&host)[0]["digest"], all[1]["digest"]);
}

#[test]
fn a_root_is_shown_by_its_name_or_by_some_digits() {
    let host = host();
    made(&host, "dir:other");
    let digest = list(&host)[0]["digest"].as_str().expect("a digest").to_owned();
    for name in ["dir:other", "dir:./one/../other", &digest, &digest[..6], &format!("sha256:{digest}")] {
        let told = host.run(&["root", "show", name]);
        told.succeeds();
        for word in [&digest, "-rwsr-xr-x", "/bin/tool", "/link -> there", "/same [user.note]"] {
            assert!(told.stdout.contains(word), "no {word} in: {}", told.stdout);
        }
    }
    let told = host.run(&["root", "show", "--json", &digest]);
    host.is_as_the_schema_says("root-show", &told);
    let shown: Value = serde_json::from_str(&told.stdout).expect("JSON");
    let tree = shown["tree"].as_array().expect("a tree");
    let node = |path: &str| tree.iter().find(|node| node["path"] == path).expect(path);
    assert_eq!(node("/bin/tool")["digest"], kiln_digest::Digest::of(b"new").to_string());
    assert_eq!((&node("/bin/tool")["mode"], &node("/bin/tool")["size"]), (&"4755".into(), &3.into()));
    assert_eq!((&node("/link")["kind"], &node("/link")["target"]), (&"symlink".into(), &"there".into()));
    assert_eq!(node("/same")["xattrs"]["user.note"], "2");
    assert_eq!(node("/")["kind"], "directory");
}

#[test]
fn names_that_are_no_roots_are_refused() {
    let host = host();
    for name in ["moon", "abc", "0123456789abcdefg", ""] {
        host.run(&["root", "show", name]).fails(2, &[&format!("`{name}`"), "digest"]);
        host.run(&["root", "rm", name]).fails(2, &[&format!("`{name}`")]);
    }
    host.run(&["root", "show", "abcdef"]).fails(1, &["`abcdef`"]);
}

#[test]
fn two_roots_are_compared_as_diff_does() {
    let host = host();
    made(&host, "dir:one");
    made(&host, "dir:other");
    let same = host.run(&["root", "diff", "dir:one", "dir:one"]);
    assert_eq!((same.code, same.stdout.as_str()), (Some(0), ""));
    let told = host.run(&["root", "diff", "dir:one", "dir:other"]);
    let expected = "~ /bin/tool: content, mode (0755 -> 4755)\n~ /link: content\n- /only-one\n+ /only-other\n\
                    ~ /same: xattrs (user.note)\n";
    assert_eq!((told.code, told.stdout.as_str()), (Some(1), expected));
    let told =
        host.run(&["root", "diff", "--ignore", "content", "--ignore", "xattrs", "dir:one", "dir:other"]);
    assert_eq!(told.stdout, "~ /bin/tool: mode (0755 -> 4755)\n- /only-one\n+ /only-other\n");
    let told = host.run(&["root", "diff", "--json", "dir:one", "dir:other"]);
    host.is_as_the_schema_says("root-diff", &told);
    let lines: Vec<Value> =
        told.stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(lines[0]["aspects"], serde_json::json!(["content", "mode"]));
    assert_eq!((&lines[2]["path"], &lines[2]["change"]), (&"/only-one".into(), &"removed".into()));
    // Trouble is neither the same nor different.
    host.run(&["root", "diff", "dir:one", "dir:nowhere"]).fails(2, &["dir:nowhere"]);
    host.run(&["root", "diff", "dir:one", "moon"]).fails(2, &["`moon`"]);
    host.run(&["root", "diff", "--ignore", "moon", "dir:one", "dir:other"]).fails(2, &["--ignore", "`moon`"]);
    host.run(&["root", "diff", "--store", "kernel", "dir:one", "dir:other"]).fails(2, &["not a directory"]);
}

#[test]
fn a_root_that_is_removed_is_gone_with_its_image() {
    let host = host();
    made(&host, "dir:one");
    made(&host, "dir:other");
    let images = || fs::read_dir(host.path("store/images")).expect("a store").count();
    assert_eq!(images(), 2);
    host.run(&["root", "rm", "dir:one", "dir:nowhere"]).fails(1, &["dir:nowhere"]);
    assert_eq!(images(), 2, "nothing is removed where one name is bad");
    let told = host.run(&["root", "rm", "dir:one", "dir:one"]);
    assert_eq!(told.succeeds().stdout.lines().count(), 1);
    assert_eq!((images(), list(&host).len()), (1, 1));
    host.run(&["root", "show", "dir:one"]).fails(1, &["dir:one"]);
    made(&host, "dir:one");
    assert_eq!((images(), list(&host).len()), (2, 2));
}

#[test]
fn a_root_that_a_machine_has_is_not_removed() {
    let host = host();
    host.folder("root");
    host.folder("src");
    let mut running = Hanging::start(&host);
    let told = host.run(&["root", "rm", "dir:root"]);
    told.fails(1, &["in use"]).hints(&["wait"]);
    assert_eq!(list(&host).len(), 1);
    running.kill();
    // Its machine goes a moment after kiln, and holds the image until then.
    running.is_gone();
    host.run(&["root", "rm", "dir:root"]).succeeds();
    assert_eq!(list(&host).len(), 0);
}

#[test]
fn an_image_is_a_root_by_its_bytes_whatever_its_name() {
    let host = host();
    squashfs(&host, "rootfs.tar", &["-comp", "xz"]);
    pack("mkfs.erofs", &["--quiet", "rootfs.tar.gz", "one"], host.root());
    for (name, format) in [("rootfs.tar", "squashfs"), ("rootfs.tar.gz", "erofs")] {
        made(&host, &format!("file:{name}"));
        let bytes = fs::read(host.path(name)).expect("an image");
        let root = &list(&host)[0];
        assert_eq!(root["digest"], kiln_digest::Digest::of(&bytes).to_string());
        assert_eq!(root["image"], format);
        // Names are another matter: what is in it is what was packed.
        let told = host.run(&["root", "show", &format!("file:{name}")]);
        assert!(told.succeeds().stdout.contains("/bin/tool"), "{}", told.stdout);
    }
    made(&host, "dir:one");
    let told = host.run(&["root", "diff", "dir:one", "file:rootfs.tar"]);
    assert_eq!((told.code, told.stdout.as_str()), (Some(0), ""), "{}", told.stderr);
}

#[test]
fn an_image_that_changes_later_changes_no_root() {
    let host = host();
    squashfs(&host, "r.img", &["-nopad"]);
    made(&host, "file:r.img");
    let first = list(&host)[0]["digest"].clone();
    squashfs(&host, "r.img", &["-comp", "lz4"]);
    let told = host.run(&["root", "show", "file:r.img"]);
    assert!(told.succeeds().stdout.contains(first.as_str().expect("a digest")));
    made(&host, "file:r.img");
    let all = list(&host);
    assert_eq!(all.len(), 2);
    assert_ne!(all[0]["digest"], first);
    fs::remove_file(host.path("r.img")).expect("it was there");
    for root in &all {
        host.run(&["root", "show", root["digest"].as_str().expect("a digest")]).succeeds();
    }
}

#[test]
fn an_image_that_cannot_be_a_root_is_named_with_the_reason() {
    let host = host();
    host.file("one/large", [7; 50_000]);
    squashfs(&host, "good.sqfs", &[]);
    squashfs(&host, "lzma.sqfs", &["-comp", "lzma"]);
    pack("mkfs.erofs", &["--quiet", "good.img", "one"], host.root());
    for (name, image, length) in [("cut.sqfs", "good.sqfs", 200), ("cut.img", "good.img", 4096)] {
        let bytes = fs::read(host.path(image)).expect("an image");
        host.file(name, &bytes[..length]);
    }
    let mut old = fs::read(host.path("good.sqfs")).expect("an image");
    old[28] = 3;
    host.file("old.sqfs", old);
    for (name, words) in [
        ("lzma.sqfs", &["lzma", "does not read"][..]),
        ("cut.sqfs", &["squashfs", "cut off"]),
        ("cut.img", &["erofs", "cut off"]),
        ("old.sqfs", &["squashfs", "not 4.0"]),
    ] {
        make(&host, &format!("file:{name}")).fails(2, &[&format!("`{name}`")]).fails(2, words);
    }
    assert_eq!(list(&host).len(), 0);
}

#[test]
fn what_an_open_would_wait_for_is_refused_at_once() {
    let host = host();
    pack("mkfifo", &["pipe"], host.root());
    let _socket = std::os::unix::net::UnixListener::bind(host.path("socket")).expect("a socket");
    make(&host, "file:pipe").fails(2, &["`pipe`", "not a regular file"]).hints(&["tar archive", "squashfs"]);
    make(&host, "file:socket").fails(2, &["`socket`"]);
    make(&host, "file:/dev/zero").fails(2, &["`/dev/zero`", "not a regular file"]);
    host.is_untouched();
}

#[test]
fn a_reader_that_has_seen_enough_ends_no_list_in_an_error() {
    let host = host();
    for number in 0..3000 {
        File::create(host.path(&format!("one/file{number}"))).expect("room");
    }
    made(&host, "dir:one");
    let mut command = host.kiln();
    command.args(["root", "show", "dir:one"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("kiln can be started");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("kiln is ours");
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), ""));
}
