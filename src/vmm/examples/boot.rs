//! Boots a kernel on KVM with its console on standard output, and devices of kiln's where they are asked for, without kiln's jail:
//!
//! ```text
//! boot [DEVICE]... KERNEL INITRAMFS MEMORY_MIB CPUS [WORD]...
//!   --disk FILE       /dev/vda, which the guest may write
//!   --share FOLDER    the share `share` in the file system `kiln`
//!   --vsock           port 5001 of the host gives back what comes
//!   --serial          the virtio-serial port `bench` does
//! ```
#![expect(clippy::disallowed_methods, reason = "a program for trying things")]

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Instant;

use kiln_virtio::console::Console;
use kiln_virtio::control::{Client, Server};
use kiln_virtio::device::Device;
use kiln_virtio::fs::Attributes;
use kiln_vmm::cpu::Model;
use kiln_vmm::disk::Disk;
use kiln_vmm::local::{Local, Thread};
use kiln_vmm::mmio::Registers;
use kiln_vmm::vm::{OnEnd, Slot};
use kiln_vmm::{End, Machine, Origin, Parts, memory};
use vm_memory::GuestMemoryMmap;

/// The guest's number on vsock.
const CID: u64 = 3;
/// The port of the host that echoes.
const PORT: u32 = 5001;

/// Devices that are asked for.
#[derive(Default)]
struct Wanted {
    disk: Option<String>,
    share: Option<String>,
    vsock: bool,
    serial: bool,
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1).peekable();
    let mut wanted = Wanted::default();
    while let Some(option) = arguments.next_if(|argument| argument.starts_with("--")) {
        match option.as_str() {
            "--disk" => wanted.disk = arguments.next(),
            "--share" => wanted.share = arguments.next(),
            "--vsock" => wanted.vsock = true,
            "--serial" => wanted.serial = true,
            _ => return Err(format!("no such device: {option}").into()),
        }
    }
    let mut next =
        || arguments.next().ok_or("usage: boot [DEVICE]... KERNEL INITRAMFS MEMORY_MIB CPUS [WORD]...");
    let (kernel, initramfs) = (File::open(next()?)?, File::open(next()?)?);
    let (bytes, cpus) = (next()?.parse::<u64>()? << 20, next()?.parse()?);
    let words: Vec<String> = arguments.collect();
    let (sender, ends) = mpsc::channel();
    let on_end: OnEnd = Arc::new(move |end| drop(sender.send(end)));
    let memory = memory::map(&memory::make_file(bytes)?, bytes)?;
    let (devices, _client) = devices(wanted, &memory, &on_end)?;
    let started = Instant::now();
    let machine = Machine::new(Parts {
        kvm: OpenOptions::new().read(true).write(true).open("/dev/kvm")?.into(),
        origin: Origin::Boot {
            kernel,
            initramfs,
            command_line: format!("console=ttyS0 panic=-1 reboot=a {}", words.join(" ")),
        },
        generation: [0; 16],
        memory,
        working_set: None,
        cpus,
        model: Model::Fixed,
        console: Box::new(std::io::stdout()),
        devices,
        on_end,
    })?;
    let _running = machine.start(|| Ok(()))?;
    let end = ends.recv()?;
    let line = format!("\n{end}, after {:.3} s\n", started.elapsed().as_secs_f64());
    std::io::stderr().write_all(line.as_bytes())?;
    Ok(())
}

/// The devices that are asked for, and what has to live as long as they do.
fn devices(
    wanted: Wanted,
    memory: &GuestMemoryMmap,
    on_end: &OnEnd,
) -> Result<(Vec<Slot>, Option<Client>), Box<dyn Error>> {
    let mut slots = Vec::new();
    if let Some(disk) = wanted.disk {
        let file = OpenOptions::new().read(true).write(true).open(disk)?;
        let failed = Arc::clone(on_end);
        let failed = move |error: &std::io::Error| failed(End::Device { what: format!("disk: {error}") });
        slots.push(slot("disk", Disk::new(file, "bench", false, failed)?, memory, on_end)?);
    }
    if wanted.serial {
        let (ours, theirs) = UnixStream::pair()?;
        thread::spawn(move || echo(&ours));
        slots.push(slot("console", Console::new("bench", theirs)?, memory, on_end)?);
    }
    if wanted.share.is_none() && !wanted.vsock {
        return Ok((slots, None));
    }
    let (ours, theirs) = UnixStream::pair()?;
    let cid = wanted.vsock.then_some(CID);
    let (mut server, fs, vsock) = Server::new(theirs, cid, |_| Ok(Box::new(|| Ok(()))), None)?;
    thread::spawn(move || server.serve(|_| true));
    let client = Client::new(ours)?;
    if let Some(share) = wanted.share {
        client.add_share(b"share", File::open(share)?.as_fd(), Attributes::Real)?;
        slots.push(slot("fs", fs, memory, on_end)?);
    }
    if let Some(vsock) = vsock {
        let incoming = client.listen(PORT)?;
        thread::spawn(move || incoming.iter().for_each(|stream| echo(&stream)));
        slots.push(slot("vsock", vsock, memory, on_end)?);
    }
    Ok((slots, Some(client)))
}

fn slot<D: Device<()> + 'static>(
    name: &'static str,
    device: D,
    memory: &GuestMemoryMmap,
    on_end: &OnEnd,
) -> std::io::Result<Slot> {
    let thread = Thread { name, confine: || Ok(()), narrowing: None };
    Registers::slot(Local::new(thread, device, memory, Arc::clone(on_end))?, memory)
}

/// Gives back what comes, until no more does.
fn echo(mut stream: &UnixStream) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
}
