//! Builds of recipes without machines: which steps run, which do not, and what is left where something fails.

mod boot;
mod clock;
mod disk;
mod enter;
mod faults;
mod handles;
mod initos;
mod leak;
mod make;
mod power;
mod racing;
mod upkeep;
mod workload;
mod world;

use std::fs;
use std::panic::{self, AssertUnwindSafe};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, SystemTime};

use kiln::cache::{Index, Scope};
use kiln::engine::Event;
use kiln::engine::build::{BuildError, Gate, News, Outcome, work_name};
use world::{World, settle};

use crate::acceptance::held;

/// A number that whoever runs a test may set.
#[expect(clippy::disallowed_methods, reason = "a test takes its order from whoever runs it")]
fn ordered(name: &str, usual: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
}

/// Two objects, a program of both, and a step that reads nothing of SRCDIR.
const RECIPE: &str = r#"
[steps.a]
run = """
stat include/missing.h
read include/a.h
copy a.o a.c
"""
outputs = ["a.o"]
[steps.b]
run = """
list parts
copy b.o b.c
"""
outputs = ["b.o"]
[steps.link]
needs = ["a", "b"]
run = "copy bin/program work:a.o work:b.o"
outputs = ["bin"]
[steps.report]
needs = ["link"]
run = """
use bin/program
write report fine
"""
outputs = ["report"]
"#;

fn world() -> World {
    let world = World::new();
    for (name, text) in
        [("a.c", "a"), ("b.c", "b"), ("include/a.h", "h"), ("parts/one", "1"), ("unread", "x")]
    {
        world.source(name, text);
    }
    settle(&world);
    world
}

fn sorted(mut names: Vec<String>) -> Vec<String> {
    names.sort();
    names
}

#[test]
fn a_second_build_runs_nothing() {
    let world = world();
    let first = world.build(RECIPE);
    assert!(first.summary.is_good());
    assert_eq!(sorted(first.ran.clone()), ["a", "b", "link", "report"]);
    assert!(first.reasons.values().all(|why| why == "it never ran here"), "{:?}", first.reasons);
    assert_eq!(world.work("bin/program").as_deref(), Some("ab"));
    for _ in 0..2 {
        let again = world.build(RECIPE);
        assert!(again.ran.is_empty(), "{:?}", again.reasons);
        assert_eq!(again.summary.count(|outcome| matches!(outcome, Outcome::UpToDate { .. })), 4);
    }
    held("hermetic-step");
}

#[test]
fn what_runs_again_is_what_read_something_that_changed() {
    type Deed = fn(&World);
    let deeds: [(Deed, &[&str], &str); 11] = [
        (|w| w.source("a.c", "A"), &["a", "link", "report"], "`/ws/p/a.c` changed: content"),
        (|w| w.source("unread", "y"), &[], ""),
        (|w| w.source("a.c", "a"), &[], ""),
        (
            |w| {
                let file = fs::File::options().write(true).open(w.path("src/a.c")).expect("there");
                file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1)).expect("ours");
            },
            &[],
            "",
        ),
        (|w| w.source("include/other.h", ""), &[], ""),
        // It shadows nothing, but the step would find it now. What it puts out is the same, so nothing follows.
        (
            |w| w.source("include/missing.h", ""),
            &["a"],
            "`/ws/p/include/missing.h`, which it looked for in vain",
        ),
        (|w| w.source("include/a.h", "H"), &["a"], "`/ws/p/include/a.h` changed"),
        (|w| w.source("parts/two", ""), &["b"], "`/ws/p/parts`, which it listed"),
        (
            |w| fs::rename(w.path("src/parts/one"), w.path("src/parts/uno")).expect("there"),
            &["b"],
            "`/ws/p/parts`, which it listed",
        ),
        (
            |w| fs::remove_file(w.path("src/b.c")).expect("there"),
            &["b", "link", "report"],
            "`/ws/p/b.c` is gone",
        ),
        (
            |w| {
                // Another file of the same size and time in its place.
                let time = fs::metadata(w.path("src/a.c")).and_then(|meta| meta.modified()).expect("there");
                w.source("new", "c");
                fs::rename(w.path("src/new"), w.path("src/a.c")).expect("there");
                fs::File::open(w.path("src/a.c")).and_then(|file| file.set_modified(time)).expect("ours");
            },
            &["a", "link", "report"],
            "`/ws/p/a.c` changed: content",
        ),
    ];
    for (number, (deed, runs, why)) in deeds.into_iter().enumerate() {
        let world = world();
        world.build(RECIPE);
        deed(&world);
        let built = world.build(RECIPE);
        assert_eq!(sorted(built.ran.clone()), runs, "deed {number}: {:?}", built.reasons);
        if let Some(first) = runs.first() {
            assert!(built.reasons[*first].contains(why), "{:?}", built.reasons);
        }
        assert!(world.build(RECIPE).ran.is_empty(), "deed {number}");
    }
    held("hermetic-step");
}

#[test]
fn another_command_root_or_variable_is_another_step_and_said_so() {
    let world = world();
    let recipe = |more: &str, line: &str| {
        format!("[steps.s]\n{more}\nrun = \"copy o a.c\\n{line}\"\noutputs = [\"o\"]\n")
    };
    world.build(&recipe("env = { LEVEL = \"1\" }", ""));
    for (more, line, why) in [
        ("env = { LEVEL = \"2\" }", "", "variable LEVEL was `1` and is `2`"),
        ("", "", "variable LEVEL is gone"),
        ("", "read b.c", "the command changed: the line `read b.c` is new"),
        ("root = \"dir:x\"", "read b.c", "the root was `debian:bookworm`"),
        ("root = \"dir:x\"\nclock = \"fixed\"", "read b.c", "the clock was `host` and is `fixed`"),
        ("root = \"dir:x\"\nclock = \"fixed\"\ninputs = [\"x\"]", "read b.c", "the declared inputs"),
    ] {
        let built = world.build(&recipe(more, line));
        assert!(built.reasons["s"].contains(why), "{:?}", built.reasons);
        assert!(world.build(&recipe(more, line)).ran.is_empty());
    }
    // What it was at first is still known.
    assert!(world.build(&recipe("env = { LEVEL = \"1\" }", "")).ran.is_empty());
}

#[test]
fn going_back_to_what_was_built_before_runs_nothing() {
    let world = world();
    world.build(RECIPE);
    world.source("a.c", "other");
    assert_eq!(sorted(world.build(RECIPE).ran), ["a", "link", "report"]);
    world.source("a.c", "a");
    let back = world.build(RECIPE);
    assert!(back.ran.is_empty(), "{:?}", back.reasons);
    assert_eq!(world.work("bin/program").as_deref(), Some("ab"));
    assert_eq!(world.work("a.o").as_deref(), Some("a"));
}

#[test]
fn work_gets_back_what_it_lacks_and_keeps_what_a_person_changed() {
    let world = world();
    world.build(RECIPE);
    fs::remove_dir_all(world.path("work")).expect("there");
    let built = world.build(RECIPE);
    assert!(built.ran.is_empty() && built.summary.is_good());
    assert_eq!(world.work("bin/program").as_deref(), Some("ab"));
    fs::write(world.path("work/a.o"), "mine").expect("room");
    let built = world.build(RECIPE);
    assert!(matches!(built.outcome("a"), Outcome::Failed(error) if matches!(**error, BuildError::Merge(_))));
    assert!(matches!(built.outcome("link"), Outcome::Skipped));
    assert_eq!(world.work("a.o").as_deref(), Some("mine"));
}

#[test]
fn work_gets_back_an_empty_folder_that_is_an_output() {
    let world = world();
    world.source("tree/full/file", "x");
    fs::create_dir(world.path("src/tree/empty")).expect("room");
    let recipe = "[steps.s]\nmake = { files = 'out', from = [{ src = 'tree' }] }\n";
    world.build(recipe);
    let (empty, full) = (world.path("work/out/empty"), world.path("work/out/full"));
    assert!(empty.is_dir() && full.is_dir());
    // A person may put something into it.
    fs::write(empty.join("mine"), "x").expect("room");
    assert!(matches!(world.build(recipe).outcome("s"), Outcome::UpToDate { restored: 0, .. }));
    fs::remove_dir_all(&empty).expect("there");
    assert!(matches!(world.build(recipe).outcome("s"), Outcome::UpToDate { .. }));
    assert!(empty.is_dir() && full.is_dir());
    assert!(world.build(recipe).reasons.is_empty());
}

#[test]
fn a_step_sees_in_work_what_the_steps_it_needs_put_out_and_nothing_else() {
    let world = world();
    fs::write(world.path("work/stray"), "a person's").expect("room");
    let recipe = |inputs: &str| {
        format!(
            "[steps.a]\nrun = \"write out/a 1\\nwrite out/b 2\"\noutputs = [\"out\"]\n\
             [steps.z]\nrun = \"write z 3\"\noutputs = [\"z\"]\n\
             [steps.s]\nneeds = [\"a\"]\n{inputs}\nrun = \"copy s work:out/a work:out/b work:z work:stray\"\noutputs = [\"s\"]\n"
        )
    };
    world.build(&recipe(""));
    assert_eq!(world.work("s").as_deref(), Some("12"));
    world.build(&recipe("inputs = [\"out/b\"]"));
    assert_eq!(world.work("s").as_deref(), Some("2"));
}

#[test]
fn a_failure_stops_the_build_or_what_needs_the_step_with_keep_going() {
    let mut world = world();
    let recipe = "[steps.bad]\nrun = \"fail\"\n[steps.after]\nneeds = [\"bad\"]\nrun = \"write x 1\"\noutputs = [\"x\"]\n\
                  [steps.last]\nneeds = [\"after\"]\nrun = \"read a.c\"\n[steps.good]\nrun = \"wait\"\n\
                  [steps.next]\nneeds = [\"good\"]\nrun = \"read a.c\"\n";
    // They come after one that lasts, so that none begins before the failure because its check was quicker.
    let many: String =
        (0..40).map(|n| format!("[steps.many{n}]\nneeds = [\"good\"]\nrun = \"wait\"\n")).collect();
    let built = world.build(&format!("{recipe}{many}"));
    assert_eq!(built.summary.outcomes.len(), 45);
    assert!(built.ran.len() < 20 && built.ran.contains(&"bad".to_owned()), "{:?}", built.ran);
    assert!(["after", "last"].iter().all(|step| !built.ran.contains(&(*step).to_owned())));
    world.options.keep_going = true;
    let built = world.build(recipe);
    assert_eq!(built.ran.iter().filter(|step| *step == "bad").count(), 1);
    assert!(built.ran.contains(&"next".to_owned()));
    assert_eq!(built.reasons["bad"], "it failed the last time: it exited with status 3");
    assert!(matches!(built.outcome("last"), Outcome::Skipped) && !built.summary.is_good());
    assert_eq!(world.build(recipe).ran, ["bad"]);
}

#[test]
fn a_result_is_not_kept_where_a_file_changed_meanwhile() {
    let world = world();
    let recipe = "[steps.s]\nrun = \"copy o a.c\\nchange a.c\"\noutputs = [\"o\"]\n";
    let built = world.build(recipe);
    assert!(matches!(built.outcome("s"), Outcome::Ran { not_kept: Some(why), .. } if why.contains("a.c")));
    assert_eq!(world.work("o").as_deref(), Some("a"));
    let again = world.build(recipe);
    assert_eq!(again.ran, ["s"]);
    assert!(again.reasons["s"].contains("its last result was not kept"), "{:?}", again.reasons);
}

#[test]
fn what_one_scope_made_another_does_not_use_unless_it_reads_it() {
    let mut world = world();
    let scope = |name: &str| name.parse::<Scope>().expect("a good name");
    world.options.scope = scope("pull-request");
    world.build(RECIPE);
    world.options.scope = Scope::default();
    assert_eq!(world.build(RECIPE).ran.len(), 4);
    world.source("a.c", "reviewed");
    assert_eq!(world.build(RECIPE).ran.len(), 3);
    world.options.scope = scope("other");
    world.options.read_scopes = vec![Scope::default()];
    assert!(world.build(RECIPE).ran.is_empty());
    // It wrote nothing into the scope that it reads.
    world.source("a.c", "unreviewed");
    assert_eq!(world.build(RECIPE).ran.len(), 3);
    world.options.scope = Scope::default();
    world.options.read_scopes.clear();
    assert_eq!(world.build(RECIPE).ran.len(), 3);
    for bad in ["", "../x", "A", "a b", "-x"] {
        assert!(bad.parse::<Scope>().is_err(), "{bad}");
    }
}

#[test]
fn a_blob_that_is_damaged_or_gone_costs_a_run_and_no_more() {
    for damage in [
        |path: &std::path::Path| fs::remove_file(path).expect("there"),
        |path: &std::path::Path| {
            fs::remove_file(path).expect("there");
            fs::write(path, "flipped").expect("room");
        },
    ] {
        let world = world();
        world.build(RECIPE);
        let digest = kiln_digest::Digest::of(b"ab");
        damage(&world.store.blobs().path(&digest));
        fs::remove_file(world.path("work/bin/program")).expect("there");
        let built = world.build(RECIPE);
        assert_eq!(built.ran, ["link"], "{:?}", built.reasons);
        assert!(
            built.reasons["link"].contains("the store has lost its output `bin/program`"),
            "{:?}",
            built.reasons
        );
        assert_eq!(world.work("bin/program").as_deref(), Some("ab"));
        assert!(world.build(RECIPE).ran.is_empty());
    }
}

/// The store has lost the program. WORK is as it should be, and another step wants to see what it has.
fn program_comes_back(world: &World) {
    let recipe = format!("{RECIPE}[steps.more]\nneeds = [\"link\"]\nrun = \"use bin/program\"\n");
    let built = world.build(&recipe);
    assert!(
        matches!(built.outcome("more"), Outcome::Failed(error) if matches!(**error, BuildError::Lost { .. }))
    );
    let built = world.build(&recipe);
    assert_eq!(sorted(built.ran), ["link", "more"]);
    assert!(world.build(&recipe).ran.is_empty());
}

#[test]
fn what_a_needed_step_put_out_and_the_store_has_lost_comes_back_with_the_next_build() {
    let world = world();
    world.build(RECIPE);
    let path = world.store.blobs().path(&kiln_digest::Digest::of(b"ab"));
    fs::remove_file(&path).expect("there");
    fs::write(&path, "ax").expect("room");
    program_comes_back(&world);
}

#[test]
fn what_a_step_of_another_scope_put_out_and_the_store_has_lost_comes_back_too() {
    let mut world = world();
    world.options.scope = "nightly".parse().expect("a scope");
    world.build(RECIPE);
    world.options.scope = Scope::default();
    world.options.read_scopes = vec!["nightly".parse().expect("a scope")];
    assert!(world.build(RECIPE).ran.is_empty());
    fs::remove_file(world.store.blobs().path(&kiln_digest::Digest::of(b"ab"))).expect("there");
    program_comes_back(&world);
}

#[test]
fn a_step_whose_outputs_work_refused_need_not_run_again() {
    let world = world();
    fs::create_dir_all(world.path("work/bin")).expect("a folder");
    fs::write(world.path("work/bin/program"), "mine").expect("room");
    for ran in [vec!["a", "b", "link"], vec![]] {
        let built = world.build_targets(RECIPE, &["link"]);
        assert_eq!(sorted(built.ran.clone()), ran, "{:?}", built.reasons);
        assert!(
            matches!(built.outcome("link"), Outcome::Failed(error) if matches!(**error, BuildError::Merge(_)))
        );
        assert_eq!(world.work("bin/program").as_deref(), Some("mine"));
    }
    fs::remove_file(world.path("work/bin/program")).expect("there");
    assert!(world.build_targets(RECIPE, &["link"]).ran.is_empty());
    assert_eq!(world.work("bin/program").as_deref(), Some("ab"));
}

#[test]
fn what_another_kiln_put_in_place_of_an_output_is_not_taken_for_it() {
    let world = World::new();
    let recipe = "[steps.a]\nrun = \"write out one\\nthen out two\"\noutputs = ['out']";
    assert!(world.build(recipe).summary.is_good());
    assert_eq!(world.work("out").as_deref(), Some("two"));
    let again = world.build(recipe);
    assert!(again.ran.is_empty(), "{:?}", again.reasons);
    assert_eq!(world.work("out").as_deref(), Some("one"), "the trace says so, and WORK has to");
}

#[test]
fn the_same_work_by_another_path_is_the_same_work() {
    let mut world = world();
    assert!(world.build(RECIPE).summary.is_good());
    world.settings.work.value = world.path("src/../work");
    let again = world.build(RECIPE);
    assert!(again.ran.is_empty(), "{:?}", again.reasons);
}

#[test]
fn what_differs_in_a_size_alone_is_kept_beside_what_was_there() {
    let world = World::new();
    let recipe = "[steps.a]\nrun = \"stat x\\nwrite out same\"\noutputs = ['out']";
    for (text, runs) in [("1", true), ("long", true), ("2", false), ("more", false)] {
        world.source("x", text);
        settle(&world);
        assert_eq!(!world.build(recipe).ran.is_empty(), runs, "{text}");
    }
}

#[test]
fn of_many_results_those_stay_that_are_used() {
    let folder = tempfile::tempdir().expect("a folder");
    let recipe = "[steps.a]\nrun = 'copy out x'\noutputs = ['out']";
    let build = |text: &str| {
        // As a kiln of its own.
        let world = World::at(folder.path());
        world.source("x", text);
        settle(&world);
        world.build(recipe)
    };
    build("base");
    for number in 0..20 {
        assert!(!build(&number.to_string()).ran.is_empty());
        let again = build("base");
        assert!(again.ran.is_empty(), "after {number}: {:?}", again.reasons);
    }
    // What is told is how it differs from what was used last.
    let told = build("other").reasons.remove("a").expect("it ran");
    let was = kiln_digest::Digest::of(b"base").to_string();
    assert!(told.contains(&was[..8]), "{told}");
}

#[test]
fn a_build_whose_listener_dies_ends() {
    let (over, ends) = channel();
    thread::spawn(move || {
        let mut world = World::new();
        // The second waits for its turn, which nobody gives back.
        (world.options.jobs, world.ahead) = (1, 1);
        let first = "wait\n".repeat(15) + "say\nwait\nsay";
        let recipe = format!("[steps.a]\nrun = '''{first}'''\n[steps.b]\nrun = 'wait'");
        let died = panic::catch_unwind(AssertUnwindSafe(|| {
            world.build_through(&recipe, &Gate::default(), &mut |news| {
                assert!(!matches!(news, News::Event(..)), "nobody hears this");
            })
        }));
        over.send(died.is_err()).expect("somebody waits");
    });
    assert_eq!(ends.recv_timeout(Duration::from_secs(60)), Ok(true), "its workers wait for ever");
}

#[test]
fn a_step_that_ended_with_an_error_is_known_by_that_and_by_what_it_printed() {
    let world = world();
    let recipe = |command: &str| format!("[steps.s]\nrun = \"\"\"\n{command}\n\"\"\"\noutputs = [\"o\"]\n");
    world.build(&recipe("write o 1"));
    assert!(!world.build(&recipe("lose")).summary.is_good());
    let index = Index::new(&world.store, Scope::default(), Vec::new());
    let last = index.last_run(&work_name(&world.settings.work.value), "s").expect("a note");
    let failure = last.failure.expect("it failed");
    assert!(failure.starts_with("ended with an error: ") && failure.contains("nothing"), "{failure}");
    let log = world.store.blobs().read(&last.log.expect("a log")).expect("there");
    assert_eq!(log, b"s speaks\n");
    let built = world.build(&recipe("lose"));
    assert!(
        built.reasons["s"].contains("it failed the last time: it ended with an error"),
        "{:?}",
        built.reasons
    );
}

#[test]
fn a_build_can_be_ended_while_a_step_is_merged_and_nobody_hears_what_is_told() {
    let world = world();
    // More than may be under way at once.
    let recipe = "[steps.s]\nrun = \"\"\"\nlater 2000\n\"\"\"\n";
    let gate = Gate::default();
    let (sender, shut) = channel();
    let mut is_shut = None;
    thread::scope(|scope| {
        let ended = gate.clone();
        world.build_through(recipe, &gate, &mut |news| {
            if is_shut.is_none() && matches!(news, News::Event(_, Event::Output(..))) {
                // It is at the gate, or will be; nothing more is heard until the gate is shut.
                let (ended, sender) = (ended.clone(), sender.clone());
                thread::sleep(Duration::from_millis(300));
                scope.spawn(move || {
                    ended.shut();
                    let _ = sender.send(());
                });
                is_shut = Some(shut.recv_timeout(Duration::from_secs(20)).is_ok());
            }
        });
    });
    assert_eq!(is_shut, Some(true));
}

#[test]
fn damaged_traces_cost_runs_and_no_more() {
    let world = world();
    world.build(RECIPE);
    let pack = world.path("store/traces/trusted.pack");
    let mut bytes = fs::read(&pack).expect("a pack");
    let mut damaged = 0;
    for line in bytes.split_mut(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        line[line.len() / 2] ^= 1;
        damaged += 1;
    }
    fs::write(&pack, bytes).expect("room");
    assert_eq!(damaged, 4);
    assert_eq!(world.build(RECIPE).ran.len(), 4);
    assert!(world.build(RECIPE).ran.is_empty());
}

#[test]
fn a_dry_run_says_what_would_run_and_changes_nothing() {
    let mut world = world();
    world.build(RECIPE);
    world.source("a.c", "A");
    fs::remove_file(world.path("work/b.o")).expect("there");
    world.options.dry_run = true;
    let built = world.build(RECIPE);
    assert!(built.ran.is_empty());
    assert!(built.reasons["a"].contains("a.c") && built.reasons["link"].contains("`a`, which it needs"));
    assert!(!built.reasons.contains_key("b"), "{:?}", built.reasons);
    assert_eq!((world.work("b.o"), world.work("a.o").as_deref()), (None, Some("a")));
}

#[test]
fn no_more_steps_run_at_once_than_jobs_and_as_many_as_those() {
    let mut world = world();
    let recipe: String = (0..12).map(|n| format!("[steps.s{n}]\nrun = \"wait\"\n")).collect();
    for jobs in [1, 3] {
        world.options.jobs = jobs;
        world.options.scope = format!("jobs-{jobs}").parse().expect("a good name");
        let built = world.build(&recipe);
        assert_eq!((built.ran.len(), built.most), (12, jobs));
    }
}

#[test]
fn steps_are_got_ready_while_others_run_and_begin_when_their_turn_comes() {
    let mut world = world();
    world.options.jobs = 1;
    world.ahead = 2;
    let recipe: String = (0..12).map(|n| format!("[steps.s{n}]\nrun = \"wait\"\n")).collect();
    let built = world.build(&recipe);
    assert_eq!((built.ran.len(), built.most), (12, 1));
    // One more where its turn has come and it has not said so yet.
    assert!((2..=3).contains(&built.most_ready), "{}", built.most_ready);
}

#[test]
fn a_step_that_was_got_ready_does_not_begin_after_a_failure() {
    let mut world = world();
    world.options.jobs = 1;
    world.ahead = 2;
    // They come after two that last, and by then `a` waits for its turn or has had it.
    let rest: String =
        (0..6).map(|n| format!("[steps.s{n}]\nneeds = [\"b\", \"c\"]\nrun = \"write x 1\"\n")).collect();
    let lasting = "[steps.b]\nrun = \"wait\"\n[steps.c]\nrun = \"wait\"\n";
    let built = world.build(&format!("[steps.a]\nrun = \"wait\\nfail\"\n{lasting}{rest}"));
    assert_eq!(built.ran.last().map(String::as_str), Some("a"), "{:?}", built.ran);
    assert!(built.ran.iter().all(|step| ["a", "b", "c"].contains(&step.as_str())), "{:?}", built.ran);
    // One more where its turn has come and it has not said so yet.
    assert!((2..=3).contains(&built.most_ready), "{}", built.most_ready);
    assert_eq!(built.summary.count(|outcome| matches!(outcome, Outcome::Skipped)), 9 - built.ran.len());
    assert_eq!(built.summary.outcomes.len(), 9);
}

#[test]
fn a_target_builds_what_it_needs_and_no_more() {
    let world = world();
    let built = world.build_targets(RECIPE, &["link"]);
    assert_eq!(sorted(built.ran), ["a", "b", "link"]);
    let built = world.build_targets(&format!("{RECIPE}[targets]\nall = [\"report\"]\n"), &["all"]);
    assert_eq!(built.ran, ["report"]);
}

#[test]
fn what_is_ignored_is_no_input() {
    let world = world();
    let recipe = "ignore = [\"*.tmp\"]\n[steps.s]\nrun = \"list parts\"\n";
    world.build(recipe);
    world.source("parts/x.tmp", "");
    assert!(world.build(recipe).ran.is_empty());
    world.source("parts/x", "");
    assert_eq!(world.build(recipe).ran, ["s"]);
}
