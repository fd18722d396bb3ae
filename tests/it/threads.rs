//! A host whose user may have few processes: whichever thread or process it does not give, kiln says so and leaves
//! nothing behind. The limit binds nobody who may exceed it, so kiln runs as another user, which only root can let it.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::{fs, io};

use super::host::{Host, Told};

/// Users of this file's own, one a test and a run, lest the processes of others count.
const USERS: u32 = 0x7e57_0000;

fn give(path: &Path, user: u32) -> io::Result<()> {
    std::os::unix::fs::lchown(path, Some(user), Some(user))?;
    if path.is_dir() && !path.is_symlink() {
        for entry in fs::read_dir(path)? {
            give(&entry?.path(), user)?;
        }
    }
    Ok(())
}

/// `kiln` as a user of its own who may have so many processes and threads.
fn limited(host: &Host, user: u32, kiln: &Command, processes: u32) -> Told {
    let user = USERS + user + std::process::id() % 0x10000 * 2;
    give(host.root(), user).expect("root may");
    let mut command = Command::new("setpriv");
    command.args([&format!("--reuid={user}"), &format!("--regid={user}"), "--clear-groups", "prlimit"]);
    command.arg(format!("--nproc={processes}")).arg(host.path("kiln")).args(kiln.get_args());
    command.env_clear().envs(kiln.get_envs().filter_map(|(name, value)| Some((name, value?))));
    Told::by(command.current_dir(host.root()))
}

/// A host with all that a run and a build need but a machine that answers, and kiln where its user can start it.
fn host() -> Host {
    let host = Host::new();
    fs::set_permissions(host.root(), fs::Permissions::from_mode(0o755)).expect("it is ours");
    host.installed("kiln");
    host.file("kernel", super::qemu::kernel());
    host.file("agent", "an agent");
    host.file("root/etc/os-release", "ID=test");
    host.file("src/a", "1");
    let version = "[ \"$1\" = --version ] && echo 'QEMU emulator version 10.0.2' && exit";
    host.script("qemu", &format!("{version}\necho broken >&2\nexit 1"));
    host
}

#[test]
fn a_host_that_gives_no_thread_is_told_of_whichever_it_is() {
    if !rustix::process::geteuid().is_root() {
        // Only root can run as somebody who runs nothing else.
        return;
    }
    let host = host();
    let run = [
        "run",
        "-q",
        "--no-keeper",
        "--kernel",
        "kernel",
        "--root",
        "dir:root",
        "--src",
        "src",
        "--",
        "true",
    ];
    let kept = ["run", "-q", "--kernel", "kernel", "--root", "dir:root", "--", "true"];
    let (mut refused, mut passed) = (0, 0);
    for (arguments, limits) in [(&run[..], &[1, 2, 3, 4, 5, 6, 7, 8, 9, 24][..]), (&kept, &[1, 9, 24])] {
        for &processes in limits {
            let mut kiln = host.kiln();
            kiln.env("KILN_QEMU", host.path("qemu")).env("KILN_AGENT", host.path("agent")).args(arguments);
            let told = limited(&host, 0, &kiln, processes);
            told.fails(125, &[]);
            if told.stderr.contains("the host gives no") || told.stderr.contains("temporarily unavailable") {
                told.hints(&["ulimit -u"]);
                refused += 1;
            } else {
                passed += 1;
            }
            host.is_swept();
        }
    }
    assert!(refused > 2 && passed > 0, "{refused} were refused, {passed} not");
}

#[test]
fn a_build_makes_do_with_the_threads_there_are() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let host = host();
    let recipe = "[steps.one]\nmake = [{ squashfs = 'a', from = [{ src = 'src' }] }, { verity = 'v', from = ['a'], hash = 'h' }]\n";
    host.file("kiln.toml", recipe);
    let mut images = Vec::new();
    for processes in 1..9 {
        let _ = fs::remove_dir_all(host.path("store"));
        let _ = fs::remove_dir_all(host.path("work"));
        let mut kiln = host.kiln();
        kiln.arg("build");
        let told = limited(&host, 1, &kiln, processes);
        match told.code {
            Some(0) => images.push(fs::read(host.path("work/a")).expect("it was built")),
            _ => drop(told.fails(1, &["the host gives no"]).hints(&["ulimit -u"])),
        }
    }
    assert!((1..8).contains(&images.len()), "{} were built", images.len());
    assert!(images.iter().all(|image| *image == images[0]), "fewer threads make the same");
}
