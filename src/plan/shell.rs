//! Words as a shell reads them, for commands that people paste.

use super::text::{harmless, without_commands};

/// `word` so that a shell takes it as this one word. Plain words stay as they are, others are in single quotes; bytes
/// that a terminal would obey, lines that a CI system would, and what is no text are written `$'\xNN'`, which POSIX has
/// since 2024 and bash, zsh, ksh and busybox had before.
pub fn quote(word: &[u8]) -> String {
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"_-./,:=+@%^".contains(byte);
    let is_obeyed = |text: &str| {
        harmless(text.as_bytes()) != text || text.split('\n').any(|line| without_commands(line) != line)
    };
    let text = std::str::from_utf8(word).ok().filter(|text| !is_obeyed(text));
    match text {
        Some(text) if !text.is_empty() && word.iter().all(is_plain) => text.to_owned(),
        Some(text) => format!("'{}'", text.replace('\'', r"'\''")),
        None => {
            let escape = |byte: &u8| match byte {
                b'\'' | b'\\' => format!("\\{}", char::from(*byte)),
                b' '..=b'~' if *byte != b'#' => char::from(*byte).to_string(),
                byte => format!("\\x{byte:02x}"),
            };
            // A hexadecimal escape ends after two digits in every shell that has it.
            format!("$'{}'", word.iter().map(escape).collect::<String>())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use std::process::Command;

    use super::*;

    const WORDS: [&[u8]; 16] = [
        b"make",
        b"-j2",
        b"",
        b"a b",
        b"it's",
        b"$HOME `id` \"x\" \\ !",
        b"*?[a]{b,c}~#",
        b"line\nline\n",
        b"tab\t;&|<>()",
        "gr\u{fc}n".as_bytes(),
        "\u{202e}evil".as_bytes(),
        b"\x1b[31m'\\0",
        b"\xff\xfe1",
        b"\r\x7f",
        b"echo\n::error::x",
        b"a ##[group]x",
    ];

    #[test]
    fn a_shell_reads_every_word_back() {
        let line: Vec<String> = WORDS.iter().map(|word| quote(word)).collect();
        let script = format!("printf '%s\\0' {}", line.join(" "));
        let output = Command::new("bash").arg("-c").arg(&script).output().expect("bash is there");
        let read: Vec<&[u8]> = output.stdout.split(|&byte| byte == 0).collect();
        assert_eq!(read[..WORDS.len()], WORDS, "{script}");
    }

    #[test]
    fn what_is_text_needs_no_more_than_posix() {
        for word in WORDS.iter().filter(|word| !quote(word).starts_with('$')) {
            let script = format!("printf %s {}", quote(word));
            let output = Command::new("sh").arg("-c").arg(OsStr::from_bytes(script.as_bytes())).output();
            assert_eq!(output.expect("a shell").stdout, *word, "{script}");
        }
    }

    #[test]
    fn plain_words_stay_and_no_terminal_obeys_the_rest() {
        assert_eq!(quote(b"--root=debian:bookworm+gcc,make"), "--root=debian:bookworm+gcc,make");
        for word in WORDS {
            let quoted = quote(word);
            assert_eq!(harmless(quoted.as_bytes()), quoted);
            let shown = format!("kiln: again: {quoted}");
            assert!(shown.split('\n').all(|line| without_commands(line) == line), "{shown}");
        }
    }
}
