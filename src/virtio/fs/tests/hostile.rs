//! Guests that do what no kernel does, where that takes code; the cases are files in `tests/hostile`.

use std::os::unix::fs::symlink;

use proptest::prelude::*;

use super::*;
use crate::testkit::{INDIRECT, NEXT, WRITE};

fn small_share() -> tempfile::TempDir {
    let host = tempfile::tempdir().expect("directory");
    std::fs::create_dir(host.path().join("d")).expect("directory");
    std::fs::write(host.path().join("d/f"), "inside").expect("file");
    std::fs::write(host.path().join("f"), "content").expect("file");
    symlink("/", host.path().join("x")).expect("link");
    host
}

#[test]
fn fs03_any_bytes_are_names_and_survive_in_the_record() {
    use std::os::unix::ffi::OsStrExt;
    let host = small_share();
    let name = b"bad\xff\x1b[2J\n%";
    std::fs::write(host.path().join(std::ffi::OsStr::from_bytes(name)), "x").expect("file");
    let mut guest = Guest::of(host.path(), EPOCH);
    let root = guest.walk("s");
    assert_ne!(guest.lookup(root, name).expect("found").nodeid.get(), 0);
    assert_eq!(guest.lookup(root, b"no\xfe%\n").expect("absent").nodeid.get(), 0);
    let record = guest.record();
    let text = serde_json::to_string(&record).expect("text");
    assert!(text.contains("bad%ff") && text.contains("no%fe%25\\n"));
    assert_eq!(serde_json::from_str::<Record>(&text).expect("record"), record);
    assert!(record.shares[0].entries.iter().any(|entry| entry.path.0 == name));
}

#[test]
fn hv09_requests_without_end_are_taken_a_queue_at_a_time() {
    let host = small_share();
    let mut guest = Guest::of(host.path(), EPOCH);
    let body = request(40, op::INTERRUPT, 1, 0, b"");
    guest.memory.write_slice(&body, GuestAddress(guest.ring.data())).expect("memory");
    guest.ring.describe(&guest.memory, 0, (guest.ring.data(), 40), 0, 0);
    for _ in 0..256 {
        guest.ring.offer(&guest.memory, 0);
    }
    let mut queues: [Option<&mut Queue>; 2] = [None, Some(&mut guest.ring.queue)];
    let outcome = Device::<()>::process(&mut guest.device, Wake::Queue(1), &mut queues, &guest.memory);
    assert!(outcome.expect("ring").again);
    guest.kick().expect("ring");
}

#[test]
fn a_queue_that_is_not_there_is_left_alone() {
    let host = small_share();
    let mut guest = Guest::of(host.path(), EPOCH);
    let mut queues: [Option<&mut Queue>; 2] = [None, None];
    for wake in [Wake::Queue(0), Wake::Queue(1), Wake::Queue(9), Wake::Events] {
        let outcome = Device::<()>::process(&mut guest.device, wake, &mut queues, &guest.memory);
        assert_eq!(outcome.expect("nothing to do"), crate::device::Outcome::default());
    }
}

/// A request whose header is right and whose body is a guess at what the opcode takes.
fn any_request() -> impl Strategy<Value = Vec<u8>> {
    let opcode = prop_oneof![0..60_u32, any::<u32>()];
    let node = prop_oneof![0..10_u64, any::<u64>()];
    let body = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..80),
        "[a-z./]{0,4}\0".prop_map(String::into_bytes),
        (any::<u64>(), any::<u32>()).prop_map(|(offset, size)| read_in(offset, size)),
    ];
    (opcode, node, body).prop_map(|(opcode, node, body)| {
        let length = u32::try_from(40 + body.len()).expect("short");
        request(length, opcode, 7, node, &body)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn no_bytes_are_too_much_for_the_server(
        requests in prop::collection::vec((prop_oneof![
            any_request(), prop::collection::vec(any::<u8>(), 0..200),
        ], 0..5000_u32), 1..80),
    ) {
        let host = small_share();
        let mut guest = Guest::of(host.path(), EPOCH);
        guest.walk("s/d/f");
        for (request, room) in requests {
            guest.raw(&request, room);
        }
        // What a good guest asks is still answered.
        guest.init();
        let file = guest.walk("s/f");
        prop_assert_eq!(guest.read(file, 0, 100), Ok(b"content".to_vec()));
    }

    #[test]
    fn no_descriptors_are_too_much_for_the_device(
        table in prop::collection::vec((
            prop_oneof![Just(0x40_0000_u64), 0x1_0000..0x3_0000_u64, 0x3f_ff00..0x40_0100_u64, any::<u64>()],
            prop_oneof![0..64_u32, 0..5000_u32, any::<u32>()],
            prop_oneof![Just(NEXT), Just(WRITE), Just(NEXT | WRITE), Just(INDIRECT), any::<u16>()],
            prop_oneof![0..16_u16, any::<u16>()],
        ), 16),
        heads in prop::collection::vec(0..16_u16, 1..40),
        bytes in prop::collection::vec(any::<u8>(), 512),
    ) {
        let host = small_share();
        let mut guest = Guest::of(host.path(), EPOCH);
        guest.memory.write_slice(&bytes, GuestAddress(0x3f_ff00)).expect("memory");
        for (index, (address, length, flags, next)) in (0..).zip(table) {
            guest.ring.describe(&guest.memory, index, (address, length), flags, next);
        }
        for head in heads {
            guest.ring.offer(&guest.memory, head);
            // The ring itself lies where buffers may be, so it may break; it must end.
            if guest.kick().is_err() {
                break;
            }
        }
    }
}
