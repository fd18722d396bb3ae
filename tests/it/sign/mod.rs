//! `kiln sign`: keys, the record that images are held against, and both ways to a signature, here with images that a build
//! has assembled. Judged by sbverify, OpenSSL and virt-firmware.

mod assembled;
mod built;
#[path = "../../canary/mod.rs"]
#[expect(dead_code, reason = "no machine is searched here")]
mod canary;
mod configured;
mod hostile;
mod lists;
mod made;
mod many;
mod others;
mod racer;
#[path = "../../unsigned/mod.rs"]
mod unsigned;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kiln::sign::make;
use kiln::sign::record::{File, Record};
use kiln_digest::Digest;

use unsigned::COMMAND_LINE;

use super::host::{self, Host, Told};
use crate::acceptance::held;

const EFI: &str = "/usr/lib/systemd/boot/efi";

/// A host with one image to sign, and what it says of it.
struct Signing {
    host: Host,
    record: Record,
}

impl Signing {
    fn new() -> Self {
        let host = Host::new();
        fs::create_dir_all(host.path("work/boot/efi")).expect("folders");
        let mut signing = Self { host, record: Record::default() };
        signing.image("a", &unified(COMMAND_LINE, b"initrd"));
        signing.images(b"a root");
        signing.write();
        signing
    }

    fn image(&mut self, name: &str, bytes: &[u8]) {
        unsigned::put(&self.host.path("work"), &mut self.record, name, bytes);
    }

    fn images(&mut self, bytes: &[u8]) {
        fs::write(self.host.path("work/boot/efi/root.sqfs"), bytes).expect("room");
        self.record.images.push(File { file: "boot/efi/root.sqfs".to_owned(), sha256: Digest::of(bytes) });
    }

    fn write(&self) {
        unsigned::write(&self.host.path("work"), &self.record);
    }

    fn sign(&self, arguments: &[&str]) -> Told {
        Told::by(self.host.kiln().env("SECRETS", self.host.path("secrets")).arg("sign").args(arguments))
    }

    fn with_keys() -> Self {
        let signing = Self::new();
        signing.sign(&["--init"]).succeeds();
        signing
    }

    fn key(&self, name: &str) -> std::path::PathBuf {
        self.host.path("secrets/uefi-keys").join(name)
    }

    fn signed(&self) -> std::path::PathBuf {
        self.host.path("work/boot/efi/A.EFI")
    }

    fn has_signed_nothing(&self) {
        let left: Vec<_> =
            fs::read_dir(self.host.path("work/boot/efi")).expect("a folder").flatten().collect();
        let left: Vec<_> = left.iter().map(fs::DirEntry::file_name).filter(|name| name != "KEYS").collect();
        assert_eq!(left, ["root.sqfs"]);
    }
}

fn unified(command_line: &str, initrd: &[u8]) -> Vec<u8> {
    let read = |name: &str| fs::read(Path::new(EFI).join(name)).expect("systemd-boot-efi is installed");
    // What firmware can start; nothing runs here.
    let (stub, kernel) = (read("linuxx64.efi.stub"), read("systemd-bootx64.efi"));
    unsigned::unified(&stub, &kernel, command_line, initrd)
}

fn judge(program: &str, arguments: &[&str], folder: &Path) -> String {
    let output = Command::new(program).args(arguments).current_dir(folder).stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|error| panic!("this test needs `{program}` to judge by: {error}"));
    let said =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success(), "`{program}` {arguments:?}: {said}");
    said
}

#[test]
fn keys_are_made_whole_for_their_owner_alone_and_a_second_time_changes_no_byte() {
    let signing = Signing::with_keys();
    let folder = signing.host.path("secrets/uefi-keys");
    let state = || -> Vec<(String, Vec<u8>, u32)> {
        let mut files: Vec<_> = fs::read_dir(&folder)
            .expect("made")
            .flatten()
            .map(|entry| {
                let mode = entry.metadata().expect("a file").permissions().mode() & 0o777;
                (
                    entry.file_name().into_string().expect("plain"),
                    fs::read(entry.path()).expect("readable"),
                    mode,
                )
            })
            .collect();
        files.sort();
        files
    };
    let made = state();
    assert_eq!(made.len(), 18);
    for (name, _, mode) in &made {
        let secret = Path::new(name).extension().is_some_and(|extension| extension == "key");
        assert_eq!(*mode, if secret { 0o600 } else { 0o644 }, "{name}");
    }
    signing.sign(&["--init"]).succeeds();
    assert_eq!(state(), made);
    for name in ["PK", "KEK", "db"] {
        let (esl, crt) = (format!("{name}.esl"), format!("{name}.crt"));
        judge("openssl", &["verify", "-CAfile", &crt, &crt], &folder);
        judge("sig-list-to-certs", &[&esl, "out"], &folder);
        assert_eq!(
            fs::read(folder.join("out-0.der")).expect("written"),
            fs::read(folder.join(format!("{name}.cer"))).expect("made")
        );
    }
    let line = judge("ssh-keygen", &["-y", "-f", "root.key"], &folder);
    let ours = fs::read_to_string(folder.join("authorized_keys")).expect("made");
    assert_eq!(
        line.split_whitespace().take(2).collect::<Vec<_>>(),
        ours.split_whitespace().take(2).collect::<Vec<_>>()
    );
    let public = judge("openssl", &["pkey", "-in", "root.key", "-pubout"], &folder);
    assert_eq!(public, fs::read_to_string(folder.join("root.pem")).expect("made"));
    held("keys-first-run");
}

#[test]
fn firmware_variables_take_the_certificates_of_a_set() {
    let signing = Signing::with_keys();
    let folder = signing.host.path("secrets/uefi-keys");
    let owner = "77fa9abd-0359-4d32-bd60-28f4e78f784b";
    let vars = "/usr/share/OVMF/OVMF_VARS_4M.fd";
    let arguments = [
        "-i",
        vars,
        "-o",
        "vars.fd",
        "--set-pk",
        owner,
        "PK.crt",
        "--add-kek",
        owner,
        "KEK.crt",
        "--add-db",
        owner,
        "db.crt",
        "--secure-boot",
    ];
    judge("virt-fw-vars", &arguments, &folder);
    let said = judge("virt-fw-vars", &["-i", "vars.fd", "-p", "-v"], &folder);
    for name in ["(PK)", "(KEK)", "(db)"] {
        assert!(said.contains(&format!("mesh.internal {name}")), "{said}");
    }
    held("auth-chain");
}

#[test]
fn an_image_is_signed_as_it_was_built_and_twice_gives_the_same_bytes() {
    let signing = Signing::with_keys();
    let told = signing.sign(&["-n"]);
    told.succeeds();
    assert!(told.stdout.contains("boot/a.efi -> boot/efi/A.EFI"), "{}", told.stdout);
    signing.has_signed_nothing();
    signing.sign(&[]).succeeds();
    let first = fs::read(signing.signed()).expect("signed");
    let certificate = |name| signing.key(name).to_string_lossy().into_owned();
    let work = signing.host.path("work/boot/efi");
    let said = judge("sbverify", &["--cert", &certificate("db.crt"), "A.EFI"], &work);
    assert!(said.contains("Signature verification OK") && !said.contains("warning"), "{said}");
    let other = Command::new("sbverify")
        .args(["--cert", &certificate("KEK.crt"), "A.EFI"])
        .current_dir(&work)
        .output();
    assert!(!other.expect("sbverify runs").status.success(), "KEK signs no images");
    signing.sign(&[]).succeeds();
    assert_eq!(fs::read(signing.signed()).expect("signed"), first);
    let mut keys: Vec<_> =
        fs::read_dir(work.join("KEYS")).expect("made").flatten().map(|entry| entry.file_name()).collect();
    keys.sort();
    let public = [
        "KEK.auth", "KEK.cer", "KEK.crt", "PK.auth", "PK.cer", "PK.crt", "db.auth", "db.cer", "db.crt",
        "root.pem",
    ];
    assert_eq!(keys, public);
}

#[test]
fn signatures_made_elsewhere_give_the_same_image() {
    let signing = Signing::with_keys();
    signing.sign(&[]).succeeds();
    let here = fs::read(signing.signed()).expect("signed");
    fs::remove_file(signing.signed()).expect("removed");
    // This host has the public half alone.
    let elsewhere = signing.host.path("db.key");
    fs::rename(signing.key("db.key"), &elsewhere).expect("moved");
    fs::create_dir(signing.host.path("out")).expect("a folder");
    signing.sign(&["--request", "out"]).succeeds();
    let out = signing.host.path("out");
    let key = elsewhere.to_string_lossy().into_owned();
    let sign = ["dgst", "-sha256", "-sign", &key, "-out", "A.EFI.signature", "A.EFI.to-be-signed"];
    judge("openssl", &sign, &out);
    signing.sign(&["--signatures", "out"]).succeeds();
    assert_eq!(fs::read(signing.signed()).expect("signed"), here);
    fs::remove_file(signing.signed()).expect("removed");
    let signature = fs::read(out.join("A.EFI.signature")).expect("written");
    let wrong: Vec<u8> = signature.iter().rev().copied().collect();
    fs::write(out.join("A.EFI.signature"), wrong).expect("room");
    signing.sign(&["--signatures", "out"]).fails(1, &["not by", "(db)"]);
    signing.has_signed_nothing();
}

#[test]
fn what_was_not_built_is_not_signed() {
    let refused = |change: &dyn Fn(&mut Signing), words: &[&str]| {
        let mut signing = Signing::with_keys();
        change(&mut signing);
        signing.sign(&["-n"]).fails(1, words);
        signing.sign(&[]).fails(1, words);
        signing.has_signed_nothing();
    };
    let put = |signing: &Signing, bytes: &[u8]| {
        fs::write(signing.host.path("work/boot/a.efi"), bytes).expect("room")
    };
    refused(
        &|signing| put(signing, &unified("console=ttyS0 init=/bin/sh", b"initrd")),
        &["boot/a.efi (.cmdline)", "not what was built"],
    );
    refused(&|signing| put(signing, &unified(COMMAND_LINE, b"other")), &["boot/a.efi (.initrd)"]);
    refused(
        &|signing| {
            let mut bytes = unified(COMMAND_LINE, b"initrd");
            // In the stub's code.
            bytes[0x500] ^= 1;
            put(signing, &bytes);
        },
        &["`boot/a.efi` is not what was built"],
    );
    refused(
        &|signing| put(signing, &fs::read(Path::new(EFI).join("systemd-bootx64.efi")).expect("there")),
        &["no `.linux`", "alone"],
    );
    refused(&|signing| put(signing, &unified(COMMAND_LINE, b"initrd")[..9000]), &["boot/a.efi"]);
    refused(
        &|signing| fs::write(signing.host.path("work/boot/efi/root.sqfs"), "another").expect("room"),
        &["root.sqfs", "not what was built"],
    );
    refused(
        &|signing| fs::remove_file(signing.host.path("work/boot/record.json")).expect("there"),
        &["no record"],
    );
    refused(
        &|signing| {
            fs::rename(signing.host.path("work/boot/a.efi"), signing.host.path("work/boot/b.efi"))
                .expect("there");
            std::os::unix::fs::symlink("b.efi", signing.host.path("work/boot/a.efi")).expect("a link");
        },
        &["cannot open", "a.efi"],
    );
}

#[test]
fn an_image_that_its_record_has_as_it_is_and_that_is_signed_or_lies_is_not_signed() {
    let refused = |bytes: &[u8], words: &[&str]| {
        let mut signing = Signing::with_keys();
        signing.record.unified.clear();
        signing.image("a", bytes);
        signing.write();
        signing.sign(&[]).fails(1, words);
        signing.has_signed_nothing();
    };
    let signing = Signing::with_keys();
    signing.sign(&[]).succeeds();
    refused(&fs::read(signing.signed()).expect("signed"), &["boot/a.efi", "signed"]);
    // Its headers: a name in them that is there already, and one that must be there and is not.
    let renamed = |from: &[u8; 8], to: &[u8; 8]| {
        let mut bytes = unified(COMMAND_LINE, b"initrd");
        let at = bytes.windows(8).position(|name| name == from).expect("in the table");
        bytes[at..at + 8].copy_from_slice(to);
        bytes
    };
    refused(&renamed(b".uname\0\0", b".linux\0\0"), &["more than one `.linux`"]);
    refused(&renamed(b".uname\0\0", b".initrd\0"), &["more than one `.initrd`"]);
    refused(&renamed(b".initrd\0", b".splash\0"), &["no digest for section `.initrd`"]);
    refused(&renamed(b".cmdline", b".profile"), &["no digest for section `.cmdline`"]);
}

#[test]
fn a_key_behind_a_passphrase_is_refused_and_the_passphrase_is_asked_of_nobody() {
    let signing = Signing::with_keys();
    let folder = signing.host.path("secrets/uefi-keys");
    let lock = ["pkey", "-in", "db.key", "-aes256", "-passout", "pass:word", "-out", "../locked"];
    judge("openssl", &lock, &folder);
    fs::write(signing.key("db.key"), fs::read(folder.join("../locked")).expect("made")).expect("room");
    fs::remove_file(folder.join("../locked")).expect("made");
    signing.sign(&[]).fails(1, &["`db.key` is no RSA key", "without a passphrase"]);
    signing.has_signed_nothing();
}

#[test]
fn keys_that_others_could_read_change_or_mix_up_are_refused() {
    let refused = |change: &dyn Fn(&Signing), words: &[&str]| {
        let signing = Signing::with_keys();
        change(&signing);
        signing.sign(&[]).fails(1, words);
        signing.has_signed_nothing();
    };
    let mode = |signing: &Signing, name: &str, mode| {
        fs::set_permissions(signing.host.path("secrets").join(name), fs::Permissions::from_mode(mode))
            .expect("a mode");
    };
    refused(
        &|signing| mode(signing, "uefi-keys/db.key", 0o640),
        &["db.key", "read or written by others", "chmod 600"],
    );
    refused(&|signing| mode(signing, "uefi-keys/root.key", 0o604), &["root.key"]);
    refused(&|signing| mode(signing, "uefi-keys", 0o777), &["uefi-keys", "written by others"]);
    refused(&|signing| mode(signing, "", 0o770), &["secrets", "written by others"]);
    refused(
        &|signing| {
            fs::rename(signing.key("db.key"), signing.host.path("db.key")).expect("moved");
            std::os::unix::fs::symlink(signing.host.path("db.key"), signing.key("db.key")).expect("a link");
        },
        &["db.key", "symbolic link"],
    );
    refused(
        &|signing| fs::hard_link(signing.key("db.key"), signing.host.path("db.key")).expect("a link"),
        &["db.key", "hard link"],
    );
    // Only root gives files away.
    if rustix::process::geteuid().is_root() {
        for name in ["uefi-keys/db.key", "uefi-keys/root.key", "uefi-keys", ""] {
            let other = |signing: &Signing| {
                std::os::unix::fs::chown(signing.host.path("secrets").join(name), Some(65534), None)
                    .expect("a user");
            };
            refused(&other, &["belongs to another user", "chown"]);
        }
    }
    let copy = |signing: &Signing, from: &str, to: &str| {
        fs::write(signing.key(to), fs::read(signing.key(from)).expect("made")).expect("room");
    };
    refused(&|signing| copy(signing, "KEK.key", "db.key"), &["`db.key` is not the key of `db.crt`"]);
    refused(
        &|signing| {
            copy(signing, "db.key", "PK.key");
            copy(signing, "db.crt", "PK.crt");
        },
        &["PK and db have the same key"],
    );
    refused(&|signing| copy(signing, "db.auth", "KEK.auth"), &["`KEK.auth` does not enrol `KEK.crt`"]);
    refused(
        &|signing| fs::write(signing.key("db.key"), "no key").expect("room"),
        &["`db.key` is no RSA key"],
    );
    refused(&|signing| fs::remove_file(signing.key("PK.crt")).expect("made"), &["PK.crt"]);
    // What is published, and who may log in.
    for name in ["db.crt", "KEK.cer", "PK.auth", "root.pem", "authorized_keys"] {
        refused(
            &|signing| mode(signing, &format!("uefi-keys/{name}"), 0o666),
            &[name, "can be written by others"],
        );
    }
    let apart = "do not belong together";
    refused(&|signing| copy(signing, "KEK.cer", "db.cer"), &["`db.cer` is not `db.crt`", apart]);
    refused(&|signing| copy(signing, "PK.esl", "KEK.esl"), &["`KEK.esl` is not `KEK.crt`", apart]);
    let stranger = Signing::with_keys();
    let of_stranger = |signing: &Signing, name: &str| {
        fs::copy(stranger.key(name), signing.key(name)).expect("room");
    };
    refused(&|signing| of_stranger(signing, "root.key"), &["`root.key` is not the key of `root.pem`", apart]);
    refused(&|signing| of_stranger(signing, "root.pem"), &["root.pem", apart]);
    let login = ["`authorized_keys` does not have the key of `root.pem`", apart];
    refused(&|signing| of_stranger(signing, "authorized_keys"), &login);
    refused(&|signing| fs::write(signing.key("authorized_keys"), "").expect("room"), &login);
    refused(
        &|signing| fs::write(signing.key("root.pem"), "x").expect("room"),
        &["`root.pem` is no public P-256"],
    );
    // What cannot be looked into is not empty.
    let signing = Signing::new();
    fs::write(signing.host.path("secrets"), "").expect("room");
    signing.sign(&[]).fails(1, &["cannot open", "secrets"]);
    // Others may log in beside the owner.
    let signing = Signing::with_keys();
    let both = ["authorized_keys"; 1].map(|name| {
        [stranger.key(name), signing.key(name)].map(|path| fs::read(path).expect("made")).concat()
    });
    fs::write(signing.key("authorized_keys"), &both[0]).expect("room");
    signing.sign(&[]).succeeds();
}

#[test]
#[expect(clippy::disallowed_methods, reason = "the certificates are judged by the real clock")]
fn certificates_are_refused_after_their_time_and_said_to_expire_before_it() {
    let day = Duration::from_secs(24 * 3600);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    let signing_at = |begin: Duration| {
        let signing = Signing::new();
        make::make(&signing.host.path("secrets"), "mesh.internal", begin).expect("keys");
        signing
    };
    for (begin, word) in [(now - 3651 * day, "expired"), (now + day, "later than this host's clock")] {
        let signing = signing_at(begin);
        signing.sign(&[]).fails(1, &["PK.crt", word]);
        signing.has_signed_nothing();
    }
    for (begin, warned) in [(now - 3600 * day, true), (now - 3500 * day, false)] {
        let told = signing_at(begin).sign(&[]);
        told.succeeds();
        assert_eq!(told.stderr.contains("`db.crt` expires in"), warned, "{}", told.stderr);
    }
}

#[test]
fn without_keys_the_first_signing_says_that_it_makes_them_and_never_where_something_else_is() {
    let signing = Signing::new();
    signing.sign(&["-n"]).succeeds();
    assert!(!signing.host.path("secrets").exists());
    signing.sign(&["--request", "work"]).fails(1, &["no keys"]).hints(&["--init"]);
    let told = signing.sign(&[]);
    told.succeeds();
    assert!(told.stderr.contains("is empty: this makes keys"), "{}", told.stderr);
    let other = Signing::new();
    fs::create_dir_all(other.host.path("secrets/local")).expect("a folder");
    other.sign(&[]).fails(1, &["no keys"]).hints(&["--init"]);
    other.has_signed_nothing();
}

#[test]
fn secrets_in_work_and_work_in_secrets_are_refused() {
    let signing = Signing::new();
    let secrets = signing.host.path("work/secrets");
    fs::create_dir(&secrets).expect("a folder");
    for secrets in [secrets, signing.host.path("work"), signing.host.path(".")] {
        let told = Told::by(signing.host.kiln().env("SECRETS", secrets).arg("sign"));
        told.fails(1, &["WORK", "contains SECRETS", "or lies in it"]);
    }
    signing.has_signed_nothing();
}

#[test]
fn keys_are_never_made_where_steps_would_see_them() {
    let signing = Signing::new();
    fs::create_dir(signing.host.path("src")).expect("a folder");
    std::os::unix::fs::symlink("work", signing.host.path("link")).expect("a link");
    for (secrets, what) in [
        ("work/keys", "WORK"),
        ("work/deep/er", "WORK"),
        ("link/keys", "WORK"),
        ("work", "WORK"),
        (".", "WORK"),
        ("src/keys", "SRCDIR"),
        ("absent/../src/keys", "SRCDIR"),
        ("src", "SRCDIR"),
    ] {
        let sign = |arguments: &[&str]| {
            let mut kiln = signing.host.kiln();
            kiln.env("SECRETS", signing.host.path(secrets)).env("SRCDIR", signing.host.path("src"));
            Told::by(kiln.arg("sign").args(arguments))
        };
        sign(&["--init"]).fails(1, &[what, "contains SECRETS", "or lies in it"]).hints(&["set SECRETS"]);
        // The first signing makes keys where there is nothing.
        if secrets.ends_with("/keys") {
            sign(&[]).fails(1, &[what, "contains SECRETS"]);
        }
        for made in
            ["uefi-keys", "work/uefi-keys", "work/keys", "work/deep", "src/keys", "src/uefi-keys", "absent"]
        {
            assert!(!signing.host.path(made).exists(), "{secrets}: {made}");
        }
    }
    // A WORK that is not there yet would be around them as well.
    let mut kiln = signing.host.kiln();
    kiln.env("SECRETS", signing.host.path("new/keys")).env("WORK", signing.host.path("new"));
    Told::by(kiln.args(["sign", "--init"])).fails(1, &["WORK", "contains SECRETS"]);
    assert!(!signing.host.path("new").exists());
    signing.has_signed_nothing();
}

#[test]
fn a_signer_that_is_killed_at_any_time_leaves_no_half_image_and_the_next_sweeps() {
    let mut signing = Signing::with_keys();
    // Long enough that kills fall into reading, hashing and writing.
    let large = unified(COMMAND_LINE, &vec![7; 24 << 20]);
    signing.record.unified.clear();
    signing.image("a", &large);
    signing.write();
    signing.sign(&[]).succeeds();
    let whole = fs::metadata(signing.signed()).expect("signed").size();
    let work = signing.host.path("work/boot/efi");
    let mut unfinished = 0;
    for round in 0..12 {
        fs::remove_file(signing.signed()).ok();
        let mut kiln = signing.host.kiln();
        let kiln = kiln
            .env("SECRETS", signing.host.path("secrets"))
            .arg("sign")
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut kiln = kiln.spawn().expect("kiln starts");
        // Killed when the first, second… unfinished file was seen, or when it ended.
        let mut seen = std::collections::BTreeSet::new();
        while kiln.try_wait().expect("a child").is_none() {
            let names = fs::read_dir(&work)
                .expect("a folder")
                .chain(fs::read_dir(work.join("KEYS")).expect("a folder"));
            seen.extend(
                names
                    .flatten()
                    .map(|entry| entry.file_name())
                    .filter(|name| name.as_encoded_bytes().starts_with(b".kiln-sign-")),
            );
            if seen.len() > round {
                break;
            }
        }
        kiln.kill().ok();
        kiln.wait().expect("a child");
        if let Ok(signed) = fs::metadata(signing.signed()) {
            assert_eq!(signed.size(), whole, "round {round}");
        } else {
            unfinished += 1;
        }
    }
    assert!(unfinished > 3, "{unfinished} of 12 were killed in time");
    signing.sign(&[]).succeeds();
    let left = |folder: &Path| {
        let names = fs::read_dir(folder).expect("a folder").flatten().map(|entry| entry.file_name());
        names.filter(|name| name.as_encoded_bytes().starts_with(b".kiln-sign-")).count()
    };
    assert_eq!(left(&work) + left(&work.join("KEYS")), 0);
    judge("sbverify", &["--cert", &signing.key("db.crt").to_string_lossy(), "A.EFI"], &work);
}
