//! The entropy device.

use std::collections::BTreeSet;

use kiln_virtio::rng::Rng;

use crate::driven::{Driven, VERSION_1};
use crate::transports::over_both;
use crate::{Numbers, assert_ends, same_answers};

fn answers(driven: &mut Driven) -> Vec<Vec<u8>> {
    let mut answers = driven.hostile_chains(0, b"no request");
    let mut numbers = Numbers(5);
    for _ in 0..1000 {
        let room = numbers.pick(&[0, 1, 64, 255, 256, 257, 1000]);
        let request = numbers.pick(&[&b""[..], &b""[..], &b"no request"[..]]);
        answers.push(driven.ask(0, request, room));
    }
    answers
}

#[test]
fn random_numbers_come_as_many_at_a_time_over_both_transports_and_never_twice() {
    // What was given, apart from what else there is to see: how much it was, and that the rest of the room is as before.
    let mut given = BTreeSet::new();
    let mut seen = |mut driven: Driven| {
        let mut answers = answers(&mut driven);
        for answer in &mut answers {
            let length = answer.get(4..8).and_then(|length| length.try_into().ok()).map(u32::from_le_bytes);
            let numbers = 8..8 + length.expect("not broken") as usize;
            let numbers = answer.get_mut(numbers).expect("within the room");
            assert!(numbers.len() < 64 || given.insert(numbers.to_vec()), "the same numbers again");
            numbers.fill(0);
        }
        answers
    };
    let same = same_answers(|features| over_both(Rng::new, features).map(&mut seen));
    assert!(same.iter().filter(|answer| answer[4..8] == 256_u32.to_le_bytes()).count() > 100);
}

#[test]
fn a_source_of_random_numbers_ends_with_its_queue() {
    assert_ends(|| over_both(Rng::new, VERSION_1), 0, &[]);
}
