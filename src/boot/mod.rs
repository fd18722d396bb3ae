//! `kiln boot`: a system that kiln need not have built, on real firmware, held against what it should print and do.
//!
//! [`boot`] takes a [`Boot`]: an image ([`image`]), [`firmware`] with or without keys, and a [`script`]. It starts the
//! machine, lets [`trial`] carry the script out, and leaves pictures and a timeline where it is told to. The image stays
//! as it is: what the guest writes goes to a [`layer`] that dies with the machine, unless it is said otherwise. Keys are
//! in the variables from the beginning, or the firmware takes them first ([`enrol`]).

pub mod console;
mod disks;
mod enrol;
pub mod firmware;
pub mod folder;
pub mod image;
mod layer;
pub mod report;

mod ssh;
mod stage;
pub mod trial;
mod vars;

use kiln_artifact::fat::Label;
use kiln_digest::Digest;
use std::fs;
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use crate::apart::{self, Kept, Overlap};
use crate::machine::qemu::firmware::{Bus, FirmwareMachine, FirmwareSpec, Format, GuestEvent, Network, Tpm};
use crate::machine::qemu::{Qemu, find_program};
use crate::machine::{Identity, MachineError};
use crate::plan::script::{self, Statement, Step};
use crate::plan::{harmless, show_duration};
use crate::threads;
pub use enrol::EnrolError;
use firmware::{Firmware, FirmwareError, SecureBoot};
use folder::FolderError;
use image::{ImageError, Subject};
use ssh::Ssh;
pub use ssh::SshError;
use stage::{Report, Stage};
use trial::{Input, Moment, Outcome, Rig, What};
use vars::Vars;
pub use vars::VarsError;

/// What a machine has for a TPM.
const TPM: &str = "swtpm";

/// A disk that is named for a machine.
#[derive(Debug, Clone)]
pub struct DiskChoice {
    /// An image, a folder or a program.
    pub path: PathBuf,
    /// How its bytes are read, where that is said.
    pub format: Option<Format>,
    /// How it is attached.
    pub bus: Bus,
    /// Whether what the guest writes stays.
    pub keep_writes: bool,
    /// What the partition of a folder is called.
    pub label: Option<Label>,
}

/// How commands get in.
#[derive(Debug, Clone)]
pub struct SshChoice {
    /// Who.
    pub user: String,
    /// The private key's file.
    pub key: PathBuf,
    /// The file of the guest's public host key, where it is known.
    pub host_key: Option<PathBuf>,
}

/// What is to be booted, on what, and what it should do.
#[derive(Debug)]
pub struct Boot {
    /// Disks, in the order in which the firmware tries them.
    pub disks: Vec<DiskChoice>,
    /// Secure Boot.
    pub secure_boot: SecureBoot,
    /// Firmware that was named, instead of the host's.
    pub firmware: Option<Firmware>,
    /// A file that keeps the variables between runs.
    pub vars: Option<PathBuf>,
    /// swtpm, where the machine is to have a TPM.
    pub tpm: Option<PathBuf>,
    /// Guest memory.
    pub memory_bytes: u64,
    /// Virtual processors; none: two, and one where they are emulated. On a busy host the second of two emulated ones has been seen
    /// never to get a timer's interrupt, and a system does not start faster with it.
    pub cpus: Option<u16>,
    /// Whether the guest reaches the host's network.
    pub network: bool,
    /// How `ssh` gets in.
    pub ssh: Option<SshChoice>,
    /// What it should do.
    pub script: Vec<Statement>,
    /// A folder for pictures, the console and the timeline.
    pub report: Option<PathBuf>,
    /// A folder for files of the machine's, which are gone afterwards.
    pub scratch: PathBuf,
}

/// What is told while it boots.
#[derive(Debug)]
pub enum Told<'a> {
    /// The machine runs.
    Started(&'a Identity),
    /// Something happened.
    Moment(&'a Moment),
    /// Something that is worth knowing.
    Note(String),
    /// Something could not be done that is not the guest's fault.
    Warning(String),
}

/// How it went.
#[derive(Debug)]
pub struct Verdict {
    /// Against the script.
    pub outcome: Outcome,
    /// All that happened, but the lines that were printed.
    pub moments: Vec<Moment>,
    /// From the machine's start to the end.
    pub total: Duration,
}

/// Why nothing was judged.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A disk shows signing keys.
    #[error(transparent)]
    Overlap(#[from] Overlap),
    /// A folder.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The firmware.
    #[error(transparent)]
    Firmware(#[from] FirmwareError),
    /// The variables.
    #[error(transparent)]
    Vars(#[from] VarsError),
    /// Enrolment.
    #[error(transparent)]
    Enrol(#[from] EnrolError),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// ssh.
    #[error(transparent)]
    Ssh(#[from] SshError),
    /// No TPM can be had.
    #[error("`{TPM}` was not found")]
    NoTpm,
    /// A disk is too large for a layer over it.
    #[error("{} is too large to be kept unchanged", .0.display())]
    TooLarge(PathBuf),
    /// A folder or a program cannot be written back to.
    #[error("what the guest writes can be kept in the image of a disk only, and {} is none", .0.display())]
    NotKept(PathBuf),
    /// The script wants ssh, and there is no key.
    #[error("{place} needs a key to get in with")]
    NoKey {
        /// The statement's place.
        place: String,
    },
    /// The script looks at a command's output before there was one.
    #[error("{place} has no command over ssh before it")]
    NoCommand {
        /// The statement's place.
        place: String,
    },
    /// The script wants a picture, and there is no report.
    #[error("{place} needs a folder for its picture")]
    NoReport {
        /// The statement's place.
        place: String,
    },
    /// The host.
    #[error("cannot {what}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The system's word.
        #[source]
        source: io::Error,
    },
}

impl BootError {
    /// What the user can do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Image(error) => error.hint(),
            Self::Overlap(overlap) => Some(overlap.hint().to_owned()),
            Self::Folder(error) => error.hint(),
            Self::Firmware(error) => error.hint(),
            Self::Vars(error) => error.hint(),
            Self::Enrol(error) => error.hint(),
            Self::Machine(error) => error.hint(),
            Self::Ssh(error) => error.hint(),
            Self::NoTpm => Some("install swtpm (Debian: apt install swtpm)".to_owned()),
            Self::NoKey { .. } => Some("name a private key with --ssh-key".to_owned()),
            Self::NoReport { .. } => Some("name one with --report".to_owned()),
            _ => None,
        }
    }

    /// Whether this host lacks something.
    #[must_use]
    pub fn is_the_hosts(&self) -> bool {
        matches!(
            self,
            Self::NoTpm
                | Self::Firmware(FirmwareError::Missing { .. } | FirmwareError::NoVendorKeys)
                | Self::Enrol(EnrolError::NoEnroller)
                | Self::Machine(MachineError::Missing { .. } | MachineError::TooOld { .. })
        )
    }

    /// Whether the user asked for something that cannot be.
    #[must_use]
    pub fn is_the_users(&self) -> bool {
        match self {
            Self::Folder(error) => error.is_the_users(),
            Self::Vars(error) => error.is_the_users(),
            Self::Ssh(error) => error.is_the_users(),
            Self::Image(_)
            | Self::Overlap(_)
            | Self::Firmware(FirmwareError::NoKey { .. } | FirmwareError::NotAKey(_))
            | Self::NotKept(_)
            | Self::Enrol(EnrolError::NoFile { .. })
            | Self::NoKey { .. }
            | Self::NoCommand { .. }
            | Self::NoReport { .. } => true,
            _ => false,
        }
    }

    fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}

/// Whether what is asked for can be: what is no image, a disk that would show `secrets`, and keys that are not there.
/// Nothing of the host's is needed.
///
/// # Errors
/// [`BootError`], the user's.
pub fn check(boot: &Boot, secrets: &Path) -> Result<(), BootError> {
    let mut ran = false;
    for statement in &boot.script {
        let place = || statement.place.clone();
        match &statement.step {
            Step::Ssh { .. } if boot.ssh.is_none() => return Err(BootError::NoKey { place: place() }),
            Step::Ssh { .. } => ran = true,
            Step::Output(_) if !ran => return Err(BootError::NoCommand { place: place() }),
            Step::Screenshot(_) if boot.report.is_none() => {
                return Err(BootError::NoReport { place: place() });
            }
            _ => {}
        }
    }
    for choice in &boot.disks {
        apart::refuse("disk", &choice.path, Kept::Secrets, secrets)?;
        match image::look(&choice.path, choice.format, choice.keep_writes && choice.path.is_file())? {
            Subject::Disk(..) => {}
            _ if choice.keep_writes => return Err(BootError::NotKept(choice.path.clone())),
            Subject::Folder => folder::check(&choice.path)?,
            Subject::Program(_) => {}
        }
    }
    match &boot.secure_boot {
        SecureBoot::Keys(folder) => drop(firmware::keys(folder)?),
        SecureBoot::Enrol(folder) => enrol::check(folder)?,
        SecureBoot::Off | SecureBoot::Setup | SecureBoot::Vendor => {}
    }
    Ok(())
}

/// Finds what a machine has for a TPM.
///
/// # Errors
/// [`BootError::NoTpm`].
pub fn find_tpm(search_path: &str) -> Result<PathBuf, BootError> {
    find_program(TPM, search_path).ok_or(BootError::NoTpm)
}

/// What a boot of the host's firmware is known by: names and digests of its files, and of what hands over keys.
///
/// # Errors
/// [`BootError`] where they are not there.
pub fn identify(secure_boot: &SecureBoot) -> Result<Vec<(String, String)>, BootError> {
    let Firmware { code, vars, .. } = firmware::find(secure_boot)?;
    let mut files = vec![("the firmware", code), ("the firmware's variables", vars)];
    if matches!(secure_boot, SecureBoot::Enrol(_)) {
        files.push(("what enrolls keys", enrol::enroller()?));
    }
    let digest = |(name, path): (&str, PathBuf)| {
        let (digest, _) =
            fs::File::open(path).and_then(Digest::of_reader).map_err(BootError::io("read firmware"))?;
        Ok((name.to_owned(), digest.to_string()))
    };
    files.into_iter().map(digest).collect()
}

/// Boots and judges. The caller has let [`check`] look.
///
/// # Errors
/// [`BootError`] where nothing could be judged; a script that is not met is a [`Verdict`].
pub fn boot(qemu: &Qemu, boot: &Boot, told: &mut dyn FnMut(Told<'_>)) -> Result<Verdict, BootError> {
    let wants_ssh = boot.script.iter().any(|statement| matches!(statement.step, Step::Ssh { .. }));
    let scratch =
        tempfile::tempdir_in(&boot.scratch).map_err(BootError::io("make a folder for the machine"))?;
    let firmware = match &boot.firmware {
        Some(firmware) => firmware.clone(),
        None => firmware::find(&boot.secure_boot)?,
    };
    let mut disks = Vec::new();
    for choice in &boot.disks {
        disks.push(disks::disk(choice, scratch.path())?);
    }
    let ssh = match &boot.ssh {
        Some(choice) if wants_ssh => Some(Ssh::new(&choice.user, &choice.key, choice.host_key.as_deref())?),
        _ => None,
    };
    let vars = variables(qemu, boot, &firmware, scratch.path(), told)?;
    let tpm = match &boot.tpm {
        Some(program) => {
            let state = scratch.path().join("tpm");
            fs::create_dir(&state).map_err(BootError::io("make a folder for the TPM"))?;
            Some(Tpm { program: program.clone(), state })
        }
        None => None,
    };
    let spec = FirmwareSpec {
        code: firmware.open_code()?.into(),
        vars: vars.file()?.into(),
        smm: firmware.smm,
        memory_bytes: boot.memory_bytes,
        cpus: boot.cpus.unwrap_or(if qemu.uses_kvm() { 2 } else { 1 }),
        disks,
        tpm,
        network: match (wants_ssh, boot.network) {
            (false, false) => Network::None,
            (ssh, outside) => Network::User { ssh, outside },
        },
    };
    let report =
        boot.report.as_deref().map(Report::open).transpose().map_err(BootError::io("write the report"))?;
    let Running { mut machine, typing, inputs, started, is_gone } = start_machine(qemu, spec)?;
    told(Told::Started(machine.identity()));
    let ssh = match ssh {
        Some(ssh) => Some((ssh, machine.ssh_port().map_err(BootError::io("find the way into the guest"))?)),
        None => None,
    };
    let mut rig =
        Stage { machine, is_gone, typing, ssh, script: &boot.script, report, moments: Vec::new(), told };
    let mut outcome = trial::carry_out(&boot.script, &mut rig, &inputs, started, script::DEFAULT_PATIENCE);
    let total = started.elapsed();
    if let Outcome::Mute(_) = outcome
        && rig.report.is_some()
        && let Err(why) = rig.screenshot("end")
    {
        (rig.told)(Told::Warning(why));
    }
    if outcome == Outcome::Over
        && let Some(complaint) = rig.machine.complaint()
    {
        let complaint = harmless(complaint.as_bytes());
        match died(&complaint, &rig.moments) {
            Some(died) => outcome = died,
            None => (rig.told)(Told::Warning(complaint)),
        }
    }
    Ok(Verdict { outcome, moments: rig.moments, total })
}

/// What an end comes to that no script waited for and that QEMU complains of; none where the guest had switched the machine
/// off before, so that it is nothing against the image.
fn died(complaint: &str, moments: &[Moment]) -> Option<Outcome> {
    let was_switched_off = moments.iter().any(|moment| moment.what == What::PowerOff);
    (!was_switched_off).then(|| Outcome::Died(complaint.to_owned()))
}

/// The variables of the machine: new ones with the keys that are wanted, or those that were kept.
fn variables(
    qemu: &Qemu,
    boot: &Boot,
    firmware: &Firmware,
    scratch: &Path,
    told: &mut dyn FnMut(Told<'_>),
) -> Result<Vars, BootError> {
    let fresh = firmware::variables(firmware, &boot.secure_boot)?;
    let vars = match &boot.vars {
        Some(path) => Vars::kept(path, &fresh)?,
        None => Vars::private(scratch, &fresh)?,
    };
    let have_keys = vars.have_keys()?;
    if let Some(path) = boot.vars.as_deref().filter(|_| vars.is_old) {
        let path = path.display();
        let what = if have_keys { "with the keys that are in them" } else { "which have no keys" };
        told(Told::Note(format!("variables as {path} has them, {what}")));
    }
    match (&boot.secure_boot, have_keys, &boot.vars) {
        (SecureBoot::Keys(_) | SecureBoot::Vendor, false, Some(path)) => {
            Err(VarsError::NoKeys(path.clone()).into())
        }
        (SecureBoot::Enrol(folder), false, _) => {
            let took = enrol::enrol(qemu, firmware.open_code()?, &vars, folder, scratch)?;
            let folder = folder.display();
            told(Told::Note(format!("the firmware took the keys of {folder} in {}", show_duration(took))));
            Ok(vars)
        }
        _ => Ok(vars),
    }
}

/// A machine that was started, and what comes of it.
struct Running {
    machine: FirmwareMachine,
    typing: UnixStream,
    inputs: Receiver<Input>,
    started: Instant,
    /// Whether QEMU is gone, for who cannot wait for `inputs`. Set once, after the last of them that tells of the machine.
    is_gone: Arc<AtomicBool>,
}

fn start_machine(qemu: &Qemu, spec: FirmwareSpec) -> Result<Running, BootError> {
    let (sender, inputs) = mpsc::channel();
    let started = Instant::now();
    let is_gone = Arc::new(AtomicBool::new(false));
    let (events, gone) = (sender.clone(), Arc::clone(&is_gone));
    let mut machine = qemu.start_firmware(spec, move |event| {
        let is_end = event == GuestEvent::Ended;
        drop(events.send(Input::Event(event)));
        if is_end {
            gone.store(true, Ordering::Release);
        }
    })?;
    let console = machine.take_console().ok_or_else(|| BootError::Io {
        what: "read the serial console",
        source: io::ErrorKind::NotConnected.into(),
    })?;
    let typing = console.try_clone().map_err(BootError::io("read the serial console"))?;
    let reading = threads::start("console", move || read_console(console, &sender));
    reading.map_err(BootError::io("read the serial console"))?;
    Ok(Running { machine, typing, inputs, started, is_gone })
}

fn read_console(mut console: UnixStream, sender: &Sender<Input>) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = console.read(&mut buffer) {
        if sender.send(Input::Printed(buffer[..count].to_vec())).is_err() {
            return;
        }
    }
    let _ = sender.send(Input::Silent);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_qemu_took_with_it_has_failed_unless_its_guest_had_ended_it() {
        let moment = |what| Moment { at: Duration::ZERO, what };
        let failed = Some(Outcome::Died("QEMU ended (signal: 9)".to_owned()));
        assert_eq!(died("QEMU ended (signal: 9)", &[]), failed);
        assert_eq!(died("QEMU ended (signal: 9)", &[moment(What::Reset)]), failed);
        assert_eq!(died("QEMU ended (signal: 9)", &[moment(What::Reset), moment(What::PowerOff)]), None);
    }
}
