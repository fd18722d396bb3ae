//! Agents that lie in every place of a conversation, and honest ones whose words come in pieces. What else an agent may do
//! is in `tests/hostile`.

use std::io::{Read, Seek, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use kiln::agent::{ExecEnd, Limits, Listing, Session, SessionError, TransferError};
use kiln::machine::fake::{Fake, Guest};
use kiln::machine::{Backend, Carrier, Cpu, Spec};
use kiln_wire::{
    Access, CREDIT_BYTES, Entry, EntryKind, Exec, FrameReader, FromAgent, MAX_DATA_BYTES,
    MAX_FROM_AGENT_BYTES, MAX_PAYLOAD_BYTES, Mount, Outcome, Setup, Source, Stream, ToAgent, Usage, VERSION,
    encode_frame,
};

/// How long a test waits for a host that waits for ever.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The agent's end, for one that speaks frames when it wants to.
pub struct Liar {
    stream: UnixStream,
    reader: FrameReader,
}

impl Liar {
    pub fn say(&mut self, message: &FromAgent) {
        self.send(&encode_frame(&message.encode()));
    }

    /// Bytes as they are. A host that has hung up is what most of these lead to.
    pub fn send(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
    }

    pub fn hear(&mut self) -> Option<ToAgent> {
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

    pub fn ready(&mut self) {
        assert_eq!(self.hear(), Some(ToAgent::Hello { version: VERSION }));
        self.say(&ready(VERSION));
    }
}

pub fn ready(version: u16) -> FromAgent {
    FromAgent::Ready { version, kernel: "6.12.0".into(), uptime_us: 1, memory_bytes: 1 << 30, cpus: 1 }
}

pub fn spec() -> Spec {
    Spec {
        kernel: "kernel".into(),
        initramfs: "initramfs".into(),
        bundle: kiln_digest::Digest::of(b"bundle"),
        memory_bytes: 1 << 30,
        cpus: 1,
        shares: Vec::new(),
        disks: Vec::new(),
        carrier: Carrier::Serial,
        cpu: Cpu::Fixed,
        network: false,
        rehearsal: None,
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
pub fn session(liar: impl FnOnce(&mut Liar) + Send + 'static) -> Session {
    open(|agent| {
        agent.ready();
        liar(agent);
    })
    .expect("the greeting was honest")
}

fn setup() -> Setup {
    Setup {
        seed: [7; 64],
        warm_up: false,
        clock: kiln_wire::Clock { seconds: 0, nanoseconds: 0 },
        root: Source::Share("root".into()),
        scratch: None,
        layer_bytes: 0,
        processes: 0,
        mounts: Vec::new(),
        hostname: "kiln".into(),
        load_modules: Vec::new(),
    }
}

pub fn exec() -> Exec {
    Exec {
        id: 1,
        argv: vec![b"true".to_vec()],
        env: Vec::new(),
        cwd: b"/".to_vec(),
        timeout_ms: 0,
        grace_ms: 0,
        stdin: false,
        terminal: None,
    }
}

fn toolbox() -> Mount {
    Mount { source: Source::Share("tools".into()), target: b"/toolbox".to_vec(), access: Access::ReadOnly }
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
        FromAgent::Mounted,
        FromAgent::Started { id: 1 },
        FromAgent::Credit { id: 1, bytes: 1 },
        FromAgent::ExecFailed { id: 1, what: String::new(), errno: 2, why: String::new() },
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
fn garbage_is_an_error_in_every_place() {
    for (name, bytes) in garbage() {
        let greeting = bytes.clone();
        // It hears the host out, whose own greeting would meet a closed door otherwise.
        let refused = open(move |agent| {
            agent.send(&greeting);
            agent.hear();
        })
        .map(drop);
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
    let places: [Place; 4] = [
        ("setup", |session| session.setup(setup()), &["SetupDone"]),
        ("mount", |session| session.mount(toolbox()), &["Mounted"]),
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
fn an_agent_that_waits_for_credit_is_given_it() {
    let pieces = usize::try_from(CREDIT_BYTES).expect("small") / MAX_DATA_BYTES;
    let output = || FromAgent::Output { id: 1, stream: Stream::Stdout, data: vec![0; MAX_DATA_BYTES] };
    let mut session = session(move |agent| {
        agent.hear();
        let mut credit = u32::try_from(pieces).expect("small");
        for _ in 0..3 * pieces {
            while credit == 0 {
                let Some(ToAgent::Credit { id: 1, bytes }) = agent.hear() else { panic!("no credit") };
                credit += bytes / u32::try_from(MAX_DATA_BYTES).expect("small");
            }
            credit -= 1;
            agent.say(&output());
        }
        agent.say(&FromAgent::Exited { id: 1, outcome: Outcome::Exit(0), usage: Usage::default() });
        // The last credit may come after it.
        while agent.hear().is_some() {}
    });
    let mut length = 0;
    let end = session.exec(exec(), None, &mut |_, data| {
        length += data.len();
        Ok(())
    });
    assert!(matches!(end, Ok(ExecEnd::Ran(Outcome::Exit(0), _))), "{end:?}");
    assert_eq!(length, 3 * pieces * MAX_DATA_BYTES);
}

#[test]
fn what_a_command_was_to_run_in_is_named_where_it_could_not_be_made() {
    let mut session = session(|agent| {
        agent.hear();
        agent.say(&FromAgent::ExecFailed {
            id: 1,
            what: "entering `/nowhere`".into(),
            errno: 2,
            why: String::new(),
        });
        agent.hear();
        agent.say(&FromAgent::Exited { id: 1, outcome: Outcome::Exit(0), usage: Usage::default() });
    });
    let failed = run(&mut session).expect_err("it could not be made");
    assert!(matches!(&failed, SessionError::Failed { what, .. } if what.contains("/nowhere")), "{failed:?}");
    // The session goes on.
    assert!(matches!(run(&mut session), Ok(ExecEnd::Ran(Outcome::Exit(0), _))));
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
                ToAgent::Stdin { data, .. } => {
                    agent.say(&FromAgent::Credit { id: 1, bytes: u32::try_from(data.len()).expect("small") });
                    bytes.extend(data);
                }
                _ => {}
            }
        }
        sender.send(bytes).expect("the test waits");
        agent.say(&FromAgent::Exited { id: 1, outcome: Outcome::Exit(0), usage: Usage::default() });
    });
    let input: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(&input).and_then(|()| file.rewind()).expect("room");
    session
        .exec(Exec { stdin: true, ..exec() }, Some(file.into()), &mut |_, _| Ok(()))
        .expect("an honest agent");
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
