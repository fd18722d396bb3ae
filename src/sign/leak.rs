//! The owner's private keys in what is built: found by their public halves, which every form of an RSA or P-256 key has beside
//! its secret, so that whoever looks reads no private key.
//!
//! Found is what has the secret itself, as arithmetic shows: bytes that look like a key can be made of its certificate, and
//! whoever is told that a key has leaked makes another. It is looked for in PEM and among other bytes, in DER as RFC 8017 and
//! RFC 5915 have it and as OpenSSH writes it. What is compressed or encrypted is not looked into, and a bare P-256 number is
//! no key to this.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use der::asn1::UintRef;
use der::{Decode as _, SliceReader};
use kiln_artifact::uefi::Signer;
use kiln_digest::Digest;
use p256::elliptic_curve::sec1::ToSec1Point as _;
use regex::bytes::Regex;
use rsa::BoxedUint;
use rsa::pkcs1::RsaPublicKeyRef;
use rsa::pkcs8::DecodePublicKey as _;

use super::KEYS;
use super::folder::Folder;
use super::private::{blocks, number};
/// How much is looked at at a time.
const WINDOW_BYTES: usize = 1 << 20;
/// What is looked at again with the next: more than a private key takes in any form.
const OVERLAP_BYTES: usize = 64 << 10;
/// No certificate is nearly as long.
const FILE_BYTES_MAX: u64 = 64 << 10;
/// How much of a public number is looked for.
const HEAD_BYTES: usize = 40;
/// What a P-256 number takes.
const SECRET_BYTES: usize = 32;
/// Between the beginning of an elliptic key in DER and its point: version, number, curve and the tags of the point, with room.
const BEFORE_POINT_BYTES: usize = 64;
/// The bit string of a point, within its own tag, 1 (RFC 5915).
const POINT: [u8; 5] = [0xa1, 0x44, 0x03, 0x42, 0x00];
/// How many forgeries of one file are looked at: a file that is full of them would take hours, and whoever writes it has
/// better ways to hide a key.
const TRIES_MAX: u32 = 1000;

/// What private keys of SECRETS look like where they should not be, and what was found so far.
#[derive(Debug, Default)]
pub struct Leaks {
    publics: Vec<Public>,
    /// For a first look, and for what PEM holds; none where there are no keys.
    patterns: Option<Patterns>,
    // Protects what is known of contents; held only to look one up, whose own lock whoever reads it holds meanwhile.
    known: Mutex<BTreeMap<Digest, Arc<Mutex<Option<Found>>>>>,
    // Protects windows that nobody uses; held only to take one or give it back.
    windows: Mutex<Vec<Vec<u8>>>,
}

/// The name of a key that is in a content; none where none is.
type Found = Option<&'static str>;

#[derive(Debug)]
struct Patterns {
    /// What every form of a key has.
    hints: Regex,
    /// How the public numbers begin.
    heads: Regex,
}

/// The public half of a key.
#[derive(Debug)]
struct Public {
    /// What the private half is called.
    name: &'static str,
    kind: Kind,
    /// The modulus, without zeros before it; or the point, uncompressed.
    number: Vec<u8>,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Rsa,
    Elliptic,
}

impl Leaks {
    /// Of the keys in `secrets`, as far as their public halves are there and can be read: to judge them is signing's.
    pub fn of(secrets: &Path) -> Self {
        let mut leaks = Self::default();
        let Ok(folder) = Folder::open(&secrets.join(KEYS)) else { return leaks };
        for (certificate, name) in [("PK.crt", "PK.key"), ("KEK.crt", "KEK.key"), ("db.crt", "db.key")] {
            let bytes = folder.read(Path::new(certificate), FILE_BYTES_MAX);
            let Some(signer) = bytes.ok().and_then(|bytes| Signer::from_pem(&bytes).ok()) else { continue };
            let public = signer.certificate().tbs_certificate().subject_public_key_info();
            if let Ok(public) = RsaPublicKeyRef::try_from(public.subject_public_key.raw_bytes()) {
                let number = public.modulus.as_bytes().to_vec();
                leaks.publics.push(Public { name, kind: Kind::Rsa, number });
            }
        }
        let root = folder.read(Path::new("root.pem"), FILE_BYTES_MAX).ok();
        let root = root.and_then(|bytes| String::from_utf8(bytes).ok());
        if let Some(root) = root.and_then(|text| p256::PublicKey::from_public_key_pem(&text).ok()) {
            let number = root.to_sec1_point(false).as_bytes().to_vec();
            leaks.publics.push(Public { name: "root.key", kind: Kind::Elliptic, number });
        }
        let heads: Vec<String> = leaks.publics.iter().map(|public| escaped(public.head())).collect();
        if !heads.is_empty() {
            let heads = heads.join("|");
            let hints = Regex::new(&format!("(?-u:-----BEGIN |{heads})")).ok();
            let heads = Regex::new(&format!("(?-u:{heads})")).ok();
            leaks.patterns = hints.zip(heads).map(|(hints, heads)| Patterns { hints, heads });
        }
        leaks
    }

    /// The name of the key that is in the content `digest`, which is opened and read to its end, or to there, by the first who
    /// asks; others wait for that.
    ///
    /// # Errors
    /// It cannot be opened or read.
    pub fn find<R: Read>(
        &self,
        digest: &Digest,
        open: impl FnOnce() -> io::Result<R>,
    ) -> io::Result<Option<&'static str>> {
        let Some(patterns) = &self.patterns else { return Ok(None) };
        let known = {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(known.entry(*digest).or_default())
        };
        let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = *known {
            return Ok(found);
        }
        let content = open()?;
        let window = self.windows.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut window = window.unwrap_or_default();
        let found = self.read(patterns, content, &mut window);
        self.windows.lock().unwrap_or_else(PoisonError::into_inner).push(window);
        *known = Some(found?);
        Ok(known.flatten())
    }

    fn read(&self, patterns: &Patterns, mut content: impl Read, window: &mut Vec<u8>) -> io::Result<Found> {
        let (limit, mut tries) = (u64::try_from(WINDOW_BYTES).unwrap_or(u64::MAX), TRIES_MAX);
        window.clear();
        loop {
            let read = content.by_ref().take(limit).read_to_end(window)?;
            if patterns.hints.is_match(window) {
                let mut look = |bytes: &[u8]| self.look(&patterns.heads, bytes, &mut tries);
                let found = look(window);
                let found = found.or_else(|| blocks(window).iter().find_map(|(_, content)| look(content)));
                if found.is_some() {
                    return Ok(found);
                }
            }
            if read < WINDOW_BYTES {
                return Ok(None);
            }
            window.drain(..window.len().saturating_sub(OVERLAP_BYTES));
        }
    }

    /// The name of the key that is in `bytes` as it is.
    fn look(&self, heads: &Regex, bytes: &[u8], tries: &mut u32) -> Found {
        heads.find_iter(bytes).find_map(|hit| {
            let public = self.publics.iter().find(|public| public.head() == hit.as_bytes())?;
            public.has_secret(bytes, hit.start(), tries).then_some(public.name)
        })
    }
}

impl Public {
    fn head(&self) -> &[u8] {
        self.number.get(..HEAD_BYTES).unwrap_or(&self.number)
    }

    /// Whether `bytes`, where the public number begins at `at`, have the secret in its place beside that.
    fn has_secret(&self, bytes: &[u8], at: usize, tries: &mut u32) -> bool {
        let (before, behind) = bytes.split_at(at);
        let Some(behind) = behind.strip_prefix(self.number.as_slice()) else { return false };
        let mut attempt = |secret: &dyn Fn() -> bool| match tries.checked_sub(1) {
            Some(left) => {
                *tries = left;
                secret()
            }
            None => false,
        };
        match self.kind {
            Kind::Rsa => {
                // RFC 8017, A.1.2: exponents, then primes. OpenSSH has the coefficient between (its PROTOCOL.key).
                let der = || der_numbers::<4>(behind).map(|[_, _, p, q]| (p, q));
                let openssh = || openssh_numbers::<5>(behind).map(|[_, _, _, p, q]| (p, q));
                let primes = der().or_else(openssh);
                primes.is_some_and(|(p, q)| attempt(&|| self.is_product(p, q)))
            }
            Kind::Elliptic => {
                let begin = before.len().saturating_sub(BEFORE_POINT_BYTES);
                let der = before.ends_with(&POINT).then(|| number(&before[begin..]));
                let secret = der.or_else(|| openssh_numbers::<1>(behind).map(|[secret]| secret));
                secret.is_some_and(|secret| attempt(&|| self.is_of(secret)))
            }
        }
    }

    fn is_product(&self, p: &[u8], q: &[u8]) -> bool {
        let is_less = |factor: &[u8]| factor.len() < self.number.len();
        // Neither is 1, then.
        if !is_less(p) || !is_less(q) {
            return false;
        }
        let bits = u32::try_from(8 * self.number.len()).unwrap_or(u32::MAX);
        let [p, q] = [p, q].map(|factor| BoxedUint::from_be_slice(factor, bits));
        let (Ok(p), Ok(q)) = (p, q) else { return false };
        let product = p.checked_mul(&q).into_option();
        product.is_some_and(|product| product.to_be_bytes_trimmed_vartime()[..] == self.number[..])
    }

    fn is_of(&self, secret: &[u8]) -> bool {
        let mut padded = [0; SECRET_BYTES];
        let Some(begin) = SECRET_BYTES.checked_sub(secret.len()) else { return false };
        padded[begin..].copy_from_slice(secret);
        let key = p256::SecretKey::from_slice(&padded);
        key.is_ok_and(|key| key.public_key().to_sec1_point(false).as_bytes() == self.number)
    }
}

/// The first `N` integers of `bytes` in DER.
fn der_numbers<const N: usize>(bytes: &[u8]) -> Option<[&[u8]; N]> {
    // More than any key has, and no more than a reader takes.
    let bytes = bytes.get(..OVERLAP_BYTES).unwrap_or(bytes);
    let mut reader = SliceReader::new(bytes).ok()?;
    let mut numbers = [&[][..]; N];
    for number in &mut numbers {
        *number = UintRef::decode(&mut reader).ok()?.as_bytes();
    }
    Some(numbers)
}

/// The first `N` numbers of `bytes` as OpenSSH writes them (RFC 4251, 5), without zeros before them.
fn openssh_numbers<const N: usize>(mut bytes: &[u8]) -> Option<[&[u8]; N]> {
    let mut numbers = [&[][..]; N];
    for number in &mut numbers {
        let (length, rest) = bytes.split_first_chunk()?;
        let (text, rest) = rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)?;
        let zeros = text.iter().take_while(|byte| **byte == 0).count();
        (*number, bytes) = (&text[zeros..], rest);
    }
    Some(numbers)
}

/// `bytes` as a regular expression.
fn escaped(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!(r"\x{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use base64ct::{Base64, Encoding as _};

    use super::*;
    use crate::sign::make;

    /// Keys, what looks for them, and a reader of their files.
    #[expect(clippy::disallowed_methods, reason = "keys are made for now")]
    fn keys(folder: &Path) -> (Leaks, impl Fn(&str) -> Vec<u8>) {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
        let place = make::make(folder, "mesh.internal", now).expect("keys");
        (Leaks::of(folder), move |name: &str| std::fs::read(place.join(name)).expect("made"))
    }

    fn find(leaks: &Leaks, bytes: &[u8]) -> Found {
        leaks.find(&Digest::of(bytes), || Ok(bytes)).expect("read")
    }

    #[test]
    fn a_private_key_is_found_wherever_it_lies_in_a_file_and_public_ones_are_none() {
        let folder = tempfile::tempdir().expect("a folder");
        let (leaks, read) = keys(folder.path());
        for name in ["PK.key", "KEK.key", "db.key", "root.key"] {
            let pem = read(name);
            let (_, der) = pem_rfc7468::decode_vec(&pem).expect("PEM");
            for key in [&pem, &der] {
                // At the ends of what is looked at, too.
                for before in
                    [0, 5, WINDOW_BYTES - 700, WINDOW_BYTES - 1, WINDOW_BYTES, 2 * WINDOW_BYTES - 300]
                {
                    let content = [&vec![b'\n'; before][..], key, b"\nbehind it"].concat();
                    assert_eq!(find(&leaks, &content), Some(name), "behind {before} bytes");
                }
            }
            assert_eq!(find(&Leaks::default(), &pem), None);
        }
        for name in ["db.crt", "db.cer", "db.esl", "db.auth", "PK.auth", "root.pem", "authorized_keys"] {
            assert_eq!(find(&leaks, &read(name)), None, "{name}");
        }
        assert_eq!(find(&leaks, b"-----BEGIN PRIVATE KEY-----\nAAAA\n"), None);
    }

    #[test]
    fn what_is_made_of_a_public_half_is_no_key_however_it_looks() {
        let folder = tempfile::tempdir().expect("a folder");
        let (leaks, read) = keys(folder.path());
        let decoded = |name: &str| pem_rfc7468::decode_vec(&read(name)).expect("PEM").1;
        let at = |bytes: &[u8], part: &[u8]| bytes.windows(part.len()).position(|window| window == part);
        for (name, public) in ["PK.key", "KEK.key", "db.key", "root.key"].iter().zip(&leaks.publics) {
            let der = decoded(name);
            let begin = at(&der, &public.number).expect("the public number");
            let behind = begin + public.number.len();
            // Whole, but for one bit of what is secret; and what a certificate has, with nothing or too little behind it.
            let secret = match public.kind {
                Kind::Rsa => behind + 400,
                Kind::Elliptic => begin - 10,
            };
            let mut forged = der.clone();
            forged[secret] ^= 1;
            let one = [0x02, 0x01, 0x01];
            let mut trivial = [&der[..behind], &one, &one, &one, &[0x02, 0x82, 0x01, 0x01, 0x00]].concat();
            trivial.extend(&public.number);
            for bytes in [&forged, &der[..behind].to_vec(), &trivial] {
                let text = Base64::encode_string(bytes);
                let pem = format!("-----BEGIN RSA PRIVATE KEY-----\n{text}\n-----END RSA PRIVATE KEY-----\n");
                match public.kind {
                    // Its secret lies before.
                    Kind::Elliptic if *bytes != forged => {}
                    _ => {
                        assert_eq!(find(&leaks, bytes), None, "{name}");
                        assert_eq!(find(&leaks, pem.as_bytes()), None, "{name}");
                    }
                }
            }
            assert_eq!(find(&leaks, &[&forged[..], &der].concat()), Some(*name), "a key behind a forgery");
        }
    }

    #[test]
    fn a_file_full_of_forgeries_costs_no_more_than_some_of_them() {
        let folder = tempfile::tempdir().expect("a folder");
        let (leaks, read) = keys(folder.path());
        let (_, mut forged) = pem_rfc7468::decode_vec(&read("db.key")).expect("PEM");
        let secret = forged.len() - 500;
        forged[secret] ^= 1;
        let patterns = leaks.patterns.as_ref().expect("keys");
        let mut tries = 100;
        assert_eq!(leaks.look(&patterns.heads, &forged.repeat(60), &mut tries), None);
        assert_eq!(tries, 40);
        assert_eq!(leaks.look(&patterns.heads, &forged.repeat(60), &mut tries), None);
        assert_eq!(tries, 0);
    }

    #[test]
    fn a_content_is_read_once_whatever_is_found_and_again_where_that_failed() {
        let folder = tempfile::tempdir().expect("a folder");
        let (leaks, read) = keys(folder.path());
        for (content, found) in [(read("db.key"), Some("db.key")), (b"nothing".to_vec(), None)] {
            let (digest, opened) = (Digest::of(&content), Cell::new(0));
            let open = || {
                opened.set(opened.get() + 1);
                if opened.get() == 1 { Err(io::ErrorKind::NotFound.into()) } else { Ok(&content[..]) }
            };
            assert!(leaks.find(&digest, open).is_err());
            for _ in 0..3 {
                assert_eq!(leaks.find(&digest, open).expect("read"), found);
            }
            assert_eq!(opened.get(), 2);
        }
        let windows = leaks.windows.lock().expect("nobody");
        assert!(windows.len() == 1 && windows[0].capacity() < WINDOW_BYTES / 8, "{}", windows[0].capacity());
    }
}
