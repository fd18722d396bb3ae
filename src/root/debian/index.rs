//! Fetching a suite's indexes: InRelease by its signature, then each package index by its digest.

use std::fs;
use std::io::{self, Read};
use std::path::PathBuf;

use jiff::Timestamp;
use kiln_digest::Digest;
use kiln_openpgp::VerifyError;

use super::packages::PackagesError;
use super::release::{Release, ReleaseError};
use super::sources::{Keyring, Pocket};
use super::{ARCHITECTURE, Archive};
use crate::fetch::http::{Expected, FetchError};
use crate::fetch::lock::LockedIndex;
use crate::root::decompress::{Compression, Limited};

/// Debian's largest InRelease is 0.3 MB.
const MAX_RELEASE_BYTES: u64 = 16 << 20;
/// Debian's largest package index is 60 MB.
const MAX_INDEX_BYTES: u64 = 1 << 30;

/// Why a suite's indexes cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// They cannot be fetched.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The archive has no such suite.
    #[error("there is no suite `{suite}` at `{uri}`")]
    NoSuite {
        /// The suite.
        suite: String,
        /// The archive.
        uri: String,
    },
    /// A keyring cannot be read.
    #[error("keyring `{path}` cannot be read")]
    Keyring {
        /// The file.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// The signature is not good.
    #[error("the Release of {suite} from `{uri}` is not to be trusted")]
    Verify {
        /// The suite.
        suite: String,
        /// The archive.
        uri: String,
        /// What is wrong.
        #[source]
        source: VerifyError,
    },
    /// The Release is not the one that was asked for.
    #[error("the Release of {suite} from `{uri}` cannot be used")]
    Release {
        /// The suite.
        suite: String,
        /// The archive.
        uri: String,
        /// What is wrong.
        #[source]
        source: ReleaseError,
    },
    /// The Release names no package index for a component.
    #[error("suite {suite} has no packages for {ARCHITECTURE} in its component `{component}`")]
    NoComponent {
        /// The suite.
        suite: String,
        /// The component.
        component: String,
    },
    /// A package index that does not decompress to what the Release says.
    #[error("the package index of {suite} from `{uri}` cannot be decompressed")]
    Decompress {
        /// The suite.
        suite: String,
        /// The archive.
        uri: String,
        /// What is wrong.
        #[source]
        source: io::Error,
    },
    /// A package index that cannot be read.
    #[error("the package index of {suite} cannot be used")]
    Packages {
        /// The suite.
        suite: String,
        /// What is wrong.
        #[source]
        source: PackagesError,
    },
}

impl IndexError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Fetch(error) => error.hint(),
            Self::NoSuite { .. } => Some("check the suite's name (as in bookworm or trixie) and the mirror".into()),
            Self::Verify { source: VerifyError::UnknownKey { .. } | VerifyError::EmptyKeyring, .. } => Some(
                "install a newer debian-archive-keyring, or name a key file that you trust with --debian-keyring FILE"
                    .into(),
            ),
            Self::Verify { .. } => Some("use another mirror; do not use what this one offers".into()),
            Self::Release { source, .. } => source.hint(),
            Self::Keyring { .. } => Some("name a key file with --debian-keyring FILE".into()),
            Self::NoComponent { .. } => Some("check the components of the APT source".into()),
            Self::Decompress { .. } | Self::Packages { .. } => Some("use another mirror".into()),
        }
    }
}

/// The indexes of one pocket.
pub struct Index {
    /// What the lock says of them.
    pub locked: LockedIndex,
    /// Its package indexes, decompressed.
    pub texts: Vec<Vec<u8>>,
}

impl Archive {
    /// Fetches and verifies the indexes of `pocket`. An index older than that of the same suite in `previous` is
    /// refused.
    pub(super) fn index(&self, pocket: &Pocket, previous: &[LockedIndex]) -> Result<Index, IndexError> {
        let keyrings = pocket.keyrings.iter().map(read_keyring).collect::<Result<Vec<_>, _>>()?;
        let keyrings: Vec<&[u8]> = keyrings.iter().map(Vec::as_slice).collect();
        let (text, sha256) = self.release(pocket, &keyrings)?;
        let uri = || pocket.uris.join(" ");
        let release_error = |source| IndexError::Release { suite: pocket.suite.clone(), uri: uri(), source };
        let release = Release::parse(&text).map_err(release_error)?;
        release
            .check(&pocket.suite, self.now.as_second(), self.settings.allow_expired)
            .map_err(release_error)?;
        refuse_downgrade(&pocket.suite, release.date, previous).map_err(release_error)?;
        let mut texts = Vec::new();
        for component in &pocket.components {
            let path = |architecture| format!("{component}/binary-{architecture}/Packages");
            let text = self.packages(pocket, &release, &path(ARCHITECTURE))?;
            texts.push(text.ok_or_else(|| IndexError::NoComponent {
                suite: pocket.suite.clone(),
                component: component.clone(),
            })?);
            if release.separate_all {
                texts.extend(self.packages(pocket, &release, &path("all"))?);
            }
        }
        Ok(Index { locked: LockedIndex { suite: pocket.suite.clone(), date: release.date, sha256 }, texts })
    }

    /// The text of the pocket's Release that a good signature covers, and the digest of the file that was signed.
    fn release(&self, pocket: &Pocket, keyrings: &[&[u8]]) -> Result<(String, Digest), IndexError> {
        let suite = &pocket.suite;
        let urls = |file: &str| -> Vec<String> {
            pocket.uris.iter().map(|uri| format!("{uri}/dists/{suite}/{file}")).collect()
        };
        let now = u64::try_from(self.now.as_second()).unwrap_or_default();
        let what = |file: &str| format!("{file} of suite {suite}");
        let (verified, sha256) =
            match self.client.get(&what("InRelease"), &urls("InRelease"), MAX_RELEASE_BYTES) {
                Ok(bytes) => (kiln_openpgp::verify_cleartext(&bytes, keyrings, now), Digest::of(&bytes)),
                Err(FetchError::Missing { .. }) => {
                    let text = match self.client.get(&what("Release"), &urls("Release"), MAX_RELEASE_BYTES) {
                        Err(FetchError::Missing { .. }) => {
                            return Err(IndexError::NoSuite {
                                suite: suite.clone(),
                                uri: pocket.uris.join(" "),
                            });
                        }
                        text => text?,
                    };
                    let signature =
                        self.client.get(&what("Release.gpg"), &urls("Release.gpg"), MAX_RELEASE_BYTES)?;
                    (kiln_openpgp::verify_detached(&text, &signature, keyrings, now), Digest::of(&text))
                }
                Err(error) => return Err(error.into()),
            };
        let untrusted =
            |source| IndexError::Verify { suite: suite.clone(), uri: pocket.uris.join(" "), source };
        let text = verified.map_err(untrusted)?.text;
        let text = String::from_utf8(text)
            .map_err(|_| untrusted(VerifyError::Malformed("it is not UTF-8 text".into())))?;
        Ok((text, sha256))
    }

    /// The package index at `path`, decompressed; none where the Release does not list it.
    fn packages(
        &self,
        pocket: &Pocket,
        release: &Release,
        path: &str,
    ) -> Result<Option<Vec<u8>>, IndexError> {
        let plain = release.file(path);
        if let Some(bytes) = plain.and_then(|plain| self.cached_index(plain)) {
            return Ok(Some(bytes));
        }
        let listed = [".xz", ".zst", ".gz", ""].into_iter().find_map(|extension| {
            let name = format!("{path}{extension}");
            release.file(&name).map(|expected| (name, expected))
        });
        let Some((name, expected)) = listed else { return Ok(None) };
        let folder = name.rsplit_once('/').map_or("", |(folder, _)| folder);
        let dists = |uri: &String| format!("{uri}/dists/{}", pocket.suite);
        let by_hash = pocket
            .uris
            .iter()
            .map(|uri| format!("{}/{folder}/by-hash/SHA256/{}", dists(uri), expected.sha256));
        let by_name = pocket.uris.iter().map(|uri| format!("{}/{name}", dists(uri)));
        let urls: Vec<String> = by_hash.filter(|_| release.by_hash).chain(by_name).collect();
        let what = format!("package index {name} of suite {}", pocket.suite);
        let bytes = self.client.get_exactly(&what, &urls, expected)?;
        let failed = |source| IndexError::Decompress {
            suite: pocket.suite.clone(),
            uri: pocket.uris.join(" "),
            source,
        };
        let text = decompress(&name, &bytes, plain).map_err(failed)?;
        if plain.is_some() {
            // Kept for the next time; a store that cannot take it only costs time.
            let _ = self.store.blobs().put(&text[..]);
        }
        Ok(Some(text))
    }

    fn cached_index(&self, expected: Expected) -> Option<Vec<u8>> {
        let bytes = fs::read(self.store.blobs().path(&expected.sha256)).ok()?;
        // The index decides what is installed: what lies on the disk is not taken on trust.
        (Digest::of(&bytes) == expected.sha256).then_some(bytes)
    }
}

fn decompress(name: &str, bytes: &[u8], plain: Option<Expected>) -> io::Result<Vec<u8>> {
    let (compression, _) = Compression::of_name(name);
    let limit = plain.map_or(MAX_INDEX_BYTES, |plain| plain.size.min(MAX_INDEX_BYTES));
    let mut text = Vec::with_capacity(usize::try_from(limit.min(64 << 20)).unwrap_or_default());
    Limited::new(compression.reader(bytes)?, limit).read_to_end(&mut text)?;
    if plain.is_some_and(|plain| Digest::of(&text) != plain.sha256) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "its digest is not the one the Release gives",
        ));
    }
    Ok(text)
}

fn read_keyring(keyring: &Keyring) -> Result<Vec<u8>, IndexError> {
    match keyring {
        Keyring::Inline(text) => Ok(text.clone().into_bytes()),
        Keyring::File(path) => {
            fs::read(path).map_err(|source| IndexError::Keyring { path: path.clone(), source })
        }
    }
}

fn refuse_downgrade(suite: &str, date: Timestamp, previous: &[LockedIndex]) -> Result<(), ReleaseError> {
    match previous.iter().find(|index| index.suite == suite) {
        Some(index) if index.date > date => Err(ReleaseError::Downgrade { date, locked: index.date }),
        _ => Ok(()),
    }
}
