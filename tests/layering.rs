//! Imports inside the root crate go downwards only. Between crates Cargo enforces it; here it is this table.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Each room and the rooms it may import. Folders that are crates of their own are not part of the root crate.
const ALLOWED: &[(&str, &[&str])] = &[
    (
        "cli",
        &[
            "agent", "apart", "boot", "cache", "clock", "engine", "keeper", "machine", "plan", "root",
            "settings", "shortage", "sign", "threads", "upkeep",
        ],
    ),
    (
        "engine",
        &[
            "agent", "apart", "boot", "cache", "clock", "fetch", "keeper", "machine", "plan", "root",
            "settings", "sign", "store", "threads", "upkeep", "writes",
        ],
    ),
    ("boot", &["apart", "machine", "plan", "threads"]),
    // It knows what names blobs, and nothing of builds.
    ("upkeep", &["cache", "clock", "machine", "root", "store", "writes"]),
    ("cache", &["plan", "store", "writes"]),
    ("root", &["agent", "clock", "fetch", "machine", "plan", "store", "threads", "writes"]),
    ("keeper", &["agent", "clock", "machine", "plan", "store", "threads"]),
    ("fetch", &["machine", "plan", "store", "writes"]),
    ("sign", &["apart", "threads"]),
    ("machine", &["shortage", "threads", "writes"]),
    ("agent", &["plan", "store", "threads"]),
    ("store", &["clock", "writes"]),
    ("writes", &[]),
    ("apart", &[]),
    ("settings", &["plan"]),
    ("plan", &[]),
    ("clock", &[]),
    ("shortage", &["threads"]),
    ("threads", &[]),
];

const CRATES: &[&str] = &["artifact", "digest", "openpgp", "virtio", "vmm"];

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("the source tree") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

fn room(relative: &Path) -> String {
    let first = relative.components().next().expect("a file").as_os_str().to_string_lossy().into_owned();
    first.trim_end_matches(".rs").to_owned()
}

fn imports(text: &str) -> BTreeSet<String> {
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    let mut rooms = BTreeSet::new();
    for line in code {
        for (index, _) in line.match_indices("crate::") {
            let rest = &line[index + "crate::".len()..];
            let name: String = rest.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect();
            if !name.is_empty() {
                rooms.insert(name);
            }
        }
    }
    rooms
}

#[test]
fn every_room_imports_only_what_lies_below_it() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    rust_files(&source, &mut files);
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.iter().copied().collect();
    let (mut wrong, mut edges) = (Vec::new(), 0);
    for file in files {
        let relative = file.strip_prefix(&source).expect("below src");
        let from = room(relative);
        if CRATES.contains(&from.as_str()) || matches!(from.as_str(), "main" | "bin" | "lib") {
            continue;
        }
        let may = allowed.get(from.as_str()).unwrap_or_else(|| panic!("room `{from}` is not in the table"));
        for to in imports(&fs::read_to_string(&file).expect("a source file")) {
            edges += 1;
            if to != from && !may.contains(&to.as_str()) {
                wrong.push(format!("{} imports {to}", relative.display()));
            }
        }
    }
    assert!(edges > 20, "the test reads no imports any more: {edges}");
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_table_has_no_circles() {
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.iter().copied().collect();
    for start in allowed.keys() {
        let (mut reached, mut open) = (BTreeSet::new(), vec![*start]);
        while let Some(room) = open.pop() {
            for next in allowed[room] {
                assert_ne!(next, start, "{start} reaches itself");
                if reached.insert(*next) {
                    open.push(next);
                }
            }
        }
    }
}
