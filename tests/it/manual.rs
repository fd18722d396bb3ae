//! Completion and manual pages: made from what the command line takes, and of nothing else.

use std::fs;
use std::process::Command;

use super::host::{Host, Told};

/// The verbs that `--help` names, below `above`.
fn verbs(host: &Host, above: &[&str]) -> Vec<String> {
    let help = host.run(&[above, &["--help"]].concat()).stdout;
    let lines =
        help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let verbs = lines.filter_map(|line| line.split_whitespace().next()).filter(|verb| *verb != "help");
    verbs.map(str::to_owned).collect()
}

#[test]
fn every_verb_has_a_page_and_nothing_else_has() {
    let host = Host::new();
    host.run(&["man", "man1"]).succeeds();
    let mut expected = vec!["kiln.1".to_owned()];
    for verb in verbs(&host, &[]) {
        expected.extend(verbs(&host, &[&verb]).iter().map(|inner| format!("kiln-{verb}-{inner}.1")));
        expected.push(format!("kiln-{verb}.1"));
    }
    assert!(expected.len() > 10, "{expected:?}");
    let mut pages: Vec<String> = fs::read_dir(host.path("man1"))
        .expect("it was made")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("text"))
        .collect();
    pages.sort();
    expected.sort();
    assert_eq!(pages, expected);
    let run = host.path("man1/kiln-run.1");
    let run = fs::read_to_string(run).expect("a page");
    for word in ["reads", "GUEST", "Examples", "src\\-writable"] {
        assert!(run.contains(word), "no {word} in: {run}");
    }
    let main = fs::read_to_string(host.path("man1/kiln.1")).expect("a page");
    assert!(host.run(&["man"]).stdout == main, "the main page is one");
}

#[test]
fn what_kiln_starts_of_itself_is_nobody_elses() {
    let host = Host::new();
    host.run(&["man", "man1"]).succeeds();
    let mut texts: Vec<String> = ["bash", "zsh", "fish"]
        .map(|shell| host.run(&["completion", shell]).succeeds().stdout.clone())
        .to_vec();
    texts.extend(
        fs::read_dir(host.path("man1"))
            .expect("pages")
            .map(|page| fs::read_to_string(page.expect("an entry").path()).expect("a page")),
    );
    texts.push(host.run(&["--help"]).stdout);
    for text in texts {
        assert!(!text.contains("__launch") && !text.contains("kiln __"), "{text}");
    }
}

#[test]
fn bash_completes_verbs_options_and_their_words() {
    let host = Host::new();
    let script = host.file("complete", host.run(&["completion", "bash"]).succeeds().stdout.as_bytes());
    for (words, expected) in [
        (&["kiln", "roo"][..], "root"),
        (&["kiln", "root", ""], "ls show diff rm"),
        (&["kiln", "run", "--src-w"], "--src-writable"),
        (&["kiln", "run", "--clock", ""], "host fixed"),
        (&["kiln", "completion", ""], "bash zsh fish"),
    ] {
        let (last, at) = (words[words.len() - 1], words.len() - 1);
        let quoted: Vec<String> = words.iter().map(|word| format!("'{word}'")).collect();
        let ask = format!(
            "source {}; COMP_WORDS=({}); COMP_CWORD={at}; _kiln kiln '{last}' '{}'; echo \"${{COMPREPLY[@]}}\"",
            script.display(),
            quoted.join(" "),
            words[at - 1]
        );
        let told = Told::by(Command::new("bash").args(["--norc", "-c", &ask]));
        assert!(told.stdout.contains(expected), "{words:?}: {} {}", told.stdout, told.stderr);
    }
}

#[test]
fn shells_that_are_not_known_are_refused_with_those_that_are() {
    let told = Host::new().run(&["completion", "tcsh"]);
    assert_eq!(told.code, Some(2));
    assert!(told.stderr.contains("bash, zsh, fish"), "{}", told.stderr);
}

#[test]
fn pages_that_cannot_be_written_say_where() {
    let host = Host::new();
    host.file("file", "");
    host.run(&["man", "file/man1"]).fails(1, &["file/man1`", "Not a directory"]);
}
