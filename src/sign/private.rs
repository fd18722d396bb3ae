//! Private keys stay where they are: they are looked for in bytes that are about to leave (copied whole, in another encoding,
//! or beside something else in one file), and a process that reads them leaves no core and lets nobody look in.

use base64ct::{Base64, Encoding as _};
use der::zeroize::Zeroizing;
use rustix::process::{DumpableBehavior, Resource, Rlimit};

/// How much of a key is looked for: enough to be no chance, and less than any has.
const PART_BYTES: usize = 32;

/// Lets this process leave no core file, and no other process of its user read its memory. Where the system refuses, keys
/// are as safe as in any other program.
pub fn close_process() {
    let _ = rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    let _ = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable);
}

/// What a set's private keys look like. Keys that are elsewhere are known by their public halves.
#[derive(Default)]
pub(super) struct Privates {
    /// Bytes of private keys, and each key's name.
    secrets: Vec<(String, Zeroizing<Vec<u8>>)>,
    /// Bytes that public keys have in common with the private ones, and each key's name.
    publics: Vec<(String, Vec<u8>)>,
}

impl Privates {
    /// Adds the file of a private key.
    pub fn secret(&mut self, name: &str, file: &[u8]) {
        for (_, der) in blocks(file) {
            self.secrets.push((name.to_owned(), Zeroizing::new(number(&der).to_vec())));
        }
        let text = file.trim_ascii();
        if text.len() >= PART_BYTES {
            self.secrets.push((name.to_owned(), Zeroizing::new(text.to_vec())));
        }
    }

    /// Adds a public key: the bits of its SubjectPublicKeyInfo, which end in the number that is the key's alone.
    pub fn public(&mut self, name: &str, bits: &[u8]) {
        // Behind an RSA modulus comes its exponent, which takes five bytes with its tag and length.
        let end = bits.len().saturating_sub(5);
        if let Some(part) = end.checked_sub(PART_BYTES).and_then(|begin| bits.get(begin..end)) {
            self.publics.push((name.to_owned(), part.to_vec()));
        }
    }

    /// The name of a key of the set that is in `bytes`.
    pub fn find(&self, bytes: &[u8]) -> Option<&str> {
        let blocks = blocks(bytes);
        let in_block = |needle: &[u8], private: bool| {
            blocks
                .iter()
                .any(|(label, der)| (!private || label.contains("PRIVATE KEY")) && contains(der, needle))
        };
        let secret = self.secrets.iter().find(|(_, key)| contains(bytes, key) || in_block(key, false));
        let public = || self.publics.iter().find(|(_, key)| in_block(key, true));
        secret.map(|(name, _)| name.as_str()).or_else(|| public().map(|(name, _)| name.as_str()))
    }
}

/// Whether `bytes` has any private key in PEM.
pub(super) fn has_private_key(bytes: &[u8]) -> bool {
    contains(bytes, b"PRIVATE KEY-----")
}

/// Of a private key in DER, the bytes that every encoding of it has: of an elliptic key its number (RFC 5915: version 1, then
/// an octet string, and after it what is public), of others the last, which is where RSA keys (RFC 8017, A.1.2) have the
/// coefficient.
pub(super) fn number(der: &[u8]) -> &[u8] {
    const ELLIPTIC: [u8; 5] = [0x02, 0x01, 0x01, 0x04, 0x20];
    let elliptic = der.windows(ELLIPTIC.len()).position(|window| window == ELLIPTIC);
    let begin = elliptic.map(|at| at + ELLIPTIC.len());
    let number = begin.and_then(|begin| der.get(begin..begin + PART_BYTES));
    number.unwrap_or(&der[der.len().saturating_sub(PART_BYTES)..])
}

fn contains(bytes: &[u8], needle: &[u8]) -> bool {
    let Some(first) = needle.first() else { return false };
    let mut rest = bytes;
    while let Some(at) = rest.iter().position(|byte| byte == first) {
        if rest[at..].starts_with(needle) {
            return true;
        }
        rest = &rest[at + 1..];
    }
    false
}

/// The PEM blocks in `bytes`, read as leniently as anybody might: label and content.
pub(super) fn blocks(bytes: &[u8]) -> Vec<(String, Zeroizing<Vec<u8>>)> {
    const BEGIN: &str = "-----BEGIN ";
    let text = Zeroizing::new(String::from_utf8_lossy(bytes).into_owned());
    let mut blocks = Vec::new();
    for part in text.split(BEGIN).skip(1) {
        let Some((label, rest)) = part.split_once("-----") else { continue };
        let body = rest.split("-----").next().unwrap_or_default();
        // Headers, as old encrypted keys have, are lines with a colon.
        let lines = body.lines().filter(|line| !line.contains(':'));
        let base64 = Zeroizing::new(lines.flat_map(|line| line.split_whitespace()).collect::<String>());
        if let Ok(content) = Base64::decode_vec(&base64) {
            blocks.push((label.to_owned(), Zeroizing::new(content)));
        }
    }
    blocks
}

impl std::fmt::Debug for Privates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Privates").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pem(label: &str, content: &[u8], newline: &str) -> String {
        let text = Base64::encode_string(content);
        let lines: Vec<&str> =
            text.as_bytes().chunks(64).filter_map(|line| std::str::from_utf8(line).ok()).collect();
        format!(
            "-----BEGIN {label}-----{newline}{}{newline}-----END {label}-----{newline}",
            lines.join(newline)
        )
    }

    #[test]
    fn a_private_key_is_found_in_any_encoding_and_its_public_half_is_none() {
        let (private, public): (Vec<u8>, Vec<u8>) = ((0..200).collect(), (100..240).rev().collect());
        let mut keys = Privates::default();
        keys.secret("db.key", pem("PRIVATE KEY", &private, "\n").as_bytes());
        keys.public("PK.key", &public);
        let block = [&b"a header of another format"[..], &public].concat();
        let hidden = [
            pem("PRIVATE KEY", &private, "\n").into_bytes(),
            pem("PRIVATE KEY", &private, "\r\n").into_bytes(),
            private.clone(),
            [b"before", &private[..], b"after"].concat(),
            format!("text\n{}more", pem("WHATEVER", &private, "\n")).into_bytes(),
        ];
        for bytes in hidden {
            assert_eq!(keys.find(&bytes), Some("db.key"), "{}", bytes.escape_ascii());
        }
        assert_eq!(keys.find(pem("RSA PRIVATE KEY", &block, "\n").as_bytes()), Some("PK.key"));
        let harmless = [
            pem("CERTIFICATE", &block, "\n").into_bytes(),
            public,
            pem("PRIVATE KEY", b"other", "\n").into_bytes(),
        ];
        for bytes in harmless {
            assert_eq!(keys.find(&bytes), None, "{}", bytes.escape_ascii());
        }
    }
}
