//! Landlock: which files may be opened, whatever the namespaces are.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

use kiln_virtio::process::LockIn;
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, PathBeneath, PathFd, RestrictionStatus,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetStatus, Scope,
};

use super::{Reach, ReachKind};

/// The newest interface whose rights are named; an older kernel holds what it knows.
const NEWEST: ABI = ABI::V6;

/// Restricts this thread, and all it will start, to `reach` (where it lies inside a jail's root, or on the host) and to
/// reading beneath the directories `beneath`; TCP stays where `network` says so. Gives the version of the interface.
///
/// # Errors
/// The kernel has no landlock, or refuses.
pub(super) fn enter(reach: &[Reach], beneath: &[&OwnedFd], inside: bool, network: bool) -> io::Result<i32> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let rules = || -> Result<RestrictionStatus, Box<dyn std::error::Error>> {
        let mut handled = Ruleset::default().handle_access(AccessFs::from_all(NEWEST))?;
        if !network {
            handled = handled.handle_access(AccessNet::from_all(NEWEST))?;
        }
        let mut rules = handled.scope(Scope::from_all(NEWEST))?.create()?;
        for reach in reach {
            let path = if inside { &reach.at } else { &reach.from };
            let access: BitFlags<AccessFs> = match reach.kind {
                ReachKind::Files => read | AccessFs::Execute,
                ReachKind::Device => AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev,
                ReachKind::Writable => {
                    read | AccessFs::WriteFile
                        | AccessFs::MakeReg
                        | AccessFs::RemoveFile
                        | AccessFs::Truncate
                        | AccessFs::Refer
                }
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

/// How many threads of a device process open files: the one that serves the parent, and the one of the fs device's queues.
const OPENERS: usize = 2;

/// Makes what restricts each of a device process's threads that open files to reading beneath `directories`, in addition
/// to what it was restricted to before. Where the kernel has no landlock, it does nothing.
///
/// # Errors
/// The kernel refuses.
pub(super) fn narrow(directories: &[OwnedFd]) -> io::Result<LockIn> {
    let rules = || -> Result<Vec<RulesetCreated>, Box<dyn std::error::Error>> {
        let mut rules = Ruleset::default().handle_access(AccessFs::from_all(NEWEST))?.create()?;
        for directory in directories {
            rules = rules.add_rule(PathBeneath::new(directory, AccessFs::ReadFile | AccessFs::ReadDir))?;
        }
        // Now, because those threads may do little.
        Ok((0..OPENERS).map(|_| rules.try_clone()).collect::<Result<_, _>>()?)
    };
    let rules = Mutex::new(rules().map_err(|error| io::Error::other(error.to_string()))?);
    Ok(Box::new(move || {
        let rules = rules.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let rules = rules.ok_or_else(|| io::Error::other("a thread that is not expected to open files"))?;
        rules.restrict_self().map(drop).map_err(|error| io::Error::other(error.to_string()))
    }))
}

/// What of `access` a rule on `path` can say: a file has no entries.
fn fitting(path: &std::path::Path, access: BitFlags<AccessFs>) -> BitFlags<AccessFs> {
    if path.is_dir() { access } else { access & AccessFs::from_file(NEWEST) }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::thread;

    use super::*;

    #[test]
    fn a_narrowed_thread_reads_beneath_what_it_was_given_and_nowhere_else() {
        if thread::spawn(|| enter(&[], &[], false, false)).join().expect("no panic").is_err() {
            // This kernel has no landlock; the tests of the jail say so.
            return;
        }
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["given", "other"] {
            fs::create_dir(folder.path().join(name)).expect("a folder");
            fs::write(folder.path().join(name).join("file"), name).expect("room");
        }
        let reads = |name: &str| fs::read(folder.path().join(name).join("file")).is_ok();
        let given = OwnedFd::from(File::open(folder.path().join("given")).expect("a folder"));
        let lock_in = narrow(&[given]).expect("landlock");
        thread::scope(|scope| {
            for _ in 0..OPENERS {
                let locked = scope.spawn(|| {
                    let before = reads("other");
                    lock_in().expect("landlock");
                    (before, reads("given"), reads("other"))
                });
                assert_eq!(locked.join().expect("no panic"), (true, true, false));
            }
        });
        assert!(reads("other"), "a thread for itself");
        assert!(lock_in().is_err(), "no more threads than there are");
    }
}
