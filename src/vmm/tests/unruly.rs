//! Guests that never stop asking: ports, model-specific registers, CPUID, windows of devices and interrupt controllers, at
//! random and with all devices there. Each is a program of random instructions, in a machine and a process of its own, that
//! runs on behind whatever faults. However it ends, that end has a name, nothing panics, and it holds no more memory and
//! descriptors in the end than in the beginning.
//!
//! `KILN_UNRULY_SECONDS` says for how long, `KILN_UNRULY_SEED` with which first seed.

#![allow(clippy::disallowed_methods, reason = "a test's own environment, and it fails by panicking")]
#![allow(
    clippy::cast_possible_truncation,
    reason = "random words lose bits, and addresses of the program are low"
)]

use std::io;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use kiln_virtio::balloon::Balloon;
use kiln_virtio::console::Console;
use kiln_virtio::device::Device;
use kiln_virtio::fs::{Fs, Settings};
use kiln_virtio::rng::Rng;
use kiln_virtio::vsock::{Backend, Vsock};
use kiln_vmm::cpu::Model;
use kiln_vmm::disk::Disk;
use kiln_vmm::local::{Local, Thread};
use kiln_vmm::memory::{LEAST_BYTES, make_file, map};
use kiln_vmm::mmio::Registers;
use kiln_vmm::vm::{OnEnd, Slot};
use kiln_vmm::{Machine, Origin, Parts};
use testkit::{CODE, device, kernel};
use vm_memory::GuestMemoryMmap;

#[path = "../testkit.rs"]
mod testkit;

/// How long a machine is let run.
const RUN: Duration = Duration::from_secs(2);
/// How long a machine may take to be put together and to stop, on a slow host.
const PATIENCE: Duration = Duration::from_secs(60);
/// Instructions of a program.
const LENGTH: usize = 3000;
const CPUS: u8 = 2;
/// Below the code's end lies nothing else; the stack grows down from here.
const STACK: u32 = 0x01f0_0000;
/// What a process may hold more in the end: buffers of devices that the guest woke.
const MORE_KIB: u64 = 8 << 10;

/// Marsaglia's xorshift64: the same program for the same seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.roll() % end
    }

    fn word(&mut self) -> u32 {
        (self.roll() >> 16) as u32
    }

    fn one_of<T: Copy>(&mut self, list: &[T]) -> T {
        let index = self.below(list.len() as u64);
        list[usize::try_from(index).expect("small")]
    }

    /// A value for a register: what a driver might write, an address in memory, or anything.
    fn value(&mut self) -> u32 {
        match self.below(4) {
            0 => self.one_of(&[0, 1, 2, 3, 4, 7, 8, 11, 15, 16, 64, 128, 256, 0x8000]),
            1 => self.word() % 0x0200_0000,
            2 => 1 << self.below(32),
            _ => self.word(),
        }
    }

    fn port(&mut self) -> u16 {
        match self.below(4) {
            0 => 0x3f8 + u16::try_from(self.below(8)).expect("small"),
            1 => self.one_of(&[
                0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x40, 0x43, 0x61, 0x64, 0x70, 0x71, 0x80, 0xcf8, 0xcfc,
            ]),
            // Where the machine is switched off, by the bytes of a few values: not often, as that ends a program.
            2 if self.below(64) == 0 => 0x600 + u16::try_from(self.below(8)).expect("small"),
            _ => self.word() as u16,
        }
    }

    fn register(&mut self) -> u32 {
        let low = u32::try_from(self.below(0x200)).expect("small");
        match self.below(7) {
            // Where it is, and what interrupts wait for.
            0 => self.one_of(&[
                0x10,
                0x1b,
                0x174,
                0x1a0,
                0x277,
                0x2ff,
                0x6e0,
                0xc000_0080,
                0xc000_0081,
                0xc000_0101,
            ]),
            1 => 0x800 + low % 0x100,
            2 => 0x4b56_4d00 + low % 16,
            3 => 0xc001_0000 + low,
            4 => low,
            // Another hypervisor's.
            5 => 0x4000_0000 + low,
            _ => self.word(),
        }
    }

    /// In the window of a device, or just beside one; or an interrupt controller's.
    fn window(&mut self) -> u32 {
        let device = u32::try_from(self.below(14)).expect("small") * 0x1000;
        match self.below(8) {
            0 => 0xfee0_0000 + (self.word() & 0xff0),
            1 => 0xfec0_0000 + self.one_of(&[0, 0x10, 0x20, 0x40]),
            2 => 0xd000_0000 + device + self.word() % 0x1000,
            3 => 0xd000_0000 + device + (self.word() & 0xffc),
            _ => 0xd000_0000 + device + ((self.word() % 0x110) & !3),
        }
    }

    /// One thing to do, as machine code (SDM vol. 2).
    fn instruction(&mut self) -> Vec<u8> {
        let mut code = Vec::new();
        let mut put = |opcode: &[u8], operand: &[u8]| {
            code.extend_from_slice(opcode);
            code.extend_from_slice(operand);
        };
        match self.below(32) {
            // in from, and out to, DX.
            0..4 => {
                put(b"\x66\xba", &self.port().to_le_bytes());
                put(self.one_of(&[b"\xec".as_slice(), b"\x66\xed", b"\xed"]), b"");
            }
            4..8 => {
                put(b"\xb8", &self.value().to_le_bytes());
                put(b"\x66\xba", &self.port().to_le_bytes());
                put(self.one_of(&[b"\xee".as_slice(), b"\x66\xef", b"\xef"]), b"");
            }
            // rep ins and outs.
            8 => {
                put(b"\xbe", &(self.word() % 0x0200_0000).to_le_bytes());
                put(b"\xbf", &(0x0180_0000 + self.word() % 0x10_0000).to_le_bytes());
                put(b"\xb9", &(self.word() % 600).to_le_bytes());
                put(b"\x66\xba", &self.port().to_le_bytes());
                let all = [
                    b"\xf3\x6c".as_slice(),
                    b"\xf3\x66\x6d",
                    b"\xf3\x6d",
                    b"\xf3\x6e",
                    b"\xf3\x66\x6f",
                    b"\xf3\x6f",
                ];
                put(self.one_of(&all), b"");
            }
            9..11 => put(b"\xb9", &[&self.register().to_le_bytes()[..], b"\x0f\x32"].concat()),
            11..13 => {
                put(b"\xb9", &self.register().to_le_bytes());
                put(b"\xb8", &self.value().to_le_bytes());
                let high = self.word();
                put(b"\xba", &self.one_of(&[0, 0, high]).to_le_bytes());
                put(b"\x0f\x30", b"");
            }
            13 => {
                let leaf = self.one_of(&[0, 0x4000_0000, 0x8000_0000]) + self.word() % 0x30;
                let any = self.word();
                put(b"\xb8", &self.one_of(&[leaf, leaf, any]).to_le_bytes());
                put(b"\xb9", &(self.word() % 8).to_le_bytes());
                put(b"\x0f\xa2", b"");
            }
            // Loads from a window: of 1, 2, 4, 8 and 16 bytes.
            14..19 => {
                put(b"\xbb", &self.window().to_le_bytes());
                let all =
                    [b"\x8a\x03".as_slice(), b"\x66\x8b\x03", b"\x8b\x03", b"\x48\x8b\x03", b"\x0f\x10\x03"];
                put(self.one_of(&all), b"");
            }
            // And stores, some of them locked.
            19..28 => {
                put(b"\xbb", &self.window().to_le_bytes());
                put(b"\x48\xb8", &[self.value().to_le_bytes(), self.value().to_le_bytes()].concat());
                let all = [
                    b"\x88\x03".as_slice(),
                    b"\x66\x89\x03",
                    b"\x89\x03",
                    b"\x89\x03",
                    b"\x89\x03",
                    b"\x48\x89\x03",
                    b"\x0f\x11\x03",
                    b"\x87\x03",
                    b"\xf0\x01\x03",
                ];
                put(self.one_of(&all), b"");
            }
            // rep movsb and stosd across windows.
            28 => {
                put(b"\xbe", &self.window().to_le_bytes());
                put(b"\xbf", &self.window().to_le_bytes());
                put(b"\xb9", &(self.word() % 300).to_le_bytes());
                put(self.one_of(&[b"\xf3\xa4".as_slice(), b"\xf3\xab"]), b"");
            }
            // Interrupts on and off, calls of a hypervisor, xsetbv, mov to CR4 and CR8, and anything at all.
            29 => put(self.one_of(&[b"\xfb".as_slice(), b"\xfb", b"\xfa"]), b""),
            30 => {
                put(b"\xb8", &self.value().to_le_bytes());
                let all = [
                    b"\x0f\x01\xd9".as_slice(),
                    b"\x0f\x01\xc1",
                    b"\x0f\x01\xd1",
                    b"\x44\x0f\x22\xc0",
                    b"\x0f\x08",
                    b"\x0f\x00\xd8",
                    b"\x0f\x01\xf9",
                    b"\x0f\x33",
                    b"\x0f\x07",
                    b"\x0f\x35",
                ];
                put(self.one_of(&all), b"");
            }
            _ => put(&self.word().to_le_bytes(), b"\x90\x90\x90\x90\x90\x90\x90\x90"),
        }
        code
    }
}

/// A program that does [`LENGTH`] things over and over, and behind whatever faults goes on with the next.
fn program(seed: u64) -> Vec<u8> {
    let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut code = Vec::new();
    // Of descriptors of interrupts there is a page, before the first instruction that is not this one.
    const TABLE: u32 = CODE as u32 + 0x10;
    const POINTER: u32 = TABLE + 0x1000;
    const HANDLER: u32 = POINTER + 0x10;
    const START: u32 = HANDLER + 0x40;
    // jmp START
    code.push(0xe9);
    code.extend_from_slice(&(START - CODE as u32 - 5).to_le_bytes());
    code.resize(0x10, 0x90);
    for _ in 0..256 {
        // An interrupt gate to HANDLER, in the code segment that the machine begins with (SDM vol. 3, 7.14.1).
        let [low0, low1, high0, high1] = HANDLER.to_le_bytes();
        code.extend_from_slice(&[low0, low1, 0x10, 0, 0, 0x8e, high0, high1, 0, 0, 0, 0, 0, 0, 0, 0]);
    }
    code.extend_from_slice(&0xfff_u16.to_le_bytes());
    code.extend_from_slice(&u64::from(TABLE).to_le_bytes());
    code.resize((HANDLER - CODE as u32) as usize, 0x90);
    // mov rsp, STACK; mov eax, 0xfee000b0; xor ecx, ecx; mov [rax], ecx (the end of an interrupt); jmp r14
    code.extend_from_slice(b"\x48\xc7\xc4");
    code.extend_from_slice(&STACK.to_le_bytes());
    code.extend_from_slice(b"\xb8\xb0\x00\xe0\xfe\x31\xc9\x89\x08\x41\xff\xe6");
    code.resize((START - CODE as u32) as usize, 0x90);
    // mov rsp, STACK; lidt [POINTER]
    code.extend_from_slice(b"\x48\xc7\xc4");
    code.extend_from_slice(&STACK.to_le_bytes());
    code.extend_from_slice(b"\x0f\x01\x1c\x25");
    code.extend_from_slice(&POINTER.to_le_bytes());
    let again = code.len();
    for _ in 0..LENGTH {
        let instruction = dice.instruction();
        // lea r14, [rip + what comes next]
        code.extend_from_slice(b"\x4c\x8d\x35");
        code.extend_from_slice(&u32::try_from(instruction.len()).expect("short").to_le_bytes());
        code.extend_from_slice(&instruction);
    }
    // jmp again
    code.push(0xe9);
    let back = i32::try_from(code.len() + 4 - again).expect("short");
    code.extend_from_slice(&(-back).to_le_bytes());
    code
}

/// Accepts nothing.
struct Nobody;

impl Backend for Nobody {
    fn connect_from_guest(&mut self, _: u32) -> Option<UnixStream> {
        None
    }
}

/// All devices that a machine of kiln's has. The streams end where nobody reads.
fn devices(memory: &GuestMemoryMmap, on_end: &OnEnd) -> (Vec<Slot>, Box<dyn std::any::Any>) {
    fn slot<D: Device<()> + 'static>(
        name: &'static str,
        device: D,
        memory: &GuestMemoryMmap,
        on_end: &OnEnd,
    ) -> Slot {
        let thread = Thread { name, confine: || Ok(()), narrowing: None };
        let local = Local::new(thread, device, memory, Arc::clone(on_end)).expect("a thread");
        Registers::slot(local, memory).expect("registers")
    }
    let (fs, shares) = Fs::new(Settings::default());
    let (ours, wire) = UnixStream::pair().expect("a pair");
    let (vsock, connector) = Vsock::new(3, 100, Box::new(Nobody)).expect("descriptors");
    let disk = |serial: &str, read_only| {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(1 << 20).expect("room");
        Disk::slot(Some(file), serial, read_only, 1 << 24, |_| {}).expect("a disk")
    };
    let empty = Disk::slot(None, "empty", false, 1 << 24, |_| {}).expect("a disk");
    let slots = vec![
        slot("fs", fs, memory, on_end),
        slot("console", Console::new("wire", wire).expect("a console"), memory, on_end),
        slot("vsock", vsock, memory, on_end),
        slot("rng", Rng::new(), memory, on_end),
        slot("balloon", Balloon::new(), memory, on_end),
        slot("disk", disk("root", true), memory, on_end),
        slot("disk", disk("scratch", false).scratch(), memory, on_end),
        slot("disk", empty, memory, on_end),
    ];
    (slots, Box::new((shares, ours, connector)))
}

/// What this process holds: descriptors, and KiB of memory that is nobody else's.
fn held() -> (usize, u64) {
    let status = std::fs::read_to_string("/proc/self/status").expect("a status");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("a line");
    let kib = line.trim().trim_end_matches(" kB").parse().expect("a number");
    (std::fs::read_dir("/proc/self/fd").expect("a folder").count(), kib)
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// One machine: the seed is in the environment. Says how it ended.
#[test]
#[ignore = "run by the other, a process each"]
fn a_machine_of_its_own() {
    let Some(kvm) = device() else { return };
    let seed = number("KILN_UNRULY_SEED").unwrap_or(1);
    let (sender, ends) = mpsc::channel();
    let on_end: OnEnd = Arc::new(move |end| drop(sender.send(end)));
    let memory = map(&make_file(LEAST_BYTES).expect("memory"), LEAST_BYTES).expect("a mapping");
    let (slots, _kept) = devices(&memory, &on_end);
    let machine = Machine::new(Parts {
        kvm: kvm.into(),
        origin: Origin::Boot {
            kernel: kernel(&program(seed)),
            initramfs: tempfile::tempfile().expect("a file"),
            command_line: String::new(),
        },
        generation: [7; 16],
        memory,
        working_set: None,
        cpus: CPUS,
        model: if seed.is_multiple_of(2) { Model::Fixed } else { Model::Host },
        console: Box::new(io::sink()),
        devices: slots,
        on_end,
    });
    let mut running = machine.expect("a machine").start(|| Ok(())).expect("threads");
    let first = ends.recv_timeout(RUN / 4);
    let before = held();
    let end = first.or_else(|_| ends.recv_timeout(RUN - RUN / 4));
    let after = held();
    if let Ok(end) = &end {
        assert!(end.is_the_guests(), "seed {seed}: {end:?}");
    }
    let start = Instant::now();
    running.stop();
    assert!(start.elapsed() < PATIENCE, "seed {seed}: it took {:?} to stop", start.elapsed());
    let end = end.map_or("it was stopped".to_owned(), |end| end.to_string());
    assert!(after.0 <= before.0, "seed {seed}, {end}: {} descriptors, then {}", before.0, after.0);
    assert!(after.1 <= before.1 + MORE_KIB, "seed {seed}, {end}: {} KiB, then {}", before.1, after.1);
    println!("end: {end}");
    drop(running);
}

#[test]
fn whatever_a_guest_asks_for_its_machine_ends_by_name_and_holds_no_more() {
    if device().is_none() {
        return;
    }
    let time = Duration::from_secs(number("KILN_UNRULY_SECONDS").unwrap_or(5));
    let first = number("KILN_UNRULY_SEED").unwrap_or(1);
    let start = Instant::now();
    let mut ends = std::collections::BTreeMap::<String, u32>::new();
    for seed in first.. {
        let program = std::env::current_exe().expect("this program");
        let output = Command::new(program)
            .args(["--exact", "a_machine_of_its_own", "--ignored", "--nocapture", "--test-threads=1"])
            .env("KILN_UNRULY_SEED", seed.to_string())
            .output()
            .expect("a process");
        let said = String::from_utf8_lossy(&output.stdout);
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "seed {seed}: {}: {said}{complaint}", output.status);
        // A thread of a device's that panics ends alone.
        assert!(!complaint.contains("panicked"), "seed {seed}: {complaint}");
        let end = said.lines().find_map(|line| line.split_once("end: ")).map(|(_, end)| end);
        *ends.entry(end.expect("an end").to_owned()).or_default() += 1;
        if start.elapsed() >= time {
            break;
        }
    }
    println!("{} machines in {:?}: {ends:?}", ends.values().sum::<u32>(), start.elapsed());
}
