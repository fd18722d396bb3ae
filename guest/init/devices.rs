//! What devices a machine has, as both programs ask it.

use std::fs;
use std::path::Path;

/// How deep folders of devices are looked into.
const DEPTH: usize = 16;

/// The modaliases of all devices, in order and each once.
pub fn modaliases() -> Vec<String> {
    let mut found = Vec::new();
    find(Path::new("/sys/devices"), DEPTH, &mut found);
    found.sort_unstable();
    found.dedup();
    found
}

fn find(folder: &Path, depth: usize, found: &mut Vec<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_name() == "modalias" {
            found.extend(fs::read_to_string(path).map(|text| text.trim().to_owned()));
        } else if depth > 0 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            find(&path, depth - 1, found);
        }
    }
}
