//! Small documents, and single lines, whose ends tell whether they are what was written, and under this name.

use kiln_digest::{Digest, Hasher};

/// What the last line begins with.
const MARK: &[u8] = b"sha256 ";

/// What a line has more when it is sealed: a blank, the sum in hexadecimal digits, and its end.
pub const SEAL_BYTES: usize = 1 + 64 + 1;

fn sum(name: &str, text: &[u8]) -> Digest {
    let mut hasher = Hasher::default();
    [name.as_bytes(), b"\0", text].into_iter().for_each(|piece| hasher.update(piece));
    hasher.finish().0
}

/// `text` and the line that seals it under `name`.
pub fn seal(name: &str, mut text: Vec<u8>) -> Vec<u8> {
    let sum = sum(name, &text);
    text.push(b'\n');
    text.extend(MARK);
    text.extend(sum.to_string().as_bytes());
    text.push(b'\n');
    text
}

/// What was sealed under `name`; none where `bytes` are anything else.
pub fn unseal<'a>(name: &str, bytes: &'a [u8]) -> Option<&'a [u8]> {
    let length = bytes.len().checked_sub(1 + MARK.len() + 64 + 1)?;
    let (text, line) = bytes.split_at_checked(length)?;
    let digits = line.strip_prefix(b"\n")?.strip_prefix(MARK)?.strip_suffix(b"\n")?;
    (digits == sum(name, text).to_string().as_bytes()).then_some(text)
}

/// The line that is `text`, which has no end of line in it, sealed under `name`.
pub fn seal_line(name: &str, mut text: Vec<u8>) -> Vec<u8> {
    let sum = sum(name, &text);
    text.push(b' ');
    text.extend(sum.to_string().as_bytes());
    text.push(b'\n');
    text
}

/// What was sealed under `name` as a line, whose end is left out; none where `line` is anything else.
pub fn unseal_line<'a>(name: &str, line: &'a [u8]) -> Option<&'a [u8]> {
    let (text, digits) = line.split_at_checked(line.len().checked_sub(1 + 64)?)?;
    (digits.strip_prefix(b" ")? == sum(name, text).to_string().as_bytes()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flip_cut_and_other_name_breaks_the_seal() {
        let sealed = seal("name", b"{\"a\": 1}".to_vec());
        assert_eq!(unseal("name", &sealed), Some(&b"{\"a\": 1}"[..]));
        assert_eq!(unseal("other", &sealed), None);
        for at in 0..sealed.len() {
            assert_eq!(unseal("name", &sealed[..at]), None);
            for bit in 0..8 {
                let mut damaged = sealed.clone();
                damaged[at] ^= 1 << bit;
                assert_eq!(unseal("name", &damaged), None, "byte {at} bit {bit}");
            }
        }
    }
}
