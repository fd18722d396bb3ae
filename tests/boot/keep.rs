//! Machines that stay: entered, listed, ended, and gone with whoever holds them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use rustix::termios::LocalModes;
use serde_json::Value;

use super::host::{Host, Running, Told, members, soon, started_by};
use super::typist::Typist;

/// The machine that a run says it has kept.
fn kept(told: &Told) -> String {
    let after = told.stderr.split_once("kept as ").map(|(_, after)| after);
    let name = after.and_then(|after| after.split(';').next());
    assert!(name.is_some(), "nothing was kept: {told:?}");
    name.unwrap_or_default().to_owned()
}

/// `kiln` with `arguments`, to its end, whatever else runs.
fn kiln(host: &Host, arguments: &[&str]) -> Told {
    Host::told(host.kiln().args(arguments), &[]).0
}

fn exec(host: &Host, name: &str, command: &[&str]) -> Told {
    kiln(host, &[&["exec", name, "--"], command].concat())
}

fn machines(host: &Host) -> Vec<Value> {
    let told = kiln(host, &["ps", "--json"]);
    told.ends(0, &[]);
    told.lines_of("ps")
}

/// The process that holds a machine; it leads the group of all that belongs to it.
fn holder(machine: &Value) -> u32 {
    machine["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).expect("a process")
}

/// Asserts that there is no machine, and nothing left of one that `pid` held.
fn are_gone(host: &Host, pid: u32) {
    soon(10, "all processes of the machine are gone", || members(pid).is_empty());
    assert!(machines(host).is_empty());
    let left = fs::read_dir(host.path("store/run/machines")).expect("a registry").count();
    assert_eq!(left, 0, "places that nobody holds");
}

fn kill(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a process");
    rustix::process::kill_process(pid, signal).expect("it runs");
}

#[test]
fn a_machine_is_kept_where_its_command_fails_and_can_be_entered() {
    let host = Host::new();
    host.file("src/a", "source");
    let script = "echo made > /tmp/made; echo w > $WORK/w; ls -d /toolbox && echo seen; sleep 1000 & exit 3";
    let arguments = ["--keep", "--src", "src", "--env", "WORD=a b", "--reads", "reads.json"];
    let told = host.script(&arguments, script);
    told.ends(3, &["`sh` exited with status 3", "again: cd ", "kiln shell"]);
    // The caller has its answer, the record of reads and all of the output, and nothing of the toolbox was there.
    assert!(!told.text().contains("seen"), "{told:?}");
    assert!(host.read("reads.json").contains("\"complete\""));
    let name = kept(&told);
    assert!(name.starts_with("sh-"), "{name}");

    let machine = machines(&host).remove(0);
    assert_eq!((&machine["name"], &machine["state"]), (&name.clone().into(), &"kept".into()));
    assert_eq!((&machine["memory_bytes"], &machine["accelerator"]), (&(2_u64 << 30).into(), &"tcg".into()));
    assert_eq!(machine["command"][2], script);
    let pid = holder(&machine);
    assert!(members(pid).len() >= 3, "kiln, QEMU and the device process: {:?}", members(pid));
    let table = kiln(&host, &["ps"]);
    let row = table.text().lines().nth(1).expect("a row");
    for word in [&name, "kept", "2.0 GiB", "tcg", &pid.to_string(), "sh -c "] {
        assert!(row.contains(word), "no {word} in {row}");
    }

    let script = "cat /tmp/made $WORK/w $SRCDIR/a; pwd; echo $WORD $TERM; echo err >&2; ps | grep -c 'sleep 10[0]0'; exit 7";
    let told = exec(&host, &name, &["sh", "-c", script]);
    told.ends(7, &["err\n"]);
    assert_eq!(told.text(), "made\nw\nsource/ws/project\na b dumb\n0\n");
    // What one command leaves, the next one finds.
    exec(&host, &name, &["sh", "-c", "echo more >> /tmp/made; kill -KILL $$"]).ends(128 + 9, &[]);
    let mut command = host.kiln();
    command.args(["exec", "--stdin", "--env", "N=1", "-C", "/tmp", &name, "--", "sh", "-c"]);
    let told = host.end(command.arg("echo $N; cat made; wc -c"), &vec![b'x'; 3_000_000]);
    assert_eq!(told.text(), "1\nmade\nmore\n3000000\n");
    exec(&host, &name, &["nothing"]).ends(127, &["`nothing` was not found", &name]);
    exec(&host, &name, &["/tmp"]).ends(126, &["`/tmp` cannot be executed"]);
    kiln(&host, &["exec", "-C", "/no/where", &name, "--", "true"]).ends(125, &["/no/where", "-C PATH"]);

    // One that nobody reads holds up no other, and goes with its caller.
    let mut stuck = host.kiln();
    stuck.args(["exec", &name, "--", "yes"]).stdout(Stdio::piped());
    let mut stuck = Running::start(&mut stuck);
    stuck.read_until("y\n");
    let told = exec(&host, &name, &["sh", "-c", "head -c 5000000 /dev/zero"]);
    assert_eq!(told.stdout.len(), 5_000_000);
    drop(stuck);
    soon(30, "the command went with its caller", || exec(&host, &name, &["pidof", "yes"]).code == Some(1));

    let told = kiln(&host, &["stop", &name]);
    told.ends(0, &[]);
    assert_eq!(told.text(), format!("stopped {name}\n"));
    are_gone(&host, pid);
    kiln(&host, &["stop", &name]).ends(1, &["there is no machine", "no machine at all"]);
    assert!(!host.path("work/w").exists(), "a failed step put something out");
}

#[test]
fn a_machine_is_entered_with_a_terminal() {
    let host = Host::new();
    let name = kept(&host.run(&["--keep=always"], &["true"]));
    let mut shell = Typist::at(host.kiln().args(["shell", &name]), 33, 99);
    let before = shell.settings();
    shell.sees("# ");
    assert!(!shell.settings().local_modes.contains(LocalModes::ISIG), "keys are not handed over");
    shell.types("stty size; tty; echo $TERM\n");
    let shown = shell.sees("xterm");
    assert!(shown.contains("33 99\r\n") && shown.contains("/dev/pts/"), "{shown:?}");
    shell.resizes(10, 20);
    shell.types("while [ \"$(stty size)\" != '10 20' ]; do :; done; echo resi''zed\n");
    shell.sees("resized");
    // Programs in the foreground are told.
    shell.types("sh -c 'trap \"echo win\"\"ch; exit\" WINCH; echo rea\"\"dy; while :; do sleep 0.1; done'\n");
    shell.sees("ready");
    shell.resizes(11, 20);
    shell.sees("winch");
    // Ctrl-C ends what runs there, not what shows it here; raw keys reach whoever asks for them.
    shell.resizes(24, 200);
    shell.types("sh -c 'echo sle\"\"eps; exec sleep 1000'\n");
    shell.sees("sleeps");
    shell.types("\x03");
    shell.sees("# ");
    shell.types(
        "stty raw -echo; echo ra''w; dd bs=1 count=3 2>/dev/null | od -An -tx1; stty sane; echo do''ne\n",
    );
    shell.sees("raw\n");
    shell.types("\x03\x1a\x1c");
    assert!(shell.sees("done").contains("03 1a 1c"));
    shell.types("exit 42\n");
    soon(20, "kiln gave the terminal back", || shell.settings().local_modes == before.local_modes);
    assert_eq!(shell.leaves(), Some(42));

    // Without --tty, nothing of what a guest writes is obeyed; with it, everything is.
    let escape = ["printf", r"a\033[31mb\n"];
    let mut command = host.kiln();
    let mut plain = Typist::at(command.args(["exec", &name, "--"]).args(escape), 24, 80);
    plain.sees("a\u{241b}[31mb");
    assert_eq!(plain.leaves(), Some(0));
    let mut command = host.kiln();
    let mut drawn = Typist::at(command.args(["exec", "--tty", &name, "--"]).args(escape), 24, 80);
    drawn.sees("a\u{1b}[31mb");
    assert_eq!(drawn.leaves(), Some(0));

    // Without a terminal of the command's own, Ctrl-C is passed on as a signal.
    let script = "trap 'echo caught; exit 9' INT; echo going; while :; do sleep 0.1; done";
    let mut command = host.kiln();
    let mut caught = Typist::at(command.args(["exec", &name, "--", "sh", "-c", script]), 24, 80);
    caught.sees("going");
    caught.types("\x03");
    caught.sees("caught");
    assert_eq!(caught.leaves(), Some(9));

    // A terminal that goes takes the command with it, and is given back as it was.
    let mut gone = Typist::at(host.kiln().args(["shell", &name]), 24, 80);
    gone.sees("# ");
    gone.types("sh -c 'trap \"\" HUP; echo sle\"\"eps; sleep 987'\n");
    gone.sees("sleeps");
    kill(gone.pid(), Signal::TERM);
    soon(20, "kiln gave the terminal back", || gone.settings().local_modes == before.local_modes);
    assert_eq!(gone.leaves(), Some(128 + 15));
    soon(30, "the command is gone", || {
        exec(&host, &name, &["sh", "-c", "ps | grep -q 'sleep 98[7]'"]).code == Some(1)
    });
    kiln(&host, &["stop", "--all"]).ends(0, &[]);
}

#[test]
fn a_root_without_a_shell_is_entered_through_the_toolbox() {
    let host = Host::new();
    host.file("root/etc/hello", "hello");
    let arguments = ["--keep", "--root", "dir:root"];
    let told = host.end(host.kiln().arg("run").args(arguments).args(["--", "make"]), &[]);
    told.ends(127, &["`make` was not found"]);
    let name = kept(&told);
    let mut shell = Typist::at(host.kiln().args(["shell", &name]), 24, 80);
    shell.sees("# ");
    shell.types("cat /etc/hello; strace -o /tmp/calls true; grep -c exit_group /tmp/calls; exit 5\n");
    assert!(shell.sees("hello").contains("cat /etc/hello"));
    shell.sees("1\r\n");
    assert_eq!(shell.leaves(), Some(5));
    // Everything that is named there is there.
    let script = "busybox --list > /tmp/list; for one in /toolbox/bin/*; do name=${one##*/}; case $name in
        strace | busybox) ;; *) grep -qxF -- \"$name\" /tmp/list || echo $name ;; esac; done";
    let told = exec(&host, &name, &["sh", "-c", script]);
    told.ends(0, &[]);
    assert_eq!(told.text(), "", "busybox does not know these");
    exec(&host, &name, &["touch", "/toolbox/x"]).ends(1, &["Read-only"]);
    kiln(&host, &["stop", &name]).ends(0, &[]);
}

#[test]
fn a_step_sees_the_toolbox_where_it_asks_for_it() {
    let host = Host::new();
    host.file("root/etc/hello", "hello");
    host.file("tools/bin/greet", "not a program");
    let command = ["--", "/toolbox/bin/strace", "-o", "/dev/stdout", "/toolbox/bin/busybox", "true"];
    let told = host.end(host.kiln().args(["run", "--toolbox", "--root", "dir:root"]).args(command), &[]);
    told.ends(0, &[]);
    assert!(told.text().contains("exit_group(0)"), "{told:?}");
    // Another one, if the user says so.
    let mut kiln = host.command(&["--toolbox"], &["cat", "/toolbox/bin/greet"]);
    assert_eq!(host.end(kiln.env("KILN_TOOLBOX", "tools"), &[]).text(), "not a program");
}

#[test]
fn a_good_command_s_machine_stays_only_if_always_was_said_and_its_disks_are_left_clean() {
    let host = Host::new();
    let image = host.path("rw.img");
    let image = image.to_str().expect("text");
    let made = Command::new("/sbin/mkfs.ext4").args(["-q", "-F", image, "16M"]).status();
    assert!(made.expect("mkfs.ext4 is there").success());
    let disk = ["--disk", "rw.img:/mnt", "--out", "x"];
    let told = host.script(&[&["--keep"], &disk[..]].concat(), "echo 1 > /mnt/a; echo 1 > $WORK/x");
    told.ends(0, &[]);
    assert!(!told.stderr.contains("kept"), "{told:?}");
    assert!(machines(&host).is_empty());
    let told = host.script(&[&["--keep=always"], &disk[..]].concat(), "echo 2 > /mnt/a; echo 2 > $WORK/x");
    told.ends(0, &[]);
    assert_eq!(host.read("work/x"), "2\n");
    let name = kept(&told);
    exec(&host, &name, &["sh", "-c", "echo 3 > /mnt/a"]).ends(0, &[]);
    kiln(&host, &["stop", &name]).ends(0, &[]);
    let told = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output().expect(program);
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    assert!(told("/sbin/dumpe2fs", &["-h", image]).contains("Filesystem state:         clean"));
    assert_eq!(told("/sbin/debugfs", &["-R", "cat /a", image]), "3\n");
}

#[test]
fn a_machine_that_runs_is_listed_and_can_be_ended() {
    let host = Host::new();
    let script = "echo going; sleep 1000";
    let mut command = host.command(&["--out", "x"], &["sh", "-c", script]);
    let mut run = Running::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    run.read_until("going\n");
    let machine = machines(&host).remove(0);
    assert_eq!((&machine["state"], holder(&machine)), (&"running".into(), run.id()));
    let name = machine["name"].as_str().expect("a name");
    exec(&host, name, &["true"]).ends(125, &["still runs"]);
    kiln(&host, &["stop", name]).ends(0, &[]);
    let group = run.id();
    run.end().ends(125, &["ended by `kiln stop` while running the command", "again: cd "]);
    host.is_clean(group);
    are_gone(&host, group);
}

#[test]
fn nothing_outlives_a_keeper_that_is_killed() {
    let host = Host::new();
    // Whoever reads what kiln was started with, beside its standard streams, is not kept waiting.
    let command = host.command(&["--keep", "--wire", "vsock"], &["false"]);
    let mut shell = started_by(&["sh", "-c", "exec 3>&1; \"$@\"", "sh"], &command);
    shell.process_group(0);
    let told = host.end(&mut shell, &[]);
    told.ends(1, &["kept as false-"]);
    let machine = machines(&host).remove(0);
    let pid = holder(&machine);
    // It has let go of everything.
    for fd in ["0", "1", "2"] {
        let target = fs::read_link(format!("/proc/{pid}/fd/{fd}")).expect("it runs");
        assert_eq!(target.to_str(), Some("/dev/null"));
    }
    assert_eq!(fs::read_link(format!("/proc/{pid}/cwd")).expect("it runs").to_str(), Some("/"));
    let name = machine["name"].as_str().expect("a name");
    let mut inside = host.kiln();
    inside.args(["exec", name, "--", "sh", "-c", "echo in; sleep 1000"]);
    let mut inside = Running::start(inside.stdout(Stdio::piped()).stderr(Stdio::piped()));
    inside.read_until("in\n");
    kill(pid, Signal::KILL);
    inside.end().ends(125, &[name, "ended under the command"]);
    are_gone(&host, pid);
}

#[test]
fn nothing_outlives_a_caller_that_is_killed_before_it_has_its_answer() {
    for signal in [Signal::KILL, Signal::INT] {
        let host = Host::new();
        let mut command = host.command(&["--keep"], &["sh", "-c", "echo going; sleep 1000"]);
        let mut run = Running::start(command.stdout(Stdio::piped()).stderr(Stdio::null()));
        run.read_until("going\n");
        let pid = holder(&machines(&host)[0]);
        assert_ne!(pid, run.id(), "the run is another process's");
        assert!(members(pid).len() >= 2, "kiln and QEMU: {:?}", members(pid));
        kill(run.id(), signal);
        assert!(!run.wait().expect("kiln is ours").success());
        are_gone(&host, pid);
        host.is_swept(run.id());
    }
}

#[test]
fn a_kept_machine_ends_when_nobody_is_in_it_for_its_time() {
    let host = Host::new();
    let started = Instant::now();
    let told = host.run(&["--keep", "--keep-for", "2s", "--json"], &["false"]);
    assert_eq!(told.code, Some(1));
    let events = told.events();
    let (end, kept) = (&events[events.len() - 2], &events[events.len() - 1]);
    assert!(
        end["event"] == "end" && end["again"].as_str().is_some_and(|line| line.contains("--keep-for 2s"))
    );
    assert_eq!((&kept["event"], &kept["idle_seconds"]), (&"kept".into(), &2.into()));
    let pid = holder(kept);
    soon(60, "it ended by itself", || members(pid).is_empty());
    assert!(started.elapsed() > Duration::from_secs(2));
    are_gone(&host, pid);
}

#[test]
fn another_user_cannot_reach_a_kept_machine() {
    if !rustix::process::geteuid().is_root() {
        // Only root can try as somebody else.
        return;
    }
    let host = Host::new();
    let name = kept(&host.run(&["--keep"], &["false"]));
    let socket = fs::canonicalize(host.path("store")).expect("a store").join("run/machines").join(&name);
    let socket = socket.join("socket");
    // 7: refused. 8: hung up on without a word. 0: greeted.
    let script =
        "my $s = IO::Socket::UNIX->new(Peer => shift) or exit 7; exit(sysread($s, my $b, 1) ? 0 : 8)";
    let attempt = |user: &[&str]| {
        let perl = ["perl", "-MIO::Socket::UNIX", "-e", script, socket.to_str().expect("text")];
        let line = [user, &perl[..]].concat();
        Command::new(line[0]).args(&line[1..]).current_dir("/").status().expect("it is there").code()
    };
    let stranger = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    assert_eq!(attempt(&[]), Some(0), "its own user is greeted");
    assert_eq!(attempt(&stranger), Some(7), "the folders keep others out");
    // Were they open, and the socket too, a stranger would still not be spoken to.
    let mut opened = Vec::new();
    for path in socket.ancestors() {
        let mode = fs::metadata(path).expect("it is there").permissions().mode();
        if mode & 0o005 != 0o005 || path == socket {
            opened.push((path, mode));
            fs::set_permissions(path, fs::Permissions::from_mode(0o777)).expect("it is ours");
        }
    }
    let code = attempt(&stranger);
    for (path, mode) in opened {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("it is ours");
    }
    assert_eq!(code, Some(8));
    kiln(&host, &["stop", &name]).ends(0, &[]);
}

#[test]
fn the_command_that_does_it_again_does() {
    let host = Host::new();
    host.file("src dir/it's", "source\n");
    let script = "cat \"$SRCDIR/it's\"\necho \"$WORD\"; exit 4";
    let told = host.script(&["--quiet", "--src", "src dir", "--env", "WORD=a 'b' $c"], script);
    told.ends(4, &[]);
    let again = told.stderr.split_once("kiln: again: ").expect("a command").1;
    let mut shell = Command::new("sh");
    shell.args(["-c", again]).current_dir("/").env("HOME", host.path("home"));
    shell.process_group(0);
    let twice = host.end(&mut shell, &[]);
    twice.ends(4, &[]);
    assert_eq!((twice.text(), told.text()), ("source\na 'b' $c\n", "source\na 'b' $c\n"));
}
