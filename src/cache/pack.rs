//! Packs: files to which lines are added, of which the last of each name counts.
//!
//! A line is sealed under the file's name. To add one is a write(2), where a file of its own would be a new inode and a
//! rename, thirty times as much. Of a line that was being written when its process was killed or the power failed there
//! is no end, and it is cut off before the next is added. Who changes a pack holds a lock, alone or in the middle of a
//! collection; who reads one needs none, and sees whole lines or nothing of them.
//!
//! A line begins with when it was written. That it was used since is a line too, a short one that names it.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Seek as _, SeekFrom, Write as _};
use std::ops::Bound;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::store::{LockFile, SEAL_BYTES, Store, seal_line, unseal_line};
use crate::writes::{self, Through};

/// A pack is written anew when it has so many bytes beside twice those that count.
const SLACK_BYTES: u64 = 256 << 10;
/// How much of a pack is read at once.
const PIECE_BYTES: usize = 256 << 10;
/// What a line says before the name of one that was used. No line of a family begins so.
const USED: &[u8] = b"used ";

/// The name of the line whose text begins like this; there may be anything after the text.
pub(super) type NameOf = fn(&[u8]) -> Option<Cow<'_, str>>;

/// A line.
#[derive(Debug, Clone)]
pub(super) struct Line {
    /// Its name.
    pub name: String,
    /// When it was written or used last.
    pub when: SystemTime,
    /// What it takes up.
    pub size_bytes: u64,
    /// What it says.
    pub text: Vec<u8>,
    place: Place,
}

/// Which of the files that a process has opened as packs a line is in, and where. No two lines have one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    opened: u64,
    start: u64,
}

/// When a line was written, and all that follows.
fn parts(line: &[u8]) -> Option<(SystemTime, &[u8])> {
    let at = line.iter().position(|byte| *byte == b' ')?;
    let nanos = std::str::from_utf8(&line[..at]).ok()?.parse().ok()?;
    Some((UNIX_EPOCH + Duration::from_nanos(nanos), &line[at + 1..]))
}

fn sealed(pack: &str, when: SystemTime, text: &[u8]) -> Vec<u8> {
    let nanos = when.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let date = format!("{nanos} ");
    let mut line = Vec::with_capacity(date.len() + text.len() + SEAL_BYTES);
    line.extend(date.as_bytes());
    line.extend(text);
    seal_line(pack, line)
}

/// The name that a line without its end says was used, and when.
fn used(pack: &str, line: &[u8]) -> Option<(String, SystemTime)> {
    let (when, text) = parts(unseal_line(pack, line)?)?;
    Some((std::str::from_utf8(text.strip_prefix(USED)?).ok()?.to_owned(), when))
}

/// Whether a line says that another was used.
fn says_used(line: &[u8]) -> bool {
    parts(line).is_some_and(|(_, text)| text.starts_with(USED))
}

/// Where a line is in its pack, and when it was written or used last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct At {
    start: u64,
    length_bytes: usize,
    when: SystemTime,
}

/// An open pack, and where in it the last line of each name is.
#[derive(Debug)]
struct Open {
    /// What its lines are sealed under.
    pack: String,
    file: File,
    /// The how manieth it is that was opened.
    opened: u64,
    inode: u64,
    /// How many names its file had: one less when another took its place.
    links: u64,
    /// How much of it is read: up to the end of a line.
    end: u64,
    /// Of what was read, what counts.
    live_bytes: u64,
    lines: BTreeMap<String, At>,
}

impl Open {
    /// Notes the line at the end that was read there.
    fn push_read(&mut self, line: &[u8], name_of: NameOf) {
        let Some((when, text)) = parts(line) else {
            self.end += line.len() as u64;
            return;
        };
        if text.starts_with(USED) {
            // Its seal is looked at now: nobody reads it later.
            let used = line.strip_suffix(b"\n").and_then(|line| used(&self.pack, line));
            self.push_used(used.as_ref().map(|(name, when)| (name.as_str(), *when)), line.len());
        } else {
            self.push(name_of(text).map(Cow::into_owned), line.len(), when);
        }
    }

    /// Notes that there is a line of so many bytes at the end, which is that of a name if it has one.
    fn push(&mut self, name: Option<String>, length_bytes: usize, when: SystemTime) {
        let start = self.end;
        self.end += length_bytes as u64;
        if let Some(name) = name {
            let before = self.lines.insert(name, At { start, length_bytes, when });
            self.live_bytes += length_bytes as u64;
            self.live_bytes -= before.map_or(0, |at| at.length_bytes as u64);
        }
    }

    /// Notes that there is a line of so many bytes at the end, which says that one of a name was used, and when.
    fn push_used(&mut self, used: Option<(&str, SystemTime)>, length_bytes: usize) {
        self.end += length_bytes as u64;
        if let Some((at, when)) = used.and_then(|(name, when)| Some((self.lines.get_mut(name)?, when))) {
            at.when = at.when.max(when);
        }
    }

    /// Reads the lines that are new.
    fn catch_up(&mut self, name_of: NameOf) -> io::Result<()> {
        let mut file = self.file.try_clone()?;
        file.seek(SeekFrom::Start(self.end))?;
        let (mut reader, mut line) = (BufReader::with_capacity(PIECE_BYTES, file), Vec::new());
        loop {
            line.clear();
            reader.read_until(b'\n', &mut line)?;
            if line.last() != Some(&b'\n') {
                return Ok(());
            }
            self.push_read(&line, name_of);
        }
    }

    /// The line without its end that is `at` a place.
    fn read(&self, at: At) -> io::Result<Vec<u8>> {
        let mut line = vec![0; at.length_bytes.saturating_sub(1)];
        self.file.read_exact_at(&mut line, at.start)?;
        Ok(line)
    }

    /// Where a line is.
    fn place(&self, at: At) -> Place {
        Place { opened: self.opened, start: at.start }
    }

    /// The lines that `which` names, those written or used last first: those that are what was written.
    fn lines(&self, which: Which<'_>) -> Vec<Line> {
        let (first, is_one) = match which {
            Which::Name(name) => (name, true),
            Which::Beginning(start) => (start, false),
        };
        let all = self.lines.range::<str, _>((Bound::Included(first), Bound::Unbounded));
        let is_named = |name: &str| if is_one { name == first } else { name.starts_with(first) };
        let mut found: Vec<(&String, At)> =
            all.take_while(|(name, _)| is_named(name)).map(|(name, at)| (name, *at)).collect();
        found.sort_by_key(|(_, at)| Reverse((at.when, at.start)));
        let line = |(name, at): (&String, At)| {
            let line = self.read(at).ok()?;
            let (_, text) = parts(unseal_line(&self.pack, &line)?)?;
            let (name, text, place) = (name.clone(), text.to_owned(), self.place(at));
            Some(Line { name, when: at.when, size_bytes: at.length_bytes as u64, text, place })
        };
        found.into_iter().filter_map(line).collect()
    }
}

/// Lines of a pack.
#[derive(Clone, Copy)]
pub(super) enum Which<'a> {
    /// That of a name.
    Name(&'a str),
    /// Those whose names begin so.
    Beginning(&'a str),
}

/// What a pack holds: the last line of each name, in their order, and whether every byte is of a line as it was written.
pub(super) fn read_all(pack: &str, bytes: &[u8], name_of: NameOf) -> (Vec<Line>, bool) {
    let (mut last, mut is_whole) = (BTreeMap::<String, (usize, Line)>::new(), true);
    for (number, line) in bytes.split_inclusive(|byte| *byte == b'\n').enumerate() {
        let size_bytes = line.len() as u64;
        let Some(line) = line.strip_suffix(b"\n") else {
            is_whole = false;
            continue;
        };
        if let Some((name, when)) = says_used(line).then(|| used(pack, line)).flatten() {
            if let Some((_, line)) = last.get_mut(&name) {
                line.when = line.when.max(when);
            }
            continue;
        }
        let text = unseal_line(pack, line).and_then(parts);
        match text.and_then(|(when, text)| Some((when, text, name_of(text)?.into_owned()))) {
            Some((when, text, name)) => {
                let place = Place { opened: 0, start: 0 };
                let line = Line { name: name.clone(), when, size_bytes, text: text.to_owned(), place };
                last.insert(name, (number, line));
            }
            None => is_whole = false,
        }
    }
    let mut lines: Vec<_> = last.into_values().collect();
    lines.sort_by_key(|(number, _)| *number);
    (lines.into_iter().map(|(_, line)| line).collect(), is_whole)
}

#[derive(Debug, Default)]
struct State {
    open: BTreeMap<PathBuf, Open>,
    /// How many were opened.
    opened: u64,
}

impl State {
    /// The pack at `path` as it is now, and its length in bytes; none where there is none. `makes` makes it then.
    fn open(
        &mut self,
        path: &Path,
        pack: &str,
        name_of: NameOf,
        makes: impl FnOnce() -> io::Result<bool>,
    ) -> io::Result<Option<(&mut Open, u64)>> {
        let meta = match fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.open.remove(path);
                match makes()? {
                    true => fs::metadata(path)?,
                    false => return Ok(None),
                }
            }
            meta => meta?,
        };
        if !self.open.get(path).is_some_and(|open| open.inode == meta.ino() && open.end <= meta.len()) {
            let file = match File::options().read(true).append(true).open(path) {
                // A store that can only be read.
                Err(error) if error.kind() != io::ErrorKind::NotFound => File::open(path)?,
                file => file?,
            };
            let meta = file.metadata()?;
            self.opened += 1;
            let open = Open {
                pack: pack.to_owned(),
                file,
                opened: self.opened,
                inode: meta.ino(),
                links: meta.nlink(),
                end: 0,
                live_bytes: 0,
                lines: BTreeMap::new(),
            };
            self.open.insert(path.to_owned(), open);
        }
        let open = self.open.get_mut(path);
        open.map(|open| {
            if open.end < meta.len() {
                open.catch_up(name_of)?;
            }
            Ok((open, meta.len()))
        })
        .transpose()
    }
}

/// The packs of one family in a store.
#[derive(Debug)]
pub(super) struct Packs {
    store: Store,
    name_of: NameOf,
    /// Of who changes one.
    lock: LockFile,
    // Protects the open packs.
    state: Mutex<State>,
}

/// A pack that nobody else changes.
pub(super) struct Pack<'a> {
    open: &'a mut Open,
    path: &'a Path,
    when: SystemTime,
}

impl Pack<'_> {
    /// The lines that `which` names, those written or used last first.
    pub fn lines(&self, which: Which<'_>) -> Vec<Line> {
        self.open.lines(which)
    }

    /// Adds lines, each of which is a name and the text that begins with it, and dates them now.
    ///
    /// # Errors
    /// What writing says; the pack is as it was then.
    pub fn append(&mut self, lines: impl IntoIterator<Item = (String, Vec<u8>)>) -> io::Result<()> {
        let sealed = |(name, text): (String, Vec<u8>)| (name, sealed(&self.open.pack, self.when, &text));
        let lines: Vec<_> = lines.into_iter().map(sealed).collect();
        match &lines[..] {
            [(_, line)] => self.write(line)?,
            lines => self.write(&lines.iter().flat_map(|(_, line)| line).copied().collect::<Vec<_>>())?,
        }
        for (name, line) in lines {
            self.open.push(Some(name), line.len(), self.when);
        }
        Ok(())
    }

    /// Adds that the line `name` is used now.
    fn append_used(&mut self, name: &str) -> io::Result<()> {
        let line = sealed(&self.open.pack, self.when, &[USED, name.as_bytes()].concat());
        self.write(&line)?;
        self.open.push_used(Some((name, self.when)), line.len());
        Ok(())
    }

    fn write(&self, lines: &[u8]) -> io::Result<()> {
        let written = Through::new(&self.open.file, self.path).write_all(lines);
        if written.is_err() {
            let _ = writes::set_length(&self.open.file, self.path, self.open.end);
        }
        written
    }
}

impl Packs {
    /// Those of `store` whose lines have the names that `name_of` says; who changes one holds the lock `lock`.
    pub fn new(store: &Store, lock: &str, name_of: NameOf) -> Self {
        let lock = LockFile::new(store.run().join(lock));
        Self { store: store.clone(), name_of, lock, state: Mutex::default() }
    }

    /// What the pack at `path` is called in its seals.
    fn called(&self, path: &Path) -> String {
        path.strip_prefix(self.store.path()).unwrap_or(path).to_string_lossy().into_owned()
    }

    /// The lines of the pack at `path` that `which` names, those written or used last first.
    pub fn lines(&self, path: &Path, which: Which<'_>) -> Vec<Line> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // To ask the file takes half as long as to look for its name.
        let is_as_it_was = |open: &&Open| {
            let now = open.file.metadata();
            now.is_ok_and(|now| now.len() == open.end && now.nlink() == open.links && open.links > 0)
        };
        if let Some(open) = state.open.get(path).filter(is_as_it_was) {
            return open.lines(which);
        }
        let pack = self.called(path);
        match state.open(path, &pack, self.name_of, || Ok(false)) {
            Ok(Some((open, _))) => open.lines(which),
            _ => Vec::new(),
        }
    }

    /// Changes the pack at `path` by `does`, alone.
    ///
    /// # Errors
    /// What locking and writing say.
    pub fn change<T>(&self, path: &Path, does: impl FnOnce(&mut Pack<'_>) -> io::Result<T>) -> io::Result<T> {
        let pack = self.called(path);
        let _alone = self.lock.alone()?;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let makes = || {
            path.parent().map_or(Ok(()), writes::make_folders)?;
            writes::create(path).map(|_| true)
        };
        let opened = state.open(path, &pack, self.name_of, makes)?;
        let (open, length_bytes) = opened.ok_or(io::ErrorKind::NotFound)?;
        if length_bytes > open.end {
            writes::set_length(&open.file, path, open.end)?;
        }
        let done = does(&mut Pack { open, path, when: self.store.date() })?;
        if open.end > open.live_bytes.saturating_mul(2).saturating_add(SLACK_BYTES) {
            self.rewrite_alone(path, |_| true)?;
        }
        Ok(done)
    }

    /// Says of `line`, which was read of the pack at `path`, that it is used now; whether it is still there. No collection
    /// goes on meanwhile, and it stays then, with all that it names, for as long as this process lives.
    pub fn mark(&self, path: &Path, line: &Line) -> bool {
        let since = self.store.since();
        if line.when >= since {
            return true;
        }
        // In another place it may be what it was all the same: a pack that was written anew has other places.
        let is_there = |open: &Open| match open.lines.get(&line.name) {
            Some(at) if open.place(*at) == line.place => true,
            _ => open.lines(Which::Name(&line.name)).iter().any(|now| now.text == line.text),
        };
        let _using = self.store.using();
        let marked = self.change(path, |pack| {
            if !is_there(pack.open) {
                return Ok(false);
            }
            // Not to be dated costs it nothing as long as it is not collected, as in a store that can only be read.
            if pack.open.lines.get(&line.name).is_some_and(|at| at.when < since) {
                let _ = pack.append_used(&line.name);
            }
            Ok(true)
        });
        marked.unwrap_or_else(|_| !self.lines(path, Which::Name(&line.name)).is_empty())
    }

    /// Does something while nobody changes a pack.
    ///
    /// # Errors
    /// What locking says.
    pub fn alone<T>(&self, does: impl FnOnce() -> T) -> io::Result<T> {
        let _alone = self.lock.alone()?;
        Ok(does())
    }

    /// Writes the pack at `path` anew, with the last line of each name that `keeps` says, and nothing else.
    ///
    /// # Errors
    /// What locking, reading and writing say.
    pub fn rewrite(&self, path: &Path, keeps: impl Fn(&Line) -> bool) -> io::Result<()> {
        let _alone = self.lock.alone()?;
        self.rewrite_alone(path, keeps)
    }

    fn rewrite_alone(&self, path: &Path, keeps: impl Fn(&Line) -> bool) -> io::Result<()> {
        let pack = self.called(path);
        let bytes = match fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            bytes => bytes?,
        };
        let mut kept = Vec::new();
        for line in read_all(&pack, &bytes, self.name_of).0.iter().filter(|line| keeps(line)) {
            kept.extend(sealed(&pack, line.when, &line.text));
        }
        match kept.is_empty() {
            true => writes::remove(path),
            // Synced: what is lost of it would be lost of all names.
            false => self.store.replace_for_good(path, &kept),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines of these tests are a name, a blank and anything.
    fn name_of(text: &[u8]) -> Option<Cow<'_, str>> {
        let at = text.iter().position(|byte| *byte == b' ')?;
        std::str::from_utf8(&text[..at]).ok().map(Cow::Borrowed)
    }

    fn packs(store: &Store) -> Packs {
        Packs::new(store, "test.lock", name_of)
    }

    struct World {
        folder: tempfile::TempDir,
        store: Store,
        path: PathBuf,
    }

    fn world() -> World {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path()).expect("a store");
        let path = store.path().join("packs/one");
        World { folder, store, path }
    }

    impl World {
        fn add(&self, packs: &Packs, text: &str) {
            let name = name_of(text.as_bytes()).expect("a name").into_owned();
            packs.change(&self.path, |pack| pack.append([(name, text.into())])).expect("room");
        }

        /// What each line says, the last first.
        fn said(&self, packs: &Packs, which: Which<'_>) -> Vec<String> {
            let text = |line: Line| String::from_utf8(line.text).expect("text");
            packs.lines(&self.path, which).into_iter().map(text).collect()
        }

        fn bytes(&self) -> Vec<u8> {
            fs::read(&self.path).expect("a pack")
        }

        fn read_all(&self) -> (Vec<Line>, bool) {
            read_all("packs/one", &self.bytes(), name_of)
        }
    }

    #[test]
    fn the_last_line_of_a_name_counts_whoever_wrote_it() {
        let world = world();
        let (one, other) = (packs(&world.store), packs(&world.store));
        assert!(one.lines(&world.path, Which::Name("a")).is_empty());
        world.add(&one, "a 1");
        world.add(&other, "a 2");
        world.add(&one, "b 3");
        world.add(&other, "ab 4");
        for packs in [&one, &other, &packs(&world.store)] {
            assert_eq!(world.said(packs, Which::Name("a")), ["a 2"]);
            assert_eq!(world.said(packs, Which::Beginning("a")), ["ab 4", "a 2"]);
            assert_eq!(world.said(packs, Which::Beginning("")).len(), 3);
        }
    }

    #[test]
    fn a_line_without_an_end_is_cut_off_before_the_next() {
        let world = world();
        world.add(&packs(&world.store), "a 1");
        let whole = world.bytes();
        for torn in [&whole[..whole.len() - 1], &[0; 700], b"1 a 2", b"x"] {
            fs::write(&world.path, [&whole, torn].concat()).expect("room");
            let packs = packs(&world.store);
            assert!(!world.read_all().1, "{torn:?}");
            assert_eq!(world.said(&packs, Which::Name("a")), ["a 1"]);
            world.add(&packs, "b 2");
            let (lines, is_whole) = world.read_all();
            assert!(is_whole && lines.len() == 2, "{torn:?}");
        }
    }

    #[test]
    fn every_flip_is_seen_and_costs_a_line() {
        let world = world();
        world.add(&packs(&world.store), "a 1");
        world.add(&packs(&world.store), "b 2");
        let opened = Store::open(world.folder.path()).expect("a store");
        let line = packs(&opened).lines(&world.path, Which::Name("a")).remove(0);
        assert!(packs(&opened).mark(&world.path, &line));
        let whole = world.bytes();
        assert_eq!(whole.split(|byte| *byte == b'\n').count(), 4, "two lines, and that one was used");
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1 << (at % 8);
            fs::write(&world.path, &flipped).expect("room");
            let (lines, is_whole) = world.read_all();
            assert!(!is_whole, "byte {at}");
            let good = |line: &Line| matches!(&line.text[..], b"a 1" | b"b 2");
            assert!(lines.iter().all(good), "byte {at}");
            let said = world.said(&packs(&world.store), Which::Beginning(""));
            assert!(said.iter().all(|text| matches!(&text[..], "a 1" | "b 2")), "byte {at}: {said:?}");
        }
        let elsewhere = read_all("packs/other", &whole, name_of);
        assert!(elsewhere.0.is_empty() && !elsewhere.1);
    }

    #[test]
    fn a_line_that_is_used_is_dated_once_a_process_and_stays_so() {
        let world = world();
        world.add(&packs(&world.store), "a 1");
        world.add(&packs(&world.store), "b 2");
        // As a process that began later.
        let later = Store::open(world.folder.path()).expect("a store");
        let packs = packs(&later);
        let line = |name| packs.lines(&world.path, Which::Name(name)).remove(0);
        assert!(line("a").when < later.since());
        assert!(packs.mark(&world.path, &line("a")));
        let length = world.bytes().len();
        assert!(packs.mark(&world.path, &line("a")));
        assert_eq!(world.bytes().len(), length, "once is enough");
        let is_dated = || {
            let dated = |line: &Line| line.when >= later.since();
            let (lines, is_whole) = world.read_all();
            (
                is_whole,
                lines.iter().map(|line| (line.name.as_str() == "a") == dated(line)).collect::<Vec<_>>(),
            )
        };
        assert_eq!(is_dated(), (true, vec![true, true]));
        packs.rewrite(&world.path, |_| true).expect("room");
        assert_eq!(is_dated(), (true, vec![true, true]));
        assert_eq!(world.bytes().split(|byte| *byte == b'\n').count(), 3);
    }

    #[test]
    fn a_line_that_is_gone_or_says_something_else_is_not_marked() {
        let world = world();
        world.add(&packs(&world.store), "a 1");
        world.add(&packs(&world.store), "b 2");
        let later = Store::open(world.folder.path()).expect("a store");
        let packs = packs(&later);
        let [a, b] = ["a", "b"].map(|name| packs.lines(&world.path, Which::Name(name)).remove(0));
        packs.rewrite(&world.path, |line| line.name != "b").expect("room");
        assert!(packs.mark(&world.path, &a), "in another place");
        assert!(!packs.mark(&world.path, &b));
        world.add(&packs, "b 3");
        assert!(!packs.mark(&world.path, &b));
    }

    #[test]
    fn lines_that_do_not_count_any_more_are_left_out_in_the_end() {
        let world = world();
        let (one, other) = (packs(&world.store), packs(&world.store));
        world.add(&one, "b 7");
        let bytes = world.bytes().len() as u64;
        for time in 0..2 * SLACK_BYTES / bytes {
            world.add([&one, &other][usize::from(time % 3 == 0)], &format!("a {time}"));
        }
        let left = world.bytes().len() as u64;
        assert!(left < SLACK_BYTES + 20 * bytes, "{left}");
        assert_eq!(world.said(&other, Which::Name("b")), ["b 7"]);
        one.rewrite(&world.path, |line| line.name == "a").expect("room");
        assert!(world.said(&other, Which::Name("b")).is_empty());
        assert_eq!(world.said(&other, Which::Name("a")).len(), 1);
        one.rewrite(&world.path, |_| false).expect("room");
        assert!(!world.path.exists() && world.said(&other, Which::Name("a")).is_empty());
    }
}
