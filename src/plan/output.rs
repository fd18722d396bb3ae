//! Output globs: which paths below WORK a step declares as its outputs.

use globset::{Glob, GlobBuilder, GlobMatcher};
use kiln_artifact::tree::TreePath;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

/// A glob that cannot name outputs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OutputError {
    /// Absolute, or with `..`: it would leave WORK.
    #[error("output `{0}` escapes WORK: write a path relative to it, without `..`")]
    Escapes(String),
    /// Empty or malformed.
    #[error("output `{glob}` is not a glob: {why}")]
    Malformed {
        /// The text.
        glob: String,
        /// What is wrong.
        why: String,
    },
}

/// Longest glob, bytes: no path is longer (PATH_MAX).
const MOST_GLOB_BYTES: usize = 4096;
/// Most alternatives within each other. What compiles globs fails with some hundred, and with some thousand has no stack.
const MOST_NESTED: usize = 8;

/// Reads a glob of paths, in which only `**` crosses a `/`.
///
/// # Errors
/// What is wrong with it.
pub(super) fn glob(text: &str) -> Result<Glob, String> {
    if text.len() > MOST_GLOB_BYTES {
        return Err(format!("it is longer than {MOST_GLOB_BYTES} bytes"));
    }
    let mut open = 0_usize;
    for byte in text.bytes() {
        match byte {
            b'{' => open += 1,
            b'}' => open = open.saturating_sub(1),
            _ => {}
        }
        if open > MOST_NESTED {
            return Err(format!("more than {MOST_NESTED} alternatives within each other"));
        }
    }
    GlobBuilder::new(text).literal_separator(true).build().map_err(|error| error.kind().to_string())
}

/// The declared outputs of a step. A glob that matches a folder takes all that is in it; `*` does not cross a `/`,
/// `**` does. Or everything that the step writes there, and takes away.
#[derive(Clone, Default)]
pub struct Outputs {
    globs: Vec<(String, GlobMatcher)>,
    everything: bool,
}

/// As they were written: what they are compiled to says nothing more.
impl std::fmt::Debug for Outputs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.globs()).finish()
    }
}

impl Outputs {
    /// Reads globs.
    ///
    /// # Errors
    /// [`OutputError`] names the glob.
    pub fn parse<'a>(globs: impl IntoIterator<Item = &'a str>) -> Result<Self, OutputError> {
        let mut outputs = Self::default();
        for text in globs {
            let trimmed = text.strip_prefix("./").unwrap_or(text).trim_end_matches('/');
            if text.starts_with('/') || trimmed.split('/').any(|part| part == "..") {
                return Err(OutputError::Escapes(text.to_owned()));
            }
            let malformed = |why: String| OutputError::Malformed { glob: text.to_owned(), why };
            if trimmed.is_empty() || trimmed.split('/').any(|part| part.is_empty()) {
                return Err(malformed("it has an empty part".to_owned()));
            }
            if trimmed.split('/').any(|part| part == ".") {
                return Err(malformed("no path has `.` in it; `**` is all that is written".to_owned()));
            }
            let glob = glob(trimmed).map_err(malformed)?;
            outputs.globs.push((text.to_owned(), glob.compile_matcher()));
        }
        Ok(outputs)
    }

    /// Everything that is written in WORK, as a folder that is bound into a container takes it: what is removed there is
    /// removed, what was put there before stays.
    pub fn everything() -> Self {
        Self { globs: Vec::new(), everything: true }
    }

    /// Whether they are everything that is written.
    pub fn are_everything(&self) -> bool {
        self.everything
    }

    /// The globs as they were written; of everything, none.
    pub fn globs(&self) -> impl Iterator<Item = &str> {
        self.globs.iter().map(|(text, _)| text.as_str())
    }

    /// Whether none were declared.
    pub fn is_empty(&self) -> bool {
        self.globs.is_empty() && !self.everything
    }

    /// The numbers of the globs that match `path` or a folder it lies in.
    pub fn matching<'a>(&'a self, path: &'a TreePath) -> impl Iterator<Item = usize> + 'a {
        self.globs
            .iter()
            .enumerate()
            .filter(move |(_, (_, glob))| {
                let bytes = path.as_bytes();
                let ends =
                    bytes.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(index, _)| index);
                ends.chain([bytes.len()])
                    .any(|end| end > 0 && glob.is_match(OsStr::from_bytes(&bytes[..end])))
            })
            .map(|(index, _)| index)
    }

    /// Whether any glob declares `path`.
    pub fn declare(&self, path: &TreePath) -> bool {
        self.everything || self.matching(path).next().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> TreePath {
        TreePath::new(text.as_bytes()).expect("a good path")
    }

    #[test]
    fn a_glob_takes_files_and_whole_folders() {
        let outputs = Outputs::parse(["bin/*", "share", "lib/**/*.so"]).expect("good globs");
        for declared in ["bin/lua", "bin/sub/deep", "share", "share/doc/x", "lib/a/b/c.so", "lib/c.so"] {
            assert!(outputs.declare(&path(declared)), "{declared}");
        }
        for undeclared in ["bin", "shared", "lib/c.a", "x/bin/lua"] {
            assert!(!outputs.declare(&path(undeclared)), "{undeclared}");
        }
    }

    #[test]
    fn everything_declares_whatever_there_is_and_misses_nothing() {
        let outputs = Outputs::everything();
        assert!(!outputs.is_empty() && outputs.are_everything());
        assert!(outputs.declare(&path("a/b")) && outputs.declare(&path(".x")));
        assert_eq!(outputs.globs().count(), 0);
        assert!(Outputs::default().is_empty() && !Outputs::default().declare(&path("a")));
    }

    #[test]
    fn globs_that_leave_work_are_refused() {
        for bad in ["/etc/passwd", "../x", "a/../../x", "a/.."] {
            assert_eq!(Outputs::parse([bad]).err(), Some(OutputError::Escapes(bad.to_owned())));
        }
        let (deep, long) = ("{".repeat(3000) + "a" + &"}".repeat(3000), "a".repeat(5000));
        for bad in ["", "a//b", ".", "./", "././a", "a/./b", "a[", "{a", &deep[2900..3101], &deep, &long] {
            assert!(matches!(Outputs::parse([bad]), Err(OutputError::Malformed { .. })), "{bad}");
        }
    }
}
