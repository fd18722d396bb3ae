//! `kiln boot`: a system that kiln need not have built, on real firmware, held against what it should print and do.
//!
//! [`boot`] takes a [`Boot`]: an image ([`image`]), [`firmware`] with or without keys, and a [`script`]. It starts the
//! machine, lets [`trial`] carry the script out, and leaves pictures and a timeline where it is told to. The image stays
//! as it is: what the guest writes goes to a [`layer`] that dies with the machine, unless it is said otherwise.

pub mod console;
pub mod firmware;
pub mod folder;
pub mod image;
mod layer;
pub mod report;
pub mod script;
mod ssh;
pub mod trial;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::{Duration, Instant};

use crate::machine::qemu::Qemu;
use crate::machine::qemu::firmware::{BootDisk, Bus, FirmwareMachine, FirmwareSpec, Format, Network, Tpm};
use crate::machine::{Identity, MachineError};
use crate::plan::harmless;
use firmware::{Firmware, FirmwareError, SecureBoot};
use folder::FolderError;
use image::{ImageError, Subject};
use script::{Statement, Step};
use ssh::Ssh;
pub use ssh::SshError;
use trial::{Input, Moment, Outcome, Rig, What};

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
    /// swtpm, where the machine is to have a TPM.
    pub tpm: Option<PathBuf>,
    /// Guest memory.
    pub memory_bytes: u64,
    /// Virtual processors.
    pub cpus: u16,
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
    /// A folder.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The firmware.
    #[error(transparent)]
    Firmware(#[from] FirmwareError),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// ssh.
    #[error(transparent)]
    Ssh(#[from] SshError),
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
            Self::Folder(error) => error.hint(),
            Self::Firmware(error) => error.hint(),
            Self::Machine(error) => error.hint(),
            Self::NoKey { .. } => Some("name a private key with --ssh-key".to_owned()),
            _ => None,
        }
    }

    /// Whether this host lacks something.
    #[must_use]
    pub fn is_the_hosts(&self) -> bool {
        matches!(
            self,
            Self::Firmware(FirmwareError::Missing { .. })
                | Self::Machine(MachineError::Missing { .. } | MachineError::TooOld { .. })
        )
    }

    /// Whether the user asked for something that cannot be.
    #[must_use]
    pub fn is_the_users(&self) -> bool {
        match self {
            Self::Folder(error) => error.is_the_users(),
            Self::Image(_)
            | Self::Firmware(FirmwareError::NoKey { .. } | FirmwareError::NotAKey(_))
            | Self::NotKept(_)
            | Self::NoKey { .. }
            | Self::Ssh(SshError::Key { .. }) => true,
            _ => false,
        }
    }

    fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}

/// Whether what is asked for can be: what is no image, and keys that are not there. Nothing of the host's is needed.
///
/// # Errors
/// [`BootError`], the user's.
pub fn check(boot: &Boot) -> Result<(), BootError> {
    let wants_ssh = boot.script.iter().find(|statement| matches!(statement.step, Step::Ssh(_)));
    if let (Some(statement), None) = (wants_ssh, &boot.ssh) {
        return Err(BootError::NoKey { place: statement.place.clone() });
    }
    for choice in &boot.disks {
        match image::look(&choice.path, choice.format, choice.keep_writes && choice.path.is_file())? {
            Subject::Disk(..) => {}
            _ if choice.keep_writes => return Err(BootError::NotKept(choice.path.clone())),
            Subject::Folder => folder::check(&choice.path)?,
            Subject::Program(_) => {}
        }
    }
    if let SecureBoot::Keys(folder) = &boot.secure_boot {
        firmware::keys(folder)?;
    }
    Ok(())
}

/// Boots and judges. The caller has let [`check`] look.
///
/// # Errors
/// [`BootError`] where nothing could be judged; a script that is not met is a [`Verdict`].
pub fn boot(qemu: &Qemu, boot: &Boot, told: &mut dyn FnMut(Told<'_>)) -> Result<Verdict, BootError> {
    let wants_ssh = boot.script.iter().any(|statement| matches!(statement.step, Step::Ssh(_)));
    let scratch =
        tempfile::tempdir_in(&boot.scratch).map_err(BootError::io("make a folder for the machine"))?;
    let firmware = match &boot.firmware {
        Some(firmware) => firmware.clone(),
        None => firmware::find(boot.secure_boot != SecureBoot::Off)?,
    };
    let vars = firmware::variables(&firmware, &boot.secure_boot)?;
    let mut disks = Vec::new();
    for choice in &boot.disks {
        disks.push(disk(choice, scratch.path())?);
    }
    let ssh_port =
        if wants_ssh { Some(free_port().map_err(BootError::io("find a free port"))?) } else { None };
    let ssh = match (&boot.ssh, ssh_port) {
        (Some(choice), Some(port)) => {
            Some(Ssh::new(port, &choice.user, &choice.key, choice.host_key.as_deref())?)
        }
        _ => None,
    };
    let tpm = match &boot.tpm {
        Some(program) => {
            let state = scratch.path().join("tpm");
            fs::create_dir(&state).map_err(BootError::io("make a folder for the TPM"))?;
            Some(Tpm { program: program.clone(), state })
        }
        None => None,
    };
    let code = File::open(&firmware.code)
        .map_err(|source| FirmwareError::Read { path: firmware.code.clone(), source })?;
    let spec = FirmwareSpec {
        code: code.into(),
        vars: nameless(scratch.path(), &vars)?,
        smm: firmware.smm,
        memory_bytes: boot.memory_bytes,
        cpus: boot.cpus,
        disks,
        tpm,
        network: match (ssh_port, boot.network) {
            (None, false) => Network::None,
            (ssh_port, outside) => Network::User { ssh_port, outside },
        },
    };
    let report =
        boot.report.as_deref().map(Report::open).transpose().map_err(BootError::io("write the report"))?;
    let (sender, inputs) = mpsc::channel();
    let started = Instant::now();
    let events = sender.clone();
    let mut machine = qemu.start_firmware(spec, move |event| drop(events.send(Input::Event(event))))?;
    told(Told::Started(machine.identity()));
    let console = machine.take_console().ok_or_else(|| BootError::Io {
        what: "read the serial console",
        source: io::ErrorKind::NotConnected.into(),
    })?;
    let typing = console.try_clone().map_err(BootError::io("read the serial console"))?;
    thread::spawn(move || read_console(console, &sender));
    let mut rig = Stage { machine, typing, ssh, script: &boot.script, report, moments: Vec::new(), told };
    let outcome = trial::carry_out(&boot.script, &mut rig, &inputs, started);
    let total = started.elapsed();
    if outcome == Outcome::Over
        && let Some(complaint) = rig.machine.complaint()
    {
        (rig.told)(Told::Warning(harmless(complaint.as_bytes())));
    }
    Ok(Verdict { outcome, moments: rig.moments, total })
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

/// A port of the host that nobody listens at. Somebody may take it before QEMU does, which then says so.
fn free_port() -> io::Result<u16> {
    Ok(std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

/// A file of these bytes that has no name.
fn nameless(folder: &Path, bytes: &[u8]) -> Result<OwnedFd, BootError> {
    let make = || {
        let mut file = tempfile::tempfile_in(folder)?;
        file.write_all(bytes)?;
        io::Result::Ok(file)
    };
    Ok(make().map_err(BootError::io("write a file of the machine's"))?.into())
}

fn disk(choice: &DiskChoice, scratch: &Path) -> Result<BootDisk, BootError> {
    let subject = image::look(&choice.path, choice.format, choice.keep_writes)?;
    let (file, format): (OwnedFd, Format) = match subject {
        Subject::Disk(file, format) => (file.into(), format),
        Subject::Folder => (folder::disk_of_folder(&choice.path, scratch)?, Format::Raw),
        Subject::Program(_) => (folder::disk_of_program(&choice.path, scratch)?, Format::Raw),
    };
    let layer = match choice.keep_writes {
        true => None,
        false => {
            let size = disk_size(&file, format).map_err(BootError::io("read the size of a disk"))?;
            let bytes = layer::empty(size).ok_or_else(|| BootError::TooLarge(choice.path.clone()))?;
            Some(nameless(scratch, &bytes)?)
        }
    };
    Ok(BootDisk { file, format, bus: choice.bus, read_only: false, layer })
}

/// How large a guest sees the disk: a multiple of a sector, as QEMU rounds.
fn disk_size(file: &OwnedFd, format: Format) -> io::Result<u64> {
    let mut file = File::from(file.try_clone()?);
    match format {
        // A block device has its size at its end.
        Format::Raw => Ok(io::Seek::seek(&mut file, io::SeekFrom::End(0))?.next_multiple_of(512)),
        Format::Qcow2 => {
            let mut size = [0; 8];
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut size, 24)?;
            Ok(u64::from_be_bytes(size))
        }
    }
}

/// The folder of a report.
struct Report {
    folder: PathBuf,
    console: File,
    timeline: File,
    pictures: usize,
}

impl Report {
    fn open(folder: &Path) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        Ok(Self {
            console: File::create(folder.join("console.txt"))?,
            timeline: File::create(folder.join("timeline.jsonl"))?,
            folder: folder.to_owned(),
            pictures: 0,
        })
    }

    fn note(&mut self, moment: &Moment, script: &[Statement]) -> io::Result<()> {
        if let What::Line(line) = &moment.what {
            writeln!(self.console, "[{:9.3}] {}", moment.at.as_secs_f64(), harmless(line))?;
        }
        writeln!(self.timeline, "{}", report::timeline(moment, script))
    }

    fn picture(&mut self, index: usize, failed: bool, png: &[u8]) -> io::Result<()> {
        self.pictures += 1;
        let verdict = if failed { "failed" } else { "met" };
        fs::write(
            self.folder.join(format!("{:02}-statement-{}-{verdict}.png", self.pictures, index + 1)),
            png,
        )
    }
}

/// A machine as a trial sees it.
struct Stage<'a> {
    machine: FirmwareMachine,
    typing: UnixStream,
    ssh: Option<Ssh>,
    script: &'a [Statement],
    report: Option<Report>,
    moments: Vec<Moment>,
    told: &'a mut dyn FnMut(Told<'_>),
}

impl Rig for Stage<'_> {
    fn type_in(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.typing.write_all(bytes).map_err(|error| format!("cannot type: {error}"))
    }

    fn ssh(&mut self, command: &str, deadline: Instant) -> Result<(), String> {
        let ssh = self.ssh.as_ref().ok_or("there is no key to get in with")?;
        ssh.run(command, deadline).map(drop)
    }

    fn told(&mut self, moment: &Moment) {
        (self.told)(Told::Moment(moment));
        if let Some(report) = &mut self.report {
            let mut written = report.note(moment, self.script);
            if let What::Verdict { index, failure, .. } = &moment.what
                && let Ok(png) = self.machine.screenshot()
            {
                written = written.and_then(|()| report.picture(*index, failure.is_some(), &png));
            }
            if let Err(error) = written {
                (self.told)(Told::Warning(format!("the report cannot be written any more: {error}")));
                self.report = None;
            }
        }
        if !matches!(moment.what, What::Line(_)) {
            self.moments.push(moment.clone());
        }
    }
}
