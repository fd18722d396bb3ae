//! All that a store has of traces and of what steps did, for whoever looks after the store; nothing is dated.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use kiln_digest::Digest;

use super::notes::{self, Noted};
use super::trace::{Trace, read_all};
use crate::store::Store;

/// What one file holds.
#[derive(Debug)]
pub enum Content {
    /// Traces of a key, in a scope.
    Traces(Vec<Trace>),
    /// What each step did last in a WORK, and whether all else that is there is as it was written too.
    Notes(Vec<Noted>, bool),
    /// What outputs look like in a WORK.
    Placed(Trace),
    /// It is not what was written.
    Damaged,
}

/// One file.
#[derive(Debug)]
pub struct Stored {
    /// Where it lies.
    pub path: PathBuf,
    /// Its path in the store.
    pub name: String,
    /// What is in it.
    pub content: Content,
}

/// All files beneath `folder`; those of a folder that is not there are none.
///
/// # Errors
/// What reading a folder says.
pub fn files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let (mut found, mut open) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(folder) = open.pop() {
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            match entry.file_type()?.is_dir() {
                true => open.push(entry.path()),
                false => found.push(entry.path()),
            }
        }
    }
    found.sort();
    Ok(found)
}

/// All of them.
///
/// # Errors
/// What reading folders says.
pub fn stock(store: &Store) -> io::Result<Vec<Stored>> {
    let mut stock = Vec::new();
    for folder in [store.traces(), store.notes(), store.placed()] {
        for path in files(&folder)? {
            let name = path.strip_prefix(store.path()).unwrap_or(&path).to_string_lossy().into_owned();
            stock.extend(read(&path, &name).map(|content| Stored { path, name, content }));
        }
    }
    Ok(stock)
}

/// What one of them holds now; none where it is gone.
pub fn reread(stored: &Stored) -> Option<Content> {
    read(&stored.path, &stored.name)
}

fn read(path: &Path, name: &str) -> Option<Content> {
    let bytes = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        bytes => bytes.unwrap_or_default(),
    };
    let content = match name.split('/').next() {
        Some("traces") => read_all(name, &bytes).map(Content::Traces),
        Some("notes") => {
            let (noted, is_whole) = notes::read_all(name, &bytes);
            Some(Content::Notes(noted, is_whole))
        }
        _ => read_all(name, &bytes).and_then(|mut placed| placed.pop()).map(Content::Placed),
    };
    Some(content.unwrap_or(Content::Damaged))
}

/// The key and the scope of the traces at `name` in the store.
pub fn key_of(name: &str) -> Option<(String, Digest)> {
    let mut parts = name.strip_prefix("traces/")?.split('/');
    let (scope, start, rest) = (parts.next()?, parts.next()?, parts.next()?);
    Some((scope.to_owned(), format!("{start}{rest}").parse().ok()?))
}
