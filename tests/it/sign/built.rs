//! A WORK with the parts of one kernel as a build leaves them, and its record.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kiln::sign::record::{File, Kernel, Record, Verity};
use kiln_artifact::cpio::{self, Options};
use kiln_artifact::tree::{Kind, Meta, Node, Tree, TreePath};
use kiln_artifact::uefi::uki::Uki;
use kiln_artifact::verity::{self, Parameters};
use kiln_digest::Digest;

use super::host::{Host, Told};
use super::{EFI, judge};

pub const RELEASE: &str = "6.12-x";
pub const COMMAND_LINE: &str = "quiet loglevel=0 rdinit=/init initos.secure";
/// Where the image goes: two places, the same bytes.
pub const PLACES: [&str; 2] = ["boot/efi/InitOS-Signed-6.12-x.EFI", "boot/efi/EFI/BOOT/BOOTX64.EFI"];

pub struct Built {
    pub host: Host,
    pub record: Record,
}

/// An archive with one file.
pub fn archive(name: &str, content: &[u8]) -> Vec<u8> {
    let mut tree = Tree::new();
    let mut folder = String::new();
    for part in name.split('/').take(name.split('/').count() - 1) {
        folder = format!("{folder}/{part}").trim_start_matches('/').to_owned();
        let path = TreePath::new(folder.as_bytes()).expect("good");
        tree.insert(path, Node { kind: Kind::Directory, meta: Meta { mode: 0o755, ..Meta::default() } });
    }
    let (digest, size) = (Digest::of(content), u64::try_from(content.len()).expect("small"));
    let node = Node { kind: Kind::File { digest, size }, meta: Meta { mode: 0o755, ..Meta::default() } };
    tree.insert(TreePath::new(name.as_bytes()).expect("good"), node);
    let contents = BTreeMap::from([(digest, content.to_vec())]);
    let mut bytes = Vec::new();
    cpio::write(&tree, &contents, &mut bytes, Options { omit_root: true, drop_xattrs: false }).expect("good");
    bytes
}

impl Built {
    pub fn new() -> Self {
        let built = Self { host: Host::new(), record: Record::default() };
        let read = |name: &str| fs::read(Path::new(EFI).join(name)).expect("systemd-boot-efi is installed");
        let mut built = built;
        let kernel = Kernel {
            release: RELEASE.to_owned(),
            signed: PLACES.map(str::to_owned).to_vec(),
            stub: built.put("boot/linux.efi.stub", &read("linuxx64.efi.stub")),
            // What firmware can start; nothing runs here.
            linux: built.put("boot/vmlinuz-6.12-x", &read("systemd-bootx64.efi")),
            osrel: built.put("boot/os-release", b"ID=initos\nNAME=initOS\n"),
            cmdline: built.put("boot/cmdline.secure", format!("{COMMAND_LINE}\n").as_bytes()),
            initrds: vec![
                built.put("boot/ucode.img", &archive("kernel/x86/microcode/GenuineIntel.bin", b"microcode")),
                built.put("boot/initrd-base.img", &archive("bin/busybox", b"not a multiple of four.")),
                built.put("boot/initrd-init.img", &archive("init", b"the init")),
            ],
            sbat: None,
            verity: Vec::new(),
        };
        built.record.kernels.push(kernel);
        built.image("hash.recovery", "boot/efi/recovery.sqfs", "boot/efi/hash.recovery", 300);
        let modules = format!("modules-{RELEASE}");
        built.image(
            &format!("hash.{modules}"),
            &format!("boot/efi/{modules}.sqfs"),
            &format!("boot/efi/hash.{modules}"),
            1,
        );
        built.write();
        built
    }

    pub fn with_keys() -> Self {
        let built = Self::new();
        built.sign(&["--init"]).succeeds();
        built
    }

    pub fn work(&self) -> PathBuf {
        self.host.path("work")
    }

    /// Writes a file of WORK.
    pub fn put(&self, path: &str, bytes: &[u8]) -> File {
        let place = self.work().join(path);
        fs::create_dir_all(place.parent().expect("a folder")).expect("room");
        fs::write(place, bytes).expect("room");
        File { file: path.to_owned(), sha256: Digest::of(bytes) }
    }

    /// Writes a file of SECRETS.
    pub fn secret(&self, path: &str, bytes: &[u8]) -> PathBuf {
        let place = self.host.path("secrets").join(path);
        fs::create_dir_all(place.parent().expect("a folder")).expect("room");
        fs::write(&place, bytes).expect("room");
        place
    }

    /// Adds an image of so many blocks to the first kernel.
    pub fn image(&mut self, name: &str, path: &str, hash_path: &str, blocks: usize) {
        let bytes: Vec<u8> =
            (0..blocks * verity::BLOCK_BYTES).map(|at| (at / 7 % 253).to_le_bytes()[0]).collect();
        let mut tree = Vec::new();
        let root = verity::write(&&bytes[..], &Parameters::derived(&Digest::of(&bytes)), &mut tree);
        let root = root.expect("whole blocks").to_string();
        self.put(path, &bytes);
        let image = Verity {
            name: name.to_owned(),
            image: path.to_owned(),
            tree: self.put(&format!("{path}.verity"), &tree),
            hash: self.put(hash_path, root.as_bytes()),
        };
        self.record.kernels[0].verity.push(image);
    }

    pub fn write(&self) {
        let json = serde_json::to_vec_pretty(&self.record).expect("plain data");
        self.put("boot/record.json", &json);
    }

    /// Changes a part and the record with it, as a build would whose part that is.
    pub fn rebuild(&mut self, part: fn(&mut Kernel) -> &mut File, bytes: &[u8]) {
        let path = part(&mut self.record.kernels[0]).file.clone();
        *part(&mut self.record.kernels[0]) = self.put(&path, bytes);
        self.write();
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut kiln = self.host.kiln();
        kiln.env("SECRETS", self.host.path("secrets")).arg("sign").args(arguments);
        kiln
    }

    pub fn sign(&self, arguments: &[&str]) -> Told {
        Told::by(&mut self.command(arguments))
    }

    /// The signed image, which is the same in all places.
    pub fn signed(&self) -> Vec<u8> {
        let [first, second] = PLACES.map(|place| fs::read(self.work().join(place)).expect("signed"));
        assert!(first == second, "the places differ");
        first
    }

    pub fn has_signed_nothing(&self) {
        for place in PLACES.iter().copied().chain(["boot/efi/KEYS/db.crt"]) {
            assert!(!self.work().join(place).exists(), "{place}");
        }
        self.has_no_rest();
    }

    /// Nothing unfinished is anywhere in WORK.
    pub fn has_no_rest(&self) {
        let rest =
            files(&self.work()).into_iter().find(|path| path.to_string_lossy().contains(".kiln-sign-"));
        assert_eq!(rest, None);
    }

    /// The archive that signing added to the initrd: what follows the parts.
    pub fn patch(&self) -> Vec<u8> {
        let mut before = 0_usize;
        for initrd in &self.record.kernels[0].initrds {
            let length = fs::read(self.work().join(&initrd.file)).expect("there").len();
            before = before.next_multiple_of(4) + length;
        }
        section(&self.signed(), ".initrd")[before.next_multiple_of(4)..].to_vec()
    }

    /// The patch's files as GNU cpio unpacks them: path from /local, and content or link.
    pub fn local(&self) -> BTreeMap<String, String> {
        let folder = self.host.path("unpacked");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir(&folder).expect("a folder");
        unpack(&self.patch(), &["-i", "-d", "--quiet", "--no-preserve-owner"], &folder);
        let top = folder.join("local");
        let text = |path: &Path| match fs::read_link(path) {
            Ok(link) => format!("-> {}", link.display()),
            Err(_) => fs::read_to_string(path).expect("text"),
        };
        let found = files(&top);
        found
            .iter()
            .map(|path| (path.strip_prefix(&top).expect("below").display().to_string(), text(path)))
            .collect()
    }
}

/// What GNU cpio says of an archive that gzip has compressed.
pub fn unpack(archive: &[u8], arguments: &[&str], folder: &Path) -> String {
    fs::write(folder.join(".archive.gz"), archive).expect("room");
    judge("gzip", &["-d", "-f", ".archive.gz"], folder);
    let input = fs::File::open(folder.join(".archive")).expect("unpacked");
    let output =
        Command::new("cpio").args(arguments).current_dir(folder).stdin(input).output().expect("cpio");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    fs::remove_file(folder.join(".archive")).expect("there");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Files and links below a folder.
pub fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.file_type().expect("a kind") {
            kind if kind.is_dir() => found.extend(files(&entry.path())),
            _ => found.push(entry.path()),
        }
    }
    found.sort();
    found
}

pub fn section(image: &[u8], name: &str) -> Vec<u8> {
    Uki::read(image).expect("whole").section(name).expect("there").to_vec()
}

/// Signs by OpenSSL what kiln asks for, with a key that kiln does not have.
pub fn sign_elsewhere(folder: &Path, key: &Path) {
    let name = "InitOS-Signed-6.12-x.EFI";
    let (from, to) = (format!("{name}.to-be-signed"), format!("{name}.signature"));
    judge("openssl", &["dgst", "-sha256", "-sign", &key.to_string_lossy(), "-out", &to, &from], folder);
}

/// A `sh` that runs a script in the folder.
pub fn shell(script: &str, folder: &Path) {
    let mut shell =
        Command::new("sh").args(["-eu"]).current_dir(folder).stdin(Stdio::piped()).spawn().expect("sh");
    shell.stdin.take().expect("piped").write_all(script.as_bytes()).expect("read");
    assert!(shell.wait().expect("a child").success(), "{script}");
}
