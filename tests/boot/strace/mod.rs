//! The record held against strace, program by program.
//!
//! `programs` has a folder for each; `run.sh` runs them under strace in a machine, whose output comes out. What strace
//! saw is turned into what the record has to say ([`trace`], [`asked`]), and the two are compared both ways: nothing may
//! be missing from the record, and little may be in it that no program asked for. Digests are compared with the host's
//! files. Once with the sources as they are, once below a writable layer, where overlayfs asks on the programs' behalf.

mod asked;
mod trace;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::Path;
use std::process::Command;

use kiln_digest::Digest;
use kiln_virtio::fs::record::PathBytes;
use serde_json::Value;

use self::asked::{Asked, Place, Question, World};
use super::host::Host;
use super::reads::of_share;

const ROOT: &str = "debian:bookworm+gcc,git,libc6-dev,make,python3-minimal,strace";
const PROGRAMS: [&str; 14] = [
    "tool",
    "find",
    "git",
    "gcc",
    "make",
    "python",
    "ld",
    "configure",
    "tar",
    "mmap",
    "list",
    "absent",
    "links",
    "exec",
];

fn run(folder: &Path, program: &str, arguments: &[&str]) {
    let mut command = Command::new(program);
    // Nothing of whoever runs the tests, and the same times everywhere.
    command.env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_SYSTEM", "/dev/null");
    for who in ["AUTHOR", "COMMITTER"] {
        command.env(format!("GIT_{who}_DATE"), "1980-01-01T00:00:00Z");
    }
    let output = command.args(arguments).current_dir(folder).output().expect(program);
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("the programs").flatten() {
        let to = to.join(entry.file_name());
        if entry.file_type().expect("a type").is_dir() {
            copy(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).expect("room");
        }
    }
}

/// The sources of all programs, with what a repository cannot hold.
fn sources(host: &Host) {
    let src = host.path("src");
    copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/boot/strace/programs"), &src);
    let odd = OsStr::from_bytes(b"odd \xff%");
    fs::write(src.join("find").join(odd), "odd").expect("a file");
    fs::write(src.join("find/deep/er/\u{fc}mlaut.c"), "").expect("a file");
    for number in 0..300 {
        host.file(&format!("src/find/wide/{number}.c"), "x");
        host.file(&format!("src/list/{number}"), "");
    }
    symlink("nowhere", src.join("find/dangling")).expect("a link");

    let git = src.join("git");
    fs::rename(git.join(".gitignore.in"), git.join(".gitignore")).expect("it is there");
    run(&git, "git", &["init", "-q"]);
    run(&git, "git", &["add", "."]);
    let who = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost"];
    run(&git, "git", &[&who[..], &["commit", "-q", "-m", "first"]].concat());
    host.file("src/git/modified", "modified since");
    host.file("src/git/untracked/file", "untracked");
    host.file("src/git/ignored.o", "ignored");

    let ld = src.join("ld");
    for name in ["start", "other", "unused"] {
        run(&ld, "cc", &["-c", "-fno-pie", &format!("{name}.c")]);
    }
    host.folder("src/ld/lib");
    run(&ld, "ar", &["rcD", "lib/libother.a", "other.o", "unused.o"]);
    host.file("src/mmap/large", vec![7; 3_000_001]);
    host.file("include/mounted.h", "#define MOUNTED 5\n");

    let links = src.join("links");
    for (link, text) in [
        ("to-real", "real"),
        ("loop", "loop"),
        ("dangling", "real/none"),
        ("over", "./to-real/.."),
        ("out", "/"),
        ("real/below/up", "../../to-real"),
    ] {
        symlink(text, links.join(link)).expect("a link");
    }
}

/// What strace saw of each program, and how each ended.
fn traces(host: &Host, world: &World) -> BTreeMap<String, Asked> {
    run(host.root(), "tar", &["-xf", "work/trace.tar"]);
    PROGRAMS
        .iter()
        .map(|program| {
            let mut asked = Asked::default();
            // The shell that starts it goes to its folder.
            let start = world.resolve(b"/", format!("/ws/project/{program}").as_bytes(), true, &mut asked);
            let start = start.expect("the program's folder");
            trace::replay(&host.path("trace").join(program), &start, world, &mut asked);
            ((*program).to_owned(), asked)
        })
        .collect()
}

/// What the document says, in the form in which strace's word is.
fn recorded(report: &Value) -> Asked {
    let mut recorded = Asked::default();
    for share in ["src", "mount0"] {
        let reads = of_share(report, share);
        let path = |value: &Value| {
            let path = PathBytes::from_escaped(value.as_str().expect("a path")).expect("an escaped path");
            Place { share: share.to_owned(), path: path.0 }
        };
        for entry in reads["entries"].as_array().expect("entries") {
            for (member, question) in Question::MEMBERS {
                if !entry[member].is_null() {
                    recorded.note(path(&entry["path"]), question);
                }
            }
        }
        for missed in reads["missed"].as_array().expect("a list") {
            recorded.note(path(missed), Question::Absence);
        }
    }
    recorded
}

/// All digests of the document, by the definitions of docs/reads.md from the host's files.
fn digests_are_the_hosts(report: &Value, world: &World) {
    let mut compared = 0;
    for share in ["src", "mount0"] {
        for entry in of_share(report, share)["entries"].as_array().expect("entries") {
            let path = PathBytes::from_escaped(entry["path"].as_str().expect("a path")).expect("a path").0;
            let path = world.on_host(&Place { share: share.to_owned(), path });
            for (member, question) in Question::MEMBERS {
                if !entry[member].is_null() {
                    let digest = entry[member]["digest"].as_str().expect("a digest");
                    assert_eq!(digest, shown(&path, question).to_string(), "{member} of {}", path.display());
                    compared += 1;
                }
            }
        }
    }
    assert!(compared > 150, "{compared} digests");
}

fn shown(path: &Path, question: Question) -> Digest {
    let meta = path.symlink_metadata().expect("it is there");
    let letter = |kind: fs::FileType| match () {
        () if kind.is_dir() => 'd',
        () if kind.is_symlink() => 'l',
        () if kind.is_fifo() => 'p',
        () => 'f',
    };
    match question {
        Question::Metadata => {
            let size = if meta.is_dir() { String::new() } else { format!(" {}", meta.size()) };
            Digest::of(format!("{} {:o}{size}\n", letter(meta.file_type()), meta.mode() & 0o7777).as_bytes())
        }
        Question::Content => Digest::of(&fs::read(path).expect("a file")),
        Question::Target => Digest::of(fs::read_link(path).expect("a link").as_os_str().as_bytes()),
        Question::Listing => {
            let entries = fs::read_dir(path).expect("a folder").flatten();
            let mut lines: Vec<Vec<u8>> = entries
                .map(|entry| {
                    let letter = letter(entry.file_type().expect("a type"));
                    [letter.to_string().as_bytes(), entry.file_name().as_bytes(), b"\0"].concat()
                })
                .collect();
            lines.sort();
            Digest::of(&lines.concat())
        }
        // Nothing here has any.
        Question::Xattrs | Question::Absence => Digest::of(b""),
    }
}

/// Runs the programs and compares. Returns what was recorded and no program asked for.
fn compare(layered: bool) -> BTreeSet<(Place, Question)> {
    let host = Host::new();
    sources(&host);
    let mut kiln = host.kiln();
    kiln.args([
        "run",
        "--root",
        ROOT,
        "--src",
        "src",
        "--mount",
        "include:/opt/include",
        "--reads",
        "reads.json",
    ]);
    kiln.args(["--out", "trace.tar"]);
    let into = if layered { "." } else { "/tmp/made" };
    if layered {
        kiln.arg("--src-writable");
    }
    kiln.args([
        "--",
        "sh",
        "-c",
        &fs::read_to_string(host.path("src/run.sh")).expect("a script"),
        "sh",
        into,
    ]);
    let told = host.end(&mut kiln, &[]);
    told.ends(0, &[]);
    let report: Value = serde_json::from_str(&host.read("reads.json")).expect("JSON");
    assert_eq!(report["complete"], true, "{}", told.stderr);
    let world = World::new(&[
        ("src", "/ws/project", &host.path("src")),
        ("mount0", "/opt/include", &host.path("include")),
    ]);
    let recorded = recorded(&report);
    let programs = traces(&host, &world);
    let mut extras = recorded.0.clone();
    if layered {
        // overlayfs keeps notes of its own in extended attributes, and looks for them in all that is looked up.
        extras.retain(|(place, question)| {
            *question != Question::Xattrs || !recorded.0.contains(&(place.clone(), Question::Metadata))
        });
    }
    println!(
        "{:<10} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8}",
        "program", "metadata", "content", "target", "listing", "xattrs", "absent"
    );
    for (program, asked) in &programs {
        let count = |question| asked.0.iter().filter(|(_, other)| *other == question).count();
        let counts = Question::ALL.map(|question| format!("{:>8}", count(question)));
        println!("{program:<10} {}", counts.join(" "));
        let lacking: Vec<_> = asked.0.difference(&recorded.0).collect();
        assert!(lacking.is_empty(), "{program} asked, and it is not in the record: {lacking:#?}");
        assert!(asked.0.len() > 3, "{program} did next to nothing");
        assert_eq!(told.section(program).last(), Some(&"exit 0"), "{program}: {}", told.text());
        extras.retain(|item| !asked.0.contains(item));
    }
    digests_are_the_hosts(&report, &world);
    println!("recorded {}, asked by no program {}:", recorded.0.len(), extras.len());
    for (place, question) in &extras {
        println!("  {question:?} of {place:?}");
    }
    extras
}

#[test]
fn the_record_is_what_strace_sees_and_little_more() {
    let extras = compare(false);
    assert!(extras.len() <= 3, "{extras:?}");
}

#[test]
#[ignore = "takes minutes: `ci/test slow` runs it"]
fn below_a_writable_layer_the_record_is_what_strace_sees_and_little_more() {
    let extras = compare(true);
    assert!(extras.len() <= 3, "{extras:?}");
}
