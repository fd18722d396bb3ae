//! The tree of one commit, as a tar archive: fetched by the host's `git`, which is told as little as can be.
//!
//! `git` runs with no configuration but what is given here, no hooks, no helpers, no prompt, no submodules and only the
//! protocol that the URL names, in a jail that leaves it a place of its own (`machine::fetcher`). Objects are checked as they
//! come, so what has the commit's id is that commit. Attributes of the tree (`export-ignore`, `text`, filters) are turned off.
//!
//! The archive is kiln's, not git's: the same commit gives the same bytes whichever git fetched it. Its members are the
//! tree's, without a folder around them, owned by root, at the commit's time; a submodule is an empty folder.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_artifact::tree::TreePath;
use kiln_digest::Digest;

use crate::machine::fetcher::{Ended, Fetcher};
use crate::plan::is_commit;
use crate::store::Blobs;

/// Most bytes of a pack, and of a tree as an archive.
const MOST_BYTES: u64 = 16 << 30;
/// How long one run of git may take. A server that stalls is given up long before.
const PATIENCE: Duration = Duration::from_secs(3600);
/// How long it may take to say what a name stands for.
const RESOLVE_PATIENCE: Duration = Duration::from_secs(120);

/// What git must not do, whatever else it is told.
const SETTINGS: &[&str] = &[
    "core.hooksPath=/dev/null",
    "core.fsmonitor=false",
    "core.attributesFile=/dev/null",
    "core.askPass=/bin/false",
    "credential.helper=",
    "fetch.fsckObjects=true",
    "fetch.recurseSubmodules=false",
    "gc.auto=0",
    "http.lowSpeedLimit=8192",
    "http.lowSpeedTime=60",
    "maintenance.auto=false",
    "protocol.version=2",
    "submodule.recurse=false",
    "tar.umask=0022",
    "transfer.bundleURI=false",
    "transfer.fsckObjects=true",
];

/// Attributes that come before those of the tree, and turn off all that would change what is archived.
const ATTRIBUTES: &str = "* -export-ignore -export-subst -text -eol -ident -filter -working-tree-encoding\n";

/// The longest target of a link that fits a tar header (POSIX.1-2017, pax, "ustar Interchange Format").
const SHORT_LINK: usize = 100;

/// Why a commit cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum GitError {
    /// The host has no git.
    #[error("there is no program `git` in PATH")]
    NoGit,
    /// git failed.
    #[error("git cannot {what} `{url}`: {said}")]
    Failed {
        /// What it should do.
        what: &'static str,
        /// The repository.
        url: String,
        /// What it said.
        said: String,
    },
    /// It took too long.
    #[error("git took longer than {seconds} s to {what} `{url}`")]
    TimedOut {
        /// What it should do.
        what: &'static str,
        /// The repository.
        url: String,
        /// How long it had.
        seconds: u64,
    },
    /// The repository has no such commit or tag.
    #[error("`{url}` has no commit or tag `{rev}`")]
    NoRev {
        /// The repository.
        url: String,
        /// What was named in it.
        rev: String,
    },
    /// A branch is another commit tomorrow.
    #[error("`{rev}` is a branch of `{url}`, which moves")]
    Branch {
        /// The repository.
        url: String,
        /// The branch.
        rev: String,
        /// The commit that it is now.
        commit: String,
    },
    /// The id of something else.
    #[error("`{rev}` in `{url}` is no commit")]
    NotACommit {
        /// The repository.
        url: String,
        /// What was named.
        rev: String,
        /// The commit that it leads to, where it leads to one.
        commit: Option<String>,
    },
    /// A tree that could not lie in a folder.
    #[error("commit {commit} of `{url}` has a file that cannot be: `{path}`")]
    Path {
        /// The repository.
        url: String,
        /// The commit.
        commit: String,
        /// The file.
        path: String,
    },
    /// The archive cannot be made.
    #[error("cannot make an archive of commit {commit} of `{url}`")]
    Io {
        /// The repository.
        url: String,
        /// The commit.
        commit: String,
        /// The system's word.
        #[source]
        source: io::Error,
    },
}

impl GitError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NoGit => Some("install git".to_owned()),
            Self::NoRev { rev, .. } if is_commit(rev) => Some(
                "it may have gone with the branch or tag that led to it: name another commit, or a mirror that has it"
                    .to_owned(),
            ),
            Self::NoRev { .. } => Some("name a commit's whole id, or a tag".to_owned()),
            Self::Branch { commit, .. } => Some(format!("name a tag, or the commit that it is now: {commit}")),
            Self::NotACommit { commit, .. } => commit.as_ref().map(|commit| format!("its commit is {commit}")),
            Self::Failed { .. } | Self::TimedOut { .. } => {
                Some("try `git ls-remote` with the same URL; a private repository cannot be fetched".to_owned())
            }
            Self::Path { .. } | Self::Io { .. } => None,
        }
    }
}

/// A repository and how git gets to it.
#[derive(Debug, Clone)]
pub struct Repository {
    /// What the recipe calls it.
    pub url: String,
    /// Where it is on this host, where it is.
    pub local: Option<PathBuf>,
}

/// The host's git.
#[derive(Debug, Clone)]
pub struct Git {
    program: PathBuf,
    environment: Vec<(String, String)>,
    /// Certificate authorities that vouch for servers; none: those of the host.
    authorities: Option<PathBuf>,
}

impl Git {
    /// The git of `search_path`. `variables` are those of the host's environment that name proxies and certificates.
    ///
    /// # Errors
    /// [`GitError::NoGit`].
    pub fn find(search_path: &str, variables: Vec<(String, String)>) -> Result<Self, GitError> {
        let folders = search_path.split(':').filter(|folder| folder.starts_with('/'));
        let mut programs = folders.map(|folder| Path::new(folder).join("git"));
        let program = programs.find(|path| path.is_file()).ok_or(GitError::NoGit)?;
        let mut environment = variables;
        let fixed = [
            ("GIT_ASKPASS", "/bin/false"),
            ("GIT_ATTR_NOSYSTEM", "1"),
            ("GIT_CONFIG_GLOBAL", "/dev/null"),
            ("GIT_CONFIG_NOSYSTEM", "1"),
            ("GIT_TERMINAL_PROMPT", "0"),
            ("HOME", "/nonexistent"),
            ("LC_ALL", "C"),
            ("PATH", search_path),
        ];
        environment.extend(fixed.map(|(name, value)| (name.to_owned(), value.to_owned())));
        Ok(Self { program, environment, authorities: None })
    }

    /// The same, for servers that the certificate authorities in the file `path` vouch for, and no others.
    #[must_use]
    pub fn trusting(mut self, path: &Path) -> Self {
        // It goes before the variables of the host's that say so.
        self.environment.push(("GIT_SSL_CAINFO".to_owned(), path.to_string_lossy().into_owned()));
        Self { authorities: Some(path.to_owned()), ..self }
    }

    /// The commit that `rev` is in `repository`: itself, or what the tag of that name leads to. `place` is an empty folder.
    ///
    /// # Errors
    /// [`GitError::NoRev`], [`GitError::Branch`], or git's own.
    pub fn resolve(&self, repository: &Repository, rev: &str, place: &Path) -> Result<String, GitError> {
        if is_commit(rev) {
            return Ok(rev.to_owned());
        }
        let (tag, peeled, branch) =
            (format!("refs/tags/{rev}"), format!("refs/tags/{rev}^{{}}"), format!("refs/heads/{rev}"));
        let arguments = ["ls-remote", "--quiet", "--", &repository.name(), &tag, &peeled, &branch];
        let what = "ask what is in";
        let ended = self.run(repository, place, &arguments, what, RESOLVE_PATIENCE)?;
        if !ended.success {
            return Err(repository.failed(what, ended.said));
        }
        let text = String::from_utf8_lossy(&ended.output);
        let lines = || text.lines().filter_map(|line| line.split_once('\t'));
        let commit_of = |name: &str| {
            lines()
                .find(|(commit, found)| *found == name && is_commit(commit))
                .map(|(commit, _)| commit.to_owned())
        };
        if let Some(commit) = commit_of(&peeled).or_else(|| commit_of(&tag)) {
            return Ok(commit);
        }
        let (url, rev) = (repository.url.clone(), rev.to_owned());
        Err(match commit_of(&branch) {
            Some(commit) => GitError::Branch { url, rev, commit },
            None => GitError::NoRev { url, rev },
        })
    }

    /// Puts the tree of `commit` of `repository` into `blobs`, as an archive: its digest, and its length in bytes. `place`
    /// is an empty folder.
    ///
    /// # Errors
    /// [`GitError`], as its variants say.
    pub fn archive(
        &self,
        repository: &Repository,
        commit: &str,
        place: &Path,
        blobs: &Blobs,
    ) -> Result<(Digest, u64), GitError> {
        let git = |arguments: &[&str], what| self.run(repository, place, arguments, what, PATIENCE);
        let format = if commit.len() == 64 { "--object-format=sha256" } else { "--object-format=sha1" };
        let made = git(&["init", "--quiet", "--bare", "--template=", format, "."], "make a place for")?;
        if !made.success {
            return Err(repository.failed("make a place for", made.said));
        }
        let io = |source| GitError::Io { url: repository.url.clone(), commit: commit.to_owned(), source };
        fs::create_dir_all(place.join("info")).map_err(io)?;
        fs::write(place.join("info/attributes"), ATTRIBUTES).map_err(io)?;
        self.fetch(repository, commit, place)?;
        let wanted = format!("{commit}^{{commit}}");
        let parsed = git(&["rev-parse", "--quiet", "--verify", "--end-of-options", &wanted], "read")?;
        let found = String::from_utf8_lossy(&parsed.output).trim().to_owned();
        if !parsed.success || found != commit {
            let (url, rev) = (repository.url.clone(), commit.to_owned());
            return Err(GitError::NotACommit { url, rev, commit: parsed.success.then_some(found) });
        }
        let archived = git(&["archive", "--format=tar", "--output=tree.tar", commit], "archive")?;
        if !archived.success {
            return Err(repository.failed("archive", archived.said));
        }
        let mut writer = blobs.writer().map_err(io)?;
        let bad_path = |path: &[u8]| GitError::Path {
            url: repository.url.clone(),
            commit: commit.to_owned(),
            path: String::from_utf8_lossy(path).into_owned(),
        };
        if let Some(path) = rewrite(&place.join("tree.tar"), &mut writer).map_err(io)? {
            return Err(bad_path(&path));
        }
        writer.finish().map_err(io)
    }

    /// Fetches `commit` alone or, from servers that give only what they advertise, all that they advertise.
    fn fetch(&self, repository: &Repository, commit: &str, place: &Path) -> Result<(), GitError> {
        let what = "fetch from";
        let name = repository.name();
        let fetch = |more: &[&str]| {
            let mut arguments =
                vec!["fetch", "--quiet", "--no-tags", "--no-write-fetch-head", "--no-recurse-submodules"];
            arguments.extend(more);
            self.run(repository, place, &arguments, what, PATIENCE)
        };
        if fetch(&["--depth=1", "--", &name, commit])?.success {
            return Ok(());
        }
        let all = fetch(&["--", &name, "+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*"])?;
        if !all.success {
            return Err(repository.failed(what, all.said));
        }
        let there = self.run(repository, place, &["cat-file", "-e", commit], "read", PATIENCE)?;
        match there.success {
            true => Ok(()),
            false => Err(GitError::NoRev { url: repository.url.clone(), rev: commit.to_owned() }),
        }
    }

    fn run(
        &self,
        repository: &Repository,
        place: &Path,
        arguments: &[&str],
        what: &'static str,
        patience: Duration,
    ) -> Result<Ended, GitError> {
        let mut environment = self.environment.clone();
        environment.push(("GIT_ALLOW_PROTOCOL".to_owned(), repository.protocol().to_owned()));
        let settings = SETTINGS.iter().flat_map(|setting| ["-c", setting]);
        let fetcher = Fetcher {
            program: self.program.clone(),
            arguments: settings.chain(arguments.iter().copied()).map(str::to_owned).collect(),
            environment,
            place: place.to_owned(),
            reads: repository
                .local
                .as_deref()
                .map(folders_of)
                .into_iter()
                .flatten()
                .chain(self.authorities.clone())
                .collect(),
            most_file_bytes: MOST_BYTES,
        };
        fetcher.run(patience).map_err(|error| match error.kind() {
            io::ErrorKind::TimedOut => {
                GitError::TimedOut { what, url: repository.url.clone(), seconds: patience.as_secs() }
            }
            _ => repository.failed(what, error.to_string()),
        })
    }
}

impl Repository {
    /// What git is told.
    fn name(&self) -> String {
        self.local.as_ref().map_or_else(|| self.url.clone(), |path| path.display().to_string())
    }

    /// The one protocol that git may speak.
    fn protocol(&self) -> &str {
        match (&self.local, self.url.split_once("://")) {
            (None, Some((scheme, _))) => scheme,
            _ => "file",
        }
    }

    fn failed(&self, what: &'static str, said: String) -> GitError {
        GitError::Failed { what, url: self.url.clone(), said: said.trim_start_matches("fatal: ").to_owned() }
    }
}

/// The folders that hold a repository of this host: its own and, of a linked worktree (gitrepository-layout(5), "gitdir"
/// and "commondir"), those of the repository that it belongs to.
fn folders_of(local: &Path) -> Vec<PathBuf> {
    let mut folders = vec![local.to_owned()];
    let text = fs::read_to_string(local.join(".git")).unwrap_or_default();
    if let Some(path) = text.trim_end().strip_prefix("gitdir: ") {
        let own = local.join(path);
        let common = fs::read_to_string(own.join("commondir")).unwrap_or_default();
        folders.push(own.join(common.trim_end()));
        folders.push(own);
    }
    folders
}

/// Writes the members of the archive at `from` to `to` as kiln writes them. Gives a path that cannot be, where there is one.
fn rewrite(from: &Path, to: &mut impl Write) -> io::Result<Option<Vec<u8>>> {
    let mut from = tar::Archive::new(File::open(from)?);
    let mut to = tar::Builder::new(to);
    for entry in from.entries()? {
        let entry = entry?;
        let kind = entry.header().entry_type();
        if kind == tar::EntryType::XGlobalHeader {
            continue;
        }
        let path = entry.path_bytes().into_owned();
        let name = path.strip_suffix(b"/").unwrap_or(&path);
        if TreePath::new(name).is_ok_and(|path| path.is_root()) {
            continue;
        }
        let is_git = |part: &[u8]| part.eq_ignore_ascii_case(b".git");
        if TreePath::new(name).is_err() || name.split(|byte| *byte == b'/').any(is_git) {
            return Ok(Some(path));
        }
        let is_executable = entry.header().mode()? & 0o100 != 0;
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(entry.header().mtime()?);
        header.set_mode(if is_executable || kind == tar::EntryType::Directory { 0o755 } else { 0o644 });
        let path = Path::new(std::ffi::OsStr::from_bytes(&path));
        match kind {
            tar::EntryType::Symlink => {
                header.set_size(0);
                header.set_mode(0o777);
                let target = entry.link_name_bytes().unwrap_or_default().into_owned();
                if target.len() <= SHORT_LINK {
                    // As it is: a longer one loses its `./` and doubled slashes.
                    header.set_link_name_literal(&target)?;
                    to.append_data(&mut header, path, io::empty())?;
                } else {
                    to.append_link(&mut header, path, Path::new(std::ffi::OsStr::from_bytes(&target)))?;
                }
            }
            tar::EntryType::Regular | tar::EntryType::Directory => {
                header.set_size(entry.size());
                to.append_data(&mut header, path, entry)?;
            }
            _ => return Ok(Some(path.as_os_str().as_bytes().to_vec())),
        }
    }
    to.finish()?;
    Ok(None)
}
