//! Debian's cloud kernel: from a suite to one package, and from the package to an image and modules.
//!
//! The package leaves to its scripts what depmod would write; it is written here instead, from what the modules
//! say of themselves, so that no script runs and the tree is complete.

use std::collections::BTreeMap;
use std::io::{self, Read};

use kiln_artifact::tree::{Builder, Kind, Meta, Node, PathError, Timestamp, Tree, TreeError, TreePath};
use kiln_digest::Digest;

use super::relation::{self, Operator, Relation};
use super::{Archive, ArchiveError, unpack};
use crate::fetch::http::Progress;
use crate::fetch::lock::LockedKernel;
use crate::root::decompress::{Compression, Limited};
use crate::root::modules::{InfoError, ModuleInfo, Modules, ModulesError};
use crate::store::Blobs;
use crate::threads;

/// The suite whose kernel is taken unless another is named: it has 6.12, which boots every root.
pub const DEFAULT_KERNEL_SUITE: &str = "trixie";
/// The package that depends on the suite's newest cloud kernel.
const METAPACKAGE: &str = "linux-image-cloud-amd64";
const IMAGE_PREFIX: &str = "linux-image-";
/// Larger than any module of Debian's.
const MAX_MODULE_BYTES: u64 = 256 << 20;

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The suite has none.
    #[error("{suite} has no `{METAPACKAGE}` that leads to a kernel")]
    None {
        /// The suite.
        suite: String,
    },
    /// The package has no image or no modules where they belong.
    #[error("package `{package}` has no `{path}`")]
    Incomplete {
        /// The package.
        package: String,
        /// What is missing.
        path: String,
    },
    /// A module cannot be read.
    #[error("module `{path}` cannot be read")]
    Read {
        /// The module.
        path: TreePath,
        /// What reading said.
        #[source]
        source: io::Error,
    },
    /// A module is none.
    #[error("module `{path}` cannot be used")]
    Info {
        /// The module.
        path: TreePath,
        /// What is wrong.
        #[source]
        source: InfoError,
    },
    /// Modules need what is not there.
    #[error(transparent)]
    Modules(#[from] ModulesError),
    /// The store cannot be written.
    #[error("the store cannot be written")]
    Store(#[source] io::Error),
    /// A name that no path can be.
    #[error("the kernel's release is no good name")]
    Path(#[from] PathError),
    /// The package's files are no tree.
    #[error("the kernel's files are no file tree")]
    Tree(#[from] TreeError),
}

impl KernelError {
    /// Says of which package something is missing.
    fn of_package(self, name: &str) -> Self {
        match self {
            Self::Incomplete { path, .. } => Self::Incomplete { package: name.to_owned(), path },
            other => other,
        }
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::None { .. } => Some(format!(
                "name a suite that has one, such as {DEFAULT_KERNEL_SUITE} or bookworm-backports"
            )),
            Self::Incomplete { .. } | Self::Info { .. } | Self::Modules(_) => {
                Some("lock another kernel, or give one with --kernel FILE --modules DIR".into())
            }
            _ => None,
        }
    }
}

/// A kernel, unpacked.
#[derive(Debug, Clone)]
pub struct KernelTree {
    /// The package's files, and what depmod adds.
    pub tree: Tree,
    /// The kernel's release: `6.12.57+deb13-cloud-amd64`.
    pub release: String,
    /// Where the image lies in the tree: `boot/vmlinuz-RELEASE`, a bzImage.
    pub image: TreePath,
    /// The folder of modules in the tree: `usr/lib/modules/RELEASE`.
    pub modules_folder: TreePath,
    /// The modules, their paths being below `modules_folder`.
    pub modules: Modules,
}

impl Archive {
    /// The newest cloud kernel of `suite`, for the lock. `previous` is as in [`Archive::resolve`].
    ///
    /// # Errors
    /// [`ArchiveError`], as its variants say.
    pub fn resolve_kernel(
        &self,
        suite: &str,
        previous: Option<&LockedKernel>,
    ) -> Result<LockedKernel, ArchiveError> {
        let spec = super::DebianSpec::essential(suite)?;
        let previous = previous.map_or(&[][..], |kernel| &kernel.indexes);
        self.with_packages(suite, previous, |universe, locate, indexes| {
            let none = || KernelError::None { suite: suite.to_owned() };
            let metapackage = universe.versions(METAPACKAGE).next().ok_or_else(none)?;
            let depends = relation::parse(metapackage.depends).map_err(|_| none())?;
            let image = depends.iter().flatten().find_map(exact_image).ok_or_else(none)?;
            let package = universe.versions(image.name).find(|package| image.admits(package.version));
            let package = package.ok_or_else(none)?;
            Ok(LockedKernel {
                spec: spec.to_string(),
                release: image.name[IMAGE_PREFIX.len()..].to_owned(),
                indexes,
                package: locate(package),
            })
        })
    }

    /// Fetches the package of `locked` if the store lacks it.
    ///
    /// # Errors
    /// As [`Archive::fetch`].
    pub fn fetch_kernel(&self, locked: &LockedKernel, progress: Progress<'_>) -> Result<(), ArchiveError> {
        self.fetch_packages(std::slice::from_ref(&locked.package), &locked.indexes, progress)
    }

    /// The kernel of `locked`, whose package the store has; contents go into the store.
    ///
    /// # Errors
    /// [`ArchiveError::Unpack`] and [`ArchiveError::Kernel`].
    pub fn unpack_kernel(&self, locked: &LockedKernel) -> Result<KernelTree, ArchiveError> {
        let deb = unpack::read(&locked.package, self.store.blobs())?;
        Ok(self.kernel_tree(locked, deb.data)?)
    }

    fn kernel_tree(&self, locked: &LockedKernel, data: Tree) -> Result<KernelTree, KernelError> {
        let release = &locked.release;
        let incomplete = |path: &str| KernelError::Incomplete {
            package: locked.package.name.clone(),
            path: path.to_owned(),
        };
        let image_path = format!("boot/vmlinuz-{release}");
        let image = TreePath::new(image_path.as_bytes())?;
        if !matches!(data.get(&image), Some(Node { kind: Kind::File { .. }, .. })) {
            return Err(incomplete(&image_path));
        }
        // Before trixie, packages said `lib` for what is `usr/lib`.
        let folders = [format!("usr/lib/modules/{release}"), format!("lib/modules/{release}")];
        let folder = folders.iter().filter_map(|path| TreePath::new(path.as_bytes()).ok());
        let folder = folder.into_iter().find(|path| data.get(path).is_some());
        let folder = folder.ok_or_else(|| incomplete(&folders[0]))?;
        let (tree, modules) = depmod(self.store.blobs(), &data, &folder, locked.source_date_epoch())
            .map_err(|error| error.of_package(&locked.package.name))?;
        Ok(KernelTree { tree, release: release.clone(), image, modules_folder: folder, modules })
    }
}

/// `data` with what depmod writes for the modules in `folder`, dated `epoch`, and those modules.
fn depmod(blobs: &Blobs, data: &Tree, folder: &TreePath, epoch: i64) -> Result<(Tree, Modules), KernelError> {
    let read = |name: &str| -> Result<Vec<u8>, KernelError> {
        let path = folder.join(name.as_bytes())?;
        let missing = || KernelError::Incomplete { package: String::new(), path: format!("{folder}/{name}") };
        let Some(Node { kind: Kind::File { digest, .. }, .. }) = data.get(&path) else {
            return Err(missing());
        };
        let mut bytes = Vec::new();
        let read = blobs.file(digest).and_then(|mut file| file.read_to_end(&mut bytes));
        read.map_err(|source| KernelError::Read { path, source })?;
        Ok(bytes)
    };
    let (order, builtin) = (read("modules.order")?, read("modules.builtin")?);
    let (order, builtin) = (String::from_utf8_lossy(&order), String::from_utf8_lossy(&builtin));
    let infos = module_infos(blobs, data, folder)?;
    let modules = Modules::from_infos(infos, &order, &builtin, &read("modules.builtin.modinfo")?);
    let mut builder = Builder::new();
    for (path, node) in data.iter().filter(|(path, _)| !path.is_root()) {
        match &node.kind {
            Kind::HardLink(target) if builder.link(path.clone(), target) => {}
            _ => builder.put(path.clone(), node.clone()),
        }
    }
    let mtime = Timestamp { seconds: epoch, nanoseconds: 0 };
    for (name, bytes) in modules.depmod_files()? {
        let (digest, size) = blobs.put(&bytes[..]).map_err(KernelError::Store)?;
        let meta = Meta { mode: 0o644, mtime, ..Meta::default() };
        builder.put(folder.join(name.as_bytes())?, Node { kind: Kind::File { digest, size }, meta });
    }
    Ok((builder.finish()?, modules))
}

/// `tree` with what depmod writes for each kernel in `usr/lib/modules`, dated `epoch`.
pub(super) fn with_depmod(blobs: &Blobs, mut tree: Tree, epoch: i64) -> Result<Tree, KernelError> {
    let top = TreePath::new(b"usr/lib/modules")?;
    let is_kernel = |path: &TreePath, tree: &Tree| {
        let lists = |name: &[u8]| path.join(name).is_ok_and(|list| tree.get(&list).is_some());
        path.parent().as_ref() == Some(&top) && lists(b"modules.order") && !lists(b"modules.dep")
    };
    let folders: Vec<TreePath> =
        tree.subtree(&top).map(|(path, _)| path).filter(|path| is_kernel(path, &tree)).cloned().collect();
    for folder in folders {
        tree = depmod(blobs, &tree, &folder, epoch)?.0;
    }
    Ok(tree)
}

/// What each module below `folder` of `data` says of itself, by path below it.
///
/// # Errors
/// [`KernelError`] names the first module that cannot be read.
pub fn module_infos(
    blobs: &Blobs,
    data: &Tree,
    folder: &TreePath,
) -> Result<BTreeMap<String, ModuleInfo>, KernelError> {
    let modules: Vec<(&TreePath, &Digest)> = data
        .subtree(folder)
        .filter_map(|(path, node)| match &node.kind {
            Kind::File { digest, .. } if is_module(path) => Some((path, digest)),
            _ => None,
        })
        .collect();
    let info = |(path, digest): &(&TreePath, &Digest)| {
        module_info(blobs, path, digest).map(|info| (below(path, folder), info))
    };
    Ok(threads::map(&modules, "modules", info)?.into_iter().collect())
}

fn module_info(blobs: &Blobs, path: &TreePath, digest: &Digest) -> Result<ModuleInfo, KernelError> {
    let failed = |source| KernelError::Read { path: path.clone(), source };
    let name = String::from_utf8_lossy(path.name());
    let (compression, _) = Compression::of_name(&name);
    let packed = blobs.read(digest).map_err(failed)?;
    let mut elf = Vec::new();
    let reader = compression.reader(&packed[..]).map_err(failed)?;
    Limited::new(reader, MAX_MODULE_BYTES).read_to_end(&mut elf).map_err(failed)?;
    ModuleInfo::parse(&elf).map_err(|source| KernelError::Info { path: path.clone(), source })
}

/// `linux-image-RELEASE (= VERSION)`: the one dependency of the metapackage that is the kernel.
fn exact_image<'a>(relation: &Relation<'a>) -> Option<Relation<'a>> {
    let is_exact = matches!(relation.constraint, Some((Operator::Equal, _)));
    (is_exact && relation.name.starts_with(IMAGE_PREFIX) && relation.name != METAPACKAGE).then_some(*relation)
}

fn is_module(path: &TreePath) -> bool {
    let name = String::from_utf8_lossy(path.name());
    Compression::of_name(&name).1.ends_with(".ko")
}

fn below(path: &TreePath, folder: &TreePath) -> String {
    let above = if folder.is_root() { 0 } else { folder.as_bytes().len() + 1 };
    let below = path.as_bytes().get(above..).unwrap_or_default();
    String::from_utf8_lossy(below).into_owned()
}
