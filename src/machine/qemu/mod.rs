//! The QEMU backend: QEMU with its own disks and serial port, and beside it our device process, which serves
//! shares and vsock over vhost-user.
//!
//! A machine boots, or goes on where one was frozen ([`freeze`]); this file brings up either.

mod argv;
mod devices;
pub mod firmware;
mod freeze;
mod key;
mod qmp;
mod vm;

use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::mpsc;
use std::time::Duration;

use rustix::process::{Pid, Signal};

use super::jail::Profile;
use super::launch::{Become, RAM};
use super::server::pair;
use super::slots::Places;
use super::spawn::spawn_jailed;
use super::tail::Tail;
use super::template::{self, Templates};
use super::wire::Wire;
use super::{Accelerator, Backend, Carrier, Identity, Machine, MachineError, Origin, Spec};
use crate::threads;
use argv::{Shape, Start};
use devices::Devices;
use qmp::{Qmp, Version, Watch};
use vm::QemuMachine;

/// The oldest QEMU kiln is built for (8.2): the first whose vhost-user-fs can be part of a frozen machine.
pub const OLDEST: &str = "8.2";
const OLDEST_VERSION: Version = Version { major: 8, minor: 2, micro: 0 };

/// How long QEMU may take to say its version, and what it says at most.
const VERSION_PATIENCE: Duration = Duration::from_secs(10);
const MOST_VERSION_BYTES: u64 = 4096;

/// Where `program` lies: a path, or a name in the folders of `search_path`.
#[must_use]
pub fn find_program(program: &str, search_path: &str) -> Option<PathBuf> {
    let runs = |path: &Path| {
        path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    let candidates: Vec<PathBuf> = if program.contains('/') {
        vec![program.into()]
    } else {
        let folders = search_path.split(':').filter(|folder| !folder.is_empty());
        folders.map(|folder| Path::new(folder).join(program)).collect()
    };
    candidates.into_iter().find(|path| runs(path))
}

/// Starts machines with QEMU.
#[derive(Debug, Clone)]
pub struct Qemu {
    program: PathBuf,
    accelerator: Accelerator,
    templates: Option<Templates>,
}

impl Qemu {
    /// Finds `program` (a path, or a name in the folders of `search_path`).
    ///
    /// # Errors
    /// [`MachineError::Missing`] where there is no such program.
    pub fn find(program: &str, search_path: &str, accelerator: Accelerator) -> Result<Self, MachineError> {
        match find_program(program, search_path) {
            Some(program) => Ok(Self { program, accelerator, templates: None }),
            None => Err(MachineError::Missing { program: program.to_owned() }),
        }
    }

    /// The jail of its process, which opens `files` by name, and serves its guest's network where `network` says so.
    pub fn profile(&self, files: Vec<(String, PathBuf)>, network: bool) -> Profile {
        let program = std::path::absolute(&self.program).unwrap_or_else(|_| self.program.clone());
        Profile::Qemu { program, kvm: self.accelerator == Accelerator::Kvm, files, network, memory: None }
    }

    /// Copies machines from `templates` from now on, where it can.
    pub fn with_templates(self, templates: Templates) -> Self {
        Self { templates: Some(templates), ..self }
    }

    /// Whether it uses KVM.
    pub fn uses_kvm(&self) -> bool {
        self.accelerator == Accelerator::Kvm
    }

    /// Where the program lies.
    pub fn program(&self) -> &Path {
        &self.program
    }
}

/// What a machine that does not simply boot is handed.
enum Origins {
    /// Nothing: it boots.
    Boot,
    /// Memory to boot in, and where its state goes when it is frozen.
    Freeze { ram: OwnedFd, state: OwnedFd },
    /// Memory and state that were frozen; the state comes when the memory is whole.
    Thaw { ram: OwnedFd, state: OwnedFd },
}

impl Backend for Qemu {
    fn start(&self, spec: Spec) -> Result<Box<dyn Machine>, MachineError> {
        let notes = match template::copy(self, &spec)? {
            Ok(machine) => return Ok(Box::new(machine)),
            Err(notes) => notes,
        };
        let devices = match spec.shares.is_empty() && spec.carrier == Carrier::Serial {
            true => None,
            false => Some(Devices::with_shares(spec.carrier, &spec.shares)?),
        };
        let (mut machine, qmp) = self.bring_up(&spec, devices, Origins::Boot)?;
        machine.watch = qmp.watch().map_err(MachineError::io("listen to QEMU"))?;
        machine.notes = notes;
        Ok(Box::new(machine))
    }
}

impl Qemu {
    fn shape<'a>(
        &self,
        spec: &Spec,
        places: &Places<'_>,
        others: &'a [(String, bool)],
        start: Start,
    ) -> Shape<'a> {
        Shape {
            accelerator: self.accelerator,
            memory_bytes: spec.memory_bytes,
            cpus: spec.cpus,
            carrier: spec.carrier,
            cpu: spec.cpu,
            network: spec.network,
            slots: places.slots.map(|disk| disk.is_some()),
            disks: others,
            shares: true,
            start,
        }
    }

    /// Starts QEMU, and waits for its monitor. The machine has `devices` where they are given.
    fn bring_up(
        &self,
        spec: &Spec,
        mut devices: Option<Devices>,
        origins: Origins,
    ) -> Result<(QemuMachine, Qmp), MachineError> {
        let mut descriptors = Vec::new();
        if let Some(devices) = &mut devices {
            descriptors.append(&mut devices.for_qemu);
        }
        let (console, theirs) = pair("make a socket pair")?;
        descriptors.push(("console".to_owned(), theirs));
        let (qmp, theirs) = pair("make a socket pair")?;
        descriptors.push(("qmp".to_owned(), theirs));
        let wire = match (spec.carrier, &devices) {
            (Carrier::Vsock, Some(devices)) => {
                let port = kiln_wire::AGENT_VSOCK_PORT;
                let devices = &devices.server;
                Wire::Awaited(devices.control()?.listen(port).map_err(|error| devices.failure(&error))?)
            }
            _ => {
                let (wire, theirs) = pair("make a socket pair")?;
                descriptors.push(("wire".to_owned(), theirs));
                if let Some(devices) = &devices {
                    // A guest waits for ever for a share that nobody serves any more.
                    let hold = wire.try_clone().map_err(MachineError::io("hold the wire"))?;
                    devices.server.process.hang_up_at_end(hold);
                }
                Wire::Connected(wire)
            }
        };
        let places = Places::of(&spec.disks);
        for (index, disk) in places.numbered() {
            let file = disk.file.try_clone().map_err(MachineError::io("hold a disk"))?;
            descriptors.push((format!("disk{index}"), file));
        }
        let others: Vec<(String, bool)> =
            places.others.iter().map(|disk| (disk.serial.clone(), disk.read_only)).collect();
        let (start, origin) = match origins {
            Origins::Boot => (Start::Boot, Origin::Boot),
            Origins::Freeze { ram, state } => {
                descriptors.extend([(RAM.to_owned(), ram), ("state".to_owned(), state)]);
                (Start::Freeze, Origin::Boot)
            }
            Origins::Thaw { ram, state } => {
                descriptors.extend([(RAM.to_owned(), ram), ("state".to_owned(), state)]);
                (Start::Thaw, Origin::Template)
            }
        };
        let mut files = Vec::new();
        if start != Start::Thaw {
            files.push(("kernel".to_owned(), spec.kernel.clone()));
            files.push(("initramfs".to_owned(), spec.initramfs.clone()));
        }
        let shape = Shape { shares: devices.is_some(), ..self.shape(spec, &places, &others, start) };
        let arguments = argv::arguments(&shape);
        let qemu = Become::Qemu { profile: self.profile(files, spec.network), arguments };
        let (process, held) = spawn_jailed(qemu, &descriptors).map_err(MachineError::io("start QEMU"))?;
        // QEMU and the device process hold the other ends now; with ours gone, their death closes the streams.
        drop(descriptors);
        let devices = devices.map(|devices| devices.server);
        let console = Tail::follow(console).map_err(MachineError::io("read the console"))?;
        let mut machine = QemuMachine {
            identity: Identity {
                backend: "qemu".to_owned(),
                accelerator: self.accelerator,
                jail: devices.iter().fold(held, |held, devices| held.both(&devices.held)),
                origin,
            },
            wire,
            console,
            disks: places.serials(),
            watch: Watch::default(),
            process,
            devices,
            notes: Vec::new(),
        };
        let opened = Qmp::open(qmp).map_err(|_| {
            // Nobody waits for what a monitor that is not there says.
            machine.watch = Watch::ended();
            self.died_at_start(&mut machine)
        })?;
        if opened.version < OLDEST_VERSION {
            return Err(MachineError::TooOld { found: opened.version.to_string() });
        }
        machine.identity.backend = format!("qemu {}", opened.version);
        Ok((machine, opened))
    }

    /// A QEMU that gave up before its monitor answered: too old for the command line, or broken.
    fn died_at_start(&self, machine: &mut QemuMachine) -> MachineError {
        let death = machine.death(Duration::from_secs(2));
        match self.version() {
            Some(version) if version < OLDEST_VERSION => MachineError::TooOld { found: version.to_string() },
            _ => MachineError::DiedAtStart(death),
        }
    }

    /// What `--version` says, if it says it in time.
    fn version(&self) -> Option<Version> {
        let mut command = std::process::Command::new(&self.program);
        // A group of its own, so that what it may start itself ends with it.
        command
            .arg("--version")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .process_group(0);
        let mut child = command.spawn().ok()?;
        let (sender, said) = mpsc::channel();
        let stdout = child.stdout.take()?.take(MOST_VERSION_BYTES);
        // Ends with the group's last process, of which none is left below. Where there is no thread, nothing was said.
        let _ = threads::start("version", move || sender.send(io::read_to_string(stdout)));
        let said = said.recv_timeout(VERSION_PATIENCE);
        if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
            let _ = rustix::process::kill_process_group(group, Signal::KILL);
        }
        let _ = child.wait();
        let text = said.ok()?.ok()?;
        let mut numbers = text.split_whitespace().nth(3)?.split('.').map_while(|part| part.parse().ok());
        Some(Version { major: numbers.next()?, minor: numbers.next()?, micro: numbers.next().unwrap_or(0) })
    }

    /// QEMU's version as its program prints it; none where it does not within some seconds.
    pub fn version_text(&self) -> Option<String> {
        self.version().map(|version| version.to_string())
    }

    /// Whether the program is new enough.
    pub fn is_new_enough(&self) -> bool {
        self.version().is_some_and(|version| version >= OLDEST_VERSION)
    }
}
