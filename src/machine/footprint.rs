//! What the processes of a machine really hold of the host's memory, as proc(5) says it to everybody: pages that nobody
//! else has, and the guest's memory, which is shared among them.

use std::fs;

/// Most processes that are looked at for one machine.
const MOST_PROCESSES: usize = 64;

/// Memory that `processes` and their descendants hold, bytes; none where none of them is there.
pub fn held_bytes(processes: &[i32]) -> Option<u64> {
    measure(processes, of_status)
}

/// The most that they have held, as far as can be told: a guest of kiln's own VMM gives memory back.
pub fn most_held_bytes(processes: &[i32]) -> Option<u64> {
    measure(processes, at_most)
}

/// What `of` says of all of them together, by their statuses.
fn measure(processes: &[i32], of: impl Fn(&str) -> Option<Resident>) -> Option<u64> {
    let mut found = Vec::new();
    let mut open = processes.to_vec();
    let mut looked_at = 0;
    while let Some(process) = open.pop().filter(|_| looked_at < MOST_PROCESSES) {
        looked_at += 1;
        let Ok(status) = fs::read_to_string(format!("/proc/{process}/status")) else { continue };
        found.extend(of(&status));
        // The thread that started a process has it as a child.
        for thread in fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten() {
            let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            open.extend(children.split_whitespace().filter_map(|child| child.parse::<i32>().ok()));
        }
    }
    (!found.is_empty()).then(|| together(&found))
}

/// Private and shared memory, bytes.
type Resident = (u64, u64);

/// What one machine's processes hold together: the guest's memory is one, however many have it mapped.
fn together(processes: &[Resident]) -> u64 {
    let private = processes.iter().map(|(private, _)| *private).fold(0, u64::saturating_add);
    private.saturating_add(processes.iter().map(|(_, shared)| *shared).max().unwrap_or(0))
}

/// What `/proc/PID/status` says; none of a process that is over.
fn of_status(text: &str) -> Option<Resident> {
    Some((field(text, "RssAnon:")?, field(text, "RssShmem:")?))
}

/// As [`of_status`], when it was most. The most of all that was resident counts pages of files too: where all that were there last
/// were there then, what is missing is its own. Where the system took some of them meanwhile it is less than this.
fn at_most(text: &str) -> Option<Resident> {
    let (private, shared) = of_status(text)?;
    let most = field(text, "VmHWM:")?.saturating_sub(field(text, "RssFile:")?);
    Some((private.max(most.saturating_sub(shared)), shared))
}

/// The bytes that a field says.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_says_what_is_private_and_what_is_shared() {
        let status = "Name:\tqemu\nVmRSS:\t  400 kB\nRssAnon:\t     100 kB\nRssFile:\t  50 kB\nRssShmem:\t     250 kB\n";
        assert_eq!(of_status(status), Some((100 << 10, 250 << 10)));
        assert_eq!(of_status("Name:\tqemu\nState:\tZ (zombie)\n"), None);
    }

    #[test]
    fn what_a_process_gave_back_counts_in_the_most_that_it_held() {
        let of = |most: u64, private: u64| {
            at_most(&format!(
                "VmHWM:\t{most} kB\nRssAnon:\t{private} kB\nRssFile:\t50 kB\nRssShmem:\t250 kB\n"
            ))
        };
        assert_eq!(of(400, 100), Some((100 << 10, 250 << 10)), "it holds what it ever did");
        assert_eq!(of(1400, 100), Some((1100 << 10, 250 << 10)));
        assert_eq!(of(20, 100), Some((100 << 10, 250 << 10)), "what is now counts in any case");
        assert_eq!(at_most("Name:\tqemu\nState:\tZ (zombie)\n"), None);
    }

    #[test]
    fn memory_that_this_process_has_given_back_was_held() {
        let own = [rustix::process::getpid().as_raw_pid()];
        let bytes = 64 << 20;
        let memory = vec![1_u8; bytes];
        let held = held_bytes(&own).expect("this process");
        assert!(held >= bytes as u64);
        drop(std::hint::black_box(memory));
        assert!(most_held_bytes(&own).is_some_and(|most| most >= bytes as u64));
    }

    #[test]
    fn memory_that_two_processes_share_counts_once() {
        assert_eq!(together(&[(100, 1000), (30, 400)]), 1130);
        assert_eq!(together(&[]), 0);
    }

    #[test]
    fn this_process_holds_something_and_one_that_is_not_there_nothing() {
        let own = rustix::process::getpid().as_raw_pid();
        assert!(held_bytes(&[own]).is_some_and(|bytes| bytes > 100 << 10));
        assert_eq!(held_bytes(&[i32::MAX]), None);
        assert_eq!(held_bytes(&[]), None);
    }
}
