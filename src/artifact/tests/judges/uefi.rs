//! Signed and unified kernel images, and enrolment files, before the tools that others read them with.

use std::fs;
use std::path::{Path, PathBuf};

use kiln_artifact::uefi::Signer;
use kiln_artifact::uefi::auth::{self, Time, Variable};
use kiln_artifact::uefi::authenticode::{self, Others, Request, SignatureError};
use kiln_artifact::uefi::esl::{self, Guid};
use kiln_artifact::uefi::pe::Image;
use kiln_artifact::uefi::uki::{self, Parts, Uki, UkiError};
use rsa::pkcs1v15::SigningKey;
use rsa::pkcs8::DecodePrivateKey;
use rsa::signature::{SignatureEncoding, Signer as _};
use sha2::Sha256;

use super::judge::run;

const STUBS: &str = "/usr/lib/systemd/boot/efi";
const COMMAND_LINE: &str = "console=ttyS0 quiet";

/// Somebody with a key, made by OpenSSL in a folder where the tools find it as `NAME.key`, `NAME.crt` and `NAME.cer`.
struct Someone {
    signer: Signer,
    key: SigningKey<Sha256>,
}

impl Someone {
    fn new(folder: &Path, name: &str) -> Self {
        let subject = format!("/CN=kiln test ({name})");
        let (key, crt, cer) = (format!("{name}.key"), format!("{name}.crt"), format!("{name}.cer"));
        let request = [
            "req", "-new", "-x509", "-newkey", "rsa:2048", "-nodes", "-sha256", "-days", "30", "-subj",
            &subject,
        ];
        run("openssl", request.iter().copied().chain(["-keyout", &key, "-out", &crt]), folder, b"");
        run("openssl", ["x509", "-in", &crt, "-outform", "DER", "-out", &cer], folder, b"");
        let signer = Signer::from_pem(&fs::read(folder.join(&crt)).expect("written")).expect("a certificate");
        assert_eq!(signer.der(), fs::read(folder.join(&cer)).expect("written"));
        let key = fs::read_to_string(folder.join(&key)).expect("written");
        Self { signer, key: SigningKey::from_pkcs8_pem(&key).expect("a key") }
    }

    fn sign(&self, message: &[u8]) -> Vec<u8> {
        self.key.sign(message).to_vec()
    }

    fn sign_image(&self, bytes: &[u8], others: Others) -> Vec<u8> {
        let image = Image::parse(bytes).expect("an image");
        let request = Request::new(&image, &self.signer).expect("a request");
        let signature = self.sign(request.to_be_signed());
        request.attach(&signature, others).expect("a signature")
    }
}

/// The EFI programs that the packages of the judges bring.
fn programs() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = ["/usr/lib/systemd/boot/efi", "/usr/lib/efitools/x86_64-linux-gnu"]
        .iter()
        .flat_map(|folder| fs::read_dir(folder).expect("systemd-boot-efi and efitools are installed"))
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.to_string_lossy().contains(".efi"))
        .filter(|path| path.extension().is_some_and(|extension| extension == "efi" || extension == "stub"))
        .filter(|path| !path.to_string_lossy().contains(".elf"))
        .collect();
    found.sort();
    assert!(found.len() > 10, "{found:?}");
    found
}

#[test]
fn every_program_has_the_digest_that_other_tools_say_and_they_verify_what_is_signed() {
    let folder = tempfile::tempdir().expect("a folder");
    let db = Someone::new(folder.path(), "db");
    Someone::new(folder.path(), "KEK");
    for program in programs() {
        println!("{}", program.display());
        let bytes = fs::read(&program).expect("readable");
        let image = Image::parse(&bytes).expect("a well formed image");
        let digest = authenticode::digest(&image).to_string();
        fs::write(folder.path().join("in.efi"), &bytes).expect("room");
        let said = run("pesign", ["-h", "-P", "-d", "sha256", "-i", "in.efi"], folder.path(), b"");
        assert!(String::from_utf8_lossy(&said).contains(&digest), "{}", String::from_utf8_lossy(&said));
        let signed = db.sign_image(&bytes, Others::Keep);
        assert_eq!(signed, db.sign_image(&bytes, Others::Keep), "signing twice");
        fs::write(folder.path().join("out.efi"), &signed).expect("room");
        let said = run("sbverify", ["--cert", "db.crt", "out.efi"], folder.path(), b"");
        assert!(String::from_utf8_lossy(&said).contains("Signature verification OK"));
        let said = run("osslsigncode", ["verify", "-CAfile", "db.crt", "-in", "out.efi"], folder.path(), b"");
        let said = String::from_utf8_lossy(&said).into_owned();
        assert!(
            said.to_lowercase().contains(&digest) && said.contains("Signature verification: ok"),
            "{said}"
        );
        let image = Image::parse(&signed).expect("a well formed image");
        authenticode::verify(&image, &db.signer).expect("signed");
        assert_eq!(authenticode::digest(&image).to_string(), digest);
    }
}

/// A program of the judges' stands for the kernel: what firmware can start.
const KERNEL: &str = "/usr/lib/systemd/boot/efi/systemd-bootx64.efi";

fn unified(stub: &[u8], kernel: &[u8], sbat: Option<&[u8]>) -> Result<Vec<u8>, UkiError> {
    uki::write(
        stub,
        &Parts {
            os_release: Some(b"ID=kiln\nPRETTY_NAME=\"kiln test\"\n"),
            release: Some("6.12.1-test"),
            command_line: COMMAND_LINE,
            kernel,
            initrds: &[b"first", b"second archive"],
            sbat,
        },
    )
}

/// systemd's stub of this release, and on Debian 12 that of the next, whose sections lie otherwise.
fn stubs() -> Vec<Vec<u8>> {
    let read = |folder: &Path| fs::read(folder.join("linuxx64.efi.stub"));
    let own = read(Path::new(STUBS)).expect("systemd-boot-efi is installed");
    let next = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/judges/stub").join(&STUBS[1..]);
    let next = read(&next);
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    assert!(
        next.is_ok() || !release.contains("VERSION_CODENAME=bookworm"),
        "`ci/setup test` brings the next stub"
    );
    [Ok(own), next].into_iter().flatten().collect()
}

#[test]
fn a_unified_image_has_what_it_was_made_of_for_objdump_and_goblin_and_is_signed_whole() {
    let folder = tempfile::tempdir().expect("a folder");
    let db = Someone::new(folder.path(), "db");
    for stub in stubs() {
        is_whole_and_signed(&stub, folder.path(), &db);
    }
}

/// What judges say of images on `stub`, which `db` signs.
fn is_whole_and_signed(stub: &[u8], folder: &Path, db: &Someone) {
    let kernel = fs::read(KERNEL).expect("systemd-boot-efi is installed");
    let own = b"sbat,1,SBAT Version,sbat,1,https://github.com/rhboot/shim/blob/main/SBAT.md\nkiln.test,1,kiln,test,1,none\n";
    for sbat in [None, Some(&own[..])] {
        let bytes = unified(stub, &kernel, sbat).expect("a stub with room");
        assert_eq!(bytes, unified(stub, &kernel, sbat).expect("the same"));
        let read = Uki::read(&bytes).expect("complete");
        let payloads: Vec<(&str, &[u8])> = read.payloads().collect();
        let initrd = b"first\0\0\0second archive";
        for wanted in [(".cmdline", COMMAND_LINE.as_bytes()), (".linux", &kernel), (".initrd", initrd)] {
            assert!(payloads.contains(&wanted), "{}", wanted.0);
        }
        let has_own = String::from_utf8_lossy(read.section(".sbat").expect("one")).contains("kiln.test,1");
        assert_eq!(has_own, sbat.is_some());

        let pe = goblin::pe::PE::parse(&bytes).expect("goblin reads it");
        for section in &pe.sections {
            let name = section.name().expect("a short name");
            let start = usize::try_from(section.pointer_to_raw_data).expect("small");
            let length = usize::try_from(section.virtual_size.min(section.size_of_raw_data)).expect("small");
            let ours =
                read.image().sections().iter().find(|ours| ours.name == name).expect("the same sections");
            assert_eq!(&bytes[start..start + length], read.image().content(ours), "{name}");
        }
        let hashed: Vec<&[u8]> = pe.authenticode_ranges().collect();
        let (flat, image) = (hashed.concat(), read.image());
        let padded = [&flat[..], &vec![0; bytes.len().next_multiple_of(8) - bytes.len()]].concat();
        assert_eq!(kiln_digest::Digest::of(&padded), authenticode::digest(image));

        fs::write(folder.join("uki.efi"), &bytes).expect("room");
        let listing = run("objdump", ["-h", "uki.efi"], folder, b"");
        let listing = String::from_utf8_lossy(&listing).into_owned();
        let order: Vec<usize> = [".osrel", ".uname", ".cmdline", ".linux", ".initrd"]
            .iter()
            .map(|name| listing.find(name).unwrap_or_else(|| unreachable!("{name} in {listing}")))
            .collect();
        assert!(order.is_sorted(), "{listing}");
        run("objcopy", ["-O", "binary", "--only-section=.linux", "uki.efi", "linux"], folder, b"");
        assert_eq!(fs::read(folder.join("linux")).expect("written"), kernel);

        let signed = db.sign_image(&bytes, Others::Keep);
        fs::write(folder.join("signed.efi"), signed).expect("room");
        let said = run("sbverify", ["--cert", "db.crt", "signed.efi"], folder, b"");
        assert!(String::from_utf8_lossy(&said).contains("Signature verification OK"));
        run(
            "sbsign",
            ["--key", "db.key", "--cert", "db.crt", "--output", "theirs.efi", "uki.efi"],
            folder,
            b"",
        );
        let theirs = fs::read(folder.join("theirs.efi")).expect("written");
        authenticode::verify(&Image::parse(&theirs).expect("well formed"), &db.signer)
            .expect("sbsign's signature");
    }
}

#[test]
fn signatures_are_added_replaced_and_taken_off_and_each_is_seen_by_sbverify() {
    let folder = tempfile::tempdir().expect("a folder");
    let (one, two) = (Someone::new(folder.path(), "one"), Someone::new(folder.path(), "two"));
    let bytes = fs::read(KERNEL).expect("systemd-boot-efi is installed");
    let list = |bytes: &[u8]| {
        fs::write(folder.path().join("image.efi"), bytes).expect("room");
        String::from_utf8_lossy(&run("sbverify", ["--list", "image.efi"], folder.path(), b"")).into_owned()
    };
    let by_one = one.sign_image(&bytes, Others::Keep);
    let by_both = two.sign_image(&by_one, Others::Keep);
    let listing = list(&by_both);
    assert!(listing.contains("signature 1") && listing.contains("signature 2"), "{listing}");
    let image = Image::parse(&by_both).expect("well formed");
    for someone in [&one, &two] {
        authenticode::verify(&image, &someone.signer).expect("signed by both");
    }
    let by_two = two.sign_image(&by_one, Others::Replace);
    assert!(!list(&by_two).contains("(one)"));
    let image = Image::parse(&by_two).expect("well formed");
    assert!(matches!(authenticode::verify(&image, &one.signer), Err(SignatureError::Signer { .. })));
    // What another made over the same bytes is refused before it is in an image.
    let image = Image::parse(&bytes).expect("well formed");
    let request = Request::new(&image, &one.signer).expect("a request");
    let foreign = two.sign(request.to_be_signed());
    assert!(matches!(request.attach(&foreign, Others::Keep), Err(SignatureError::NotOverThis { .. })));

    let unsigned = Image::parse(&by_both)
        .map(|image| authenticode::detach(&image))
        .expect("well formed")
        .expect("short");
    let image = Image::parse(&unsigned).expect("well formed");
    assert!(matches!(authenticode::verify(&image, &one.signer), Err(SignatureError::Unsigned)));
    assert_eq!(one.sign_image(&unsigned, Others::Keep), by_one);
}

#[test]
fn enrolment_files_are_what_efitools_and_virt_firmware_make_and_read() {
    let folder = tempfile::tempdir().expect("a folder");
    let pk = Someone::new(folder.path(), "PK");
    let owner = Guid::from_bytes(*b"\x67\x45\x23\x01\xab\x89\xef\xcd0123456\x37");
    let list = esl::write(&owner, pk.signer.der()).expect("short");
    run("cert-to-efi-sig-list", ["-g", &owner.to_string(), "PK.crt", "theirs.esl"], folder.path(), b"");
    assert_eq!(fs::read(folder.path().join("theirs.esl")).expect("written"), list);

    let time = Time { year: 2026, month: 11, day: 28, hour: 1, minute: 2, second: 3 };
    let request = auth::Request::new(Variable::Pk, time, &list);
    let file = request.attach(&pk.signer, &pk.sign(request.to_be_signed())).expect("signed");
    fs::write(folder.path().join("PK.esl"), &list).expect("room");
    fs::write(folder.path().join("PK.auth"), &file).expect("room");
    let theirs = ["-t", "2026-11-28 01:02:03", "-k", "PK.key", "-c", "PK.crt", "PK", "PK.esl", "theirs.auth"];
    run("sign-efi-sig-list", theirs, folder.path(), b"");
    let theirs = fs::read(folder.path().join("theirs.auth")).expect("written");
    assert_eq!(auth::verify(Variable::Pk, &file, &pk.signer).expect("ours"), list);
    assert_eq!(auth::verify(Variable::Pk, &theirs, &pk.signer).expect("theirs"), list);
    assert!(auth::verify(Variable::Kek, &file, &pk.signer).is_err(), "signed for another variable");
    for more in [&[][..], &["-a"]] {
        let theirs = ["-k", "PK.key", "-c", "PK.crt", "KEK", "PK.esl", "KEK.auth"];
        run("sign-efi-sig-list", more.iter().chain(&theirs), folder.path(), b"");
        let theirs = fs::read(folder.path().join("KEK.auth")).expect("written");
        assert_eq!(auth::verify(Variable::Kek, &theirs, &pk.signer).expect("either way"), list);
    }
    run("sig-list-to-certs", ["PK.esl", "out"], folder.path(), b"");
    assert_eq!(fs::read(folder.path().join("out-0.der")).expect("written"), pk.signer.der());
}

#[test]
fn a_flipped_byte_of_what_is_signed_is_noticed_wherever_it_is() {
    let folder = tempfile::tempdir().expect("a folder");
    let db = Someone::new(folder.path(), "db");
    let program =
        fs::read("/usr/lib/efitools/x86_64-linux-gnu/HelloWorld.efi").expect("efitools is installed");
    let signed = db.sign_image(&program, Others::Keep);
    let pe = goblin::pe::PE::parse(&signed).expect("goblin reads it");
    let optional = pe.header.optional_header.expect("an image has one");
    let table = optional.data_directories.get_certificate_table().expect("signed").virtual_address;
    let header = usize::try_from(pe.header.dos_header.pe_pointer).expect("small") + 24;
    let (checksum, table) = (header + 64..header + 68, usize::try_from(table).expect("small"));
    let mut flipped = 0;
    for at in (0..table).filter(|at| *at < 1024 || at % 23 == 0 || at + 64 > table) {
        let mut bytes = signed.clone();
        bytes[at] ^= 1;
        let verified = match Image::parse(&bytes) {
            Ok(image) => authenticode::verify(&image, &db.signer).is_ok(),
            Err(_) => false,
        };
        assert_eq!(verified, checksum.contains(&at), "byte {at:#x}");
        flipped += 1;
    }
    assert!(flipped > 2000, "{flipped}");
    // In the table: all that says what was signed, and the signature. Who signed is known, so that the copy of the certificate is
    // not read, and the rest is names of algorithms that nobody goes by, and the padding.
    let der = db.signer.der();
    let copy = signed.windows(der.len()).position(|window| window == der).expect("the certificate");
    let mut unread = 0;
    for at in (table..signed.len()).filter(|at| !(copy..copy + der.len()).contains(at)) {
        let mut bytes = signed.clone();
        bytes[at] ^= 1;
        if Image::parse(&bytes).is_ok_and(|image| authenticode::verify(&image, &db.signer).is_ok()) {
            println!("byte {:#x} of the table", at - table);
            unread += 1;
        }
    }
    assert!(unread < 20, "{unread}");
}
