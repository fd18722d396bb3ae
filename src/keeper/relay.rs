//! Callers inside a kept machine: each runs one command, and what it and the agent say to each other is passed on.
//!
//! What comes of the agent was checked by the hub and is encoded anew; what a caller sends can concern its own command
//! only, and one that breaks the rules loses it. A caller that goes takes its command with it: first by a hang-up, as of a
//! terminal, then by force.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use kiln_wire::{Exec, FrameReader, FromAgent, MAX_PAYLOAD_BYTES, ToAgent, encode_frame};

use crate::agent::{Hub, Remote};
use crate::threads;

/// SIGHUP.
const HANG_UP: u8 = 1;
/// How long a command whose caller went has between SIGHUP and SIGKILL.
const GRACE: Duration = Duration::from_secs(2);
/// How long the agent may take to tell of a command that was killed.
const KILL_PATIENCE: Duration = Duration::from_secs(30);

/// What its keeper learns of what goes on in a kept machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum News {
    /// A caller came in.
    Came,
    /// One left.
    Left,
    /// Somebody wants the machine to end.
    Stop,
    /// It is gone.
    Gone,
}

/// What callers share: the session, and what their commands have in common.
pub(super) struct Guests {
    hub: Hub,
    environment: Vec<Vec<u8>>,
    directory: Vec<u8>,
    news: Sender<News>,
}

impl Guests {
    /// Callers who run commands in `hub`, in `environment` and `directory` where they do not say otherwise.
    pub fn new(hub: Hub, environment: Vec<Vec<u8>>, directory: Vec<u8>, news: Sender<News>) -> Self {
        Self { hub, environment, directory, news }
    }

    /// Passes a wish for the end on.
    pub fn stop(&self) {
        let _ = self.news.send(News::Stop);
    }

    /// Serves one caller to its end.
    pub fn serve(&self, caller: &UnixStream) -> io::Result<()> {
        let _ = self.news.send(News::Came);
        let served = self.run_one(caller);
        let _ = caller.shutdown(Shutdown::Both);
        let _ = self.news.send(News::Left);
        served
    }

    fn run_one(&self, caller: &UnixStream) -> io::Result<()> {
        let mut inbox = Inbox { stream: caller, reader: FrameReader::new(MAX_PAYLOAD_BYTES) };
        let Some(ToAgent::Exec(exec)) = inbox.next()? else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "no command"));
        };
        let id = exec.id;
        let exec = complete(exec, &self.environment, &self.directory);
        let (remote, messages) = self.hub.start(exec).map_err(io::Error::other)?;
        let gone = AtomicBool::new(false);
        // Nothing is ever sent: it ends with the command.
        let (over, ends) = channel::<()>();
        thread::scope(|scope| {
            let reading = threads::start_in(scope, "relay", || {
                while let Ok(Some(message)) = inbox.next() {
                    if remote.pass(message).is_err() {
                        break;
                    }
                }
                gone.store(true, Ordering::Release);
                see_out(&remote, ends);
            });
            if reading.is_err() {
                // Nobody could tell that the caller leaves: the command ends at once.
                gone.store(true, Ordering::Release);
                remote.take_all();
                remote.kill();
            }
            pass_on(messages.iter().map(|message| renumbered(message, id)), &remote, caller, &gone);
            drop(over);
            // Ends the other thread too.
            let _ = caller.shutdown(Shutdown::Both);
            reading.map(drop)
        })
    }
}

/// Adds what a caller left out: the variables and the working directory of the machine's step.
pub(super) fn complete(mut exec: Exec, environment: &[Vec<u8>], directory: &[u8]) -> Exec {
    let name = |variable: &[u8]| variable.iter().position(|&byte| byte == b'=').unwrap_or(variable.len());
    let is_set = |variable: &Vec<u8>| {
        let length = name(variable);
        exec.env.iter().any(|own| name(own) == length && own[..length] == variable[..length])
    };
    let mut env: Vec<Vec<u8>> = environment.iter().filter(|variable| !is_set(variable)).cloned().collect();
    env.append(&mut exec.env);
    exec.env = env;
    if exec.cwd.is_empty() {
        exec.cwd = directory.to_vec();
    }
    exec
}

/// What a caller sends.
struct Inbox<'a> {
    stream: &'a UnixStream,
    reader: FrameReader,
}

impl Inbox<'_> {
    /// The next message; `None` at the end.
    fn next(&mut self) -> io::Result<Option<ToAgent>> {
        let nonsense = |error: String| io::Error::new(io::ErrorKind::InvalidData, error);
        let mut buffer = [0; 16 << 10];
        loop {
            if let Some(payload) = self.reader.next().map_err(|error| nonsense(error.to_string()))? {
                return ToAgent::decode(&payload).map(Some).map_err(|error| nonsense(error.to_string()));
            }
            match self.stream.read(&mut buffer) {
                Ok(0) => return Ok(None),
                Ok(count) => self.reader.push(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// What concerns a command, by its caller's number for it.
fn renumbered(mut message: FromAgent, by_caller: u32) -> FromAgent {
    match &mut message {
        FromAgent::Started { id }
        | FromAgent::ExecFailed { id, .. }
        | FromAgent::Output { id, .. }
        | FromAgent::Credit { id, .. }
        | FromAgent::Exited { id, .. } => *id = by_caller,
        // The hub hands out nothing else.
        _ => {}
    }
    message
}

/// Ends a command whose caller is gone.
fn see_out(remote: &Remote, ends: Receiver<()>) {
    let outlives = |patience| ends.recv_timeout(patience) == Err(RecvTimeoutError::Timeout);
    remote.take_all();
    let _ = remote.pass(ToAgent::Signal { id: 0, signal: HANG_UP });
    if !outlives(GRACE) {
        return;
    }
    remote.kill();
    // An agent that does not tell of the end must not keep the caller's place taken.
    if outlives(KILL_PATIENCE) {
        remote.disown();
    }
}

/// Passes on what the agent says of a command until the command is over.
fn pass_on(
    messages: impl Iterator<Item = FromAgent>,
    remote: &Remote,
    mut caller: &UnixStream,
    gone: &AtomicBool,
) {
    for message in messages {
        let is_gone =
            gone.load(Ordering::Acquire) || caller.write_all(&encode_frame(&message.encode())).is_err();
        if is_gone {
            remote.take_all();
        }
    }
}
