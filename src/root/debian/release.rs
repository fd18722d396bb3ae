//! A suite's Release: what its signature vouches for, and whether it is the one that was asked for.
//!
//! The text has been verified; here it is read and judged: the right suite, not expired, not from the future.

use std::collections::BTreeMap;

use jiff::Timestamp;
use kiln_artifact::tree::TreePath;
use kiln_digest::Digest;

use super::control::{self, ControlError};
use crate::fetch::http::Expected;

/// A Release whose date lies further ahead than this is refused: the host's clock or the archive's is wrong.
const FUTURE_SECONDS: i64 = 24 * 60 * 60;
/// No suite lists more files (bookworm: 1,500).
const MAX_FILES: usize = 100_000;

/// Why a Release is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReleaseError {
    /// It is not control data.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// A field is missing, doubled or cannot be read.
    #[error("the Release has no sound `{field}` field")]
    Field {
        /// The field.
        field: &'static str,
    },
    /// A Release of another suite under this suite's name.
    #[error("the Release is of suite `{suite}` (codename `{codename}`), not of `{asked}`")]
    OtherSuite {
        /// What it says.
        suite: String,
        /// What it says.
        codename: String,
        /// What was asked for.
        asked: String,
    },
    /// Its time is over.
    #[error("the Release expired on {valid_until}")]
    Expired {
        /// Its `Valid-Until`.
        valid_until: Timestamp,
    },
    /// Its time has not come.
    #[error("the Release is dated {date}, which is in the future")]
    Future {
        /// Its `Date`.
        date: Timestamp,
    },
    /// Older than one that was locked.
    #[error("the Release is dated {date}, before the one of {locked} that is locked")]
    Downgrade {
        /// Its `Date`.
        date: Timestamp,
        /// The date in the lock.
        locked: Timestamp,
    },
}

impl ReleaseError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Expired { .. } => Some(
                "use a mirror that is up to date, check this host's clock, or accept it with --debian-allow-expired \
                 (`debian.allow-expired = true` under [settings])"
                    .into(),
            ),
            Self::Future { .. } => Some("check this host's clock".into()),
            Self::Downgrade { .. } => Some(
                "use a mirror that is up to date; to go back on purpose, remove the root from kiln.lock first".into(),
            ),
            Self::OtherSuite { codename, .. } => Some(format!("ask for `{codename}` if that is what you want")),
            Self::Control(_) | Self::Field { .. } => None,
        }
    }
}

/// What a Release says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    /// When it was made.
    pub date: Timestamp,
    /// Until when it holds; for ever where it does not say.
    pub valid_until: Option<Timestamp>,
    /// The suite: `stable`.
    pub suite: String,
    /// The codename: `bookworm`.
    pub codename: String,
    /// Whether files can be had by their digest.
    pub by_hash: bool,
    /// Whether packages of architecture `all` have an index of their own.
    pub separate_all: bool,
    files: BTreeMap<String, Expected>,
}

impl Release {
    /// Reads a Release's verified `text`.
    ///
    /// # Errors
    /// [`ReleaseError::Control`] and [`ReleaseError::Field`].
    pub fn parse(text: &str) -> Result<Self, ReleaseError> {
        let mut fields = BTreeMap::new();
        let mut paragraphs = control::paragraphs(text);
        let paragraph = paragraphs.next().ok_or(ReleaseError::Field { field: "Suite" })?;
        if paragraphs.next().is_some() {
            return Err(ReleaseError::Field { field: "Suite" });
        }
        for field in paragraph.fields() {
            let (name, value) = field?;
            if fields.insert(name, value).is_some() {
                let field = ["Suite", "Codename", "Date", "Valid-Until", "SHA256"]
                    .into_iter()
                    .find(|known| *known == name);
                return Err(ReleaseError::Field { field: field.unwrap_or("…") });
            }
        }
        let field = |name| fields.get(name).copied();
        let time =
            |name| field(name).map(|value| parse_date(value).ok_or(ReleaseError::Field { field: name }));
        let architectures = field("Architectures").unwrap_or_default();
        let no_all = field("No-Support-for-Architecture-all").unwrap_or_default();
        let has = |list: &str, word| list.split_ascii_whitespace().any(|one| one == word);
        Ok(Self {
            date: time("Date").ok_or(ReleaseError::Field { field: "Date" })??,
            valid_until: time("Valid-Until").transpose()?,
            suite: field("Suite").unwrap_or_default().to_owned(),
            codename: field("Codename").unwrap_or_default().to_owned(),
            by_hash: field("Acquire-By-Hash") == Some("yes"),
            separate_all: has(architectures, "all") && !has(no_all, "Packages"),
            files: parse_files(field("SHA256").ok_or(ReleaseError::Field { field: "SHA256" })?)?,
        })
    }

    /// Whether this is suite `asked` and its time is now (`now` is in seconds since the epoch).
    ///
    /// # Errors
    /// [`ReleaseError::OtherSuite`], [`ReleaseError::Expired`] unless `allow_expired`, [`ReleaseError::Future`].
    pub fn check(&self, asked: &str, now: i64, allow_expired: bool) -> Result<(), ReleaseError> {
        if self.suite != asked && self.codename != asked {
            return Err(ReleaseError::OtherSuite {
                suite: self.suite.clone(),
                codename: self.codename.clone(),
                asked: asked.to_owned(),
            });
        }
        if self.date.as_second() > now.saturating_add(FUTURE_SECONDS) {
            return Err(ReleaseError::Future { date: self.date });
        }
        match self.valid_until {
            Some(valid_until) if valid_until.as_second() < now && !allow_expired => {
                Err(ReleaseError::Expired { valid_until })
            }
            _ => Ok(()),
        }
    }

    /// What the file at `path`, below the suite's folder, must be; none where the Release does not list it.
    pub fn file(&self, path: &str) -> Option<Expected> {
        self.files.get(path).copied()
    }
}

/// `Sat, 21 Nov 2026 09:15:44 UTC`: an RFC 2822 date with a zone that only archives write.
fn parse_date(value: &str) -> Option<Timestamp> {
    let value = value.strip_suffix("UTC").map_or_else(|| value.to_owned(), |date| format!("{date}GMT"));
    jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(value).ok()
}

fn parse_files(section: &str) -> Result<BTreeMap<String, Expected>, ReleaseError> {
    let bad = || ReleaseError::Field { field: "SHA256" };
    let mut files = BTreeMap::new();
    for line in section.lines().filter(|line| !line.trim().is_empty()) {
        let mut words = line.split_ascii_whitespace();
        let (Some(sha256), Some(size), Some(path), None) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            return Err(bad());
        };
        let expected = Expected {
            size: size.parse().map_err(|_| bad())?,
            sha256: sha256.parse::<Digest>().map_err(|_| bad())?,
        };
        TreePath::new(path.as_bytes()).map_err(|_| bad())?;
        if files.insert(path.to_owned(), expected).is_some_and(|earlier| earlier != expected) {
            return Err(bad());
        }
        if files.len() > MAX_FILES {
            return Err(bad());
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RELEASE: &str = "\
Origin: Debian
Suite: oldstable-security
Codename: bookworm-security
Date: Sat, 21 Nov 2026 00:53:02 UTC
Valid-Until: Sat, 28 Nov 2026 00:53:02 UTC
Acquire-By-Hash: yes
Architectures: amd64 arm64
SHA256:
 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855        0 main/binary-amd64/Packages
 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855       32 main/binary-amd64/Packages.xz
";
    const NOW: i64 = 1_795_300_000;

    #[test]
    fn a_release_reads() {
        let release = Release::parse(RELEASE).expect("a release");
        assert_eq!(release.date.to_string(), "2026-11-21T00:53:02Z");
        assert!(release.by_hash && !release.separate_all);
        assert_eq!(release.file("main/binary-amd64/Packages.xz").expect("listed").size, 32);
        assert_eq!(release.file("main/binary-i386/Packages.xz"), None);
        let with_all = RELEASE.replace("Architectures: ", "Architectures: all ");
        assert!(Release::parse(&with_all).expect("a release").separate_all);
        let merged = format!("No-Support-for-Architecture-all: Packages\n{with_all}");
        assert!(!Release::parse(&merged).expect("a release").separate_all);
    }

    #[test]
    fn a_release_is_judged_by_suite_and_time() {
        let release = Release::parse(RELEASE).expect("a release");
        assert_eq!(release.check("bookworm-security", NOW, false), Ok(()));
        assert_eq!(release.check("oldstable-security", NOW, false), Ok(()));
        assert!(matches!(release.check("trixie-security", NOW, false), Err(ReleaseError::OtherSuite { .. })));
        let late = NOW + 7 * 24 * 3600;
        let error = release.check("bookworm-security", late, false).expect_err("expired");
        assert!(error.to_string().contains("2026-11-28") && error.hint().is_some(), "{error}");
        assert_eq!(release.check("bookworm-security", late, true), Ok(()));
        let early = NOW - 30 * 24 * 3600;
        assert!(matches!(release.check("bookworm-security", early, false), Err(ReleaseError::Future { .. })));
    }

    #[test]
    fn unsound_releases_are_errors() {
        for (from, to) in [
            ("Date: Sat, 21", "Date: Someday, 21"),
            ("Date: Sat, 21 Nov 2026 00:53:02 UTC\n", ""),
            ("SHA256:\n", "SHA512:\n"),
            ("Suite: oldstable-security\n", "Suite: oldstable-security\nSuite: stable\n"),
            ("Suite: oldstable-security\n", "Suite: oldstable-security\n\n"),
            ("       32 main", "       -1 main"),
            (" e3b0", " x3b0"),
            ("main/binary-amd64/Packages.xz", "../../etc/passwd"),
        ] {
            assert!(Release::parse(&RELEASE.replacen(from, to, 1)).is_err(), "{to}");
        }
    }
}
