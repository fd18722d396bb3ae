//! The console device, with a host at the other end of its port.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use kiln_virtio::console::Console;

use crate::driven::{Driven, VERSION_1};
use crate::testkit::WRITE;
use crate::transports::over_both;
use crate::{Numbers, assert_ends, same_answers};

/// The port's queues, and those of messages about it.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const TOLD: usize = 2;
const SAID: usize = 3;
/// Events of messages.
const DEVICE_READY: u16 = 0;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;
/// Most messages that the device keeps for a driver that has no room for them.
const MOST_TOLD: usize = 16;

/// struct virtio_console_control (virtio 1.3 §5.3.6.2).
fn message(port: u32, event: u16, value: u16) -> Vec<u8> {
    [&port.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat()
}

/// What a driver hears, and then what its host does.
fn answers(driven: &mut Driven, mut host: UnixStream) -> Vec<Vec<u8>> {
    let mut numbers = Numbers(11);
    // Messages, while there is no room for answers.
    let mut answers = vec![driven.ask(SAID, &message(0, PORT_READY, 1), 0)];
    answers.extend(driven.hostile_chains(SAID, &message(0, DEVICE_READY, 1)));
    for _ in 0..600 {
        let (port, event) = (u32::from(numbers.pick(&[0_u8, 0, 0, 1])), u16::from(numbers.below(9)));
        let said = message(port, event, numbers.pick(&[0, 1, 1, 2]));
        let length = numbers.pick(&[8, 8, 8, 7, 0]);
        answers.push(driven.ask(SAID, &said[..length], 0));
    }
    for _ in 0..MOST_TOLD {
        answers.push(driven.ask(TOLD, b"", numbers.pick(&[1, 8, 12, 1000, 1000])));
    }
    driven.prompt = Some((SAID, message(0, DEVICE_READY, 1)));
    answers.extend(driven.hostile_chains(TOLD, b"no message"));
    driven.prompt = None;

    // More than all that chains have room for, before the first is offered.
    let bytes: Vec<u8> = (0..64 << 10).map(|_| numbers.below(251)).collect();
    host.write_all(&bytes).expect("less than a socket holds");
    driven.ask(SAID, &message(0, PORT_OPEN, 1), 0);
    answers.extend(driven.hostile_chains(RECEIVE, b"no room"));
    answers.extend(driven.hostile_chains(TRANSMIT, b"to the host"));
    for _ in 0..300 {
        answers.push(match numbers.below(2) {
            0 => {
                let sent: Vec<u8> = (0..numbers.below(100)).map(|_| numbers.below(251)).collect();
                driven.ask(TRANSMIT, &sent, 0)
            }
            _ => driven.ask(RECEIVE, b"", numbers.pick(&[1, 2, 99, 250])),
        });
    }
    // What was answered is at the host's end by now, and no more comes from there once it is closed.
    driven.rings[RECEIVE].describe(&driven.memory, 0, (driven.rings[RECEIVE].answer(), 1 << 16), WRITE, 0);
    answers.push(driven.offer(RECEIVE, 0));
    host.shutdown(Shutdown::Write).expect("a socket");
    driven.rings[RECEIVE].offer(&driven.memory, 0);
    driven.notify(RECEIVE);
    answers.push(driven.ask(TOLD, b"", 1000));
    answers.push(driven.ask(TRANSMIT, b"to nobody", 0));
    host.set_nonblocking(true).expect("a socket");
    let mut heard = Vec::new();
    // It ends with the word that there is no more for now.
    let _ = host.read_to_end(&mut heard);
    answers.push(heard);
    answers
}

/// The device over either transport, and the host's ends.
fn consoles(features: u64) -> ([Driven; 2], Vec<UnixStream>) {
    let mut hosts = Vec::new();
    let both = over_both(
        || {
            let (host, stream) = UnixStream::pair().expect("a pair");
            hosts.push(host);
            Console::new("wire", stream).expect("a console")
        },
        features,
    );
    (both, hosts)
}

#[test]
fn a_console_answers_the_same_over_both_transports_whatever_was_negotiated() {
    let same = same_answers(|features| {
        let (both, hosts) = consoles(features);
        let mut hosts = hosts.into_iter();
        both.map(|mut driven| answers(&mut driven, hosts.next().expect("a host for each")))
    });
    assert!(same.last().is_some_and(|heard| heard.len() > 5000), "the host has heard much");
    let told =
        |answer: &&Vec<u8>| answer.starts_with(&[0, 0, 0, 0, 12, 0, 0, 0]) && answer[16..20] == *b"wire";
    assert!(same.iter().any(|answer| told(&answer)), "the port has its name");
}

#[test]
fn a_console_ends_with_any_of_its_queues() {
    for queue in [RECEIVE, TRANSMIT, TOLD, SAID] {
        let mut hosts = Vec::new();
        let both = || {
            let (mut both, ends) = consoles(VERSION_1);
            hosts.extend(ends);
            for driven in &mut both {
                // Nothing is received before the port is open, and nothing is told that was not asked for.
                if queue == RECEIVE {
                    driven.ask(SAID, &message(0, PORT_OPEN, 1), 0);
                }
                driven.prompt = (queue == TOLD).then(|| (SAID, message(0, DEVICE_READY, 1)));
            }
            both
        };
        assert_ends(both, queue, b"good");
    }
}
