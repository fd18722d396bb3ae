use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::*;
use crate::fs::record::{Record, ShareRecord};

/// What a client makes of a device process that answers its first request with what `answer` sends.
fn finish(answer: impl FnOnce(&UnixStream, u64) + Send + 'static) -> Result<Record, ClientError> {
    let (ours, theirs) = UnixStream::pair().expect("pair");
    let device = std::thread::spawn(move || {
        let (request, _) = receive::<Request>(&theirs).expect("frame").expect("request");
        answer(&theirs, request.id);
        // Until the client hangs up, or has enough.
        while let Ok(Some(_)) = receive::<Request>(&theirs) {}
    });
    let client = Client::new(ours).expect("client");
    let result = client.finish();
    drop(client);
    device.join().expect("device");
    result
}

fn part(socket: &UnixStream, id: u64, part: RecordPart) {
    send(socket, &Event::Record { id, part }, None).expect("sent");
}

fn path(text: &str) -> PathBytes {
    PathBytes(text.as_bytes().to_vec())
}

#[test]
fn a_record_comes_in_parts_in_the_order_of_a_walk() {
    let record = finish(|socket, id| {
        part(socket, id, RecordPart::Share(path("s")));
        part(socket, id, RecordPart::Missed(vec![path("a"), path("a/b")]));
        part(socket, id, RecordPart::Missed(vec![path("a-b")]));
        part(socket, id, RecordPart::End { full: false });
        send(socket, &Event::Reply { id, result: Ok(()) }, None).expect("sent");
    });
    let mut share = ShareRecord { name: path("s"), ..ShareRecord::default() };
    assert!(["a", "a/b", "a-b"].iter().all(|missed| share.missed.push(&path(missed))));
    assert_eq!(record.expect("record"), Record { full: false, shares: vec![share] });
}

#[test]
fn what_does_not_belong_ends_the_connection() {
    type Answer = fn(&UnixStream, u64);
    let cases: [(&str, Answer); 7] = [
        ("nothing", |socket, _| socket.shutdown(std::net::Shutdown::Both).expect("socket")),
        ("not JSON", |mut socket, _| socket.write_all(b"\x04\0\0\0oops").expect("sent")),
        ("unknown", |socket, _| send(socket, &"unknown", None).expect("sent")),
        ("too long", |mut socket, _| socket.write_all(&u32::MAX.to_le_bytes()).expect("sent")),
        ("parts after the end", |socket, id| {
            part(socket, id, RecordPart::End { full: false });
            part(socket, id, RecordPart::Share(path("s")));
        }),
        ("no stream with a connection", |socket, _| {
            send(socket, &Event::Accepted { port: 1 }, None).expect("sent");
        }),
        ("a reply without a record", |socket, id| {
            send(socket, &Event::Reply { id, result: Ok(()) }, None).expect("sent");
        }),
    ];
    for (name, answer) in cases {
        assert!(matches!(finish(answer), Err(ClientError::Closed)), "{name}");
    }
}

#[test]
fn parts_that_make_no_record_are_an_error_that_says_so() {
    let named = |parts: Vec<RecordPart>| {
        let result = finish(move |socket, id| {
            for part in parts {
                if send(socket, &Event::Record { id, part }, None).is_err() {
                    break;
                }
            }
        });
        result.expect_err("no record").to_string()
    };
    let share = || RecordPart::Share(path("s"));
    let out_of_order = "record parts out of order";
    assert_eq!(named(vec![RecordPart::Missed(vec![path("a")])]), out_of_order);
    assert_eq!(named(vec![share(), RecordPart::Missed(vec![path("b"), path("a/b")])]), out_of_order);
    assert_eq!(named(vec![share(), RecordPart::Missed(vec![path("a"), path("a")])]), out_of_order);
    let long = |number: u32| path(&format!("{number:06}{}", "x".repeat(1 << 20)));
    let parts = (0..300).map(|number| RecordPart::Missed(vec![long(number)]));
    assert_eq!(
        named([share()].into_iter().chain(parts).collect()),
        "the record has more than 4000000 paths or 256 MiB of them"
    );
}

#[test]
fn what_nobody_waits_for_is_ignored() {
    let result = finish(|socket, id| {
        send(socket, &Event::Reply { id: id + 7, result: Ok(()) }, None).expect("sent");
        let stream = UnixStream::pair().expect("pair").0;
        for _ in 0..1000 {
            send(socket, &Event::Accepted { port: 9 }, Some(stream.as_fd())).expect("sent");
        }
        send(socket, &Event::Reply { id, result: Err("no".to_owned()) }, None).expect("sent");
    });
    assert!(matches!(result, Err(ClientError::Refused(why)) if why == "no"));
}

#[test]
fn a_guest_that_does_not_answer_is_waited_for_only_so_long() {
    let (ours, _theirs) = UnixStream::pair().expect("pair");
    let client = Client::new(ours).expect("client");
    assert!(matches!(client.connect(1, Duration::from_millis(1)), Err(ClientError::TimedOut)));
}

#[test]
fn descriptors_ride_with_their_message() {
    let (one, other) = UnixStream::pair().expect("pair");
    let file = File::open("/dev/null").expect("file");
    send(&one, &1, None).expect("sent");
    send(&one, &2, Some(file.as_fd())).expect("sent");
    send(&one, &3, None).expect("sent");
    drop(one);
    for (number, with) in [(1, false), (2, true), (3, false)] {
        let (received, descriptor) = receive::<u32>(&other).expect("frame").expect("message");
        assert_eq!((received, descriptor.is_some()), (number, with));
    }
    assert!(receive::<u32>(&other).expect("end").is_none());
}
