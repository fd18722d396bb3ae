//! Downloads over http, https and from file:// mirrors: bounded, timed, and kept only with the right digest.
//!
//! Two ways in: [`Client::get`] for a small document that is verified by its signature afterwards, and
//! [`Client::fetch`] for a blob whose digest is known before. Proxies are those of the environment
//! (`http_proxy`, `https_proxy`, `no_proxy`). A redirect from https to http is refused.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use kiln_digest::{Digest, Hasher, HashingReader};

use crate::store::Blobs;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// A transfer slower than this for its whole length is given up: a mirror that drips bytes must not hold a build.
const SLOWEST_BYTES_PER_SECOND: u64 = 8 << 10;
const ATTEMPTS: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_millis(400);

/// Why something could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// No answer that is worth anything.
    #[error("cannot fetch {what} from `{url}`")]
    Unreachable {
        /// What was wanted, for people.
        what: String,
        /// Where it was looked for last.
        url: String,
        /// Why that failed.
        #[source]
        source: Box<ureq::Error>,
    },
    /// The server has no such file.
    #[error("{what} is not at `{url}`")]
    Missing {
        /// What was wanted.
        what: String,
        /// Where it was looked for last.
        url: String,
    },
    /// A file:// mirror or the store cannot be read or written.
    #[error("cannot fetch {what} from `{url}`")]
    Io {
        /// What was wanted.
        what: String,
        /// Where from.
        url: String,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// More bytes than there may be, or fewer than there must be.
    #[error("{what} from `{url}` has {found} bytes where {expected} were expected")]
    Size {
        /// What was wanted.
        what: String,
        /// Where from.
        url: String,
        /// Its size in bytes, or the most it may have.
        expected: u64,
        /// How many came; where there were too many, those read before giving up.
        found: u64,
    },
    /// Other bytes than those that were asked for. Nothing of them was kept.
    #[error("{what} from `{url}` has digest {found}, not {expected}")]
    Digest {
        /// What was wanted.
        what: String,
        /// Where from.
        url: String,
        /// The digest it must have.
        expected: Digest,
        /// The digest it has.
        found: Digest,
    },
    /// A URL that is neither http, https nor file.
    #[error("`{url}` is not an http, https or file URL")]
    Url {
        /// The URL.
        url: String,
    },
    /// It may not be fetched, or there is no place to fetch it from.
    #[error("{what} is not in the store, and there is nowhere to fetch it from")]
    NoSource {
        /// What was wanted.
        what: String,
    },
}

impl FetchError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Unreachable { .. } | Self::NoSource { .. } => Some(
                "connect this host to the network, set http_proxy, or name a mirror that it can reach \
                 (a file:// folder will do)"
                    .into(),
            ),
            Self::Missing { .. } => Some(
                "the mirror may have moved on: lock again, or use a mirror that keeps old versions".into(),
            ),
            Self::Digest { .. } | Self::Size { .. } => {
                Some("the mirror or something on the way changed it: try again, or use another mirror".into())
            }
            Self::Url { .. } | Self::Io { .. } => None,
        }
    }

    fn is_missing(&self) -> bool {
        matches!(self, Self::Missing { .. })
    }
}

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
}

impl Default for Client {
    fn default() -> Self {
        Self::new()
    }
}

/// An open answer.
struct Body {
    reader: Box<dyn Read + Send>,
}

impl Client {
    /// A client with the proxies of the environment.
    pub fn new() -> Self {
        let config = ureq::Agent::config_builder()
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(READ_TIMEOUT))
            .timeout_per_read(Some(READ_TIMEOUT))
            .max_redirects(8)
            .user_agent(concat!("kiln/", env!("CARGO_PKG_VERSION")))
            .build();
        Self { agent: config.new_agent(), first_pause: FIRST_PAUSE }
    }

    /// The document at the first of `urls` that has it, at most `limit_bytes` long. `what` names it in errors.
    ///
    /// # Errors
    /// [`FetchError`] of the last URL; [`FetchError::Missing`] only where no URL has it.
    pub fn get(&self, what: &str, urls: &[String], limit_bytes: u64) -> Result<Vec<u8>, FetchError> {
        self.first_of(what, urls, |url| {
            let body = self.open(what, url, limit_bytes)?;
            let mut bytes = Vec::new();
            let io = |source| FetchError::Io { what: what.into(), url: url.into(), source };
            body.reader.take(limit_bytes + 1).read_to_end(&mut bytes).map_err(io)?;
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
        if blobs.contains(&expected.sha256) {
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
            let io = |source| FetchError::Io { what: what.into(), url: url.into(), source };
            let reader = self.open(what, url, limit_bytes)?.reader;
            let mut reader = HashingReader::new(reader.take(limit_bytes + 1));
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
        let patience = CONNECT_TIMEOUT * 3 + Duration::from_secs(size / SLOWEST_BYTES_PER_SECOND);
        self.open_within(what, url, patience)
    }

    fn open_within(&self, what: &str, url: &str, patience: Duration) -> Result<Body, FetchError> {
        if let Some(path) = url.strip_prefix("file://") {
            let path = PathBuf::from(unescaped(path));
            return match File::open(&path) {
                Ok(file) => Ok(Body { reader: Box::new(file) }),
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
            Ok(response) => Ok(Body { reader: Box::new(response.into_body().into_reader()) }),
            Err(ureq::Error::StatusCode(404 | 410)) => {
                Err(FetchError::Missing { what: what.into(), url: url.into() })
            }
            Err(error) => {
                Err(FetchError::Unreachable { what: what.into(), url: url.into(), source: Box::new(error) })
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
        let io = |source| FetchError::Io { what: what.into(), url: url.into(), source };
        let mut reader = self.open(what, url, expected.size)?.reader;
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

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::net::TcpListener;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::store::Store;

    /// Gives each connection the next of `answers` and closes it; the address, and what was asked for.
    fn serve(answers: Vec<Vec<u8>>) -> (String, thread::JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = format!("http://{}", listener.local_addr().expect("bound"));
        let server = thread::spawn(move || {
            let mut asked = Vec::new();
            for answer in answers {
                let (mut stream, _) = listener.accept().expect("a client");
                let mut lines = BufReader::new(stream.try_clone().expect("a descriptor")).lines();
                asked.push(lines.next().and_then(Result::ok).unwrap_or_default());
                while lines.next().and_then(Result::ok).is_some_and(|line| !line.is_empty()) {}
                // The client may hang up first.
                let _ = stream.write_all(&answer);
            }
            asked
        });
        (address, server)
    }

    fn ok(body: &[u8]) -> Vec<u8> {
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
        [head.as_bytes(), body].concat()
    }

    fn status(line: &str) -> Vec<u8> {
        format!("HTTP/1.1 {line}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").into_bytes()
    }

    struct Place {
        _folder: tempfile::TempDir,
        store: Store,
        client: Client,
    }

    fn place() -> Place {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path()).expect("a store");
        Place { _folder: folder, store, client: Client { first_pause: Duration::ZERO, ..Client::new() } }
    }

    fn expected(body: &[u8]) -> Expected {
        Expected { size: body.len() as u64, sha256: Digest::of(body) }
    }

    impl Place {
        fn fetch(&self, url: &str, expected: Expected) -> Result<(), FetchError> {
            self.client.fetch("a thing", &[format!("{url}/thing")], expected, self.store.blobs(), &|_| {})
        }

        fn is_clean(&self) -> bool {
            std::fs::read_dir(self.store.temporary()).expect("a folder").next().is_none()
        }
    }

    #[test]
    fn a_blob_with_the_right_digest_is_stored_once() {
        let place = place();
        let body = vec![9; 200_000];
        let (url, server) = serve(vec![ok(&body)]);
        let seen = AtomicU64::new(0);
        let progress = |bytes| {
            seen.fetch_add(bytes, Ordering::Relaxed);
        };
        let urls = [format!("{url}/thing")];
        let client = &place.client;
        client.fetch("a thing", &urls, expected(&body), place.store.blobs(), &progress).expect("fetched");
        assert_eq!(seen.load(Ordering::Relaxed), 200_000);
        assert_eq!(server.join().expect("served"), ["GET /thing HTTP/1.1"]);
        client.fetch("a thing", &urls, expected(&body), place.store.blobs(), &progress).expect("no network");
    }

    #[test]
    fn other_bytes_are_refused_and_nothing_of_them_stays() {
        let place = place();
        let (url, server) = serve(vec![ok(b"evil"), ok(b"evil and more"), ok(b"ev")]);
        let wanted = expected(b"good");
        let error = place.fetch(&url, wanted).expect_err("another digest");
        let text = error.to_string();
        assert!(text.contains(&wanted.sha256.to_string()) && text.contains(&Digest::of(b"evil").to_string()));
        assert!(matches!(place.fetch(&url, wanted), Err(FetchError::Size { expected: 4, .. })));
        assert!(matches!(place.fetch(&url, wanted), Err(FetchError::Size { found: 2, .. })));
        server.join().expect("served");
        assert!(!place.store.blobs().contains(&wanted.sha256));
        assert!(!place.store.blobs().contains(&Digest::of(b"evil")) && place.is_clean());
    }

    #[test]
    fn a_failure_that_may_pass_is_tried_again_and_one_that_will_not_is_not() {
        let place = place();
        let mut broken = ok(b"good");
        broken.truncate(broken.len() - 2);
        let (url, server) = serve(vec![status("503 Busy"), broken, ok(b"good")]);
        place.fetch(&url, expected(b"good")).expect("third time lucky");
        assert_eq!(server.join().expect("served").len(), 3);
        let (url, server) = serve(vec![status("404 None")]);
        assert!(matches!(place.fetch(&url, expected(b"other")), Err(FetchError::Missing { .. })));
        server.join().expect("served");
    }

    #[test]
    fn a_document_has_a_limit_and_the_next_mirror_is_tried() {
        let place = place();
        let (url, server) = serve(vec![ok(&[b'x'; 100])]);
        let error = place.client.get("an index", &[url], 99).expect_err("too long");
        assert!(matches!(error, FetchError::Size { expected: 99, .. }), "{error}");
        server.join().expect("served");
        let (url, server) = serve(vec![ok(b"index")]);
        let urls = ["file:///nowhere/index".to_owned(), url];
        assert_eq!(place.client.get("an index", &urls, 99).expect("the second"), b"index");
        server.join().expect("served");
    }

    #[test]
    fn redirects_end_and_never_leave_http() {
        let place = place();
        let to = |target: &str| {
            format!(
                "HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            )
            .into_bytes()
        };
        let (url, server) = serve(vec![to("file:///etc/passwd")]);
        assert!(place.client.get("x", &[url], 9999).is_err());
        server.join().expect("served");
        let (url, server) = serve(vec![to("/again"); 9]);
        assert!(place.client.get("x", &[format!("{url}/")], 9999).is_err());
        server.join().expect("served");
    }

    #[test]
    fn without_a_network_the_error_says_what_was_wanted_and_the_way_out() {
        let place = place();
        let error = place.fetch("http://127.0.0.1:9", expected(b"good")).expect_err("nobody listens");
        assert!(error.to_string().contains("a thing") && error.hint().is_some());
        let error = place.client.get("an index", &[], 10).expect_err("no mirror");
        assert!(matches!(error, FetchError::NoSource { .. }));
        assert!(matches!(place.client.get("x", &["ftp://h/x".into()], 10), Err(FetchError::Url { .. })));
    }
}
