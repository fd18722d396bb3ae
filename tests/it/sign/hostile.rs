//! Parts, records and keys that somebody made on purpose.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use kiln::sign::record::{File, Kernel};
use kiln_digest::Digest;

use super::built::{Built, archive, files, shell, sign_elsewhere};
use super::{Told, canary::Canaries, judge};
use crate::acceptance::held;

fn le32(bytes: &[u8], at: usize) -> usize {
    bytes[at..at + 4].iter().rev().fold(0, |value, byte| value << 8 | usize::from(*byte))
}

/// Where the section headers of an image begin.
fn headers(image: &[u8]) -> usize {
    let pe = le32(image, 0x3c);
    pe + 24 + (le32(image, pe + 20) & 0xffff)
}

#[test]
fn parts_that_make_no_whole_image_are_refused_with_the_record_on_their_side() {
    type Part = fn(&mut Kernel) -> &mut File;
    let stub: Part = |kernel| &mut kernel.stub;
    let linux: Part = |kernel| &mut kernel.linux;
    let initrd: Part = |kernel| &mut kernel.initrds[1];
    let good = |part: Part| {
        let mut built = Built::new();
        fs::read(built.host.path("work").join(&part(&mut built.record.kernels[0]).file)).expect("there")
    };
    let changed = |part: Part, change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good(part);
        change(&mut bytes);
        bytes
    };
    // A second header like the first: two sections share their bytes, or their addresses.
    let overlap = |field: usize| {
        changed(stub, &|bytes| {
            let first = headers(bytes);
            bytes.copy_within(first + field..first + field + 4, first + 40 + field);
        })
    };
    let signed = || {
        let built = Built::with_keys();
        built.sign(&[]).succeeds();
        built.signed()
    };
    let cases: Vec<(&str, Part, Vec<u8>, &[&str])> = vec![
        ("no stub", stub, b"MZ".to_vec(), &["stub is no PE image"]),
        ("half a stub", stub, changed(stub, &|bytes| bytes.truncate(9000)), &["stub is no PE image"]),
        ("sections on one another in the file", stub, overlap(20), &["stub is no PE image", "overlaps"]),
        ("sections on one another in memory", stub, overlap(12), &["stub is no PE image", "overlaps"]),
        (
            "a stub with bytes behind it",
            stub,
            changed(stub, &|bytes| bytes.extend([7; 64])),
            &["belong to nothing"],
        ),
        ("a signed image as a stub", stub, signed(), &["stub is signed"]),
        ("no kernel", linux, b"vmlinuz".to_vec(), &["kernel cannot be started by firmware"]),
        (
            "half a kernel",
            linux,
            changed(linux, &|bytes| bytes.truncate(9000)),
            &["kernel cannot be started"],
        ),
        ("an image as a kernel", linux, signed(), &["kernel is a unified kernel image itself"]),
        ("a tab", |kernel| &mut kernel.cmdline, b"quiet\tinit=/bin/sh\n".to_vec(), &["control character"]),
        ("no words", |kernel| &mut kernel.cmdline, b"# none\n".to_vec(), &["command line is empty"]),
        ("a NUL", |kernel| &mut kernel.cmdline, b"quiet\0init=/bin/sh".to_vec(), &["NUL"]),
        ("no text", |kernel| &mut kernel.cmdline, b"quiet \xff".to_vec(), &["no command line"]),
        ("too many words", |kernel| &mut kernel.cmdline, vec![b'a'; 3000], &["2,047 bytes"]),
        ("no os-release", |kernel| &mut kernel.osrel, Vec::new(), &["os-release is empty"]),
    ];
    for (what, part, bytes, words) in cases {
        let mut built = Built::with_keys();
        built.rebuild(part, &bytes);
        let told = built.sign(&[]);
        assert_eq!(told.code, Some(1), "{what}: {}", told.stderr);
        told.fails(1, words);
        built.has_signed_nothing();
    }
    let mut built = Built::with_keys();
    built.record.kernels[0].sbat = Some(built.put("boot/sbat", b"image,1,a,b,c,d\n"));
    built.write();
    built.sign(&[]).fails(1, &["SBAT"]);
    built.has_signed_nothing();
    // An empty archive among others harms nothing.
    let mut built = Built::with_keys();
    built.rebuild(initrd, &[]);
    built.sign(&[]).succeeds();
}

#[test]
fn initrds_of_gibibytes_are_refused_where_no_image_or_no_memory_holds_them() {
    const GIB: u64 = 1 << 30;
    let refused = |initrds: &[(&str, u64)], words: &[&str]| {
        let built = Built::with_keys();
        for (name, length_bytes) in initrds {
            let file = fs::File::options().write(true).open(built.work().join("boot").join(name));
            file.expect("there").set_len(*length_bytes).expect("a hole");
        }
        let kiln = built.command(&[]);
        let mut limited = Command::new("prlimit");
        limited.arg("--as=2147483648").arg(kiln.get_program()).args(kiln.get_args());
        limited.envs(kiln.get_envs().filter_map(|(name, value)| Some((name, value?))));
        limited.current_dir(kiln.get_current_dir().expect("a folder of its own"));
        Told::by(&mut limited).fails(1, words);
        built.has_signed_nothing();
    };
    // What no image holds is refused before it is read, alone and together; what one would, where there is no memory for it.
    refused(&[("initrd-base.img", 4 * GIB + 1)], &["initrd-base.img", "is longer than 4294967296 bytes"]);
    refused(
        &[("initrd-base.img", 2 * GIB + 1), ("initrd-init.img", 2 * GIB)],
        &["kernel 6.12-x", "with its initrd the image would be longer than 4 GiB"],
    );
    refused(&[("initrd-base.img", 3 * GIB)], &["initrd-base.img", "out of memory"]);
}

#[test]
fn a_kernel_of_another_release_than_its_modules_is_refused() {
    let mut built = Built::with_keys();
    // A setup header (boot.rst) and its version text are all that is looked at before.
    let mut image = vec![0; 0x2000];
    image[0x1f1] = 4;
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
    image[0x20e..0x210].copy_from_slice(&0x200_u16.to_le_bytes());
    image[0x400..0x40b].copy_from_slice(b"6.1-other #");
    built.rebuild(|kernel| &mut kernel.linux, &image);
    built.sign(&[]).fails(1, &["vmlinuz-6.12-x", "kernel 6.1-other", "has it as 6.12-x"]);
    built.record.kernels[0].release = "6.1\n6.12-cloud".to_owned();
    built.write();
    built.sign(&[]).fails(1, &["not the release of one kernel"]);
    built.has_signed_nothing();
    held("sqfs-content");
}

#[test]
fn a_record_that_names_what_it_should_not_signs_nothing() {
    let refused = |change: &dyn Fn(&mut Built), words: &[&str]| {
        let mut built = Built::with_keys();
        change(&mut built);
        built.write();
        built.sign(&[]).fails(1, words);
        built.has_signed_nothing();
    };
    refused(&|built| built.record.kernels[0].signed[0] = "boot/efi/A*.EFI".to_owned(), &["FAT cannot hold"]);
    refused(&|built| built.record.kernels[0].signed[0] = "../A.EFI".to_owned(), &["no plain path"]);
    refused(&|built| built.record.kernels[0].initrds[0].file = "/etc/passwd".to_owned(), &["no plain path"]);
    refused(
        &|built| {
            let mut second = built.record.kernels[0].clone();
            second.signed = vec!["boot/efi/initos-signed-6.12-X.efi".to_owned()];
            built.record.kernels.push(second);
        },
        &["two images to be signed as"],
    );
    refused(&|built| drop(built.record.kernels[0].verity.remove(0)), &["0 root images"]);
    // A link out of WORK, in place of a part and in place of the folder for what is signed.
    refused(
        &|built| {
            let part = built.work().join("boot/os-release");
            fs::rename(&part, built.host.path("outside")).expect("there");
            std::os::unix::fs::symlink(built.host.path("outside"), part).expect("a link");
        },
        &["os-release"],
    );
    let built = Built::with_keys();
    fs::create_dir(built.host.path("outside")).expect("room");
    std::os::unix::fs::symlink(built.host.path("outside"), built.work().join("boot/efi/EFI"))
        .expect("a link");
    built.sign(&[]).fails(1, &["boot/efi/EFI"]);
    assert_eq!(files(&built.host.path("outside")), Vec::<std::path::PathBuf>::new());
    assert!(!built.work().join("boot/efi/KEYS/db.crt").exists());
}

#[test]
fn private_keys_appear_in_no_file_and_in_no_output() {
    let built = Built::with_keys();
    let keys = built.host.path("secrets/uefi-keys");
    built.secret("local/etc/hostname", b"all\n");
    let canaries = Canaries::of(&keys);
    // The search finds them where they are.
    assert_eq!(canaries.find(&fs::read(keys.join("db.key")).expect("made")), Some("db"));
    let der = judge("openssl", &["pkey", "-in", "db.key", "-outform", "DER", "-out", "../der"], &keys);
    assert!(
        der.is_empty() && canaries.find(&fs::read(built.host.path("secrets/der")).expect("made")).is_some()
    );
    fs::remove_file(built.host.path("secrets/der")).expect("made");

    fs::create_dir(built.host.path("out")).expect("a folder");
    let failing = built.secret("hosts/leaks/local/db", &fs::read(keys.join("db.key")).expect("made"));
    let mut said = Vec::new();
    for arguments in [
        &["--init"][..],
        &["-n"],
        &[],
        &["--request", "out"],
        &["--signatures", "out"],
        &["--host", "leaks"],
        &["--host", "nobody"],
        &["-n", "--host", "leaks"],
    ] {
        if arguments == ["--signatures", "out"] {
            sign_elsewhere(&built.host.path("out"), &keys.join("db.key"));
        }
        let told = built.sign(arguments);
        said.extend([told.stdout, told.stderr]);
    }
    assert!(failing.exists());
    // A key that is broken is not quoted either.
    let text = fs::read_to_string(keys.join("db.key")).expect("made");
    fs::write(keys.join("db.key"), text.replacen('A', "!", 1)).expect("room");
    let told = built.sign(&[]);
    told.fails(1, &["db.key"]);
    said.extend([told.stdout, told.stderr]);
    for text in &said {
        assert_eq!(canaries.find(text.as_bytes()), None, "{text}");
    }
    let secrets = built.host.path("secrets");
    let written: Vec<_> =
        files(&built.host.path(".")).into_iter().filter(|path| !path.starts_with(&secrets)).collect();
    assert!(written.len() > 25, "{written:?}");
    for path in written {
        assert_eq!(canaries.find(&fs::read(&path).expect("readable")), None, "{}", path.display());
    }
    held("tree-complete");
    held("sign-offline");
}

#[test]
fn a_process_that_reads_keys_leaves_no_core() {
    let mut built = Built::with_keys();
    built.rebuild(|kernel| &mut kernel.initrds[1], &archive("bin/busybox", &vec![7; 8 << 20]));
    let mut kiln = built.command(&[]);
    let mut kiln = kiln.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("kiln starts");
    let limits = format!("/proc/{}/limits", kiln.id());
    let mut closed = false;
    while kiln.try_wait().expect("a child").is_none() {
        let said = fs::read_to_string(&limits).unwrap_or_default();
        let core = said.lines().find_map(|line| line.strip_prefix("Max core file size"));
        closed |= core.is_some_and(|line| line.split_whitespace().take(2).eq(["0", "0"]));
    }
    assert!(closed);
}

#[test]
fn a_file_that_is_published_and_has_a_private_key_in_it_is_refused() {
    for (script, file) in [
        ("cp root.key root.pem", "root.pem"),
        ("cat root.key >>authorized_keys", "authorized_keys"),
        ("cat db.key >>db.crt", "db.crt"),
        ("openssl pkey -in PK.key -outform DER >>PK.cer", "PK.cer"),
    ] {
        let built = Built::with_keys();
        shell(&format!("cd secrets/uefi-keys; {script}"), &built.host.path("."));
        built.sign(&[]).fails(1, &[file]);
        built.has_signed_nothing();
    }
}

#[test]
fn what_kiln_signed_is_what_its_digest_says_to_other_tools() {
    let built = Built::with_keys();
    built.sign(&[]).succeeds();
    let image = built.signed();
    fs::write(built.host.path("signed.efi"), &image).expect("room");
    let ours = kiln_artifact::uefi::authenticode::digest(
        &kiln_artifact::uefi::pe::Image::parse(&image).expect("whole"),
    );
    let said = judge("pesign", &["--hash", "--in", "signed.efi"], &built.host.path("."));
    assert!(said.contains(&ours.to_string()), "{said}");
    // One byte anywhere in what was assembled, and no tool takes it.
    let certificate = built.host.path("secrets/uefi-keys/db.crt");
    let parsed = kiln_artifact::uefi::pe::Image::parse(&image).expect("whole");
    for part in parsed.sections().iter().filter(|part| !parsed.content(part).is_empty()) {
        let (name, content) = (&part.name, parsed.content(part));
        let at = image.windows(content.len()).position(|window| window == content).expect("there");
        let mut flipped = image.clone();
        flipped[at + content.len() - 1] ^= 1;
        fs::write(built.host.path("flipped.efi"), &flipped).expect("room");
        let verdict = Command::new("sbverify")
            .args(["--cert", &certificate.to_string_lossy(), "flipped.efi"])
            .current_dir(built.host.path("."))
            .output();
        assert!(!verdict.expect("sbverify runs").status.success(), "{name}");
    }
    assert_ne!(Digest::of(&image), ours);
    assert!(Path::new(&certificate).exists());
}
