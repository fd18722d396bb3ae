//! The scripts beside initOS's recipe: what they call kiln with for each of their words, and that kiln takes it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::host::{Host, Told};

/// The folder of the recipe that ships.
fn recipe() -> PathBuf {
    fs::canonicalize(Path::new(env!("CARGO_MANIFEST_DIR")).join("images/initos")).expect("it ships")
}

/// A script of that folder, which finds kiln in `folder`.
fn script(host: &Host, name: &str, words: &[&str], folder: &Path) -> Command {
    let mut script = host.program(&recipe().join(name));
    script.args(words).env("PATH", format!("{}:/usr/bin:/bin", folder.display()));
    script
}

#[test]
fn each_word_of_the_scripts_is_a_call_of_kiln() {
    let host = Host::new();
    host.script("bin/kiln", "pwd\nprintf '<%s>' \"$@\"");
    let recipe = recipe();
    let here = fs::canonicalize(host.path("")).expect("it is there");
    let drun = format!("<drun><--directory><{}>", recipe.display());
    let (setup, docker) = ("setup.sh", "start-docker");
    for (name, words, place, call) in [
        (setup, &[][..], &recipe, "<build><all>"),
        (setup, &["all"], &recipe, "<build><all>"),
        (setup, &["efi2", "--net", "full"], &recipe, "<build><efi2><--net><full>"),
        (setup, &["sign", "--init"], &recipe, "<sign><--init>"),
        (setup, &["drun", "sh", "-c", "a  b"], &here, &format!("{drun}<sh><-c><a  b>")),
        (docker, &["drun", "efi"], &here, &format!("{drun}<efi>")),
        (docker, &["drunit"], &recipe, "<shell><recovery>"),
        (docker, &["drunit", "check"], &recipe, "<shell><check>"),
        (docker, &["drunit", "sh"], &recipe, "<exec><--tty><recovery><--><sh>"),
        (docker, &["drunit", "c.eck"], &recipe, "<exec><--tty><recovery><--><c.eck>"),
        (docker, &["drunit", "check", "a  b"], &recipe, "<exec><--tty><recovery><--><check><a  b>"),
        (docker, &["drunit", "-l"], &recipe, "<exec><--tty><recovery><--><-l>"),
    ] {
        let told = Told::by(&mut script(&host, name, words, &host.path("bin")));
        assert_eq!(told.succeeds().stdout, format!("{}\n{call}", place.display()), "{name} {words:?}");
    }
    for (words, said) in [(&[][..], "no word"), (&["start"], "start"), (&["stop"], "stop")] {
        let told = Told::by(&mut script(&host, docker, words, &host.path("bin")));
        assert_eq!((told.code, told.stdout.as_str()), (Some(2), ""), "{words:?}");
        assert!(told.stderr.starts_with(&format!("start-docker: {said}: drun CMD")), "{}", told.stderr);
    }
}

#[test]
fn a_command_on_the_terminal_is_one_in_the_machine_of_a_step_of_either_layout() {
    let host = Host::new();
    for layout in ["separate", "single"] {
        let mut check = host.kiln();
        check.args(["recipe", "check", "--set", &format!("layout={layout}")]).current_dir(recipe());
        let told = Told::by(&mut check);
        assert!(told.succeeds().stdout.lines().any(|step| step == "recovery"), "{}", told.stdout);
    }
    let kiln = Path::new(env!("CARGO_BIN_EXE_kiln")).parent().expect("a folder");
    for words in [&["drunit"][..], &["drunit", "sh"]] {
        Told::by(&mut script(&host, "start-docker", words, kiln)).fails(2, &["not a terminal"]);
    }
    host.is_untouched();
}
