//! What a person writes to name a Debian root: `debian:SUITE+PKG,PKG=VERSION…`.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use super::{relation, version};
use crate::fetch::lock::LockedPackage;

/// A suite and the packages wanted beside the essential ones.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DebianSpec {
    suite: String,
    files_only: bool,
    packages: BTreeMap<String, Option<String>>,
}

/// Why some text names no Debian root.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// The prefix is missing.
    #[error("`{0}` does not begin with `debian:`")]
    Prefix(String),
    /// No suite, or an impossible one.
    #[error("`{0}` is not the name of a Debian suite")]
    Suite(String),
    /// No package, or an impossible one.
    #[error("`{0}` is not the name of a package")]
    Package(String),
    /// A package with an architecture.
    #[error("package `{0}` names an architecture")]
    Architecture(String),
    /// A version that is none.
    #[error("`{version}` is not a version of package `{package}`")]
    Version {
        /// The package.
        package: String,
        /// What was given as its version.
        version: String,
    },
    /// One package in two versions.
    #[error("package `{0}` is named in two versions")]
    TwoVersions(String),
}

impl SpecError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Prefix(_) | Self::Suite(_) => {
                "write `debian:SUITE+PKG,PKG…`, as in `debian:bookworm+gcc,make`".into()
            }
            Self::Architecture(_) => "roots are of one architecture: leave it out".into(),
            Self::Package(_) => "package names are lower-case letters, digits and `+-.`".into(),
            Self::Version { .. } => "write `PKG=VERSION` with a version as the index shows it".into(),
            Self::TwoVersions(_) => "name it once".into(),
        })
    }
}

impl DebianSpec {
    /// A root of `suite` with the essential packages only.
    ///
    /// # Errors
    /// [`SpecError::Suite`].
    pub fn essential(suite: &str) -> Result<Self, SpecError> {
        let is_suite = suite.starts_with(|c: char| c.is_ascii_alphanumeric())
            && suite.chars().all(|c| c.is_ascii_alphanumeric() || "-.".contains(c))
            && !suite.contains("..");
        if !is_suite {
            return Err(SpecError::Suite(suite.to_owned()));
        }
        Ok(Self { suite: suite.to_owned(), files_only: false, packages: BTreeMap::new() })
    }

    /// Adds `package`, `NAME` or `NAME=VERSION`.
    ///
    /// # Errors
    /// [`SpecError`], as its variants say.
    pub fn add(&mut self, package: &str) -> Result<(), SpecError> {
        let (name, wanted) = match package.split_once('=') {
            Some((name, wanted)) => (name, Some(wanted)),
            None => (package, None),
        };
        if name.contains(':') {
            return Err(SpecError::Architecture(name.to_owned()));
        }
        if !relation::is_package_name(name) || name.contains(|c: char| c.is_ascii_uppercase()) {
            return Err(SpecError::Package(package.to_owned()));
        }
        if let Some(wanted) = wanted.filter(|wanted| !version::is_valid(wanted)) {
            return Err(SpecError::Version { package: name.to_owned(), version: wanted.to_owned() });
        }
        match self.packages.get(name) {
            Some(Some(earlier)) if wanted.is_some_and(|wanted| wanted != earlier) => {
                return Err(SpecError::TwoVersions(name.to_owned()));
            }
            Some(Some(_)) => {}
            _ => {
                self.packages.insert(name.to_owned(), wanted.map(ToOwned::to_owned));
            }
        }
        Ok(())
    }

    /// The suite.
    pub fn suite(&self) -> &str {
        &self.suite
    }

    /// Whether only the files of the named packages are meant (`deb:`), and no root that programs run in.
    pub fn is_files_only(&self) -> bool {
        self.files_only
    }

    /// A package that this names with a version and that `locked` does not have in it, for people.
    pub fn lacks(&self, locked: &[LockedPackage]) -> Option<String> {
        let pinned = self.packages.iter().filter_map(|(name, version)| Some((name, version.as_ref()?)));
        let is_there = |name: &str, version: &str| {
            locked.iter().any(|package| package.name == name && package.version == version)
        };
        pinned
            .filter(|(name, version)| !is_there(name, version))
            .map(|(name, version)| format!("{name} {version}"))
            .next()
    }

    /// The packages by name, each with the version that it must have.
    pub fn packages(&self) -> impl Iterator<Item = (&str, Option<&str>)> {
        self.packages.iter().map(|(name, version)| (name.as_str(), version.as_deref()))
    }
}

impl FromStr for DebianSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let files = text.strip_prefix("deb:");
        let rest = files.or_else(|| text.strip_prefix("debian:"));
        let rest = rest.ok_or_else(|| SpecError::Prefix(text.to_owned()))?;
        let (suite, packages) = match rest.split_once('+') {
            Some((suite, packages)) => (suite, Some(packages)),
            None => (rest, None),
        };
        let mut spec = Self { files_only: files.is_some(), ..Self::essential(suite)? };
        for package in packages.into_iter().flat_map(|packages| packages.split(',')) {
            spec.add(package.trim())?;
        }
        match spec.files_only && spec.packages.is_empty() {
            true => Err(SpecError::Package(String::new())),
            false => Ok(spec),
        }
    }
}

/// The one way to write the spec: packages sorted, each once.
impl fmt::Display for DebianSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", if self.files_only { "deb" } else { "debian" }, self.suite)?;
        for (index, (name, version)) in self.packages.iter().enumerate() {
            f.write_str(if index == 0 { "+" } else { "," })?;
            f.write_str(name)?;
            if let Some(version) = version {
                write!(f, "={version}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specs_read_and_have_one_form() {
        for (text, form) in [
            ("debian:bookworm", "debian:bookworm"),
            ("debian:bookworm+make,gcc,make", "debian:bookworm+gcc,make"),
            ("debian:bookworm-backports+g++", "debian:bookworm-backports+g++"),
            ("deb:trixie+make,gcc", "deb:trixie+gcc,make"),
            ("debian:trixie+gcc=4:14.2.0-1,gcc", "debian:trixie+gcc=4:14.2.0-1"),
        ] {
            let spec: DebianSpec = text.parse().expect(text);
            assert_eq!(spec.to_string(), form);
        }
    }

    #[test]
    fn what_names_no_root_is_an_error_with_a_hint() {
        for text in [
            "bookworm",
            "debian:",
            "deb:trixie",
            "debian:../x",
            "debian:a b",
            "debian:bookworm+",
            "debian:bookworm+a,",
            "debian:bookworm+GCC:i386",
            "debian:bookworm+gcc:i386",
            "debian:bookworm+gcc=",
            "debian:bookworm+gcc=x y",
            "debian:bookworm+gcc=1,gcc=2",
            "debian:bookworm+/etc",
        ] {
            let error = text.parse::<DebianSpec>().expect_err(text);
            assert!(error.hint().is_some(), "{error}");
        }
    }
}
