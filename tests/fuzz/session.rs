//! The host's conversation with an agent, from its greeting to its goodbye: session, listing and transfer.
//!
//! An input is the stream that the agent sends, whatever it is asked. It is there before the host reads, and then ends.

use std::collections::BTreeSet;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use kiln::agent::{Limits, Listing, Session, SessionError};
use kiln::store::{Blobs, Store};
use kiln_artifact::tree::Builder;
use kiln_wire::{Clock, EntryKind, Exec, FromAgent, Setup, Source, encode_frame};
use tempfile::TempDir;

use crate::driver::{Seen, Target, campaign};
use crate::messages;
use crate::random::Random;

const LIMITS: Limits = Limits { entries: 64, total_bytes: 1 << 20, printed_bytes: 1 << 20, processes: 64 };

struct Conversation {
    // Holds the store for as long as the target lives.
    _folder: TempDir,
    _store: Store,
    blobs: Blobs,
    runs: u32,
}

/// Runs after which the store is a fresh one: changed contents are new blobs.
const RUNS_IN_STORE: u32 = 20_000;

/// What one conversation came to, as far as it went.
fn converse(stream: UnixStream, blobs: &Blobs, seen: &mut Seen) -> Result<(), Box<dyn std::error::Error>> {
    let mut session = Session::open(stream, Duration::from_secs(10))?;
    seen.note(1);
    session.setup(Setup {
        seed: [0; 64],
        warm_up: false,
        clock: Clock { seconds: 0, nanoseconds: 0 },
        root: Source::Share(String::new()),
        scratch: None,
        layer_bytes: 0,
        processes: 0,
        mounts: Vec::new(),
        hostname: String::new(),
        load_modules: Vec::new(),
    })?;
    seen.note(2);
    let exec: Exec = messages::exec(&mut Random::new(0));
    let mut printed = 0;
    session.exec(exec, None, &mut |_, bytes| {
        printed += bytes.len();
        Ok(())
    })?;
    seen.note(3);
    let mut listing = Listing::receive(&mut session, b"/work", &LIMITS)?;
    assert!(listing.entries().count() <= LIMITS.entries as usize);
    let wanted: BTreeSet<u32> = listing.entries().map(|(_, entry)| entry.ordinal).collect();
    for ordinal in &wanted {
        seen.note(4 << 8 | kind_number(&listing.entry(*ordinal).expect("listed").kind));
    }
    listing.fetch(&mut session, blobs, &LIMITS, &wanted)?;
    let (bytes, files) = listing.totals();
    assert!(bytes <= LIMITS.total_bytes && files <= wanted.len());
    seen.note(5 << 8 | files.min(8) as u64);
    check_tree(&listing, &wanted, blobs);
    session.power_off()?;
    seen.note(6);
    Ok(())
}

fn kind_number(kind: &EntryKind) -> u64 {
    match kind {
        EntryKind::Directory { .. } => 0,
        EntryKind::File { .. } => 1,
        EntryKind::Symlink(_) => 2,
        EntryKind::HardLink { .. } => 3,
        _ => 4,
    }
}

/// What was accepted makes a tree, whose contents are in the store.
fn check_tree(listing: &Listing, wanted: &BTreeSet<u32>, blobs: &Blobs) {
    let mut builder = Builder::new();
    for ordinal in wanted {
        let path = listing.path(*ordinal).expect("listed").clone();
        let Some(node) = listing.node(*ordinal) else { continue };
        match node.kind {
            kiln_artifact::tree::Kind::HardLink(target) => {
                assert!(builder.link(path, &target), "a link leads to an entry before it");
            }
            kiln_artifact::tree::Kind::File { digest, size } => {
                let stored = blobs.path(&digest).metadata().expect("a content that was fetched");
                assert_eq!(stored.len(), size);
                builder.put(path, node);
            }
            _ => builder.put(path, node),
        }
    }
    // What no file system could hold is refused here, and not by a panic.
    let _ = builder.finish();
}

impl Target for Conversation {
    const NAME: &'static str = "session";
    const MOST_BYTES: usize = 32 << 10;

    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(&folder.path().join("store")).expect("a store");
        Self { blobs: store.blobs().clone(), _folder: folder, _store: store, runs: 0 }
    }

    fn generate(&mut self, random: &mut Random, input: &mut Vec<u8>) {
        let mut said = vec![messages::ready(), FromAgent::SetupDone, FromAgent::Started { id: 1 }];
        for _ in 0..random.below(3) {
            said.push(messages::output(random, 1));
        }
        said.push(messages::exited(random, 1));
        let mut files = Vec::new();
        let count = u32::try_from(random.below(8)).expect("small");
        for ordinal in 0..count {
            let kind = match ordinal {
                0 => EntryKind::Directory { opaque: false },
                _ => messages::entry_kind(random, ordinal),
            };
            // Names that meet seldom, so that most lists are accepted.
            let path = if ordinal == 0 { Vec::new() } else { vec![b'a' + random.byte() % 16] };
            if let EntryKind::File { size } = kind {
                files.push((ordinal, size));
            }
            said.push(FromAgent::Entry(messages::entry(random, ordinal, path, kind)));
        }
        said.push(FromAgent::ListDone { entries: count });
        for &(ordinal, size) in &files {
            said.push(FromAgent::FileStart { ordinal });
            if size > 0 {
                let length = usize::try_from(size).expect("small").min(random.pick(&[1, 10, 5000]));
                let offset = size - length as u64;
                said.push(FromAgent::FileData { offset, data: vec![random.byte() % 3; length] });
            }
            said.push(FromAgent::FileEnd { size });
        }
        if !files.is_empty() {
            said.push(FromAgent::FetchDone);
        }
        said.push(FromAgent::Bye);
        // One lie in half of the conversations: something left out, said twice, or said that belongs nowhere.
        let at = random.below(said.len());
        match random.below(6) {
            0 => drop(said.remove(at)),
            1 => said.insert(at, said[at].clone()),
            2 => said.insert(at, messages::from_agent(random)),
            _ => {}
        }
        input.extend(said.iter().flat_map(|message| encode_frame(&message.encode())));
    }

    fn parts(input: &[u8]) -> Vec<usize> {
        messages::frame_ends(input)
    }

    fn run(&mut self, input: &[u8], seen: &mut Seen) {
        self.runs += 1;
        if self.runs > RUNS_IN_STORE {
            *self = Self::new();
        }
        let (host, mut agent) = UnixStream::pair().expect("a pair");
        // All of it fits into the socket's buffer, or the rest is cut off.
        agent.set_nonblocking(true).expect("a socket");
        let _ = agent.write(input);
        agent.shutdown(Shutdown::Write).expect("a socket");
        match converse(host, &self.blobs, seen) {
            Ok(()) => seen.note(7),
            Err(error) => {
                // The words without what they name: a list of its own is kept of those.
                let text = error.to_string();
                let words = text.bytes().take(24).filter(u8::is_ascii_lowercase);
                seen.note(words.fold(8, |hash: u64, byte| hash.wrapping_mul(31).wrapping_add(byte.into())));
                let silent = error.downcast_ref::<SessionError>();
                assert!(
                    !matches!(silent, Some(SessionError::Silent { .. })),
                    "an end of the stream is no silence"
                );
            }
        }
    }

    fn memory_limit(input_bytes: usize) -> usize {
        // The session reads 64 KiB at a time.
        (512 << 10) + 64 * input_bytes
    }
}

#[test]
fn no_agent_breaks_the_hosts_session() {
    campaign::<Conversation>();
}
