//! What each step did last in each WORK: a file for each WORK, to which every run adds a line.
//!
//! A line is sealed under the file's name; of a step's lines the last counts. To add one is a write(2), where a file of its
//! own would be a new inode and a rename, thirty times as much. Of a line that was being written when its process was killed
//! or the power failed there is no end, and it is cut off before the next is added. Who changes a file holds a lock, alone
//! or in the middle of a collection; who reads one needs none, and sees whole lines or nothing of them.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kiln_digest::Digest;
use serde::{Deserialize, Serialize};

use super::alone::Alone;
use super::key::Key;
use crate::store::{Store, seal_line, unseal_line};
use crate::writes::{self, Through};

/// The lock's name among what runs.
const LOCK: &str = "notes.lock";
/// A file is written anew when it has so many bytes beside four times those that count.
const SLACK_BYTES: u64 = 256 << 10;

/// What a step did last in one WORK: for `kiln why`, `kiln log` and `kiln inputs`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LastRun {
    /// Its name.
    pub step: String,
    /// Its key then.
    pub key: Key,
    /// How it ended, in words; none where it succeeded.
    pub failure: Option<String>,
    /// Why it ran, in words.
    pub why: String,
    /// Digest of what it printed.
    pub log: Option<Digest>,
    /// Digest of its outputs' manifest.
    pub outputs: Option<Digest>,
    /// Why its result was not kept, in words.
    pub not_kept: Option<String>,
    /// How long its command ran, milliseconds.
    pub command_ms: u64,
    /// How much of the host's memory its machine held at the end, where that is known.
    #[serde(default)]
    pub held_bytes: Option<u64>,
}

/// A line: what a step did last.
#[derive(Debug, Clone)]
pub struct Noted {
    /// When it was noted.
    pub when: SystemTime,
    /// What it takes up.
    pub size_bytes: u64,
    /// What it did.
    pub run: LastRun,
}

/// The name of a step, alone of all that a line says.
#[derive(Deserialize)]
struct Named<'a> {
    #[serde(borrow)]
    step: Cow<'a, str>,
}

/// What a line says: nanoseconds since 1970, and a run.
fn parts(line: &[u8]) -> Option<(SystemTime, &[u8])> {
    let at = line.iter().position(|byte| *byte == b' ')?;
    let nanos = std::str::from_utf8(&line[..at]).ok()?.parse().ok()?;
    Some((UNIX_EPOCH + Duration::from_nanos(nanos), &line[at + 1..]))
}

fn line(name: &str, when: SystemTime, run: &LastRun) -> io::Result<Vec<u8>> {
    let nanos = when.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let mut text = format!("{nanos} ").into_bytes();
    serde_json::to_writer(&mut text, run)?;
    Ok(seal_line(name, text))
}

/// What a line says that was sealed under `name`, without its end.
fn read_line(name: &str, line: &[u8]) -> Option<Noted> {
    let (when, run) = parts(unseal_line(name, line)?)?;
    let size_bytes = line.len() as u64 + 1;
    Some(Noted { when, size_bytes, run: serde_json::from_slice(run).ok()? })
}

/// What a file holds: the last line of each step, and whether every byte is of a line as it was written.
pub(super) fn read_all(name: &str, bytes: &[u8]) -> (Vec<Noted>, bool) {
    let mut last = BTreeMap::new();
    let mut is_whole = true;
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        match line.strip_suffix(b"\n").and_then(|line| read_line(name, line)) {
            Some(noted) => drop(last.insert(noted.run.step.clone(), noted)),
            None => is_whole = false,
        }
    }
    (last.into_values().collect(), is_whole)
}

/// What a file of the store is sealed under.
fn name_of(path: &Path) -> String {
    format!("notes/{}", path.file_name().unwrap_or_default().to_string_lossy())
}

/// An open file, and where in it the last line of each step is.
#[derive(Debug)]
struct Open {
    file: File,
    inode: u64,
    /// How much of it is read: up to the end of a line.
    end: u64,
    /// Of what was read, what counts.
    live_bytes: u64,
    lines: BTreeMap<String, (u64, usize)>,
}

impl Open {
    fn of(file: File) -> io::Result<Self> {
        let inode = file.metadata()?.ino();
        Ok(Self { file, inode, end: 0, live_bytes: 0, lines: BTreeMap::new() })
    }

    /// Notes that there is a line of `step` at the end.
    fn push(&mut self, step: String, line_bytes: usize) {
        let before = self.lines.insert(step, (self.end, line_bytes));
        self.live_bytes += line_bytes as u64;
        self.live_bytes -= before.map_or(0, |(_, bytes)| bytes as u64);
        self.end += line_bytes as u64;
    }

    /// Reads the lines that are new in the file's `length` bytes.
    fn catch_up(&mut self, length: u64) -> io::Result<()> {
        let new = usize::try_from(length - self.end).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let mut bytes = vec![0; new];
        let mut filled = 0;
        while filled < new {
            match self.file.read_at(&mut bytes[filled..], self.end + filled as u64)? {
                0 => break,
                count => filled += count,
            }
        }
        let whole = bytes[..filled].iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        for line in bytes[..whole].split_inclusive(|byte| *byte == b'\n') {
            let run = parts(line).map(|(_, rest)| rest);
            // What follows the run is its seal, which is looked at when it is read.
            let named =
                run.and_then(|run| serde_json::Deserializer::from_slice(run).into_iter().next()?.ok());
            match named {
                Some(Named { step }) => self.push(step.into_owned(), line.len()),
                None => self.end += line.len() as u64,
            }
        }
        Ok(())
    }
}

#[derive(Debug, Default)]
struct State {
    open: BTreeMap<PathBuf, Open>,
}

impl State {
    /// The file at `path` as it is now; none where there is none.
    fn open(&mut self, path: &Path) -> io::Result<Option<&mut Open>> {
        let meta = match fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.open.remove(path);
                return Ok(None);
            }
            meta => meta?,
        };
        if !self.open.get(path).is_some_and(|open| open.inode == meta.ino() && open.end <= meta.len()) {
            let file = File::options().read(true).append(true).open(path)?;
            self.open.insert(path.to_owned(), Open::of(file)?);
        }
        let open = self.open.get_mut(path);
        open.map(|open| {
            if open.end < meta.len() {
                open.catch_up(meta.len())?;
            }
            Ok(open)
        })
        .transpose()
    }
}

/// The notes of a store.
#[derive(Debug)]
pub struct Notes {
    store: Store,
    /// Of who changes one.
    alone: Alone,
    // Protects the open files.
    state: Mutex<State>,
}

impl Notes {
    /// Those of `store`.
    pub fn new(store: &Store) -> Self {
        Self { store: store.clone(), alone: Alone::new(store.run().join(LOCK)), state: Mutex::default() }
    }

    fn path(&self, work: &[u8]) -> PathBuf {
        self.store.notes().join(Digest::of(&[b"notes of\0", work].concat()).to_string())
    }

    /// What the step `step` did last in the WORK that `work` names.
    pub fn last(&self, work: &[u8], step: &str) -> Option<LastRun> {
        let path = self.path(work);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let open = state.open(&path).ok()??;
        let (at, length) = *open.lines.get(step)?;
        let mut line = vec![0; length.checked_sub(1)?];
        open.file.read_exact_at(&mut line, at).ok()?;
        drop(state);
        read_line(&name_of(&path), &line).map(|noted| noted.run)
    }

    /// Notes what a step did in the WORK that `work` names.
    ///
    /// # Errors
    /// What locking and writing say.
    pub fn add(&self, work: &[u8], run: &LastRun) -> io::Result<()> {
        let path = self.path(work);
        let line = line(&name_of(&path), self.store.date(), run)?;
        let _alone = self.alone.hold()?;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut open = state.open(&path)?;
        if open.is_none() {
            writes::make_folders(&self.store.notes())?;
            drop(writes::create(&path)?);
            open = state.open(&path)?;
        }
        let open = open.ok_or(io::ErrorKind::NotFound)?;
        if open.file.metadata()?.len() > open.end {
            writes::set_length(&open.file, &path, open.end)?;
        }
        let written = Through::new(&open.file, &path).write_all(&line);
        if written.is_err() {
            let _ = writes::set_length(&open.file, &path, open.end);
        }
        written?;
        open.push(run.step.clone(), line.len());
        match open.end > open.live_bytes.saturating_mul(4).saturating_add(SLACK_BYTES) {
            true => self.rewrite_alone(&path, |_| true),
            false => Ok(()),
        }
    }

    /// Writes the notes at `path` anew, with the last line of each step that `keeps` says, and nothing else.
    ///
    /// # Errors
    /// What locking, reading and writing say.
    pub fn rewrite(&self, path: &Path, keeps: impl Fn(&Noted) -> bool) -> io::Result<()> {
        let _alone = self.alone.hold()?;
        self.rewrite_alone(path, keeps)
    }

    fn rewrite_alone(&self, path: &Path, keeps: impl Fn(&Noted) -> bool) -> io::Result<()> {
        let bytes = match fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            bytes => bytes?,
        };
        let name = name_of(path);
        let mut kept = Vec::new();
        for noted in read_all(&name, &bytes).0.iter().filter(|noted| keeps(noted)) {
            kept.extend(line(&name, noted.when, &noted.run)?);
        }
        match kept.is_empty() {
            true => writes::remove(path),
            false => self.store.replace(path, &kept),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(step: &str, command_ms: u64) -> LastRun {
        LastRun {
            step: step.to_owned(),
            key: Key::default(),
            failure: None,
            why: "it never ran\nhere".to_owned(),
            log: None,
            outputs: None,
            not_kept: None,
            command_ms,
            held_bytes: None,
        }
    }

    fn store() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path()).expect("a store");
        (folder, store)
    }

    #[test]
    fn the_last_line_of_a_step_counts_whoever_wrote_it() {
        let (_folder, store) = store();
        let (one, other) = (Notes::new(&store), Notes::new(&store));
        assert!(one.last(b"/x/p", "a").is_none());
        one.add(b"/x/p", &run("a", 1)).expect("room");
        other.add(b"/x/p", &run("a", 2)).expect("room");
        one.add(b"/x/p", &run("b \"quoted\"", 3)).expect("room");
        for notes in [&one, &other, &Notes::new(&store)] {
            let took = |work: &[u8], step| notes.last(work, step).map(|run| run.command_ms);
            assert_eq!((took(b"/x/p", "a"), took(b"/x/p", "b \"quoted\"")), (Some(2), Some(3)));
            assert_eq!(took(b"/x/q", "a"), None);
        }
    }

    #[test]
    fn a_line_without_an_end_is_cut_off_before_the_next() {
        let (_folder, store) = store();
        let notes = Notes::new(&store);
        notes.add(b"w", &run("a", 1)).expect("room");
        let path = notes.path(b"w");
        let whole = fs::read(&path).expect("a file");
        for torn in [&whole[..whole.len() - 1], &[0; 700], b"1 {\"step\": \"a\"", b"x"] {
            fs::write(&path, [&whole, torn].concat()).expect("room");
            let notes = Notes::new(&store);
            assert_eq!(notes.last(b"w", "a").map(|run| run.command_ms), Some(1));
            notes.add(b"w", &run("b", 2)).expect("room");
            let (noted, is_whole) = read_all(&name_of(&path), &fs::read(&path).expect("a file"));
            assert!(is_whole && noted.len() == 2, "{torn:?}");
        }
    }

    #[test]
    fn lines_that_do_not_count_any_more_are_left_out_in_the_end() {
        let (_folder, store) = store();
        let (notes, other) = (Notes::new(&store), Notes::new(&store));
        notes.add(b"w", &run("b", 7)).expect("room");
        let bytes = fs::metadata(notes.path(b"w")).expect("a file").len();
        for time in 0..2 * SLACK_BYTES / bytes {
            [&notes, &other][usize::from(time % 3 == 0)].add(b"w", &run("a", time)).expect("room");
        }
        let left = fs::metadata(notes.path(b"w")).expect("a file").len();
        assert!(left < SLACK_BYTES + 20 * bytes, "{left}");
        assert_eq!(other.last(b"w", "b").map(|run| run.command_ms), Some(7));
        notes.rewrite(&notes.path(b"w"), |noted| noted.run.step == "a").expect("room");
        assert!(other.last(b"w", "b").is_none() && other.last(b"w", "a").is_some());
        notes.rewrite(&notes.path(b"w"), |_| false).expect("room");
        assert!(!notes.path(b"w").exists() && other.last(b"w", "a").is_none());
    }
}
