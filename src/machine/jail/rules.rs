//! Landlock: which files may be opened, whatever the namespaces are.

use std::io;
use std::os::fd::OwnedFd;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, PathBeneath, PathFd, RestrictionStatus,
    Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
};

use super::{Reach, ReachKind};

/// The newest interface whose rights are named; an older kernel holds what it knows.
const NEWEST: ABI = ABI::V6;

/// Restricts this thread, and all it will start, to `reach` (where it lies inside a jail's root, or on the host) and to
/// reading beneath the directories `beneath`. Gives the version of the interface.
///
/// # Errors
/// The kernel has no landlock, or refuses.
pub(super) fn enter(reach: &[Reach], beneath: &[&OwnedFd], inside: bool) -> io::Result<i32> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let rules = || -> Result<RestrictionStatus, Box<dyn std::error::Error>> {
        let mut rules = Ruleset::default()
            .handle_access(AccessFs::from_all(NEWEST))?
            .handle_access(AccessNet::from_all(NEWEST))?
            .scope(Scope::from_all(NEWEST))?
            .create()?;
        for reach in reach {
            let path = if inside { &reach.at } else { &reach.from };
            let access: BitFlags<AccessFs> = match reach.kind {
                ReachKind::Files => read | AccessFs::Execute,
                ReachKind::Device => AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev,
                // Of files that were never in a file system landlock knows nothing, and lets them be opened.
                ReachKind::Descriptor => continue,
            };
            let file = PathFd::new(path)?;
            rules = rules.add_rule(PathBeneath::new(file, fitting(path, access)))?;
        }
        for directory in beneath {
            rules = rules.add_rule(PathBeneath::new(*directory, read))?;
        }
        Ok(rules.restrict_self()?)
    };
    let status = rules().map_err(|error| io::Error::other(error.to_string()))?;
    match (status.ruleset, status.landlock) {
        (RulesetStatus::NotEnforced, LandlockStatus::NotEnabled) => {
            Err(io::Error::other("the kernel has landlock, but it is not enabled (boot parameter `lsm=`)"))
        }
        (RulesetStatus::NotEnforced, _) => Err(io::Error::other("the kernel has no landlock (Linux 5.13)")),
        (_, LandlockStatus::Available { effective_abi, kernel_abi }) => {
            Ok(kernel_abi.unwrap_or(effective_abi as i32))
        }
        _ => Ok(0),
    }
}

/// What of `access` a rule on `path` can say: a file has no entries.
fn fitting(path: &std::path::Path, access: BitFlags<AccessFs>) -> BitFlags<AccessFs> {
    if path.is_dir() { access } else { access & AccessFs::from_file(NEWEST) }
}
