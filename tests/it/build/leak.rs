//! Copies of the owner's private keys, committed or put out by a step: no step sees them in a source, and nothing is made of
//! them.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use kiln::engine::build::Outcome;
use kiln::sign::make;
use kiln_digest::Digest;

use super::super::host::Host;
use super::world::{World, done, settle};
use crate::acceptance::held;

fn world() -> World {
    with_keys(World::new())
}

/// The world with keys, which are elsewhere than SRCDIR.
#[expect(clippy::disallowed_methods, reason = "the certificates are made for now")]
fn with_keys(mut world: World) -> World {
    let secrets = world.path("secrets");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    make::make(&secrets, "mesh.internal", now).expect("keys");
    world.settings.secrets.value = secrets;
    world
}

fn shell(script: &str, folder: &Path) {
    let output = Command::new("sh").args(["-euc", script]).current_dir(folder).output().expect("sh");
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Whether the store has the file `path` of the world's.
fn is_kept(world: &World, path: &str) -> bool {
    world.store.blobs().path(&Digest::of(&fs::read(world.path(path)).expect("there"))).exists()
}

/// Asserts that the step `s` failed for the key `key`, and left nothing.
fn is_refused(world: &World, recipe: &str, words: &[&str]) {
    let built = world.build(recipe);
    let Outcome::Failed(error) = built.outcome("s") else { panic!("{recipe}: {:?}", built.outcome("s")) };
    let said = error.to_string();
    for word in words {
        assert!(said.contains(word), "{recipe}: no `{word}` in {said}");
    }
    assert!(error.hint().is_some_and(|hint| hint.contains("make other keys")), "{recipe}");
    assert!(!world.path("work/x").exists(), "{recipe}");
}

#[test]
fn nothing_is_made_with_a_copy_of_a_signing_key_in_it_in_whatever_form_it_is() {
    for (script, key) in [
        ("cp ../secrets/uefi-keys/db.key etc/innocent", "db.key"),
        ("sed 's/$/\\r/' ../secrets/uefi-keys/PK.key >etc/dos", "PK.key"),
        (
            "openssl pkcs8 -topk8 -nocrypt -in ../secrets/uefi-keys/KEK.key -outform DER -out etc/der",
            "KEK.key",
        ),
        ("openssl rsa -traditional -in ../secrets/uefi-keys/db.key -out etc/old", "db.key"),
        ("openssl rsa -traditional -in ../secrets/uefi-keys/db.key -outform DER -out etc/old", "db.key"),
        ("openssl ec -in ../secrets/uefi-keys/root.key -outform DER -out etc/ec", "root.key"),
        ("openssl ec -in ../secrets/uefi-keys/root.key -out etc/ec", "root.key"),
        ("(head -c 3000000 /dev/zero; cat ../secrets/uefi-keys/db.key; echo more) >etc/firmware", "db.key"),
        ("tar -cf etc/archive.tar -C ../secrets/uefi-keys .", ".key"),
        ("cp ../secrets/uefi-keys/root.key etc/id && ssh-keygen -q -p -N '' -f etc/id", "root.key"),
        ("cp ../secrets/uefi-keys/KEK.key etc/id && ssh-keygen -q -p -N '' -f etc/id", "KEK.key"),
    ] {
        let world = world();
        world.source("etc/hostname", "host");
        shell(script, &world.path("src"));
        settle(&world);
        is_refused(
            &world,
            "[steps.s]\nmake = { squashfs = 'x', from = [{ src = 'etc', at = 'etc' }] }\n",
            &["which would go into `x`", &format!("{key}` of SECRETS")],
        );
    }
    held("sqfs-content");
}

#[test]
fn no_kind_of_artifact_takes_a_key_wherever_it_comes_from() {
    let world = world();
    world.source("etc/hostname", "host");
    shell("cp ../secrets/uefi-keys/db.key etc/innocent; cat etc/innocent >>part", &world.path("src"));
    settle(&world);
    let put_out = "[steps.before]\nrun = \"copy etc/a etc/innocent\"\noutputs = [\"etc\"]\n";
    for make in [
        "{ erofs = 'x', from = [{ src = 'etc' }] }",
        "{ cpio = 'x', from = [{ src = 'etc' }], compression = 'gzip' }",
        "{ fat = 'x', from = [{ src = 'etc' }], label = 'BOOTA' }",
        "{ files = 'x', from = [{ src = 'etc' }] }",
        "{ files = 'x', from = [{ src = 'etc', join = true, at = 'all' }] }",
        "{ squashfs = 'x', from = ['etc'] }",
        "{ uki = 'x', stub = { src = 'part' }, linux = { src = 'part' }, initrd = [{ src = 'part' }], cmdline = { text = 'quiet' } }",
    ] {
        let recipe = format!("{put_out}[steps.s]\nneeds = ['before']\nmake = {make}\n");
        is_refused(&world, &recipe, &["which would go into `x", "has the key `db.key` of SECRETS in it"]);
        // The step before, which puts it out, is as it was: its result is its own.
        assert!(is_kept(&world, "src/etc/innocent"), "{make}");
    }
    // What is left out is not in it; nor is what is public, and what is somebody else's.
    shell(
        "cp ../secrets/uefi-keys/*.crt ../secrets/uefi-keys/*.auth ../secrets/uefi-keys/root.pem etc/
        openssl genrsa -out etc/host.key 2>/dev/null",
        &world.path("src"),
    );
    settle(&world);
    let good = "[steps.s]\nmake = { cpio = 'x', from = [{ src = 'etc', exclude = ['innocent'] }] }\n";
    assert_eq!(done(&world, good), ["s"]);
}

#[test]
fn the_store_keeps_no_copy_of_a_key_that_it_took_in_for_what_is_refused() {
    for (make, copies) in [
        ("{ squashfs = 'x', from = [{ src = 'etc' }] }", &["src/etc/innocent", "src/etc/more"][..]),
        ("{ files = 'x', from = [{ src = 'etc', join = true, at = 'all' }] }", &["src/etc/innocent", "all"]),
        ("{ files = 'x', from = [{ src = 'etc/more' }] }", &["src/etc/more"]),
    ] {
        let world = world();
        world.source("etc/hostname", "host");
        shell(
            "cp ../secrets/uefi-keys/db.key etc/innocent; cat etc/hostname etc/innocent >etc/more
            cat etc/hostname etc/innocent etc/more >../all",
            &world.path("src"),
        );
        settle(&world);
        let recipe = format!("[steps.s]\nmake = {make}\n");
        for _ in 0..2 {
            let built = world.build(&recipe);
            let Outcome::Failed(error) = built.outcome("s") else { panic!("{make}") };
            assert!(error.hint().is_some_and(|hint| hint.ends_with("kiln's store keeps no copy")), "{make}");
            for copy in copies {
                assert!(!is_kept(&world, copy), "{make}: {copy}");
            }
        }
        fs::remove_file(world.path("src/etc/innocent")).expect("there");
        world.source("etc/more", "no key");
        assert_eq!(done(&world, &recipe), ["s"], "{make}");
    }
}

#[test]
fn no_step_sees_a_source_in_which_a_signing_key_was_committed() {
    let host = Host::new();
    let world = with_keys(World::at(host.root()));
    fs::create_dir_all(world.path("r/deep")).expect("room");
    shell(
        "git init -q -b main; cp ../secrets/uefi-keys/root.key deep/id; head -c 2000000 /dev/zero >a; git add .
        git -c user.name=n -c user.email=e@example.org commit -q -m first; git tag v1
        git rm -q deep/id; git -c user.name=n -c user.email=e@example.org commit -q -m second; git tag v2",
        &world.path("r"),
    );
    settle(&world);
    let recipe = |rev: &str| {
        format!(
            "[sources.r]\ngit = \"file:r\"\nrev = \"{rev}\"\n[steps.s]\nrun = \"write x y\"\nsources = [\"r\"]\noutputs = [\"x\"]\n"
        )
    };
    for rev in ["v1", "v2"] {
        // Git is jailed by the program.
        host.file("kiln.toml", recipe(rev));
        host.run(&["lock", "update", "r"]).succeeds();
        match rev {
            "v1" => {
                // The commit's archive, as it was locked.
                shell("grep -rlq 'PRIVATE KEY' store/blobs", host.root());
                is_refused(&world, &recipe(rev), &["source `r` has the key `root.key` of SECRETS in it"]);
                shell("! grep -rlq 'PRIVATE KEY' store/blobs", host.root());
            }
            _ => assert_eq!(done(&world, &recipe(rev)), ["s"]),
        }
    }
    held("sign-offline");
}
