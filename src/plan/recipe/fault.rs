//! What is wrong with a recipe, where: file, line and column, the line itself, and the way out.

use std::fmt;
use std::ops::Range;

use super::nearest;

/// A mistake in a recipe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// What the recipe is called.
    pub file: String,
    /// The line, counted from one.
    pub line: usize,
    /// The column in characters, counted from one.
    pub column: usize,
    /// What is wrong.
    pub message: String,
    /// What the user can do about it.
    pub hint: Option<String>,
    shown: String,
    width: usize,
}

/// The longest piece of a line that is shown.
const SHOWN_CHARACTERS: usize = 120;

impl Fault {
    /// What is wrong with the bytes `span` of the recipe `text`, which is called `file`.
    pub fn at(text: &str, file: &str, span: Range<usize>, message: String) -> Self {
        let before = |at: usize| {
            let mut at = at.min(text.len());
            while !text.is_char_boundary(at) {
                at -= 1;
            }
            at
        };
        let start = before(span.start);
        let line_start = text[..start].rfind('\n').map_or(0, |at| at + 1);
        let line = text[line_start..].split(['\n', '\r']).next().unwrap_or_default();
        let column = text[line_start..start].chars().count() + 1;
        let end = before(span.end).clamp(start, line_start + line.len().max(start - line_start));
        Self {
            file: file.to_owned(),
            line: text[..start].matches('\n').count() + 1,
            column,
            message,
            hint: None,
            shown: line
                .chars()
                .take(SHOWN_CHARACTERS)
                .map(|c| if c.is_control() { ' ' } else { c })
                .collect(),
            width: text[start..end].chars().count().clamp(1, SHOWN_CHARACTERS),
        }
    }

    /// The same with a way out.
    #[must_use]
    pub fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    /// What the reader of TOML says, in kiln's words where it has some.
    pub(super) fn of_toml(error: &toml::de::Error, text: &str, file: &str) -> Self {
        let span = error.span().unwrap_or(0..0);
        let message = error.message().trim_end_matches('\n').to_owned();
        let mut quoted = message.split('`').skip(1).step_by(2);
        let Some(word) = message.strip_prefix("unknown field ").and_then(|_| quoted.next()) else {
            return Self::at(text, file, span, message.replace('\n', ", "));
        };
        let known: Vec<&str> = quoted.collect();
        let fault = Self::at(text, file, span, format!("unknown key `{word}`"));
        match nearest(word, known.iter().copied()) {
            Some(meant) => fault.hint(format!("did you mean `{meant}`?")),
            None => fault.hint(format!("the keys here are {}", known.join(", "))),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, line, column, message, shown, width, .. } = self;
        write!(f, "{file}:{line}:{column}: {message}")?;
        let number = line.to_string();
        let gap = " ".repeat(number.len());
        let indent = " ".repeat((column - 1).min(SHOWN_CHARACTERS));
        let marks = "^".repeat((*width).min(shown.chars().count().saturating_sub(column - 1)).max(1));
        write!(f, "\n{number} | {shown}\n{gap} | {indent}{marks}")
    }
}

impl std::error::Error for Fault {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_shown_whatever_stands_there() {
        let text = "a = 1\n\tgr\u{fc}n = x\r\nlast";
        for at in 0..=text.len() + 3 {
            for end in [at, at + 1, at + 90] {
                let fault = Fault::at(text, "kiln.toml", at..end, "wrong".to_owned());
                assert!(fault.to_string().contains('^'), "{fault}");
            }
        }
        let at = text.find('x').expect("there");
        let fault = Fault::at(text, "kiln.toml", at..at + 1, "wrong".to_owned());
        assert_eq!(fault.to_string(), "kiln.toml:2:9: wrong\n2 |  gr\u{fc}n = x\n  |         ^");
    }
}
