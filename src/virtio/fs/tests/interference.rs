//! What was not recorded was not answered: whatever a guest asks, another host gives other answers only where the
//! record does not hold on it. What holds is found out from the host's files, by the definitions of the record.

use std::cell::Cell;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use kiln_digest::Digest;
use proptest::prelude::*;
use rustix::fs::{CWD, Mode, XattrFlags};

use super::*;
use crate::fs::record::{Observed, PathBytes};

/// Names that hosts have and guests look for.
const NAMES: [&str; 4] = ["a", "b", "d", "l"];

/// What stands at a place: nothing, a file, a directory, a link or a pipe.
#[derive(Debug, Clone)]
enum Stands {
    Nothing,
    File { content: &'static str, mode: u32, xattr: Option<&'static str> },
    Directory { xattr: Option<&'static str> },
    Link(&'static str),
    Pipe,
}

fn stands() -> impl Strategy<Value = Stands> {
    let xattr = || prop::option::weighted(0.2, prop::sample::select(&["1", "22", "2"][..]));
    let content = prop::sample::select(&["", "x", "y", "xy"][..]);
    prop_oneof![
        2 => Just(Stands::Nothing),
        4 => (content, prop::sample::select(&[0o644, 0o755][..]), xattr())
            .prop_map(|(content, mode, xattr)| Stands::File { content, mode, xattr }),
        4 => xattr().prop_map(|xattr| Stands::Directory { xattr }),
        2 => prop::sample::select(&["a", "b", "d/a"][..]).prop_map(Stands::Link),
        1 => Just(Stands::Pipe),
    ]
}

/// A host: what stands at each name, and below it where that is a directory.
type Places = Vec<(Stands, Vec<Stands>)>;

/// How a host differs from another at a place.
#[derive(Debug, Clone, Copy)]
enum Differs {
    No,
    /// Something else stands there.
    Wholly,
    /// What stands there looks the same from outside.
    Inside,
}

fn differs() -> impl Strategy<Value = Differs> {
    prop_oneof![4 => Just(Differs::No), 1 => Just(Differs::Wholly), 2 => Just(Differs::Inside)]
}

fn differing(differs: Differs, one: &Stands, other: Stands) -> Stands {
    let another = |xattr: Option<&str>| xattr.map(|value| if value == "1" { "2" } else { "1" });
    match (differs, one.clone()) {
        (Differs::No, one) => one,
        (Differs::Wholly, _) => other,
        (Differs::Inside, Stands::File { content, mode, xattr }) => {
            let content = if content == "x" { "y" } else { "x" };
            Stands::File { content, mode, xattr: another(xattr) }
        }
        (Differs::Inside, Stands::Directory { xattr }) => Stands::Directory { xattr: another(xattr) },
        (Differs::Inside, Stands::Link(text)) => Stands::Link(if text == "a" { "b" } else { "a" }),
        (Differs::Inside, one) => one,
    }
}

/// Two hosts that agree at most places.
fn hosts() -> impl Strategy<Value = (Places, Places)> {
    let below = || prop::collection::vec(stands(), NAMES.len());
    let places = || prop::collection::vec((stands(), below()), NAMES.len());
    let how = prop::collection::vec((differs(), prop::collection::vec(differs(), NAMES.len())), NAMES.len());
    (places(), places(), how).prop_map(|(one, other, how)| {
        let merged = one.iter().zip(other).zip(how).map(|((one, other), (top, how))| {
            let below = one.1.iter().zip(other.1).zip(how);
            let below = below.map(|((one, other), how)| differing(how, one, other)).collect();
            (differing(top, &one.0, other.0), below)
        });
        let merged = merged.collect();
        (one, merged)
    })
}

/// One request: its number, which of the nodes seen so far, a name, a position, a size.
type Ask = (u32, usize, &'static str, u64, u32);

fn asks() -> impl Strategy<Value = Vec<Ask>> {
    let opcode = prop_oneof![
        8 => Just(op::LOOKUP),
        8 => prop::sample::select(
            &[op::GETATTR, op::READ, op::READDIR, op::READLINK, op::GETXATTR, op::LISTXATTR][..]
        ),
        1 => prop_oneof![1..26_u32, 27..60_u32],
    ];
    let name = prop::sample::select(&["a", "b", "d", "l", "zz", "s", "user.k"][..]);
    prop::collection::vec(
        (opcode, 0..12_usize, name, 0..4_u64, prop::sample::select(&[0, 1, 200, 4096][..])),
        1..60,
    )
}

fn put(path: &Path, stands: &Stands) {
    let set = |xattr: &Option<&str>| {
        if let Some(value) = xattr {
            // A file system without extended attributes has none to tell.
            let _ = rustix::fs::setxattr(path, "user.k", value.as_bytes(), XattrFlags::empty());
        }
    };
    match stands {
        Stands::Nothing => {}
        Stands::File { content, mode, xattr } => {
            std::fs::write(path, content).expect("file");
            set(xattr);
            std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(*mode))
                .expect("mode");
        }
        Stands::Directory { xattr } => {
            std::fs::create_dir(path).expect("directory");
            set(xattr);
        }
        Stands::Link(text) => std::os::unix::fs::symlink(text, path).expect("link"),
        Stands::Pipe => {
            rustix::fs::mknodat(CWD, path, rustix::fs::FileType::Fifo, Mode::RUSR, 0).expect("pipe");
        }
    }
}

fn host(places: &Places) -> tempfile::TempDir {
    let host = tempfile::tempdir().expect("directory");
    for (name, (stands, below)) in NAMES.iter().zip(places) {
        let path = host.path().join(name);
        put(&path, stands);
        if matches!(stands, Stands::Directory { .. }) {
            NAMES.iter().zip(below).for_each(|(name, stands)| put(&path.join(name), stands));
        }
    }
    host
}

/// A guest and the nodes it has seen. Numbers of nodes are not compared: they say how full directories are that
/// were looked into.
struct Asker {
    guest: Guest,
    host: PathBuf,
    nodes: Vec<u64>,
}

impl Asker {
    fn of(host: &Path) -> Self {
        Self { guest: Guest::of(host, EPOCH), host: host.to_owned(), nodes: vec![TOP] }
    }

    fn ask(&mut self, &(opcode, node, name, position, size): &Ask) -> Option<Result<Vec<u8>, i32>> {
        let node = self.nodes[node % self.nodes.len()];
        let body = match opcode {
            op::LOOKUP => [name.as_bytes(), b"\0"].concat(),
            op::GETXATTR => [size.as_bytes(), &[0; 4], name.as_bytes(), b"\0"].concat(),
            op::LISTXATTR => [size.as_bytes(), &[0; 4]].concat(),
            op::READ | op::READDIR => read_in(position, size),
            _ => vec![0; 16],
        };
        let mut answer = self.guest.send(opcode, node, &body, 0x1000);
        if let (op::LOOKUP, Some(Ok(entry))) = (opcode, &mut answer) {
            let nodeid = u64::from_le_bytes(*entry.first_chunk().expect("entry"));
            if nodeid != 0 {
                self.nodes.push(nodeid);
                entry[..8].fill(1);
            }
        }
        answer
    }

    /// The first thing that the record says and that is not so on `host`.
    fn refuted_by(&self, host: &Path) -> Option<String> {
        let record = self.guest.share_record();
        assert!(record.changed.is_empty(), "nothing changes here: {record:?}");
        let at = |path: &PathBytes| host.join(path.to_string());
        let refuted = record.entries.iter().find_map(|entry| {
            let there = on(&at(&entry.path), entry.observed)?;
            let content = entry.observed.contains(Observed::CONTENT);
            let content =
                content.then(|| on(&self.host.join(entry.path.to_string()), entry.observed)?.content);
            let metadata = entry.observed.contains(Observed::METADATA).then(|| entry.metadata_line(EPOCH));
            let same = there.kind == entry.kind.letter()
                && there.content == content.flatten()
                && there.metadata == metadata
                && (there.listing, there.xattrs) == (entry.listing, entry.xattrs);
            (!same).then(|| format!("{entry:?}"))
        });
        let appeared = || record.entries.iter().find(|entry| at(&entry.path).symlink_metadata().is_err());
        let appeared = || appeared().map(|entry| format!("{entry:?}"));
        let missed = || record.missed.iter().find(|path| at(path).symlink_metadata().is_ok());
        refuted.or_else(appeared).or_else(|| missed().map(|path| format!("no {path}")))
    }
}

/// What stands at a path, as far as it was asked, in the words of the record.
struct There {
    kind: char,
    content: Option<Digest>,
    metadata: Option<String>,
    listing: Option<Digest>,
    xattrs: Option<Digest>,
}

fn on(path: &Path, asked: Observed) -> Option<There> {
    let meta = path.symlink_metadata().ok()?;
    let kind = letter(meta.file_type());
    let content = |path: &Path| match kind {
        'l' => Digest::of(std::fs::read_link(path).expect("link").as_os_str().as_encoded_bytes()),
        'f' => Digest::of(&std::fs::read(path).expect("file")),
        _ => Digest::of(b"none of it can be read"),
    };
    let metadata = || {
        let size = if matches!(kind, 'f' | 'l') { format!(" {}", meta.size()) } else { String::new() };
        format!("{kind} {:o}{size}\n", meta.mode() & 0o7777)
    };
    let listing = |path: &Path| {
        let mut lines: Vec<Vec<u8>> = Vec::new();
        for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
            let letter = letter(entry.file_type().expect("type"));
            lines.push([&[letter as u8], entry.file_name().as_encoded_bytes(), b"\0"].concat());
        }
        lines.sort();
        Digest::of(&lines.concat())
    };
    let xattrs = |path: &Path| {
        let mut value = [0; 10];
        match rustix::fs::lgetxattr(path, "user.k", &mut value[..]) {
            Ok(length) => {
                Digest::of(&[b"user.k\0", format!("{length}\0").as_bytes(), &value[..length]].concat())
            }
            Err(_) => Digest::of(b""),
        }
    };
    let asked = |what| asked.contains(what).then_some(path);
    Some(There {
        kind,
        content: asked(Observed::CONTENT).map(content),
        metadata: asked(Observed::METADATA).map(|_| metadata()),
        listing: asked(Observed::LISTING).map(listing),
        xattrs: asked(Observed::XATTRS).map(xattrs),
    })
}

/// As find(1) has it.
fn letter(kind: std::fs::FileType) -> char {
    match () {
        () if kind.is_file() => 'f',
        () if kind.is_dir() => 'd',
        () if kind.is_symlink() => 'l',
        () => 'p',
    }
}

#[test]
fn what_was_not_recorded_was_not_answered() {
    let differed = Cell::new(0);
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) };
    proptest!(config, |((one, other) in hosts(), asks in asks())| {
        let (one, other) = (host(&one), host(&other));
        let (mut first, mut second) = (Asker::of(one.path()), Asker::of(other.path()));
        // Every guest knows the share, and has not looked further.
        let enter = (op::LOOKUP, 0, "s", 0, 0);
        let differs = [enter].iter().chain(&asks).any(|ask| first.ask(ask) != second.ask(ask));
        // Each holds at home, and not where the other answers came from.
        prop_assert_eq!(first.refuted_by(one.path()), None);
        prop_assert_eq!(second.refuted_by(other.path()), None);
        if differs {
            differed.set(differed.get() + 1);
            prop_assert!(first.refuted_by(other.path()).is_some(), "{:?}", first.guest.share_record());
            prop_assert!(second.refuted_by(one.path()).is_some(), "{:?}", second.guest.share_record());
        }
    });
    assert!(differed.get() > 100, "only {} pairs answered differently", differed.get());
}
