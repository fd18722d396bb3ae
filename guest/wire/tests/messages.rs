//! Every message survives its bytes, and no bytes make the decoders panic, allocate what they merely claim, or accept
//! what they would not have written.

use kiln_wire::*;
use proptest::collection::vec;
use proptest::prelude::*;

fn name() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9_.é-]{3,20}"
}

fn c_bytes(most: usize) -> impl Strategy<Value = Vec<u8>> {
    vec(1..=255u8, 0..most)
}

fn absolute_path() -> impl Strategy<Value = Vec<u8>> {
    c_bytes(60).prop_map(|mut path| {
        path.insert(0, b'/');
        path
    })
}

fn relative_path() -> impl Strategy<Value = Vec<u8>> {
    vec("[^/\0]{3,9}", 0..5).prop_map(|names| names.join("/").into_bytes())
}

fn source() -> impl Strategy<Value = Source> {
    prop_oneof![
        name().prop_map(Source::Share),
        (name(), name(), any::<bool>()).prop_map(|(serial, filesystem, read_only)| Source::Disk {
            serial,
            filesystem,
            read_only
        }),
        name().prop_map(Source::Modules),
        relative_path().prop_map(|path| Source::Within([b"/", &path[..]].concat())),
    ]
}

fn mount() -> impl Strategy<Value = Mount> {
    let access = prop_oneof![Just(Access::ReadOnly), Just(Access::Layered), Just(Access::Direct)];
    (source(), absolute_path(), access).prop_map(|(source, target, access)| Mount { source, target, access })
}

fn scratch() -> impl Strategy<Value = Scratch> {
    (name(), any::<u64>()).prop_map(|(serial, bytes)| Scratch { serial, bytes })
}

fn seed() -> impl Strategy<Value = [u8; 64]> {
    any::<[u8; 32]>().prop_map(|half| {
        let mut seed = [0; 64];
        seed[..32].copy_from_slice(&half);
        seed
    })
}

fn setup() -> impl Strategy<Value = Setup> {
    (
        (seed(), any::<bool>(), any::<i64>(), 0..1_000_000_000u32),
        source(),
        (proptest::option::of(scratch()), any::<u64>(), any::<u32>(), name()),
        vec(mount(), 0..5),
        vec(name(), 0..5),
    )
        .prop_map(
            |(
                (seed, warm_up, seconds, nanoseconds),
                root,
                (scratch, layer_bytes, processes, hostname),
                mounts,
                load_modules,
            )| {
                let clock = Clock { seconds, nanoseconds };
                Setup {
                    seed,
                    warm_up,
                    clock,
                    root,
                    scratch,
                    layer_bytes,
                    processes,
                    mounts,
                    hostname,
                    load_modules,
                }
            },
        )
}

fn size() -> impl Strategy<Value = TerminalSize> {
    any::<(u16, u16)>().prop_map(|(rows, columns)| TerminalSize { rows, columns })
}

fn exec() -> impl Strategy<Value = Exec> {
    let terminal = proptest::option::of(size());
    let rest = (any::<(u64, u64, bool)>(), terminal);
    (any::<u32>(), vec(c_bytes(30), 1..6), vec(c_bytes(30), 0..6), c_bytes(60), rest).prop_map(
        |(id, argv, env, cwd, ((timeout_ms, grace_ms, stdin), terminal))| Exec {
            id,
            argv,
            env,
            cwd,
            timeout_ms,
            grace_ms,
            stdin,
            terminal,
        },
    )
}

fn to_agent() -> impl Strategy<Value = ToAgent> {
    prop_oneof![
        any::<u16>().prop_map(|version| ToAgent::Hello { version }),
        setup().prop_map(ToAgent::Setup),
        setup().prop_map(ToAgent::Rehearse),
        (seed(), scratch()).prop_map(|(seed, scratch)| ToAgent::Settle { seed, scratch }),
        mount().prop_map(ToAgent::Mount),
        exec().prop_map(ToAgent::Exec),
        (any::<u32>(), 1..=u32::MAX).prop_map(|(id, bytes)| ToAgent::Credit { id, bytes }),
        (any::<u32>(), size()).prop_map(|(id, size)| ToAgent::Resize { id, size }),
        (any::<u32>(), vec(any::<u8>(), 0..200)).prop_map(|(id, data)| ToAgent::Stdin { id, data }),
        (any::<u32>(), 1..=64u8).prop_map(|(id, signal)| ToAgent::Signal { id, signal }),
        absolute_path().prop_map(|target| ToAgent::List { target }),
        vec(any::<u32>(), 0..50).prop_map(|ordinals| ToAgent::Fetch { ordinals }),
        Just(ToAgent::PowerOff),
    ]
}

fn entry_kind() -> impl Strategy<Value = EntryKind> {
    prop_oneof![
        any::<bool>().prop_map(|opaque| EntryKind::Directory { opaque }),
        any::<u64>().prop_map(|size| EntryKind::File { size }),
        c_bytes(60).prop_map(EntryKind::Symlink),
        any::<u32>().prop_map(|ordinal| EntryKind::HardLink { ordinal }),
        Just(EntryKind::Whiteout),
        any::<(u32, u32)>().prop_map(|(major, minor)| EntryKind::CharDevice { major, minor }),
        any::<(u32, u32)>().prop_map(|(major, minor)| EntryKind::BlockDevice { major, minor }),
        Just(EntryKind::Fifo),
        Just(EntryKind::Socket),
    ]
}

fn entry() -> impl Strategy<Value = Entry> {
    (
        any::<u32>(),
        relative_path(),
        entry_kind(),
        (0..=0o7777u16, any::<u32>(), any::<u32>()),
        (any::<i64>(), 0..1_000_000_000u32),
        vec((vec(1..=255u8, 1..20), vec(any::<u8>(), 0..50)), 0..4),
    )
        .prop_map(
            |(ordinal, path, kind, (mode, uid, gid), (mtime_seconds, mtime_nanoseconds), xattrs)| Entry {
                ordinal,
                path,
                kind,
                mode,
                uid,
                gid,
                mtime_seconds,
                mtime_nanoseconds,
                xattrs,
            },
        )
}

fn usage() -> impl Strategy<Value = Usage> {
    any::<(u64, u64, u64, u64, u64, u32, u32)>().prop_map(
        |(wall_us, user_us, system_us, max_rss_bytes, peak_memory_bytes, oom_kills, refused_processes)| {
            Usage {
                wall_us,
                user_us,
                system_us,
                max_rss_bytes,
                peak_memory_bytes,
                oom_kills,
                refused_processes,
            }
        },
    )
}

fn outcome() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        any::<u8>().prop_map(Outcome::Exit),
        any::<u8>().prop_map(Outcome::Signal),
        Just(Outcome::TimedOut)
    ]
}

fn from_agent() -> impl Strategy<Value = FromAgent> {
    let stream = prop_oneof![Just(Stream::Stdout), Just(Stream::Stderr)];
    prop_oneof![
        (any::<(u16, u64, u64, u16)>(), name()).prop_map(
            |((version, uptime_us, memory_bytes, cpus), kernel)| {
                FromAgent::Ready { version, kernel, uptime_us, memory_bytes, cpus }
            }
        ),
        Just(FromAgent::SetupDone),
        Just(FromAgent::Mounted),
        (any::<u32>(), 1..=u32::MAX).prop_map(|(id, bytes)| FromAgent::Credit { id, bytes }),
        (".{0,40}", any::<u16>()).prop_map(|(what, errno)| FromAgent::Failed { what, errno }),
        any::<u32>().prop_map(|id| FromAgent::Started { id }),
        (any::<(u32, u16)>(), ".{0,40}", ".{0,40}")
            .prop_map(|((id, errno), what, why)| FromAgent::ExecFailed { id, what, errno, why }),
        (any::<u32>(), stream, vec(any::<u8>(), 1..200)).prop_map(|(id, stream, data)| FromAgent::Output {
            id,
            stream,
            data
        }),
        (any::<u32>(), outcome(), usage()).prop_map(|(id, outcome, usage)| FromAgent::Exited {
            id,
            outcome,
            usage
        }),
        entry().prop_map(FromAgent::Entry),
        any::<u32>().prop_map(|entries| FromAgent::ListDone { entries }),
        any::<u32>().prop_map(|ordinal| FromAgent::FileStart { ordinal }),
        (any::<u64>(), vec(any::<u8>(), 0..200))
            .prop_map(|(offset, data)| FromAgent::FileData { offset, data }),
        any::<u64>().prop_map(|size| FromAgent::FileEnd { size }),
        Just(FromAgent::FetchDone),
        ".{0,40}".prop_map(FromAgent::Log),
        Just(FromAgent::Bye),
    ]
}

/// Decodes hostile bytes both ways. What is accepted must be exactly what would have been written: the encoding has one
/// form, so nothing can hide in a second one.
fn survives(bytes: &[u8]) {
    if let Ok(message) = ToAgent::decode(bytes) {
        assert_eq!(message.encode(), bytes);
    }
    if let Ok(message) = FromAgent::decode(bytes) {
        assert_eq!(message.encode(), bytes);
    }
}

/// Truncates at every position, flips a bit of every byte, and plants the largest length at every position.
fn torment(bytes: &[u8]) {
    for cut in 0..bytes.len() {
        let start = &bytes[..cut];
        assert!(
            ToAgent::decode(start).is_err() && FromAgent::decode(start).is_err(),
            "cut at {cut} was accepted"
        );
    }
    let mut changed = bytes.to_vec();
    for position in 0..bytes.len() {
        changed[position] ^= 1 << (position % 8);
        survives(&changed);
        changed[position] = bytes[position];
        for length in [u32::MAX, 0, 1] {
            if let Some(field) = changed.get_mut(position..position + 4) {
                field.copy_from_slice(&length.to_le_bytes());
                survives(&changed);
                changed.copy_from_slice(bytes);
            }
        }
    }
    changed.push(0);
    assert!(
        ToAgent::decode(&changed).is_err() && FromAgent::decode(&changed).is_err(),
        "a trailing byte was accepted"
    );
}

proptest! {
    #[test]
    fn every_message_to_the_agent_survives_its_bytes(message in to_agent()) {
        let bytes = message.encode();
        prop_assert_eq!(ToAgent::decode(&bytes), Ok(message));
        torment(&bytes);
    }

    #[test]
    fn every_message_from_the_agent_survives_its_bytes(message in from_agent()) {
        let bytes = message.encode();
        prop_assert_eq!(FromAgent::decode(&bytes), Ok(message));
        torment(&bytes);
    }

    #[test]
    fn random_bytes_never_panic(tag in any::<u8>(), mut bytes in vec(any::<u8>(), 0..300)) {
        survives(&bytes);
        bytes.insert(0, tag & 0x9f);
        survives(&bytes);
    }

    #[test]
    fn random_streams_never_panic(pieces in vec(vec(prop_oneof![Just(0u8), any::<u8>()], 0..40), 0..20)) {
        let mut reader = FrameReader::new(64);
        for piece in &pieces {
            reader.push(piece);
            while let Ok(Some(payload)) = reader.next() {
                prop_assert!((1..=64).contains(&payload.len()));
                survives(&payload);
            }
        }
    }
}

fn exec_with(argv: Vec<Vec<u8>>, env: Vec<Vec<u8>>) -> ToAgent {
    ToAgent::Exec(Exec {
        id: 1,
        argv,
        env,
        cwd: b"/".to_vec(),
        timeout_ms: 0,
        grace_ms: 0,
        stdin: false,
        terminal: None,
    })
}

fn refused(message: &ToAgent) -> DecodeError {
    ToAgent::decode(&message.encode()).expect_err("over a limit")
}

#[test]
fn the_largest_messages_fit_their_frames() {
    let half = MAX_ARGUMENT_BYTES / 2 / MAX_ARGUMENTS;
    let strings = || vec![vec![b'x'; half]; MAX_ARGUMENTS];
    let largest = exec_with(strings(), strings());
    let bytes = largest.encode();
    assert!(bytes.len() <= MAX_PAYLOAD_BYTES);
    assert_eq!(ToAgent::decode(&bytes), Ok(largest));

    let largest = FromAgent::Entry(Entry {
        ordinal: 0,
        path: vec![vec![b'p'; 255]; 15].join(&b'/'),
        kind: EntryKind::Symlink(vec![b's'; MAX_PATH_BYTES]),
        mode: 0,
        uid: 0,
        gid: 0,
        mtime_seconds: 0,
        mtime_nanoseconds: 0,
        xattrs: vec![(vec![b'n'; MAX_NAME_BYTES], vec![b'v'; MAX_XATTR_BYTES]); MAX_XATTRS],
    });
    let bytes = largest.encode();
    assert!(bytes.len() <= MAX_FROM_AGENT_BYTES);
    assert_eq!(FromAgent::decode(&bytes), Ok(largest));
}

#[test]
fn one_more_than_a_limit_is_refused() {
    let over = MAX_DATA_BYTES + 1;
    assert_eq!(
        refused(&ToAgent::Stdin { id: 0, data: vec![0; over] }),
        DecodeError::Limit { what: "standard input", claimed: over, limit: MAX_DATA_BYTES }
    );
    refused(&ToAgent::Fetch { ordinals: vec![0; MAX_FETCH + 1] });
    refused(&ToAgent::List { target: vec![b'/'; MAX_PATH_BYTES + 1] });
    refused(&exec_with(vec![vec![]; MAX_ARGUMENTS + 1], vec![]));
    refused(&exec_with(vec![vec![b'x'; MAX_ARGUMENT_BYTES + 1]], vec![]));
    // The limit is on arguments and environment together.
    refused(&exec_with(vec![vec![b'x'; MAX_ARGUMENT_BYTES]], vec![vec![b'x']]));
    assert!(FromAgent::decode(&FromAgent::Log("x".repeat(MAX_TEXT_BYTES + 1)).encode()).is_err());
}

#[test]
fn strings_that_system_calls_cannot_take_are_refused() {
    refused(&exec_with(vec![], vec![]));
    refused(&exec_with(vec![b"a\0b".to_vec()], vec![]));
    refused(&exec_with(vec![b"a".to_vec()], vec![b"A=\0".to_vec()]));
    refused(&ToAgent::List { target: b"relative".to_vec() });
    refused(&ToAgent::Signal { id: 0, signal: 0 });
    refused(&ToAgent::Signal { id: 0, signal: 65 });
}

#[test]
fn messages_that_cost_nothing_are_refused() {
    // No credit bounds how many there are.
    let credit = ToAgent::Credit { id: 1, bytes: 0 };
    assert_eq!(refused(&credit), DecodeError::Invalid { what: "credit" });
    for message in [
        FromAgent::Credit { id: 1, bytes: 0 },
        FromAgent::Output { id: 1, stream: Stream::Stdout, data: Vec::new() },
    ] {
        assert!(FromAgent::decode(&message.encode()).is_err(), "{message:?}");
    }
}

#[test]
fn a_mount_after_the_setup_is_held_to_the_same_paths() {
    let source = Source::Share("x".into());
    for target in [&b"relative"[..], b"", b"/a\0b"] {
        refused(&ToAgent::Mount(Mount {
            source: source.clone(),
            target: target.to_vec(),
            access: Access::ReadOnly,
        }));
    }
}

#[test]
fn an_entry_cannot_leave_its_folder() {
    for path in ["/", "/a", "a/", "a//b", ".", "..", "a/../b", "../a", "a/.", "a\0b"] {
        let entry = Entry {
            ordinal: 0,
            path: path.as_bytes().to_vec(),
            kind: EntryKind::Fifo,
            mode: 0,
            uid: 0,
            gid: 0,
            mtime_seconds: 0,
            mtime_nanoseconds: 0,
            xattrs: vec![],
        };
        let bytes = FromAgent::Entry(entry).encode();
        assert_eq!(
            FromAgent::decode(&bytes),
            Err(DecodeError::Invalid { what: "path of an entry" }),
            "{path:?} was accepted"
        );
    }
}

#[test]
fn text_must_be_utf8() {
    let mut bytes = FromAgent::Log("ab".into()).encode();
    *bytes.last_mut().expect("not empty") = 0xff;
    assert_eq!(FromAgent::decode(&bytes), Err(DecodeError::Utf8 { what: "log line" }));
}
