//! What was taken along comes back byte for byte, or is refused by name.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use tempfile::TempDir;

use super::*;
use crate::fetch::http::{Client, Expected, FetchError};
use crate::store::Store;

const LOCK_TEXT: &str = "version = 1\n";

struct World {
    folder: TempDir,
    store: Store,
    files: BTreeMap<Digest, (String, u64)>,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(&folder.path().join("store")).expect("a store");
        let mut files = BTreeMap::new();
        for (name, length) in [("small", 3), ("empty", 0), ("block", 512), ("large", 100_001)] {
            let bytes = vec![u8::try_from(name.len()).expect("short"); length];
            let (digest, size) = store.blobs().put(&bytes[..]).expect("room");
            files.insert(digest, (name.to_owned(), size));
        }
        Self { folder, store, files }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn archive(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        write_archive(&path, LOCK_TEXT, &self.files, self.store.blobs()).expect("written");
        path
    }

    fn directory(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        write_directory(&path, LOCK_TEXT, &self.files, self.store.blobs()).expect("written");
        path
    }

    /// Takes every file from `vendor` into an empty store, offline.
    fn take(&self, vendor: &Path) -> Result<(), FetchError> {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path()).expect("a store");
        let client = Client::new().offline().with_vendor(vendor);
        for (sha256, (name, size)) in &self.files {
            let expected = Expected { size: *size, sha256: *sha256 };
            client.fetch(name, &["http://127.0.0.1:1/".into()], expected, store.blobs(), &|_| {})?;
            let found = Digest::of_reader(store.blobs().file(sha256).expect("taken")).expect("read");
            assert_eq!(found, (*sha256, *size));
        }
        Ok(())
    }

    fn named(&self, name: &str) -> Digest {
        *self.files.iter().find(|(_, (known, _))| known == name).expect("a file").0
    }
}

fn fault(result: Result<(), FetchError>) -> (VendorError, String) {
    match result {
        Err(error @ FetchError::Vendor { .. }) => {
            let text = error.to_string();
            assert!(error.hint().is_some(), "{error:?}");
            let FetchError::Vendor { source, .. } = error else { unreachable!("it is one") };
            (*source, text)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn all_that_was_taken_along_comes_back_from_a_directory_and_from_an_archive() {
    let world = World::new();
    for vendor in [world.directory("d"), world.archive("a.tar")] {
        world.take(&vendor).expect("all of it");
    }
    let listed = Command::new("tar").arg("-tf").arg(world.path("a.tar")).output().expect("GNU tar");
    let names = String::from_utf8(listed.stdout).expect("text");
    let wanted: Vec<String> = std::iter::once(LOCK.to_owned())
        .chain(world.files.keys().map(|digest| format!("blobs/sha256/{digest}")))
        .collect();
    assert_eq!(names.lines().collect::<Vec<_>>(), wanted);
}

#[test]
fn equal_locks_give_equal_archives() {
    let world = World::new();
    let read = |path: PathBuf| fs::read(path).expect("written");
    assert!(read(world.archive("a.tar")) == read(world.archive("b.tar")));
}

#[test]
fn an_archive_that_gnu_tar_made_of_a_directory_will_do() {
    let world = World::new();
    let directory = world.directory("d");
    let packed = world.path("packed.tar");
    let mut tar = Command::new("tar");
    tar.arg("-cf").arg(&packed).arg("-C").arg(&directory).args(["kiln.lock", "blobs"]);
    assert!(tar.status().expect("GNU tar").success());
    world.take(&packed).expect("all of it");
}

#[test]
fn an_archive_that_is_cut_off_anywhere_is_refused_as_such() {
    let world = World::new();
    let path = world.archive("a.tar");
    let bytes = fs::read(&path).expect("written");
    let (mut cuts, mut length) = (0, 1024);
    while length < bytes.len() {
        fs::write(&path, &bytes[..length]).expect("room");
        let (error, _) = fault(world.take(&path));
        assert!(matches!(error, VendorError::Cut { .. }), "{length}: {error:?}");
        assert!(error.hint().expect("one").contains("copy"), "{error}");
        cuts += 1;
        length += 509;
    }
    assert!(cuts > 150, "{cuts}");
}

#[test]
fn a_flipped_bit_is_found_and_the_file_named() {
    let world = World::new();
    let directory = world.directory("d");
    let large = world.named("large");
    let blob = directory.join(BLOBS).join(large.to_string());
    let flip = |path: &Path, at: usize| {
        let mut bytes = fs::read(path).expect("there");
        bytes[at] ^= 4;
        fs::remove_file(path).expect("ours");
        fs::write(path, bytes).expect("room");
    };
    flip(&blob, 77_777);
    let (error, text) = fault(world.take(&directory));
    assert!(matches!(error, VendorError::Digest { expected, .. } if expected == large), "{error:?}");
    assert!(text.contains("large"), "{text}");
    // Made anew it is whole again, and what was good is kept.
    let written = write_directory(&directory, LOCK_TEXT, &world.files, world.store.blobs()).expect("mended");
    assert_eq!((written.new, written.kept), (1, 3));
    world.take(&directory).expect("all of it");

    let archive = world.archive("a.tar");
    let bytes = fs::read(&archive).expect("written");
    let at =
        bytes.windows(512).rposition(|window| window.iter().all(|byte| *byte == 5)).expect("the content");
    flip(&archive, at);
    let (error, _) = fault(world.take(&archive));
    assert!(matches!(error, VendorError::Digest { .. }), "{error:?}");
}

#[test]
fn what_is_missing_longer_or_shorter_is_named() {
    let world = World::new();
    let directory = world.directory("d");
    let blob = directory.join(BLOBS).join(world.named("block").to_string());
    for (length, is_long) in [(513, true), (100, false)] {
        fs::remove_file(&blob).expect("ours");
        fs::write(&blob, vec![5; length]).expect("room");
        let (error, text) = fault(world.take(&directory));
        let VendorError::Size { expected: 512, found, .. } = error else { panic!("{error:?}") };
        assert_eq!(found > 512, is_long);
        assert!(text.contains("block"), "{text}");
    }
    fs::remove_file(&blob).expect("ours");
    let error = world.take(&directory).expect_err("it is gone");
    assert!(matches!(&error, FetchError::Offline { what, vendor: Some(_) } if what == "block"), "{error:?}");
    assert!(error.hint().expect("one").contains("kiln lock vendor"));
}

#[test]
fn what_holds_no_vendored_bytes_is_refused_with_what_would() {
    let world = World::new();
    fs::create_dir(world.path("empty")).expect("room");
    fs::write(world.path("text.tar"), "this is no archive at all\n".repeat(100)).expect("room");
    fs::write(world.path("nothing.tar"), "").expect("room");
    for name in ["empty", "text.tar", "nothing.tar"] {
        let (error, _) = fault(world.take(&world.path(name)));
        assert!(matches!(error, VendorError::NotVendored { .. }), "{name}: {error:?}");
    }
    let result = world.take(&world.path("nowhere"));
    let (error, _) = match result {
        Err(FetchError::Vendor { source, what }) => (*source, what),
        other => panic!("{other:?}"),
    };
    assert!(matches!(error, VendorError::Io { .. }), "{error:?}");
}

#[test]
fn other_files_are_not_written_among_and_a_damaged_store_is_not_taken_along() {
    let world = World::new();
    fs::create_dir(world.path("home")).expect("room");
    fs::write(world.path("home/letter"), "").expect("room");
    let result = write_directory(&world.path("home"), LOCK_TEXT, &world.files, world.store.blobs());
    assert!(matches!(result, Err(VendorError::Occupied { .. })), "{result:?}");
    let blob = world.store.blobs().path(&world.named("small"));
    fs::remove_file(&blob).expect("ours");
    fs::write(&blob, "bad").expect("room");
    let in_archive = write_archive(&world.path("a.tar"), LOCK_TEXT, &world.files, world.store.blobs());
    assert!(matches!(&in_archive, Err(VendorError::Store { what, .. }) if what == "small"), "{in_archive:?}");
    assert!(!world.path("a.tar").exists(), "whole or not at all");
    let in_directory = write_directory(&world.path("d"), LOCK_TEXT, &world.files, world.store.blobs());
    assert!(matches!(in_directory, Err(VendorError::Store { .. })), "{in_directory:?}");
    assert!(!world.path("d/kiln.lock").exists(), "it has a lock only when it has all");
}
