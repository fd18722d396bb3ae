//! How much memory the host can still give to machines, all that runs taken into account: what the kernel says is
//! available, and what the limits of the control groups leave that kiln and its machines are in (cgroups(7), version 2).

use std::fs;
use std::path::{Path, PathBuf};

/// Where version 2 of control groups is mounted: alone, or beside version 1.
const MOUNTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// Memory that is available now, bytes; all there can be where the system does not say.
pub fn available_bytes() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    of_meminfo(&text).min(within_groups())
}

fn of_meminfo(text: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches(" kB").trim().parse::<u64>().ok());
    kib.map_or(u64::MAX, |kib| kib.saturating_mul(1024))
}

fn within_groups() -> u64 {
    let told = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let Some(group) = told.lines().find_map(|line| line.strip_prefix("0::/")) else { return u64::MAX };
    MOUNTS.iter().map(|mount| within(Path::new(mount), group)).min().unwrap_or(u64::MAX)
}

/// What the group `group` beneath `mount` and those above it leave.
fn within(mount: &Path, group: &str) -> u64 {
    let mut left = u64::MAX;
    let mut folder: PathBuf = mount.join(group);
    while folder.starts_with(mount) {
        let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap_or_default();
        left = left.min(of_group(&read("memory.max"), &read("memory.current"), &read("memory.stat")));
        if !folder.pop() {
            break;
        }
    }
    left
}

/// What one group leaves. What it has of files and nobody used lately is given back when memory is short.
fn of_group(max: &str, current: &str, stat: &str) -> u64 {
    let (Ok(max), Ok(current)) = (max.trim().parse::<u64>(), current.trim().parse::<u64>()) else {
        return u64::MAX;
    };
    let files = stat.lines().find_map(|line| line.strip_prefix("inactive_file "));
    let files = files.and_then(|files| files.trim().parse::<u64>().ok()).unwrap_or(0);
    max.saturating_sub(current.saturating_sub(files))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_available_is_read_and_all_there_can_be_where_nothing_says() {
        assert_eq!(of_meminfo("MemTotal: 10 kB\nMemAvailable:    3000 kB\n"), 3000 << 10);
        assert_eq!(of_meminfo("MemTotal: 10 kB\n"), u64::MAX);
        assert_eq!(of_group("max\n", "5\n", ""), u64::MAX);
        assert_eq!(of_group("1000\n", "900\n", "anon 5\ninactive_file 300\n"), 400);
        assert_eq!(of_group("1000\n", "2000\n", ""), 0);
        assert_eq!(of_group("", "", ""), u64::MAX);
    }

    #[test]
    fn the_tightest_group_above_decides() {
        let mount = tempfile::tempdir().expect("a folder");
        let inner = mount.path().join("user/build");
        fs::create_dir_all(&inner).expect("folders");
        let write = |folder: &Path, max: &str, current: &str| {
            fs::write(folder.join("memory.max"), max).expect("room");
            fs::write(folder.join("memory.current"), current).expect("room");
        };
        write(&inner, "max", "10");
        assert_eq!(within(mount.path(), "user/build"), u64::MAX);
        write(&mount.path().join("user"), "100", "40");
        assert_eq!(within(mount.path(), "user/build"), 60);
        write(&inner, "50", "30");
        assert_eq!(within(mount.path(), "user/build"), 20);
        assert_eq!(within(mount.path(), "elsewhere"), u64::MAX);
    }
}
