//! `kiln.lock`: every byte that came from outside, by suite, pool path and digest, whatever the mirror.
//!
//! TOML that a person can read and diff: one package a line, roots and packages in a fixed order, so that equal
//! contents are equal bytes. It is replaced by rename, whole or not at all. Comments in it do not survive.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use kiln_artifact::tree::TreePath;
use kiln_digest::Digest;
use serde::Deserialize;
use tempfile::NamedTempFile;

/// The version of the format. A file of a later version is refused.
pub const VERSION: u32 = 1;

const HEADER: &str = "\
# Every byte that came from outside, by digest. Written by kiln; keep it under version control.
";

/// Why a lock file cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// The file could not be read or replaced.
    #[error("lock file `{path}` cannot be used")]
    Io {
        /// The lock file.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// The file is not what kiln writes.
    #[error("lock file `{path}`, line {line}: {reason}")]
    Malformed {
        /// The lock file.
        path: PathBuf,
        /// The line, counted from one.
        line: usize,
        /// What is wrong there.
        reason: String,
    },
    /// The file comes from a later kiln.
    #[error("lock file `{path}` has version {found}; this kiln knows version {VERSION}")]
    Version {
        /// The lock file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
}

impl LockError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Io { .. } => None,
            Self::Malformed { path, .. } => Some(format!(
                "restore `{}` from version control, or delete it to lock everything anew",
                path.display()
            )),
            Self::Version { .. } => Some("use a newer kiln".into()),
        }
    }
}

/// One Debian package: where it lies in an archive, and what it is.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedPackage {
    /// The package's name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// `amd64` or `all`.
    pub architecture: String,
    /// The suite whose index named it: `bookworm`, `bookworm-security`, ….
    pub suite: String,
    /// Its path in the archive: `pool/…`.
    pub path: String,
    /// Length of the .deb in bytes.
    pub size: u64,
    /// Digest of the .deb.
    pub sha256: Digest,
}

/// A signed index that packages were taken from.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedIndex {
    /// The suite as it was asked for.
    pub suite: String,
    /// The index's own date.
    pub date: Timestamp,
    /// Digest of the InRelease file (of Release, where an archive has no InRelease).
    pub sha256: Digest,
}

/// A root or a toolbox, and the packages it is made of.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedRoot {
    /// What was asked for: `debian:SUITE+PKG,PKG…`.
    pub spec: String,
    /// The indexes, by suite.
    pub indexes: Vec<LockedIndex>,
    /// The packages, by name.
    pub packages: Vec<LockedPackage>,
}

impl LockedRoot {
    /// The date of the newest index: the root's `SOURCE_DATE_EPOCH`, in seconds since 1970-01-01 UTC.
    pub fn source_date_epoch(&self) -> i64 {
        self.indexes.iter().map(|index| index.date.as_second()).max().unwrap_or(0)
    }
}

/// A kernel: one package.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedKernel {
    /// What was asked for: `debian:SUITE`.
    pub spec: String,
    /// The kernel's release, the name of its folder of modules: `6.12.57+deb13-cloud-amd64`.
    pub release: String,
    /// The indexes, by suite.
    pub indexes: Vec<LockedIndex>,
    /// The package.
    pub package: LockedPackage,
}

impl LockedKernel {
    /// As [`LockedRoot::source_date_epoch`].
    pub fn source_date_epoch(&self) -> i64 {
        self.indexes.iter().map(|index| index.date.as_second()).max().unwrap_or(0)
    }
}

/// A file that a recipe names.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedSource {
    /// Where it is fetched from.
    pub url: String,
    /// Its length in bytes.
    pub size: u64,
    /// Its digest.
    pub sha256: Digest,
}

/// What a lock file says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Lock {
    roots: BTreeMap<String, LockedRoot>,
    kernels: BTreeMap<String, LockedKernel>,
    toolboxes: BTreeMap<String, LockedRoot>,
    sources: BTreeMap<String, LockedSource>,
}

#[derive(Deserialize)]
struct VersionOnly {
    version: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(rename = "version")]
    _version: u32,
    #[serde(default)]
    kernel: Vec<toml::Spanned<LockedKernel>>,
    #[serde(default)]
    root: Vec<toml::Spanned<LockedRoot>>,
    #[serde(default)]
    toolbox: Vec<toml::Spanned<LockedRoot>>,
    #[serde(default)]
    source: Vec<toml::Spanned<LockedSource>>,
}

impl Lock {
    /// Reads the lock file at `path`; an empty lock where there is none.
    ///
    /// # Errors
    /// [`LockError`], as its variants say.
    pub fn load(path: &Path) -> Result<Self, LockError> {
        match fs::read_to_string(path) {
            Ok(text) => Self::parse(&text, path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(LockError::Io { path: path.to_owned(), source }),
        }
    }

    /// Reads `text`, which `path` names in errors.
    ///
    /// # Errors
    /// [`LockError::Malformed`] and [`LockError::Version`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, LockError> {
        let line_of = |offset: usize| {
            text.as_bytes()[..offset.min(text.len())].iter().filter(|&&b| b == b'\n').count() + 1
        };
        let malformed = |offset: usize, reason: String| LockError::Malformed {
            path: path.to_owned(),
            line: line_of(offset),
            reason,
        };
        let parse_error = |error: toml::de::Error| {
            malformed(error.span().map_or(0, |span| span.start), error.message().to_owned())
        };
        let version = toml::from_str::<VersionOnly>(text).map_err(parse_error)?.version;
        if version != VERSION {
            return Err(LockError::Version { path: path.to_owned(), found: version });
        }
        let file: File = toml::from_str(text).map_err(parse_error)?;
        let mut lock = Self::default();
        for (what, list, locked) in
            [("root", file.root, &mut lock.roots), ("toolbox", file.toolbox, &mut lock.toolboxes)]
        {
            for root in list {
                let start = root.span().start;
                let root = root.into_inner();
                if let Some(bad) = root.packages.iter().find_map(check_package) {
                    return Err(malformed(start, bad));
                }
                if let Some(earlier) = locked.insert(root.spec.clone(), root) {
                    return Err(malformed(start, format!("{what} `{}` is locked twice", earlier.spec)));
                }
            }
        }
        for kernel in file.kernel {
            let start = kernel.span().start;
            let kernel = kernel.into_inner();
            if let Some(bad) = check_package(&kernel.package) {
                return Err(malformed(start, bad));
            }
            if let Some(earlier) = lock.kernels.insert(kernel.spec.clone(), kernel) {
                return Err(malformed(start, format!("kernel `{}` is locked twice", earlier.spec)));
            }
        }
        for source in file.source {
            let start = source.span().start;
            let source = source.into_inner();
            if let Some(earlier) = lock.sources.insert(source.url.clone(), source) {
                return Err(malformed(start, format!("source `{}` is locked twice", earlier.url)));
            }
        }
        Ok(lock)
    }

    /// The source locked for `url`.
    pub fn source(&self, url: &str) -> Option<&LockedSource> {
        self.sources.get(url)
    }

    /// Locks `source`; what was locked for its URL is replaced.
    pub fn set_source(&mut self, source: LockedSource) {
        self.sources.insert(source.url.clone(), source);
    }

    /// The root locked for `spec`.
    pub fn root(&self, spec: &str) -> Option<&LockedRoot> {
        self.roots.get(spec)
    }

    /// Locks `root`; what was locked for its spec is replaced.
    pub fn set_root(&mut self, root: LockedRoot) {
        self.roots.insert(root.spec.clone(), root);
    }

    /// The toolbox locked for `spec`.
    pub fn toolbox(&self, spec: &str) -> Option<&LockedRoot> {
        self.toolboxes.get(spec)
    }

    /// Locks `toolbox`; what was locked for its spec is replaced.
    pub fn set_toolbox(&mut self, toolbox: LockedRoot) {
        self.toolboxes.insert(toolbox.spec.clone(), toolbox);
    }

    /// The kernel locked for `spec`.
    pub fn kernel(&self, spec: &str) -> Option<&LockedKernel> {
        self.kernels.get(spec)
    }

    /// Locks `kernel`; what was locked for its spec is replaced.
    pub fn set_kernel(&mut self, kernel: LockedKernel) {
        self.kernels.insert(kernel.spec.clone(), kernel);
    }

    /// The lock file's text.
    pub fn to_text(&self) -> String {
        let mut text = format!("{HEADER}version = {VERSION}\n");
        // Writing to a string cannot fail.
        for kernel in self.kernels.values() {
            let _ = write!(
                text,
                "\n[[kernel]]\nspec = {}\nrelease = {}\n",
                quoted(&kernel.spec),
                quoted(&kernel.release)
            );
            write_indexes(&mut text, &kernel.indexes);
            let _ = writeln!(text, "package = {}", package_line(&kernel.package));
        }
        for LockedSource { url, size, sha256 } in self.sources.values() {
            let url = quoted(url);
            let _ = write!(text, "\n[[source]]\nurl = {url}\nsize = {size}\nsha256 = \"{sha256}\"\n");
        }
        let roots = self.roots.values().map(|root| ("root", root));
        let toolboxes = self.toolboxes.values().map(|toolbox| ("toolbox", toolbox));
        for (what, root) in roots.chain(toolboxes) {
            let _ = write!(text, "\n[[{what}]]\nspec = {}\n", quoted(&root.spec));
            write_indexes(&mut text, &root.indexes);
            text.push_str("packages = [\n");
            for package in &root.packages {
                let _ = writeln!(text, "  {},", package_line(package));
            }
            text.push_str("]\n");
        }
        text
    }

    /// Replaces the lock file at `path`, unless it says this already.
    ///
    /// # Errors
    /// [`LockError::Io`].
    pub fn save(&self, path: &Path) -> Result<(), LockError> {
        let text = self.to_text();
        if fs::read_to_string(path).is_ok_and(|old| old == text) {
            return Ok(());
        }
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let write = || -> io::Result<()> {
            let mut file = NamedTempFile::with_prefix_in(".kiln.lock.", folder)?;
            file.write_all(text.as_bytes())?;
            // A temporary file is private; a lock file is shared like any source.
            let mode = fs::metadata(path).map_or_else(|_| default_mode(), |old| old.permissions());
            file.as_file().set_permissions(mode)?;
            file.as_file().sync_all()?;
            file.persist(path).map_err(|error| error.error)?;
            Ok(())
        };
        write().map_err(|source| LockError::Io { path: path.to_owned(), source })
    }
}

fn default_mode() -> fs::Permissions {
    use std::os::unix::fs::PermissionsExt as _;
    fs::Permissions::from_mode(0o644)
}

/// What is wrong with a package that parses but could not be one.
fn check_package(package: &LockedPackage) -> Option<String> {
    let path_is_sound = TreePath::new(package.path.as_bytes()).is_ok_and(|path| !path.is_root())
        && package.path.chars().all(|c| c.is_ascii_graphic());
    (!path_is_sound).then(|| {
        format!(
            "package `{}` has a path that no archive has: `{}`",
            package.name,
            package.path.escape_debug()
        )
    })
}

fn quoted(text: &str) -> String {
    toml::Value::from(text).to_string()
}

fn write_indexes(text: &mut String, indexes: &[LockedIndex]) {
    text.push_str("indexes = [\n");
    for index in indexes {
        let _ = writeln!(
            text,
            "  {{ suite = {}, date = {}, sha256 = \"{}\" }},",
            quoted(&index.suite),
            quoted(&index.date.to_string()),
            index.sha256
        );
    }
    text.push_str("]\n");
}

fn package_line(package: &LockedPackage) -> String {
    format!(
        "{{ name = {}, version = {}, architecture = {}, suite = {}, path = {}, size = {}, sha256 = \"{}\" }}",
        quoted(&package.name),
        quoted(&package.version),
        quoted(&package.architecture),
        quoted(&package.suite),
        quoted(&package.path),
        package.size,
        package.sha256
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str) -> LockedPackage {
        LockedPackage {
            name: name.into(),
            version: "1:2.3-4+b1".into(),
            architecture: "amd64".into(),
            suite: "bookworm".into(),
            path: format!("pool/main/{name}.deb"),
            size: 12,
            sha256: Digest::of(name.as_bytes()),
        }
    }

    fn lock() -> Lock {
        let index = LockedIndex {
            suite: "bookworm".into(),
            date: Timestamp::from_second(1_795_252_544).expect("a time"),
            sha256: Digest::of(b"index"),
        };
        let mut lock = Lock::default();
        lock.set_root(LockedRoot {
            spec: "debian:bookworm+make".into(),
            indexes: vec![index.clone()],
            packages: vec![package("base-files"), package("make")],
        });
        lock.set_toolbox(LockedRoot {
            spec: "debian:trixie+strace".into(),
            indexes: vec![index.clone()],
            packages: vec![package("strace")],
        });
        lock.set_kernel(LockedKernel {
            spec: "debian:trixie".into(),
            release: "6.12".into(),
            indexes: vec![index],
            package: package("linux-image"),
        });
        lock.set_source(LockedSource {
            url: "https://example.org/a?b=\"c\"".into(),
            size: 12,
            sha256: Digest::of(b"source"),
        });
        lock
    }

    #[test]
    fn what_is_written_reads_back() {
        let lock = lock();
        assert_eq!(Lock::parse(&lock.to_text(), Path::new("kiln.lock")).expect("own text"), lock);
        assert_eq!(lock.root("debian:bookworm+make").expect("locked").source_date_epoch(), 1_795_252_544);
    }

    #[test]
    fn saving_replaces_the_file_whole_and_loading_nothing_is_empty() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("kiln.lock");
        assert_eq!(Lock::load(&path).expect("none"), Lock::default());
        lock().save(&path).expect("written");
        assert_eq!(Lock::load(&path).expect("read"), lock());
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 1, "no temporary file is left");
    }

    #[test]
    fn errors_name_the_line() {
        let text = lock().to_text();
        let path = Path::new("kiln.lock");
        let line_of_size = text.lines().position(|line| line.contains("make.deb")).expect("there") + 1;
        let broken = text.replace("make.deb\", size = 12", "make.deb\", size = true");
        let error = Lock::parse(&broken, path).expect_err("a flag is no size");
        assert!(error.to_string().contains(&format!("line {line_of_size}")), "{error}");
        let error = Lock::parse(&text.replace("version = 1\n", "version = 9\n"), path).expect_err("later");
        assert!(matches!(error, LockError::Version { found: 9, .. }));
        for path_in_archive in ["../../etc/passwd", "/etc/passwd", "pool/a b", "pool/\\u0007"] {
            let evil = text.replace("pool/main/make.deb", path_in_archive);
            assert!(
                matches!(Lock::parse(&evil, path), Err(LockError::Malformed { .. })),
                "{path_in_archive}"
            );
        }
        let cut = &text[..text.len() - 40];
        assert!(matches!(Lock::parse(cut, path), Err(LockError::Malformed { .. })));
    }
}
