//! Canaries: parts of private keys in every form that they have, looked for where no key may be. Two test programs use them.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

const SEARCH: &str = include_str!("search.py");

/// What is looked for, by name.
#[derive(Debug, Clone)]
pub struct Canaries(Vec<(String, Vec<u8>)>);

/// What a search came upon: what, and where.
#[derive(Debug)]
pub struct Found {
    pub hits: Vec<(String, String)>,
    /// How many places were searched, and how many bytes.
    pub places: u64,
    pub bytes: u64,
}

impl Found {
    /// Whether `name` was found in a place whose name has `place` in it.
    pub fn has(&self, name: &str, place: &str) -> bool {
        self.hits.iter().any(|(hit, at)| hit == name && at.contains(place))
    }

    /// Asserts that nothing was found but what was looked for as a proof that the search finds it.
    pub fn is_clean_but_for(&self, controls: &[&str]) {
        let keys: Vec<_> = self.hits.iter().filter(|(name, _)| !controls.contains(&name.as_str())).collect();
        assert!(keys.is_empty(), "private keys where they must not be: {keys:?}");
    }
}

/// A search that goes on for as long as a process.
pub struct Search(Child);

impl Search {
    /// Its end.
    pub fn end(self) -> Found {
        let output = self.0.wait_with_output().expect("it ends");
        assert!(output.status.success(), "the search failed");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut lines: Vec<(String, String)> = text
            .lines()
            .filter_map(|line| line.split_once('\t'))
            .map(|(one, other)| (one.to_owned(), other.to_owned()))
            .collect();
        let (places, bytes) = lines.pop().expect("its last line");
        let number = |text: &str| text.parse().expect("a number");
        Found { places: number(&places), bytes: number(&bytes), hits: lines }
    }
}

impl Canaries {
    /// Those of the set of keys in `keys`: of each a line from the middle of its file, where nothing is public, and its own
    /// number, as bytes and in hexadecimal.
    pub fn of(keys: &Path) -> Self {
        let mut canaries: Vec<(String, Vec<u8>)> = Vec::new();
        for name in ["PK", "KEK", "db", "root"] {
            let text = fs::read_to_string(keys.join(format!("{name}.key"))).expect("made");
            let lines: Vec<&str> = text.lines().collect();
            canaries.push((name.to_owned(), lines[lines.len() / 2].as_bytes().to_vec()));
            let mut openssl = Command::new("openssl");
            openssl.args(["pkey", "-text", "-noout", "-in"]).arg(keys.join(format!("{name}.key")));
            let output = openssl.output().expect("openssl is there");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            let number = said.split("priv:").nth(1).or_else(|| said.split("privateExponent:").nth(1));
            let lines = number.expect("a number").lines().map(str::trim).skip(1).take(2);
            let number: String = lines.collect::<String>().replace(':', "");
            let bytes: Option<Vec<u8>> = (0..number.len() / 2)
                .map(|at| u8::from_str_radix(&number[2 * at..2 * at + 2], 16).ok())
                .collect();
            canaries.push((format!("{name}'s number"), bytes.expect("hexadecimal")[..24].to_vec()));
            canaries.push((format!("{name}'s number in text"), number.as_bytes()[..48].to_vec()));
        }
        Self(canaries)
    }

    /// The same, and `bytes` that will be found: they prove that a search looks where it should.
    pub fn with_control(mut self, name: &str, bytes: &[u8]) -> Self {
        self.0.push((name.to_owned(), bytes.to_vec()));
        self
    }

    /// The name of one that is in `bytes`.
    pub fn find(&self, bytes: &[u8]) -> Option<&str> {
        let there = |canary: &[u8]| bytes.windows(canary.len()).any(|window| window == canary);
        self.0.iter().find(|(_, canary)| there(canary)).map(|(name, _)| name.as_str())
    }

    /// Begins to look at variables and arguments of `process` and of all that it starts, until it ends.
    pub fn watch(&self, process: u32) -> Search {
        self.search(&["watch", &process.to_string()])
    }

    /// Looks at the same once, and into the memory and the open files of all that `process` has started.
    pub fn inside(&self, process: u32) -> Found {
        self.search(&["inside", &process.to_string()]).end()
    }

    /// Looks into all files below `folders` that were changed since `seconds` (since the epoch).
    pub fn below(&self, seconds: f64, folders: &[&Path]) -> Found {
        let seconds = seconds.to_string();
        let folders = folders.iter().map(|folder| folder.to_str().expect("UTF-8"));
        let words: Vec<&str> = ["below", &seconds].into_iter().chain(folders).collect();
        self.search(&words).end()
    }

    fn search(&self, words: &[&str]) -> Search {
        let mut python = Command::new("/usr/bin/python3");
        python.args(["-I", "-c", SEARCH]).args(words).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut python = python.spawn().expect("python3 is there: ci/setup installs it");
        let mut input = python.stdin.take().expect("it is piped");
        for (name, bytes) in &self.0 {
            let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            writeln!(input, "{name}\t{text}").expect("it reads");
        }
        Search(python)
    }
}
