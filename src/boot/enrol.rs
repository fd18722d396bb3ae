//! Enrolment as on a real machine: firmware in setup mode is handed the .auth files of a folder one by one and takes or
//! refuses each, and only then is the image booted.
//!
//! What hands them over is systemd-boot (`secure-boot-enroll`, loader.conf(5)), which the host has: it writes db, KEK and
//! PK by the firmware's own service and restarts the machine. Nothing of the files is believed here; whether there is
//! a PK afterwards is read in the variables.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::trial::{Answer, Moment, Outcome, Rig};
use super::vars::Vars;
use super::{BootError, Running, folder, start_machine};
use crate::machine::qemu::Qemu;
use crate::machine::qemu::firmware::{BootDisk, Bus, FirmwareSpec, Format, Network};
use crate::plan::script::{self, Statement};

/// What hands them over.
const ENROLLER: &str = "/usr/lib/systemd/boot/efi/systemd-bootx64.efi";
/// The files, as systemd-boot wants them named.
const FILES: [&str; 3] = ["db.auth", "KEK.auth", "PK.auth"];
/// Enough for the firmware and a loader.
const MEMORY_BYTES: u64 = 256 << 20;
/// It tells of each variable that the firmware refuses, and restarts the machine after the last.
const SCRIPT: &str = "within 3m\nreject /Failed|Error/\nreboot";

/// Why keys are not enrolled.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// A file is not there.
    #[error("there is no {name} in {}", .folder.display())]
    NoFile {
        /// Which.
        name: &'static str,
        /// Where it was looked for.
        folder: PathBuf,
    },
    /// The host lacks what hands them over.
    #[error("{ENROLLER} was not found")]
    NoEnroller,
    /// The firmware did not take them.
    #[error("the firmware does not take the keys of {}: {why}", .folder.display())]
    Refused {
        /// Where they are.
        folder: PathBuf,
        /// What was seen of it.
        why: String,
    },
}

impl EnrolError {
    /// What the user can do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NoFile { .. } => Some(
                "`kiln sign --init` and sign-efi-sig-list make them: PK.auth, KEK.auth and db.auth"
                    .to_owned(),
            ),
            Self::NoEnroller => {
                Some("install systemd-boot (Debian: apt install systemd-boot-efi)".to_owned())
            }
            Self::Refused { .. } => None,
        }
    }
}

/// Whether all files are in `folder`.
///
/// # Errors
/// [`EnrolError::NoFile`].
pub fn check(folder: &Path) -> Result<(), EnrolError> {
    match FILES.into_iter().find(|name| !folder.join(name).is_file()) {
        Some(name) => Err(EnrolError::NoFile { name, folder: folder.to_owned() }),
        None => Ok(()),
    }
}

/// What hands them over.
///
/// # Errors
/// [`EnrolError::NoEnroller`].
pub(super) fn enroller() -> Result<PathBuf, EnrolError> {
    let path = PathBuf::from(ENROLLER);
    if path.is_file() { Ok(path) } else { Err(EnrolError::NoEnroller) }
}

/// Lets the firmware `code` take the keys of `keys` into `vars`, with files in `scratch`. Gives how long it took.
///
/// # Errors
/// The host cannot do it, or the firmware refuses.
pub(super) fn enrol(
    qemu: &Qemu,
    code: fs::File,
    vars: &Vars,
    keys: &Path,
    scratch: &Path,
) -> Result<Duration, BootError> {
    enroller()?;
    let esp = scratch.join("enrol");
    fill(&esp, keys).map_err(BootError::io("write the files that enrol the keys"))?;
    let disk = BootDisk {
        file: folder::disk_of_folder(&esp, None, scratch)?,
        format: Format::Raw,
        bus: Bus::Virtio,
        read_only: true,
        layer: None,
    };
    let spec = FirmwareSpec {
        code: code.into(),
        vars: vars.file()?.into(),
        smm: true,
        memory_bytes: MEMORY_BYTES,
        cpus: 1,
        disks: vec![disk],
        tpm: None,
        network: Network::None,
    };
    let statements: Vec<Statement> = script::parse("enrolment", SCRIPT).unwrap_or_default();
    let Running { inputs, started, machine, .. } = start_machine(qemu, spec)?;
    let outcome =
        super::trial::carry_out(&statements, &mut Unattended, &inputs, started, script::DEFAULT_PATIENCE);
    // What it does after the restart is no concern of ours.
    drop(machine);
    let refused = |why| EnrolError::Refused { folder: keys.to_owned(), why };
    match outcome {
        Outcome::NotMet { why, .. } | Outcome::Mute(why) | Outcome::Died(why) => {
            return Err(refused(why).into());
        }
        Outcome::Met | Outcome::Over => {}
    }
    match vars.have_keys()? {
        true => Ok(started.elapsed()),
        false => Err(refused("there is no PK afterwards".to_owned()).into()),
    }
}

/// The disk that systemd-boot starts from.
fn fill(esp: &Path, keys: &Path) -> std::io::Result<()> {
    let auto = esp.join("loader/keys/auto");
    fs::create_dir_all(&auto)?;
    fs::create_dir_all(esp.join("EFI/BOOT"))?;
    fs::copy(ENROLLER, esp.join("EFI/BOOT/BOOTX64.EFI"))?;
    fs::write(esp.join("loader/loader.conf"), "timeout 0\nsecure-boot-enroll force\n")?;
    for name in FILES {
        fs::copy(keys.join(name), auto.join(name))?;
    }
    Ok(())
}

/// Nobody types, and nobody looks.
struct Unattended;

impl Rig for Unattended {
    fn type_in(&mut self, _: &[u8]) -> Result<(), String> {
        Ok(())
    }

    fn ssh(&mut self, _: &str, _: Instant) -> Result<Answer, String> {
        Err("there is no key to get in with".to_owned())
    }

    fn host_key(&mut self) -> Option<String> {
        None
    }

    fn screenshot(&mut self, _: &str) -> Result<(), String> {
        Ok(())
    }

    fn told(&mut self, _: &Moment) {}
}
