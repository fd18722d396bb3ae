//! `kiln doctor`: what this host can do, found out by doing it.

use std::io;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::Failure;
use super::show::{chain, line};
use crate::engine::{Boundary, Host, HostError, jail_of};
use crate::machine::jail::attempt::{Attempt, Outcome, Targets};
use crate::machine::jail::{Layer, Profile, ThreadKind};
use crate::machine::qemu::{OLDEST, Qemu};
use crate::machine::{Accelerator, MachineError, program};
use crate::root::bundle;
use crate::root::debian::ArchiveError;
use crate::settings::BackendChoice;

/// How long the mirror may take to answer.
const MIRROR_PATIENCE: Duration = Duration::from_secs(5);

/// Arguments of `kiln doctor`.
#[derive(Debug, Args)]
pub(super) struct DoctorArguments {
    /// Try everything that the jail must not let a machine's processes do: without it, in each layer, in all
    #[arg(long)]
    jail: bool,
}

/// Without a store there is nothing else to look at.
pub(super) fn no_store(failure: &Failure) -> ExitCode {
    line(&format!("MISSING  {:<10} {}", "store", failure.text));
    line(&format!("         {:<10} fix: name a directory of yours with --store or KILN_STORE", ""));
    ExitCode::from(super::CANNOT)
}

/// Prints a line for each thing a run needs, and the fix for each that is missing. 3 where no machine can run.
pub(super) fn doctor(host: &Host, arguments: &DoctorArguments) -> Result<ExitCode, Failure> {
    if arguments.jail {
        let qemu = host.backend(&Boundary::default())?;
        let failed = |source| MachineError::Io { what: "try the jail", source };
        return Ok(try_jail(&qemu).map_err(failed).map_err(HostError::from)?);
    }
    let mut missing = 0;
    let mut check = |name: &str, good: Result<String, (String, String)>| match good {
        Ok(text) => line(&format!("ok       {name:<10} {text}")),
        Err((text, fix)) => {
            missing += 1;
            line(&format!("MISSING  {name:<10} {text}"));
            line(&format!("         {:<10} fix: {fix}", ""));
        }
    };
    let settings = &host.settings;
    check("store", Ok(format!("{} can be written", settings.store.value.display())));
    let verdict = host.kvm(true);
    let qemu = Qemu::find(&settings.qemu.value, &settings.search_path, Accelerator::Tcg);
    let bad = |error: MachineError| (error.to_string(), error.hint().unwrap_or_default());
    let qemu = qemu.map_err(bad).and_then(|qemu| match qemu.version_text() {
        Some(version) if qemu.is_new_enough() => Ok(format!("{version} at {}", qemu.program().display())),
        Some(found) => Err(bad(MachineError::TooOld { found })),
        None => {
            let text = format!("{} does not say its version when asked", qemu.program().display());
            Err((text, bad(MachineError::TooOld { found: String::new() }).1))
        }
    });
    check("qemu", qemu);
    check(
        "program",
        match program::find() {
            Some(path) => Ok(path.display().to_string()),
            None => Err((program::Missing.to_string(), program::HINT.to_owned())),
        },
    );
    let agent = bundle::find_agent(settings.agent.value.as_deref());
    check(
        "agent",
        match agent.filter(|path| path.is_file()) {
            Some(path) => Ok(path.display().to_string()),
            None => {
                Err(("not found beside kiln or in ../libexec/kiln".to_owned(), "run ci/build".to_owned()))
            }
        },
    );
    match host.probe_debian_mirror(MIRROR_PATIENCE) {
        Ok(mirror) => check("debian", Ok(format!("{mirror} answers"))),
        // What is in the store needs no mirror.
        Err(error @ ArchiveError::Fetch(_)) => {
            line(&format!("note     debian     {}: only what is in the store can be used", chain(&error)));
            line(&format!("                    fix: {}", error.hint().unwrap_or_default()));
        }
        Err(error) => check("debian", Err((error.to_string(), error.hint().unwrap_or_default()))),
    }
    line(&format!("{:<8} kvm        {verdict}", if verdict.is_usable() { "ok" } else { "note" }));
    if let Some(fix) = verdict.fix() {
        line(&format!("                    fix: {fix}"));
    }
    let backend = host.backend(&Boundary::default());
    if let Ok(qemu) = &backend
        && !jail(qemu)
    {
        missing += 1;
    }
    match backend {
        Ok(qemu) if qemu.uses_kvm() => {
            let which = if host.vmm(&qemu).is_some() { "kiln's own VMM on KVM" } else { "qemu with KVM" };
            line(&format!("backend  {which}, because the probe ran guest code at a processor's speed"));
        }
        Ok(_) => {
            let why = match settings.backend.value {
                BackendChoice::Tcg => "the setting says so",
                _ => "KVM cannot be used",
            };
            line(&format!(
                "backend  qemu with emulation, because {why}: slower, and no security boundary (QEMU {OLDEST} or newer)"
            ));
        }
        Err(_) if missing > 0 => line("backend  none: see what is missing"),
        Err(error) => {
            missing += 1;
            line(&format!("MISSING  backend    {}", chain(&error)));
            line("                    fix: what is said of kvm above, or let kiln choose (`--backend auto`)");
        }
    }
    Ok(if missing == 0 { ExitCode::SUCCESS } else { ExitCode::from(super::CANNOT) })
}

/// What of the jail holds, and for each layer that does not, what that means. False where no machine's processes can be
/// started in one at all.
fn jail(qemu: &Qemu) -> bool {
    match jail_of(qemu) {
        Ok(held) if held.is_whole() => {
            let abi =
                held.landlock_abi.map_or_else(String::new, |abi| format!(" (landlock's interface {abi})"));
            line(&format!("ok       jail       {held}{abi}"));
        }
        Ok(held) => {
            line(&format!("note     jail       {held}"));
            for (layer, why) in &held.missing {
                line(&format!("                    no {}: {why}", layer.name()));
                line(&format!("                    so {}", layer.what_missing_means()));
                line(&format!("                    fix: {}", layer.how_to_get()));
            }
            line("                    --require jail and --untrusted are refused");
        }
        Err(error) => {
            line(&format!("MISSING  jail       no process can be locked in: {error}"));
            line("                    fix: a kernel with seccomp filters, and room for one more process");
            return false;
        }
    }
    true
}

/// Every attempt on the jails of a machine's processes, a line each: without the jail, in each layer alone, in all of
/// it. Fails where the whole lets something through that it need not, or where nothing shows that it was the jail.
fn try_jail(qemu: &Qemu) -> io::Result<ExitCode> {
    let targets = Targets::new()?;
    let mut good = true;
    let profiles = [
        ("device process", Profile::Devices),
        ("QEMU", qemu.profile(Vec::new(), false)),
        ("kiln's VMM", Profile::Vmm),
    ];
    for (name, profile) in profiles {
        let columns = Layer::ALL.map(|layer| format!("{:<13}", layer.name())).concat();
        line(&format!("{name:<33}{:<10}{columns}whole", "no jail"));
        for attempt in Attempt::ALL {
            let free = targets.attempt(attempt, &profile, &Layer::ALL)?;
            let mut text = format!("  {:<31}{:<10}", attempt.name(), free.to_string());
            for only in Layer::ALL {
                let others: Vec<Layer> = Layer::ALL.into_iter().filter(|layer| *layer != only).collect();
                text.push_str(&format!("{:<13}", targets.attempt(attempt, &profile, &others)?.to_string()));
            }
            let whole = targets.attempt(attempt, &profile, &[])?;
            let verdict = match (&free, &whole, attempt.is_needed_by(&profile)) {
                (_, Outcome::Allowed, true) => " (it needs that)",
                (Outcome::Allowed, Outcome::Refused(_) | Outcome::Killed, _) => "",
                (_, Outcome::Allowed, false) => " NOT HELD",
                // As where a host lets nobody make user namespaces.
                _ => " (the host does that by itself)",
            };
            good &= verdict != " NOT HELD";
            line(&format!("{text}{whole}{verdict}"));
        }
    }
    let columns = ThreadKind::OF_VMM.map(|kind| format!("{:<11}", kind.name())).concat();
    line(&format!("{:<33}{:<10}{}", "threads of kiln's VMM", "process", columns.trim_end()));
    for attempt in Attempt::OF_THREADS {
        let process = targets.attempt_as(attempt, None)?;
        // What the process may not do either shows nothing of its threads.
        good &= process == Outcome::Allowed;
        let mut text = format!("  {:<31}{:<10}", attempt.name(), process.to_string());
        let mut verdict = "";
        for kind in ThreadKind::OF_VMM {
            let outcome = targets.attempt_as(attempt, Some(kind))?;
            if (outcome == Outcome::Allowed) != attempt.is_needed_by_thread(kind) {
                (good, verdict) = (false, " NOT AS NEEDED");
            }
            text.push_str(&format!("{:<11}", outcome.to_string()));
        }
        line(&format!("{}{verdict}", text.trim_end()));
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::from(super::CANNOT) })
}
