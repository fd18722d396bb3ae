//! What a signed index must survive, and what must be refused.

#![allow(clippy::panic, reason = "a test fails by panicking")]

use std::time::{SystemTime, UNIX_EPOCH};

use kiln_openpgp::testing::{SignOptions, TestKey};
use kiln_openpgp::{VerifyError, verify_cleartext, verify_detached};
use pgp::crypto::hash::HashAlgorithm;

const TEXT: &str = "Origin: Test\nSuite: stable\n- a dash\n\nSHA256:\n 00 1 main/x\n";

#[expect(clippy::disallowed_methods, reason = "keys made by a test are valid from now on")]
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
}

fn refused(document: &[u8], keyring: &[u8]) -> VerifyError {
    verify_cleartext(document, &[keyring], now()).expect_err("it must be refused")
}

#[test]
fn a_good_signature_gives_back_the_text() {
    let (key, other) = (TestKey::generate(), TestKey::generate());
    let document = key.sign_cleartext(TEXT, SignOptions::default());
    for keyring in [key.public(), key.public_armored(), [other.public(), key.public()].concat()] {
        let verified = verify_cleartext(&document, &[&keyring], now()).expect("good");
        assert_eq!(String::from_utf8(verified.text).expect("text").trim_end(), TEXT.trim_end());
        assert_eq!(verified.fingerprints.len(), 1);
        assert!(now() - verified.signed_at < 60);
    }
    let armored = [other.public_armored(), key.public_armored()].concat();
    verify_cleartext(&document, &[&armored], now()).expect("two armored keys in one file");
}

#[test]
fn a_detached_signature_holds_for_its_text_only() {
    let key = TestKey::generate();
    let signature = key.sign_detached(TEXT.as_bytes(), SignOptions::default());
    let verified = verify_detached(TEXT.as_bytes(), &signature, &[&key.public()], now()).expect("good");
    assert_eq!(verified.text, TEXT.as_bytes());
    let error = verify_detached(b"other", &signature, &[&key.public()], now()).expect_err("bad");
    assert!(matches!(error, VerifyError::Bad { .. }), "{error}");
}

#[test]
fn any_changed_byte_of_the_text_is_noticed() {
    let key = TestKey::generate();
    let document = key.sign_cleartext(TEXT, SignOptions::default());
    let keyring = key.public();
    let good = verify_cleartext(&document, &[&keyring], now()).expect("good").text;
    for position in 0..document.len() {
        for bit in [0, 1, 5, 7] {
            let mut changed = document.clone();
            changed[position] ^= 1 << bit;
            // A change of the armor's own layout may be harmless, but never of what comes back.
            if let Ok(verified) = verify_cleartext(&changed, &[&keyring], now()) {
                assert_eq!(verified.text, good, "byte {position} bit {bit}");
            }
        }
    }
    let text = String::from_utf8(document).expect("text").replace("stable", "staple");
    assert!(matches!(refused(text.as_bytes(), &keyring), VerifyError::Bad { .. }));
}

#[test]
fn every_truncation_is_refused() {
    let key = TestKey::generate();
    let document = key.sign_cleartext(TEXT, SignOptions::default());
    for length in 0..document.len() - 1 {
        assert!(verify_cleartext(&document[..length], &[&key.public()], now()).is_err(), "{length}");
    }
}

#[test]
fn unknown_keys_and_unsigned_text_are_refused() {
    let (key, other) = (TestKey::generate(), TestKey::generate());
    let document = key.sign_cleartext(TEXT, SignOptions::default());
    assert!(matches!(refused(&document, &other.public()), VerifyError::UnknownKey { .. }));
    assert_eq!(refused(TEXT.as_bytes(), &key.public()), VerifyError::Unsigned);
    assert_eq!(refused(b"", &key.public()), VerifyError::Unsigned);
    assert_eq!(refused(&document, b"no key"), VerifyError::EmptyKeyring);
}

#[test]
fn text_outside_the_armor_is_refused() {
    let key = TestKey::generate();
    let document = String::from_utf8(key.sign_cleartext(TEXT, SignOptions::default())).expect("text");
    let before = format!("Suite: evil\n{document}");
    let blank = format!("\n{document}");
    let after = format!("{document}Suite: evil\n");
    let twice = format!("{document}{document}");
    for changed in [before, blank, after, twice] {
        assert_eq!(refused(changed.as_bytes(), &key.public()), VerifyError::Outside, "{changed}");
    }
}

#[test]
fn weak_hashes_are_refused() {
    let key = TestKey::generate_rsa();
    let options = SignOptions { hash: HashAlgorithm::Sha1, ..SignOptions::default() };
    let signature = key.sign_detached(TEXT.as_bytes(), options);
    let error = verify_detached(TEXT.as_bytes(), &signature, &[&key.public()], now()).expect_err("weak");
    assert!(error.to_string().contains("SHA1"), "{error}");
}

#[test]
fn what_expired_was_revoked_or_comes_from_the_future_is_refused() {
    let key = TestKey::generate();
    let document = key.sign_cleartext(TEXT, SignOptions::default());
    let unusable =
        |document: &[u8], keyring: &[u8], now: u64| match verify_cleartext(document, &[keyring], now) {
            Err(VerifyError::Unusable { reason, .. }) => reason,
            other => panic!("{other:?}"),
        };
    let expiring = key.public_expiring(3600);
    verify_cleartext(&document, &[&expiring], now()).expect("still good");
    assert!(unusable(&document, &expiring, now() + 4000).contains("expired"));
    assert!(unusable(&document, &key.public_revoked(), now()).contains("revoked"));
    assert!(unusable(&document, &key.public(), now() - 200_000).contains("future"));
    let short = key.sign_cleartext(TEXT, SignOptions { lifetime_seconds: 60, ..SignOptions::default() });
    verify_cleartext(&short, &[&key.public()], now()).expect("still good");
    assert!(unusable(&short, &key.public(), now() + 61).contains("expired"));
    let early = key.sign_cleartext(TEXT, SignOptions { made_at: Some(1), ..SignOptions::default() });
    assert!(unusable(&early, &key.public(), now()).contains("before"));
}

#[test]
fn a_key_cannot_claim_the_subkey_of_another() {
    let (key, thief) = (TestKey::generate(), TestKey::generate());
    let document = key.sign_cleartext(TEXT, SignOptions::default());
    let error = refused(&document, &key.public_claimed_by(&thief));
    assert!(
        matches!(&error, VerifyError::Unusable { reason, .. } if reason.contains("never bound")),
        "{error}"
    );
}
