//! Many kilns at one store: processes that build the same and different things, collect and verify, and are killed with
//! SIGKILL at random moments. None but the killed fails, nothing is ever found damaged, and in the end all is right.
//! `ci/test faults` runs it; KILN_RACE_SECONDS says for how long, KILN_RACE_BUILDERS how many build.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kiln::engine::merge;
use kiln::upkeep::collect::{Order, collect};
use kiln::upkeep::verify::verify;

use super::disk::{lot, lot_of};
use super::workload::prepare;
use super::world::World;
use super::{RECIPE, ordered};

/// How many build, where nobody says: two the same in one WORK, the others each in its own.
const BUILDERS: u64 = 5;
/// For how long, where nobody says.
const SECONDS: u64 = 15;

fn recipe(role: &str) -> String {
    match role {
        "same" | "one" => RECIPE.to_owned(),
        // Some steps are those of the others, some put out what the others do and are another's all the same.
        _ => format!(
            "{RECIPE}[steps.more]\nneeds = [\"link\"]\nrun = \"use bin/program\\nwrite more/{role} fine\"\noutputs = [\"more\"]\n"
        ),
    }
}

fn world(place: &Path, role: &str) -> World {
    World::sharing(&place.join(role), &place.join("store"))
}

/// Whether a build gives what it should of the source `text`.
fn check(world: &World, role: &str, text: &str) {
    let built = world.build(&recipe(role));
    let bad: Vec<_> = built
        .summary
        .outcomes
        .iter()
        .filter(|(_, outcome)| {
            !matches!(
                outcome,
                kiln::engine::build::Outcome::UpToDate { .. } | kiln::engine::build::Outcome::Ran { .. }
            )
        })
        .collect();
    assert!(built.summary.is_good(), "{role}: {bad:?}");
    assert_eq!(world.work("bin/program"), Some(format!("{text}b")), "{role}");
    assert_eq!(world.work("report").as_deref(), Some("fine"), "{role}");
}

#[test]
#[ignore = "one of the processes that race"]
fn a_case() {
    let case = PathBuf::from(std::env::args().next_back().expect("a folder"));
    let (place, role) =
        (case.parent().expect("a place"), case.file_name().expect("a role").to_string_lossy());
    let seed = fs::read_to_string(place.join("seed")).expect("there").parse::<u64>().expect("a number");
    let told = place.join(format!("wrong-{}", std::process::id()));
    std::panic::set_hook(Box::new(move |panic| fs::write(&told, format!("{panic}")).expect("room")));
    for number in 0.. {
        if place.join("stop").exists() {
            return;
        }
        let seed = seed + u64::from(std::process::id()) + (number << 32);
        match &*role {
            "collects" => {
                let world = world(place, &role);
                let most_bytes = [None, Some(0), Some(1 << 16)][lot_of(seed, "most", 3)];
                let order = Order { most_bytes, unused: Some(Duration::ZERO), dry_run: false, own: true };
                collect(&world.store, &order).expect("a store");
            }
            "verifies" => {
                let world = world(place, &role);
                let damage = verify(&world.store).expect("a store").damage;
                assert!(damage.is_empty(), "{damage:?}");
            }
            "same" => check(&world(place, &role), &role, "a"),
            _ => {
                let world = world(place, &role);
                let text = ["a", "A", "x"][lot_of(seed, "text", 3)];
                world.source("a.c", text);
                check(&world, &role, text);
            }
        }
    }
}

/// A process that does not outlive this.
struct Racer(Child);

impl Drop for Racer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(place: &Path, role: &str) -> Racer {
    let mut child = Command::new(std::env::current_exe().expect("this program"));
    child.args(["--exact", "--ignored", "build::racing::a_case", "--test-threads=1"]);
    Racer(child.arg(place.join(role)).stdout(Stdio::null()).spawn().expect("it starts"))
}

/// What processes do.
fn roles() -> Vec<String> {
    let others = (3..=ordered("KILN_RACE_BUILDERS", BUILDERS).max(3)).map(|number| match number {
        3 => "one".to_owned(),
        number => format!("other-{number}"),
    });
    let named = ["same", "same", "collects", "verifies"].map(str::to_owned);
    named.into_iter().chain(others).collect()
}

#[test]
#[ignore = "many processes for some seconds: `ci/test faults` runs it"]
fn kilns_that_race_and_are_killed_leave_a_store_and_works_that_are_right() {
    let place = tempfile::tempdir().expect("a folder");
    let path = fs::canonicalize(place.path()).expect("it is there");
    let seed = u64::from(std::process::id());
    fs::write(path.join("seed"), seed.to_string()).expect("room");
    let (roles, seconds) = (roles(), ordered("KILN_RACE_SECONDS", SECONDS));
    for role in &roles {
        prepare(&path.join(role));
    }
    let mut children: Vec<(&str, Racer)> =
        roles.iter().map(|role| (role.as_str(), start(&path, role))).collect();
    let (end, mut killed) = (Instant::now() + Duration::from_secs(seconds), 0);
    while Instant::now() < end {
        // Not to wait for something: so that the moment is any.
        std::thread::sleep(Duration::from_millis(5 + lot(seed, &format!("pause {killed}"), 150)));
        let number = lot_of(seed, &format!("whom {killed}"), children.len());
        let (role, child) = &mut children[number];
        if child.0.try_wait().expect("ours").is_some() {
            // It is told below why.
            break;
        }
        child.0.kill().and_then(|()| child.0.wait()).expect("ours");
        *child = start(&path, role);
        killed += 1;
    }
    fs::write(path.join("stop"), "").expect("room");
    let ended: Vec<_> = children.iter_mut().map(|(role, child)| (*role, child.0.wait())).collect();
    // Also one that was killed afterwards has said it.
    for entry in fs::read_dir(&path).expect("a folder").flatten() {
        let is_wrong = entry.file_name().to_string_lossy().starts_with("wrong-");
        assert!(!is_wrong, "seed {seed}: {}", fs::read_to_string(entry.path()).expect("text"));
    }
    for (role, ended) in ended {
        assert!(ended.expect("ours").success(), "{role} failed; seed {seed}");
    }
    for role in roles.iter().filter(|role| !["collects", "verifies"].contains(&role.as_str())) {
        let world = world(&path, role);
        merge::recover(&world.store, &path.join(role).join("work")).expect("a WORK");
        let text = if *role == "same" { "a" } else { "last" };
        world.source("a.c", text);
        check(&world, role, text);
        assert!(world.build(&recipe(role)).ran.is_empty(), "{role}");
        assert_eq!(verify(&world.store).expect("a store").damage, []);
        assert_eq!(fs::read_dir(path.join("store/tmp")).expect("a folder").count(), 1);
    }
    println!("racing: {} processes for {seconds} s, {killed} killed", roles.len());
}
