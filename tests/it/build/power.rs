//! Power failures: a process is cut at an operation that a seed decides, and its folder is what a disk may hold then; half of
//! them are cut again in what comes next. What is left works, no trace names what is lost, and what was said to be done is
//! done. `ci/test faults` runs it; KILN_POWER_SEEDS says how many seeds, and from which one on: `10000` or `500+3000`.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use kiln::writes::{self, Act, Watcher};

use super::disk::{Power, lot, lot_of};
use super::workload::{self, KILLED, PANICKED};

/// How many seeds are tried where nobody says.
const SEEDS: u64 = 1000;

struct Borrowed(&'static Power);

impl Watcher for Borrowed {
    fn before(&self, act: &Act<'_>) -> std::io::Result<usize> {
        self.0.before(act)
    }

    fn after(&self, act: &Act<'_>) {
        self.0.after(act);
    }
}

#[test]
#[ignore = "a case that the test of power failures runs in a process"]
fn a_case() {
    let place = workload::folder_of_the_case();
    let (top, morgue) = (place.join("top"), place.join("morgue"));
    let case = fs::read_to_string(place.join("case")).expect("a case");
    let (at, seed) = case.split_once(' ').expect("two words");
    let seed = seed.parse().expect("a number");
    fs::create_dir(&morgue).expect("a folder");
    let power = Power::new(at.parse().expect("a number"), seed, &top, &morgue, || std::process::exit(KILLED));
    let power: &'static Power = Box::leak(Box::new(power));
    assert!(writes::watch(Box::new(Borrowed(power))));
    workload::run(&top, |builds| fs::write(place.join("done"), builds.to_string()).expect("room"));
    fs::write(place.join("count"), power.count().to_string()).expect("room");
    workload::end_of_the_case();
}

/// Cuts the workload in `place` before operation `at`; whether it came to that.
fn cut(place: &Path, at: usize, seed: u64) -> Result<bool, String> {
    fs::write(place.join("case"), format!("{at} {seed}")).expect("room");
    match workload::in_a_process("build::power::a_case", place) {
        (Some(0), _) => Ok(false),
        (Some(KILLED), _) => Ok(true),
        (Some(PANICKED), said) => Err(format!("kiln panicked: {said}")),
        (other, said) => Err(format!("the process ended with {other:?}: {said}")),
    }
}

fn number(place: &Path, name: &str) -> usize {
    fs::read_to_string(place.join(name)).ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// Runs a case of so many operations. Gives how often the power failed.
fn case(operations: usize, seed: u64) -> Result<usize, String> {
    let place = tempfile::tempdir().expect("a folder");
    let place = fs::canonicalize(place.path()).map(|path| (place, path)).expect("it is there");
    let top = place.1.join("top");
    fs::create_dir(&top).expect("a folder");
    workload::prepare(&top);
    let at = lot_of(seed, "at", operations);
    let mut failures = usize::from(cut(&place.1, at, seed)?);
    let mut done = number(&place.1, "done");
    if lot(seed, "again", 2) == 0 {
        let at = lot_of(seed, "again at", operations / 2);
        failures += usize::from(cut(&place.1, at, seed ^ 1 << 40)?);
        done = done.max(number(&place.1, "done"));
    }
    workload::look(&top, done, true).map(|()| failures)
}

/// Which seeds: how many, and the first.
#[expect(clippy::disallowed_methods, reason = "a test takes its order from whoever runs it")]
fn seeds() -> (u64, u64) {
    let said = std::env::var("KILN_POWER_SEEDS").unwrap_or_default();
    let (count, first) = said.split_once('+').unwrap_or((&said, "0"));
    (count.parse().unwrap_or(SEEDS), first.parse().unwrap_or(0))
}

#[test]
#[ignore = "hundreds of processes: `ci/test faults` runs it"]
fn after_a_power_failure_the_store_and_work_are_old_or_new_and_a_build_goes_on() {
    let (count, first) = seeds();
    let operations = {
        let place = tempfile::tempdir().expect("a folder");
        let path = fs::canonicalize(place.path()).expect("it is there");
        fs::create_dir(path.join("top")).expect("a folder");
        workload::prepare(&path.join("top"));
        assert_eq!(cut(&path, usize::MAX, 0), Ok(false));
        number(&path, "count")
    };
    assert!(operations > 100, "the door sees {operations} operations");
    let (next, failures) = (Mutex::new(first..first + count), AtomicUsize::new(0));
    let wrong = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let seed = next.lock().unwrap_or_else(PoisonError::into_inner).next();
                    let Some(seed) = seed else { return };
                    match case(operations, seed) {
                        Ok(count) => drop(failures.fetch_add(count, Ordering::SeqCst)),
                        Err(what) => wrong
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .push(format!("KILN_POWER_SEEDS=1+{seed}: {what}")),
                    }
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap_or_else(PoisonError::into_inner);
    let failures = failures.into_inner();
    println!(
        "power: {operations} operations, {count} seeds from {first} on, {failures} power failures in what passed, {} failed",
        wrong.len()
    );
    assert!(wrong.is_empty(), "{} of {count}: {:#?}", wrong.len(), &wrong[..wrong.len().min(40)]);
}
