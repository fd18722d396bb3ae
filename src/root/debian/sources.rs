//! Where Debian's archives are: the host's own APT sources, or a mirror that was given.
//!
//! A suite is read from its **pockets**: the suite itself, `SUITE-updates` and `SUITE-security`.
//! - Where the host lists the suite, those of its pockets that the host lists are used.
//! - Where it does not, the pockets that the host lists for its own Debian release are used, with the release
//!   changed: a host that takes security updates gets them for every release it builds for.
//! - `SUITE-backports` is those pockets and the backports themselves.
//! - A given mirror replaces the host's sources: it has the suite alone, and `SUITE-security` only where a mirror
//!   of the security archive is given beside it.
//!
//! kiln knows no mirror by itself. `trusted=yes` and `check-valid-until=no` of a source are not honoured.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::control;

/// Suites by which a source shows that it is Debian's and not a relative's.
const RELEASES: [&str; 16] = [
    "stretch",
    "buster",
    "bullseye",
    "bookworm",
    "trixie",
    "forky",
    "duke",
    "sid",
    "oldoldstable",
    "oldstable",
    "stable",
    "testing",
    "unstable",
    "experimental",
    "rc-buggy",
    "etch",
];
/// Releases without pockets.
const ROLLING: [&str; 4] = ["sid", "unstable", "experimental", "rc-buggy"];
/// Pockets that belong to every root of a release, by suffix.
const POCKETS: [&str; 4] = ["", "-updates", "-security", "/updates"];
/// Where Debian puts its archive's keys; the second is the name that newer releases prefer.
const KEYRINGS: [&str; 2] =
    ["usr/share/keyrings/debian-archive-keyring.gpg", "usr/share/keyrings/debian-archive-keyring.pgp"];

/// Why no archive is known for a suite.
#[derive(Debug, thiserror::Error)]
pub enum SourcesError {
    /// A file of APT's could not be read.
    #[error("`{path}` cannot be read")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// A source whose `Signed-By` is neither a file nor a key.
    #[error("`{path}` signs suite `{suite}` by `{value}`, which is neither a key file nor a key")]
    SignedBy {
        /// The file.
        path: PathBuf,
        /// The suite.
        suite: String,
        /// What it says.
        value: String,
    },
    /// Neither the host nor the settings know a Debian mirror.
    #[error("no Debian mirror is known for suite `{suite}`")]
    NoMirror {
        /// The suite.
        suite: String,
    },
    /// No key to verify the archive by.
    #[error("no keyring is known for suite `{suite}`")]
    NoKeyring {
        /// The suite.
        suite: String,
    },
}

impl SourcesError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Io { .. } => None,
            Self::NoMirror { .. } => Some(
                "name one with --debian-mirror URL, KILN_DEBIAN_MIRROR, or `debian.mirror` under [settings] in \
                 kiln.toml; file:// URLs do as well"
                    .into(),
            ),
            Self::NoKeyring { .. } | Self::SignedBy { .. } => Some(
                "install debian-archive-keyring, or name a key file with --debian-keyring FILE, \
                 KILN_DEBIAN_KEYRING, or `debian.keyring` under [settings] in kiln.toml"
                    .into(),
            ),
        }
    }
}

/// Keys that may sign a suite.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Keyring {
    /// A file of them.
    File(PathBuf),
    /// A key written into the source itself.
    Inline(String),
}

/// A suite of some archive, and where to find it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pocket {
    /// The suite: `bookworm-security`.
    pub suite: String,
    /// Archives that have it, without a trailing slash, in the order to try them.
    pub uris: Vec<String>,
    /// The components that are taken from it.
    pub components: Vec<String>,
    /// Who may have signed it.
    pub keyrings: Vec<Keyring>,
}

/// What the user says about archives.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    /// A mirror of Debian's archive, instead of the host's sources.
    pub mirror: Option<String>,
    /// A mirror of the security archive, beside `mirror`.
    pub security_mirror: Option<String>,
    /// A file of keys, instead of the host's.
    pub keyring: Option<PathBuf>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    file: PathBuf,
    uri: String,
    suite: String,
    components: Vec<String>,
    signed_by: Option<String>,
}

impl Entry {
    /// The release it is of: its suite without the pocket.
    fn release(&self) -> &str {
        release_of(&self.suite)
    }
}

fn release_of(suite: &str) -> &str {
    let end = suite.find(['-', '/']).unwrap_or(suite.len());
    &suite[..end]
}

/// The pockets of `suite` for packages of `architecture`, by `settings` and the APT sources below `host_root`.
///
/// # Errors
/// [`SourcesError`], as its variants say.
pub fn pockets(
    suite: &str,
    architecture: &str,
    settings: &Settings,
    host_root: &Path,
) -> Result<Vec<Pocket>, SourcesError> {
    let backports = suite.strip_suffix("-backports");
    let release = backports.unwrap_or(suite);
    let entries = match &settings.mirror {
        Some(mirror) => given_entries(release, mirror, settings.security_mirror.as_deref()),
        None => host_entries(release, architecture, host_root)?,
    };
    let mut chosen: Vec<Entry> = entries
        .iter()
        .filter(|entry| {
            entry.suite.strip_prefix(release).is_some_and(|pocket| {
                POCKETS.contains(&pocket) && (pocket.is_empty() || !ROLLING.contains(&release))
            })
        })
        .cloned()
        .collect();
    if backports.is_some() {
        let listed: Vec<_> = entries.iter().filter(|entry| entry.suite == suite).cloned().collect();
        if listed.is_empty() {
            let main = chosen.iter().filter(|entry| entry.suite == release);
            let made: Vec<_> = main.map(|entry| Entry { suite: suite.to_owned(), ..entry.clone() }).collect();
            chosen.extend(made);
        } else {
            chosen.extend(listed);
        }
    }
    if !chosen.iter().any(|entry| entry.suite == release) {
        return Err(SourcesError::NoMirror { suite: suite.to_owned() });
    }
    merge(chosen, settings, host_root)
}

fn given_entries(release: &str, mirror: &str, security: Option<&str>) -> Vec<Entry> {
    let entry = |suite: String, uri: &str| Entry {
        file: PathBuf::new(),
        uri: uri.trim_end_matches('/').to_owned(),
        suite,
        components: vec!["main".to_owned()],
        signed_by: None,
    };
    let mut entries = vec![entry(release.to_owned(), mirror)];
    entries.extend(security.map(|uri| entry(format!("{release}-security"), uri)));
    entries
}

/// The host's entries for `release`; where it has none, those of its own release with the release changed.
fn host_entries(release: &str, architecture: &str, host_root: &Path) -> Result<Vec<Entry>, SourcesError> {
    let entries = read_apt(host_root, architecture)?;
    if entries.iter().any(|entry| entry.suite == release) {
        return Ok(entries);
    }
    let of_debian = || entries.iter().filter(|entry| RELEASES.contains(&entry.release()));
    let Some(own) = of_debian().find(|entry| entry.suite == entry.release()).or_else(|| of_debian().next())
    else {
        return Ok(Vec::new());
    };
    Ok(of_debian()
        .filter(|entry| entry.release() == own.release())
        .map(|entry| {
            let pocket = &entry.suite[entry.release().len()..];
            // The security archive changed its layout with bullseye.
            let pocket = if pocket == "/updates" { "-security" } else { pocket };
            Entry { suite: format!("{release}{pocket}"), ..entry.clone() }
        })
        .collect())
}

fn merge(entries: Vec<Entry>, settings: &Settings, host_root: &Path) -> Result<Vec<Pocket>, SourcesError> {
    let mut pockets: BTreeMap<String, Pocket> = BTreeMap::new();
    for entry in entries {
        let keyrings = match &settings.keyring {
            Some(file) => vec![Keyring::File(file.clone())],
            None => keyrings_of(&entry, host_root)?,
        };
        let pocket = pockets.entry(entry.suite.clone()).or_insert_with(|| Pocket {
            suite: entry.suite.clone(),
            uris: Vec::new(),
            components: Vec::new(),
            keyrings: Vec::new(),
        });
        let mut add = |list: fn(&mut Pocket) -> &mut Vec<String>, value: String| {
            if !list(pocket).contains(&value) {
                list(pocket).push(value);
            }
        };
        add(|pocket| &mut pocket.uris, entry.uri);
        for component in entry.components {
            add(|pocket| &mut pocket.components, component);
        }
        for keyring in keyrings {
            if !pocket.keyrings.contains(&keyring) {
                pocket.keyrings.push(keyring);
            }
        }
    }
    Ok(pockets.into_values().collect())
}

fn keyrings_of(entry: &Entry, host_root: &Path) -> Result<Vec<Keyring>, SourcesError> {
    let Some(signed_by) = &entry.signed_by else {
        // Debian's own keys, not every key that the host's APT trusts for something.
        let known = KEYRINGS.iter().map(|file| host_root.join(file)).find(|file| file.is_file());
        let file = known.ok_or_else(|| SourcesError::NoKeyring { suite: entry.suite.clone() })?;
        return Ok(vec![Keyring::File(file)]);
    };
    if signed_by.contains("-----BEGIN PGP PUBLIC KEY BLOCK-----") {
        // In control data, a line that holds nothing is written as a dot.
        let lines = signed_by.lines().map(str::trim).map(|line| if line == "." { "" } else { line });
        return Ok(vec![Keyring::Inline(lines.collect::<Vec<_>>().join("\n"))]);
    }
    signed_by
        .split([',', ' ', '\n', '\t'])
        .filter(|word| !word.is_empty())
        .map(|word| match word.strip_prefix('/') {
            Some(path) => Ok(Keyring::File(host_root.join(path))),
            None => Err(SourcesError::SignedBy {
                path: entry.file.clone(),
                suite: entry.suite.clone(),
                value: word.to_owned(),
            }),
        })
        .collect()
}

fn read_apt(host_root: &Path, architecture: &str) -> Result<Vec<Entry>, SourcesError> {
    let apt = host_root.join("etc/apt");
    let mut files = vec![apt.join("sources.list")];
    match fs::read_dir(apt.join("sources.list.d")) {
        Ok(folder) => {
            let mut more: Vec<_> = folder.flatten().map(|entry| entry.path()).collect();
            more.sort();
            files.extend(more);
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(SourcesError::Io { path: apt.join("sources.list.d"), source }),
    }
    let mut entries = Vec::new();
    for file in files {
        let read = match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => read_list,
            Some("sources") => read_deb822,
            _ => continue,
        };
        match fs::read(&file) {
            Ok(bytes) => entries.extend(read(&String::from_utf8_lossy(&bytes), &file, architecture)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(SourcesError::Io { path: file, source }),
        }
    }
    Ok(entries)
}

/// Whether kiln can fetch from `uri`. `cdrom:`, `mirror:` and the like are left to APT.
fn is_fetchable(uri: &str) -> bool {
    ["http://", "https://", "file://"].iter().any(|scheme| uri.starts_with(scheme))
}

/// `file:/srv/mirror`, which APT takes as well, as a URL.
fn normal_uri(uri: &str) -> String {
    let uri = uri.trim_end_matches('/');
    match uri.strip_prefix("file:") {
        Some(path) if !path.starts_with("//") => format!("file://{path}"),
        _ => uri.to_owned(),
    }
}

/// The one-line style: `deb [arch=amd64 signed-by=/key] URI SUITE COMPONENT…`. A line that is not one is passed
/// over: APT itself has complained about it.
fn read_list(text: &str, file: &Path, architecture: &str) -> Vec<Entry> {
    let mut entries = Vec::new();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        let Some(rest) = line.strip_prefix("deb").filter(|rest| rest.starts_with([' ', '\t'])) else {
            continue;
        };
        let rest = rest.trim_start();
        let (options, rest) = match rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((options, rest)) => (options, rest),
            None => ("", rest),
        };
        let option = |name: &str| {
            options.split_ascii_whitespace().find_map(|option| option.strip_prefix(name)?.strip_prefix('='))
        };
        if option("arch").is_some_and(|list| !list.split(',').any(|one| one == architecture)) {
            continue;
        }
        let mut words = rest.split_ascii_whitespace();
        let (Some(uri), Some(suite)) = (words.next(), words.next()) else { continue };
        let uri = normal_uri(uri);
        if !is_fetchable(&uri) || suite.ends_with('/') {
            continue;
        }
        entries.push(Entry {
            file: file.to_owned(),
            uri,
            suite: suite.to_owned(),
            components: words.map(ToOwned::to_owned).collect(),
            signed_by: option("signed-by").map(ToOwned::to_owned),
        });
    }
    entries
}

/// The deb822 style: paragraphs of `Types`, `URIs`, `Suites`, `Components`, `Signed-By`.
fn read_deb822(text: &str, file: &Path, architecture: &str) -> Vec<Entry> {
    let mut entries = Vec::new();
    // A comment may stand inside a field here, which control data proper does not know.
    let text: String =
        text.lines().filter(|line| !line.starts_with('#')).flat_map(|line| [line, "\n"]).collect();
    for paragraph in control::paragraphs(&text) {
        let field = |name| paragraph.field(name).ok().flatten();
        let words = |name| field(name).unwrap_or_default().split_ascii_whitespace();
        let is_off = field("Enabled")
            .is_some_and(|value| matches!(value, "no" | "false" | "0" | "off" | "without" | "disable"));
        let other_architecture =
            field("Architectures").is_some() && !words("Architectures").any(|one| one == architecture);
        if is_off || other_architecture || !words("Types").any(|word| word == "deb") {
            continue;
        }
        for suite in words("Suites").filter(|suite| !suite.ends_with('/')) {
            for uri in words("URIs").map(normal_uri).filter(|uri| is_fetchable(uri)) {
                entries.push(Entry {
                    file: file.to_owned(),
                    uri,
                    suite: suite.to_owned(),
                    components: words("Components").map(ToOwned::to_owned).collect(),
                    signed_by: field("Signed-By").map(ToOwned::to_owned),
                });
            }
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCES: &str = "\
Types: deb
# a comment in the middle
URIs: http://mirror.test/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb deb-src
URIs: http://mirror.test/debian-security/
Suites: bookworm-security
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
Enabled: no
URIs: http://off.test/debian
Suites: trixie
Components: main
";

    fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let host = tempfile::tempdir().expect("a folder");
        for (path, text) in files {
            let path = host.path().join(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            fs::write(path, text).expect("written");
        }
        host
    }

    fn found(suite: &str, settings: &Settings, host: &tempfile::TempDir) -> Vec<(String, Vec<String>)> {
        let pockets = pockets(suite, "amd64", settings, host.path()).expect("a mirror");
        pockets.into_iter().map(|pocket| (pocket.suite, pocket.uris)).collect()
    }

    fn pocket(suite: &str, uri: &str) -> (String, Vec<String>) {
        (suite.to_owned(), vec![uri.to_owned()])
    }

    #[test]
    fn a_listed_suite_comes_with_its_pockets() {
        let host = host(&[("etc/apt/sources.list.d/debian.sources", SOURCES)]);
        let all = pockets("bookworm", "amd64", &Settings::default(), host.path()).expect("a mirror");
        assert_eq!(all.len(), 3);
        assert_eq!(all[0].components, ["main", "contrib"]);
        let keyring = host.path().join("usr/share/keyrings/debian-archive-keyring.gpg");
        assert_eq!(all[0].keyrings, [Keyring::File(keyring)]);
        assert_eq!(all[1].suite, "bookworm-security");
        assert_eq!(all[1].uris, ["http://mirror.test/debian-security"]);
    }

    #[test]
    fn another_release_is_looked_for_beside_the_hosts_own() {
        let host = host(&[("etc/apt/sources.list.d/debian.sources", SOURCES)]);
        let settings = Settings::default();
        let trixie = [
            pocket("trixie", "http://mirror.test/debian"),
            pocket("trixie-security", "http://mirror.test/debian-security"),
            pocket("trixie-updates", "http://mirror.test/debian"),
        ];
        assert_eq!(found("trixie", &settings, &host), trixie);
        assert_eq!(
            found("sid", &settings, &host),
            trixie[..1].iter().map(|_| pocket("sid", "http://mirror.test/debian")).collect::<Vec<_>>()
        );
        let backports = found("bookworm-backports", &settings, &host);
        assert_eq!(backports.len(), 4);
        assert_eq!(backports[1], pocket("bookworm-backports", "http://mirror.test/debian"));
    }

    #[test]
    fn one_line_sources_are_read() {
        let list = "deb http://a.test/debian trixie main # here\n\
                    deb-src http://a.test/debian trixie main\n\
                    deb [arch=arm64] http://arm.test/debian trixie main\n\
                    deb [ arch=amd64 signed-by=/k.gpg ] http://b.test/debian/ trixie main\n\
                    deb file:/srv/debian trixie main\n\
                    deb cdrom:[Debian]/ trixie main\ndeb\n";
        let host = host(&[
            ("etc/apt/sources.list", list),
            ("usr/share/keyrings/debian-archive-keyring.pgp", "keys"),
        ]);
        let all = pockets("trixie", "amd64", &Settings::default(), host.path()).expect("a mirror");
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].uris, ["http://a.test/debian", "http://b.test/debian", "file:///srv/debian"]);
        assert_eq!(all[0].keyrings.len(), 2);
    }

    #[test]
    fn a_given_mirror_replaces_the_hosts_sources() {
        let host = host(&[("etc/apt/sources.list.d/debian.sources", SOURCES)]);
        let mut settings = Settings {
            mirror: Some("file:///srv/debian/".into()),
            keyring: Some("/k.gpg".into()),
            ..Settings::default()
        };
        assert_eq!(found("bookworm", &settings, &host), [pocket("bookworm", "file:///srv/debian")]);
        settings.security_mirror = Some("file:///srv/security".into());
        assert_eq!(found("bookworm", &settings, &host).len(), 2);
    }

    #[test]
    fn without_a_mirror_or_a_key_the_error_says_what_to_set() {
        let ubuntu = "deb http://a.test/ubuntu noble main\n";
        let settings = Settings::default();
        for host in [host(&[]), host(&[("etc/apt/sources.list", ubuntu)])] {
            let error = pockets("bookworm", "amd64", &settings, host.path()).expect_err("no Debian mirror");
            assert!(matches!(error, SourcesError::NoMirror { .. }));
            assert!(error.hint().is_some_and(|hint| hint.contains("--debian-mirror")));
        }
        let host = host(&[("etc/apt/sources.list", "deb http://a.test/debian bookworm main\n")]);
        let error = pockets("bookworm", "amd64", &settings, host.path()).expect_err("no key");
        assert!(matches!(error, SourcesError::NoKeyring { .. }));
    }

    #[test]
    fn a_key_may_stand_in_the_source() {
        let inline = "Types: deb\nURIs: http://a.test/debian\nSuites: trixie\nComponents: main\n\
                      Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n -----END PGP PUBLIC KEY BLOCK-----\n";
        let host = host(&[("etc/apt/sources.list.d/x.sources", inline)]);
        let all = pockets("trixie", "amd64", &Settings::default(), host.path()).expect("a mirror");
        let key = "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nabc\n-----END PGP PUBLIC KEY BLOCK-----";
        assert_eq!(all[0].keyrings, [Keyring::Inline(key.into())]);
    }
}
