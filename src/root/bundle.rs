//! What a machine boots: a kernel, the initramfs with our agent and the few modules it needs, and the kernel's
//! module tree for steps that ask for it.
//!
//! Each part is a blob, named by its digest; a bundle is remembered under the digests of all that went into it, so
//! that finding it again costs a small file.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use kiln_artifact::cpio::{self, CpioError};
use kiln_artifact::kernel::{self, KernelError};
use kiln_artifact::tree::{Kind, Meta, Node, PathError, Tree, TreePath};
use kiln_digest::{Digest, Hasher};
use kiln_wire::{DRIVERS_FOLDER, FILESYSTEMS_FOLDER};
use serde::{Deserialize, Serialize};

use crate::machine::Carrier;
use crate::root::debian::{KernelError as PackageError, KernelTree, module_infos};
use crate::root::directory::{self, DirectoryError};
use crate::root::file;
use crate::root::image::{self, Filesystem, Image, ImageError};
use crate::root::modules::{Modules, ModulesError};
use crate::root::stat::Stat;
use crate::store::{Store, StoreError};

/// Changes with what `initramfs` makes of the same inputs.
const FORMAT: u32 = 7;

/// The modules without which no machine comes up: the root's disk, its file system, and the layer above it.
pub const NEEDED: [&str; 3] = ["virtio_blk", "erofs", "overlay"];
/// The module that carries the wire over vsock.
const NEEDED_FOR_VSOCK: &str = "vmw_vsock_virtio_transport";
/// The module of kiln's own VMM's devices, where the kernel has it.
const MMIO: &str = "virtio_mmio";

/// File systems that a disk or a root may bring, by the name that `mount` has for each, and their modules. They are in
/// the initramfs where the kernel has them, 96 KiB in all, and loaded by the machine that mounts one. FAT is no use without the
/// tables of characters that it asks for by itself.
const ON_DEMAND: [(&str, &[&str]); 2] =
    [("squashfs", &["squashfs"]), ("vfat", &["vfat", "nls_cp437", "nls_ascii"])];

/// Drivers of devices that only some machines have, and that nothing waits for: a virtio device's number as sysfs has it, and its
/// module. The agent loads them where there is such a device, once it has answered the host.
const DRIVERS: [(&str, &str); 2] = [("0x0004", "virtio_rng"), ("0x0005", "virtio_balloon")];

/// Why there is no bundle.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The kernel's file is no kernel that kiln can boot.
    #[error("`{path}` cannot be booted")]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: KernelError,
    },
    /// The modules do not fit.
    #[error("the kernel's modules cannot be used")]
    Modules(#[from] ModulesError),
    /// A file cannot be read or written.
    #[error("cannot {what} `{path}`")]
    Io {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// The store fails.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The module image cannot be made.
    #[error("the module image cannot be made")]
    Image(#[from] ImageError),
    /// The modules' folder cannot be read.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// A module cannot be read.
    #[error(transparent)]
    Module(#[from] PackageError),
    /// There is no folder of modules of this kernel.
    #[error("`{path}` holds no modules of {release}")]
    NoModules {
        /// What was named.
        path: PathBuf,
        /// The kernel.
        release: String,
    },
    /// The initramfs cannot be laid out.
    #[error("the initramfs cannot be laid out")]
    Path(#[from] PathError),
    /// The initramfs cannot be written.
    #[error("the initramfs cannot be written")]
    Cpio(#[from] CpioError),
}

impl BundleError {
    /// Whether the kernel or the modules that were named cannot be used, rather than something failing on the way.
    pub fn is_the_users(&self) -> bool {
        match self {
            Self::Kernel { .. } | Self::NoModules { .. } | Self::Directory(_) | Self::Modules(_) => true,
            Self::Io { what, .. } => *what == READ_KERNEL,
            _ => false,
        }
    }
}

/// What [`BundleError::Io`] was doing when it was a user's file.
const READ_KERNEL: &str = "read the kernel";

/// A bundle, ready to boot.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Bundle {
    /// The uncompressed kernel.
    pub kernel: Digest,
    /// The initramfs.
    pub initramfs: Digest,
    /// The kernel's release, as `uname -r` will say.
    pub release: String,
    /// The image of the module tree, by its tree's digest.
    pub modules: Option<Digest>,
    /// The files of the kernel and the initramfs when they were read last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    read: Option<[Stat; 2]>,
}

impl Bundle {
    /// The digest of all that a bundle is: part of every step's key.
    pub fn digest(&self) -> Digest {
        let mut hasher = Hasher::default();
        hasher.update(self.kernel.as_bytes());
        hasher.update(self.initramfs.as_bytes());
        hasher.finish().0
    }

    /// The files that have the kernel and the initramfs now; none where one is not there. They are not dated, which would
    /// make them others: the record of the bundle is, and keeps them.
    fn files(&self, store: &Store) -> Option<[Stat; 2]> {
        let stat = |digest| Some(Stat::of(&fs::metadata(store.blobs().path(digest)).ok()?));
        Some([stat(&self.kernel)?, stat(&self.initramfs)?])
    }

    /// Whether the store has the kernel and the initramfs as they should be. What it does not is taken away.
    fn is_sound(&self, store: &Store) -> bool {
        [self.kernel, self.initramfs].iter().all(|digest| {
            let path = store.blobs().path(digest);
            let is_sound =
                File::open(path).and_then(Digest::of_reader).is_ok_and(|(found, _)| found == *digest);
            if !is_sound {
                store.blobs().discard_damaged(digest);
            }
            is_sound
        })
    }
}

/// The agent: its file's digest, kept in the store.
///
/// # Errors
/// [`BundleError::Io`] when it cannot be read.
pub fn store_agent(store: &Store, path: &Path) -> Result<Digest, BundleError> {
    let read = |source| BundleError::Io { what: "read the agent", path: path.to_owned(), source };
    let file = File::open(path).map_err(read)?;
    let meta = file.metadata().map_err(read)?;
    if let Some(digest) = file::remembered(store, path, &meta).filter(|digest| store.blobs().contains(digest))
    {
        return Ok(digest);
    }
    let keep =
        |source| BundleError::Io { what: "put into the store the agent", path: path.to_owned(), source };
    let (digest, _) = store.blobs().put(&file).map_err(keep)?;
    if Stat::of(&meta) == Stat::of(&file.metadata().map_err(read)?) {
        store.sync_blobs(&[digest])?;
        // Without it, it is hashed again.
        let _ = file::remember(store, path, &meta, digest);
    }
    Ok(digest)
}

/// Where the agent lies: named by the environment, beside this program, or in `../libexec/kiln`.
pub fn find_agent(named: Option<&Path>) -> Option<PathBuf> {
    if let Some(path) = named {
        return Some(path.to_owned());
    }
    let folder = std::env::current_exe().ok()?.parent()?.to_owned();
    [folder.join("agent"), folder.join("../libexec/kiln/agent")].into_iter().find(|path| path.is_file())
}

/// The remembered bundle made from the kernel `key`, if all of it is still there.
pub fn remembered(store: &Store, key: &Digest, agent: &Digest, carrier: Carrier) -> Option<Bundle> {
    let (records, key) = (store.records("bundle"), record_key(key, agent, carrier));
    let mut bundle: Bundle = records.get(&key)?;
    let files = bundle.files(store)?;
    if bundle.read.as_ref() != Some(&files) {
        if !bundle.is_sound(store) {
            return None;
        }
        bundle.read = Some(files);
        // Without it, they are read again.
        let _ = records.put(&key, &bundle);
    }
    if let Some(modules) = &bundle.modules {
        Image::open(store, modules, Filesystem::Erofs).ok()??;
    }
    Some(bundle)
}

fn record_key(key: &Digest, agent: &Digest, carrier: Carrier) -> Digest {
    Digest::of(format!("bundle {FORMAT} {key} {agent} {carrier:?}").as_bytes())
}

/// The modules of a kernel: what they say of themselves, and the tree they lie in.
struct ModuleFolder<'a> {
    modules: Modules,
    tree: &'a Tree,
    folder: TreePath,
}

/// Makes the bundle of an unpacked kernel package.
///
/// # Errors
/// [`BundleError`].
pub fn from_package(
    store: &Store,
    key: &Digest,
    package: &KernelTree,
    agent: &Digest,
    carrier: Carrier,
) -> Result<Bundle, BundleError> {
    let Some(Node { kind: Kind::File { digest, .. }, .. }) = package.tree.get(&package.image) else {
        return Err(BundleError::NoModules {
            path: package.image.to_string().into(),
            release: package.release.clone(),
        });
    };
    let kernel = read_kernel(&store.blobs().path(digest), digest, &package.image.to_string())?;
    let folder = ModuleFolder {
        modules: package.modules.clone(),
        tree: &package.tree,
        folder: package.modules_folder.clone(),
    };
    make(store, key, &kernel, Some(&folder), agent, carrier)
}

/// Makes the bundle of a kernel file, with the modules below `modules`: a folder such as `/lib/modules/RELEASE`, or
/// one that holds it.
///
/// # Errors
/// [`BundleError`].
pub fn from_files(
    store: &Store,
    kernel: &Path,
    modules: Option<&Path>,
    agent: &Digest,
    carrier: Carrier,
) -> Result<Bundle, BundleError> {
    let read = |source| BundleError::Io { what: READ_KERNEL, path: kernel.to_owned(), source };
    // A FIFO in its place is not waited for.
    if fs::metadata(kernel).is_ok_and(|meta| !meta.is_file()) {
        return Err(read(io::Error::other("not a regular file")));
    }
    let (digest, _) = Digest::of_reader(File::open(kernel).map_err(read)?).map_err(read)?;
    let tree = match modules {
        Some(folder) => Some((folder, directory::import(store, folder)?)),
        None => None,
    };
    let modules = tree.as_ref().map(|(folder, tree)| (*folder, tree));
    of_parts(store, kernel, &digest, modules, agent, carrier)
}

/// Makes the bundle of the blob `kernel`, with the modules in the tree whose manifest is the blob `modules`.
///
/// # Errors
/// [`BundleError`].
pub fn from_blobs(
    store: &Store,
    kernel: &Digest,
    modules: Option<&Digest>,
    agent: &Digest,
    carrier: Carrier,
) -> Result<Bundle, BundleError> {
    let blobs = store.blobs();
    let path = blobs.path(kernel);
    let tree = match modules {
        Some(manifest) => {
            let place = blobs.path(manifest);
            let tree = blobs.read(manifest).and_then(|bytes| {
                Tree::parse_manifest(&bytes)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
            });
            let tree = tree.map_err(|source| BundleError::Io {
                what: "read the modules in",
                path: place.clone(),
                source,
            })?;
            Some((place, tree))
        }
        None => None,
    };
    let modules = tree.as_ref().map(|(place, tree)| (place.as_path(), tree));
    of_parts(store, &path, kernel, modules, agent, carrier)
}

/// The bundle of the kernel at `kernel`, whose digest is `digest`, and of modules, with what errors call their place.
fn of_parts(
    store: &Store,
    kernel: &Path,
    digest: &Digest,
    tree: Option<(&Path, &Tree)>,
    agent: &Digest,
    carrier: Carrier,
) -> Result<Bundle, BundleError> {
    let read = |source| BundleError::Io { what: READ_KERNEL, path: kernel.to_owned(), source };
    let key = Digest::of(format!("{digest} {:?}", tree.map(|(_, tree)| tree.digest())).as_bytes());
    if let Some(bundle) = remembered(store, &key, agent, carrier) {
        return Ok(bundle);
    }
    let kernel = read_kernel(kernel, digest, &kernel.display().to_string())?;
    let Some((path, tree)) = tree else {
        return make(store, &key, &kernel, None, agent, carrier);
    };
    let release = kernel.release.clone().unwrap_or_default();
    let none = || BundleError::NoModules { path: path.to_owned(), release: release.clone() };
    let folder = folder_of_modules(tree, &release).ok_or_else(none)?;
    // Of a folder without these lists only less is known: no order among alternatives, nothing built in.
    let bytes = |name: &str| -> Result<Vec<u8>, BundleError> {
        let node = folder.join(name.as_bytes()).ok().and_then(|path| tree.get(&path));
        let Some(Kind::File { digest, .. }) = node.map(|node| &node.kind) else { return Ok(Vec::new()) };
        let failed = |source| BundleError::Io { what: "read the modules in", path: path.to_owned(), source };
        store.blobs().read(digest).map_err(failed)
    };
    let text = |name: &str| bytes(name).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let infos = module_infos(store.blobs(), tree, &folder)?;
    let modules = Modules::from_infos(
        infos,
        &text("modules.order")?,
        &text("modules.builtin")?,
        &bytes("modules.builtin.modinfo")?,
    );
    let mut whole = tree.clone();
    for (name, bytes) in modules.depmod_files()? {
        let (digest, size) = store.blobs().put(&bytes[..]).map_err(read)?;
        whole.insert(folder.join(name.as_bytes())?, node(Kind::File { digest, size }));
    }
    let folder = ModuleFolder { modules, tree: &whole, folder };
    make(store, &key, &kernel, Some(&folder), agent, carrier)
}

/// The folder in `tree` that holds modules: the one named by `release` where there are several.
fn folder_of_modules(tree: &Tree, release: &str) -> Option<TreePath> {
    let marks: [&[u8]; 3] = [b"modules.builtin", b"modules.order", b"modules.dep"];
    let found: BTreeSet<TreePath> = tree
        .iter()
        .filter(|(path, _)| marks.contains(&path.name()))
        .filter_map(|(path, _)| path.parent())
        .collect();
    let named = found.iter().find(|folder| folder.name() == release.as_bytes());
    named.or(if found.len() == 1 { found.first() } else { None }).cloned()
}

/// The kernel at `path`, a file with this digest.
fn read_kernel(path: &Path, digest: &Digest, name: &str) -> Result<kernel::Kernel, BundleError> {
    let failed = |source| BundleError::Io { what: READ_KERNEL, path: path.to_owned(), source };
    let bytes = fs::read(path).map_err(failed)?;
    if Digest::of(&bytes) != *digest {
        return Err(failed(io::ErrorKind::InvalidData.into()));
    }
    kernel::read(&bytes).map_err(|source| BundleError::Kernel { path: name.into(), source })
}

fn make(
    store: &Store,
    key: &Digest,
    kernel: &kernel::Kernel,
    modules: Option<&ModuleFolder<'_>>,
    agent: &Digest,
    carrier: Carrier,
) -> Result<Bundle, BundleError> {
    let io = |source| BundleError::Io { what: "keep", path: store.temporary(), source };
    let (kernel_digest, _) = store.blobs().put(&kernel.elf[..]).map_err(io)?;
    let mut tree = Tree::new();
    for folder in ["dev", DRIVERS_FOLDER, FILESYSTEMS_FOLDER, "modules", "proc", "run", "sys"] {
        tree.insert(TreePath::new(folder.as_bytes())?, node(Kind::Directory));
    }
    for (filesystem, _) in ON_DEMAND {
        let path = TreePath::new(FILESYSTEMS_FOLDER.as_bytes())?.join(filesystem.as_bytes())?;
        tree.insert(path, node(Kind::Directory));
    }
    for (device, _) in DRIVERS {
        let path = TreePath::new(DRIVERS_FOLDER.as_bytes())?.join(device.as_bytes())?;
        tree.insert(path, node(Kind::Directory));
    }
    let agent_bytes = store.blobs().read(agent).inspect_err(|_| {
        // The next run puts it there anew.
        let _ = store.blobs().discard(agent);
    });
    let size = agent_bytes.map_err(io)?.len() as u64;
    tree.insert(TreePath::new(b"init")?, node(Kind::File { digest: *agent, size }));
    let mut wanted: Vec<&str> = NEEDED.to_vec();
    if carrier == Carrier::Vsock {
        wanted.push(NEEDED_FOR_VSOCK);
    }
    let mut modules_image = None;
    if let Some(ModuleFolder { modules, tree: source, folder }) = modules {
        let mut add = |place: &str, files: Vec<&str>| -> Result<(), BundleError> {
            for (index, below) in files.into_iter().enumerate() {
                let path = TreePath::new(&[folder.as_bytes(), b"/", below.as_bytes()].concat())
                    .or_else(|_| TreePath::new(below.as_bytes()))?;
                let path = if folder.is_root() { TreePath::new(below.as_bytes())? } else { path };
                if let Some(Node { kind: kind @ Kind::File { .. }, .. }) = source.get(&path) {
                    let name = format!("{place}/{index:03}-{}", String::from_utf8_lossy(path.name()));
                    tree.insert(TreePath::new(name.as_bytes())?, node(kind.clone()));
                }
            }
            Ok(())
        };
        if modules.load_order(&[MMIO]).is_ok() {
            wanted.push(MMIO);
        }
        add("modules", modules.load_order(&wanted)?)?;
        for (filesystem, wanted) in ON_DEMAND {
            // A kernel without one of them is good for all that does not need it.
            if let Ok(files) = modules.load_order(wanted) {
                add(&format!("{FILESYSTEMS_FOLDER}/{filesystem}"), files)?;
            }
        }
        for (device, wanted) in DRIVERS {
            // As well without.
            if let Ok(files) = modules.load_order(&[wanted]) {
                add(&format!("{DRIVERS_FOLDER}/{device}"), files)?;
            }
        }
        modules_image = Some(image::make(store, &subtree(source, folder)?)?);
    }
    let mut archive = store.blobs().writer().map_err(io)?;
    cpio::write(&tree, store.blobs(), &mut archive, cpio::Options::default())?;
    let (initramfs, _) = archive.finish().map_err(io)?;
    let release = kernel.release.clone().unwrap_or_default();
    let bundle = Bundle { kernel: kernel_digest, initramfs, release, modules: modules_image, read: None };
    store.sync()?;
    store.records("bundle").put(&record_key(key, agent, carrier), &bundle).map_err(io)?;
    Ok(bundle)
}

/// What lies at and beneath `folder`, as a tree of its own.
fn subtree(tree: &Tree, folder: &TreePath) -> Result<Tree, BundleError> {
    let mut part = Tree::new();
    for (path, node) in tree.subtree(folder) {
        let below = path.as_bytes().get(folder.as_bytes().len()..).unwrap_or_default();
        // Links of a distribution's build folder lead out of the tree, and are of no use in a guest.
        if !matches!(node.kind, Kind::HardLink(_)) {
            part.insert(TreePath::from_archive(below)?, node.clone());
        }
    }
    Ok(part)
}

fn node(kind: Kind) -> Node {
    Node { kind, meta: Meta { mode: 0o755, ..Meta::default() } }
}
