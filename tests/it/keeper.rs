//! A kept machine and its callers, with an agent played by the test: what a caller leaves out is added, what it says
//! concerns its own command only, and its command goes with it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use kiln::agent::{ExecEnd, Session, SessionError};
use kiln::keeper::{DoorError, Entry, Kept, Registry, State};
use kiln::machine::fake::{Fake, Guest};
use kiln::machine::jail::Held;
use kiln::machine::{Accelerator, Backend, Identity, Origin};
use kiln_wire::{
    CREDIT_BYTES, Exec, FromAgent, MAX_DATA_BYTES, Outcome, Stream, TerminalSize, ToAgent, Usage, VERSION,
    encode_frame,
};

use super::wire::{Liar, PATIENCE, exec, session, spec};

/// A machine that is kept in a registry of its own, by a thread that tells of its end.
struct Machine {
    run: tempfile::TempDir,
    name: String,
    ended: Receiver<()>,
}

/// A kept machine whose agent is `liar`; with nobody in it, it stays for `idle`.
fn kept(idle: Duration, liar: impl FnOnce(&mut Liar) + Send + 'static) -> Machine {
    let run = tempfile::tempdir().expect("a folder");
    let registry = Registry::open(run.path()).expect("a registry");
    let identity = Identity {
        backend: "fake".into(),
        accelerator: Accelerator::Tcg,
        jail: Held::default(),
        origin: Origin::Boot,
    };
    let entry = Entry::running("run", &[b"make".to_vec()], 1 << 30, 1, &identity);
    let registration = registry.register(entry, || {}).expect("registered");
    let nobody: Guest = Box::new(|_, _| {});
    let keeper = Kept {
        machine: Fake::new(vec![nobody]).start(spec()).expect("a guest"),
        session: session(liar),
        registration,
        environment: vec![b"PATH=/bin".to_vec(), b"TERM=dumb".to_vec()],
        directory: b"/x/project".to_vec(),
        has_toolbox: false,
        writes_disks: false,
    }
    .open(idle)
    .expect("threads");
    let name = keeper.entry().name.clone();
    let (sender, ended) = channel();
    thread::spawn(move || {
        keeper.stay();
        let _ = sender.send(());
    });
    Machine { run, name, ended }
}

impl Machine {
    fn registry(&self) -> Registry {
        Registry::open(self.run.path()).expect("a registry")
    }

    fn enter(&self) -> Session {
        self.registry().door(&self.name).and_then(kiln::keeper::Door::enter).expect("it is open")
    }

    /// A caller that speaks whatever it likes, after it was let in.
    fn intrude(&self) -> UnixStream {
        let path = self.run.path().join("machines").join(&self.name).join("socket");
        let mut stream = UnixStream::connect(path).expect("it listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        hear(&mut stream);
        stream.write_all(&encode_frame(b"\"enter\"")).expect("room");
        assert_eq!(hear(&mut stream), b"\"granted\"");
        stream
    }

    fn ends(&self) {
        self.ended.recv_timeout(PATIENCE).expect("it ends");
        assert!(self.registry().machines().expect("a folder").is_empty());
    }
}

fn hear(stream: &mut UnixStream) -> Vec<u8> {
    let mut length = [0; 4];
    stream.read_exact(&mut length).expect("a frame");
    let mut payload = vec![0; usize::try_from(u32::from_le_bytes(length)).expect("small")];
    stream.read_exact(&mut payload).expect("a frame");
    payload
}

fn is_hung_up_on(stream: &mut UnixStream) -> bool {
    matches!(stream.read(&mut [0; 1]), Ok(0) | Err(_))
}

fn started(agent: &mut Liar) -> Exec {
    match agent.hear() {
        Some(ToAgent::Exec(exec)) => exec,
        other => panic!("{other:?}"),
    }
}

fn exited(id: u32) -> FromAgent {
    FromAgent::Exited { id, outcome: Outcome::Exit(3), usage: Usage::default() }
}

const LONG: Duration = Duration::from_secs(1000);

#[test]
fn a_command_gets_what_its_caller_left_out_and_its_caller_hears_of_it() {
    let machine = kept(LONG, |agent| {
        let exec = started(agent);
        assert_eq!(exec.cwd, b"/x/project");
        let env: Vec<_> = exec.env.iter().map(|variable| String::from_utf8_lossy(variable)).collect();
        assert_eq!(env, ["PATH=/bin", "TERM=xterm", "PATHS=1"]);
        agent.say(&FromAgent::Started { id: exec.id });
        agent.say(&FromAgent::Output { id: exec.id, stream: Stream::Stderr, data: b"hello".to_vec() });
        agent.say(&exited(exec.id));
        let exec = started(agent);
        assert_eq!(exec.cwd, b"/");
        agent.say(&FromAgent::ExecFailed { id: exec.id, what: String::new(), errno: 2, why: String::new() });
        agent.hear();
    });
    let entry = machine.registry().machines().expect("a folder").remove(0);
    assert_eq!((entry.state, entry.idle_seconds), (State::Kept, Some(1000)));
    let mut said = Vec::new();
    let env = vec![b"TERM=xterm".to_vec(), b"PATHS=1".to_vec()];
    let end = machine.enter().exec(Exec { cwd: Vec::new(), env, ..exec() }, None, &mut |_, data| {
        said.extend_from_slice(data);
        Ok(())
    });
    assert!(matches!(end, Ok(ExecEnd::Ran(Outcome::Exit(3), _))), "{end:?}");
    assert_eq!(said, b"hello");
    let end = machine.enter().exec(exec(), None, &mut |_, _| Ok(()));
    assert!(matches!(end, Ok(ExecEnd::NotStarted { .. })), "{end:?}");
}

/// A caller's command, as it is sent.
fn command() -> Vec<u8> {
    encode_frame(&ToAgent::Exec(Exec { id: 9, ..exec() }).encode())
}

#[test]
fn keys_signals_and_sizes_reach_the_caller_s_own_command() {
    let machine = kept(LONG, |agent| {
        let Exec { id, terminal, .. } = started(agent);
        assert_eq!(terminal, Some(TerminalSize { rows: 24, columns: 80 }));
        assert_eq!(agent.hear(), Some(ToAgent::Stdin { id, data: b"key".to_vec() }));
        assert_eq!(agent.hear(), Some(ToAgent::Signal { id, signal: 2 }));
        assert_eq!(agent.hear(), Some(ToAgent::Resize { id, size: TerminalSize { rows: 1, columns: 2 } }));
        agent.say(&exited(id));
        agent.hear();
    });
    let mut caller = machine.intrude();
    let terminal = Some(TerminalSize { rows: 24, columns: 80 });
    for message in [
        ToAgent::Exec(Exec { id: 9, stdin: true, terminal, ..exec() }),
        ToAgent::Stdin { id: 1, data: b"key".to_vec() },
        ToAgent::Signal { id: 2, signal: 2 },
        ToAgent::Resize { id: 3, size: TerminalSize { rows: 1, columns: 2 } },
    ] {
        caller.write_all(&encode_frame(&message.encode())).expect("room");
    }
    // By the number that the caller gave.
    assert_eq!(FromAgent::decode(&hear(&mut caller)), Ok(exited(9)));
    assert!(is_hung_up_on(&mut caller));
}

#[test]
fn a_command_goes_with_its_caller_by_force_if_need_be() {
    let machine = kept(LONG, |agent| {
        let Exec { id, .. } = started(agent);
        agent.say(&FromAgent::Started { id });
        // It does not mind being hung up on, and meanwhile another caller comes.
        let (mut signals, mut other) = (Vec::new(), None);
        while signals.len() < 2 || other.is_none() {
            match agent.hear() {
                Some(ToAgent::Signal { id: to, signal }) if to == id => signals.push(signal),
                Some(ToAgent::Exec(exec)) => other = Some(exec.id),
                message => panic!("{message:?}"),
            }
        }
        assert_eq!(signals, [1, 9]);
        agent.say(&exited(id));
        agent.say(&exited(other.expect("it came")));
        agent.hear();
    });
    let mut caller = machine.intrude();
    caller.write_all(&command()).expect("room");
    assert_eq!(FromAgent::decode(&hear(&mut caller)), Ok(FromAgent::Started { id: 9 }));
    drop(caller);
    let end = machine.enter().exec(exec(), None, &mut |_, _| Ok(()));
    assert!(matches!(end, Ok(ExecEnd::Ran(..))), "{end:?}");
}

#[test]
fn a_caller_that_breaks_the_rules_loses_its_command_and_nobody_else_s() {
    let stdin = ToAgent::Stdin { id: 9, data: vec![0; MAX_DATA_BYTES] };
    let too_much: Vec<ToAgent> =
        vec![stdin; usize::try_from(CREDIT_BYTES).expect("small") / MAX_DATA_BYTES + 1];
    let frames = |messages: &[ToAgent]| messages.iter().flat_map(|m| encode_frame(&m.encode())).collect();
    let rules: Vec<Vec<u8>> = vec![
        vec![0xff; 8],
        frames(&[ToAgent::PowerOff]),
        frames(&[ToAgent::Hello { version: VERSION }]),
        frames(&[ToAgent::Credit { id: 9, bytes: 1 }]),
        frames(&[ToAgent::Exec(exec())]),
        frames(&too_much),
    ];
    let count = rules.len();
    let machine = kept(LONG, move |agent| {
        for _ in 0..count {
            let Exec { id, .. } = started(agent);
            // Input that there was credit for comes first.
            while !matches!(agent.hear(), Some(ToAgent::Signal { signal: 1, .. })) {}
            agent.say(&exited(id));
        }
        let Exec { id, .. } = started(agent);
        agent.say(&exited(id));
        agent.hear();
    });
    for bytes in rules {
        let mut caller = machine.intrude();
        let _ = caller.write_all(&[command(), bytes].concat());
        // The end of its command may come first.
        let _ = caller.read_to_end(&mut Vec::new());
    }
    let end = machine.enter().exec(exec(), None, &mut |_, _| Ok(()));
    assert!(matches!(end, Ok(ExecEnd::Ran(..))), "{end:?}");
}

#[test]
fn a_caller_that_says_nothing_sensible_at_the_door_stays_outside() {
    let machine = kept(LONG, |agent| {
        agent.hear();
    });
    for word in [&b"\"dance\""[..], b"{}", b"\xff", &[b' '; 20_000]] {
        let path = machine.run.path().join("machines").join(&machine.name).join("socket");
        let mut stream = UnixStream::connect(path).expect("it listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        hear(&mut stream);
        let _ = stream.write_all(&encode_frame(word));
        assert!(is_hung_up_on(&mut stream), "{word:?}");
    }
    for name in ["", "..", "../machines", "nobody", &"x".repeat(5000)] {
        let refused = machine.registry().door(name).expect_err(name);
        assert!(matches!(&refused, DoorError::Unknown { known, .. } if known.len() == 1), "{refused:?}");
    }
}

#[test]
fn a_machine_ends_when_nobody_was_in_it_for_its_time() {
    let idle = Duration::from_millis(300);
    let machine = kept(idle, |agent| {
        let Exec { id, .. } = started(agent);
        agent.hear();
        agent.say(&exited(id));
        agent.hear();
    });
    let mut caller = machine.intrude();
    caller.write_all(&command()).expect("room");
    assert!(machine.ended.recv_timeout(3 * idle).is_err(), "somebody is in it");
    drop(caller);
    machine.ends();
}

#[test]
fn a_machine_that_dies_takes_leave_of_its_callers() {
    let machine = kept(LONG, |agent| {
        started(agent);
    });
    let end = machine.enter().exec(exec(), None, &mut |_, _| Ok(()));
    assert!(matches!(end, Err(SessionError::Closed)), "{end:?}");
    machine.ends();
}

#[test]
fn an_agent_that_lies_ends_its_machine_and_no_more() {
    let machine = kept(LONG, |agent| {
        let Exec { id, .. } = started(agent);
        agent.say(&FromAgent::Output { id: id + 1, stream: Stream::Stdout, data: b"x".to_vec() });
        agent.hear();
    });
    let end = machine.enter().exec(exec(), None, &mut |_, _| Ok(()));
    assert!(matches!(end, Err(SessionError::Closed)), "{end:?}");
    machine.ends();
}
