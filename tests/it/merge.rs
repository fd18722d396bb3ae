//! Outputs on their way into WORK, where a person or an earlier step has put something in the way. Nothing outside of
//! WORK is touched, whatever a step's outputs are named and whatever links lie in WORK.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use kiln::engine::merge::{Merge, MergeError, STAGING, placed_by, recover};
use kiln::store::Store;
use kiln_artifact::tree::{Kind, Meta, Node, Tree, TreePath};
use tempfile::TempDir;

/// A WORK, a store and a folder outside of both.
struct World {
    folder: PathBuf,
    _temporary: Option<TempDir>,
    store: Store,
}

fn path(bytes: &[u8]) -> TreePath {
    TreePath::new(bytes).expect("a good path")
}

fn node(kind: Kind, mode: u16) -> Node {
    Node { kind, meta: Meta { mode, ..Meta::default() } }
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open(&folder.path().join("store")).expect("a store");
        for name in ["work", "outside"] {
            fs::create_dir(folder.path().join(name)).expect("a folder");
        }
        Self { folder: folder.path().to_owned(), _temporary: Some(folder), store }
    }

    /// A world that another process has made.
    fn at(folder: &Path) -> Self {
        let store = Store::open(&folder.join("store")).expect("a store");
        Self { folder: folder.to_owned(), _temporary: None, store }
    }

    fn work(&self, name: &str) -> PathBuf {
        self.folder.join("work").join(name)
    }

    fn outside(&self) -> PathBuf {
        self.folder.join("outside")
    }

    /// Outputs: files and links at paths, and the folders above them.
    fn tree(&self, nodes: Vec<(&[u8], Node)>) -> Tree {
        let mut tree = Tree::new();
        for (name, node) in nodes {
            let path = path(name);
            let mut above = path.parent();
            while let Some(folder) = above {
                above = folder.parent();
                if tree.get(&folder).is_none() {
                    tree.insert(folder, self::node(Kind::Directory, 0o755));
                }
            }
            tree.insert(path, node);
        }
        tree
    }

    fn file(&self, text: &str, mode: u16) -> Node {
        let (digest, size) = self.store.blobs().put(text.as_bytes()).expect("room");
        node(Kind::File { digest, size }, mode)
    }

    fn merge(&self, step: &str, nodes: Vec<(&[u8], Node)>) -> Result<Vec<TreePath>, MergeError> {
        let work = self.work("");
        let merge = Merge { store: &self.store, work: &work, step, overwrite: false };
        Ok(merge.run(&self.tree(nodes))?.placed)
    }

    fn placed_by(&self, step: &str) -> Vec<String> {
        let placed = placed_by(&self.store, &self.work(""), step).expect("a ledger");
        placed.iter().map(ToString::to_string).collect()
    }

    /// Asserts that the folder outside is as it was made, and that no merge is under way.
    fn is_sound(&self) {
        let outside = fs::read_dir(self.outside()).expect("it is there").flatten().map(|entry| entry.path());
        assert_eq!(outside.collect::<Vec<_>>(), Vec::<PathBuf>::new(), "written outside of WORK");
        let mode = fs::metadata(self.outside()).expect("it is there").permissions().mode();
        assert_eq!(mode & 0o777, 0o755, "the mode of a folder outside of WORK was changed");
        assert!(!self.work(STAGING).exists(), "a staging folder is left");
        recover(&self.store, &self.work("")).expect("nothing to recover");
    }
}

#[test]
fn an_output_does_not_follow_a_link_that_a_person_made() {
    let world = World::new();
    fs::set_permissions(world.outside(), fs::Permissions::from_mode(0o755)).expect("a mode");
    symlink(world.outside(), world.work("lib")).expect("a link");
    let refused =
        world.merge("s", vec![(b"lib", node(Kind::Directory, 0o700)), (b"lib/a", world.file("1", 0o644))]);
    assert!(matches!(refused, Err(MergeError::Changed { .. })), "{refused:?}");
    world.is_sound();
}

#[test]
fn an_output_does_not_follow_a_link_that_another_step_put_out() {
    let world = World::new();
    fs::set_permissions(world.outside(), fs::Permissions::from_mode(0o755)).expect("a mode");
    let target = world.outside().into_os_string().into_encoded_bytes();
    world
        .merge("one", vec![(b"lib", node(Kind::Symlink(target.into()), 0o777))])
        .expect("a link is an output");
    let _ = world
        .merge("other", vec![(b"lib", node(Kind::Directory, 0o700)), (b"lib/a", world.file("1", 0o644))]);
    world.is_sound();
}

#[test]
fn an_empty_folder_does_not_follow_a_link() {
    let world = World::new();
    fs::set_permissions(world.outside(), fs::Permissions::from_mode(0o755)).expect("a mode");
    symlink(world.outside(), world.work("lib")).expect("a link");
    let _ = world.merge("s", vec![(b"lib", node(Kind::Directory, 0o700))]);
    world.is_sound();
}

#[test]
fn what_a_step_put_out_before_is_not_removed_through_a_link() {
    let world = World::new();
    world.merge("s", vec![(b"d/a", world.file("1", 0o644))]).expect("a first merge");
    fs::rename(world.work("d"), world.folder.join("moved")).expect("a person's change");
    symlink(world.folder.join("moved"), world.work("d")).expect("a link");
    let _ = world.merge("s", vec![(b"b", world.file("1", 0o644))]);
    let kept = fs::read_to_string(world.folder.join("moved/a"));
    assert_eq!(kept.expect("it was moved out of WORK"), "1");
}

#[test]
fn a_file_where_a_folder_must_go_is_refused_and_nothing_is_merged() {
    let world = World::new();
    fs::write(world.work("bin"), "mine").expect("room");
    let refused =
        world.merge("s", vec![(b"a", world.file("1", 0o644)), (b"bin/lua", world.file("2", 0o755))]);
    assert!(matches!(refused, Err(MergeError::Changed { .. })), "{refused:?}");
    assert!(!world.work("a").exists(), "half of the outputs were merged");
    assert_eq!(fs::read_to_string(world.work("bin")).expect("it is a person's"), "mine");
    world.is_sound();
}

#[test]
fn a_folder_where_a_file_must_go_is_refused_unless_kiln_made_it() {
    let world = World::new();
    fs::create_dir(world.work("a")).expect("a folder");
    let refused = world.merge("s", vec![(b"a", world.file("1", 0o644))]);
    assert!(matches!(refused, Err(MergeError::Changed { .. })), "{refused:?}");
    world.is_sound();
}

#[test]
fn a_step_may_turn_a_folder_of_its_own_into_a_file_and_back() {
    let world = World::new();
    world.merge("s", vec![(b"a/b", world.file("1", 0o644))]).expect("a folder");
    world.merge("s", vec![(b"a", world.file("2", 0o644))]).expect("a file in its place");
    assert_eq!(fs::read_to_string(world.work("a")).expect("a file"), "2");
    world.merge("s", vec![(b"a/b", world.file("3", 0o644))]).expect("a folder again");
    assert_eq!(fs::read_to_string(world.work("a/b")).expect("a file"), "3");
    world.is_sound();
}

#[test]
fn a_path_that_two_steps_put_out_is_the_later_ones_and_the_earlier_one_does_not_take_it_away() {
    let world = World::new();
    world.merge("one", vec![(b"out/x", world.file("1", 0o644))]).expect("merged");
    world.merge("two", vec![(b"out/x", world.file("2", 0o644))]).expect("merged");
    assert_eq!(fs::read(world.work("out/x")).expect("there"), b"2");
    // The first puts out nothing more.
    world.merge("one", Vec::new()).expect("merged");
    assert_eq!(fs::read(world.work("out/x")).expect("there"), b"2");
    // Both at once leave what one of them put out, whole.
    std::thread::scope(|scope| {
        for step in ["one", "two"] {
            let world = &world;
            scope.spawn(move || {
                for _ in 0..20 {
                    let text = step.repeat(1000);
                    world.merge(step, vec![(b"out/x", world.file(&text, 0o644))]).expect("merged");
                }
            });
        }
    });
    let found = fs::read_to_string(world.work("out/x")).expect("there");
    assert!(["one", "two"].iter().any(|step| found == step.repeat(1000)), "{}", found.len());
    world.is_sound();
}

#[test]
fn a_path_is_the_step_that_put_it_there_last_also_where_a_person_removed_it_between() {
    let world = World::new();
    world.merge("one", vec![(b"x", world.file("1", 0o644)), (b"y", world.file("1", 0o644))]).expect("merged");
    fs::remove_file(world.work("x")).expect("a person may");
    // The same content, so that only the ledger tells whose it is.
    world.merge("two", vec![(b"x", world.file("1", 0o644))]).expect("merged");
    assert_eq!(world.placed_by("one"), ["y"]);
    assert_eq!(world.placed_by("two"), ["x"]);
    world.merge("one", Vec::new()).expect("merged");
    assert!(world.work("x").exists(), "it is the other step's");
    assert!(!world.work("y").exists());
    world.merge("two", Vec::new()).expect("merged");
    assert!(!world.work("x").exists());
}

#[test]
fn what_a_command_removes_is_no_steps_any_more_and_who_puts_it_there_next_owns_it() {
    let world = World::new();
    world
        .merge("one", vec![(b"d/x", world.file("1", 0o644)), (b"k", world.file("1", 0o644))])
        .expect("merged");
    let work = world.work("");
    let command = Merge { store: &world.store, work: &work, step: "command", overwrite: false };
    let outputs = world.tree(vec![(b"made", world.file("c", 0o644))]);
    command.run_upon(&outputs, &[path(b"d")]).expect("merged");
    assert_eq!(world.placed_by("one"), ["k"]);
    assert_eq!(world.placed_by("command"), ["made"]);
    // A person's file under a name that was the step's stays a person's.
    fs::create_dir(world.work("d")).expect("a folder");
    fs::write(world.work("d/x"), "mine").expect("room");
    world.merge("one", vec![(b"k", world.file("1", 0o644))]).expect("merged");
    let refused = world.merge("two", vec![(b"d/x", world.file("2", 0o644))]);
    assert!(matches!(refused, Err(MergeError::Changed { .. })), "{refused:?}");
    assert_eq!(fs::read(world.work("d/x")).expect("there"), b"mine");
}

#[test]
fn a_step_whose_ledger_is_damaged_takes_nothing_that_another_put_out() {
    let world = World::new();
    let records = world.folder.join("store/records/work");
    let ledger = || fs::read_dir(&records).expect("a ledger").flatten().map(|entry| entry.path());
    world.merge("one", vec![(b"x", world.file("1", 0o644))]).expect("merged");
    // Of its two documents the one that says whose a path is.
    let is_shard = |path: &PathBuf| fs::read_to_string(path).expect("there").contains("owners");
    ledger().filter(is_shard).for_each(|path| fs::remove_file(path).expect("there"));
    world.merge("two", vec![(b"x", world.file("1", 0o644))]).expect("merged");
    assert_eq!(world.placed_by("two"), Vec::<String>::new(), "it was there, and is not its own");
    fs::remove_file(world.work("x")).expect("there");
    world.merge("two", vec![(b"x", world.file("1", 0o644))]).expect("merged");
    world.merge("one", Vec::new()).expect("merged");
    assert!(world.work("x").exists(), "it is the other step's");
    world.merge("two", Vec::new()).expect("merged");
    assert!(!world.work("x").exists());
}

#[test]
fn a_step_reads_of_the_ledger_what_it_put_out_itself() {
    let world = World::new();
    let many: Vec<String> = (0..3_000).map(|number| format!("many/{number}")).collect();
    let content = world.file("1", 0o644);
    let nodes = many.iter().map(|name| (name.as_bytes(), content.clone())).collect();
    world.merge("many", nodes).expect("merged");
    world.merge("few", vec![(b"a", world.file("1", 0o644))]).expect("merged");
    // Whatever is not the step's own is as good as gone.
    let records = world.folder.join("store/records/work");
    for entry in fs::read_dir(records).expect("a ledger").flatten() {
        if entry.metadata().expect("there").len() > 4096 {
            fs::remove_file(entry.path()).expect("there");
        }
    }
    assert_eq!(world.placed_by("few"), ["a"]);
    world.merge("few", vec![(b"a", world.file("2", 0o644))]).expect("merged");
    assert_eq!(fs::read(world.work("a")).expect("there"), b"2");
}

#[test]
fn the_name_of_the_staging_folder_is_no_output() {
    // A folder of WORK may be another's WORK, and a file system may take capitals for small letters.
    for name in [
        &b".kiln-staging/journal"[..],
        b".kiln-staging/0",
        b".kiln-staging",
        b"below/.kiln-staging/journal",
        b".Kiln-Staging/journal",
    ] {
        let world = World::new();
        fs::write(world.work("mine"), "mine").expect("room");
        let refused = world.merge("s", vec![(name, world.file("{}", 0o644)), (b"a", world.file("1", 0o644))]);
        assert!(refused.is_err(), "{} was taken", name.escape_ascii());
        assert!(!world.work("a").exists(), "half of the outputs were merged");
        world.is_sound();
    }
}

#[test]
fn a_mode_that_changed_alone_is_merged() {
    let world = World::new();
    world.merge("s", vec![(b"a", world.file("1", 0o644))]).expect("a first merge");
    world.merge("s", vec![(b"a", world.file("1", 0o755))]).expect("a second merge");
    let mode = fs::metadata(world.work("a")).expect("it is there").permissions().mode();
    assert_eq!(mode & 0o777, 0o755);
}

#[test]
fn a_name_of_any_bytes_is_merged_and_removed_again() {
    let world = World::new();
    for name in [&b"new\nline"[..], b"\xff\xfe", b"back\\nslash", b"%41"] {
        let on_host =
            world.work("").join(std::ffi::OsStr::new(std::str::from_utf8(name).unwrap_or("\u{fffd}")));
        let on_host = match std::str::from_utf8(name) {
            Ok(_) => on_host,
            Err(_) => {
                world.work("").join(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(name))
            }
        };
        world.merge("s", vec![(name, world.file("1", 0o644))]).expect("a first merge");
        assert!(on_host.exists(), "{}", name.escape_ascii());
        world.merge("s", vec![(b"other", world.file("1", 0o644))]).expect("a second merge");
        assert!(!on_host.exists(), "{} is no output any more, and stays", name.escape_ascii());
        world.merge("s", vec![]).expect("a third merge");
    }
    world.is_sound();
}

#[test]
fn a_name_that_looks_like_another_when_it_is_shown_takes_nothing_along() {
    let world = World::new();
    world.merge("s", vec![(b"a\nb", world.file("1", 0o644))]).expect("a first merge");
    // What a person has under the name by which messages show the output, with the same content.
    fs::write(world.work("a\\nb"), "1").expect("room");
    world.merge("s", vec![(b"other", world.file("1", 0o644))]).expect("a second merge");
    assert!(world.work("a\\nb").exists(), "a person's file was removed");
}

#[test]
fn a_file_that_a_person_changed_stops_its_removal_too() {
    let world = World::new();
    world.merge("s", vec![(b"a", world.file("1", 0o644))]).expect("a first merge");
    fs::write(world.work("a"), "mine").expect("a person's change");
    let refused = world.merge("s", vec![(b"b", world.file("1", 0o644))]);
    assert!(matches!(refused, Err(MergeError::Changed { .. })), "{refused:?}");
    assert!(!world.work("b").exists());
    world.is_sound();
}

#[test]
fn devices_fifos_and_sockets_are_refused_by_kind() {
    for (kind, word) in [
        (Kind::CharDevice { major: 1, minor: 3 }, "device"),
        (Kind::BlockDevice { major: 8, minor: 0 }, "device"),
        (Kind::Fifo, "FIFO"),
        (Kind::Socket, "socket"),
    ] {
        let world = World::new();
        let refused = world.merge("s", vec![(b"a", world.file("1", 0o644)), (b"odd", node(kind, 0o644))]);
        let refused = refused.expect_err("WORK holds none");
        assert!(refused.to_string().contains("`odd`") && refused.to_string().contains(word), "{refused}");
        assert!(!world.work("a").exists());
        world.is_sound();
    }
}

#[test]
fn set_user_bits_do_not_reach_work() {
    let world = World::new();
    world.merge("s", vec![(b"a", world.file("1", 0o6755)), (b"b", world.file("1", 0o000))]).expect("a merge");
    let mode = |name| fs::metadata(world.work(name)).expect("it is there").permissions().mode() & 0o7777;
    assert_eq!(mode("a"), 0o755);
    assert_eq!(mode("b"), 0o600, "what is in WORK can be read and replaced by its owner");
}

#[test]
fn kilns_of_two_stores_merge_into_one_work_by_turns() {
    let world = World::new();
    let kiln = |number: usize| {
        let store = Store::open(&world.folder.join(format!("store{number}"))).expect("a store");
        let mine = World { folder: world.folder.clone(), _temporary: None, store };
        let step = format!("s{number}");
        for time in 0..150 {
            // Many, so that each has more than one to rename.
            let text = time.to_string();
            let names: Vec<String> = (0..4).map(|file| format!("{step}/{file}")).collect();
            let nodes = names.iter().map(|name| (name.as_bytes(), mine.file(&text, 0o644))).collect();
            mine.merge(&step, nodes).expect("nobody is in the way of another");
            for name in names {
                assert_eq!(fs::read_to_string(mine.work(&name)).expect("it is placed"), text, "{name}");
            }
        }
    };
    let kiln = &kiln;
    std::thread::scope(|scope| {
        (1..4).for_each(|number| drop(scope.spawn(move || kiln(number))));
    });
    world.is_sound();
}

#[test]
fn a_kiln_of_another_store_completes_a_merge_only_when_nobody_is_at_it() {
    let world = World::new();
    let staging = world.work(STAGING);
    fs::create_dir(&staging).expect("a folder");
    let held = fs::File::open(&staging).expect("it is there");
    held.lock().expect("nobody has it");
    let outputs = vec![(&b"a"[..], world.file("1", 0o644))];
    std::thread::scope(|scope| {
        let merges = scope.spawn(|| world.merge("s", outputs));
        let inode = held.metadata().expect("it is open").ino();
        // As the system lists whoever waits for a lock.
        let waits = |line: &str| line.contains("-> FLOCK") && line.contains(&format!(":{inode} "));
        while !fs::read_to_string("/proc/locks").expect("a list").lines().any(waits) {
            assert!(!merges.is_finished(), "it does not wait for who holds the folder");
            std::thread::yield_now();
        }
        assert_eq!(fs::metadata(&staging).expect("it is there").ino(), inode);
        drop(held);
        merges.join().expect("no panic").expect("nothing is in the way");
    });
    assert!(world.work("a").exists());
    world.is_sound();
}

/// Where the process of [`merges_and_ends`] merges.
const PLACE: &str = "KILN_TEST_MERGE";
/// What changes files, and what tells the disk to keep them.
const CALLS: [&str; 17] = [
    "rename",
    "renameat",
    "renameat2",
    "unlink",
    "unlinkat",
    "rmdir",
    "mkdir",
    "mkdirat",
    "symlink",
    "symlinkat",
    "fchmod",
    "ftruncate",
    "fsync",
    "fdatasync",
    "syncfs",
    "flock",
    "copy_file_range",
];

impl World {
    fn merge_old(&self) {
        let nodes: Vec<(&[u8], Node)> = vec![
            (b"changed", self.file("old", 0o644)),
            (b"folder/gone", self.file("old", 0o644)),
            (b"turned", self.file("old", 0o644)),
        ];
        self.merge("step", nodes).expect("nothing is in the way");
        let nodes: Vec<(&[u8], Node)> =
            vec![(b"others", self.file("old", 0o644)), (b"taken", self.file("old", 0o644))];
        self.merge("other", nodes).expect("nothing is in the way");
    }

    fn merge_new(&self) -> Vec<TreePath> {
        let nodes: Vec<(&[u8], Node)> = vec![
            (b"changed", self.file("new", 0o755)),
            (b"deep/er/added", self.file("new", 0o644)),
            (b"link", node(Kind::Symlink(b"changed"[..].into()), 0o777)),
            (b"taken", self.file("new", 0o644)),
            (b"turned/into", self.file("new", 0o644)),
        ];
        self.merge("step", nodes).expect("nothing is in the way")
    }

    /// Every file in WORK with what is in it.
    fn files(&self) -> Vec<String> {
        let list = Command::new("find")
            .arg(self.work(""))
            .args(["!", "-type", "d", "-printf", "%P %m ", "-exec", "cat", "{}", ";", "-printf", "\\n"])
            .output()
            .expect("find");
        let mut lines: Vec<String> =
            String::from_utf8_lossy(&list.stdout).lines().map(str::to_owned).collect();
        lines.sort_unstable();
        lines
    }
}

#[test]
#[expect(clippy::disallowed_methods, reason = "the process that is killed is told so by the environment")]
fn merges_and_ends() {
    if let Some(folder) = std::env::var_os(PLACE) {
        World::at(Path::new(&folder)).merge_new();
    }
}

#[test]
fn a_merge_that_is_killed_at_any_point_is_completed_or_undone() {
    let (mut undone, mut completed) = (0, 0);
    let old = ["changed 644 old", "folder/gone 644 old", "others 644 old", "taken 644 old", "turned 644 old"];
    let new = [
        "changed 755 new",
        "deep/er/added 644 new",
        "link 777 new",
        "others 644 old",
        "taken 644 new",
        "turned/into 644 new",
    ];
    let owned = |world: &World| (world.placed_by("step").join(" "), world.placed_by("other").join(" "));
    let owned_old = ("changed folder/gone turned".to_owned(), "others taken".to_owned());
    let owned_new = ("changed deep/er/added link taken turned/into".to_owned(), "others".to_owned());
    for call in CALLS {
        for point in 1.. {
            let world = World::new();
            world.merge_old();
            let status = Command::new("strace")
                .args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={call}")])
                .args(["-e", &format!("inject={call}:signal=KILL:when={point}")])
                .arg(std::env::current_exe().expect("this program"))
                .args(["--exact", "merge::merges_and_ends", "--test-threads=1"])
                .env(PLACE, &world.folder)
                .output()
                .expect("strace is installed: see ci/setup test")
                .status;
            recover(&world.store, &world.work("")).expect("what a killed kiln left");
            let files = world.files();
            world.is_sound();
            if status.success() {
                // There is no further call of this kind.
                assert_eq!(files, new, "after {} of {call}", point - 1);
                break;
            }
            assert!(files == old || files == new, "killed at {call} {point}: {files:?}");
            if files == new {
                completed += 1;
                assert_eq!(owned(&world), owned_new, "killed at {call} {point}");
            } else {
                undone += 1;
                assert_eq!(owned(&world), owned_old, "killed at {call} {point}");
            }
            world.merge_new();
            assert_eq!(world.files(), new, "after a kill at {call} {point}");
            world.is_sound();
        }
    }
    assert!(undone > 5 && completed > 5, "undone {undone} times, completed {completed} times");
}
