//! The guest's side of `ci/bench machine`: the first process of a machine. It loads the modules that lie beside it, puts one load on
//! one device, prints what that took and resets the machine. What it does is said behind `--` on the kernel's command line:
//!
//! ```text
//! disk MEBIBYTES OPERATIONS THREADS     /dev/vda, past the guest's own cache
//! fs TAG READ_AHEAD_KIB FOLDER LOAD...  mounts TAG and runs `load LOAD... FOLDER_OF_THE_MOUNT` (src/virtio/examples/load.rs)
//! streams ROUND_TRIPS                   the virtio-serial port `bench`, and port 5001 of the host on vsock, which echo
//! idle                                  nothing, until it is killed
//! ```
//! A line of each row goes to the console: `row`, its name, nanoseconds of the monotonic clock, and how many operations (or bytes,
//! of the rows `read` and `write`) that was.
#![expect(unsafe_code, reason = "connects to an address that no library has")]
#![allow(clippy::print_stdout, reason = "a program for people")]

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use rustix::mount::MountFlags;
use rustix::system::{RebootCommand, finit_module, reboot};

type Result<T = ()> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// MODULE_INIT_COMPRESSED_FILE.
const COMPRESSED: libc::c_int = 4;
const PAGE_BYTES: usize = 4096;
/// How much one request of a sequential row asks for.
const PIECE_BYTES: usize = 1 << 20;
/// What goes to and fro: as much as a short message of the wire.
const MESSAGE_BYTES: usize = 64;
/// Where the host echoes on vsock.
const VSOCK_PORT: u32 = 5001;
/// Round trips before those that are timed.
const REHEARSED: usize = 20;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    // Firmware leaves its last line open.
    println!();
    match prepare().and_then(|()| run(&words)) {
        Ok(()) => println!("bench done"),
        Err(error) => println!("bench failed: {error}"),
    }
    let _ = std::io::stdout().flush();
    let _ = reboot(RebootCommand::Restart);
}

/// Mounts what the rows look into, and loads the modules in the order of their names.
fn prepare() -> Result {
    for (kind, place) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys"), ("tmpfs", "/tmp")] {
        std::fs::create_dir_all(place)?;
        match rustix::mount::mount(kind, place, kind, MountFlags::empty(), None) {
            Err(rustix::io::Errno::BUSY) => {}
            result => result?,
        }
    }
    let mut modules: Vec<_> =
        std::fs::read_dir("/modules")?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
    modules.sort();
    for module in modules {
        let flags = if module.extension().is_some_and(|end| end == "ko") { 0 } else { COMPRESSED };
        match finit_module(File::open(&module)?, c"", flags) {
            // Of a device that this machine does not have.
            Ok(()) | Err(rustix::io::Errno::EXIST | rustix::io::Errno::NODEV) => {}
            Err(error) => return Err(format!("{}: {error}", module.display()).into()),
        }
    }
    Ok(())
}

fn run(words: &[String]) -> Result {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["disk", mebibytes, operations, threads] => {
            disk(mebibytes.parse()?, operations.parse()?, threads.parse()?)
        }
        ["fs", tag, read_ahead_kib, folder, load @ ..] => share(tag, read_ahead_kib, folder, load),
        ["streams", trips] => {
            let trips = trips.parse()?;
            let mut port = OpenOptions::new().read(true).write(true).open(serial_port()?)?;
            round_trips("serial", &mut port, trips)?;
            round_trips("vsock", &mut connect_vsock(VSOCK_PORT)?, trips)
        }
        ["idle"] => {
            println!("bench idle");
            loop {
                std::thread::park();
            }
        }
        _ => Err(format!("no such load: {words:?}").into()),
    }
}

/// Does `work`, and prints what that took for `count` operations or bytes.
fn row(name: &str, count: u64, work: impl FnOnce() -> Result) -> Result {
    let began = Instant::now();
    work().map_err(|error| format!("{name}: {error}"))?;
    println!("row {name} {} {count}", began.elapsed().as_nanos());
    Ok(())
}

/// Room for `bytes`, aligned as O_DIRECT wants it, as what lies in `room`.
fn aligned(room: &mut Vec<u8>, bytes: usize) -> &mut [u8] {
    room.resize(bytes + PAGE_BYTES, 0x5a);
    let start = room.as_ptr().align_offset(PAGE_BYTES);
    &mut room[start..start + bytes]
}

/// Page numbers below `pages`, by xorshift64.
struct Pages {
    state: u64,
    pages: u64,
}

impl Iterator for Pages {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        Some(self.state % self.pages)
    }
}

fn disk(mebibytes: u64, operations: u64, threads: u64) -> Result {
    let disk = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open("/dev/vda")?;
    let pages = mebibytes << 20 >> 12;
    let work = |seed: u64, count: u64, writes: bool| -> Result {
        let mut room = Vec::new();
        let page = aligned(&mut room, PAGE_BYTES);
        for at in (Pages { state: 88_172_645_463_325_252 + seed, pages }).take(usize::try_from(count)?) {
            match writes {
                true => disk.write_all_at(page, at * 4096)?,
                false => disk.read_exact_at(page, at * 4096)?,
            }
        }
        Ok(())
    };
    let deep = |name, writes| {
        let each = operations.div_ceil(threads);
        row(name, each * threads, || {
            std::thread::scope(|scope| {
                let started: Vec<_> = (0..threads)
                    .map(|seed| {
                        let work = &work;
                        let run = move || work(seed, each, writes);
                        std::thread::Builder::new().spawn_scoped(scope, run)
                    })
                    .collect::<std::io::Result<_>>()?;
                started.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a thread panicked")?)
            })
        })
    };
    // Before anything else has been read: the host may have to.
    deep("random-read-cold", false)?;
    let mut room = Vec::new();
    let piece = aligned(&mut room, PIECE_BYTES);
    let offsets = || (0..mebibytes).map(|at| at << 20);
    row("write", mebibytes << 20, || Ok(offsets().try_for_each(|at| disk.write_all_at(piece, at))?))?;
    row("read", mebibytes << 20, || Ok(offsets().try_for_each(|at| disk.read_exact_at(piece, at))?))?;
    row("random-read", operations, || work(0, operations, false))?;
    row("random-write", operations, || work(0, operations, true))?;
    deep("random-read-deep", false)?;
    deep("random-write-deep", true)?;
    let flushes = operations.div_ceil(10);
    row("write-flush", flushes, || {
        let mut room = Vec::new();
        let page = aligned(&mut room, PAGE_BYTES);
        for at in (Pages { state: 88_172_645_463_325_252, pages }).take(usize::try_from(flushes)?) {
            disk.write_all_at(page, at * 4096)?;
            disk.sync_data()?;
        }
        Ok(())
    })
}

/// Mounts the file system `tag`, and has `load` work on `folder` in it, with that much read ahead.
fn share(tag: &str, read_ahead_kib: &str, folder: &str, load: &[&str]) -> Result {
    std::fs::create_dir_all("/share")?;
    rustix::mount::mount(tag, "/share", "virtiofs", MountFlags::RDONLY, None)?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let device = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(2);
        let device = words.next()?;
        (words.nth(1)? == "/share").then_some(device)
    });
    for device in device {
        std::fs::write(format!("/sys/class/bdi/{device}/read_ahead_kb"), read_ahead_kib)?;
    }
    // As a step sees a share: the device is asked anew for the name of one each time.
    std::fs::create_dir_all("/work")?;
    rustix::mount::mount_bind(format!("/share/{folder}"), "/work")?;
    let status = Command::new("/load").args(load).arg("share=/work").status()?;
    if status.success() { Ok(()) } else { Err(format!("load: {status}").into()) }
}

/// Where the port `bench` is.
fn serial_port() -> Result<std::path::PathBuf> {
    for port in std::fs::read_dir("/sys/class/virtio-ports")? {
        let port = port?;
        if std::fs::read_to_string(port.path().join("name")).is_ok_and(|name| name.trim() == "bench") {
            return Ok(Path::new("/dev").join(port.file_name()));
        }
    }
    Err("no port `bench`".into())
}

/// A stream to a vsock port of the host (vsock(7)).
fn connect_vsock(port: u32) -> Result<File> {
    use rustix::net::{AddressFamily, SocketType};
    let socket = rustix::net::socket(AddressFamily::VSOCK, SocketType::STREAM, None)?;
    // SAFETY: sockaddr_vm is a C struct of integers, for which all zeros is a value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK)?;
    address.svm_cid = libc::VMADDR_CID_HOST;
    address.svm_port = port;
    let length = libc::socklen_t::try_from(size_of::<libc::sockaddr_vm>())?;
    // SAFETY: the address is live and its length is given.
    match unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) } {
        0 => Ok(socket.into()),
        _ => Err(std::io::Error::last_os_error().into()),
    }
}

/// Messages to an echo and back, one after the other.
fn round_trips(name: &str, stream: &mut (impl Read + Write), count: u64) -> Result {
    let (message, mut answer) = ([0x5a; MESSAGE_BYTES], [0; MESSAGE_BYTES]);
    let mut trip = || -> Result {
        stream.write_all(&message)?;
        stream.read_exact(&mut answer)?;
        if answer == message { Ok(()) } else { Err("another answer".into()) }
    };
    (0..REHEARSED).try_for_each(|_| trip())?;
    row(name, count, || (0..count).try_for_each(|_| trip()))
}
