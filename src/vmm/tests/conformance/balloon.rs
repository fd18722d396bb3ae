//! The balloon device.

use kiln_virtio::balloon::Balloon;

use crate::driven::{Driven, VERSION_1};
use crate::transports::over_both;
use crate::{assert_ends, same_answers};

/// Those that a balloon is put into and taken out of by, and two of reports.
const QUEUES: [usize; 4] = [2, 0, 1, 3];

fn answers(driven: &mut Driven) -> Vec<Vec<u8>> {
    let mut answers = Vec::new();
    for queue in QUEUES {
        answers.extend(driven.hostile_chains(queue, b"no report"));
        for room in [0, 1, 4095, 4096, 8192, 8193, 1 << 20, u32::MAX] {
            answers.push(driven.ask(queue, b"", room));
            answers.push(driven.ask(queue, b"pages", room));
        }
    }
    answers
}

#[test]
fn reports_of_free_memory_do_the_same_over_both_transports_whatever_was_negotiated() {
    let same =
        same_answers(|features| over_both(Balloon::new, features).map(|mut driven| answers(&mut driven)));
    let came_back = |answer: &&Vec<u8>| answer[8..] == [0; 1024];
    let of_each =
        same.chunks(same.len() / QUEUES.len()).map(|answers| answers.iter().filter(came_back).count());
    // What holds whole pages, of reports alone; in the last queue, what is longer than two does not lie in memory.
    assert_eq!(of_each.collect::<Vec<_>>(), [2 * 4, 0, 0, 2 * 2]);
}

#[test]
fn a_balloon_ends_with_any_of_its_queues() {
    for queue in QUEUES {
        assert_ends(|| over_both(Balloon::new, VERSION_1), queue, &[]);
    }
}
