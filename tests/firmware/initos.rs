//! initOS from the recipe that ships, small: built of Debian packages, signed, and booted as its recipe says, from NVMe, virtio
//! and USB, as it is and with changes that somebody must find; and what follows a changed init.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::host::{Host, Told};

const RECIPE: &str = include_str!("../../images/initos/kiln.toml");
const ROOT: &str = r#"packages = ["iproute2", "kmod", "login", "openssh-server"]"#;

/// The recipe with few packages in the root.
fn small() -> String {
    let (before, rest) = RECIPE.split_once("[roots.recovery]\n").expect("the root");
    let (_, after) = rest.split_once("\n]\n").expect("the end of its packages");
    format!("{before}[roots.recovery]\nfrom = \"debian:trixie\"\n{ROOT}\n{after}")
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
}

#[test]
fn a_small_initos_is_built_signed_and_booted_and_what_was_changed_is_refused() {
    let built = Built::new();
    built.kiln(&["build", "all", "check"]).ends(0, &["nothing was signed", "check: done"]);
    built
        .kiln(&["build", "boot-nvme"])
        .ends(1, &["there are no keys in `boot/efi/KEYS`", "`kiln sign --init` makes keys"]);
    assert!(!built.host.path("secrets").exists(), "a build makes no keys");
    built.kiln(&["sign"]).ends(0, &["made keys", "signed 3 images"]);
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

    // The boots of the recipe: each tells of itself in a report.
    built.kiln(&["build", "test", "-j", "2"]).ends(0, &["boot-nvme: done", "boot_usb: done"]);
    for report in REPORTS {
        let xml = built.host.read(&format!("work/reports/{report}/junit.xml"));
        assert!(xml.contains("failures=\"0\" errors=\"0\" skipped=\"0\""), "{report}: {xml}");
    }
    let console = built.host.read("work/reports/other_hash/console.txt");
    assert!(console.contains("INITOS: FAILED") && !console.contains("login:"), "{console}");
    built.kiln(&["build", "test"]).ends(0, &["1 run, 12 cut off"]);
}

/// Those of what must boot, and of what must not.
const REPORTS: [&str; 11] = [
    "boot-nvme",
    "boot-virtio",
    "boot_usb",
    "refused-linux",
    "refused-initrd",
    "refused-cmdline",
    "refused-none",
    "refused-stranger",
    "corrupt_root",
    "corrupt_hashes",
    "other_hash",
];

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
