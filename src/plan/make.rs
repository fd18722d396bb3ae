//! What a step makes on the host: which artifact, of what, and where in WORK.

use kiln_artifact::cpio::Encoding;
use kiln_artifact::fat::Label;
use kiln_artifact::squashfs::Codec;

use super::{Outputs, RootSpec};

/// What `%{*}` stands for in texts: what `*` matched.
const STAR: &str = "%{*}";

/// A path in which at most one `*` stands for letters of one name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    text: String,
}

/// Text that is no [`Pattern`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// Absolute, with `..`, or with an empty part.
    #[error("is no path below it: write one without `..`, that does not begin with `/`")]
    Path,
    /// Several stars, or other letters of globs.
    #[error("may have one `*`, and no other letters of globs")]
    Glob,
}

impl Pattern {
    /// Reads `text`; `.` is the top.
    ///
    /// # Errors
    /// [`PatternError`].
    pub fn parse(text: &str) -> Result<Self, PatternError> {
        let trimmed = text.trim_end_matches('/');
        let trimmed = if trimmed == "." { "" } else { trimmed.strip_prefix("./").unwrap_or(trimmed) };
        if text.is_empty()
            || text.starts_with('/')
            || text.contains('\0')
            || (!trimmed.is_empty() && trimmed.split('/').any(|part| matches!(part, "" | "." | "..")))
        {
            return Err(PatternError::Path);
        }
        if trimmed.matches('*').count() > 1 || trimmed.contains(['?', '[', ']', '{', '}', '\\']) {
            return Err(PatternError::Glob);
        }
        Ok(Self { text: trimmed.to_owned() })
    }

    /// The top.
    pub fn top() -> Self {
        Self { text: String::new() }
    }

    /// As it was written; empty for the top.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether it has a star.
    pub fn has_star(&self) -> bool {
        self.text.contains('*')
    }

    /// The path, where the star stands for `star`.
    pub fn bind(&self, star: &str) -> String {
        self.text.replace('*', star)
    }

    /// What the star stands for where this is `path`.
    pub fn matches<'a>(&self, path: &'a str) -> Option<&'a str> {
        let (before, after) = self.text.split_once('*')?;
        let star = path.strip_prefix(before)?.strip_suffix(after)?;
        (!star.is_empty() && !star.contains('/')).then_some(star)
    }
}

/// `text`, where `%{*}` stands for `star`.
pub fn fill(text: &str, star: &str) -> String {
    text.replace(STAR, star)
}

/// Where something comes from.
#[derive(Debug, Clone)]
pub enum Origin {
    /// What needed steps put out, and earlier makes of this one.
    Work(Pattern),
    /// SRCDIR.
    Source(Pattern),
    /// A root.
    Root {
        /// Which.
        spec: RootSpec,
        /// What of it.
        path: Pattern,
    },
    /// A program that comes with kiln.
    Program(String),
    /// This text.
    Text(String),
}

impl Origin {
    /// The path in it that may have a star.
    pub fn pattern(&self) -> Option<&Pattern> {
        match self {
            Self::Work(path) | Self::Source(path) | Self::Root { path, .. } => Some(path),
            Self::Program(_) | Self::Text(_) => None,
        }
    }
}

/// Something that goes into an artifact.
#[derive(Debug, Clone)]
pub struct From {
    /// Where it comes from.
    pub origin: Origin,
    /// Where it goes.
    pub at: Option<Pattern>,
    /// What is taken; all where there are none.
    pub only: Outputs,
    /// What is left out.
    pub exclude: Outputs,
    /// Permission bits of a file.
    pub mode: Option<u16>,
    /// Whether files become one.
    pub join: bool,
    /// Whether it may be missing.
    pub optional: bool,
    /// Kernel modules by name, with `?` behind those that a kernel need not have; all where there are none.
    pub modules: Vec<String>,
}

/// The parts of a unified kernel image.
#[derive(Debug, Clone)]
pub struct Unified {
    /// The stub.
    pub stub: From,
    /// The kernel.
    pub linux: From,
    /// The initrd's archives.
    pub initrds: Vec<From>,
    /// The command line.
    pub command_line: From,
    /// os-release(5).
    pub os_release: Option<From>,
    /// The kernel's release, where `%{*}` is filled in.
    pub release: Option<String>,
    /// SBAT to add.
    pub sbat: Option<From>,
}

/// Which artifact.
#[derive(Debug, Clone)]
pub enum What {
    /// A squashfs image.
    Squashfs {
        /// How blocks are compressed.
        codec: Codec,
        /// Length of a block.
        block_bytes: u32,
    },
    /// An erofs image.
    Erofs,
    /// A cpio archive.
    Cpio(Encoding),
    /// A FAT32 image.
    Fat {
        /// Its name.
        label: Option<Label>,
        /// Its length.
        size_bytes: Option<u64>,
    },
    /// The files as they are.
    Files,
    /// A hash tree.
    Verity {
        /// Where the root hash goes.
        hash: Option<Pattern>,
    },
    /// A unified kernel image.
    Unified(Box<Unified>),
    /// What is to be assembled and signed.
    Record(Box<Recorded>),
}

/// Images that are to be assembled of parts in WORK, and signed.
#[derive(Debug, Clone)]
pub struct Recorded {
    /// Their parts.
    pub parts: Unified,
    /// Where each goes.
    pub signed: Vec<Pattern>,
    /// A file with the release of the one that paths without a star are for.
    pub default: Option<Pattern>,
    /// Images that their initrds open through verity, and whether each may be missing.
    pub images: Vec<(Pattern, bool)>,
}

/// Something to be made.
#[derive(Debug, Clone)]
pub struct Make {
    /// What.
    pub what: What,
    /// Where in WORK.
    pub path: Pattern,
    /// Of what.
    pub from: Vec<From>,
    /// What the star ranges over.
    pub each: Option<From>,
    /// Whether there may be nothing to make it of.
    pub optional: bool,
}

impl Make {
    /// All that it is made of.
    pub fn parts(&self) -> impl Iterator<Item = &From> {
        let unified = match &self.what {
            What::Unified(unified) => Some(&**unified),
            What::Record(recorded) => Some(&recorded.parts),
            _ => None,
        };
        let parts = unified.into_iter().flat_map(|unified| {
            [&unified.linux, &unified.stub, &unified.command_line]
                .into_iter()
                .chain(&unified.initrds)
                .chain(&unified.os_release)
                .chain(&unified.sbat)
        });
        self.each.iter().chain(parts).chain(&self.from)
    }

    /// What its star ranges over.
    pub fn range(&self) -> Option<&From> {
        self.parts().find(|part| part.origin.pattern().is_some_and(Pattern::has_star))
    }

    /// Globs of what it puts out.
    pub fn globs(&self) -> Vec<String> {
        let below = |path: &str| match (self.path.text(), path) {
            ("", path) => path.to_owned(),
            (folder, "") => folder.to_owned(),
            (folder, path) => format!("{folder}/{path}"),
        };
        match &self.what {
            What::Files => self.from.iter().flat_map(|from| from.globs()).map(|glob| below(&glob)).collect(),
            What::Verity { hash: Some(hash) } => {
                vec![self.path.text().to_owned(), hash.text().to_owned()]
            }
            _ => vec![self.path.text().to_owned()],
        }
    }
}

impl From {
    /// Globs of where its files go, below where the files of the make go.
    fn globs(&self) -> Vec<String> {
        let at = self.at.as_ref().map_or("", Pattern::text);
        let below = |path: &str| if at.is_empty() { path.to_owned() } else { format!("{at}/{path}") };
        let is_file = self.join || matches!(self.origin, Origin::Text(_) | Origin::Program(_));
        if is_file {
            return vec![at.to_owned()];
        }
        if !self.only.is_empty() {
            return self.only.globs().map(below).collect();
        }
        if at.is_empty() { vec!["**".to_owned()] } else { vec![at.to_owned()] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(text: &str) -> Pattern {
        Pattern::parse(text).expect("a pattern")
    }

    #[test]
    fn a_star_stands_for_letters_of_one_name() {
        let modules = pattern("boot/modules-*.sqfs");
        assert_eq!(modules.matches("boot/modules-6.12.sqfs"), Some("6.12"));
        for other in
            ["boot/modules-.sqfs", "boot/modules-a/b.sqfs", "boot/modules-6.12", "x/boot/modules-1.sqfs"]
        {
            assert_eq!(modules.matches(other), None, "{other}");
        }
        assert_eq!(modules.bind("6.12"), "boot/modules-6.12.sqfs");
        assert_eq!(pattern("./a/").text(), "a");
        assert_eq!(pattern("."), Pattern::top());
        assert_eq!(fill("uname %{*}", "6.12"), "uname 6.12");
    }

    #[test]
    fn what_leaves_its_folder_or_is_another_glob_is_no_pattern() {
        for bad in ["", "/a", "../a", "a/../b", "a//b", "a/./b"] {
            assert_eq!(Pattern::parse(bad), Err(PatternError::Path), "{bad}");
        }
        for bad in ["a*b*", "**", "a?", "[a]", "{a,b}"] {
            assert_eq!(Pattern::parse(bad), Err(PatternError::Glob), "{bad}");
        }
    }
}
