//! The lock's text: read strictly, with the line of what is wrong, and written so that equal locks are equal bytes.

use std::fmt::Write as _;
use std::path::Path;

use kiln_artifact::tree::TreePath;
use serde::Deserialize;

use super::{
    Lock, LockError, LockedGit, LockedIndex, LockedKernel, LockedPackage, LockedRoot, LockedSource, VERSION,
};
use crate::plan::is_commit;

const HEADER: &str = "\
# Every byte that came from outside, by digest. Written by kiln; keep it under version control.
";

/// What is wrong with a lock that a merge left in two versions.
pub(super) const BOTH_SIDES: &str = "a merge left both sides in it";

#[derive(Deserialize)]
struct VersionOnly {
    version: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: u32,
    #[serde(default)]
    kernel: Vec<toml::Spanned<LockedKernel>>,
    #[serde(default)]
    root: Vec<toml::Spanned<LockedRoot>>,
    #[serde(default)]
    toolbox: Vec<toml::Spanned<LockedRoot>>,
    #[serde(default)]
    source: Vec<toml::Spanned<LockedSource>>,
    #[serde(default)]
    git: Vec<toml::Spanned<LockedGit>>,
}

impl Lock {
    /// Reads `text`, which `path` names in errors.
    ///
    /// # Errors
    /// [`LockError::Malformed`] and [`LockError::Version`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, LockError> {
        let malformed = |offset: usize, reason: String| {
            let before = &text[..text.floor_char_boundary(offset)];
            let line_start = before.rfind('\n').map_or(0, |at| at + 1);
            LockError::Malformed {
                path: path.to_owned(),
                line: before.matches('\n').count() + 1,
                column: before[line_start..].chars().count() + 1,
                reason,
            }
        };
        let mut marks = text.match_indices("<<<<<<< ").map(|(offset, _)| offset);
        if let Some(offset) = marks.find(|at| *at == 0 || text[..*at].ends_with('\n')) {
            return Err(malformed(offset, BOTH_SIDES.to_owned()));
        }
        let parse_error = |error: toml::de::Error| {
            malformed(error.span().map_or(0, |span| span.start), error.message().to_owned())
        };
        let read = toml::from_str::<File>(text);
        // What another version has in it may be nothing that this one knows: its number says why.
        let version = match &read {
            Ok(file) => file.version,
            Err(_) => toml::from_str::<VersionOnly>(text).map_err(parse_error)?.version,
        };
        if version != VERSION {
            return Err(LockError::Version { path: path.to_owned(), found: version });
        }
        let file = read.map_err(parse_error)?;
        let mut lock = Self::default();
        for (what, list, locked) in
            [("root", file.root, &mut lock.roots), ("toolbox", file.toolbox, &mut lock.toolboxes)]
        {
            for root in list {
                let start = root.span().start;
                let root = root.into_inner();
                if let Some(bad) = root.packages.iter().find_map(check_package) {
                    return Err(malformed(start, bad));
                }
                if let Some(earlier) = locked.insert(root.spec.clone(), root) {
                    return Err(malformed(start, format!("{what} `{}` is locked twice", earlier.spec)));
                }
            }
        }
        for kernel in file.kernel {
            let start = kernel.span().start;
            let kernel = kernel.into_inner();
            if let Some(bad) = check_package(&kernel.package) {
                return Err(malformed(start, bad));
            }
            if let Some(earlier) = lock.kernels.insert(kernel.spec.clone(), kernel) {
                return Err(malformed(start, format!("kernel `{}` is locked twice", earlier.spec)));
            }
        }
        for source in file.source {
            let start = source.span().start;
            let source = source.into_inner();
            if let Some(earlier) = lock.sources.insert(source.url.clone(), source) {
                return Err(malformed(start, format!("source `{}` is locked twice", earlier.url)));
            }
        }
        for git in file.git {
            let start = git.span().start;
            let git = git.into_inner();
            if !is_commit(&git.commit) {
                return Err(malformed(start, format!("`{}` is no commit", git.commit.escape_debug())));
            }
            if let Some(earlier) = lock.gits.insert((git.url.clone(), git.rev.clone()), git) {
                let reason = format!("`{}` of `{}` is locked twice", earlier.rev, earlier.url);
                return Err(malformed(start, reason));
            }
        }
        Ok(lock)
    }

    /// The lock file's text.
    pub fn to_text(&self) -> String {
        let mut text = format!("{HEADER}version = {VERSION}\n");
        // Writing to a string cannot fail.
        for kernel in self.kernels.values() {
            let _ = write!(
                text,
                "\n[[kernel]]\nspec = {}\nrelease = {}\n",
                quoted(&kernel.spec),
                quoted(&kernel.release)
            );
            write_indexes(&mut text, &kernel.indexes);
            let _ = writeln!(text, "package = {}", package_line(&kernel.package));
        }
        for LockedSource { url, size, sha256 } in self.sources.values() {
            let url = quoted(url);
            let _ = write!(text, "\n[[source]]\nurl = {url}\nsize = {size}\nsha256 = \"{sha256}\"\n");
        }
        for LockedGit { url, rev, commit, size, sha256 } in self.gits.values() {
            let (url, rev) = (quoted(url), quoted(rev));
            let _ = write!(
                text,
                "\n[[git]]\nurl = {url}\nrev = {rev}\ncommit = \"{commit}\"\nsize = {size}\nsha256 = \"{sha256}\"\n"
            );
        }
        let roots = self.roots.values().map(|root| ("root", root));
        let toolboxes = self.toolboxes.values().map(|toolbox| ("toolbox", toolbox));
        for (what, root) in roots.chain(toolboxes) {
            let _ = write!(text, "\n[[{what}]]\nspec = {}\n", quoted(&root.spec));
            write_indexes(&mut text, &root.indexes);
            text.push_str("packages = [\n");
            for package in &root.packages {
                let _ = writeln!(text, "  {},", package_line(package));
            }
            text.push_str("]\n");
        }
        text
    }
}

/// What is wrong with a package that parses but could not be one.
fn check_package(package: &LockedPackage) -> Option<String> {
    let path_is_sound = TreePath::new(package.path.as_bytes()).is_ok_and(|path| !path.is_root())
        && package.path.chars().all(|c| c.is_ascii_graphic());
    (!path_is_sound).then(|| {
        format!(
            "package `{}` has a path that no archive has: `{}`",
            package.name,
            package.path.escape_debug()
        )
    })
}

fn quoted(text: &str) -> String {
    toml::Value::from(text).to_string()
}

fn write_indexes(text: &mut String, indexes: &[LockedIndex]) {
    text.push_str("indexes = [\n");
    for index in indexes {
        let _ = writeln!(
            text,
            "  {{ suite = {}, date = {}, sha256 = \"{}\" }},",
            quoted(&index.suite),
            quoted(&index.date.to_string()),
            index.sha256
        );
    }
    text.push_str("]\n");
}

fn package_line(package: &LockedPackage) -> String {
    format!(
        "{{ name = {}, version = {}, architecture = {}, suite = {}, path = {}, size = {}, sha256 = \"{}\" }}",
        quoted(&package.name),
        quoted(&package.version),
        quoted(&package.architecture),
        quoted(&package.suite),
        quoted(&package.path),
        package.size,
        package.sha256
    )
}
