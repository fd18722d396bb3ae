//! `kiln doctor`: what this host can do, found out by doing it.

use std::process::ExitCode;

use super::Failure;
use super::show::line;
use crate::engine::{Boundary, Host};
use crate::machine::probe::Verdict;
use crate::machine::qemu::{OLDEST, Qemu};
use crate::machine::{Accelerator, MachineError};
use crate::root::bundle;

/// Without a store there is nothing else to look at.
pub(super) fn no_store(failure: &Failure) -> ExitCode {
    line(&format!("MISSING  {:<10} {}", "store", failure.text));
    line(&format!("         {:<10} fix: name a directory of yours with --store or KILN_STORE", ""));
    ExitCode::from(super::CANNOT)
}

/// Prints a line for each thing a run needs, and the fix for each that is missing. 3 where no machine can run.
pub(super) fn doctor(host: &Host) -> Result<ExitCode, Failure> {
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
    let too_old = |found: String| MachineError::TooOld { found };
    let qemu = qemu.and_then(|qemu| match qemu.version_text() {
        Some(version) if qemu.is_new_enough() => Ok(format!("{version} at {}", qemu.program().display())),
        Some(version) => Err(too_old(version)),
        None => Err(too_old("of unknown version".to_owned())),
    });
    check("qemu", qemu.map_err(|error| (error.to_string(), error.hint().unwrap_or_default())));
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
    check(
        "debian",
        host.debian_mirror().map(|mirror| format!("{mirror} (as configured; not contacted)")).map_err(
            |error| {
                let fix = error.hint().unwrap_or_default();
                (error.to_string(), fix)
            },
        ),
    );
    match &verdict {
        Verdict::Usable { .. } => line(&format!("ok       kvm        {verdict}")),
        Verdict::Slow { .. } => {
            line(&format!("note     kvm        {verdict}"));
            line(
                "                    fix: run on hardware with virtualisation, or ask your host for nested virtualisation",
            );
        }
        Verdict::Absent { .. } => {
            line(&format!("note     kvm        {verdict}"));
            line(
                "                    fix: load kvm_intel or kvm_amd, and let your user open /dev/kvm (group kvm)",
            );
        }
    }
    line("note     jail       none in this version: --require jail and --untrusted are refused");
    match host.backend(&Boundary::default()) {
        Ok(_) if verdict.is_usable() => {
            line("backend  qemu with KVM, because the probe ran guest code at a processor's speed")
        }
        Ok(_) => line(&format!(
            "backend  qemu with emulation, because KVM cannot be used: slower, and no security boundary (QEMU {OLDEST} or newer)"
        )),
        Err(_) => line("backend  none: see what is missing"),
    }
    Ok(if missing == 0 { ExitCode::SUCCESS } else { ExitCode::from(super::CANNOT) })
}
