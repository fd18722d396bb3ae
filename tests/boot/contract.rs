//! What a step sees: a fixed environment, read-only inputs, no network, and nothing else of the host.

use std::collections::BTreeSet;
use std::os::unix::fs::symlink;

use super::acceptance::held;
use super::host::{Host, TOKEN};

#[test]
fn the_environment_is_the_fixed_one_and_what_the_step_names() {
    let host = Host::new();
    let told = host.run(&["--quiet", "--env", "A=b=c", "--env", TOKEN.0, "--env", "TZ=Asia/Tokyo"], &["env"]);
    told.ends(0, &[]);
    let mut lines: Vec<&str> = told.text().lines().collect();
    lines.sort_unstable();
    let token = format!("{}={}", TOKEN.0, TOKEN.1);
    let mut expected = vec![
        "A=b=c",
        "HOME=/root",
        &token,
        "LANG=C.UTF-8",
        "LC_ALL=C.UTF-8",
        "LOGNAME=root",
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "SHELL=/bin/sh",
        "SOURCE_DATE_EPOCH=315532800",
        "TAG=latest",
        "TERM=dumb",
        "TZ=Asia/Tokyo",
        "USER=root",
        "WORK=/x/project",
    ];
    expected.sort_unstable();
    assert_eq!(lines, expected);
}

#[test]
fn a_step_sees_its_inputs_and_nothing_else_of_the_host() {
    let host = Host::new();
    host.file("home/.ssh/lua/kiln-test-key", "a key");
    host.file("outside/kiln-test-outside", "not shared");
    host.file("src/b/deep", "deep");
    for name in ["c", "a", "e", "d"] {
        host.file(&format!("src/{name}"), name);
    }
    symlink(host.path("outside/kiln-test-outside"), host.path("src/out")).expect("a link");
    symlink("../outside/kiln-test-outside", host.path("src/up")).expect("a link");
    host.file("more/m", "more");
    host.file("work/before", "from before");
    let script = format!(
        r#"
        echo '[where]'; pwd
        echo '[list]'; find . -maxdepth 1 ! -name . | sed s,./,,
        echo '[stat]'; stat -c '%u %g %Y %a %s' a
        echo '[touch]'; touch $SRCDIR/x 2>&1; touch $SRCDIR/a 2>&1; rm $SRCDIR/a 2>&1; touch /m/x 2>&1
        echo '[links]'; cat out up 2>/dev/null; readlink out
        echo '[mount]'; cat /m/m; echo
        echo '[work]'; cat $WORK/before; rm $WORK/before; echo changed > $WORK/before; cat $WORK/before
        echo '[net]'; ls /sys/class/net; grep -c : /proc/net/dev; cat /proc/net/route | wc -l
        echo '[name]'; hostname; id -u; umask
        echo '[clock]'; date +%s
        echo '[input]'; cat
        echo '[host]'; ls -d {0} {0}/src /home/* 2>/dev/null
        echo '[search]'; find / -name 'kiln-test-*' 2>/dev/null | grep -v '^/proc'
        echo '[processes]'; ls -d /proc/[0-9]* | wc -l
        echo '[end]'
        "#,
        host.path("").display().to_string().trim_end_matches('/')
    );
    let arguments = ["--project", "lua", "--src", "src", "--mount", "more:/m", "--clock", "fixed"];
    let told = host.script(&arguments, &script);
    told.ends(0, &["before", "not declared, dropped"]);
    assert_eq!(told.section("where"), ["/ws/lua"]);
    assert_eq!(told.section("list"), ["a", "b", "c", "d", "e", "out", "up"], "a listing is sorted");
    assert_eq!(told.section("stat"), ["0 0 315532800 644 1"]);
    let refused = told.section("touch");
    assert_eq!(refused.len(), 4, "{refused:?}");
    assert!(refused.iter().all(|line| line.contains("Read-only file system")), "{refused:?}");
    assert_eq!(told.section("links"), [host.path("outside/kiln-test-outside").to_str().expect("text")]);
    assert_eq!(told.section("mount"), ["more"]);
    assert_eq!(told.section("work"), ["from beforechanged"]);
    assert_eq!(told.section("net"), ["lo", "1", "1"]);
    assert_eq!(told.section("name"), ["kiln", "0", "0022"]);
    let clock: u64 = told.section("clock")[0].parse().expect("a number");
    assert!((315_532_800..315_532_800 + 600).contains(&clock), "{clock}");
    assert_eq!(told.section("input"), [""; 0], "without --stdin there is no input");
    assert_eq!(told.section("host"), [""; 0]);
    assert_eq!(told.section("search"), [""; 0]);
    let processes: u32 = told.section("processes")[0].parse().expect("a number");
    assert!(processes < 8, "{processes} processes in a namespace of the step's own");
    assert_eq!(host.read("work/before"), "from before");
    assert!(!host.path("src/x").exists());
    held("hermetic-step");
}

#[test]
fn a_writable_view_of_the_sources_vanishes_with_its_machine() {
    let host = Host::new();
    host.file("src/a", "1");
    host.file("src/sub/b", "2");
    let script = "echo changed > a; rm -r sub; mkdir sub; echo 3 > sub/c; mv a d; cat d sub/c; ls sub";
    let told = host.script(&["--quiet", "--src", "src", "--src-writable"], script);
    told.ends(0, &[]);
    assert_eq!(told.text(), "changed\n3\nc\n");
    assert_eq!((host.read("src/a").as_str(), host.read("src/sub/b").as_str()), ("1", "2"));
    assert!(!host.path("src/d").exists() && !host.path("src/sub/c").exists());
}

#[test]
fn what_files_really_are_is_shown_where_the_step_asks() {
    let host = Host::new();
    let path = host.file("src/a", "1");
    // Only root can give a file away; another user's are its own.
    let owner = match std::os::unix::fs::chown(&path, Some(1234), Some(5678)) {
        Ok(()) => "1234 5678".to_owned(),
        Err(_) => {
            format!("{} {}", rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())
        }
    };
    let file = std::fs::File::options().write(true).open(&path).expect("it is there");
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_234_567_890);
    file.set_modified(time).expect("a time");
    let told =
        host.run(&["--quiet", "--src", "src", "--attributes", "real"], &["stat", "-c", "%u %g %Y", "a"]);
    told.ends(0, &[]);
    assert_eq!(told.text(), format!("{owner} 1234567890\n"));
}

#[test]
fn two_machines_draw_different_numbers() {
    let host = Host::new();
    let draw = || {
        let told = host
            .script(&["--quiet"], "head -c 16 /dev/urandom | sha256sum; cat /proc/sys/kernel/random/boot_id");
        told.ends(0, &[]);
        told.text().to_owned()
    };
    let (one, other) = (draw(), draw());
    for (one, other) in one.lines().zip(other.lines()) {
        assert_ne!(one, other);
    }
}

#[test]
fn the_processor_is_one_model_and_the_hosts_own_where_the_step_asks() {
    let host = Host::new();
    let seen = |options: &[&str]| {
        let told = host.run(options, &["sh", "-c", "grep -m 1 '^flags' /proc/cpuinfo"]);
        told.ends(0, &[]);
        told.text().split_whitespace().map(str::to_owned).collect::<BTreeSet<_>>()
    };
    let fixed = seen(&["--quiet"]);
    let all = seen(&["--quiet", "--cpu=host"]);
    assert!(fixed.contains("sse4_2") && !fixed.contains("avx"), "{fixed:?}");
    assert!(all.contains("sse4_2") && all.difference(&fixed).count() > 5, "{all:?}");
    // A step's results are kept for every host.
    host.run(&["--cpu=host", "--step=s"], &["true"]).ends(2, &["--cpu", "--step"]);
}
