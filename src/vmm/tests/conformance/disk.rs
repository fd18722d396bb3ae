//! The block device.

use std::fs::File;
use std::os::unix::fs::FileExt;

use kiln_vmm::disk::Disk;

use crate::driven::{Driven, VERSION_1};
use crate::transports::over_both;
use crate::{Numbers, assert_ends, same_answers};

const DISK_BYTES: usize = 64 * 512;

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

/// What a driver hears, and then what is on the disk.
fn answers(driven: &mut Driven, file: &File) -> Vec<Vec<u8>> {
    let mut answers = driven.hostile_chains(0, &header(8, 0));
    let mut numbers = Numbers(3);
    for _ in 0..1000 {
        let kind = numbers.pick(&[0, 1, 4, 8, 11, 13, 5]);
        let mut request = header(kind, numbers.below(70).into());
        match kind {
            1 => request.extend([numbers.below(255); 512]),
            11 | 13 => request
                .extend([header(0, 0)[8..].to_vec(), vec![numbers.below(9), 0, 0, 0, 0, 0, 0, 0]].concat()),
            _ => {}
        }
        let room = numbers.pick(&[1, 513, 21, 500]);
        answers.push(driven.ask(0, &request, room));
    }
    let mut content = vec![0; DISK_BYTES];
    file.read_exact_at(&mut content, 0).expect("as long as before");
    answers.push(content);
    answers
}

/// The same disk over either transport, each with a file of its own.
fn disks(features: u64) -> ([Driven; 2], Vec<File>) {
    let mut files = Vec::new();
    let both = over_both(
        || {
            let file = tempfile::tempfile().expect("a file");
            file.set_len(DISK_BYTES as u64).expect("room");
            files.push(file.try_clone().expect("a descriptor"));
            Disk::new(file, "same", false, |_| ()).expect("a disk")
        },
        features,
    );
    (both, files)
}

#[test]
fn a_disk_answers_the_same_over_both_transports_whatever_was_negotiated() {
    let same = same_answers(|features| {
        let (both, files) = disks(features);
        let mut files = files.iter();
        both.map(|mut driven| answers(&mut driven, files.next().expect("a file for each")))
    });
    let content = same.last().expect("the content");
    assert!(content.iter().any(|byte| *byte != 0), "something was written");
}

#[test]
fn a_disk_ends_with_its_queue() {
    assert_ends(|| disks(VERSION_1).0, 0, &header(8, 0));
}
