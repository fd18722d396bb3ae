//! Where a step's root comes from, as a person names it.

use std::path::PathBuf;
use std::str::FromStr;

/// A root by its source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RootSpec {
    /// `debian:SUITE+PKG,PKG…`: the suite's essential packages and those named. The text after `debian:`.
    Debian(String),
    /// `deb:SUITE+PKG,PKG…`: the files of these packages, and of those that they need in exactly one version, as a
    /// metapackage does. No script of theirs runs: not for steps, but for what is made of files.
    Packages(String),
    /// `dir:PATH`: a directory, imported: the step gets an image of it as it is now, named by its digest.
    Directory(PathBuf),
    /// `file:PATH`: a tar archive, plain or compressed with gzip, xz or zstd, which is imported; or a squashfs or erofs
    /// image, which is attached as it is. Its first bytes say which, not its name.
    File(PathBuf),
    /// `live:PATH`: a directory as it stands, not imported: observed like a share, not named by a digest.
    Live(PathBuf),
}

impl RootSpec {
    /// Whether it is made of Debian packages, which are locked.
    pub fn is_debian(&self) -> bool {
        matches!(self, Self::Debian(_) | Self::Packages(_))
    }
}

/// Text that names no root.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` names no root: write debian:SUITE+PKG,PKG… or deb:SUITE+PKG,PKG… or dir:PATH or file:ARCHIVE or file:IMAGE or live:PATH"
)]
pub struct ParseRootError(String);

impl FromStr for RootSpec {
    type Err = ParseRootError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (kind, rest) = text.split_once(':').ok_or_else(|| ParseRootError(text.to_owned()))?;
        if rest.is_empty() {
            return Err(ParseRootError(text.to_owned()));
        }
        match kind {
            "debian" => Ok(Self::Debian(rest.to_owned())),
            "deb" => Ok(Self::Packages(rest.to_owned())),
            "dir" => Ok(Self::Directory(rest.into())),
            "file" => Ok(Self::File(rest.into())),
            "live" => Ok(Self::Live(rest.into())),
            _ => Err(ParseRootError(text.to_owned())),
        }
    }
}

impl std::fmt::Display for RootSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Debian(spec) => write!(f, "debian:{spec}"),
            Self::Packages(spec) => write!(f, "deb:{spec}"),
            Self::Directory(path) => write!(f, "dir:{}", path.display()),
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Live(path) => write!(f, "live:{}", path.display()),
        }
    }
}
