//! A clock that jumps, between builds and while others build: nothing is believed that it says, but for what is young.

use std::fs;
use std::time::Duration;

use kiln::upkeep::collect::{Order, collect};
use kiln::upkeep::verify::verify;

use super::RECIPE;
use super::workload::{end_of_the_case, folder_of_the_case, in_a_process, prepare};
use super::world::World;

#[test]
#[ignore = "a case that the test of clocks runs in a process"]
fn a_case() {
    let folder = folder_of_the_case();
    let off = fs::read_to_string(folder.join("off")).expect("there").parse().expect("a number");
    kiln::clock::put_forward(off);
    let world = World::at(&folder);
    let ran = world.build(RECIPE).ran.len();
    assert!(world.build(RECIPE).ran.is_empty());
    // What was used just now stays, whatever the clock says.
    let order = Order {
        most_bytes: Some(0),
        unused: Some(Duration::from_secs(14 * 24 * 3600)),
        dry_run: false,
        own: false,
    };
    collect(&world.store, &order).expect("a store");
    assert!(world.build(RECIPE).ran.is_empty());
    assert_eq!(verify(&world.store).expect("a store").damage, []);
    fs::write(folder.join("ran"), ran.to_string()).expect("room");
    end_of_the_case();
}

#[test]
fn a_clock_that_jumps_between_builds_makes_nothing_run_and_hides_no_change() {
    const YEAR: i64 = 365 * 24 * 3600;
    let place = tempfile::tempdir().expect("a folder");
    prepare(place.path());
    let run = |off: i64| {
        fs::write(place.path().join("off"), off.to_string()).expect("room");
        let (code, said) = in_a_process("build::clock::a_case", place.path());
        assert_eq!(code, Some(0), "off by {off}: {said}");
        fs::read_to_string(place.path().join("ran")).expect("it said so")
    };
    assert_eq!(run(0), "4");
    for (number, off) in [-1, YEAR, -YEAR, 10 * YEAR, 0, -50 * YEAR].into_iter().enumerate() {
        assert_eq!(run(off), "0", "off by {off}");
        // Another content of the same length.
        fs::write(place.path().join("src/a.c"), number.to_string()).expect("room");
        assert_eq!(run(off), "3", "off by {off}");
        let program = fs::read_to_string(place.path().join("work/bin/program")).expect("an output");
        assert_eq!(program, format!("{number}b"));
    }
}
