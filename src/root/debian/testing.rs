//! A small signed archive for tests: packages, indexes and a Release, made as an archive's owner makes them.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use jiff::Timestamp;
use kiln_artifact::tree::Tree;
use kiln_digest::Digest;
use kiln_openpgp::testing::{SignOptions, TestKey};
use tempfile::TempDir;

use super::{Archive, ArchiveError, ArchiveSettings, DebianSpec};
use crate::fetch::http::Client;
use crate::store::Store;

/// An ar archive of `members`.
pub(super) fn ar(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut bytes = b"!<arch>\n".to_vec();
    for (name, content) in members {
        let header = format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n", 0, 0, 0, 100_644, content.len());
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(content);
        if content.len() % 2 == 1 {
            bytes.push(b'\n');
        }
    }
    bytes
}

/// What a member of a tar archive is.
#[derive(Debug, Clone, Copy)]
pub(super) enum File<'a> {
    /// A folder with its mode.
    Folder(u32),
    /// A file with its mode.
    Plain(u32, &'a [u8]),
    /// A symbolic link.
    Symlink(&'a str),
    /// A hard link to an earlier member.
    Link(&'a str),
}

/// A tar archive of `files`.
pub(super) fn tar_of(files: &[(&str, File<'_>)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, file) in files {
        let mut header = tar::Header::new_gnu();
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(7);
        let (kind, mode, bytes, link) = match *file {
            File::Folder(mode) => (tar::EntryType::Directory, mode, &b""[..], None),
            File::Plain(mode, bytes) => (tar::EntryType::Regular, mode, bytes, None),
            File::Symlink(target) => (tar::EntryType::Symlink, 0o777, &b""[..], Some(target)),
            File::Link(target) => (tar::EntryType::Link, 0o644, &b""[..], Some(target)),
        };
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(bytes.len() as u64);
        match link {
            Some(target) => builder.append_link(&mut header, name, target).expect("memory"),
            None => builder.append_data(&mut header, name, bytes).expect("memory"),
        }
    }
    builder.into_inner().expect("memory")
}

/// A package of `control`, with `control_files` and `data` beside it.
pub(super) fn deb(control: &str, control_files: &[(&str, File<'_>)], data: &[(&str, File<'_>)]) -> Vec<u8> {
    let mut members =
        vec![("./", File::Folder(0o755)), ("./control", File::Plain(0o644, control.as_bytes()))];
    members.extend_from_slice(control_files);
    let compress = |tar: Vec<u8>| zstd::encode_all(&tar[..], 1).expect("memory");
    let (control, data) = (compress(tar_of(&members)), compress(tar_of(data)));
    ar(&[("debian-binary", b"2.0\n"), ("control.tar.zst", &control), ("data.tar.zst", &data)])
}

/// A signed archive of one suite in a folder of its own, and a store beside it.
pub(super) struct TestArchive {
    folder: TempDir,
    /// Who signs it.
    pub(super) key: TestKey,
    /// The text of its package index.
    pub(super) index: String,
    /// The Release's date, in seconds since the epoch.
    pub(super) date: i64,
    /// How long the Release is valid.
    pub(super) valid_seconds: Option<i64>,
}

/// The suite of every test archive.
pub(super) const SUITE: &str = "testing";

/// A root of the suite: `packages` as they follow its name.
pub(super) fn spec(packages: &str) -> DebianSpec {
    format!("debian:{SUITE}{packages}").parse().expect("a spec")
}
/// When tests take place: in seconds since the epoch.
pub(super) fn now() -> i64 {
    Timestamp::now().as_second()
}

impl TestArchive {
    pub(super) fn new() -> Self {
        Self {
            folder: tempfile::tempdir().expect("a folder"),
            key: TestKey::generate(),
            index: String::new(),
            date: now() - 3600,
            valid_seconds: None,
        }
    }

    pub(super) fn path(&self, path: &str) -> PathBuf {
        self.folder.path().join("archive").join(path)
    }

    pub(super) fn write(&self, path: &str, bytes: &[u8]) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        fs::write(path, bytes).expect("written");
    }

    /// Adds a package; `fields` are the control fields after `Package`, `Version` and `Architecture`.
    pub(super) fn add(
        &mut self,
        name: &str,
        fields: &str,
        control_files: &[(&str, File<'_>)],
        data: &[(&str, File<'_>)],
    ) {
        let control = format!("Package: {name}\nVersion: 1-1\nArchitecture: amd64\n{fields}");
        let bytes = deb(&control, control_files, data);
        self.add_bytes(name, &control, &bytes);
    }

    /// Adds a package whose index says `control`, whatever `bytes` hold.
    pub(super) fn add_bytes(&mut self, name: &str, control: &str, bytes: &[u8]) {
        let path = format!("pool/main/{name}_1-1_amd64.deb");
        self.write(&path, bytes);
        let (size, digest) = (bytes.len(), Digest::of(bytes));
        let _ = write!(self.index, "{control}Filename: {path}\nSize: {size}\nSHA256: {digest}\n\n");
    }

    /// The Release of the index as it stands, and the index's file.
    pub(super) fn release(&self) -> String {
        let plain = self.index.as_bytes();
        let packed = zstd::encode_all(plain, 1).expect("memory");
        let folder = "main/binary-amd64";
        self.write(&format!("dists/{SUITE}/{folder}/Packages.zst"), &packed);
        let time = |seconds: i64| {
            let time = Timestamp::from_second(seconds).expect("a time");
            time.strftime("%a, %d %b %Y %H:%M:%S UTC").to_string()
        };
        let valid = self.valid_seconds.map(|valid| format!("Valid-Until: {}\n", time(self.date + valid)));
        let (date, valid) = (time(self.date), valid.unwrap_or_default());
        let line =
            |name: &str, bytes: &[u8]| format!(" {} {} {folder}/{name}\n", Digest::of(bytes), bytes.len());
        let files = [line("Packages", plain), line("Packages.zst", &packed)].concat();
        format!("Suite: {SUITE}\nCodename: test\nDate: {date}\n{valid}Architectures: amd64\nSHA256:\n{files}")
    }

    /// Writes index and InRelease.
    pub(super) fn publish(&self) {
        let signed = self.key.sign_cleartext(&self.release(), SignOptions::default());
        self.write(&format!("dists/{SUITE}/InRelease"), &signed);
    }

    /// What `packages` resolve to, fetched and unpacked.
    pub(super) fn unpack(&self, packages: &str) -> Result<Tree, ArchiveError> {
        let archive = self.open();
        let locked = archive.resolve(&spec(packages), None).expect("resolved");
        archive.fetch(&locked, &|_| {}).expect("fetched");
        archive.unpack(&locked)
    }

    pub(super) fn store(&self) -> Store {
        Store::open(&self.folder.path().join("store")).expect("a store")
    }

    /// The archive as kiln sees it through a file:// mirror.
    pub(super) fn open(&self) -> Archive {
        self.open_at(&format!("file://{}", self.path("").display()))
    }

    /// The archive as kiln sees it at `mirror`.
    pub(super) fn open_at(&self, mirror: &str) -> Archive {
        let keyring = self.folder.path().join("keyring.gpg");
        fs::write(&keyring, self.key.public()).expect("written");
        let settings = ArchiveSettings {
            mirror: Some(mirror.to_owned()),
            keyring: Some(keyring),
            host_root: self.folder.path().to_owned(),
            ..ArchiveSettings::default()
        };
        Archive::new(settings, Client::new(), &self.store(), Timestamp::from_second(now()).expect("a time"))
    }
}
