//! What init keeps running: who is to be started when, and started again after it ended. Pure: times come in, and nothing is
//! started here.

use std::time::Duration;

/// How long a service must have run to be started again soon.
const STEADY: Duration = Duration::from_secs(10);
/// How soon that is.
const SOON: Duration = Duration::from_secs(1);
/// The longest that one is waited with that keeps ending.
const LATEST: Duration = Duration::from_secs(60);

/// A program that is to run all the time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// What it and its arguments are.
    pub command: Vec<String>,
    /// The terminal that it gets as its own; without one it gets none, and its errors go to the kernel's log.
    pub terminal: Option<String>,
}

#[derive(Debug)]
enum State {
    /// To be started at a time.
    Due(Duration),
    /// Running since a time.
    Running { pid: i32, since: Duration },
}

/// All of them.
#[derive(Debug)]
pub struct Services(Vec<(Service, State, Duration)>);

impl Services {
    /// All due at once.
    #[must_use]
    pub fn new(services: Vec<Service>) -> Self {
        Self(services.into_iter().map(|service| (service, State::Due(Duration::ZERO), SOON)).collect())
    }

    /// One that is due at `now`: its number, and what it is.
    #[must_use]
    pub fn due(&self, now: Duration) -> Option<(usize, &Service)> {
        let found = self.0.iter().enumerate().find(|(_, (_, state, _))| match state {
            State::Due(at) => *at <= now,
            State::Running { .. } => false,
        });
        found.map(|(index, (service, ..))| (index, service))
    }

    /// How long until one is due; none where all run.
    #[must_use]
    pub fn until_due(&self, now: Duration) -> Option<Duration> {
        let due = self.0.iter().filter_map(|(_, state, _)| match state {
            State::Due(at) => Some(at.saturating_sub(now)),
            State::Running { .. } => None,
        });
        due.min()
    }

    /// The service `index` was started as this process, or could not be.
    pub fn started(&mut self, index: usize, pid: Option<i32>, now: Duration) {
        let Some((_, state, delay)) = self.0.get_mut(index) else { return };
        match pid {
            Some(pid) => *state = State::Running { pid, since: now },
            None => {
                *state = State::Due(now + *delay);
                *delay = (*delay * 2).min(LATEST);
            }
        }
    }

    /// A process ended.
    pub fn ended(&mut self, ended: i32, now: Duration) {
        for (_, state, delay) in &mut self.0 {
            if let State::Running { pid, since } = state
                && *pid == ended
            {
                let was_steady = now.saturating_sub(*since) >= STEADY;
                let wait = if was_steady { SOON } else { *delay };
                *delay = if was_steady { SOON } else { (*delay * 2).min(LATEST) };
                *state = State::Due(now + wait);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: fn(u64) -> Duration = Duration::from_secs;

    fn services() -> Services {
        let service = |name: &str| Service { command: vec![name.to_owned()], terminal: None };
        Services::new(vec![service("a"), service("b")])
    }

    #[test]
    fn each_is_started_once_and_again_after_it_ended() {
        let mut all = services();
        for pid in [10, 11] {
            let (index, _) = all.due(S(0)).expect("one is due");
            all.started(index, Some(pid), S(0));
        }
        assert_eq!((all.due(S(0)), all.until_due(S(0))), (None, None));
        all.ended(99, S(20));
        assert_eq!(all.until_due(S(20)), None, "an orphan is nobody's");
        all.ended(11, S(20));
        assert_eq!((all.due(S(20)), all.until_due(S(20))), (None, Some(SOON)));
        assert_eq!(
            all.due(S(21)).map(|(index, service)| (index, service.command[0].as_str())),
            Some((1, "b"))
        );
    }

    #[test]
    fn one_that_keeps_ending_is_waited_with_longer_but_never_given_up() {
        let mut all = services();
        all.started(1, Some(1), S(0));
        let mut now = S(0);
        let mut waits = Vec::new();
        for _ in 0..9 {
            all.started(0, None, now);
            waits.push(all.until_due(now).expect("it is due").as_secs());
            now += S(waits[waits.len() - 1]);
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        all.started(0, Some(5), now);
        all.ended(5, now + S(11));
        assert_eq!(all.until_due(now + S(11)), Some(SOON), "it ran for a while");
    }
}
