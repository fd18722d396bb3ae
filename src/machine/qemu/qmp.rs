//! A small client of QEMU's machine protocol: greeting, commands one at a time, and the events in between.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Longest line that is taken from QEMU, which runs next to a hostile guest.
const MAX_LINE_BYTES: u64 = 1 << 20;
/// How many events are kept, the latest.
const MOST_EVENTS: usize = 64;
/// How long QEMU may take for an answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// A connection in command mode.
#[derive(Debug)]
pub(super) struct Qmp {
    stream: BufReader<UnixStream>,
    events: Vec<Value>,
    /// QEMU's version, such as `10.0.2`.
    pub version: Version,
}

/// QEMU's version, as its greeting gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version {
    pub major: u64,
    pub minor: u64,
    pub micro: u64,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

impl Qmp {
    /// Takes the greeting and enters command mode.
    ///
    /// # Errors
    /// `UnexpectedEof` when QEMU is gone; `InvalidData` when it speaks nonsense.
    pub fn open(stream: UnixStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut stream = BufReader::new(stream);
        let greeting = read_line(&mut stream)?;
        let part = |name: &str| {
            greeting["QMP"]["version"]["qemu"][name]
                .as_u64()
                .ok_or_else(|| nonsense("no version in its greeting"))
        };
        let version = Version { major: part("major")?, minor: part("minor")?, micro: part("micro")? };
        let mut qmp = Self { stream, events: Vec::new(), version };
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Runs `command` and gives what it returns. Events that come first are kept.
    ///
    /// # Errors
    /// `UnexpectedEof` when QEMU is gone, `TimedOut` or `WouldBlock` when it does not answer, `Other` with QEMU's
    /// words when it refuses.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> io::Result<Value> {
        let mut line = json!({"execute": command, "arguments": arguments}).to_string();
        line.push('\n');
        self.stream.get_mut().write_all(line.as_bytes())?;
        loop {
            let mut answer = read_line(&mut self.stream)?;
            if answer.get("event").is_some() {
                self.keep(answer);
            } else if let Some(error) = answer.get("error") {
                let text = error["desc"].as_str().unwrap_or("no reason given");
                return Err(io::Error::other(format!("QEMU refused {command}: {text}")));
            } else {
                return Ok(answer["return"].take());
            }
        }
    }

    /// All events up to the moment QEMU closes the connection or `patience` is over.
    pub fn last_events(&mut self, patience: Duration) -> &[Value] {
        let deadline = Instant::now() + patience;
        loop {
            // A guest can make QEMU send events without end.
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.stream.get_ref().set_read_timeout(Some(left)).is_err() {
                return &self.events;
            }
            match read_line(&mut self.stream) {
                Ok(message) => self.keep(message),
                Err(_) => return &self.events,
            }
        }
    }

    fn keep(&mut self, event: Value) {
        if self.events.len() == MOST_EVENTS {
            self.events.remove(0);
        }
        self.events.push(event);
    }
}

fn nonsense(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("QEMU's monitor: {what}"))
}

fn read_line(stream: &mut BufReader<UnixStream>) -> io::Result<Value> {
    let mut line = Vec::new();
    io::Read::take(&mut *stream, MAX_LINE_BYTES).read_until(b'\n', &mut line)?;
    if line.last() != Some(&b'\n') {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    serde_json::from_slice(&line).map_err(|_| nonsense("a line that is not JSON"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(script: &'static [u8]) -> UnixStream {
        let (ours, mut theirs) = UnixStream::pair().expect("a socket pair");
        theirs.write_all(script).expect("room in the socket");
        std::thread::spawn(move || {
            let _ = io::copy(&mut theirs, &mut io::sink());
        });
        ours
    }

    #[test]
    fn the_greeting_gives_the_version_and_events_are_kept() {
        let stream = peer(
            b"{\"QMP\":{\"version\":{\"qemu\":{\"major\":10,\"minor\":0,\"micro\":2}},\"capabilities\":[]}}\n\
              {\"event\":\"RESUME\"}\n{\"return\":{}}\n{\"error\":{\"desc\":\"no\"}}\n",
        );
        let mut qmp = Qmp::open(stream).expect("a good greeting");
        assert_eq!(qmp.version.to_string(), "10.0.2");
        assert_eq!(qmp.events.len(), 1);
        let error = qmp.execute("stop", &json!({})).expect_err("refused");
        assert!(error.to_string().contains("QEMU refused stop: no"), "{error}");
    }

    #[test]
    fn a_peer_that_speaks_nonsense_is_refused() {
        assert!(Qmp::open(peer(b"hello\n")).is_err());
        assert!(Qmp::open(peer(b"{\"QMP\":{}}\n")).is_err());
    }
}
