//! Numbers, bytes and paths in little room: seven bits a byte, and paths by what they share with the one before; and any
//! bytes as a word of a line.

use kiln_digest::Digest;

/// Writes.
#[derive(Debug, Default)]
pub(super) struct Writer {
    pub bytes: Vec<u8>,
    last: Vec<u8>,
}

impl Writer {
    pub fn byte(&mut self, byte: u8) {
        self.bytes.push(byte);
    }

    pub fn number(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.bytes.push(number.to_le_bytes()[0] | 0x80);
            number >>= 7;
        }
        self.bytes.push(number.to_le_bytes()[0]);
    }

    pub fn signed(&mut self, number: i64) {
        self.bytes.extend(number.to_le_bytes());
    }

    pub fn text(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.bytes.extend(bytes);
    }

    pub fn digest(&mut self, digest: &Digest) {
        self.bytes.extend(digest.as_bytes());
    }

    pub fn path(&mut self, path: &[u8]) {
        let shared = self.last.iter().zip(path).take_while(|(one, other)| one == other).count();
        self.number(shared as u64);
        self.text(&path[shared..]);
        self.last.truncate(shared);
        self.last.extend(&path[shared..]);
    }

    /// The next path shares nothing with what came before.
    pub fn restart(&mut self) {
        self.last.clear();
    }
}

/// Reads what [`Writer`] wrote; `None` where that ends too early.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    rest: &'a [u8],
    last: Vec<u8>,
}

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes, last: Vec::new() }
    }

    pub fn is_at_end(&self) -> bool {
        self.rest.is_empty()
    }

    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.rest.split_at_checked(count)?;
        self.rest = rest;
        Some(bytes)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N).and_then(|bytes| bytes.try_into().ok())
    }

    pub fn byte(&mut self) -> Option<u8> {
        self.array().map(|[byte]| byte)
    }

    pub fn number(&mut self) -> Option<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(number);
            }
        }
        None
    }

    /// How many items follow, each of which takes a byte at least.
    pub fn count(&mut self) -> Option<usize> {
        usize::try_from(self.number()?).ok().filter(|count| *count <= self.rest.len())
    }

    pub fn signed(&mut self) -> Option<i64> {
        Some(i64::from_le_bytes(self.array()?))
    }

    pub fn text(&mut self) -> Option<&'a [u8]> {
        let length = usize::try_from(self.number()?).ok()?;
        self.bytes(length)
    }

    pub fn digest(&mut self) -> Option<Digest> {
        self.array().map(Digest::from_bytes)
    }

    pub fn path(&mut self) -> Option<Vec<u8>> {
        let shared = usize::try_from(self.number()?).ok().filter(|shared| *shared <= self.last.len())?;
        let rest = self.text()?;
        self.last.truncate(shared);
        self.last.extend(rest);
        Some(self.last.clone())
    }

    pub fn restart(&mut self) {
        self.last.clear();
    }
}

/// Each byte that would end a word or a line, and the letter that stands for it after a backslash.
const ESCAPED: [(u8, u8); 3] = [(b'\\', b'\\'), (b'\n', b'n'), (b' ', b's')];

/// `bytes` as a word.
pub(super) fn word(bytes: &[u8]) -> Vec<u8> {
    let mut word = Vec::with_capacity(bytes.len() + bytes.len() / 32);
    for byte in bytes {
        match ESCAPED.iter().find(|(escaped, _)| escaped == byte) {
            Some((_, letter)) => word.extend([b'\\', *letter]),
            None => word.push(*byte),
        }
    }
    word
}

/// The bytes that `word` stands for; none where [`word`] gives no such.
pub(super) fn unword(word: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(word.len());
    let mut rest = word.iter();
    while let Some(byte) = rest.next() {
        match byte {
            b'\\' => {
                let letter = rest.next()?;
                bytes.push(ESCAPED.iter().find(|(_, standing)| standing == letter)?.0);
            }
            b'\n' | b' ' => return None,
            byte => bytes.push(*byte),
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_bytes_are_a_word_and_come_back() {
        let all: Vec<u8> = (0..=255).collect();
        for bytes in [&all[..], b"", b"\\n", b"\\\\ \n", b" \n "] {
            let word = word(bytes);
            assert!(!word.contains(&b' ') && !word.contains(&b'\n'), "{bytes:?}");
            assert_eq!(unword(&word).as_deref(), Some(bytes));
        }
        for bad in [&b"\\"[..], b"a\\x", b"a b", b"a\n"] {
            assert_eq!(unword(bad), None);
        }
    }
}
