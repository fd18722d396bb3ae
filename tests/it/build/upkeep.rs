//! A store that was built with is looked after: what may go goes, what is damaged is found, and builds go on.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln::cache::stock::files;
use kiln::engine::build::Outcome;
use kiln::store::{Store, StoreError};
use kiln::upkeep::census::Census;
use kiln::upkeep::collect::{Order, collect, set_limit};
use kiln::upkeep::verify::{repair, verify};

use super::{RECIPE, world};

/// Every file that a verification looks at.
fn checked(store: &Path) -> Vec<PathBuf> {
    ["blobs", "images", "records", "traces", "notes", "placed"]
        .iter()
        .flat_map(|folder| files(&store.join(folder)).expect("a store"))
        .collect()
}

fn write(path: &Path, bytes: &[u8]) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).expect("mine");
    fs::write(path, bytes).expect("room");
}

#[test]
fn every_flip_cut_and_swap_is_found() {
    let world = world();
    world.build(RECIPE);
    let found = |path: &Path| {
        let name = path.strip_prefix(world.store.path()).expect("below it").to_string_lossy().into_owned();
        verify(&world.store).expect("a store").damage.iter().any(|damage| damage.name == name)
    };
    assert_eq!(verify(&world.store).expect("a store").damage, []);
    let all = checked(world.store.path());
    assert!(all.len() > 15, "{all:?}");
    for (number, path) in all.iter().enumerate() {
        let bytes = fs::read(path).expect("a file");
        let mut flipped = bytes.clone();
        let at = (number * 31) % bytes.len();
        flipped[at] ^= 1 << (number % 8);
        for damaged in [&flipped[..], &bytes[..bytes.len() - 1], &[&bytes[..], b"x"].concat()] {
            write(path, damaged);
            assert!(found(path), "{}", path.display());
        }
        // Another of its kind in its place.
        if let Some(other) = all.iter().find(|other| *other != path && other.parent() == path.parent()) {
            write(path, &fs::read(other).expect("a file"));
            assert!(found(path), "{} in place of {}", other.display(), path.display());
        }
        write(path, &bytes);
    }
    assert_eq!(verify(&world.store).expect("a store").damage, []);
}

#[test]
fn what_is_damaged_is_repaired_by_the_next_build() {
    let world = world();
    world.build(RECIPE);
    for path in checked(world.store.path()).iter().filter(|path| path.starts_with(world.path("store/blobs")))
    {
        let mut bytes = fs::read(path).expect("a file");
        bytes[0] ^= 1;
        write(path, &bytes);
    }
    let damage = verify(&world.store).expect("a store").damage;
    assert!(!damage.is_empty());
    assert_eq!(repair(&world.store, &damage).expect("a store"), []);
    assert_eq!(verify(&world.store).expect("a store").damage, []);
    assert!(world.build(RECIPE).summary.is_good());
    assert_eq!(world.work("bin/program").as_deref(), Some("ab"));
    assert_eq!(verify(&world.store).expect("a store").damage, []);
}

#[test]
fn repair_says_which_build_brings_back_what_it_takes() {
    let world = world();
    world.build(RECIPE);
    let host = crate::host::Host::new();
    let path = world.store.blobs().path(&kiln_digest::Digest::of(b"ab"));
    write(&path, b"ax");
    let store = world.store.path().to_str().expect("text");
    let told = host.run(&["store", "repair", "--store", store]);
    let digest = kiln_digest::Digest::of(b"ab");
    let line = format!(
        "{digest}, `bin/program`: the next build has it anew (a trace of step `link` in scope `trusted`)"
    );
    assert!(told.succeeds().stdout.contains(&line), "{}", told.stdout);
    assert_eq!(world.build(RECIPE).ran, ["link"]);
}

#[test]
fn a_collection_takes_all_but_what_a_living_kiln_uses() {
    let world = world();
    world.build(RECIPE);
    let order = Order { most_bytes: Some(0), unused: None, dry_run: false, own: false };
    // This process used all of it.
    assert_eq!(collect(&world.store, &order).expect("a store").taken, []);
    let dry = collect(&world.store, &Order { own: true, dry_run: true, ..order }).expect("a store");
    let before = checked(world.store.path());
    assert!(dry.bytes() > 0);
    let taken = collect(&world.store, &Order { own: true, ..order }).expect("a store");
    assert_eq!(taken, dry);
    assert!(checked(world.store.path()).len() < before.len());
    assert!(!world.path("store/traces/trusted.pack").exists());
    assert_eq!(verify(&world.store).expect("a store").damage, []);
    let again = world.build(RECIPE);
    assert!(again.summary.is_good());
    assert_eq!(again.ran.len(), 4);
}

#[test]
fn what_is_used_by_another_kiln_stays_when_it_was_old() {
    let world = world();
    world.build(RECIPE);
    let all = checked(world.store.path());
    let old = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1);
    for path in &all {
        fs::File::open(path).and_then(|file| file.set_modified(old)).expect("times");
    }
    // A hit dates the traces, and they keep what they name.
    assert!(matches!(world.build(RECIPE).outcome("link"), Outcome::UpToDate { .. }));
    let order = Order { most_bytes: Some(0), unused: None, dry_run: false, own: true };
    let other = Store::open(world.store.path()).expect("a store");
    let kept = collect(&other, &order).expect("a store");
    assert!(kept.in_use_bytes > 0);
    assert!(world.build(RECIPE).ran.is_empty());
    fs::remove_dir_all(world.path("work")).expect("mine");
    assert!(world.build(RECIPE).ran.is_empty());
    assert_eq!(world.work("bin/program").as_deref(), Some("ab"));
}

#[test]
fn a_store_that_is_full_of_what_is_in_use_says_so_with_numbers() {
    let world = world();
    set_limit(&world.store, 4096).expect("a store");
    let error = world.store.reserve(100_000).expect_err("no room").to_string();
    assert!(error.contains("4096") && error.contains("store-limit"), "{error}");
    let built = world.store.blobs().put(&[0; 100_000][..]);
    let error = built.expect_err("no room").to_string();
    assert!(error.contains("4096") && error.contains("store-limit"), "{error}");
}

#[test]
fn kilns_that_share_a_store_do_not_write_into_each_others_room() {
    const LIMIT: u64 = 1 << 20;
    let world = world();
    let others: Vec<Store> = (0..3).map(|_| Store::open(world.store.path()).expect("a store")).collect();
    for store in &others {
        set_limit(store, LIMIT).expect("a store");
    }
    // One has said that it writes most of it, and has not begun; another may write a little ahead.
    let room = others[0].reserve(LIMIT * 3 / 4).expect("an empty store");
    others[1].blobs().put(&[1; 1000][..]).expect("room");
    let refused = others[2].reserve(LIMIT / 4).expect_err("what is left is taken").to_string();
    assert!(refused.contains("are free"), "{refused}");
    let total = |store: &Store| Census::take(store).expect("a store").total();
    assert!((LIMIT * 3 / 4..=LIMIT).contains(&total(&others[2])));
    // What was not needed after all is free again, and so is what a process had that ended.
    drop(room);
    drop(others[2].reserve(LIMIT / 2).expect("room again"));
    let left = others.into_iter().next().expect("the first");
    assert!(total(&left) < LIMIT / 4);
    left.reserve(LIMIT * 3 / 4).map(drop).expect("all but what is there");
}

#[test]
fn many_kilns_at_once_stay_below_the_ceiling_together() {
    const LIMIT: u64 = 8 << 20;
    let world = world();
    let store = &world.store;
    let finished = || {
        let blobs = files(&store.path().join("blobs")).expect("a store");
        blobs.iter().map(|path| fs::metadata(path).expect("a blob").blocks() * 512).sum::<u64>()
    };
    std::thread::scope(|scope| {
        for writer in 0..4_u8 {
            scope.spawn(move || {
                let store = Store::open(store.path()).expect("a store");
                set_limit(&store, LIMIT).expect("a store");
                for number in 0..40_u8 {
                    // In use until this one ends, so that at some time there is no more room.
                    let put = store.blobs().put(&[writer, number].repeat(60_000)[..]);
                    if let Err(error) = put {
                        assert!(error.to_string().contains("store-limit"), "{error}");
                    }
                }
            });
        }
        scope.spawn(|| {
            for _ in 0..20 {
                // Finished ones alone: one that is given its name meanwhile would be seen twice.
                let bytes = finished();
                assert!(bytes <= LIMIT, "{bytes} bytes");
                std::thread::sleep(Duration::from_millis(20));
            }
        });
    });
    let bytes = finished();
    assert!((LIMIT / 2..=LIMIT).contains(&bytes), "{bytes} bytes of blobs");
}

#[test]
fn a_blob_says_what_keeps_it() {
    let world = world();
    world.build(RECIPE);
    let census = Census::take(&world.store).expect("a store");
    let digest = kiln_digest::Digest::of(b"ab").to_string();
    let found = census.why(&digest[..8]);
    let text = format!("{found:?}");
    assert!(text.contains("step `link`") && text.contains("`bin/program`"), "{text}");
    assert!(census.why("0000000000").is_empty());
}

#[test]
fn a_store_of_a_newer_kiln_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    drop(Store::open(folder.path()).expect("a store"));
    fs::write(folder.path().join("version"), "kiln store 2\n").expect("room");
    // What this kiln would make or sweep.
    fs::remove_dir(folder.path().join("blobs")).expect("empty");
    fs::create_dir(folder.path().join("tmp/other")).expect("room");
    let error = Store::open(folder.path()).expect_err("another form");
    assert!(!folder.path().join("blobs").exists() && folder.path().join("tmp/other").exists());
    assert!(matches!(&error, StoreError::Version { version, .. } if version == "kiln store 2"), "{error}");
}

#[test]
fn what_an_earlier_kiln_left_goes_with_the_next_collection() {
    let world = world();
    world.build(RECIPE);
    let before = Census::take(&world.store).expect("a store").total();
    for left in ["last/0000", "traces/trusted/00/11", "placed/2222"] {
        let path = world.path("store").join(left);
        fs::create_dir_all(path.parent().expect("below it")).expect("a folder");
        fs::write(path, [b'x'; 5000]).expect("room");
    }
    assert_eq!(verify(&world.store).expect("a store").damage, []);
    assert!(Census::take(&world.store).expect("a store").total() > before);
    let order = Order { most_bytes: None, unused: None, dry_run: false, own: false };
    collect(&world.store, &order).expect("a store");
    assert_eq!(Census::take(&world.store).expect("a store").total(), before);
    assert!(
        ["last", "traces/trusted", "placed/2222"].iter().all(|left| !world.path("store").join(left).exists())
    );
    assert!(world.build(RECIPE).ran.is_empty());
}

#[test]
fn what_a_work_that_is_gone_left_goes_and_what_one_that_is_there_holds_stays() {
    let world = world();
    world.build(RECIPE);
    let left = |folder: &str| files(&world.path("store").join(folder)).expect("a store").len();
    let locks = || world.store.lock_paths().expect("a store").len();
    assert!(left("records/work") > 1 && locks() > 0);
    let order = Order { most_bytes: Some(0), unused: None, dry_run: false, own: false };
    // Another kiln may hold a lock, and this one is another to the collection.
    collect(&world.store, &order).expect("a store");
    assert!(locks() > 0);
    let order = Order { own: true, unused: Some(Duration::ZERO), ..order };
    collect(&world.store, &order).expect("a store");
    assert!(
        left("records/work") > 1,
        "a person's files would be taken for outputs' and outputs for a person's"
    );
    assert_eq!(locks(), 0);
    fs::remove_dir_all(world.path("work")).expect("mine");
    // It may be on a disk that comes back: only age takes it, whatever the ceiling.
    let young = Order { unused: Some(Duration::from_secs(3600)), ..order };
    collect(&world.store, &young).expect("a store");
    assert!(left("records/work") > 1);
    let collected = collect(&world.store, &order).expect("a store");
    assert!(collected.taken.iter().any(|(name, _)| name.contains("is gone")), "{collected:?}");
    assert_eq!(left("records/work"), 0);
}
