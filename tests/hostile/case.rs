//! A case: one small file that says what a hostile peer does and what has to come of it. Parsing only.
//!
//! ```text
//! # A name that leads elsewhere is refused.
//! against fs
//! LOOKUP nodeid=s name=".." -> EINVAL
//! ```

use std::path::{Path, PathBuf};

use super::value::Expression;

/// What a case is run against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// The fs device, on queues and memory of the case's own.
    Fs,
    /// The vsock device, likewise.
    Vsock,
    /// kiln's own VMM's block device, likewise.
    Disk,
    /// The entropy device, likewise.
    Rng,
    /// The balloon, likewise.
    Balloon,
    /// A device behind the registers of kiln's own VMM.
    Mmio,
    /// The whole device process, by a front end that speaks vhost-user.
    Process,
    /// The host's side of the wire, and the collector behind it; the case is the agent.
    Host,
    /// The agent's side of the wire; the case is the host.
    Agent,
    /// What a terminal is shown of a guest's output.
    Terminal,
}

impl Subject {
    /// All of them, by the words of the language.
    pub const ALL: [(&'static str, Self); 10] = [
        ("fs", Self::Fs),
        ("vsock", Self::Vsock),
        ("disk", Self::Disk),
        ("rng", Self::Rng),
        ("balloon", Self::Balloon),
        ("mmio", Self::Mmio),
        ("process", Self::Process),
        ("host", Self::Host),
        ("agent", Self::Agent),
        ("terminal", Self::Terminal),
    ];

    /// The subject of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(known, _)| *known == name).map(|(_, subject)| *subject)
    }

    /// Whether its driver can be a guest: it has queues in memory, and no process of its own.
    pub fn has_driver(self) -> bool {
        matches!(self, Self::Fs | Self::Vsock | Self::Disk | Self::Rng | Self::Balloon | Self::Mmio)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, known)| *known == self).map_or("", |(name, _)| name)
    }
}

/// What a case may cost, where it has to be more than the oracle's figures.
#[derive(Debug, Clone, Copy, Default)]
pub struct Allowance {
    pub memory_bytes: Option<u64>,
    pub seconds: Option<u64>,
}

/// A word of a line: `text`, or `key=text`.
#[derive(Debug, Clone)]
pub struct Word {
    pub key: Option<String>,
    /// As it stands there, without the key.
    pub text: String,
    /// What that is as an expression; a word like `ok` is the name `ok`.
    pub expression: Result<Expression, String>,
}

/// One statement on one line.
#[derive(Debug, Clone)]
pub struct Line {
    pub number: usize,
    pub verb: String,
    pub words: Vec<Word>,
    /// What stands behind `->`.
    pub expected: Option<Vec<Word>>,
}

/// A statement, with what it encloses.
#[derive(Debug, Clone)]
pub enum Statement {
    Line(Line),
    /// `repeat COUNT [NAME]` and `for NAME VALUE…`, up to their `end`.
    Block(Line, Vec<Self>),
}

/// A parsed file.
#[derive(Debug, Clone)]
pub struct Case {
    pub path: PathBuf,
    /// The file's name without its extension.
    pub name: String,
    pub against: Vec<Subject>,
    /// Why it is not run.
    pub skip: Option<String>,
    /// Why it is run only where it is asked for by its name.
    pub slow: Option<String>,
    pub allow: Allowance,
    pub body: Vec<Statement>,
}

impl Case {
    /// Parses a file's text. An error names the line.
    pub fn parse(path: &Path, text: &str) -> Result<Self, String> {
        let mut case = Self {
            path: path.to_owned(),
            name: path.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
            against: Vec::new(),
            skip: None,
            slow: None,
            allow: Allowance::default(),
            body: Vec::new(),
        };
        if !text.lines().next().is_some_and(|line| line.starts_with("# ") && line.len() > 10) {
            return Err(format!("{}: the first line says in words what must hold: `# …`", path.display()));
        }
        let mut open: Vec<(Line, Vec<Statement>)> = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            let at = |what: String| format!("{}:{number}: {what}", path.display());
            let Some(line) = parse_line(number, line).map_err(at)? else { continue };
            if open.is_empty() && case.header(&line).map_err(at)? {
                continue;
            }
            let done = match line.verb.as_str() {
                "repeat" | "for" => {
                    open.push((line, Vec::new()));
                    continue;
                }
                "end" => {
                    let (head, body) = open.pop().ok_or_else(|| at("`end` of nothing".to_owned()))?;
                    Statement::Block(head, body)
                }
                _ => Statement::Line(line),
            };
            open.last_mut().map_or(&mut case.body, |(_, body)| body).push(done);
        }
        match (open.pop(), case.against.is_empty()) {
            (Some((line, _)), _) => {
                Err(format!("{}:{}: `{}` without `end`", path.display(), line.number, line.verb))
            }
            (None, true) => Err(format!("{}: `against` is missing", path.display())),
            (None, false) => Ok(case),
        }
    }

    /// Takes a line that is about the whole case; false where it is a statement.
    fn header(&mut self, line: &Line) -> Result<bool, String> {
        match line.verb.as_str() {
            "against" => {
                for word in &line.words {
                    let subject = Subject::named(&word.text);
                    self.against.push(subject.ok_or_else(|| format!("nothing is called `{}`", word.text))?);
                }
            }
            "skip" | "slow" => {
                let words: Vec<_> = line.words.iter().map(|word| word.text.as_str()).collect();
                let why = if line.verb == "skip" { &mut self.skip } else { &mut self.slow };
                *why = Some(words.join(" "));
            }
            "allow" => {
                let mut words = line.words.iter();
                let why = words.by_ref().position(|word| word.key.is_none() && word.text == "because");
                if why.is_none() || words.next().is_none() {
                    return Err("`allow … because` needs a reason".to_owned());
                }
                for word in line.words.iter().take(why.unwrap_or(0)) {
                    let number = || {
                        let value = word.expression.clone()?.value(&mut Nothing)?;
                        value.to::<u64>("allow")
                    };
                    match word.key.as_deref() {
                        Some("memory") => self.allow.memory_bytes = Some(number()?),
                        Some("seconds") => self.allow.seconds = Some(number()?),
                        _ => return Err(format!("`{}` cannot be allowed", word.text)),
                    }
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// Where nothing has a name.
struct Nothing;

impl super::value::Names for Nothing {
    fn name(&self, _name: &str) -> Option<super::value::Value> {
        None
    }

    fn call(&mut self, function: &str, _: &[super::value::Value]) -> Result<super::value::Value, String> {
        Err(format!("`{function}` is not known here"))
    }
}

/// The statement of one line; none where it is empty or a comment.
fn parse_line(number: usize, line: &str) -> Result<Option<Line>, String> {
    let mut words = split(line)?.into_iter();
    let Some(verb) = words.next() else { return Ok(None) };
    let mut line = Line { number, verb, words: Vec::new(), expected: None };
    for word in words {
        if word == "->" && line.expected.is_none() {
            line.expected = Some(Vec::new());
            continue;
        }
        let (key, text) = match word.split_once('=') {
            Some((key, text)) if !key.is_empty() && is_key(key) && !text.starts_with('=') => {
                (Some(key.to_owned()), text.to_owned())
            }
            _ => (None, word),
        };
        let expression = Expression::parse(&text);
        line.expected.as_mut().unwrap_or(&mut line.words).push(Word { key, text, expression });
    }
    Ok(Some(line))
}

fn is_key(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.'))
}

/// Cuts a line at spaces outside of quotes and parentheses, and at the `#` of a comment.
fn split(line: &str) -> Result<Vec<String>, String> {
    let (mut words, mut word) = (Vec::new(), String::new());
    let (mut quoted, mut escaped, mut depth) = (false, false, 0_u32);
    for c in line.chars() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            '#' if !quoted && word.is_empty() && depth == 0 => break,
            '(' if !quoted => depth += 1,
            ')' if !quoted => depth = depth.saturating_sub(1),
            ' ' | '\t' if !quoted && depth == 0 => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                continue;
            }
            _ => {}
        }
        word.push(c);
    }
    if quoted || depth > 0 {
        return Err("a quote or parenthesis does not end".to_owned());
    }
    if !word.is_empty() {
        words.push(word);
    }
    Ok(words)
}
