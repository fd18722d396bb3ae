//! The jail, tried: what must not work in it, and does without.

use super::host::Host;

/// The columns of `kiln doctor --jail`: without a jail, in each layer alone, in the whole.
const COLUMNS: [&str; 6] = ["no jail", "namespaces", "capabilities", "landlock", "seccomp", "whole"];

/// Attempts that every jail is to stop.
const ATTEMPTS: usize = 19;

#[test]
fn every_attempt_fails_in_the_jail_and_every_layer_stops_some() {
    let told = Host::new().run(&["doctor", "--jail"]);
    told.succeeds();
    let rows: Vec<&str> = told.stdout.lines().filter(|line| line.starts_with("  ")).collect();
    assert_eq!(rows.len(), 3 * ATTEMPTS + 7, "{}", told.stdout);
    for profile in rows[..3 * ATTEMPTS].chunks(ATTEMPTS) {
        let mut stopped = [0; COLUMNS.len()];
        for row in profile {
            let (name, outcomes) = row.split_at(33);
            let outcomes: Vec<&str> = outcomes.split_whitespace().take(COLUMNS.len()).collect();
            assert_eq!(outcomes.len(), COLUMNS.len(), "{row}");
            for (count, outcome) in stopped.iter_mut().zip(&outcomes) {
                *count += usize::from(*outcome != "allowed");
            }
            let needed = row.ends_with("(it needs that)");
            assert_eq!(outcomes[5] == "allowed", needed, "{row}");
            if name.contains("signal kiln") || name.contains("trace kiln") {
                assert_ne!(outcomes[1], "allowed", "no process of the host has a number there: {row}");
            }
            let by_an_emulator = name.contains("executable") || name.contains("device of KVM's");
            assert!(!needed || by_an_emulator, "{row}");
        }
        // A host may itself forbid user namespaces and tracing, and nothing else of it.
        assert!(stopped[0] <= 3, "without a jail everything works: {}", told.stdout);
        for (column, count) in COLUMNS.iter().zip(stopped).skip(1) {
            assert!(count > 0, "{column} stops nothing: {}", told.stdout);
        }
    }
}

#[test]
fn each_thread_of_a_vmm_may_do_what_it_is_for_and_its_process_shows_that_it_could_more() {
    let told = Host::new().run(&["doctor", "--jail"]);
    let rows: Vec<&str> = told.stdout.lines().skip_while(|line| !line.starts_with("threads of")).collect();
    let columns: Vec<&str> = rows[0][33..].split_whitespace().collect();
    assert_eq!(columns, ["process", "processor", "owner", "disk", "plain", "files", "streams", "control"]);
    let allowed = |row: &str| -> Vec<&str> {
        let outcomes = row[33..].split_whitespace();
        outcomes
            .zip(&columns)
            .filter(|(outcome, _)| *outcome == "allowed")
            .map(|(_, column)| *column)
            .collect()
    };
    for (name, threads) in [
        ("make a machine of KVM's", &["process"][..]),
        ("open a file beneath a share", &["process", "files", "control"]),
        ("write a file at a place", &["process", "owner", "disk"]),
        ("receive a message", &["process", "owner", "streams", "control"]),
        ("make a pair of sockets", &["process", "owner", "streams"]),
        ("wait for several", &["process", "owner", "disk", "plain", "files", "streams", "control"]),
        ("start a thread", &["process"]),
    ] {
        let row = rows.iter().find(|row| row.trim().starts_with(name)).expect("a row");
        assert_eq!(allowed(row), threads, "{row}");
    }
}
