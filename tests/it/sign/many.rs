//! Many images in one signing: each is what other tools say it is, and none is there where one cannot be. And what lies
//! behind a table of certificates.

use std::fs;

use kiln_artifact::uefi::authenticode;
use kiln_artifact::uefi::pe::Image;

use super::{COMMAND_LINE, Signing, judge, unified};

const COUNT: usize = 50;

/// So many images of as many lengths, a name each.
fn fifty() -> Signing {
    let mut signing = Signing::with_keys();
    signing.record.unified.clear();
    for index in 1..=COUNT {
        // The length is any, modulo the alignments of certificates and of sections.
        let initrd = vec![0xa5; index * 97];
        signing.image(&format!("image-{index}"), &unified(&format!("{COMMAND_LINE} n={index}"), &initrd));
    }
    signing.write();
    signing
}

#[test]
fn fifty_images_are_signed_at_once_and_each_has_the_digest_that_other_tools_say() {
    let signing = fifty();
    signing.sign(&[]).succeeds();
    let (work, certificate) = (signing.host.path("work/boot/efi"), signing.key("db.crt"));
    let certificate = certificate.to_string_lossy();
    let mut digests = std::collections::BTreeSet::new();
    for index in 1..=COUNT {
        let name = format!("IMAGE-{index}.EFI");
        let bytes = fs::read(work.join(&name)).expect("signed");
        let digest = authenticode::digest(&Image::parse(&bytes).expect("whole")).to_string();
        let said = judge("pesign", &["--hash", "--in", &name], &work);
        assert!(said.contains(&digest), "{name}: {said}");
        let said = judge("osslsigncode", &["verify", "-CAfile", &certificate, "-in", &name], &work);
        assert!(said.to_lowercase().contains(&digest), "{name}: {said}");
        let said = judge("sbverify", &["--cert", &certificate, &name], &work);
        assert!(said.contains("Signature verification OK") && !said.contains("warning"), "{name}: {said}");
        digests.insert(digest);
    }
    assert_eq!(digests.len(), COUNT);
}

#[test]
fn of_fifty_images_none_is_signed_where_the_last_is_not_what_was_built() {
    let signing = fifty();
    let last = signing.host.path(&format!("work/boot/image-{COUNT}.efi"));
    let mut bytes = fs::read(&last).expect("there");
    let end = bytes.len() - 1;
    bytes[end] ^= 1;
    fs::write(&last, bytes).expect("room");
    signing.sign(&[]).fails(1, &["image-50.efi"]);
    signing.has_signed_nothing();
}

#[test]
fn an_image_with_bytes_behind_its_certificates_is_refused_by_name() {
    let signing = Signing::with_keys();
    signing.sign(&[]).succeeds();
    let good = fs::read(signing.signed()).expect("signed");
    // In whole entries and less, zeros too: no signature covers them.
    for more in [&[0_u8][..], &[0; 8], b"#!/bin/sh\n", &[0x18, 0, 0, 0, 0, 2, 2, 0]] {
        let mut signing = Signing::with_keys();
        signing.record.unified.clear();
        let behind = [&good[..], more].concat();
        signing.image("a", &good);
        fs::write(signing.host.path("work/boot/a.efi"), &behind).expect("room");
        // The record has what is there: it is not this that refuses.
        signing.record.unified[0].sha256 = kiln_digest::Digest::of(&behind);
        signing.write();
        signing.sign(&[]).fails(1, &["boot/a.efi", "is followed by bytes that no signature covers"]);
        signing.has_signed_nothing();
    }
}
