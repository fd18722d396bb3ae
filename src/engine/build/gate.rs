//! The gate before WORK: a build that is ended from outside ends between two merges.

use std::collections::BTreeSet;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use crate::plan::StepId;

/// What lets a build be ended from outside, but not in the middle of a merge: whoever ends it waits for those.
#[derive(Debug, Clone, Default)]
pub struct Gate(Arc<(Mutex<Passing>, Condvar)>);

#[derive(Debug, Default)]
struct Passing {
    merging: BTreeSet<usize>,
    is_shut: bool,
}

impl Gate {
    /// Waits until nothing is merged, and lets nothing be merged any more.
    pub fn shut(&self) {
        let (passing, changed) = &*self.0;
        let mut passing = passing.lock().unwrap_or_else(PoisonError::into_inner);
        passing.is_shut = true;
        while !passing.merging.is_empty() {
            passing = changed.wait(passing).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets the step in that is about to merge; once the gate is shut, nobody gets further than here. Who is inside stays
    /// there. It must wait for nobody who may be kept from going on when the build is ended: it tells what it has to tell
    /// when it is outside.
    pub(super) fn enter(&self, id: StepId) {
        let mut passing = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        while passing.is_shut && !passing.merging.contains(&id.0) {
            passing = self.0.1.wait(passing).unwrap_or_else(PoisonError::into_inner);
        }
        passing.merging.insert(id.0);
    }

    /// It has merged.
    pub(super) fn leave(&self, id: StepId) {
        let mut passing = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        passing.merging.remove(&id.0);
        // Nobody waits for those inside but whoever shuts it, and to wake nobody is a system call too.
        if passing.is_shut {
            self.0.1.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn who_shuts_the_gate_waits_for_those_inside() {
        let gate = Gate::default();
        gate.enter(StepId(0));
        let inside = gate.clone();
        let shut = thread::spawn(move || inside.shut());
        // It cannot be over: somebody is inside.
        while !gate.0.0.lock().expect("no panic").is_shut {
            thread::yield_now();
        }
        assert!(!shut.is_finished());
        // Once more: it is there already.
        gate.enter(StepId(0));
        gate.leave(StepId(0));
        shut.join().expect("it ends");
    }
}
