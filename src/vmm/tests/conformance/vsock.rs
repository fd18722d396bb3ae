//! The vsock device: of a device process, and on a bus.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use kiln_virtio::vsock::{Backend, Vsock};

use crate::driven::{Driven, PATIENCE, VERSION_1};
use crate::fs::shared;
use crate::testkit::WRITE;
use crate::transports::{CID, of_device_process, over_mmio};
use crate::{Numbers, assert_ends, same_answers};

/// Receive buffers that the device has at a time.
const BUFFERS: u16 = 32;
const BUFFER_BYTES: u32 = 4096;

/// Accepts nothing.
struct Nobody;

impl Backend for Nobody {
    fn connect_from_guest(&mut self, _: u32) -> Option<UnixStream> {
        None
    }
}

/// What a driver receives: packets without end in one order, whoever is quicker.
fn answers(driven: &mut Driven) -> Vec<Vec<u8>> {
    let post = |driven: &mut Driven, index: u16| {
        let at = driven.rings[0].data() + u64::from(index) * u64::from(BUFFER_BYTES);
        driven.rings[0].describe(&driven.memory, index, (at, BUFFER_BYTES), WRITE, 0);
        driven.rings[0].offer(&driven.memory, index);
    };
    for index in 0..BUFFERS {
        post(driven, index);
    }
    driven.notify(0);
    let packet = |op: u16, kind: u16, ports: [u32; 2], cids: [u64; 2], data: &[u8], claimed: u32| {
        let mut bytes = cids.map(u64::to_le_bytes).concat();
        bytes.extend([ports[0], ports[1], claimed].map(u32::to_le_bytes).concat());
        bytes.extend([kind, op].map(u16::to_le_bytes).concat());
        bytes.extend([0_u32, 65_536, 0].map(u32::to_le_bytes).concat());
        bytes.extend(data);
        bytes
    };
    let mut answers = driven.hostile_chains(1, &packet(1, 1, [9, 9], [CID, 2], b"", 0));
    let mut numbers = Numbers(9);
    for _ in 0..600 {
        let op = u16::from(numbers.below(9));
        let kind = numbers.pick(&[1, 1, 1, 2, 0]);
        let cids = numbers.pick(&[[CID, 2], [CID, 2], [CID, 2], [5, 2], [CID, 3]]);
        let ports = [1, 2].map(|_| u32::from(numbers.below(4)));
        let data = vec![7; if op == 5 { 10 } else { 0 }];
        let length = u32::try_from(data.len()).expect("short");
        let claimed = numbers.pick(&[length, length, u32::MAX]);
        answers.push(driven.ask(1, &packet(op, kind, ports, cids, &data, claimed), 0));
        // What has come meanwhile is taken, for there to be room.
        answers.extend(received(driven, &post, false));
    }
    // The last one's answer comes behind all others.
    driven.ask(1, &packet(1, 1, [4242, 9], [CID, 2], b"", 0), 0);
    answers.extend(received(driven, &post, true));
    // In which step of the driver's a packet came is no property of the device's.
    let (mut sent, mut came): (Vec<_>, Vec<_>) = answers.into_iter().partition(|answer| answer.len() > 1000);
    sent.append(&mut came);
    sent
}

/// The packets that the device has sent; with `to_the_end`, all up to that to port 4242.
fn received(driven: &mut Driven, post: &impl Fn(&mut Driven, u16), to_the_end: bool) -> Vec<Vec<u8>> {
    let mut packets = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let Some((head, length)) = driven.rings[0].used(&driven.memory) else {
            if !to_the_end {
                break;
            }
            assert!(Instant::now() < deadline, "the last packet is not answered");
            std::thread::yield_now();
            continue;
        };
        let at = driven.rings[0].data() + u64::from(head) * u64::from(BUFFER_BYTES);
        let bytes = driven.read(at, length as usize);
        post(driven, u16::try_from(head).expect("an index"));
        let last = bytes.get(20..24) == Some(&4242_u32.to_le_bytes());
        packets.push(bytes);
        if last {
            break;
        }
    }
    driven.notify(0);
    packets
}

fn over_both(share: &File, features: u64) -> [Driven; 2] {
    let (device, connector) = Vsock::new(CID, 1000, Box::new(Nobody)).expect("descriptors");
    let both = [of_device_process(1, share, features), over_mmio(device, features, connector)];
    assert_eq!(both[0].features, both[1].features);
    both
}

#[test]
fn the_vsock_device_answers_the_same_over_both_transports() {
    let (_host, share) = shared();
    let same = same_answers(|features| over_both(&share, features).map(|mut driven| answers(&mut driven)));
    assert!(same.iter().filter(|answer| answer.len() == 44).count() > 100, "packets come back");
}

#[test]
fn a_vsock_device_ends_with_its_queue() {
    let (_host, share) = shared();
    assert_ends(|| over_both(&share, VERSION_1), 1, &[0; 44]);
}
