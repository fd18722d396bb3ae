//! The fs device: of a device process, and on a bus.

use std::fs::File;

use kiln_virtio::fs::{Attributes, Fs, Settings, Share};

use crate::driven::{Driven, VERSION_1};
use crate::transports::{of_device_process, over_mmio};
use crate::{Numbers, assert_ends, same_answers};

pub fn fuse(opcode: u32, unique: u64, node: u64, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(40 + body.len()).expect("short");
    let mut request = [length, opcode].map(u32::to_le_bytes).concat();
    request.extend([unique, node].map(u64::to_le_bytes).concat());
    request.extend([0; 16]);
    request.extend(body);
    request
}

/// What a driver hears.
fn answers(driven: &mut Driven) -> Vec<Vec<u8>> {
    let init = [&[7_u32, 41, 1 << 17, u32::MAX].map(u32::to_le_bytes).concat()[..], &[0; 48]].concat();
    let mut answers = vec![
        driven.ask(1, &fuse(1, 1, 1, b"s\0"), 1000),
        driven.ask(1, &fuse(26, 2, 0, &init), 1000),
        driven.ask(1, &fuse(1, 3, 1, b"s\0"), 1000),
    ];
    answers.extend(driven.hostile_chains(1, &fuse(3, 4, 1, &[0; 16])));
    let names: [&[u8]; 9] = [b"s\0", b"f\0", b"d\0", b"..\0", b"\0", b"none\0", b"a/b\0", b"x", b"x\0"];
    let mut numbers = Numbers(7);
    for unique in 10..1500 {
        let opcode = numbers.below(56);
        let node = numbers.pick(&[0, 1, 2, 3, 4, 5, 99, u64::MAX]);
        let body = match opcode {
            1 => numbers.pick(&names).to_vec(),
            // INIT would begin anew.
            26 => continue,
            _ => (0..numbers.below(9) * 8).map(|_| numbers.pick(&[0, 0, 0, 0, 1, 16, 255])).collect(),
        };
        let room = numbers.pick(&[0, 15, 16, 200, 1000, 1000, 1000]);
        let opcode = u32::from(opcode);
        answers.push(driven.ask(1, &fuse(opcode, unique, node, &body), room));
    }
    answers
}

pub fn shared() -> (tempfile::TempDir, File) {
    let host = tempfile::tempdir().expect("directory");
    std::fs::create_dir(host.path().join("d")).expect("directory");
    for (name, content) in [("f", "content"), ("d/f", "inside")] {
        std::fs::write(host.path().join(name), content).expect("file");
    }
    std::os::unix::fs::symlink("/", host.path().join("x")).expect("link");
    let directory = File::open(host.path()).expect("directory");
    (host, directory)
}

pub fn on_a_bus(share: &File, features: u64) -> Driven {
    let (device, shares) = Fs::new(Settings::default());
    let directory = share.try_clone().expect("a descriptor").into();
    let share = Share { directory, attributes: Attributes::Fixed { mtime_seconds: 1 } };
    shares.with_tree(|tree| tree.add_share(b"s", share)).expect("a share");
    over_mmio(device, features, ())
}

fn over_both(share: &File, features: u64) -> [Driven; 2] {
    let both = [of_device_process(0, share, features), on_a_bus(share, features)];
    assert_eq!(both[0].features, both[1].features);
    both
}

#[test]
fn the_fs_device_answers_the_same_over_both_transports() {
    let (_host, share) = shared();
    let same = same_answers(|features| over_both(&share, features).map(|mut driven| answers(&mut driven)));
    assert!(same.len() > 1000 && same.iter().any(|answer| answer.len() > 1000));
}

#[test]
fn an_fs_device_ends_with_its_queue() {
    let (_host, share) = shared();
    assert_ends(|| over_both(&share, VERSION_1), 1, &fuse(3, 4, 1, &[0; 16]));
}
