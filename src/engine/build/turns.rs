//! Turns: as many commands run at once as the build has jobs, and each begins the moment another is over. A step waits for
//! its turn with its machine set up, and gives it back when its outputs are out of the machine: what comes before and
//! after is done while the commands of others run. Steps that need no machine have a turn for all they do.
//!
//! A step that would only wait is not got ready while others begin: to read programs for the first time is most of what a
//! short command does, and it would take longer.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::plan::StepId;

/// How long a command may run at most before another step is got ready beside it.
const MOST_COURTESY: Duration = Duration::from_millis(200);
/// Who takes longer than this to get ready is waited for no more: it may be making a template, or wait for a kernel that never answers.
const MOST_PREPARATION: Duration = Duration::from_secs(3);
/// A shorter time than this is not waited for: to be woken again takes longer.
const LEAST_COURTESY: Duration = Duration::from_millis(2);

/// The turns of a build.
#[derive(Debug)]
pub(super) struct Turns {
    jobs: usize,
    // Protects who has a turn and who waits for one.
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    taken: BTreeSet<usize>,
    /// Those that are got ready for a turn, and since when.
    preparing: BTreeMap<usize, Instant>,
    /// How long that took the last time: so long a command runs before another step is got ready beside it.
    courtesy: Option<Duration>,
    /// When a turn was taken last.
    began: Option<Instant>,
    waiting: VecDeque<usize>,
    refused: BTreeSet<usize>,
    /// How many wait for a change.
    listening: usize,
    is_over: bool,
}

impl Turns {
    /// Turns for so many steps at once.
    pub fn new(jobs: usize) -> Self {
        Self { jobs: jobs.max(1), state: Mutex::default(), changed: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a change, or at most so long.
    fn wait<'a>(&self, mut state: MutexGuard<'a, State>, most: Option<Duration>) -> MutexGuard<'a, State> {
        state.listening += 1;
        let mut state = match most {
            Some(most) => self.changed.wait_timeout(state, most).unwrap_or_else(PoisonError::into_inner).0,
            None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
        };
        state.listening -= 1;
        state
    }

    /// Tells those who wait of a change: to wake nobody is a system call too.
    fn tell(&self, state: &State) {
        if state.listening > 0 {
            self.changed.notify_all();
        }
    }

    /// Waits until the step `id` may be got ready: there will be a turn for it, or all who have one have begun with it. False
    /// where no step begins any more.
    pub fn prepare(&self, id: StepId) -> bool {
        let mut state = self.state();
        while !state.is_over {
            let left = state.courtesy_left(self.jobs, Instant::now());
            state = match left {
                Some(Duration::ZERO) => break,
                left => self.wait(state, left),
            };
        }
        match state.is_over {
            true => state.refused.insert(id.0),
            false => state.preparing.insert(id.0, Instant::now()).is_none(),
        };
        !state.is_over
    }

    /// Waits for the turn of the step `id`: who waits longest is next. False where no step begins any more. Who has a turn
    /// keeps it.
    pub fn take(&self, id: StepId) -> bool {
        let mut state = self.state();
        if state.taken.contains(&id.0) {
            return true;
        }
        if let Some(since) = state.preparing.remove(&id.0) {
            state.courtesy = Some(since.elapsed().min(MOST_COURTESY));
        }
        state.waiting.push_back(id.0);
        while !state.is_over && (state.taken.len() >= self.jobs || state.waiting.front() != Some(&id.0)) {
            state = self.wait(state, None);
        }
        state.waiting.retain(|waiting| *waiting != id.0);
        let is_over = state.is_over;
        if is_over {
            state.refused.insert(id.0)
        } else {
            state.began = Some(Instant::now());
            state.taken.insert(id.0)
        };
        // Another turn may be free for who is first now.
        self.tell(&state);
        !is_over
    }

    /// Gives the step's turn to whoever waits; nothing happens where it has none.
    pub fn give_back(&self, id: StepId) {
        let mut state = self.state();
        let was_preparing = state.preparing.remove(&id.0).is_some();
        if state.taken.remove(&id.0) || was_preparing {
            self.tell(&state);
        }
    }

    /// From now on no step begins.
    pub fn end(&self) {
        self.state().is_over = true;
        self.changed.notify_all();
    }

    /// Whether the step's turn never came.
    pub fn has_refused(&self, id: StepId) -> bool {
        self.state().refused.contains(&id.0)
    }
}

impl State {
    /// How long nobody else is to be got ready; none where that is until something changes.
    fn courtesy_left(&self, jobs: usize, now: Instant) -> Option<Duration> {
        let left = |since: &Instant| MOST_PREPARATION.checked_sub(now.saturating_duration_since(*since));
        let preparing = self.preparing.values().filter_map(left).filter(|left| !left.is_zero());
        let ready = preparing.clone().count() + self.waiting.len();
        let is_short = self.courtesy.is_some_and(|courtesy| courtesy < LEAST_COURTESY);
        if is_short || self.taken.len() + ready < jobs {
            return Some(Duration::ZERO);
        }
        if self.taken.len() < jobs {
            // Those who are got ready take what turns there are, if they are in time.
            return preparing.min();
        }
        let since = self.began.map_or(Duration::MAX, |began| now.saturating_duration_since(began));
        Some(self.courtesy.unwrap_or_default().saturating_sub(since))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    /// Waits until so many wait.
    fn until_waiting(turns: &Turns, count: usize) {
        while turns.state().waiting.len() < count {
            thread::yield_now();
        }
    }

    #[test]
    fn who_waits_longest_is_next_when_a_turn_is_given_back() {
        let turns = Turns::new(2);
        assert!(turns.take(StepId(0)) && turns.take(StepId(1)) && turns.take(StepId(1)));
        let (sender, began) = channel();
        thread::scope(|scope| {
            for id in [2, 3] {
                let sender = sender.clone();
                let turns = &turns;
                scope.spawn(move || sender.send((id, turns.take(StepId(id)))));
                until_waiting(turns, id - 1);
            }
            turns.give_back(StepId(7));
            assert!(began.try_recv().is_err(), "a step that had no turn gave one");
            turns.give_back(StepId(1));
            assert_eq!(began.recv(), Ok((2, true)));
            assert_eq!(turns.state().waiting, [3]);
            turns.give_back(StepId(0));
            assert_eq!(began.recv(), Ok((3, true)));
        });
        assert_eq!(turns.state().taken, [2, 3].into());
    }

    #[test]
    fn who_would_only_wait_is_got_ready_when_those_before_have_begun_and_run_for_as_long_as_that_takes() {
        let turns = Turns::new(2);
        assert!(turns.prepare(StepId(0)) && turns.prepare(StepId(1)));
        let left = |turns: &Turns, later: Duration| {
            let state = turns.state();
            state.courtesy_left(2, state.began.unwrap_or_else(Instant::now) + later)
        };
        let most = left(&turns, Duration::ZERO).expect("no longer than that");
        assert!(!most.is_zero() && most <= MOST_PREPARATION, "two are got ready for two turns");
        assert_eq!(left(&turns, MOST_PREPARATION), Some(Duration::ZERO), "they take too long");
        assert!(turns.take(StepId(0)));
        turns.state().courtesy = None;
        assert_ne!(left(&turns, Duration::ZERO), Some(Duration::ZERO), "one of them has not begun");
        assert!(turns.take(StepId(1)));
        turns.state().courtesy = Some(Duration::from_millis(100));
        assert_eq!(left(&turns, Duration::from_millis(30)), Some(Duration::from_millis(70)));
        assert_eq!(left(&turns, Duration::from_millis(100)), Some(Duration::ZERO));
        turns.state().courtesy = Some(Duration::from_millis(1));
        assert_eq!(left(&turns, Duration::ZERO), Some(Duration::ZERO), "nobody waits for so little");
        // Who failed before its turn stands in nobody's way.
        turns.state().courtesy = Some(MOST_COURTESY);
        turns.give_back(StepId(1));
        assert!(turns.prepare(StepId(2)));
        assert_ne!(left(&turns, Duration::ZERO), Some(Duration::ZERO));
        turns.give_back(StepId(2));
        assert!(turns.prepare(StepId(3)));
    }

    #[test]
    fn who_waits_to_be_got_ready_hears_of_whoever_makes_room_and_of_the_end() {
        let one_of = |free: &dyn Fn(&Turns)| {
            let turns = Turns::new(1);
            assert!(turns.prepare(StepId(0)));
            let began = Instant::now();
            let is_prepared = thread::scope(|scope| {
                let waiting = scope.spawn(|| turns.prepare(StepId(1)));
                while turns.state().listening == 0 {
                    thread::yield_now();
                }
                free(&turns);
                waiting.join().expect("no panic")
            });
            assert!(began.elapsed() < MOST_PREPARATION, "it was not told");
            is_prepared
        };
        assert!(one_of(&|turns| turns.give_back(StepId(0))));
        assert!(one_of(&|turns| assert!(turns.take(StepId(0)))));
        assert!(!one_of(&Turns::end));
    }

    #[test]
    fn who_waits_when_the_turns_end_is_refused_and_who_has_one_keeps_it() {
        let turns = Turns::new(1);
        assert!(turns.take(StepId(0)));
        thread::scope(|scope| {
            let waiting = scope.spawn(|| turns.take(StepId(1)));
            until_waiting(&turns, 1);
            turns.end();
            assert!(!waiting.join().expect("no panic"));
        });
        assert!(turns.take(StepId(0)) && !turns.take(StepId(2)));
        assert!(
            turns.has_refused(StepId(1)) && turns.has_refused(StepId(2)) && !turns.has_refused(StepId(0))
        );
    }
}
