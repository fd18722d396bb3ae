//! `kiln drun`: a step of the recipe by its name, or a command in a machine with the layout that initOS's scripts know.
//! Either is another verb's work: `build`'s, or `run`'s with folders of WORK at the places of a system.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser};

use super::build::{self, BuildArguments};
use super::choice::Choice;
use super::run::{self, RunArguments};
use super::{Failure, USAGE, recipe};
use crate::plan::{Plan, RootSpec, nearest};
use crate::settings::{Flags, Settings};

/// Folders of WORK, and where in the machine they are seen as well.
pub(super) const LAYOUT: [(&str, &str); 4] = [
    ("boot", "/boot"),
    ("modules", "/lib/modules"),
    ("firmware", "/lib/firmware"),
    ("work/cache", "/etc/apk/cache"),
];
/// The root of a recipe that a command gets unless it says another.
const PREFERRED: [&str; 2] = ["recovery", "default"];

/// Arguments of `kiln drun`.
#[derive(Debug, Args)]
#[command(after_help = "\
One word that the recipe has as a step or target is built, as `kiln build` does it. Anything else is a command. Its
machine sees the root at /, SRCDIR read-only at /ws/PROJECT, WORK at /x/PROJECT, and of WORK also
  boot at /boot, modules at /lib/modules, firmware at /lib/firmware, work/cache at /etc/apk/cache.
Everything that it writes in these places, or removes there, is done to WORK when it succeeds, whoever had put there
what was there before; when it fails, nothing is. It is never skipped, and steps of the recipe do not see what it wrote.

Examples:
  kiln drun efi2                              a step
  kiln drun -- cat /boot/version              a command; after -- no word is taken for an option of kiln's
  kiln drun /ws/initos/setup-initos sqfs      a script of the source tree
  kiln drun --root debian:trixie+mtools --net full -- sh -c 'apt-get update'")]
pub(super) struct DrunArguments {
    /// Look for the recipe from this folder, as if called there
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
    /// Where / comes from: a root of the recipe by its name, or as `kiln run --root` takes it [default: the recipe's
    /// root `recovery`, else its `default` or its only one, else debian:bookworm]
    #[arg(long, value_name = "ROOT")]
    root: Option<String>,
    /// Source tree, read-only at /ws/PROJECT [env: SRCDIR] [default: /ws/PROJECT, else the recipe's folder]
    #[arg(long, value_name = "DIR")]
    src: Option<PathBuf>,
    /// Where outputs go, at /x/PROJECT [env: WORK] [default: /x/PROJECT, else $HOME/.cache/PROJECT]
    #[arg(long, value_name = "DIR")]
    work: Option<PathBuf>,
    /// The network of a command, or of steps that ask for it: none, or full: what this host reaches, and 10.0.2.2 for the
    /// host itself
    #[arg(long, value_name = "NETWORK", value_parser = Choice(&["none", "full"]))]
    net: Option<String>,
    /// Set a variable of a command, or pass the host's on
    #[arg(long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Pass standard input to a command
    #[arg(long)]
    stdin: bool,
    /// Memory of a command's machine [default: 2G]
    #[arg(long, value_name = "SIZE")]
    memory: Option<String>,
    /// Stop a command after this long, such as 90s or 1m30s
    #[arg(long, value_name = "TIME")]
    timeout: Option<String>,
    /// Write what a command read, as JSON with digests
    #[arg(long, value_name = "FILE")]
    reads: Option<PathBuf>,
    /// Write events as JSON, one a line, to standard output
    #[arg(long)]
    json: bool,
    /// Say nothing but the command's own output and errors
    #[arg(long, short)]
    quiet: bool,
    /// A step or target of the recipe, or a command and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "NAME|CMD")]
    words: Vec<OsString>,
}

/// The arguments of another verb by themselves, for what they are without flags.
#[derive(Debug, Parser)]
struct Alone<A: Args> {
    #[command(flatten)]
    arguments: A,
}

/// What a verb's arguments are where only `words` are said.
fn plain<A: Args>(words: impl IntoIterator<Item = OsString>) -> Result<A, Failure> {
    let words = [OsString::from("kiln")].into_iter().chain(words);
    let alone = Alone::try_parse_from(words);
    let wrong = |error: clap::Error| Failure { text: error.to_string(), hint: None, code: USAGE };
    alone.map(|Alone { arguments }| arguments).map_err(wrong)
}

/// `kiln drun`.
pub(super) fn drun(arguments: DrunArguments, mut flags: Flags) -> Result<ExitCode, Failure> {
    if let Some(directory) = &arguments.directory {
        flags.recipe_from = Some(directory.canonicalize().map_err(|error| Failure {
            text: format!("--directory {}: {error}", directory.display()),
            hint: Some("it names the folder of a recipe, or one below it".to_owned()),
            code: USAGE,
        })?);
    }
    flags.srcdir.clone_from(&arguments.src);
    flags.work.clone_from(&arguments.work);
    let settings = Settings::read(flags.clone())?;
    let plan = settings.recipe.as_ref().map(recipe::plan).transpose()?.unwrap_or_default();
    if let Some(name) = step_named(&plan, &arguments.words) {
        return run_step(&arguments, name, flags);
    }
    let command = arguments.words.iter().cloned();
    let mut run: RunArguments = plain([OsString::from("--")].into_iter().chain(command))?;
    run.layout = true;
    run.steps = plan.steps.iter().map(|step| step.name.clone()).collect();
    let folder = settings.recipe.as_ref().and_then(|file| file.path.parent()).unwrap_or(Path::new("."));
    run.root = root(&plan, folder, arguments.root.as_deref())?.unwrap_or(run.root);
    run.net = arguments.net.unwrap_or(run.net);
    flags.network = run.net == run::FULL;
    run.memory = arguments.memory.unwrap_or(run.memory);
    (run.env, run.stdin, run.timeout, run.reads) =
        (arguments.env, arguments.stdin, arguments.timeout, arguments.reads);
    (run.src, run.work, run.json, run.quiet) =
        (arguments.src, arguments.work, arguments.json, arguments.quiet);
    Ok(run::run(&run, flags, None))
}

/// The step or target that is meant, where the words are the name of one.
fn step_named<'a>(plan: &Plan, words: &'a [OsString]) -> Option<&'a str> {
    let [word] = words else { return None };
    let name = word.to_str()?;
    plan.wanted(&[name.to_owned()]).is_ok().then_some(name)
}

/// Builds the step `name`, for which the recipe says what a command's flags could.
fn run_step(arguments: &DrunArguments, name: &str, flags: Flags) -> Result<ExitCode, Failure> {
    let said = [
        ("--root", arguments.root.is_some()),
        ("--env", !arguments.env.is_empty()),
        ("--stdin", arguments.stdin),
        ("--memory", arguments.memory.is_some()),
        ("--timeout", arguments.timeout.is_some()),
        ("--reads", arguments.reads.is_some()),
    ];
    if let Some((flag, _)) = said.iter().find(|(_, said)| *said) {
        return Err(Failure {
            text: format!("`{name}` is a step of the recipe, and {flag} is for commands"),
            hint: Some(format!("say it in the recipe; a program of that name is run by `env {name}`")),
            code: USAGE,
        });
    }
    let mut build: BuildArguments = plain([OsString::from(name)])?;
    build.work.clone_from(&arguments.work);
    (build.json, build.quiet) = (arguments.json, arguments.quiet);
    build.net = arguments.net.clone().unwrap_or(build.net);
    build::build(&build, flags, None)
}

/// The root of a command as `kiln run` takes it; none where nothing says which. Paths of the recipe are `folder`'s.
fn root(plan: &Plan, folder: &Path, said: Option<&str>) -> Result<Option<String>, Failure> {
    let shown = |root: &RootSpec| match root {
        RootSpec::Directory(path) => RootSpec::Directory(folder.join(path)).to_string(),
        RootSpec::File(path) => RootSpec::File(folder.join(path)).to_string(),
        root => root.to_string(),
    };
    let Some(said) = said else {
        let preferred = PREFERRED.iter().find_map(|name| plan.roots.get(*name));
        let only = plan.roots.values().next().filter(|_| plan.roots.len() == 1);
        return Ok(preferred.or(only).map(shown));
    };
    if said.contains(':') {
        return Ok(Some(said.to_owned()));
    }
    let Some(root) = plan.roots.get(said) else {
        let known = plan.roots.keys().map(String::as_str);
        let hint = nearest(said, known).map(|meant| format!("did you mean `{meant}`?"));
        return Err(Failure { text: format!("the recipe has no root `{said}`"), hint, code: USAGE });
    };
    Ok(Some(shown(root)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::recipe::Recipe;

    fn plan(text: &str) -> Plan {
        Plan::of(&Recipe::parse(text, "kiln.toml").expect("a recipe"), text, "kiln.toml").expect("a plan")
    }

    fn words(words: &[&str]) -> Vec<OsString> {
        words.iter().map(OsString::from).collect()
    }

    const TEXT: &str = "[roots.recovery]\nfrom = \"dir:tree\"\n[roots.other]\nfrom = \"debian:trixie\"\n\
                        [steps.efi]\nroot = \"other\"\nrun = \"true\"\n[targets]\nall = [\"efi\"]\n";

    #[test]
    fn one_word_that_the_recipe_knows_is_a_step_and_all_else_a_command() {
        let plan = plan(TEXT);
        assert_eq!(step_named(&plan, &words(&["efi"])), Some("efi"));
        assert_eq!(step_named(&plan, &words(&["all"])), Some("all"));
        for command in [&["efi2"][..], &["efi", "x"], &["./efi"], &["env", "efi"]] {
            assert_eq!(step_named(&plan, &words(command)), None, "{command:?}");
        }
        assert_eq!(step_named(&Plan::default(), &words(&["efi"])), None);
    }

    #[test]
    fn a_command_gets_the_root_that_is_said_else_the_recipes_recovery_root() {
        let (plan, folder) = (plan(TEXT), Path::new("/recipe"));
        let root = |said| root(&plan, folder, said).expect("a root");
        assert_eq!(root(None).as_deref(), Some("dir:/recipe/tree"));
        assert_eq!(root(Some("other")).as_deref(), Some("debian:trixie"));
        assert_eq!(root(Some("dir:tree")).as_deref(), Some("dir:tree"));
        assert_eq!(super::root(&Plan::default(), folder, None).expect("no root"), None);
        let failure = super::root(&plan, folder, Some("othr")).expect_err("no such root");
        assert_eq!(failure.hint.as_deref(), Some("did you mean `other`?"));
    }

    #[test]
    fn a_commands_step_binds_the_layout_and_puts_out_everything() {
        let mut run: RunArguments = plain(words(&["--", "sh", "-c", "x"])).expect("arguments");
        let step = run::step(&run).expect("a step");
        assert!(step.binds.is_empty() && step.outputs.is_empty() && !step.network);
        run.layout = true;
        run.net = "full".to_owned();
        let step = run::step(&run).expect("a step");
        assert_eq!(step.binds, LAYOUT);
        assert!(step.outputs.are_everything() && step.network);
        assert_eq!(step.argv, [&b"sh"[..], b"-c", b"x"]);
    }
}
