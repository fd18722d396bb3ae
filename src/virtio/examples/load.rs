//! The guest's side of `ci/bench fs` and `ci/bench machine fs`: does the same work on one mount, or on several by turns, and prints
//! what it took.
//!
//! ```text
//! load ROUNDS ROWS [DIRECTORIES,MEBIBYTES,READS] NAME=DIRECTORY...
//! ```
//! ROWS are names with commas between them, or `all`. A directory holds what `ci/bench` lays out: `many` (so many DIRECTORIES, 200
//! unless said, of 100 files each), `big` (of so many MEBIBYTES, 512), `git`, `lua`. READS (4000) are small and random ones. Each line
//! printed is a row, a mount's name and nanoseconds of the monotonic clock. Before each row but the warm one
//! the guest's caches are dropped, and programs that the row runs are read from their disk again. Which mount is
//! first changes with every round.
#![expect(unsafe_code, reason = "maps a file")]
#![allow(clippy::print_stdout, reason = "a program for people")]

use std::error::Error;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use rustix::mm::{MapFlags, ProtFlags};

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

/// A row: its name, whether caches are dropped before it, the program it runs, what it does.
type Row = (&'static str, bool, &'static [&'static str], fn(&Path, Sizes) -> Result);

const ROWS: [Row; 9] = [
    ("stat-cold", true, &[], stat_walk),
    ("stat-warm", false, &[], stat_walk),
    ("find-missed", true, &[], find_missed),
    ("small-reads", true, &[], small_reads),
    ("sequential", true, &[], sequential),
    ("random-4k", true, &[], random),
    ("mmap", true, &[], mapped),
    ("git-status", true, &["git", "--version"], git_status),
    ("compile", true, &["gcc", "-O0", "-c", "-o", "/tmp/warm.o", "/tmp/warm.c"], compile),
];

const PAGE: usize = 4096;
/// How many files a directory in `many` has.
const FILES: usize = 100;

/// How much there is to work on.
#[derive(Clone, Copy)]
struct Sizes {
    directories: usize,
    mebibytes: usize,
    reads: usize,
}

impl Sizes {
    fn parse(text: &str) -> Result<Self> {
        let numbers = text.split(',').map(str::parse).collect::<std::result::Result<Vec<_>, _>>()?;
        let [directories, mebibytes, reads] = numbers[..] else { return Err("three sizes".into()) };
        Ok(Self { directories, mebibytes, reads })
    }
}

fn main() -> Result {
    let mut arguments = std::env::args().skip(1).peekable();
    let rounds: usize = arguments.next().ok_or("rounds")?.parse()?;
    let wanted = arguments.next().ok_or("rows")?;
    let wanted: Vec<&str> = wanted.split(',').collect();
    let rows = ROWS.iter().filter(|(row, ..)| wanted.contains(row) || wanted == ["all"]);
    let sizes = arguments.next_if(|argument| !argument.contains('='));
    let sizes = Sizes::parse(sizes.as_deref().unwrap_or("200,512,4000"))?;
    let mounts: Vec<String> = arguments.collect();
    touch_memory()?;
    std::fs::write("/tmp/warm.c", "#include <stdio.h>\nint main(void) { return puts(\"\"); }\n")?;
    for round in 0..rounds {
        for (row, cold, program, work) in rows.clone() {
            for at in 0..mounts.len() {
                let mount = mounts.get((at + round) % mounts.len()).ok_or("mount")?;
                let (name, directory) = mount.split_once('=').ok_or("NAME=DIRECTORY")?;
                if *cold {
                    drop_caches()?;
                    if let Some((program, rest)) = program.split_first() {
                        run(Command::new(program).args(rest))?;
                    }
                } else {
                    // A build goes on for longer than a second or two.
                    work(Path::new(directory), sizes)?;
                    std::thread::sleep(std::time::Duration::from_secs(2));
                }
                let began = Instant::now();
                work(Path::new(directory), sizes).map_err(|error| format!("{row} on {name}: {error}"))?;
                println!("row {row} {name} {}", began.elapsed().as_nanos());
            }
        }
    }
    Ok(())
}

/// Touches most of the guest's memory. The host finds a page for each that is touched first, and whoever reads a large file
/// first would be charged for all of them.
fn touch_memory() -> Result {
    let known = std::fs::read_to_string("/proc/meminfo")?;
    let available =
        known.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB"));
    let kibibytes: usize = available.ok_or("MemAvailable")?.parse()?;
    let mut memory: Vec<u8> = Vec::new();
    memory.resize(kibibytes / 10 * 9 * 1024, 1);
    std::hint::black_box(&memory);
    Ok(())
}

fn drop_caches() -> Result {
    // Entries are freed a generation at a time, and forgetting them is work for the devices that is not a row's.
    for _ in 0..3 {
        std::fs::write("/proc/sys/vm/drop_caches", "3")?;
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    Ok(())
}

fn run(command: &mut Command) -> Result {
    let status = command.stdout(Stdio::null()).status()?;
    if status.success() { Ok(()) } else { Err(format!("{command:?}: {status}").into()) }
}

/// Files below `directory`, by listings alone.
fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let (mut found, mut waiting) = (Vec::new(), vec![directory.to_owned()]);
    while let Some(directory) = waiting.pop() {
        for entry in std::fs::read_dir(directory)? {
            let entry = entry?;
            let into = if entry.file_type()?.is_dir() { &mut waiting } else { &mut found };
            into.push(entry.path());
        }
    }
    Ok(found)
}

fn expect(found: usize, wanted: usize) -> Result {
    if found == wanted { Ok(()) } else { Err(format!("{found} where {wanted} should be").into()) }
}

/// What `du`, `tar` and `git status` do: lists a directory, asks for the metadata of all in it, and goes on to those
/// that are directories.
fn stat_walk(share: &Path, sizes: Sizes) -> Result {
    let (mut files, mut waiting) = (0, vec![share.join("many")]);
    while let Some(directory) = waiting.pop() {
        let entries: Vec<_> = std::fs::read_dir(directory)?.collect::<std::io::Result<_>>()?;
        for entry in entries {
            if std::fs::symlink_metadata(entry.path())?.is_dir() {
                waiting.push(entry.path());
            } else {
                files += 1;
            }
        }
    }
    expect(files, sizes.directories * FILES)
}

/// What compilers do with their search paths: asks for names that are not there, and the second compiler for the same.
fn find_missed(share: &Path, sizes: Sizes) -> Result {
    let mut files = files(&share.join("many"))?;
    let mut missed = 0;
    for _ in 0..2 {
        for file in &mut files {
            file.set_extension("missing");
            missed += usize::from(std::fs::symlink_metadata(file).is_err());
        }
    }
    expect(missed, sizes.directories * FILES * 2)
}

fn small_reads(share: &Path, sizes: Sizes) -> Result {
    let mut bytes = Vec::new();
    for at in 0..sizes.reads {
        let file =
            share.join(format!("many/d{}/f{}", at % sizes.directories, at / sizes.directories % FILES));
        bytes.clear();
        File::open(file)?.read_to_end(&mut bytes)?;
        expect(bytes.len(), 2048)?;
    }
    Ok(())
}

fn sequential(share: &Path, sizes: Sizes) -> Result {
    let mut big = File::open(share.join("big"))?;
    let (mut buffer, mut total) = (vec![0; 1 << 20], 0);
    loop {
        match big.read(&mut buffer)? {
            0 => return expect(total, sizes.mebibytes << 20),
            count => total += count,
        }
    }
}

fn random(share: &Path, sizes: Sizes) -> Result {
    let big = File::open(share.join("big"))?;
    let mut buffer = [0; PAGE];
    let pages = big.metadata()?.len() / 4096;
    let mut state = 88_172_645_463_325_252_u64;
    for _ in 0..sizes.reads {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        big.read_exact_at(&mut buffer, state % pages * 4096)?;
    }
    Ok(())
}

fn mapped(share: &Path, _: Sizes) -> Result {
    let big = File::open(share.join("big"))?;
    let length = usize::try_from(big.metadata()?.len())?;
    // SAFETY: a new mapping at a place the kernel chooses aliases nothing of this process.
    let at = unsafe {
        rustix::mm::mmap(std::ptr::null_mut(), length, ProtFlags::READ, MapFlags::PRIVATE, &big, 0)?
    };
    let mut sum = 0_u64;
    for offset in (0..length).step_by(PAGE) {
        // SAFETY: `offset` lies in the mapping just made, and nobody changes the file.
        sum += u64::from(unsafe { at.cast::<u8>().add(offset).read_volatile() });
    }
    // SAFETY: the mapping made above, of which no reference is left.
    unsafe { rustix::mm::munmap(at, length)? };
    if sum == 0 { Err("the file is all zeroes".into()) } else { Ok(()) }
}

fn git_status(share: &Path, _: Sizes) -> Result {
    let git = ["--no-optional-locks", "-c", "safe.directory=*", "status", "--porcelain"];
    run(Command::new("git").arg("-C").arg(share.join("git")).args(git))
}

/// lua's own Makefile builds beside its sources; this compiles the same files elsewhere, two at a time.
fn compile(share: &Path, _: Sizes) -> Result {
    let build = Path::new("/tmp/build");
    std::fs::create_dir(build)?;
    let script =
        "printf '%s\\n' \"$1\"/l*.c | xargs -P 2 -n 1 gcc -O0 -c -DLUA_COMPAT_5_3 && ar rc liblua.a l*.o";
    let mut shell = Command::new("sh");
    run(shell.current_dir(build).args(["-euc", script, "sh"]).arg(share.join("lua/src")))?;
    expect(usize::from(build.join("liblua.a").exists()), 1)?;
    Ok(std::fs::remove_dir_all(build)?)
}
