//! How long something may take, where whoever counts may not run for a while.

use std::time::{Duration, Instant};

/// How much longer something may take. A stretch in which whoever counts did not run, because it was stopped, its machine stood
/// still or its host slept, is nobody's delay: it counts for little.
#[derive(Debug)]
pub struct Deadline {
    left: Duration,
    /// Until when time was counted.
    counted: Instant,
    patience: Duration,
}

/// The longest stretch that counts, and so the longest wait at once.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

impl Deadline {
    /// `patience` from `now`.
    #[must_use]
    pub fn after(patience: Duration, now: Instant) -> Self {
        Self { left: patience, counted: now, patience }
    }

    /// How long to wait at `now`, until which time is counted; none where it has passed.
    pub fn wait(&mut self, now: Instant) -> Option<Duration> {
        let passed = now.saturating_duration_since(self.counted).min(LONGEST_WAIT);
        (self.left, self.counted) = (self.left.saturating_sub(passed), now);
        (!self.left.is_zero()).then_some(self.left.min(LONGEST_WAIT))
    }

    /// When to count again.
    #[must_use]
    pub fn next(&self) -> Instant {
        self.counted + self.left.min(LONGEST_WAIT)
    }

    /// How long it could take in all.
    #[must_use]
    pub fn patience(&self) -> Duration {
        self.patience
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_in_which_nobody_counted_hardly_counts() {
        let start = Instant::now();
        let mut deadline = Deadline::after(LONGEST_WAIT * 3, start);
        let mut now = start;
        for left in [LONGEST_WAIT * 2, LONGEST_WAIT] {
            now += LONGEST_WAIT * 20;
            assert_eq!((deadline.wait(now), deadline.left), (Some(LONGEST_WAIT), left));
            assert_eq!(deadline.next(), now + LONGEST_WAIT);
        }
        assert_eq!(
            deadline.wait(now + LONGEST_WAIT - Duration::from_millis(1)),
            Some(Duration::from_millis(1))
        );
        assert_eq!(deadline.wait(now + LONGEST_WAIT), None);
    }
}
