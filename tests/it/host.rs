//! A host of a test's own: a folder with a home, a store and a WORK, and kiln run in it with no other environment.

use std::fs;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::folder::Folder;
use super::judge;

/// A mirror that nobody serves: a test that would fetch something fails instead.
pub const NOWHERE: &str = "http://127.0.0.1:1/debian";

/// The folder. Paths in arguments are relative to it: kiln is called there.
pub struct Host {
    folder: Folder,
}

/// How kiln ended and what it said.
pub struct Told {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Host {
    pub fn new() -> Self {
        let folder = Folder::new();
        fs::create_dir(folder.path("home")).expect("a home");
        Self { folder }
    }

    /// Writes a shell script that can be executed.
    pub fn script(&self, name: &str, text: &str) -> PathBuf {
        let script = self.file(&format!("{name}.text"), format!("#!/bin/sh\n{text}\n"));
        let path = self.executable(name, &script);
        fs::remove_file(script).expect("it was written");
        path
    }

    /// A copy of a program. Another process writes it: what this one has open, whatever other tests start at that moment
    /// has open too until its execve(2), and a file that is open for writing cannot be executed.
    pub fn executable(&self, name: &str, from: &Path) -> PathBuf {
        let path = self.path(name);
        let copied = Command::new("install").args(["-D", "-m", "755"]).args([from, &path]).status();
        assert!(copied.expect("coreutils").success(), "{name} cannot be written");
        path
    }

    /// A copy of kiln at `name`, with its program for machines.
    pub fn installed(&self, name: &str) -> PathBuf {
        let machine = Path::new(env!("CARGO_BIN_EXE_kiln-machine"));
        self.executable(&format!("{name}-machine"), machine);
        self.executable(name, Path::new(env!("CARGO_BIN_EXE_kiln")))
    }

    /// kiln, not started yet. KVM is not asked: what these tests see must not depend on the host's.
    pub fn kiln(&self) -> Command {
        self.program(Path::new(env!("CARGO_BIN_EXE_kiln")))
    }

    /// As [`Host::kiln`], from another place.
    pub fn program(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("HOME", self.path("home"))
            .env("KILN_STORE", self.path("store"))
            .env("KILN_BACKEND", "tcg")
            .env("WORK", self.path("work"))
            .env("KILN_DEBIAN_MIRROR", NOWHERE)
            .env("KILN_DEBIAN_SECURITY_MIRROR", NOWHERE)
            .current_dir(self.folder.root());
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Told {
        Told::by(self.kiln().args(arguments))
    }

    /// Asserts that each line of `told` is as the schema of `what` says.
    pub fn is_as_the_schema_says(&self, what: &str, told: &Told) {
        judge::holds(&self.run(&["schema", what]).succeeds().stdout, &told.stdout);
    }

    /// Asserts that nothing unfinished is left in the store, and that WORK was not made. The next kiln sweeps what a
    /// killed one could not.
    pub fn is_swept(&self) {
        self.run(&["doctor"]);
        self.is_untouched();
    }

    /// Asserts that nothing unfinished is left in the store, and that WORK was not made.
    pub fn is_untouched(&self) {
        if let Ok(entries) = fs::read_dir(self.path("store/tmp")) {
            let left: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
            assert!(left.is_empty(), "left in the store: {left:?}");
        }
        assert!(!self.path("work").is_dir(), "WORK was made");
    }
}

/// `sh` with a script in a mount namespace of its own, in which `"$@"` is what `command` would have run.
pub fn in_own_mounts(command: &Command, script: &str) -> Command {
    let mut apart = Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        apart.args(["--user", "--map-root-user"]);
    }
    apart.args(["--mount", "sh", "-euc", script, "sh"]).arg(command.get_program()).args(command.get_args());
    apart.env_clear().envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    apart.env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin");
    command.get_current_dir().map(|folder| apart.current_dir(folder));
    apart
}

impl Deref for Host {
    type Target = Folder;

    fn deref(&self) -> &Folder {
        &self.folder
    }
}

impl Told {
    pub fn by(command: &mut Command) -> Self {
        let output = command.output().expect("kiln can be started");
        Self {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Asserts the exit code, one error that has all of `words` in it or in its hint, and no panic.
    pub fn fails(&self, code: i32, words: &[&str]) -> &Self {
        assert_eq!(self.code, Some(code), "{}", self.stderr);
        let errors = self.stderr.lines().filter(|line| line.starts_with("kiln: error: ")).count();
        assert_eq!(errors, 1, "{}", self.stderr);
        for word in words {
            assert!(self.stderr.contains(word), "no `{word}` in: {}", self.stderr);
        }
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        self
    }

    /// Asserts that a hint follows the error, with all of `words`.
    pub fn hints(&self, words: &[&str]) -> &Self {
        let hint = self.stderr.lines().find(|line| line.starts_with("kiln: hint: "));
        let hint = hint.unwrap_or_else(|| panic!("no hint: {}", self.stderr));
        for word in words {
            assert!(hint.contains(word), "no `{word}` in: {hint}");
        }
        self
    }

    /// Asserts success.
    pub fn succeeds(&self) -> &Self {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self
    }
}
