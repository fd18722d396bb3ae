//! What must hold of a process after any case: little memory more, no descriptor more, done in time.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use super::case::Allowance;

/// Most memory that a case may cost at its peak.
const MEMORY_BYTES: u64 = 16 << 20;
/// Longest that a case may take, not counting what its threads waited for a processor.
const SECONDS: u64 = 2;
/// How many times as long it may take on a slow machine: one and the same took 2.2 times the allowance of some cases on one day, and
/// none on others. What hangs, or takes a square of the time that it should, takes longer than that.
const SLACK: u64 = 3;

/// The state of the process before a case.
pub struct Before {
    started: Instant,
    waited: Duration,
    resident_bytes: u64,
    descriptors: BTreeMap<u32, String>,
}

/// A figure of /proc/self/status, in bytes.
fn status_bytes(name: &str) -> Result<u64, String> {
    let status = fs::read_to_string("/proc/self/status").map_err(|error| error.to_string())?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let figure = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    figure.map(|kilobytes| kilobytes << 10).ok_or_else(|| format!("no {name} in /proc/self/status"))
}

/// Open descriptors and what they are.
pub fn descriptors() -> Result<BTreeMap<u32, String>, String> {
    let folder = fs::read_dir("/proc/self/fd").map_err(|error| error.to_string())?;
    let mut open = BTreeMap::new();
    for entry in folder.flatten() {
        // The folder's own descriptor is closed by now or will be.
        if let (Ok(target), Ok(number)) =
            (fs::read_link(entry.path()), entry.file_name().to_string_lossy().parse())
            && !target.starts_with(format!("/proc/{}", std::process::id()))
        {
            open.insert(number, target.to_string_lossy().into_owned());
        }
    }
    Ok(open)
}

/// How long this process's threads were ready and waited for a processor (the second figure of schedstat). Work of
/// others on the host must not fail a case.
fn waited() -> Duration {
    let threads = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let nanoseconds = threads.filter_map(|thread| {
        let text = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        text.split_whitespace().nth(1)?.parse::<u64>().ok()
    });
    Duration::from_nanos(nanoseconds.sum())
}

impl Before {
    /// Notes how things stand.
    pub fn now() -> Result<Self, String> {
        // 5: the peak of resident memory begins anew (proc(5), clear_refs).
        fs::write("/proc/self/clear_refs", "5").map_err(|error| format!("clear_refs: {error}"))?;
        Ok(Self {
            started: Instant::now(),
            waited: waited(),
            resident_bytes: status_bytes("VmRSS")?,
            descriptors: descriptors()?,
        })
    }

    /// Compares time and memory, to be called when the target has done what it was to do.
    pub fn within(&self, allow: Allowance) -> Result<(), String> {
        let taken = self.started.elapsed().saturating_sub(waited().saturating_sub(self.waited));
        let seconds = SLACK * allow.seconds.unwrap_or(SECONDS);
        if taken > Duration::from_secs(seconds) {
            return Err(format!("it took {:.1} s, and {seconds} s are allowed", taken.as_secs_f32()));
        }
        let grown = status_bytes("VmHWM")?.saturating_sub(self.resident_bytes);
        let most = allow.memory_bytes.unwrap_or(MEMORY_BYTES);
        if grown > most {
            return Err(format!("it took {} KiB of memory, and {} KiB are allowed", grown >> 10, most >> 10));
        }
        Ok(())
    }

    /// Compares descriptors, to be called when the target is gone. Its threads may need a moment to go.
    pub fn closed(&self) -> Result<(), String> {
        let deadline = Instant::now() + Duration::from_secs(SECONDS);
        loop {
            let mut more = descriptors()?;
            more.retain(|number, target| self.descriptors.get(number) != Some(target));
            if more.is_empty() {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(format!("descriptors are left open: {more:?}"));
            }
            std::thread::yield_now();
        }
    }
}
