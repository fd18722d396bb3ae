//! What every step's world is made of and no step has a say in, and what of the machine does not change any more: made and
//! looked up before a step is known, so that the copies of a frozen machine have it.

use std::os::fd::OwnedFd;

use kiln_wire::Scratch;
use rustix::mount::MountAttrFlags;

use crate::beside::WarmUp;
use crate::disk::Disks;
use crate::failure::Failure;
use crate::group::Group;
use crate::mounts;
use crate::setup::RootDisk;

/// File systems of one world's own that nobody has mounted yet.
pub struct Pieces {
    /// The tmpfs of all its layers, with a limit: one without cannot be given any.
    pub layers: OwnedFd,
    /// Its devpts.
    pub terminals: OwnedFd,
    /// Its /dev/shm.
    pub shared_memory: OwnedFd,
}

impl Pieces {
    /// Makes them.
    ///
    /// # Errors
    /// The kernel lacks one of the file systems.
    pub fn make() -> Result<Self, Failure> {
        // Inodes are not limited beside bytes: a step is told one limit, not two.
        let layers = [("source", "layers"), ("mode", "0700"), ("nr_inodes", "0"), ("size", "1M")];
        let no_programs = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let terminals = [("source", "devpts"), ("mode", "0620"), ("gid", "5"), ("ptmxmode", "0666")];
        let no_devices = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
        let shared_memory = [("source", "shm"), ("mode", "1777")];
        Ok(Self {
            layers: mounts::filesystem("tmpfs", &layers, MountAttrFlags::empty())?,
            terminals: mounts::filesystem("devpts", &terminals, no_programs)?,
            shared_memory: mounts::filesystem("tmpfs", &shared_memory, no_devices)?,
        })
    }
}

/// What a machine has before it hears of a step.
pub struct Stock {
    /// Its disks.
    pub disks: Disks,
    /// What it swaps to already.
    pub swapped: Option<Scratch>,
    /// What is mounted already at its place.
    pub root: Option<RootDisk>,
    /// For the step's processes.
    group: Option<Group>,
    /// For a step's world, and for one that is rehearsed before.
    pieces: Vec<Pieces>,
    /// What helps with making a world, and may run until [`Stock::settle`]; none where there is no processor for it.
    pub warm_up: Option<WarmUp>,
}

impl Stock {
    /// Makes and looks up all that is to be had; what is not is asked for again where it is needed.
    pub fn lay_in(cpus: u16) -> Self {
        let pieces = [Pieces::make(), Pieces::make()].into_iter().filter_map(Result::ok).collect();
        let (disks, group) = (Disks::look(), Group::make().ok());
        let warm_up = (cpus > 1).then(WarmUp::prepare).and_then(Result::ok);
        Self { disks, swapped: None, root: None, group, pieces, warm_up }
    }

    /// Waits until nothing runs in the machine but what commands must find in it.
    pub fn settle(&mut self) {
        if let Some(warm_up) = self.warm_up.take() {
            warm_up.end();
        }
    }

    /// The pieces of a world, which has them for itself.
    ///
    /// # Errors
    /// Those of [`Pieces::make`].
    pub fn take(&mut self) -> Result<Pieces, Failure> {
        self.pieces.pop().map_or_else(Pieces::make, Ok)
    }

    /// The group of the step's processes, of at most `processes`.
    ///
    /// # Errors
    /// Those of [`Group::make`] and [`Group::limit`].
    pub fn group(&mut self, processes: u32) -> Result<Group, Failure> {
        let group = self.group.take().map_or_else(Group::make, Ok)?;
        group.limit(processes).map(|()| group)
    }
}
