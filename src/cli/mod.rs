//! The command line: clap types, one file a verb family, and output rendering. No logic.

mod again;
mod ask;
mod boot;
mod build;
mod choice;
mod config;
mod doctor;
mod drun;
mod enter;
mod events;
mod fresh;
mod interrupt;
mod keep;
mod kernel;
mod lock;
mod machines;
mod manual;
mod named;
mod recipe;
mod report;
mod root;
mod run;
mod schema;
mod screen;
mod show;
mod sign;
mod signals;
mod store;
mod terminal;
mod totals;
mod trace;
mod verdict;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, Parser, Subcommand};

use choice::Choice;

use crate::engine::build::BuildError;
use crate::engine::build::sources::SourceError;
use crate::engine::{Host, HostError, RunError};
use crate::keeper::background::{self, Caller};
use crate::keeper::{DoorError, Registry, RegistryError};
use crate::machine::MachineError;
use crate::settings::{Flags, Settings, SettingsError};
use crate::shortage::Shortage;

/// Builds software with every step in its own microVM, and says what each step really read.
#[derive(Debug, Parser)]
#[command(
    name = "kiln",
    version,
    max_term_width = 100,
    subcommand_required = true,
    arg_required_else_help = true
)]
#[command(after_help = "\
Examples:
  kiln doctor                                     what this host can do, and what is missing
  kiln init && kiln build                         a recipe to begin with, built
  kiln why compile                                why that step would run
  kiln shell compile                              a shell in a machine as that step gets it
  kiln run -- uname -a                            a command in a fresh Debian machine
  kiln run --root debian:bookworm+gcc,make,libc6-dev \\
      --src . --src-writable --work out --out lua \\
      -- sh -c 'make && cp lua $WORK/'            build a source tree, take one file out
  kiln run --keep -- make                         keep the machine where the command fails
  kiln shell make-7f3a                            look into it
  kiln boot disk.img -e 'expect login:'           an image on real firmware
  kiln lock update -n                             what newer packages there are
  kiln config                                     every setting and where it was set

Exit codes: 0 done, 1 failed, 2 usage, 3 this host cannot do it. `kiln run`, `drun`, `exec` and `shell` give the
command's own status; 124 timed out, 125 kiln failed, 126 not executable, 127 not found, 128+N killed by
signal N, or interrupted by it.")]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

/// Settings that every verb takes.
#[derive(Debug, Args, Clone)]
#[command(next_help_heading = "Settings")]
struct Global {
    /// Give a variable of the recipe (`[variables]`) this value; may be repeated
    #[arg(long, global = true, value_name = "NAME=VALUE")]
    set: Vec<String>,
    /// Name in /ws/PROJECT and /x/PROJECT [env: PROJECT] [default: the recipe's, else `project`]
    #[arg(long, global = true, value_name = "NAME")]
    project: Option<String>,
    /// kiln's store [env: KILN_STORE] [default: $XDG_CACHE_HOME/kiln]
    #[arg(long, global = true, value_name = "DIR")]
    store: Option<PathBuf>,
    /// How much the store may hold; what was used least recently goes [env: KILN_STORE_LIMIT] [default: none]
    #[arg(long, global = true, value_name = "SIZE")]
    store_limit: Option<String>,
    /// Lock file [env: KILN_LOCK] [default: kiln.lock beside kiln.toml, else here]
    #[arg(long, global = true, value_name = "FILE")]
    lock: Option<PathBuf>,
    /// What runs machines [env: KILN_BACKEND] [default: auto]
    #[arg(long, global = true, value_name = "BACKEND", value_parser = Choice(&["auto", "kvm", "qemu", "tcg", "vmm"]))]
    backend: Option<String>,
    /// Debian mirror [env: KILN_DEBIAN_MIRROR] [default: the host's APT sources]
    #[arg(long, global = true, value_name = "URL")]
    debian_mirror: Option<String>,
    /// Mirror of its security archive [env: KILN_DEBIAN_SECURITY_MIRROR] [default: the host's APT sources]
    #[arg(long, global = true, value_name = "URL")]
    debian_security_mirror: Option<String>,
    /// Take indexes after their Valid-Until
    #[arg(long, global = true)]
    debian_allow_expired: bool,
    /// Archive of old packages, for locked ones that mirrors dropped; with {archive} and {time} in it, or a mirror's
    /// [env: KILN_DEBIAN_SNAPSHOT] [default: none]
    #[arg(long, global = true, value_name = "URL")]
    debian_snapshot: Option<String>,
    /// Keyring that signs it [env: KILN_DEBIAN_KEYRING] [default: what the APT sources name]
    #[arg(long, global = true, value_name = "FILE")]
    debian_keyring: Option<PathBuf>,
    /// Refuse what the lock file does not name [env: KILN_LOCKED=on]
    #[arg(long, global = true)]
    locked: bool,
    /// Fetch nothing: only what is in the store, or vendored; implies --locked [env: KILN_OFFLINE=on]
    #[arg(long, global = true)]
    offline: bool,
    /// Take bytes from what `kiln lock vendor` made before any server is asked [env: KILN_VENDOR]
    #[arg(long, global = true, value_name = "DIR|FILE")]
    vendor: Option<PathBuf>,
    /// Trust servers that the certificate authorities in FILE (PEM) vouch for, and no others [env: KILN_CA_FILE] [default:
    /// those that browsers trust]
    #[arg(long, global = true, value_name = "FILE")]
    ca_file: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run the steps of the recipe that must run
    Build(Box<build::BuildArguments>),
    /// Say why a step would run, or why it need not
    Why(ask::WhyArguments),
    /// Print what a step really read
    Inputs(ask::InputsArguments),
    /// Print what a step printed when it ran last
    Log(ask::LogArguments),
    /// Draw the steps of the recipe and what they need
    Graph(ask::GraphArguments),
    /// Run one command in its own machine and take its outputs
    Run(Box<run::RunArguments>),
    /// Run a step of the recipe by its name, or a command whose writes to WORK are all kept
    Drun(Box<drun::DrunArguments>),
    /// Boot an image on real firmware, and judge what it prints
    Boot(Box<boot::BootArguments>),
    /// Run a command in a machine that was kept, or in one as a step of the recipe gets it
    Exec(enter::ExecArguments),
    /// Open a shell in a machine that was kept, or in one as a step of the recipe gets it
    Shell(enter::ShellArguments),
    /// List the machines that run and those that were kept
    Ps(machines::PsArguments),
    /// End machines
    Stop(machines::StopArguments),
    /// Make signing keys, or sign the boot images that a build left in WORK
    Sign(sign::SignArguments),
    /// Fetch, verify and lock the kernel that machines boot
    Kernel(kernel::KernelArguments),
    /// Write a commented recipe that builds
    Init(recipe::InitArguments),
    /// Check the recipe, or print the schema of recipes
    Recipe(recipe::RecipeArguments),
    /// Show, update and prune the lock file, or take along its bytes
    Lock(lock::LockArguments),
    /// List, show, compare and remove the roots in the store
    Root(root::RootArguments),
    /// Say what is in the store, remove what may go, and check it
    Store(store::StoreArguments),
    /// Print the JSON schema of what kiln writes for programs
    Schema(schema::SchemaArguments),
    /// Say what this host can do, by doing it, and how to get what is missing
    Doctor(doctor::DoctorArguments),
    /// Print every setting and where it was set
    Config(config::ConfigArguments),
    /// Print what completes kiln's arguments in a shell
    Completion(manual::CompletionArguments),
    /// Print the manual page, or write those of all verbs
    Man(manual::ManArguments),
}

/// kiln itself failed.
const FAILED: u8 = 1;
/// Bad usage.
const USAGE: u8 = 2;
/// This host cannot do it.
const CANNOT: u8 = 3;

/// A failure of kiln, as it is shown.
#[derive(Debug)]
struct Failure {
    text: String,
    hint: Option<String>,
    code: u8,
}

impl Failure {
    fn new(error: &(dyn std::error::Error + 'static), hint: Option<String>, code: u8) -> Self {
        let hint = Shortage::behind(error).map(|lack| lack.hint().to_owned()).or(hint);
        Self { text: show::chain(error), hint, code }
    }

    /// As `--json` has it.
    fn event(&self) -> events::Line<'_> {
        events::Line::Error { text: &self.text, hint: self.hint.as_deref(), again: None }
    }

    /// The same, of an attempt to `what`.
    fn about(self, what: &str) -> Self {
        Self { text: format!("cannot {what}: {}", self.text), ..self }
    }
}

fn code_of_machine(error: &MachineError) -> u8 {
    match error {
        MachineError::Missing { .. } | MachineError::TooOld { .. } | MachineError::NoProgram(_) => CANNOT,
        _ => FAILED,
    }
}

fn code_of_host(error: &HostError) -> u8 {
    match error {
        HostError::Boundary { .. } | HostError::NoAgent { .. } => CANNOT,
        HostError::NotLocked { .. }
        | HostError::Contradiction { .. }
        | HostError::Overlap(_)
        | HostError::Network { .. } => USAGE,
        HostError::Root(error) if error.is_the_users() => USAGE,
        HostError::Bundle(error) if error.is_the_users() => USAGE,
        HostError::Machine(error) => code_of_machine(error),
        _ => FAILED,
    }
}

fn code_of_run(error: &RunError) -> u8 {
    match error {
        RunError::Host(error) => code_of_host(error),
        RunError::Machine(error) => code_of_machine(error),
        RunError::Input(_) | RunError::Output(_) | RunError::Env(_) => USAGE,
        _ => FAILED,
    }
}

/// The exit status of a build that could not do a step for `error`.
fn code_of_build(error: &BuildError) -> u8 {
    match error {
        BuildError::Run(error) => code_of_run(error),
        BuildError::Boot(error) if error.is_the_hosts() => CANNOT,
        BuildError::Source(error) if error.is_the_users() => USAGE,
        BuildError::Environment { .. } | BuildError::OnePlace { .. } => USAGE,
        _ => FAILED,
    }
}

impl From<SettingsError> for Failure {
    fn from(error: SettingsError) -> Self {
        let hint = error.hint();
        Self::new(&error, hint, USAGE)
    }
}

impl From<HostError> for Failure {
    fn from(error: HostError) -> Self {
        Self::new(&error, error.hint(), code_of_host(&error))
    }
}

impl From<DoorError> for Failure {
    fn from(error: DoorError) -> Self {
        let hint = error.hint();
        Self::new(&error, hint, FAILED)
    }
}

impl From<RegistryError> for Failure {
    fn from(error: RegistryError) -> Self {
        Self::new(&error, None, FAILED)
    }
}

impl From<BuildError> for Failure {
    fn from(error: BuildError) -> Self {
        Self::new(&error, error.hint(), code_of_build(&error))
    }
}

impl From<SourceError> for Failure {
    fn from(error: SourceError) -> Self {
        BuildError::from(error).into()
    }
}

impl From<RunError> for Failure {
    fn from(error: RunError) -> Self {
        Self::new(&error, error.hint(), code_of_run(&error))
    }
}

/// Reads the command line and does what it says.
pub fn main() -> ExitCode {
    obey(std::env::args_os(), None)
}

/// As [`main`], for a kiln that was started to stay where that is asked for.
pub fn main_that_can_stay() -> ExitCode {
    match Caller::meet() {
        Ok(caller) => {
            let mut arguments = std::env::args_os();
            let program = arguments.next();
            obey(program.into_iter().chain(arguments.skip(1)), Some(caller))
        }
        Err(error) => {
            show::failure(&format!("this is for kiln itself: {error}"), None);
            ExitCode::from(USAGE)
        }
    }
}

fn obey(arguments: impl Iterator<Item = OsString>, caller: Option<Caller>) -> ExitCode {
    // A file that would outgrow `ulimit -f` is an error then, with a name, and not the end of kiln. Where this fails, it is
    // as it was.
    let _ = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::default());
    match dispatch(Cli::parse_from(arguments), caller) {
        Ok(code) => code,
        Err(failure) => {
            show::failure(&failure.text, failure.hint.as_deref());
            ExitCode::from(failure.code)
        }
    }
}

fn dispatch(cli: Cli, caller: Option<Caller>) -> Result<ExitCode, Failure> {
    let mut flags = Flags {
        variables: cli.global.set,
        project: cli.global.project,
        store: cli.global.store,
        store_limit: cli.global.store_limit,
        lock: cli.global.lock,
        backend: cli.global.backend,
        debian_mirror: cli.global.debian_mirror,
        debian_security_mirror: cli.global.debian_security_mirror,
        debian_allow_expired: cli.global.debian_allow_expired,
        debian_keyring: cli.global.debian_keyring,
        debian_snapshot: cli.global.debian_snapshot,
        locked: cli.global.locked,
        offline: cli.global.offline,
        vendor: cli.global.vendor,
        ca_file: cli.global.ca_file,
        ..Flags::default()
    };
    match cli.verb {
        Verb::Build(arguments) => match caller.is_none() && arguments.may_stay() {
            true => Ok(stay_in_background(FAILED)),
            false => build::build(&arguments, flags, caller),
        },
        Verb::Why(arguments) => ask::why(&arguments, flags),
        Verb::Inputs(arguments) => ask::inputs(&arguments, flags),
        Verb::Log(arguments) => ask::log(&arguments, flags),
        Verb::Graph(arguments) => ask::graph(&arguments, flags),
        Verb::Run(arguments) => {
            flags.srcdir.clone_from(&arguments.src);
            flags.work.clone_from(&arguments.work);
            flags.no_template = arguments.no_template;
            flags.no_keeper = arguments.no_keeper;
            flags.keeper_idle.clone_from(&arguments.keeper_idle);
            flags.network = arguments.net == run::FULL;
            if caller.is_none() && arguments.may_stay() {
                return Ok(stay_in_background(run::KILN_FAILED));
            }
            match &arguments.named.step {
                Some(name) => Ok(named::run(&arguments, name, flags)),
                None => Ok(run::run(&arguments, flags, caller)),
            }
        }
        Verb::Drun(arguments) => drun::drun(*arguments, flags),
        Verb::Boot(arguments) => {
            let wanted = boot::read(&arguments)?;
            boot::run(&arguments, wanted, &open(flags)?)
        }
        Verb::Exec(arguments) => Ok(enter::exec(&arguments, flags)),
        Verb::Shell(arguments) => Ok(enter::shell(&arguments, flags)),
        Verb::Ps(arguments) => machines::ps(&arguments, &registry(flags)?),
        Verb::Stop(arguments) => machines::stop(&arguments, &open(flags)?),
        Verb::Sign(arguments) => {
            flags.work.clone_from(&arguments.work);
            sign::sign(&arguments, &Settings::read(flags)?)
        }
        Verb::Kernel(arguments) => kernel::kernel(&arguments, &open(flags)?),
        Verb::Init(arguments) => recipe::init(&arguments),
        Verb::Recipe(arguments) => recipe::recipe(&arguments, flags),
        Verb::Lock(arguments) => lock::lock(&arguments, flags),
        Verb::Root(arguments) => root::root(&arguments, open(flags)),
        Verb::Store(arguments) => store::store(&arguments, &open(flags)?),
        Verb::Schema(arguments) => schema::schema(&arguments),
        Verb::Doctor(arguments) => match open(flags) {
            Ok(host) => doctor::doctor(&host, &arguments),
            Err(failure) => Ok(doctor::no_store(&failure)),
        },
        Verb::Config(arguments) => config::config(&arguments, Settings::read(flags)?),
        Verb::Completion(arguments) => manual::completion(&arguments),
        Verb::Man(arguments) => manual::man(&arguments),
    }
}

fn open(flags: Flags) -> Result<Host, Failure> {
    Ok(Host::open(Settings::read(flags)?)?)
}

/// The machines of the store.
fn registry(flags: Flags) -> Result<Registry, Failure> {
    Ok(Registry::open(&open(flags)?.store.run())?)
}

/// Lets another kiln do the same, which can stay when this one is done. `failed` says that there can be none.
fn stay_in_background(failed: u8) -> ExitCode {
    match background::run(std::env::args_os(), &interrupt::heeded_signals()) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let failure = Failure::new(&error, None, failed).about("start a kiln that can keep a machine");
            show::failure(&failure.text, failure.hint.as_deref());
            ExitCode::from(failure.code)
        }
    }
}
