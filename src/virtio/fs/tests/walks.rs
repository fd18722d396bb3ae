//! What comes along with listings, for whom, and that it is recorded.

use std::fs;

use tempfile::TempDir;

use super::*;
use crate::fs::record::Observed;

/// `d0` to `d3`, of four files and a folder each.
fn folders() -> TempDir {
    let host = tempfile::tempdir().expect("directory");
    for folder in ["d0", "d1", "d2", "d3"] {
        fs::create_dir_all(host.path().join(folder).join("sub")).expect("directory");
        for file in ["a", "b", "c", "e"] {
            fs::write(host.path().join(folder).join(file), "text").expect("file");
        }
    }
    host
}

/// Lists a directory with READDIRPLUS, and gives the entries of which something is told: name and node.
fn told(guest: &mut Guest, node: u64) -> Vec<(String, abi::EntryOut)> {
    let (mut entries, mut offset) = (Vec::new(), 0);
    loop {
        let answer = guest.ask(op::READDIRPLUS, node, &read_in(offset, 400)).expect("listing");
        if answer.is_empty() {
            return entries;
        }
        let mut rest = &answer[..];
        while !rest.is_empty() {
            let (entry, tail) = abi::EntryOut::read_from_prefix(rest).expect("entry");
            let (head, tail) = abi::Dirent::read_from_prefix(tail).expect("entry");
            let length = head.name_length.get() as usize;
            if entry.nodeid.get() != 0 {
                entries.push((String::from_utf8_lossy(&tail[..length]).into_owned(), entry));
            }
            offset = head.offset.get();
            rest = &tail[length.next_multiple_of(8)..];
        }
    }
}

fn names(told: &[(String, abi::EntryOut)]) -> Vec<&str> {
    told.iter().map(|(name, _)| name.as_str()).collect()
}

/// Lists `node`, and asks for what was not told of the names in it.
fn ask_for_all(guest: &mut Guest, node: u64) {
    let told = told(guest, node);
    for name in ["a", "b", "c", "e", "sub"] {
        if !told.iter().any(|(other, _)| other == name) {
            guest.lookup(node, name.as_bytes()).expect("there");
        }
    }
}

#[test]
fn whoever_asks_for_all_it_lists_is_told_the_next_time() {
    let host = folders();
    let mut guest = Guest::of(host.path(), EPOCH);
    let [d0, d1, d2, d3] = ["s/d0", "s/d1", "s/d2", "s/d3"].map(|path| guest.walk(path));
    ask_for_all(&mut guest, d0);
    let first = told(&mut guest, d1);
    // Two are kept back, to see whether it still asks.
    assert_eq!(names(&first), ["b", "c", "sub"]);
    for (name, entry) in &first {
        let asked = guest.lookup(d1, name.as_bytes()).expect("there");
        assert_eq!(entry.as_bytes(), asked.as_bytes(), "{name}: as a lookup says");
    }
    // It did not ask for those, so it is told nothing more.
    assert!(told(&mut guest, d2).is_empty());
    ask_for_all(&mut guest, d2);
    assert!(!told(&mut guest, d3).is_empty());
}

#[test]
fn another_process_is_told_names_only() {
    let host = folders();
    let mut guest = Guest::of(host.path(), EPOCH);
    let [d0, d1] = ["s/d0", "s/d1"].map(|path| guest.walk(path));
    ask_for_all(&mut guest, d0);
    guest.process = 7;
    assert!(told(&mut guest, d1).is_empty());
    guest.process = 0;
    assert!(!told(&mut guest, d1).is_empty());
}

#[test]
fn what_is_told_is_recorded_and_nothing_else() {
    let host = folders();
    let mut guest = Guest::of(host.path(), EPOCH);
    let [d0, d1] = ["s/d0", "s/d1"].map(|path| guest.walk(path));
    ask_for_all(&mut guest, d0);
    // Nobody has asked for it, so that it is gone says nothing of what was.
    fs::remove_file(host.path().join("d1/b")).expect("there");
    let entries = told(&mut guest, d1);
    let told = names(&entries);
    assert_eq!(told, ["c", "sub"]);
    let record = guest.share_record();
    for name in ["a", "b", "c", "e", "sub"] {
        let path = format!("d1/{name}");
        let seen = record.entries.iter().find(|entry| entry.path.0 == path.as_bytes());
        let asked = seen.is_some_and(|entry| entry.observed.contains(Observed::METADATA));
        assert_eq!(asked, told.contains(&name), "{name}");
    }
}

#[test]
fn a_node_that_came_along_is_held_until_it_is_forgotten() {
    let host = folders();
    let mut guest = Guest::of(host.path(), EPOCH);
    let [d0, d1] = ["s/d0", "s/d1"].map(|path| guest.walk(path));
    ask_for_all(&mut guest, d0);
    let entries = told(&mut guest, d1);
    let (name, entry) = &entries[0];
    let node = entry.nodeid.get();
    assert_eq!(guest.read(node, 0, 100).expect(name), b"text");
    assert!(guest.send(op::FORGET, node, &1_u64.to_le_bytes(), 0).is_none());
    assert!(guest.read(node, 0, 100).is_err());
}
