//! A step: one command with its root, inputs, outputs, environment and limits, as it is described.

use std::sync::Arc;
use std::time::Duration;

use super::host::{Boundary, KernelChoice};
use super::inputs::{DiskArgument, MountArgument};
use crate::agent::Limits;
use crate::machine::{Carrier, Cpu, PathBytes};
use crate::plan::{FIXED_PATH, Outputs, RootSpec};
use crate::writes::Folder;

/// What is said of a step that has the network.
pub const OPEN_NETWORK: &str = "the network is open to this command: what it does is no longer decided by what kiln records, and \
                                QEMU keeps this host's network";

/// The clock a step sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Clock {
    /// The host's.
    #[default]
    Host,
    /// It starts at SOURCE_DATE_EPOCH.
    Fixed,
}

/// When the machine of a step stays after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Keep {
    /// Never.
    #[default]
    Never,
    /// Where the step failed.
    OnFailure,
    /// Always.
    Always,
}

/// What a step of a graph is shown in place of WORK as it stands. The directories go with the last copy of this.
#[derive(Debug, Clone)]
pub struct View {
    /// A directory with what it sees in WORK: outputs of the steps it needs.
    pub work: Arc<Folder>,
    /// A directory with the sources it sees, where it sees any.
    pub sources: Option<Arc<Folder>>,
    /// Paths in SRCDIR that it is not shown.
    pub hidden: Vec<PathBytes>,
}

/// One command with its root, inputs, outputs, environment and limits.
#[derive(Debug)]
pub struct Step {
    /// Who puts outputs into WORK.
    pub name: String,
    /// The root.
    pub root: RootSpec,
    /// The kernel.
    pub kernel: KernelChoice,
    /// Program and arguments.
    pub argv: Vec<Vec<u8>>,
    /// Variables the step names: `NAME=VALUE` or `NAME`.
    pub env: Vec<String>,
    /// Working directory; where it is not said, SRCDIR's place, else WORK's.
    pub directory: Option<String>,
    /// Whether SRCDIR gets a private writable layer.
    pub source_layer: bool,
    /// Other directories.
    pub mounts: Vec<MountArgument>,
    /// Disks.
    pub disks: Vec<DiskArgument>,
    /// Folders of WORK that are seen at other places as well: relative to WORK, and the place. What is written there is
    /// written in WORK.
    pub binds: Vec<(&'static str, &'static str)>,
    /// Declared outputs.
    pub outputs: Outputs,
    /// Whether outputs may replace files that kiln did not put into WORK.
    pub overwrite: bool,
    /// Guest memory.
    pub memory_bytes: u64,
    /// Processors; 0: as many as the host has.
    pub cpus: u16,
    /// Size of the scratch disk.
    pub scratch_bytes: u64,
    /// Kill the command after this long.
    pub timeout: Option<Duration>,
    /// How long after SIGTERM comes SIGKILL.
    pub grace: Duration,
    /// The clock.
    pub clock: Clock,
    /// What carries the wire.
    pub carrier: Carrier,
    /// Kernel modules to load; with any, the bundle's module tree is attached.
    pub modules: Vec<String>,
    /// Whether the module tree is attached.
    pub module_tree: bool,
    /// Which processor it has.
    pub cpu: Cpu,
    /// Whether it reaches the host's network. What such a step gives is never kept as a result.
    pub network: bool,
    /// What files of shares show: the contract's fixed owner and time, or the host's own.
    pub real_attributes: bool,
    /// Whether it sees the toolbox.
    pub toolbox: bool,
    /// When its machine stays.
    pub keep: Keep,
    /// What must hold of the boundary.
    pub boundary: Boundary,
    /// Whether the reads are hashed for a report.
    pub report_reads: bool,
    /// What may leave the machine.
    pub limits: Limits,
    /// Whether it sees sources of the recipe.
    pub sees_sources: bool,
    /// What it is shown as a step of a graph.
    pub view: Option<View>,
}

impl Step {
    /// The first place of a mount or a disk that hides folders of the root in which the command's program is looked
    /// for.
    pub fn covers_programs(&self) -> Option<&str> {
        let program = self.argv.first().map(Vec::as_slice).unwrap_or_default();
        let path = self.env.iter().rev().find_map(|variable| variable.strip_prefix("PATH="));
        let folders: Vec<&[u8]> = match program.iter().rposition(|&byte| byte == b'/') {
            Some(slash) => vec![&program[..slash]],
            None => path.unwrap_or(FIXED_PATH).split(':').map(str::as_bytes).collect(),
        };
        let places = self.mounts.iter().map(|mount| mount.guest.as_str());
        let places = places.chain(self.binds.iter().map(|(_, place)| *place));
        let mut places = places.chain(self.disks.iter().map(|disk| disk.guest.as_str()));
        places.find(|place| {
            let place = place.trim_end_matches('/').as_bytes();
            let is_below = |folder: &&[u8]| matches!(folder.strip_prefix(place), Some([] | [b'/', ..]));
            folders.iter().any(is_below)
        })
    }

    /// Whether its machine stays after it.
    pub fn keeps(&self, succeeded: bool) -> bool {
        match self.keep {
            Keep::Never => false,
            Keep::OnFailure => !succeeded,
            Keep::Always => true,
        }
    }

    /// Whether it may write to a disk of the user's.
    pub fn writes_disks(&self) -> bool {
        self.disks.iter().any(|disk| !disk.read_only)
    }
}
