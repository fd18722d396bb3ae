//! Recipes that are none, through the program: each is refused with its name, the place where there is one, and a way out.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};

use super::host::Host;

const GOOD: &str = "project = \"p\"\n[steps.a]\nrun = \"\"\"\necho a\necho b\n\"\"\"\n";

fn check(host: &Host) -> super::host::Told {
    host.run(&["recipe", "check"])
}

#[test]
fn a_recipe_with_a_mark_of_its_encoding_or_line_ends_of_another_system_is_the_same_recipe() {
    for text in [GOOD.to_owned(), format!("\u{feff}{GOOD}"), GOOD.replace('\n', "\r\n")] {
        let host = Host::new();
        host.file("kiln.toml", &text);
        assert_eq!(check(&host).succeeds().stdout, "a\n");
    }
}

#[test]
fn a_variable_is_set_for_one_run_and_what_cannot_be_set_is_said_with_what_can() {
    let host = Host::new();
    host.file(
        "kiln.toml",
        "variables = { layout = \"separate\", note = \"x\" }\n[steps.a]\nrun = \"a\"\nwhen = { layout = \"separate\" }\n\
         [steps.b]\nrun = \"b\"\nwhen = { layout = \"single\" }\n",
    );
    let set = |values: &[&str]| {
        let flags = values.iter().flat_map(|value| ["--set", value]);
        host.run(&["recipe", "check"].into_iter().chain(flags).collect::<Vec<_>>())
    };
    assert_eq!(set(&[]).succeeds().stdout, "a\n");
    assert_eq!(set(&["layout=single", "note=all = of it"]).succeeds().stdout, "b\n");
    assert_eq!(set(&["layout=single", "layout=separate"]).succeeds().stdout, "a\n");
    set(&["lay-out=single"])
        .fails(2, &["--set lay-out=single", "no variable `lay-out`"])
        .hints(&["`layout`"]);
    set(&["colour=red"]).fails(2, &["no variable `colour`"]).hints(&["layout, note"]);
    set(&["layout=singel"]).fails(2, &["no step of the recipe is for"]).hints(&["separate, single"]);
    set(&["layout"]).fails(2, &["`layout` is not NAME=VALUE"]);
    fs::remove_file(host.path("kiln.toml")).expect("it was there");
    let told = host.run(&["config", "--set", "layout=single"]);
    told.fails(2, &["no variable `layout`"]).hints(&["[variables]"]);
}

#[test]
fn bytes_that_are_no_text_are_refused_where_they_are() {
    for (bytes, words) in [
        (&b"project = \"p\"\n# caf\xe9\n"[..], ["kiln.toml:2:6", "not UTF-8"]),
        (b"\xff\xfep\0r\0", ["kiln.toml:1:1", "not UTF-8"]),
        (b"project = \"a\0b\"\n", ["kiln.toml:1:13", "invalid basic string"]),
        (b"project = \"p\"\n\0\0\0\0", ["kiln.toml:2:", "key with no value"]),
    ] {
        let host = Host::new();
        host.file("kiln.toml", bytes);
        check(&host).fails(2, &words);
    }
}

#[test]
fn a_recipe_that_is_nested_without_end_is_refused() {
    let deep = |open: &str, close: &str| format!("x = {}{}\n", open.repeat(100_000), close.repeat(100_000));
    for text in [deep("[", "]"), deep("{a=", "}"), format!("{}a = 1\n", "a.".repeat(100_000))] {
        let host = Host::new();
        host.file("kiln.toml", &text);
        check(&host).fails(2, &["kiln.toml:1:", "recurs"]);
    }
}

#[test]
fn a_recipe_of_a_hundred_megabytes_is_refused_before_it_is_read() {
    let host = Host::new();
    let path = host.file("kiln.toml", GOOD);
    let file = fs::OpenOptions::new().append(true).open(path).expect("ours");
    file.set_len(100 << 20).expect("a hole");
    check(&host).fails(2, &["kiln.toml` is longer than"]).hints(&["files of their own"]);
}

#[test]
fn what_is_no_file_and_has_the_name_of_a_recipe_is_refused_and_not_waited_for() {
    let path = |host: &Host| host.path("kiln.toml");
    type Make<'a> = &'a dyn Fn(&Host);
    let cases: [(Make<'_>, &str); 5] = [
        (&|host| fs::create_dir(path(host)).expect("a folder"), "a directory"),
        (
            &|host| {
                let mode = rustix::fs::Mode::from_raw_mode(0o644);
                rustix::fs::mknodat(rustix::fs::CWD, path(host), rustix::fs::FileType::Fifo, mode, 0)
                    .expect("a FIFO");
            },
            "no file",
        ),
        (&|host| symlink("/dev/zero", path(host)).expect("a link"), "no file"),
        (&|host| symlink("kiln.toml", path(host)).expect("a link"), "a link to no file"),
        (&|host| symlink("nowhere", path(host)).expect("a link"), "a link to no file"),
    ];
    for (make, what) in cases {
        let host = Host::new();
        make(&host);
        check(&host).fails(2, &["kiln.toml`", what]).hints(&["another name"]);
    }
}

#[test]
fn a_recipe_that_may_not_be_read_is_named() {
    let host = Host::new();
    let path = host.file("kiln.toml", GOOD);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).expect("ours");
    // Root may read all the same.
    if !rustix::process::geteuid().is_root() {
        check(&host).fails(2, &["cannot read", "kiln.toml"]).hints(&["ls -l"]);
    }
}

#[test]
#[ignore = "a process whose locks are refused; the test below starts it"]
fn a_kiln_without_locks() {
    use std::os::unix::process::CommandExt as _;
    let place = std::path::PathBuf::from(std::env::args().next_back().expect("a folder"));
    let refuse = seccompiler::SeccompAction::Errno(rustix::io::Errno::NOLCK.raw_os_error().unsigned_abs());
    let rules = [(libc::SYS_flock, Vec::new())].into_iter().collect();
    let filter = seccompiler::SeccompFilter::new(
        rules,
        seccompiler::SeccompAction::Allow,
        refuse,
        std::env::consts::ARCH.try_into().expect("a known processor"),
    );
    let program: seccompiler::BpfProgram = filter.expect("a filter").try_into().expect("a program");
    seccompiler::apply_filter(&program).expect("a filter");
    let mut kiln = std::process::Command::new(env!("CARGO_BIN_EXE_kiln"));
    panic!("{}", kiln.args(["store", "du", "--store"]).arg(place.join("store")).exec());
}

#[test]
fn a_store_where_there_are_no_locks_is_refused_with_a_way_out() {
    let host = Host::new();
    let mut child = std::process::Command::new(std::env::current_exe().expect("this program"));
    child.args(["--exact", "--ignored", "recipe::a_kiln_without_locks", "--nocapture"]).arg(host.path(""));
    let told = super::host::Told::by(&mut child);
    assert_ne!(told.code, Some(0));
    for word in ["kiln: error: ", "on a file system without locks", "kiln: hint: ", "local file system"] {
        assert!(told.stderr.contains(word), "{}", told.stderr);
    }
}
