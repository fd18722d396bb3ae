//! The recipe of initOS that ships, with folders in place of Debian's roots and without machines: what it takes for kernels, and
//! what it says where there are two of one, or none, or what belongs to another.

use std::fs;
use std::process::Command;

use kiln::engine::build::Outcome;

use super::super::host::{Host, Told};
use super::world::{World, settle};

const RECIPE: &str = include_str!("../../../images/initos/kiln.toml");
const EFI: &str = "/usr/lib/systemd/boot/efi";
/// Modules without which no initrd opens an image, here built in.
const BUILTIN: [&str; 11] = [
    "dm-mod",
    "dm-verity",
    "efivarfs",
    "fat",
    "loop",
    "nls_ascii",
    "nls_cp437",
    "overlay",
    "squashfs",
    "vfat",
    "x",
];

/// The recipe with a folder of each root's name for it, and a step that is played in place of the one that runs in a machine.
fn recipe() -> String {
    let (mut text, mut within) = (String::new(), false);
    for line in RECIPE.lines() {
        if line.starts_with('[') {
            within = line.starts_with("[roots.");
            text.push_str(line);
            if let Some(name) = line.strip_prefix("[roots.").and_then(|rest| rest.strip_suffix(']')) {
                text.push_str(&format!("\nfrom = \"dir:{name}\""));
            }
            text.push('\n');
        } else if !within || line.starts_with('#') {
            text.push_str(line);
            text.push('\n');
        }
    }
    let (before, rest) =
        text.split_once("run = \"\"\"\nmkdir -p \"$WORK/recovery/etc\"").expect("the step recovery");
    let (_, after) = rest.split_once("\"\"\"\n").expect("its end");
    let played = "run = \"write recovery/os-release ID=initos\\nwrite recovery/etc/initos-packages none\"";
    format!("{before}{played}\n{after}")
}

struct InitOs {
    host: Host,
    world: World,
}

impl InitOs {
    /// With one kernel for hosts, one for machines, and all else that the recipe takes.
    fn new() -> Self {
        let host = Host::new();
        let mut world = World::at(host.root());
        let agent = host.file("libexec/agent", "");
        for name in ["init", "initos-init"] {
            host.file(&format!("libexec/{name}"), "a program");
        }
        world.settings.agent.value = Some(agent);
        host.file("recovery/etc/passwd", "root:x:0:0::/root:/bin/sh\n");
        host.file("src/recovery/etc/issue", "initOS\n");
        host.file("firmware/usr/lib/firmware/card.bin", "firmware");
        let stub = fs::read(format!("{EFI}/linuxx64.efi.stub")).expect("systemd-boot-efi is installed");
        host.file("stub/usr/lib/systemd/boot/efi/linuxx64.efi.stub", stub);
        let made = Self { host, world };
        made.kernel("kernel", "6.12-host");
        made.kernel("kernel-virt", "6.12-virt");
        settle(&made.world);
        made
    }

    /// A kernel with its modules in a root.
    fn kernel(&self, root: &str, release: &str) {
        // What firmware can start; nothing runs here.
        let image = fs::read(format!("{EFI}/systemd-bootx64.efi")).expect("systemd-boot-efi is installed");
        self.host.file(&format!("{root}/boot/vmlinuz-{release}"), image);
        self.host.file(&format!("{root}/boot/config-{release}"), "CONFIG_EFI_STUB=y\n");
        let modules = format!("{root}/usr/lib/modules/{release}");
        let builtin = BUILTIN.map(|name| format!("kernel/{name}.ko\n")).concat();
        self.host.file(&format!("{modules}/modules.builtin"), builtin);
        self.host.file(&format!("{modules}/modules.order"), "");
        self.host.file(&format!("{modules}/modules.builtin.modinfo"), "");
    }

    /// Asserts that the step `name` fails with `words`, and that what is signed by was not made.
    fn fails(&self, name: &str, words: &[&str]) {
        let built = self.world.build_targets(&recipe(), &["efi2"]);
        let Outcome::Failed(error) = built.outcome(name) else {
            panic!("{name}: {:?}", built.summary.outcomes)
        };
        let mut said = format!("{error} {}", error.hint().unwrap_or_default());
        let mut source = std::error::Error::source(error);
        while let Some(error) = source {
            said.push_str(&format!(": {error}"));
            source = error.source();
        }
        for word in words {
            assert!(said.contains(word), "no `{word}` in {said}");
        }
        assert!(!self.world.path("work/boot/record.json").exists());
    }
}

#[test]
fn kernels_in_folders_are_as_good_as_those_of_packages() {
    let initos = InitOs::new();
    let built = initos.world.build_targets(&recipe(), &["efi2"]);
    assert!(built.summary.is_good(), "{:?}", built.summary.outcomes);
    let work = |path: &str| initos.world.work(path);
    assert_eq!(work("boot/version").as_deref(), Some("6.12-host"));
    assert_eq!(work("boot/version-virt").as_deref(), Some("6.12-virt"));
    let mut kiln = initos.host.kiln();
    let told = Told::by(kiln.env("SECRETS", initos.host.path("secrets")).arg("sign"));
    told.succeeds();
    for release in ["6.12-host", "6.12-virt"] {
        let signed = initos.world.path(&format!("work/boot/efi/InitOS-Signed-{release}.EFI"));
        let mut sbverify = Command::new("sbverify");
        sbverify.arg("--cert").arg(initos.host.path("secrets/uefi-keys/db.crt")).arg(signed);
        assert!(sbverify.output().expect("sbsigntool is installed").status.success(), "{release}");
    }
}

#[test]
fn kernels_that_do_not_go_together_are_named_before_anything_is_signed_by() {
    let with = |change: &dyn Fn(&InitOs)| {
        let initos = InitOs::new();
        change(&initos);
        settle(&initos.world);
        initos
    };
    let shell = |initos: &InitOs, script: &str| {
        let output = Command::new("sh").args(["-euc", script]).current_dir(initos.host.root()).output();
        assert!(output.expect("sh").status.success(), "{script}");
    };
    // Which of two would the version's file name? The command that writes that from a list of folders writes both.
    for (root, file) in [("kernel", "boot/version"), ("kernel-virt", "boot/version-virt")] {
        let words = ["is one, and `*` of `boot/vmlinuz-*` could be", "6.13-other"];
        with(&|initos| initos.kernel(root, "6.13-other"))
            .fails("linux_debian", &[&[file][..], &words].concat());
    }
    for (script, step, words) in [
        ("rm kernel/boot/vmlinuz-*", "linux_debian", &["nothing matches `boot/vmlinuz-*`"][..]),
        ("rm -r kernel/usr/lib/modules/*", "efi", &["boot/initrd-initos.img-6.12-host"]),
        ("cd kernel/usr/lib/modules; mv 6.12-host 6.12-old", "efi", &["boot/initrd-initos.img-6.12-host"]),
        // No EFI stub; of another processor; of 32 bits.
        ("cp /bin/sh kernel/boot/vmlinuz-6.12-host", "efi", &["kernel cannot be started by firmware", "MZ"]),
        (&change(4, r"\144\252"), "efi", &["kernel cannot be started by firmware", "machine"]),
        (&change(24, r"\013\001"), "efi", &["kernel cannot be started by firmware"]),
        // Something else in the stub's place.
        (
            "cp kernel/boot/vmlinuz-* stub/usr/lib/systemd/boot/efi/linuxx64.efi.stub",
            "efi",
            &["the stub has a section `.osrel` already"],
        ),
    ] {
        with(&|initos| shell(initos, script)).fails(step, words);
    }
}

/// A script that changes bytes of the kernel's PE header.
fn change(at: usize, bytes: &str) -> String {
    format!(
        "image=kernel/boot/vmlinuz-6.12-host; at=$(od -An -tu4 -j 60 -N 4 $image)
        printf '{bytes}' | dd of=$image bs=1 seek=$((at + {at})) conv=notrunc status=none"
    )
}
