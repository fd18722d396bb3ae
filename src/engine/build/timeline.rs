//! Where the time of a build went, in the trace event format that Perfetto and Chrome's viewer open.
//!
//! A lane is a row: a step takes the lowest that is free. Times are microseconds since the build began.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use serde_json::json;

/// What happened when.
#[derive(Debug)]
pub struct Timeline {
    began: Instant,
    spans: Vec<Span>,
    lanes: Vec<bool>,
}

#[derive(Debug)]
struct Span {
    name: String,
    category: &'static str,
    lane: usize,
    start: Duration,
    length: Duration,
    arguments: serde_json::Value,
}

impl Default for Timeline {
    fn default() -> Self {
        Self { began: Instant::now(), spans: Vec::new(), lanes: Vec::new() }
    }
}

impl Timeline {
    /// The lowest lane that is free, taken.
    pub(super) fn take_lane(&mut self) -> usize {
        let free = self.lanes.iter().position(|taken| !taken);
        let lane = free.unwrap_or(self.lanes.len());
        if free.is_none() {
            self.lanes.push(true);
        }
        self.lanes[lane] = true;
        lane
    }

    /// Gives a lane back.
    pub(super) fn free_lane(&mut self, lane: usize) {
        if let Some(taken) = self.lanes.get_mut(lane) {
            *taken = false;
        }
    }

    /// Something that ends now and took `length`.
    pub(super) fn span(
        &mut self,
        name: &str,
        category: &'static str,
        lane: usize,
        length: Duration,
        arguments: serde_json::Value,
    ) {
        let start = self.began.elapsed().saturating_sub(length);
        self.spans.push(Span { name: name.to_owned(), category, lane, start, length, arguments });
    }

    /// How long ago the build began.
    pub(super) fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// Writes the file.
    ///
    /// # Errors
    /// What `out` fails with.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let name = |lane: &usize| json!({"name": "thread_name", "ph": "M", "pid": 1, "tid": lane, "args": {"name": format!("lane {lane}")}});
        let microseconds = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let spans = self.spans.iter().map(|span| {
            json!({
                "name": span.name, "cat": span.category, "ph": "X", "pid": 1, "tid": span.lane,
                "ts": microseconds(span.start), "dur": microseconds(span.length), "args": span.arguments,
            })
        });
        let lanes: Vec<usize> = (0..self.lanes.len()).collect();
        out.write_all(b"{\"displayTimeUnit\":\"ms\",\"traceEvents\":[")?;
        for (number, event) in lanes.iter().map(name).chain(spans).enumerate() {
            out.write_all(if number == 0 { b"\n" } else { b",\n" })?;
            serde_json::to_writer(&mut *out, &event)?;
        }
        out.write_all(b"\n]}\n")
    }
}
