//! What is booted: Debian's kernel, a root of busybox in squashfs with its hash tree, partitions that hold them, and the
//! initrd that names them. Made once in each run of the tests, by kiln's own writers.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use kiln::root::modules::{Modules, Profile};
use kiln_artifact::cpio::{self, Encoding};
use kiln_artifact::fat::{self, Label};
use kiln_artifact::squashfs::{self, Codec};
use kiln_artifact::tree::{Kind, Meta, Node, Tree, TreePath};
use kiln_artifact::verity::{self, Parameters};
use kiln_digest::Digest;

use super::host;

/// A tree and what is in it.
#[derive(Clone)]
pub struct Files {
    pub tree: Tree,
    pub contents: BTreeMap<Digest, Vec<u8>>,
}

impl Files {
    pub fn new() -> Self {
        Self { tree: Tree::new(), contents: BTreeMap::new() }
    }

    fn put(&mut self, path: &str, kind: Kind, mode: u16) {
        let path = TreePath::new(path.as_bytes()).expect("a path");
        for (at, _) in path.to_string().match_indices('/') {
            let folder = TreePath::new(&path.as_bytes()[..at]).expect("a path");
            if self.tree.get(&folder).is_none() {
                self.tree.insert(folder, node(Kind::Directory, 0o755));
            }
        }
        self.tree.insert(path, node(kind, mode));
    }

    pub fn file(&mut self, path: &str, mode: u16, bytes: impl Into<Vec<u8>>) {
        let bytes = bytes.into();
        let digest = Digest::of(&bytes);
        let size = u64::try_from(bytes.len()).expect("small");
        self.contents.insert(digest, bytes);
        self.put(path, Kind::File { digest, size }, mode);
    }

    pub fn folder(&mut self, path: &str) {
        self.put(path, Kind::Directory, 0o755);
    }

    pub fn link(&mut self, path: &str, to: &str) {
        self.put(path, Kind::Symlink(to.as_bytes().into()), 0o777);
    }
}

fn node(kind: Kind, mode: u16) -> Node {
    Node { kind, meta: Meta { mode, ..Meta::default() } }
}

/// A kernel, and where its modules are.
pub struct Kernel {
    pub image: PathBuf,
    pub release: String,
    folder: PathBuf,
    modules: Modules,
}

/// The folder of this run, empty at its start.
pub fn place() -> &'static Path {
    static PLACE: OnceLock<PathBuf> = OnceLock::new();
    PLACE.get_or_init(|| {
        let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join("init");
        let _ = fs::remove_dir_all(&place);
        fs::create_dir_all(&place).expect("a folder");
        place
    })
}

/// A new name in it.
pub fn fresh(kind: &str) -> PathBuf {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    place().join(format!("{}.{kind}", NEXT.fetch_add(1, Ordering::Relaxed)))
}

pub fn kernel() -> &'static Kernel {
    static KERNEL: OnceLock<Kernel> = OnceLock::new();
    KERNEL.get_or_init(|| {
        let top = place().join("kernel");
        let unpacked = Command::new("dpkg-deb").arg("-x").arg(host::kernel_package()).arg(&top).status();
        assert!(unpacked.expect("dpkg-deb is there").success());
        let modules = ["usr/lib/modules", "lib/modules"].map(|path| top.join(path));
        let modules = modules.into_iter().find(|path| path.is_dir()).expect("the package has modules");
        let folder = fs::read_dir(modules).expect("it is there").flatten().next().expect("a release").path();
        let release = folder.file_name().expect("a name").to_string_lossy().into_owned();
        // Another program's word on what needs what.
        let merged = top.join("lib");
        if !merged.exists() {
            std::os::unix::fs::symlink("usr/lib", merged).expect("a link");
        }
        let depmod = Command::new("sh")
            .args(["-euc", r#"PATH=$PATH:/usr/sbin:/sbin exec depmod -b "$1" "$2""#, "sh"])
            .arg(&top)
            .arg(&release)
            .status();
        assert!(depmod.expect("sh").success(), "kmod is installed: see ci/setup test");
        let read = |name: &str| fs::read_to_string(folder.join(name)).expect(name);
        let modules = Modules::from_dep(&read("modules.dep"), &read("modules.builtin")).expect("depmod's");
        Kernel { image: top.join(format!("boot/vmlinuz-{release}")), release, folder, modules }
    })
}

impl Kernel {
    /// Puts these modules, and an index that names no others, into `files`.
    fn install(&self, modules: &[&str], files: &mut Files) {
        let below = format!("lib/modules/{}", self.release);
        for module in modules {
            files.file(
                &format!("{below}/{module}"),
                0o644,
                fs::read(self.folder.join(module)).expect("it is there"),
            );
        }
        for (name, bytes) in self.modules.only(modules).depmod_files().expect("all of them") {
            files.file(&format!("{below}/{name}"), 0o644, bytes);
        }
        for name in ["modules.alias", "modules.builtin"] {
            files.file(&format!("{below}/{name}"), 0o644, fs::read(self.folder.join(name)).expect(name));
        }
    }

    /// What an initrd has of modules.
    fn for_initrd(&self, files: &mut Files) {
        self.install(&self.modules.for_initrd(Profile::Cloud).expect("all are there"), files);
    }

    /// What these roots have.
    pub fn for_root(&self, files: &mut Files) {
        self.install(&self.modules.load_order(&["virtio_net"]).expect("it is there"), files);
    }
}

/// The least that is a root: busybox, and an init that says how it was started and switches off.
pub fn root() -> Files {
    let mut files = Files::new();
    for path in [
        "boot/efi",
        "dev",
        "etc",
        "lib/firmware",
        "lib/modules",
        "proc",
        "root",
        "run",
        "sbin",
        "sys",
        "tmp",
        "var",
    ] {
        files.folder(path);
    }
    let busybox = fs::read("/bin/busybox").expect("busybox-static is installed: see ci/setup test");
    files.file("bin/busybox", 0o755, busybox);
    for name in ["sh", "cat", "ls", "poweroff", "reboot", "mount", "grep", "dd", "sleep"] {
        files.link(&format!("bin/{name}"), "busybox");
    }
    files.file("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\n");
    files.file("sbin/init", 0o755, INIT);
    files
}

/// Says what a test wants to know.
const INIT: &str = "#!/bin/sh
echo ROOT is $$ with $(ls / | grep -c '^init$') of the initrd
for name in CURRENT NEXT SECURE DEVICE; do
    echo BOOT_$name=$(cat /var/initos/BOOT_$name)
done
echo cmdline: $(cat /proc/cmdline)
echo local: $(cat /var/initos/local/marker)
echo modules: $(ls /lib/modules/$(cat /proc/sys/kernel/osrelease)/kernel)
echo firmware: $(cat /lib/firmware/blob)
echo END of it
[ ! -e /etc/initos-next ] || . /etc/initos-next
poweroff -f
";

/// A squashfs image with its tree and root hash.
#[derive(Clone)]
pub struct Image {
    pub data: Vec<u8>,
    pub tree: Vec<u8>,
    pub hash: String,
}

impl Image {
    pub fn of(files: &Files) -> Self {
        let options = squashfs::Options { codec: Codec::Gzip { level: 1 }, ..squashfs::Options::default() };
        let path = fresh("sqfs");
        let file = File::create(&path).expect("room");
        squashfs::write(&files.tree, &files.contents, file, &options).expect("a tree");
        let data = fs::read(path).expect("it was written");
        let mut tree = Vec::new();
        let parameters = Parameters::derived(&Digest::of(&data));
        let hash = verity::write(&&data[..], &parameters, &mut tree).expect("whole blocks");
        Self { data, tree, hash: hash.to_string() }
    }

    /// The same with one bit of the data changed.
    pub fn with_flipped_data(&self, at: usize) -> Self {
        let mut changed = self.clone();
        changed.data[at] ^= 1;
        changed
    }

    /// The same with one bit of the tree changed.
    pub fn with_flipped_tree(&self, at: usize) -> Self {
        let mut changed = self.clone();
        changed.tree[at] ^= 1;
        changed
    }

    /// Puts it onto a partition: `name.sqfs`, its tree, and its hash in `hash_file`.
    fn onto(&self, files: &mut Files, name: &str, hash_file: &str) {
        files.file(&format!("{name}.sqfs"), 0o644, self.data.clone());
        files.file(&format!("{name}.sqfs.verity"), 0o644, self.tree.clone());
        files.file(hash_file, 0o644, self.hash.clone());
    }
}

/// The image of all in one, of which most tests make their disks.
pub fn single() -> &'static Image {
    static IMAGE: OnceLock<Image> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let mut files = root();
        kernel().for_root(&mut files);
        files.file("lib/firmware/blob", 0o644, "inside");
        Image::of(&files)
    })
}

/// What a partition with one image of all has.
pub fn single_layout(image: &Image) -> Files {
    let mut files = Files::new();
    image.onto(&mut files, "initos/initos", "initos/initos.hash");
    files
}

/// Images of root, modules and firmware, each by itself.
pub struct Separate {
    pub root: Image,
    pub modules: Image,
    pub firmware: Image,
}

impl Separate {
    pub fn new() -> Self {
        let mut all = Files::new();
        kernel().for_root(&mut all);
        let below = format!("lib/modules/{}/", kernel().release);
        let mut modules = Files { tree: Tree::new(), contents: all.contents };
        for (path, node) in all.tree.iter() {
            if let Some(path) = path.to_string().strip_prefix(&below) {
                modules.tree.insert(TreePath::new(path.as_bytes()).expect("a path"), node.clone());
            }
        }
        let mut firmware = Files::new();
        firmware.file("blob", 0o644, "separate");
        Self { root: Image::of(&root()), modules: Image::of(&modules), firmware: Image::of(&firmware) }
    }

    /// What its partition has.
    pub fn layout(&self) -> Files {
        let mut files = Files::new();
        for (name, image) in self.named() {
            image.onto(&mut files, &name, &format!("hash.{name}"));
        }
        files
    }

    fn named(&self) -> [(String, &Image); 3] {
        let modules = format!("modules-{}", kernel().release);
        [
            ("recovery".to_owned(), &self.root),
            (modules, &self.modules),
            ("firmware".to_owned(), &self.firmware),
        ]
    }

    /// What its initrd names.
    pub fn hashes(&self) -> Vec<(String, String)> {
        self.named().map(|(name, image)| (format!("boot/hash.{name}"), image.hash.clone())).into()
    }
}

/// A disk that is one FAT file system with this label; without one where it is empty.
pub fn disk(files: &Files, label: &str) -> PathBuf {
    let path = fresh("disk");
    let options = fat::Options { label: Label::new(label), ..fat::Options::default() };
    let file = File::create(&path).expect("room");
    fat::write(&files.tree, &files.contents, &file, &options).expect("it fits");
    path
}

/// As [`disk`], with the label in the root directory alone: the boot sector, where FAT32 has it at byte 71, says `NO NAME`.
pub fn disk_labelled_in_its_root(files: &Files, label: &str) -> PathBuf {
    let path = disk(files, label);
    let file = File::options().write(true).open(&path).expect("it was made");
    file.write_all_at(b"NO NAME    ", 71).expect("it is there");
    path
}

/// The program `name` that was built for guests.
pub fn program(name: &str) -> Vec<u8> {
    fs::read(host::built_for_guests(name)).expect("ci/build makes it")
}

/// An initrd of the init, its modules, and files beside them.
pub fn initrd(files: &[(String, String)]) -> PathBuf {
    let mut all = Files::new();
    for path in ["dev", "proc", "run", "sys", "sbin"] {
        all.folder(path);
    }
    all.file("init", 0o755, program("init"));
    kernel().for_initrd(&mut all);
    all.file("local/marker", 0o644, "of this machine");
    for (path, text) in files {
        let mode = if path.starts_with("sbin/") { 0o755 } else { 0o644 };
        all.file(path, mode, text.clone());
    }
    write_initrd(&all)
}

pub fn write_initrd(files: &Files) -> PathBuf {
    let path = fresh("initrd");
    let file = File::create(&path).expect("room");
    cpio::write_encoded(&files.tree, &files.contents, &file, cpio::Options::default(), Encoding::Plain)
        .expect("a tree");
    path
}

/// The initrd that names the image of all in one.
pub fn initrd_of(image: &Image) -> PathBuf {
    initrd(&[("local/initos.hash".to_owned(), image.hash.clone())])
}
