//! A small client of QEMU's machine protocol: greeting, commands one at a time, and then the events.

use std::io::{self, BufRead, BufReader, Write};
use std::net::Shutdown;
use std::ops::Deref;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::threads;

/// Longest line that is taken from QEMU, which runs next to a hostile guest.
const MAX_LINE_BYTES: u64 = 1 << 20;
/// How many events are kept, the latest.
const MOST_EVENTS: usize = 64;
/// How long QEMU may take for an answer: on a host that is busy, or was stopped meanwhile, that is not its fault.
const PATIENCE: Duration = Duration::from_secs(90);

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
            } else {
                return taken(command, &mut answer);
            }
        }
    }

    /// Leaves memory that is shared where it is when the machine is frozen or goes on.
    ///
    /// # Errors
    /// Those of [`Qmp::execute`].
    pub fn ignore_shared_memory(&mut self) -> io::Result<()> {
        let capability = json!({"capability": "x-ignore-shared", "state": true});
        self.execute("migrate-set-capabilities", &json!({"capabilities": [capability]})).map(drop)
    }

    /// Stops the machine and writes its state, without its memory, to the set of descriptors `set`.
    ///
    /// # Errors
    /// Those of [`Qmp::execute`]; `Other` with QEMU's words where it cannot.
    pub fn freeze(&mut self, set: usize) -> io::Result<()> {
        self.ignore_shared_memory()?;
        self.execute("stop", &json!({}))?;
        self.execute("migrate", &json!({"uri": format!("file:/dev/fdset/{set}")}))?;
        let give_up = Instant::now() + PATIENCE;
        loop {
            let status = self.execute("query-migrate", &json!({}))?;
            match status["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => {
                    let why = status["error-desc"].as_str().unwrap_or("no reason given");
                    return Err(io::Error::other(why.to_owned()));
                }
                _ if Instant::now() < give_up => thread::sleep(Duration::from_millis(5)),
                _ => return Err(io::ErrorKind::TimedOut.into()),
            }
        }
    }

    /// From now on takes commands and gives `told` every event, in a thread that ends with the connection; then `told`
    /// is dropped.
    ///
    /// # Errors
    /// What duplicating the connection says; there is no thread.
    pub fn split(mut self, mut told: impl FnMut(Value) + Send + 'static) -> io::Result<Commands> {
        let writer = self.stream.get_ref().try_clone()?;
        self.stream.get_ref().set_read_timeout(None)?;
        let (sender, answers) = mpsc::channel();
        threads::start("qmp", move || {
            for event in self.events {
                told(event);
            }
            while let Ok(line) = read_line(&mut self.stream) {
                if line.get("event").is_some() {
                    told(line);
                } else if sender.send(line).is_err() {
                    break;
                }
            }
        })?;
        Ok(Commands { writer, answers })
    }

    /// From now on only listens, in a thread that ends with the connection.
    ///
    /// # Errors
    /// There is no thread.
    pub fn watch(mut self) -> io::Result<Watch> {
        let watch = Watch::default();
        for event in std::mem::take(&mut self.events) {
            watch.take(event);
        }
        let watching = watch.clone();
        let _ = self.stream.get_ref().set_read_timeout(None);
        threads::start("qmp", move || {
            // A guest can make QEMU send events without end; a line that is none ends the connection.
            while let Ok(event) = read_line(&mut self.stream) {
                watching.take(event);
            }
            watching.lock().ended = true;
            watching.changed.notify_all();
        })?;
        Ok(watch)
    }

    fn keep(&mut self, event: Value) {
        if self.events.len() == MOST_EVENTS {
            self.events.remove(0);
        }
        self.events.push(event);
    }
}

/// Commands to a QEMU whose events somebody else reads.
#[derive(Debug)]
pub(super) struct Commands {
    writer: UnixStream,
    answers: mpsc::Receiver<Value>,
}

impl Commands {
    /// Runs `command` and gives what it returns.
    ///
    /// # Errors
    /// Those of [`Qmp::execute`].
    pub fn execute(&mut self, command: &str, arguments: &Value) -> io::Result<Value> {
        let mut line = json!({"execute": command, "arguments": arguments}).to_string();
        line.push('\n');
        self.writer.write_all(line.as_bytes())?;
        let mut answer =
            self.answers.recv_timeout(PATIENCE).map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?;
        taken(command, &mut answer)
    }
}

/// What an answer to `command` returns.
fn taken(command: &str, answer: &mut Value) -> io::Result<Value> {
    match answer.get("error") {
        Some(error) => {
            let text = error["desc"].as_str().unwrap_or("no reason given");
            Err(io::Error::other(format!("QEMU refused {command}: {text}")))
        }
        None => Ok(answer["return"].take()),
    }
}

/// What QEMU has told since its machine was started.
#[derive(Debug, Clone, Default)]
pub(super) struct Watch(Arc<Watched>);

#[derive(Debug, Default)]
pub(super) struct Watched {
    // Written by the watching thread; read, and given the stream, by whoever holds the machine.
    state: Mutex<State>,
    // The connection has ended.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    shutdown: Option<String>,
    trouble: Option<DiskTrouble>,
    hang_up: Option<UnixStream>,
    ended: bool,
}

/// A disk that the host could not read or write. QEMU has stopped the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DiskTrouble {
    /// QEMU's name of the disk.
    pub node: String,
    /// The system's word.
    pub why: String,
}

impl Watch {
    /// Of a QEMU that tells nothing any more.
    pub fn ended() -> Self {
        let watch = Self::default();
        watch.lock().ended = true;
        watch
    }
}

impl Deref for Watch {
    type Target = Watched;

    fn deref(&self) -> &Watched {
        &self.0
    }
}

impl Watched {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, event: Value) {
        let mut state = self.lock();
        let data = &event["data"];
        let word = |name: &str| data[name].as_str().unwrap_or("no reason given").to_owned();
        match event["event"].as_str() {
            Some("SHUTDOWN") => state.shutdown = Some(word("reason")),
            // Errors that the guest is told of are its own business.
            Some("BLOCK_IO_ERROR") if data["action"] == "stop" => {
                state.trouble = Some(DiskTrouble { node: word("node-name"), why: word("reason") });
                if let Some(stream) = &state.hang_up {
                    let _ = stream.shutdown(Shutdown::Both);
                }
            }
            _ => {}
        }
    }

    /// Hangs up on `stream` when the machine is stopped for a disk: it would never answer again.
    pub fn hang_up_at_trouble(&self, stream: UnixStream) {
        let mut state = self.lock();
        if state.trouble.is_some() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        state.hang_up = Some(stream);
    }

    /// The disk that stopped the machine, if one did.
    pub fn trouble(&self) -> Option<DiskTrouble> {
        self.lock().trouble.clone()
    }

    /// Why the guest stopped its machine, if it did; QEMU is given `patience` to end.
    pub fn shutdown_reason(&self, patience: Duration) -> Option<String> {
        let waited = self.changed.wait_timeout_while(self.lock(), patience, |state| !state.ended);
        waited.unwrap_or_else(PoisonError::into_inner).0.shutdown.clone()
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

    #[test]
    fn a_disk_that_stops_the_machine_hangs_up_on_its_wire() {
        let stream = peer(
            b"{\"QMP\":{\"version\":{\"qemu\":{\"major\":10,\"minor\":0,\"micro\":2}},\"capabilities\":[]}}\n\
              {\"return\":{}}\n{\"event\":\"BLOCK_IO_ERROR\",\"data\":{\"action\":\"stop\",\"node-name\":\"disk1\",\"reason\":\"full\"}}\n\
              {\"event\":\"STOP\"}\n",
        );
        let watch = Qmp::open(stream).expect("a good greeting").watch().expect("a thread");
        let (mut ours, theirs) = UnixStream::pair().expect("a socket pair");
        watch.hang_up_at_trouble(theirs);
        assert_eq!(io::Read::read(&mut ours, &mut [0]).expect("hung up on"), 0);
        assert_eq!(watch.trouble(), Some(DiskTrouble { node: "disk1".to_owned(), why: "full".to_owned() }));
    }
}
