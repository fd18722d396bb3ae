//! A binary package (deb(5)): an ar archive of `debian-binary`, `control.tar.*` and `data.tar.*`, in that order.
//!
//! Read in one pass, file contents going to a sink as they come. Stricter than dpkg: exactly these three members,
//! and nothing after them. Maintainer scripts are kept as bytes; nothing here runs any.

use std::collections::BTreeMap;
use std::io::{self, Read};

use kiln_artifact::archive::ContentSink;
use kiln_artifact::archive::tar::{self, Limits, TarError};
use kiln_artifact::tree::{Kind, Tree};
use kiln_digest::Digest;

use super::control::{self, ControlError};
use crate::root::decompress::{Compression, Limited};

const AR_MAGIC: &[u8] = b"!<arch>\n";
const AR_HEADER_BYTES: usize = 60;
/// Debian's largest control archive is some 5 MB (checksums of a package with many files).
const MAX_CONTROL_BYTES: u64 = 64 << 20;
const MAX_CONTROL_MEMBERS: u64 = 64;
/// Larger than any package of Debian's unpacked.
const MAX_DATA_BYTES: u64 = 16 << 30;
const MAX_DATA_MEMBERS: u64 = 2 << 20;
/// tar pads to whole records; what follows its end mark is never longer.
const MAX_PADDING_BYTES: u64 = 1 << 20;

/// Why a package cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum DebError {
    /// The file could not be read, or a part does not decompress.
    #[error("its {part} cannot be read")]
    Read {
        /// Which part.
        part: &'static str,
        /// What reading said.
        #[source]
        source: io::Error,
    },
    /// The outer archive is not as it must be.
    #[error("it is no Debian package: {0}")]
    Layout(&'static str),
    /// A tar archive in it is not sound.
    #[error("its {part}")]
    Tar {
        /// Which part.
        part: &'static str,
        /// What is wrong.
        #[source]
        source: TarError,
    },
    /// The control file is not control data.
    #[error("its control file")]
    Control(#[from] ControlError),
    /// The control file lacks a field.
    #[error("its control file has no `{0}`")]
    Field(&'static str),
}

/// A file beside the control file: a script, a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlFile {
    /// Permission bits.
    pub mode: u16,
    /// What is in it.
    pub bytes: Vec<u8>,
}

/// A package, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deb {
    /// The control file: one paragraph.
    pub control: String,
    /// What else the control archive holds, by name.
    pub control_files: BTreeMap<String, ControlFile>,
    /// The files to unpack; what is in them went to the sink.
    pub data: Tree,
}

impl Deb {
    /// Reads a package. Contents go to `sink`.
    ///
    /// # Errors
    /// [`DebError`], as its variants say.
    pub fn read(reader: impl Read, sink: &mut dyn ContentSink) -> Result<Self, DebError> {
        let mut ar = Ar::open(reader)?;
        let mut version = String::new();
        let (name, size) = ar.next()?.ok_or(DebError::Layout("it is empty"))?;
        if name != "debian-binary" || size > 64 {
            return Err(DebError::Layout("it does not begin with `debian-binary`"));
        }
        let read = ar.member(size).read_to_string(&mut version);
        read.map_err(|source| DebError::Read { part: "`debian-binary`", source })?;
        ar.end_member(size)?;
        if !version.starts_with("2.") {
            return Err(DebError::Layout("its format is not version 2"));
        }
        let mut contents = BTreeMap::new();
        let limits = Limits { members: MAX_CONTROL_MEMBERS, content_bytes: MAX_CONTROL_BYTES };
        let tree = ar.tar("control.tar", "control archive", &mut contents, &limits)?;
        let (control, control_files) = control_files(&tree, &mut contents)?;
        let limits = Limits { members: MAX_DATA_MEMBERS, content_bytes: MAX_DATA_BYTES };
        let data = ar.tar("data.tar", "data archive", sink, &limits)?;
        if ar.next()?.is_some() {
            return Err(DebError::Layout("there is something after its data archive"));
        }
        Ok(Self { control, control_files, data })
    }

    /// The control field `name`.
    ///
    /// # Errors
    /// [`DebError::Field`] where it is missing, [`DebError::Control`].
    pub fn field(&self, name: &'static str) -> Result<&str, DebError> {
        self.optional_field(name)?.ok_or(DebError::Field(name))
    }

    /// The control field `name`, if it is there.
    ///
    /// # Errors
    /// [`DebError::Control`].
    pub fn optional_field(&self, name: &str) -> Result<Option<&str>, DebError> {
        match control::paragraphs(&self.control).next() {
            Some(paragraph) => Ok(paragraph.field(name)?),
            None => Ok(None),
        }
    }

    /// The lines of the control file `name` as text; none where there is no such file.
    pub fn lines(&self, name: &str) -> impl Iterator<Item = &str> {
        let bytes = self.control_files.get(name).map_or(&[][..], |file| &file.bytes);
        std::str::from_utf8(bytes)
            .unwrap_or_default()
            .lines()
            .map(str::trim_end)
            .filter(|line| !line.is_empty())
    }
}

fn control_files(
    tree: &Tree,
    contents: &mut BTreeMap<Digest, Vec<u8>>,
) -> Result<(String, BTreeMap<String, ControlFile>), DebError> {
    let mut files = BTreeMap::new();
    for (path, node) in tree.iter().filter(|(path, _)| !path.is_root()) {
        let Kind::File { digest, .. } = &node.kind else {
            return Err(DebError::Layout("its control archive holds something else than files"));
        };
        let name = std::str::from_utf8(path.as_bytes()).ok().filter(|name| is_control_name(name));
        let name = name.ok_or(DebError::Layout("its control archive holds a file with a strange name"))?;
        let bytes = contents.get(digest).cloned().unwrap_or_default();
        files.insert(name.to_owned(), ControlFile { mode: node.meta.mode & 0o777, bytes });
    }
    let control =
        files.remove("control").ok_or(DebError::Layout("its control archive holds no control file"))?;
    let control =
        String::from_utf8(control.bytes).map_err(|_| DebError::Layout("its control file is not text"))?;
    if control::paragraphs(&control).count() != 1 {
        return Err(DebError::Layout("its control file is not one paragraph"));
    }
    Ok((control, files))
}

/// A name that becomes part of a file's name in dpkg's database.
fn is_control_name(name: &str) -> bool {
    name.len() <= 50 && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
}

/// The outer archive.
struct Ar<R> {
    reader: R,
}

impl<R: Read> Ar<R> {
    fn open(mut reader: R) -> Result<Self, DebError> {
        let mut magic = [0; AR_MAGIC.len()];
        reader.read_exact(&mut magic).map_err(|source| DebError::Read { part: "beginning", source })?;
        if magic != *AR_MAGIC {
            return Err(DebError::Layout("it is not an ar archive"));
        }
        Ok(Self { reader })
    }

    /// The next member's name and size in bytes.
    fn next(&mut self) -> Result<Option<(String, u64)>, DebError> {
        let failed = |source| DebError::Read { part: "member list", source };
        let mut header = Vec::new();
        (&mut self.reader).take(AR_HEADER_BYTES as u64).read_to_end(&mut header).map_err(failed)?;
        if header.is_empty() {
            return Ok(None);
        }
        if header.len() < AR_HEADER_BYTES || !header.ends_with(b"`\n") {
            return Err(DebError::Layout("a member has no good header"));
        }
        let text = |range: std::ops::Range<usize>| {
            std::str::from_utf8(&header[range]).ok().map(|text| text.trim_end_matches(' '))
        };
        let size = text(48..58).filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()));
        let size = size.and_then(|digits| digits.parse().ok());
        match (text(0..16), size) {
            (Some(name), Some(size)) => Ok(Some((name.strip_suffix('/').unwrap_or(name).to_owned(), size))),
            _ => Err(DebError::Layout("a member has no good header")),
        }
    }

    fn member(&mut self, size: u64) -> io::Take<&mut R> {
        (&mut self.reader).take(size)
    }

    /// Passes over the byte that makes a member's length even.
    fn end_member(&mut self, size: u64) -> Result<(), DebError> {
        if size % 2 == 1 {
            let mut padding = [0];
            match self.reader.read_exact(&mut padding) {
                Ok(()) if padding == *b"\n" => {}
                Ok(()) => return Err(DebError::Layout("a member has no good padding")),
                // dpkg-deb leaves the padding of the last member out.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
                Err(source) => return Err(DebError::Read { part: "member list", source }),
            }
        }
        Ok(())
    }

    /// Reads the next member, which must be the tar archive `wanted`, compressed somehow.
    fn tar(
        &mut self,
        wanted: &str,
        part: &'static str,
        sink: &mut dyn ContentSink,
        limits: &Limits,
    ) -> Result<Tree, DebError> {
        let failed = |source| DebError::Read { part, source };
        let (name, size) = self.next()?.ok_or(DebError::Layout("a member is missing"))?;
        let (compression, stem) = Compression::of_name(&name);
        if stem != wanted {
            return Err(DebError::Layout(if stem == "data.tar" || stem == "control.tar" {
                "its members are not in order"
            } else {
                "it has a member that is neither control.tar nor data.tar, compressed by gz, xz or zst"
            }));
        }
        let mut member = self.member(size);
        let tree = {
            // Headers and padding come on top of the contents.
            let limit = limits.content_bytes + limits.members * 2048;
            let mut reader = Limited::new(compression.reader(&mut member).map_err(failed)?, limit);
            let tree =
                tar::read(&mut reader, sink, limits).map_err(|source| DebError::Tar { part, source })?;
            // To the end, where the decompressor compares its checksum.
            let padding =
                io::copy(&mut (&mut reader).take(MAX_PADDING_BYTES), &mut io::sink()).map_err(failed)?;
            if padding == MAX_PADDING_BYTES {
                return Err(DebError::Layout("there is something after the end of a tar archive in it"));
            }
            tree
        };
        if member.limit() != 0 {
            return Err(DebError::Layout(
                "a member is shorter than its header says, or has something after it",
            ));
        }
        self.end_member(size)?;
        Ok(tree)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{File, ar, tar_of};
    use super::*;

    const CONTROL: &[u8] = b"Package: hello\nVersion: 1-1\nArchitecture: amd64\nDescription: x\n";

    fn parts() -> (Vec<u8>, Vec<u8>) {
        let control = tar_of(&[
            ("./", File::Folder(0o755)),
            ("./control", File::Plain(0o644, CONTROL)),
            ("./postinst", File::Plain(0o755, b"#!/bin/sh\n")),
            ("./conffiles", File::Plain(0o644, b"/etc/hello\n\n")),
        ]);
        let data = tar_of(&[
            ("./", File::Folder(0o755)),
            ("./bin/", File::Folder(0o755)),
            ("./bin/hello", File::Plain(0o4755, b"hello")),
            ("./etc/", File::Folder(0o755)),
            ("./etc/hello", File::Plain(0o644, b"x=1\n")),
        ]);
        (zstd::encode_all(&control[..], 1).expect("memory"), zstd::encode_all(&data[..], 1).expect("memory"))
    }

    fn read(bytes: &[u8]) -> Result<Deb, DebError> {
        Deb::read(bytes, &mut BTreeMap::new())
    }

    #[test]
    fn a_package_reads() {
        let (control, data) = parts();
        let deb = ar(&[("debian-binary", b"2.0\n"), ("control.tar.zst", &control), ("data.tar.zst", &data)]);
        let mut sink = BTreeMap::new();
        let deb = Deb::read(&deb[..], &mut sink).expect("a package");
        assert_eq!(deb.field("Package").expect("there"), "hello");
        assert!(deb.field("Section").is_err());
        assert_eq!(deb.control_files["postinst"].mode, 0o755);
        assert_eq!(deb.lines("conffiles").collect::<Vec<_>>(), ["/etc/hello"]);
        let path = kiln_artifact::tree::TreePath::new(b"bin/hello").expect("a path");
        assert_eq!(deb.data.get(&path).expect("there").meta.mode, 0o4755);
        assert!(sink.values().any(|bytes| bytes == b"hello"));
    }

    #[test]
    fn other_layouts_are_refused() {
        let (control, data) = parts();
        let (c, d) = (("control.tar.zst", &control[..]), ("data.tar.zst", &data[..]));
        let binary = ("debian-binary", &b"2.0\n"[..]);
        for members in [
            vec![],
            vec![binary],
            vec![binary, c],
            vec![binary, d, c],
            vec![binary, c, c],
            vec![c, d],
            vec![binary, c, d, d],
            vec![binary, c, c, d],
            vec![binary, ("_gpg", b"x"), c, d],
            vec![("debian-binary", b"3.0\n"), c, d],
            vec![binary, ("control.tar.bz2", &control), d],
            vec![binary, ("control.tar", &control), d],
            vec![binary, c, ("data.tar.xz", &data)],
        ] {
            assert!(read(&ar(&members)).is_err(), "{members:?}");
        }
        let script = tar_of(&[
            ("./control", File::Plain(0o644, CONTROL)),
            ("./a/", File::Folder(0o755)),
            ("./a/b", File::Plain(0o644, b"")),
        ]);
        assert!(read(&ar(&[binary, ("control.tar", &script), d])).is_err());
        let none = tar_of(&[("./postinst", File::Plain(0o644, b""))]);
        assert!(read(&ar(&[binary, ("control.tar", &none), d])).is_err());
        assert!(read(b"").is_err());
        assert!(read(b"!<arch>\n").is_err());
    }

    #[test]
    fn flipped_and_truncated_packages_never_panic_and_truncated_ones_never_read() {
        let (control, data) = parts();
        let good = ar(&[("debian-binary", b"2.0\n"), ("control.tar.zst", &control), ("data.tar.zst", &data)]);
        for position in 0..good.len() {
            // The padding of the last member may be left out.
            let only_padding_is_gone = data.len() % 2 == 1 && position == good.len() - 1;
            assert!(read(&good[..position]).is_err() || only_padding_is_gone, "{position}");
            for bit in [0, 3, 7] {
                let mut changed = good.clone();
                changed[position] ^= 1 << bit;
                let _ = read(&changed);
            }
        }
    }
}
