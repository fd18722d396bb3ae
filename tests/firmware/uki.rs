//! Unified kernel images made by other people's tools (objcopy, sbsign, openssl) of Debian's stub, the kernel that the
//! store has a verified package of, and an initramfs of busybox that prints MARKER and READY and does as it is told.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use super::host;

const INIT: &str = "#!/bin/busybox sh
for path in proc sys dev; do /bin/busybox mkdir -p /$path; done
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox insmod /efivarfs.ko
/bin/busybox mount -t efivarfs e /sys/firmware/efi/efivars
echo MARKER
/bin/busybox od -An -tu1 /sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c
echo READY
while read line; do
    echo \"got $line\"
    case $line in
    off) /bin/busybox poweroff -f ;;
    again) /bin/busybox reboot -f ;;
    esac
done
";

fn shell(folder: &Path, script: &str) {
    let output = Command::new("sh").args(["-euc", script]).current_dir(folder).output().expect("sh");
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The folder with everything, made once in each run of the tests.
fn place() -> &'static Path {
    static PLACE: OnceLock<PathBuf> = OnceLock::new();
    PLACE.get_or_init(|| {
        let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join("firmware");
        let _ = fs::remove_dir_all(&place);
        fs::create_dir_all(place.join("tree/bin")).expect("a folder");
        fs::copy("/bin/busybox", place.join("tree/bin/busybox")).expect("busybox-static is installed");
        let init = place.join("tree/init");
        fs::write(&init, INIT).expect("room");
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).expect("it is ours");
        fs::copy(host::kernel_package(), place.join("kernel.deb")).expect("room");
        // efivarfs is a module of this kernel's.
        shell(
            &place,
            r#"dpkg-deb --fsys-tarfile kernel.deb | tar x --wildcards './boot/vmlinuz-*' '*/efivarfs.ko*'
            cp $(find . -name 'efivarfs.ko*') tree/
            [ ! -e tree/efivarfs.ko.xz ] || xz -d tree/efivarfs.ko.xz
            (cd tree && find . | sort | cpio -o -H newc) 2>/dev/null | gzip -1 >initrd
            printf 'ID=kiln\nPRETTY_NAME=test\n' >osrel
            printf 'console=ttyS0 quiet loglevel=4 panic=-1 no_timer_check' >cmdline
            objcopy --add-section .osrel=osrel --change-section-vma .osrel=0x20000 \
                --add-section .cmdline=cmdline --change-section-vma .cmdline=0x30000 \
                --add-section .linux="$(echo boot/vmlinuz-*)" --change-section-vma .linux=0x2000000 \
                --add-section .initrd=initrd --change-section-vma .initrd=0x4000000 \
                /usr/lib/systemd/boot/efi/linuxx64.efi.stub unsigned.efi
            mkdir keys
            for name in PK KEK db other; do
                openssl req -new -x509 -newkey rsa:2048 -nodes -sha256 -days 2 -subj "/CN=test $name" \
                    -keyout keys/$name.key -out keys/$name.crt 2>/dev/null
            done
            for name in db other; do
                sbsign --key keys/$name.key --cert keys/$name.crt --output signed-$name.efi unsigned.efi
            done"#,
        );
        place
    })
}

/// One that nobody signed.
pub fn unsigned() -> PathBuf {
    place().join("unsigned.efi")
}

/// The same, signed with a key of [`keys`], or with `other`, which no firmware knows.
pub fn signed(key: &str) -> PathBuf {
    place().join(format!("signed-{key}.efi"))
}

/// PK, KEK and db.
pub fn keys() -> PathBuf {
    place().join("keys")
}
