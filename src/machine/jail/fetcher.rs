//! The jail around a program that fetches: it keeps the network, and of files sees the system's and its own place.

use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr,
};
use rustix::process::{Resource, Rlimit, Signal};

use super::{CLOSURES, Profile, SYSTEM_FOLDERS, capability};
use crate::machine::fetcher::Fetcher;

/// What finding servers and believing them takes: resolver, certificates, users.
const CONFIGURATION: [&str; 5] =
    ["/etc", "/run/systemd/resolve", "/run/resolvconf", "/run/NetworkManager", "/var/lib/ca-certificates"];
const DEVICES: [&str; 3] = ["/dev/null", "/dev/zero", "/dev/urandom"];

/// Locks the calling process in, which will become `fetcher`.
///
/// # Errors
/// What cannot be done and must be: limits and capabilities. A kernel without landlock leaves files to their modes.
pub(in crate::machine) fn enter(fetcher: &Fetcher) -> io::Result<()> {
    let most = fetcher.most_file_bytes;
    rustix::process::setrlimit(Resource::Fsize, Rlimit { current: Some(most), maximum: Some(most) })?;
    rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    // Away from the terminal, at which it could ask for passwords, and in a group that can be ended as one.
    rustix::process::setsid()?;
    let none = Profile::Qemu {
        program: PathBuf::new(),
        kvm: false,
        files: Vec::new(),
        memory: None,
        network: false,
    };
    capability::drop_all(&none)?;
    rustix::thread::set_no_new_privs(true)?;
    rules(fetcher).map_err(|error| io::Error::other(error.to_string()))?;
    // Credentials have changed, at which the kernel may forget it.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    Ok(())
}

fn rules(fetcher: &Fetcher) -> Result<(), Box<dyn std::error::Error>> {
    // Not the rights of later interfaces: what they would take away are sockets and signals, which it needs.
    let all = AccessFs::from_all(ABI::V4);
    let read = AccessFs::ReadFile | AccessFs::ReadDir | AccessFs::Execute;
    let mut rules =
        Ruleset::default().set_compatibility(CompatLevel::BestEffort).handle_access(all)?.create()?;
    let real = std::fs::canonicalize(&fetcher.program)?;
    // A git that lies elsewhere has its parts beside it: PREFIX/bin, PREFIX/libexec/git-core.
    let folder = real.parent().unwrap_or(Path::new("/"));
    let beside = ["lib", "lib64", "libexec", "share/git-core"].map(|name| folder.join("..").join(name));
    let system = SYSTEM_FOLDERS.iter().chain(&CLOSURES).chain(&CONFIGURATION).map(PathBuf::from);
    let reads = system.chain(beside).chain([folder.to_owned()]).chain(fetcher.reads.iter().cloned());
    let rights = reads
        .map(|path| (path, read))
        .chain(DEVICES.iter().map(|path| (PathBuf::from(path), AccessFs::ReadFile | AccessFs::WriteFile)))
        .chain([(fetcher.place.clone(), all)]);
    for (path, access) in rights.filter(|(path, _)| path.exists()) {
        let access: BitFlags<AccessFs> =
            if path.is_dir() { access } else { access & AccessFs::from_file(ABI::V4) };
        rules = rules.add_rule(PathBeneath::new(PathFd::new(path)?, access))?;
    }
    rules.restrict_self()?;
    Ok(())
}
