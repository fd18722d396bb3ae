//! The record that a build leaves in WORK beside what is to be signed: what images are made of, by digest.
//!
//! It is `boot/record.json`, so that WORK can be copied to the host that has the keys. It is not believed: it is what
//! the files are held against, so that what is signed is what was built, whole. `docs/record.md` describes it.

use std::collections::{BTreeMap, BTreeSet};

use kiln_artifact::fat::{self, FatError};
use kiln_artifact::tree::{Kind, Meta, Node, PathError, Tree, TreePath};
use kiln_digest::Digest;
use serde::{Deserialize, Serialize};

/// Where it is below WORK.
pub const PATH: &str = "boot/record.json";
/// The version that this kiln writes and reads.
pub const VERSION: u32 = 2;
/// `uname -r` has room for 64 bytes.
const RELEASE_BYTES_MAX: usize = 64;

/// Why a record is not one.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// No JSON, or a field missing, unknown or of another type.
    #[error("`{PATH}` is no record of a build")]
    Form(#[source] serde_json::Error),
    /// Another kiln's.
    #[error("`{PATH}` is of version {0}; this kiln reads version {VERSION}")]
    Version(u32),
    /// A path that could leave WORK.
    #[error("`{PATH}` names {0:?}, which is no plain path below WORK")]
    Path(String),
    /// Nothing to sign.
    #[error("`{PATH}` names no images to sign")]
    Empty,
    /// A release that is not one word, as a file has that was written while two kernels were there.
    #[error("`{PATH}` has a kernel of release {0:?}, which is not the release of one kernel")]
    Release(String),
    /// A kernel that is signed as nothing.
    #[error("`{PATH}` says of kernel {0} nowhere that it goes when it is signed")]
    Nowhere(String),
    /// A kernel without an initrd.
    #[error("`{PATH}` has no initrd for kernel {0}")]
    NoInitrd(String),
    /// Two images under one name.
    #[error("`{PATH}` wants two images to be signed as `{0}`")]
    Twice(String),
    /// An image that would replace what it is made of.
    #[error("`{PATH}` wants `{0}` signed in place, and could then not be held against it")]
    InPlace(String),
    /// Among the enrolment files, whose names it could take.
    #[error("`{PATH}` wants `{0}` signed into the folder of the enrolment files")]
    Keys(String),
    /// Names that an EFI system partition cannot have.
    #[error("`{PATH}` names what no EFI system partition can hold")]
    Fat(#[source] FatError),
    /// A record that leaves the part open that must be signed.
    #[error("`{PATH}` has no digest for section `{section}` of `{file}`")]
    Section {
        /// The image.
        file: String,
        /// The section.
        section: &'static str,
    },
    /// A root hash under a name that the initrd does not look for.
    #[error("`{PATH}` has a hash `{name}` for kernel {release}, and no initrd of it looks for that")]
    Hash {
        /// The name.
        name: String,
        /// The kernel.
        release: String,
    },
    /// Two hashes for one thing, or none for the root.
    #[error("`{PATH}` has {count} root images for kernel {release}, which starts from one")]
    Roots {
        /// How many.
        count: usize,
        /// The kernel.
        release: String,
    },
    /// An image that is not where the initrd looks.
    #[error(
        "`{PATH}` has `{file}` for `{name}`, and the initrd looks for `{wanted}` in the same place as the others"
    )]
    Place {
        /// The hash.
        name: String,
        /// Where the record has it.
        file: String,
        /// The end that its path should have.
        wanted: String,
    },
}

/// A file below WORK.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// Where, from WORK.
    pub file: String,
    /// Its content.
    pub sha256: Digest,
}

/// An image that the initrd opens through dm-verity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Verity {
    /// The name of its root hash in the initrd's /local: `hash.recovery`, `hash.modules-VER`, `hash.firmware` or
    /// `initos.hash`.
    pub name: String,
    /// The image, from WORK. It is held against its root hash, which covers all of it.
    pub image: String,
    /// Its hash tree.
    pub tree: File,
    /// The file with its root hash.
    pub hash: File,
}

/// A unified kernel image that is to be assembled and signed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// Its release.
    pub release: String,
    /// Where it goes when it is signed, from WORK: one place or more, the same bytes in each.
    pub signed: Vec<String>,
    /// The stub.
    pub stub: File,
    /// The kernel.
    pub linux: File,
    /// os-release(5) of what is booted.
    pub osrel: File,
    /// The command line, as [`command_line`] reads it.
    pub cmdline: File,
    /// Archives of the initrd in their order: microcode, the base, the init.
    pub initrds: Vec<File>,
    /// Lines for SBAT beside the stub's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sbat: Option<File>,
    /// The images whose root hashes go into the initrd.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub verity: Vec<Verity>,
}

/// A unified kernel image that is to be signed as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Unified {
    /// Where it is, unsigned, from WORK.
    pub file: String,
    /// Its content.
    pub sha256: Digest,
    /// Where it goes when it is signed, from WORK.
    pub signed: String,
    /// Its sections but the stub's own, `.sbat` among them, by name.
    pub sections: BTreeMap<String, Digest>,
}

/// What a build says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// [`VERSION`].
    pub version: u32,
    /// What is assembled and signed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kernels: Vec<Kernel>,
    /// What is signed as it is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unified: Vec<Unified>,
    /// What is not signed, and must be as it was built.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub images: Vec<File>,
    /// The folder that enrolment files go to, from WORK.
    #[serde(default = "keys")]
    pub keys: String,
}

fn keys() -> String {
    "boot/efi/KEYS".to_owned()
}

impl Default for Record {
    fn default() -> Self {
        Self { version: VERSION, kernels: Vec::new(), unified: Vec::new(), images: Vec::new(), keys: keys() }
    }
}

impl Record {
    /// Reads a record and checks all that it alone can show.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn parse(json: &[u8]) -> Result<Self, RecordError> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let Versioned { version } = serde_json::from_slice(json).map_err(RecordError::Form)?;
        if version != VERSION {
            return Err(RecordError::Version(version));
        }
        let record: Self = serde_json::from_slice(json).map_err(RecordError::Form)?;
        record.check()?;
        Ok(record)
    }

    /// Checks all that a record alone can show.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn check(&self) -> Result<(), RecordError> {
        if self.unified.is_empty() && self.kernels.is_empty() {
            return Err(RecordError::Empty);
        }
        let read = self.read();
        for path in read.iter().copied().chain(self.signed()).chain([self.keys.as_str()]) {
            if !is_plain(path) {
                return Err(RecordError::Path(path.to_owned()));
            }
        }
        // FAT knows no case, and a path that is read must not be written under another spelling.
        let folded: BTreeSet<String> = read.iter().map(|path| path.to_ascii_lowercase()).collect();
        let keys = format!("{}/", self.keys.to_ascii_lowercase());
        let mut places = BTreeSet::new();
        for path in self.signed() {
            let lower = path.to_ascii_lowercase();
            if folded.contains(&lower) || lower == PATH {
                return Err(RecordError::InPlace(path.to_owned()));
            }
            if format!("{lower}/").starts_with(&keys) || keys.starts_with(&format!("{lower}/")) {
                return Err(RecordError::Keys(path.to_owned()));
            }
            if !places.insert(lower) {
                return Err(RecordError::Twice(path.to_owned()));
            }
        }
        // Signatures that come from elsewhere are told by the last part.
        let mut names = BTreeSet::new();
        let all = self.kernels.iter().map(Kernel::name).chain(self.unified.iter().map(Unified::name));
        if let Some(twice) = all.into_iter().find(|name| !names.insert(name.to_ascii_lowercase())) {
            return Err(RecordError::Twice(twice.to_owned()));
        }
        self.kernels.iter().try_for_each(Kernel::check)?;
        self.unified.iter().try_for_each(Unified::check)?;
        self.check_fat()
    }

    /// Every file that signing reads.
    fn read(&self) -> Vec<&str> {
        let parts = self.kernels.iter().flat_map(Kernel::parts).map(|(_, part)| part.file.as_str());
        let verity = self.kernels.iter().flat_map(|kernel| &kernel.verity);
        let verity = verity.flat_map(|verity| [&verity.image, &verity.tree.file, &verity.hash.file]);
        let unified = self.unified.iter().map(|image| &image.file);
        let images = self.images.iter().map(|image| &image.file);
        parts.chain(verity.chain(unified).chain(images).map(String::as_str)).collect()
    }

    /// Every file that signing writes, but for enrolment files.
    pub(super) fn signed(&self) -> impl Iterator<Item = &str> {
        let kernels = self.kernels.iter().flat_map(|kernel| &kernel.signed);
        kernels.chain(self.unified.iter().map(|image| &image.signed)).map(String::as_str)
    }

    /// What ends on the EFI system partition must have names that FAT can hold.
    fn check_fat(&self) -> Result<(), RecordError> {
        let verity = self.kernels.iter().flat_map(|kernel| &kernel.verity);
        let verity = verity.flat_map(|verity| [&verity.image, &verity.tree.file, &verity.hash.file]);
        let paths = self.signed().chain(verity.map(String::as_str)).map(|path| {
            TreePath::new(path.as_bytes()).map_err(|_: PathError| RecordError::Path(path.to_owned()))
        });
        let paths = paths.collect::<Result<Vec<TreePath>, _>>()?;
        let node = |kind| Node { kind, meta: Meta::default() };
        let mut tree = Tree::new();
        for path in &paths {
            let mut parent = path.parent();
            while let Some(folder) = parent {
                parent = folder.parent();
                tree.insert(folder, node(Kind::Directory));
            }
        }
        // A file in the place of a folder leaves what should be in that without one.
        for path in paths {
            tree.insert(path, node(Kind::File { digest: Digest::of(b""), size: 0 }));
        }
        fat::least_bytes(&tree).map(drop).map_err(RecordError::Fat)
    }
}

/// Whether `path` is one below WORK, spelled in the one way that it has.
fn is_plain(path: &str) -> bool {
    let is_name = |name: &str| !matches!(name, "" | "." | "..") && !name.chars().any(char::is_control);
    path.split('/').all(is_name)
}

/// What the init of the initrd (`guest/init`) looks for on a partition, for a hash `name` in /local: the paths of the image
/// and of its hash.
fn places(name: &str, release: &str) -> Option<(String, String)> {
    if name == "initos.hash" {
        return Some(("initos/initos.sqfs".to_owned(), "initos/initos.hash".to_owned()));
    }
    let image = name.strip_prefix("hash.")?;
    let known = matches!(image, "recovery" | "firmware") || image.strip_prefix("modules-") == Some(release);
    known.then(|| (format!("{image}.sqfs"), name.to_owned()))
}

impl Kernel {
    /// What it is called where it is signed elsewhere: the last part of the first place that it goes to.
    pub fn name(&self) -> &str {
        self.signed.first().map_or("", |path| last(path))
    }

    /// Its parts, and what each is; images apart.
    pub fn parts(&self) -> impl Iterator<Item = (&'static str, &File)> {
        let initrds = self.initrds.iter().map(|initrd| ("initrd", initrd));
        [("stub", &self.stub), ("linux", &self.linux), ("osrel", &self.osrel), ("cmdline", &self.cmdline)]
            .into_iter()
            .chain(initrds)
            .chain(self.sbat.iter().map(|sbat| ("sbat", sbat)))
    }

    fn check(&self) -> Result<(), RecordError> {
        let release = &self.release;
        let one_word = (1..=RELEASE_BYTES_MAX).contains(&release.len())
            && release.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/')
            && !release.starts_with('.');
        if !one_word {
            return Err(RecordError::Release(release.clone()));
        }
        if self.signed.is_empty() {
            return Err(RecordError::Nowhere(release.clone()));
        }
        if self.initrds.is_empty() {
            return Err(RecordError::NoInitrd(release.clone()));
        }
        let mut names = BTreeSet::new();
        let mut partition = None;
        for verity in &self.verity {
            let name = &verity.name;
            let (image, hash) = places(name, release)
                .filter(|_| names.insert(name))
                .ok_or_else(|| RecordError::Hash { name: name.clone(), release: release.clone() })?;
            let tree = format!("{image}.verity");
            for (file, wanted) in
                [(&verity.image, image), (&verity.tree.file, tree), (&verity.hash.file, hash)]
            {
                let top = file.strip_suffix(&wanted).filter(|top| top.is_empty() || top.ends_with('/'));
                if top.is_none() || *partition.get_or_insert(top) != top {
                    return Err(RecordError::Place { name: name.clone(), file: file.clone(), wanted });
                }
            }
        }
        let count =
            ["initos.hash", "hash.recovery"].iter().filter(|name| names.contains(&(**name).to_owned()));
        match count.count() {
            1 => Ok(()),
            0 if self.verity.is_empty() => Ok(()),
            count => Err(RecordError::Roots { count, release: release.clone() }),
        }
    }
}

impl Unified {
    /// The last part of where it goes.
    pub fn name(&self) -> &str {
        last(&self.signed)
    }

    fn check(&self) -> Result<(), RecordError> {
        for section in [".linux", ".initrd", ".cmdline"] {
            if !self.sections.contains_key(section) {
                return Err(RecordError::Section { file: self.file.clone(), section });
            }
        }
        Ok(())
    }
}

/// The command line in a file that people write: without lines of comments (`#`), in one line.
pub fn command_line(text: &str) -> String {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.collect::<Vec<_>>().join(" ")
}

fn last(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

#[cfg(test)]
#[path = "record_tests.rs"]
mod tests;
