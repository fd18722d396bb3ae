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
fn a_record_comes_in_parts_and_is_sorted() {
    let record = finish(|socket, id| {
        part(socket, id, RecordPart::Share(path("s")));
        part(socket, id, RecordPart::Missed(vec![path("b"), path("a/b")]));
        part(socket, id, RecordPart::Missed(vec![path("a-b")]));
        part(socket, id, RecordPart::End { complete: true });
        send(socket, &Event::Reply { id, result: Ok(()) }, None).expect("sent");
    });
    let missed = vec![path("a-b"), path("a/b"), path("b")];
    let share = ShareRecord { name: path("s"), missed, ..ShareRecord::default() };
    assert_eq!(record.expect("record"), Record { complete: true, shares: vec![share] });
}

#[test]
fn what_does_not_belong_ends_the_connection() {
    type Answer = fn(&UnixStream, u64);
    let cases: [(&str, Answer); 8] = [
        ("nothing", |socket, _| socket.shutdown(std::net::Shutdown::Both).expect("socket")),
        ("not JSON", |mut socket, _| socket.write_all(b"\x04\0\0\0oops").expect("sent")),
        ("unknown", |socket, _| send(socket, &"unknown", None).expect("sent")),
        ("too long", |mut socket, _| socket.write_all(&u32::MAX.to_le_bytes()).expect("sent")),
        ("entries of no share", |socket, id| part(socket, id, RecordPart::Missed(vec![path("a")]))),
        ("parts after the end", |socket, id| {
            part(socket, id, RecordPart::End { complete: true });
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
