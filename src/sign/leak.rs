//! The owner's private keys in what is built: found by their public halves, which every form of an RSA or P-256 key has beside
//! its secret, so that whoever builds reads no private key.
//!
//! Found are PEM blocks of any private form, and DER as RFC 8017 and RFC 5915 have it, alone or among other bytes. What is
//! compressed or encrypted is not looked into, and a bare P-256 number is no key to this.

use std::io::{self, Read};
use std::path::Path;

use kiln_artifact::uefi::Signer;
use p256::elliptic_curve::sec1::ToSec1Point as _;
use regex::bytes::Regex;
use rsa::pkcs8::DecodePublicKey as _;

use super::KEYS;
use super::folder::Folder;
use super::private::{Privates, blocks};

/// How much is looked at at a time.
const WINDOW_BYTES: usize = 1 << 20;
/// What is looked at again with the next: more than a private key takes in any form.
const OVERLAP_BYTES: usize = 64 << 10;
/// No certificate is nearly as long.
const FILE_BYTES_MAX: u64 = 64 << 10;
/// How much of a number is looked for.
const PART_BYTES: usize = 40;

/// What private keys of SECRETS look like where they should not be.
#[derive(Debug, Default)]
pub struct Leaks {
    privates: Privates,
    /// How the DER of each begins to be one key's alone, and the key's name.
    ders: Vec<(String, Vec<u8>)>,
    /// What every form has, for a first look; none where there are no keys.
    hints: Option<Regex>,
}

impl Leaks {
    /// Of the keys in `secrets`, as far as their public halves are there and can be read: to judge them is signing's.
    pub fn of(secrets: &Path) -> Self {
        let mut leaks = Self::default();
        let Ok(folder) = Folder::open(&secrets.join(KEYS)) else { return leaks };
        for name in ["PK", "KEK", "db"] {
            let bytes = folder.read(Path::new(&format!("{name}.crt")), FILE_BYTES_MAX);
            let Some(signer) = bytes.ok().and_then(|bytes| Signer::from_pem(&bytes).ok()) else { continue };
            let public = signer.certificate().tbs_certificate().subject_public_key_info();
            let bits = public.subject_public_key.raw_bytes();
            // A public key begins with the modulus (RFC 8017, A.1.1), behind the head of its sequence; a private one has its
            // version, 0, before it.
            let modulus = bits.get(4..4 + PART_BYTES).unwrap_or_default();
            leaks.add(name, bits, &[&[0x02, 0x01, 0x00], modulus].concat());
        }
        let root = folder.read(Path::new("root.pem"), FILE_BYTES_MAX).ok();
        let root = root.and_then(|bytes| String::from_utf8(bytes).ok());
        if let Some(root) = root.and_then(|text| p256::PublicKey::from_public_key_pem(&text).ok()) {
            let point = root.to_sec1_point(false);
            // The bit string of the public key, within its own tag, 1.
            let head = [0xa1, 0x44, 0x03, 0x42, 0x00];
            leaks.add("root", point.as_bytes(), &[&head, &point.as_bytes()[..PART_BYTES]].concat());
        }
        let ders = leaks.ders.iter().map(|(_, der)| {
            let byte = |byte: &u8| format!(r"\x{byte:02x}");
            der.iter().map(byte).collect::<String>()
        });
        let hints = ["-----BEGIN ".to_owned()].into_iter().chain(ders).collect::<Vec<_>>().join("|");
        if !leaks.ders.is_empty() {
            leaks.hints = Regex::new(&format!("(?-u:{hints})")).ok();
        }
        leaks
    }

    fn add(&mut self, name: &str, public: &[u8], der: &[u8]) {
        let name = format!("{name}.key");
        self.privates.public(&name, public);
        self.ders.push((name, der.to_vec()));
    }

    /// The name of the key that is in `content`, which is read to its end or to there.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn find(&self, mut content: impl Read) -> io::Result<Option<&str>> {
        let Some(hints) = &self.hints else { return Ok(None) };
        let mut window = Vec::with_capacity(WINDOW_BYTES + OVERLAP_BYTES);
        loop {
            let limit = u64::try_from(WINDOW_BYTES).unwrap_or(u64::MAX);
            let read = content.by_ref().take(limit).read_to_end(&mut window)?;
            if hints.is_match(&window)
                && let Some(name) = self.name(&window)
            {
                return Ok(Some(name));
            }
            if read < WINDOW_BYTES {
                return Ok(None);
            }
            window.drain(..window.len().saturating_sub(OVERLAP_BYTES));
        }
    }

    fn name(&self, bytes: &[u8]) -> Option<&str> {
        let blocks = blocks(bytes);
        let has = |der: &[u8]| {
            let is_in = |bytes: &[u8]| bytes.windows(der.len()).any(|window| window == der);
            is_in(bytes) || blocks.iter().any(|(_, content)| is_in(content))
        };
        let der = self.ders.iter().find(|(_, der)| has(der)).map(|(name, _)| name.as_str());
        der.or_else(|| self.privates.find(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sign::make;

    #[test]
    #[expect(clippy::disallowed_methods, reason = "keys are made for now")]
    fn a_private_key_is_found_wherever_it_lies_in_a_file_and_public_ones_are_none() {
        let folder = tempfile::tempdir().expect("a folder");
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
        let place = make::make(folder.path(), "mesh.internal", now).expect("keys");
        let leaks = Leaks::of(folder.path());
        let read = |name: &str| std::fs::read(place.join(name)).expect("made");
        for name in ["PK.key", "KEK.key", "db.key", "root.key"] {
            let pem = read(name);
            let (_, der) = pem_rfc7468::decode_vec(&pem).expect("PEM");
            for key in [&pem, &der] {
                // At the ends of what is looked at, too.
                for before in
                    [0, 5, WINDOW_BYTES - 700, WINDOW_BYTES - 1, WINDOW_BYTES, 2 * WINDOW_BYTES - 300]
                {
                    let content = [&vec![b'\n'; before][..], key, b"\nbehind it"].concat();
                    assert_eq!(leaks.find(&content[..]).expect("read"), Some(name), "behind {before} bytes");
                }
            }
            assert_eq!(Leaks::default().find(&pem[..]).expect("read"), None);
        }
        for name in ["db.crt", "db.cer", "db.esl", "db.auth", "PK.auth", "root.pem", "authorized_keys"] {
            assert_eq!(leaks.find(&read(name)[..]).expect("read"), None, "{name}");
        }
        assert_eq!(leaks.find(&b"-----BEGIN PRIVATE KEY-----\nAAAA\n"[..]).expect("read"), None);
    }
}
