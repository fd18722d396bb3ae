//! Disks and modules: file systems that are written through, read only, or seen as block devices.

use std::fs;
use std::process::Command;

use kiln_digest::Digest;

use super::host::Host;

fn tool(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().expect(program);
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// An ext4 image that holds what is in `folder`.
fn ext4(host: &Host, image: &str, folder: &str) -> String {
    let (image, folder) = (host.path(image), host.path(folder));
    let image = image.to_str().expect("text");
    tool("/sbin/mkfs.ext4", &["-q", "-F", "-d", folder.to_str().expect("text"), image, "16M"]);
    image.to_owned()
}

#[test]
fn disks_are_mounted_or_shown_as_devices_and_modules_are_loaded() {
    let host = Host::new();
    host.file("content/old", "old");
    let writable = ext4(&host, "rw.img", "content");
    let read_only = ext4(&host, "ro.img", "content");
    let device = host.file("device.img", vec![7; 1 << 20]);
    let before = Digest::of(&fs::read(&read_only).expect("the image"));
    let script = r#"
        set -e
        cat /mnt/rw/old /mnt/ro/old; echo
        echo new > /mnt/rw/new; mkdir /mnt/rw/sub; rm /mnt/rw/old
        if touch /mnt/ro/x 2>/dev/null; then echo written; fi
        head -c 4 /dev/blk | od -An -tx1
        printf marked | dd of=/dev/blk bs=1 seek=4096 conv=notrunc 2>/dev/null
        if printf x 2>/dev/null >/dev/fixed; then sync; echo written; fi
        ls -d /sys/module/squashfs /sys/module/loop; ls -d /lib/modules/$(uname -r)/kernel
    "#;
    let told = host.script(
        &[
            "--disk=rw.img:/mnt/rw",
            "--disk=ro.img:/mnt/ro:ro",
            "--disk=device.img:/dev/blk",
            "--disk=ro.img:/dev/fixed:ro",
            "--module=squashfs",
            "--module=loop",
        ],
        script,
    );
    told.ends(0, &[]);
    let lines: Vec<&str> = told.text().lines().collect();
    assert_eq!(lines[..4], ["oldold", " 07 07 07 07", "/sys/module/loop", "/sys/module/squashfs"]);
    assert!(lines[4].starts_with("/lib/modules/"), "{lines:?}");
    assert_eq!(tool("/sbin/debugfs", &["-R", "cat /new", &writable]), "new\n");
    assert!(!tool("/sbin/debugfs", &["-R", "ls -l /", &writable]).contains(" old"));
    // Left clean, not merely recoverable.
    tool("/sbin/e2fsck", &["-fn", &writable]);
    assert!(tool("/sbin/dumpe2fs", &["-h", &writable]).contains("Filesystem state:         clean"));
    assert_eq!(Digest::of(&fs::read(&read_only).expect("the image")), before);
    let device = fs::read(device).expect("the image");
    assert_eq!((&device[4096..4102], &device[..4], device.len()), (&b"marked"[..], &[7; 4][..], 1 << 20));
}

#[test]
fn a_disk_is_left_clean_when_the_command_fails() {
    let host = Host::new();
    host.folder("content");
    let image = ext4(&host, "rw.img", "content");
    host.script(&["--disk", "rw.img:/mnt"], "echo new > /mnt/new; exit 3").ends(3, &[]);
    assert_eq!(tool("/sbin/debugfs", &["-R", "cat /new", &image]), "new\n");
    assert!(tool("/sbin/dumpe2fs", &["-h", &image]).contains("Filesystem state:         clean"));
}

#[test]
fn a_module_that_the_kernel_does_not_have_is_named() {
    let told = Host::new().run(&["--module", "no_such_module"], &["true"]);
    told.ends(125, &["no_such_module"]);
}
