//! The hostile cases: guests, front ends and agents that do what nobody should, one small file each, in `cases/`.
//! README.md has the language.
//!
//! Each run is a process of its own, so a case that panics, aborts, hangs or eats memory is named and harms no other.
//! After every one holds the same oracle: no panic and no signal, time and memory within limits (`oracle`),
//! descriptors as before, canaries untouched, and a good peer served afterwards. The last line counts; a selection
//! that matches nothing is a failure.
//!
//! ```text
//! cargo test --test hostile                 all of them
//! cargo test --test hostile -- fs01 vs      those whose name has one of the words; a slow one by its whole name
//! KILN_KVM_REQUIRED=1 …                     those with a driver also by a guest's processor, `guest::`, which needs KVM
//! ```

#![allow(clippy::disallowed_methods, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "a test program says what it found")]

mod agent;
mod case;
mod changes;
mod disk;
#[path = "../folder/mod.rs"]
mod folder;
mod fs;
mod fuse;
mod host;
mod hub;
mod layout;
mod mmio;
mod oracle;
mod plain;
mod process;
mod processor;
mod rings;
mod script;
mod terminal;
#[path = "../../src/vmm/testkit.rs"]
mod testkit;
mod value;
mod vsock;
mod wire;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::fs::{Access, access};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use case::{Allowance, Case, Subject};
use rings::Driver;
use script::Target;

const CASES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/hostile/cases");
/// The first argument of a run's own process.
const ONE: &str = "--one-case";
/// Begins the name of what a guest's processor drives.
const GUEST: &str = "guest::";
/// A file system in memory, where there is one.
const MEMORY: &str = "/dev/shm";
/// After this long a run's process ends itself, and one with a guest, which may be emulated.
const HANGS: Duration = Duration::from_secs(60);
const HANGS_WITH_GUESTS: Duration = Duration::from_secs(600);
/// A process that its target ended, as `std` has it for panics.
const FAILED: u8 = 101;

/// What came of a run.
enum Verdict {
    Passed,
    Skipped(String),
    Failed(String),
}

/// One case against one subject.
struct Run {
    case: Case,
    subject: Subject,
    driver: Driver,
}

impl Run {
    fn name(&self) -> String {
        format!("{}::{}", self.against(), self.case.name)
    }

    /// What it is run against, as the run's own process is told.
    fn against(&self) -> String {
        let by = if self.driver == Driver::Guest { GUEST } else { "" };
        format!("{by}{}", self.subject.name())
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [first, subject, path] = &arguments[..]
        && first == ONE
    {
        return one(subject, Path::new(path));
    }
    if arguments.first().is_some_and(|first| first == process::DEVICES) {
        return process::serve_devices();
    }
    let has = |flag: &str| arguments.iter().any(|argument| argument == flag);
    let (runs, broken) = select(&words(&arguments), has("--exact"));
    if has("--list") {
        // As cargo-nextest wants it.
        runs.iter().filter(|_| !has("--ignored")).for_each(|run| println!("{}: test", run.name()));
        return ExitCode::SUCCESS;
    }
    if report(runs, broken) { ExitCode::SUCCESS } else { ExitCode::from(FAILED) }
}

/// The arguments that select cases. Flags are for other test programs, some of them with a value.
fn words(arguments: &[String]) -> Vec<String> {
    const WITH_VALUE: [&str; 5] = ["--test-threads", "--format", "--color", "--skip", "--logfile"];
    let mut words = Vec::new();
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        if WITH_VALUE.contains(&argument.as_str()) {
            arguments.next();
        } else if !argument.starts_with('-') {
            words.push(argument.clone());
        }
    }
    words
}

/// The runs that have one of the words in their name, and what is wrong with files that are no cases.
fn select(words: &[String], exact: bool) -> (Vec<Run>, Vec<String>) {
    let (mut runs, mut broken) = (Vec::new(), Vec::new());
    for path in files(Path::new(CASES)) {
        let parsed = std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()));
        match parsed.and_then(|text| Case::parse(&path, &text)) {
            Ok(case) => {
                for subject in case.against.clone() {
                    let guest = (processor::is_wanted() && subject.has_driver()).then_some(Driver::Guest);
                    for driver in [Driver::Process].into_iter().chain(guest) {
                        runs.push(Run { case: case.clone(), subject, driver });
                    }
                }
            }
            Err(what) => broken.push(what),
        }
    }
    let wanted = |run: &Run| {
        let name = run.name();
        words.is_empty() || words.iter().any(|word| if exact { name == *word } else { name.contains(word) })
    };
    runs.retain(wanted);
    // Slow ones are for whoever asks for them by name.
    for run in runs.iter_mut().filter(|run| !words.iter().any(|word| word.ends_with(&run.case.name))) {
        run.case.skip = run.case.skip.take().or(run.case.slow.take());
    }
    (runs, broken)
}

/// All `.case` files beneath a folder, sorted.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.extension().is_some_and(|extension| extension == "case") {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// Runs all of them, says what came of it, and whether that is good.
fn report(runs: Vec<Run>, broken: Vec<String>) -> bool {
    let started = Instant::now();
    let cases = runs.iter().map(|run| &run.case.path).collect::<std::collections::BTreeSet<_>>().len();
    let count = runs.len();
    // Runs that are still to be done, the next at the end; and what came of the others.
    let (waiting, done) = (Mutex::new(runs.into_iter().rev().collect::<Vec<_>>()), Mutex::new(Vec::new()));
    let lock = |error: std::sync::PoisonError<_>| error.into_inner();
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let next = waiting.lock().unwrap_or_else(lock).pop();
                    let Some(run) = next else { return };
                    let verdict = in_a_process(&run);
                    done.lock()
                        .unwrap_or_else(std::sync::PoisonError::into_inner)
                        .push((run.name(), verdict));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_default();
    done.sort_by(|(one, _), (other, _)| one.cmp(other));
    let (mut passed, mut failed, mut skipped) = (0, broken.len(), 0);
    for (name, verdict) in &done {
        match verdict {
            Verdict::Passed => passed += 1,
            Verdict::Skipped(why) => {
                skipped += 1;
                println!("skipped {name}: {why}");
            }
            Verdict::Failed(what) => {
                failed += 1;
                println!("FAILED  {name}: {what}");
            }
        }
    }
    broken.iter().for_each(|what| println!("FAILED  {what}"));
    println!(
        "hostile: {count} runs of {cases} cases: {passed} passed, {failed} failed, {skipped} skipped, in {:.1} s",
        started.elapsed().as_secs_f32()
    );
    if passed + failed == 0 {
        println!("hostile: no case was run");
    }
    failed == 0 && passed > 0
}

/// Runs one case in a process of its own.
fn in_a_process(run: &Run) -> Verdict {
    if let Some(why) = &run.case.skip {
        return Verdict::Skipped(why.clone());
    }
    let output = std::env::current_exe().and_then(|program| {
        let mut command = Command::new(program);
        command.arg(ONE).arg(run.against()).arg(&run.case.path);
        // Each store and each merge is synced, which takes no time in memory.
        if run.subject == Subject::Host && access(MEMORY, Access::WRITE_OK | Access::EXEC_OK).is_ok() {
            command.env("TMPDIR", MEMORY);
        }
        command.output()
    });
    match output {
        Err(error) => Verdict::Failed(format!("its process cannot be started: {error}")),
        Ok(output) if output.status.success() => Verdict::Passed,
        Ok(output) => Verdict::Failed(said(&output)),
    }
}

/// What a process that failed has said, and how it went where it did not say it itself.
fn said(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    let own = output.status.code() == Some(1) && err.is_empty();
    let status = if own { String::new() } else { format!(" ({})", output.status) };
    [format!("{out}{status}"), err].join("\n").trim_end().to_owned()
}

/// The process of one run. What does not hold is on its standard output.
fn one(subject: &str, path: &Path) -> ExitCode {
    // It ends with the process, or ends it.
    let hangs = if subject.starts_with(GUEST) { HANGS_WITH_GUESTS } else { HANGS };
    std::thread::spawn(move || {
        std::thread::park_timeout(hangs);
        println!("it hangs");
        std::process::exit(1)
    });
    match prepared(subject, path) {
        Ok(()) => ExitCode::SUCCESS,
        Err(what) => {
            println!("{what}");
            ExitCode::from(1)
        }
    }
}

fn prepared(subject: &str, path: &Path) -> Result<(), String> {
    let (driver, subject) = match subject.strip_prefix(GUEST) {
        Some(subject) => (Driver::Guest, subject),
        None => (Driver::Process, subject),
    };
    let subject = Subject::named(subject).ok_or("there is no such subject")?;
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    let case = Case::parse(path, &text)?;
    // A process that is meant to die leaves no core, and one that is meant to open many files may.
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    setrlimit(Resource::Core, none).map_err(|error| error.to_string())?;
    let files = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: files.maximum, ..files })
        .map_err(|error| error.to_string())?;
    judged(&case, subject, driver)
}

/// Runs the case and asks the oracle.
fn judged(case: &Case, subject: Subject, driver: Driver) -> Result<(), String> {
    // Descriptors are counted from here, memory once the target with its guest memory stands.
    let before = oracle::Before::now()?;
    let mut target = target(subject, driver)?;
    let started = oracle::Before::now()?;
    script::run(case, &mut *target)?;
    let allow = match driver {
        Driver::Guest => Allowance { seconds: Some(HANGS_WITH_GUESTS.as_secs()), ..case.allow },
        Driver::Process => case.allow,
    };
    started.within(allow)?;
    let after = |what: &str| format!("after the case: {what}");
    target.serve().map_err(|what| after(&what))?;
    target.untouched().map_err(|what| after(&what))?;
    drop(target);
    before.closed().map_err(|what| after(&what))
}

fn target(subject: Subject, driver: Driver) -> Result<Box<dyn Target>, String> {
    Ok(match subject {
        Subject::Fs => Box::new(fs::FsTarget::new(driver)?),
        Subject::Vsock => Box::new(vsock::VsockTarget::new(driver)?),
        Subject::Disk => Box::new(disk::DiskTarget::new(driver)?),
        Subject::Rng => Box::new(plain::PlainTarget::rng(driver)?),
        Subject::Balloon => Box::new(plain::PlainTarget::balloon(driver)?),
        Subject::Mmio => Box::new(mmio::MmioTarget::new(driver)?),
        Subject::Process => Box::new(process::ProcessTarget::new()?),
        Subject::Host => Box::new(host::HostTarget::new()?),
        Subject::Agent => Box::new(agent::AgentTarget::new()),
        Subject::Terminal => Box::new(terminal::TerminalTarget),
    })
}
