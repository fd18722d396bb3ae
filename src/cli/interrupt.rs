//! What Ctrl-C and its like do to a run: one line that says what was interrupted and what became of WORK, and an end
//! with 128 and the signal's number.
//!
//! A thread of its own waits for signals, because the run may be waiting for anything: a mirror, a disk, the
//! machine, whoever reads its output. It ends the process, and with that the machine. Only while outputs are merged
//! into WORK it lets the run go on: that is short, and what it says afterwards is then true.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::events::Line;
use super::{show, terminal};
use crate::engine::{Event, Phase};
use crate::threads;

/// Where a run is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    /// Doing something that can be left at any moment.
    Doing(String),
    /// Changing WORK.
    Merging,
    /// WORK is as the run leaves it.
    Merged,
}

struct Shared {
    // Protects the state, and with it the decision to end: who holds it decides before the run goes on.
    state: Mutex<State>,
    changed: Condvar,
    // Set by the signal's handler itself: whatever fails because of the signal fails after that.
    is_interrupted: Arc<AtomicBool>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How an interrupted run is left.
struct Manner {
    work: PathBuf,
    temporary: PathBuf,
    json: bool,
}

/// The run's side: it says where it is.
pub(super) struct Interrupts(Arc<Shared>);

impl Interrupts {
    /// Watches for signals from now on. `temporary` goes when the run is interrupted; `json`: an event is written too.
    ///
    /// # Errors
    /// What registering for signals says; there is no thread.
    pub fn watch(work: &Path, temporary: PathBuf, json: bool) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State::Doing("preparing".to_owned())),
            changed: Condvar::new(),
            is_interrupted: Arc::default(),
        });
        let heeded = heeded_signals();
        let mut signals = Signals::new(&heeded)?;
        for signal in heeded {
            signal_hook::flag::register(signal, Arc::clone(&shared.is_interrupted))?;
        }
        let manner = Manner { work: work.to_owned(), temporary, json };
        let watched = Arc::clone(&shared);
        threads::start("interrupts", move || {
            if let Some(signal) = signals.forever().next() {
                leave(&watched, signal, &manner);
            }
        })?;
        Ok(Self(shared))
    }

    /// Takes note of what happens.
    pub fn note(&self, event: &Event<'_>) {
        let next = match event {
            Event::Progress(text) => State::Doing((*text).to_owned()),
            Event::Phase(phase, _) => after(*phase),
            _ => return,
        };
        *self.0.state() = next;
        self.0.changed.notify_all();
    }

    /// Where the run has failed: returns only if that is not because it was interrupted, which the watcher says. A
    /// terminal sends its signal to the machine as well. A merge that failed is told in any case, as the watcher waits.
    pub fn settle(&self) {
        if *self.0.state() == State::Merging {
            return;
        }
        while self.0.is_interrupted.load(Ordering::SeqCst) {
            thread::park();
        }
    }
}

fn after(phase: Phase) -> State {
    let doing = match phase {
        Phase::Prepare => "booting the machine",
        Phase::Boot => "preparing the step",
        Phase::Setup => "running the command",
        Phase::Command => "collecting outputs",
        Phase::Collect => "recording what was read",
        Phase::Record => return State::Merging,
        Phase::Merge => return State::Merged,
    };
    State::Doing(doing.to_owned())
}

/// Says what was interrupted, and ends the process.
fn leave(shared: &Shared, signal: i32, manner: &Manner) -> ! {
    let state = shared.changed.wait_while(shared.state(), |state| *state == State::Merging);
    let state = state.unwrap_or_else(PoisonError::into_inner);
    let name = match signal {
        SIGINT => "SIGINT",
        SIGTERM => "SIGTERM",
        _ => "SIGHUP",
    };
    let work = manner.work.display();
    let text = match &*state {
        State::Doing(what) => format!("interrupted by {name} while {what}; WORK `{work}` is unchanged"),
        State::Merging | State::Merged => {
            format!("interrupted by {name} when the run was over; its outputs are in WORK `{work}`")
        }
    };
    let _ = fs::remove_dir_all(&manner.temporary);
    if manner.json {
        let event = Line::Error { text: &text, hint: None, again: None };
        write_now(io::stdout(), &format!("{event}\n"));
    }
    // Over the line of progress, if there is one.
    let clear = if terminal::is_drawn_on() { "\r\x1b[2K" } else { "" };
    write_now(io::stderr(), &format!("{clear}{}", show::error_line(&text)));
    // The state stays locked: the run gets no further.
    std::process::exit(128 + signal)
}

/// Writes what can be written at once. Whoever holds the stream's lock may be waiting for its reader for ever.
pub(super) fn write_now(stream: impl AsFd, text: &str) {
    let soon = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
    let mut fds = [PollFd::new(&stream, PollFlags::OUT)];
    if matches!(poll(&mut fds, Some(&soon)), Ok(1..)) {
        let _ = rustix::io::write(&stream, text.as_bytes());
    }
}

/// The signals that end a run: under nohup(1), and in the background of a script, some are not to be heeded.
pub(super) fn heeded_signals() -> Vec<i32> {
    let ignored = ignored_signals();
    [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|signal| ignored >> (signal - 1) & 1 == 0).collect()
}

/// Signals that were ignored when kiln was started, as bits.
fn ignored_signals() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
