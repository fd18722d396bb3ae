//! What a record may say and what not, without a file.

use super::*;

fn file(path: &str) -> File {
    File { file: path.to_owned(), sha256: Digest::of(path.as_bytes()) }
}

fn verity(name: &str, path: &str, hash: &str) -> Verity {
    let tree = file(&format!("{path}.verity"));
    Verity { name: name.to_owned(), image: path.to_owned(), tree, hash: file(hash) }
}

fn sample() -> Record {
    let sections =
        [".linux", ".initrd", ".cmdline"].map(|name| (name.to_owned(), Digest::of(name.as_bytes())));
    let image = Unified {
        file: "boot/a.efi".to_owned(),
        sha256: Digest::of(b"a"),
        signed: "boot/efi/A.EFI".to_owned(),
        sections: sections.into(),
    };
    let kernel = Kernel {
        release: "6.12-x".to_owned(),
        signed: vec!["boot/efi/Signed.EFI".to_owned(), "boot/efi/EFI/BOOT/BOOTX64.EFI".to_owned()],
        stub: file("boot/stub"),
        linux: file("boot/vmlinuz"),
        osrel: file("boot/osrel"),
        cmdline: file("boot/cmdline.secure"),
        initrds: vec![file("boot/initrd")],
        sbat: None,
        verity: vec![
            verity("hash.recovery", "boot/efi/recovery.sqfs", "boot/efi/hash.recovery"),
            verity("hash.modules-6.12-x", "boot/efi/modules-6.12-x.sqfs", "boot/efi/hash.modules-6.12-x"),
        ],
    };
    Record { kernels: vec![kernel], unified: vec![image], ..Record::default() }
}

fn parse(change: impl FnOnce(&mut Record)) -> Result<Record, RecordError> {
    let mut record = sample();
    change(&mut record);
    Record::parse(&serde_json::to_vec(&record).expect("plain data"))
}

#[test]
fn a_record_is_read_as_it_was_written() {
    assert_eq!(parse(|_| ()).expect("good"), sample());
    let single = verity("initos.hash", "boot/efi/initos/initos.sqfs", "boot/efi/initos/initos.hash");
    parse(|record| record.kernels[0].verity = vec![single]).expect("the other layout");
    parse(|record| record.kernels[0].verity.clear()).expect("a kernel that mounts nothing");
}

#[test]
fn what_a_record_may_not_say_is_refused() {
    for path in ["/etc/passwd", "../x", "boot/../../x", "", "boot/", "./a", "a/./b", "a//b", "a\nb"] {
        let refused = parse(|record| record.unified[0].signed = path.to_owned());
        assert!(matches!(refused, Err(RecordError::Path(_))), "{path}: {refused:?}");
        let refused = parse(|record| record.kernels[0].initrds[0].file = path.to_owned());
        assert!(matches!(refused, Err(RecordError::Path(_))), "{path}: {refused:?}");
    }
    for path in ["boot/a.efi", "boot/vmlinuz", "boot/efi/hash.recovery", "boot/efi/HASH.RECOVERY", PATH] {
        let refused = parse(|record| record.unified[0].signed = path.to_owned());
        assert!(matches!(refused, Err(RecordError::InPlace(_))), "{path}: {refused:?}");
    }
    for path in ["boot/efi/SIGNED.efi", "boot/efi/EFI/BOOT/bootx64.efi", "boot/other/signed.EFI"] {
        let refused = parse(|record| record.unified[0].signed = path.to_owned());
        assert!(matches!(refused, Err(RecordError::Twice(_))), "{path}: {refused:?}");
    }
    for path in ["boot/efi/keys/PK.auth", "boot/efi/KEYS", "boot"] {
        let refused = parse(|record| record.kernels[0].signed[1] = path.to_owned());
        assert!(matches!(refused, Err(RecordError::Keys(_))), "{path}: {refused:?}");
    }
    let refused = parse(|record| record.unified[0].sections.retain(|name, _| name != ".initrd"));
    assert!(matches!(refused, Err(RecordError::Section { section: ".initrd", .. })));
    assert!(matches!(
        parse(|record| {
            record.unified.clear();
            record.kernels.clear();
        }),
        Err(RecordError::Empty)
    ));
    assert!(matches!(parse(|record| record.version = 1), Err(RecordError::Version(1))));
    assert!(matches!(parse(|record| record.kernels[0].signed.clear()), Err(RecordError::Nowhere(_))));
    assert!(matches!(parse(|record| record.kernels[0].initrds.clear()), Err(RecordError::NoInitrd(_))));
}

#[test]
fn a_release_is_that_of_one_kernel() {
    for release in ["", "6.1\n6.12-cloud", "6.1 6.12", "6.1\n", "../6.1", "a/b", &"6".repeat(65)] {
        let refused = parse(|record| record.kernels[0].release = release.to_owned());
        assert!(matches!(refused, Err(RecordError::Release(_))), "{release:?}: {refused:?}");
    }
}

#[test]
fn a_command_line_is_one_line_of_what_people_write() {
    for (text, wanted) in [
        ("quiet\n", "quiet"),
        ("# for hosts\nquiet  rdinit=/init\n\n  # and\r\n\tx=#1\r\n", "quiet  rdinit=/init x=#1"),
        ("# nothing\n", ""),
        ("", ""),
    ] {
        assert_eq!(command_line(text), wanted, "{text:?}");
    }
}

#[test]
fn names_that_fat_cannot_hold_are_refused() {
    for path in ["boot/efi/a:b.EFI", "boot/efi/what?.EFI", "boot/efi/a .", "boot/efi/ a/B.EFI"] {
        let refused = parse(|record| record.kernels[0].signed[0] = path.to_owned());
        assert!(matches!(refused, Err(RecordError::Fat(_))), "{path}: {refused:?}");
    }
    // One name in another's place as a folder, and two spellings of one folder.
    for path in ["boot/efi/EFI/BOOT/BOOTX64.EFI/x.EFI", "boot/efi/efi/other.EFI"] {
        let refused = parse(|record| record.unified[0].signed = path.to_owned());
        assert!(matches!(refused, Err(RecordError::Fat(_))), "{path}: {refused:?}");
    }
}

#[test]
fn hashes_have_the_names_and_images_the_places_that_the_initrd_looks_for() {
    for name in ["hash.other", "recovery", "hash.modules-6.1", "hash.modules-", "../hash.recovery"] {
        let refused = parse(|record| record.kernels[0].verity[1].name = name.to_owned());
        assert!(matches!(refused, Err(RecordError::Hash { .. })), "{name}: {refused:?}");
    }
    let refused = parse(|record| record.kernels[0].verity[1].name = "hash.firmware".to_owned());
    assert!(matches!(refused, Err(RecordError::Place { .. })), "{refused:?}");
    for path in ["boot/recovery.sqfs", "boot/efi/xrecovery.sqfs", "boot/efi/img/recovery.sqfs"] {
        let refused = parse(|record| record.kernels[0].verity[0].image = path.to_owned());
        assert!(matches!(refused, Err(RecordError::Place { .. })), "{path}: {refused:?}");
    }
    let refused = parse(|record| record.kernels[0].verity.truncate(0));
    assert!(refused.is_ok());
    let refused = parse(|record| drop(record.kernels[0].verity.remove(0)));
    assert!(matches!(refused, Err(RecordError::Roots { count: 0, .. })), "{refused:?}");
    let other = verity("initos.hash", "boot/efi/initos/initos.sqfs", "boot/efi/initos/initos.hash");
    let refused = parse(|record| record.kernels[0].verity.push(other));
    assert!(matches!(refused, Err(RecordError::Roots { count: 2, .. })), "{refused:?}");
}
