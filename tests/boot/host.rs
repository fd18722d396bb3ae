//! A host of a test's own: a folder with a home and a WORK, and kiln run in it. The store's contents are shared by all
//! tests; its places for unfinished files are each test's own, so that what a run leaves behind is seen.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::folder::Folder;
use super::judge;

/// A variable of the host's that no guest may see, unless a run names it.
pub const TOKEN: (&str, &str) = ("KILN_TEST_TOKEN", "sesame");

/// The folder. Paths in arguments are relative to it: kiln is called there.
pub struct Host {
    folder: Folder,
}

/// How kiln ended and what it said.
#[derive(Debug)]
pub struct Told {
    pub code: Option<i32>,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

#[expect(clippy::disallowed_methods, reason = "tests are told by the environment what to test")]
fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

fn built(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target").join(path)
}

fn binary() -> PathBuf {
    let path = variable("KILN_TEST_BIN").unwrap_or_else(|| built("dist/bin/kiln"));
    assert!(path.is_file(), "{} is missing: ci/build makes it", path.display());
    path
}

/// A program for guests, where an installation has it.
#[allow(dead_code, reason = "tests of initOS put them into images")]
pub fn built_for_guests(name: &str) -> PathBuf {
    binary().with_file_name("../libexec/kiln").join(name)
}

/// The store that all tests share, with the kernel in it.
fn shared_store() -> &'static Path {
    static STORE: OnceLock<PathBuf> = OnceLock::new();
    STORE.get_or_init(|| {
        let store = variable("KILN_STORE").unwrap_or_else(|| built("test-store"));
        fs::create_dir_all(&store).expect("a store");
        let store = fs::canonicalize(store).expect("it was made");
        let status = Command::new(binary())
            .arg("kernel")
            .env("KILN_STORE", &store)
            .env("KILN_LOCK", store.join("kiln.lock"))
            .stdout(Stdio::null())
            .status()
            .expect("kiln can be started");
        assert!(status.success(), "there is no kernel to boot");
        store
    })
}

/// The verified package of the kernel that machines boot.
#[allow(dead_code, reason = "tests of firmware boot it as it is")]
pub fn kernel_package() -> PathBuf {
    let lock = fs::read_to_string(shared_store().join("kiln.lock")).expect("the store's lock");
    let line = lock.lines().find(|line| line.starts_with("package = ")).expect("a locked kernel");
    let digest = line.split("sha256 = \"").nth(1).and_then(|rest| rest.get(..64)).expect("its digest");
    shared_store().join("blobs").join(&digest[..2]).join(&digest[2..])
}

/// A root of busybox, its applets and nothing else. It stays in the build's folder, imported once.
pub fn busybox() -> &'static Path {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    ROOT.get_or_init(|| {
        let place = variable("KILN_TEST_TMP").unwrap_or_else(|| env!("CARGO_TARGET_TMPDIR").into());
        let root = place.join("busybox-root");
        let new = tempfile::tempdir_in(&place).expect("room");
        let bin = new.path().join("bin");
        fs::create_dir(&bin).expect("a folder");
        fs::copy("/bin/busybox", bin.join("busybox"))
            .expect("busybox-static is installed: see ci/setup test");
        let list = Command::new("/bin/busybox").arg("--list").output().expect("busybox can be started");
        for applet in String::from_utf8_lossy(&list.stdout).lines().filter(|name| *name != "busybox") {
            symlink("busybox", bin.join(applet)).expect("a link");
        }
        let _ = fs::remove_dir_all(&root);
        fs::rename(new.keep(), &root).expect("the name is free");
        root
    })
}

impl Host {
    pub fn new() -> Self {
        let store = shared_store();
        let folder = Folder::new();
        let host = Self { folder };
        for name in ["home", "tmp"] {
            fs::create_dir(host.path(name)).expect("a folder");
        }
        // On the shared store's file system: blobs are renamed into place.
        let own = tempfile::tempdir_in(store).expect("a folder in the store").keep();
        for name in ["blobs", "images", "records", "templates"] {
            fs::create_dir_all(store.join(name)).expect("a folder in the store");
            symlink(store.join(name), own.join(name)).expect("a link");
        }
        symlink(own, host.path("store")).expect("a link");
        host
    }

    /// A host that has yet to make what these folders of the store hold.
    #[allow(dead_code, reason = "not all tests need one")]
    pub fn without(names: &[&str]) -> Self {
        let host = Self::new();
        for name in names {
            let folder = host.path("store").join(name);
            fs::remove_file(&folder).expect("the shared one's link");
            fs::create_dir(folder).expect("a folder");
        }
        host
    }

    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).expect(name)
    }

    /// kiln in a process group of its own, by which all it started is found, heeding the signals that tests send also
    /// where the tests themselves run in the background, and out of a CI system's sight.
    pub fn kiln(&self) -> Command {
        let mut command = Command::new("env");
        command.arg("--default-signal=HUP,INT,TERM").arg(binary());
        let settings = ["SRCDIR", "REPO", "TAG", "PROJECT", "SECRETS", "XDG_CACHE_HOME", "KILN_AGENT"];
        for name in settings.iter().chain(&["CI", "GITHUB_ACTIONS", "TF_BUILD", "TEAMCITY_VERSION"]) {
            command.env_remove(name);
        }
        // One backend on every host: what KVM's does is for ci/test-kvm to say.
        let backend = variable("KILN_BACKEND").unwrap_or_else(|| "tcg".into());
        command
            .env("KILN_BACKEND", backend)
            .env("HOME", self.path("home"))
            .env("TMPDIR", self.path("tmp"))
            .env("KILN_STORE", self.path("store"))
            .env("KILN_LOCK", shared_store().join("kiln.lock"))
            .env("WORK", self.path("work"))
            .env("KILN_KEEPER", "off")
            .env(TOKEN.0, TOKEN.1)
            .current_dir(self.folder.root())
            .process_group(0)
            .stdin(Stdio::null());
        command
    }

    /// `kiln run` of a command in the busybox root.
    pub fn command(&self, arguments: &[&str], command: &[&str]) -> Command {
        let mut kiln = self.kiln();
        let root = format!("dir:{}", busybox().display());
        kiln.args(["run", "--root", &root]).args(arguments).arg("--").args(command);
        kiln
    }

    pub fn run(&self, arguments: &[&str], command: &[&str]) -> Told {
        self.end(self.command(arguments, command).stdout(Stdio::piped()).stderr(Stdio::piped()), &[])
    }

    /// A shell script.
    pub fn script(&self, arguments: &[&str], script: &str) -> Told {
        self.run(arguments, &["sh", "-c", script])
    }

    /// Runs `command` with `input` to its end, and asserts that nothing of it is left.
    pub fn end(&self, command: &mut Command, input: &[u8]) -> Told {
        let (told, group) = Self::told(command, input);
        self.is_clean(group);
        told
    }

    /// Runs `command` with `input` to its end, beside another kiln of this host. Gives its process group too.
    pub fn told(command: &mut Command, input: &[u8]) -> (Told, u32) {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let feeds = !input.is_empty();
        if feeds {
            command.stdin(Stdio::piped());
        }
        let mut running = Running::start(command);
        let group = running.id();
        let stdin = running.stdin.take();
        let told = std::thread::scope(|scope| {
            scope.spawn(move || stdin.map(|mut stdin| stdin.write_all(input)));
            running.end()
        });
        assert!(!told.stderr.contains("panicked at "), "{}", told.stderr);
        (told, group)
    }

    /// As [`Host::is_clean`] where kiln was killed: the folder of its unfinished files stays, with nothing in it but
    /// its lock, and goes with the next kiln.
    pub fn is_swept(&self, group: u32) {
        soon(2, "all processes of the run are gone", || members(group).is_empty());
        for folder in fs::read_dir(self.path("store/tmp")).into_iter().flatten().flatten() {
            for file in fs::read_dir(folder.path()).into_iter().flatten().flatten() {
                assert_eq!(file.file_name(), "lock", "left behind: {file:?}");
            }
        }
        self.end(self.kiln().arg("doctor"), &[]);
        self.is_clean(group);
    }

    /// Asserts that no process of the group is alive, and that no file of a run is left, within two seconds.
    pub fn is_clean(&self, group: u32) {
        soon(2, "all processes of the run are gone", || members(group).is_empty());
        for place in ["store/tmp", "tmp"] {
            let left: Vec<_> = fs::read_dir(self.path(place)).into_iter().flatten().flatten().collect();
            assert!(left.is_empty(), "left behind: {left:?}");
        }
    }
}

impl Deref for Host {
    type Target = Folder;

    fn deref(&self) -> &Folder {
        &self.folder
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Of a test that failed: what it kept must not stay.
        if fs::read_dir(self.path("store/run/machines")).is_ok_and(|mut places| places.next().is_some()) {
            let _ = self.kiln().args(["stop", "--all"]).stdout(Stdio::null()).status();
        }
        if let Ok(own) = fs::read_link(self.path("store")) {
            let _ = fs::remove_dir_all(own);
        }
    }
}

/// `command` started by another program: what `words` begin, with its variables and in its folder.
pub fn started_by(words: &[&str], command: &Command) -> Command {
    let mut outer = Command::new(words[0]);
    outer.args(&words[1..]).arg(command.get_program()).args(command.get_args()).stdin(Stdio::null());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => outer.env(name, value),
            None => outer.env_remove(name),
        };
    }
    if let Some(folder) = command.get_current_dir() {
        outer.current_dir(folder);
    }
    outer
}

/// The living processes of a process group, and those of the machine of its leader: they leave the group.
pub fn members(group: u32) -> Vec<String> {
    let mut found = Vec::new();
    let machine = format!("kiln-{group}");
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let mut words = words.split(|byte| *byte == 0);
        let of_machine = words.any(|word| word.strip_prefix(b"guest=").unwrap_or(word) == machine.as_bytes());
        // pid (comm) state ppid pgrp …
        let Some((name, rest)) = stat.rsplit_once(") ") else { continue };
        let fields: Vec<&str> = rest.split(' ').collect();
        if fields[0] != "Z" && (of_machine || fields[2] == group.to_string()) {
            found.push(name.to_owned());
        }
    }
    found
}

/// Asks again until `condition` holds, at most `seconds` long.
pub fn soon(seconds: u64, what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    while !condition() {
        assert!(Instant::now() < deadline, "not within {seconds} s: {what}");
        std::thread::yield_now();
    }
}

/// A kiln that runs; killed when a test fails before its end.
pub struct Running(Child);

impl Running {
    pub fn start(command: &mut Command) -> Self {
        Self(command.spawn().expect("kiln can be started"))
    }

    /// Reads what it writes to standard output until `word` has come.
    pub fn read_until(&mut self, word: &str) {
        let stdout = self.0.stdout.as_mut().expect("it is piped");
        let mut seen = Vec::new();
        let mut buffer = [0; 1024];
        while !String::from_utf8_lossy(&seen).contains(word) {
            let count = stdout.read(&mut buffer).expect("a pipe");
            assert!(count > 0, "kiln ended before it said {word}");
            seen.extend_from_slice(&buffer[..count]);
        }
    }

    /// Waits for its end. What was not read yet is told.
    pub fn end(mut self) -> Told {
        let (stdout, stderr) = (self.0.stdout.take(), self.0.stderr.take());
        let (stdout, stderr) = std::thread::scope(|scope| {
            let stderr = scope.spawn(|| rest(stderr));
            (rest(stdout), stderr.join().expect("no panic"))
        });
        let code = self.0.wait().expect("kiln is ours").code();
        Told { code, stdout, stderr: String::from_utf8_lossy(&stderr).into_owned() }
    }
}

/// What comes from a pipe up to its end, where there is one.
fn rest(pipe: Option<impl Read>) -> Vec<u8> {
    let mut bytes = Vec::new();
    pipe.map(|mut pipe| pipe.read_to_end(&mut bytes)).transpose().expect("a pipe");
    bytes
}

impl Deref for Running {
    type Target = Child;

    fn deref(&self) -> &Child {
        &self.0
    }
}

impl DerefMut for Running {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A server of this host's that says `from the host` to whoever connects: its port.
pub fn greeter() -> u16 {
    let server = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = server.local_addr().expect("its address").port();
    std::thread::spawn(move || {
        for stream in server.incoming() {
            let _ = stream.and_then(|mut stream| stream.write_all(b"from the host\n"));
        }
    });
    port
}

impl Told {
    /// Asserts the exit code and that standard error has all of `words`.
    pub fn ends(&self, code: i32, words: &[&str]) -> &Self {
        assert_eq!(self.code, Some(code), "{self:?}");
        for word in words {
            assert!(self.stderr.contains(word), "no `{word}` in: {}", self.stderr);
        }
        self
    }

    /// Whether nothing was tried, as this host lets nobody mount: said by the status 77 of the script that mounts, or by
    /// unshare(1). It is told.
    #[allow(dead_code, reason = "not all tests mount")]
    pub fn cannot_mount(&self) -> bool {
        let cannot = self.code == Some(77) || self.stderr.contains("unshare failed");
        if cannot {
            eprintln!("skipped: this host lets nobody mount: {}", self.stderr);
        }
        cannot
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).expect("text")
    }

    /// The lines that the command wrote between `[name]` and the next such line.
    pub fn section(&self, name: &str) -> Vec<&str> {
        let start = format!("[{name}]");
        assert!(self.text().lines().any(|line| line == start), "no {start} in: {self:?}");
        let lines = self.text().lines().skip_while(|line| *line != start).skip(1);
        lines.take_while(|line| !(line.starts_with('[') && line.ends_with(']'))).collect()
    }

    /// The events that `--json` wrote.
    pub fn events(&self) -> Vec<serde_json::Value> {
        self.lines_of("events")
    }

    /// The lines of JSON that were written: each is as the schema of `what` says.
    pub fn lines_of(&self, what: &str) -> Vec<serde_json::Value> {
        let printed = Command::new(binary()).args(["schema", what]).output().expect("kiln is there");
        judge::holds(std::str::from_utf8(&printed.stdout).expect("text"), self.text());
        self.text().lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
    }
}
