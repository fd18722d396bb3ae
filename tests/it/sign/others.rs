//! Sets of keys that kiln did not make: of other lengths, by OpenSSL and efitools.

use super::built::shell;
use super::{Signing, judge};

/// Puts a set in the place of kiln's own, whose keys are of the kind that OpenSSL calls `kind`.
fn set_of(signing: &Signing, kind: &str) {
    let script = "
        umask 077
        for name in PK KEK db; do
            openssl req -new -x509 -newkey KIND -nodes -sha256 -days 100 -subj /CN=$name -keyout $name.key -out $name.crt
            openssl x509 -in $name.crt -outform DER -out $name.cer
            cert-to-efi-sig-list -g 11111111-2222-3333-4444-123456789abc $name.crt $name.esl
        done >../said 2>&1";
    let folder = signing.host.path("secrets/uefi-keys");
    shell(&script.replace("KIND", kind), &folder);
    for (name, by) in [("PK", "PK"), ("KEK", "PK"), ("db", "KEK")] {
        let [key, certificate] = ["key", "crt"].map(|form| format!("{by}.{form}"));
        let [list, enrolment] = ["esl", "auth"].map(|form| format!("{name}.{form}"));
        judge("sign-efi-sig-list", &["-k", &key, "-c", &certificate, name, &list, &enrolment], &folder);
    }
}

#[test]
fn keys_that_are_longer_sign_and_those_that_are_too_short_do_not() {
    let signing = Signing::with_keys();
    for kind in ["rsa:3072", "rsa:4096"] {
        set_of(&signing, kind);
        signing.sign(&[]).succeeds();
        let image = signing.signed().display().to_string();
        let said = judge("sbverify", &["--cert", "db.crt", &image], &signing.host.path("secrets/uefi-keys"));
        assert!(said.contains("Signature verification OK"), "{kind}: {said}");
        signing.sign(&["--verify"]).succeeds();
    }
    let signing = Signing::with_keys();
    set_of(&signing, "rsa:1024");
    signing.sign(&[]).fails(1, &["1024 bits", "at least 2,048"]);
    signing.has_signed_nothing();
}
