//! The client against servers that follow a script, and against none.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::store::Store;

/// The way of every test: connections by number, each served by `answer`.
fn serve_by(
    count: usize,
    answer: impl Fn(usize, &mut std::net::TcpStream) + Send + 'static,
) -> (String, thread::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = format!("http://{}", listener.local_addr().expect("bound"));
    let server = thread::spawn(move || {
        for number in 0..count {
            let (mut stream, _) = listener.accept().expect("a client");
            let mut lines = BufReader::new(stream.try_clone().expect("a descriptor")).lines();
            while lines.next().and_then(Result::ok).is_some_and(|line| !line.is_empty()) {}
            answer(number, &mut stream);
        }
    });
    (address, server)
}

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
        // But for the file that says since when the store is used.
        let mut names = std::fs::read_dir(self.store.temporary()).expect("a folder").flatten();
        names.all(|entry| entry.file_name().as_encoded_bytes().starts_with(b".since"))
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
fn a_blob_that_is_damaged_is_fetched_again_at_once() {
    let place = place();
    let body = b"the whole thing".to_vec();
    let (url, asked) = serve(vec![ok(&body)]);
    let wanted = expected(&body);
    place.store.blobs().put(&body[..]).expect("room");
    let path = place.store.blobs().path(&wanted.sha256);
    std::fs::remove_file(&path).expect("there");
    // As long as it was.
    std::fs::write(&path, b"the whole thin!").expect("room");
    place.fetch(&url, wanted).expect("fetched");
    assert_eq!(std::fs::read(&path).expect("there"), body);
    assert_eq!(place.store.take_damage().len(), 1);
    assert_eq!(asked.join().expect("no panic").len(), 1);
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
        format!("HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
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

#[test]
fn what_drips_is_given_up_however_long_it_would_go_on() {
    let mut place = place();
    place.client.slowest = Pace { grace: Duration::from_millis(300), bytes_per_second: 1 << 20 };
    // As many bytes as the client takes, one at a time: it must hang up, or this never ends.
    let (url, server) = serve_by(2, |_, stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n");
        while stream.write_all(b"x").is_ok() {}
    });
    let urls = [format!("{url}/drip")];
    let error =
        place.client.fetch_new("a drip", &urls, 1 << 40, None, place.store.blobs()).expect_err("slow");
    let FetchError::Slow { bytes, .. } = &error else { panic!("{error:?}") };
    assert!(*bytes > 0 && error.hint().is_some());
    let error = place.fetch(&url, Expected { size: 1 << 40, sha256: Digest::of(b"") }).expect_err("slow");
    assert!(matches!(error, FetchError::Slow { .. }), "{error:?}");
    server.join().expect("hung up on");
    assert!(place.is_clean());
}

#[test]
fn a_body_without_an_end_is_cut_at_what_it_may_be() {
    let place = place();
    let endless = |_: usize, stream: &mut std::net::TcpStream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
        while stream.write_all(b"10\r\n0123456789abcdef\r\n").is_ok() {}
    };
    let (url, server) = serve_by(3, endless);
    let urls = [format!("{url}/thing")];
    let error = place.client.fetch_new("it", &urls, 5000, None, place.store.blobs()).expect_err("endless");
    assert!(matches!(error, FetchError::Size { expected: 5000, found: 5001, .. }), "{error:?}");
    let error = place.client.get("it", &urls, 5000).expect_err("endless");
    assert!(matches!(error, FetchError::Size { expected: 5000, .. }), "{error:?}");
    let error = place.fetch(&url, expected(b"0123456789abcde")).expect_err("endless");
    assert!(matches!(error, FetchError::Size { expected: 15, .. }), "{error:?}");
    server.join().expect("hung up on");
    assert!(place.is_clean());
}

#[test]
fn a_length_that_lies_either_way_is_no_success() {
    let place = place();
    let lie = |length: usize| {
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
        [head.as_bytes(), b"good"].concat()
    };
    // Too long a length is a connection that broke: tried again. Too short a one gives other bytes.
    let (url, server) = serve(vec![lie(400), lie(400), lie(400)]);
    let urls = [format!("{url}/thing")];
    let error = place.client.fetch_new("it", &urls, 5000, None, place.store.blobs()).expect_err("cut off");
    assert!(matches!(error, FetchError::Io { .. }), "{error:?}");
    server.join().expect("served");
    let (url, server) = serve(vec![lie(2)]);
    let error = place.fetch(&url, expected(b"good")).expect_err("short");
    assert!(matches!(error, FetchError::Size { found: 2, .. }), "{error:?}");
    server.join().expect("served");
    assert!(!place.store.blobs().contains(&Digest::of(b"go")) && place.is_clean());
}

#[test]
fn a_digest_is_that_of_the_bytes_that_came_whatever_they_are_said_to_be() {
    let place = place();
    // A gzip stream of 1,000 zeros, said to be an encoding of the body.
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    packed.write_all(&[0; 1000]).expect("memory");
    let packed = packed.finish().expect("memory");
    let head =
        format!("HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {}\r\n\r\n", packed.len());
    let (url, server) = serve(vec![[head.as_bytes(), &packed].concat()]);
    place.fetch(&url, expected(&packed)).expect("as it was sent");
    server.join().expect("served");
}

#[test]
fn a_head_without_an_end_is_given_up() {
    let place = place();
    let (url, server) = serve_by(1, |_, stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n");
        while stream.write_all(format!("X-Y: {}\r\n", "z".repeat(1000)).as_bytes()).is_ok() {}
    });
    let error = place.client.get("it", &[url], 99).expect_err("no end");
    assert!(matches!(error, FetchError::Unreachable { .. }), "{error:?}");
    server.join().expect("hung up on");
}

#[test]
fn the_next_url_is_asked_where_one_lacks_it_or_gives_something_else() {
    let place = place();
    let (lacks, first) = serve(vec![status("404 None")]);
    let (lies, second) = serve(vec![ok(b"evil")]);
    let (has, third) = serve(vec![ok(b"good")]);
    let urls = [lacks, lies, has].map(|url| format!("{url}/thing"));
    place.client.fetch("a thing", &urls, expected(b"good"), place.store.blobs(), &|_| {}).expect("the third");
    for server in [first, second, third] {
        assert_eq!(server.join().expect("served").len(), 1);
    }
}

#[test]
fn offline_no_url_is_opened_whatever_is_asked_for() {
    let folder = tempfile::tempdir().expect("a folder");
    let place = place();
    let client = Client::new().offline();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.set_nonblocking(true).expect("ours");
    let file = folder.path().join("thing");
    std::fs::write(&file, "good").expect("room");
    let http = format!("http://{}/thing", listener.local_addr().expect("bound"));
    let urls = [http.clone(), format!("file://{}", file.display())];
    let wanted = expected(b"good");
    let blobs = place.store.blobs();
    let errors = [
        client.get("it", &urls, 9).map(drop),
        client.get_exactly("it", &urls, wanted).map(drop),
        client.fetch("it", &urls, wanted, blobs, &|_| {}),
        client.fetch_new("it", &urls, 9, Some(wanted.sha256), blobs).map(drop),
        client.probe("it", &http, Duration::from_secs(1)),
    ];
    for error in errors {
        let error = error.expect_err("offline");
        assert!(matches!(error, FetchError::Offline { .. }) && error.hint().is_some(), "{error:?}");
    }
    assert_eq!(listener.accept().map(drop).expect_err("nobody came").kind(), io::ErrorKind::WouldBlock);
}

#[test]
fn a_redirect_goes_to_http_at_most_and_not_for_ever() {
    let place = place();
    for target in ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:text/plain,x", "gopher://h/", "//"] {
        let head = format!(
            "HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
        // A target that is no URL may be tried again.
        let (url, _server) = serve(vec![head.into_bytes(); 3]);
        assert!(place.client.get("x", &[url], 9999).is_err(), "{target}");
    }
}
