//! A build from vendored bytes alone: an empty store, and no network to ask.

use std::fs;
use std::process::Command;

use super::host::{Host, Told};

const RECIPE: &str = r#"
[roots.base]
from = "debian:bookworm"
[sources.s]
git = "file:repository"
rev = "v1"
[steps.look]
root = "base"
run = """
tar xOf $KILN_SOURCES/s hello > $WORK/out
dpkg-query -W -f '${db:Status-Abbrev}\n' | sort -u >> $WORK/out
"""
outputs = ["out"]
"#;

/// `command` where there is no network but an interface that leads nowhere.
fn without_network(command: &Command) -> Command {
    let mut alone = Command::new("unshare");
    alone.arg(if rustix::process::geteuid().is_root() { "-n" } else { "-rn" });
    alone.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => alone.env(name, value),
            None => alone.env_remove(name),
        };
    }
    alone.current_dir(command.get_current_dir().expect("a test's"));
    alone
}

#[test]
#[ignore = "takes minutes: `ci/test slow` runs it"]
fn a_root_is_configured_and_a_step_runs_from_vendored_bytes_alone() {
    let host = Host::new();
    host.file("p/kiln.toml", RECIPE);
    host.file("p/repository/hello", "hello\n");
    let git = |arguments: &[&str]| {
        let mut git = Command::new("git");
        git.arg("-C").arg(host.path("p/repository")).args(["-c", "user.name=n", "-c", "user.email=e"]);
        assert!(git.args(arguments).status().expect("git can be started").success());
    };
    git(&["init", "-q"]);
    git(&["add", "."]);
    git(&["commit", "-qm", "x"]);
    git(&["tag", "v1"]);
    let kiln = |arguments: &[&str]| {
        let mut command = host.kiln();
        command.env("KILN_LOCK", host.path("p/kiln.lock")).current_dir(host.path("p")).args(arguments);
        command
    };
    let ends = |told: Told, code: i32| assert_eq!(told.code, Some(code), "{}", told.stderr);
    ends(host.end(&mut kiln(&["lock", "update"]), &[]), 0);
    ends(host.end(&mut kiln(&["lock", "vendor", "../vendor.tar"]), &[]), 0);
    fs::rename(host.path("p/repository"), host.path("gone")).expect("ours");
    let mut build = kiln(&["build", "--offline"]);
    build.env("KILN_STORE", host.path("empty"));
    let told = host.end(&mut without_network(&build), &[]);
    assert!(told.stderr.contains("is not in the store, and --offline fetches nothing"), "{}", told.stderr);
    build.args(["--vendor", "../vendor.tar"]);
    ends(host.end(&mut without_network(&build), &[]), 0);
    assert_eq!(host.read("work/out"), "hello\nii \n");
}
