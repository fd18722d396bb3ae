//! How many processes a step's commands may have together: a control group (cgroup v2) that each command's first
//! process is started in. The agent itself stays outside, so that it can end what is inside.

use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use rustix::mount::MountAttrFlags;

use crate::failure::{Doing, Failure};
use crate::mounts;

/// In the agent's own tree: no command sees it.
const GROUPS: &str = "/run/kiln/groups";
const STEP: &str = "/run/kiln/groups/step";

/// The group of a step's commands.
pub struct Group {
    folder: File,
    limit: File,
    events: File,
}

impl Group {
    /// Makes it, without a limit.
    ///
    /// # Errors
    /// The kernel has no control groups, or does not count processes.
    pub fn make() -> Result<Self, Failure> {
        let quiet = MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NOEXEC
            | MountAttrFlags::MOUNT_ATTR_NODEV;
        mounts::attach_at(&mounts::filesystem("cgroup2", &[("source", "groups")], quiet)?, GROUPS)?;
        let counting = format!("{GROUPS}/cgroup.subtree_control");
        fs::write(&counting, "+pids").doing(|| format!("writing to {counting}"))?;
        fs::create_dir(STEP).doing(|| format!("making {STEP}"))?;
        let open = |name: &str, write: bool| {
            let path = format!("{STEP}/{name}");
            File::options().read(!write).write(write).open(&path).doing(|| format!("opening {path}"))
        };
        Ok(Self {
            folder: open("", false)?,
            limit: open("pids.max", true)?,
            events: open("pids.events", false)?,
        })
    }

    /// Lets it have at most `processes` processes and threads.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn limit(&self, processes: u32) -> Result<(), Failure> {
        let number = processes.to_string();
        self.limit.write_all_at(number.as_bytes(), 0).doing(|| format!("writing {number} to {STEP}/pids.max"))
    }

    /// What a process is started in it with.
    pub fn place(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }

    /// How often a process could not be started because there were as many as may be.
    pub fn refusals(&self) -> u64 {
        let mut text = [0; 256];
        let length = self.events.read_at(&mut text, 0).unwrap_or(0);
        let text = String::from_utf8_lossy(text.get(..length).unwrap_or_default());
        text.lines().find_map(|line| line.strip_prefix("max ")?.trim().parse().ok()).unwrap_or(0)
    }
}
