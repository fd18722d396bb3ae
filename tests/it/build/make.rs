//! Steps that make artifacts on the host: what goes in, what comes out, and when they are made again.

use std::fs;

use kiln::engine::build::Outcome;
use kiln_artifact::image::Limits;
use kiln_artifact::squashfs;
use kiln_artifact::tree::{Kind, TreePath};
use kiln_artifact::verity;
use kiln_digest::Digest;
use rustix::process::{DumpableBehavior, Resource};

use super::world::{World, done, settle};

const RECIPE: &str = r#"
[steps.kernels]
run = """
copy modules/6.1/a.ko a.ko
copy modules/6.12/a.ko a.ko
write unread text
"""
outputs = ["modules", "unread"]
[steps.images]
needs = ["kernels"]
make = [
    { squashfs = "boot/modules-*.sqfs", from = ["modules/*"], compression = "zstd:3" },
    { verity = "boot/modules-*.sqfs.verity", from = ["boot/modules-*.sqfs"], hash = "boot/hash.modules-*" },
    { files = "boot", from = [{ text = "%{*}\n", at = "version-*" }], each = { work = "modules/*" } },
]
[steps.initrd]
make = { cpio = "boot/initrd", from = [
    { src = "etc", at = "etc", exclude = ["secret"] },
    { src = "parts", only = ["*.bin"], join = true, at = "joined" },
    { src = "lacks", optional = true },
    { text = "hello", at = "motd", mode = "600" },
], compression = "gzip" }
[steps.fat]
needs = ["initrd"]
make = [{ fat = "esp.img", from = [{ work = "boot/initrd", at = "EFI/BOOT/initrd" }], label = "BOOTA" }]
"#;

fn world() -> World {
    let world = World::new();
    for (name, text) in [
        ("a.ko", "module"),
        ("etc/passwd", "root"),
        ("etc/secret", "key"),
        ("parts/2.bin", "two"),
        ("parts/1.bin", "one"),
        ("parts/note", "not taken"),
    ] {
        world.source(name, text);
    }
    settle(&world);
    world
}

#[test]
fn artifacts_are_made_of_outputs_sources_and_texts_and_only_when_these_change() {
    let world = world();
    assert_eq!(done(&world, RECIPE), ["fat", "images", "initrd", "kernels"]);
    for version in ["6.1", "6.12"] {
        let path = world.path(&format!("work/boot/modules-{version}.sqfs"));
        let image = fs::File::open(&path).expect("made");
        let tree = squashfs::read(&image, &Limits::default()).expect("an image").tree;
        let module = tree.get(&TreePath::new(b"a.ko").expect("a path")).expect("in it");
        assert_eq!(module.kind, Kind::File { digest: Digest::of(b"module"), size: 6 });
        let root = world.work(&format!("boot/hash.modules-{version}")).expect("made");
        let hashes = fs::File::open(path.with_extension("sqfs.verity")).expect("made");
        verity::verify(&image, &hashes, &root.parse().expect("a digest")).expect("the tree is the image's");
        assert_eq!(world.work(&format!("boot/version-{version}")), Some(format!("{version}\n")));
    }
    let archive = fs::File::open(world.path("work/boot/initrd")).expect("made");
    let mut archive_bytes = Vec::new();
    std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(archive), &mut archive_bytes).expect("gzip");
    let text = String::from_utf8_lossy(&archive_bytes);
    for there in ["etc/passwd", "onetwo", "motd", "hello"] {
        assert!(text.contains(there), "{there}");
    }
    for absent in ["secret", "not taken"] {
        assert!(!text.contains(absent), "{absent}");
    }
    assert_eq!(done(&world, RECIPE), Vec::<String>::new());

    // What nothing takes makes nothing anew; what is taken, all that follows from it.
    world.source("parts/note", "changed");
    world.source("etc/secret", "changed");
    assert_eq!(done(&world, RECIPE), Vec::<String>::new());
    world.source("etc/passwd", "other");
    assert_eq!(done(&world, RECIPE), ["fat", "initrd"]);
    fs::remove_file(world.path("work/boot/hash.modules-6.1")).expect("it was there");
    assert_eq!(done(&world, RECIPE), Vec::<String>::new());
    assert!(world.work("boot/hash.modules-6.1").is_some(), "it is put back");
}

#[test]
fn what_was_made_and_work_refused_need_not_be_made_again() {
    let world = world();
    fs::create_dir_all(world.path("work/boot")).expect("a folder");
    fs::write(world.path("work/boot/initrd"), "mine").expect("room");
    let first = world.build_targets(RECIPE, &["initrd"]);
    assert!(matches!(first.outcome("initrd"), Outcome::Failed(_)) && !first.reasons.is_empty());
    fs::remove_file(world.path("work/boot/initrd")).expect("it is there");
    let again = world.build_targets(RECIPE, &["initrd"]);
    assert!(again.summary.is_good() && again.reasons.is_empty(), "{:?}", again.reasons);
    assert!(world.path("work/boot/initrd").exists());
}

#[test]
fn two_worlds_make_the_same_bytes() {
    let (one, other) = (world(), world());
    done(&one, RECIPE);
    done(&other, RECIPE);
    for name in ["boot/modules-6.1.sqfs", "boot/modules-6.12.sqfs.verity", "boot/initrd", "esp.img"] {
        let bytes = |world: &World| fs::read(world.path("work").join(name)).expect("made");
        assert!(bytes(&one) == bytes(&other), "{name}");
    }
}

#[test]
fn what_cannot_be_made_is_named_and_leaves_work_as_it_was() {
    let world = world();
    for name in ["odd/a:b", "case/readme", "case/README"] {
        world.source(name, "x");
    }
    for (make, words) in [
        ("{ squashfs = 'x.sqfs', from = ['nothing'] }", "there is no `nothing` in WORK"),
        ("{ squashfs = 'x-*.sqfs', from = ['none/*'] }", "nothing matches `none/*`"),
        ("{ cpio = 'x', from = [{ src = 'etc', exclude = ['**'] }] }", "nothing goes into `x`"),
        ("{ cpio = 'x', from = [{ src = '../../etc/passwd2' }] }", "is no path below it"),
        // Names that FAT cannot hold, and two that are one to it.
        ("{ fat = 'x', from = [{ src = 'odd' }], label = 'BOOTA' }", "`x` cannot be made"),
        ("{ fat = 'x', from = [{ src = 'case' }], label = 'BOOTA' }", "`x` cannot be made"),
        ("{ verity = 'x', from = [{ src = 'etc' }] }", "not one regular file"),
        ("{ verity = 'x', from = [{ src = 'a.ko' }] }", "cannot get a hash tree"),
        (
            "{ uki = 'x', stub = { src = 'a.ko' }, linux = { src = 'a.ko' }, initrd = [{ src = 'a.ko' }], \
             cmdline = { text = 'quiet' } }",
            "the unified kernel image cannot be made",
        ),
    ] {
        let recipe = format!("[steps.s]\nmake = [{{ files = 'y', from = [{{ src = 'etc' }}] }}, {make}]\n");
        let said = match kiln::plan::recipe::Recipe::parse(&recipe, "kiln.toml")
            .and_then(|parsed| kiln::plan::Plan::of(&parsed, &recipe, "kiln.toml"))
        {
            Err(fault) => fault.to_string(),
            Ok(_) => match world.build(&recipe).outcome("s") {
                Outcome::Failed(error) => error.to_string(),
                other => panic!("{make}: {other:?}"),
            },
        };
        assert!(said.contains(words), "{make}: {said}");
        assert!(!world.path("work/y").exists(), "{make}");
    }
}

#[test]
fn a_link_in_the_sources_does_not_lead_out_of_them() {
    let world = world();
    fs::write(world.path("outside"), "secret").expect("room");
    std::os::unix::fs::symlink("../outside", world.path("src/link")).expect("room");
    std::os::unix::fs::symlink("..", world.path("src/up")).expect("room");
    for source in ["link", "up/outside", "up"] {
        let recipe = format!("[steps.s]\nmake = {{ cpio = 'x', from = [{{ src = '{source}' }}] }}\n");
        let built = world.build(&recipe);
        assert!(matches!(built.outcome("s"), Outcome::Failed(_)), "{source}");
    }
}

/// Whether the store has a blob of this content.
fn has_blob(world: &World, content: &str) -> bool {
    world.store.blobs().contains(&Digest::of(content.as_bytes()))
}

#[test]
fn secrets_in_a_source_are_never_read_whatever_is_made_of_it() {
    let mut world = world();
    world.source("recovery/etc/hostname", "host");
    world.source("recovery/keys/db.key", "a private key");
    world.source("recovery/keys/sub/note", "beside it");
    world.source("beside/etc/hostname", "host");
    std::os::unix::fs::symlink("recovery/keys", world.path("src/innocent")).expect("room");
    settle(&world);
    world.settings.secrets.value = world.path("src/recovery/keys");
    for make in [
        "{ squashfs = 'x', from = [{ src = 'recovery' }] }",
        "{ erofs = 'x', from = [{ src = 'recovery/keys' }] }",
        "{ cpio = 'x', from = [{ src = 'recovery', exclude = ['keys'] }] }",
        "{ fat = 'x', from = [{ src = 'recovery/keys/sub', at = 'sub' }] }",
        "{ files = 'x', from = [{ src = 'recovery/keys/db.key' }] }",
        "{ files = 'x-*', from = [{ src = 'recovery/*' }] }",
        "{ cpio = 'x', from = [{ src = 'recovery', optional = true }], optional = true }",
    ] {
        let built = world.build(&format!("[steps.s]\nmake = {make}\n"));
        let Outcome::Failed(error) = built.outcome("s") else { panic!("{make}: {:?}", built.outcome("s")) };
        let said = error.to_string();
        for word in ["source `", "contains SECRETS", "recovery/keys`) or lies in it"] {
            assert!(said.contains(word), "{make}: no `{word}` in {said}");
        }
        assert!(error.hint().is_some_and(|hint| hint.contains("set SECRETS")), "{make}");
        assert!(!has_blob(&world, "a private key") && !has_blob(&world, "beside it"), "{make}");
    }
    // Keys elsewhere in SRCDIR are nothing to a folder beside them.
    let beside = "[steps.s]\nmake = { cpio = 'x', from = [{ src = 'beside' }] }\n";
    assert_eq!(done(&world, beside), ["s"]);
}

#[test]
fn what_is_made_waits_for_its_turn_as_commands_do() {
    let mut world = world();
    world.options.jobs = 1;
    world.ahead = 2;
    let lasting = "wait\\n".repeat(20);
    let recipe = format!(
        "[steps.a]\nrun = \"wait\"\n[steps.b]\nrun = \"{lasting}fail\"\n\
         [steps.m]\nneeds = [\"a\"]\nmake = {{ cpio = 'c', from = [{{ text = 'x', at = 'y' }}] }}\n"
    );
    let built = world.build(&recipe);
    // Its turn comes when the other has failed, and nothing begins any more.
    assert!(matches!(built.outcome("m"), Outcome::Skipped), "{:?}", built.summary.outcomes);
}

#[test]
fn what_is_made_is_of_the_sources_that_its_key_names_whatever_becomes_of_them_meanwhile() {
    let mut world = world();
    world.options.jobs = 1;
    let waits = "wait\\n".repeat(10);
    let recipe = format!(
        "[steps.a]\nrun = \"{waits}change etc/passwd\"\n\
         [steps.m]\nmake = {{ files = 'm', from = [{{ src = 'etc', exclude = ['secret'] }}] }}\n"
    );
    // It waits for its turn while a file changes.
    world.build(&recipe);
    assert_eq!(world.work("m/passwd").as_deref(), Some("root"));
    assert!(world.build(&recipe).reasons.contains_key("m"));
    assert_eq!(world.work("m/passwd").as_deref(), Some("changed meanwhile"));
    world.source("etc/passwd", "root");
    assert!(matches!(world.build(&recipe).outcome("m"), Outcome::UpToDate { .. }));
    assert_eq!(world.work("m/passwd").as_deref(), Some("root"));
}

#[test]
fn what_is_made_of_a_damaged_or_lost_output_waits_for_the_next_build_which_has_it_anew() {
    let disk = "d".repeat(4096);
    for make in [
        "{ squashfs = 'x', from = ['disk'] }",
        "{ erofs = 'x', from = ['disk'] }",
        "{ cpio = 'x', from = ['disk'] }",
        "{ fat = 'x', from = ['disk'], label = 'BOOTA' }",
        "{ verity = 'x', from = ['disk'] }",
        "{ files = 'x', from = [{ work = 'd*', join = true, at = 'y' }] }",
    ] {
        for damaged in [None, Some("e".repeat(4096))] {
            let world = world();
            world.source("disk", &disk);
            let first = "[steps.a]\nrun = \"copy disk disk\"\noutputs = [\"disk\"]\n";
            assert_eq!(done(&world, first), ["a"]);
            let path = world.store.blobs().path(&Digest::of(disk.as_bytes()));
            fs::remove_file(&path).expect("there");
            if let Some(text) = damaged {
                fs::write(&path, text).expect("room");
            }
            let recipe = format!("{first}[steps.m]\nneeds = [\"a\"]\nmake = {make}\n");
            let built = world.build(&recipe);
            let Outcome::Failed(error) = built.outcome("m") else {
                panic!("{make}: {:?}", built.outcome("m"))
            };
            let said = error.to_string();
            assert!(said.contains("the store has lost `disk`, which step `a` put out"), "{make}: {said}");
            assert_eq!(done(&world, &recipe), ["a", "m"], "{make}");
            assert!(world.build(&recipe).reasons.is_empty());
        }
    }
}

#[test]
fn a_build_that_signs_leaves_no_core_and_nobody_looks_into_it() {
    let world = World::new();
    let built = world.build("[steps.s]\nsign = true\n");
    // That there is nothing to sign shows after that.
    assert!(matches!(built.outcome("s"), Outcome::Failed(_)), "{:?}", built.outcome("s"));
    assert_eq!(rustix::process::getrlimit(Resource::Core).current, Some(0));
    let dumpable = rustix::process::dumpable_behavior().expect("Linux says so");
    assert_eq!(dumpable, DumpableBehavior::NotDumpable);
}
