//! Sources that are commits: pinned by the lock, the same bytes from every server, and refused where they move.

use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use super::super::host::{Host, Told};

/// A repository made by git itself, with a commit, a tag and a branch.
struct Repository {
    host: Host,
}

impl Repository {
    fn new() -> Self {
        let host = Host::new();
        host.file("r/hello.c", "int main() { return 0; }\n");
        host.script("r/configure", "true");
        host.file(
            "r/.gitattributes",
            "secret export-ignore\nident.txt ident text eol=crlf\n*.sub export-subst\n",
        );
        host.file("r/secret", "kept\n");
        host.file("r/ident.txt", "$Id$\n");
        host.file("r/v.sub", "$Format:%H$\n");
        host.file("r/deep/er/x", "x\n");
        let repository = Self { host };
        std::os::unix::fs::symlink("./deep//er/x", repository.host.path("r/link")).expect("room");
        repository.git(&["init", "-q", "-b", "main"]);
        repository.git(&["add", "."]);
        repository.commit("first");
        repository.git(&["tag", "-a", "v1", "-m", "one"]);
        repository.git(&["tag", "light"]);
        repository
    }

    fn git(&self, arguments: &[&str]) -> String {
        let mut command = Command::new("git");
        command.arg("-C").arg(self.host.path("r")).args(arguments).env("HOME", self.host.root());
        for who in ["AUTHOR", "COMMITTER"] {
            command.env(format!("GIT_{who}_NAME"), "n").env(format!("GIT_{who}_EMAIL"), "e@example.org");
            command.env(format!("GIT_{who}_DATE"), "2026-01-02T03:04:05Z");
        }
        let output = command.output().expect("git can be started");
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    fn commit(&self, message: &str) {
        self.git(&["commit", "-q", "--allow-empty", "-m", message]);
    }

    fn head(&self) -> String {
        self.git(&["rev-parse", "HEAD"])
    }

    fn recipe(&self, url: &str, rev: &str) {
        let text = format!(
            "[sources.s]\ngit = \"{url}\"\nrev = \"{rev}\"\n[steps.s]\nroot = \"dir:r\"\nrun = \"x\"\n"
        );
        self.host.file("kiln.toml", text);
    }

    fn update(&self) -> Told {
        self.host.run(&["lock", "update", "s"])
    }

    fn lock(&self) -> String {
        fs::read_to_string(self.host.path("kiln.lock")).unwrap_or_default()
    }

    /// The archive that the lock names, unpacked by GNU tar in a folder of that name.
    fn unpacked(&self, name: &str) -> PathBuf {
        self.host.run(&["lock", "vendor", &format!("vendor-{name}")]).succeeds();
        let lock = self.lock();
        let digest = lock.split("sha256 = \"").nth(1).and_then(|rest| rest.get(..64)).expect("a digest");
        let folder = self.host.folder(name);
        let archive = self.host.path(&format!("vendor-{name}/blobs/sha256/{digest}"));
        let mut tar = Command::new("tar");
        assert!(tar.arg("-xf").arg(archive).arg("-C").arg(&folder).status().expect("GNU tar").success());
        folder
    }
}

/// `git daemon`, which speaks git:// on this host.
struct Daemon {
    child: Child,
    port: u16,
}

impl Daemon {
    fn new(repository: &Repository) -> Self {
        let port =
            TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port").port();
        // Itself, not the `git` that would start it and leave it behind.
        let programs = Command::new("git").arg("--exec-path").output().expect("git can be started").stdout;
        let programs = PathBuf::from(String::from_utf8_lossy(&programs).trim());
        let child = Command::new(programs.join("git-daemon"))
            .args(["--reuseaddr", "--export-all", "--listen=127.0.0.1"])
            .arg(format!("--port={port}"))
            .arg(format!("--base-path={}", repository.host.root().display()))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("git daemon can be started");
        let daemon = Self { child, port };
        // It listens when somebody gets through.
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            std::thread::yield_now();
        }
        daemon
    }

    fn url(&self) -> String {
        format!("git://127.0.0.1:{}/r/.git", self.port)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_tag_is_pinned_to_its_commit_and_the_tree_comes_as_it_was_committed() {
    let repository = Repository::new();
    repository.recipe("file:r", "v1");
    repository.update().succeeds();
    assert!(repository.lock().contains(&format!("rev = \"v1\"\ncommit = \"{}\"", repository.head())));
    let folder = repository.unpacked("tree");
    let read = |name: &str| fs::read_to_string(folder.join(name)).expect(name);
    // No attribute of the tree changes what comes.
    assert_eq!(read("secret"), "kept\n");
    assert_eq!(read("ident.txt"), "$Id$\n");
    assert_eq!(read("v.sub"), "$Format:%H$\n");
    assert_eq!(read("deep/er/x"), "x\n");
    assert_eq!(fs::read_link(folder.join("link")).expect("a link").as_os_str(), "./deep//er/x");
    let mode = |name: &str| {
        use std::os::unix::fs::PermissionsExt;
        fs::metadata(folder.join(name)).expect(name).permissions().mode() & 0o777
    };
    assert_eq!((mode("configure"), mode("hello.c")), (0o755, 0o644));
    assert!(!folder.join(".git").exists());
    let left: Vec<_> = fs::read_dir(repository.host.path("store/tmp")).expect("a store").collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn the_same_commit_gives_the_same_bytes_however_it_is_named_and_fetched() {
    let repository = Repository::new();
    let daemon = Daemon::new(&repository);
    let (commit, url) = (repository.head(), daemon.url());
    repository.commit("later");
    let mut digests = std::collections::BTreeSet::new();
    for (url, rev) in [("file:r", "v1"), ("file:r", "light"), (&url, "v1"), (&url, &commit)] {
        repository.recipe(url, rev);
        let _ = fs::remove_file(repository.host.path("kiln.lock"));
        repository.update().succeeds();
        let lock = repository.lock();
        assert!(lock.contains(&format!("commit = \"{commit}\"")), "{lock}");
        digests.insert(lock.split("sha256 = ").nth(1).expect("a digest").to_owned());
    }
    assert_eq!(digests.len(), 1, "{digests:?}");
}

#[test]
fn a_branch_an_unknown_name_and_a_commit_that_is_not_there_are_refused() {
    let repository = Repository::new();
    let head = repository.head();
    let tag_object = repository.git(&["rev-parse", "refs/tags/v1"]);
    let tree = repository.git(&["rev-parse", "HEAD^{tree}"]);
    for (rev, words, hint) in [
        ("main", &["`main` is a branch", "moves"][..], head.as_str()),
        ("nothing", &["no commit or tag `nothing`"], "tag"),
        (&"7".repeat(40), &["no commit or tag `777"], "another commit"),
        (&tag_object, &["is no commit"], &head),
    ] {
        repository.recipe("file:r", rev);
        repository.update().fails(1, words).hints(&[hint]);
    }
    repository.recipe("file:r", &tree);
    repository.update().fails(1, &["is no commit"]);
    repository.recipe("file:nowhere", "v1");
    repository.update().fails(1, &["file:nowhere"]);
    repository.recipe("git://127.0.0.1:1/r", &head);
    repository.update().fails(1, &["git://127.0.0.1:1/r"]);
    assert_eq!(repository.lock(), "");
}

#[test]
fn a_tag_that_moved_changes_nothing_until_an_update_says_so_loudly() {
    let repository = Repository::new();
    repository.recipe("file:r", "v1");
    repository.update().succeeds();
    let first = repository.head();
    repository.host.file("r/hello.c", "evil\n");
    repository.git(&["commit", "-qam", "second"]);
    repository.git(&["tag", "-f", "v1"]);
    let locked = repository.lock();
    // An empty store fetches what is locked, not what the tag is now.
    repository.host.run(&["lock", "vendor", "v", "--store", "other"]).succeeds();
    let told = repository.host.run(&["lock", "update", "-n", "s"]);
    let line = format!("! THE TAG MOVED: commit {first} -> {}", repository.head());
    assert!(told.succeeds().stdout.contains(&line), "{}", told.stdout);
    assert_eq!(repository.lock(), locked);
    // A commit in the recipe that is another in the lock is a contradiction.
    repository.recipe("file:r", &first);
    repository.update().succeeds();
    let wrong = repository
        .lock()
        .replace(&format!("commit = \"{first}\""), &format!("commit = \"{}\"", repository.head()));
    fs::write(repository.host.path("kiln.lock"), wrong).expect("room");
    repository.host.folder("r");
    let told = repository.host.run(&["build", "-n"]);
    told.fails(2, &["source `s` is commit", &first, &repository.head()]).hints(&["kiln lock update s"]);
}

#[test]
fn no_hook_no_configuration_and_no_helper_of_anybody_runs() {
    let repository = Repository::new();
    let trap = repository.host.path("sprung");
    let spring = format!("touch {}", trap.display());
    for hook in ["post-checkout", "reference-transaction", "post-index-change", "pre-auto-gc"] {
        repository.host.script(&format!("hooks/{hook}"), &spring);
        repository.host.script(&format!("templates/hooks/{hook}"), &spring);
    }
    let hooks = repository.host.path("hooks");
    let helper = repository.host.script("helper", &spring);
    let config = format!(
        "[core]\n hooksPath = {0}\n fsmonitor = {1}\n askPass = {1}\n[credential]\n helper = {1}\n[init]\n templateDir = {2}\n\
         [uploadpack]\n packObjectsHook = {1}\n[filter \"x\"]\n smudge = {1}\n clean = {1}\n[url \"ext::{1}\"]\n insteadOf = git:\n",
        hooks.display(),
        helper.display(),
        repository.host.path("templates").display()
    );
    repository.host.file("home/.gitconfig", &config);
    repository.host.file("home/.config/git/config", &config);
    let daemon = Daemon::new(&repository);
    for url in ["file:r".to_owned(), daemon.url()] {
        repository.recipe(&url, "v1");
        let mut command = repository.host.kiln();
        command
            .env("GIT_DIR", "/nonexistent")
            .env("GIT_SSH_COMMAND", &helper)
            .env("GIT_PROXY_COMMAND", &helper);
        command
            .env("GIT_CONFIG_COUNT", "1")
            .env("GIT_CONFIG_KEY_0", "core.hooksPath")
            .env("GIT_CONFIG_VALUE_0", &hooks);
        Told::by(command.args(["lock", "update", "s"])).succeeds();
    }
    assert!(!trap.exists(), "something ran");
}

#[test]
fn a_server_that_leads_to_another_protocol_is_not_followed() {
    let repository = Repository::new();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    let target = repository.host.path("r").display().to_string();
    std::thread::spawn(move || {
        use std::io::{Read, Write};
        for mut stream in listener.incoming().flatten() {
            let _ = stream.read(&mut [0; 4096]);
            let _ = write!(
                stream,
                "HTTP/1.1 302 Found\r\nLocation: file://{target}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            );
        }
    });
    repository.recipe(&format!("http://{address}/r"), "v1");
    repository.update().fails(1, &[&address.to_string()]);
    assert_eq!(repository.lock(), "");
}

#[test]
fn a_linked_worktree_is_a_repository_too() {
    let repository = Repository::new();
    let linked = repository.host.path("linked").display().to_string();
    repository.git(&["worktree", "add", "-q", "--detach", &linked]);
    repository.recipe("file:linked", "v1");
    repository.update().succeeds();
    assert!(repository.lock().contains(&repository.head()));
}

#[test]
fn what_git_may_reach_is_its_place_and_the_repository() {
    // As a program of the host's that looks around in the same jail.
    let repository = Repository::new();
    let secret = repository.host.file("home/secret", "s");
    let script = format!(
        "cat {0} && echo READ; echo x > {1}/written && echo WROTE; echo y > inside && echo INSIDE; exit 3",
        secret.display(),
        repository.host.root().display()
    );
    let bin = repository.host.folder("bin");
    repository.host.script("bin/git", &format!("({script}) >&2"));
    repository.recipe("git://127.0.0.1:1/r", &repository.head());
    let mut command = repository.host.kiln();
    let told = Told::by(
        command.env("PATH", format!("{}:/usr/bin:/bin", bin.display())).args(["lock", "update", "s"]),
    );
    told.fails(1, &["INSIDE"]);
    let jail = repository.host.run(&["doctor"]).stdout;
    if jail.contains("landlock") && !jail.contains("no landlock") {
        assert!(!told.stderr.contains("WROTE") && !told.stderr.contains("READ"), "{}", told.stderr);
        assert!(!repository.host.path("written").exists());
    }
}

#[test]
fn offline_a_commit_comes_from_vendored_bytes_and_git_is_not_asked() {
    let repository = Repository::new();
    repository.recipe("file:r", "v1");
    repository.update().succeeds();
    repository.host.run(&["lock", "vendor", "v.tar"]).succeeds();
    fs::rename(repository.host.path("r"), repository.host.path("gone")).expect("ours");
    let arguments = ["lock", "vendor", "w.tar", "--offline", "--store", "empty"];
    repository.host.run(&arguments).fails(1, &["v1 of file:r", "--offline"]);
    let with = [&arguments[..], &["--vendor", "v.tar"]].concat();
    repository.host.run(&with).succeeds();
    let read = |name: &str| fs::read(repository.host.path(name)).expect("there");
    assert!(read("v.tar") == read("w.tar"));
}
