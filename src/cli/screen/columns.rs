//! Text cut to columns of a terminal: what is seen takes no more than it is given.

use unicode_width::UnicodeWidthChar;

/// What stands for what was cut off.
const CUT: char = '…';
/// Characters without a width that a character may have after it; of more, nobody can tell anything.
const MARKS: usize = 4;

/// How many columns the text takes.
pub(super) fn width(text: &str) -> usize {
    text.chars().map(|c| c.width().unwrap_or(0)).sum()
}

/// The text in at most `columns`, with a mark where it was cut. A tab is one space; what has no width of its own goes where it is
/// one too many.
pub(in crate::cli) fn cut(text: &str, columns: usize) -> String {
    let mut shown = String::new();
    // Where the mark would go.
    let mut fits = 0;
    let (mut taken, mut marks) = (0, 0);
    for c in text.chars() {
        let c = if c == '\t' { ' ' } else { c };
        let Some(wide) = c.width() else { continue };
        marks = if wide == 0 { marks + 1 } else { 0 };
        if marks > MARKS || (wide == 0 && shown.is_empty()) {
            continue;
        }
        if taken + wide > columns {
            shown.truncate(fits);
            if columns > 0 {
                shown.push(CUT);
            }
            return shown;
        }
        taken += wide;
        shown.push(c);
        if taken < columns {
            fits = shown.len();
        }
    }
    shown
}

/// The text in exactly `columns`.
pub(super) fn fill(text: &str, columns: usize) -> String {
    let mut shown = cut(text, columns);
    let rest = columns.saturating_sub(width(&shown));
    shown.extend(std::iter::repeat_n(' ', rest));
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn text_is_cut_by_columns_and_not_by_bytes_or_characters() {
        for (text, columns, shown) in [
            ("abc", 3, "abc"),
            ("abcd", 3, "ab…"),
            ("日本語", 6, "日本語"),
            ("日本語", 5, "日本…"),
            ("日本語", 4, "日…"),
            ("日本語", 1, "…"),
            ("日", 1, "…"),
            ("a", 0, ""),
            ("", 5, ""),
            ("e\u{301}f", 2, "e\u{301}f"),
            ("a\tb", 3, "a b"),
            ("\u{301}\u{301}a", 1, "a"),
        ] {
            assert_eq!(cut(text, columns), shown, "{text:?} in {columns}");
        }
        let marks = format!("a{}", "\u{301}".repeat(1000));
        assert_eq!(cut(&marks, 5).chars().count(), 1 + MARKS);
        assert_eq!(fill("日本語", 4), "日… ");
        assert_eq!(fill("a", 3), "a  ");
    }

    proptest! {
        #[test]
        fn nothing_takes_more_columns_than_it_is_given(text in "\\PC{0,60}", columns in 0_usize..40) {
            prop_assert!(width(&cut(&text, columns)) <= columns);
            prop_assert_eq!(width(&fill(&text, columns)), columns);
        }
    }
}
