//! A session that several share: each hears of its own command, none waits for another, and an agent that lies to one
//! ends it for all.

use std::sync::mpsc::{Receiver, channel};

use kiln::agent::{Hub, Remote, SessionError};
use kiln_wire::{
    CREDIT_BYTES, Exec, FromAgent, MAX_DATA_BYTES, Outcome, Stream, TerminalSize, ToAgent, Usage,
};

use super::wire::{Liar, PATIENCE, exec, session};

type Started = (Remote, Receiver<FromAgent>);
type End = Receiver<Result<(), SessionError>>;

/// A hub whose agent is `liar`, and what tells of its end.
fn hub(liar: impl FnOnce(&mut Liar) + Send + 'static) -> (Hub, End) {
    let (sender, end) = channel();
    let hub = Hub::new(session(liar), move |result| sender.send(result).expect("the test waits"));
    (hub.expect("a thread"), end)
}

/// The id of the command that the host starts next.
fn started(agent: &mut Liar) -> u32 {
    match agent.hear() {
        Some(ToAgent::Exec(Exec { id, .. })) => id,
        other => panic!("{other:?}"),
    }
}

fn start(hub: &Hub) -> Started {
    hub.start(exec()).expect("sent")
}

fn output(id: u32, data: &[u8]) -> FromAgent {
    FromAgent::Output { id, stream: Stream::Stdout, data: data.to_vec() }
}

fn exited(id: u32) -> FromAgent {
    FromAgent::Exited { id, outcome: Outcome::Exit(0), usage: Usage::default() }
}

fn is_violated(end: &End) -> bool {
    matches!(end.recv_timeout(PATIENCE).expect("it ends"), Err(SessionError::Violation(_)))
}

#[test]
fn each_command_hears_what_concerns_it() {
    let (hub, end) = hub(|agent| {
        let (one, two) = (started(agent), started(agent));
        assert_ne!(one, two);
        for message in [output(two, b"2"), output(one, b"1"), exited(two), output(one, b"1"), exited(one)] {
            agent.say(&message);
        }
        assert_eq!(agent.hear(), Some(ToAgent::PowerOff));
        agent.say(&FromAgent::Bye);
    });
    let (one, two) = (start(&hub), start(&hub));
    let heard = |(_, messages): &Started| messages.iter().collect::<Vec<_>>();
    assert!(matches!(&heard(&two)[..], [FromAgent::Output { .. }, FromAgent::Exited { .. }]));
    let said = heard(&one);
    assert!(
        matches!(&said[..], [FromAgent::Output { data, .. }, _, FromAgent::Exited { .. }] if data == b"1")
    );
    hub.power_off().expect("sent");
    assert!(matches!(end.recv_timeout(PATIENCE), Ok(Ok(()))));
    assert!(matches!(hub.start(exec()), Err(SessionError::Closed)));
}

#[test]
fn what_is_passed_on_goes_to_the_sender_s_own_command() {
    let (hub, _end) = hub(|agent| {
        let id = started(agent);
        let size = TerminalSize { rows: 2, columns: 3 };
        assert_eq!(agent.hear(), Some(ToAgent::Resize { id, size }));
        assert_eq!(agent.hear(), Some(ToAgent::Signal { id, signal: 2 }));
        assert_eq!(agent.hear(), Some(ToAgent::Stdin { id, data: b"x".to_vec() }));
        agent.say(&exited(id));
    });
    let (remote, messages) = start(&hub);
    // Whatever number the sender gives.
    let id = u32::MAX;
    for message in [
        ToAgent::Resize { id, size: TerminalSize { rows: 2, columns: 3 } },
        ToAgent::Signal { id, signal: 2 },
        ToAgent::Stdin { id, data: b"x".to_vec() },
    ] {
        remote.pass(message).expect("it concerns the command");
    }
    assert!(matches!(messages.recv(), Ok(FromAgent::Exited { .. })));
    assert!(messages.recv().is_err());
    remote.pass(ToAgent::Signal { id, signal: 9 }).expect("nobody is left to be signalled");
}

#[test]
fn what_the_agent_would_end_the_machine_for_is_not_passed_on() {
    let (hub, _end) = hub(|agent| {
        started(agent);
        // Nothing comes but the end of the command that is left alone.
        assert!(matches!(agent.hear(), Some(ToAgent::Signal { signal: 9, .. })));
    });
    let (remote, _messages) = start(&hub);
    for message in [
        ToAgent::PowerOff,
        ToAgent::Exec(exec()),
        ToAgent::List { target: b"/".to_vec() },
        ToAgent::Credit { id: 0, bytes: 1 },
        ToAgent::Stdin { id: 0, data: vec![0; usize::try_from(CREDIT_BYTES).expect("small") + 1] },
    ] {
        let name = format!("{message:?}");
        assert!(remote.pass(message).is_err(), "{}", &name[..name.len().min(40)]);
    }
}

#[test]
fn a_lie_to_one_command_ends_the_session_for_all() {
    type Lie = fn(&mut Liar, u32);
    let lies: [(&str, Lie); 8] = [
        ("a command that is none", |agent, id| agent.say(&output(id + 7, b"x"))),
        ("a second start", |agent, id| (0..2).for_each(|_| agent.say(&FromAgent::Started { id }))),
        ("input taken that never came", |agent, id| agent.say(&FromAgent::Credit { id, bytes: 1 })),
        ("output beyond its credit", |agent, id| {
            for _ in 0..=usize::try_from(CREDIT_BYTES).expect("small") / MAX_DATA_BYTES {
                agent.say(&output(id, &[0; MAX_DATA_BYTES]));
            }
        }),
        ("words after the end", |agent, id| [exited(id), output(id, b"x")].iter().for_each(|m| agent.say(m))),
        ("a second end", |agent, id| (0..2).for_each(|_| agent.say(&exited(id)))),
        ("a list", |agent, _| agent.say(&FromAgent::ListDone { entries: 0 })),
        ("garbage", |agent, _| agent.send(&[0xff; 8])),
    ];
    for (name, lie) in lies {
        let (hub, end) = hub(move |agent| {
            started(agent);
            let id = started(agent);
            lie(agent, id);
            agent.hear();
        });
        let ((_other, messages), _lied_to) = (start(&hub), start(&hub));
        assert!(is_violated(&end), "{name}");
        assert!(messages.recv().is_err(), "{name}");
    }
}

#[test]
fn a_command_that_nobody_listens_to_any_more_is_killed_and_holds_nobody_up() {
    let (hub, _end) = hub(|agent| {
        let (id, mark) = (started(agent), started(agent));
        // All its credit is out, and the host has looked at nothing.
        let pieces = usize::try_from(CREDIT_BYTES).expect("small") / MAX_DATA_BYTES;
        (0..pieces).for_each(|_| agent.say(&output(id, &[0; MAX_DATA_BYTES])));
        agent.say(&exited(mark));
        assert_eq!(agent.hear(), Some(ToAgent::Credit { id, bytes: CREDIT_BYTES }));
        assert_eq!(agent.hear(), Some(ToAgent::Signal { id, signal: 9 }));
        // It writes on until it dies, and is given credit for it.
        (0..pieces).for_each(|_| agent.say(&output(id, &[0; MAX_DATA_BYTES])));
        let (mut bytes, mut next) = (0, None);
        while bytes < CREDIT_BYTES || next.is_none() {
            match agent.hear() {
                Some(ToAgent::Credit { bytes: more, .. }) => bytes += more,
                Some(ToAgent::Exec(Exec { id, .. })) => next = Some(id),
                other => panic!("{other:?}"),
            }
        }
        agent.say(&exited(id));
        agent.say(&exited(next.expect("it was started")));
        agent.hear();
    });
    let (command, (_mark, mark)) = (start(&hub), start(&hub));
    assert!(matches!(mark.recv(), Ok(FromAgent::Exited { .. })), "all that came before has come");
    drop(command);
    let (_next, next) = start(&hub);
    assert!(matches!(next.recv(), Ok(FromAgent::Exited { .. })));
}
