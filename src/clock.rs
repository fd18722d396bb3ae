//! The host's clock: the only place that reads it. What is a function of its inputs must not come here.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How far the clock is put forward, or back.
static OFF_SECONDS: AtomicI64 = AtomicI64::new(0);

/// Puts this process's clock so many seconds forward, or back: for tests of clocks that jump.
pub fn put_forward(seconds: i64) {
    OFF_SECONDS.store(seconds, Ordering::Relaxed);
}

/// The time of day.
#[expect(clippy::disallowed_methods, reason = "the one door to the clock")]
pub fn now() -> SystemTime {
    let off = OFF_SECONDS.load(Ordering::Relaxed);
    let by = Duration::from_secs(off.unsigned_abs());
    let now = SystemTime::now();
    let there = if off < 0 { now.checked_sub(by) } else { now.checked_add(by) };
    there.unwrap_or(now)
}

/// The time of day, nanoseconds since 1970.
pub fn now_nanos() -> i64 {
    let since = now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// The time of day, for judging dates and signatures.
pub fn timestamp() -> jiff::Timestamp {
    jiff::Timestamp::try_from(now()).unwrap_or_default()
}
