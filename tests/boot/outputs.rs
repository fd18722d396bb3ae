//! Outputs: what is declared leaves the machine when the command succeeds, whole; nothing else does.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Stdio;

use kiln_artifact::tree::{Kind, Tree, TreePath};

use super::acceptance::held;
use super::host::{Host, Running};

#[test]
fn declared_outputs_arrive_whole_and_what_is_not_declared_is_named() {
    let host = Host::new();
    let script = r#"
        cd $WORK
        mkdir -p tree/sub/deep tree/empty other
        echo file > tree/file; echo deep > tree/sub/deep/file; : > tree/none
        chmod 755 tree/sub/deep/file; chmod 600 tree/none; chmod 750 tree/sub
        ln -s ../file tree/sub/link; ln -s /etc/passwd tree/absolute; ln -s nowhere tree/dangling
        ln tree/file tree/second
        truncate -s 64M tree/sparse; printf end >> tree/sparse
        printf 1 > "$(printf 'tree/new\nline')"; printf 2 > "$(printf 'tree/\377\376')"; printf 3 > 'tree/ %41\n'
        echo 1 > lib1.a; echo 2 > lib2.a; echo 3 > lib.so
        echo stray > other/stray; echo stray > stray
    "#;
    let told = host.script(&["--out", "tree", "--out", "./lib*.a"], script);
    told.ends(0, &["not declared, dropped", "more"]);
    let work = host.path("work");
    let mode = |name: &str| fs::metadata(work.join(name)).expect(name).permissions().mode() & 0o7777;
    assert_eq!(host.read("work/tree/file"), "file\n");
    assert_eq!(host.read("work/tree/second"), "file\n");
    assert_eq!(host.read("work/tree/sub/deep/file"), "deep\n");
    assert_eq!((mode("tree/file"), mode("tree/sub/deep/file"), mode("tree/none")), (0o644, 0o755, 0o600));
    assert_eq!(mode("tree/sub"), 0o750);
    assert!(work.join("tree/empty").is_dir());
    let link = |name: &str| fs::read_link(work.join(name)).expect(name).into_os_string();
    assert_eq!(link("tree/sub/link"), "../file");
    assert_eq!(link("tree/absolute"), "/etc/passwd");
    assert_eq!(link("tree/dangling"), "nowhere");
    let sparse = fs::metadata(work.join("tree/sparse")).expect("it is there");
    assert_eq!(sparse.len(), (64 << 20) + 3);
    assert!(sparse.blocks() * 512 < 1 << 20, "{} blocks", sparse.blocks());
    for (name, text) in [(&b"new\nline"[..], "1"), (b"\xff\xfe", "2"), (b" %41\\n", "3")] {
        let path = work.join("tree").join(OsStr::from_bytes(name));
        assert_eq!(fs::read_to_string(path).expect("it is there"), text, "{}", name.escape_ascii());
    }
    assert_eq!(host.read("work/lib2.a"), "2\n");
    for stray in ["stray", "other", "lib.so", ".kiln-staging"] {
        assert!(fs::symlink_metadata(work.join(stray)).is_err(), "{stray} was not declared");
    }
    assert!(["stray", "lib.so"].iter().any(|name| told.stderr.contains(name)), "{}", told.stderr);
    held("hermetic-step");
}

#[test]
fn a_command_that_fails_leaves_work_as_it_was() {
    let host = Host::new();
    host.file("work/old", "old");
    host.file("work/sub/kept", "kept");
    let script = "cd $WORK; echo new > old; rm -r sub; echo made > made; exit 1";
    host.script(&["--out", "old", "--out", "made", "--overwrite"], script).ends(1, &[]);
    assert_eq!((host.read("work/old").as_str(), host.read("work/sub/kept").as_str()), ("old", "kept"));
    assert_eq!(fs::read_dir(host.path("work")).expect("it is there").count(), 2);
}

#[test]
fn a_missing_output_fails_the_run_and_nothing_is_merged() {
    let host = Host::new();
    let told = host.script(&["--out", "made", "--out", "missing/*.a"], "echo made > $WORK/made");
    told.ends(125, &["`missing/*.a`"]);
    assert!(!told.stderr.contains("`made`"), "{}", told.stderr);
    assert!(!host.path("work/made").exists());
}

#[test]
fn a_file_that_a_person_changed_is_not_overwritten() {
    let host = Host::new();
    let run = |arguments: &[&str], text: &str| {
        host.script(
            &[&["--out", "*"], arguments].concat(),
            &format!("cd $WORK; for f in a b; do rm -f $f; echo {text} > $f; done"),
        )
    };
    run(&[], "1").ends(0, &[]);
    assert_eq!(host.read("work/a"), "1\n");
    host.file("work/b", "mine");
    let told = run(&[], "2");
    told.ends(125, &["work/b`", "not what kiln put there", "--overwrite"]);
    assert_eq!((host.read("work/a").as_str(), host.read("work/b").as_str()), ("1\n", "mine"));
    run(&["--overwrite"], "3").ends(0, &[]);
    assert_eq!(host.read("work/b"), "3\n");
}

#[test]
fn two_runs_at_one_work_both_end_and_leave_what_one_of_them_made() {
    let host = Host::new();
    let run = |word: &str| {
        let script = format!("mkdir $WORK/o; for i in 1 2 3; do echo {word} >$WORK/o/$i; done");
        let mut command = host.command(&["--out", "o", "--overwrite"], &["sh", "-c", &script]);
        Running::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()))
    };
    let runs = [run("one"), run("two")];
    let groups = runs.each_ref().map(|run| run.id());
    for run in runs {
        run.end().ends(0, &[]);
    }
    for group in groups {
        host.is_clean(group);
    }
    let words: BTreeSet<String> = (1..=3).map(|number| host.read(&format!("work/o/{number}"))).collect();
    assert_eq!(words.len(), 1, "of both: {words:?}");
}

#[test]
fn what_work_does_not_hold_is_refused_by_kind() {
    let host = Host::new();
    let told = host.script(&["--out", "out"], "mkdir $WORK/out; echo 1 > $WORK/out/a; mkfifo $WORK/out/pipe");
    told.ends(125, &["`out/pipe`", "FIFO"]);
    assert!(!host.path("work/out").exists());
}

/// A build that shows whatever differs between machines: order, time, names, numbers of processors.
const BUILD: &str = r#"
    mkdir -p $WORK/out/sub; cd $WORK/out
    find $SRCDIR -type f | xargs sha256sum > sums
    date +%s > date; stat -c '%Y %i' $SRCDIR/* > stats; hostname > name; nproc > /dev/null
    tar -cf sub/src.tar -C $SRCDIR .; gzip sub/src.tar; ln -s sums link; env | sort > env
    cat > input
"#;

#[test]
fn two_runs_of_a_build_give_the_same_bytes_whatever_carries_the_wire() {
    let host = Host::new();
    for number in 0..40 {
        host.file(&format!("src/{}/f{number}", number % 3), format!("{number}").repeat(number * 50));
    }
    let mut manifests = Vec::new();
    for (work, carrier, cpus) in [("one", "serial", "1"), ("other", "vsock", "2")] {
        let arguments = [
            "--json", "--src", "src", "--out", "out", "--work", work, "--wire", carrier, "--cpus", cpus,
            "--stdin",
        ];
        let arguments = [&arguments[..], &["--clock", "host"]].concat();
        // The clock is the host's: what depends on it is left out of what is compared.
        let script = BUILD.replace("date +%s > date;", "");
        let told = host.end(&mut host.command(&arguments, &["sh", "-c", &script]), &[7; 300_000]);
        assert_eq!(told.code, Some(0), "{told:?}");
        let end = told.events().pop().expect("an end");
        assert!(end["outputs"]["files"].as_u64().expect("a number") >= 6, "{end}");
        manifests.push(end["outputs"]["manifest"].clone());
    }
    let equal = |name: &str| {
        fs::read(host.path("one/out").join(name)).ok() == fs::read(host.path("other/out").join(name)).ok()
    };
    for name in ["sums", "stats", "name", "sub/src.tar.gz", "env", "input"] {
        assert!(equal(name), "{name} differs");
    }
    assert_eq!(manifests[0], manifests[1]);
    assert_eq!(fs::metadata(host.path("one/out/input")).expect("it is there").len(), 300_000);
}

#[test]
fn the_manifest_keeps_what_work_cannot_hold() {
    let host = Host::new();
    let script = r#"
        mkdir -p $WORK/out/sub; cd $WORK/out
        echo owned > owned; chown 70000:5 owned; chmod 6711 owned
        echo linked > sub/z; ln sub/z a; ln sub/z ../not-declared; ln -s ../../etc/passwd link
        chmod 1777 sub; truncate -s 1T sparse; rm sparse; : > empty; chmod 0 empty
        printf x > "$(printf 'new\nline \377')"
    "#;
    let told = host.script(&["--json", "--out", "out"], script);
    assert_eq!(told.code, Some(0), "{told:?}");
    let end = told.events().pop().expect("an end");
    assert_eq!(end["outputs"]["files"], 5, "{end}");
    let digest = end["outputs"]["manifest"].as_str().expect("a digest");
    let blobs = fs::canonicalize(host.path("store/blobs")).expect("the store");
    let manifest = fs::read(blobs.join(&digest[..2]).join(&digest[2..])).expect("a blob");
    let tree = Tree::parse_manifest(&manifest).expect("a manifest");
    let node =
        |path: &[u8]| tree.get(&TreePath::new(path).expect("a path")).unwrap_or_else(|| panic!("{path:?}"));
    let owned = &node(b"out/owned").meta;
    assert_eq!((owned.uid, owned.gid, owned.mode), (70_000, 5, 0o6711));
    assert_eq!(node(b"out/sub").meta.mode, 0o1777);
    assert_eq!(node(b"out/empty").meta.mode, 0);
    assert_eq!(node(b"out/link").kind, Kind::Symlink(b"../../etc/passwd"[..].into()));
    assert!(matches!(node(b"out/a").kind, Kind::File { size: 7, .. }));
    assert_eq!(node(b"out/sub/z").kind, Kind::HardLink(TreePath::new(b"out/a").expect("a path")));
    assert_eq!(node(b"out/new\nline \xff").meta.mode, 0o644);
    // WORK holds plain files of the user's own.
    let in_work = fs::metadata(host.path("work/out/owned")).expect("it was merged");
    assert_eq!((in_work.uid(), in_work.mode() & 0o7777), (rustix::process::geteuid().as_raw(), 0o711));
    assert_eq!(host.read("work/out/sub/z"), "linked\n");
}
