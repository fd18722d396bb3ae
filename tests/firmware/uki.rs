//! Unified kernel images made by other people's tools (objcopy, sbsign, openssl) of Debian's stub, the kernel that the
//! store has a verified package of, and an initramfs of busybox that prints MARKER and READY and does as it is told; and
//! the same on disks and on a CD.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::{host, shell};

const INIT: &str = "#!/bin/busybox sh
for path in proc sys dev; do /bin/busybox mkdir -p /$path; done
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox insmod /efivarfs.ko
/bin/busybox mount -t efivarfs e /sys/firmware/efi/efivars
echo MARKER
/bin/busybox od -An -tu1 /sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c
[ ! -e /sys/firmware/acpi/tables/TPM2 ] || echo TPM2
echo READY
while read line; do
    echo \"got $line\"
    case $line in
    off) /bin/busybox poweroff -f ;;
    again) /bin/busybox reboot -f ;;
    write)
        /bin/busybox insmod /virtio_blk.ko
        echo written | /bin/busybox dd of=/dev/vda bs=512 seek=4 conv=sync,fsync 2>/dev/null && echo WRITTEN
        ;;
    enroll)
        cd /sys/firmware/efi/efivars
        for key in db-d719b2cb-3d3a-4596-a3bc-dad00e67656f KEK-8be4df61-93ca-11d2-aa0d-00e098032b8c \
            PK-8be4df61-93ca-11d2-aa0d-00e098032b8c; do
            /bin/busybox dd if=/keys/${key%%-*} of=$key bs=64k 2>/dev/null && echo \"enrolled ${key%%-*}\"
        done
        ;;
    net) /net ;;
    esac
done
";

/// What makes a guest reachable: QEMU's user network has this address for its only guest.
const NET: &str = "#!/bin/busybox sh
for module in failover net_failover virtio_net; do /bin/busybox insmod /$module.ko; done
/bin/busybox ip link set eth0 up
/bin/busybox ip addr add 10.0.2.15/24 dev eth0
/usr/sbin/dropbear -r /etc/host_key && echo 'NET UP'
";

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
        fs::write(place.join("net.sh"), NET).expect("room");
        fs::set_permissions(place.join("net.sh"), fs::Permissions::from_mode(0o755)).expect("it is ours");
        fs::copy(host::kernel_package(), place.join("kernel.deb")).expect("room");
        // efivarfs is a module of this kernel's.
        shell(
            &place,
            r#"dpkg-deb --fsys-tarfile kernel.deb | tar x --wildcards './boot/vmlinuz-*' '*/efivarfs.ko*' \
                '*/virtio_blk.ko*' '*/failover.ko*' '*/net_failover.ko*' '*/virtio_net.ko*'
            find . -name '*.ko.xz' -exec xz -d {} +
            cp $(find . -name efivarfs.ko) $(find . -name virtio_blk.ko) tree/
            mkdir keys tree/keys
            for name in PK KEK db other; do
                openssl req -new -x509 -newkey rsa:2048 -nodes -sha256 -days 2 -subj "/CN=test $name" \
                    -keyout keys/$name.key -out keys/$name.crt 2>/dev/null
                cert-to-efi-sig-list -g 11111111-2222-3333-4444-123456789abc keys/$name.crt keys/$name.list
            done
            auth() { # auth VARIABLE SIGNER FOLDER
                sign-efi-sig-list -k keys/$2.key -c keys/$2.crt $1 keys/$1.list $3/$1.auth >/dev/null
            }
            mkdir enroll stolen
            auth PK PK enroll && auth KEK PK enroll && auth db KEK enroll
            cp enroll/* stolen/ && auth PK other stolen
            for name in PK KEK db; do # with the attributes, as efivarfs takes it
                { printf '\047\000\000\000' && cat enroll/$name.auth; } >tree/keys/$name
            done
            archive() { (cd $1 && find . | sort | cpio -o -H newc --owner=+0:+0) 2>/dev/null | gzip -1; }
            archive tree >initrd
            printf 'ID=kiln\nPRETTY_NAME=test\n' >osrel
            printf 'console=ttyS0 quiet loglevel=4 panic=-1 no_timer_check' >cmdline
            unify() { # unify INITRD UKI
                objcopy --add-section .osrel=osrel --change-section-vma .osrel=0x20000 \
                    --add-section .cmdline=cmdline --change-section-vma .cmdline=0x30000 \
                    --add-section .linux="$(echo boot/vmlinuz-*)" --change-section-vma .linux=0x2000000 \
                    --add-section .initrd=$1 --change-section-vma .initrd=0x4000000 \
                    /usr/lib/systemd/boot/efi/linuxx64.efi.stub $2
            }
            unify initrd unsigned.efi
            # A second archive, which Linux unpacks over the first, has an ssh server and what it is linked with.
            mkdir -p net/bin net/etc net/root/.ssh net/usr/sbin
            mv net.sh net/net
            cp $(find . -name failover.ko) $(find . -name net_failover.ko) $(find . -name virtio_net.ko) net/
            cp /usr/sbin/dropbear net/usr/sbin/
            for library in $(ldd /usr/sbin/dropbear | grep -o '/[^ ]*'); do install -D $library net$library; done
            ln -s busybox net/bin/sh
            echo 'root::0:0:root:/root:/bin/sh' >net/etc/passwd
            dropbearkey -t ed25519 -f net/etc/host_key >/dev/null 2>&1
            dropbearkey -y -f net/etc/host_key | grep ^ssh- >host_key.pub
            for name in mine strange; do ssh-keygen -q -t ed25519 -N '' -f $name; done
            cp mine.pub net/root/.ssh/authorized_keys
            chmod -R go= net/root
            { cat initrd && archive net; } >initrd-net
            unify initrd-net net.efi
            # A FAT file system without partitions, as raw and as qcow2, and a CD that has it as its EFI image.
            truncate -s 48M disk.img
            /sbin/mkfs.vfat disk.img >/dev/null
            mmd -i disk.img ::/EFI ::/EFI/BOOT
            mcopy -i disk.img unsigned.efi ::/EFI/BOOT/BOOTX64.EFI
            qemu-img convert -O qcow2 disk.img disk.qcow2
            mkdir cd && cp disk.img cd/efi.img
            xorriso -as mkisofs -quiet -e efi.img -no-emul-boot -o cd.iso cd 2>/dev/null
            sign() { # sign KEY IMAGE SIGNED
                sbsign --key keys/$1.key --cert keys/$1.crt --output signed-$3.efi $2
            }
            sign db unsigned.efi db && sign other unsigned.efi other && sign other signed-db.efi both
            # Firmware that trusts other too, and forbids it all the same; and an image by its digest.
            printf 'ID=forbidden\n' >osrel && unify initrd forbidden.efi && sign db forbidden.efi forbidden
            hash-to-efi-sig-list forbidden.efi forbidden.list >/dev/null
            mkdir forbidding && cp keys/PK.crt keys/KEK.crt forbidding
            cat keys/db.list keys/other.list >forbidding/db.esl
            cat keys/other.list forbidden.list >forbidding/dbx.esl"#,
        );
        place
    })
}

/// One that nobody signed.
pub fn unsigned() -> PathBuf {
    place().join("unsigned.efi")
}

/// The same, signed with a key of [`keys`], or with `other`, which those do not have; `both` has both signatures. And
/// `forbidden`, another image by db's key.
pub fn signed(key: &str) -> PathBuf {
    place().join(format!("signed-{key}.efi"))
}

/// PK, KEK and db.
pub fn keys() -> PathBuf {
    place().join("keys")
}

/// The same, with `other` in db and in dbx, where the digest of `forbidden` is too.
pub fn forbidding_keys() -> PathBuf {
    place().join("forbidding")
}

/// PK.auth, KEK.auth and db.auth, each signed by whom it must be.
pub fn enrolment() -> PathBuf {
    place().join("enroll")
}

/// The same, but PK is signed by somebody else.
pub fn stolen_enrolment() -> PathBuf {
    place().join("stolen")
}

/// [`unsigned`] with an ssh server, which takes [`ssh_key`] for root once it is told `net`.
pub fn with_ssh() -> PathBuf {
    place().join("net.efi")
}

/// The private key that [`with_ssh`] takes.
pub fn ssh_key() -> PathBuf {
    place().join("mine")
}

/// One that it does not take.
pub fn strange_ssh_key() -> PathBuf {
    place().join("strange")
}

/// The public host key of [`with_ssh`].
pub fn host_key() -> PathBuf {
    place().join("host_key.pub")
}

/// [`unsigned`] on a FAT disk: `disk.img` or `disk.qcow2`; on a CD: `cd.iso`.
pub fn image(name: &str) -> PathBuf {
    place().join(name)
}
