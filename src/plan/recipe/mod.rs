//! The recipe: what `kiln.toml` may say, as types. The JSON schema that editors use is made of the same types.
//!
//! `fault` shows where a recipe is wrong; `given` sets variables from outside; `expand` makes plain steps of a matrix. What the steps of a recipe mean
//! together is [`super::graph`]'s business.

mod boot;
mod expand;
mod fault;
mod given;
mod make;
mod nearest;

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::Deserialize;
use toml::Spanned;

pub use boot::{BootTable, ChangeTable};
pub use expand::{Expanded, NAMES, Steps, expand, is_name};
pub use fault::Fault;
pub use given::GivenError;
pub use make::{FromKeys, FromTable, MakeTable, Several};
pub use nearest::nearest;

/// A recipe that `kiln init` writes: it builds, and says what else there is.
pub const TEMPLATE: &str = include_str!("template.toml");

/// A text and where it stands.
pub type Text = Spanned<String>;

/// `kiln.toml`
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Recipe {
    /// The name in /ws/PROJECT and /x/PROJECT, where a step sees SRCDIR and WORK.
    #[schemars(with = "Option<String>")]
    pub project: Option<Text>,
    /// Settings; flags and the environment come before them.
    pub settings: RecipeSettings,
    /// Globs of what no step sees of SRCDIR.
    #[schemars(with = "Vec<String>")]
    pub ignore: Vec<Text>,
    /// Root file systems by name.
    #[schemars(with = "BTreeMap<String, RootTable>")]
    pub roots: BTreeMap<Text, RootTable>,
    /// Files from outside by name; a step finds each at $KILN_SOURCES/NAME.
    #[schemars(with = "BTreeMap<String, SourceTable>")]
    pub sources: BTreeMap<Text, SourceTable>,
    /// Variables: `%{NAME}` stands for a value wherever a matrix's would, and `when` of a step asks for one.
    #[schemars(with = "BTreeMap<String, String>")]
    pub variables: BTreeMap<Text, Text>,
    /// Steps by name.
    #[schemars(with = "BTreeMap<String, StepTable>")]
    pub steps: BTreeMap<Text, StepTable>,
    /// Names for lists of steps; `kiln build` without arguments builds `default`, or every step.
    #[schemars(with = "BTreeMap<String, Vec<String>>")]
    pub targets: BTreeMap<Text, Vec<Text>>,
}

/// `[settings]`
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct RecipeSettings {
    /// Where outputs go.
    pub work: Option<PathBuf>,
    /// What is built; the recipe's folder unless said.
    pub srcdir: Option<PathBuf>,
    /// Signing keys, which no step ever sees.
    pub secrets: Option<PathBuf>,
    /// Where images are published.
    pub repo: Option<String>,
    /// Under which tag.
    pub tag: Option<String>,
    /// kiln's store.
    pub store: Option<PathBuf>,
    /// How much the store may hold, such as `20G`; `none`: as much as the disk has.
    #[schemars(with = "Option<String>")]
    pub store_limit: Option<Text>,
    /// `auto`, `kvm`, `qemu`, `tcg` or `vmm`.
    #[schemars(with = "Option<String>")]
    pub backend: Option<Text>,
    /// QEMU's program.
    pub qemu: Option<String>,
    /// Whether machines may be copies of templates.
    pub template: Option<bool>,
    /// Whether a machine is kept ready for the next run.
    pub keeper: Option<bool>,
    /// How long a ready machine waits for a run.
    #[schemars(with = "Option<String>")]
    pub keeper_idle: Option<Text>,
    /// Refuse what kiln.lock does not name.
    pub locked: Option<bool>,
    /// Fetch nothing.
    pub offline: Option<bool>,
    /// Vendored bytes: what `kiln lock vendor` made.
    pub vendor: Option<PathBuf>,
    /// Certificate authorities that vouch for servers, in place of those that browsers trust.
    pub ca_file: Option<PathBuf>,
    /// Debian's archive.
    pub debian: Option<RecipeDebian>,
}

/// `[settings.debian]`
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct RecipeDebian {
    /// The mirror.
    pub mirror: Option<String>,
    /// The mirror of the security archive.
    pub security_mirror: Option<String>,
    /// An archive that keeps old packages, asked for locked ones that the mirror lacks.
    pub snapshot: Option<String>,
    /// The keyring that signs it.
    pub keyring: Option<PathBuf>,
    /// Take indexes after their Valid-Until.
    #[serde(default)]
    pub allow_expired: bool,
}

/// `[roots.NAME]`
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct RootTable {
    /// `debian:SUITE`, `dir:PATH`, `file:ARCHIVE` or `file:IMAGE`; paths are relative to the recipe.
    #[schemars(with = "String")]
    pub from: Text,
    /// Debian packages beside the essential ones: NAME or NAME=VERSION.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub packages: Vec<Text>,
}

/// `[sources.NAME]`
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct SourceTable {
    /// Where it is fetched from: https; or http, with its sha256.
    #[schemars(with = "Option<String>")]
    pub url: Option<Text>,
    /// Where else it may be had; asked in this order when the URL does not have it.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub mirrors: Vec<Text>,
    /// In place of url: a git repository, whose tree at `rev` the step gets as a tar archive.
    #[schemars(with = "Option<String>")]
    pub git: Option<Text>,
    /// The commit's whole id, or a tag, which kiln.lock then pins to a commit.
    #[schemars(with = "Option<String>")]
    pub rev: Option<Text>,
    /// Its SHA-256. Where it is left out, the first fetch writes it into kiln.lock.
    #[schemars(with = "Option<String>")]
    pub sha256: Option<Text>,
}

/// The clock of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ClockWord {
    /// The host's.
    #[default]
    Host,
    /// It starts at SOURCE_DATE_EPOCH.
    Fixed,
}

/// The network of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NetworkWord {
    /// None.
    #[default]
    None,
    /// Where the host reaches, and the host itself: QEMU's user network. Nothing of such a step is kept, so that it runs each time.
    Full,
}

/// `limits` of a step: sizes are bytes or a number with K, M, G, T; times seconds, or numbers with h, m, s, ms (1m30s).
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct LimitsTable {
    /// Memory of the machine.
    #[schemars(with = "Option<String>")]
    pub memory: Option<Text>,
    /// Processors of the machine; the host's unless said, and of a boot two, or one where they are emulated.
    #[schemars(with = "Option<u16>")]
    pub cpus: Option<Spanned<u16>>,
    /// Space for what the command writes, beyond memory.
    #[schemars(with = "Option<String>")]
    pub scratch: Option<Text>,
    /// Stop the command after this long.
    #[schemars(with = "Option<String>")]
    pub timeout: Option<Text>,
    /// How much the command may print.
    #[schemars(with = "Option<String>")]
    pub printed: Option<Text>,
    /// How much its outputs may come to.
    #[schemars(with = "Option<String>")]
    pub outputs: Option<Text>,
    /// How many files they may be.
    pub files: Option<u64>,
    /// How many processes it may have.
    pub processes: Option<u32>,
}

/// `[steps.NAME]`
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct StepTable {
    /// What it does: shell, or whatever the interpreter takes as its last word.
    #[schemars(with = "Option<String>")]
    pub run: Option<Text>,
    /// A script file in SRCDIR, in place of `run`.
    #[schemars(with = "Option<String>")]
    pub script: Option<Text>,
    /// In place of `run`: artifacts that kiln makes on the host, without a machine, one after the other.
    #[serde(default)]
    pub make: Several<MakeTable>,
    /// In place of `run`: sign what the steps it needs left in WORK, with the keys in SECRETS, on the host.
    #[serde(default)]
    pub sign: bool,
    /// In place of `run`: an image that is booted on real firmware, on the host, and what it should do.
    pub boot: Option<BootTable>,
    /// Values that variables must have for it; else it is left out, of targets and of what other steps need too.
    #[serde(default)]
    #[schemars(with = "BTreeMap<String, String>")]
    pub when: BTreeMap<Text, Text>,
    /// What runs it: ["sh", "-eu", "-c"], for a script ["sh", "-eu"], unless said.
    #[serde(default)]
    pub interpreter: Vec<String>,
    /// A root of the recipe by name, a root as `--root` takes it, or step:NAME/PATH for an image, archive or folder that a step
    /// puts out. Not needed where the recipe has just one.
    #[schemars(with = "Option<String>")]
    pub root: Option<Text>,
    /// The kernel: debian:SUITE, file:PATH of a vmlinux or bzImage beside the recipe, or step:NAME and step:NAME/PATH for one
    /// that a step puts out, with its modules.
    #[schemars(with = "Option<String>")]
    pub kernel: Option<Text>,
    /// A folder with the modules of a kernel that is a file, such as /lib/modules/RELEASE.
    #[schemars(with = "Option<String>")]
    pub modules: Option<Text>,
    /// Steps whose outputs it sees in WORK.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub needs: Vec<Text>,
    /// Globs below WORK of what it sees of those; all of it unless said.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub inputs: Vec<Text>,
    /// Globs below WORK of what it puts out; a folder is taken whole.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub outputs: Vec<Text>,
    /// Sources it sees; all of them unless said.
    #[schemars(with = "Option<Vec<String>>")]
    pub sources: Option<Vec<Text>>,
    /// Variables.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Variables of the host's that are passed on.
    #[serde(default)]
    pub pass_env: Vec<String>,
    /// Working directory: SRCDIR unless said, or one below it, or with `/` before it any of the machine.
    pub directory: Option<String>,
    /// Give its view of SRCDIR a private writable layer, dropped at the end.
    #[serde(default)]
    pub writable_source: bool,
    /// Its network; with one it runs each time.
    #[serde(default)]
    pub network: NetworkWord,
    /// Its clock.
    #[serde(default)]
    pub clock: ClockWord,
    /// What it may use at most.
    #[serde(default)]
    pub limits: LimitsTable,
    /// The code is not trusted: demand hardware virtualisation and a whole jail.
    #[serde(default)]
    pub untrusted: bool,
    /// One step for each combination: `%{NAME}` stands for a value in run, script, root, needs, inputs, outputs, env, and in texts of
    /// make and boot.
    #[serde(default)]
    #[schemars(with = "BTreeMap<String, Vec<String>>")]
    pub matrix: BTreeMap<Text, Vec<String>>,
}

impl Recipe {
    /// Reads the text of a recipe that errors call `name`.
    ///
    /// # Errors
    /// [`Fault`], with line and column.
    pub fn parse(text: &str, name: &str) -> Result<Self, Fault> {
        toml::from_str(text).map_err(|error| Fault::of_toml(&error, text, name))
    }

    /// The JSON schema of a recipe.
    pub fn schema() -> schemars::Schema {
        schemars::schema_for!(Recipe)
    }
}

#[cfg(test)]
mod tests;
