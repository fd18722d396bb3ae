//! Faults: the Nth operation by which the store or WORK is changed fails, or is the last one that its process does, for
//! each N. Each case is a process of its own that builds twice, has one hit, collects and verifies; this one then looks at
//! what is left: the store opens, no build is told something wrong, WORK is whole, and a new build gives what a clean one
//! gives. `ci/test faults` runs all of them; KILN_FAULTS_SHARE=3 one in three.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use kiln::upkeep::verify::verify;
use kiln::writes::{self, Act, Watcher};
use rustix::io::Errno;

use super::ordered;
use super::workload::{self, KILLED, PANICKED};
use super::world::World;

/// What happens at an operation.
const FAULTS: [&str; 10] = [
    "killed-before",
    "killed-after",
    "ENOSPC",
    "EIO",
    "EDQUOT",
    "EMFILE",
    "EINTR",
    "short",
    "ENOSPC-lasting",
    "EIO-lasting",
];
/// Counts operations, and does what the case says at one.
struct Fault {
    at: usize,
    fault: String,
    count: AtomicUsize,
    /// Whether it was done.
    done: AtomicBool,
    // Protects what was done so far, in words.
    seen: Mutex<BTreeSet<String>>,
}

impl Fault {
    /// The process ends here, as by SIGKILL.
    fn end() -> ! {
        std::process::exit(KILLED)
    }

    /// What an operation does to what steps see, or to folders of the store.
    fn note(&self, act: &Act<'_>) {
        let (verb, path) = match *act {
            Act::Make(path) => ("made", path),
            Act::Write(path, _) => ("written", path),
            Act::Set(path) => ("set", path),
            Act::Remove(path) => ("removed", path),
            _ => return,
        };
        let names: Vec<_> = path.components().map(|name| name.as_os_str().to_string_lossy()).collect();
        let is_view = |name: &str| name.starts_with("view-");
        let what = match &names[..] {
            [.., name] if is_view(name) => "a view",
            [.., above, _] if is_view(above) => "what is in a view",
            [.., above, name] if above == "tmp" && name.starts_with("kiln-") => "a process's folder",
            [.., above, name] if above == "store" && name == "blobs" => "the store's folder of blobs",
            _ => return,
        };
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).insert(format!("{what} was {verb}"));
    }
}

impl Watcher for Fault {
    fn before(&self, act: &Act<'_>) -> io::Result<usize> {
        let number = self.count.fetch_add(1, Ordering::SeqCst);
        let is_here = number == self.at || self.fault.ends_with("-lasting") && number > self.at;
        if !is_here {
            return Ok(usize::MAX);
        }
        let is_write = matches!(act, Act::Write(..));
        let errno = match self.fault.trim_end_matches("-lasting") {
            "killed-before" => Self::end(),
            "ENOSPC" => Errno::NOSPC,
            "EIO" => Errno::IO,
            "EDQUOT" => Errno::DQUOT,
            "EMFILE" => Errno::MFILE,
            // Only what may be done again is interrupted.
            "EINTR" if is_write => Errno::INTR,
            "short" if is_write => {
                self.done.store(true, Ordering::SeqCst);
                return Ok(1);
            }
            _ => return Ok(usize::MAX),
        };
        self.done.store(true, Ordering::SeqCst);
        Err(errno.into())
    }

    fn after(&self, act: &Act<'_>) {
        self.note(act);
        if self.fault == "killed-after" && self.count.load(Ordering::SeqCst) == self.at + 1 {
            Self::end();
        }
    }
}

#[test]
#[ignore = "a case that the test of all faults runs in a process"]
fn a_case() {
    let folder = workload::folder_of_the_case();
    let case = fs::read_to_string(folder.join("case")).expect("a case");
    let (at, fault) = case.split_once(' ').expect("two words");
    let fault = Fault {
        at: at.parse().expect("a number"),
        fault: fault.to_owned(),
        count: AtomicUsize::new(0),
        done: AtomicBool::new(false),
        seen: Mutex::default(),
    };
    let fault: &'static Fault = Box::leak(Box::new(fault));
    assert!(writes::watch(Box::new(Borrowed(fault))));
    workload::run(&folder, |_| {});
    let (count, done) = (fault.count.load(Ordering::SeqCst), fault.done.load(Ordering::SeqCst));
    fs::write(folder.join("count"), format!("{count} {done}")).expect("room");
    let seen = fault.seen.lock().expect("no panic");
    fs::write(folder.join("seen"), seen.iter().cloned().collect::<Vec<_>>().join("\n")).expect("room");
    workload::end_of_the_case();
}

struct Borrowed(&'static Fault);

impl Watcher for Borrowed {
    fn before(&self, act: &Act<'_>) -> io::Result<usize> {
        self.0.before(act)
    }

    fn after(&self, act: &Act<'_>) {
        self.0.after(act);
    }
}

/// Runs a case and looks at what is left. Gives how many operations it had, and whether its fault was done.
fn case(at: usize, fault: &str) -> Result<(usize, bool), String> {
    let place = tempfile::tempdir().expect("a folder");
    let folder = place.path();
    workload::prepare(folder);
    fs::write(folder.join("case"), format!("{at} {fault}")).expect("room");
    let (code, said) = workload::in_a_process("build::faults::a_case", folder);
    match code {
        Some(0 | KILLED) => {}
        Some(PANICKED) => return Err(format!("kiln panicked: {said}")),
        _ => return Err(format!("it ended with {code:?}: {said}")),
    }
    workload::look(folder, 0, false)?;
    if code == Some(KILLED) {
        return Ok((at + 1, true));
    }
    let said = fs::read_to_string(folder.join("count")).unwrap_or_default();
    let (count, done) = said.split_once(' ').ok_or("it counted nothing")?;
    Ok((count.parse().map_err(|_| "it counted nothing")?, done == "true"))
}

#[test]
fn what_steps_are_shown_and_folders_of_the_store_go_through_the_door() {
    let place = tempfile::tempdir().expect("a folder");
    workload::prepare(place.path());
    fs::write(place.path().join("case"), format!("{} none", usize::MAX)).expect("room");
    let (code, said) = workload::in_a_process("build::faults::a_case", place.path());
    assert_eq!(code, Some(0), "{said}");
    let seen = fs::read_to_string(place.path().join("seen")).expect("a list");
    let wanted = [
        "a process's folder was made",
        "a process's folder was removed",
        "a view was made",
        "a view was removed",
        "a view was set",
        "the store's folder of blobs was made",
        "what is in a view was made",
        "what is in a view was set",
        "what is in a view was written",
    ];
    assert_eq!(seen.lines().collect::<Vec<_>>(), wanted);
}

#[test]
#[ignore = "some thousand processes: `ci/test faults` runs it"]
fn every_fault_at_every_operation_leaves_a_store_that_works() {
    let (operations, _) = case(usize::MAX, "none").expect("a clean run");
    assert!(operations > 100, "the door sees {operations} operations");
    // One in so many, and each time others.
    let share = ordered("KILN_FAULTS_SHARE", 1).max(1);
    let all = (0..operations).flat_map(|at| FAULTS.map(|fault| (at, fault)));
    let start = usize::try_from(u64::from(std::process::id()) % share).expect("small");
    let cases: Vec<(usize, &str)> = all.skip(start).step_by(usize::try_from(share).expect("small")).collect();
    let skipped = AtomicUsize::new(0);
    let next = AtomicUsize::new(0);
    let wrong = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((at, fault)) = cases.get(next.fetch_add(1, Ordering::SeqCst)) {
                    let what = match case(*at, fault) {
                        Ok((_, true)) => continue,
                        // No write is there, or the operation fails by itself, as it does in a clean run.
                        Ok((_, false)) if matches!(*fault, "EINTR" | "short" | "killed-after") => {
                            skipped.fetch_add(1, Ordering::SeqCst);
                            continue;
                        }
                        // Who does fewer operations than a clean run has not been tried there.
                        Ok((_, false)) => "nothing was done".to_owned(),
                        Err(what) => what,
                    };
                    let mut wrong = wrong.lock().unwrap_or_else(PoisonError::into_inner);
                    wrong.push(format!("{fault} at operation {at}: {what}"));
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap_or_else(PoisonError::into_inner);
    let (skipped, failed) = (skipped.into_inner(), wrong.len());
    let run = cases.len() - skipped;
    let passed = run - failed;
    println!(
        "faults: {operations} operations, {run} cases run (one in {share}), {passed} passed, {skipped} skipped (not a write)"
    );
    assert!(run as u64 * share > 8 * operations as u64, "few cases ran");
    assert!(wrong.is_empty(), "{failed} of {run}: {:#?}", &wrong[..wrong.len().min(40)]);
}

#[test]
#[ignore = "with the faults: `ci/test faults` runs it"]
fn a_flip_in_each_of_a_thousand_blobs_is_found() {
    const BLOBS: usize = 1000;
    let world = World::new();
    let blobs = world.store.blobs();
    for number in 0..BLOBS {
        let (digest, length) = blobs.put(format!("{number:064}").as_bytes()).expect("room");
        let path = blobs.path(&digest);
        let mut bytes = fs::read(&path).expect("a blob");
        bytes[number % usize::try_from(length).expect("short")] ^= 1 << (number % 8);
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o644)).expect("mine");
        fs::write(&path, bytes).expect("room");
    }
    let found = verify(&world.store).expect("a store").damage.len();
    println!("faults: {found} of {BLOBS} flips found");
    assert_eq!(found, BLOBS);
}
