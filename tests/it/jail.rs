//! The jail, tried: what must not work in it, and does without.

use super::host::Host;

/// The columns of `kiln doctor --jail`: without a jail, in each layer alone, in the whole.
const COLUMNS: [&str; 6] = ["no jail", "namespaces", "capabilities", "landlock", "seccomp", "whole"];

#[test]
fn every_attempt_fails_in_the_jail_and_every_layer_stops_some() {
    let told = Host::new().run(&["doctor", "--jail"]);
    told.succeeds();
    let rows: Vec<&str> = told.stdout.lines().filter(|line| line.starts_with("  ")).collect();
    assert_eq!(rows.len(), 3 * 13, "{}", told.stdout);
    for profile in rows.chunks(13) {
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
            assert!(!needed || name.contains("executable"), "{row}");
        }
        // A host may itself forbid user namespaces, and nothing else of it.
        assert!(stopped[0] <= 1, "without a jail everything works: {}", told.stdout);
        for (column, count) in COLUMNS.iter().zip(stopped).skip(1) {
            assert!(count > 0, "{column} stops nothing: {}", told.stdout);
        }
    }
}
