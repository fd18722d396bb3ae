//! Images assembled from the parts of a build: what is in them, that it is what was built, and that they appear whole and
//! together. Judged by objcopy, GNU cpio, veritysetup, sbverify, osslsigncode and OpenSSL.

use std::fs;
use std::process::Command;

use kiln_digest::Digest;

use super::built::{Built, COMMAND_LINE, PLACES, RELEASE, files, section, shell, sign_elsewhere, unpack};
use super::judge;
use crate::acceptance::held;
use crate::judge::sections_of;

#[test]
fn parts_become_one_signed_image_whose_sections_are_what_was_built() {
    let built = Built::with_keys();
    built.sign(&[]).succeeds();
    let image = built.signed();
    let (work, out) = (built.work(), built.host.path("."));
    let sections = [(".linux", "vmlinuz-6.12-x"), (".osrel", "os-release"), (".initrd", "")];
    for (name, part) in sections {
        let to = format!("{name}={}/dumped", out.display());
        judge("objcopy", &["--dump-section", &to, PLACES[0], "../copy.efi"], &work);
        let dumped = fs::read(out.join("dumped")).expect("written");
        // objcopy pads to the alignment of the file.
        let ours = section(&image, name);
        assert!(dumped.starts_with(&ours) && dumped.len() < ours.len() + 4096, "{name}");
        if !part.is_empty() {
            assert!(ours == fs::read(work.join("boot").join(part)).expect("there"), "{name}");
        }
    }
    assert_eq!(section(&image, ".cmdline"), COMMAND_LINE.as_bytes());
    assert_eq!(section(&image, ".uname"), RELEASE.as_bytes());
    let initrd = section(&image, ".initrd");
    let mut expected = Vec::new();
    for name in ["ucode.img", "initrd-base.img", "initrd-init.img"] {
        expected.resize(expected.len().next_multiple_of(4), 0);
        expected.extend(fs::read(work.join("boot").join(name)).expect("there"));
    }
    assert!(initrd.starts_with(&expected));
    assert_eq!(initrd[expected.len()..], built.patch());
    // To systemd's own tool each section is its part, and there are no others but the stub's.
    let said = sections_of(&work.join(PLACES[0]));
    let own = sections_of(&work.join("boot/linux.efi.stub"));
    let part = |name: &str| fs::read(work.join("boot").join(name)).expect("there");
    let parts = [
        (".osrel", part("os-release")),
        (".uname", RELEASE.as_bytes().to_vec()),
        (".cmdline", COMMAND_LINE.as_bytes().to_vec()),
        (".linux", part("vmlinuz-6.12-x")),
        (".initrd", [expected, built.patch()].concat()),
    ];
    let parts = parts.map(|(name, bytes)| {
        let size = u64::try_from(bytes.len()).expect("small");
        (name.to_owned(), (size, Digest::of(&bytes).to_string()))
    });
    assert_eq!(said, own.into_iter().chain(parts).collect());
    let listed = unpack(&built.patch(), &["-itv", "--numeric-uid-gid", "--quiet"], &out);
    let lines: Vec<Vec<&str>> = listed.lines().map(|line| line.split_whitespace().collect()).collect();
    let names: Vec<&str> = lines.iter().filter_map(|line| line.last().copied()).collect();
    let modules = format!("local/hash.modules-{RELEASE}");
    assert_eq!(names, ["local", "local/authorized_keys", &modules, "local/hash.recovery", "local/root.pem"]);
    for line in &lines {
        assert_eq!(line[2..4], ["0", "0"], "{listed}");
        assert_eq!(line[7], "1970", "{listed}");
    }
    for place in PLACES {
        let certificate = built.host.path("secrets/uefi-keys/db.crt");
        let said = judge("sbverify", &["--cert", &certificate.to_string_lossy(), place], &work);
        assert!(said.contains("Signature verification OK") && !said.contains("warning"), "{said}");
        let arguments = ["verify", "-CAfile", &certificate.to_string_lossy(), "-in", place];
        let said = judge("osslsigncode", &arguments, &work);
        assert!(said.contains("Signature verification: ok"), "{said}");
    }
    let mesh = fs::read(built.host.path("secrets/uefi-keys/root.pem")).expect("made");
    assert_eq!(fs::read(work.join("boot/efi/KEYS/root.pem")).expect("published"), mesh);
    assert_eq!(built.local()["root.pem"].as_bytes(), mesh);
    held("uki-sections");
}

#[test]
fn a_command_line_is_signed_without_the_comments_of_its_file_and_in_one_line() {
    let mut built = Built::with_keys();
    let written = b"# Starts quietly.\nquiet loglevel=0\n\n  rdinit=/init # no comment\n#init=/bin/sh\n";
    built.rebuild(|kernel| &mut kernel.cmdline, written);
    built.sign(&[]).succeeds();
    assert_eq!(section(&built.signed(), ".cmdline"), b"quiet loglevel=0 rdinit=/init # no comment");
    built.sign(&["--verify"]).succeeds();
}

#[test]
fn the_hashes_in_the_image_are_those_by_which_the_images_verify() {
    let mut built = Built::with_keys();
    // One that veritysetup makes, by its own salt.
    shell("dd if=/dev/urandom of=f.sqfs bs=4096 count=70 status=none", &built.host.path("."));
    let efi = built.work().join("boot/efi");
    fs::copy(built.host.path("f.sqfs"), efi.join("firmware.sqfs")).expect("room");
    let arguments = ["format", "--root-hash-file=hash.firmware", "firmware.sqfs", "firmware.sqfs.verity"];
    judge("/usr/sbin/veritysetup", &arguments, &efi);
    let file = |path: &str| built.put(path, &fs::read(built.work().join(path)).expect("made"));
    let image = kiln::sign::record::Verity {
        name: "hash.firmware".to_owned(),
        image: "boot/efi/firmware.sqfs".to_owned(),
        tree: file("boot/efi/firmware.sqfs.verity"),
        hash: file("boot/efi/hash.firmware"),
    };
    built.record.kernels[0].verity.push(image);
    built.write();
    built.sign(&[]).succeeds();
    let local = built.local();
    for name in ["recovery", "firmware", &format!("modules-{RELEASE}")] {
        let hash = &local[&format!("hash.{name}")];
        assert_eq!(*hash, fs::read_to_string(efi.join(format!("hash.{name}"))).expect("there"));
        let (image, tree) = (format!("{name}.sqfs"), format!("{name}.sqfs.verity"));
        judge("/usr/sbin/veritysetup", &["verify", &image, &tree, hash], &efi);
    }
    held("hash-binding");
}

#[test]
fn two_kernels_share_a_root_and_each_knows_its_own_modules_alone() {
    let mut built = Built::with_keys();
    let mut second = built.record.kernels[0].clone();
    second.release = "6.12-cloud".to_owned();
    second.signed = vec!["boot/efi/InitOS-Signed-6.12-cloud.EFI".to_owned()];
    second.verity.truncate(1);
    built.record.kernels.insert(0, second);
    let image = "modules-6.12-cloud";
    built.image(
        &format!("hash.{image}"),
        &format!("boot/efi/{image}.sqfs"),
        &format!("boot/efi/hash.{image}"),
        200,
    );
    built.record.kernels.swap(0, 1);
    built.write();
    built.sign(&[]).succeeds();
    let local = built.local();
    assert!(local.contains_key("hash.recovery") && local.contains_key("hash.modules-6.12-x"));
    assert!(!local.contains_key("hash.modules-6.12-cloud"));
    let cloud = fs::read(built.work().join("boot/efi/InitOS-Signed-6.12-cloud.EFI")).expect("signed");
    assert_eq!(section(&cloud, ".uname"), b"6.12-cloud");
    let certificate = built.host.path("secrets/uefi-keys/db.crt");
    let arguments = ["--cert", &certificate.to_string_lossy(), "boot/efi/InitOS-Signed-6.12-cloud.EFI"];
    judge("sbverify", &arguments, &built.work());
    fs::create_dir(built.host.path("out")).expect("a folder");
    built.sign(&["--request", "out"]).succeeds();
    assert_eq!(files(&built.host.path("out")).len(), 2);
}

#[test]
fn an_image_tree_or_hash_that_do_not_belong_together_are_never_signed() {
    let refused = |change: &dyn Fn(&mut Built), words: &[&str]| {
        let mut built = Built::with_keys();
        change(&mut built);
        built.write();
        built.sign(&["-n"]).fails(1, words);
        built.sign(&[]).fails(1, words);
        built.has_signed_nothing();
    };
    let edit = |built: &Built, path: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = fs::read(built.work().join(path)).expect("there");
        change(&mut bytes);
        built.put(path, &bytes)
    };
    let (image, tree, hash) =
        ("boot/efi/recovery.sqfs", "boot/efi/recovery.sqfs.verity", "boot/efi/hash.recovery");
    refused(
        &|built| drop(edit(built, image, &|bytes| bytes[1_000_000] ^= 1)),
        &[image, "block 244 of the data"],
    );
    refused(&|built| drop(edit(built, tree, &|bytes| bytes[5000] ^= 1)), &[tree, "not what was built"]);
    refused(&|built| drop(edit(built, hash, &|bytes| bytes[0] ^= 1)), &[hash, "not what was built"]);
    // A build that says so itself is not believed either.
    refused(
        &|built| built.record.kernels[0].verity[0].tree = edit(built, tree, &|bytes| bytes[5000] ^= 1),
        &[image, "the hash tree is corrupted"],
    );
    refused(
        &|built| {
            let other = Digest::of(b"other").to_string();
            built.record.kernels[0].verity[0].hash = built.put(hash, other.as_bytes());
        },
        &[image, "root hash is"],
    );
    refused(
        &|built| built.record.kernels[0].verity[0].hash = built.put(hash, b"none"),
        &[hash, "no root hash"],
    );
    refused(
        &|built| built.record.kernels[0].verity[0].tree = edit(built, tree, &|bytes| bytes.truncate(8000)),
        &[image, "hash tree cannot be read"],
    );
    refused(
        &|built| drop(edit(built, image, &|bytes| bytes.extend([0; 4096]))),
        &[image, "its hash tree covers"],
    );
    refused(&|built| drop(edit(built, image, &|bytes| bytes.truncate(4096))), &[image, "cut off"]);
    refused(&|built| fs::remove_file(built.work().join(image)).expect("there"), &[image]);
    held("tree-complete");
}

#[test]
fn a_part_that_is_not_what_was_built_is_named_and_nothing_is_signed() {
    let parts = Built::new().record.kernels[0].parts().map(|(_, part)| part.file.clone()).collect::<Vec<_>>();
    assert_eq!(parts.len(), 7);
    let built = Built::with_keys();
    for part in parts {
        let good = fs::read(built.work().join(&part)).expect("there");
        let mut bad = good.clone();
        bad[good.len() / 2] ^= 1;
        built.put(&part, &bad);
        built.sign(&[]).fails(1, &[&format!("`{part}` is not what was built")]);
        built.has_signed_nothing();
        built.put(&part, &good);
    }
    built.sign(&[]).succeeds();
}

#[test]
fn signing_again_gives_the_same_bytes_whatever_the_time_and_from_signatures_made_elsewhere_too() {
    let built = Built::with_keys();
    built.secret("local/etc/hostname", b"all\n");
    built.sign(&[]).succeeds();
    let first = built.signed();
    shell("find secrets/local work/boot -exec touch -d 2001-01-01 {} +", &built.host.path("."));
    let mut kiln = built.command(&[]);
    assert!(kiln.env("SOURCE_DATE_EPOCH", "1234567").output().expect("kiln starts").status.success());
    assert!(built.signed() == first);
    // Elsewhere: this host has the public half alone.
    let (out, key) = (built.host.path("out"), built.host.path("db.key"));
    fs::rename(built.host.path("secrets/uefi-keys/db.key"), &key).expect("made");
    fs::create_dir(&out).expect("a folder");
    for place in PLACES {
        fs::remove_file(built.work().join(place)).expect("signed");
    }
    built.sign(&["--request", "out"]).succeeds();
    assert_eq!(files(&out).len(), 1, "one image, one request");
    sign_elsewhere(&out, &key);
    built.sign(&["--signatures", "out"]).succeeds();
    assert!(built.signed() == first);
    // Another configuration is another image.
    built.secret("local/etc/hostname", b"other\n");
    built.sign(&["--signatures", "out"]).fails(1, &["not by", "(db)"]).hints(&["--request"]);
    assert!(built.signed() == first);
    built.has_no_rest();
}

#[test]
fn what_was_put_out_is_listed_file_by_file_and_the_list_is_the_same_for_the_same_signing() {
    let built = Built::with_keys();
    let before = files(&built.work());
    let list = || {
        let told = built.sign(&[]);
        let is_file = |line: &&str| line.split(' ').next().is_some_and(|word| word.len() == 64);
        told.succeeds().stdout.lines().filter(is_file).map(str::to_owned).collect::<Vec<_>>()
    };
    let listed = list();
    let put_out = files(&built.work()).into_iter().filter(|path| !before.contains(path));
    let expected = put_out.map(|path| {
        let bytes = fs::read(&path).expect("readable");
        let path = path.strip_prefix(built.work()).expect("below").display().to_string();
        format!("{} {:>9} {path}", Digest::of(&bytes), bytes.len())
    });
    assert_eq!(listed, expected.collect::<Vec<_>>());
    assert_eq!(listed.len(), PLACES.len() + 10);
    assert_eq!(list(), listed);
    // sha256sum agrees of each.
    let sums = listed.iter().map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        format!("{}  {}\n", words[0], words[2])
    });
    fs::write(built.host.path("sums"), sums.collect::<String>()).expect("room");
    judge("sha256sum", &["--check", "--strict", "../sums"], &built.work());
    built.secret("local/etc/hostname", b"all\n");
    let other = list();
    let differs: Vec<&String> = other.iter().filter(|line| !listed.contains(line)).collect();
    assert_eq!(differs.len(), PLACES.len(), "{other:#?}");
    held("tree-complete");
}

#[test]
fn the_plan_says_what_goes_in_and_where_it_goes_and_writes_nothing() {
    let built = Built::with_keys();
    built.secret("local/etc/hostname", b"all\n");
    built.secret("hosts/alice/local/initos.env", b"A=1\n");
    let before = files(&built.work());
    let told = built.sign(&["-n", "--host", "alice"]);
    told.succeeds();
    let kernel = &built.record.kernels[0];
    for (what, part) in kernel.parts() {
        assert!(told.stdout.contains(&format!("{what:<9} {} {}", part.file, part.sha256)), "{}", told.stdout);
    }
    let root = fs::read_to_string(built.work().join("boot/efi/hash.recovery")).expect("there");
    let lines = [
        format!("kernel {RELEASE}\n"),
        format!("boot/efi/recovery.sqfs {root} as /local/hash.recovery"),
        "/local/authorized_keys of the keys".to_owned(),
        "/local/etc/hostname of all hosts".to_owned(),
        "/local/initos.env of this host".to_owned(),
        format!("kernel {RELEASE} -> {}", PLACES[0]),
        format!("kernel {RELEASE} -> {}", PLACES[1]),
    ];
    for line in lines {
        assert!(told.stdout.contains(&line), "no `{line}` in {}", told.stdout);
    }
    assert_eq!(files(&built.work()), before);
}

#[test]
fn all_places_get_the_image_or_none_does_and_what_was_there_stays() {
    let mut built = Built::with_keys();
    // The last place cannot be had.
    fs::create_dir_all(built.work().join(PLACES[1])).expect("room");
    built.sign(&[]).fails(1, &["BOOTX64.EFI"]);
    built.has_no_rest();
    assert!(!built.work().join(PLACES[0]).exists() && !built.work().join("boot/efi/KEYS/db.crt").exists());
    fs::remove_dir(built.work().join(PLACES[1])).expect("empty");
    built.sign(&[]).succeeds();
    let first = built.signed();
    // An earlier image comes back under its name when a later place fails.
    built.rebuild(|kernel| &mut kernel.cmdline, b"another command line");
    fs::remove_file(built.work().join(PLACES[1])).expect("signed");
    fs::create_dir(built.work().join(PLACES[1])).expect("room");
    built.sign(&[]).fails(1, &["BOOTX64.EFI"]);
    assert!(fs::read(built.work().join(PLACES[0])).expect("kept") == first);
    built.has_no_rest();
}

#[test]
fn a_work_that_is_full_keeps_what_it_had() {
    let built = Built::with_keys();
    // As the disk would say when the second of both is written: no file may be longer than 100 KiB.
    let limited = |arguments: &str| {
        let kiln = env!("CARGO_BIN_EXE_kiln");
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("ulimit -f 200; exec {kiln} sign {arguments}")]);
        shell.env_clear().env("HOME", built.host.path("home")).env("SECRETS", built.host.path("secrets"));
        super::Told::by(shell.env("WORK", built.work()).env("PATH", "/usr/bin:/bin"))
    };
    limited("").fails(1, &["cannot write", "File too large"]);
    built.has_signed_nothing();
    built.sign(&[]).succeeds();
    let first = built.signed();
    built.secret("local/etc/hostname", b"other\n");
    limited("").fails(1, &["cannot write", "File too large"]);
    assert!(built.signed() == first);
    built.has_no_rest();
}

#[test]
fn a_copy_of_work_is_signed_on_a_host_with_nothing_but_kiln_and_the_keys() {
    let built = Built::with_keys();
    built.sign(&[]).succeeds();
    let here = built.signed();
    let (work, there) = (built.work(), built.host.path("there"));
    for place in PLACES {
        fs::remove_file(work.join(place)).expect("signed");
    }
    fs::remove_dir_all(work.join("boot/efi/KEYS")).expect("made");
    shell(
        "mkdir -p there/home && cp -r work there/copy && cp -r secrets there/home/keys",
        &built.host.path("."),
    );
    let mut kiln = Command::new(env!("CARGO_BIN_EXE_kiln"));
    kiln.env_clear().env("HOME", there.join("home")).env("SECRETS", there.join("home/keys"));
    let told = super::Told::by(kiln.current_dir(&there).args(["sign", "--work", "copy"]));
    told.succeeds();
    for place in PLACES {
        assert!(fs::read(there.join("copy").join(place)).expect("signed") == here);
    }
    assert!(there.join("copy/boot/efi/KEYS/PK.auth").exists());
    let left: Vec<_> =
        fs::read_dir(there.join("home")).expect("a home").flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(left, ["keys"], "signing needs no store, and makes none");
    built.has_signed_nothing();
    held("sign-offline");
}

#[test]
fn what_was_signed_is_verified_until_anything_of_it_is_another() {
    let built = Built::with_keys();
    built.sign(&["--verify"]).fails(1, &["KEYS", "No such file"]);
    let signed = built.sign(&[]).succeeds().stdout.clone();
    let verified = built.sign(&["--verify"]).succeeds().stdout.clone();
    let files = |text: &str| -> Vec<String> {
        text.lines().filter(|line| line.len() > 64 && !line.contains("->")).map(str::to_owned).collect()
    };
    assert_eq!(files(&verified), files(&signed));
    assert!(files(&verified).len() > PLACES.len());
    // The image, a byte of which is another; another one of the same keys; an enrolment file; and then as it was.
    let image = built.work().join(PLACES[0]);
    let good = fs::read(&image).expect("signed");
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 1;
    fs::write(&image, flipped).expect("room");
    built.sign(&["--verify"]).fails(1, &[PLACES[0], "is not signed by these keys as it is"]);
    built.secret("local/hostname", b"another");
    fs::write(&image, &good).expect("room");
    built
        .sign(&["--verify"])
        .fails(1, &["is not what these parts, keys and configuration make", "kiln sign"]);
    fs::remove_file(built.host.path("secrets/local/hostname")).expect("there");
    let enrolment = built.work().join("boot/efi/KEYS/db.auth");
    let own = fs::read(&enrolment).expect("published");
    fs::write(&enrolment, b"another").expect("room");
    built.sign(&["--verify"]).fails(1, &["KEYS/db.auth"]);
    fs::write(&enrolment, own).expect("room");
    built.sign(&["--verify"]).succeeds();
}
