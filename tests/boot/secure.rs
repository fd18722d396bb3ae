//! Secure Boot with keys of one's own, in real firmware: enrolled in setup mode by the files that kiln makes, then images
//! booted from a disk. Never with `-kernel`, which some firmware starts unsigned; and never a refusal without a boot of
//! the good image by the same firmware beside it.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kiln::sign::record::{Record, Unified};
use kiln_artifact::cpio::{self, Options};
use kiln_artifact::tree::{Kind, Meta, Node, Tree, TreePath};
use kiln_artifact::uefi::uki::{self, Parts, Uki};
use kiln_digest::Digest;

use super::folder::Folder;

const EFI: &str = "/usr/lib/systemd/boot/efi";
const OVMF: &str = "/usr/share/OVMF";
/// Says that it runs, and what the kernel found of Secure Boot.
const INIT: &str = "#!/busybox sh
/busybox mkdir /proc && /busybox mount -t proc proc /proc
/busybox echo KILN-BOOTED > /dev/console
/busybox dmesg | /busybox grep -i 'secure boot' > /dev/console
/busybox poweroff -f
";

fn run(program: &str, arguments: &[&str], folder: &Path) -> String {
    let output = Command::new(program).args(arguments).current_dir(folder).stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|error| unreachable!("this test needs `{program}`: {error}"));
    assert!(
        output.status.success(),
        "`{program}` {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The distribution's kernel, from its package.
fn kernel(folder: &Path) -> Vec<u8> {
    let depends = run("apt-cache", &["depends", "--important", "linux-image-cloud-amd64"], folder);
    let package = depends
        .split_whitespace()
        .find(|word| word.starts_with("linux-image-6"))
        .expect("a kernel's package");
    run("apt-get", &["download", "-qq", package], folder);
    let deb = fs::read_dir(folder).expect("a folder").flatten().map(|entry| entry.path());
    let deb = deb
        .into_iter()
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .expect("fetched");
    run("dpkg-deb", &["-x", &deb.to_string_lossy(), "kernel"], folder);
    let mut boot =
        fs::read_dir(folder.join("kernel/boot")).expect("a kernel").flatten().map(|entry| entry.path());
    let image = boot.find(|path| path.to_string_lossy().contains("/vmlinuz-")).expect("a kernel");
    fs::read(image).expect("readable")
}

fn initrd() -> Vec<u8> {
    let mut tree = Tree::new();
    let mut contents = BTreeMap::new();
    let mut file = |name: &str, content: Vec<u8>| {
        let (digest, size) = (Digest::of(&content), u64::try_from(content.len()).expect("small"));
        contents.insert(digest, content);
        let meta = Meta { mode: 0o755, ..Meta::default() };
        tree.insert(
            TreePath::new(name.as_bytes()).expect("good"),
            Node { kind: Kind::File { digest, size }, meta },
        );
    };
    file("busybox", fs::read("/bin/busybox").expect("busybox-static is installed"));
    file("init", INIT.as_bytes().to_vec());
    let folder = Node { kind: Kind::Directory, meta: Meta { mode: 0o755, ..Meta::default() } };
    tree.insert(TreePath::new(b"dev").expect("good"), folder);
    let console =
        Node { kind: Kind::CharDevice { major: 5, minor: 1 }, meta: Meta { mode: 0o600, ..Meta::default() } };
    tree.insert(TreePath::new(b"dev/console").expect("good"), console);
    let mut archive = Vec::new();
    cpio::write(&tree, &contents, &mut archive, Options::default()).expect("a good tree");
    archive
}

/// Firmware with its variables, and a folder for disks.
struct Firmware(PathBuf);

impl Firmware {
    /// Boots `program` from a disk, with `more` on it, and returns what it said until it powered off, reset, or the
    /// firmware has nothing more to start.
    fn boots(&self, program: &Path, more: &[(PathBuf, &str)]) -> String {
        let folder = &self.0;
        let _ = fs::remove_file(folder.join("disk.img"));
        fs::File::create(folder.join("disk.img")).expect("room").set_len(96 << 20).expect("room");
        run("/sbin/mkfs.vfat", &["-F", "32", "disk.img"], folder);
        run(
            "mmd",
            &[
                "-i",
                "disk.img",
                "::/EFI",
                "::/EFI/BOOT",
                "::/loader",
                "::/loader/keys",
                "::/loader/keys/auto",
            ],
            folder,
        );
        let program = (program.to_owned(), "EFI/BOOT/BOOTX64.EFI");
        for (from, to) in more.iter().chain([&program]) {
            run("mcopy", &["-i", "disk.img", &from.to_string_lossy(), &format!("::/{to}")], folder);
        }
        let code = format!("if=pflash,format=raw,unit=0,readonly=on,file={OVMF}/OVMF_CODE_4M.secboot.fd");
        let qemu_arguments = [
            "90",
            "qemu-system-x86_64",
            "-M",
            "q35,smm=on",
            "-accel",
            "tcg",
            "-m",
            "1G",
            "-nodefaults",
            "-nographic",
            "-no-reboot",
            "-net",
            "none",
            "-serial",
            "stdio",
            "-global",
            "driver=cfi.pflash01,property=secure,value=on",
            "-drive",
            &code,
            "-drive",
            "if=pflash,format=raw,unit=1,file=vars.fd",
            "-drive",
            "file=disk.img,format=raw,if=none,id=disk",
            "-device",
            "virtio-blk-pci,drive=disk,bootindex=0",
        ];
        let mut qemu = Command::new("timeout");
        qemu.args(qemu_arguments).current_dir(folder).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut qemu = qemu.spawn().expect("QEMU starts");
        let mut said = String::new();
        let mut lines = BufReader::new(qemu.stdout.take().expect("piped")).split(b'\n');
        while let Some(Ok(line)) = lines.next() {
            said.push_str(&String::from_utf8_lossy(&line));
            said.push('\n');
            // The firmware waits for somebody then.
            if said.contains("No bootable option or device was found") {
                run("kill", &[&qemu.id().to_string()], folder);
                break;
            }
        }
        qemu.wait().expect("a child");
        said
    }
}

#[test]
fn firmware_takes_the_keys_and_starts_what_is_signed_and_nothing_else() {
    let host = Folder::new();
    let work = host.path("work");
    fs::create_dir_all(work.join("boot")).expect("folders");
    let folder = host.path("firmware");
    fs::create_dir(&folder).expect("a folder");
    let (stub, kernel, initrd) =
        (fs::read(format!("{EFI}/linuxx64.efi.stub")).expect("systemd-boot-efi"), kernel(&folder), initrd());
    let command_line = "console=ttyS0 panic=-1";
    let parts = Parts {
        os_release: None,
        release: None,
        command_line,
        kernel: &kernel,
        initrds: &[&initrd],
        sbat: None,
    };
    let unsigned = uki::write(&stub, &parts).expect("a stub with room");
    fs::write(work.join("boot/a.efi"), &unsigned).expect("room");
    let sections = Uki::read(&unsigned)
        .expect("whole")
        .payloads()
        .map(|(name, bytes)| (name.to_owned(), Digest::of(bytes)))
        .collect();
    let image = Unified {
        file: "boot/a.efi".to_owned(),
        sha256: Digest::of(&unsigned),
        signed: "boot/efi/A.EFI".to_owned(),
        sections,
    };
    let record = Record { unified: vec![image], ..Record::default() };
    fs::write(work.join("boot/record.json"), serde_json::to_vec(&record).expect("plain data")).expect("room");
    let sign = |secrets: &str| {
        // Signing needs nothing of an installation.
        let mut kiln = Command::new(env!("CARGO_BIN_EXE_kiln"));
        let status = kiln.env("SECRETS", host.path(secrets)).arg("sign").arg("--work").arg(&work).status();
        assert!(status.expect("kiln starts").success());
        fs::read(work.join("boot/efi/A.EFI")).expect("signed")
    };
    let foreign = sign("others");
    let signed = sign("secrets");

    let firmware = Firmware(folder.clone());
    fs::copy(format!("{OVMF}/OVMF_VARS_4M.fd"), folder.join("vars.fd")).expect("ovmf is installed");
    let keys = ["PK.auth", "KEK.auth", "db.auth"];
    let targets = keys.map(|name| format!("loader/keys/auto/{name}"));
    let mut enrolment: Vec<(PathBuf, &str)> = keys
        .iter()
        .zip(&targets)
        .map(|(name, to)| (work.join("boot/efi/KEYS").join(name), to.as_str()))
        .collect();
    fs::write(folder.join("loader.conf"), "timeout 0\nsecure-boot-enroll force\n").expect("room");
    enrolment.push((folder.join("loader.conf"), "loader/loader.conf"));
    // systemd-boot writes the variables in setup mode, and resets.
    firmware.boots(&Path::new(EFI).join("systemd-bootx64.efi"), &enrolment);

    let program = folder.join("program.efi");
    let boots = |bytes: &[u8]| {
        fs::write(&program, bytes).expect("room");
        firmware.boots(&program, &[])
    };
    let flipped = |at: usize| {
        let mut bytes = signed.clone();
        bytes[at] ^= 1;
        bytes
    };
    let said = boots(&signed);
    assert!(said.contains("KILN-BOOTED") && said.contains("Secure boot enabled"), "{said}");
    for (what, bytes) in [
        ("unsigned", unsigned.clone()),
        ("signed by another key", foreign),
        ("a flipped byte of the initrd", flipped(signed.len() - 100_000)),
    ] {
        let said = boots(&bytes);
        assert!(!said.contains("KILN-BOOTED"), "{what}: {said}");
        let refused = |line: &str| line.contains("failed to load") && line.contains("Access Denied");
        assert!(said.lines().any(refused), "{what}: {said}");
    }
}
