//! Steps that boot what others put out: what is booted and changed before, what is left of it, and when it is booted again.
//! The player's guest prints the lines of the file `says` of its image.

use kiln::engine::build::{BuildError, Outcome};

use super::world::{World, done, settle};

const RECIPE: &str = r#"
[steps.image]
run = "copy esp/says says"
outputs = ["esp"]
[steps.good]
needs = ["image"]
boot = { image = "esp", expect = "reject panic\nexpect hello", report = "reports/good" }
[steps.flipped]
needs = ["image"]
boot = { image = "esp", change = [{ file = "says", flip = 0 }], script = "boot.txt" }
[steps.edited]
needs = ["image"]
boot = { image = "esp", change = [{ file = "s*s", text = "panic\n" }], expect = "expect panic" }
"#;

fn world() -> World {
    let world = World::new();
    world.source("says", "hello\n");
    world.source("boot.txt", "reject hello\nexpect iello\n");
    settle(&world);
    world
}

#[test]
fn what_was_booted_is_booted_again_only_when_something_of_it_changed() {
    let world = world();
    assert_eq!(done(&world, RECIPE), ["edited", "flipped", "good", "image"]);
    let report = world.work("reports/good/junit.xml").expect("a report");
    assert!(report.contains("name=\"good\" tests=\"2\" failures=\"0\""), "{report}");
    assert_eq!(done(&world, RECIPE), Vec::<String>::new());
    world.source("boot.txt", "reject hello\nexpect iell\n");
    let built = world.build(RECIPE);
    assert_eq!(built.reasons.keys().collect::<Vec<_>>(), ["flipped"]);
    // As `kiln why` says it: which of the statements.
    assert_eq!(built.reasons["flipped"], "what is expected changed: `expect iell` was `expect iello`");
    let other = RECIPE.replace("expect hello", "expect hell");
    assert_eq!(done(&world, &other), ["good"]);
    let other = other.replace("{ image = \"esp\", expect", "{ image = \"esp\", bus = \"nvme\", expect");
    assert_eq!(done(&world, &other), ["good"]);
    // The report is an output, and is put back as one.
    std::fs::remove_dir_all(world.path("work/reports")).expect("it was there");
    assert_eq!(done(&world, &other), Vec::<String>::new());
    assert!(world.work("reports/good/junit.xml").is_some());
    world.source("says", "hello again\n");
    assert_eq!(done(&world, &other), ["edited", "flipped", "good", "image"]);
}

#[test]
fn a_boot_that_is_not_as_expected_fails_and_leaves_its_report() {
    let world = world();
    let built = world.build_targets(&RECIPE.replace("expect hello", "expect goodbye"), &["good"]);
    assert!(matches!(built.outcome("good"), Outcome::CommandFailed(_)), "{:?}", built.summary.outcomes);
    let report = world.work("reports/good/junit.xml").expect("a report");
    assert!(report.contains("failures=\"1\"") && report.contains("expect goodbye"), "{report}");
    // It is not kept.
    let again = world.build_targets(&RECIPE.replace("expect hello", "expect goodbye"), &["good"]);
    assert!(again.reasons["good"].contains("failed the last time"), "{:?}", again.reasons);
    assert_eq!(world.build_targets(RECIPE, &["good"]).summary.count(Outcome::is_good), 2);
    let report = world.work("reports/good/junit.xml").expect("a report");
    assert!(report.contains("failures=\"0\""), "{report}");
}

#[test]
fn the_report_of_a_boot_that_fails_after_one_that_did_not_is_kilns_own_too() {
    let world = world();
    let failing = RECIPE.replace("expect hello", "expect goodbye");
    for _ in 0..2 {
        assert_eq!(world.build_targets(RECIPE, &["good"]).summary.count(Outcome::is_good), 2);
        let built = world.build_targets(&failing, &["good"]);
        assert!(matches!(built.outcome("good"), Outcome::CommandFailed(_)), "{:?}", built.summary.outcomes);
    }
}

#[test]
fn what_cannot_be_booted_or_changed_is_named() {
    let world = world();
    for (boot, words, hint) in [
        ("image = 'nothing', expect = 'reboot'", "there is no `nothing`", None),
        ("image = 'esp', expect = 'reboot', change = [{ file = 'x', flip = 0 }]", "there is no `x`", None),
        ("image = 'esp', expect = 'reboot', change = [{ file = 'says', flip = 6 }]", "cannot change", None),
        (
            "image = 'esp', expect = 'reboot', change = [{ file = 'says', sign = 'none' }]",
            "cannot change",
            None,
        ),
        ("image = 'esp', script = 'nothing.txt'", "there is no file `nothing.txt`", None),
        ("image = 'esp', script = 'says'", "says line 1, column 1: `hello` is no statement", None),
        (
            "image = 'esp', expect = 'reboot', secure-boot = 'keys', keys = 'KEYS'",
            "there are no keys in `KEYS`",
            Some("kiln sign --init"),
        ),
    ] {
        let recipe = format!(
            "[steps.image]\nrun = 'copy esp/says says'\noutputs = ['esp']\n\
             [steps.x]\nneeds = ['image']\nboot = {{ {boot} }}\n"
        );
        let built = world.build(&recipe);
        let Outcome::Failed(error) = built.outcome("x") else { panic!("{boot}") };
        assert!(matches!(**error, BuildError::Boot(_)) && error.to_string().contains(words), "{error}");
        let given = error.hint();
        assert_eq!(given.is_some(), hint.is_some(), "{given:?}");
        assert!(hint.is_none_or(|hint| given.is_some_and(|given| given.contains(hint))));
    }
}

#[test]
fn what_is_booted_is_judged_by_the_script_that_its_key_names() {
    let mut world = world();
    world.options.jobs = 1;
    world.source("asked", "reject iello\nexpect hello\n");
    settle(&world);
    let waits = "wait\\n".repeat(10);
    let recipe = format!(
        "[steps.image]\nrun = \"copy esp/says says\"\noutputs = [\"esp\"]\n\
         [steps.a]\nneeds = [\"image\"]\nrun = \"{waits}change asked\"\n\
         [steps.b]\nneeds = [\"image\"]\nboot = {{ image = \"esp\", script = \"asked\" }}\n"
    );
    // What stands in the file when it is booted is no script.
    let built = world.build(&recipe);
    assert!(
        matches!(built.outcome("b"), Outcome::Ran { not_kept: None, .. }),
        "{:?}",
        built.summary.outcomes
    );
    let built = world.build(&recipe);
    assert!(matches!(built.outcome("b"), Outcome::Failed(_)), "{:?}", built.summary.outcomes);
    world.source("asked", "reject iello\nexpect hello\n");
    assert!(matches!(world.build(&recipe).outcome("b"), Outcome::UpToDate { .. }));
}

#[test]
fn a_boot_is_not_kept_where_the_key_for_ssh_changed_meanwhile() {
    let world = world();
    world.source("key", "first");
    let recipe = "[steps.image]\nrun = \"copy esp/says says\"\noutputs = [\"esp\"]\n\
         [steps.b]\nneeds = [\"image\"]\nboot = { image = \"esp\", expect = \"expect hello\\nssh second\", ssh-key = \"key\" }\n";
    let built = world.build(recipe);
    let Outcome::Ran { not_kept: Some(why), .. } = built.outcome("b") else {
        panic!("{:?}", built.outcome("b"))
    };
    assert!(why.ends_with("src/key` was modified while the step ran"), "{why}");
    assert!(matches!(world.build(recipe).outcome("b"), Outcome::Ran { not_kept: None, .. }));
    world.source("key", "first");
    assert!(matches!(world.build(recipe).outcome("b"), Outcome::Ran { .. }));
}

#[test]
fn what_the_store_has_lost_of_what_is_booted_comes_back_with_the_next_build() {
    let world = world();
    world.source("PK.auth", "a key");
    let first = "[steps.image]\nrun = \"copy esp/says says\\ncopy keys/PK.auth PK.auth\"\noutputs = [\"esp\", \"keys\"]\n";
    assert_eq!(done(&world, first), ["image"]);
    for (text, boot) in [
        ("hello\n", "image = \"esp\""),
        ("hello\n", "image = \"esp/says\""),
        ("a key", "image = \"esp\", secure-boot = \"keys\", keys = \"keys\""),
    ] {
        let path = world.store.blobs().path(&kiln_digest::Digest::of(text.as_bytes()));
        std::fs::remove_file(&path).expect("there");
        std::fs::write(&path, "jello\n").expect("room");
        let recipe =
            format!("{first}[steps.b]\nneeds = [\"image\"]\nboot = {{ {boot}, expect = \"reboot\" }}\n");
        let built = world.build(&recipe);
        let Outcome::Failed(error) = built.outcome("b") else { panic!("{boot}: {:?}", built.outcome("b")) };
        assert!(error.to_string().contains("which step `image` put out"), "{boot}: {error}");
        assert_eq!(world.build(&recipe).ran, ["image"], "{boot}");
    }
}
