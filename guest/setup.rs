//! `Setup` and `Mount`: make the world that a step's commands run in. Everything of the agent's own lies under `/run/kiln` of the
//! initramfs, which the commands never see: each moves the step's root over `/` in a mount namespace of its own.

use std::ffi::CStr;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, chown};

use kiln_wire::{ABOUT_ROOT, Access, Clock, Mount, Setup, Source};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, Timespec, Timestamps, XattrFlags, openat, utimensat};
use rustix::io::Errno;
use rustix::time::ClockId;

use crate::beside::{Beside, WarmUp};
use crate::disk::Disks;
use crate::failure::{Doing, Failure};
use crate::layer::Layer;
use crate::modules::ModuleTree;
use crate::place::StepRoot;
use crate::stock::{Pieces, Stock};
use crate::{mounts, network, swap, sys};

/// The step's root in the agent's own tree.
pub const ROOT: &CStr = c"/run/kiln/root";
const ROOT_PATH: &str = "/run/kiln/root";
const LAYERS: &str = "/run/kiln/layers";
/// Where what is below the root's layer is mounted, whoever mounts it: a step sees the name in /proc/mounts.
pub const ROOT_LOWER: &str = "/run/kiln/lower/root";

/// A step's world, as far as it is needed after it was made.
pub struct World {
    root: StepRoot,
    maker: Maker,
    /// The devpts that the step's commands see.
    pub terminals: OwnedFd,
}

impl World {
    /// Adds a tree, which commands started from now on see. Where the step had no folder for it, one is made, which
    /// counts as the step's in a `List`.
    ///
    /// # Errors
    /// What failed, by name. The world is as it was.
    pub fn mount(&mut self, mount: &Mount) -> Result<(), Failure> {
        self.maker.mount(&self.root, mount, &[])
    }

    /// What the step can write to and `List` can name.
    pub fn layers(&self) -> &[Layer] {
        &self.maker.layers
    }

    /// Where the agent has disks mounted that steps write to: to be unmounted at the end.
    pub fn direct(&self) -> &[String] {
        &self.maker.direct
    }
}

/// Makes the world of `pieces` and what is in stock, with the device of `shares` where it is mounted.
///
/// # Errors
/// What failed, by name. The machine is of no use then.
pub fn make(setup: &Setup, shares: Option<OwnedFd>, pieces: Pieces, stock: &Stock) -> Result<World, Failure> {
    let about_root =
        |failure: Failure| Failure::new(format!("{ABOUT_ROOT}: {}", failure.what), failure.errno);
    let disk = RootDisk::of(setup, &stock.disks).map_err(about_root)?;
    let warm_up = stock.warm_up.as_ref().filter(|_| setup.warm_up);
    // Before anything else, to come far; what fails of it costs time.
    if let Some(warm_up) = warm_up {
        warm_up.begin(disk.as_ref());
    }
    seed(&setup.seed)?;
    if let Some(warm_up) = warm_up {
        warm_up.go_on();
    }
    set_clock(setup.clock)?;
    rustix::system::sethostname(setup.hostname.as_bytes())
        .doing(|| format!("setting the host name {:?}", setup.hostname))?;
    let swapping = setup.scratch.as_ref().map(|scratch| swap::begin(scratch, stock)).transpose()?.flatten();
    mounts::limit(&pieces.layers, setup.layer_bytes)?;
    mounts::attach_at(&pieces.layers, LAYERS)?;

    let disks = stock.disks.clone();
    let mut maker = Maker { shares, disks, lowers: 0, layers: Vec::new(), direct: Vec::new() };
    let is_mounted = disk.is_some() && (stock.root == disk || warm_up.is_some_and(WarmUp::has_mounted));
    if !is_mounted {
        maker
            .read_only(&setup.root)
            .and_then(|lower| mounts::attach_at(&lower, ROOT_LOWER))
            .map_err(about_root)?;
    }
    let root = maker.layered(ROOT_LOWER, b"/").map_err(about_root)?;
    mounts::attach_at(&root, ROOT_PATH)?;
    let root = StepRoot::open(ROOT_PATH)?;
    mount_system(&root, &pieces)?;
    for mount in &setup.mounts {
        maker.mount(&root, mount, &setup.load_modules)?;
    }
    let has_modules = setup.mounts.iter().any(|mount| matches!(mount.source, Source::Modules(_)));
    if let Some(name) = setup.load_modules.first().filter(|_| !has_modules) {
        return Err(Failure::new(format!("loading module {name}: no module tree is mounted"), Errno::NOENT));
    }
    if network::is_wanted() {
        network::set_up(&root)?;
    }
    for layer in &mut maker.layers {
        layer.remember()?;
    }
    swapping.map_or(Ok(()), Beside::join)?;
    Ok(World { root, maker, terminals: pieces.terminals })
}

/// A disk that the root's own tree is on, and is mounted from read-only.
#[derive(Debug, PartialEq, Eq)]
pub struct RootDisk {
    /// Path of the device.
    pub device: String,
    /// As the kernel calls it.
    pub filesystem: String,
}

impl RootDisk {
    /// That of `setup`; none where the root is no such disk.
    ///
    /// # Errors
    /// Those of [`Disks::find`].
    pub fn of(setup: &Setup, disks: &Disks) -> Result<Option<Self>, Failure> {
        // One that is mounted to be written to cannot be mounted twice.
        let Source::Disk { serial, filesystem, read_only: true } = &setup.root else { return Ok(None) };
        Ok(Some(Self { device: disks.find(serial)?, filesystem: filesystem.clone() }))
    }

    /// Mounts it at [`ROOT_LOWER`].
    ///
    /// # Errors
    /// It cannot be mounted.
    pub fn mount(&self) -> Result<(), Failure> {
        mounts::attach_at(&mounts::disk(&self.device, &self.filesystem, true)?, ROOT_LOWER)
    }
}

/// Gives the kernel's generator of random numbers a seed, of which it makes what it gives from now on.
///
/// # Errors
/// It does not take it.
pub fn seed(seed: &[u8; 64]) -> Result<(), Failure> {
    let random = File::options().write(true).open("/dev/urandom").doing(|| "opening /dev/urandom")?;
    sys::add_entropy(&random, seed).doing(|| "adding the seed to the kernel's entropy")
}

fn set_clock(clock: Clock) -> Result<(), Failure> {
    let time = Timespec { tv_sec: clock.seconds, tv_nsec: clock.nanoseconds.into() };
    rustix::time::clock_settime(ClockId::Realtime, time)
        .doing(|| format!("setting the clock to {}", clock.seconds))
}

/// What every step finds whatever its root is: devices and kernel information. `/proc` is mounted by each command, in
/// its own pid namespace; here it only gets its place.
fn mount_system(root: &StepRoot, pieces: &Pieces) -> Result<(), Failure> {
    for path in ["/proc", "/run"] {
        root.folder(path.as_bytes())?;
    }
    root.folder_with_mode(b"/tmp", 0o1777)?;
    attach(root, &mounts::bind(CWD, "/sys", mounts::READ_ONLY_KERNEL)?, b"/sys")?;
    attach(root, &mounts::bind(CWD, "/dev", 0)?, b"/dev")?;
    attach(root, &pieces.terminals, b"/dev/pts")?;
    attach(root, &pieces.shared_memory, b"/dev/shm")
}

fn attach(root: &StepRoot, mount: &OwnedFd, target: &[u8]) -> Result<(), Failure> {
    let folder = root.folder(target)?;
    mounts::attach(mount, &folder).doing(|| format!("mounting on {}", target.escape_ascii()))
}

/// Makes mounts and remembers what was made.
struct Maker {
    shares: Option<OwnedFd>,
    disks: Disks,
    lowers: usize,
    layers: Vec<Layer>,
    direct: Vec<String>,
}

impl Maker {
    /// One of a `Setup`'s mounts.
    fn mount(&mut self, root: &StepRoot, mount: &Mount, load_modules: &[String]) -> Result<(), Failure> {
        match (&mount.source, mount.access) {
            (Source::Disk { serial, filesystem, .. }, _) if filesystem.is_empty() => {
                let device = self.disks.find(serial)?;
                let file = root.file(&mount.target)?;
                mounts::attach(&mounts::bind(CWD, &device, 0)?, &file)
                    .doing(|| format!("mounting {device} on {}", mount.target.escape_ascii()))
            }
            (Source::Modules(serial), _) => {
                let tree = mounts::disk(&self.disks.find(serial)?, "erofs", true)?;
                let release = rustix::system::uname();
                let target = [b"/lib/modules/", release.release().to_bytes()].concat();
                attach(root, &tree, &target)?;
                if load_modules.is_empty() {
                    return Ok(());
                }
                // Loaded here, not last: a mount after this one may need them.
                let tree = ModuleTree::open(tree)?;
                load_modules.iter().try_for_each(|module| tree.load(module))
            }
            (Source::Within(path), _) => {
                let folder = root.folder(path)?;
                attach(root, &mounts::bind(&folder, ".", 0)?, &mount.target)
            }
            (source, Access::ReadOnly) => attach(root, &self.read_only(source)?, &mount.target),
            (source, Access::Layered) => {
                let lower = self.lower(source)?;
                let overlay = self.layered(&lower, &mount.target)?;
                attach(root, &overlay, &mount.target)
            }
            (Source::Disk { serial, filesystem, read_only }, Access::Direct) => {
                let device = self.disks.find(serial)?;
                let own = format!("/run/kiln/direct/{}", self.direct.len());
                mounts::attach_at(&mounts::disk(&device, filesystem, *read_only)?, &own)?;
                let shown = mounts::bind(CWD, &own, 0)?;
                self.direct.push(own);
                attach(root, &shown, &mount.target)
            }
            (Source::Share(name), Access::Direct) => {
                Err(Failure::new(format!("mounting share {name} for writing"), Errno::ROFS))
            }
        }
    }

    /// A source as a mount that nobody can write to.
    fn read_only(&mut self, source: &Source) -> Result<OwnedFd, Failure> {
        match source {
            Source::Disk { serial, filesystem, .. } => {
                mounts::disk(&self.disks.find(serial)?, filesystem, true)
            }
            Source::Modules(serial) => mounts::disk(&self.disks.find(serial)?, "erofs", true),
            Source::Share(name) => self.share(name),
            Source::Within(path) => {
                Err(Failure::new(format!("a layer over {}", path.escape_ascii()), Errno::INVAL))
            }
        }
    }

    /// A share. Where the device of shares was not there when the machine came up, it is looked for once more.
    fn share(&mut self, name: &str) -> Result<OwnedFd, Failure> {
        let shares = match self.shares.take() {
            Some(shares) => shares,
            None => mounts::shares()?,
        };
        if name.is_empty() {
            return Err(Failure::new("binding a share without a name", Errno::INVAL));
        }
        let share = mounts::bind(&shares, name, mounts::READ_ONLY_SHARE);
        self.shares = Some(shares);
        share
    }

    /// A source mounted read-only at a path of the agent's own, to be the lower tree of an overlay.
    fn lower(&mut self, source: &Source) -> Result<String, Failure> {
        let path = format!("/run/kiln/lower/{}", self.lowers);
        self.lowers += 1;
        mounts::attach_at(&self.read_only(source)?, &path)?;
        Ok(path)
    }

    /// An overlay with a new layer above `lower`, known by `target`.
    fn layered(&mut self, lower: &str, target: &[u8]) -> Result<OwnedFd, Failure> {
        let number = self.layers.len();
        let (upper, work) = (format!("{LAYERS}/{number}/upper"), format!("{LAYERS}/{number}/work"));
        let what = || format!("making a layer for {}", target.escape_ascii());
        for path in [&upper, &work] {
            std::fs::DirBuilder::new().recursive(true).mode(0o755).create(path).doing(what)?;
        }
        copy_attributes(lower, &upper).doing(what)?;
        let overlay = mounts::overlay(lower, &upper, &work)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let top = openat(CWD, upper.as_str(), flags, Mode::empty()).doing(what)?;
        self.layers.push(Layer::new(target.to_vec(), top));
        Ok(overlay)
    }
}

/// Gives the top of a layer the attributes of the lower tree's top, because the overlay shows the layer's.
fn copy_attributes(from: &str, to: &str) -> std::io::Result<()> {
    let stat = rustix::fs::stat(from)?;
    // Most have none, and room for what there is at most is more than a short step takes.
    let mut names = match rustix::fs::llistxattr(from, &mut [0_u8; 0][..]) {
        // A share whose device has no extended attributes.
        Err(Errno::NOTSUP | Errno::NOSYS) => Vec::new(),
        result => vec![0; result?],
    };
    let length = match rustix::fs::llistxattr(from, &mut names[..]) {
        _ if names.is_empty() => 0,
        // There are more by now: as many as there can be (XATTR_LIST_MAX).
        Err(Errno::RANGE) => {
            names.resize(65_536, 0);
            rustix::fs::llistxattr(from, &mut names[..])?
        }
        result => result?,
    };
    let names = names.get(..length).unwrap_or_default().split(|&byte| byte == 0);
    for name in names.filter(|name| !name.is_empty() && !name.starts_with(b"trusted.overlay.")) {
        let mut value = vec![0; 65_536];
        let length = rustix::fs::lgetxattr(from, name, &mut value[..])?;
        rustix::fs::lsetxattr(to, name, value.get(..length).unwrap_or_default(), XattrFlags::empty())?;
    }
    chown(to, Some(stat.st_uid), Some(stat.st_gid))?;
    rustix::fs::chmod(to, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    let nanoseconds = i64::try_from(stat.st_mtime_nsec).unwrap_or(0);
    let time = Timespec { tv_sec: stat.st_mtime, tv_nsec: nanoseconds };
    let times = Timestamps { last_access: time, last_modification: time };
    utimensat(CWD, to, &times, AtFlags::empty())?;
    Ok(())
}
