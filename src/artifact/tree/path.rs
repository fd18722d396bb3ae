//! A checked path inside a tree, and its order. Everything that names a node goes through [`TreePath`].

use std::cmp::Ordering;
use std::fmt;

/// A path inside a tree: components joined by `/`, none of them empty, `.` or `..`, none with a NUL; no leading
/// slash. The empty path is the tree's root. Order is that of the components, so a folder comes before
/// what is in it and siblings sort by name.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct TreePath(Box<[u8]>);

/// Linux's limits (`limits.h`), which a path from a guest or an archive must respect as well.
pub const MAX_NAME_BYTES: usize = 255;
/// As [`MAX_NAME_BYTES`], for a whole path without its terminating NUL.
pub const MAX_PATH_BYTES: usize = 4095;

/// Why some bytes are not a [`TreePath`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// An empty component, `.` or `..`, or a leading or trailing slash.
    #[error("a path component is empty, `.` or `..`")]
    Component,
    /// A NUL byte.
    #[error("a path holds a NUL byte")]
    Nul,
    /// A component over 255 bytes or a path over 4,095.
    #[error("a path is longer than Linux allows")]
    TooLong,
}

impl TreePath {
    /// The root of a tree.
    pub fn root() -> Self {
        Self(Box::from([]))
    }

    /// Checks `bytes`, which have no leading slash.
    ///
    /// # Errors
    /// [`PathError`], as its variants say.
    pub fn new(bytes: &[u8]) -> Result<Self, PathError> {
        if bytes.is_empty() {
            return Ok(Self::root());
        }
        if bytes.len() > MAX_PATH_BYTES {
            return Err(PathError::TooLong);
        }
        for component in bytes.split(|&byte| byte == b'/') {
            Self::check_name(component)?;
        }
        Ok(Self(bytes.into()))
    }

    fn check_name(name: &[u8]) -> Result<(), PathError> {
        if matches!(name, b"" | b"." | b"..") {
            return Err(PathError::Component);
        }
        if name.contains(&0) {
            return Err(PathError::Nul);
        }
        if name.len() > MAX_NAME_BYTES {
            return Err(PathError::TooLong);
        }
        Ok(())
    }

    /// Checks a path as archives write it: a leading `/` or `./` and a trailing `/` are taken off first.
    ///
    /// # Errors
    /// [`PathError`], as its variants say.
    pub fn from_archive(bytes: &[u8]) -> Result<Self, PathError> {
        let mut rest = bytes;
        loop {
            rest = match rest {
                [b'.', b'/', tail @ ..] | [b'/', tail @ ..] => tail,
                [b'.'] => &[],
                [head @ .., b'/'] => head,
                _ => return Self::new(rest),
            };
        }
    }

    /// The path of `name` in this folder.
    ///
    /// # Errors
    /// [`PathError`] when `name` is not one good component, or the whole grows too long.
    pub fn join(&self, name: &[u8]) -> Result<Self, PathError> {
        Self::check_name(name)?;
        if name.contains(&b'/') {
            return Err(PathError::Component);
        }
        let mut bytes = self.0.to_vec();
        if !bytes.is_empty() {
            bytes.push(b'/');
        }
        bytes.extend_from_slice(name);
        if bytes.len() > MAX_PATH_BYTES {
            return Err(PathError::TooLong);
        }
        Ok(Self(bytes.into()))
    }

    /// The bytes, without a leading slash.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether this is the tree's root.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// The components in order; none for the root.
    pub fn components(&self) -> impl Iterator<Item = &[u8]> {
        self.0.split(|&byte| byte == b'/').filter(|name| !name.is_empty())
    }

    /// The folder that holds this path; none for the root.
    pub fn parent(&self) -> Option<Self> {
        self.parent_bytes().map(|bytes| Self(bytes.into()))
    }

    /// As [`Self::parent`], without a copy.
    pub(crate) fn parent_bytes(&self) -> Option<&[u8]> {
        if self.is_root() {
            return None;
        }
        let end = self.0.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
        Some(&self.0[..end])
    }

    /// The last component; empty for the root.
    pub fn name(&self) -> &[u8] {
        self.0.rsplit(|&byte| byte == b'/').next().unwrap_or_default()
    }

    /// Whether `self` is `folder` or lies beneath it.
    pub fn is_within(&self, folder: &Self) -> bool {
        folder.is_root()
            || self.0.strip_prefix(folder.as_bytes()).is_some_and(|rest| matches!(rest, [] | [b'/', ..]))
    }
}

impl Ord for TreePath {
    /// Compares bytes with `/` taken as NUL, which no path holds: that is the order of the components.
    fn cmp(&self, other: &Self) -> Ordering {
        let differing = self.0.iter().zip(&other.0).find(|(mine, theirs)| mine != theirs);
        match differing {
            Some((b'/', _)) => Ordering::Less,
            Some((_, b'/')) => Ordering::Greater,
            Some((mine, theirs)) => mine.cmp(theirs),
            None => self.0.len().cmp(&other.0.len()),
        }
    }
}

impl PartialOrd for TreePath {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Shows the path with bytes that are not printable ASCII escaped, so that it is safe on a terminal.
impl fmt::Display for TreePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match std::str::from_utf8(&self.0) {
            Ok(text) if !text.chars().any(char::is_control) => f.write_str(text),
            _ => write!(f, "{}", self.0.escape_ascii()),
        }
    }
}

impl fmt::Debug for TreePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TreePath({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> TreePath {
        TreePath::new(text.as_bytes()).expect("a good path")
    }

    #[test]
    fn order_is_that_of_components() {
        let mut paths: Vec<_> = ["a-b", "a/b", "a", "", "a/b/c", "b", "a.b", "a/b-c", "ab"].map(path).into();
        paths.sort();
        let sorted: Vec<_> = paths.iter().map(TreePath::to_string).collect();
        assert_eq!(sorted, ["", "a", "a/b", "a/b/c", "a/b-c", "a-b", "a.b", "ab", "b"]);
        for one in &paths {
            for other in &paths {
                assert_eq!(one.cmp(other), one.components().cmp(other.components()), "{one} {other}");
            }
        }
    }

    #[test]
    fn bad_paths_are_refused_and_archive_forms_are_cut() {
        for (bytes, error) in [
            (&b"/a"[..], PathError::Component),
            (b"a/", PathError::Component),
            (b"a//b", PathError::Component),
            (b"..", PathError::Component),
            (b"a/../b", PathError::Component),
            (b".", PathError::Component),
            (b"a\0b", PathError::Nul),
            (&[b'a'; 256], PathError::TooLong),
            (&b"ab/".repeat(1366)[..4097], PathError::TooLong),
        ] {
            assert_eq!(TreePath::new(bytes), Err(error), "{}", bytes.escape_ascii());
        }
        for (bytes, good) in
            [(&b"./a"[..], "a"), (b"/", ""), (b".", ""), (b"./", ""), (b"//a//", "a"), (b"././b/", "b")]
        {
            assert_eq!(TreePath::from_archive(bytes), Ok(path(good)), "{}", bytes.escape_ascii());
        }
        for bytes in [&b"a/../b"[..], b"../a", b"a/./b", b"/.."] {
            assert!(TreePath::from_archive(bytes).is_err(), "{}", bytes.escape_ascii());
        }
        assert_eq!(TreePath::new(&[b'a'; 255]).map(|path| path.name().len()), Ok(255));
    }

    #[test]
    fn a_path_is_within_its_folders_only() {
        assert!(path("a/b").is_within(&path("a")));
        assert!(path("a").is_within(&path("a")));
        assert!(path("a").is_within(&TreePath::root()));
        assert!(!path("ab").is_within(&path("a")));
        assert_eq!(path("a/b").parent(), Some(path("a")));
        assert_eq!(path("a").parent(), Some(TreePath::root()));
        assert_eq!(TreePath::root().parent(), None);
    }
}
