//! What `ci/bench artifacts` times of kiln's: one artifact from a folder or a file, and the seconds it took.
//!
//! usage: bench-artifacts squashfs FOLDER IMAGE CODEC LEVEL BLOCK_BYTES
//!        bench-artifacts verity DATA HASHES
//!        bench-artifacts uki STUB KERNEL INITRD IMAGE
//!        bench-artifacts sign IMAGE KEY CERTIFICATE SIGNED
#![expect(clippy::print_stdout, reason = "what it is for")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use kiln_artifact::squashfs::{self, Codec};
use kiln_artifact::tree::{Contents, Kind, Meta, Node, Timestamp, Tree, TreePath};
use kiln_artifact::uefi::Signer;
use kiln_artifact::uefi::authenticode::{Others, Request};
use kiln_artifact::uefi::pe::Image;
use kiln_artifact::uefi::uki;
use kiln_artifact::verity;
use kiln_digest::Digest;
use rsa::pkcs1v15::SigningKey;
use rsa::pkcs8::DecodePrivateKey as _;
use rsa::signature::{SignatureEncoding as _, Signer as _};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["squashfs", folder, image, codec, level, block_bytes] => {
            let codec = match codec {
                "gzip" => Codec::Gzip { level: level.parse()? },
                "zstd" => Codec::Zstd { level: level.parse()? },
                "xz" => Codec::Xz { level: level.parse()? },
                "lz4" => Codec::Lz4,
                other => return Err(format!("no codec `{other}`").into()),
            };
            let mut found = Found { tree: Tree::new(), files: Files::default() };
            found.folder(Path::new(folder), &TreePath::root())?;
            let options = squashfs::Options {
                codec,
                block_bytes: block_bytes.parse()?,
                ..squashfs::Options::default()
            };
            timed(
                || Ok(squashfs::write(&found.tree, &found.files, File::create(image)?, &options).map(drop)?),
            )
        }
        ["verity", data, hashes] => {
            let data = File::open(data)?;
            // What the data is, the store knows.
            let parameters = verity::Parameters::derived(&Digest::of(b"bench"));
            timed(|| Ok(verity::write(&data, &parameters, File::create(hashes)?).map(drop)?))
        }
        ["uki", stub, kernel, initrd, image] => timed(|| {
            let (stub, kernel, initrd) = (fs::read(stub)?, fs::read(kernel)?, fs::read(initrd)?);
            let parts = uki::Parts {
                os_release: Some(b"ID=bench\n"),
                release: None,
                command_line: "quiet",
                kernel: &kernel,
                initrds: &[&initrd],
                sbat: None,
            };
            Ok(fs::write(image, uki::write(&stub, &parts)?)?)
        }),
        ["sign", image, key, certificate, signed] => {
            let signer = Signer::from_pem(&fs::read(certificate)?)?;
            let key = rsa::PrivateKey::from_pkcs8_pem(&fs::read_to_string(key)?)?;
            let key = SigningKey::<sha2::Sha256>::new(key);
            timed(|| {
                let bytes = fs::read(image)?;
                let image = Image::parse(&bytes)?;
                let request = Request::new(&image, &signer)?;
                let signature = key.try_sign(request.to_be_signed())?.to_vec();
                Ok(fs::write(signed, request.attach(&signature, Others::Keep)?)?)
            })
        }
        _ => Err("see the head of ci/bench-artifacts.rs".into()),
    }
}

/// Prints how long `work` took. What is before it is what kiln's store has done before a step.
fn timed(work: impl FnOnce() -> Outcome<()>) -> Outcome<()> {
    let start = Instant::now();
    work()?;
    println!("{:.3}", start.elapsed().as_secs_f64());
    Ok(())
}

/// Where contents are.
#[derive(Default)]
struct Files(BTreeMap<Digest, PathBuf>);

impl Contents for Files {
    fn open(&self, digest: &Digest) -> io::Result<Box<dyn Read + '_>> {
        let path = self.0.get(digest).ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(File::open(path)?))
    }
}

struct Found {
    tree: Tree,
    files: Files,
}

impl Found {
    fn folder(&mut self, on_disk: &Path, folder: &TreePath) -> Outcome<()> {
        for entry in fs::read_dir(on_disk)? {
            let entry = entry?;
            let path = folder.join(entry.file_name().as_bytes())?;
            let metadata = fs::symlink_metadata(entry.path())?;
            let meta = Meta {
                mode: u16::try_from(metadata.mode() & 0o7777)?,
                uid: metadata.uid(),
                gid: metadata.gid(),
                mtime: Timestamp { seconds: metadata.mtime(), nanoseconds: 0 },
                xattrs: BTreeMap::new(),
            };
            let kind = if metadata.is_dir() {
                Kind::Directory
            } else if metadata.is_symlink() {
                Kind::Symlink(fs::read_link(entry.path())?.as_os_str().as_bytes().into())
            } else if metadata.is_file() {
                let (digest, size) = Digest::of_reader(File::open(entry.path())?)?;
                self.files.0.insert(digest, entry.path());
                Kind::File { digest, size }
            } else {
                continue;
            };
            let is_folder = kind == Kind::Directory;
            self.tree.insert(path.clone(), Node { kind, meta });
            if is_folder {
                self.folder(&entry.path(), &path)?;
            }
        }
        Ok(())
    }
}
