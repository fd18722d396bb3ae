//! Random messages of the wire, right in form. A message that is not made here is still fuzzed by its tag.

use kiln_wire::*;

use crate::random::Random;

/// A number for what is wrong with a payload.
pub fn kind_of(error: &DecodeError) -> u64 {
    let text = match error {
        DecodeError::Short { what } => (1, *what),
        DecodeError::Trailing { .. } => (2, ""),
        // `is_unknown_tag` looks for this one.
        DecodeError::Tag { what, .. } if what.starts_with("message") => (0, ""),
        DecodeError::Tag { what, .. } => (3, *what),
        DecodeError::Limit { what, .. } => (4, *what),
        DecodeError::Utf8 { what } => (5, *what),
        DecodeError::Invalid { what } => (6, *what),
    };
    // FNV-1a.
    let hash = text.1.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    if text.0 == 0 { 0 } else { hash >> 20 << 3 | text.0 }
}

pub fn is_unknown_tag(decoded: Result<Vec<u8>, u64>) -> bool {
    decoded == Err(0)
}

/// Where the frames of a stream end; what is left over is the last.
pub fn frame_ends(stream: &[u8]) -> Vec<usize> {
    let (mut ends, mut at) = (Vec::new(), 0);
    while let Some(header) = stream.get(at..).and_then(|rest| rest.first_chunk()) {
        at = at.saturating_add(4 + u32::from_le_bytes(*header) as usize).min(stream.len());
        ends.push(at);
    }
    if at < stream.len() {
        ends.push(stream.len());
    }
    ends
}

fn name(random: &mut Random) -> String {
    random.pick(&["", "root", "src", "a", "é", "kiln-work", "vda"]).to_owned()
}

/// A few names, so that they meet.
pub fn path(random: &mut Random) -> Vec<u8> {
    let parts = 1 + random.below(3);
    let names: Vec<&str> = (0..parts).map(|_| random.pick(&["a", "b", "c", "dir", "x.o"])).collect();
    names.join("/").into_bytes()
}

fn data(random: &mut Random) -> Vec<u8> {
    let length = random.pick(&[0, 1, 3, 8, 40, 200]);
    vec![random.byte(); length]
}

fn strings(random: &mut Random) -> Vec<Vec<u8>> {
    (0..random.below(4)).map(|_| random.pick(&["", "A=b", "--flag", "sh"]).as_bytes().to_vec()).collect()
}

fn source(random: &mut Random) -> Source {
    match random.below(4) {
        0 => Source::Share(name(random)),
        1 => Source::Disk {
            serial: name(random),
            filesystem: "erofs".to_owned(),
            read_only: random.once_in(2),
        },
        2 => Source::Modules(name(random)),
        _ => Source::Within(format!("/{}", name(random)).into_bytes()),
    }
}

fn mount(random: &mut Random) -> Mount {
    Mount {
        source: source(random),
        target: [b"/".to_vec(), path(random)].concat(),
        access: random.pick(&[Access::ReadOnly, Access::Layered, Access::Direct]),
    }
}

fn size(random: &mut Random) -> TerminalSize {
    TerminalSize { rows: random.u16(), columns: random.u16() }
}

fn scratch(random: &mut Random) -> Scratch {
    Scratch { serial: name(random), bytes: random.edge() }
}

/// Any message of a host's.
pub fn to_agent(random: &mut Random) -> ToAgent {
    match random.below(13) {
        0 => ToAgent::Hello { version: VERSION },
        1 => ToAgent::Setup(Setup {
            seed: [random.byte(); 64],
            warm_up: random.once_in(2),
            clock: Clock { seconds: random.edge().cast_signed(), nanoseconds: random.u32() >> 3 },
            root: source(random),
            scratch: random.once_in(2).then(|| scratch(random)),
            layer_bytes: random.edge(),
            processes: 0,
            mounts: (0..random.below(4)).map(|_| mount(random)).collect(),
            hostname: name(random),
            load_modules: (0..random.below(3)).map(|_| name(random)).collect(),
        }),
        2 | 3 => ToAgent::Exec(exec(random)),
        4 => ToAgent::Stdin { id: random.edge32(), data: data(random) },
        5 => ToAgent::Signal { id: random.edge32(), signal: random.byte() },
        6 => ToAgent::List { target: [b"/".to_vec(), path(random)].concat() },
        7 => ToAgent::Mount(mount(random)),
        8 => ToAgent::Credit { id: random.edge32(), bytes: random.u32().max(1) },
        9 => ToAgent::Resize { id: random.edge32(), size: size(random) },
        10 => ToAgent::Fetch { ordinals: (0..random.below(6)).map(|_| random.edge32()).collect() },
        11 => ToAgent::Settle { seed: [random.byte(); 64], scratch: scratch(random) },
        _ => ToAgent::PowerOff,
    }
}

/// A command.
pub fn exec(random: &mut Random) -> Exec {
    let mut argv = strings(random);
    argv.push(b"sh".to_vec());
    Exec {
        id: 1,
        argv,
        env: strings(random),
        cwd: b"/".to_vec(),
        timeout_ms: random.edge(),
        grace_ms: random.edge(),
        stdin: random.once_in(2),
        terminal: random.once_in(2).then(|| size(random)),
    }
}

/// An entry of a layer.
pub fn entry(random: &mut Random, ordinal: u32, path: Vec<u8>, kind: EntryKind) -> Entry {
    let xattrs = if random.once_in(4) {
        vec![(random.pick(&["user.a", "trusted.overlay.x", ""]).as_bytes().to_vec(), data(random))]
    } else {
        Vec::new()
    };
    Entry {
        ordinal,
        path,
        kind,
        mode: random.u16() & 0o7777,
        uid: random.pick(&[0, 1000, u32::MAX]),
        gid: 0,
        mtime_seconds: random.edge().cast_signed(),
        mtime_nanoseconds: random.u32() >> 3,
        xattrs,
    }
}

/// What an entry is; links lead to an ordinal below `before`.
pub fn entry_kind(random: &mut Random, before: u32) -> EntryKind {
    match random.below(11) {
        0 | 1 => EntryKind::Directory { opaque: random.once_in(4) },
        2 | 3 => EntryKind::File { size: random.pick(&[0, 1, 10, 5000]) },
        4 => EntryKind::Symlink(path(random)),
        5 => EntryKind::HardLink { ordinal: random.u32() % before.max(1) },
        6 => EntryKind::Whiteout,
        7 => EntryKind::CharDevice { major: random.edge32(), minor: random.u32() },
        8 => EntryKind::BlockDevice { major: random.u32(), minor: random.u32() },
        9 => EntryKind::Fifo,
        _ => EntryKind::Socket,
    }
}

/// Any message of an agent's.
pub fn from_agent(random: &mut Random) -> FromAgent {
    let id = random.pick(&[1, 1, 1, 0, 2, u32::MAX]);
    match random.below(18) {
        0 => ready(),
        1 => FromAgent::SetupDone,
        2 => FromAgent::Failed { what: name(random), errno: random.u16() },
        3 => FromAgent::Started { id },
        4 => FromAgent::ExecFailed { id, what: name(random), errno: random.u16(), why: name(random) },
        5 => output(random, id),
        6 => exited(random, id),
        7 | 8 => {
            let kind = entry_kind(random, 4);
            let (ordinal, path) = (random.edge32(), path(random));
            FromAgent::Entry(entry(random, ordinal, path, kind))
        }
        9 => FromAgent::ListDone { entries: random.edge32() },
        10 => FromAgent::FileStart { ordinal: random.edge32() },
        11 => FromAgent::FileData { offset: random.edge(), data: data(random) },
        12 => FromAgent::FileEnd { size: random.edge() },
        13 => FromAgent::FetchDone,
        14 => FromAgent::Log(name(random)),
        15 => FromAgent::Mounted,
        16 => FromAgent::Credit { id, bytes: random.u32().max(1) },
        _ => FromAgent::Bye,
    }
}

/// A greeting of the right version.
pub fn ready() -> FromAgent {
    FromAgent::Ready {
        version: VERSION,
        kernel: "6.1".to_owned(),
        uptime_us: 7,
        memory_bytes: 1 << 30,
        cpus: 2,
    }
}

/// A piece of output.
pub fn output(random: &mut Random, id: u32) -> FromAgent {
    let data = [data(random), vec![random.byte()]].concat();
    FromAgent::Output { id, stream: random.pick(&[Stream::Stdout, Stream::Stderr]), data }
}

/// The end of a command.
pub fn exited(random: &mut Random, id: u32) -> FromAgent {
    let code = random.byte();
    let outcome = random.pick(&[Outcome::Exit(code), Outcome::Signal(code), Outcome::TimedOut]);
    FromAgent::Exited { id, outcome, usage: Usage { wall_us: random.edge(), ..Usage::default() } }
}
