//! A second place to look for a locked package: an archive that keeps what mirrors drop.
//!
//! A mirror drops a version within days of its successor; the lock still names it, by pool path and digest. A snapshot
//! archive is named by a URL, in which `{archive}` stands for `debian` or `debian-security` and `{time}` for a moment, as
//! `20261121T091544Z`: that of the index that named the package and, because an archive may take its picture of an index a
//! while after the index was made, that a day later. Without them it is a mirror like any other, asked last.

use jiff::{Timestamp, ToSpan};

use crate::fetch::lock::{LockedIndex, LockedPackage};

/// Why a URL names no snapshot archive.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// Another scheme, or none.
    #[error("`{0}` is no http, https or file URL of a snapshot archive")]
    Scheme(String),
    /// A placeholder that is not known.
    #[error("the URL of a snapshot archive has `{placeholder}` in it: {url}")]
    Placeholder {
        /// The URL.
        url: String,
        /// What is not known.
        placeholder: String,
    },
}

impl SnapshotError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(
            "as in https://HOST/archive/{archive}/{time}, or the URL of a mirror that keeps old packages"
                .to_owned(),
        )
    }
}

/// Where `package`, which one of `indexes` named, may be in the archive at `template`.
///
/// # Errors
/// [`SnapshotError`].
pub(super) fn urls(
    template: &str,
    package: &LockedPackage,
    indexes: &[LockedIndex],
) -> Result<Vec<String>, SnapshotError> {
    if !["http://", "https://", "file://"].iter().any(|scheme| template.starts_with(scheme)) {
        return Err(SnapshotError::Scheme(template.to_owned()));
    }
    let is_security = package.suite.ends_with("-security") || package.suite.ends_with("/updates");
    let base = template.trim_end_matches('/').replace(
        "{archive}",
        match is_security {
            true => "debian-security",
            false => "debian",
        },
    );
    let at = |time: Timestamp| {
        let base = base.replace("{time}", &time.strftime("%Y%m%dT%H%M%SZ").to_string());
        match base.split_once('{') {
            None => Ok(format!("{base}/{}", package.path)),
            Some((_, rest)) => Err(SnapshotError::Placeholder {
                url: template.to_owned(),
                placeholder: format!("{{{}", rest.split_inclusive('}').next().unwrap_or(rest)),
            }),
        }
    };
    let index = indexes.iter().find(|index| index.suite == package.suite).or_else(|| indexes.first());
    let date = index.map_or(Timestamp::UNIX_EPOCH, |index| index.date);
    let mut urls = vec![at(date)?];
    if base.contains("{time}") {
        urls.push(at(date.saturating_add(24.hours()).unwrap_or(date))?);
    }
    Ok(urls)
}

#[cfg(test)]
mod tests {
    use kiln_digest::Digest;

    use super::*;

    fn of(template: &str, suite: &str) -> Result<Vec<String>, SnapshotError> {
        let package = LockedPackage {
            name: "make".into(),
            version: "1".into(),
            architecture: "amd64".into(),
            suite: suite.into(),
            path: "pool/main/m/make.deb".into(),
            size: 1,
            sha256: Digest::of(b""),
        };
        let index = |suite: &str, date: &str| LockedIndex {
            suite: suite.into(),
            date: date.parse().expect("a time"),
            sha256: Digest::of(b""),
        };
        let indexes =
            [index("trixie", "2026-11-21T09:15:44Z"), index("trixie-security", "2026-11-22T00:53:03Z")];
        urls(template, &package, &indexes)
    }

    #[test]
    fn a_package_is_looked_for_at_the_time_of_its_own_index_and_a_day_later() {
        let template = "https://snapshot.test/archive/{archive}/{time}/";
        assert_eq!(
            of(template, "trixie").expect("sound"),
            [
                "https://snapshot.test/archive/debian/20261121T091544Z/pool/main/m/make.deb",
                "https://snapshot.test/archive/debian/20261122T091544Z/pool/main/m/make.deb",
            ]
        );
        assert_eq!(
            of(template, "trixie-security").expect("sound")[0],
            "https://snapshot.test/archive/debian-security/20261122T005303Z/pool/main/m/make.deb"
        );
        assert_eq!(of("file:///srv/old", "trixie").expect("sound"), ["file:///srv/old/pool/main/m/make.deb"]);
    }

    #[test]
    fn what_is_no_such_url_is_refused() {
        assert!(matches!(of("snapshot.test", "trixie"), Err(SnapshotError::Scheme(_))));
        let error = of("http://s/{date}/x", "trixie").expect_err("unknown");
        assert!(error.to_string().contains("`{date}`"), "{error}");
    }
}
