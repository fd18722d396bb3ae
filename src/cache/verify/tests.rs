use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use super::*;

/// A folder that a step read.
struct World {
    folder: tempfile::TempDir,
    hidden: Hidden,
    hashed: Hashed,
}

fn nanos(time: SystemTime) -> i64 {
    i64::try_from(time.duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_nanos()).expect("fits")
}

#[expect(clippy::disallowed_methods, reason = "compared with the times of files")]
fn now() -> i64 {
    nanos(SystemTime::now())
}

/// A stamp that is older than no file.
const LATER: i64 = i64::MAX;

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let world = Self { folder, hidden: Hidden::default(), hashed: Hashed::default() };
        fs::create_dir_all(world.path("include")).expect("a folder");
        fs::write(world.path("main.c"), "int main;").expect("room");
        fs::write(world.path("include/a.h"), "a").expect("room");
        fs::write(world.path("unread"), "x").expect("room");
        symlink("main.c", world.path("link")).expect("a link");
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn entry(&self, path: &str, observed: Observed) -> Entry {
        let live = fs::File::open(self.folder.path()).expect("there").into();
        let live = Live {
            directory: &live,
            hidden: &self.hidden,
            hashed: &self.hashed,
            stamped_nanos: 0,
            now_nanos: 0,
        };
        let fingerprint = live.stat(path.as_bytes()).expect("there");
        let kind = kiln_virtio::fs::kind_of(fingerprint.mode).expect("a kind");
        let mut entry = Entry {
            path: path.as_bytes().to_vec(),
            kind,
            observed,
            fingerprint,
            content: None,
            listing: None,
            xattrs: None,
        };
        if observed.contains(Observed::CONTENT) {
            entry.content = Some(live.content(&entry, &fingerprint).expect("readable"));
        }
        if observed.contains(Observed::LISTING) {
            entry.listing = Some(live.listing(path.as_bytes()).expect("readable"));
        }
        entry
    }

    /// A step that read main.c through the link, looked for b.h and found a.h, and listed `include`.
    fn trace(&self, stamped_nanos: i64) -> Trace {
        let told = Observed::METADATA;
        let entries = vec![
            self.entry("", told),
            self.entry("include", told | Observed::LISTING),
            self.entry("include/a.h", told | Observed::CONTENT),
            self.entry("link", told | Observed::CONTENT),
            self.entry("main.c", told | Observed::CONTENT),
        ];
        let share = ShareTrace {
            name: "src".to_owned(),
            guest: "/ws/p".to_owned(),
            entries,
            missed: vec![b"b.h".to_vec(), b"include/b.h".to_vec()],
        };
        let (outputs, machine) = (Digest::of(b""), String::new());
        Trace { stamped_nanos, shares: vec![share], outputs, log: None, command_ms: 0, machine }
    }

    fn verify(&self, trace: &Trace) -> Verdict {
        let directory = fs::File::open(self.folder.path()).expect("there").into();
        let places = [("src".to_owned(), Place::Live { directory, hidden: &self.hidden })].into();
        verify(trace, &places, &self.hashed, now())
    }

    fn difference(&self, trace: &Trace) -> String {
        match self.verify(trace) {
            Verdict::Differs(difference) => difference.to_string(),
            Verdict::Holds(_) => panic!("it holds"),
        }
    }
}

#[test]
fn what_nobody_read_makes_no_difference() {
    let world = World::new();
    let trace = world.trace(LATER);
    fs::write(world.path("unread"), "y").expect("room");
    fs::write(world.path("new"), "y").expect("room");
    assert!(matches!(world.verify(&trace), Verdict::Holds(_)));
}

#[test]
fn what_was_read_and_is_another_is_named() {
    type Deed = fn(&World);
    let deeds: [(Deed, &str); 10] = [
        (|w| fs::write(w.path("main.c"), "int nain;").expect("room"), "`/ws/p/main.c` changed: content"),
        (|w| fs::remove_file(w.path("main.c")).expect("there"), "`/ws/p/main.c` is gone"),
        (|w| fs::write(w.path("b.h"), "").expect("room"), "`/ws/p/b.h`, which it looked for in vain"),
        (|w| fs::write(w.path("include/c.h"), "").expect("room"), "`/ws/p/include`, which it listed"),
        (|w| fs::rename(w.path("include"), w.path("inc")).expect("room"), "`/ws/p/include` is gone"),
        (
            |w| fs::set_permissions(w.path("main.c"), fs::Permissions::from_mode(0o755)).expect("ours"),
            "`/ws/p/main.c` changed: mode 0755 was 0644",
        ),
        (
            |w| {
                fs::remove_file(w.path("link")).expect("there");
                symlink("unread", w.path("link")).expect("room");
            },
            "`/ws/p/link` changed",
        ),
        (
            |w| {
                fs::remove_file(w.path("main.c")).expect("there");
                fs::create_dir(w.path("main.c")).expect("room");
            },
            "was a file and is a folder",
        ),
        (
            |w| {
                // The same tree, but elsewhere and by a link.
                fs::rename(w.path("include"), w.path("inc")).expect("room");
                symlink("inc", w.path("include")).expect("room");
            },
            "was a folder and is a symbolic link",
        ),
        (
            |w| {
                fs::remove_file(w.path("include/a.h")).expect("there");
                fs::write(w.path("include/a.h"), "b").expect("room");
            },
            "`/ws/p/include/a.h` changed",
        ),
    ];
    for (deed, words) in deeds {
        let world = World::new();
        let trace = world.trace(LATER);
        assert!(matches!(world.verify(&trace), Verdict::Holds(None)), "{words}");
        deed(&world);
        let difference = world.difference(&trace);
        assert!(difference.contains(words), "{difference}");
    }
}

#[test]
fn a_file_that_was_only_touched_holds_and_is_stamped_anew() {
    let world = World::new();
    let trace = world.trace(LATER);
    let file = fs::File::open(world.path("main.c")).expect("there");
    file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(5)).expect("ours");
    let Verdict::Holds(Some(renewed)) = world.verify(&trace) else { panic!("it holds, with a new stamp") };
    assert_ne!(renewed.shares[0].entries[4].fingerprint, trace.shares[0].entries[4].fingerprint);
    assert!(matches!(world.verify(&Trace { stamped_nanos: LATER, ..*renewed }), Verdict::Holds(None)));
}

#[test]
fn a_stamp_is_no_proof_of_a_file_that_may_have_changed_after_it() {
    let world = World::new();
    // As if the file had changed within a tick after it was read: all that stat(2) shows is the same.
    let mut trace = world.trace(now());
    trace.shares[0].entries[4].content = Some(Digest::of(b"what it was"));
    assert!(world.difference(&trace).contains("main.c"));
    // The same of a clock that was set back since.
    trace.stamped_nanos = now() - 3_600_000_000_000;
    assert!(world.difference(&trace).contains("main.c"));
    // Long after, the stamp is proof.
    trace.stamped_nanos = LATER;
    assert!(matches!(world.verify(&trace), Verdict::Holds(None)));
}

#[test]
fn a_file_system_that_keeps_whole_seconds_needs_more_than_a_tick() {
    let second = 1_000_000_000;
    let seen = |ctime_nanos| Fingerprint { ctime_nanos, ..Fingerprint::default() };
    assert!(is_young(&seen(5 * second), 6 * second) && !is_young(&seen(5 * second), 8 * second));
    assert!(is_young(&seen(5 * second + 1), 5 * second + 2) && !is_young(&seen(5 * second + 1), 6 * second));
    assert!(is_young(&seen(i64::MAX), i64::MAX));
}

#[test]
fn what_is_hidden_is_as_good_as_absent() {
    let mut world = World::new();
    let trace = world.trace(LATER);
    world.hidden.paths = [b"include/c.h".to_vec(), b"b.h".to_vec()].into();
    fs::write(world.path("include/c.h"), "").expect("room");
    fs::write(world.path("b.h"), "").expect("room");
    assert!(matches!(world.verify(&trace), Verdict::Holds(_)));
    world.hidden.paths.insert(b"main.c".to_vec());
    fs::write(world.path("main.c"), "int main;").expect("room");
    assert!(world.difference(&trace).contains("is gone"));
}

#[test]
fn outputs_of_other_steps_are_held_against_their_manifest() {
    use kiln_artifact::tree::{Meta, Node};
    let file = |text: &str, mode| {
        let kind = NodeKind::File { digest: Digest::of(text.as_bytes()), size: text.len() as u64 };
        Node { kind, meta: Meta { mode, ..Meta::default() } }
    };
    let tree = |nodes: Vec<(&str, Node)>| {
        let mut tree = Tree::new();
        let folder = Node { kind: NodeKind::Directory, meta: Meta { mode: 0o755, ..Meta::default() } };
        tree.insert(TreePath::new(b"lib").expect("good"), folder);
        nodes.into_iter().for_each(|(path, node)| {
            tree.insert(TreePath::new(path.as_bytes()).expect("good"), node);
        });
        tree
    };
    let entry = |path: &str, kind, mode, observed| Entry {
        path: path.as_bytes().to_vec(),
        kind,
        observed: Observed::METADATA | observed,
        fingerprint: Fingerprint { mode, size_bytes: 1, ..Fingerprint::default() },
        content: Some(Digest::of(b"a")),
        listing: Some(listing_digest(vec![('f', b"a".to_vec())])),
        xattrs: None,
    };
    let share = ShareTrace {
        name: "work".to_owned(),
        guest: "/x/p".to_owned(),
        entries: vec![
            entry("lib", Kind::Directory, 0o755, Observed::LISTING),
            entry("lib/a", Kind::Regular, 0o644, Observed::CONTENT),
        ],
        missed: vec![b"bin".to_vec()],
    };
    let difference =
        |tree: &Tree| against_tree(&share, tree).err().map(|(path, what)| (path.to_string(), what));
    assert_eq!(difference(&tree(vec![("lib/a", file("a", 0o644))])), None);
    let found = difference(&tree(vec![("lib/a", file("b", 0o644))]));
    assert!(matches!(found, Some((path, What::Content(..))) if path == "lib/a"));
    let found = difference(&tree(vec![("lib/a", file("a", 0o755))]));
    assert!(matches!(found, Some((path, What::Mode(..))) if path == "lib/a"));
    let found = difference(&tree(vec![("lib/a", file("a", 0o644)), ("lib/b", file("", 0o644))]));
    assert!(matches!(found, Some((path, What::Listing)) if path == "lib"));
    let found = difference(&tree(vec![("lib/a", file("a", 0o644)), ("bin", file("", 0o644))]));
    assert!(matches!(found, Some((path, What::Appeared)) if path == "bin"));
    assert!(matches!(difference(&Tree::new()), Some((_, What::Vanished))));
}

#[test]
fn attributes_that_a_link_was_asked_for_are_no_difference() {
    let world = World::new();
    let mut trace = world.trace(0);
    let asked = Observed::METADATA | Observed::CONTENT | Observed::XATTRS;
    // As the fs device says it of what has none.
    let link = Entry { xattrs: Some(Digest::of(b"")), ..world.entry("link", asked) };
    trace.shares[0].entries = vec![link];
    assert!(matches!(world.verify(&trace), Verdict::Holds(Some(_))));
}
