//! The lock: what is locked, what an update changes and says, and what is refused.

mod archive;
mod git;
mod tls;
mod vendor;

use std::fs;
use std::process::Command;

use super::host::{Host, Told};
use archive::{Archive, SUITE, Server};

/// A root of the test archive.
const ROOT: &str = "debian:testing+make";

/// An archive with what makes a root, a host, and a server between them.
struct World {
    archive: Archive,
    server: Server,
    host: Host,
}

impl World {
    fn new() -> Self {
        let mut archive = Archive::new();
        archive.add("base-files", "12", "Essential: yes\n", b"base");
        archive.add("make", "4.3-1", "Depends: libc6\n", b"make");
        archive.add("libc6", "2.40-1", "", b"libc");
        archive.publish();
        let server = Server::new(archive.root(), |_| false);
        Self { archive, server, host: Host::new() }
    }

    /// kiln with `arguments`, which knows the archive as its mirror.
    fn kiln(&self, arguments: &[&str]) -> Command {
        self.kiln_at(&self.server.url, arguments)
    }

    fn kiln_at(&self, mirror: &str, arguments: &[&str]) -> Command {
        let mut command = self.host.kiln();
        command.env("KILN_DEBIAN_KEYRING", self.archive.keyring()).env("KILN_DEBIAN_MIRROR", mirror);
        command.env_remove("KILN_DEBIAN_SECURITY_MIRROR").args(arguments);
        command
    }

    fn run(&self, arguments: &[&str]) -> Told {
        Told::by(&mut self.kiln(arguments))
    }

    fn lock(&self) -> String {
        fs::read_to_string(self.host.path("kiln.lock")).unwrap_or_default()
    }
}

#[test]
fn an_update_says_package_by_package_what_became_of_it() {
    let mut world = World::new();
    let told = world.run(&["lock", "update", ROOT]);
    told.succeeds();
    assert!(told.stdout.starts_with(&format!("+ root {ROOT}: ")), "{}", told.stdout);
    let first = world.lock();
    for package in ["base-files", "libc6", "make"] {
        assert!(first.contains(&format!("name = \"{package}\"")), "{first}");
    }
    let again = world.run(&["lock", "update"]);
    again.succeeds();
    assert_eq!((again.stdout.as_str(), world.lock() == first), ("", true), "{}", again.stderr);
    assert!(again.stderr.contains("1 entries looked at, nothing changed"), "{}", again.stderr);

    world.archive.add("make", "4.4-1", "Depends: libc6, libgc\n", b"newer make");
    world.archive.add("libgc", "8", "", b"gc");
    // Nobody should ever do that.
    world.archive.add("libc6", "2.40-1", "", b"evil");
    world.archive.publish();
    let dry = world.run(&["lock", "update", "-n"]);
    dry.succeeds();
    assert!(dry.stderr.contains("1 of 1 entries would change") && world.lock() == first, "{}", dry.stderr);
    let told = world.run(&["lock", "update"]);
    assert_eq!(told.succeeds().stdout, dry.stdout);
    for line in [
        format!("~ root {ROOT}: "),
        format!("    ~ index of {SUITE}: "),
        "    + libgc 8 (2 B)".to_owned(),
        "    ~ make 4.3-1 -> 4.4-1 (4 B -> 10 B)".to_owned(),
        "    ! libc6 2.40-1 has OTHER BYTES UNDER THE SAME VERSION: sha256 ".to_owned(),
        "    = 1 package as before".to_owned(),
    ] {
        assert!(told.stdout.lines().any(|found| found.starts_with(&line)), "no `{line}` in\n{}", told.stdout);
    }
    world.archive.remove("libgc");
    world.archive.add("make", "4.4-2", "Depends: libc6\n", b"make again");
    world.archive.publish();
    let told = world.run(&["lock", "update", ROOT]);
    assert!(told.succeeds().stdout.contains("    - libgc 8 (2 B)"), "{}", told.stdout);
}

#[test]
fn a_blob_that_the_lock_names_says_so() {
    let world = World::new();
    world.run(&["lock", "update", ROOT]).succeeds();
    let digest = kiln_digest::Digest::of(b"make").to_string();
    let told = world.run(&["store", "why", &digest[..12]]);
    let stdout = &told.succeeds().stdout;
    assert!(stdout.starts_with(&digest), "{stdout}");
    assert!(stdout.contains(&format!("kiln.lock: package make 4.3-1 of root {ROOT}\n")), "{stdout}");
    world.run(&["store", "why", "0123456789"]).fails(1, &["the lock names none"]);
}

#[test]
fn an_archive_that_went_back_in_time_changes_nothing() {
    let mut world = World::new();
    world.run(&["lock", "update", ROOT]).succeeds();
    let old = world.archive.root().join(format!("dists/{SUITE}/InRelease"));
    let old_bytes = fs::read(&old).expect("there");
    world.archive.publish();
    world.run(&["lock", "update"]).succeeds();
    let locked = world.lock();
    fs::write(&old, old_bytes).expect("room");
    world.run(&["lock", "update"]).fails(1, &["before the one of", "that is locked"]);
    assert_eq!(world.lock(), locked);
}

#[test]
fn a_name_is_the_recipes_or_the_locks_or_refused_with_what_was_meant() {
    let world = World::new();
    let recipe =
        format!("[roots.base]\nfrom = \"debian:{SUITE}\"\npackages = [\"make\"]\n[steps.s]\nrun = \"x\"\n");
    world.host.file("kiln.toml", recipe);
    let told = world.run(&["lock", "update", "bas"]);
    told.fails(2, &["neither the lock nor the recipe has `bas`"]).hints(&["`base`"]);
    world.run(&["lock", "update", "base"]).succeeds();
    world.run(&["lock", "update", ROOT]).succeeds();
    assert_eq!(world.lock().matches("[[root]]").count(), 1);
    // What would be a root of another suite is looked for where there is none.
    world.run(&["lock", "update", "debian:nowhere"]).fails(1, &["nowhere"]);
    world.run(&["lock", "update", "debian:UPPER CASE"]).fails(2, &["UPPER CASE"]);
    let told = world.run(&["lock", "--locked", "update", "base"]);
    told.fails(2, &["--locked"]);
}

#[test]
fn what_the_recipe_does_not_name_is_shown_as_such_and_pruned() {
    let world = World::new();
    world.run(&["lock", "update", ROOT, "debian:testing"]).succeeds();
    world.run(&["lock", "prune"]).fails(2, &["no kiln.toml"]);
    world.host.file("kiln.toml", format!("[roots.base]\nfrom = \"{ROOT}\"\n[steps.s]\nrun = \"x\"\n"));
    let told = world.run(&["lock", "show"]);
    let row = |name: &str| told.stdout.lines().find(|line| line.contains(name)).expect("a row").to_owned();
    assert!(row("debian:testing ").ends_with("(the recipe does not name it)"), "{}", told.stdout);
    assert!(row(ROOT).ends_with(ROOT), "{}", told.stdout);
    let json = world.run(&["lock", "show", "--json"]);
    world.host.is_as_the_schema_says("lock-show", json.succeeds());
    let rows: serde_json::Value = serde_json::from_str(&json.stdout).expect("JSON");
    assert_eq!((rows[0]["in-recipe"].as_bool(), rows[1]["in-recipe"].as_bool()), (Some(false), Some(true)));
    let before = world.lock();
    let dry = world.run(&["lock", "prune", "-n"]);
    assert!(dry.succeeds().stdout.starts_with("- root debian:testing: ") && world.lock() == before);
    world.run(&["lock", "prune"]).succeeds();
    assert!(!world.lock().contains("\"debian:testing\"") && world.lock().contains(ROOT));
}

#[test]
fn a_locked_run_refuses_what_the_lock_does_not_name_whatever_asks() {
    let world = World::new();
    world.host.file("agent", "an agent");
    world.host.script("qemu", "exit 1");
    world.host.file("kiln.toml", "[roots.r]\nfrom = \"debian:testing\"\n[steps.s]\nrun = \"x\"\n");
    let locked = |arguments: &[&str], variable: &str| {
        let mut command = world.kiln(arguments);
        command.env("KILN_AGENT", world.host.path("agent")).env("KILN_QEMU", world.host.path("qemu"));
        command.env("SRCDIR", world.host.folder("src"));
        if !variable.is_empty() {
            command.env(variable, "on");
        }
        Told::by(&mut command)
    };
    for (arguments, variable, flag) in [
        (&["kernel", "--locked"][..], "", "--locked"),
        (&["kernel"], "KILN_LOCKED", "--locked"),
        (&["kernel"], "KILN_OFFLINE", "--offline"),
        (&["run", "--locked", "--", "true"], "", "--locked"),
        (&["run", "--offline", "--", "true"], "", "--offline"),
        (&["build", "--locked"], "", "--locked"),
        (&["build", "--offline"], "", "--offline"),
        (&["build", "-n", "--locked"], "", "--locked"),
        (&["exec", "--offline", "s", "--", "true"], "", "--offline"),
    ] {
        let told = locked(arguments, variable);
        told.fails(2, &["the kernel of Debian trixie is not in the lock", flag]).hints(&["kiln lock update"]);
    }
    assert_eq!((world.lock().as_str(), world.server.asked().len()), ("", 0));
    world.host.file("kiln.lock", "version = 1\n");
    world.host.file("kiln.toml", "[settings]\nlocked = true\n[steps.s]\nrun = \"x\"\n");
    locked(&["kernel"], "").fails(2, &["--locked"]);
    Told::by(world.kiln(&["kernel"]).env("KILN_LOCKED", "perhaps")).fails(2, &["`perhaps`", "on or off"]);
}

#[test]
fn a_package_that_mirrors_dropped_is_fetched_from_the_snapshot_archive() {
    let world = World::new();
    world.run(&["lock", "update", ROOT]).succeeds();
    let mirror = Server::new(world.archive.root(), |path| path.contains("/make_"));
    let told = Told::by(&mut world.kiln_at(&mirror.url, &["lock", "vendor", "v"]));
    told.fails(1, &["package make 4.3-1", "is not at"]).hints(&["--debian-snapshot"]);

    // An archive by time: where the index's own time is too early, the day after has it.
    let snapshot = Server::new(world.archive.root(), |_| false);
    let template = format!("{}/archive/{{archive}}/{{time}}", snapshot.url);
    let told =
        Told::by(&mut world.kiln_at(&mirror.url, &["lock", "vendor", "v", "--debian-snapshot", &template]));
    told.fails(1, &["package make 4.3-1"]);
    let asked = snapshot.asked();
    assert_eq!(asked.len(), 2, "{asked:?}");
    for path in &asked {
        let (start, rest) = path.split_at("/archive/debian/".len());
        assert_eq!(start, "/archive/debian/");
        assert!(rest.ends_with("Z/pool/main/make_4.3-1_amd64.deb") && rest.as_bytes()[8] == b'T', "{path}");
    }
    let day = asked[1].split('/').nth(3).expect("a time").to_owned();
    let place = format!("archive/debian/{day}/pool/main");
    fs::create_dir_all(world.archive.root().join(&place)).expect("room");
    let old = world.archive.root().join(&place).join("make_4.3-1_amd64.deb");
    // Other bytes under that name are no more than a mirror's.
    fs::write(&old, "evil").expect("room");
    let mut command = world.kiln_at(&mirror.url, &["lock", "vendor", "v"]);
    let told = Told::by(command.env("KILN_DEBIAN_SNAPSHOT", &template));
    told.fails(1, &["package make 4.3-1", "digest"]);
    fs::copy(world.archive.pool("make", "4.3-1"), &old).expect("room");
    let mut command = world.kiln_at(&mirror.url, &["lock", "vendor", "v"]);
    Told::by(command.env("KILN_DEBIAN_SNAPSHOT", &template)).succeeds();

    let mut command = world.kiln_at(&mirror.url, &["lock", "vendor", "v", "--store", "other"]);
    Told::by(command.env("KILN_DEBIAN_SNAPSHOT", "ftp://x")).fails(1, &["ftp://x"]).hints(&["{time}"]);
}

#[test]
fn a_lock_that_contradicts_the_recipe_is_refused_and_an_update_takes_the_recipes_word() {
    let world = World::new();
    let files = Host::new();
    files.file("a.tar", "some bytes");
    let server = Server::new(files.root(), |_| false);
    let url = format!("{}/a.tar", server.url);
    let digest = kiln_digest::Digest::of(b"some bytes").to_string();
    let recipe = |sha256: &str| {
        format!(
            "[sources.a]\nurl = \"{url}\"\nsha256 = \"{sha256}\"\n[steps.s]\nroot = \"dir:r\"\nrun = \"x\"\n"
        )
    };
    world.host.file("kiln.toml", recipe(&digest));
    world.host.file("r/file", "");
    let wrong = "7".repeat(64);
    world.host.file(
        "kiln.lock",
        format!("version = 1\n\n[[source]]\nurl = \"{url}\"\nsize = 10\nsha256 = \"{wrong}\"\n"),
    );
    let told = world.run(&["build", "-n"]);
    told.fails(2, &["source `a`", &wrong, &digest]).hints(&["kiln lock update a"]);
    let told = world.run(&["lock", "update", "a"]);
    assert!(told.succeeds().stdout.contains("! OTHER BYTES AT THE SAME URL"), "{}", told.stdout);
    assert!(world.lock().contains(&digest));
    // A recipe whose digest the server does not give: both are shown, and nothing is locked.
    fs::remove_file(world.host.path("kiln.lock")).expect("ours");
    world.host.file("kiln.toml", recipe(&wrong));
    let told = world.run(&["lock", "update", "a"]);
    told.fails(1, &["source a", &wrong, &digest]).hints(&["another mirror"]);
    assert_eq!(world.lock(), "");
}

#[test]
fn a_source_without_a_digest_is_locked_by_its_first_and_a_change_is_said_loudly() {
    let world = World::new();
    let files = Host::new();
    files.file("a", "first");
    let server = Server::new(files.root(), |path| path == "/gone");
    world.host.file(
        "kiln.toml",
        format!(
            "[sources.a]\nurl = \"{0}/gone\"\nmirrors = [\"{0}/a\"]\n[steps.s]\nrun = \"x\"\n",
            server.url
        ),
    );
    world.run(&["lock", "update", "a"]).succeeds();
    assert!(world.lock().contains("/gone\"") && !world.lock().contains("/a\""), "{}", world.lock());
    files.file("a", "second");
    let told = world.run(&["lock", "update", "a"]);
    assert!(told.succeeds().stdout.contains("! OTHER BYTES AT THE SAME URL: sha256 "), "{}", told.stdout);
}

#[test]
fn two_kilns_that_lock_at_once_lose_nothing() {
    let world = World::new();
    let roots = ["debian:testing", ROOT, "debian:testing+libc6"];
    let children: Vec<_> = roots
        .iter()
        .map(|root| world.kiln(&["lock", "update", root]).spawn().expect("kiln can be started"))
        .collect();
    for mut child in children {
        assert!(child.wait().expect("it ends").success());
    }
    assert_eq!(world.lock().matches("[[root]]").count(), 3, "{}", world.lock());
}

#[test]
fn a_root_whose_version_is_named_is_held_against_the_lock() {
    let world = World::new();
    let root = "debian:testing+make=4.3-1";
    world.run(&["lock", "update", root]).succeeds();
    let text = world.lock().replace("version = \"4.3-1\"", "version = \"4.2-1\"");
    fs::write(world.host.path("kiln.lock"), text).expect("room");
    world.run(&["lock", "show"]).succeeds();
    world.run(&["lock", "update", "debian:testing+make=9"]).fails(1, &["make"]);
}
