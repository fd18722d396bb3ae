//! Guests that do what no kernel does. The names are those of the project's list of cases.

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
fn fs01_names_that_lead_elsewhere_are_refused_and_not_noted() {
    let host = small_share();
    let mut guest = Guest::of(host.path(), EPOCH);
    let root = guest.walk("s");
    for directory in [TOP, root] {
        for name in [b"..".as_slice(), b".", b"", b"/", b"a/b", b"/etc/passwd", b"d/f", b"../s"] {
            assert_eq!(guest.lookup(directory, name).err(), Some(libc::EINVAL), "{name:?}");
        }
    }
    assert!(guest.share_record().missed.is_empty());
}

#[test]
fn fs02_names_without_or_with_inner_zero_and_too_long_ones_are_refused() {
    let host = small_share();
    let mut guest = Guest::of(host.path(), EPOCH);
    let root = guest.walk("s");
    assert_eq!(guest.ask(op::LOOKUP, root, b"f"), Err(libc::EINVAL));
    assert_eq!(guest.ask(op::LOOKUP, root, b"f\0g\0"), Err(libc::EINVAL));
    assert_eq!(guest.ask(op::LOOKUP, root, b""), Err(libc::EINVAL));
    assert_eq!(guest.lookup(root, &[b'x'; 255]).expect("absent").nodeid.get(), 0);
    assert_eq!(guest.lookup(root, &[b'x'; 256]).err(), Some(libc::ENAMETOOLONG));
    let mebibyte = vec![b'x'; 900_000];
    assert_eq!(guest.ask(op::LOOKUP, root, &mebibyte), Err(libc::ENAMETOOLONG));
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
fn fs04_a_link_leads_nowhere_on_the_host() {
    let host = small_share();
    let mut guest = Guest::of(host.path(), EPOCH);
    let link = guest.walk("s/x");
    assert_eq!(guest.lookup(link, b"etc").err(), Some(libc::ENOTDIR));
    assert_eq!(guest.read(link, 0, 100), Err(libc::EINVAL));
    assert_eq!(guest.ask(op::READDIR, link, &read_in(0, 4096)), Err(libc::ENOTDIR));
    assert_eq!(guest.ask(op::READLINK, link, b""), Ok(b"/".to_vec()));
}

#[test]
fn fs05_what_is_swapped_for_a_link_meanwhile_is_not_followed() {
    let (host, secret) = (small_share(), tempfile::tempdir().expect("directory"));
    std::fs::write(secret.path().join("f"), "secret").expect("file");
    let mut guest = Guest::of(host.path(), EPOCH);
    let (directory, file) = (guest.walk("s/d"), guest.walk("s/f"));
    std::fs::rename(host.path().join("d"), host.path().join("was")).expect("rename");
    symlink(secret.path(), host.path().join("d")).expect("link");
    std::fs::remove_file(host.path().join("f")).expect("remove");
    symlink(secret.path().join("f"), host.path().join("f")).expect("link");
    assert_eq!(guest.lookup(directory, b"f").err(), Some(libc::ESTALE));
    assert_eq!(guest.ask(op::READDIR, directory, &read_in(0, 4096)), Err(libc::ESTALE));
    assert_eq!(guest.read(file, 0, 100), Err(libc::ESTALE));
    let changed = guest.share_record().changed;
    let changed: Vec<_> = changed.iter().map(|entry| (entry.path.to_string(), entry.what)).collect();
    use crate::fs::record::Change::Replaced;
    assert_eq!(changed, [("d".to_owned(), Replaced), ("f".to_owned(), Replaced)]);
}

#[test]
fn fs10_only_nodes_that_the_guest_holds_answer() {
    let host = small_share();
    let mut guest = Guest::of(host.path(), EPOCH);
    let file = guest.walk("s/f");
    for node in [0, 3, 5, 1000, u64::from(u32::MAX), u64::from(u32::MAX) + 2, u64::MAX] {
        assert_ne!(node, file);
        assert_eq!(guest.attr(node).err(), Some(libc::ESTALE), "{node}");
        assert_eq!(guest.read(node, 0, 1), Err(libc::ESTALE), "{node}");
        assert_eq!(guest.lookup(node, b"f").err(), Some(libc::ESTALE), "{node}");
    }
    assert_eq!(guest.send(op::FORGET, file, &1_u64.to_le_bytes(), 0), None);
    assert_eq!(guest.attr(file).err(), Some(libc::ESTALE));
    assert_eq!(guest.walk("s/f"), file);
    assert!(guest.attr(file).is_ok());
}

#[test]
fn fs11_fs12_counts_of_lookups_neither_wrap_nor_lie() {
    let host = small_share();
    let mut guest = Guest::of(host.path(), EPOCH);
    let file = guest.walk("s/f");
    for _ in 0..2 {
        guest.walk("s/f");
    }
    // Three are held. More are given back than that, then it starts again from none.
    assert_eq!(guest.send(op::FORGET, file, &2_u64.to_le_bytes(), 0), None);
    assert!(guest.attr(file).is_ok());
    assert_eq!(guest.send(op::FORGET, file, &u64::MAX.to_le_bytes(), 0x1000), None);
    assert_eq!(guest.attr(file).err(), Some(libc::ESTALE));
    assert_eq!(guest.send(op::FORGET, file, &u64::MAX.to_le_bytes(), 0), None);
    guest.walk("s/f");
    assert!(guest.attr(file).is_ok());
    // A batch that claims 2^32-1 and holds one, and one that is cut off.
    let one = [file.to_le_bytes(), 1_u64.to_le_bytes()].concat();
    let lie = [&u32::MAX.to_le_bytes(), &[0; 4], &one[..]].concat();
    assert_eq!(guest.send(op::BATCH_FORGET, 0, &lie, 0), None);
    assert_eq!(guest.attr(file).err(), Some(libc::ESTALE));
    assert_eq!(guest.send(op::BATCH_FORGET, 0, &lie[..20], 0), None);
    assert_eq!(guest.send(op::FORGET, file, b"", 0), None);
    // The top cannot be given back.
    assert_eq!(guest.send(op::FORGET, TOP, &u64::MAX.to_le_bytes(), 0), None);
    assert!(guest.attr(TOP).is_ok());
}

#[test]
fn fs14_reads_of_any_size_and_place_stay_within_room_and_file() {
    let host = small_share();
    let mut guest = Guest::of(host.path(), EPOCH);
    let (file, directory) = (guest.walk("s/f"), guest.walk("s/d"));
    assert_eq!(guest.read(file, 0, u32::MAX), Ok(b"content".to_vec()));
    assert_eq!(guest.read(file, 0, 0), Ok(vec![]));
    assert_eq!(guest.read(file, i64::MAX.cast_unsigned() - (1 << 20), u32::MAX), Ok(vec![]));
    for offset in [i64::MAX.cast_unsigned(), 1 << 63, u64::MAX, u64::MAX - 10] {
        assert_eq!(guest.read(file, offset, 100), Err(libc::EINVAL));
    }
    assert_eq!(guest.read(directory, 0, 10), Err(libc::EISDIR));
    assert_eq!(guest.ask(op::READ, file, &read_in(0, 10)[..39]), Err(libc::EINVAL));
    // Less room than asked for, and none.
    assert_eq!(guest.send(op::READ, file, &read_in(0, 100), 16 + 3), Some(Ok(b"con".to_vec())));
    assert_eq!(guest.send(op::READ, file, &read_in(0, 100), 16), Some(Ok(vec![])));
}

#[test]
fn fs15_listings_of_any_size_and_place_end() {
    let host = small_share();
    let mut guest = Guest::of(host.path(), EPOCH);
    let (root, file) = (guest.walk("s"), guest.walk("s/f"));
    for (offset, size) in [(0, 0), (0, 1), (2, 31), (3, 8)] {
        assert_eq!(guest.ask(op::READDIR, root, &read_in(offset, size)), Err(libc::EINVAL));
    }
    assert_eq!(guest.ask(op::READDIR, root, &read_in(0, 32)).map(|answer| answer.len()), Ok(32));
    assert_eq!(guest.ask(op::READDIR, root, &read_in(0, u32::MAX)).map(|answer| answer.len()), Ok(160));
    for offset in [5, 6, 1000, u64::from(u32::MAX) + 2, u64::MAX - 1, u64::MAX] {
        assert_eq!(guest.ask(op::READDIR, root, &read_in(offset, 4096)), Ok(vec![]), "{offset}");
        assert_eq!(guest.ask(op::READDIR, TOP, &read_in(offset, 4096)), Ok(vec![]), "{offset}");
    }
    assert_eq!(guest.ask(op::READDIR, file, &read_in(0, 4096)), Err(libc::ENOTDIR));
}

#[test]
fn fs16_malformed_questions_about_attributes_are_refused() {
    let host = small_share();
    let mut guest = Guest::of(host.path(), EPOCH);
    let file = guest.walk("s/f");
    let sized = |size: u32, name: &[u8]| [&size.to_le_bytes(), &[0; 4], name].concat();
    for body in [b"".to_vec(), vec![0; 7], sized(10, b""), sized(10, b"user.a"), sized(10, b"a\0b\0")] {
        assert_eq!(guest.ask(op::GETXATTR, file, &body), Err(libc::EINVAL), "{body:?}");
    }
    assert_eq!(guest.ask(op::GETXATTR, file, &sized(u32::MAX, &[b'x'; 5000])), Err(libc::ENAMETOOLONG));
    assert_eq!(guest.ask(op::GETXATTR, file, &sized(u32::MAX, b"user.a\0")), Err(libc::ENODATA));
    assert_eq!(guest.ask(op::LISTXATTR, file, &[0; 7]), Err(libc::EINVAL));
}

#[test]
fn fs17_a_header_that_does_not_fit_its_request_is_an_error() {
    let host = small_share();
    let mut guest = Guest::of(host.path(), EPOCH);
    for length in [0, 39, 41, 1 << 20, (1 << 20) + 4097, u32::MAX] {
        let answer = guest.raw(&request(length, op::GETATTR, 9, TOP, &[0; 16]), 0x1000);
        assert_eq!(answer.len(), 16, "{length}");
        assert_eq!(answer[4..8], (-libc::EIO).to_le_bytes());
    }
    for length in 0..40 {
        assert!(guest.raw(&request(40, op::GETATTR, 9, TOP, b"")[..length], 0x1000).is_empty());
    }
}

#[test]
fn fs18_fs26_what_writes_is_refused_and_what_is_unknown_is_said_to_be() {
    let host = small_share();
    let before = std::fs::metadata(host.path().join("f")).expect("stat").modified().expect("time");
    let mut guest = Guest::of(host.path(), EPOCH);
    let file = guest.walk("s/f");
    let writes = [4, 6, 8, 9, 10, 11, 12, 13, 16, 21, 24, 35, 43, 45, 47, 51];
    let answered = [1, 2, 3, 5, 15, 17, 22, 23, 26, 28, 36, 38, 41, 42];
    for opcode in (0..=65_535).chain([1 << 20, u32::MAX]).filter(|opcode| !answered.contains(opcode)) {
        let expected = if writes.contains(&opcode) { libc::EROFS } else { libc::ENOSYS };
        assert_eq!(guest.ask(opcode, file, b"x\0y\0"), Err(expected), "{opcode}");
    }
    assert_eq!(std::fs::read(host.path().join("f")).expect("file"), b"content");
    assert_eq!(std::fs::metadata(host.path().join("f")).expect("stat").modified().expect("time"), before);
}

#[test]
fn fs19_nothing_is_answered_before_init_and_init_may_come_again() {
    let host = small_share();
    let mut guest = Guest::silent(16);
    guest.share("s", host.path(), EPOCH);
    for opcode in [op::LOOKUP, op::GETATTR, op::READ, op::READDIR, op::STATFS, 9999] {
        assert_eq!(guest.ask(opcode, TOP, b"s\0"), Err(libc::EIO));
    }
    let init = |major: u32, minor: u32| [major, minor, 0, 0].as_bytes().to_vec();
    for (major, minor) in [(0, 0), (6, 99), (7, 0), (7, 30)] {
        assert_eq!(guest.ask(op::INIT, 0, &init(major, minor)), Err(libc::EPROTO));
    }
    assert_eq!(guest.ask(op::INIT, 0, b"short"), Err(libc::EINVAL));
    // A newer major version is told ours, and asks again.
    assert_eq!(guest.ask(op::INIT, 0, &init(99, 0)).map(|answer| answer[0]), Ok(7));
    assert_eq!(guest.attr(TOP).err(), Some(libc::EIO));
    // A newer minor version is taken down to ours, an older one kept.
    assert_eq!(guest.ask(op::INIT, 0, &init(7, 99)).map(|answer| answer[4]), Ok(41));
    assert_eq!(guest.ask(op::INIT, 0, &init(7, 31)).map(|answer| answer[4]), Ok(31));
    let file = guest.walk("s/f");
    guest.init();
    assert_eq!(guest.attr(file).err(), Some(libc::ESTALE));
    guest.walk("s/f");
    assert_eq!(guest.ask(op::DESTROY, 0, b""), Ok(vec![]));
    assert_eq!(guest.attr(TOP).err(), Some(libc::EIO));
}

#[test]
fn fs21_interrupts_are_ignored() {
    let host = small_share();
    let mut guest = Guest::of(host.path(), EPOCH);
    for unique in 0..10_000_u64 {
        assert_eq!(guest.send(op::INTERRUPT, 0, &unique.to_le_bytes(), 0), None);
    }
    assert_eq!(guest.send(op::INTERRUPT, 0, b"", 0x1000), None);
    assert_eq!(guest.send(op::NOTIFY_REPLY, 0, b"", 0x1000), None);
}

#[test]
fn fs22_open_descriptors_stay_within_the_cache() {
    let host = tempfile::tempdir().expect("directory");
    for number in 0..200 {
        std::fs::write(host.path().join(number.to_string()), number.to_string()).expect("file");
    }
    let mut guest = Guest::silent(4);
    guest.share("s", host.path(), EPOCH);
    guest.init();
    // Descriptors of this share only: other tests run in the same process.
    let held = || {
        let descriptors = std::fs::read_dir("/proc/self/fd").expect("descriptors");
        let targets = descriptors.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
        targets.filter(|target| target.starts_with(host.path())).count()
    };
    for round in 0..3 {
        for number in 0..200 {
            let node = guest.walk(&format!("s/{number}"));
            assert_eq!(guest.read(node, 0, 10), Ok(number.to_string().into_bytes()));
        }
        assert!(held() <= 5, "round {round}: {}", held());
    }
    guest.record();
    assert_eq!(held(), 1);
}

#[test]
fn fs27_no_room_for_an_answer_means_none_and_nothing_held() {
    let host = small_share();
    let mut guest = Guest::of(host.path(), EPOCH);
    let root = guest.walk("s");
    for room in 0..16 {
        assert_eq!(guest.send(op::LOOKUP, root, b"f\0", room), None);
        assert_eq!(guest.send(op::GETATTR, root, &[0; 16], room), None);
    }
    for room in 16..16 + 128 {
        assert_eq!(guest.send(op::LOOKUP, root, b"f\0", room), Some(Err(libc::EIO)));
    }
    assert!(guest.share_record().entries.iter().all(|entry| entry.path.0.is_empty()));
    assert!(matches!(guest.send(op::LOOKUP, root, b"f\0", 16 + 128), Some(Ok(_))));
    assert_eq!(guest.send(op::STATFS, root, b"", 16 + 79), Some(Err(libc::EIO)));
}

#[test]
fn hv06_a_broken_ring_stops_the_device_without_a_loop() {
    let host = small_share();
    let mut guest = Guest::of(host.path(), EPOCH);
    guest.ring.set_available(&guest.memory, 5000);
    assert!(guest.kick().is_err());
    assert!(guest.ring.used(&guest.memory).is_none());
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
