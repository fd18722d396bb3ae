//! Names: the long ones that files have, and the short ones of eight and three characters that each needs beside them.

use std::collections::{BTreeMap, BTreeSet};

use super::FatError;
use crate::tree::{Entries, TreePath};

/// Most UTF-16 units of a long name.
const MAX_LONG_UNITS: usize = 255;

/// A name in both forms.
pub(super) struct Name {
    /// Eight characters and three, filled up with spaces.
    pub short: [u8; 11],
    /// The long name in UTF-16; none where the short one says it all.
    pub long: Vec<u16>,
}

/// Whether short names may have the byte.
pub(super) fn is_short(byte: u8) -> bool {
    byte.is_ascii_uppercase() || byte.is_ascii_digit() || b"$%'-_@~`!(){}^#&".contains(&byte)
}

/// The names in a folder, by the index of the entry. Those that are short already keep that name; others get one of
/// their first characters, `~` and a number.
pub(super) fn names(entries: &Entries<'_>, folder: usize) -> Result<BTreeMap<usize, Name>, FatError> {
    let mut names = BTreeMap::new();
    let mut taken = BTreeSet::new();
    // What FAT takes for one name: readers compare without regard to case.
    let mut known: BTreeMap<String, &TreePath> = BTreeMap::new();
    let mut without_short = Vec::new();
    for &child in entries.children(folder) {
        let path = entries[child].path;
        let text = checked(path)?;
        if let Some(other) = known.insert(text.to_uppercase(), path) {
            return Err(FatError::SameName { path: path.clone(), other: other.clone() });
        }
        match short(text) {
            Some(short) => {
                let is_whole = !text.bytes().any(|byte| byte.is_ascii_lowercase());
                let long = if is_whole { Vec::new() } else { text.encode_utf16().collect() };
                taken.insert(short);
                names.insert(child, Name { short, long });
            }
            None => without_short.push((child, text)),
        }
    }
    let mut counts: BTreeMap<[u8; 11], u32> = BTreeMap::new();
    for (child, text) in without_short {
        let stem = stem(text);
        let count = counts.entry(stem).or_insert(0);
        let short = loop {
            *count += 1;
            let short = numbered(stem, *count);
            if taken.insert(short) {
                break short;
            }
        };
        names.insert(child, Name { short, long: text.encode_utf16().collect() });
    }
    Ok(names)
}

/// The name, if FAT can hold it.
fn checked(path: &TreePath) -> Result<&str, FatError> {
    let bad = |what| Err(FatError::Name { path: path.clone(), what });
    let Ok(text) = std::str::from_utf8(path.name()) else { return bad("is not UTF-8") };
    if text.chars().any(|c| c < ' ' || c == '\u{7f}' || "\"*/:<>?\\|".contains(c)) {
        return bad("has a control character or one of \" * / : < > ? \\ |");
    }
    if text.ends_with(['.', ' ']) {
        return bad("ends with a full stop or a space");
    }
    if text.starts_with(' ') {
        return bad("begins with a space");
    }
    if text.encode_utf16().count() > MAX_LONG_UNITS {
        return bad("is longer than 255 UTF-16 units");
    }
    Ok(text)
}

/// The short form of a name that has one but for case.
fn short(text: &str) -> Option<[u8; 11]> {
    let upper = text.to_ascii_uppercase();
    let (base, extension) = upper.rsplit_once('.').unwrap_or((&upper, ""));
    let is_good = |part: &str| part.bytes().all(is_short);
    if base.is_empty() || base.len() > 8 || extension.len() > 3 || !is_good(base) || !is_good(extension) {
        return None;
    }
    Some(filled(base.bytes(), extension.bytes()))
}

/// What a numbered short name begins and ends with.
fn stem(text: &str) -> [u8; 11] {
    let upper = text.trim_start_matches('.').to_uppercase();
    let (base, extension) = upper.rsplit_once('.').unwrap_or((&upper, ""));
    let usable = |part: &str| {
        let fitting = part.chars().filter(|c| !matches!(c, ' ' | '.'));
        fitting
            .map(|c| u8::try_from(c).ok().filter(|byte| is_short(*byte)).unwrap_or(b'_'))
            .collect::<Vec<_>>()
    };
    filled(usable(base).into_iter().take(8), usable(extension).into_iter().take(3))
}

/// The stem with `~` and a number at the end of its base.
fn numbered(stem: [u8; 11], number: u32) -> [u8; 11] {
    let number = format!("~{number}");
    let base = stem[..8].iter().copied().filter(|byte| *byte != b' ').take(8 - number.len().min(8));
    let extension = stem[8..].iter().copied();
    filled(base.chain(number.bytes()).take(8), extension)
}

fn filled(base: impl Iterator<Item = u8>, extension: impl Iterator<Item = u8>) -> [u8; 11] {
    let mut short = [b' '; 11];
    for (place, byte) in short.iter_mut().zip(base) {
        *place = byte;
    }
    for (place, byte) in short[8..].iter_mut().zip(extension) {
        *place = byte;
    }
    short
}

/// How many entries a name takes: thirteen units of a long name each, and one of its own.
pub(super) fn entry_count(name: &Name) -> usize {
    1 + name.long.len().div_ceil(13)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_are_kept_and_others_numbered() {
        assert_eq!(short("BOOTX64.EFI"), Some(*b"BOOTX64 EFI"));
        assert_eq!(short("initos.efi"), Some(*b"INITOS  EFI"));
        for text in ["a.b.c", ".hidden", "longbasename", "a.long", "a b", "\u{fc}", "a+b"] {
            assert_eq!(short(text), None, "{text}");
        }
        assert_eq!(numbered(stem("long name.conf"), 1), *b"LONGNA~1CON");
        assert_eq!(numbered(stem(".hidden"), 12), *b"HIDDE~12   ");
        assert_eq!(numbered(stem("\u{fc}\u{20ac}.x"), 1), *b"__~1    X  ");
        assert_eq!(numbered(stem("a+b.tar.gz"), 1_234_567), *b"~1234567GZ ");
    }
}
