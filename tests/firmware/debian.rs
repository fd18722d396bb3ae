//! A disk that kiln did not build: Debian as its packages make it, with shim, GRUB, kernel and initrd as they are signed for
//! every machine that is sold. `ci/test debian` runs it: the packages are fetched once, and booting them takes a minute under
//! emulation.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{boot, uki};
use crate::host::Host;

/// What a system needs to boot and ask who is there.
const PACKAGES: &str =
    "systemd-sysv,udev,login,kmod,initramfs-tools,linux-image-cloud-amd64,shim-signed,grub-efi-amd64-signed";

/// What `grub-install --removable` and fdisk would do, without a mount.
const DISK: &str = r#"root=$1 uuid=6b696c6e-0000-4000-8000-000000000001
PATH=$PATH:/usr/sbin:/sbin
cat >grub.cfg <<END
search --no-floppy --fs-uuid --set=root $uuid
linux /vmlinuz root=UUID=$uuid ro console=ttyS0 no_timer_check
initrd /initrd.img
boot
END
truncate -s 64M esp
mkfs.vfat -F 32 esp >/dev/null
mmd -i esp ::/EFI ::/EFI/BOOT ::/EFI/debian
mcopy -i esp "$root/usr/lib/shim/shimx64.efi.signed" ::/EFI/BOOT/BOOTX64.EFI
mcopy -i esp "$root/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed" ::/EFI/BOOT/grubx64.efi
mcopy -i esp grub.cfg ::/EFI/debian/grub.cfg
truncate -s 700M ext4
mkfs.ext4 -q -U $uuid -d "$root" ext4
truncate -s 800M disk
sfdisk -q disk <<END
label: gpt
start=2048, size=131072, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B
start=133120, type=0FC63DAF-8483-4772-8E79-3D69D8477DE4
END
dd if=esp of=disk bs=1M seek=1 conv=notrunc,sparse status=none
dd if=ext4 of=disk bs=1M seek=65 conv=notrunc,sparse status=none
rm esp ext4"#;

/// The disk's image in a folder of `host`, of a root that stays in the build's folder.
fn disk(host: &Host) -> PathBuf {
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = top.join("target/trixie-boot");
    let made = Command::new(top.join("ci/trixie")).arg(&root).args([PACKAGES, "minbase"]).status();
    assert!(made.expect("ci/trixie is there").success(), "mmdebstrap, as root, makes the root");
    let place = host.path("debian");
    fs::create_dir(&place).expect("a folder");
    let made =
        Command::new("sh").args(["-euc", DISK, "sh"]).arg(&root).current_dir(&place).output().expect("sh");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    place.join("disk")
}

#[test]
#[ignore = "fetches Debian's packages: `ci/test debian` runs it"]
fn debian_as_it_is_sold_boots_under_the_vendors_keys_and_is_refused_under_the_owners() {
    let host = Host::new();
    let disk = disk(&host);
    let run = |keys: &str, script: &[&str]| {
        boot(&host, &[disk.to_str().expect("text"), "--secure-boot", keys], script)
            .ends(0, &["as the script wants it"]);
    };
    let login = ["within 5m", "reject Kernel panic", "expect Secure boot enabled", "expect login:"];
    run("vendor", &login);
    let refused =
        ["within 100s", "reject /GRUB|Linux version|login:/", "expect /Access Denied|Security Violation/"];
    run(uki::keys().to_str().expect("text"), &refused);
}
