//! Relations between packages: `a (>= 1) | b, c:any` (Debian Policy §7.1).

use std::cmp::Ordering;
use std::fmt;

use super::version;

/// How a version must compare with the one that a relation names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operator {
    /// `<<`
    Less,
    /// `<=`
    LessOrEqual,
    /// `=`
    Equal,
    /// `>=`
    GreaterOrEqual,
    /// `>>`
    Greater,
}

/// A package that a relation names, perhaps in certain versions only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Relation<'a> {
    /// The package's name.
    pub name: &'a str,
    /// What follows the name after a colon: `any`, or an architecture.
    pub qualifier: Option<&'a str>,
    /// The versions that will do.
    pub constraint: Option<(Operator, &'a str)>,
}

/// Alternatives, of which one must hold.
pub type Group<'a> = Vec<Relation<'a>>;

/// A relation that does not read as one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a relation between packages")]
pub struct RelationError {
    /// The relation, shortened.
    pub text: String,
}

impl Relation<'_> {
    /// Whether `candidate` is a version that will do.
    pub fn admits(&self, candidate: &str) -> bool {
        let Some((operator, wanted)) = self.constraint else { return true };
        let order = version::compare(candidate, wanted);
        match operator {
            Operator::Less => order == Ordering::Less,
            Operator::LessOrEqual => order != Ordering::Greater,
            Operator::Equal => order == Ordering::Equal,
            Operator::GreaterOrEqual => order != Ordering::Less,
            Operator::Greater => order == Ordering::Greater,
        }
    }
}

impl fmt::Display for Operator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Less => "<<",
            Self::LessOrEqual => "<=",
            Self::Equal => "=",
            Self::GreaterOrEqual => ">=",
            Self::Greater => ">>",
        })
    }
}

impl fmt::Display for Relation<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)?;
        if let Some(qualifier) = self.qualifier {
            write!(f, ":{qualifier}")?;
        }
        if let Some((operator, version)) = self.constraint {
            write!(f, " ({operator} {version})")?;
        }
        Ok(())
    }
}

/// Whether `name` could be a package's (Policy §5.6.1, and upper case, which archives have had).
pub fn is_package_name(name: &str) -> bool {
    name.len() >= 2
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
}

/// Reads a relation field: groups parted by commas, alternatives by bars. An empty field has no groups.
///
/// # Errors
/// [`RelationError`] for the first relation that does not read as one.
pub fn parse(field: &str) -> Result<Vec<Group<'_>>, RelationError> {
    field
        .split(',')
        .map(str::trim)
        .filter(|group| !group.is_empty())
        .map(|group| group.split('|').map(parse_one).collect())
        .collect()
}

fn parse_one(text: &str) -> Result<Relation<'_>, RelationError> {
    let bad = || RelationError { text: text.trim().chars().take(80).collect() };
    let text_trimmed = text.trim();
    let (name, constraint) = match text_trimmed.split_once('(') {
        None => (text_trimmed, None),
        Some((name, rest)) => {
            let inside = rest.strip_suffix(')').ok_or_else(bad)?.trim();
            let (operator, version) = [
                ("<<", Operator::Less),
                ("<=", Operator::LessOrEqual),
                (">=", Operator::GreaterOrEqual),
                (">>", Operator::Greater),
                ("=", Operator::Equal),
                // Obsolete spellings, which dpkg still reads.
                ("<", Operator::LessOrEqual),
                (">", Operator::GreaterOrEqual),
            ]
            .into_iter()
            .find_map(|(sign, operator)| Some((operator, inside.strip_prefix(sign)?.trim())))
            .ok_or_else(bad)?;
            if !version::is_valid(version) {
                return Err(bad());
            }
            (name.trim(), Some((operator, version)))
        }
    };
    let (name, qualifier) = match name.split_once(':') {
        None => (name, None),
        Some((name, qualifier)) => (name, Some(qualifier)),
    };
    if !is_package_name(name) || qualifier.is_some_and(|q| !is_package_name(q)) {
        return Err(bad());
    }
    Ok(Relation { name, qualifier, constraint })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relations_read_and_show() {
        let groups = parse("libc6 (>= 2.34), perl:any, debconf (>= 0.5) | debconf-2.0,").expect("relations");
        let shown: Vec<Vec<_>> =
            groups.iter().map(|group| group.iter().map(ToString::to_string).collect()).collect();
        assert_eq!(
            shown,
            [vec!["libc6 (>= 2.34)"], vec!["perl:any"], vec!["debconf (>= 0.5)", "debconf-2.0"]]
        );
        assert_eq!(parse("").expect("nothing"), Vec::<Group<'_>>::new());
        assert_eq!(parse("a1(=1)").expect("no blanks")[0][0].constraint, Some((Operator::Equal, "1")));
    }

    #[test]
    fn constraints_admit_versions() {
        let admits = |text: &str, version: &str| parse(text).expect("a relation")[0][0].admits(version);
        assert!(admits("aa (<< 2)", "1.9") && !admits("aa (<< 2)", "2"));
        assert!(admits("aa (<= 2)", "2") && !admits("aa (<= 2)", "2.1"));
        assert!(admits("aa (>= 2)", "2") && !admits("aa (>= 2)", "2~rc1"));
        assert!(admits("aa (>> 2)", "2.1") && !admits("aa (>> 2)", "2"));
        assert!(admits("aa (= 2)", "2-0") && !admits("aa (= 2)", "2.1") && admits("aa", "0"));
    }

    #[test]
    fn what_is_no_relation_is_an_error() {
        for text in [
            "a b",
            "aa (2)",
            "aa (>= )",
            "aa (>= x)",
            "aa (>= 1",
            "|",
            "aa | ",
            "../x",
            "aa:",
            "aa (=1) [amd64]",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_the_reader_fail(text in "[a-c0-1 ():|,<>=é]{0,40}") {
            let _ = parse(&text);
        }
    }
}
