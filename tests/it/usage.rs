//! Arguments that kiln does not take: exit code 2, the argument and what would be taken, before anything is made.

use super::host::{Host, Told};

/// `kiln run` with `arguments` and a command that must never run.
fn run(host: &Host, arguments: &[&str]) -> Told {
    let told = host.run(&[&["run"], arguments, &["--", "false"]].concat());
    host.is_untouched();
    told
}

#[test]
fn without_a_verb_the_usage_is_shown() {
    let told = Host::new().run(&[]);
    assert_eq!(told.code, Some(2));
    assert!(told.stderr.contains("Usage: kiln"), "{}", told.stderr);
    assert!(told.stderr.contains("Examples:"), "{}", told.stderr);
}

#[test]
fn help_has_examples_and_goes_to_standard_output() {
    let host = Host::new();
    let verbs = ["run", "exec", "shell", "ps", "stop", "sign", "kernel", "lock"];
    for arguments in std::iter::once(vec!["--help"]).chain(verbs.map(|verb| vec![verb, "--help"])) {
        let told = host.run(&arguments);
        assert_eq!((told.code, told.stderr.as_str()), (Some(0), ""));
        assert!(told.stdout.contains("Examples:") && told.stdout.contains("  kiln "), "{arguments:?}");
    }
}

#[test]
fn a_run_needs_a_command() {
    let told = Host::new().run(&["run"]);
    assert_eq!(told.code, Some(2));
    assert!(told.stderr.contains("<CMD>"), "{}", told.stderr);
}

#[test]
fn a_root_of_an_unknown_kind_is_refused_with_the_kinds_that_are() {
    for root in ["bookworm", "ftp:x", "debian:", ":x", ""] {
        let told = run(&Host::new(), &["--root", root]);
        told.fails(2, &[&format!("`{root}`"), "debian:SUITE", "dir:PATH", "file:ARCHIVE", "live:PATH"]);
    }
}

#[test]
fn a_root_of_packages_that_cannot_be_is_refused_before_anything_is_fetched() {
    for (root, word) in [
        ("debian:Book worm", "`Book worm`"),
        ("debian:../sid", "`../sid`"),
        ("debian:bookworm+", "package"),
        ("debian:bookworm+GCC", "`GCC`"),
        ("debian:bookworm+gcc,,make", "package"),
        ("debian:bookworm+gcc:amd64", "architecture"),
        ("debian:bookworm+gcc=", "version"),
    ] {
        run(&Host::new(), &["--root", root]).fails(2, &[word]).hints(&[]);
    }
}

#[test]
fn machines_that_are_not_there_are_named_with_what_to_do() {
    let host = Host::new();
    let told = host.run(&["ps"]);
    assert_eq!((told.code, told.stdout.lines().count()), (Some(0), 1), "{}", told.stderr);
    assert!(told.stdout.starts_with("NAME"), "{}", told.stdout);
    assert_eq!(host.run(&["ps", "--json"]).stdout, "");
    host.run(&["exec", "nobody", "--", "true"]).fails(125, &["no machine `nobody`"]).hints(&["--keep"]);
    host.run(&["stop", "../x"]).fails(1, &["no machine `../x`"]);
    assert_eq!(host.run(&["stop", "--all"]).succeeds().stdout, "");
    // Asked before the machine is looked for.
    host.run(&["shell", "nobody"]).fails(2, &["not a terminal"]).hints(&["kiln exec"]);
    host.run(&["exec", "--tty", "nobody", "--", "true"]).fails(2, &["not a terminal"]);
    for arguments in [&["stop"][..], &["stop", "--all", "x"], &["exec", "x"], &["shell"]] {
        assert_eq!(host.run(arguments).code, Some(2), "{arguments:?}");
    }
}

#[test]
fn when_to_keep_a_machine_is_read_or_refused() {
    run(&Host::new(), &["--keep=sometimes"]).fails(2, &["failure or always", "`sometimes`"]);
    run(&Host::new(), &["--keep", "--keep-for", "long"]).fails(2, &["--keep-for", "`long`"]);
    // The kiln that can stay is started by kiln alone.
    Host::new().run(&["__keep", "run", "--keep", "--", "true"]).fails(2, &["for kiln itself"]);
}

#[test]
fn outputs_that_leave_work_are_refused() {
    for glob in ["../x", "/etc/passwd", "a/../../x", "a/.."] {
        run(&Host::new(), &["--out", glob]).fails(2, &[&format!("`{glob}`"), "escapes WORK"]);
    }
}

#[test]
fn outputs_that_are_no_globs_are_refused() {
    for glob in ["", "a//b", "a[", "{a"] {
        run(&Host::new(), &["--out", glob]).fails(2, &[&format!("`{glob}`"), "not a glob"]);
    }
}

#[test]
fn sizes_and_times_are_read_or_refused_with_their_form() {
    for (flag, value, word) in [
        ("--memory", "lots", "2G"),
        ("--memory", "-1", "2G"),
        ("--memory", "64M", "128M"),
        ("--memory", "0", "128M"),
        ("--memory", "134217727", "128M"),
        ("--memory", "8796093022209", "8T is the most"),
        ("--memory", "18446744073709551615", "8T is the most"),
        ("--scratch", "0", "1M"),
        ("--scratch", "18446744073709551615", "8T is the most"),
        ("--scratch", "1.5G", "2G"),
        ("--scratch", "1", "1M"),
        ("--timeout", "soon", "90s"),
        ("--grace", "1d", "90s"),
    ] {
        run(&Host::new(), &[&format!("{flag}={value}")]).fails(2, &[value, word]);
    }
}

#[test]
fn a_size_that_is_refused_names_its_flag() {
    for (flag, value) in
        [("--memory", "lots"), ("--scratch", "some"), ("--timeout", "soon"), ("--grace", "1d")]
    {
        run(&Host::new(), &[flag, value]).fails(2, &[flag]);
    }
}

#[test]
fn a_number_of_processors_is_one_to_sixty_four() {
    for count in ["0", "65"] {
        run(&Host::new(), &["--cpus", count]).fails(2, &["--cpus", "1 to 64"]);
    }
}

#[test]
fn words_that_an_option_does_not_know_are_refused_with_those_it_does() {
    for (flag, choices) in [
        ("--clock", "host or fixed"),
        ("--attributes", "fixed or real"),
        ("--wire", "serial or vsock"),
        ("--require", "kvm or jail"),
    ] {
        run(&Host::new(), &[flag, "moon"]).fails(2, &[flag, choices, "`moon`"]);
    }
}

#[test]
fn an_unknown_backend_is_refused_with_its_origin() {
    let host = Host::new();
    run(&host, &["--backend", "moon"])
        .fails(2, &["backend", "flag", "`moon`", "auto, kvm, qemu, tcg or vmm"]);
    let told = Told::by(host.kiln().env("KILN_BACKEND", "moon").args(["run", "--", "true"]));
    told.fails(2, &["environment KILN_BACKEND", "`moon`"]);
}

#[test]
fn a_variable_that_the_host_does_not_have_is_refused() {
    let host = Host::new();
    run(&host, &["--env", "NO_SUCH_VARIABLE"]).fails(2, &["NO_SUCH_VARIABLE"]);
    run(&host, &["--env", "=x"]).fails(2, &["`=x`"]);
    run(&host, &["--env", "SOURCE_DATE_EPOCH=today"]).fails(2, &["SOURCE_DATE_EPOCH", "today"]);
}

#[test]
fn modules_without_their_kernel_are_refused() {
    let told = Host::new().run(&["run", "--modules", "/lib/modules", "--", "true"]);
    assert_eq!(told.code, Some(2));
    assert!(told.stderr.contains("--kernel"), "{}", told.stderr);
}

#[test]
fn an_error_is_an_event_too_where_events_are_asked_for() {
    let host = Host::new();
    host.file("kiln.toml", "[steps.s]\nrun = \"x\"\n");
    for (told, word) in [
        (run(&host, &["--json", "--root", "moon"]), "`moon`"),
        (run(&host, &["--json", "--step", "s", "--needs", "s"]), "cannot need itself"),
        (host.run(&["build", "--json", "nothing"]), "`nothing`"),
    ] {
        told.fails(2, &[word]);
        host.is_as_the_schema_says("events", &told);
        let event: serde_json::Value = serde_json::from_str(told.stdout.trim()).expect("one line of JSON");
        assert_eq!(event["event"], "error");
        assert!(event["text"].as_str().expect("text").contains(word));
    }
}

#[test]
fn a_build_that_cannot_begin_leaves_a_timeline_and_an_unwritable_one_stops_it_before() {
    let host = Host::new();
    host.run(&["build", "--trace-out", "trace.json"]).fails(2, &["kiln.toml"]);
    let text = std::fs::read_to_string(host.path("trace.json")).expect("it was written");
    assert!(super::judge::timeline(&text).is_empty());
    host.run(&["build", "--trace-out", "nowhere/trace.json"]).fails(2, &["cannot write the timeline"]);
}

#[test]
fn what_has_no_schema_is_said_to_have_none() {
    let host = Host::new();
    host.run(&["schema", "moon"]).fails(2, &["`moon`", "events"]);
    host.run(&["schema", "recipe"]).fails(2, &["`recipe`"]).hints(&["kiln recipe schema"]);
    host.is_as_the_schema_says("store-du", host.run(&["store", "du", "--json"]).succeeds());
}

#[test]
fn text_from_arguments_reaches_no_terminal_as_control_characters() {
    let told = run(&Host::new(), &["--root", "moon\u{1b}[31m"]);
    assert_eq!(told.code, Some(2));
    assert!(!told.stderr.contains('\u{1b}'), "{:?}", told.stderr);
}

#[test]
fn a_file_that_outgrows_the_limit_of_the_shell_is_named_and_not_left_in_part() {
    let host = Host::new();
    let limited = host.script("limited", "ulimit -f 1\nexec \"$@\"");
    let kiln = host.kiln();
    let told = Told::by(host.program(&limited).arg(kiln.get_program()).arg("init"));
    told.fails(1, &["kiln.toml", "File too large"]);
    assert!(!host.path("kiln.toml").exists());
    Told::by(host.kiln().arg("init")).succeeds();
    assert!(host.path("kiln.toml").exists());
}

#[test]
fn a_named_step_takes_only_what_it_can_be_known_by() {
    for (arguments, words) in [
        (&["--needs", "a"][..], &["--step"][..]),
        (&["--scope", "a"], &["--step"]),
        (&["--step", "a", "--mount", "/tmp:/tmp"], &["--mount"]),
        (&["--step", "a", "--keep"], &["--keep"]),
        (&["--step", "a", "--toolbox"], &["--toolbox"]),
        (&["--step", "../a"], &["`../a` is no name for a step"]),
        (&["--step", "a", "--needs", "-"], &["`-` is no name for a step"]),
        (&["--step", "a", "--needs", "a"], &["cannot need itself"]),
    ] {
        let told = run(&Host::new(), arguments);
        assert_eq!(told.code, Some(2), "{arguments:?}");
        assert!(words.iter().all(|word| told.stderr.contains(word)), "{arguments:?}: {}", told.stderr);
    }
}
