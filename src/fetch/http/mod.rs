//! Downloads over http, https and from file:// mirrors: bounded, timed, and kept only with the right digest.
//!
//! Two ways in: [`Client::get`] for a small document that is verified by its signature afterwards, and
//! [`Client::fetch`] for a blob whose digest is known before. Proxies are those of the environment
//! (`http_proxy`, `https_proxy`, `no_proxy`). Servers over https show certificates of the authorities that browsers trust, or of
//! those in a file. A redirect from https to http is refused. Bodies are taken as they are sent:
//! nothing undoes a content encoding, so a digest is that of the bytes that came.
//!
//! A client may have vendored bytes, which come before any URL, and may be offline: then it opens no URL at all.

mod authority;
mod error;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use kiln_digest::{Digest, Hasher, HashingReader};
use ureq::tls::TlsConfig;

use super::vendor::Vendor;
use crate::store::Blobs;

pub use authority::{AuthorityError, Untrusted};
pub use error::FetchError;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// A transfer slower than this is given up: a mirror that drips bytes must not hold a build.
const SLOWEST: Pace = Pace { grace: Duration::from_secs(60), bytes_per_second: 8 << 10 };
const ATTEMPTS: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_millis(400);

/// What a blob must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// Length in bytes.
    pub size: u64,
    /// Digest.
    pub sha256: Digest,
}

/// Told how many more bytes have come.
pub type Progress<'a> = &'a (dyn Fn(u64) + Sync);

/// An HTTP client. Clones share its connections.
#[derive(Debug, Clone)]
pub struct Client {
    agent: ureq::Agent,
    first_pause: Duration,
    slowest: Pace,
    vendor: Option<Arc<Vendor>>,
    offline: bool,
}

/// How slowly bytes may come: after `grace`, as many as this for every second since the first was asked for.
#[derive(Debug, Clone, Copy)]
struct Pace {
    grace: Duration,
    bytes_per_second: u64,
}

impl Pace {
    /// How long `bytes` may take.
    fn patience(self, bytes: u64) -> Duration {
        self.grace + Duration::from_secs(bytes / self.bytes_per_second.max(1))
    }
}

impl Default for Client {
    fn default() -> Self {
        Self::new()
    }
}

/// An open answer, whose bytes come fast enough or not at all.
struct Body {
    reader: Box<dyn Read + Send>,
    pace: Pace,
    started: Instant,
    bytes: u64,
}

/// What a body's reader fails with when it is too slow: bytes and seconds.
#[derive(Debug, thiserror::Error)]
#[error("{0} bytes in {1} s")]
struct TooSlow(u64, u64);

impl Read for Body {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(buffer)?;
        self.bytes += count as u64;
        let taken = self.started.elapsed();
        if count > 0 && taken > self.pace.patience(self.bytes) {
            return Err(io::Error::other(TooSlow(self.bytes, taken.as_secs())));
        }
        Ok(count)
    }
}

/// `error`, which reading or writing a body gave.
fn broken(what: &str, url: &str, error: io::Error) -> FetchError {
    let (what, url) = (what.to_owned(), url.to_owned());
    match error.get_ref().and_then(|inner| inner.downcast_ref::<TooSlow>()) {
        Some(TooSlow(bytes, seconds)) => FetchError::Slow { what, url, bytes: *bytes, seconds: *seconds },
        None => FetchError::Io { what, url, source: error },
    }
}

impl Client {
    /// A client with the proxies of the environment.
    pub fn new() -> Self {
        Self::speaking(TlsConfig::default())
    }

    /// The same, for servers that the certificate authorities in the file `path` vouch for, and no others.
    ///
    /// # Errors
    /// [`AuthorityError`].
    pub fn trusting(path: &Path) -> Result<Self, AuthorityError> {
        authority::trusting(path).map(Self::speaking)
    }

    fn speaking(tls: TlsConfig) -> Self {
        let config = ureq::Agent::config_builder()
            .tls_config(tls)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(READ_TIMEOUT))
            .timeout_per_read(Some(READ_TIMEOUT))
            .max_redirects(8)
            .user_agent(concat!("kiln/", env!("CARGO_PKG_VERSION")))
            .build();
        Self {
            agent: config.new_agent(),
            first_pause: FIRST_PAUSE,
            slowest: SLOWEST,
            vendor: None,
            offline: false,
        }
    }

    /// The same, with vendored bytes at `path` that come before any URL.
    #[must_use]
    pub fn with_vendor(self, path: &Path) -> Self {
        Self { vendor: Some(Arc::new(Vendor::new(path))), ..self }
    }

    /// The same, but it opens no URL.
    #[must_use]
    pub fn offline(self) -> Self {
        Self { offline: true, ..self }
    }

    /// Whether it opens no URL.
    pub fn is_offline(&self) -> bool {
        self.offline
    }

    /// Whether the blob `expected` needs no URL, or may have none: what it is fetched from need not be known then.
    ///
    /// # Errors
    /// [`FetchError::Vendor`].
    pub fn needs_no_url(&self, what: &str, expected: Expected, blobs: &Blobs) -> Result<bool, FetchError> {
        let Expected { size, sha256 } = expected;
        Ok(self.offline || blobs.holds(&sha256, size) || self.vendored(what, &sha256)?.is_some())
    }

    fn vendored(&self, what: &str, digest: &Digest) -> Result<Option<Box<dyn Read + Send>>, FetchError> {
        let Some(vendor) = &self.vendor else { return Ok(None) };
        let failed = |error| FetchError::Vendor { what: what.into(), source: Box::new(error) };
        vendor.open(digest).map_err(failed)
    }

    /// Copies the blob `expected` from the vendored bytes, where they have it.
    fn take(&self, what: &str, expected: Expected, blobs: &Blobs) -> Result<bool, FetchError> {
        let (Some(vendor), Some(reader)) = (&self.vendor, self.vendored(what, &expected.sha256)?) else {
            return Ok(false);
        };
        let failed = |error| FetchError::Vendor { what: what.into(), source: Box::new(error) };
        let io =
            |source| FetchError::Io { what: what.into(), url: vendor.path().display().to_string(), source };
        let mut writer = blobs.writer().map_err(io)?;
        vendor.copy(expected.sha256, expected.size, reader, &mut writer).map_err(failed)?;
        writer.finish().map_err(io)?;
        Ok(true)
    }

    fn refuse_offline(&self, what: &str) -> Result<(), FetchError> {
        match self.offline {
            false => Ok(()),
            true => Err(FetchError::Offline {
                what: what.to_owned(),
                vendor: self.vendor.as_ref().map(|vendor| vendor.path().to_owned()),
            }),
        }
    }

    /// The document at the first of `urls` that has it, at most `limit_bytes` long. `what` names it in errors.
    ///
    /// # Errors
    /// [`FetchError`] of the last URL; [`FetchError::Missing`] only where no URL has it.
    pub fn get(&self, what: &str, urls: &[String], limit_bytes: u64) -> Result<Vec<u8>, FetchError> {
        self.first_of(what, urls, |url| {
            let body = self.open(what, url, limit_bytes)?;
            let mut bytes = Vec::new();
            body.take(limit_bytes + 1).read_to_end(&mut bytes).map_err(|error| broken(what, url, error))?;
            let found = bytes.len() as u64;
            if found > limit_bytes {
                return Err(FetchError::Size {
                    what: what.into(),
                    url: url.into(),
                    expected: limit_bytes,
                    found,
                });
            }
            Ok(bytes)
        })
    }

    /// The document that `expected` describes, from the first of `urls` that gives it.
    ///
    /// # Errors
    /// [`FetchError`] of the last URL.
    pub fn get_exactly(
        &self,
        what: &str,
        urls: &[String],
        expected: Expected,
    ) -> Result<Vec<u8>, FetchError> {
        self.first_of(what, urls, |url| {
            let mut bytes = Vec::new();
            self.copy_exactly(what, url, expected, &mut bytes, &|_| {})?;
            Ok(bytes)
        })
    }

    /// Whether `url` answers within `patience`: asked once, and what it answers is not read.
    ///
    /// # Errors
    /// [`FetchError`].
    pub fn probe(&self, what: &str, url: &str, patience: Duration) -> Result<(), FetchError> {
        self.open_within(what, url, patience).map(drop)
    }

    /// Puts the blob that `expected` describes into `blobs` from the first of `urls` that gives it, unless it is
    /// there already.
    ///
    /// # Errors
    /// [`FetchError`] of the last URL. Bytes of another digest are not kept.
    pub fn fetch(
        &self,
        what: &str,
        urls: &[String],
        expected: Expected,
        blobs: &Blobs,
        progress: Progress<'_>,
    ) -> Result<(), FetchError> {
        // One that a power failure cut short, or that is damaged, is fetched again.
        if blobs.holds(&expected.sha256, expected.size) {
            progress(expected.size);
            return Ok(());
        }
        if self.take(what, expected, blobs)? {
            progress(expected.size);
            return Ok(());
        }
        self.first_of(what, urls, |url| self.fetch_one(what, url, expected, blobs, progress))
    }

    /// Puts what the first of `urls` that answers gives into `blobs`: at most `limit_bytes`, with the digest `wanted` where
    /// one is known. Its digest and its size.
    ///
    /// # Errors
    /// [`FetchError`] of the last URL. Bytes of another digest are not kept.
    pub fn fetch_new(
        &self,
        what: &str,
        urls: &[String],
        limit_bytes: u64,
        wanted: Option<Digest>,
        blobs: &Blobs,
    ) -> Result<(Digest, u64), FetchError> {
        self.first_of(what, urls, |url| {
            let io = |error| broken(what, url, error);
            let body = self.open(what, url, limit_bytes)?;
            let mut reader = HashingReader::new(body.take(limit_bytes + 1));
            let mut writer = blobs.writer().map_err(io)?;
            io::copy(&mut reader, &mut writer).map_err(io)?;
            let (found, size) = reader.finish();
            if size > limit_bytes {
                let (what, url) = (what.into(), url.into());
                return Err(FetchError::Size { what, url, expected: limit_bytes, found: size });
            }
            match wanted {
                Some(expected) if expected != found => {
                    Err(FetchError::Digest { what: what.into(), url: url.into(), expected, found })
                }
                _ => writer.finish().map_err(io),
            }
        })
    }

    fn first_of<T>(
        &self,
        what: &str,
        urls: &[String],
        attempt: impl Fn(&str) -> Result<T, FetchError>,
    ) -> Result<T, FetchError> {
        self.refuse_offline(what)?;
        let mut last = FetchError::NoSource { what: what.into() };
        for url in urls {
            match self.with_retries(|| attempt(url)) {
                Ok(done) => return Ok(done),
                // A mirror that lacks it says less than one that failed.
                Err(error) if error.is_missing() && !matches!(last, FetchError::NoSource { .. }) => {}
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn with_retries<T>(&self, attempt: impl Fn() -> Result<T, FetchError>) -> Result<T, FetchError> {
        let mut pause = self.first_pause;
        for _ in 1..ATTEMPTS {
            match attempt() {
                Err(error) if is_transient(&error) => thread::sleep(pause),
                done => return done,
            }
            pause *= 3;
        }
        attempt()
    }

    fn open(&self, what: &str, url: &str, size: u64) -> Result<Body, FetchError> {
        self.open_within(what, url, self.slowest.patience(size))
    }

    fn open_within(&self, what: &str, url: &str, patience: Duration) -> Result<Body, FetchError> {
        self.refuse_offline(what)?;
        let started = Instant::now();
        let body = |reader| Body { reader, pace: self.slowest, started, bytes: 0 };
        if let Some(path) = url.strip_prefix("file://") {
            let path = PathBuf::from(unescaped(path));
            return match File::open(&path) {
                Ok(file) => Ok(body(Box::new(file))),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    Err(FetchError::Missing { what: what.into(), url: url.into() })
                }
                Err(source) => Err(FetchError::Io { what: what.into(), url: url.into(), source }),
            };
        }
        let https = url.starts_with("https://");
        if !https && !url.starts_with("http://") {
            return Err(FetchError::Url { url: url.into() });
        }
        let request = self.agent.get(url).config().https_only(https).timeout_global(Some(patience)).build();
        match request.call() {
            Ok(response) => Ok(body(Box::new(response.into_body().into_reader()))),
            Err(ureq::Error::StatusCode(404 | 410)) => {
                Err(FetchError::Missing { what: what.into(), url: url.into() })
            }
            Err(error) => {
                let (what, url) = (what.into(), url.into());
                Err(match Untrusted::of(&error) {
                    Some(why) => FetchError::Certificate { what, url, why, source: Box::new(error) },
                    None => FetchError::Unreachable { what, url, source: Box::new(error) },
                })
            }
        }
    }

    fn fetch_one(
        &self,
        what: &str,
        url: &str,
        expected: Expected,
        blobs: &Blobs,
        progress: Progress<'_>,
    ) -> Result<(), FetchError> {
        let io = |source| FetchError::Io { what: what.into(), url: url.into(), source };
        let mut writer = blobs.writer().map_err(io)?;
        self.copy_exactly(what, url, expected, &mut writer, progress)?;
        writer.finish().map_err(io)?;
        Ok(())
    }

    /// Copies what `url` gives to `writer`; an error where it is not what was expected.
    fn copy_exactly(
        &self,
        what: &str,
        url: &str,
        expected: Expected,
        writer: &mut dyn Write,
        progress: Progress<'_>,
    ) -> Result<(), FetchError> {
        let io = |error| broken(what, url, error);
        let mut reader = self.open(what, url, expected.size)?;
        let mut hasher = Hasher::default();
        let mut buffer = vec![0; 1 << 16];
        let mut found = 0_u64;
        loop {
            let count = match reader.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(io(error)),
            };
            found += count as u64;
            if found > expected.size {
                break;
            }
            hasher.update(&buffer[..count]);
            writer.write_all(&buffer[..count]).map_err(io)?;
            progress(count as u64);
        }
        if found != expected.size {
            return Err(FetchError::Size {
                what: what.into(),
                url: url.into(),
                expected: expected.size,
                found,
            });
        }
        let (digest, _) = hasher.finish();
        if digest != expected.sha256 {
            return Err(FetchError::Digest {
                what: what.into(),
                url: url.into(),
                expected: expected.sha256,
                found: digest,
            });
        }
        Ok(())
    }
}

/// Whether the same request may go better a moment later.
fn is_transient(error: &FetchError) -> bool {
    match error {
        FetchError::Unreachable { source, .. } => match source.as_ref() {
            ureq::Error::StatusCode(code) => matches!(code, 408 | 425 | 429 | 500 | 502 | 503 | 504),
            ureq::Error::Io(_)
            | ureq::Error::Timeout(_)
            | ureq::Error::HostNotFound
            | ureq::Error::ConnectionFailed
            | ureq::Error::Protocol(_) => true,
            _ => false,
        },
        // A connection that broke in the middle; a file:// mirror or a full disk will not mend.
        FetchError::Io { url, source, .. } => {
            !url.starts_with("file://") && source.kind() != io::ErrorKind::StorageFull
        }
        _ => false,
    }
}

/// A file URL's path with `%XX` undone.
fn unescaped(path: &str) -> String {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let [first, tail @ ..] = rest {
        let digits = tail.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
        match (first, digits.and_then(|digits| u8::from_str_radix(digits, 16).ok())) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
