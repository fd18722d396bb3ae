//! Where the time of a build went, in the trace event format that Perfetto and Chrome's viewer open.
//!
//! Steps are one process of the trace and checks another; a lane is a thread of it. A step takes the lowest lane that is free
//! for as long as it runs, and its phases lie within it, one after the other. A check is told when it is over, and goes into the
//! lowest lane where nothing was at the time. Times are whole microseconds since the build began.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::json;

use super::Outcome;
use crate::engine::event::Phase;

/// The trace's processes: their number and name.
const STEPS: (u32, &str) = (1, "steps");
const CHECKS: (u32, &str) = (2, "checks");

/// What happened when. A copy is the same timeline: whoever ends a build from outside writes what there is of it.
#[derive(Debug, Clone)]
pub struct Timeline {
    began: Instant,
    // Protects what is noted: held to note one thing, or to write all.
    noted: Arc<Mutex<Noted>>,
}

#[derive(Debug, Default)]
struct Noted {
    spans: Vec<Span>,
    lanes: Vec<Lane>,
    /// When the last check of each lane was over.
    checks: Vec<u64>,
}

/// A lane of steps.
#[derive(Debug, Default)]
struct Lane {
    /// The step that runs, and since when.
    runs: Option<(Arc<str>, u64)>,
    /// When the last that lies in it was over.
    last: u64,
}

#[derive(Debug, Clone)]
struct Span {
    what: What,
    /// The step that it is of.
    step: Arc<str>,
    lane: usize,
    start: u64,
    end: u64,
}

/// What a span is of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    /// All of it, and how it ended.
    Step(&'static str),
    Phase(Phase),
    Check,
}

impl Default for Timeline {
    fn default() -> Self {
        Self { began: Instant::now(), noted: Arc::default() }
    }
}

impl Timeline {
    fn noted(&self) -> MutexGuard<'_, Noted> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn at(&self, moment: Instant) -> u64 {
        microseconds(moment.saturating_duration_since(self.began))
    }

    /// A step begins to run: in the lane that is given.
    pub(super) fn begin(&self, step: &str) -> usize {
        let now = self.at(Instant::now());
        let mut noted = self.noted();
        let free = noted.lanes.iter().position(|lane| lane.runs.is_none());
        let number = free.unwrap_or(noted.lanes.len());
        if free.is_none() {
            noted.lanes.push(Lane::default());
        }
        let lane = &mut noted.lanes[number];
        let start = now.max(lane.last);
        *lane = Lane { runs: Some((step.into(), start)), last: start };
        number
    }

    /// A phase of the step in `lane` was over at the moment `ended` and took `length`.
    pub(super) fn phase(&self, lane: usize, phase: Phase, length: Duration, ended: Instant) {
        let end = self.at(ended);
        let mut noted = self.noted();
        let Some(Lane { runs: Some((step, _)), last }) = noted.lanes.get_mut(lane) else { return };
        // Each clock of its own: what is before ends where this begins.
        let end = end.max(*last);
        let start = end.saturating_sub(microseconds(length)).max(*last);
        *last = end;
        let span = Span { what: What::Phase(phase), step: Arc::clone(step), lane, start, end };
        noted.spans.push(span);
    }

    /// The step in `lane` is over.
    pub(super) fn end(&self, lane: usize, outcome: &Outcome) {
        let now = self.at(Instant::now());
        let mut noted = self.noted();
        let Some(found) = noted.lanes.get_mut(lane) else { return };
        let end = now.max(found.last);
        found.last = end;
        if let Some((step, start)) = found.runs.take() {
            noted.spans.push(Span { what: What::Step(outcome.name()), step, lane, start, end });
        }
    }

    /// It was found out now whether a step has to run, which took `length`.
    pub(super) fn check(&self, step: &str, length: Duration) {
        let end = self.at(Instant::now());
        let start = end.saturating_sub(microseconds(length));
        let mut noted = self.noted();
        let free = noted.checks.iter().position(|last| *last <= start);
        let lane = free.unwrap_or(noted.checks.len());
        if free.is_none() {
            noted.checks.push(0);
        }
        noted.checks[lane] = end;
        noted.spans.push(Span { what: What::Check, step: step.into(), lane, start, end });
    }

    /// How long ago the build began.
    pub(super) fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// Writes the file: what was noted until now. Steps that run end there.
    ///
    /// # Errors
    /// What `out` fails with.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let now = self.at(Instant::now());
        let (mut spans, steps, checks) = {
            let noted = self.noted();
            let mut spans = noted.spans.clone();
            spans.extend(noted.lanes.iter().enumerate().filter_map(|(number, lane)| {
                let (step, start) = lane.runs.clone()?;
                let what = What::Step("unfinished");
                Some(Span { what, step, lane: number, start, end: now.max(lane.last) })
            }));
            (spans, noted.lanes.len(), noted.checks.len())
        };
        // What holds others comes before them.
        spans.sort_by_key(|span| {
            (span.start, std::cmp::Reverse(span.end), matches!(span.what, What::Phase(_)))
        });
        let named = |what: &str, process: u32, lane: usize, name: String| json!({"name": what, "ph": "M", "pid": process, "tid": lane, "args": {"name": name}});
        let mut events = Vec::new();
        for ((process, name), lanes) in [(STEPS, steps), (CHECKS, checks)] {
            if lanes > 0 {
                events.push(named("process_name", process, 0, name.to_owned()));
            }
            events.extend(
                (0..lanes).map(|lane| named("thread_name", process, lane, format!("lane {}", lane + 1))),
            );
        }
        let spans = spans.into_iter().map(|span| {
            let Span { what, step, lane, start, end } = span;
            let (process, category, name, arguments) = match what {
                What::Step(outcome) => (STEPS.0, "step", &*step, json!({"outcome": outcome})),
                What::Phase(phase) => (STEPS.0, "phase", phase.name(), json!({"step": &*step})),
                What::Check => (CHECKS.0, "check", &*step, json!({})),
            };
            json!({
                "name": name, "cat": category, "ph": "X", "pid": process, "tid": lane,
                "ts": start, "dur": end - start, "args": arguments,
            })
        });
        out.write_all(b"{\"displayTimeUnit\":\"ms\",\"traceEvents\":[")?;
        for (number, event) in events.into_iter().chain(spans).enumerate() {
            out.write_all(if number == 0 { b"\n" } else { b",\n" })?;
            serde_json::to_writer(&mut *out, &event)?;
        }
        out.write_all(b"\n]}\n")
    }
}

fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[path = "../../../tests/judge/timeline.rs"]
mod judge;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::judge::{self, Span};
    use super::*;

    fn read(timeline: &Timeline) -> Vec<Span> {
        let mut text = Vec::new();
        timeline.write(&mut text).expect("memory");
        judge::timeline(std::str::from_utf8(&text).expect("text"))
    }

    #[test]
    fn a_step_holds_its_phases_and_is_there_before_it_is_over() {
        let timeline = Timeline::default();
        let lane = timeline.begin("a");
        // Longer than the build has gone on, as by another clock.
        timeline.phase(lane, Phase::Prepare, Duration::from_secs(9), Instant::now());
        timeline.phase(lane, Phase::Command, Duration::from_secs(9), Instant::now());
        let other = timeline.begin("b");
        assert_ne!(lane, other);
        timeline.end(lane, &Outcome::Skipped);
        assert_eq!(timeline.begin("c"), lane);
        let spans = read(&timeline);
        let of = |name: &str| spans.iter().find(|span| span.name == name).expect(name);
        assert_eq!((of("a").depth, of("prepare").depth, of("command").depth), (0, 1, 1));
        assert_eq!(of("command").arguments["step"], "a");
        assert!(of("prepare").end <= of("command").start && of("a").end <= of("c").start);
        assert_eq!(of("a").arguments["outcome"], "skipped");
        assert_eq!(of("b").arguments["outcome"], "unfinished");
    }

    #[test]
    fn a_timeline_of_nothing_is_one() {
        assert!(read(&Timeline::default()).is_empty());
    }

    /// Something that is noted.
    #[derive(Debug, Clone)]
    enum Deed {
        Begin,
        Phase(usize, u64),
        End(usize),
        Check(u64),
    }

    fn deed() -> impl Strategy<Value = Deed> {
        prop_oneof![
            Just(Deed::Begin),
            (0..4_usize, 0..2000_u64).prop_map(|(lane, length)| Deed::Phase(lane, length)),
            (0..4_usize).prop_map(Deed::End),
            (0..2000_u64).prop_map(Deed::Check),
        ]
    }

    proptest! {
        #[test]
        fn whatever_is_noted_a_timeline_is_in_order(deeds in proptest::collection::vec(deed(), 0..60)) {
            let timeline = Timeline::default();
            let (mut steps, mut checks) = (0, 0);
            for deed in deeds {
                match deed {
                    Deed::Begin => {
                        timeline.begin("step");
                        steps += 1;
                    }
                    Deed::Phase(lane, length) => {
                        timeline.phase(lane, Phase::Command, Duration::from_micros(length), Instant::now());
                    }
                    Deed::End(lane) => timeline.end(lane, &Outcome::WouldRun),
                    Deed::Check(length) => {
                        timeline.check("checked", Duration::from_micros(length));
                        checks += 1;
                    }
                }
            }
            let spans = read(&timeline);
            let count = |name: &str| spans.iter().filter(|span| span.name == name).count();
            prop_assert_eq!((count("step"), count("checked")), (steps, checks));
        }
    }
}
