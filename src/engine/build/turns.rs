//! Turns: as many commands run at once as the build has jobs, and each begins the moment another is over. A step waits for
//! its turn with its machine set up, and gives it back when its outputs are out of the machine: what comes before and
//! after is done while the commands of others run. Steps that need no machine have a turn for all they do.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::plan::StepId;

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
    waiting: VecDeque<usize>,
    refused: BTreeSet<usize>,
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

    /// Waits for the turn of the step `id`: who waits longest is next. False where no step begins any more. Who has a turn
    /// keeps it.
    pub fn take(&self, id: StepId) -> bool {
        let mut state = self.state();
        if state.taken.contains(&id.0) {
            return true;
        }
        state.waiting.push_back(id.0);
        while !state.is_over && (state.taken.len() >= self.jobs || state.waiting.front() != Some(&id.0)) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.waiting.retain(|waiting| *waiting != id.0);
        let is_over = state.is_over;
        if is_over {
            state.refused.insert(id.0)
        } else {
            state.taken.insert(id.0)
        };
        // Another turn may be free for who is first now.
        self.changed.notify_all();
        !is_over
    }

    /// Gives the step's turn to whoever waits; nothing happens where it has none.
    pub fn give_back(&self, id: StepId) {
        if self.state().taken.remove(&id.0) {
            self.changed.notify_all();
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
