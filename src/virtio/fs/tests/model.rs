//! Random requests against a small random tree, compared with a model: a tree in memory, who holds what, and what was
//! asked, written down as plainly as can be.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::fs::record::Observed;

/// Names that files have, or are looked for in vain.
const NAMES: [&[u8]; 8] = [b"a", b"b", b"c", b"d", b"ab", b"a.b", b"\xff\xfe", b"Z"];
/// Names that no file has.
const NO_NAMES: [&[u8]; 8] = [b"", b".", b"..", b"/", b"a/b", b"../s", b"a\0b", &[b'x'; 256]];
/// How much is asked of READDIR and READ at most; it fits into the answer's room.
const MOST_BYTES: u32 = 600;

#[derive(Debug, Clone)]
enum Content {
    Directory(BTreeMap<Vec<u8>, usize>),
    File(Vec<u8>),
    Link(Vec<u8>),
}

/// What a node is made from: the directory it is in and its name (both among those there are), and what it is.
type Seed = (usize, usize, Option<Vec<u8>>, bool);

/// One request. Numbers choose among what there is.
#[derive(Debug, Clone)]
enum Ask {
    Lookup(Whom, usize),
    LookupNoName(Whom, usize),
    Attributes(Whom),
    Read(Whom, u64, u32),
    List(Whom, u64, u32),
    LinkText(Whom),
    XattrNames(Whom),
    Open(Whom, bool),
    Forget(Whom, u64),
    ForgetBatch(Vec<(Whom, u64)>),
    Init,
}

/// The node that a request is about.
#[derive(Debug, Clone)]
enum Whom {
    /// One that the guest was given, whether it still holds it or not.
    Given(usize),
    Top,
    /// Any number.
    Number(u64),
}

/// The top, the share's directory and what is in it, by place.
struct Model {
    nodes: Vec<Content>,
    paths: Vec<Vec<u8>>,
    /// The driver's number of a node, once it has been told.
    numbers: BTreeMap<usize, u64>,
    /// All numbers the driver was told, in their order.
    given: Vec<u64>,
    /// How often it holds them.
    held: BTreeMap<u64, u64>,
    missed: BTreeSet<Vec<u8>>,
    observed: BTreeMap<usize, Observed>,
}

const TOP_PLACE: usize = 0;
const SHARE_PLACE: usize = 1;

impl Model {
    /// The tree that the seeds describe, made on the host too.
    fn plant(seeds: &[Seed], host: &Path) -> Self {
        let mut model = Self {
            nodes: vec![
                Content::Directory(BTreeMap::from([(b"s".to_vec(), SHARE_PLACE)])),
                Content::Directory(BTreeMap::new()),
            ],
            paths: vec![Vec::new(); 2],
            numbers: BTreeMap::from([(TOP_PLACE, TOP)]),
            given: Vec::new(),
            held: BTreeMap::new(),
            missed: BTreeSet::new(),
            observed: BTreeMap::new(),
        };
        for (parent, name, bytes, link) in seeds {
            let directories =
                (SHARE_PLACE..model.nodes.len()).filter(|place| model.children(*place).is_some());
            let directories: Vec<usize> = directories.collect();
            let (parent, name) = (directories[parent % directories.len()], NAMES[name % NAMES.len()]);
            let separator: &[u8] = if parent == SHARE_PLACE { b"" } else { b"/" };
            let path = [&model.paths[parent], separator, name].concat();
            let place = model.nodes.len();
            let Content::Directory(children) = &mut model.nodes[parent] else { unreachable!("it is one") };
            if children.insert(name.to_vec(), place).is_some_and(|there| {
                children.insert(name.to_vec(), there);
                true
            }) {
                continue;
            }
            let on_host = host.join(OsStr::from_bytes(&path));
            let content = match (bytes, link) {
                (None, _) => {
                    std::fs::create_dir(on_host).expect("directory");
                    Content::Directory(BTreeMap::new())
                }
                (Some(bytes), true) => {
                    let text: Vec<u8> = bytes.iter().map(|byte| byte | 1).chain(*b"/x").collect();
                    symlink(OsStr::from_bytes(&text), on_host).expect("link");
                    Content::Link(text)
                }
                (Some(bytes), false) => {
                    std::fs::write(on_host, bytes).expect("file");
                    Content::File(bytes.clone())
                }
            };
            model.nodes.push(content);
            model.paths.push(path);
        }
        model
    }

    fn children(&self, place: usize) -> Option<&BTreeMap<Vec<u8>, usize>> {
        match &self.nodes[place] {
            Content::Directory(children) => Some(children),
            _ => None,
        }
    }

    fn number(&self, whom: &Whom) -> u64 {
        match whom {
            Whom::Given(index) if !self.given.is_empty() => self.given[index % self.given.len()],
            Whom::Given(_) | Whom::Top => TOP,
            Whom::Number(number) => *number,
        }
    }

    /// The node of a number that the driver holds.
    fn place(&self, number: u64) -> Result<usize, i32> {
        let held = number == TOP || self.held.get(&number).is_some_and(|count| *count > 0);
        let place = self.numbers.iter().find(|(_, known)| **known == number).map(|(place, _)| *place);
        place.filter(|_| held).ok_or(libc::ESTALE)
    }

    fn observe(&mut self, place: usize, what: Observed) {
        if place != TOP_PLACE {
            *self.observed.entry(place).or_default() |= what;
        }
    }

    fn observe_attributes(&mut self, place: usize) {
        let empty = matches!(&self.nodes[place], Content::File(bytes) if bytes.is_empty());
        self.observe(place, if empty { Observed::METADATA | Observed::CONTENT } else { Observed::METADATA });
    }

    fn forget(&mut self, number: u64, count: u64) {
        if let Some(held) = self.held.get_mut(&number) {
            *held = held.saturating_sub(count);
        }
    }

    /// What a directory shows: `.`, `..` and the children by their bytes, each with the kind of a listing.
    fn listing(&self, place: usize) -> Option<Vec<(Vec<u8>, u32)>> {
        let children = self.children(place)?;
        let kind = |place: usize| match self.nodes[place] {
            Content::Directory(_) => u32::from(libc::DT_DIR),
            Content::File(_) => u32::from(libc::DT_REG),
            Content::Link(_) => u32::from(libc::DT_LNK),
        };
        let dots = [b".".to_vec(), b"..".to_vec()].map(|dot| (dot, u32::from(libc::DT_DIR)));
        Some(
            dots.into_iter()
                .chain(children.iter().map(|(name, child)| (name.clone(), kind(*child))))
                .collect(),
        )
    }
}

/// Asks the guest, and compares the answer with the model's.
fn compare(guest: &mut Guest, model: &mut Model, ask: &Ask) -> Result<(), TestCaseError> {
    match ask {
        Ask::Lookup(whom, name) => lookup(guest, model, model.number(whom), NAMES[name % NAMES.len()])?,
        Ask::LookupNoName(whom, name) => {
            let (number, name) = (model.number(whom), NO_NAMES[name % NO_NAMES.len()]);
            let wrong = if name.len() > 255 { libc::ENAMETOOLONG } else { libc::EINVAL };
            let expected = model.place(number).err().unwrap_or(wrong);
            prop_assert_eq!(guest.lookup(number, name).err(), Some(expected));
        }
        Ask::Attributes(whom) => {
            let number = model.number(whom);
            let expected = model.place(number);
            let found = guest.attr(number);
            prop_assert_eq!(found.as_ref().err(), expected.as_ref().err());
            if let (Ok(attr), Ok(place)) = (found, expected) {
                model.observe_attributes(place);
                shown(model, place, &attr)?;
            }
        }
        Ask::Read(whom, offset, size) => {
            let number = model.number(whom);
            let place = model.place(number);
            let expected = place.and_then(|place| match &model.nodes[place] {
                _ if i64::try_from(*offset).is_err() => Err(libc::EINVAL),
                Content::Directory(_) => Err(libc::EISDIR),
                Content::Link(_) => Err(libc::EINVAL),
                Content::File(bytes) => {
                    let from = usize::try_from(*offset).unwrap_or(usize::MAX).min(bytes.len());
                    let to = from.saturating_add(*size as usize).min(bytes.len());
                    Ok(bytes[from..to].to_vec())
                }
            });
            prop_assert_eq!(guest.read(number, *offset, *size), expected.clone());
            if let (Ok(place), Ok(_)) = (place, expected) {
                model.observe(place, Observed::CONTENT);
            }
        }
        Ask::List(whom, offset, size) => list(guest, model, model.number(whom), *offset, *size)?,
        Ask::LinkText(whom) => {
            let number = model.number(whom);
            let place = model.place(number);
            let expected = place.and_then(|place| match &model.nodes[place] {
                Content::Link(text) => Ok(text.clone()),
                _ => Err(libc::EINVAL),
            });
            prop_assert_eq!(guest.ask(op::READLINK, number, b""), expected.clone());
            if let (Ok(place), Ok(_)) = (place, expected) {
                model.observe(place, Observed::CONTENT);
            }
        }
        Ask::XattrNames(whom) => {
            let number = model.number(whom);
            let place = model.place(number);
            let answer = guest.ask(op::LISTXATTR, number, &[0; 8]);
            // Some hosts label every file, so how many names there are is theirs to say.
            prop_assert_eq!(answer.map(|size| size.len()), place.map(|_| 8));
            if let Ok(place) = place {
                model.observe(place, Observed::XATTRS);
            }
        }
        Ask::Open(whom, directory) => {
            const OPEN: [u32; 2] = [14, 27];
            let number = model.number(whom);
            prop_assert_eq!(guest.ask(OPEN[usize::from(*directory)], number, &[0; 8]), Err(libc::ENOSYS));
        }
        Ask::Forget(whom, count) => {
            let number = model.number(whom);
            prop_assert_eq!(guest.send(op::FORGET, number, &count.to_le_bytes(), 0), None);
            model.forget(number, *count);
        }
        Ask::ForgetBatch(batch) => {
            let mut body = vec![0; 8];
            for (whom, count) in batch {
                body.extend([model.number(whom).to_le_bytes(), count.to_le_bytes()].concat());
            }
            prop_assert_eq!(guest.send(op::BATCH_FORGET, 0, &body, 0), None);
            batch.iter().for_each(|(whom, count)| model.forget(model.number(whom), *count));
        }
        Ask::Init => {
            guest.init();
            model.held.clear();
        }
    }
    Ok(())
}

fn lookup(guest: &mut Guest, model: &mut Model, number: u64, name: &[u8]) -> Result<(), TestCaseError> {
    let name = if number == TOP { b"s" } else { name };
    let found = guest.lookup(number, name);
    let directory = match model.place(number) {
        Ok(place) if model.children(place).is_some() => place,
        Ok(_) => {
            prop_assert_eq!(found.err(), Some(libc::ENOTDIR));
            return Ok(());
        }
        Err(errno) => {
            prop_assert_eq!(found.err(), Some(errno));
            return Ok(());
        }
    };
    let child = model.children(directory).and_then(|children| children.get(name)).copied();
    let entry = found.map_err(|errno| TestCaseError::fail(format!("errno {errno}")))?;
    let Some(child) = child else {
        prop_assert_eq!(entry.nodeid.get(), 0);
        let separator: &[u8] = if directory == SHARE_PLACE { b"" } else { b"/" };
        model.missed.insert([&model.paths[directory], separator, name].concat());
        return Ok(());
    };
    let given = entry.nodeid.get();
    prop_assert_ne!(given, 0, "it is there");
    // A node has one number for ever, and a number one node.
    let known = *model.numbers.entry(child).or_insert(given);
    prop_assert_eq!(known, given);
    prop_assert_eq!(model.numbers.values().filter(|number| **number == given).count(), 1);
    if !model.given.contains(&given) {
        model.given.push(given);
    }
    *model.held.entry(given).or_default() += 1;
    model.observe_attributes(child);
    shown(model, child, &entry.attr)
}

fn list(
    guest: &mut Guest,
    model: &mut Model,
    number: u64,
    offset: u64,
    size: u32,
) -> Result<(), TestCaseError> {
    let answer = guest.ask(op::READDIR, number, &read_in(offset, size));
    let entries = match model.place(number).map(|place| (place, model.listing(place))) {
        Ok((place, Some(entries))) => (place, entries),
        Ok((_, None)) => {
            prop_assert_eq!(answer, Err(libc::ENOTDIR));
            return Ok(());
        }
        Err(errno) => {
            prop_assert_eq!(answer, Err(errno));
            return Ok(());
        }
    };
    let (place, entries) = entries;
    if place == TOP_PLACE {
        // A listing of the shares tells the number of each one's directory, whatever part of it fits.
        model.observe(SHARE_PLACE, Observed::METADATA);
    }
    let skipped = usize::try_from(offset).unwrap_or(usize::MAX).min(entries.len());
    let (mut expected, mut length) = (Vec::new(), 0);
    for (position, (name, kind)) in (1_u64..).zip(&entries).skip(skipped) {
        length += (24 + name.len()).next_multiple_of(8);
        if length > size as usize {
            break;
        }
        expected.push((name.clone(), *kind, position));
    }
    if expected.is_empty() && skipped < entries.len() {
        prop_assert_eq!(answer, Err(libc::EINVAL), "no entry fits");
        return Ok(());
    }
    let answer = answer.map_err(|errno| TestCaseError::fail(format!("errno {errno}")))?;
    let (mut found, mut rest) = (Vec::new(), &answer[..]);
    while !rest.is_empty() {
        let (head, tail) = abi::Dirent::read_from_prefix(rest).expect("entry");
        let length = head.name_length.get() as usize;
        found.push((tail[..length].to_vec(), head.kind.get(), head.offset.get()));
        rest = &tail[length.next_multiple_of(8)..];
    }
    if found.iter().any(|(name, ..)| name != b"." && name != b"..") {
        model.observe(place, Observed::LISTING);
    }
    prop_assert_eq!(found, expected);
    Ok(())
}

/// Compares attributes with what the share shows of every host: see [`Attributes::Fixed`].
fn shown(model: &Model, place: usize, attr: &abi::Attr) -> Result<(), TestCaseError> {
    if place == TOP_PLACE {
        prop_assert_eq!(attr.mode.get() & libc::S_IFMT, libc::S_IFDIR);
        return Ok(());
    }
    let (kind, size) = match &model.nodes[place] {
        Content::Directory(_) => (libc::S_IFDIR, 4096),
        Content::File(bytes) => (libc::S_IFREG, bytes.len()),
        Content::Link(text) => (libc::S_IFLNK, text.len()),
    };
    prop_assert_eq!(attr.mode.get() & libc::S_IFMT, kind);
    prop_assert_eq!(usize::try_from(attr.size.get()), Ok(size));
    prop_assert_eq!((attr.uid.get(), attr.gid.get(), attr.nlink.get()), (0, 0, 1));
    prop_assert_eq!((attr.mtime.get(), attr.mtime_nanos.get()), (1_700_000_000, 0));
    Ok(())
}

fn whom() -> impl Strategy<Value = Whom> {
    prop_oneof![
        8 => any::<prop::sample::Index>().prop_map(|index| Whom::Given(index.index(1 << 16))),
        1 => Just(Whom::Top),
        1 => prop_oneof![0..20_u64, any::<u64>()].prop_map(Whom::Number),
    ]
}

fn ask() -> impl Strategy<Value = Ask> {
    let offset = || prop_oneof![4 => 0..12_u64, 1 => 0..600_u64, 1 => any::<u64>()];
    let count = || prop_oneof![0..4_u64, any::<u64>()];
    prop_oneof![
        10 => (whom(), 0..NAMES.len()).prop_map(|(whom, name)| Ask::Lookup(whom, name)),
        2 => (whom(), 0..NO_NAMES.len()).prop_map(|(whom, name)| Ask::LookupNoName(whom, name)),
        4 => whom().prop_map(Ask::Attributes),
        4 => (whom(), offset(), 0..MOST_BYTES).prop_map(|(whom, offset, size)| Ask::Read(whom, offset, size)),
        4 => (whom(), offset(), 0..MOST_BYTES).prop_map(|(whom, offset, size)| Ask::List(whom, offset, size)),
        2 => whom().prop_map(Ask::LinkText),
        1 => whom().prop_map(Ask::XattrNames),
        1 => (whom(), any::<bool>()).prop_map(|(whom, directory)| Ask::Open(whom, directory)),
        3 => (whom(), count()).prop_map(|(whom, count)| Ask::Forget(whom, count)),
        1 => vec((whom(), count()), 0..6).prop_map(Ask::ForgetBatch),
        1 => Just(Ask::Init),
    ]
}

fn seed() -> impl Strategy<Value = Seed> {
    let bytes = prop::option::of(vec(any::<u8>(), 0..400));
    (any::<usize>(), any::<usize>(), bytes, any::<bool>())
}

proptest! {
    // PROPTEST_CASES runs more of them.
    #![proptest_config(ProptestConfig::default())]

    #[test]
    fn the_device_answers_as_a_plain_tree_would_and_notes_what_it_answered(
        seeds in vec(seed(), 0..14),
        asks in vec(ask(), 1..50),
    ) {
        let host = tempfile::tempdir().expect("directory");
        let mut model = Model::plant(&seeds, host.path());
        let mut guest = Guest::of(host.path(), EPOCH);
        for ask in &asks {
            compare(&mut guest, &mut model, ask)?;
        }
        let record = guest.share_record();
        prop_assert!(record.changed.is_empty());
        let missed: BTreeSet<String> = record.missed.iter().map(|path| path.to_string()).collect();
        let text = |path: &Vec<u8>| crate::fs::record::PathBytes(path.clone()).to_string();
        prop_assert_eq!(missed, model.missed.iter().map(text).collect());
        let noted: BTreeMap<String, Observed> =
            record.entries.iter().map(|entry| (entry.path.to_string(), entry.observed)).collect();
        for (place, observed) in &model.observed {
            let path = text(&model.paths[*place]);
            prop_assert!(noted.get(&path).is_some_and(|noted| noted.contains(*observed)), "`{}` is not noted", path);
        }
        // Nothing is noted that nobody asked about.
        let asked: BTreeSet<String> = model.observed.keys().map(|place| text(&model.paths[*place])).collect();
        prop_assert!(noted.keys().all(|path| asked.contains(path)), "{:?} and {:?}", noted, asked);
    }
}
