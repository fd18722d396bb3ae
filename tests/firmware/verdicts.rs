//! What firmware itself finds in what kiln signed, of many images in one start: each is an entry of its boot order.

use std::fs;
use std::os::unix::fs::DirBuilderExt;

use kiln::sign::record::Record;
use kiln_artifact::uefi::pe::Image;
use kiln_artifact::uefi::uki::{self, Parts};

use super::host::Host;
use super::{boot, shell, unsigned};

/// The machine's words of a program that ends at once with EFI_LOAD_ERROR (UEFI 2.10 appendix D): firmware goes on to its next
/// entry.
const ENDS: &str = "movabsq $0x8000000000000001, %rax; ret";
/// And of one that never ends.
const STAYS: &str = "hlt; jmp start";
/// What is around them.
const REST: &str = r#"
    .data
    .quad start
    .section .sbat, "a"
    .ascii "sbat,1,SBAT Version,sbat,1,https://github.com/rhboot/shim/blob/main/SBAT.md\n"
    .ascii "kiln.test,1,kiln,kiln.test,1,kiln\n"
"#;
const COUNT: usize = 50;

/// A program for firmware that does what `does` says.
fn linked(host: &Host, does: &str) -> Vec<u8> {
    fs::write(host.path("program.s"), format!(".globl start\nstart: {does}\n{REST}")).expect("room");
    shell(
        &host.path("."),
        "as -o program.o program.s
        ld -m i386pep --oformat pei-x86-64 --subsystem 10 --enable-reloc-section \
            --no-insert-timestamp -s -e start -o program.efi program.o",
    );
    fs::read(host.path("program.efi")).expect("linked")
}

/// A host with keys, and images signed by them in `esp/V`, V1.EFI and so on: those that `images` makes of the program.
fn signed(images: impl FnOnce(&[u8]) -> Vec<Vec<u8>>) -> Host {
    let host = Host::new();
    fs::create_dir_all(host.path("esp/V")).expect("folders");
    fs::create_dir_all(host.path("work/boot/efi")).expect("folders");
    fs::DirBuilder::new().mode(0o700).create(host.path("secrets")).expect("a folder");
    let program = linked(&host, ENDS);
    let mut record = Record::default();
    let images = images(&program);
    for (index, image) in images.iter().enumerate() {
        unsigned::put(&host.path("work"), &mut record, &format!("v{}", index + 1), image);
    }
    unsigned::write(&host.path("work"), &record);
    for arguments in [&["sign", "--init"][..], &["sign"]] {
        let mut kiln = host.kiln();
        kiln.env("SECRETS", host.path("secrets")).args(arguments);
        host.end(&mut kiln, &[]).ends(0, &[]);
    }
    for index in 1..=images.len() {
        let name = format!("V{index}.EFI");
        fs::copy(host.path("work/boot/efi").join(&name), host.path("esp/V").join(&name)).expect("room");
    }
    host
}

/// Images of as many lengths.
fn of_lengths(count: usize) -> Host {
    signed(|program| {
        let image = |index: usize| {
            let command_line = format!("{} n={index}", unsigned::COMMAND_LINE);
            unsigned::unified(program, program, &command_line, &vec![0xa5; index * 97])
        };
        (1..=count).map(image).collect()
    })
}

/// Writes `vars.fd`: Secure Boot with the keys of `arguments` for virt-fw-vars, and an entry for each file of `order` in `esp/V`.
fn variables(host: &Host, arguments: &str, order: &[String]) {
    let entries: String = order.iter().map(|name| format!(" --append-boot-filepath '\\V\\{name}'")).collect();
    let keys = "owner=11111111-2222-3333-4444-123456789abc; keys=secrets/uefi-keys;";
    let from = "-i /usr/share/OVMF/OVMF_VARS_4M.fd -o vars.fd --secure-boot";
    shell(&host.path("."), &format!("{keys} virt-fw-vars {from} {arguments}{entries}"));
}

const PK_AND_KEK: &str = "--set-pk $owner $keys/PK.crt --add-kek $owner $keys/KEK.crt";

/// What firmware says of an entry that it started, and of one that it refused.
fn started(name: &str) -> String {
    format!("expect /failed to start Boot.*file {name}. .*Load Error/")
}

fn refused(name: &str) -> String {
    format!("expect /failed to load Boot.*file {name}. .*(Access Denied|Security Violation)/")
}

fn boots(host: &Host, script: &[String]) {
    let script: Vec<&str> = script.iter().map(String::as_str).collect();
    boot(host, &["esp", "--secure-boot", "setup", "--vars", "vars.fd"], &script).ends(0, &[]);
}

/// Each is followed by itself with a bit of another place changed.
#[test]
fn the_firmware_starts_fifty_signed_images_and_none_of_them_with_a_bit_changed() {
    let host = of_lengths(COUNT);
    let (mut order, mut script) = (Vec::new(), vec!["within 5m".to_owned()]);
    for index in 1..=COUNT {
        let (good, bad) = (format!("V{index}.EFI"), format!("W{index}.EFI"));
        let mut bytes = fs::read(host.path("esp/V").join(&good)).expect("signed");
        let image = Image::parse(&bytes).expect("whole");
        let sections: Vec<_> = image.sections().iter().filter(|section| !section.file.is_empty()).collect();
        let place = sections[index % sections.len()].file.clone();
        let at = place.start + index * 7919 % place.len();
        bytes[at] ^= 1 << (index % 8);
        fs::write(host.path("esp/V").join(&bad), bytes).expect("room");
        script.extend([started(&good), refused(&bad)]);
        order.extend([good, bad]);
    }
    variables(&host, &format!("{PK_AND_KEK} --add-db $owner $keys/db.crt"), &order);
    boots(&host, &script);
}

/// Secure Boot is on, and nothing is trusted: the same image that [`started`] is said of where db has its certificate.
#[test]
fn a_firmware_with_an_empty_db_starts_nothing() {
    let host = of_lengths(1);
    let order = ["V1.EFI".to_owned()];
    let within = "within 100s".to_owned();
    variables(&host, PK_AND_KEK, &order);
    boots(&host, &[within.clone(), refused("V1.EFI")]);
    variables(&host, &format!("{PK_AND_KEK} --add-db $owner $keys/db.crt"), &order);
    boots(&host, &[within, started("V1.EFI")]);
}

/// shim, which the keys of most machines sold let start, here by the owner's: it has a list of generations that it revoked, and
/// two images differ in theirs alone.
#[test]
fn shim_starts_an_image_of_todays_generation_and_none_that_it_revoked() {
    let first = "sbat,1,SBAT Version,sbat,1,https://github.com/rhboot/shim/blob/main/SBAT.md\n";
    let generations = [99, 1].map(|generation| format!("{first}grub,{generation},kiln.test,grub,1,kiln\n"));
    let host = signed(|program| {
        let image = |sbat: &String| {
            uki::write(program, &Parts { sbat: Some(sbat.as_bytes()), ..unsigned::parts(program) })
                .expect("a stub with room")
        };
        generations.iter().map(image).collect()
    });
    shell(
        &host.path("."),
        "mkdir -p esp/EFI/BOOT
        sbsign --key secrets/uefi-keys/db.key --cert secrets/uefi-keys/db.crt \
            --output esp/EFI/BOOT/BOOTX64.EFI /usr/lib/shim/shimx64.efi",
    );
    let verdicts = ["expect /start_image.*Load Error/", "expect /Verification failed.*Security Violation/"];
    for (index, verdict) in verdicts.into_iter().enumerate() {
        let image = format!("esp/V/V{}.EFI", index + 1);
        fs::copy(host.path(&image), host.path("esp/EFI/BOOT/grubx64.efi")).expect("room");
        let script = ["within 100s", verdict];
        boot(&host, &["esp", "--secure-boot", "secrets/uefi-keys"], &script).ends(0, &[]);
    }
}

#[test]
fn an_image_that_never_prints_anything_is_said_to_be_silent_and_not_the_firmware() {
    let host = Host::new();
    let program = linked(&host, STAYS);
    fs::write(host.path("mute.efi"), unsigned::unified(&program, &program, "quiet", b"initrd"))
        .expect("room");
    boot(&host, &["mute.efi"], &["within 30s", "expect login:"])
        .ends(1, &["not within 30", "the firmware handed over, and the image printed nothing"]);
}
