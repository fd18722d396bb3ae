//! Images that other tools made as roots of real machines: mounted by the guest's kernel, or refused in its words.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Command;

use kiln_digest::Digest;

use super::host::{Host, busybox};

/// A tree to be packed: busybox, and a file with an attribute.
fn tree(host: &Host) {
    host.folder("tree/bin");
    fs::copy(busybox().join("bin/busybox"), host.path("tree/bin/busybox")).expect("room");
    for applet in ["sh", "cat", "ls", "sha256sum", "touch", "rm", "head", "wc"] {
        symlink("busybox", host.path(&format!("tree/bin/{applet}"))).expect("a link");
    }
    host.file("tree/data/large", (0..400_000_u32).flat_map(u32::to_le_bytes).collect::<Vec<u8>>());
    host.file("tree/data/small", "small");
}

fn pack(host: &Host, tool: &str, arguments: &[&str]) {
    let output = Command::new(tool).args(arguments).current_dir(host.root()).output().expect(tool);
    assert!(output.status.success(), "{tool}: {}", String::from_utf8_lossy(&output.stderr));
}

/// `kiln run` of a shell script in the root that the file is.
fn run_in(host: &Host, file: &str, script: &str) -> super::host::Told {
    let mut kiln = host.kiln();
    kiln.args([
        "run",
        "--reads",
        "reads.json",
        "--root",
        &format!("file:{file}"),
        "--",
        "/bin/sh",
        "-c",
        script,
    ]);
    host.end(&mut kiln, &[])
}

#[test]
fn images_of_other_tools_are_roots_below_a_private_layer() {
    let host = Host::new();
    tree(&host);
    let content = fs::read(host.path("tree/data/large")).expect("it was made");
    // A length that is no whole number of sectors, and contents that only the guest's kernel decompresses.
    pack(
        &host,
        "mksquashfs",
        &["tree", "a.img", "-noappend", "-quiet", "-no-progress", "-comp", "xz", "-nopad"],
    );
    pack(&host, "mkfs.erofs", &["--quiet", "-zlz4hc", "b.img", "tree"]);
    for image in ["a.img", "b.img"] {
        let bytes = fs::read(host.path(image)).expect("an image");
        let script = "cat /data/small; sha256sum < /data/large; touch /data/new; rm /data/small; ls /data";
        let told = run_in(&host, image, script);
        told.ends(0, &[]);
        assert_eq!(told.text(), format!("small{}  -\nlarge\nnew\n", Digest::of(&content)));
        let reads: serde_json::Value = serde_json::from_str(&host.read("reads.json")).expect("JSON");
        assert_eq!(reads["root"], Digest::of(&bytes).to_string());
        assert!(fs::read(host.path(image)).expect("an image") == bytes, "the file is as it was");
    }
}

#[test]
fn an_image_that_the_kernel_does_not_mount_is_named_with_the_kernels_words() {
    let host = Host::new();
    tree(&host);
    pack(&host, "mksquashfs", &["tree", "a.img", "-noappend", "-quiet", "-no-progress"]);
    let mut bytes = fs::read(host.path("a.img")).expect("an image");
    // The inodes, whose place the superblock says: what comes before is sound.
    let table = u64::from_le_bytes(bytes[64..72].try_into().expect("eight bytes"));
    let table = usize::try_from(table).expect("in memory");
    bytes[table..table + 60].fill(0xa5);
    host.file("a.img", bytes);
    let told = run_in(&host, "a.img", "true");
    told.ends(125, &["`file:a.img`", "cannot be mounted", "squashfs", "damaged", "SQUASHFS error"]);
    assert!(!told.stderr.contains("SeaBIOS"), "{}", told.stderr);
}

/// It is started before a command is, where a machine is emulated and has processors enough (`guest/beside.rs`), and killed wherever
/// it is then: it cannot be relied on to leave a mark.
#[test]
fn a_root_whose_true_never_ends_leaves_a_command_alone() {
    let host = Host::new();
    tree(&host);
    for applet in ["grep", "sleep", "sort"] {
        symlink("busybox", host.path(&format!("tree/bin/{applet}"))).expect("a link");
    }
    let script = "#!/bin/sh\nkill -9 -1\nwhile :; do :; done &\n/bin/sleep 1000 & while :; do :; done\n";
    host.file("tree/bin/true", script);
    fs::set_permissions(host.path("tree/bin/true"), fs::Permissions::from_mode(0o755)).expect("its own");
    pack(&host, "mksquashfs", &["tree", "a.img", "-noappend", "-quiet", "-no-progress"]);
    // A thread of the kernel's may run too at one look, not at each of them.
    let look =
        "i=0; while [ $i -lt 40 ]; do grep procs_running /proc/stat; i=$((i+1)); done | sort -u | head -n 1";
    let told = run_in(&host, "a.img", look);
    told.ends(0, &[]);
    assert_eq!(told.text(), "procs_running 1\n");
}

#[test]
fn programs_that_a_root_cannot_run_are_named_with_what_is_missing() {
    let host = Host::new();
    let program = fs::read(busybox().join("bin/busybox")).expect("busybox");
    // e_machine (elf(5)) of 64-bit ARM, and big-endian SPARC.
    let (mut arm, mut sparc) = (program.clone(), program);
    arm[18..20].copy_from_slice(&183_u16.to_le_bytes());
    sparc[5] = 2;
    sparc[18..20].copy_from_slice(&43_u16.to_be_bytes());
    host.folder("tree/bin");
    for (name, bytes) in [("arm", arm), ("sparc", sparc)] {
        host.file(&format!("tree/bin/{name}"), bytes);
    }
    // No libc and no loader beside it.
    fs::copy("/bin/true", host.path("tree/bin/dynamic")).expect("coreutils");
    host.file("tree/bin/script", "#!/bin/python9 -u\n");
    host.file("tree/bin/text", "print(1)\n");
    for name in ["arm", "sparc", "script", "text"] {
        let path = host.path(&format!("tree/bin/{name}"));
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("its own");
    }
    pack(&host, "mksquashfs", &["tree", "a.img", "-noappend", "-quiet", "-no-progress"]);
    for (command, status, said) in [
        ("/bin/sh", 127, "not found"),
        ("/bin/arm", 126, "it is for 64-bit ARM, and the machine is x86-64"),
        ("/bin/sparc", 126, "it is for SPARC, and the machine is x86-64"),
        ("/bin/dynamic", 127, "its loader `/lib64/ld-linux-x86-64.so.2` is not there"),
        ("/bin/script", 127, "its interpreter `/bin/python9` is not there"),
        ("/bin/text", 126, "it is neither a program of Linux nor a script with `#!`"),
        ("/bin", 126, "it is a folder"),
    ] {
        let mut kiln = host.kiln();
        kiln.args(["run", "--root", "file:a.img", "--", command]);
        let told = host.end(&mut kiln, &[]);
        told.ends(status, &[command, said]);
    }
}
