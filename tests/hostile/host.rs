//! The host's side of the wire as a target, and the collector and the merge behind it; the case is the agent.
//!
//! What the case says is written by one thread and what the host says read by another, so the agent may say
//! everything before the host asks for it.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;
use std::{fs, io};

use kiln::agent::{ExecEnd, Limits, Listing, Session, SessionError, TransferError};
use kiln::engine::RunError;
use kiln::engine::collect::{Collect, Collection, collect};
use kiln::engine::merge::{Merge, MergeError};
use kiln::plan::Outputs;
use kiln::store::Store;
use kiln_artifact::tree::{Kind, Node};
use kiln_wire::{Clock, Exec, Outcome, Setup, Source, Stream};

use super::changes::change;
use super::folder::Folder;
use super::hub::Shared;
use super::script::{Step, Target};
use super::value::Value;
use super::wire::{From, frame, is_entry};

/// How long the host waits for the agent's first word.
const PATIENCE: Duration = Duration::from_secs(10);
/// What is in the file that must never be reached.
const CANARY: &[u8] = b"outside of WORK";

/// What the agent's thread is to do.
enum Say {
    Bytes(Vec<u8>, u64),
    HangUp,
}

/// The agent's end of a conversation.
struct Liar {
    say: Sender<Say>,
    heard: JoinHandle<Vec<u8>>,
    host: Option<UnixStream>,
}

/// A conversation, and a store and a WORK that what is collected goes to.
pub struct HostTarget {
    folder: Folder,
    store: Store,
    liar: Liar,
    session: Option<Session>,
    /// The conversation once several commands share it.
    shared: Option<Shared>,
    /// How many entries the agent has listed.
    entries: u32,
    limits: Limits,
    listing: Option<Listing>,
    collection: Option<Collection>,
    /// Bytes of standard output and standard error of the last command.
    output: [u64; 2],
    /// Tags of the host's messages, once the conversation is over.
    heard: Option<Vec<u8>>,
}

fn say(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl Liar {
    fn new() -> Result<Self, String> {
        let (host, agent) = UnixStream::pair().map_err(say)?;
        let (sender, receiver) = channel::<Say>();
        let mut writer = agent.try_clone().map_err(say)?;
        std::thread::spawn(move || {
            for what in receiver {
                let done = match what {
                    Say::Bytes(bytes, times) => (0..times).try_for_each(|_| writer.write_all(&bytes)),
                    Say::HangUp => writer.shutdown(Shutdown::Write),
                };
                // A host that has hung up is what most of this leads to.
                if done.is_err() {
                    break;
                }
            }
        });
        let heard = std::thread::spawn(move || tags(agent));
        Ok(Self { say: sender, heard, host: Some(host) })
    }
}

/// The tags of all messages of the host's, when it has hung up.
fn tags(mut agent: UnixStream) -> Vec<u8> {
    let mut tags = Vec::new();
    let mut length = [0; 4];
    while agent.read_exact(&mut length).is_ok() {
        let mut payload = vec![0; usize::try_from(u32::from_le_bytes(length)).unwrap_or(0)];
        if agent.read_exact(&mut payload).is_err() {
            break;
        }
        tags.extend(payload.first());
    }
    tags
}

fn setup() -> Setup {
    Setup {
        seed: [7; 64],
        warm_up: false,
        clock: Clock { seconds: 0, nanoseconds: 0 },
        root: Source::Share("root".into()),
        scratch: None,
        layer_bytes: 0,
        processes: 0,
        mounts: Vec::new(),
        hostname: "kiln".into(),
        load_modules: Vec::new(),
    }
}

fn exec() -> Exec {
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

/// How something ended: the word for it, and what it says.
type Found = (&'static str, String);

fn session_end(error: &SessionError) -> Found {
    let word = match error {
        SessionError::Closed => "closed",
        SessionError::Silent { .. } => "silent",
        SessionError::Violation(_) => "violation",
        SessionError::Failed { .. } => "failed",
        SessionError::Output(_) => "output",
        SessionError::Io(_) => "io",
    };
    (word, error.to_string())
}

fn transfer_end(error: &TransferError) -> Found {
    match error {
        TransferError::Session(error) => session_end(error),
        TransferError::TooMany { .. } | TransferError::TooMuch { .. } => ("too_much", error.to_string()),
        TransferError::Store { .. } => ("store", error.to_string()),
    }
}

fn run_end(error: &RunError) -> Found {
    match error {
        RunError::Session(error) => session_end(error),
        RunError::Transfer(error) => transfer_end(error),
        RunError::MissingOutputs(_) => ("missing", error.to_string()),
        _ => ("error", error.to_string()),
    }
}

fn merge_end(error: &MergeError) -> Found {
    let word = match error {
        MergeError::Changed { .. } => "changed",
        MergeError::Kind { .. } => "kind",
        MergeError::Reserved { .. } => "reserved",
        MergeError::Unreadable { .. } => "unreadable",
        MergeError::InTheWay { .. } => "in-the-way",
        MergeError::NoStaging { .. } => "no-staging",
        MergeError::Io { .. } => "io",
    };
    (word, error.to_string())
}

/// Nothing went wrong.
const OK: Found = ("ok", String::new());

impl HostTarget {
    /// A conversation in which nobody has said anything.
    pub fn new() -> Result<Self, String> {
        let folder = Folder::new();
        folder.folder("work");
        folder.file("outside/canary", CANARY);
        fs::set_permissions(folder.path("outside"), fs::Permissions::from_mode(0o755)).map_err(say)?;
        let store = Store::open(&folder.path("store")).map_err(say)?;
        Ok(Self {
            folder,
            store,
            liar: Liar::new()?,
            session: None,
            shared: None,
            entries: 0,
            limits: Limits::default(),
            listing: None,
            collection: None,
            output: [0; 2],
            heard: None,
        })
    }

    fn open(&mut self, patience: Duration) -> Result<Found, String> {
        let host = self.liar.host.take().ok_or("the conversation was opened before")?;
        Ok(match Session::open(host, patience) {
            Ok(session) => {
                self.session = Some(session);
                OK
            }
            Err(error) => session_end(&error),
        })
    }

    fn say(&self, bytes: Vec<u8>, times: u64) -> Result<(), String> {
        self.liar.say.send(Say::Bytes(bytes, times)).map_err(|_| "the agent's thread is gone".to_owned())
    }

    /// One exchange of the host's with the agent.
    fn exchange(&mut self, step: &mut Step) -> Result<Option<Found>, String> {
        let outputs = |step: &Step| {
            let globs = (0..step.count()).map(|index| step.bytes_at(index));
            let globs = globs.map(|glob| Ok(String::from_utf8_lossy(&glob?).into_owned()));
            let globs = globs.collect::<Result<Vec<String>, String>>()?;
            Outputs::parse(globs.iter().map(String::as_str)).map_err(say)
        };
        let patience = step.number("patience_ms", 0)?;
        if step.verb == "open" {
            let patience = if patience == 0 { PATIENCE } else { Duration::from_millis(patience) };
            return self.open(patience).map(Some);
        }
        if let Some(shared) = &mut self.shared {
            return Ok(Some(match step.verb.as_str() {
                "start" => shared.start(exec()).map_or_else(|error| session_end(&error), |()| OK),
                "hears" => shared.hear(step)?,
                "leave" => shared.leave(step).map(|()| OK)?,
                "ends" => shared.end()?.map_or_else(|error| session_end(&error), |()| OK),
                "power_off" => shared.power_off().map_or_else(|error| session_end(&error), |()| OK),
                _ => return Ok(None),
            }));
        }
        let (limits, store) = (self.limits, &self.store);
        let session = self.session.as_mut().ok_or("no conversation is open");
        Ok(Some(match step.verb.as_str() {
            "setup" => session?.setup(setup()).map_or_else(|error| session_end(&error), |_| OK),
            "exec" => {
                let (mut output, fails) = ([0; 2], step.word(0) == "full");
                let mut take = |stream, data: &[u8]| {
                    output[usize::from(stream == Stream::Stderr)] += data.len() as u64;
                    if fails { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
                };
                let end = session?.exec(exec(), None, &mut take);
                self.output = output;
                match end {
                    Ok(ExecEnd::Ran(Outcome::Exit(status), _)) => ("exit", format!("status {status}")),
                    Ok(ExecEnd::Ran(Outcome::Signal(signal), _)) => ("signal", format!("signal {signal}")),
                    Ok(ExecEnd::Ran(Outcome::TimedOut, _)) => ("timed_out", String::new()),
                    Ok(ExecEnd::NotStarted { error, why }) => ("not_started", format!("{error}: {why}")),
                    Err(error) => session_end(&error),
                }
            }
            "power_off" => session?.power_off().map_or_else(|error| session_end(&error), |_| OK),
            "list" => match Listing::receive(session?, b"/x/project", &limits) {
                Ok(listing) => {
                    self.listing = Some(listing);
                    OK
                }
                Err(error) => transfer_end(&error),
            },
            "fetch" => {
                let listing = self.listing.as_mut().ok_or("nothing was listed")?;
                let all: BTreeSet<u32> = listing.entries().map(|(_, entry)| entry.ordinal).collect();
                let fetched = listing.fetch(session?, store.blobs(), &limits, &all);
                fetched.map_or_else(|error| transfer_end(&error), |_| OK)
            }
            "collect" => {
                let outputs = outputs(step)?;
                let what = Collect { target: b"/x/project", outputs: &outputs, limits: &limits, epoch: 1 };
                match collect(&what, session?, store.blobs()) {
                    Ok(collection) => {
                        self.collection = Some(collection);
                        OK
                    }
                    Err(error) => run_end(&error),
                }
            }
            "merge" => {
                let collection = self.collection.as_ref().ok_or("nothing was collected")?;
                let work = self.folder.path("work");
                let merge = Merge { store, work: &work, step: "s", overwrite: step.word(0) == "overwrite" };
                merge.run(&collection.outputs).map_or_else(|error| merge_end(&error), |_| OK)
            }
            _ => return Ok(None),
        }))
    }

    /// Hangs up, and waits for what the host had said.
    fn close(&mut self) -> Result<&[u8], String> {
        if self.heard.is_none() {
            (self.session, self.shared) = (None, None);
            let liar = std::mem::replace(&mut self.liar, Liar::new()?);
            let _ = liar.say.send(Say::HangUp);
            drop((liar.say, liar.host));
            self.heard = Some(liar.heard.join().map_err(|_| "the agent's reader panicked".to_owned())?);
        }
        Ok(self.heard.as_deref().unwrap_or_default())
    }

    /// The content that was fetched for an entry.
    fn content(&self, ordinal: u32) -> Result<Value, String> {
        let listing = self.listing.as_ref().ok_or("nothing was listed")?;
        match listing.node(ordinal) {
            Some(Node { kind: Kind::File { digest, .. }, .. }) => {
                fs::read(self.store.blobs().path(&digest)).map(Value::Bytes).map_err(say)
            }
            _ => Err(format!("no content was fetched for entry {ordinal}")),
        }
    }
}

/// What lies in a folder, sorted: a folder as `PATH/`, a link as `PATH@`.
fn tree(folder: &Path, prefix: &str, found: &mut Vec<String>) -> io::Result<()> {
    let mut entries = fs::read_dir(folder)?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let name = format!("{prefix}{}", entry.file_name().as_bytes().escape_ascii());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            found.push(format!("{name}/"));
            tree(&entry.path(), &format!("{name}/"), found)?;
        } else {
            found.push(if kind.is_symlink() { format!("{name}@") } else { name });
        }
    }
    Ok(())
}

/// Bytes on disk beneath a folder.
fn disk_bytes(folder: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        bytes += if meta.is_dir() { disk_bytes(&entry.path())? } else { meta.blocks() * 512 };
    }
    Ok(bytes)
}

impl Target for HostTarget {
    fn act(&mut self, step: &mut Step) -> Result<(), String> {
        match step.verb.as_str() {
            "host" => return change(&self.folder, step),
            "hang_up" => {
                return self.liar.say.send(Say::HangUp).map_err(|_| "the agent's thread is gone".to_owned());
            }
            // An agent that was honest so far.
            "ready" => {
                step.verb = "READY".to_owned();
                let frame = frame(From::Agent, step, 0)?.ok_or("no READY")?;
                self.say(frame, 1)?;
                return match self.open(PATIENCE)? {
                    ("ok", _) => Ok(()),
                    (word, text) => Err(format!("a good agent is `{word}`: {text}")),
                };
            }
            "share" => {
                let session = self.session.take().ok_or("no conversation is open")?;
                self.shared = Some(Shared::new(session)?);
                return Ok(());
            }
            "limits" => {
                self.limits.entries = step.number("entries", self.limits.entries)?;
                self.limits.total_bytes = step.number("bytes", self.limits.total_bytes)?;
                return Ok(());
            }
            _ => {}
        }
        let times = step.number("times", 1_u64)?;
        if let Some(frame) = frame(From::Agent, step, self.entries)? {
            self.entries += u32::from(is_entry(&step.verb));
            return self.say(frame, times);
        }
        let Some((word, text)) = self.exchange(step)? else {
            return Err(format!("`{}` is not known here", step.verb));
        };
        if step.expected_word().unwrap_or("ok") != word {
            return Err(step.unlike(format!("{word} ({text})")));
        }
        step.expect_text(&text)
    }

    fn name(&self, name: &str) -> Option<Value> {
        match name {
            "stdout_bytes" => Some(Value::from(self.output[0])),
            "stderr_bytes" => Some(Value::from(self.output[1])),
            "VERSION" => Some(Value::from(u64::from(kiln_wire::VERSION))),
            "MAX_FRAME" => Some(Value::from(kiln_wire::MAX_FROM_AGENT_BYTES)),
            "MAX_DATA" => Some(Value::from(kiln_wire::MAX_DATA_BYTES)),
            _ => None,
        }
    }

    fn call(&mut self, function: &str, arguments: &[Value]) -> Result<Value, String> {
        let path = |value: &Value| {
            let path = value.bytes("path")?;
            let path = Path::new(std::ffi::OsStr::from_bytes(path));
            super::changes::inside(&self.folder, path)
        };
        match (function, arguments) {
            ("heard", []) => {
                let names: Vec<&str> = self.close()?.iter().map(|tag| From::Host.name(*tag)).collect();
                Ok(Value::Bytes(names.join(" ").into_bytes()))
            }
            ("content", [ordinal]) => self.content(ordinal.to("content")?),
            ("listed", []) => Ok(Value::from(self.listing.as_ref().map_or(0, |list| list.entries().count()))),
            ("undeclared", []) => {
                let collection = self.collection.as_ref().ok_or("nothing was collected")?;
                let paths: Vec<String> = collection.undeclared.iter().map(ToString::to_string).collect();
                Ok(Value::Bytes(paths.join(" ").into_bytes()))
            }
            ("tree", [folder]) => {
                let mut found = Vec::new();
                tree(&path(folder)?, "", &mut found).map_err(say)?;
                Ok(Value::Bytes(found.join(" ").into_bytes()))
            }
            ("file", [name]) => fs::read(path(name)?).map(Value::Bytes).map_err(say),
            ("target", [name]) => {
                let target = fs::read_link(path(name)?).map_err(say)?;
                Ok(Value::Bytes(target.as_os_str().as_bytes().to_vec()))
            }
            ("mode", [name]) => {
                let mode = fs::symlink_metadata(path(name)?).map_err(say)?.mode();
                Ok(Value::from(u64::from(mode & 0o7777)))
            }
            ("disk_bytes", [folder]) => disk_bytes(&path(folder)?).map(Value::from).map_err(say),
            _ => Err(format!("`{function}()` is not known here")),
        }
    }

    fn serve(&mut self) -> Result<(), String> {
        self.close()?;
        let mut agent = Self::new()?;
        let script = "# an honest agent\nagainst host\nready\nSETUP_DONE\nsetup\nEXITED\nexec -> exit \"0\"\n\
                      DIR\nFILE path=\"a\" size=4\nLIST_DONE\nFILE_START\nFILE_DATA data=\"good\"\nFILE_END size=4\n\
                      FETCH_DONE\ncollect \"a\"\nmerge\nexpect file(\"work/a\") == \"good\"\n";
        let case = super::case::Case::parse(Path::new("honest"), script)?;
        super::script::run(&case, &mut agent).map_err(|error| format!("an honest agent: {error}"))?;
        agent.close().map(drop)
    }

    fn untouched(&self) -> Result<(), String> {
        let canary = self.folder.path("outside");
        let mut found = Vec::new();
        tree(&canary, "", &mut found).map_err(say)?;
        let mode = fs::metadata(&canary).map_err(say)?.mode() & 0o777;
        let content = fs::read(canary.join("canary")).map_err(say)?;
        if found != ["canary"] || mode != 0o755 || content != CANARY {
            return Err(format!("something outside of WORK was touched: {found:?}, mode {mode:o}"));
        }
        match fs::read_dir(self.store.temporary()).map_err(say)?.count() {
            0 => Ok(()),
            left => Err(format!("{left} temporary files are left in the store")),
        }
    }
}
