//! A disk with both slots, each with the same signed image for firmware. The first start is by the name that firmware looks
//! for on any disk; the root then makes entry 1002 for the second partition, with load options, and asks for it.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;

use kiln_artifact::fat::{self, Label};
use kiln_artifact::gpt::{Disk, Guid, Partition, Window};
use kiln_artifact::uefi::uki;
use kiln_digest::Digest;

use super::images::{self, Image, initrd_of, kernel, place, single_layout};

pub struct Slots {
    pub image: PathBuf,
    /// PK, KEK and db.
    pub keys: PathBuf,
}

const SLOT_BYTES: u64 = 64 << 20;
const STUB: &str = "/usr/lib/systemd/boot/efi/linuxx64.efi.stub";
/// What the root does at its first start, and not at its second.
const NEXT: &str = "
if [ $(cat /var/initos/BOOT_CURRENT) != 1002 ]; then
    cat /etc/entry >/sys/firmware/efi/efivars/Boot1002-8be4df61-93ca-11d2-aa0d-00e098032b8c
    cat /etc/next >/sys/firmware/efi/efivars/BootNext-8be4df61-93ca-11d2-aa0d-00e098032b8c
    reboot -f
fi
";
/// Attributes of a variable that stays and is there at any time, in front of its value (efivarfs).
const ATTRIBUTES: [u8; 4] = 7_u32.to_le_bytes();

pub fn disk() -> Slots {
    let partition =
        |name: &str| Partition { kind: Guid::EFI_SYSTEM, name: name.to_owned(), bytes: SLOT_BYTES };
    let layout = Disk::new(&Digest::of(b"slots"), &[partition("A"), partition("B")]).expect("two slots");
    let path = place().join("slots.disk");
    let file = File::create(&path).expect("room");
    layout.write(&file).expect("room");
    let table = fs::read(&path).expect("it was written");
    // The second entry of the array at the third sector (UEFI 2.10 §5.3.3): its GUID is the partition's name.
    let guid = &table[1024 + 128 + 16..][..16];
    let mut root = images::root();
    kernel().for_root(&mut root);
    root.file("lib/firmware/blob", 0o644, "inside");
    root.file("etc/initos-next", 0o644, NEXT);
    root.file("etc/entry", 0o644, [&ATTRIBUTES[..], &load_option(guid, layout.starts[1])].concat());
    root.file("etc/next", 0o644, [&ATTRIBUTES[..], &0x1002_u16.to_le_bytes()].concat());
    let root = Image::of(&root);
    let mut files = single_layout(&root);
    let (signed, keys) = signed(&root);
    files.file("EFI/BOOT/BOOTX64.EFI", 0o644, signed);
    for (start, label) in layout.starts.iter().zip(["BOOTA", "BOOTB"]) {
        let options = fat::Options {
            size_bytes: Some(SLOT_BYTES),
            label: Label::new(label),
            hidden_sectors: u32::try_from(start / 512).expect("small"),
            ..fat::Options::default()
        };
        let window = Window::new(&file, *start).expect("it is there");
        fat::write(&files.tree, &files.contents, window, &options).expect("it fits");
    }
    Slots { image: path, keys }
}

/// What the second entry hands to the image as its command line, and where the kernel then looks for its init.
const OPTIONS: &str =
    "console=ttyS0 loglevel=5 panic=-1 no_timer_check break=premount init=/bin/sh single rdinit=/stranger";

/// An `EFI_LOAD_OPTION` (UEFI 2.10 §3.1.3) for the image of the partition that begins at the byte `start`, by the short form
/// of its path: GUID and file (§10.3.5), with options that nobody signed.
fn load_option(guid: &[u8], start: u64) -> Vec<u8> {
    let wide =
        |text: &str| -> Vec<u8> { text.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect() };
    let node = |kind: [u8; 2], body: &[u8]| -> Vec<u8> {
        let length = u16::try_from(body.len() + 4).expect("short");
        [&kind[..], &length.to_le_bytes(), body].concat()
    };
    let sectors = [start / 512, SLOT_BYTES / 512].map(u64::to_le_bytes).concat();
    let partition = [&2_u32.to_le_bytes()[..], &sectors, guid, &[2, 2]].concat();
    let file = wide("\\EFI\\BOOT\\BOOTX64.EFI");
    let path = [node([4, 1], &partition), node([4, 4], &file), node([0x7f, 0xff], &[])].concat();
    let length = u16::try_from(path.len()).expect("short");
    let head = [&1_u32.to_le_bytes()[..], &length.to_le_bytes(), &wide("InitOS SecureB")].concat();
    [head, path, wide(OPTIONS)].concat()
}

/// A unified kernel image for `root`, signed by sbsign with a new db key.
fn signed(root: &Image) -> (Vec<u8>, PathBuf) {
    let initrd = fs::read(initrd_of(root)).expect("it was written");
    let kernel_image = fs::read(&kernel().image).expect("it is there");
    let parts = uki::Parts {
        os_release: Some(b"ID=initos\n"),
        release: Some(&kernel().release),
        command_line: "console=ttyS0 quiet loglevel=5 panic=-1 no_timer_check",
        kernel: &kernel_image,
        initrds: &[&initrd],
        sbat: None,
    };
    let stub = fs::read(STUB).expect("systemd-boot-efi is installed: see ci/setup test");
    let unsigned = uki::write(&stub, &parts).expect("a kernel and a stub");
    fs::write(place().join("unsigned.efi"), unsigned).expect("room");
    let script = r#"mkdir keys
        for name in PK KEK db; do
            openssl req -new -x509 -newkey rsa:2048 -nodes -sha256 -days 2 -subj "/CN=test $name" \
                -keyout keys/$name.key -out keys/$name.crt 2>/dev/null
        done
        sbsign --key keys/db.key --cert keys/db.crt --output signed.efi unsigned.efi"#;
    let made = Command::new("sh").args(["-euc", script]).current_dir(place()).output().expect("sh");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    (fs::read(place().join("signed.efi")).expect("sbsign wrote it"), place().join("keys"))
}
