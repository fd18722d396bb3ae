//! The QEMU backend: QEMU with its own disks and serial port, and beside it our device process, which serves
//! shares and vsock over vhost-user.

mod argv;
mod qmp;

use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use kiln_virtio::control;
use kiln_virtio::fs::record::Record;
use rustix::process::{Pid, Signal};

use super::jail::{Held, Profile};
use super::launch::{Become, SHARE};
use super::spawn::{Process, spawn_jailed};
use super::tail::Tail;
use super::{Accelerator, Backend, Carrier, Death, Identity, Machine, MachineError, Share, Spec};
use qmp::{DiskTrouble, Qmp, Version, Watch};

/// The oldest QEMU kiln is built for (8.2): the first whose vhost-user-fs can be part of a frozen machine.
pub const OLDEST: &str = "8.2";
const OLDEST_VERSION: Version = Version { major: 8, minor: 2, micro: 0 };

/// How long a process that closed its streams may take to be gone.
const REAP_PATIENCE: Duration = Duration::from_millis(500);
/// How long QEMU may take to say its version, and what it says at most.
const VERSION_PATIENCE: Duration = Duration::from_secs(10);
const MOST_VERSION_BYTES: u64 = 4096;
/// How long an agent may take to connect over vsock.
const WIRE_PATIENCE: Duration = Duration::from_secs(90);

/// The guest's vsock address; each machine has a device process of its own, so all may have the same.
const GUEST_CID: u64 = 3;

/// Starts machines with QEMU.
#[derive(Debug, Clone)]
pub struct Qemu {
    program: PathBuf,
    accelerator: Accelerator,
}

impl Qemu {
    /// Finds `program` (a path, or a name in the folders of `search_path`).
    ///
    /// # Errors
    /// [`MachineError::Missing`] where there is no such program.
    pub fn find(program: &str, search_path: &str, accelerator: Accelerator) -> Result<Self, MachineError> {
        let runs = |path: &Path| {
            path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
        };
        let candidates: Vec<PathBuf> = if program.contains('/') {
            vec![program.into()]
        } else {
            search_path
                .split(':')
                .filter(|folder| !folder.is_empty())
                .map(|f| Path::new(f).join(program))
                .collect()
        };
        match candidates.into_iter().find(|path| runs(path)) {
            Some(program) => Ok(Self { program, accelerator }),
            None => Err(MachineError::Missing { program: program.to_owned() }),
        }
    }

    /// The jail of its process, which opens `files` by name.
    pub fn profile(&self, files: Vec<(String, PathBuf)>) -> Profile {
        let program = std::path::absolute(&self.program).unwrap_or_else(|_| self.program.clone());
        Profile::Qemu { program, kvm: self.accelerator == Accelerator::Kvm, files }
    }

    /// Where the program lies.
    pub fn program(&self) -> &Path {
        &self.program
    }
}

/// One end for us, one to be handed over.
fn pair(what: &'static str) -> Result<(UnixStream, OwnedFd), MachineError> {
    let (ours, theirs) = UnixStream::pair().map_err(MachineError::io(what))?;
    Ok((ours, theirs.into()))
}

/// A listening socket for a device, and the connection to it for QEMU. The name exists only within this function.
fn listening_pair() -> Result<(OwnedFd, OwnedFd), MachineError> {
    let make = || {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path)?;
        let connected = UnixStream::connect(&path)?;
        io::Result::Ok((listener.into(), connected.into()))
    };
    make().map_err(MachineError::io("make a socket for a device"))
}

/// The parent's and QEMU's side of the device process.
struct Devices {
    process: Process,
    held: Held,
    control: control::Client,
    /// vhost-user connections for QEMU: of fs, and of vsock where it carries the wire.
    for_qemu: Vec<(String, OwnedFd)>,
}

impl Devices {
    fn start(shares: Vec<Share>, carrier: Carrier) -> Result<Self, MachineError> {
        let (control, theirs) = pair("make a socket pair")?;
        let (device_fs, qemu_fs) = listening_pair()?;
        let mut for_qemu = vec![("fs".to_owned(), qemu_fs)];
        let mut for_process = vec![("control".to_owned(), theirs), ("fs".to_owned(), device_fs)];
        if carrier == Carrier::Vsock {
            let (device_vsock, qemu_vsock) = listening_pair()?;
            for_qemu.push(("vsock".to_owned(), qemu_vsock));
            for_process.push(("vsock".to_owned(), device_vsock));
        }
        let vsock_cid = (carrier == Carrier::Vsock).then_some(GUEST_CID);
        for (index, share) in shares.iter().enumerate() {
            let directory = share.directory.try_clone().map_err(MachineError::io("hold a share"))?;
            for_process.push((format!("{SHARE}{index}"), directory));
        }
        let (process, held) = spawn_jailed(Become::Devices { vsock_cid }, &for_process)
            .map_err(MachineError::io("start the device process"))?;
        // With ours gone, its end closes the connection, and nobody waits for its answer.
        drop(for_process);
        let control =
            control::Client::new(control).map_err(MachineError::io("speak to the device process"))?;
        let devices = Self { process, held, control, for_qemu };
        for share in shares {
            devices
                .control
                .add_share(share.name.as_bytes(), share.directory.as_fd(), share.attributes)
                .and_then(|()| devices.control.hide(share.name.as_bytes(), &share.hidden))
                .map_err(|error| devices.failure(&error))?;
        }
        Ok(devices)
    }

    fn failure(&self, error: &dyn std::fmt::Display) -> MachineError {
        let said = self.process.said();
        MachineError::Device(if said.is_empty() { error.to_string() } else { format!("{error}: {said}") })
    }
}

impl Backend for Qemu {
    fn start(&self, spec: Spec) -> Result<Box<dyn Machine>, MachineError> {
        let mut descriptors = Vec::new();
        let profile = self.profile(vec![
            ("kernel".to_owned(), spec.kernel.clone()),
            ("initramfs".to_owned(), spec.initramfs.clone()),
        ]);
        let needs_devices = !spec.shares.is_empty() || spec.carrier == Carrier::Vsock;
        let with_fs = needs_devices;
        let mut devices = if needs_devices { Some(Devices::start(spec.shares, spec.carrier)?) } else { None };
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
                Wire::Awaited(devices.control.listen(port).map_err(|error| devices.failure(&error))?)
            }
            _ => {
                let (wire, theirs) = pair("make a socket pair")?;
                descriptors.push(("wire".to_owned(), theirs));
                if let Some(devices) = &devices {
                    // A guest waits for ever for a share that nobody serves any more.
                    let hold = wire.try_clone().map_err(MachineError::io("hold the wire"))?;
                    devices.process.hang_up_at_end(hold);
                }
                Wire::Connected(wire)
            }
        };
        let disks: Vec<(String, bool)> =
            spec.disks.iter().map(|disk| (disk.serial.clone(), disk.read_only)).collect();
        for (index, disk) in spec.disks.into_iter().enumerate() {
            descriptors.push((format!("disk{index}"), disk.file));
        }
        let shape = argv::Shape {
            accelerator: self.accelerator,
            memory_bytes: spec.memory_bytes,
            cpus: spec.cpus,
            carrier: spec.carrier,
            nested: spec.nested,
            disks: &disks,
            shares: with_fs,
        };
        let qemu = Become::Qemu { profile, arguments: argv::arguments(&shape) };
        let (process, held) = spawn_jailed(qemu, &descriptors).map_err(MachineError::io("start QEMU"))?;
        // QEMU and the device process hold the other ends now; with ours gone, their death closes the streams.
        drop(descriptors);
        let mut machine = QemuMachine {
            identity: Identity {
                backend: "qemu".to_owned(),
                accelerator: self.accelerator,
                jail: devices.iter().fold(held, |held, devices| held.both(&devices.held)),
            },
            wire,
            console: Tail::follow(console),
            disks: disks.into_iter().map(|(serial, _)| serial).collect(),
            watch: Watch::default(),
            process,
            devices,
        };
        let opened = Qmp::open(qmp).map_err(|_| self.died_at_start(&mut machine))?;
        if opened.version < OLDEST_VERSION {
            return Err(MachineError::TooOld { found: opened.version.to_string() });
        }
        machine.identity.backend = format!("qemu {}", opened.version);
        machine.watch = opened.watch();
        Ok(Box::new(machine))
    }
}

impl Qemu {
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
        // Ends with the group's last process, of which none is left below.
        thread::spawn(move || sender.send(io::read_to_string(stdout)));
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

/// The stream to the agent.
enum Wire {
    Connected(UnixStream),
    Awaited(Receiver<UnixStream>),
    Taken,
}

/// A running QEMU. Fields are dropped in order: QEMU dies before what it is connected to.
struct QemuMachine {
    identity: Identity,
    wire: Wire,
    console: Tail,
    watch: Watch,
    /// Serials, in QEMU's order.
    disks: Vec<String>,
    process: Process,
    devices: Option<Devices>,
}

impl Machine for QemuMachine {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn wire(&mut self) -> Result<UnixStream, MachineError> {
        let wire = match std::mem::replace(&mut self.wire, Wire::Taken) {
            Wire::Connected(wire) => Ok(wire),
            // The first connection is the agent's: nothing of a step runs before it. Later ones find nobody.
            Wire::Awaited(connections) => connections
                .recv_timeout(WIRE_PATIENCE)
                .map_err(|_| MachineError::DiedAtStart(self.death(Duration::ZERO))),
            Wire::Taken => Err(MachineError::Device("the wire was taken before".to_owned())),
        }?;
        self.watch.hang_up_at_trouble(wire.try_clone().map_err(MachineError::io("hold the wire"))?);
        Ok(wire)
    }

    fn observed(&mut self) -> Result<Record, MachineError> {
        // A guest that still ran could read on after the record was taken.
        self.process.stop();
        self.observed_so_far()
    }

    fn observed_so_far(&mut self) -> Result<Record, MachineError> {
        match &self.devices {
            Some(devices) => devices.control.finish().map_err(|error| devices.failure(&error)),
            None => Ok(Record::default()),
        }
    }

    fn death(&mut self, patience: Duration) -> Death {
        if let Some(devices) = &mut self.devices
            // Its streams close a moment before it can be reaped.
            && let Some(status) = devices.process.wait(REAP_PATIENCE)
        {
            let status = in_words(status);
            return Death::Killed { program: "the device process", status, said: devices.process.said() };
        }
        if let Some(DiskTrouble { node, why }) = self.watch.trouble() {
            let index = node.strip_prefix("disk").and_then(|number| number.parse::<usize>().ok());
            let disk = index.and_then(|index| self.disks.get(index)).cloned().unwrap_or(node);
            return Death::Disk { disk, why };
        }
        let reason = self.watch.shutdown_reason(patience);
        let status = self.process.wait(patience);
        let console = self.console.text();
        if let Some(line) = console.lines().find(|line| line.contains("Kernel panic")) {
            return Death::Panicked(line.trim().to_owned());
        }
        match (reason, status) {
            (Some(reason), Some(status)) if status.success() => Death::Stopped(reason),
            (_, Some(status)) => {
                Death::Killed { program: "QEMU", status: in_words(status), said: self.process.said() }
            }
            (_, None) => Death::Killed {
                program: "QEMU",
                status: "still running, but not answering".to_owned(),
                said: self.process.said(),
            },
        }
    }

    fn console(&self) -> String {
        self.console.text()
    }
}

fn in_words(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => io::Error::last_os_error().to_string(),
    }
}
