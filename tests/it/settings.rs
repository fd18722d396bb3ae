//! Settings: flag, then environment, then kiln.toml, then default, and `kiln config` says which it was.

use super::host::{Host, Told};

/// Value and origin of a setting in what `kiln config` printed.
fn setting<'a>(told: &'a Told, name: &str) -> (&'a str, &'a str) {
    let line = told.stdout.lines().find(|line| line.split_whitespace().next() == Some(name));
    let line = line.unwrap_or_else(|| panic!("no {name} in: {}", told.stdout));
    let (value, origin) = line[name.len()..].rsplit_once('(').expect("an origin");
    (value.trim(), origin.trim_end_matches(')'))
}

#[test]
fn config_shows_each_setting_with_its_origin() {
    let host = Host::new();
    host.file(
        "kiln.toml",
        "project = \"lua\"\n[settings]\ntag = \"v1\"\nrepo = \"r.example/x\"\nwork = \"out\"\n",
    );
    let mut command = host.kiln();
    command.env("TAG", "v2").env("REPO", "").env_remove("WORK");
    let told =
        Told::by(command.args(["config", "--backend", "qemu", "--debian-mirror", "http://m.example/d"]));
    told.succeeds();
    let work = host.path("out").display().to_string();
    assert_eq!(setting(&told, "PROJECT"), ("lua", "kiln.toml"));
    assert_eq!(setting(&told, "TAG"), ("v2", "environment TAG"));
    assert_eq!(setting(&told, "WORK"), (work.as_str(), "kiln.toml"));
    assert_eq!(setting(&told, "KILN_BACKEND"), ("qemu", "flag"));
    assert_eq!(setting(&told, "debian.mirror"), ("http://m.example/d", "flag"));
    assert_eq!(setting(&told, "debian.keyring").1, "default");
    assert_eq!(setting(&told, "KILN_STORE").1, "environment KILN_STORE");
    // An empty variable is one that is not set.
    assert_eq!(setting(&told, "REPO"), ("r.example/x", "kiln.toml"));
    let secrets = host.path("home/.ssh/lua").display().to_string();
    assert_eq!(setting(&told, "SECRETS"), (secrets.as_str(), "default"));
    let recipe = format!("recipe: {}", host.path("kiln.toml").display());
    assert!(told.stdout.contains(&recipe), "{}", told.stdout);
}

#[test]
fn a_flag_comes_before_the_environment() {
    let host = Host::new();
    let told = host.run(&["config", "--store", "elsewhere", "--lock", "my.lock"]);
    let path = |name: &str| host.path(name).display().to_string();
    assert_eq!(setting(&told, "KILN_STORE"), (path("elsewhere").as_str(), "flag"));
    assert_eq!(setting(&told, "KILN_LOCK").1, "flag");
}

#[test]
fn the_recipe_of_a_folder_above_is_found_and_its_paths_are_beside_it() {
    let host = Host::new();
    host.file("kiln.toml", "project = \"lua\"\n[settings]\nsrcdir = \"src\"\n");
    let inner = host.folder("a/b");
    let told = Told::by(host.kiln().current_dir(inner).arg("config"));
    assert_eq!(setting(&told, "SRCDIR"), (host.path("src").display().to_string().as_str(), "kiln.toml"));
    assert_eq!(setting(&told, "KILN_LOCK").0, host.path("kiln.lock").display().to_string());
}

#[test]
fn the_store_lies_where_caches_do() {
    let host = Host::new();
    let mut command = host.kiln();
    command.env_remove("KILN_STORE").arg("config");
    assert_eq!(
        setting(&Told::by(&mut command), "KILN_STORE").0,
        host.path("home/.cache/kiln").display().to_string()
    );
    let told = Told::by(command.env("XDG_CACHE_HOME", host.path("cache")));
    assert_eq!(setting(&told, "KILN_STORE").0, host.path("cache/kiln").display().to_string());
}

#[test]
fn without_a_home_and_a_store_the_error_says_what_to_set() {
    let host = Host::new();
    let told = Told::by(host.kiln().env_remove("KILN_STORE").env_remove("HOME").args(["run", "--", "true"]));
    told.fails(2, &["KILN_STORE"]);
}

#[test]
fn an_unknown_key_in_the_recipe_is_named_with_line_and_column() {
    let host = Host::new();
    for (text, words) in [
        ("project = \"lua\"\ncolour = \"red\"\n", ["kiln.toml:2:1", "unknown key", "`colour`"]),
        ("[settings]\ntag = \"x\"\n  wrok = \"x\"\n", ["kiln.toml:3:3", "`wrok`", "`work`"]),
        ("[settings]\ntag = 3\n", ["kiln.toml:2:7", "tag = 3", "string"]),
        ("project = \n", ["kiln.toml:1:11", "project =", "value"]),
    ] {
        host.file("kiln.toml", text);
        for arguments in [&["config"][..], &["run", "--", "true"]] {
            host.run(arguments).fails(2, &["kiln.toml"]).fails(2, &words);
        }
    }
}

#[test]
fn a_recipe_that_is_no_text_is_refused_by_name() {
    let host = Host::new();
    host.file("kiln.toml", b"\xff\xfe");
    host.run(&["config"]).fails(2, &["kiln.toml", "UTF-8"]);
}

#[test]
fn a_project_name_that_is_no_folder_name_is_refused() {
    for name in ["../x", "a/b", "", ".hidden", "a b"] {
        // An empty flag is a name, not an absent one.
        Host::new().run(&["config", "--project", name]).fails(2, &["project", "flag", "letters"]);
    }
}

#[test]
fn a_store_that_cannot_be_made_is_named() {
    let host = Host::new();
    host.file("store", "a file");
    let told = host.run(&["run", "--", "true"]);
    told.fails(125, &[&host.path("store").display().to_string(), "is not a directory"]).hints(&["--store"]);
    host.run(&["kernel"]).fails(1, &["is not a directory"]);
    let told = host.run(&["run", "--store", "store/below", "--", "true"]);
    told.fails(125, &["store/below", "cannot be used", "Not a directory"]).hints(&["--store"]);
}

#[test]
fn a_value_in_the_recipe_that_its_setting_does_not_take_is_shown_where_it_stands() {
    let host = Host::new();
    for (text, words) in [
        ("project = \"a/b\"\n", ["kiln.toml:1:11", "`project` is `a/b`", "letters"]),
        (
            "[settings]\nbackend = \"moon\"\n",
            ["kiln.toml:2:11", "`backend` is `moon`", "kvm, qemu, tcg or vmm"],
        ),
        ("[settings]\nstore-limit = \"much\"\n", ["kiln.toml:2:15", "`store-limit` is `much`", "20G"]),
        ("[settings]\nkeeper-idle = \"soon\"\n", ["kiln.toml:2:15", "`keeper-idle` is `soon`", "60s"]),
    ] {
        host.file("kiln.toml", text);
        Told::by(host.kiln().env_remove("KILN_BACKEND").arg("config")).fails(2, &words);
    }
    // Set elsewhere, it is not the recipe's.
    let told = Told::by(host.kiln().env("KILN_KEEPER_IDLE", "soon").arg("config"));
    told.fails(2, &["`keeper-idle` (environment KILN_KEEPER_IDLE) is `soon`"]);
}
