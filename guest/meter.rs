//! What the kernel counts: memory in use, how often the out-of-memory killer struck, and how often a step had as many
//! processes as it may.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::failure::{Doing, Failure};
use crate::group::Group;

/// The files of counters, opened once: a sample is one read each.
pub struct Meter {
    meminfo: File,
    vmstat: File,
    /// What counts and limits the step's processes, once there is a step; none where the kernel cannot.
    pub group: Option<Group>,
}

impl Meter {
    /// Opens the counters of a mounted /proc.
    ///
    /// # Errors
    /// They cannot be opened.
    pub fn open() -> Result<Self, Failure> {
        let open = |path: &str| File::open(path).doing(|| format!("opening {path}"));
        Ok(Self { meminfo: open("/proc/meminfo")?, vmstat: open("/proc/vmstat")?, group: None })
    }

    /// MemTotal.
    pub fn memory_bytes(&self) -> u64 {
        field(&read(&self.meminfo), "MemTotal:").unwrap_or(0).saturating_mul(1024)
    }

    /// Memory that is in use and could not be had for the asking.
    pub fn used_bytes(&self) -> u64 {
        used_bytes(&read(&self.meminfo))
    }

    /// Processes that the out-of-memory killer has ended since boot.
    pub fn oom_kills(&self) -> u64 {
        field(&read(&self.vmstat), "oom_kill").unwrap_or(0)
    }

    /// Processes that could not be started because the step had as many as it may.
    pub fn refusals(&self) -> u64 {
        self.group.as_ref().map_or(0, Group::refusals)
    }
}

/// These files are made up when read: one read from the start gives one consistent text.
fn read(file: &File) -> String {
    let mut buffer = vec![0; 16 << 10];
    let length = file.read_at(&mut buffer, 0).unwrap_or(0);
    buffer.truncate(length);
    String::from_utf8(buffer).unwrap_or_default()
}

fn used_bytes(meminfo: &str) -> u64 {
    let total = field(meminfo, "MemTotal:").unwrap_or(0);
    let available = field(meminfo, "MemAvailable:").unwrap_or(total);
    total.saturating_sub(available).saturating_mul(1024)
}

/// The number after `name` at the start of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        (words.next()? == name).then(|| words.next()?.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_found_by_their_whole_name() {
        let vmstat = "nr_free_pages 99\noom_kill_x 7\noom_kill 3\n";
        assert_eq!(field(vmstat, "oom_kill"), Some(3));
        assert_eq!(field(vmstat, "free_pages"), None);
        assert_eq!(field("oom_kill\n", "oom_kill"), None);
    }

    #[test]
    fn used_memory_is_total_less_available() {
        assert_eq!(used_bytes("MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:   400 kB\n"), 600 * 1024);
        assert_eq!(used_bytes(""), 0);
    }

    #[test]
    fn this_machine_has_counters() {
        let meter = Meter::open().expect("proc");
        assert!(meter.used_bytes() > 0 && meter.used_bytes() < meter.memory_bytes());
        assert!(field(&read(&meter.vmstat), "oom_kill").is_some());
    }
}
