//! A template in its folder: `ram`, `state`, and `about.json`, which has the digests of both; and `working-set`, which comes later,
//! has a digest of its own, and may be missing.
//!
//! The state is read and verified whole each time, and what was verified is what QEMU gets. The memory is two hundred
//! times as large: it is trusted as long as its file is the one that was written, by device, inode, size and times, and
//! else verified whole too.

use std::fs::{self, File};
use std::io::{self, Read, Write as _};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use kiln_digest::Digest;
use kiln_vmm::working_set::{self, WorkingSet};
use rustix::fs::{Mode, OFlags, Timespec, Timestamps, UTIME_NOW, openat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use super::{TemplateError, ram};
use crate::writes::{self, Act, Through};

const ABOUT: &str = "about.json";
const STATE: &str = "state";
const RAM: &str = "ram";
const WORKING_SET: &str = "working-set";

/// Longest files that are read: a state has a third of a mebibyte.
const MOST_ABOUT_BYTES: u64 = 64 << 10;
const MOST_STATE_BYTES: u64 = 64 << 20;
/// Templates that nobody used for so long are thrown away, and all but the latest of these.
const UNUSED: Duration = Duration::from_secs(14 * 24 * 3600);
const MOST_TEMPLATES: usize = 8;

/// What is known of a template.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct About {
    /// The version of the program that made it.
    version: String,
    state: Digest,
    ram: Digest,
    /// Digest of the three above, and of the template's name.
    sum: Digest,
    /// The file that has this memory.
    stamp: Stamp,
}

/// What changes with a file's contents.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl About {
    fn sum(name: &str, version: &str, state: &Digest, ram: &Digest) -> Digest {
        Digest::of(format!("template {name} {version} {state} {ram}").as_bytes())
    }
}

impl Stamp {
    fn of(file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        })
    }
}

/// A template that was found and holds what was frozen.
#[derive(Debug)]
pub struct Template {
    /// The version of the program that made it.
    pub version: String,
    /// What the backend knows beside the memory.
    pub state: Vec<u8>,
    /// The guest's memory, with holes.
    pub ram: File,
    /// What of it copies touch first, where that is known.
    pub working_set: Option<WorkingSet>,
}

/// Opens the template at `path`, and notes that it is used; none where there is none.
///
/// # Errors
/// It is not what was written.
pub fn open(path: &Path, memory_bytes: u64) -> Result<Option<Template>, TemplateError> {
    use TemplateError::Damaged;
    // Whoever throws it away meanwhile takes all of it: what is opened beneath is of one template.
    let folder = match File::open(path) {
        Ok(folder) => folder,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(TemplateError::io("open a template")(error)),
    };
    let about = file(&folder, ABOUT)?;
    let text = read(&about, MOST_ABOUT_BYTES)?;
    let known: About = serde_json::from_slice(&text).map_err(|_| Damaged("its description is damaged"))?;
    if About::sum(&name_of(path), &known.version, &known.state, &known.ram) != known.sum {
        return Err(Damaged("its description is damaged"));
    }
    let state = read(&file(&folder, STATE)?, MOST_STATE_BYTES)?;
    if Digest::of(&state) != known.state {
        return Err(Damaged("its state is damaged"));
    }
    let ram = file(&folder, RAM)?;
    let stamp = Stamp::of(&ram).map_err(TemplateError::io("look at a template"))?;
    if stamp.size != memory_bytes {
        return Err(Damaged("its memory is cut short"));
    }
    if stamp != known.stamp {
        let digest = ram::digest(&ram).map_err(TemplateError::io("read a template"))?;
        if digest != known.ram {
            return Err(Damaged("its memory is damaged"));
        }
    }
    // Not being able to note it makes it go earlier.
    let _ = touch(&about);
    // One that is damaged is as good as none.
    let working_set = working_set(&folder, memory_bytes).ok().flatten();
    Ok(Some(Template { version: known.version, state, ram, working_set }))
}

/// The working set in the template's `folder`, if it is there.
///
/// # Errors
/// It is not what was written.
fn working_set(folder: &File, memory_bytes: u64) -> Result<Option<WorkingSet>, TemplateError> {
    let damaged = TemplateError::Damaged("its working set is damaged");
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let bytes = match openat(folder, WORKING_SET, flags, Mode::empty()) {
        Ok(file) => read(&file.into(), working_set::MOST_BYTES + 1)?,
        Err(Errno::NOENT) => return Ok(None),
        Err(_) => return Err(damaged),
    };
    WorkingSet::decode(&bytes, memory_bytes).map(Some).map_err(|_| damaged)
}

/// Keeps `set` as the working set of the template at `path`.
///
/// # Errors
/// What writing says.
pub fn keep_working_set(path: &Path, set: &WorkingSet) -> io::Result<()> {
    let (new, place) = (path.join(format!("{WORKING_SET}.new")), path.join(WORKING_SET));
    let file = writes::create(&new)?;
    Through::new(&file, &new).write_all(&set.encode())?;
    writes::rename(&new, &place)
}

/// Holds all of the template at `path` against its digests, its memory too.
///
/// # Errors
/// What is not as it was written.
pub fn verify(path: &Path) -> Result<(), TemplateError> {
    use TemplateError::Damaged;
    let folder = File::open(path).map_err(TemplateError::io("open a template"))?;
    let text = read(&file(&folder, ABOUT)?, MOST_ABOUT_BYTES)?;
    let known: About = serde_json::from_slice(&text).map_err(|_| Damaged("its description is damaged"))?;
    // A flip in a blank changes nothing that `open` believes; it is damage all the same. Another stamp is none: a store that
    // was copied has it, and the memory is read here in any case.
    let same = serde_json::to_vec_pretty(&known).is_ok_and(|again| again == text);
    let sum = About::sum(&name_of(path), &known.version, &known.state, &known.ram);
    let ram = file(&folder, RAM)?;
    let memory_bytes = ram.metadata().map_err(TemplateError::io("look at a template"))?.len();
    working_set(&folder, memory_bytes)?;
    if !same || sum != known.sum {
        return Err(Damaged("its description is damaged"));
    }
    if Digest::of(&read(&file(&folder, STATE)?, MOST_STATE_BYTES)?) != known.state {
        return Err(Damaged("its state is damaged"));
    }
    match ram::digest(&ram).map_err(TemplateError::io("read a template"))? == known.ram {
        true => Ok(()),
        false => Err(Damaged("its memory is damaged")),
    }
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn file(folder: &File, name: &str) -> Result<File, TemplateError> {
    let file = openat(folder, name, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty());
    file.map(File::from).map_err(|errno| match errno {
        Errno::NOENT | Errno::LOOP => TemplateError::Damaged("a part of it is missing"),
        errno => TemplateError::io("open a template")(errno.into()),
    })
}

fn read(file: &File, most_bytes: u64) -> Result<Vec<u8>, TemplateError> {
    let mut bytes = Vec::new();
    file.take(most_bytes).read_to_end(&mut bytes).map_err(TemplateError::io("read a template"))?;
    Ok(bytes)
}

/// The file in `folder` that a state is written to.
///
/// # Errors
/// What open(2) says.
pub fn new_state(folder: &Path) -> io::Result<File> {
    // Not for reading: QEMU takes it for one or the other.
    let path = folder.join(STATE);
    writes::through(Act::Make(&path), || File::options().write(true).create_new(true).open(&path))
}

/// Writes all but the state, which is there, into `folder`, which will be called `name`, and sees to it that it stays.
///
/// # Errors
/// What writing says.
pub fn write(folder: &Path, name: &str, memory: &File, version: &str) -> io::Result<()> {
    let state = File::open(folder.join(STATE))?;
    let mut bytes = Vec::new();
    (&state).take(MOST_STATE_BYTES).read_to_end(&mut bytes)?;
    let path = folder.join(RAM);
    let make = || File::options().read(true).write(true).create_new(true).open(&path);
    let file = writes::through(Act::Make(&path), make)?;
    let digest = writes::through(Act::Write(&path, 0), || ram::write(memory, &file))?;
    writes::sync(&file, &path)?;
    let stamp = Stamp::of(&file)?;
    let state_digest = Digest::of(&bytes);
    let sum = About::sum(name, version, &state_digest, &digest);
    let about = About { version: version.to_owned(), state: state_digest, ram: digest, sum, stamp };
    let path = folder.join(ABOUT);
    let file = writes::create(&path)?;
    Through::new(&file, &path).write_all(&serde_json::to_vec_pretty(&about)?)?;
    writes::sync(&state, &folder.join(STATE))?;
    writes::sync(&file, &path)?;
    writes::sync_folder(folder)
}

/// Gives a finished template its name, which is free.
///
/// # Errors
/// What rename(2) says.
pub fn publish(folder: TempDir, path: &Path) -> io::Result<()> {
    writes::rename(folder.path(), path)?;
    let _ = folder.keep();
    path.parent().map_or(Ok(()), writes::sync_folder)
}

/// Takes a template away: from its name at once, and whole.
pub fn remove(path: &Path, temporary: &Path) {
    if let Ok(folder) = tempfile::tempdir_in(temporary) {
        let _ = writes::rename(path, &folder.path().join("gone"));
    }
}

/// Notes that `file` was used now: its modification time says when.
///
/// # Errors
/// What futimens(2) says.
pub fn touch(file: &File) -> io::Result<()> {
    let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
    let times = Timestamps { last_access: now, last_modification: now };
    Ok(rustix::fs::futimens(file, &times)?)
}

/// What the name of a file ends with that says that a template could not be made,
pub const BARREN: &str = "barren";
/// and of one that says that there was no room to keep it.
pub const FULL: &str = "full";

/// Whether the file at `path` was modified less than `age` before `now` was.
pub fn is_younger(path: &Path, now: &File, age: Duration) -> bool {
    let times = || Some((fs::metadata(path).ok()?.modified().ok()?, now.metadata().ok()?.modified().ok()?));
    times().is_some_and(|(then, now)| now.duration_since(then).is_ok_and(|passed| passed < age))
}

/// Throws away templates of `folder` that were not used for long, and the oldest where there are many; never `latest`,
/// which was made just now.
pub fn collect(folder: &Path, temporary: &Path, latest: &Digest) {
    let used = |name: &str| fs::metadata(folder.join(name).join(ABOUT)).and_then(|meta| meta.modified()).ok();
    let latest = latest.to_string();
    let Some(now) = used(&latest) else { return };
    let names = fs::read_dir(folder).into_iter().flatten().flatten();
    let names = names.filter_map(|entry| entry.file_name().into_string().ok());
    let mut others: Vec<(SystemTime, String)> = names
        .filter(|name| *name != latest && name.parse::<Digest>().is_ok())
        .map(|name| (used(&name).unwrap_or(SystemTime::UNIX_EPOCH), name))
        .collect();
    others.sort();
    let too_many = (others.len() + 1).saturating_sub(MOST_TEMPLATES);
    for (index, (used, name)) in others.iter().enumerate() {
        let old = now.duration_since(*used).is_ok_and(|unused| unused > UNUSED);
        if old || index < too_many {
            remove(&folder.join(name), temporary);
            for kind in ["lock", BARREN, FULL] {
                let _ = writes::remove(&folder.join(format!("{name}.{kind}")));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMORY_BYTES: u64 = 1 << 30;

    /// Makes what passes for a template that was used so many seconds before now, or after it.
    fn used(folder: &Path, name: &str, seconds: i64) -> String {
        let name = Digest::of(name.as_bytes()).to_string();
        fs::create_dir(folder.join(&name)).expect("a folder");
        let about = File::create(folder.join(&name).join(ABOUT)).expect("room");
        let passed = Duration::from_secs(seconds.unsigned_abs());
        let now = SystemTime::now();
        about.set_modified(if seconds < 0 { now + passed } else { now - passed }).expect("ours");
        name
    }

    #[test]
    fn templates_go_that_nobody_used_for_long_and_the_oldest_of_many_but_never_the_one_just_made() {
        let (folder, temporary) =
            (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
        let is_there = |name: &String| folder.path().join(name).exists();
        let (old, latest) = (used(folder.path(), "old", 15 * 86400), used(folder.path(), "latest", 0));
        let (young, ahead) = (used(folder.path(), "young", 86400), used(folder.path(), "ahead", -86400));
        for name in [&old, &young] {
            fs::write(folder.path().join(format!("{name}.lock")), "").expect("room");
        }
        fs::write(folder.path().join("something"), "else").expect("room");
        let collects = || collect(folder.path(), temporary.path(), &latest.parse().expect("a digest"));
        collects();
        assert!(!is_there(&old) && [&latest, &young, &ahead].into_iter().all(is_there));
        assert!(!is_there(&format!("{old}.lock")) && is_there(&format!("{young}.lock")));
        let many: Vec<_> =
            (1..8).map(|hours| used(folder.path(), &hours.to_string(), hours * 3600)).collect();
        collects();
        // The oldest of ten: that of a day and that of seven hours.
        assert!(!is_there(&young) && !is_there(&many[6]), "{many:?}");
        assert!([&latest, &ahead].into_iter().chain(&many[..6]).all(is_there));
        assert!(is_there(&"something".to_owned()));
    }

    #[test]
    fn what_is_younger_is_told_by_the_times_of_files_and_nothing_of_the_future_is() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("then");
        let now = File::create(folder.path().join("now")).expect("room");
        let age = Duration::from_secs(600);
        assert!(!is_younger(&path, &now, age), "it is not there");
        let then = File::create(&path).expect("room");
        let time = now.metadata().and_then(|meta| meta.modified()).expect("a time");
        for (modified, expected) in [(time - age / 2, true), (time - age * 2, false), (time + age, false)] {
            then.set_modified(modified).expect("ours");
            assert_eq!(is_younger(&path, &now, age), expected);
        }
    }

    #[test]
    fn a_working_set_is_what_was_kept_or_none() {
        let template = tempfile::tempdir().expect("a folder");
        let path = template.path().join(WORKING_SET);
        let found = || working_set(&File::open(template.path()).expect("a folder"), MEMORY_BYTES);
        assert!(found().is_ok_and(|set| set.is_none()), "there is none yet");
        let set = WorkingSet::empty(MEMORY_BYTES);
        for _ in 0..2 {
            keep_working_set(template.path(), &set).expect("room");
            assert!(found().is_ok_and(|found| found == Some(WorkingSet::empty(MEMORY_BYTES))));
        }
        for damaged in [&b"damaged"[..], &[], &[set.encode(), vec![0]].concat(), &[0; 1 << 20]] {
            fs::write(&path, damaged).expect("room");
            assert!(found().is_err(), "{} bytes", damaged.len());
        }
        fs::remove_file(&path).expect("a file");
        std::os::unix::fs::symlink("/etc/hostname", &path).expect("a link");
        assert!(found().is_err(), "a link is none of ours");
    }
}
