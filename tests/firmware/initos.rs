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
        Self::of(&small())
    }

    /// One of the recipe `text`.
    fn of(text: &str) -> Self {
        let host = Host::new();
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("images/initos");
        let copied = Command::new("cp").arg("-r").arg(shipped).arg(host.path("initos")).status();
        assert!(copied.expect("cp").success());
        fs::write(host.path("initos/kiln.toml"), text).expect("room");
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
    built.kiln(&["build", "test"]).ends(0, &["1 run, 11 cut off"]);

    // Its sshd takes the owner's key and no other.
    let stranger = built.host.path("stranger");
    let mut keys = built.host.kiln();
    keys.args(["sign", "--init"]).current_dir(built.host.path("initos")).env("SECRETS", &stranger);
    built.host.end(&mut keys, &[]).ends(0, &["made keys"]);
    let esp = built.host.path("work/boot/efi");
    let key = stranger.join("uefi-keys/root.key");
    let shown = |path: &Path| path.to_str().expect("UTF-8").to_owned();
    let (esp, trusted, key) = (shown(&esp), shown(&esp.join("KEYS")), shown(&key));
    built
        .kiln(&[
            "boot",
            &esp,
            "--bus",
            "nvme",
            "--label",
            "BOOTA",
            "--secure-boot",
            &trusted,
            "--ssh-key",
            &key,
            "-e",
            "within 6m",
            "-e",
            "expect login:",
            "-e",
            "ssh true",
        ])
        .ends(1, &["met: expect login:", "the guest does not take the key for root"]);
}

#[test]
fn one_image_with_all_in_it_boots_and_is_opened_by_the_signed_hash_alone() {
    let single = small().replace("layout = \"separate\"\n\n", "layout = \"single\"\n\n");
    assert_ne!(single, small());
    let built = Built::of(&single);
    built.kiln(&["sign", "--init"]).ends(0, &["made keys"]);
    built
        .kiln(&[
            "build",
            "boot-nvme",
            "corrupt_root_single",
            "corrupt_hashes_single",
            "other_hash_single",
            "-j",
            "2",
        ])
        .ends(0, &["boot-nvme: done", "other_hash_single: done"]);
    let esp = built.host.path("work/boot/efi");
    assert!(esp.join("initos/initos.sqfs").exists() && !esp.join("recovery.sqfs").exists());
    let console = built.host.read("work/reports/boot-nvme/console.txt");
    assert!(
        console.contains("Mounted verity root") && !console.contains("Mounted verity modules"),
        "{console}"
    );
}

#[test]
fn two_builds_in_two_places_are_the_same_bytes_signatures_too() {
    let (one, other) = (Built::new(), Built::new());
    one.kiln(&["sign", "--init"]).ends(0, &["made keys"]);
    let mut copy = Command::new("cp");
    copy.arg("-rp").arg(one.host.path("secrets")).arg(other.host.path("secrets"));
    assert!(copy.status().expect("cp").success());
    for built in [&one, &other] {
        // Nothing that another build has noted is taken for this one.
        let name: String = built.host.path("").to_string_lossy().bytes().map(|b| format!("{b:x}")).collect();
        let scope = &name[name.len() - 30..];
        let told = built.kiln(&["build", "all", "--scope", scope]);
        told.ends(0, &["8 run", "signatures are made anew"]);
    }
    let works = [&one, &other].map(|built| built.host.path("work"));
    let diff = Command::new("diff").arg("-r").args(&works).output().expect("diff");
    assert!(diff.status.success(), "{}", String::from_utf8_lossy(&diff.stdout));
    assert!(works[0].join("boot/efi/EFI/BOOT/BOOTX64.EFI").exists());
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
