//! Control data (deb822): paragraphs of `Name: value` fields, read without copying.
//!
//! One reader for Release files, package indexes, control files in packages and APT's `.sources`. Values come
//! back as they stand, continuation lines and all.

/// A line that is neither a field, a continuation nor a comment.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("control data has a line that is no field: `{line}`")]
pub struct ControlError {
    /// The line, shortened.
    pub line: String,
}

/// The paragraphs of `text`, which empty lines part.
pub fn paragraphs(text: &str) -> impl Iterator<Item = Paragraph<'_>> {
    let mut rest = text;
    std::iter::from_fn(move || {
        rest = rest.trim_start_matches(['\n', '\r']);
        if rest.is_empty() {
            return None;
        }
        let end = rest.find("\n\n").map_or(rest.len(), |position| position + 1);
        let (paragraph, tail) = rest.split_at(end);
        rest = tail;
        Some(Paragraph { text: paragraph })
    })
}

/// One paragraph.
#[derive(Debug, Clone, Copy)]
pub struct Paragraph<'a> {
    text: &'a str,
}

impl<'a> Paragraph<'a> {
    /// The fields in order: name and value, the value trimmed at both ends.
    pub fn fields(&self) -> impl Iterator<Item = Result<(&'a str, &'a str), ControlError>> + use<'a> {
        let mut rest = self.text;
        std::iter::from_fn(move || {
            while rest.starts_with('#') {
                rest = rest.split_once('\n').map_or("", |(_, tail)| tail);
            }
            if rest.trim().is_empty() {
                return None;
            }
            let mut end = line_end(rest, 0);
            while rest[end..].starts_with([' ', '\t']) {
                end = line_end(rest, end);
            }
            let (field, tail) = rest.split_at(end);
            rest = tail;
            Some(match field.split_once(':') {
                Some((name, value)) if is_field_name(name) => Ok((name, value.trim())),
                _ => Err(ControlError {
                    line: field.lines().next().unwrap_or_default().escape_debug().take(80).collect(),
                }),
            })
        })
    }

    /// The value of the field `name`, which is compared without case; none where it is absent.
    ///
    /// # Errors
    /// [`ControlError`] for a line before it that is no field.
    pub fn field(&self, name: &str) -> Result<Option<&'a str>, ControlError> {
        for field in self.fields() {
            let (candidate, value) = field?;
            if candidate.eq_ignore_ascii_case(name) {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }
}

fn line_end(text: &str, from: usize) -> usize {
    text[from..].find('\n').map_or(text.len(), |position| from + position + 1)
}

fn is_field_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_graphic()) && !name.starts_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paragraphs_give_their_fields_with_continuations() {
        let text = "Package: a\nDescription: short\n long\n .\nEmpty:\n\n\nPackage: b\n";
        let all: Vec<Vec<_>> =
            paragraphs(text).map(|p| p.fields().collect::<Result<_, _>>().expect("fields")).collect();
        assert_eq!(
            all,
            vec![
                vec![("Package", "a"), ("Description", "short\n long\n ."), ("Empty", "")],
                vec![("Package", "b")]
            ]
        );
        let first = paragraphs(text).next().expect("one");
        assert_eq!(first.field("package"), Ok(Some("a")));
        assert_eq!(first.field("Version"), Ok(None));
    }

    #[test]
    fn comments_are_passed_over_and_other_lines_are_errors() {
        let paragraph = Paragraph { text: "# about\nTypes: deb\n# more\nSuites: x\n" };
        assert_eq!(paragraph.field("Suites"), Ok(Some("x")));
        for text in ["no colon\n", " leading\n", ": empty\n", "two words: x\n"] {
            assert!(Paragraph { text }.fields().any(|field| field.is_err()), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_the_reader_fail(text in "[a-b:#\n\t é-]{0,60}") {
            for paragraph in paragraphs(&text) {
                let count = paragraph.fields().count();
                assert!(count <= paragraph.text.len());
            }
        }
    }
}
