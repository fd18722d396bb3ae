//! initOS from the recipe that ships, small: built of Debian packages, signed, and booted from an NVMe disk under Secure Boot;
//! what follows a changed init; and images that were changed, each refused by whom it must be.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::host::{Host, Told};

const RECIPE: &str = include_str!("../../images/initos/kiln.toml");
const ROOT: &str = r#"packages = ["iproute2", "kmod", "login", "openssh-server"]"#;

/// The recipe with few packages in the root, and the kernel for virtual machines alone.
fn small() -> String {
    let (before, rest) = RECIPE.split_once("[roots.recovery]\n").expect("the root");
    let (_, after) = rest.split_once("\n]\n").expect("the end of its packages");
    let text = format!("{before}[roots.recovery]\nfrom = \"debian:trixie\"\n{ROOT}\n{after}");
    let small = text.replace("\"linux-image-amd64\"", "\"linux-image-cloud-amd64\"");
    assert_ne!(small, text);
    small
}

struct Built {
    host: Host,
}

impl Built {
    fn new() -> Self {
        let host = Host::new();
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("images/initos");
        let copied = Command::new("cp").arg("-r").arg(shipped).arg(host.path("initos")).status();
        assert!(copied.expect("cp").success());
        fs::write(host.path("initos/kiln.toml"), small()).expect("room");
        Self { host }
    }

    fn kiln(&self, arguments: &[&str]) -> Told {
        let mut kiln = self.host.kiln();
        kiln.args(arguments).current_dir(self.host.path("initos")).env("SECRETS", self.host.path("secrets"));
        self.host.end(&mut kiln, &[])
    }

    fn keys(&self) -> PathBuf {
        self.host.path("secrets/uefi-keys")
    }

    fn boot(&self, folder: &str, script: &[&str]) -> Told {
        let (keys, key) = (self.keys(), self.keys().join("root.key"));
        let text = |path: &Path| path.to_str().expect("text").to_owned();
        let mut kiln = self.host.kiln();
        kiln.args(["boot", &text(&self.host.path(folder)), "--label", "BOOTA", "--bus", "nvme"]);
        kiln.args(["--secure-boot", &text(&keys), "--ssh-key", &text(&key)]);
        for statement in script {
            kiln.args(["-e", statement]);
        }
        self.host.end(&mut kiln, &[])
    }

    /// A copy of the partition in which `change` changes the bytes of a file.
    fn changed(&self, name: &str, file: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut copy = Command::new("cp");
        copy.arg("-r").arg(self.host.path("work/boot/efi")).arg(self.host.path(name));
        assert!(copy.status().expect("cp").success());
        let path = self.host.path(name).join(file);
        let mut bytes = fs::read(&path).expect("it was built");
        change(&mut bytes);
        fs::write(path, bytes).expect("room");
    }
}

const WITHIN: &str = "within 150s";

#[test]
fn a_small_initos_is_built_signed_and_booted_and_what_was_changed_is_refused() {
    let built = Built::new();
    built.kiln(&["build", "test"]).ends(0, &["nothing was signed", "check: done"]);
    assert!(!built.host.path("secrets").exists(), "a build makes no keys");
    built.kiln(&["build", "check"]).ends(0, &["4 up to date"]);
    built.kiln(&["sign"]).ends(0, &["made keys", "signed 1 image"]);
    let image = built.host.path("work/boot/efi/EFI/BOOT/BOOTX64.EFI");
    let verify = |certificate: &str| {
        let mut sbverify = Command::new("sbverify");
        sbverify.arg("--cert").arg(built.keys().join(certificate)).arg(&image);
        sbverify.output().expect("sbverify").status.success()
    };
    assert!(verify("db.crt") && !verify("KEK.crt"));
    let signed = fs::read(&image).expect("it was signed");

    // With keys a build signs by itself, the same bytes, and does nothing else.
    let again = built.kiln(&["build", "all"]);
    again.ends(0, &["signatures are made anew each time", "1 run, 7 up to date"]);
    assert!(fs::read(&image).expect("signed") == signed, "signing twice gives the same bytes");

    built
        .boot(
            "work/boot/efi",
            &[
                WITHIN,
                "expect INITOS: SECURE: Secure Boot is on",
                "expect INITOS: Mounted verity root",
                "expect INITOS: Mounted verity modules",
                "expect INITOS: sshd is up",
                "ssh cat /etc/os-release",
                "output ID=initos",
            ],
        )
        .ends(0, &["as the script wants it"]);

    // Whoever must find it does: the firmware, the initrd by the signed hash, and verity.
    built.changed("image", "EFI/BOOT/BOOTX64.EFI", |bytes| {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
    });
    built.boot("image", &[WITHIN, "reject INITOS", "expect /Access Denied|Security Violation/"]).ends(0, &[]);
    built.changed("hash", "hash.recovery", |bytes| bytes[0] = if bytes[0] == b'0' { b'1' } else { b'0' });
    let skipped =
        ["expect hash.recovery is of another version", "reject Handing over", "expect INITOS: FAILED"];
    built.boot("hash", &[&[WITHIN][..], &skipped].concat()).ends(0, &[]);
    built.changed("squashfs", "recovery.sqfs", |bytes| bytes[100] ^= 1);
    let corrupt = ["reject Handing over", "expect /verity.*corrupt/"];
    built.boot("squashfs", &[&[WITHIN][..], &corrupt].concat()).ends(0, &[]);
}

#[test]
fn a_changed_init_makes_the_patch_and_the_images_anew_and_nothing_else() {
    let built = Built::new();
    built.kiln(&["build", "all"]).ends(0, &[]);
    let root = fs::metadata(built.host.path("work/boot/efi/recovery.sqfs")).expect("built");
    // Bytes behind its end are no part of a program.
    let mut init = fs::read(super::host::built_for_guests("init")).expect("ci/build made it");
    init.extend_from_slice(b"another");
    fs::write(built.host.path("initos/init"), init).expect("room");
    let told = built.kiln(&["build", "all"]);
    told.ends(0, &["efi2: ", "2 run, 6 up to date"]);
    let after = fs::metadata(built.host.path("work/boot/efi/recovery.sqfs")).expect("built");
    assert_eq!(root.modified().expect("a time"), after.modified().expect("a time"));
}
