//! Agents that lie: a guest owns its end of the wire, and whatever it sends, the host gives an error, does not panic and
//! does not set memory aside for what is merely claimed.

use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use kiln::agent::{ExecEnd, Limits, Listing, Session, SessionError, TransferError};
use kiln::machine::fake::{Fake, Guest};
use kiln::machine::{Backend, Carrier, Spec};
use kiln::store::Store;
use kiln_wire::{
    Entry, EntryKind, Exec, FrameReader, FromAgent, MAX_DATA_BYTES, MAX_FROM_AGENT_BYTES, MAX_PAYLOAD_BYTES,
    Outcome, Setup, Source, Stream, ToAgent, Usage, VERSION, encode_frame,
};

/// How long a test waits for a host that waits for ever.
const PATIENCE: Duration = Duration::from_secs(20);

/// The agent's end, for one that speaks frames when it wants to.
struct Liar {
    stream: UnixStream,
    reader: FrameReader,
}

impl Liar {
    fn say(&mut self, message: &FromAgent) {
        self.send(&encode_frame(&message.encode()));
    }

    /// Bytes as they are. A host that has hung up is what most of these lead to.
    fn send(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
    }

    fn hear(&mut self) -> Option<ToAgent> {
        let mut buffer = [0; 4096];
        loop {
            if let Some(payload) = self.reader.next().expect("the host is honest") {
                return Some(ToAgent::decode(&payload).expect("the host is honest"));
            }
            match self.stream.read(&mut buffer) {
                Ok(count @ 1..) => self.reader.push(&buffer[..count]),
                _ => return None,
            }
        }
    }

    fn ready(&mut self) {
        self.say(&ready(VERSION));
        assert_eq!(self.hear(), Some(ToAgent::Hello { version: VERSION }));
    }
}

fn ready(version: u16) -> FromAgent {
    FromAgent::Ready { version, kernel: "6.12.0".into(), uptime_us: 1, memory_bytes: 1 << 30, cpus: 1 }
}

fn spec() -> Spec {
    Spec {
        kernel: "kernel".into(),
        initramfs: "initramfs".into(),
        memory_bytes: 1 << 30,
        cpus: 1,
        shares: Vec::new(),
        disks: Vec::new(),
        carrier: Carrier::Serial,
        nested: false,
    }
}

/// The host's end of a machine whose agent is `liar`. It hangs up when `liar` returns.
fn wire(liar: impl FnOnce(&mut Liar) + Send + 'static) -> UnixStream {
    let guest: Guest = Box::new(move |stream, _| {
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        liar(&mut Liar { stream, reader: FrameReader::new(MAX_PAYLOAD_BYTES) });
    });
    let mut machine = Fake::new(vec![guest]).start(spec()).expect("a guest is prepared");
    machine.wire().expect("nobody took it")
}

fn open(liar: impl FnOnce(&mut Liar) + Send + 'static) -> Result<Session, SessionError> {
    Session::open(wire(liar), PATIENCE)
}

/// A session with an agent that was honest so far.
fn session(liar: impl FnOnce(&mut Liar) + Send + 'static) -> Session {
    open(|agent| {
        agent.ready();
        liar(agent);
    })
    .expect("the greeting was honest")
}

fn setup() -> Setup {
    Setup {
        seed: [7; 64],
        clock: kiln_wire::Clock { seconds: 0, nanoseconds: 0 },
        root: Source::Share("root".into()),
        scratch_serial: String::new(),
        layer_bytes: 0,
        mounts: Vec::new(),
        hostname: "kiln".into(),
        load_modules: Vec::new(),
    }
}

fn exec() -> Exec {
    Exec {
        id: 1,
        argv: vec![b"true".to_vec()],
        env: Vec::new(),
        cwd: b"/".to_vec(),
        timeout_ms: 0,
        grace_ms: 0,
        stdin: false,
    }
}

fn run(session: &mut Session) -> Result<ExecEnd, SessionError> {
    session.exec(exec(), None, &mut |_, _| Ok(()))
}

/// Every message that an agent may ever say, one of each.
fn every_message() -> Vec<FromAgent> {
    let data = b"data".to_vec();
    vec![
        ready(VERSION),
        FromAgent::SetupDone,
        FromAgent::Started { id: 1 },
        FromAgent::ExecFailed { id: 1, errno: 2, why: String::new() },
        FromAgent::Output { id: 1, stream: Stream::Stdout, data: data.clone() },
        FromAgent::Exited { id: 1, outcome: Outcome::Exit(0), usage: Usage::default() },
        FromAgent::Entry(entry(0, b"", EntryKind::Directory { opaque: false })),
        FromAgent::ListDone { entries: 0 },
        FromAgent::FileStart { ordinal: 0 },
        FromAgent::FileData { offset: 0, data },
        FromAgent::FileEnd { size: 0 },
        FromAgent::FetchDone,
        FromAgent::Bye,
        FromAgent::Failed { what: "do as it was told".into(), errno: 5 },
    ]
}

/// Bytes that are no message.
fn garbage() -> Vec<(&'static str, Vec<u8>)> {
    let frame = |payload: &[u8]| encode_frame(payload);
    let exited = FromAgent::Exited { id: 1, outcome: Outcome::Exit(0), usage: Usage::default() }.encode();
    vec![
        ("zeros", vec![0; 64]),
        ("text", b"Linux version 6.12.0 (somebody) #1 SMP\n".to_vec()),
        ("a length beyond any", vec![0xff; 8]),
        (
            "a length just over the cap",
            u32::try_from(MAX_FROM_AGENT_BYTES + 1).expect("small").to_le_bytes().to_vec(),
        ),
        ("an empty frame", frame(b"")),
        ("an unknown message", frame(&[0xee, 1, 2, 3])),
        ("a message cut short", frame(&exited[..exited.len() - 1])),
        ("a message and a byte", frame(&[&exited[..], &[0]].concat())),
    ]
}

#[test]
fn an_agent_that_is_silent_or_hangs_up_at_once_is_an_error() {
    assert!(matches!(open(|_| {}), Err(SessionError::Closed)));
    let started = Instant::now();
    let stream = wire(|agent| {
        agent.hear();
    });
    let silent = Session::open(stream, Duration::from_millis(200));
    assert!(matches!(silent, Err(SessionError::Silent { .. })), "{silent:?}");
    assert!(started.elapsed() < PATIENCE);
}

#[test]
fn an_agent_that_talks_without_saying_anything_is_silent() {
    // Log lines are no answer, and do not put the end of patience off.
    let stream = wire(|agent| {
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(2) {
            agent.say(&FromAgent::Log("still here".into()));
        }
    });
    let silent = Session::open(stream, Duration::from_millis(300));
    assert!(matches!(silent, Err(SessionError::Silent { .. })), "{silent:?}");
}

#[test]
fn another_version_is_refused_by_number() {
    let refused = open(|agent| agent.say(&ready(VERSION + 1))).expect_err("another version");
    assert!(matches!(refused, SessionError::Violation(_)), "{refused:?}");
    for number in [VERSION, VERSION + 1] {
        assert!(refused.to_string().contains(&number.to_string()), "{refused}");
    }
}

#[test]
fn garbage_is_an_error_in_every_place() {
    for (name, bytes) in garbage() {
        let greeting = bytes.clone();
        let refused = open(move |agent| agent.send(&greeting)).map(drop);
        assert!(matches!(refused, Err(SessionError::Violation(_))), "{name} as a greeting: {refused:?}");

        for place in ["setup", "exec", "list", "power off"] {
            let bytes = bytes.clone();
            let mut session = session(move |agent| {
                agent.hear();
                agent.send(&bytes);
            });
            let refused = match place {
                "setup" => session.setup(setup()),
                "exec" => run(&mut session).map(drop),
                "power off" => session.power_off(),
                _ => match Listing::receive(&mut session, b"/", &Limits::default()) {
                    Err(TransferError::Session(error)) => Err(error),
                    other => panic!("{name} as a list: {other:?}"),
                },
            };
            assert!(matches!(refused, Err(SessionError::Violation(_))), "{name} at {place}: {refused:?}");
        }
    }
}

#[test]
fn a_message_in_the_wrong_place_is_an_error_that_names_it() {
    type Place = (&'static str, fn(&mut Session) -> Result<(), SessionError>, &'static [&'static str]);
    let places: [Place; 3] = [
        ("setup", |session| session.setup(setup()), &["SetupDone"]),
        ("exec", |session| run(session).map(drop), &["Started", "Output", "Exited", "ExecFailed"]),
        ("power off", Session::power_off, &["Bye"]),
    ];
    for (place, act, good) in places {
        for message in every_message() {
            let name = format!("{message:?}");
            let name = name.split([' ', '(', '{']).next().expect("a name").to_owned();
            if good.contains(&name.as_str()) {
                continue;
            }
            let failed = name == "Failed";
            let mut session = session(move |agent| {
                agent.hear();
                agent.say(&message);
            });
            let refused = act(&mut session).expect_err(&name);
            if failed {
                assert!(refused.to_string().contains("do as it was told"), "{refused}");
            } else {
                assert!(matches!(refused, SessionError::Violation(_)), "{name} at {place}: {refused:?}");
            }
        }
    }
}

#[test]
fn what_comes_of_another_command_is_an_error() {
    for message in [
        FromAgent::Started { id: 2 },
        FromAgent::Output { id: 2, stream: Stream::Stderr, data: b"x".to_vec() },
        FromAgent::Exited { id: 2, outcome: Outcome::Exit(0), usage: Usage::default() },
        FromAgent::ExecFailed { id: 2, errno: 2, why: String::new() },
    ] {
        let mut session = session(move |agent| {
            agent.hear();
            agent.say(&message);
        });
        assert!(matches!(run(&mut session), Err(SessionError::Violation(_))));
    }
}

#[test]
fn an_errno_that_is_none_is_an_error_like_others() {
    for errno in [0, 2, 133, 4095, u16::MAX] {
        let mut session = session(move |agent| {
            agent.hear();
            agent.say(&FromAgent::ExecFailed { id: 1, errno, why: String::new() });
        });
        let Ok(ExecEnd::NotStarted { error, .. }) = run(&mut session) else { panic!("errno {errno}") };
        assert!(!error.to_string().is_empty());
    }
}

#[test]
fn hanging_up_is_an_error_at_every_stage() {
    let closed =
        |result: Result<(), SessionError>| assert!(matches!(result, Err(SessionError::Closed)), "{result:?}");
    let hang_up = || {
        session(|agent| {
            agent.hear();
        })
    };
    closed(hang_up().setup(setup()));
    closed(run(&mut hang_up()).map(drop));
    closed(hang_up().power_off());
    let listed = Listing::receive(&mut hang_up(), b"/", &Limits::default());
    assert!(matches!(listed, Err(TransferError::Session(SessionError::Closed))), "{listed:?}");
    // In the middle of a frame, of a command and of a list.
    let mut session1 = session(|agent| {
        agent.hear();
        agent.send(&encode_frame(&FromAgent::SetupDone.encode())[..3]);
    });
    closed(session1.setup(setup()));
    let mut session2 = session(|agent| {
        agent.hear();
        agent.say(&FromAgent::Started { id: 1 });
    });
    closed(run(&mut session2).map(drop));
}

#[test]
fn a_host_that_cannot_take_the_output_ends_the_command() {
    let mut session = session(|agent| {
        agent.hear();
        agent.say(&FromAgent::Output { id: 1, stream: Stream::Stdout, data: b"x".to_vec() });
        agent.hear();
    });
    let refused = session.exec(exec(), None, &mut |_, _| Err(io::ErrorKind::StorageFull.into()));
    assert!(matches!(refused, Err(SessionError::Output(_))));
}

#[test]
fn output_comes_in_order_and_apart_whatever_its_pieces() {
    let mut session = session(|agent| {
        agent.hear();
        agent.say(&FromAgent::Started { id: 1 });
        let mut bytes = Vec::new();
        for number in 0..1000_u32 {
            let stream = if number % 2 == 0 { Stream::Stdout } else { Stream::Stderr };
            let data = number.to_le_bytes().to_vec();
            bytes.extend(encode_frame(&FromAgent::Output { id: 1, stream, data }.encode()));
        }
        bytes.extend(encode_frame(
            &FromAgent::Output { id: 1, stream: Stream::Stdout, data: vec![9; MAX_DATA_BYTES] }.encode(),
        ));
        for piece in bytes.chunks(777) {
            agent.send(piece);
        }
        agent.say(&FromAgent::Exited { id: 1, outcome: Outcome::Signal(9), usage: Usage::default() });
    });
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let end = session.exec(exec(), None, &mut |stream, data| {
        if stream == Stream::Stdout { &mut out } else { &mut err }.extend_from_slice(data);
        Ok(())
    });
    assert!(matches!(end, Ok(ExecEnd::Ran(Outcome::Signal(9), _))));
    let numbers = |parity: u32| (0..1000_u32).filter(move |n| n % 2 == parity).flat_map(u32::to_le_bytes);
    assert_eq!(out[..2000], numbers(0).collect::<Vec<_>>());
    assert_eq!(out.len(), 2000 + MAX_DATA_BYTES);
    assert_eq!(err, numbers(1).collect::<Vec<_>>());
}

#[test]
fn standard_input_reaches_the_agent_whole_and_ends() {
    let (sender, receiver) = std::sync::mpsc::channel();
    let mut session = session(move |agent| {
        let mut bytes = Vec::new();
        while let Some(message) = agent.hear() {
            match message {
                ToAgent::Stdin { data, .. } if data.is_empty() => break,
                ToAgent::Stdin { data, .. } => bytes.extend(data),
                _ => {}
            }
        }
        sender.send(bytes).expect("the test waits");
        agent.say(&FromAgent::Exited { id: 1, outcome: Outcome::Exit(0), usage: Usage::default() });
    });
    let input: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let feed: Box<dyn Read + Send> = Box::new(io::Cursor::new(input.clone()));
    session.exec(Exec { stdin: true, ..exec() }, Some(feed), &mut |_, _| Ok(())).expect("an honest agent");
    assert!(receiver.recv().expect("it was sent") == input);
}

fn entry(ordinal: u32, path: &[u8], kind: EntryKind) -> Entry {
    Entry {
        ordinal,
        path: path.to_vec(),
        kind,
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime_seconds: 0,
        mtime_nanoseconds: 0,
        xattrs: Vec::new(),
    }
}

fn folder(ordinal: u32, path: &[u8]) -> Entry {
    entry(ordinal, path, EntryKind::Directory { opaque: false })
}

fn file(ordinal: u32, path: &[u8], size: u64) -> Entry {
    entry(ordinal, path, EntryKind::File { size })
}

/// What the host makes of a layer listed as `entries`.
fn list(entries: Vec<Entry>, limits: &Limits) -> Result<Listing, TransferError> {
    let mut session = session(move |agent| {
        agent.hear();
        let count = u32::try_from(entries.len()).expect("few");
        for entry in entries {
            agent.say(&FromAgent::Entry(entry));
        }
        agent.say(&FromAgent::ListDone { entries: count });
        agent.hear();
    });
    Listing::receive(&mut session, b"/x/project", limits)
}

#[test]
fn a_list_that_is_no_tree_is_refused() {
    let link = |ordinal, path: &[u8], to| entry(ordinal, path, EntryKind::HardLink { ordinal: to });
    let long_name = vec![b'n'; 256];
    let lists: Vec<(&str, Vec<Entry>)> = vec![
        ("a path that leaves", vec![folder(0, b""), file(1, b"../x", 0)]),
        ("a path that leaves and returns", vec![folder(0, b""), folder(1, b"a"), file(2, b"a/../../x", 0)]),
        ("an absolute path", vec![folder(0, b""), file(1, b"/etc/passwd", 0)]),
        ("a path with an empty part", vec![folder(0, b""), folder(1, b"a"), file(2, b"a//b", 0)]),
        ("a path that ends in a slash", vec![folder(0, b""), folder(1, b"a/")]),
        ("a path through itself", vec![folder(0, b""), file(1, b"./a", 0)]),
        ("a name that no file can have", vec![folder(0, b""), file(1, &long_name, 0)]),
        ("a file without its folder", vec![folder(0, b""), file(1, b"a/b", 0)]),
        ("a file before its folder", vec![folder(0, b""), file(1, b"a/b", 0), folder(2, b"a")]),
        ("a file in a file", vec![folder(0, b""), file(1, b"a", 0), file(2, b"a/b", 0)]),
        (
            "a file in a link",
            vec![
                folder(0, b""),
                entry(1, b"a", EntryKind::Symlink(b"/etc".to_vec())),
                file(2, b"a/passwd", 0),
            ],
        ),
        (
            "a file in what was removed",
            vec![folder(0, b""), entry(1, b"a", EntryKind::Whiteout), file(2, b"a/b", 0)],
        ),
        ("a path twice", vec![folder(0, b""), file(1, b"a", 0), file(2, b"a", 1)]),
        ("a folder that is a file too", vec![folder(0, b""), folder(1, b"a"), file(2, b"a", 1)]),
        ("a top that is a file", vec![file(0, b"", 0)]),
        ("entries out of order", vec![folder(0, b""), file(2, b"a", 0)]),
        ("an ordinal twice", vec![folder(0, b""), file(0, b"a", 0)]),
        ("a hard link to nothing", vec![folder(0, b""), link(1, b"a", 7)]),
        ("a hard link to itself", vec![folder(0, b""), link(1, b"a", 1)]),
        ("a hard link to a later file", vec![folder(0, b""), link(1, b"a", 2), file(2, b"b", 0)]),
        ("a hard link to a folder", vec![folder(0, b""), link(1, b"a", 0)]),
        (
            "a hard link to a hard link",
            vec![folder(0, b""), file(1, b"a", 0), link(2, b"b", 1), link(3, b"c", 2)],
        ),
        (
            "a hard link to what was removed",
            vec![folder(0, b""), entry(1, b"a", EntryKind::Whiteout), link(2, b"b", 1)],
        ),
        ("a link to nowhere at all", vec![folder(0, b""), entry(1, b"a", EntryKind::Symlink(Vec::new()))]),
        ("an impossible mode", vec![folder(0, b""), Entry { mode: 0o10_644, ..file(1, b"a", 0) }]),
        (
            "an impossible time",
            vec![folder(0, b""), Entry { mtime_nanoseconds: 1_000_000_000, ..file(1, b"a", 0) }],
        ),
    ];
    for (name, entries) in lists {
        let refused = list(entries, &Limits::default());
        assert!(
            matches!(refused, Err(TransferError::Session(SessionError::Violation(_)))),
            "{name}: {refused:?}"
        );
    }
}

#[test]
fn a_list_of_another_length_is_refused() {
    for count in [0, 2, u32::MAX] {
        let mut session = session(move |agent| {
            agent.hear();
            agent.say(&FromAgent::Entry(folder(0, b"")));
            agent.say(&FromAgent::ListDone { entries: count });
        });
        let refused = Listing::receive(&mut session, b"/", &Limits::default());
        assert!(matches!(refused, Err(TransferError::Session(SessionError::Violation(_)))), "{count}");
    }
}

#[test]
fn a_list_without_end_stops_at_its_limit() {
    let mut session = session(|agent| {
        agent.hear();
        agent.say(&FromAgent::Entry(folder(0, b"")));
        // It ends because the host hangs up.
        for number in 1..1_000_000 {
            let frame =
                encode_frame(&FromAgent::Entry(file(number, number.to_string().as_bytes(), 0)).encode());
            if agent.stream.write_all(&frame).is_err() {
                return;
            }
        }
        panic!("the host took a million entries");
    });
    let limits = Limits { entries: 1000, ..Limits::default() };
    let refused = Listing::receive(&mut session, b"/", &limits);
    assert!(matches!(refused, Err(TransferError::TooMuch { what: "entries", limit: 1000 })), "{refused:?}");
}

/// What the host makes of a layer with one file of `size` whose content comes as `content` says.
fn fetch(
    size: u64,
    limits: &Limits,
    content: Vec<FromAgent>,
) -> (Result<Listing, TransferError>, tempfile::TempDir) {
    let folder_of_store = tempfile::tempdir().expect("a temporary folder");
    let store = Store::open(folder_of_store.path()).expect("a store");
    let mut session = session(move |agent| {
        agent.hear();
        agent.say(&FromAgent::Entry(folder(0, b"")));
        agent.say(&FromAgent::Entry(file(1, b"a", size)));
        agent.say(&FromAgent::ListDone { entries: 2 });
        if agent.hear().is_none() {
            return;
        }
        for message in content {
            agent.say(&message);
        }
        agent.hear();
    });
    let mut listing = Listing::receive(&mut session, b"/", limits).expect("a good list");
    let all = listing.entries().map(|(_, entry)| entry.ordinal).collect();
    let fetched = listing.fetch(&mut session, store.blobs(), limits, &all).map(|()| listing);
    (fetched, folder_of_store)
}

fn data(offset: u64, bytes: &[u8]) -> FromAgent {
    FromAgent::FileData { offset, data: bytes.to_vec() }
}

#[test]
fn a_file_with_holes_arrives_whole() {
    let start = FromAgent::FileStart { ordinal: 1 };
    let pieces =
        vec![start, data(2, b"ab"), data(8, b"c"), FromAgent::FileEnd { size: 12 }, FromAgent::FetchDone];
    let (fetched, store) = fetch(12, &Limits::default(), pieces);
    let listing = fetched.expect("an honest agent");
    assert_eq!(listing.totals(), (12, 1));
    let digest = kiln_digest::Digest::of(b"\0\0ab\0\0\0\0c\0\0\0");
    let path = Store::open(store.path()).expect("a store").blobs().path(&digest);
    assert_eq!(std::fs::read(path).expect("the blob"), b"\0\0ab\0\0\0\0c\0\0\0");
}

#[test]
fn a_content_that_is_not_as_it_was_listed_is_refused_and_leaves_nothing() {
    let start = || FromAgent::FileStart { ordinal: 1 };
    let end = |size| FromAgent::FileEnd { size };
    let cases: Vec<(&str, Vec<FromAgent>)> = vec![
        ("another file", vec![FromAgent::FileStart { ordinal: 0 }]),
        ("a file that nobody asked for", vec![FromAgent::FileStart { ordinal: 9 }]),
        ("no start", vec![data(0, b"abcd"), end(4)]),
        ("a longer end", vec![start(), data(0, b"abcd"), end(5)]),
        ("a shorter end", vec![start(), data(0, b"abcd"), end(3)]),
        ("more bytes", vec![start(), data(0, b"abcde")]),
        ("bytes beyond the end", vec![start(), data(4, b"e")]),
        ("bytes beyond all numbers", vec![start(), data(u64::MAX, b"e")]),
        ("bytes a second time", vec![start(), data(0, b"abc"), data(2, b"cd")]),
        ("bytes backwards", vec![start(), data(2, b"cd"), data(0, b"ab")]),
        ("a start within", vec![start(), data(0, b"ab"), start()]),
        ("the end of all within", vec![start(), FromAgent::FetchDone]),
        ("one file too many", vec![start(), data(0, b"abcd"), end(4), start()]),
        ("a list instead", vec![FromAgent::ListDone { entries: 2 }]),
    ];
    for (name, content) in cases {
        let (refused, store) = fetch(4, &Limits::default(), content);
        assert!(
            matches!(refused, Err(TransferError::Session(SessionError::Violation(_)))),
            "{name}: {refused:?}"
        );
        let left = std::fs::read_dir(store.path().join("tmp")).expect("it is there").count();
        assert_eq!(left, 0, "{name} left a temporary file");
    }
}

#[test]
fn a_machine_that_dies_within_a_file_leaves_nothing() {
    let folder_of_store = tempfile::tempdir().expect("a temporary folder");
    let store = Store::open(folder_of_store.path()).expect("a store");
    let mut session = session(|agent| {
        agent.hear();
        agent.say(&FromAgent::Entry(folder(0, b"")));
        agent.say(&FromAgent::Entry(file(1, b"a", 10)));
        agent.say(&FromAgent::ListDone { entries: 2 });
        agent.hear();
        agent.say(&FromAgent::FileStart { ordinal: 1 });
        agent.say(&data(0, b"abc"));
    });
    let limits = Limits::default();
    let mut listing = Listing::receive(&mut session, b"/", &limits).expect("a good list");
    let all = listing.entries().map(|(_, entry)| entry.ordinal).collect();
    let died = listing.fetch(&mut session, store.blobs(), &limits, &all);
    assert!(matches!(died, Err(TransferError::Session(SessionError::Closed))), "{died:?}");
    assert_eq!(std::fs::read_dir(store.temporary()).expect("it is there").count(), 0);
}

#[test]
fn more_bytes_than_allowed_are_not_even_asked_for() {
    let limits = Limits { total_bytes: 1000, ..Limits::default() };
    let (refused, _store) = fetch(1001, &limits, Vec::new());
    assert!(matches!(refused, Err(TransferError::TooMuch { what: "bytes", limit: 1000 })), "{refused:?}");
    let (refused, _store) = fetch(u64::MAX, &Limits::default(), Vec::new());
    assert!(matches!(refused, Err(TransferError::TooMuch { what: "bytes", .. })), "{refused:?}");
}

#[test]
fn a_file_of_nothing_but_a_hole_takes_no_room() {
    let size = 64 << 20;
    let start = FromAgent::FileStart { ordinal: 1 };
    let content = vec![start, FromAgent::FileEnd { size }, FromAgent::FetchDone];
    let (fetched, store) = fetch(size, &Limits::default(), content);
    assert_eq!(fetched.expect("an honest agent").totals(), (size, 1));
    let mut blocks = 0;
    let mut folders = vec![store.path().join("blobs")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("it is there").flatten() {
            let meta = entry.metadata().expect("it is there");
            if meta.is_dir() { folders.push(entry.path()) } else { blocks += meta.blocks() }
        }
    }
    assert!(blocks * 512 < 1 << 20, "{blocks} blocks for a hole");
}

/// This process's resident memory at its peak, in bytes (VmHWM), reset before (clear_refs(5), value 5).
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("a peak");
    line.split_whitespace().nth(1).and_then(|text| text.parse::<u64>().ok()).expect("a number") << 10
}

#[test]
fn what_is_merely_claimed_takes_no_memory() {
    let before = peak_bytes();
    let threads: Vec<_> = (0..50)
        .map(|_| {
            thread::spawn(|| {
                let mut session = session(|agent| {
                    agent.hear();
                    // The largest frame there may be, of which only the header and a little comes.
                    agent.send(&u32::try_from(MAX_FROM_AGENT_BYTES).expect("small").to_le_bytes());
                    agent.send(&[0; 100]);
                });
                assert!(matches!(session.setup(setup()), Err(SessionError::Closed)));
            })
        })
        .collect();
    for thread in threads {
        thread.join().expect("no panic");
    }
    let grown = peak_bytes().saturating_sub(before);
    assert!(grown < 100 << 20, "{grown} bytes for 50 frames that never came");
}
