//! The keys of some keyrings, and whether each may sign at a given moment.
//!
//! A key that cannot be read is passed over: it can vouch for nothing. Which of a key's self-signatures counts
//! follows RFC 9580 §5.2.3.10: the newest one that verifies.

use std::io::Cursor;

use pgp::composed::{Deserializable, SignedPublicKey, SignedPublicSubKey};
use pgp::crypto::hash::HashAlgorithm;
use pgp::packet::{Signature, SignatureType};
use pgp::types::{KeyDetails, Tag};

/// More keys than this are no archive's keyring (Debian's holds a dozen).
const MAX_KEYS: usize = 1024;

/// Keys by which an index may be signed.
pub(crate) struct Keyring {
    keys: Vec<SignedPublicKey>,
}

/// A primary key or one of its subkeys.
pub(crate) struct SigningKey<'a> {
    primary: &'a SignedPublicKey,
    subkey: Option<&'a SignedPublicSubKey>,
}

/// Whether a key may be relied on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    Good,
    Expired,
    Revoked,
    Unbound,
}

/// Whether `signature` rests on a hash without known collisions, in a packet version that is still made.
pub(crate) fn is_strong(signature: &Signature) -> bool {
    use pgp::packet::SignatureVersion::{V4, V6};
    matches!(signature.version(), V4 | V6)
        && matches!(
            signature.hash_alg(),
            Some(
                HashAlgorithm::Sha256
                    | HashAlgorithm::Sha384
                    | HashAlgorithm::Sha512
                    | HashAlgorithm::Sha224
                    | HashAlgorithm::Sha3_256
                    | HashAlgorithm::Sha3_512
            )
        )
}

/// Who `signature` says made it.
pub(crate) fn issuer(signature: &Signature) -> String {
    if let Some(fingerprint) = signature.issuer_fingerprint().first() {
        return fingerprint.to_string();
    }
    signature.issuer_key_id().first().map_or_else(|| "nobody named".into(), ToString::to_string)
}

impl Keyring {
    /// Reads `files`, each binary or one or more armored blocks.
    pub(crate) fn read(files: &[&[u8]]) -> Self {
        const BEGIN: &[u8] = b"-----BEGIN PGP PUBLIC KEY BLOCK-----";
        let mut keys = Vec::new();
        for file in files {
            let starts: Vec<_> =
                file.windows(BEGIN.len()).enumerate().filter(|(_, window)| *window == BEGIN).collect();
            if starts.is_empty() {
                if let Ok(parsed) = SignedPublicKey::from_bytes_many(Cursor::new(*file)) {
                    keys.extend(parsed.take(MAX_KEYS).flatten());
                }
                continue;
            }
            for (index, (start, _)) in starts.iter().enumerate() {
                let end = starts.get(index + 1).map_or(file.len(), |(next, _)| *next);
                if let Ok((parsed, _)) = SignedPublicKey::from_armor_many_buf(Cursor::new(&file[*start..end]))
                {
                    keys.extend(parsed.take(MAX_KEYS).flatten());
                }
            }
        }
        keys.dedup_by(|a, b| a == b);
        Self { keys }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// The keys that `signature` names as its maker.
    pub(crate) fn made_by<'a>(&'a self, signature: &'a Signature) -> impl Iterator<Item = SigningKey<'a>> {
        self.keys
            .iter()
            .flat_map(|primary| {
                std::iter::once(SigningKey { primary, subkey: None }).chain(
                    primary
                        .public_subkeys
                        .iter()
                        .map(move |subkey| SigningKey { primary, subkey: Some(subkey) }),
                )
            })
            .filter(|key| key.is_named_by(signature))
    }
}

impl SigningKey<'_> {
    fn is_named_by(&self, signature: &Signature) -> bool {
        let (fingerprint, id) = match self.subkey {
            Some(subkey) => (subkey.key.fingerprint(), subkey.key.legacy_key_id()),
            None => (self.primary.fingerprint(), self.primary.legacy_key_id()),
        };
        let fingerprints = signature.issuer_fingerprint();
        if !fingerprints.is_empty() {
            return fingerprints.contains(&&fingerprint);
        }
        signature.issuer_key_id().contains(&&id)
    }

    pub(crate) fn fingerprint(&self) -> String {
        match self.subkey {
            Some(subkey) => subkey.key.fingerprint().to_string(),
            None => self.primary.fingerprint().to_string(),
        }
    }

    /// When the key was made, in seconds since the epoch.
    pub(crate) fn created_at(&self) -> u64 {
        let created = match self.subkey {
            Some(subkey) => subkey.key.created_at(),
            None => self.primary.created_at(),
        };
        u64::from(created.as_secs())
    }

    pub(crate) fn verifies(&self, signature: &Signature, text: &[u8]) -> bool {
        match self.subkey {
            Some(subkey) => signature.verify(&subkey.key, text).is_ok(),
            None => signature.verify(&self.primary.primary_key, text).is_ok(),
        }
    }

    /// Whether the key may sign at `now` (seconds since the epoch).
    pub(crate) fn standing(&self, now: u64) -> Standing {
        let primary = primary_standing(self.primary, now, self.subkey.is_none());
        match (primary, self.subkey) {
            (Standing::Good, Some(subkey)) => subkey_standing(self.primary, subkey, now),
            (standing, _) => standing,
        }
    }
}

fn is_expired(made: u64, binding: &Signature, now: u64) -> bool {
    let lifetime = binding.key_expiration_time().map_or(0, |lifetime| u64::from(lifetime.as_secs()));
    let ended = lifetime != 0 && made.saturating_add(lifetime) <= now;
    let lapse = binding.signature_expiration_time().map_or(0, |lapse| u64::from(lapse.as_secs()));
    let bound = binding.created().map_or(0, |created| u64::from(created.as_secs()));
    ended || (lapse != 0 && bound.saturating_add(lapse) <= now)
}

fn newest<'a>(signatures: impl Iterator<Item = &'a Signature>) -> Option<&'a Signature> {
    signatures.max_by_key(|signature| signature.created().map_or(0, |created| created.as_secs()))
}

fn primary_standing(key: &SignedPublicKey, now: u64, must_sign: bool) -> Standing {
    let primary = &key.primary_key;
    // A revocation counts whatever its hash and its reason: nobody gains by forging one.
    if key.details.revocation_signatures.iter().any(|signature| signature.verify_key(primary).is_ok()) {
        return Standing::Revoked;
    }
    let direct = key.details.direct_signatures.iter().filter(|signature| {
        is_strong(signature)
            && signature.typ() == Some(SignatureType::Key)
            && signature.verify_key(primary).is_ok()
    });
    let users = key.details.users.iter().filter_map(|user| {
        let own =
            |signature: &&Signature| signature.verify_certification(primary, Tag::UserId, &user.id).is_ok();
        let revoked = |signature: &Signature| signature.typ() == Some(SignatureType::CertRevocation);
        if user.signatures.iter().any(|signature| revoked(signature) && own(&signature)) {
            return None;
        }
        newest(
            user.signatures
                .iter()
                .filter(|signature| is_strong(signature) && !revoked(signature))
                .filter(own),
        )
    });
    let Some(binding) = newest(direct.chain(users)) else { return Standing::Unbound };
    if is_expired(u64::from(primary.created_at().as_secs()), binding, now) {
        return Standing::Expired;
    }
    if must_sign && !binding.key_flags().sign() {
        return Standing::Unbound;
    }
    Standing::Good
}

fn subkey_standing(key: &SignedPublicKey, subkey: &SignedPublicSubKey, now: u64) -> Standing {
    let primary = &key.primary_key;
    let own = |signature: &&Signature| signature.verify_subkey_binding(primary, &subkey.key).is_ok();
    let of = |typ| move |signature: &&Signature| signature.typ() == Some(typ);
    if subkey.signatures.iter().filter(of(SignatureType::SubkeyRevocation)).any(|signature| own(&signature)) {
        return Standing::Revoked;
    }
    let binding = newest(
        subkey
            .signatures
            .iter()
            .filter(of(SignatureType::SubkeyBinding))
            .filter(|signature| is_strong(signature))
            .filter(own),
    );
    let Some(binding) = binding else { return Standing::Unbound };
    // Without the subkey's own back signature, a key could claim another's subkey as its own (§5.2.1.9).
    let back = binding
        .embedded_signature()
        .is_some_and(|back| is_strong(back) && back.verify_primary_key_binding(&subkey.key, primary).is_ok());
    if !binding.key_flags().sign() || !back {
        return Standing::Unbound;
    }
    if is_expired(u64::from(subkey.key.created_at().as_secs()), binding, now) {
        return Standing::Expired;
    }
    Standing::Good
}
