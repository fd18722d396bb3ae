//! A package index (`Packages`): every version of every package that a suite offers, read without copying.
//!
//! The text has been verified against a signed Release before it comes here, so what is wrong in it is the
//! archive's fault; it is an error all the same, never a panic.

use kiln_digest::Digest;

use super::control::{self, ControlError, Paragraph};
use super::{relation, version};

/// How much a package matters (Policy §2.5); the order is that of importance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// `required`
    Required,
    /// `important`
    Important,
    /// `standard`
    Standard,
    /// `optional`
    Optional,
    /// `extra`, or none.
    Extra,
}

/// One version of one package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package<'a> {
    /// The package's name.
    pub name: &'a str,
    /// Its version.
    pub version: &'a str,
    /// `amd64` or `all`.
    pub architecture: &'a str,
    /// Whether every system has it.
    pub essential: bool,
    /// How much it matters.
    pub priority: Priority,
    /// What must be configured before it is unpacked.
    pub pre_depends: &'a str,
    /// What it needs.
    pub depends: &'a str,
    /// Which other names it answers to.
    pub provides: &'a str,
    /// What it cannot be together with.
    pub conflicts: &'a str,
    /// What it breaks.
    pub breaks: &'a str,
    /// Its path in the archive.
    pub path: &'a str,
    /// Length of the .deb in bytes.
    pub size: u64,
    /// Digest of the .deb.
    pub sha256: Digest,
}

/// Why an index cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PackagesError {
    /// It is not text.
    #[error("the package index is not UTF-8 text")]
    NotText,
    /// It is not control data.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// A paragraph lacks a field or has an impossible one.
    #[error("package `{name}` in the index has no sound `{field}` field")]
    Field {
        /// The package, as far as its name was read.
        name: String,
        /// The field.
        field: &'static str,
    },
}

/// Reads the index `text` for `architecture` (and `all`). Packages of other architectures are passed over.
///
/// # Errors
/// [`PackagesError`], as its variants say.
pub fn parse<'a>(text: &'a [u8], architecture: &str) -> Result<Vec<Package<'a>>, PackagesError> {
    let text = std::str::from_utf8(text).map_err(|_| PackagesError::NotText)?;
    let mut packages = Vec::with_capacity(text.len() / 1024);
    for paragraph in control::paragraphs(text) {
        let package = parse_package(&paragraph)?;
        if package.architecture == architecture || package.architecture == "all" {
            packages.push(package);
        }
    }
    Ok(packages)
}

fn parse_package<'a>(paragraph: &Paragraph<'a>) -> Result<Package<'a>, PackagesError> {
    let mut package = Package {
        name: "",
        version: "",
        architecture: "",
        essential: false,
        priority: Priority::Extra,
        pre_depends: "",
        depends: "",
        provides: "",
        conflicts: "",
        breaks: "",
        path: "",
        size: 0,
        sha256: Digest::from_bytes([0; 32]),
    };
    let (mut size, mut sha256) = ("", "");
    for field in paragraph.fields() {
        let (name, value) = field?;
        match name {
            "Package" => package.name = value,
            "Version" => package.version = value,
            "Architecture" => package.architecture = value,
            "Essential" => package.essential = value == "yes",
            "Priority" => {
                package.priority = match value {
                    "required" => Priority::Required,
                    "important" => Priority::Important,
                    "standard" => Priority::Standard,
                    "optional" => Priority::Optional,
                    _ => Priority::Extra,
                }
            }
            "Pre-Depends" => package.pre_depends = value,
            "Depends" => package.depends = value,
            "Provides" => package.provides = value,
            "Conflicts" => package.conflicts = value,
            "Breaks" => package.breaks = value,
            "Filename" => package.path = value,
            "Size" => size = value,
            "SHA256" => sha256 = value,
            _ => {}
        }
    }
    let bad = |field| PackagesError::Field { name: package.name.chars().take(80).collect(), field };
    if !relation::is_package_name(package.name) {
        return Err(bad("Package"));
    }
    if !version::is_valid(package.version) {
        return Err(bad("Version"));
    }
    if package.architecture.is_empty() {
        return Err(bad("Architecture"));
    }
    package.path = package.path.strip_prefix("./").unwrap_or(package.path);
    let path_is_sound = !package.path.split('/').any(|part| matches!(part, "" | "." | ".."))
        && package.path.bytes().all(|byte| byte.is_ascii_graphic());
    if !path_is_sound {
        return Err(bad("Filename"));
    }
    let bad_size = bad("Size");
    let bad_digest = bad("SHA256");
    package.size = size.parse().map_err(|_| bad_size)?;
    package.sha256 = sha256.parse().map_err(|_| bad_digest)?;
    Ok(package)
}

#[cfg(test)]
mod tests {
    use super::*;

    const INDEX: &str = "\
Package: make
Version: 4.3-4.1
Architecture: amd64
Pre-Depends: libc6
Depends: libc6 (>= 2.34)
Priority: optional
Description: utility
 for directing compilation
Filename: pool/main/m/make-dfsg/make_4.3-4.1_amd64.deb
Size: 396108
SHA256: e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855

Package: make
Version: 4.3-4.1
Architecture: i386
Filename: x
Size: 1
SHA256: e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855
";

    #[test]
    fn an_index_gives_the_packages_of_the_architecture() {
        let packages = parse(INDEX.as_bytes(), "amd64").expect("an index");
        assert_eq!(packages.len(), 1);
        let make = &packages[0];
        assert_eq!((make.name, make.version, make.size), ("make", "4.3-4.1", 396_108));
        assert_eq!((make.depends, make.priority), ("libc6 (>= 2.34)", Priority::Optional));
        assert_eq!(make.path, "pool/main/m/make-dfsg/make_4.3-4.1_amd64.deb");
    }

    #[test]
    fn unsound_fields_are_errors() {
        for (from, to) in [
            ("Package: make", "Package: ../make"),
            ("Version: 4.3", "Version: four"),
            ("Size: 396108", "Size: -1"),
            ("SHA256: e3", "SHA256: zz"),
            ("Filename: pool/main", "Filename: ../main"),
            ("Filename: pool/main", "Filename: /pool"),
            ("Filename: pool/main", "Filename: pool/ main"),
            ("Architecture: amd64", "Architecture:"),
            ("Depends: libc6 (>= 2.34)", "a line"),
        ] {
            assert!(parse(INDEX.replacen(from, to, 1).as_bytes(), "amd64").is_err(), "{to}");
        }
        assert_eq!(parse(b"\xff", "amd64"), Err(PackagesError::NotText));
    }

    #[test]
    fn flipped_and_truncated_indexes_never_panic() {
        for position in 0..INDEX.len() {
            let _ = parse(&INDEX.as_bytes()[..position], "amd64");
            for bit in 0..8 {
                let mut changed = INDEX.as_bytes().to_vec();
                changed[position] ^= 1 << bit;
                let _ = parse(&changed, "amd64");
            }
        }
    }
}
