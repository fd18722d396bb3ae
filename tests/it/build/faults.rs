//! Faults: the Nth operation by which the store or WORK is changed fails, or is the last one that its process does, for
//! each N. Each case is a process of its own that builds twice, has one hit, collects and verifies; this one then looks at
//! what is left: the store opens, no build is told something wrong, WORK is whole, and a new build gives what a clean one
//! gives. `ci/test faults` runs it.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use kiln::upkeep::collect::{Order, collect};
use kiln::upkeep::verify::{repair, verify};
use kiln::writes::{self, Act, Watcher};
use kiln_digest::Digest;
use rustix::io::Errno;

use super::RECIPE;
use super::world::World;

/// What happens at an operation.
const FAULTS: [&str; 11] = [
    "killed-before",
    "killed-after",
    "power",
    "ENOSPC",
    "EIO",
    "EDQUOT",
    "EMFILE",
    "EINTR",
    "short",
    "ENOSPC-lasting",
    "EIO-lasting",
];
/// How a case says that kiln itself panicked, and that it was killed as asked.
const PANICKED: i32 = 77;
const KILLED: i32 = 78;

/// Counts operations, and does what the case says at one.
struct Fault {
    at: usize,
    fault: String,
    count: AtomicUsize,
    // Protects the files that were written and not synced.
    dirty: Mutex<BTreeSet<PathBuf>>,
    /// Whether it was done.
    done: AtomicBool,
}

impl Fault {
    /// The process ends here, as by SIGKILL; with `power`, what was not synced is lost in part.
    fn end(&self) -> ! {
        if self.fault == "power" {
            for path in &*self.dirty.lock().unwrap_or_else(PoisonError::into_inner) {
                let lot = Digest::of(format!("{} {}", self.at, path.display()).as_bytes()).as_bytes()[0] % 3;
                let Ok(length) = fs::metadata(path).map(|meta| meta.len()) else { continue };
                let _ = fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o644));
                if let Ok(file) = OpenOptions::new().write(true).open(path) {
                    let _ = file.set_len([0, length / 2, length][usize::from(lot)]);
                }
            }
        }
        std::process::exit(KILLED)
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
            "killed-before" => self.end(),
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
        let mut dirty = self.dirty.lock().unwrap_or_else(PoisonError::into_inner);
        match *act {
            Act::Write(path, _) => drop(dirty.insert(path.to_owned())),
            Act::Sync(path) | Act::Remove(path) => drop(dirty.remove(path)),
            Act::SyncAll(_) => dirty.clear(),
            Act::Rename(from, to) => {
                dirty.remove(to);
                if dirty.remove(from) {
                    dirty.insert(to.to_owned());
                }
            }
            Act::Make(_) | Act::Date => {}
        }
        drop(dirty);
        let is_last = matches!(self.fault.as_str(), "killed-after" | "power");
        if is_last && self.count.load(Ordering::SeqCst) == self.at + 1 {
            self.end();
        }
    }
}

/// Builds, is changed, builds, has a hit, collects and verifies; an error in one keeps no later one from being tried.
fn workload(folder: &Path) {
    let attempt = |act: &dyn Fn(&World)| {
        let _ = catch_unwind(AssertUnwindSafe(|| {
            let mut world = World::at(folder);
            world.options.jobs = 1;
            act(&world);
        }));
    };
    attempt(&|world| drop(world.build(RECIPE)));
    attempt(&|world| {
        world.source("a.c", "A");
        drop(world.build(RECIPE));
    });
    attempt(&|world| drop(world.build(RECIPE)));
    let order = Order { most_bytes: None, unused: Some(Duration::ZERO), dry_run: false, own: true };
    attempt(&|world| drop(collect(&world.store, &order)));
    attempt(&|world| drop(verify(&world.store)));
}

#[test]
#[ignore = "a case that the test of all faults runs in a process"]
fn a_case() {
    let folder = PathBuf::from(std::env::args().next_back().expect("a folder"));
    let case = fs::read_to_string(folder.join("case")).expect("a case");
    let (at, fault) = case.split_once(' ').expect("two words");
    static KILN_PANICKED: AtomicBool = AtomicBool::new(false);
    std::panic::set_hook(Box::new(|panic| {
        if panic.location().is_some_and(|place| place.file().starts_with("src/")) {
            KILN_PANICKED.store(true, Ordering::SeqCst);
        }
    }));
    let fault = Fault {
        at: at.parse().expect("a number"),
        fault: fault.to_owned(),
        count: AtomicUsize::new(0),
        dirty: Mutex::default(),
        done: AtomicBool::new(false),
    };
    let fault: &'static Fault = Box::leak(Box::new(fault));
    assert!(writes::watch(Box::new(Borrowed(fault))));
    workload(&folder);
    let (count, done) = (fault.count.load(Ordering::SeqCst), fault.done.load(Ordering::SeqCst));
    fs::write(folder.join("count"), format!("{count} {done}")).expect("room");
    std::process::exit(if KILN_PANICKED.load(Ordering::SeqCst) { PANICKED } else { 0 });
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
    for (name, text) in [("a.c", "a"), ("b.c", "b"), ("include/a.h", "h"), ("parts/one", "1")] {
        let path = folder.join("src").join(name);
        fs::create_dir_all(path.parent().expect("below it")).expect("a folder");
        fs::write(path, text).expect("room");
    }
    fs::write(folder.join("case"), format!("{at} {fault}")).expect("room");
    let mut child = Command::new(std::env::current_exe().expect("this program"));
    // The last argument is one more name that no test has.
    child.args(["--exact", "--ignored", "build::faults::a_case", "--test-threads=1"]).arg(folder);
    let status = child.stdout(Stdio::null()).stderr(Stdio::null()).status().expect("it starts");
    match status.code() {
        Some(0 | KILLED) => {}
        Some(PANICKED) => return Err("kiln panicked".to_owned()),
        _ => return Err(format!("it ended with {status}")),
    }
    let whole = ["a", "A", "b", "ab", "Ab", "fine"];
    for path in kiln::cache::stock::files(&folder.join("work")).expect("WORK") {
        let text = fs::read_to_string(&path).expect("text");
        if !path.components().any(|part| part.as_os_str() == ".kiln-staging")
            && !whole.contains(&text.as_str())
        {
            return Err(format!("{} is `{text}`", path.display()));
        }
    }
    let look = || {
        let world = World::at(folder);
        let damage = verify(&world.store).expect("a store").damage;
        if fault != "power" && !damage.is_empty() {
            return Err(format!("damaged: {damage:?}"));
        }
        world.source("a.c", "A");
        let first = world.build(RECIPE);
        // What a power failure took may be found when it is needed; the step that made it runs the next time.
        let built = if fault == "power" && !first.summary.is_good() { world.build(RECIPE) } else { first };
        if !built.summary.is_good() {
            return Err(format!("the next build fails: {:?}", built.summary.outcomes));
        }
        for (name, wanted) in [("a.o", "A"), ("b.o", "b"), ("bin/program", "Ab"), ("report", "fine")] {
            if world.work(name).as_deref() != Some(wanted) {
                return Err(format!("{name} is {:?}", world.work(name)));
            }
        }
        if !world.build(RECIPE).ran.is_empty() {
            return Err("a build with nothing to do does something".to_owned());
        }
        let damage = verify(&world.store).expect("a store").damage;
        if repair(&world.store, &damage).is_err() || !verify(&world.store).expect("a store").damage.is_empty()
        {
            return Err("it cannot be repaired".to_owned());
        }
        let left = fs::read_dir(folder.join("store/tmp")).expect("a folder").count();
        if left != 1 || folder.join("work/.kiln-staging").exists() {
            return Err(format!("{left} folders of unfinished files are left"));
        }
        Ok(())
    };
    match catch_unwind(AssertUnwindSafe(look)) {
        Ok(looked) => looked?,
        Err(_) => return Err("looking at it panicked".to_owned()),
    }
    if status.code() == Some(KILLED) {
        return Ok((at + 1, true));
    }
    let said = fs::read_to_string(folder.join("count")).unwrap_or_default();
    let (count, done) = said.split_once(' ').ok_or("it counted nothing")?;
    Ok((count.parse().map_err(|_| "it counted nothing")?, done == "true"))
}

#[test]
#[ignore = "some thousand processes: `ci/test faults` runs it"]
fn every_fault_at_every_operation_leaves_a_store_that_works() {
    let (operations, _) = case(usize::MAX, "none").expect("a clean run");
    assert!(operations > 100, "the door sees {operations} operations");
    let cases: Vec<(usize, &str)> = (0..operations).flat_map(|at| FAULTS.map(|fault| (at, fault))).collect();
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
                        Ok((_, false)) if matches!(*fault, "EINTR" | "short" | "killed-after" | "power") => {
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
        "faults: {operations} operations, {run} cases run, {passed} passed, {skipped} skipped (not a write)"
    );
    assert!(run > 8 * operations, "few cases ran");
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
