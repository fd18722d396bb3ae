//! Tasks on their way to the workers: checks, which are many and short, and runs, which do not keep them waiting.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use kiln_digest::Digest;

use super::turns::Turns;
use crate::plan::StepId;

/// How long a thread of a build looks for what comes next before it sleeps: a processor that has nothing to do takes as long to
/// wake as a short step takes altogether.
pub(super) const AWAKE: Duration = Duration::from_micros(50);

/// What `look` finds within a time, while others may have the processor; none where that is nothing.
pub(super) fn soon<T>(most: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let began = Instant::now();
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if began.elapsed() > most {
            return None;
        }
        thread::yield_now();
    }
}

/// What a worker does.
pub(super) enum Task {
    /// Several at once: to wake a thread takes as long as to check a small step.
    Check(Vec<(StepId, Vec<(StepId, Digest)>)>),
    Run(StepId, Vec<(StepId, Digest)>, String),
}

/// A line of tasks. Who takes one wakes nobody, and who puts one in wakes one at most.
pub(super) struct Queue<T> {
    // Protects the tasks, whether no more come, and how many wait for one.
    state: Mutex<State<T>>,
    changed: Condvar,
}

struct State<T> {
    tasks: VecDeque<T>,
    is_over: bool,
    waiting: usize,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        let state = State { tasks: VecDeque::new(), is_over: false, waiting: 0 };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }
}

impl<T> Queue<T> {
    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts one in.
    pub fn push(&self, task: T) {
        let mut state = self.state();
        state.tasks.push_back(task);
        // To wake nobody is a system call too.
        if state.waiting > 0 {
            self.changed.notify_one();
        }
    }

    /// Waits for the next; none where no more come.
    pub fn pop(&self) -> Option<T> {
        if let Some(task) = soon(AWAKE, || self.state().tasks.pop_front()) {
            return Some(task);
        }
        let mut state = self.state();
        loop {
            if let Some(task) = state.tasks.pop_front() {
                return Some(task);
            }
            if state.is_over {
                return None;
            }
            state.waiting += 1;
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
        }
    }

    fn end(&self) {
        self.state().is_over = true;
        self.changed.notify_all();
    }
}

/// The queues of a build.
#[derive(Default)]
pub(super) struct Tasks {
    pub checks: Queue<Task>,
    pub runs: Queue<Task>,
}

/// No more tasks and turns come once this is dropped, however that happens.
pub(super) struct Ending<'a>(pub &'a Tasks, pub &'a Turns);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.1.end();
        self.0.checks.end();
        self.0.runs.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_is_taken_once_and_who_waits_when_they_end_goes() {
        let queue = Queue::default();
        let taken: usize = thread::scope(|scope| {
            let workers: Vec<_> =
                (0..4).map(|_| scope.spawn(|| std::iter::from_fn(|| queue.pop()).sum::<usize>())).collect();
            (1..=1000).for_each(|number| queue.push(number));
            queue.end();
            workers.into_iter().map(|worker| worker.join().expect("no panic")).sum()
        });
        assert_eq!(taken, 500_500);
    }
}
