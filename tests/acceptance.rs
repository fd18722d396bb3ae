//! The tables of tests in `docs/initos.md` are true. The acceptance tests are found by their names: what their table names is
//! there and says so (`acceptance/held.rs`), and nothing says so that it does not name. Those of signing are there.

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

/// The rows of the table in the section `title` of the document, each of `N` cells.
fn rows<const N: usize>(title: &str) -> Vec<[String; N]> {
    let text = read(&here("docs/initos.md"));
    let (_, text) = text.split_once(&format!("## {title}\n")).expect("the section");
    let section = text.split("\n## ").next().unwrap_or(text);
    let cells = |line: &str| -> [String; N] {
        let line = line.strip_prefix('|').and_then(|line| line.strip_suffix('|')).expect("a row");
        let cells: Vec<String> = line.split('|').map(|cell| cell.trim().to_owned()).collect();
        cells.try_into().expect("as many cells as the table has")
    };
    section.lines().filter(|line| line.starts_with("| ")).skip(2).map(cells).collect()
}

/// The functions of a cell, each with its folder.
fn tests(cell: &str) -> Vec<(String, String)> {
    let mut tests = Vec::new();
    for group in cell.split("; ").filter(|group| !group.is_empty()) {
        let (folder, functions) = group.split_once(": ").expect("a folder before its functions");
        let folder = folder.trim_matches('`');
        tests.extend(functions.split(", ").map(|function| (folder.to_owned(), function.to_owned())));
    }
    tests
}

fn table() -> Table {
    let mut table = Table::default();
    for [name, target, cell] in rows("What is tested, by name") {
        let steps = target.split(", ").filter(|step| !step.is_empty());
        table.targets.insert(name.clone(), steps.map(|step| step.trim_matches('`').to_owned()).collect());
        for (folder, function) in tests(&cell) {
            table.tests.insert((folder, function, name.clone()));
        }
    }
    table
}

/// Every test function below `folder`, in modules within files too, and what each of them says.
fn functions(folder: &Path, found: &mut BTreeSet<String>, shown: &mut Shown) {
    let entries = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path());
    for path in entries {
        if path.is_dir() {
            functions(&path, found, shown);
        } else if path.extension().is_some_and(|kind| kind == "rs") {
            let (mut function, mut is_test) = (String::new(), false);
            for line in read(&path).lines() {
                is_test |= line.trim() == "#[test]";
                if let Some((name, _)) = line.trim().strip_prefix("fn ").and_then(|rest| rest.split_once('('))
                    && is_test
                {
                    is_test = false;
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

#[test]
fn every_case_of_signing_has_tests_that_are_there() {
    let rows = rows::<4>("What is tested of signing");
    let cases: Vec<&str> = rows.iter().map(|[case, ..]| case.as_str()).collect();
    assert_eq!(cases, (1..=17).map(|number| format!("SG{number:02}")).collect::<Vec<_>>());
    for [case, _, cell, _] in &rows {
        let named = tests(cell);
        assert!(!named.is_empty(), "{case} is held by nothing");
        for (folder, function) in named {
            let (mut found, mut shown) = (BTreeSet::new(), BTreeSet::new());
            functions(&here(&folder), &mut found, &mut shown);
            assert!(found.contains(&function), "{case}: {folder} has no test {function}");
        }
    }
}
