//! Signature lists that firmware would take and that are not of the set: empty, with somebody else's certificate in them, or
//! under another owner. Made and signed by efitools, with the set's own keys.

use std::fs;

use super::built::shell;
use super::{Signing, judge};

/// Another SignatureOwner than any that kiln makes.
const OWNER: &str = "11111111-2222-3333-4444-123456789abc";

/// Makes `db.list` by a script in the folder of keys, and of it db's enrolment file, signed by KEK.
fn enrol(signing: &Signing, script: &str) {
    let folder = signing.host.path("secrets/uefi-keys");
    shell(&script.replace("OWNER", OWNER), &folder);
    judge("sign-efi-sig-list", &["-k", "KEK.key", "-c", "KEK.crt", "db", "db.list", "db.auth"], &folder);
    fs::remove_file(folder.join("db.list")).expect("made");
}

#[test]
fn a_db_that_is_empty_or_has_more_than_its_certificate_is_not_published() {
    let stranger = "openssl req -new -x509 -newkey rsa:2048 -nodes -subj /CN=stranger -keyout ../s.key -out ../s.crt 2>../said
        cert-to-efi-sig-list -g OWNER ../s.crt ../s.list";
    for (what, script) in [
        ("nobody's", ": >db.list".to_owned()),
        ("a stranger's", format!("{stranger}; cp ../s.list db.list")),
        ("a stranger's behind it", format!("{stranger}; cat db.esl ../s.list >db.list")),
        ("a stranger's before it", format!("{stranger}; cat ../s.list db.esl >db.list")),
        ("its own twice", "cert-to-efi-sig-list -g OWNER db.crt other; cat db.esl other >db.list".to_owned()),
        // The digest of an image, which starts then whoever signed it.
        (
            "a digest behind it",
            "hash-to-efi-sig-list /usr/lib/systemd/boot/efi/systemd-bootx64.efi other >../said; cat db.esl other >db.list"
                .to_owned(),
        ),
    ] {
        println!("{what}");
        let signing = Signing::with_keys();
        enrol(&signing, &script);
        signing.sign(&[]).fails(1, &["`db.auth` does not enrol `db.crt`"]).hints(&["one set"]);
        signing.has_signed_nothing();
        // The list alone, beside a good enrolment file.
        let signing = Signing::with_keys();
        let folder = signing.host.path("secrets/uefi-keys");
        shell(&format!("{}; cp db.list db.esl", script.replace("OWNER", OWNER)), &folder);
        signing.sign(&[]).fails(1, &["`db.esl` is not", "do not belong together"]).hints(&["one set"]);
        signing.has_signed_nothing();
    }
}

#[test]
fn a_list_under_another_owner_than_its_enrolment_file_is_of_another_set() {
    // PCR 7 measures the owner too: by one way of enrolling a disk would be unlocked, and by the other not.
    let signing = Signing::with_keys();
    let folder = signing.host.path("secrets/uefi-keys");
    judge("cert-to-efi-sig-list", &["-g", OWNER, "db.crt", "db.esl"], &folder);
    signing.sign(&[]).fails(1, &["`db.esl` is not", "`db.auth`", "do not belong together"]);
    signing.has_signed_nothing();
    // Whoever it is, where both agree.
    enrol(&signing, "cp db.esl db.list");
    signing.sign(&[]).succeeds();
}
