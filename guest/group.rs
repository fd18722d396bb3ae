//! How many processes a step's commands may have together: a control group (cgroup v2) that each command's first
//! process enters before it starts anything. The agent itself stays outside, so that it can end what is inside.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use rustix::mount::MountAttrFlags;

use crate::failure::{Doing, Failure};
use crate::mounts;

/// In the agent's own tree: no command sees it.
const GROUPS: &str = "/run/kiln/groups";
const STEP: &str = "/run/kiln/groups/step";

/// The group of a step's commands.
pub struct Group {
    members: OwnedFd,
    events: File,
}

impl Group {
    /// Makes it, for at most `processes` processes and threads.
    ///
    /// # Errors
    /// The kernel has no control groups, or does not count processes.
    pub fn make(processes: u32) -> Result<Self, Failure> {
        let quiet = MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NOEXEC
            | MountAttrFlags::MOUNT_ATTR_NODEV;
        mounts::attach_at(&mounts::filesystem("cgroup2", &[("source", "groups")], quiet)?, GROUPS)?;
        let set = |path: String, value: &str| {
            fs::write(&path, value).doing(|| format!("writing {value:?} to {path}"))
        };
        set(format!("{GROUPS}/cgroup.subtree_control"), "+pids")?;
        fs::create_dir(STEP).doing(|| format!("making {STEP}"))?;
        set(format!("{STEP}/pids.max"), &processes.to_string())?;
        let open = |name: &str, write: bool| {
            let path = format!("{STEP}/{name}");
            File::options().read(!write).write(write).open(&path).doing(|| format!("opening {path}"))
        };
        Ok(Self { members: open("cgroup.procs", true)?.into(), events: open("pids.events", false)? })
    }

    /// Puts the calling process into it, and with it whatever it starts from now on.
    ///
    /// # Errors
    /// What the system says.
    pub fn enter(&self) -> std::io::Result<()> {
        // 0 is whoever writes.
        File::from(self.members.try_clone()?).write_all(b"0")
    }

    /// How often a process could not be started because there were as many as may be.
    pub fn refusals(&self) -> u64 {
        let mut text = [0; 256];
        let length = self.events.read_at(&mut text, 0).unwrap_or(0);
        let text = String::from_utf8_lossy(text.get(..length).unwrap_or_default());
        text.lines().find_map(|line| line.strip_prefix("max ")?.trim().parse().ok()).unwrap_or(0)
    }
}
