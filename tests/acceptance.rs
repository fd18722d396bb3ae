//! The acceptance tests of initOS are found by their names: the table in `docs/initos.md` is true. What it names is there and
//! says so (`acceptance/held.rs`), and nothing says so that it does not name.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// A function of a folder's, and the name that it says.
type Shown = BTreeSet<(String, String)>;

#[derive(Default)]
struct Table {
    /// The names, each with the steps of the recipe's target.
    targets: BTreeMap<String, Vec<String>>,
    /// Folder, function and name.
    tests: BTreeSet<(String, String, String)>,
}

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).expect("it is there")
}

fn table() -> Table {
    let text = read(&here("docs/initos.md"));
    let (_, text) = text.split_once("## What is tested, by name").expect("the section");
    let mut table = Table::default();
    for line in text.lines().filter(|line| line.starts_with("| ")).skip(2) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [name, target, tests] = cells[..] else { unreachable!("not three cells: {line}") };
        let steps = target.split(", ").filter(|step| !step.is_empty());
        table.targets.insert(name.to_owned(), steps.map(|step| step.trim_matches('`').to_owned()).collect());
        for group in tests.split("; ").filter(|group| !group.is_empty()) {
            let (folder, functions) = group.split_once(": ").expect("a folder before its functions");
            for function in functions.split(", ") {
                let folder = folder.trim_matches('`').to_owned();
                table.tests.insert((folder, function.to_owned(), name.to_owned()));
            }
        }
    }
    table
}

/// Every test function below `folder`, and what each of them says.
fn functions(folder: &Path, found: &mut BTreeSet<String>, shown: &mut Shown) {
    let entries = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path());
    for path in entries {
        if path.is_dir() {
            functions(&path, found, shown);
        } else if path.extension().is_some_and(|kind| kind == "rs") {
            let mut function = String::new();
            for line in read(&path).lines() {
                if let Some((name, _)) = line.strip_prefix("fn ").and_then(|rest| rest.split_once('(')) {
                    name.clone_into(&mut function);
                    found.insert(function.clone());
                }
                if let Some(name) = line.trim().strip_prefix("held(\"") {
                    shown.insert((function.clone(), name.trim_end_matches("\");").to_owned()));
                }
            }
        }
    }
}

#[test]
fn every_name_of_the_table_is_said_where_it_says_so_and_nowhere_else() {
    let table = table();
    assert_eq!(table.targets.len(), 21, "tests 1 to 13, 15 to 17 and 20 to 23, and ab-select");
    for folder in table.tests.iter().map(|(folder, ..)| folder).collect::<BTreeSet<_>>() {
        let (mut found, mut shown) = (BTreeSet::new(), BTreeSet::new());
        functions(&here(folder), &mut found, &mut shown);
        let named = table.tests.iter().filter(|(it, ..)| it == folder);
        let named: Shown = named.map(|(_, function, name)| (function.clone(), name.clone())).collect();
        for (function, _) in &named {
            assert!(found.contains(function), "{folder} has no test {function}");
        }
        assert_eq!(shown, named, "said in {folder}, and in the table");
    }
}

#[test]
fn each_target_of_the_recipe_that_has_a_name_is_of_the_steps_in_the_table() {
    let recipe: toml::Table = read(&here("images/initos/kiln.toml")).parse().expect("a recipe");
    let targets = recipe["targets"].as_table().expect("a table");
    let steps = |name: &str| -> Vec<String> {
        let steps = targets.get(name).and_then(toml::Value::as_array).into_iter().flatten();
        steps.map(|step| step.as_str().expect("a name").to_owned()).collect()
    };
    for (name, named) in table().targets {
        assert_eq!(steps(&name), named, "{name}");
    }
}
