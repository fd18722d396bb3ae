//! Runs a case's statements against a target, and gives each statement its values.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};

use super::case::{Case, Line, Statement, Word};
use super::value::{Names, Value};

/// What a case is run against: it does what statements say.
pub trait Target {
    /// Does one statement; an error is what did not hold, or what the statement lacks.
    fn act(&mut self, step: &mut Step) -> Result<(), String>;

    /// What a name stands for: a constant, or something of the target's state.
    fn name(&self, name: &str) -> Option<Value>;

    /// What a function of the target's gives.
    fn call(&mut self, function: &str, _arguments: &[Value]) -> Result<Value, String> {
        Err(format!("`{function}()` is not known here"))
    }

    /// Starts anew and shows that a good peer is served.
    fn serve(&mut self) -> Result<(), String>;

    /// What must be as it was before the case, whatever the case did.
    fn untouched(&self) -> Result<(), String> {
        Ok(())
    }
}

/// An argument, evaluated before its statement is run.
#[derive(Debug)]
pub struct Argument {
    pub text: String,
    pub value: Result<Value, String>,
}

/// One statement with its values.
#[derive(Debug)]
pub struct Step {
    pub verb: String,
    arguments: Vec<Argument>,
    keys: BTreeMap<String, Value>,
    used: BTreeSet<String>,
    /// Words behind `->`, if there is one.
    expected: Option<Vec<(Option<String>, Argument)>>,
    /// What the target has looked at of all these: an expectation that nobody compares must not pass for one that holds.
    looked: Cell<Looked>,
    /// Names that the statement gives to what it found.
    pub bound: Vec<(String, Value)>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Looked {
    arguments: usize,
    word: bool,
    values: bool,
    keys: bool,
}

impl Step {
    /// The word in this place, as it stands in the file.
    pub fn word(&self, index: usize) -> &str {
        self.reach(index + 1);
        self.arguments.get(index).map_or("", |argument| &argument.text)
    }

    /// How many words there are, keys left out.
    pub fn count(&self) -> usize {
        self.reach(self.arguments.len());
        self.arguments.len()
    }

    /// The value in this place.
    pub fn at(&self, index: usize) -> Result<&Value, String> {
        self.reach(index + 1);
        let missing = || format!("`{}` needs a value in place {}", self.verb, index + 1);
        self.arguments.get(index).ok_or_else(missing)?.value.as_ref().map_err(Clone::clone)
    }

    fn reach(&self, count: usize) {
        let looked = self.looked.get();
        self.looked.set(Looked { arguments: looked.arguments.max(count), ..looked });
    }

    /// The bytes in this place.
    pub fn bytes_at(&self, index: usize) -> Result<Vec<u8>, String> {
        self.at(index)?.bytes(&self.verb).map(<[u8]>::to_vec)
    }

    /// The path in this place.
    pub fn path_at(&self, index: usize) -> Result<std::path::PathBuf, String> {
        use std::os::unix::ffi::OsStringExt;
        Ok(std::ffi::OsString::from_vec(self.bytes_at(index)?).into())
    }

    /// The number in this place.
    pub fn number_at<T: TryFrom<i128>>(&self, index: usize) -> Result<T, String> {
        self.at(index)?.to(&self.verb)
    }

    /// The value of a key, if it is given.
    pub fn key(&mut self, key: &str) -> Option<Value> {
        self.used.insert(key.to_owned());
        self.keys.get(key).cloned()
    }

    /// The number of a key, or `default`.
    pub fn number<T: TryFrom<i128>>(&mut self, key: &str, default: T) -> Result<T, String> {
        self.key(key).map_or(Ok(default), |value| value.to(key))
    }

    /// The bytes of a key, if it is given.
    pub fn bytes(&mut self, key: &str) -> Result<Option<Vec<u8>>, String> {
        self.key(key).map(|value| value.bytes(key).map(<[u8]>::to_vec)).transpose()
    }

    /// All words behind `->`.
    pub fn expected(&self) -> &[(Option<String>, Argument)] {
        self.looked.set(Looked { word: true, values: true, keys: true, ..self.looked.get() });
        self.expected.as_deref().unwrap_or_default()
    }

    /// The first word behind `->`; none where there is no `->`.
    pub fn expected_word(&self) -> Option<&str> {
        self.looked.set(Looked { word: true, ..self.looked.get() });
        self.expected.as_ref().map(|words| words.first().map_or("", |(_, word)| &*word.text))
    }

    /// The words behind the first of them that have no key.
    pub fn expected_values(&self) -> Vec<&Argument> {
        self.looked.set(Looked { values: true, ..self.looked.get() });
        let words = self.expected.iter().flatten().skip(1);
        words.filter(|(key, _)| key.is_none()).map(|(_, word)| word).collect()
    }

    /// The keys behind `->`.
    pub fn expected_keys(&self) -> Result<Vec<(String, Value)>, String> {
        self.looked.set(Looked { keys: true, ..self.looked.get() });
        let words = self.expected.iter().flatten().skip(1);
        words
            .filter_map(|(key, word)| key.as_ref().map(|key| Ok((key.clone(), word.value.clone()?))))
            .collect()
    }

    /// Checks that text which was found holds the string behind the first expected word, if there is one.
    pub fn expect_text(&self, found: &str) -> Result<(), String> {
        match self.expected_values().first() {
            None => Ok(()),
            Some(word) => {
                let part = String::from_utf8_lossy(word.value.clone()?.bytes("text")?).into_owned();
                if found.contains(&part) { Ok(()) } else { Err(format!("`{found}` does not say `{part}`")) }
            }
        }
    }

    /// An outcome that is not the one behind `->`.
    pub fn unlike(&self, found: impl std::fmt::Display) -> String {
        let expected = self.expected.iter().flatten();
        let expected: Vec<String> = expected
            .map(|(key, word)| match key {
                Some(key) => format!("{key}={}", word.text),
                None => word.text.clone(),
            })
            .collect();
        let expected = if expected.is_empty() { "what is usual".to_owned() } else { expected.join(" ") };
        format!("expected {expected}, found {found}")
    }

    /// What stands in the line and nobody has looked at.
    fn leftover(&self) -> Option<&str> {
        let looked = self.looked.get();
        let expected = self.expected.iter().flatten().enumerate();
        let mut ignored = expected.filter(|(index, (key, _))| match (index, key) {
            (0, _) => !looked.word,
            (_, None) => !looked.values,
            (_, Some(_)) => !looked.keys,
        });
        let unused = self.keys.keys().find(|key| !self.used.contains(*key)).map(String::as_str);
        let unused = unused.or_else(|| self.arguments.get(looked.arguments).map(|argument| &*argument.text));
        unused.or_else(|| ignored.next().map(|(_, (key, word))| key.as_deref().unwrap_or(&word.text)))
    }
}

/// Numbers of errors, by the names of the language.
const ERRNOS: [(&str, i32); 21] = [
    ("EPERM", libc::EPERM),
    ("ENOENT", libc::ENOENT),
    ("EIO", libc::EIO),
    ("EBADF", libc::EBADF),
    ("EACCES", libc::EACCES),
    ("EINVAL", libc::EINVAL),
    ("EISDIR", libc::EISDIR),
    ("ENOTDIR", libc::ENOTDIR),
    ("EMFILE", libc::EMFILE),
    ("ENFILE", libc::ENFILE),
    ("ESTALE", libc::ESTALE),
    ("EROFS", libc::EROFS),
    ("ENOSYS", libc::ENOSYS),
    ("ENAMETOOLONG", libc::ENAMETOOLONG),
    ("ENODATA", libc::ENODATA),
    ("EPROTO", libc::EPROTO),
    ("ERANGE", libc::ERANGE),
    ("ELOOP", libc::ELOOP),
    ("EXDEV", libc::EXDEV),
    ("EOPNOTSUPP", libc::EOPNOTSUPP),
    ("E2BIG", libc::E2BIG),
];

/// The name of an error's number.
pub fn errno_name(number: i32) -> String {
    let known = ERRNOS.iter().find(|(_, known)| *known == number);
    known.map_or_else(|| format!("error {number}"), |(name, _)| (*name).to_owned())
}

/// A run of one case against one target.
struct Run<'a> {
    target: &'a mut dyn Target,
    variables: BTreeMap<String, Value>,
}

impl Names for Run<'_> {
    fn name(&self, name: &str) -> Option<Value> {
        let errno =
            || ERRNOS.iter().find(|(known, _)| *known == name).map(|(_, n)| Value::Number((*n).into()));
        self.variables.get(name).cloned().or_else(|| self.target.name(name)).or_else(errno)
    }

    fn call(&mut self, function: &str, arguments: &[Value]) -> Result<Value, String> {
        match (function, arguments) {
            ("descriptors", []) => super::oracle::descriptors().map(|open| Value::from(open.len())),
            _ => self.target.call(function, arguments),
        }
    }
}

/// Runs all of a case. An error begins with the line.
pub fn run(case: &Case, target: &mut dyn Target) -> Result<(), String> {
    Run { target, variables: BTreeMap::new() }.all(&case.body)
}

impl Run<'_> {
    fn all(&mut self, body: &[Statement]) -> Result<(), String> {
        for statement in body {
            match statement {
                Statement::Line(line) => self.line(line),
                Statement::Block(line, body) => self.block(line, body),
            }?;
        }
        Ok(())
    }

    fn block(&mut self, line: &Line, body: &[Statement]) -> Result<(), String> {
        let at = |what: String| format!("line {}: {what}", line.number);
        let first = line.words.first().ok_or_else(|| at(format!("`{}` of what?", line.verb)))?;
        if line.verb == "repeat" {
            let count: u64 = self.value(first).and_then(|value| value.to("repeat")).map_err(at)?;
            let name = line.words.get(1).map(|word| &word.text);
            return (0..count).try_for_each(|number| {
                name.and_then(|name| self.variables.insert(name.clone(), number.into()));
                self.all(body)
            });
        }
        for word in line.words.iter().skip(1) {
            let values = match word.text.split_once("..") {
                Some((from, to)) if !word.text.starts_with('"') => {
                    let number = |this: &mut Self, text: &str| {
                        super::value::Expression::parse(text)?.value(this)?.number("for")
                    };
                    let ends = number(self, from).and_then(|from| Ok((from, number(self, to)?)));
                    let (from, to) = ends.map_err(at)?;
                    Box::new((from..=to).map(Value::Number)) as Box<dyn Iterator<Item = Value>>
                }
                _ => Box::new(std::iter::once(self.value(word).map_err(at)?)),
            };
            for value in values {
                self.variables.insert(first.text.clone(), value.clone());
                self.all(body).map_err(|error| format!("{error} (with {} {value})", first.text))?;
            }
        }
        Ok(())
    }

    fn value(&mut self, word: &Word) -> Result<Value, String> {
        word.expression.as_ref().map_err(Clone::clone)?.value(self)
    }

    fn argument(&mut self, word: &Word) -> Argument {
        Argument { text: word.text.clone(), value: self.value(word) }
    }

    fn line(&mut self, line: &Line) -> Result<(), String> {
        self.act(line).map_err(|what| format!("line {}: {what}", line.number))
    }

    fn act(&mut self, line: &Line) -> Result<(), String> {
        match (line.verb.as_str(), &line.words[..]) {
            ("let", [name, value]) => {
                let value = self.value(value)?;
                self.variables.insert(name.text.clone(), value);
                return Ok(());
            }
            ("expect", [left, comparison, right]) => return self.expect(left, &comparison.text, right),
            ("let" | "expect", _) => return Err(format!("`{}` takes other words", line.verb)),
            _ => {}
        }
        let (mut arguments, mut keys) = (Vec::new(), BTreeMap::new());
        for word in &line.words {
            match &word.key {
                Some(key) => drop(keys.insert(key.clone(), self.value(word)?)),
                None => arguments.push(self.argument(word)),
            }
        }
        let expected = line.expected.as_ref().map(|words| {
            words.iter().map(|word| (word.key.clone(), self.argument(word))).collect::<Vec<_>>()
        });
        let (used, looked, bound) = (BTreeSet::new(), Cell::default(), Vec::new());
        let mut step = Step { verb: line.verb.clone(), arguments, keys, used, expected, looked, bound };
        self.target.act(&mut step)?;
        if let Some(word) = step.leftover() {
            return Err(format!("`{}` has no use for `{word}`", step.verb));
        }
        self.variables.extend(step.bound);
        Ok(())
    }

    fn expect(&mut self, left: &Word, comparison: &str, right: &Word) -> Result<(), String> {
        let (one, other) = (self.value(left)?, self.value(right)?);
        let holds = match (comparison, &one, &other) {
            ("==", ..) => one == other,
            ("!=", ..) => one != other,
            ("<", Value::Number(one), Value::Number(other)) => one < other,
            ("<=", Value::Number(one), Value::Number(other)) => one <= other,
            (">", Value::Number(one), Value::Number(other)) => one > other,
            (">=", Value::Number(one), Value::Number(other)) => one >= other,
            _ => return Err(format!("`{comparison}` does not compare these")),
        };
        if holds {
            return Ok(());
        }
        Err(format!("{} {comparison} {} does not hold: {one} and {other}", left.text, right.text))
    }
}
