//! Whether there is memory for one more machine: by what machines really hold and what they are expected to grow to, of
//! all builds of the store, and not by the memory that guests were promised, of which most is never touched.
//!
//! What is free is what the host says less what running machines will still take. A step is expected to take what it took
//! the last time, or else what others took that ended, or else all that its guest may have.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::reservations::Reservations;
use crate::keeper::{Registry, State};
use crate::machine::footprint;
use crate::machine::meminfo::available_bytes;
use crate::plan::StepId;

/// What a machine takes beside its guest's memory, at most.
const OVERHEAD_BYTES: u64 = 256 << 20;
/// How much more than the last time a step is expected to take, at least; a quarter where that is more.
const MARGIN_BYTES: u64 = 64 << 20;
/// How long what was measured is believed: what is admitted meanwhile is counted on top of it.
const FRESH: Duration = Duration::from_millis(100);

/// What was measured of the host, and of machines by the process that has them.
#[derive(Debug, Default, Clone)]
struct Measured {
    available_bytes: u64,
    /// What the machines of each process hold, and what their guests may have.
    machines: BTreeMap<i32, (u64, u64)>,
}

/// The memory that this build's steps are expected to take, and whether one more may.
pub(super) struct Admission {
    run: PathBuf,
    registry: Option<Registry>,
    /// None until a first step wants to run, and where the store cannot have them: then this build looks at itself alone.
    reservations: Option<Option<Reservations>>,
    expected: BTreeMap<StepId, u64>,
    /// What is reserved: more than is expected where a step ended and the next was not looked for yet.
    reserved_bytes: u64,
    /// How much of that there was room for when it was reserved, by what was measured last.
    proven_bytes: u64,
    /// What steps that ended have taken; the most of it.
    learnt: Option<u64>,
    measured: Option<(Instant, Measured)>,
    /// Before then nothing has changed that was refused.
    refused_until: Option<Instant>,
}

/// What a step of a guest with `declared_bytes` is expected to take, where it took `own` the last time, and others `learnt`.
fn expectation(declared_bytes: u64, own: Option<u64>, learnt: Option<u64>) -> u64 {
    let most = declared_bytes.saturating_add(OVERHEAD_BYTES);
    match own.or(learnt) {
        None => most,
        Some(took) => took.saturating_add((took / 4).max(MARGIN_BYTES)).min(most),
    }
}

/// What is left for another machine, where `reserved` is what builds expect to take, each with its process. Machines of no
/// build are expected to take `typical` at most.
fn room(measured: &Measured, reserved: &[(i32, u64)], typical: u64) -> u64 {
    let mut by_process: BTreeMap<i32, u64> = BTreeMap::new();
    for (process, bytes) in reserved {
        let total = by_process.entry(*process).or_default();
        *total = total.saturating_add(*bytes);
    }
    for (process, (_, declared)) in &measured.machines {
        by_process.entry(*process).or_insert_with(|| typical.min(*declared));
    }
    let held = |process: &i32| measured.machines.get(process).map_or(0, |(held, _)| *held);
    let growth = by_process.iter().map(|(process, bytes)| bytes.saturating_sub(held(process)));
    measured.available_bytes.saturating_sub(growth.fold(0, u64::saturating_add))
}

impl Admission {
    /// For a build whose store has its running machines below `run`.
    pub fn new(run: PathBuf) -> Self {
        Self {
            run,
            registry: None,
            reservations: None,
            expected: BTreeMap::new(),
            reserved_bytes: 0,
            proven_bytes: 0,
            learnt: None,
            measured: None,
            refused_until: None,
        }
    }

    /// Whether the step `id`, whose guest may have `declared_bytes` and which took `own` the last time, may start; where no
    /// other step of this build runs, it may in any case.
    pub fn admit(&mut self, id: StepId, declared_bytes: u64, own: Option<u64>) -> bool {
        if declared_bytes == 0 {
            return true;
        }
        let now = Instant::now();
        if self.refused_until.is_some_and(|until| now < until) {
            return false;
        }
        let measured = match &self.measured {
            Some((when, measured)) if now.duration_since(*when) < FRESH => measured.clone(),
            _ => self.measure(now),
        };
        let bytes = expectation(declared_bytes, own, self.learnt);
        let taken = self.taken_bytes();
        let wanted = taken.saturating_add(bytes);
        // What a step had that has just ended nobody else could count on since.
        if wanted <= self.proven_bytes {
            self.expected.insert(id, bytes);
            return true;
        }
        let (is_first, learnt) = (self.expected.is_empty(), self.learnt);
        let fits = |others: &[(i32, u64)]| {
            let own = (rustix::process::getpid().as_raw_pid(), taken);
            let reserved: Vec<_> = others.iter().copied().chain([own]).collect();
            bytes <= room(&measured, &reserved, expectation(u64::MAX, None, learnt))
        };
        let run = &self.run;
        let reservations = self.reservations.get_or_insert_with(|| Reservations::open(run).ok());
        let mut has_room = false;
        let mut may = |others: &[(i32, u64)]| {
            has_room = fits(others);
            is_first || has_room
        };
        let admitted = match reservations {
            Some(reservations) => reservations.take(wanted, &mut may).ok(),
            None => None,
        };
        let admitted = admitted.unwrap_or_else(|| may(&[]));
        if admitted {
            self.reserved_bytes = wanted;
            self.proven_bytes = if has_room { wanted } else { 0 };
        }
        match admitted {
            true => drop(self.expected.insert(id, bytes)),
            false => self.refused_until = Some(now + FRESH),
        }
        admitted
    }

    /// The step's machine is gone; it held `held_bytes`, where that is known.
    pub fn release(&mut self, id: StepId, held_bytes: Option<u64>) {
        if self.expected.remove(&id).is_none() {
            return;
        }
        self.learnt = self.learnt.max(held_bytes);
        self.refused_until = None;
        if held_bytes.is_some() {
            // What it held is free now.
            self.measured = None;
        }
    }

    /// Gives back what is reserved beyond what is expected, before the build waits for something.
    pub fn settle(&mut self) {
        let taken = self.taken_bytes();
        if taken == self.reserved_bytes {
            return;
        }
        if let Some(Some(reservations)) = &self.reservations {
            let _ = reservations.set(taken);
        }
        self.reserved_bytes = taken;
        self.proven_bytes = self.proven_bytes.min(taken);
    }

    fn taken_bytes(&self) -> u64 {
        self.expected.values().copied().fold(0, u64::saturating_add)
    }

    fn measure(&mut self, now: Instant) -> Measured {
        let mut measured = Measured { available_bytes: available_bytes(), machines: BTreeMap::new() };
        let run = &self.run;
        let registry = match &self.registry {
            Some(registry) => Some(registry),
            None => Registry::open(run).ok().map(|registry| &*self.registry.insert(registry)),
        };
        let machines = registry.and_then(|registry| registry.machines().ok()).unwrap_or_default();
        // Of those that are kept or ready no more is expected than they hold.
        for machine in machines.iter().filter(|machine| machine.state == State::Running) {
            let of_process = measured.machines.entry(machine.pid).or_default();
            let held = footprint::held_bytes(&machine.processes).unwrap_or(0);
            *of_process =
                (of_process.0.saturating_add(held), of_process.1.saturating_add(machine.memory_bytes));
        }
        self.measured = Some((now, measured.clone()));
        self.proven_bytes = 0;
        measured
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const MIB: u64 = 1 << 20;

    #[test]
    fn a_step_is_expected_to_take_what_it_took_and_a_quarter_more() {
        assert_eq!(expectation(4 * GIB, Some(GIB), Some(3 * GIB)), GIB + GIB / 4);
        assert_eq!(expectation(4 * GIB, Some(100 * MIB), None), 164 * MIB);
        assert_eq!(expectation(4 * GIB, None, Some(200 * MIB)), 264 * MIB);
        assert_eq!(expectation(2 * GIB, None, None), 2 * GIB + OVERHEAD_BYTES);
        assert_eq!(expectation(2 * GIB, Some(9 * GIB), None), 2 * GIB + OVERHEAD_BYTES);
    }

    #[test]
    fn what_is_left_is_what_is_available_less_what_machines_will_still_take() {
        let machines = [(10, (GIB, 8 * GIB)), (20, (3 * GIB, 4 * GIB)), (30, (GIB / 2, 2 * GIB))].into();
        let measured = Measured { available_bytes: 10 * GIB, machines };
        // The first will grow by one, the second holds more than it was expected to, the third is of no build.
        assert_eq!(room(&measured, &[(10, 2 * GIB), (20, 2 * GIB)], GIB), 10 * GIB - GIB - GIB / 2);
        // Two builds of one process, one of which has no machine yet.
        assert_eq!(room(&measured, &[(10, GIB), (10, 3 * GIB), (20, 0), (30, 0)], GIB), 7 * GIB);
        assert_eq!(room(&measured, &[(40, 11 * GIB)], 0), 0);
    }

    fn admission(run: &tempfile::TempDir, available_bytes: u64) -> Admission {
        let mut admission = Admission::new(run.path().to_owned());
        let later = Instant::now() + Duration::from_secs(3600);
        admission.measured = Some((later, Measured { available_bytes, machines: BTreeMap::new() }));
        admission
    }

    #[test]
    fn steps_are_admitted_by_what_they_took_and_one_in_any_case() {
        let run = tempfile::tempdir().expect("a folder");
        let mut admission = admission(&run, GIB);
        assert!(admission.admit(StepId(0), 64 * GIB, None), "one runs whatever it needs");
        assert!(!admission.admit(StepId(1), 64 * GIB, Some(100 * MIB)));
        admission.release(StepId(0), None);
        // 164 MiB each, though the guests may have 64 GiB.
        let admitted = (1..20).filter(|id| admission.admit(StepId(*id), 64 * GIB, Some(100 * MIB))).count();
        assert_eq!(admitted, 6);
        // What needs no machine waits for none.
        assert!(admission.admit(StepId(50), 0, None));
        admission.release(StepId(3), None);
        assert!(admission.admit(StepId(60), 64 * GIB, Some(100 * MIB)));
    }

    #[test]
    fn what_steps_took_that_ended_is_expected_of_those_that_never_ran() {
        let run = tempfile::tempdir().expect("a folder");
        let mut admission = admission(&run, 3 * GIB);
        assert!(admission.admit(StepId(0), 2 * GIB, None));
        assert!(!admission.admit(StepId(1), 2 * GIB, None));
        let measured = admission.measured.clone();
        admission.release(StepId(0), Some(200 * MIB));
        admission.measured = measured;
        let admitted = (1..20).filter(|id| admission.admit(StepId(*id), 2 * GIB, None)).count();
        assert_eq!(admitted, 11);
    }

    #[test]
    fn of_two_builds_only_one_takes_the_last_memory() {
        let run = tempfile::tempdir().expect("a folder");
        let [mut one, mut other] = [admission(&run, GIB), admission(&run, GIB)];
        let own = Some(200 * MIB);
        assert!(one.admit(StepId(0), 2 * GIB, own) && other.admit(StepId(0), 2 * GIB, own));
        assert!(one.admit(StepId(1), 2 * GIB, own));
        assert!(!other.admit(StepId(1), 2 * GIB, own), "264 MiB four times are more than there are");
        drop(one);
        other.refused_until = None;
        assert!(other.admit(StepId(1), 2 * GIB, own));
    }
}
