//! A small signed Debian archive, and servers that give it out.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;

use jiff::Timestamp;
use kiln_digest::Digest;
use kiln_openpgp::testing::{SignOptions, TestKey};

use super::super::folder::Folder;

/// The suite that it has.
pub const SUITE: &str = "testing";

/// The archive, in a folder: `dists` and `pool`.
pub struct Archive {
    folder: Folder,
    key: TestKey,
    packages: BTreeMap<String, (String, String, Vec<u8>)>,
    date: i64,
}

impl Archive {
    pub fn new() -> Self {
        let date = Timestamp::now().as_second() - 10 * 24 * 3600;
        let (folder, key) = (Folder::new(), TestKey::generate());
        folder.file("keyring.gpg", key.public());
        Self { folder, key, packages: BTreeMap::new(), date }
    }

    pub fn root(&self) -> &Path {
        self.folder.root()
    }

    /// The file of keys that it is signed by.
    pub fn keyring(&self) -> PathBuf {
        self.folder.path("keyring.gpg")
    }

    /// Puts `name` in `version` into the pool, in place of another version of it in the index. The pool keeps that.
    pub fn add(&mut self, name: &str, version: &str, fields: &str, bytes: &[u8]) {
        let path = format!("pool/main/{name}_{version}_amd64.deb");
        self.folder.file(&path, bytes);
        let fields = format!("Version: {version}\nArchitecture: amd64\n{fields}");
        self.packages.insert(name.to_owned(), (fields, path, bytes.to_vec()));
    }

    pub fn remove(&mut self, name: &str) {
        self.packages.remove(name);
    }

    /// Where the file of a package lies.
    pub fn pool(&self, name: &str, version: &str) -> PathBuf {
        self.folder.path(&format!("pool/main/{name}_{version}_amd64.deb"))
    }

    /// Writes and signs the indexes, a day younger than the last ones.
    pub fn publish(&mut self) {
        self.date += 24 * 3600;
        let mut index = String::new();
        for (name, (fields, path, bytes)) in &self.packages {
            let digest = Digest::of(bytes);
            index += &format!(
                "Package: {name}\n{fields}Filename: {path}\nSize: {}\nSHA256: {digest}\n\n",
                bytes.len()
            );
        }
        let file = "main/binary-amd64/Packages";
        self.folder.file(&format!("dists/{SUITE}/{file}"), &index);
        let date = Timestamp::from_second(self.date).expect("a time");
        let release = format!(
            "Suite: {SUITE}\nCodename: test\nDate: {}\nArchitectures: amd64\nSHA256:\n {} {} {file}\n",
            date.strftime("%a, %d %b %Y %H:%M:%S UTC"),
            Digest::of(index.as_bytes()),
            index.len()
        );
        let signed = self.key.sign_cleartext(&release, SignOptions::default());
        self.folder.file(&format!("dists/{SUITE}/InRelease"), signed);
    }
}

/// A server of the files below a folder.
pub struct Server {
    pub url: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Server {
    /// Gives out `root`; a path that `lacks` names is not there.
    pub fn new(root: &Path, lacks: impl Fn(&str) -> bool + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (root, noted) = (root.to_owned(), Arc::clone(&asked));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let mut lines = BufReader::new(stream.try_clone().expect("a descriptor")).lines();
                let line = lines.next().and_then(Result::ok).unwrap_or_default();
                while lines.next().and_then(Result::ok).is_some_and(|line| !line.is_empty()) {}
                let path = line.split(' ').nth(1).unwrap_or("/").to_owned();
                noted.lock().expect("a test").push(path.clone());
                let body = fs::read(root.join(path.trim_start_matches('/'))).ok().filter(|_| !lacks(&path));
                let (status, body) = body.map_or(("404 Not Found", Vec::new()), |body| ("200 OK", body));
                let length = body.len();
                let head =
                    format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
                let _ = (&stream).write_all(&[head.as_bytes(), &body].concat());
            }
        });
        Self { url, asked }
    }

    /// The paths that were asked for since the last time.
    pub fn asked(&self) -> Vec<String> {
        std::mem::take(&mut *self.asked.lock().expect("a test"))
    }
}
