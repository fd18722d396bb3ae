//! Boots a Linux guest in QEMU with this crate's devices beside it, in a process of their own, and prints the
//! record: for trying and measuring the devices against a real driver.
//!
//! ```text
//! serve --share src=/usr/share/doc --share real:etc=/etc -- -kernel bzImage -initrd initrd -append '…'
//! ```
//! What follows `--` goes to QEMU. Guest output and the record come on standard output, memory and time on
//! standard error. With `--vsock CID`, guest port 5000 is connected to and echoes are compared, and the guest
//! may connect to port 5001, which echoes; with `--echo CID`, only that. With `--serial`, QEMU's virtio-serial
//! port `bench` echoes too. With `--kvm`, the guest runs on KVM with one processor.
#![expect(unsafe_code, reason = "takes inherited descriptors")]
#![expect(clippy::disallowed_methods, reason = "a program for trying things")]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for people")]

use std::error::Error;
use std::ffi::OsString;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::time::{Duration, Instant};

use kiln_virtio::control::{Client, ClientError};
use kiln_virtio::fs::Attributes;
use kiln_virtio::process::DeviceProcess;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "device") {
        return device(&arguments[1..]);
    }
    drive(&arguments)
}

/// The device process: descriptors by number.
fn device(arguments: &[OsString]) -> Result<(), Box<dyn Error>> {
    let take = |at: usize| -> Result<OwnedFd, Box<dyn Error>> {
        let number = arguments.get(at).and_then(|text| text.to_str()).ok_or("descriptor missing")?.parse()?;
        // SAFETY: the parent left this descriptor open for this process alone.
        Ok(unsafe { OwnedFd::from_raw_fd(number) })
    };
    let cid: u64 = arguments.get(3).and_then(|text| text.to_str()).ok_or("cid missing")?.parse()?;
    let vsock = if cid == 0 { None } else { Some((take(1)?, cid)) };
    DeviceProcess {
        fs: take(0)?,
        vsock,
        control: take(2)?.into(),
        confine: |_| Ok(()),
        narrow: |_| Ok(Box::new(|| Ok(()))),
    }
    .run()?;
    let status = std::fs::read_to_string("/proc/self/status")?;
    for line in status.lines().filter(|line| line.starts_with("RssAnon") || line.starts_with("Threads")) {
        eprintln!("device {line}");
    }
    Ok(())
}

fn drive(arguments: &[OsString]) -> Result<(), Box<dyn Error>> {
    let mut shares = Vec::new();
    let mut cid = 0_u64;
    let (mut connects, mut serial, mut kvm) = (false, false, false);
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match argument.to_str() {
            Some("--share") => shares.push(rest.next().ok_or("--share NAME=DIRECTORY")?),
            Some(option @ ("--vsock" | "--echo")) => {
                connects = option == "--vsock";
                cid = rest.next().and_then(|text| text.to_str()).ok_or("--vsock CID")?.parse()?;
            }
            Some("--serial") => serial = true,
            Some("--kvm") => kvm = true,
            Some("--") => break,
            _ => return Err(format!("unknown argument {argument:?}").into()),
        }
    }
    let directory = tempfile::tempdir()?;
    let (fs_path, vsock_path) = (directory.path().join("fs"), directory.path().join("vsock"));
    let (fs, vsock) = (UnixListener::bind(&fs_path)?, UnixListener::bind(&vsock_path)?);
    let (ours, theirs) = UnixStream::pair()?;
    for descriptor in [fs.as_fd(), vsock.as_fd(), theirs.as_fd()] {
        rustix::io::fcntl_setfd(descriptor, rustix::io::FdFlags::empty())?;
    }
    let mut device = Command::new(std::env::current_exe()?)
        .arg("device")
        .args([fs.as_raw_fd(), vsock.as_raw_fd(), theirs.as_raw_fd()].map(|number| number.to_string()))
        .arg(cid.to_string())
        .spawn()?;
    drop((fs, vsock, theirs));
    let client = Client::new(ours)?;
    for share in shares {
        let (real, share) = match share.as_bytes().strip_prefix(b"real:") {
            Some(share) => (true, share),
            None => (false, share.as_bytes()),
        };
        let at = share.iter().position(|byte| *byte == b'=').ok_or("--share NAME=DIRECTORY")?;
        let host = std::fs::File::open(std::ffi::OsStr::from_bytes(&share[at + 1..]))?;
        let attributes =
            if real { Attributes::Real } else { Attributes::Fixed { mtime_seconds: 1_700_000_000 } };
        client.add_share(&share[..at], host.as_fd(), attributes)?;
    }
    let began = Instant::now();
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args("-M q35,memory-backend=m -m 1G -nographic -no-reboot".split(' '));
    qemu.args(if kvm { "-accel kvm -cpu host -smp 1" } else { "-accel tcg,thread=multi -smp 2" }.split(' '));
    qemu.args(["-nodefaults", "-serial", "stdio", "-object", "memory-backend-memfd,id=m,size=1G,share=on"]);
    qemu.arg("-chardev").arg(format!("socket,id=fs,path={}", fs_path.display()));
    let queues = if kvm { 1 } else { 2 };
    qemu.arg("-device")
        .arg(format!("vhost-user-fs-pci,chardev=fs,tag=kiln,queue-size=1024,num-request-queues={queues}"));
    if cid != 0 {
        qemu.arg("-chardev").arg(format!("socket,id=vs,path={}", vsock_path.display()));
        qemu.args(["-device", "vhost-user-vsock-pci,chardev=vs"]);
    }
    if serial {
        let path = directory.path().join("serial");
        let listener = UnixListener::bind(&path)?;
        std::thread::spawn(move || listener.incoming().flatten().for_each(|stream| give_back(&stream)));
        qemu.arg("-chardev").arg(format!("socket,id=serial,path={}", path.display()));
        qemu.args(["-device", "virtio-serial-pci", "-device", "virtserialport,chardev=serial,name=bench"]);
    }
    if cid != 0 {
        let incoming = client.listen(5001)?;
        std::thread::spawn(move || incoming.iter().for_each(|stream| give_back(&stream)));
    }
    let mut qemu = qemu.args(rest).spawn()?;
    if connects {
        compare(&client)?;
    }
    qemu.wait()?;
    eprintln!("guest ran for {:.2} s", began.elapsed().as_secs_f64());
    let status = std::fs::read_to_string(format!("/proc/{}/status", device.id()))?;
    for line in status.lines().filter(|line| line.starts_with("RssAnon") || line.starts_with("Threads")) {
        eprintln!("device before the record: {line}");
    }
    let began = Instant::now();
    let record = client.finish()?;
    let entries: usize = record.shares.iter().map(|share| share.entries.len() + share.missed.len()).sum();
    eprintln!("the record of {entries} entries took {:.3} s", began.elapsed().as_secs_f64());
    println!("{}", serde_json::to_string(&record)?);
    drop(client);
    device.wait()?;
    Ok(())
}

/// Gives back what comes, until no more does.
fn give_back(mut stream: &UnixStream) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = stream.shutdown(std::net::Shutdown::Write);
}

/// Sends a pattern to the guest's port 5000, whose echo is compared. The guest may take its time to listen.
fn compare(client: &Client) -> Result<(), Box<dyn Error>> {
    let stream = loop {
        match client.connect(5000, Duration::from_secs(60)) {
            Err(ClientError::Refused(_)) => std::thread::sleep(Duration::from_millis(100)),
            result => break result?,
        }
    };
    let (total, began) = (100_usize << 20, Instant::now());
    let sending = stream.try_clone()?;
    let sender = std::thread::spawn(move || -> std::io::Result<()> {
        for block in 0..total / 4096 {
            (&sending).write_all(&[u8::try_from(block % 251).unwrap_or(0); 4096])?;
        }
        sending.shutdown(std::net::Shutdown::Write)
    });
    let mut received = Vec::new();
    (&stream).read_to_end(&mut received)?;
    sender.join().map_err(|_| "sender")??;
    let right = received.iter().enumerate().all(|(at, byte)| usize::from(*byte) == at / 4096 % 251);
    let seconds = began.elapsed().as_secs_f64();
    eprintln!("guest echoed {} bytes, right: {right}, {seconds:.2} s", received.len());
    Ok(())
}
