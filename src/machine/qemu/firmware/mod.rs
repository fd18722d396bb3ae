//! A machine with real firmware, for systems that kiln did not build: no agent, no shares, no template. `boot` starts
//! it and judges what it prints.
//!
//! QEMU is in its jail as for any machine, and so is the emulated TPM beside it. A machine with a network is the
//! exception: QEMU serves it itself, and keeps the host's network for that.

mod argv;

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create};
use serde_json::{Value, json};

use super::qmp::{Commands, Qmp};
use super::{OLDEST_VERSION, Qemu};
use crate::machine::jail::{Held, Profile};
use crate::machine::launch::Become;
use crate::machine::server::pair;
use crate::machine::spawn::{Process, spawn_jailed};
use crate::machine::{Death, Identity, MachineError, Origin};
use crate::threads;
use argv::{DiskShape, SCREEN_SET, Shape};

/// How a disk is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bus {
    /// virtio-blk.
    Virtio,
    /// An NVMe namespace.
    Nvme,
    /// A USB stick.
    Usb,
    /// A SATA disk.
    Sata,
}

/// How the bytes of a disk's file are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// As they are.
    Raw,
    /// As qcow2, without the files that its header names.
    Qcow2,
}

/// A disk of a machine with firmware.
#[derive(Debug)]
pub struct BootDisk {
    /// The file.
    pub file: OwnedFd,
    /// How its bytes are read.
    pub format: Format,
    /// How it is attached.
    pub bus: Bus,
    /// Whether the guest may not write.
    pub read_only: bool,
    /// An empty qcow2 file that takes what the guest writes, so that `file` stays as it is.
    pub layer: Option<OwnedFd>,
}

/// What network the guest has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// None.
    None,
    /// QEMU's user network.
    User {
        /// Whether a port of the host's on 127.0.0.1 leads to the guest's port 22.
        ssh: bool,
        /// Whether the guest reaches the host and what lies beyond.
        outside: bool,
    },
}

/// An emulated TPM.
#[derive(Debug, Clone)]
pub struct Tpm {
    /// swtpm.
    pub program: PathBuf,
    /// The folder of its state.
    pub state: PathBuf,
}

/// What such a machine is made of.
#[derive(Debug)]
pub struct FirmwareSpec {
    /// The firmware, open for reading.
    pub code: OwnedFd,
    /// Its variable store, open for writing.
    pub vars: OwnedFd,
    /// Whether the firmware is built to guard its variables by system management mode.
    pub smm: bool,
    /// Guest memory.
    pub memory_bytes: u64,
    /// Virtual processors.
    pub cpus: u16,
    /// Disks, in the order in which the firmware tries them.
    pub disks: Vec<BootDisk>,
    /// The TPM, where it has one.
    pub tpm: Option<Tpm>,
    /// Its network.
    pub network: Network,
}

/// What a machine does by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestEvent {
    /// The guest restarted its machine.
    Reset,
    /// The guest switched it off.
    PowerOff,
    /// QEMU is gone, whatever the reason.
    Ended,
}

/// A machine with firmware that runs. Dropping it kills and reaps all of it.
#[derive(Debug)]
pub struct FirmwareMachine {
    identity: Identity,
    console: Option<UnixStream>,
    commands: Commands,
    // The same file twice: where QEMU writes, and where it is read.
    screen: (OwnedFd, File),
    // QEMU dies before its TPM.
    process: Process,
    _tpm: Option<Process>,
}

impl Qemu {
    /// Starts a machine with firmware, which tells `told` what it does. `told` runs in a thread of its own.
    ///
    /// # Errors
    /// [`MachineError`] where the host cannot run it.
    pub fn start_firmware(
        &self,
        spec: FirmwareSpec,
        mut told: impl FnMut(GuestEvent) + Send + 'static,
    ) -> Result<FirmwareMachine, MachineError> {
        let shapes: Vec<DiskShape> = spec
            .disks
            .iter()
            .map(|disk| DiskShape {
                bus: disk.bus,
                format: disk.format,
                read_only: disk.read_only,
                overlay: disk.layer.is_some(),
            })
            .collect();
        let arguments = argv::arguments(&Shape {
            accelerator: self.accelerator,
            memory_bytes: spec.memory_bytes,
            cpus: spec.cpus,
            smm: spec.smm,
            tpm: spec.tpm.is_some(),
            network: spec.network,
            disks: &shapes,
        });
        let mut descriptors = vec![("code".to_owned(), spec.code), ("vars".to_owned(), spec.vars)];
        for (index, disk) in spec.disks.into_iter().enumerate() {
            descriptors.push((format!("disk{index}"), disk.file));
            descriptors.extend(disk.layer.map(|layer| (format!("layer{index}"), layer)));
        }
        let (console, theirs) = pair("make a socket pair")?;
        descriptors.push(("console".to_owned(), theirs));
        let (qmp, theirs) = pair("make a socket pair")?;
        descriptors.push(("qmp".to_owned(), theirs));
        let (screen, read) = screen().map_err(MachineError::io("make a file for screenshots"))?;
        let held_screen = screen.try_clone().map_err(MachineError::io("hold the screenshots"))?;
        descriptors.push(("screen".to_owned(), screen));
        let (tpm, tpm_held) = match spec.tpm {
            Some(tpm) => {
                let (control, theirs) = pair("make a socket pair")?;
                descriptors.push(("tpm".to_owned(), theirs));
                let (process, held) = start_tpm(tpm, control.into())?;
                (Some(process), Some(held))
            }
            None => (None, None),
        };
        let Profile::Qemu { program, kvm, files, memory, .. } = self.profile(Vec::new(), false) else {
            return Err(MachineError::Device("QEMU's jail is none of QEMU's".to_owned()));
        };
        let profile = Profile::Qemu { program, kvm, files, memory, network: spec.network != Network::None };
        let qemu = Become::Qemu { profile, arguments };
        let (mut process, held) = spawn_jailed(qemu, &descriptors).map_err(MachineError::io("start QEMU"))?;
        drop(descriptors);
        let Ok(opened) = Qmp::open(qmp) else {
            return Err(MachineError::DiedAtStart(death(&mut process)));
        };
        if opened.version < OLDEST_VERSION {
            return Err(MachineError::TooOld { found: opened.version.to_string() });
        }
        let identity = Identity {
            backend: format!("qemu {}", opened.version),
            accelerator: self.accelerator,
            jail: tpm_held.iter().fold(held, Held::both),
            origin: Origin::Boot,
        };
        // The channel ends with the connection, and so says that QEMU is gone.
        let (events, queue) = mpsc::channel();
        let commands =
            opened.split(move |event| drop(events.send(event))).map_err(MachineError::io("speak to QEMU"))?;
        let passing = threads::start("events", move || pass_on(&queue, &mut told));
        passing.map_err(MachineError::io("speak to QEMU"))?;
        Ok(FirmwareMachine {
            identity,
            console: Some(console),
            commands,
            screen: (held_screen, read),
            process,
            _tpm: tpm,
        })
    }
}

/// Passes on what QEMU tells until it is gone.
fn pass_on(queue: &Receiver<Value>, told: &mut impl FnMut(GuestEvent)) {
    for event in queue {
        let guest = event["data"]["guest"] == true;
        match event["event"].as_str() {
            Some("RESET") if guest => told(GuestEvent::Reset),
            Some("SHUTDOWN") if guest => told(GuestEvent::PowerOff),
            _ => {}
        }
    }
    told(GuestEvent::Ended);
}

/// The host's port in what QEMU's monitor tells of its user network: `TCP[HOST_FORWARD] 3 127.0.0.1 46055 …`.
fn forwarded_port(told: &str) -> Option<u16> {
    let line = told.lines().find(|line| line.trim_start().starts_with("TCP[HOST_FORWARD]"))?;
    line.split_whitespace().nth(3)?.parse().ok()
}

fn start_tpm(tpm: Tpm, control: OwnedFd) -> Result<(Process, Held), MachineError> {
    let arguments = ["socket", "--tpm2", "--ctrl", "type=unixio,clientfd={control}", "--tpmstate"]
        .map(str::to_owned)
        .into_iter()
        .chain(["dir={state},mode=0600".to_owned(), "--terminate".to_owned()])
        .collect();
    let profile = Profile::Tpm { program: tpm.program, state: tpm.state };
    let tpm = Become::Tpm { profile, arguments };
    spawn_jailed(tpm, &[("control".to_owned(), control)]).map_err(MachineError::io("start swtpm"))
}

/// A file without a name, which QEMU can only write, and the same for reading. QEMU asks of a descriptor that it
/// can do exactly what is wanted.
fn screen() -> io::Result<(OwnedFd, File)> {
    let file = memfd_create("screen", MemfdFlags::CLOEXEC)?;
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let writable = rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    Ok((writable, file.into()))
}

fn death(process: &mut Process) -> Death {
    let status = process.wait(Duration::from_secs(2));
    Death::Killed {
        program: "QEMU".into(),
        status: status
            .map_or_else(|| "still running, but not answering".to_owned(), |status| status.to_string()),
        said: process.said(),
    }
}

impl FirmwareMachine {
    /// What it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The serial console; once.
    pub fn take_console(&mut self) -> Option<UnixStream> {
        self.console.take()
    }

    /// The port on 127.0.0.1 that leads to the guest's port 22.
    ///
    /// # Errors
    /// There is none, or QEMU is gone.
    pub fn ssh_port(&mut self) -> io::Result<u16> {
        let told =
            self.commands.execute("human-monitor-command", &json!({"command-line": "info usernet"}))?;
        told.as_str()
            .and_then(forwarded_port)
            .ok_or_else(|| io::Error::other("QEMU forwards no port to the guest"))
    }

    /// What is on the screen, as PNG.
    ///
    /// # Errors
    /// QEMU refuses (one that was built without libpng), or is gone.
    pub fn screenshot(&mut self) -> io::Result<Vec<u8>> {
        let (writable, read) = &mut self.screen;
        // QEMU's descriptor shares the offset of ours.
        rustix::fs::ftruncate(&*writable, 0)?;
        rustix::fs::seek(&*writable, rustix::fs::SeekFrom::Start(0))?;
        let filename = format!("/dev/fdset/{SCREEN_SET}");
        self.commands.execute("screendump", &json!({"filename": filename, "format": "png"}))?;
        let mut bytes = Vec::new();
        read.rewind()?;
        read.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// What QEMU said at its end, where it ended by itself with an error.
    pub fn complaint(&mut self) -> Option<String> {
        let status = self.process.wait(Duration::from_millis(500))?;
        (!status.success()).then(|| format!("QEMU ended ({status}): {}", self.process.said()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_that_leads_to_the_guest_is_read_from_what_qemu_tells() {
        let told = "Hub -1 (net):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n  \
                    TCP[HOST_FORWARD]   3       127.0.0.1 46055       10.0.2.15    22     0     0\r\n";
        assert_eq!(forwarded_port(told), Some(46055));
        assert_eq!(forwarded_port("Hub -1 (net):\r\n"), None);
    }
}
