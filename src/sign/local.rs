//! /local of the initrd: the hashes of images, who may log in, and the owner's configuration, as the archive that comes last.
//!
//! What is in it goes into every image that is signed, and on every partition that the image is put on: nothing private
//! of the keys does. The archive depends on contents, names and permissions alone.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use kiln_artifact::cpio::{self, CpioError, Encoding, Options};
use kiln_artifact::tree::{Builder, Kind, Meta, Node, PathError, TreeError, TreePath};
use kiln_digest::Digest;
use rustix::fs::FileType;

use super::KEYS;
use super::folder::{Folder, FolderError};
use super::keys::{KeyError, Keys};

/// It is unpacked into memory before anything else runs.
const BYTES_MAX: u64 = 256 << 20;
/// Every kernel that unpacks an initrd knows gzip.
const ENCODING: Encoding = Encoding::Gzip { level: 9 };
const ALL: &str = "local";
const HOSTS: &str = "hosts";

/// Why there is no /local.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// A file or folder.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// What the set of keys gives.
    #[error(transparent)]
    Keys(#[from] KeyError),
    /// A folder that was named and holds nothing that is looked for.
    #[error("`{0}` has neither `local` nor `hosts`, and is no folder of configuration")]
    Nothing(PathBuf),
    /// A host that is no name of a folder.
    #[error("{0:?} is no name of a host")]
    Host(String),
    /// A node that is no file, folder or link.
    #[error("`{path}` is {what}, and configuration is files, folders and links")]
    Special {
        /// The node.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// A link that leaves /local.
    #[error("the link `{path}` leads out of the configuration (to `{text}`)")]
    Link {
        /// The link.
        path: PathBuf,
        /// Where to.
        text: String,
    },
    /// A name of a hash, by which the initrd would open another image than the one that was verified.
    #[error("`{0}` would take the place of a verified root hash")]
    Hash(PathBuf),
    /// A private key, or the folder of keys.
    #[error("`{path}` {what}, and signing keys go into no image")]
    Private {
        /// The file.
        path: PathBuf,
        /// What it has or is.
        what: String,
    },
    /// Too much.
    #[error("the configuration is longer than {BYTES_MAX} bytes")]
    TooLong,
    /// A path longer than Linux has.
    #[error("`{path}` cannot be in an initrd")]
    Path {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: PathError,
    },
    /// Names that are no tree.
    #[error("the configuration is no tree of files")]
    Tree(#[from] TreeError),
    /// The archive.
    #[error("the configuration cannot be archived")]
    Archive(#[from] CpioError),
}

impl LocalError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Folder(error) => error.hint(),
            Self::Keys(error) => error.hint(),
            Self::Private { .. } => Some("take it out: keys stay in SECRETS/uefi-keys alone".to_owned()),
            Self::Nothing(_) => {
                Some("files for all hosts are in DIR/local, for one in DIR/hosts/HOST/local".to_owned())
            }
            Self::Link { .. } => Some("make it relative, and to something in local".to_owned()),
            Self::Hash(_) => Some("rename it: hashes come from the images that the build left".to_owned()),
            _ => None,
        }
    }
}

/// Where a file of /local came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// SECRETS/uefi-keys, its public part.
    Keys,
    /// What all hosts have.
    All,
    /// What the host has.
    Host,
}

/// What /local has beside hashes: read once, and the same for every kernel.
#[derive(Debug)]
pub struct Local<'a> {
    keys: Option<&'a Keys>,
    builder: Builder,
    contents: BTreeMap<Digest, Vec<u8>>,
    origins: BTreeMap<TreePath, Origin>,
    bytes_left: u64,
    /// Whether a host was named of which nothing is known.
    pub is_host_unknown: bool,
}

impl<'a> Local<'a> {
    /// Reads the configuration below `config`, or below `secrets` where none is named, for `host`. Without `keys`, which a
    /// look ahead may lack, what they give is left out.
    ///
    /// # Errors
    /// [`LocalError`].
    pub fn read(
        secrets: &Path,
        config: Option<&Path>,
        host: Option<&str>,
        keys: Option<&'a Keys>,
    ) -> Result<Self, LocalError> {
        let mut local = Self {
            keys,
            builder: Builder::new(),
            contents: BTreeMap::new(),
            origins: BTreeMap::new(),
            bytes_left: BYTES_MAX,
            is_host_unknown: false,
        };
        let top = TreePath::new(b"local").map_err(|source| LocalError::Path { path: ALL.into(), source })?;
        local.builder.put(top.clone(), Node { kind: Kind::Directory, meta: meta(0o755) });
        for (name, bytes) in keys.map(Keys::local).transpose()?.into_iter().flatten() {
            let path = top.join(name.as_bytes());
            let path = path.map_err(|source| LocalError::Path { path: name.into(), source })?;
            local.put_file(path, bytes, 0o644, Origin::Keys);
        }
        let folder = match config {
            Some(config) => Folder::open(config)?,
            None => match Folder::open(secrets) {
                Err(FolderError::System { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                    local.is_host_unknown = host.is_some();
                    return Ok(local);
                }
                folder => folder?,
            },
        };
        folder.check_private()?;
        if config.is_some() && !folder.has(ALL) && !folder.has(HOSTS) {
            return Err(LocalError::Nothing(folder.path().to_owned()));
        }
        if folder.has(ALL) {
            local.walk(&folder.folder(Path::new(ALL))?, &top, &Origin::All)?;
        }
        if let Some(host) = host {
            let is_name = !matches!(host, "" | "." | "..") && !host.contains(['/', '\0']);
            if !is_name {
                return Err(LocalError::Host(host.to_owned()));
            }
            let path = Path::new(HOSTS).join(host).join(ALL);
            local.is_host_unknown = !folder.has(&path);
            if !local.is_host_unknown {
                local.walk(&folder.folder(&path)?, &top, &Origin::Host)?;
            }
        }
        Ok(local)
    }

    /// The files and links, by path from /local, and where each came from.
    pub fn files(&self) -> impl Iterator<Item = (String, &Origin)> {
        self.origins.iter().filter(|(path, _)| self.builder.get(path).is_some()).map(|(path, origin)| {
            let path = path.to_string();
            (path.strip_prefix("local/").unwrap_or(&path).to_owned(), origin)
        })
    }

    /// The archive, with root hashes by name.
    ///
    /// # Errors
    /// [`LocalError`].
    pub fn archive<'h>(
        &self,
        hashes: impl Iterator<Item = (&'h str, Digest)>,
    ) -> Result<Vec<u8>, LocalError> {
        let mut builder = self.builder.clone();
        let mut contents = self.contents.clone();
        for (name, hash) in hashes {
            let text = hash.to_string().into_bytes();
            let path = TreePath::new(format!("local/{name}").as_bytes());
            let path = path.map_err(|source| LocalError::Path { path: name.into(), source })?;
            builder.put(path, file(&text, 0o644));
            contents.insert(Digest::of(&text), text);
        }
        let mut archive = Vec::new();
        let options = Options { omit_root: true, drop_xattrs: false };
        cpio::write_encoded(&builder.finish()?, &contents, &mut archive, options, ENCODING)?;
        Ok(archive)
    }

    fn put_file(&mut self, path: TreePath, bytes: Vec<u8>, mode: u16, origin: Origin) {
        self.builder.put(path.clone(), file(&bytes, mode));
        self.origins.insert(path, origin);
        self.contents.insert(Digest::of(&bytes), bytes);
    }

    fn walk(&mut self, folder: &Folder, at: &TreePath, origin: &Origin) -> Result<(), LocalError> {
        folder.check_private()?;
        for name in folder.names()? {
            let file = Path::new(OsStr::from_bytes(&name));
            let shown = folder.path().join(file);
            let path = at.join(&name).map_err(|source| LocalError::Path { path: shown.clone(), source })?;
            let is_top = at.components().count() == 1;
            if is_top && (name == b"initos.hash" || name.starts_with(b"hash.")) {
                return Err(LocalError::Hash(shown));
            }
            if name == KEYS.as_bytes() {
                return Err(LocalError::Private {
                    path: shown,
                    what: "has the name of the folder of keys".to_owned(),
                });
            }
            match folder.kind(file)? {
                FileType::Directory => {
                    let inner = folder.folder(file)?;
                    let node = Node { kind: Kind::Directory, meta: meta(inner.mode()? | 0o700) };
                    self.builder.put(path.clone(), node);
                    self.walk(&inner, &path, origin)?;
                }
                FileType::Symlink => {
                    let text = folder.link(file)?;
                    if !stays_inside(&text, at.components().count() - 1) {
                        let text = text.escape_ascii().to_string();
                        return Err(LocalError::Link { path: shown, text });
                    }
                    let node = Node { kind: Kind::Symlink(text.into()), meta: meta(0o777) };
                    self.builder.put(path.clone(), node);
                    self.origins.insert(path, origin.clone());
                }
                FileType::RegularFile => {
                    let (bytes, mode) = self.content(folder, file)?;
                    if let Some(key) = self.keys.and_then(|keys| keys.find_private(&bytes)) {
                        return Err(LocalError::Private {
                            path: shown,
                            what: format!("has the key `{key}` in it"),
                        });
                    }
                    self.put_file(path, bytes, mode, origin.clone());
                }
                other => return Err(LocalError::Special { path: shown, what: special(other) }),
            }
        }
        Ok(())
    }

    /// The content of a file, read once, and its permissions.
    fn content(&mut self, folder: &Folder, name: &Path) -> Result<(Vec<u8>, u16), LocalError> {
        let path = folder.path().join(name);
        let failed = |source| FolderError::System { what: "read", path: path.clone(), source };
        let file = folder.guarded(name)?;
        let mode = file.metadata().map_err(failed)?.mode();
        let mut bytes = Vec::new();
        file.take(self.bytes_left.saturating_add(1)).read_to_end(&mut bytes).map_err(failed)?;
        let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        self.bytes_left = self.bytes_left.checked_sub(length).ok_or(LocalError::TooLong)?;
        Ok((bytes, permissions(mode)))
    }
}

fn file(bytes: &[u8], mode: u16) -> Node {
    let size = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    Node { kind: Kind::File { digest: Digest::of(bytes), size }, meta: meta(mode.into()) }
}

/// Root's, and of no time.
fn meta(mode: u32) -> Meta {
    Meta { mode: permissions(mode), ..Meta::default() }
}

/// The bits that an initrd's files keep: not set-id, which nothing needs there.
fn permissions(mode: u32) -> u16 {
    u16::try_from(mode & 0o777).unwrap_or(0)
}

/// Whether a link in a folder `depth` below /local stays there: it goes up first, if at all, and not further than that. What
/// goes up later could go up from where another link leads.
fn stays_inside(text: &[u8], depth: usize) -> bool {
    let up = text.split(|byte| *byte == b'/').take_while(|name| *name == b"..").count();
    let mut rest = text.split(|byte| *byte == b'/').skip(up);
    !text.starts_with(b"/") && up <= depth && rest.all(|name| name != b"..")
}

fn special(kind: FileType) -> &'static str {
    match kind {
        FileType::BlockDevice | FileType::CharacterDevice => "a device",
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        _ => "of no known kind",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_stay_in_local_wherever_other_links_lead() {
        for (text, depth) in [("a", 0), ("a/b", 0), ("../a", 1), ("../../a", 2), (".", 0), ("./a", 0)] {
            assert!(stays_inside(text.as_bytes(), depth), "{text}");
        }
        for (text, depth) in
            [("/etc", 3), ("..", 0), ("../../a", 1), ("a/../../b", 1), ("a/..", 5), ("./../a", 5), ("//a", 1)]
        {
            assert!(!stays_inside(text.as_bytes(), depth), "{text}");
        }
    }
}
