//! Bytes taken along: with them alone, in an empty store and without a network, everything is there; and damaged ones are
//! named.

use std::fs;
use std::process::Command;

use super::super::host::{Host, Told};
use super::archive::Server;
use super::{ROOT, World};

/// A world whose lock has a root and a source.
fn world() -> (World, Host) {
    let (world, files) = (World::new(), Host::new());
    files.file("a", "a source");
    let server = Server::new(files.root(), |_| false);
    let url = format!("{}/a", server.url);
    let recipe =
        format!("[roots.base]\nfrom = \"{ROOT}\"\n[sources.a]\nurl = \"{url}\"\n[steps.s]\nrun = \"x\"\n");
    world.host.file("kiln.toml", recipe);
    world.run(&["lock", "update", "base", "a"]).succeeds();
    (world, files)
}

/// kiln in an empty store, offline, with `vendor`: it takes all that the lock names, and writes it again to `again`.
fn offline(world: &World, vendor: &str, again: &str) -> Command {
    let _ = fs::remove_dir_all(world.host.path("empty"));
    let arguments = ["lock", "vendor", again, "--offline", "--vendor", vendor, "--store", "empty"];
    world.kiln_at("http://127.0.0.1:1/debian", &arguments)
}

#[test]
fn from_vendored_bytes_alone_all_is_there_again_byte_for_byte() {
    let (world, _files) = world();
    world.run(&["lock", "vendor", "v"]).succeeds();
    let told = world.run(&["lock", "vendor", "v.tar"]);
    assert!(told.succeeds().stderr.contains("4 files ("), "{}", told.stderr);
    assert_eq!(fs::read_to_string(world.host.path("v/kiln.lock")).expect("there"), world.lock());
    for vendor in ["v", "v.tar"] {
        Told::by(&mut offline(&world, vendor, "again.tar")).succeeds();
        let read = |name: &str| fs::read(world.host.path(name)).expect("there");
        assert!(read("v.tar") == read("again.tar"), "{vendor}");
        fs::remove_file(world.host.path("again.tar")).expect("ours");
    }
    // As a setting of the recipe, beside it.
    let recipe = fs::read_to_string(world.host.path("kiln.toml")).expect("there");
    world.host.file("kiln.toml", format!("[settings]\noffline = true\nvendor = \"v.tar\"\n{recipe}"));
    let mut command =
        world.kiln_at("http://127.0.0.1:1/debian", &["lock", "vendor", "w", "--store", "third"]);
    Told::by(command.current_dir(world.host.folder("below"))).succeeds();
    assert!(world.host.path("below/w/kiln.lock").is_file());
}

#[test]
fn offline_no_socket_of_a_network_is_opened() {
    let (world, _files) = world();
    world.run(&["lock", "vendor", "v"]).succeeds();
    let trace = |command: &Command| {
        let mut traced = Command::new("strace");
        traced.args(["-f", "-qq", "-e", "trace=network", "-o"]).arg(world.host.path("trace"));
        traced.arg("--").arg(command.get_program()).args(command.get_args()).env_clear();
        traced.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        traced.current_dir(world.host.root());
        Told::by(&mut traced)
    };
    let network = || {
        let text = fs::read_to_string(world.host.path("trace")).expect("strace wrote it");
        text.lines().filter(|line| line.contains("AF_INET") || line.contains("sendto(")).count()
    };
    trace(&offline(&world, "v", "again")).succeeds();
    assert_eq!(network(), 0);
    // What is missing is asked of nobody either.
    let lock = fs::read_to_string(world.host.path("kiln.lock")).expect("there");
    let digest = lock.split("sha256 = \"").last().and_then(|rest| rest.get(..64)).expect("a digest");
    fs::remove_file(world.host.path(&format!("v/blobs/sha256/{digest}"))).expect("there");
    trace(&offline(&world, "v", "again")).fails(1, &["--offline fetches nothing"]);
    trace(&offline(&world, "v", "again")).hints(&["kiln lock vendor"]);
    assert_eq!(network(), 0);
    // The judge sees one where there is one.
    trace(&world.kiln(&["lock", "vendor", "v", "--store", "online"])).succeeds();
    assert!(network() > 0);
}

#[test]
fn a_damaged_file_is_named_with_the_way_out() {
    let (world, _files) = world();
    world.run(&["lock", "vendor", "v.tar"]).succeeds();
    let path = world.host.path("v.tar");
    let whole = fs::read(&path).expect("there");
    let at = whole.windows(8).rposition(|window| window == b"a source").expect("it is in there");
    let mut flipped = whole.clone();
    flipped[at] ^= 1;
    fs::write(&path, &flipped).expect("room");
    let told = Told::by(&mut offline(&world, "v.tar", "again"));
    told.fails(1, &["source", "/a", "v.tar", "other bytes"]).hints(&["kiln lock vendor"]);
    fs::write(&path, &whole[..whole.len() / 2]).expect("room");
    Told::by(&mut offline(&world, "v.tar", "again")).fails(1, &["v.tar", "cut off"]).hints(&["copy"]);
    Told::by(&mut offline(&world, "nowhere", "again")).fails(1, &["nowhere"]);
    Told::by(&mut offline(&world, "kiln.toml", "again")).fails(1, &["no tar archive"]).hints(&[".tar"]);
}

#[test]
fn nothing_is_vendored_of_an_empty_lock_or_among_other_files() {
    let host = Host::new();
    host.run(&["lock", "vendor", "v"]).fails(2, &["nothing is locked"]).hints(&["kiln lock update"]);
    let (world, _files) = world();
    world.host.file("home/letter", "");
    world.run(&["lock", "vendor", "home"]).fails(2, &["home", "other things"]);
}

#[test]
fn what_a_killed_vendoring_left_goes_with_the_next_one() {
    let (world, _files) = world();
    world.host.file("v/blobs/sha256/.kiln.vendor.dead", "half a package");
    world.host.file("v/.kiln.vendor.dead", "half a lock");
    world.host.file(".kiln.vendor.dead", "half an archive");
    world.host.file(".kiln.lock.dead", "half a lock");
    world.run(&["lock", "vendor", "v"]).succeeds();
    world.run(&["lock", "vendor", "v.tar"]).succeeds();
    world.run(&["lock", "prune"]).succeeds();
    world.host.file("kiln.toml", "[steps.s]\nrun = \"x\"\n");
    world.run(&["lock", "prune"]).succeeds();
    for name in
        ["v/blobs/sha256/.kiln.vendor.dead", "v/.kiln.vendor.dead", ".kiln.vendor.dead", ".kiln.lock.dead"]
    {
        assert!(!world.host.path(name).exists(), "{name}");
    }
}

#[test]
fn what_of_the_store_is_damaged_and_locked_is_fetched_again_by_repair() {
    let (world, _files) = world();
    world.run(&["lock", "vendor", "v"]).succeeds();
    let digests: Vec<String> = fs::read_dir(world.host.path("v/blobs/sha256"))
        .expect("there")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    damage(&world, &digests);
    let told = world.run(&["store", "repair", "--offline"]);
    assert_eq!(told.code, Some(1), "{}", told.stderr);
    assert_eq!(told.stderr.matches("cannot be fetched again: ").count(), digests.len(), "{}", told.stderr);
    assert!(told.stderr.contains("kiln: hint: "), "{}", told.stderr);
    world.run(&["store", "verify"]).succeeds();
    damage(&world, &digests);
    let told = world.run(&["store", "repair"]);
    assert_eq!(told.succeeds().stdout.matches("was fetched again").count(), digests.len());
    world.run(&["store", "verify"]).succeeds();
}

/// Puts something else in the place of the store's blobs `digests`.
fn damage(world: &World, digests: &[String]) {
    for digest in digests {
        let path = world.host.path(&format!("store/blobs/{}/{}", &digest[..2], &digest[2..]));
        let _ = fs::remove_file(&path);
        fs::write(&path, "flipped").expect("room");
    }
}
