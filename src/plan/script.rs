//! The language of expectations: one statement a line, each a word and its argument. Pure; `boot` carries them out.
//!
//! | statement | means |
//! | --- | --- |
//! | `expect TEXT` or `expect /REGEX/` | waits for a line of the serial console that holds it, after what was matched last |
//! | `reject TEXT` or `reject /REGEX/` | from here on no line may hold it, after what was matched last; see below |
//! | `send TEXT` | types TEXT and Return; in quotes exactly what is there |
//! | `within TIME` | how long each statement that follows may wait; 2m until said otherwise |
//! | `reboot`, `poweroff` | waits until the guest restarts its machine, or switches it off |
//! | `ssh COMMAND`, `ssh=N COMMAND` | runs it in the guest; its status must be 0, or N |
//! | `output TEXT` or `output /REGEX/` | a line that the last command over ssh printed holds it |
//! | `screenshot NAME` | what is on the screen goes to NAME.png of the report |
//!
//! `reject` is judged while statements behind it wait: `expect`, `reboot`, `poweroff` and `ssh`. Where none is left that
//! does, the script ends no sooner than after the time of `within`, or when the guest switches its machine off; a restart
//! then, or a machine that ends in another way, fails it as it fails `expect`.
//!
//! `"…"` takes `\n \r \t \e \" \\` and `\xNN`. Empty lines and those that begin with `#` say nothing.

use std::fmt::Write;
use std::time::Duration;

use regex::bytes::{Regex, RegexBuilder};

use super::parse_duration;

/// How long a statement waits unless the script says.
pub const DEFAULT_PATIENCE: Duration = Duration::from_secs(120);
/// Most memory that a compiled pattern takes.
const MOST_PATTERN_BYTES: usize = 1 << 20;

/// What one line asks for.
#[derive(Debug, Clone)]
pub enum Step {
    /// A line must come.
    Expect(Regex),
    /// No such line may come from here on: for as long as what follows waits, or this itself where nothing does.
    Reject(Regex),
    /// Bytes typed at the serial console.
    Send(Vec<u8>),
    /// How long what follows waits.
    Within(Duration),
    /// The guest restarts its machine.
    Reboot,
    /// The guest switches it off.
    PowerOff,
    /// A command over ssh ends with this status.
    Ssh {
        /// The command, for the guest's shell.
        command: String,
        /// Its status.
        status: u32,
    },
    /// The last command over ssh printed such a line.
    Output(Regex),
    /// A picture of the screen, in a file of this name.
    Screenshot(String),
}

/// A statement and where it stands.
#[derive(Debug, Clone)]
pub struct Statement {
    /// What it asks for.
    pub step: Step,
    /// The script's name and the number of the line.
    pub place: String,
    /// The line as it was written.
    pub text: String,
}

impl Statement {
    /// Whether it can be met or not; `within` only says how long others wait.
    #[must_use]
    pub fn is_judged(&self) -> bool {
        !matches!(self.step, Step::Within(_))
    }

    /// Whether it waits for the machine; the others are done at once.
    #[must_use]
    pub fn waits(&self) -> bool {
        matches!(self.step, Step::Expect(_) | Step::Reboot | Step::PowerOff | Step::Ssh { .. })
    }
}

/// What is wrong with a line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// No such statement.
    #[error(
        "`{0}` is no statement: expect, reject, send, within, reboot, poweroff, ssh, output or screenshot"
    )]
    Unknown(String),
    /// It needs an argument.
    #[error("`{0}` needs an argument")]
    Missing(String),
    /// It takes none.
    #[error("`{0}` takes no argument")]
    Superfluous(String),
    /// A quoted text does not end.
    #[error("the quotes do not end")]
    Open,
    /// Something follows a quoted text.
    #[error("nothing may follow the quotes")]
    Behind,
    /// An escape that there is not.
    #[error("there is no such escape: \\n, \\r, \\t, \\e, \\\", \\\\ and \\xNN")]
    Escape,
    /// A pattern is not one.
    #[error("this is no regular expression: {0}")]
    Pattern(String),
    /// A text with a byte that no line has in which it is looked for.
    #[error(
        "no line holds `{0}`, so this could never match: control characters end a line or are taken out of it"
    )]
    Never(String),
    /// What a command is to end with is no status.
    #[error("`{0}` is no exit status: 0 to 255, as in `ssh=1 COMMAND`")]
    Status(String),
    /// A picture's name leads elsewhere, or is none.
    #[error("`{0}` is no name for a picture: letters, digits, `-` and `_`")]
    Name(String),
    /// A time is not one.
    #[error("`{0}` is no time: a number and ms, s, m or h")]
    Time(String),
}

/// A line that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{place}, column {column}: {problem}")]
pub struct ScriptError {
    /// The script's name and the number of the line.
    pub place: String,
    /// The number of the line, from 1.
    pub line: usize,
    /// The character where it goes wrong, from 1.
    pub column: usize,
    /// What is wrong.
    pub problem: Problem,
}

/// Reads a script that people call `name`.
///
/// # Errors
/// The first line that cannot be read.
pub fn parse(name: &str, text: &str) -> Result<Vec<Statement>, ScriptError> {
    let mut statements = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let place = format!("{name} line {}", index + 1);
        let shown = line.trim();
        if shown.is_empty() || shown.starts_with('#') {
            continue;
        }
        let step = step(line).map_err(|(at, problem)| ScriptError {
            place: place.clone(),
            line: index + 1,
            column: line.get(..at).unwrap_or(line).chars().count() + 1,
            problem,
        })?;
        statements.push(Statement { step, place, text: shown.to_owned() });
    }
    Ok(statements)
}

/// Where in the line, in bytes, and what is wrong there.
type Wrong = (usize, Problem);

fn step(line: &str) -> Result<Step, Wrong> {
    let start = line.len() - line.trim_start().len();
    let rest = line[start..].trim_end();
    let (word, argument) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    let argument = argument.trim_start();
    let at = start + rest.len() - argument.len();
    let needed = || match argument {
        "" => Err((at, Problem::Missing(word.to_owned()))),
        argument => Ok(argument),
    };
    let alone = |step| match argument {
        "" => Ok(step),
        _ => Err((at, Problem::Superfluous(word.to_owned()))),
    };
    match word {
        "expect" => Ok(Step::Expect(pattern(needed()?, at, is_never_on_the_console)?)),
        "reject" => Ok(Step::Reject(pattern(needed()?, at, is_never_on_the_console)?)),
        "send" => Ok(Step::Send(match quoted(needed()?, at)? {
            Some(bytes) => bytes,
            None => format!("{argument}\r").into_bytes(),
        })),
        "within" => {
            let argument = needed()?;
            let time = parse_duration(argument).ok().filter(|time| !time.is_zero());
            Ok(Step::Within(time.ok_or_else(|| (at, Problem::Time(argument.to_owned())))?))
        }
        "reboot" => alone(Step::Reboot),
        "poweroff" => alone(Step::PowerOff),
        "ssh" => Ok(Step::Ssh { command: needed()?.to_owned(), status: 0 }),
        "output" => Ok(Step::Output(pattern(needed()?, at, ends_a_line)?)),
        "screenshot" => {
            let name = needed()?;
            match name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_')) {
                true => Ok(Step::Screenshot(name.to_owned())),
                false => Err((at, Problem::Name(name.to_owned()))),
            }
        }
        other => match other.strip_prefix("ssh=") {
            Some(status) => match status.parse::<u8>() {
                Ok(number) => Ok(Step::Ssh { command: needed()?.to_owned(), status: number.into() }),
                Err(_) => Err((start + "ssh=".len(), Problem::Status(status.to_owned()))),
            },
            None => Err((start, Problem::Unknown(other.to_owned()))),
        },
    }
}

/// Whether no line of the serial console has this byte: a terminal obeys it, and what is left are lines of text.
fn is_never_on_the_console(byte: u8) -> bool {
    byte.is_ascii_control() && byte != b'\t'
}

/// Whether no line that a command printed has this byte.
fn ends_a_line(byte: u8) -> bool {
    byte == b'\n'
}

/// A pattern between slashes, or a text; `is_never` says of a byte that nothing which is searched has it.
fn pattern(argument: &str, at: usize, is_never: fn(u8) -> bool) -> Result<Regex, Wrong> {
    let inner =
        argument.strip_prefix('/').and_then(|rest| rest.strip_suffix('/')).filter(|inner| !inner.is_empty());
    let source = match (inner, quoted(argument, at)?) {
        (Some(inner), _) => inner.to_owned(),
        (None, text) => {
            let bytes = text.unwrap_or_else(|| argument.as_bytes().to_vec());
            if let Some(byte) = bytes.iter().find(|byte| is_never(**byte)) {
                return Err((at, Problem::Never(byte.escape_ascii().to_string())));
            }
            exactly(&bytes)
        }
    };
    RegexBuilder::new(&source).size_limit(MOST_PATTERN_BYTES).build().map_err(|error| {
        // The library draws a picture of several lines; its last line is what it means.
        let text = error.to_string();
        let meaning = text.lines().last().unwrap_or_default().trim().trim_start_matches("error: ");
        (at, Problem::Pattern(meaning.to_owned()))
    })
}

/// The pattern of these bytes, which need not be UTF-8.
fn exactly(bytes: &[u8]) -> String {
    let mut source = String::new();
    for chunk in bytes.utf8_chunks() {
        source.push_str(&regex::escape(chunk.valid()));
        for byte in chunk.invalid() {
            let _ = write!(source, "(?-u:\\x{byte:02x})");
        }
    }
    source
}

/// The bytes of a text in quotes; none where there are no quotes.
fn quoted(argument: &str, at: usize) -> Result<Option<Vec<u8>>, Wrong> {
    let Some(inner) = argument.strip_prefix('"') else { return Ok(None) };
    let mut bytes = Vec::new();
    let mut characters = inner.char_indices();
    while let Some((index, c)) = characters.next() {
        let here = at + 1 + index;
        match c {
            '"' if characters.as_str().is_empty() => return Ok(Some(bytes)),
            '"' => return Err((here + 1, Problem::Behind)),
            '\\' => match characters.next().map(|(_, escaped)| escaped) {
                Some('n') => bytes.push(b'\n'),
                Some('r') => bytes.push(b'\r'),
                Some('t') => bytes.push(b'\t'),
                Some('e') => bytes.push(0x1b),
                Some('"') => bytes.push(b'"'),
                Some('\\') => bytes.push(b'\\'),
                Some('x') => {
                    let digits: String = characters.by_ref().take(2).map(|(_, digit)| digit).collect();
                    let whole = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
                    let byte = u8::from_str_radix(&digits, 16).ok().filter(|_| whole);
                    bytes.push(byte.ok_or((here, Problem::Escape))?);
                }
                _ => return Err((here, Problem::Escape)),
            },
            c => bytes.extend(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    Err((at, Problem::Open))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(text: &str) -> (usize, Problem) {
        let error = parse("-e", text).expect_err("it is refused");
        (error.column, error.problem)
    }

    #[test]
    fn every_statement_is_read() {
        let text = "# a comment\n\nwithin 90s\n  expect login:  \nexpect /[0-9]+ users?/\nreject Kernel panic\n\
                    send root\nsend \"\\x03\\e[A\"\nreboot\nssh uname -r\n\
                    ssh=3 exit 3\noutput /^6\\.1/\nscreenshot after-ssh\npoweroff\n";
        let statements = parse("boot.txt", text).expect("a good script");
        let shown: Vec<String> = statements.iter().map(|s| format!("{}: {:?}", s.place, s.step)).collect();
        assert_eq!(
            shown,
            [
                "boot.txt line 3: Within(90s)",
                "boot.txt line 4: Expect(Regex(\"login:\"))",
                "boot.txt line 5: Expect(Regex(\"[0-9]+ users?\"))",
                "boot.txt line 6: Reject(Regex(\"Kernel panic\"))",
                "boot.txt line 7: Send([114, 111, 111, 116, 13])",
                "boot.txt line 8: Send([3, 27, 91, 65])",
                "boot.txt line 9: Reboot",
                "boot.txt line 10: Ssh { command: \"uname -r\", status: 0 }",
                "boot.txt line 11: Ssh { command: \"exit 3\", status: 3 }",
                "boot.txt line 12: Output(Regex(\"^6\\\\.1\"))",
                "boot.txt line 13: Screenshot(\"after-ssh\")",
                "boot.txt line 14: PowerOff",
            ]
        );
    }

    #[test]
    fn text_is_no_pattern_unless_it_stands_between_slashes() {
        let statements = parse("-e", "expect a.c[\nexpect /a.c/\nexpect \"/a/\"").expect("a good script");
        let matches = |index: usize, text: &[u8]| match &statements[index].step {
            Step::Expect(regex) => regex.is_match(text),
            _ => false,
        };
        assert!(matches(0, b"a.c[") && !matches(0, b"abc["));
        assert!(matches(1, b"abc"));
        assert!(matches(2, b"x/a/") && !matches(2, b"a"));
    }

    #[test]
    fn bytes_in_quotes_match_though_they_are_no_text() {
        let script = "expect \"caf\\xe9.\"\nexpect \"\\xc3\\xa9\"\noutput \"\\x1b[1m\"";
        let statements = parse("-e", script).expect("a good script");
        let matches = |index: usize, text: &[u8]| match &statements[index].step {
            Step::Expect(regex) | Step::Output(regex) => regex.is_match(text),
            _ => false,
        };
        assert!(matches(0, b"a caf\xe9.") && !matches(0, b"caf\xe9x") && !matches(0, "café.".as_bytes()));
        assert!(matches(1, "café".as_bytes()) && !matches(1, b"caf\xe9"));
        // What a command prints is looked at as it is.
        assert!(matches(2, b"\x1b[1mbold"));
    }

    #[test]
    fn what_could_never_match_is_refused() {
        let never = |shown: &str| Problem::Never(shown.to_owned());
        assert_eq!(wrong("expect \"a\\e[1m\""), (8, never("\\x1b")));
        assert_eq!(wrong("reject \"a\\x07\"").1, never("\\x07"));
        assert_eq!(wrong("expect a\x1b[1m").1, never("\\x1b"));
        assert_eq!(wrong("expect \"one\\ntwo\"").1, never("\\n"));
        assert_eq!(wrong("output \"one\\ntwo\"").1, never("\\n"));
        assert!(parse("-e", "expect \"a\\tb\"\nexpect a\tb\nsend \"\\e\\x00\"").is_ok());
    }

    #[test]
    fn what_is_wrong_is_said_with_its_column() {
        assert_eq!(wrong("  exspect x"), (3, Problem::Unknown("exspect".to_owned())));
        assert_eq!(wrong("expect"), (7, Problem::Missing("expect".to_owned())));
        assert_eq!(wrong("reboot now"), (8, Problem::Superfluous("reboot".to_owned())));
        assert_eq!(wrong("send \"abc"), (6, Problem::Open));
        assert_eq!(wrong("send \"ä\" x"), (9, Problem::Behind));
        assert_eq!(wrong("send \"a\\q\""), (8, Problem::Escape));
        assert_eq!(wrong("send \"\\x+1\""), (7, Problem::Escape));
        assert_eq!(wrong("within soon"), (8, Problem::Time("soon".to_owned())));
        assert_eq!(wrong("within 0s").0, 8);
        assert_eq!(wrong("ssh=256 true"), (5, Problem::Status("256".to_owned())));
        assert_eq!(wrong("ssh=0"), (6, Problem::Missing("ssh=0".to_owned())));
        assert_eq!(wrong("screenshot ../x"), (12, Problem::Name("../x".to_owned())));
        assert!(matches!(wrong("expect /a(/"), (8, Problem::Pattern(_))));
        let second = parse("f", "reboot\nx").expect_err("it is refused");
        assert_eq!(second.place, "f line 2");
    }
}
