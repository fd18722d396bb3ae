//! What a process does whose writes fail or are the last ones, and what must hold of what it leaves: for the tests of
//! faults and of power failures.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kiln::engine::merge;
use kiln::fetch::lock::{Lock, LockedSource};
use kiln::root::Image;
use kiln::upkeep::collect::{Order, collect};
use kiln::upkeep::verify::{repair, verify};
use kiln_artifact::tree::{Kind, Meta, Node, Tree, TreePath};
use kiln_digest::Digest;

use super::RECIPE;
use super::world::World;

/// How a case says that kiln itself panicked, and that it was killed as asked.
pub const PANICKED: i32 = 77;
pub const KILLED: i32 = 78;

static KILN_PANICKED: AtomicBool = AtomicBool::new(false);

/// Files as they are before the first build.
pub fn prepare(folder: &Path) {
    for (name, text) in [("a.c", "a"), ("b.c", "b"), ("include/a.h", "h"), ("parts/one", "1")] {
        let path = folder.join("src").join(name);
        fs::create_dir_all(path.parent().expect("below it")).expect("a folder");
        fs::write(path, text).expect("room");
    }
}

/// Runs the ignored test `case` in a process that is told `folder`: its exit code, and what it complained of.
pub fn in_a_process(case: &str, folder: &Path) -> (Option<i32>, String) {
    let mut child = Command::new(std::env::current_exe().expect("this program"));
    // The last argument is one more name that no test has.
    child.args(["--exact", "--ignored", case, "--test-threads=1", "--nocapture"]).arg(folder);
    let output = child.stdout(Stdio::null()).output().expect("it starts");
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// In such a process: its folder. From then on it is known whether kiln panics, and each run of a case has the same operations
/// in the same order: there is one processor, so that a build has one thread that does things, and by the clock no file is so
/// young that it has to be read again.
pub fn folder_of_the_case() -> PathBuf {
    let mut processors = rustix::thread::sched_getaffinity(None).expect("processors");
    let all: Vec<usize> =
        (0..rustix::thread::CpuSet::MAX_CPU).filter(|one| processors.is_set(*one)).collect();
    processors.clear();
    processors.set(all[rustix::thread::sched_getcpu() % all.len()]);
    rustix::thread::sched_setaffinity(None, &processors).expect("one of them");
    kiln::clock::put_forward(10);
    std::panic::set_hook(Box::new(|panic| {
        let _ = writeln!(std::io::stderr(), "{panic}");
        if panic.location().is_some_and(|place| place.file().starts_with("src/")) {
            KILN_PANICKED.store(true, Ordering::SeqCst);
        }
    }));
    PathBuf::from(std::env::args().next_back().expect("a folder"))
}

/// Ends such a process that was not killed.
pub fn end_of_the_case() -> ! {
    std::process::exit(if KILN_PANICKED.load(Ordering::SeqCst) { PANICKED } else { 0 })
}

fn lock_source(folder: &Path, url: &str) {
    let source = LockedSource { url: url.to_owned(), size: 1, sha256: Digest::of(url.as_bytes()) };
    let _ = Lock::change(&folder.join("kiln.lock"), |lock| lock.set_source(source));
}

/// The URLs that the lock has; none where it cannot be read.
fn locked(folder: &Path) -> Option<Vec<String>> {
    let lock = Lock::load(&folder.join("kiln.lock")).ok()?;
    Some(lock.sources().map(|source| source.url.clone()).collect())
}

/// An image with one file.
fn image(world: &World) -> Option<Vec<u8>> {
    let (digest, size) = world.store.blobs().put(&b"in an image"[..]).ok()?;
    let mut tree = Tree::new();
    let folder = Node { kind: Kind::Directory, meta: Meta { mode: 0o755, ..Meta::default() } };
    tree.insert(TreePath::root(), folder);
    let file = Node { kind: Kind::File { digest, size }, meta: Meta { mode: 0o644, ..Meta::default() } };
    tree.insert(TreePath::new(b"file").expect("a good path"), file);
    let image = Image::of_tree(&world.store, &tree).ok()?;
    let mut bytes = Vec::new();
    fs::File::from(image.descriptor().ok()?).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// Builds, locks, makes an image, is changed, builds, has a hit, collects and verifies; an error in one keeps no later one
/// from being tried. `done` is told how many builds have ended well.
pub fn run(folder: &Path, done: impl Fn(usize)) {
    let attempt = |act: &dyn Fn(&World)| {
        let _ = catch_unwind(AssertUnwindSafe(|| {
            let mut world = World::at(folder);
            world.options.jobs = 1;
            act(&world);
        }));
    };
    let built = |world: &World, number| {
        if world.build(RECIPE).summary.is_good() {
            done(number);
        }
    };
    attempt(&|world| built(world, 1));
    attempt(&|_| lock_source(folder, "one"));
    attempt(&|world| drop(image(world)));
    attempt(&|world| {
        world.source("a.c", "A");
        built(world, 2);
    });
    attempt(&|_| lock_source(folder, "two"));
    attempt(&|world| built(world, 3));
    let order = Order { most_bytes: None, unused: Some(Duration::ZERO), dry_run: false, own: true };
    attempt(&|world| drop(collect(&world.store, &order)));
    attempt(&|world| drop(verify(&world.store)));
    let all = Order { most_bytes: Some(0), ..order };
    attempt(&|world| drop(collect(&world.store, &all)));
}

/// What WORK holds: contents and modes, by path.
type Contents = BTreeMap<PathBuf, (u32, Vec<u8>)>;

fn contents(work: &Path) -> Contents {
    let files = kiln::cache::stock::files(work).expect("WORK");
    files
        .into_iter()
        .map(|path| {
            let mode = fs::metadata(&path).expect("a file").permissions().mode();
            let bytes = fs::read(&path).expect("a file");
            (path.strip_prefix(work).expect("in WORK").to_owned(), (mode, bytes))
        })
        .collect()
}

/// What a clean build and an image made where nothing was before come to.
fn clean() -> &'static (Contents, Vec<u8>) {
    static CLEAN: OnceLock<(Contents, Vec<u8>)> = OnceLock::new();
    CLEAN.get_or_init(|| {
        let place = tempfile::tempdir().expect("a folder");
        prepare(place.path());
        let world = World::at(place.path());
        world.source("a.c", "A");
        assert!(world.build(RECIPE).summary.is_good());
        (contents(&place.path().join("work")), image(&world).expect("an image"))
    })
}

/// Looks at what a process left of which `done` builds had ended well, and goes on with it. With `power_failed`, blobs that
/// nothing names and packs that say of themselves that they are damaged may be there.
pub fn look(folder: &Path, done: usize, power_failed: bool) -> Result<(), String> {
    match catch_unwind(AssertUnwindSafe(|| looked(folder, done, power_failed))) {
        Ok(looked) => looked,
        Err(panic) => {
            let said = panic.downcast_ref::<String>().cloned().unwrap_or_default();
            Err(format!("looking at it panicked: {said}"))
        }
    }
}

fn looked(folder: &Path, done: usize, power_failed: bool) -> Result<(), String> {
    let world = World::at(folder);
    let work = folder.join("work");
    if power_failed {
        merge::recover(&world.store, &work).map_err(|error| format!("it cannot be recovered: {error:?}"))?;
    }
    let whole = ["a", "A", "b", "ab", "Ab", "fine"];
    for (path, (_, bytes)) in contents(&work) {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if !path.starts_with(merge::STAGING) && !whole.contains(&text.as_str()) {
            return Err(format!("{} is `{text}`", path.display()));
        }
    }
    // What was said to be built is there, and no older.
    for (builds, name, wanted) in
        [(1, "b.o", "b"), (1, "report", "fine"), (2, "a.o", "A"), (2, "bin/program", "Ab")]
    {
        if done >= builds && world.work(name).as_deref() != Some(wanted) {
            return Err(format!("after build {done} {name} is {:?}", world.work(name)));
        }
    }
    let urls = locked(folder).ok_or("the lock cannot be read")?;
    if !matches!(
        urls.iter().map(String::as_str).collect::<Vec<_>>()[..],
        [] | ["one"] | ["two"] | ["one", "two"]
    ) {
        return Err(format!("the lock names {urls:?}"));
    }
    lock_source(folder, "three");
    let left = fs::read_dir(folder).expect("a folder").flatten();
    if let Some(left) =
        left.map(|entry| entry.file_name()).find(|name| name.to_string_lossy().starts_with(".kiln.lock."))
    {
        return Err(format!("{} is left", left.display()));
    }
    for damage in verify(&world.store).expect("a store").damage {
        let is_note = ["traces/", "notes/", "placed/"].iter().any(|folder| damage.name.starts_with(folder));
        // What a step printed is not waited for.
        let is_harmless = damage.name.starts_with("blobs/")
            || is_note
                && (damage.what == "is not what was written" || names_its_outputs(&world, &damage.name));
        if !power_failed || !is_harmless {
            return Err(format!("damaged: {damage:?}"));
        }
    }
    world.source("a.c", "A");
    let built = world.build(RECIPE);
    if !built.summary.is_good() {
        return Err(format!("the next build fails: {:?}", built.summary.outcomes));
    }
    if contents(&work) != clean().0 {
        return Err(format!("WORK is not as after a clean build: {:?}", contents(&work)));
    }
    if image(&world).as_ref() != Some(&clean().1) {
        return Err("the image is not as a clean one".to_owned());
    }
    if !world.build(RECIPE).ran.is_empty() {
        return Err("a build with nothing to do does something".to_owned());
    }
    loop {
        let damage = verify(&world.store).expect("a store").damage;
        if damage.is_empty() {
            break;
        }
        if !power_failed || repair(&world.store, &damage).is_err() {
            return Err(format!("it cannot be repaired: {damage:?}"));
        }
    }
    let left = fs::read_dir(folder.join("store/tmp")).expect("a folder").count();
    if left != 1 || work.join(merge::STAGING).exists() {
        return Err(format!("{left} folders of unfinished files are left"));
    }
    Ok(())
}

/// Whether all that a pack's traces name is there as it was put out.
fn names_its_outputs(world: &World, name: &str) -> bool {
    let blobs = world.store.blobs();
    let stock = kiln::cache::stock::stock(&world.store).expect("a store");
    let stored = stock.into_iter().find(|stored| stored.name == name).expect("it is damaged");
    let has = |outputs: &Digest| {
        let tree = blobs.read(outputs).ok().and_then(|bytes| Tree::parse_manifest(&bytes).ok());
        tree.is_some_and(|tree| {
            tree.iter().all(|(_, node)| match &node.kind {
                Kind::File { digest, .. } => blobs.read(digest).is_ok(),
                _ => true,
            })
        })
    };
    stored.lines.iter().all(|line| match &line.content {
        kiln::cache::stock::Content::Trace(trace) => has(&trace.outputs),
        // Of notes only what was printed is missed.
        _ => true,
    })
}
