//! Text from a guest, made harmless for a terminal.

/// The bytes with everything replaced that a terminal would obey, or show as if it were something else or not at all:
/// C0 controls but newline and tab, DEL, C1 controls (also as raw bytes), what is not UTF-8, and characters that turn
/// text around or have no width. A carriage return before a newline is dropped.
pub fn harmless_bytes(bytes: &[u8]) -> Vec<u8> {
    harmless(bytes).into_bytes()
}

/// As [`harmless_bytes`], as text.
pub fn harmless(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    let lossy = String::from_utf8_lossy(bytes);
    let mut characters = lossy.chars().peekable();
    while let Some(c) = characters.next() {
        match c {
            '\n' | '\t' => text.push(c),
            '\r' if characters.peek() == Some(&'\n') => {}
            // The Unicode picture of a control character says which it was.
            '\0'..='\x1f' => text.push(char::from_u32(0x2400 + u32::from(c)).unwrap_or('\u{fffd}')),
            '\x7f' => text.push('\u{2421}'),
            '\u{80}'..='\u{9f}' => text.push('\u{fffd}'),
            c if is_unseen(c) => text.push('\u{fffd}'),
            _ => text.push(c),
        }
    }
    text
}

/// A line without what CI systems that read logs obey: `::command` at its start, and `##[`, `##vso[` and their like
/// anywhere. They are kept readable, and broken by a space.
pub fn without_commands(line: &str) -> String {
    let body = line.trim_start();
    let mut text = match body.strip_prefix("::") {
        Some(rest) => format!("{}: :{rest}", &line[..line.len() - body.len()]),
        None => line.to_owned(),
    };
    let mut from = 0;
    while let Some(at) = text[from..].find("##") {
        let start = from + at + 1;
        let word = text[start + 1..].trim_start_matches(|c: char| c.is_ascii_alphanumeric());
        if word.starts_with('[') {
            text.insert(start, ' ');
        }
        from = start;
    }
    text
}

/// Format characters (Unicode's category Cf, and the two separators) but the joiner that emoji are made with.
fn is_unseen(c: char) -> bool {
    matches!(
        c,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}' | '\u{200c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}'
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_obeys_nothing_of_a_guest() {
        assert_eq!(harmless(b"a\x1b[31mb\r\n\tc\x07"), "a\u{241b}[31mb\n\tc\u{2407}");
        assert_eq!(harmless(b"\x9b31m \xff \rx"), "\u{fffd}31m \u{fffd} \u{240d}x");
        assert_eq!(harmless("gr\u{fc}n \u{202e}".as_bytes()), "gr\u{fc}n \u{fffd}");
    }

    #[test]
    fn a_ci_system_obeys_nothing_of_a_guest() {
        for (line, shown) in [
            ("::set-output name=a::b", ": :set-output name=a::b"),
            ("  ::error::x", "  : :error::x"),
            ("a ##vso[task.complete]", "a # #vso[task.complete]"),
            ("###[group]", "## #[group]"),
            ("##teamcity[x] ##[y]", "# #teamcity[x] # #[y]"),
            ("std::vec ## of [1]", "std::vec ## of [1]"),
        ] {
            assert_eq!(without_commands(line), shown);
        }
    }
}
