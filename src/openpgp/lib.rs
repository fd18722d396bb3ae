//! Verification of OpenPGP-signed indexes (RFC 9580): Debian's InRelease and Release.gpg.
//!
//! Two functions, one for each way an index is signed. Both give back only bytes that a good signature
//! covers. Everything of OpenPGP that is not needed for that (encryption, web of trust, messages) stays out, so
//! that the crate beneath can be replaced. The rules are apt's and a little stricter:
//!
//! - at least one signature must be good, by a key of the keyrings; one by an unknown key counts for nothing;
//!   one by a known key that does not fit the text spoils the whole;
//! - the key, or the subkey through its binding and back signature, is bound by strong self-signatures, may sign, and is
//!   neither expired nor revoked at the moment of verification;
//! - no signature counts that rests on MD5, SHA-1 or RIPEMD-160, that is expired, or that comes from the future;
//! - a document with anything before, between or after the parts of its armor is refused (CVE-2016-1252).

mod keyring;
#[cfg(feature = "testing")]
pub mod testing;

use std::io::Cursor;

use keyring::{Keyring, SigningKey, Standing};
use pgp::composed::{CleartextSignedMessage, Deserializable, DetachedSignature};
use pgp::packet::{Signature, SignatureType};

/// How far a signature's time may lie ahead of ours, for clocks that disagree.
const CLOCK_SKEW_SECONDS: u64 = 24 * 60 * 60;
/// More signatures than this are no index's (Debian's carry three).
const MAX_SIGNATURES: usize = 32;
/// Debian's largest InRelease is 0.3 MB.
const MAX_DOCUMENT_BYTES: usize = 16 << 20;

const BEGIN_MESSAGE: &str = "-----BEGIN PGP SIGNED MESSAGE-----";
const BEGIN_SIGNATURE: &str = "-----BEGIN PGP SIGNATURE-----";
const END_SIGNATURE: &str = "-----END PGP SIGNATURE-----";

/// What a good signature vouches for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// The signed text with dash escapes undone and lines ended by a single LF.
    pub text: Vec<u8>,
    /// When the newest good signature was made, in seconds since 1970-01-01 UTC.
    pub signed_at: u64,
    /// Fingerprints of the keys whose signatures are good, as lower-case hexadecimal digits.
    pub fingerprints: Vec<String>,
}

/// Why a document is not trusted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// No armor at all.
    #[error("there is no signature")]
    Unsigned,
    /// Text that no signature covers.
    #[error("there is text outside the signed part")]
    Outside,
    /// Armor or packets that cannot be read.
    #[error("the signature cannot be read: {0}")]
    Malformed(String),
    /// A keyring without a usable key.
    #[error("the keyrings hold no key")]
    EmptyKeyring,
    /// Signatures, but none by a key that is trusted.
    #[error("no trusted key made the signature (it is by {})", .issuers.join(", "))]
    UnknownKey {
        /// Who the signatures say made them.
        issuers: Vec<String>,
    },
    /// A trusted key's signature does not fit the text.
    #[error("the signature by {fingerprint} does not match: the text was changed after it was signed")]
    Bad {
        /// Whose signature.
        fingerprint: String,
    },
    /// A trusted key that must not be relied on any more.
    #[error("the signature is by {fingerprint}, {reason}")]
    Unusable {
        /// Whose signature.
        fingerprint: String,
        /// What is wrong with it, as a clause: "which expired", "made with SHA1".
        reason: String,
    },
}

/// Verifies a cleartext-signed `document` (RFC 9580 §7) against `keyrings`, each binary or armored, at the
/// moment `now` (seconds since 1970-01-01 UTC).
///
/// # Errors
/// [`VerifyError`], as its variants say.
pub fn verify_cleartext(document: &[u8], keyrings: &[&[u8]], now: u64) -> Result<Verified, VerifyError> {
    let document = check_frame(document)?;
    let (message, _) = CleartextSignedMessage::from_armor_buf(
        Cursor::new(document.as_bytes()),
        pgp::armor::DearmorOptions::default(),
    )
    .map_err(malformed)?;
    let text = message.signed_text();
    let signatures: Vec<_> = message.signatures().iter().collect();
    verify(&signatures, text.as_bytes(), keyrings, now).map(|mut verified| {
        verified.text = text.replace("\r\n", "\n").into_bytes();
        verified
    })
}

/// Verifies `signature`, armored or binary, made apart from `text`, as [`verify_cleartext`] does.
///
/// # Errors
/// [`VerifyError`], as its variants say.
pub fn verify_detached(
    text: &[u8],
    signature: &[u8],
    keyrings: &[&[u8]],
    now: u64,
) -> Result<Verified, VerifyError> {
    if signature.len() > MAX_DOCUMENT_BYTES || text.len() > MAX_DOCUMENT_BYTES {
        return Err(VerifyError::Malformed("it is too large".into()));
    }
    let mut signatures = Vec::new();
    let armored = signature.trim_ascii_start().starts_with(b"-----BEGIN");
    let parsed = if armored {
        DetachedSignature::from_armor_many_buf(Cursor::new(signature)).map(|(parsed, _)| parsed)
    } else {
        DetachedSignature::from_bytes_many(Cursor::new(signature))
    };
    for one in parsed.map_err(malformed)?.take(MAX_SIGNATURES + 1) {
        signatures.push(one.map_err(malformed)?.signature);
    }
    let signatures: Vec<_> = signatures.iter().collect();
    verify(&signatures, text, keyrings, now).map(|mut verified| {
        verified.text = text.to_vec();
        verified
    })
}

fn malformed(error: pgp::errors::Error) -> VerifyError {
    // One line is enough: what reads the packets describes where it stood as well.
    let text = error.to_string();
    VerifyError::Malformed(text.lines().next().unwrap_or_default().chars().take(200).collect())
}

/// Checks that `document` is one cleartext message and nothing else, before a lenient parser sees it.
fn check_frame(document: &[u8]) -> Result<&str, VerifyError> {
    if document.len() > MAX_DOCUMENT_BYTES {
        return Err(VerifyError::Malformed("it is too large".into()));
    }
    let text =
        std::str::from_utf8(document).map_err(|_| VerifyError::Malformed("it is not UTF-8 text".into()))?;
    let marks: Vec<_> = text.lines().enumerate().filter(|(_, line)| line.starts_with("-----")).collect();
    let last = text.trim_end_matches(['\n', '\r']).lines().count();
    match marks[..] {
        [] => Err(VerifyError::Unsigned),
        [(0, BEGIN_MESSAGE), (_, BEGIN_SIGNATURE), (end, END_SIGNATURE)] if end + 1 == last => {
            // A lone CR would be a line's end to some readers and not to others.
            if text.replace("\r\n", "\n").contains('\r') {
                return Err(VerifyError::Malformed("a line holds a carriage return".into()));
            }
            Ok(text)
        }
        _ if !text.contains(BEGIN_MESSAGE) || !text.contains(BEGIN_SIGNATURE) => Err(VerifyError::Unsigned),
        _ => Err(VerifyError::Outside),
    }
}

fn verify(
    signatures: &[&Signature],
    text: &[u8],
    keyrings: &[&[u8]],
    now: u64,
) -> Result<Verified, VerifyError> {
    if signatures.is_empty() {
        return Err(VerifyError::Unsigned);
    }
    if signatures.len() > MAX_SIGNATURES {
        return Err(VerifyError::Malformed("it holds too many signatures".into()));
    }
    let keyring = Keyring::read(keyrings);
    if keyring.is_empty() {
        return Err(VerifyError::EmptyKeyring);
    }
    let mut good = Verified { text: Vec::new(), signed_at: 0, fingerprints: Vec::new() };
    let mut unusable = None;
    for signature in signatures {
        for key in keyring.made_by(signature) {
            match judge(signature, &key, text, now) {
                Ok(signed_at) => {
                    good.signed_at = good.signed_at.max(signed_at);
                    good.fingerprints.push(key.fingerprint());
                }
                Err(error @ VerifyError::Bad { .. }) => return Err(error),
                Err(error) => unusable = Some(error),
            }
        }
    }
    if !good.fingerprints.is_empty() {
        return Ok(good);
    }
    Err(unusable.unwrap_or_else(|| VerifyError::UnknownKey {
        issuers: signatures.iter().map(|signature| keyring::issuer(signature)).collect(),
    }))
}

/// When `key` made `signature` over `text`, if it did and may.
fn judge(signature: &Signature, key: &SigningKey<'_>, text: &[u8], now: u64) -> Result<u64, VerifyError> {
    let fingerprint = key.fingerprint();
    let unusable = |reason: String| VerifyError::Unusable { fingerprint: fingerprint.clone(), reason };
    if !matches!(signature.typ(), Some(SignatureType::Text | SignatureType::Binary)) {
        return Err(unusable("and is not one over a document".into()));
    }
    if !keyring::is_strong(signature) {
        let hash = signature.hash_alg().map_or("an unknown hash".to_owned(), |hash| hash.to_string());
        return Err(unusable(format!("made with {hash}, which is too weak")));
    }
    if !key.verifies(signature, text) {
        return Err(VerifyError::Bad { fingerprint });
    }
    match key.standing(now) {
        Standing::Good => {}
        Standing::Expired => return Err(unusable("which expired".into())),
        Standing::Revoked => return Err(unusable("which was revoked".into())),
        Standing::Unbound => return Err(unusable("which its owner never bound for signing".into())),
    }
    let Some(made) = signature.created().map(|created| u64::from(created.as_secs())) else {
        return Err(unusable("and does not say when it was made".into()));
    };
    if made > now.saturating_add(CLOCK_SKEW_SECONDS) {
        return Err(unusable("made in the future: is this host's clock right?".into()));
    }
    if made < key.created_at() {
        return Err(unusable("made before the key was".into()));
    }
    let lifetime = signature.signature_expiration_time().map_or(0, |lifetime| lifetime.as_secs());
    if lifetime != 0 && made.saturating_add(u64::from(lifetime)) <= now {
        return Err(unusable("and expired".into()));
    }
    Ok(made)
}
