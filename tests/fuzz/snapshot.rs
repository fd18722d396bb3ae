//! The decoder of frozen machines.
//!
//! An input is how the rest is meant (one byte): as a snapshot's document, which gets the head that is its own, or as it is.

use std::collections::BTreeMap;

use kiln_vmm::snapshot::{Snapshot, SnapshotError};
use kvm_bindings::{
    kvm_clock_data, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::driver::{Seen, Target, campaign};
use crate::random::Random;

/// The magic word and the version, and with the digest all of what a snapshot begins with.
const MAGIC: &[u8] = b"KILNSNAP\x02\0\0\0";
const HEAD_BYTES: usize = MAGIC.len() + 32;
/// What a document says in plain numbers.
#[derive(Debug, PartialEq, Deserialize)]
struct Parts {
    memory_bytes: Value,
    console: Value,
    devices: Vec<BTreeMap<String, Value>>,
}

fn parts_of(bytes: &[u8]) -> Parts {
    let mut parts: Parts = serde_json::from_slice(&bytes[HEAD_BYTES..]).expect("a document");
    // What may be missing is none.
    parts.devices.iter_mut().for_each(|device| device.retain(|_, value| !value.is_null()));
    parts
}

/// A snapshot of these bytes as its document.
fn with_head(document: &[u8]) -> Vec<u8> {
    [MAGIC, kiln_digest::Digest::of(document).as_bytes(), document].concat()
}

/// A machine with `processors` processors and `devices` devices, as kiln writes one down.
fn document(processors: usize, devices: usize) -> Vec<u8> {
    let processor = json!({
        "leaves": [],
        "khz": 7,
        "running": kvm_mp_state::default(),
        "registers": kvm_regs::default(),
        "special": kvm_sregs::default(),
        "extended": kvm_xsave::default(),
        "extended_control": kvm_xcrs::default(),
        "debug": kvm_debugregs::default(),
        "interrupts": kvm_lapic_state::default(),
        "events": kvm_vcpu_events::default(),
        "model_specific": [],
    });
    let queue =
        json!({ "size": 64, "ready": true, "descriptors": 65536, "available": 98304, "used": 106496 });
    let device = json!({
        "device_type": 4,
        "registers": {
            "offered_page": 0, "accepted_page": 1, "accepted": 1_u64 << 32, "selected": 0, "status": 15,
            "changed": 0, "queues": [queue],
        },
        "frozen": { "positions": [{ "available": 1, "used": 1 }, null], "device": [1], "has_interrupted": true },
    });
    let machine = json!({
        "memory_bytes": 1 << 30,
        "clock": kvm_clock_data::default(),
        "chips": vec![kvm_irqchip::default(); 3],
        "processors": vec![processor; processors],
        "console": vec![0; 9],
        "devices": vec![device; devices],
    });
    // In the order of a snapshot's own, which a map of values does not keep.
    let decoded = Snapshot::decode(&with_head(machine.to_string().as_bytes())).expect("a snapshot");
    decoded.encode().expect("text").split_off(HEAD_BYTES)
}

/// Puts something else in the place of a number of a document.
fn change_number(random: &mut Random, document: &mut Vec<u8>) {
    let start = random.below(document.len().max(1));
    let Some(from) = document.iter().skip(start).position(u8::is_ascii_digit).map(|at| start + at) else {
        return;
    };
    let rest = &document[from..];
    let end = from + rest.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(rest.len());
    let number = random.edge().to_string();
    let other = random.pick(&["null", "-1", "1e9", "[]", "{}", "\"\"", "true", "0.5", "1,2", "256"]);
    let new = if random.once_in(2) { &number } else { other };
    document.splice(from..end, new.bytes());
}

struct Decoder {
    documents: Vec<Vec<u8>>,
}

impl Target for Decoder {
    const NAME: &'static str = "snapshot";
    const MOST_BYTES: usize = 64 << 10;

    fn new() -> Self {
        Self { documents: [(0, 0), (0, 2), (1, 0), (2, 3)].map(|(one, other)| document(one, other)).into() }
    }

    fn generate(&mut self, random: &mut Random, input: &mut Vec<u8>) {
        let is_whole = random.once_in(8);
        input.push(u8::from(is_whole));
        let index = if random.once_in(8) { random.below(self.documents.len()) } else { random.below(2) };
        let mut document = self.documents[index].clone();
        for _ in 0..random.below(4) {
            change_number(random, &mut document);
        }
        input.extend(if is_whole { with_head(&document) } else { document });
    }

    fn run(&mut self, input: &[u8], seen: &mut Seen) {
        let Some((how, rest)) = input.split_first() else { return };
        let bytes = if how & 1 == 0 { with_head(rest) } else { rest.to_vec() };
        match Snapshot::decode(&bytes) {
            Err(SnapshotError::Foreign) => assert!(!bytes.starts_with(&MAGIC[..8])),
            Err(SnapshotError::Version(version)) => {
                assert_ne!(version, 2);
                seen.note(1 << 32 | u64::from(version == 0));
            }
            Err(SnapshotError::Damaged) => {
                assert!(bytes.starts_with(&MAGIC[..8]));
                assert!(!self.documents.iter().any(|document| with_head(document) == bytes), "it is whole");
                seen.note(2 << 32);
            }
            Ok(snapshot) => {
                // What has the right digest may be written in another way than kiln's, but comes to the same.
                assert_eq!(bytes[..HEAD_BYTES], with_head(&bytes[HEAD_BYTES..])[..HEAD_BYTES]);
                let again = snapshot.encode().expect("what was decoded has a text");
                if self.documents.iter().any(|document| document == &bytes[HEAD_BYTES..]) {
                    assert!(again == bytes, "what kiln wrote is written the same again");
                }
                let twice = Snapshot::decode(&again).expect("what was encoded is decoded");
                assert!(twice.encode().ok().as_ref() == Some(&again), "a snapshot has one form");
                assert_eq!(parts_of(&again), parts_of(&bytes), "nothing of it is lost");
                let counts = [snapshot.chips.len(), snapshot.processors.len(), snapshot.devices.len()];
                let [chips, processors, devices] = counts.map(|count| count as u64);
                seen.note(3 << 32 | chips << 16 | processors << 8 | devices);
            }
        }
    }

    fn memory_limit(input_bytes: usize) -> usize {
        // A document, what is decoded of it twice, and its text again. Only a chip of which nothing is said (`[]`) is more than
        // 200 times as long as its text, and few of those come of changes.
        64 * input_bytes + (1 << 20)
    }
}

#[test]
fn no_bytes_break_the_decoder_of_frozen_machines() {
    campaign::<Decoder>();
}
