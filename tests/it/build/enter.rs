//! Steps for somebody who enters their machines: what they see, and that nothing becomes of it.

use std::fs;

use kiln::engine::Keep;
use kiln::engine::build::BuildError;

use super::world::World;

const RECIPE: &str = r#"
ignore = ["*.swp"]
[steps.a]
run = "copy a.o a.c"
outputs = ["a.o"]
[steps.b]
run = "write b.o b"
outputs = ["b.o"]
[steps.link]
needs = ["a", "b"]
inputs = ["a.o"]
run = "copy program work:a.o"
outputs = ["program"]
"#;

#[test]
fn a_step_that_is_entered_sees_what_it_would_see_and_is_not_run() {
    let world = World::new();
    world.source("a.c", "int");
    world.source(".a.c.swp", "x");
    let step = world.enter(RECIPE, &["a", "b"], "link").expect("staged");
    let view = step.view.as_ref().expect("a view");
    assert_eq!(fs::read_to_string(view.work.join("a.o")).expect("put out"), "int");
    assert!(!view.work.join("b.o").exists(), "it is not among its inputs");
    assert_eq!(view.hidden.iter().map(ToString::to_string).collect::<Vec<_>>(), [".a.c.swp"]);
    assert_eq!(step.keep, Keep::Always);
    assert_eq!(world.work("program"), None);
    let place = view.work.to_path_buf();
    drop(step);
    assert!(!place.exists(), "its view outlives it");
    // And nothing is known of it afterwards.
    assert_eq!(world.build(RECIPE).reasons["link"], "it never ran here");
}

#[test]
fn outputs_that_the_store_has_lost_are_told_and_made_again_the_next_time() {
    let world = World::new();
    world.source("a.c", "int");
    world.build(RECIPE);
    let digest = kiln_digest::Digest::of(b"int").to_string();
    fs::remove_file(world.path("store/blobs").join(&digest[..2]).join(&digest[2..])).expect("it is there");
    let enter = || world.enter(RECIPE, &["a", "b"], "link");
    assert!(matches!(enter(), Err(BuildError::Lost { step, .. }) if step == "a"));
    assert!(enter().is_ok());
}
