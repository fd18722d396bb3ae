//! The host's clock: the only place that reads it. What is a function of its inputs must not come here.

use std::time::SystemTime;

/// The time of day.
#[expect(clippy::disallowed_methods, reason = "the one door to the clock")]
pub fn now() -> SystemTime {
    SystemTime::now()
}

/// The time of day, for judging dates and signatures.
pub fn timestamp() -> jiff::Timestamp {
    jiff::Timestamp::try_from(now()).unwrap_or_default()
}
