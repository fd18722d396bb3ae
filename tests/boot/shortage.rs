//! Hosts that lack something: each run ends well or with one error that names what is lacking and the way out, and leaves
//! nothing behind; and the next run at the same store and WORK succeeds.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

use super::host::{Host, Running, Told, members, started_by};

/// A run with a share, an output and a record, and a template that it is the copy of.
fn plain(host: &Host) -> Command {
    let arguments = ["--src", "src", "--out", "o", "--overwrite", "--reads", "reads.json"];
    host.command(&arguments, &["sh", "-c", "cat a > $WORK/o"])
}

/// A host with a source, an output of before and a template of its own.
fn host_with_template() -> Host {
    let host = Host::without(&["templates"]);
    host.file("src/a", "new");
    host.file("work/o", "old");
    recovers(&host);
    assert_eq!(templates(&host).len(), 1, "there is no template to be lost");
    host.file("work/o", "old");
    host
}

/// What lies among the templates, but for locks.
fn templates(host: &Host) -> Vec<PathBuf> {
    let entries = fs::read_dir(host.path("store/templates")).expect("a folder").flatten();
    entries.map(|entry| entry.path()).filter(|path| path.extension() != Some("lock".as_ref())).collect()
}

/// Asserts that the run had its template. That an emulated kernel had to boot twice for one is nobody's fault.
fn had_a_template(told: &Told) {
    for words in ["was thrown away", "so the machine booted"] {
        assert!(!told.stderr.contains(words), "{}", told.stderr);
    }
}

/// The next run, with nothing lacking, succeeds, and with a template.
fn recovers(host: &Host) {
    let told = host.end(&mut plain(host), &[]);
    told.ends(0, &["read 1 file"]);
    had_a_template(&told);
    assert_eq!(host.read("work/o"), "new");
}

/// Runs `command` started by `words`, where kiln comes to have the number of what was started. Gives what was told where
/// kiln ended by itself; where the system killed it, what was swept is checked.
fn run_short(host: &Host, words: &[&str], command: &Command) -> Option<Told> {
    let (told, group) = Host::told(started_by(words, command).process_group(0), &[]);
    match told.code {
        Some(_) => host.is_clean(group),
        None => host.is_swept(group),
    }
    told.code.map(|_| told)
}

/// Whether `told` is of success; else it is of one error with one of `words` in it and a way out, and WORK is as it was.
fn is_success(host: &Host, told: &Told, words: &[&str]) -> bool {
    let files = fs::read_dir(host.path("work")).expect("WORK").count();
    assert_eq!(files, 1, "half written: {told:?}");
    if told.code == Some(0) {
        assert_eq!(host.read("work/o"), "new");
        host.file("work/o", "old");
        return true;
    }
    assert!(matches!(told.code, Some(2 | 125)), "{told:?}");
    assert_eq!(told.stderr.matches("kiln: error: ").count(), 1, "{told:?}");
    assert!(words.iter().any(|words| told.stderr.contains(words)), "not named: {told:?}");
    assert!(told.stderr.contains("kiln: hint: "), "no way out: {told:?}");
    assert_eq!(host.read("work/o"), "old");
    false
}

/// Runs at each of `values`, the least first. Both ends occur. Between them it may depend on who is first at what there is.
fn sweep(host: &Host, values: &[u64], words: &[&str], mut run: impl FnMut(u64) -> Option<Told>) {
    let mut succeeded = Vec::new();
    for value in values {
        // One that the system killed has said nothing.
        let success = run(*value).is_some_and(|told| is_success(host, &told, words));
        succeeded.push(success);
    }
    assert_eq!(
        (succeeded.first(), succeeded.last()),
        (Some(&false), Some(&true)),
        "{values:?}: {succeeded:?}"
    );
    recovers(host);
    assert_eq!(templates(host).len(), 1, "a template was lost, or given up");
}

#[test]
fn too_few_descriptors_are_an_error_and_no_template_is_lost() {
    let host = host_with_template();
    let kept = templates(&host);
    let words = ["Too many open files", "files may be open at once"];
    let values =
        [4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 22, 24, 28, 32, 36, 40, 44, 255, 256, 1024];
    let command = plain(&host);
    sweep(&host, &values, &words, |value| {
        run_short(&host, &["prlimit", &format!("--nofile={value}:{value}")], &command)
    });
    assert_eq!(templates(&host), kept);
}

/// A control group with a limit, gone when dropped.
struct Group(PathBuf);

impl Group {
    /// One that limits `what`; none where this host lets nobody make it, which is said.
    fn of(what: &str) -> Option<Self> {
        let [alone, unified] = [format!("/sys/fs/cgroup/{what}"), "/sys/fs/cgroup".to_owned()];
        let lists = fs::read_to_string("/sys/fs/cgroup/cgroup.subtree_control").unwrap_or_default();
        let top = if lists.split_whitespace().any(|word| word == what) { unified } else { alone };
        let path = Path::new(&top).join(format!("kiln-test-{}-{what}", std::process::id()));
        match fs::create_dir(&path) {
            Ok(()) if path.join("cgroup.procs").exists() => Some(Self(path)),
            made => {
                eprintln!("skipped: no control group for {what} can be made in {top}: {made:?}");
                None
            }
        }
    }

    fn limit(&self, names: &[&str], value: &str) {
        let file = names.iter().map(|name| self.0.join(name)).find(|file| file.exists());
        fs::write(file.expect("a limit"), value).expect("it can be set");
    }

    /// What starts a command in it.
    fn words(&self) -> [&str; 4] {
        ["sh", "-c", "echo $$ > \"$0/cgroup.procs\" && exec \"$@\"", self.0.to_str().expect("text")]
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn too_few_processes_are_an_error_that_says_so() {
    let Some(group) = Group::of("pids") else { return };
    let host = host_with_template();
    // Every number: which of a run's threads is the first that there is none for depends on the host.
    let values: Vec<u64> = (1..=26).chain([256]).collect();
    let command = plain(&host);
    sweep(&host, &values, &["Resource temporarily unavailable"], |value| {
        group.limit(&["pids.max"], &value.to_string());
        run_short(&host, &group.words(), &command)
    });
}

#[test]
fn a_machine_that_the_system_kills_for_want_of_memory_is_told_as_that() {
    let Some(group) = Group::of("memory") else { return };
    let host = host_with_template();
    let command = plain(&host);
    sweep(
        &host,
        &[4 << 20, 24 << 20, 64 << 20, 1 << 30],
        &["killed by signal 9", "Cannot allocate"],
        |value| {
            group.limit(&["memory.max", "memory.limit_in_bytes"], &value.to_string());
            run_short(&host, &group.words(), &command)
        },
    );
}

#[test]
fn too_little_address_space_is_an_error_that_says_so() {
    let host = host_with_template();
    let command = plain(&host);
    // Below that the system cannot start kiln itself.
    let values = [48 << 20, 100 << 20, 1 << 30, 3 << 30, 8 << 30];
    let words = ["Cannot allocate memory", "Resource temporarily unavailable", "failed to map segment"];
    sweep(&host, &values, &words, |value| run_short(&host, &["prlimit", &format!("--as={value}")], &command));
}

/// What starts a command whose calls are traced, as a child of this process, with `injections` done to them.
fn strace<'a>(injections: &[&'a str]) -> Vec<&'a str> {
    let mut words = vec!["strace", "-D", "-f", "-qq", "-o", "/dev/null"];
    injections.iter().for_each(|inject| words.extend(["-e", inject]));
    words
}

#[test]
fn a_slow_file_system_makes_a_run_slow_and_nothing_else() {
    let host = Host::without(&["templates"]);
    host.file("src/a", "new");
    host.file("work/o", "old");
    // Each file that a share is asked for, and each write that must last: of a template in the making too.
    let calls = "trace=openat2,getdents64,fsync,fdatasync,syncfs";
    let slow =
        ["inject=openat2,getdents64:delay_enter=50000", "inject=fsync,fdatasync,syncfs:delay_enter=300000"];
    let told = run_short(&host, &strace(&[calls, slow[0], slow[1]]), &plain(&host)).expect("nobody kills it");
    assert!(is_success(&host, &told, &[]), "{told:?}");
    had_a_template(&told);
    assert_eq!(templates(&host).len(), 1, "a template was made");
    recovers(&host);
}

#[test]
fn calls_that_fail_once_end_a_run_in_order() {
    let host = host_with_template();
    let mut failed = 0;
    // A call that the tracer lets fail is another one in truth, which the filters of the jail must know.
    for (call, error, when) in [
        ("openat2", Errno::IO, 1),
        ("openat2", Errno::MFILE, 2),
        ("socketpair", Errno::MFILE, 3),
        ("eventfd2", Errno::MFILE, 2),
        ("mmap", Errno::NOMEM, 400),
        ("fsync", Errno::IO, 1),
        ("fallocate", Errno::NOSPC, 1),
        ("ftruncate", Errno::NOSPC, 1),
    ] {
        host.file("work/o", "old");
        let number = error.raw_os_error();
        let inject = format!("inject={call}:error={number}:syscall=getpid:when={when}");
        let told = run_short(&host, &strace(&[&format!("trace={call}"), &inject]), &plain(&host));
        let told = told.expect("nobody kills it");
        if told.code != Some(0) {
            failed += 1;
            assert_eq!(told.code, Some(125), "{call} {when}: {told:?}");
            assert_eq!(told.stderr.matches("kiln: error: ").count(), 1, "{call} {when}: {told:?}");
            let words = io::Error::from(error).to_string();
            assert!(told.stderr.contains(&words), "{call} {when}: no `{words}` in {}", told.stderr);
            assert_eq!(host.read("work/o"), "old", "{call} {when}");
        }
        recovers(&host);
    }
    assert!(failed >= 4, "{failed} runs saw a call fail: the others are no test");
}

#[test]
fn a_run_that_is_stopped_for_long_goes_on_where_it_was() {
    let stopped = |phase: &str, script: &str| {
        let host = Host::new();
        host.file("src/a", "new");
        let mut command =
            host.command(&["--json", "--no-template", "--src", "src", "--out", "o"], &["sh", "-c", script]);
        let mut run = Running::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
        run.read_until(phase);
        let group = run.id();
        let pids: Vec<Pid> = members(group)
            .iter()
            .filter_map(|member| Pid::from_raw(member.split(' ').next()?.parse().ok()?))
            .collect();
        assert_eq!(pids.len(), 3, "kiln, QEMU and the device process");
        let all = |signal| pids.iter().for_each(|pid| kill_process(*pid, signal).expect("it is ours"));
        all(Signal::STOP);
        // Longer than all that kiln waits for while nobody else has to do anything: it is what this is about.
        thread::sleep(Duration::from_secs(62));
        all(Signal::CONT);
        run.end().ends(0, &[]);
        host.is_clean(group);
        assert_eq!(host.read("work/o"), "new");
    };
    let script = "echo going; i=0; while [ $i -lt 50000 ]; do i=$((i + 1)); done; cat a > $WORK/o";
    thread::scope(|scope| {
        scope.spawn(|| stopped("\"event\":\"machine\"", script));
        scope.spawn(|| stopped("going", script));
    });
}

/// What `run NAME SCRIPT`, in a shell with mounts of its own, says of kiln's run of a script: whatever it says, then how it
/// ended, what it left and what is in WORK. `fill BYTES` leaves that much room for what is new in the store.
const AMONG_MOUNTS: &str = r#"
    kiln=("$@")
    mount --make-rprivate / && mount -t tmpfs -o size=256M none disk && mkdir -p disk/upper/tmp disk/inner &&
        setfattr -n trusted.overlay.opaque -v y disk/upper/tmp &&
        mount -t overlay -o lowerdir="$SHARED,upperdir=disk/upper,workdir=disk/inner" none store-here &&
        mount -t tmpfs -o size=4M none work || exit 77
    run() {
        echo "[$1]"
        "${kiln[@]}" "$2" 2>&1 &
        number=$!
        wait $number
        echo "ended: $?"
        for process in /proc/[0-9]*; do
            if tr '\0' '\n' <$process/cmdline | grep -qx "\(guest=\)\?kiln-$number"; then echo "left: $process"; fi
        done 2>/dev/null
        find store-here/tmp tmp -mindepth 1 -printf 'left: %p\n'
        find work -type f -size -2k -printf 'work: %P ' -exec cat {} \;
    }
    fill() {
        dd if=/dev/zero of=disk/full bs=1M 2>/dev/null
        truncate -s -$1 disk/full
    }
"#;

/// Carries out `script` as [`AMONG_MOUNTS`] says, with the shared store beneath all that is new. None where this host lets nobody
/// mount, which is said.
fn among_mounts(host: &Host, flags: &[&str], script: &str) -> Option<Told> {
    for name in ["disk", "store-here", "work"] {
        host.folder(name);
    }
    host.file("src/a", "new\n");
    let all = ["--memory", "160M", "--src", "src", "--out", "o", "--overwrite"];
    let kiln = host.command(&[flags, &all].concat(), &["sh", "-c"]);
    let script = format!("{AMONG_MOUNTS}\n{script}");
    let mut command = started_by(&["unshare", "-m", "bash", "-c", &script, "bash"], &kiln);
    let own = fs::canonicalize(host.path("store")).expect("a store");
    command.env("SHARED", own.parent().expect("a folder of the shared one"));
    command.env("KILN_STORE", host.path("store-here"));
    let (told, _) = Host::told(command.process_group(0), &[]);
    if told.cannot_mount() {
        return None;
    }
    told.ends(0, &[]);
    Some(told)
}

/// Asserts how the run `name` ended, and that what was said has all of `words`.
fn ended(told: &Told, name: &str, code: i32, words: &[&str]) {
    let lines = told.section(name);
    assert!(lines.contains(&format!("ended: {code}").as_str()), "{name}: {lines:#?}");
    assert!(!lines.iter().any(|line| line.starts_with("left: ")), "{name}: {lines:#?}");
    for word in words {
        assert!(lines.iter().any(|line| line.contains(word)), "{name}: no `{word}` in {lines:#?}");
    }
}

#[test]
fn a_full_disk_below_the_store_the_scratch_disk_or_work_is_named_and_all_is_well_when_there_is_room() {
    let host = Host::new();
    let script = r"
        run first 'cat a > $WORK/o'
        fill 4M
        run blobs 'head -c 8000000 /dev/urandom > $WORK/o'
        run scratch 'yes | head -c 200000000 > /tmp/big; echo other > $WORK/o'
        fill 0
        run nothing 'echo other > $WORK/o'
        rm disk/full
        run room 'head -c 8000000 /dev/urandom > $WORK/o'
        run again 'cat a > $WORK/o'
    ";
    let Some(told) = among_mounts(&host, &["--no-template"], script) else { return };
    ended(&told, "first", 0, &["work: o new"]);
    let full = ["No space left on device", "hint: make room", "work: o new"];
    ended(&told, "blobs", 125, &[&full[..], &["cannot store `o`"]].concat());
    ended(&told, "scratch", 125, &[&full[..], &["scratch disk, a file in kiln's store"]].concat());
    ended(&told, "nothing", 125, &full);
    // WORK has 4 MiB.
    ended(&told, "room", 125, &[&full[..], &["work/o`"]].concat());
    ended(&told, "again", 0, &["work: o new"]);
}

/// Nobody else would ever say so to a run that borrowed its machine.
#[test]
fn a_full_disk_below_the_scratch_disk_of_a_machine_that_was_ready_is_named() {
    let host = Host::new();
    let script = r#"
        export KILN_KEEPER=on
        at() { "${kiln[@]:0:3}" "$@"; }
        "${kiln[@]}" 'cat a > $WORK/o' || exit
        for try in {1..600}; do
            at ps --json | grep -q '"state":"ready"' && break
            sleep 0.1
        done
        fill 1M
        echo '[lent]'
        "${kiln[@]}" 'yes | head -c 200000000 > /tmp/big; echo other > $WORK/o' 2>&1
        echo "ended: $?"
        rm disk/full
        at stop --all
    "#;
    let Some(told) = among_mounts(&host, &["--json"], script) else { return };
    ended(&told, "lent", 125, &["\"origin\":\"ready\"", "scratch disk, a file in kiln's store"]);
}

#[test]
fn a_full_disk_below_the_store_while_a_template_is_kept_costs_the_template_only() {
    let host = Host::new();
    let script = r"
        rm -rf store-here/templates
        fill 8M
        run full 'cat a > $WORK/o'
        run again 'cat a > $WORK/o'
        find store-here/templates -mindepth 1 -not -name '*.lock'
        rm disk/full store-here/templates/*.full
        run room 'cat a > $WORK/o'
        ls store-here/templates
    ";
    let Some(told) = among_mounts(&host, &["--json"], script) else { return };
    let booted = ["\"origin\":\"boot\"", "work: o new"];
    let named =
        "there is no template, so the machine booted: cannot keep a template: No space left on device";
    ended(&told, "full", 0, &[&booted[..], &[named]].concat());
    // Nobody boots a machine for one again at once.
    ended(&told, "again", 0, &booted);
    let again = told.section("again");
    assert!(!again.iter().any(|line| line.contains("template,")), "{again:#?}");
    let left: Vec<_> = again.iter().filter(|line| line.starts_with("store-here/templates/")).collect();
    assert!(matches!(&left[..], [one] if one.ends_with(".full")), "{left:?}");
    ended(&told, "room", 0, &["\"origin\":\"template\"", "work: o new"]);
}

#[test]
fn a_store_or_a_work_that_is_read_only_is_named() {
    let host = Host::new();
    let script = r"
        run first 'cat a > $WORK/o'
        mount -o remount,ro work
        run work 'echo other > $WORK/o'
        mount -o remount,rw work
        mount -o remount,ro store-here
        run store 'echo other > $WORK/o'
        mount -o remount,rw store-here
        run again 'cat a > $WORK/o'
    ";
    let Some(told) = among_mounts(&host, &["--no-template"], script) else { return };
    ended(&told, "first", 0, &["work: o new"]);
    let read_only = ["Read-only file system", "work: o new"];
    ended(&told, "work", 2, &[&read_only[..], &["error: WORK `", "hint: say --work DIR"]].concat());
    ended(
        &told,
        "store",
        125,
        &[&read_only[..], &["error: store `", "hint: name a directory of yours"]].concat(),
    );
    ended(&told, "again", 0, &["work: o new"]);
}
