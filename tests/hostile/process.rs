//! The whole device process as a target, by a front end that speaks vhost-user as a QEMU would that a guest owns.
//!
//! It is a process, started from this program (`serve_devices`), so that a signal is told apart from an end by name.

use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, ExitCode, ExitStatus};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use kiln_virtio::control::{Client, ClientError};
use kiln_virtio::fs::Attributes;
use kiln_virtio::process::{DeviceProcess, MEMORY_BYTES};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::folder::Folder;
use super::layout;
use super::rings::{REGIONS, Rings};
use super::script::{Step, Target};
use super::value::Value;

/// How long anything may take that the other side has to do.
const PATIENCE: Duration = Duration::from_secs(2);
/// Where the front end says that it has guest memory mapped.
const BASE: u64 = 0x7000_0000_0000;
/// The version of the protocol, and the flag that asks for an acknowledgement.
const VERSION: u32 = 1;
const NEED_REPLY: u32 = 8;
/// VIRTIO_F_VERSION_1 and VHOST_USER_F_PROTOCOL_FEATURES.
const FEATURES: u64 = 1 << 32 | 1 << 30;
/// The queue that is brought up: requests of fs, transmit of vsock.
const QUEUE: usize = 1;
const CID: u64 = 77;

/// Messages of a front end: name, number, body. Those that carry a descriptor's flag have it in `index`.
const MESSAGES: [(&str, u32, &str); 27] = [
    ("GET_FEATURES", 1, ""),
    ("SET_FEATURES", 2, "features:8=5368709120"),
    ("SET_OWNER", 3, ""),
    ("RESET_OWNER", 4, ""),
    ("SET_MEM_TABLE", 5, "regions:4=1 padding:4 gpa:8 bytes:8=65536 uaddr:8=123145302310912 offset:8 more:b"),
    ("SET_LOG_BASE", 6, "bytes:8 offset:8"),
    ("SET_VRING_NUM", 8, "index:4=1 num:4=256"),
    ("SET_VRING_ADDR", 9, "index:4=1 vring_flags:4 desc:8 used:8 avail:8 log:8"),
    ("SET_VRING_BASE", 10, "index:4=1 num:4"),
    ("GET_VRING_BASE", 11, "index:4=1 num:4"),
    ("SET_VRING_KICK", 12, "index:8=1"),
    ("SET_VRING_CALL", 13, "index:8=1"),
    ("SET_VRING_ERR", 14, "index:8=1"),
    ("GET_PROTOCOL_FEATURES", 15, ""),
    ("SET_PROTOCOL_FEATURES", 16, "features:8"),
    ("GET_QUEUE_NUM", 17, ""),
    ("SET_VRING_ENABLE", 18, "index:4=1 num:4=1"),
    ("SET_BACKEND_REQ_FD", 21, ""),
    ("GET_CONFIG", 24, "offset:4 bytes:4=8 config_flags:4 payload:b"),
    ("SET_CONFIG", 25, "offset:4 bytes:4=8 config_flags:4 payload:b"),
    ("GET_INFLIGHT_FD", 31, "bytes:8 offset:8 queues:2=1 size_:2=256"),
    ("SET_INFLIGHT_FD", 32, "bytes:8=4096 offset:8 queues:2=1 size_:2=256"),
    ("RESET_DEVICE", 34, ""),
    ("ADD_MEM_REG", 37, "padding:8 gpa:8 bytes:8=65536 uaddr:8=123145302310912 offset:8"),
    ("REM_MEM_REG", 38, "padding:8 gpa:8 bytes:8=65536 uaddr:8=123145302310912 offset:8"),
    ("SET_DEVICE_STATE_FD", 42, "direction:4=1 phase:4"),
    ("CHECK_DEVICE_STATE", 43, ""),
];

/// One device's connection, from the front end's side.
struct FrontEnd {
    socket: UnixStream,
    rings: Rings,
    kick: OwnedFd,
    call: OwnedFd,
}

/// A device process, its parent, and a front end for each of its devices.
struct Machine {
    /// None once it has been told to end.
    client: Option<Client>,
    /// What comes of a port that the parent listens at.
    incoming: Option<Receiver<UnixStream>>,
    process: u32,
    /// How it ended.
    ended: Receiver<ExitStatus>,
    devices: [FrontEnd; 2],
}

/// The first argument of a device process.
pub const DEVICES: &str = "--devices";
/// Its exit status when it ends by an error.
const ENDS: u8 = 125;

/// A device process: its listeners are standard input and output, its parent is standard error.
pub fn serve_devices() -> ExitCode {
    let (fs, vsock, control) = (io::stdin(), io::stdout(), io::stderr());
    let owned = |fd: BorrowedFd<'_>| fd.try_clone_to_owned();
    let process = owned(fs.as_fd()).and_then(|fs| {
        let vsock = Some((owned(vsock.as_fd())?, CID));
        let control = UnixStream::from(owned(control.as_fd())?);
        Ok(DeviceProcess { fs, vsock, control, confine: |_| Ok(()), narrow: |_| Ok(Box::new(|| Ok(()))) })
    });
    match process.map(DeviceProcess::run) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        _ => ExitCode::from(ENDS),
    }
}

/// The process that a case has to do with.
pub struct ProcessTarget {
    folder: Folder,
    machine: Option<Machine>,
    /// 0: fs, 1: vsock.
    current: usize,
}

fn say(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// A file in memory that cannot shrink.
fn sealed(length: u64) -> Result<File, String> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create("guest", flags).map_err(say)?);
    file.set_len(length).map_err(say)?;
    fcntl_add_seals(&file, SealFlags::SHRINK).map_err(say)?;
    Ok(file)
}

fn new_event() -> Result<OwnedFd, String> {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(say)
}

impl FrontEnd {
    fn new(socket: UnixStream) -> Result<Self, String> {
        socket.set_read_timeout(Some(PATIENCE)).map_err(say)?;
        let mut regions = Vec::new();
        for (start, length) in REGIONS {
            let file = sealed(length as u64)?;
            regions.push((GuestAddress(start), length, Some(FileOffset::new(file, 0))));
        }
        let memory = GuestMemoryMmap::from_ranges_with_files(regions).map_err(say)?;
        let rings = Rings::within(memory, QUEUE + 1)?;
        Ok(Self { socket, rings, kick: new_event()?, call: new_event()? })
    }

    /// Sends one message. That the other side has hung up is no error here: what comes back shows it.
    fn send(
        &self,
        (request, flags): (u32, u32),
        size: u32,
        body: &[u8],
        files: &[BorrowedFd<'_>],
    ) -> Result<(), String> {
        let header = [request, flags, size].map(u32::to_le_bytes).concat();
        let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
            return Err("too many descriptors for one message".to_owned());
        }
        // The descriptors ride on the header.
        let _ = sendmsg(&self.socket, &[IoSlice::new(&header)], &mut control, SendFlags::NOSIGNAL);
        let _ = (&self.socket).write_all(body);
        Ok(())
    }

    /// A reply's body, or none where the connection is closed.
    fn reply(&self) -> Result<Option<Vec<u8>>, String> {
        let mut header = [0; 12];
        match (&self.socket).read_exact(&mut header) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err("no answer".to_owned()),
            Err(_) => return Ok(None),
        }
        let size = header[8..].iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte));
        let mut body = Vec::new();
        (&self.socket).take(size.min(4096)).read_to_end(&mut body).map_err(say)?;
        Ok(Some(body))
    }

    /// A message that has to be acknowledged.
    fn good(&self, request: u32, body: &[u8], files: &[BorrowedFd<'_>]) -> Result<(), String> {
        let size = u32::try_from(body.len()).map_err(say)?;
        self.send((request, VERSION | NEED_REPLY), size, body, files)?;
        match self.reply()? {
            Some(ack) if ack == [0; 8] => Ok(()),
            other => Err(format!("message {request} gets {other:?}")),
        }
    }

    /// Says who it is, as QEMU does.
    fn greet(&self) -> Result<(), String> {
        self.send((3, VERSION), 0, b"", &[])?;
        self.send((1, VERSION), 0, b"", &[])?;
        self.reply()?.ok_or("hung up")?;
        self.send((2, VERSION), 8, &FEATURES.to_le_bytes(), &[])?;
        self.send((15, VERSION), 0, b"", &[])?;
        let offered = self.reply()?.ok_or("hung up")?;
        self.send((16, VERSION), 8, &offered, &[])
    }

    fn memory(&self) -> Result<(), String> {
        let mut body = [2_u32, 0].map(u32::to_le_bytes).concat();
        let mut files = Vec::new();
        for region in self.rings.memory.iter() {
            let start = region.start_addr().0;
            body.extend([start, region.len(), BASE + start, 0].map(u64::to_le_bytes).concat());
            files.push(region.file_offset().ok_or("no file")?.file().as_fd());
        }
        self.good(5, &body, &files)
    }

    /// Brings queue 1 up, as QEMU does, with what `step` says of it.
    fn start(&mut self, step: Option<&mut Step>) -> Result<(), String> {
        let (mut size, mut base) = (256_u32, 0_u32);
        if let Some(step) = step {
            (size, base) = (step.number("size", size)?, step.number("base", base)?);
        }
        self.memory()?;
        self.rings.current = QUEUE;
        let index = u32::try_from(QUEUE).map_err(say)?;
        let pair = |number: u32| [index, number].map(u32::to_le_bytes).concat();
        let [table, available, used] = self.rings.parts()?.map(|at| BASE + at);
        self.good(8, &pair(size), &[])?;
        self.good(10, &pair(base), &[])?;
        let addresses = [table, used, available, 0].map(u64::to_le_bytes).concat();
        self.good(9, &[[index, 0].map(u32::to_le_bytes).concat(), addresses].concat(), &[])?;
        self.good(13, &u64::from(index).to_le_bytes(), &[self.call.as_fd()])?;
        self.good(12, &u64::from(index).to_le_bytes(), &[self.kick.as_fd()])?;
        self.good(18, &pair(1), &[])
    }

    /// Tells the device of new buffers; true where it answers with an interrupt.
    fn kick(&self, answer: bool) -> Result<bool, String> {
        rustix::io::write(&self.kick, &1_u64.to_ne_bytes()).map_err(say)?;
        if !answer {
            return Ok(false);
        }
        let mut wait = [PollFd::new(&self.call, PollFlags::IN)];
        let patience = Timespec { tv_sec: PATIENCE.as_secs().try_into().map_err(say)?, tv_nsec: 0 };
        poll(&mut wait, Some(&patience)).map_err(say)?;
        Ok(rustix::io::read(&self.call, &mut [0; 8]).is_ok())
    }

    /// Sends one chain of readable bytes, and waits until the device has taken it.
    fn send_chain(&mut self, bytes: &[u8]) -> Result<(), String> {
        let (data, _) = self.rings.places()?;
        self.rings.write(data, bytes)?;
        self.rings.describe(0, (data, u32::try_from(bytes.len()).map_err(say)?), 0, 0)?;
        self.rings.offer(0)?;
        self.kick(true)?;
        self.rings.used()?.map(drop).ok_or_else(|| "the chain is not taken".to_owned())
    }

    /// Asks the fs device for INIT, and gives the length of its answer.
    fn init(&mut self) -> Result<u32, String> {
        let mut request = [104_u32, 26, 1, 0].map(u32::to_le_bytes).concat();
        request.extend([0; 24]);
        request.extend([7_u32, 41].map(u32::to_le_bytes).concat());
        request.extend([0; 56]);
        let (data, answer) = self.rings.places()?;
        self.rings.write(data, &request)?;
        self.rings.describe(0, (data, 104), 1, 1)?;
        self.rings.describe(1, (answer, 4096), 2, 0)?;
        self.rings.offer(0)?;
        if !self.kick(true)? {
            return Err("a good request gets no interrupt".to_owned());
        }
        self.rings.used()?.map(|(_, length)| length).ok_or_else(|| "a good request gets no answer".to_owned())
    }
}

impl Machine {
    fn start(folder: &Folder) -> Result<Self, String> {
        let sockets = Folder::new();
        let connect = |name: &str| {
            let listener = UnixListener::bind(sockets.path(name)).map_err(say)?;
            let stream = UnixStream::connect(sockets.path(name)).map_err(say)?;
            Ok::<_, String>((OwnedFd::from(listener), FrontEnd::new(stream)?))
        };
        let ((fs, fs_end), (vsock, vsock_end)) = (connect("fs")?, connect("vsock")?);
        let (ours, control) = UnixStream::pair().map_err(say)?;
        let mut process = std::env::current_exe()
            .and_then(|program| {
                let mut command = Command::new(program);
                command.arg(DEVICES).stdin(fs).stdout(vsock).stderr(OwnedFd::from(control)).spawn()
            })
            .map_err(say)?;
        let (number, (sender, ended)) = (process.id(), channel());
        std::thread::spawn(move || process.wait().map(|status| sender.send(status)));
        let client = Client::new(ours).map_err(say)?;
        let directory = File::open(folder.path("s")).map_err(say)?;
        client.add_share(b"s", directory.as_fd(), Attributes::Fixed { mtime_seconds: 1 }).map_err(say)?;
        let devices = [fs_end, vsock_end];
        Ok(Self { client: Some(client), incoming: None, process: number, ended, devices })
    }

    fn client(&self) -> Result<&Client, String> {
        self.client.as_ref().ok_or_else(|| "the parent has hung up".to_owned())
    }

    /// How the process ended; none where it goes on.
    fn status(&self, patience: Duration) -> Option<ExitStatus> {
        self.ended.recv_timeout(patience).ok()
    }

    /// Hangs up, and checks that the process ends as it should and was no larger than it may be.
    fn end(mut self) -> Result<(), String> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process)).unwrap_or_default();
        let private =
            status.lines().find_map(|line| line.strip_prefix("RssAnon:")?.split_whitespace().next());
        let private: u64 = private.and_then(|figure| figure.parse().ok()).unwrap_or(0);
        if private << 10 > MEMORY_BYTES {
            return Err(format!("the device process has {private} KiB of private memory"));
        }
        self.client = None;
        match self.status(PATIENCE).map(|status| status.code()) {
            Some(Some(0)) => Ok(()),
            // By name: its parent was told.
            Some(Some(code)) if code == i32::from(ENDS) => Ok(()),
            Some(code) => Err(format!("the device process ends with {code:?}")),
            None => Err("the device process does not end".to_owned()),
        }
    }
}

impl ProcessTarget {
    /// A process with one share, whose front ends have said nothing yet.
    pub fn new() -> Result<Self, String> {
        let folder = Folder::new();
        folder.file("s/f", "content");
        let machine = Some(Machine::start(&folder)?);
        Ok(Self { folder, machine, current: 0 })
    }

    fn machine(&mut self) -> Result<&mut Machine, String> {
        self.machine.as_mut().ok_or_else(|| "the machine is gone".to_owned())
    }

    fn device(&mut self) -> Result<&mut FrontEnd, String> {
        let current = self.current;
        Ok(&mut self.machine()?.devices[current])
    }

    /// A message of the language: `NAME field=… body=… fds="…" size=… request=… flags=… [-> ok|refused|closed|reply]`.
    fn message(&mut self, request: u32, layout: &str, step: &mut Step) -> Result<(), String> {
        let body = match step.bytes("body")? {
            Some(body) => body,
            None => layout::encode(layout, step)?,
        };
        let answered = step.expected_word().is_some();
        let flags = step.number("flags", VERSION | if answered { NEED_REPLY } else { 0 })?;
        let request = step.number("request", request)?;
        let size = step.number("size", u32::try_from(body.len()).map_err(say)?)?;
        let device = self.device()?;
        let files = files(&step.bytes("fds")?.unwrap_or_default(), device)?;
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        device.send((request, flags), size, &body, &files)?;
        let Some(expected) = step.expected_word() else { return Ok(()) };
        let found = match device.reply()? {
            None => "closed",
            Some(_) if step.verb.starts_with("GET_") => "reply",
            Some(ack) if ack == [0; 8] => "ok",
            Some(ack) if ack.len() == 8 && ack[0] == 1 && ack[1..] == [0; 7] => "refused",
            Some(_) => "reply",
        };
        // A request that is refused also ends the connection.
        let holds = expected == found || expected == "any" || (expected == "refused" && found == "closed");
        if holds { Ok(()) } else { Err(step.unlike(found)) }
    }

    /// What the process's end, or the parent, says of it.
    fn ended(&mut self, step: &Step) -> Result<(), String> {
        let expected = step.expected_word().unwrap_or_default();
        let machine = self.machine()?;
        if step.verb == "process" && expected == "running" {
            let status = machine.ended.try_recv();
            return status.map_or(Ok(()), |status| Err(step.unlike(status)));
        }
        // What the process had to say is there when it has ended.
        let status = (step.verb == "process").then(|| machine.status(PATIENCE));
        let found = match machine.client()?.finish() {
            Ok(_) => "record".to_owned(),
            Err(ClientError::Misbehaved(what)) if expected == "misbehaved" => {
                step.expect_text(&what)?;
                expected.to_owned()
            }
            Err(error) => error.to_string(),
        };
        if expected != "any" && expected != found {
            return Err(step.unlike(found));
        }
        match status {
            None => Ok(()),
            Some(Some(status)) if status.code() == Some(ENDS.into()) => {
                // For whoever asks again.
                let (sender, ended) = channel();
                sender.send(status).map_err(say)?;
                machine.ended = ended;
                Ok(())
            }
            Some(other) => Err(format!("the process ends with {other:?}")),
        }
    }
}

/// Descriptors by their kinds: `memory`, `short`, `unsealed`, `event`, `pipe`, `unread`, `file`, each after a comma.
fn files(kinds: &[u8], device: &FrontEnd) -> Result<Vec<OwnedFd>, String> {
    let kinds = String::from_utf8_lossy(kinds).into_owned();
    kinds
        .split(',')
        .filter(|kind| !kind.is_empty())
        .map(|kind| match kind {
            "memory" => sealed(1 << 20).map(OwnedFd::from),
            "short" => sealed(4096).map(OwnedFd::from),
            "unsealed" => {
                let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).map_err(say)?);
                file.set_len(1 << 20).map_err(say)?;
                Ok(file.into())
            }
            "event" => new_event(),
            "kick" => device.kick.try_clone().map_err(say),
            "pipe" => rustix::pipe::pipe().map(|(read, _)| read).map_err(say),
            "unread" => rustix::pipe::pipe().map(|(_, write)| write).map_err(say),
            "file" => File::open("/proc/self/exe").map(OwnedFd::from).map_err(say),
            other => Err(format!("there is no descriptor of the kind `{other}`")),
        })
        .collect()
}

impl Target for ProcessTarget {
    fn act(&mut self, step: &mut Step) -> Result<(), String> {
        match step.verb.as_str() {
            "device" => {
                self.current = match step.word(0) {
                    "fs" => 0,
                    "vsock" => 1,
                    other => return Err(format!("there is no device `{other}`")),
                };
            }
            "greet" => self.device()?.greet()?,
            "start" => self.device()?.start(Some(step))?,
            "serves" => match self.device()?.init()? {
                80 => {}
                other => return Err(format!("INIT has an answer of {other} bytes")),
            },
            "kick" => {
                let expected = step.expected_word().map(str::to_owned);
                let times = step.number("times", 1_u64)?;
                let answered = (0..times).try_fold(false, |_, _| self.device()?.kick(expected.is_some()))?;
                let found = if answered { "answered" } else { "silence" };
                if expected.is_some_and(|expected| expected != found) {
                    return Err(step.unlike(found));
                }
            }
            "bytes" => {
                let bytes = step.bytes_at(0)?;
                let _ = self.device()?.socket.write_all(&bytes);
                if step.expected_word() == Some("closed") && self.device()?.reply()?.is_some() {
                    return Err(step.unlike("an answer"));
                }
            }
            "listen" => {
                let port = step.number_at(0)?;
                let machine = self.machine()?;
                machine.incoming = Some(machine.client()?.listen(port).map_err(say)?);
            }
            // A vsock packet.
            "packet" => {
                let packet = layout::encode(
                    "src_cid:8=77 dst_cid:8=2 src_port:4=1000 dst_port:4=5000 length:4 kind:2=1 op:2=1 flags:4 \
                     buf_alloc:4=65536 fwd_cnt:4 data:b",
                    step,
                )?;
                self.device()?.send_chain(&packet)?;
            }
            // How many connections the parent got at its port.
            "accepted" => {
                let machine = self.machine()?;
                // The parent has seen all that came before the answer to another request.
                machine.client()?.listen(u32::MAX).map_err(say)?;
                let count = machine.incoming.iter().flat_map(Receiver::try_iter).count();
                let expected = step.expected().first().ok_or("how many?")?.1.value.clone()?;
                if expected != Value::from(count) {
                    return Err(step.unlike(count));
                }
            }
            "hang_up" => self.device()?.socket.shutdown(std::net::Shutdown::Both).map_err(say)?,
            "parent" | "process" => self.ended(step)?,
            verb => {
                if let Some((_, request, layout)) = MESSAGES.iter().find(|(name, ..)| *name == verb) {
                    return self.message(*request, layout, step);
                }
                if !self.device()?.rings.act(step)? {
                    return Err(format!("`{}` is not known here", step.verb));
                }
            }
        }
        Ok(())
    }

    fn name(&self, name: &str) -> Option<Value> {
        match name {
            "BASE" => Some(Value::from(BASE)),
            _ => self.machine.as_ref()?.devices[self.current].rings.name(name),
        }
    }

    fn call(&mut self, function: &str, arguments: &[Value]) -> Result<Value, String> {
        if function == "open_files" {
            let folder = format!("/proc/{}/fd", self.machine()?.process);
            return std::fs::read_dir(folder).map(|open| Value::from(open.count())).map_err(say);
        }
        self.device()?.rings.call(function, arguments)
    }

    fn serve(&mut self) -> Result<(), String> {
        // Whatever became of this process, the next one serves.
        self.machine.take().map_or(Ok(()), Machine::end)?;
        let mut machine = Machine::start(&self.folder)?;
        let device = &mut machine.devices[0];
        device.greet()?;
        device.start(None)?;
        match device.init()? {
            80 => machine.client()?.finish().map(drop).map_err(say)?,
            other => return Err(format!("INIT has an answer of {other} bytes")),
        }
        machine.end()
    }
}
