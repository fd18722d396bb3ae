//! What is said to an agent before its machine is anybody's, a message and its answer each: a hello, what a machine settles before it is frozen, a rehearsal.

use std::cell::Cell;
use std::io::{self, ErrorKind, Read, Write};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use kiln_wire::{FrameReader, FromAgent, MAX_FROM_AGENT_BYTES, ToAgent, VERSION, encode_frame};

/// What an agent answered to a hello.
pub struct Greeting {
    /// What it complained of meanwhile.
    pub complaints: Vec<String>,
    /// For how long its kernel has run, by the guest's clock.
    pub uptime: Duration,
    /// Between these times it looked at that clock.
    pub between: Range<Instant>,
}

/// Says hello to the agent on `wire` and waits for its answer, which is the last that it has said then.
///
/// # Errors
/// `UnexpectedEof` when the machine is gone, `TimedOut` after `patience`, `InvalidData` where something else answers.
pub fn greet(wire: &UnixStream, patience: Duration) -> io::Result<Greeting> {
    let uptime = Cell::new(Duration::ZERO);
    let is_answer = |message: &FromAgent| match message {
        FromAgent::Ready { version: VERSION, uptime_us, .. } => {
            uptime.set(Duration::from_micros(*uptime_us));
            true
        }
        _ => false,
    };
    let asked = Instant::now();
    let complaints = exchange(wire, &ToAgent::Hello { version: VERSION }.encode(), patience, is_answer)?;
    Ok(Greeting { complaints, uptime: uptime.get(), between: asked..Instant::now() })
}

/// Lets the agent on `wire` rehearse a step: `message` says which.
///
/// # Errors
/// Those of [`greet`]; it cannot.
pub fn rehearse(wire: &UnixStream, message: &[u8], patience: Duration) -> io::Result<()> {
    let is_answer = |answer: &FromAgent| *answer == FromAgent::SetupDone;
    exchange(wire, message, patience, is_answer).map(drop)
}

/// Sends one message, and waits for its answer, as [`greet`] does; complaints meanwhile are returned.
///
/// # Errors
/// Those of [`greet`].
pub fn exchange(
    mut wire: &UnixStream,
    message: &[u8],
    patience: Duration,
    is_answer: impl Fn(&FromAgent) -> bool,
) -> io::Result<Vec<String>> {
    let nonsense = |why: String| io::Error::new(ErrorKind::InvalidData, why);
    let deadline = Instant::now() + patience;
    wire.write_all(&encode_frame(message)).map_err(gone)?;
    let mut reader = FrameReader::new(MAX_FROM_AGENT_BYTES);
    let mut buffer = [0; 4096];
    let mut ready = false;
    let mut complaints = Vec::new();
    loop {
        while let Some(payload) = reader.next().map_err(|error| nonsense(error.to_string()))? {
            match FromAgent::decode(&payload).map_err(|error| nonsense(error.to_string()))? {
                answer if !ready && is_answer(&answer) => ready = true,
                FromAgent::Log(text) => complaints.push(text),
                FromAgent::Failed { what, errno } => {
                    let why = io::Error::from_raw_os_error(errno.into());
                    return Err(io::Error::other(format!("{what}: {why}")));
                }
                _ => return Err(nonsense("not the answer to what was asked".to_owned())),
            }
        }
        if ready && reader.pending_bytes() == 0 {
            return wire.set_read_timeout(None).map(|()| complaints);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        wire.set_read_timeout(Some(left))?;
        match wire.read(&mut buffer) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => reader.push(&buffer[..count]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(gone(error)),
        }
    }
}

fn gone(error: io::Error) -> io::Error {
    match error.kind() {
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => ErrorKind::UnexpectedEof.into(),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn ready(version: u16) -> Vec<u8> {
        let kernel = "6.12".to_owned();
        let message = FromAgent::Ready { version, kernel, uptime_us: 1, memory_bytes: 1, cpus: 1 };
        encode_frame(&message.encode())
    }

    /// What greeting an agent comes to that answers with `bytes` and goes.
    fn greeted(bytes: Vec<u8>) -> io::Result<Vec<String>> {
        let (ours, mut theirs) = UnixStream::pair().expect("a socket pair");
        let agent = thread::spawn(move || {
            let hello = encode_frame(&ToAgent::Hello { version: VERSION }.encode());
            let mut heard = vec![0; hello.len()];
            theirs.read_exact(&mut heard).expect("a hello");
            assert_eq!(heard, hello);
            let (start, end) = bytes.split_at(bytes.len() / 2);
            theirs.write_all(start).and_then(|()| theirs.write_all(end)).expect("a host");
        });
        let result = greet(&ours, Duration::from_secs(20));
        agent.join().expect("no panic");
        result.map(|greeting| {
            assert_eq!(greeting.uptime, Duration::from_micros(1));
            greeting.complaints
        })
    }

    #[test]
    fn an_agent_that_says_nothing_is_waited_for_as_long_as_was_said_and_no_longer() {
        let (ours, _theirs) = UnixStream::pair().expect("a socket pair");
        let asked = Instant::now();
        let error = greet(&ours, Duration::from_millis(50)).err().expect("nobody answers");
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!(asked.elapsed() >= Duration::from_millis(50));
    }

    #[test]
    fn an_agent_that_answers_is_believed_and_what_it_complains_of_is_told() {
        let complaint = encode_frame(&FromAgent::Log("no module".to_owned()).encode());
        assert!(greeted(ready(VERSION)).expect("an answer").is_empty());
        for bytes in [[complaint.clone(), ready(VERSION)], [ready(VERSION), complaint]] {
            assert_eq!(greeted(bytes.concat()).expect("an answer"), ["no module"]);
        }
    }

    #[test]
    fn what_is_no_answer_is_an_error() {
        let bye = encode_frame(&FromAgent::Bye.encode());
        for (bytes, kind) in [
            (Vec::new(), ErrorKind::UnexpectedEof),
            (ready(VERSION + 1), ErrorKind::InvalidData),
            (bye, ErrorKind::InvalidData),
            (vec![0xff; 64], ErrorKind::InvalidData),
        ] {
            assert_eq!(greeted(bytes.clone()).expect_err("no answer").kind(), kind, "{bytes:?}");
        }
    }
}
