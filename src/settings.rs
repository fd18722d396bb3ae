//! Every setting, from flag, environment, `kiln.toml` or default, and which of these it was.
//!
//! The only place that reads the environment. What it finds is data; nothing here acts on it.

mod recipe;

use std::env;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kiln_digest::Digest;

use crate::plan::recipe::{Fault, GivenError, Recipe, RecipeDebian, Text};
use crate::plan::{parse_bytes, parse_duration};
pub use recipe::RecipeFile;

/// The recipe's file name.
pub const RECIPE: &str = "kiln.toml";
/// The lock's file name, beside the recipe.
pub const LOCK: &str = "kiln.lock";
/// The project of a run that has no recipe: a fixed word, so that paths in a guest do not depend on the host's.
pub const DEFAULT_PROJECT: &str = "project";

/// Why the settings cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The recipe cannot be read.
    #[error("cannot read `{path}`")]
    Read {
        /// The recipe.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// Something else has the recipe's name.
    #[error("`{path}` is {what}, not a recipe")]
    NoFile {
        /// What has it.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// The recipe is too long to be one.
    #[error("`{path}` is longer than the {limit_bytes} bytes that a recipe may have")]
    TooLong {
        /// The recipe.
        path: PathBuf,
        /// The limit.
        limit_bytes: u64,
    },
    /// The recipe is not what kiln understands.
    #[error(transparent)]
    Recipe(Box<Fault>),
    /// A variable that cannot be set so.
    #[error("--set {given}")]
    Variable {
        /// What was given.
        given: String,
        /// Why not.
        #[source]
        source: GivenError,
    },
    /// A value that its setting does not take.
    #[error("setting `{name}` ({origin}) is `{value}`: {wanted}")]
    Value {
        /// The setting.
        name: &'static str,
        /// Where it was set.
        origin: Origin,
        /// Its value.
        value: String,
        /// What it takes.
        wanted: &'static str,
    },
    /// No home directory and no other place for the store.
    #[error("there is no home directory to keep the store in: set KILN_STORE")]
    NoHome,
}

/// Where a setting was set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// On the command line.
    Flag,
    /// By this variable.
    Environment(&'static str),
    /// In the recipe.
    Recipe,
    /// By the host's own configuration.
    Host,
    /// Nowhere.
    Default,
}

impl SettingsError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Recipe(fault) => fault.hint.clone(),
            Self::Read { path, .. } => Some(format!("see who may read it: `ls -l {}`", path.display())),
            Self::NoFile { .. } => {
                Some(format!("give it another name: {RECIPE} is the recipe's, here and in all folders below"))
            }
            Self::TooLong { .. } => {
                Some("put long texts into files of their own that the steps read".to_owned())
            }
            Self::Variable { source, .. } => source.hint(),
            Self::Value { .. } | Self::NoHome => None,
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag => f.write_str("flag"),
            Self::Environment(name) => write!(f, "environment {name}"),
            Self::Recipe => f.write_str(RECIPE),
            Self::Host => f.write_str("the host's APT sources"),
            Self::Default => f.write_str("default"),
        }
    }
}

/// A setting's value and where it was set.
#[derive(Debug, Clone)]
pub struct Setting<T> {
    /// The value.
    pub value: T,
    /// Where it was set.
    pub origin: Origin,
}

/// Which backend and accelerator are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendChoice {
    /// What the probe recommends.
    Auto,
    /// QEMU on KVM, or nothing.
    Kvm,
    /// QEMU, on KVM where the probe says that it is real.
    Qemu,
    /// QEMU's emulation, even where KVM is there.
    Tcg,
    /// kiln's own VMM on KVM, or nothing; QEMU on KVM for machines with a network or with virtualisation of their own.
    Vmm,
}

impl BackendChoice {
    /// Reads a backend's name.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "auto" => Some(Self::Auto),
            "kvm" => Some(Self::Kvm),
            "qemu" => Some(Self::Qemu),
            "tcg" => Some(Self::Tcg),
            "vmm" => Some(Self::Vmm),
            _ => None,
        }
    }
}

impl fmt::Display for BackendChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Kvm => "kvm",
            Self::Qemu => "qemu",
            Self::Tcg => "tcg",
            Self::Vmm => "vmm",
        })
    }
}

/// What was said on the command line.
#[derive(Debug, Clone, Default)]
pub struct Flags {
    /// The folder from which the recipe is looked for; none: where kiln was called.
    pub recipe_from: Option<PathBuf>,
    /// `--set`, each NAME=VALUE.
    pub variables: Vec<String>,
    /// `--project`.
    pub project: Option<String>,
    /// `--work`.
    pub work: Option<PathBuf>,
    /// `--src`.
    pub srcdir: Option<PathBuf>,
    /// `--store`.
    pub store: Option<PathBuf>,
    /// `--store-limit`.
    pub store_limit: Option<String>,
    /// `--backend`.
    pub backend: Option<String>,
    /// `--debian-mirror`.
    pub debian_mirror: Option<String>,
    /// `--debian-keyring`.
    pub debian_keyring: Option<PathBuf>,
    /// `--debian-security-mirror`.
    pub debian_security_mirror: Option<String>,
    /// `--debian-allow-expired`.
    pub debian_allow_expired: bool,
    /// `--debian-snapshot`.
    pub debian_snapshot: Option<String>,
    /// `--locked`.
    pub locked: bool,
    /// `--offline`.
    pub offline: bool,
    /// `--vendor`.
    pub vendor: Option<PathBuf>,
    /// `--ca-file`.
    pub ca_file: Option<PathBuf>,
    /// `--lock`.
    pub lock: Option<PathBuf>,
    /// `--net full`.
    pub network: bool,
    /// `--no-template`.
    pub no_template: bool,
    /// `--no-keeper`.
    pub no_keeper: bool,
    /// `--keeper-idle`.
    pub keeper_idle: Option<String>,
}

/// All settings.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The name in `/ws/PROJECT` and `/x/PROJECT`.
    pub project: Setting<String>,
    /// Where outputs go.
    pub work: Setting<PathBuf>,
    /// What is built; none where there is neither a flag nor a recipe nor `/ws/PROJECT`.
    pub srcdir: Setting<Option<PathBuf>>,
    /// Signing keys, never shared with a guest.
    pub secrets: Setting<PathBuf>,
    /// Where images are published.
    pub repo: Setting<Option<String>>,
    /// Under which tag.
    pub tag: Setting<String>,
    /// kiln's store.
    pub store: Setting<PathBuf>,
    /// How much it may hold, in bytes on the disk; none: as much as the disk has.
    pub store_limit: Setting<Option<u64>>,
    /// Backend.
    pub backend: Setting<BackendChoice>,
    /// QEMU's program: a path, or a name to be found in PATH.
    pub qemu: Setting<String>,
    /// Whether machines may be copies of templates.
    pub template: Setting<bool>,
    /// Whether a machine may be made ready for the next run.
    pub keeper: Setting<bool>,
    /// How long it waits for one.
    pub keeper_idle: Setting<Duration>,
    /// Debian mirror; none: the host's APT sources.
    pub debian_mirror: Setting<Option<String>>,
    /// Mirror of the security archive; none: the host's APT sources.
    pub debian_security_mirror: Setting<Option<String>>,
    /// Whether an index may be used after its `Valid-Until`.
    pub debian_allow_expired: bool,
    /// Debian keyring; none: what the APT sources name, else the host's.
    pub debian_keyring: Setting<Option<PathBuf>>,
    /// An archive of old packages, asked for what is locked and the mirrors lack.
    pub debian_snapshot: Setting<Option<String>>,
    /// The lock file.
    pub lock: Setting<PathBuf>,
    /// Whether nothing may be locked that is not.
    pub locked: Setting<bool>,
    /// Whether nothing may be fetched.
    pub offline: Setting<bool>,
    /// Whether steps that ask for the network have this host's. Only a flag says so, never a recipe.
    pub network: bool,
    /// Vendored bytes: a directory or an archive that `kiln lock vendor` made.
    pub vendor: Setting<Option<PathBuf>>,
    /// Certificate authorities that vouch for servers, in place of those that browsers trust.
    pub ca_file: Setting<Option<PathBuf>>,
    /// The agent, where the environment names it.
    pub agent: Setting<Option<PathBuf>>,
    /// A directory to be the toolbox; none: Debian packages.
    pub toolbox: Setting<Option<PathBuf>>,
    /// The recipe that was read.
    pub recipe: Option<RecipeFile>,
    /// PATH of the host, for finding programs.
    pub search_path: String,
    /// Where kiln was called.
    pub directory: PathBuf,
}

fn pick<T>(
    flag: Option<T>,
    variable: &'static str,
    from_environment: impl Fn(String) -> T,
    recipe: Option<T>,
    default: impl FnOnce() -> T,
) -> Setting<T> {
    debug_assert!(VARIABLES.contains(&variable), "{variable} is not in the list");
    if let Some(value) = flag {
        return Setting { value, origin: Origin::Flag };
    }
    if let Some(text) = variable_text(variable) {
        return Setting { value: from_environment(text), origin: Origin::Environment(variable) };
    }
    match recipe {
        Some(value) => Setting { value, origin: Origin::Recipe },
        None => Setting { value: default(), origin: Origin::Default },
    }
}

/// The host's variable `name` as bytes, for a step that names it.
#[expect(clippy::disallowed_methods, reason = "the one door to the environment")]
pub fn host_variable(name: &str) -> Option<Vec<u8>> {
    env::var_os(name).map(OsStringExt::into_vec)
}

/// Every variable that is a setting.
const VARIABLES: [&str; 24] = [
    "PROJECT",
    "WORK",
    "SRCDIR",
    "SECRETS",
    "REPO",
    "TAG",
    "KILN_STORE",
    "KILN_STORE_LIMIT",
    "KILN_BACKEND",
    "KILN_QEMU",
    "KILN_TEMPLATE",
    "KILN_KEEPER",
    "KILN_KEEPER_IDLE",
    "KILN_DEBIAN_MIRROR",
    "KILN_DEBIAN_SECURITY_MIRROR",
    "KILN_DEBIAN_KEYRING",
    "KILN_DEBIAN_SNAPSHOT",
    "KILN_LOCK",
    "KILN_LOCKED",
    "KILN_OFFLINE",
    "KILN_VENDOR",
    "KILN_CA_FILE",
    "KILN_AGENT",
    "KILN_TOOLBOX",
];

/// The settings that the environment makes, as they are in it.
pub fn from_environment() -> Vec<(&'static str, String)> {
    VARIABLES.iter().filter_map(|name| variable_text(name).map(|value| (*name, value))).collect()
}

#[expect(clippy::disallowed_methods, reason = "the one door to the environment")]
fn variable_text(name: &str) -> Option<String> {
    env::var(name).ok().filter(|text| !text.is_empty())
}

impl Settings {
    /// Reads the recipe of the current directory (or of one above it) and the environment.
    ///
    /// # Errors
    /// [`SettingsError`].
    pub fn read(flags: Flags) -> Result<Self, SettingsError> {
        let directory =
            env::current_dir().map_err(|source| SettingsError::Read { path: PathBuf::from("."), source })?;
        let from = flags.recipe_from.map_or_else(|| directory.clone(), |folder| directory.join(folder));
        let recipe_path = recipe::find(&from);
        let read = |path| RecipeFile::read(path, &directory, &flags.variables);
        let recipe_file = recipe_path.clone().map(read).transpose()?;
        let mut none = Recipe::default();
        if recipe_file.is_none() {
            // Of no recipe nothing can be set.
            recipe::set(&mut none, &flags.variables)?;
        }
        let none = Arc::new(none);
        let recipe = recipe_file.as_ref().map_or(&none, |file| &file.recipe);
        let recipe_folder = recipe_path.as_deref().and_then(Path::parent);
        let beside_recipe = |path: PathBuf| recipe_folder.unwrap_or(&directory).join(path);
        let file = &recipe.settings;
        let plain = |text: &Option<Text>| text.as_ref().map(|text| text.get_ref().clone());
        // What the recipe says is shown where it stands.
        let wrong = |name, setting: Setting<String>, text: &Option<Text>, wanted| {
            let Setting { value, origin } = setting;
            match (&origin, &recipe_file, text) {
                (Origin::Recipe, Some(file), Some(text)) => {
                    let message = format!("setting `{name}` is `{}`: {wanted}", value.escape_debug());
                    let fault = Fault::at(&file.text, &file.name, text.span(), message);
                    SettingsError::Recipe(Box::new(fault))
                }
                _ => SettingsError::Value { name, origin, value, wanted },
            }
        };
        let home = variable_text("HOME").map(PathBuf::from);
        let project = pick(
            flags.project,
            "PROJECT",
            |text| text,
            plain(&recipe.project),
            || DEFAULT_PROJECT.to_owned(),
        );
        if !is_project_name(&project.value) {
            let wanted = "it takes letters, digits, `.`, `_` and `-`, and starts with a letter or digit";
            return Err(wrong("project", project, &recipe.project, wanted));
        }
        let name = project.value.clone();
        let cache = variable_text("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .or_else(|| home.as_ref().map(|home| home.join(".cache")));
        let work = pick(flags.work, "WORK", PathBuf::from, file.work.clone().map(beside_recipe), || {
            // Two recipes that name no project must not take each other's outputs for their own.
            let name = match (&project.origin, recipe_folder) {
                (Origin::Default, Some(folder)) => name_of_folder(folder),
                _ => name.clone(),
            };
            let preferred = Path::new("/x").join(&name);
            let usable = if preferred.is_dir() { &preferred } else { Path::new("/x") };
            let usable = if usable.is_dir() { usable } else { Path::new("/") };
            if rustix::fs::access(usable, rustix::fs::Access::WRITE_OK).is_ok() {
                return preferred;
            }
            home.as_ref().map_or(preferred, |home| home.join(".cache").join(&name))
        });
        let srcdir = pick(
            flags.srcdir.map(Some),
            "SRCDIR",
            |text| Some(text.into()),
            file.srcdir.clone().map(|p| Some(beside_recipe(p))),
            || {
                let preferred = Path::new("/ws").join(&name);
                if preferred.is_dir() { Some(preferred) } else { recipe_folder.map(Path::to_owned) }
            },
        );
        let secrets = pick(None, "SECRETS", PathBuf::from, file.secrets.clone().map(beside_recipe), || {
            home.clone().unwrap_or_else(|| PathBuf::from("/")).join(".ssh").join(&name)
        });
        let store = match (
            pick(
                flags.store.map(Some),
                "KILN_STORE",
                |text| Some(text.into()),
                file.store.clone().map(|p| Some(beside_recipe(p))),
                || None,
            ),
            cache,
        ) {
            (Setting { value: Some(value), origin }, _) => Setting { value, origin },
            (Setting { origin, .. }, Some(cache)) => Setting { value: cache.join("kiln"), origin },
            _ => return Err(SettingsError::NoHome),
        };
        let store_limit = pick(
            flags.store_limit,
            "KILN_STORE_LIMIT",
            |text| text,
            plain(&file.store_limit),
            || "none".to_owned(),
        );
        let backend =
            pick(flags.backend, "KILN_BACKEND", |text| text, plain(&file.backend), || "auto".to_owned());
        let on = |on: bool| if on { "on" } else { "off" }.to_owned();
        let template = flags.no_template.then(|| on(false));
        let template = pick(template, "KILN_TEMPLATE", |text| text, file.template.map(on), || on(true));
        let keeper = flags.no_keeper.then(|| on(false));
        let keeper = pick(keeper, "KILN_KEEPER", |text| text, file.keeper.map(on), || on(true));
        let keeper_idle = pick(
            flags.keeper_idle,
            "KILN_KEEPER_IDLE",
            |text| text,
            plain(&file.keeper_idle),
            || "60s".to_owned(),
        );
        let locked = pick(
            flags.locked.then(|| on(true)),
            "KILN_LOCKED",
            |text| text,
            file.locked.map(on),
            || on(false),
        );
        let offline = pick(
            flags.offline.then(|| on(true)),
            "KILN_OFFLINE",
            |text| text,
            file.offline.map(on),
            || on(false),
        );
        let vendor = pick(
            flags.vendor.map(Some),
            "KILN_VENDOR",
            |text| Some(text.into()),
            file.vendor.clone().map(|path| Some(beside_recipe(path))),
            || None,
        );
        let ca_file = pick(
            flags.ca_file.map(Some),
            "KILN_CA_FILE",
            |text| Some(text.into()),
            file.ca_file.clone().map(|path| Some(beside_recipe(path))),
            || None,
        );
        let no_debian = RecipeDebian::default();
        let debian = file.debian.as_ref().unwrap_or(&no_debian);
        Ok(Self {
            backend: match BackendChoice::parse(&backend.value) {
                Some(value) => Setting { value, origin: backend.origin },
                None => {
                    let wanted = "it takes auto, kvm, qemu, tcg or vmm";
                    return Err(wrong("backend", backend, &file.backend, wanted));
                }
            },
            store_limit: match (store_limit.value.as_str(), parse_bytes(&store_limit.value)) {
                ("none", _) => Setting { value: None, origin: store_limit.origin },
                (_, Ok(value)) => Setting { value: Some(value), origin: store_limit.origin },
                (_, Err(_)) => {
                    let wanted = "it takes a size such as 20G, or none";
                    return Err(wrong("store-limit", store_limit, &file.store_limit, wanted));
                }
            },
            template: on_or_off("template", template)?,
            keeper: on_or_off("keeper", keeper)?,
            keeper_idle: match parse_duration(&keeper_idle.value) {
                Ok(value) => Setting { value, origin: keeper_idle.origin },
                Err(_) => {
                    let wanted = "it takes a time such as 60s or 5m";
                    return Err(wrong("keeper-idle", keeper_idle, &file.keeper_idle, wanted));
                }
            },
            work: absolute(work, &directory),
            srcdir,
            secrets: absolute(secrets, &directory),
            repo: pick(None, "REPO", Some, file.repo.clone().map(Some), || None),
            tag: pick(None, "TAG", |text| text, file.tag.clone(), || "latest".to_owned()),
            store: absolute(store, &directory),
            qemu: pick(None, "KILN_QEMU", |text| text, file.qemu.clone(), || "qemu-system-x86_64".to_owned()),
            debian_mirror: pick(
                flags.debian_mirror.map(Some),
                "KILN_DEBIAN_MIRROR",
                Some,
                debian.mirror.clone().map(Some),
                || None,
            ),
            debian_security_mirror: pick(
                flags.debian_security_mirror.map(Some),
                "KILN_DEBIAN_SECURITY_MIRROR",
                Some,
                debian.security_mirror.clone().map(Some),
                || None,
            ),
            debian_allow_expired: flags.debian_allow_expired || debian.allow_expired,
            debian_keyring: pick(
                flags.debian_keyring.map(Some),
                "KILN_DEBIAN_KEYRING",
                |text| Some(text.into()),
                debian.keyring.clone().map(|path| Some(beside_recipe(path))),
                || None,
            ),
            debian_snapshot: pick(
                flags.debian_snapshot.map(Some),
                "KILN_DEBIAN_SNAPSHOT",
                Some,
                debian.snapshot.clone().map(Some),
                || None,
            ),
            locked: on_or_off("locked", locked)?,
            offline: on_or_off("offline", offline)?,
            network: flags.network,
            vendor: Setting {
                value: vendor.value.map(|path: PathBuf| directory.join(path)),
                origin: vendor.origin,
            },
            ca_file: Setting {
                value: ca_file.value.map(|path: PathBuf| directory.join(path)),
                origin: ca_file.origin,
            },
            lock: pick(flags.lock, "KILN_LOCK", PathBuf::from, None, || beside_recipe(LOCK.into())),
            agent: pick(None, "KILN_AGENT", |text| Some(text.into()), None, || None),
            toolbox: pick(None, "KILN_TOOLBOX", |text| Some(text.into()), None, || None),
            recipe: recipe_file.clone(),
            search_path: variable_text("PATH").unwrap_or_default(),
            project,
            directory,
        })
    }
}

fn absolute(setting: Setting<PathBuf>, directory: &Path) -> Setting<PathBuf> {
    Setting { value: directory.join(setting.value), origin: setting.origin }
}

fn on_or_off(name: &'static str, setting: Setting<String>) -> Result<Setting<bool>, SettingsError> {
    match setting.value.as_str() {
        value @ ("on" | "off") => Ok(Setting { value: value == "on", origin: setting.origin }),
        _ => Err(SettingsError::Value {
            name,
            origin: setting.origin,
            value: setting.value,
            wanted: "it takes on or off",
        }),
    }
}

/// A project name for what lies in `folder`: like its own, and no other folder's.
fn name_of_folder(folder: &Path) -> String {
    let real = fs::canonicalize(folder);
    let path = real.as_deref().unwrap_or(folder);
    let own = path.file_name().unwrap_or_default().to_string_lossy();
    let good = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let own: String = own.chars().filter(good).skip_while(|c| !c.is_ascii_alphanumeric()).take(40).collect();
    let own = if own.is_empty() { DEFAULT_PROJECT } else { &own };
    let digest = Digest::of(path.as_os_str().as_bytes()).to_string();
    format!("{own}-{}", &digest[..8])
}

fn is_project_name(name: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    name.len() <= 64 && name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(good)
}
