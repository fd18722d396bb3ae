//! What must have nothing in common: SECRETS with whatever is shown to a guest, built or booted, and kiln's store with what
//! steps see. Everything that takes a path of the host asks here before it opens it.

mod mounts;

use std::fmt;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use mounts::Mounts;

/// What is kept apart from everything else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// The folder of the signing keys.
    Secrets,
    /// kiln's store: what other steps made is not this one's to read.
    Store,
    /// What the owner adds when images are signed, where it is not in SECRETS.
    Configuration,
}

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Secrets => "SECRETS",
            Self::Store => "kiln's store",
            Self::Configuration => "the configuration",
        })
    }
}

/// Two paths of which one lies in the other, and must not.
#[derive(Debug, thiserror::Error)]
#[error("{what} `{path}` contains {kept} (`{place}`) or lies in it")]
pub struct Overlap {
    /// What would show it: SRCDIR, a mount, a root.
    pub what: &'static str,
    /// Its path.
    pub path: PathBuf,
    /// What would be shown.
    pub kept: Kept,
    /// Where that is.
    pub place: PathBuf,
}

impl Overlap {
    /// What the user can do about it.
    pub fn hint(&self) -> &'static str {
        match self.kept {
            Kept::Secrets => "name a smaller directory, or keep the keys elsewhere and set SECRETS",
            Kept::Store => "choose another directory, or another store with --store or KILN_STORE",
            Kept::Configuration => "keep the configuration elsewhere, where no step sees it",
        }
    }
}

/// Refuses a `path` that contains `place` or lies in it, links followed. What is not there cannot be shown.
///
/// # Errors
/// [`Overlap`].
pub fn refuse(what: &'static str, path: &Path, kept: Kept, place: &Path) -> Result<(), Overlap> {
    refuse_where(what, path, kept, place, |path| fs::canonicalize(path))
}

/// As [`refuse`], before something is made at `place`: neither has to be there yet.
///
/// # Errors
/// [`Overlap`].
pub fn refuse_to_make(what: &'static str, path: &Path, kept: Kept, place: &Path) -> Result<(), Overlap> {
    refuse_where(what, path, kept, place, once_made)
}

fn refuse_where(
    what: &'static str,
    path: &Path,
    kept: Kept,
    place: &Path,
    resolve: fn(&Path) -> io::Result<PathBuf>,
) -> Result<(), Overlap> {
    match (resolve(path), resolve(place)) {
        (Ok(real), Ok(place)) if overlap(&real, &place) => {
            Err(Overlap { what, path: path.to_owned(), kept, place })
        }
        _ => Ok(()),
    }
}

/// Whether one of two canonical paths is in the other, by themselves or by way of a mount.
fn overlap(one: &Path, other: &Path) -> bool {
    one.starts_with(other) || other.starts_with(one) || Mounts::read().shows(one, other)
}

/// The canonical path that `path` has once its folders are made: that of what there is of it, and the rest as it is
/// written, in which nothing can be a link.
fn once_made(path: &Path) -> io::Result<PathBuf> {
    let mut rest: Vec<Component<'_>> = Vec::new();
    let mut there = path;
    let mut real = loop {
        match (fs::canonicalize(there), there.parent(), there.components().next_back()) {
            (Err(error), Some(above), Some(last)) if error.kind() == io::ErrorKind::NotFound => {
                rest.push(last);
                there = above;
            }
            (found, ..) => break found?,
        }
    };
    for component in rest.into_iter().rev() {
        match component {
            Component::ParentDir => drop(real.pop()),
            Component::CurDir => {}
            component => real.push(component),
        }
    }
    Ok(real)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_yet_is_where_it_would_be_made() {
        let folder = tempfile::tempdir().expect("a folder");
        let top = fs::canonicalize(folder.path()).expect("it is there");
        std::os::unix::fs::symlink(&top, top.join("link")).expect("a link");
        for (path, made) in [
            ("", ""),
            ("link", ""),
            ("link/a/b", "a/b"),
            ("a/./b/../c", "a/c"),
            ("a/../../x", "../x"),
            ("link/a/../link/b", "link/b"),
        ] {
            let made = match made.strip_prefix("../") {
                Some(beside) => top.parent().expect("a folder above").join(beside),
                None if made.is_empty() => top.clone(),
                None => top.join(made),
            };
            assert_eq!(once_made(&top.join(path)).expect("a path"), made, "{path}");
        }
        let (work, keys) = (top.join("link/work"), top.join("work/keys"));
        assert!(refuse("WORK", &work, Kept::Secrets, &keys).is_ok(), "nothing is there");
        let told = refuse_to_make("WORK", &work, Kept::Secrets, &keys).expect_err("keys would lie in WORK");
        assert_eq!((told.path, told.place), (work, keys));
        assert!(refuse_to_make("WORK", &top.join("src"), Kept::Secrets, &top.join("work")).is_ok());
    }
}
