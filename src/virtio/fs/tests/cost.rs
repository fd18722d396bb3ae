//! What it costs to note what is answered: `ci/bench fs` holds these times against those of its rows.

use std::hint::black_box;
use std::time::Instant;

use crate::fs::index::Index;
use crate::fs::missed::{MISSED_BYTES, Missed};
use crate::fs::record::{Kind, Observed};

/// Files of the bench's tree, and directories they are in.
const FILES: u32 = 20_000;
const DIRECTORIES: u32 = 200;

fn names(suffix: &str) -> Vec<(u32, String)> {
    (0..FILES).map(|at| (at % DIRECTORIES, format!("f{}{suffix}", at / DIRECTORIES))).collect()
}

/// The notes of a row, each in nanoseconds, in the order in which a walk asks.
fn each(notes: u32, note: impl FnOnce()) -> f64 {
    let began = Instant::now();
    note();
    began.elapsed().as_secs_f64() * 1e9 / f64::from(notes)
}

#[test]
#[ignore = "a measurement"]
fn what_a_note_costs() {
    let mut index = Index::new();
    let share = index.add_share(0).expect("share");
    let listed = names("")
        .iter()
        .map(|(_, name)| index.listed(name.as_bytes(), Kind::Regular, 1))
        .collect::<Result<Vec<_>, _>>();
    index.fill(share, listed.expect("names")).expect("room");
    let nodes: Vec<_> = index.all().collect();
    let observed = each(FILES, || {
        for node in &nodes {
            black_box(&mut index).observe(*node, Observed::METADATA);
        }
    });

    let mut missed = Missed::new(MISSED_BYTES);
    let absent = names(".missing");
    let mut round = || {
        each(FILES, || {
            for (directory, name) in &absent {
                assert!(black_box(&mut missed).insert(*directory, name.as_bytes()));
            }
        })
    };
    let (first, again) = (round(), round());
    // A look-up notes one thing, and reading a file two: its metadata and its contents.
    for (row, notes, nanos) in [
        ("stat-cold", FILES, observed),
        ("find-missed", 2 * FILES, f64::midpoint(first, again)),
        ("small-reads", 2 * 4000, observed),
        ("random-4k", 4000, observed),
    ] {
        println!("notes {row} {notes} {nanos:.1}");
    }
}
