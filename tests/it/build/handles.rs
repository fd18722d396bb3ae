//! Outputs that somebody still has a way to: an open descriptor, another name, a link. What the store has and what the steps
//! that need them see is what was put out; WORK says where it differs.

use std::fs::{self, File, OpenOptions};
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{MetadataExt as _, symlink};

use kiln::engine::build::{BuildError, Outcome};
use kiln::upkeep::verify::verify;

use super::{RECIPE, world};

fn write(file: &mut File, text: &str) {
    file.seek(SeekFrom::Start(0)).and_then(|_| file.write_all(text.as_bytes())).expect("room");
}

#[test]
fn who_keeps_a_descriptor_or_another_name_of_an_output_changes_neither_the_store_nor_later_outputs() {
    let world = world();
    world.build(RECIPE);
    let output = world.path("work/a.o");
    let mut held = OpenOptions::new().write(true).open(&output).expect("it is there");
    fs::hard_link(&output, world.path("other name")).expect("one more name");
    // Never the blob itself.
    let blob = world.store.blobs().path(&kiln_digest::Digest::of(b"a"));
    assert_ne!(fs::metadata(&blob).expect("there").ino(), fs::metadata(&output).expect("there").ino());
    assert_eq!(fs::metadata(&blob).expect("there").nlink(), 1);
    // The next output is another file, which neither reaches.
    world.source("a.c", "A");
    world.build(RECIPE);
    write(&mut held, "mine");
    fs::write(world.path("other name"), "mine too").expect("room");
    assert_eq!(world.work("a.o").as_deref(), Some("A"));
    assert_eq!(world.work("bin/program").as_deref(), Some("Ab"));
    // Back to what was there before: from the store, not from what was written to.
    world.source("a.c", "a");
    assert!(world.build(RECIPE).ran.is_empty());
    assert_eq!(world.work("a.o").as_deref(), Some("a"));
    assert_eq!(verify(&world.store).expect("a store").damage, []);
}

#[test]
fn an_output_that_was_written_to_through_a_descriptor_or_replaced_is_a_persons_and_no_step_sees_it() {
    type Tamper = fn(&std::path::Path);
    let tampers: [Tamper; 4] = [
        |output| write(&mut OpenOptions::new().write(true).open(output).expect("there"), "X"),
        |output| {
            let other = output.with_extension("new");
            fs::write(&other, "X").and_then(|()| fs::rename(&other, output)).expect("room");
        },
        |output| {
            fs::remove_file(output).expect("there");
            symlink("/etc/hostname", output).expect("a link");
        },
        |output| {
            fs::remove_file(output).expect("there");
            fs::hard_link(output.with_file_name("b.o"), output).expect("one more name");
        },
    ];
    for tamper in tampers {
        let world = world();
        world.build(RECIPE);
        tamper(&world.path("work/a.o"));
        let recipe = format!(
            "{RECIPE}[steps.more]\nneeds = [\"link\"]\nrun = \"copy more work:bin/program\"\noutputs = [\"more\"]\n"
        );
        let built = world.build(&recipe);
        assert!(
            matches!(built.outcome("a"), Outcome::Failed(error) if matches!(**error, BuildError::Merge(_)))
        );
        // What needs another step alone goes on with what that put out.
        assert_eq!(fs::read(world.store.blobs().path(&kiln_digest::Digest::of(b"a"))).expect("there"), b"a");
        assert_eq!(verify(&world.store).expect("a store").damage, []);
        // A person's word, and it is as it was.
        let mut world = world;
        world.options.overwrite = true;
        assert!(world.build(&recipe).summary.is_good());
        assert_eq!((world.work("a.o").as_deref(), world.work("b.o").as_deref()), (Some("a"), Some("b")));
        assert_eq!(world.work("more").as_deref(), Some("ab"));
    }
}
