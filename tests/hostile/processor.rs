//! A guest whose processor does what a case says of registers, rings and memory: a program of a few instructions in a machine of
//! kiln's own VMM, which takes an order at a time from a place in its memory. So what KVM makes of an access, and what it takes
//! upon itself, is between the case and the device.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use kiln_vmm::acpi;
use kiln_vmm::cpu::Model;
use kiln_vmm::memory::{LEAST_BYTES, make_file, map};
use kiln_vmm::vcpu::End;
use kiln_vmm::vm::{Running, Slot};
use kiln_vmm::{Machine, Origin, Parts};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::rings::REGIONS;
use super::testkit::{CODE, device, kernel};

/// The program's own page tables, which map the first 4 GiB as they are: those that it was started with are in the case's memory.
const TABLES: u64 = CODE + 0x1000;
/// Where it is told what to do with itself, a piece behind the other.
const ROUTINES: u64 = CODE + 0x8000;
/// Where orders are put: what to do, and behind it an address, a value, how often, where it goes while there is no order,
/// and bytes.
const ORDER: u64 = CODE + 0x10_0000;
const ADDRESS: u64 = ORDER + 8;
const VALUE: u64 = ORDER + 16;
const TIMES: u64 = ORDER + 24;
const ROUTINE: u64 = ORDER + 32;
/// How often all that flips has done so.
const FLIPPED: u64 = ORDER + 40;
const BYTES: u64 = ORDER + 64;
/// For how long what flips stays as it is.
const PAUSES: usize = 16;
/// How long an order may take: in machines of machines everything is slow.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long to leave the processor to the guest where there is one for both.
const A_MOMENT: Duration = Duration::from_micros(50);

/// What can be done, each as machine code of at most sixteen bytes with the jump back (SDM vol. 2): RDI has the address, RDX the
/// value or how many bytes, RSI the bytes.
const DEEDS: [&[u8]; 10] = [
    // mov [rdi], dl; and of 2 bytes
    b"\x88\x17",
    b"\x66\x89\x17",
    // mov r8, [rbx + 24]; mov [rdi], edx; dec r8; jnz to the mov
    b"\x4c\x8b\x43\x18\x89\x17\x49\xff\xc8\x75\xf9",
    // mov [rdi], rdx
    b"\x48\x89\x17",
    // movzx edx, byte [rdi]; and of 2, 4 and 8 bytes
    b"\x0f\xb6\x17",
    b"\x0f\xb7\x17",
    b"\x8b\x17",
    b"\x48\x8b\x17",
    // mov ecx, edx; rep movsb
    b"\x89\xd1\xf3\xa4",
    // the same the other way
    b"\x48\x87\xf7\x89\xd1\xf3\xa4",
];
/// The deed of a piece of so many bytes; reading one is four further on.
const WIDTHS: [usize; 4] = [1, 2, 4, 8];
const COPY_OUT: u32 = 9;
const COPY_IN: u32 = 10;

fn jump(code: &mut Vec<u8>, to: usize) {
    code.push(0xe9);
    let distance = i32::try_from(to).expect("short") - i32::try_from(code.len() + 4).expect("short");
    code.extend(distance.to_le_bytes());
}

/// The program, and where in it an order is waited for.
fn program() -> (Vec<u8>, usize) {
    // mov rax, TABLES; mov cr3, rax; mov rbx, ORDER
    let mut code = b"\x48\xb8".to_vec();
    code.extend(TABLES.to_le_bytes());
    code.extend(b"\x0f\x22\xd8\x48\xbb");
    code.extend(ORDER.to_le_bytes());
    let wait = code.len();
    // pause; mov ecx, [rbx]; test ecx, ecx; jnz over the next; jmp [rbx + 32]
    code.extend(b"\xf3\x90\x8b\x0b\x85\xc9\x75\x03\xff\x63\x20");
    // mov rdi, [rbx + 8]; mov rdx, [rbx + 16]; lea rsi, [rbx + 64]
    code.extend(b"\x48\x8b\x7b\x08\x48\x8b\x53\x10\x48\x8d\x73\x40");
    // dec ecx; shl ecx, 4; lea rax, [rip + to the deeds]; add rax, rcx; jmp rax
    code.extend(b"\xff\xc9\xc1\xe1\x04\x48\x8d\x05\x15\0\0\0\x48\x01\xc8\xff\xe0");
    let done = code.len();
    // mov [rbx + 16], rdx; mov dword [rbx], 0
    code.extend(b"\x48\x89\x53\x10\xc7\x03\0\0\0\0");
    jump(&mut code, wait);
    let deeds = done + 16;
    for (number, deed) in DEEDS.iter().enumerate() {
        code.resize(deeds + number * 16, 0x90);
        code.extend(*deed);
        jump(&mut code, done);
    }
    code.resize(usize::try_from(TABLES - CODE).expect("short"), 0);
    code.extend(tables());
    (code, wait)
}

/// Page tables (SDM vol. 3, 4.5): one page of each of the upper levels, and four of 2 MiB pages that can be written to.
fn tables() -> Vec<u8> {
    const PRESENT: u64 = 0x3;
    const LARGE: u64 = 0x80;
    let page = |number: u64| TABLES + number * 0x1000;
    let mut entries = vec![0; 1024];
    entries[0] = page(1) | PRESENT;
    for (entry, number) in entries[512..].iter_mut().zip(2..6) {
        *entry = page(number) | PRESENT;
    }
    entries.extend((0..2048).map(|number| number << 21 | PRESENT | LARGE));
    entries.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// Code that puts `bytes` at `address`, in pieces as large as can be.
fn put(code: &mut Vec<u8>, address: u64, bytes: &[u8]) -> Result<(), String> {
    let mut at = address;
    let mut rest = bytes;
    while !rest.is_empty() {
        let width = *WIDTHS.iter().rev().find(|width| **width <= rest.len()).expect("one is 1");
        let (piece, behind) = rest.split_at(width);
        // mov rdi, address
        code.extend(b"\x48\xbf");
        code.extend(at.to_le_bytes());
        match width {
            // mov byte, word or dword [rdi], piece
            1 => code.extend(b"\xc6\x07"),
            2 => code.extend(b"\x66\xc7\x07"),
            4 => code.extend(b"\xc7\x07"),
            // mov rax, piece
            _ => code.extend(b"\x48\xb8"),
        }
        code.extend(piece);
        if width == 8 {
            // mov [rdi], rax
            code.extend(b"\x48\x89\x07");
        }
        at = at.checked_add(width as u64).ok_or("no address is as high")?;
        rest = behind;
    }
    Ok(())
}

/// The guest never stops looking for an order: whoever else has something to do comes first.
fn patient() -> std::io::Result<()> {
    Ok(rustix::process::setpriority_process(None, 19)?)
}

/// A guest's memory, of which what a case has comes first.
pub struct Memory {
    all: GuestMemoryMmap,
    file: File,
}

impl Memory {
    pub fn new() -> Result<Self, String> {
        let file = make_file(LEAST_BYTES).map_err(|error| error.to_string())?;
        let all = map(&file, LEAST_BYTES).map_err(|error| error.to_string())?;
        Ok(Self { all, file })
    }

    /// The case's part of it, in the regions of cases.
    pub fn of_case(&self) -> Result<GuestMemoryMmap, String> {
        let regions = REGIONS.map(|(start, length)| {
            let file = self.file.try_clone().map_err(|error| error.to_string())?;
            Ok((GuestAddress(start), length, Some(FileOffset::new(file, start))))
        });
        let regions = regions.into_iter().collect::<Result<Vec<_>, String>>()?;
        GuestMemoryMmap::from_ranges_with_files(&regions).map_err(|error| error.to_string())
    }
}

/// A machine, with one device or none, whose processor waits for orders.
pub struct Processor {
    memory: GuestMemoryMmap,
    ends: Receiver<End>,
    /// Where it waits.
    waits: u64,
    /// What flips meanwhile, and where the next routine is put.
    flips: Vec<(u64, Vec<u8>, Vec<u8>)>,
    next: u64,
    /// It stops with this.
    _running: Running,
}

impl Processor {
    /// One in `memory`, before the device of `slot`, whose interrupts stay the case's. What it needs of memory to begin with is
    /// the case's again when this returns.
    pub fn new(memory: &Memory, slot: Option<&Slot>) -> Result<Self, String> {
        let say = |error: std::io::Error| error.to_string();
        let mut devices = Vec::new();
        if let Some(slot) = slot {
            let notified =
                slot.notified.iter().map(EventFd::try_clone).collect::<Result<_, _>>().map_err(say)?;
            let interrupt = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(say)?;
            devices.push(Slot { device: Arc::clone(&slot.device), interrupt, notified });
        }
        let (code, wait) = program();
        let waits = CODE + wait as u64;
        let memory = memory.all.clone();
        memory.write_obj(0_u32, GuestAddress(ORDER)).expect("memory");
        memory.write_obj(waits, GuestAddress(ROUTINE)).expect("memory");
        let (sender, ends) = channel();
        let parts = Parts {
            kvm: device().ok_or("there is no KVM")?.into(),
            origin: Origin::Boot {
                kernel: kernel(&code),
                initramfs: tempfile::tempfile().map_err(say)?,
                command_line: String::new(),
            },
            generation: [7; 16],
            memory: memory.clone(),
            working_set: None,
            cpus: 1,
            model: Model::Fixed,
            console: Box::new(std::io::sink()),
            devices,
            on_end: Arc::new(move |end| drop(sender.send(end))),
        };
        let running = Machine::new(parts).and_then(|machine| machine.start(patient));
        let running = running.map_err(|error| error.to_string())?;
        let processor = Self { memory, ends, waits, flips: Vec::new(), next: ROUTINES, _running: running };
        // It has its own page tables by now.
        processor.order(COPY_IN, ORDER, 0, 0);
        Ok(processor)
    }

    /// Where the device's registers are.
    pub fn window() -> u64 {
        acpi::place(0).expect("there is a place for a device").0.0
    }

    /// Has it done: the value that it leaves.
    fn order(&self, deed: u32, address: u64, value: u64, times: u64) -> u64 {
        let put = |at, value: u64| self.memory.write_obj(value, GuestAddress(at)).expect("memory");
        put(ADDRESS, address);
        put(VALUE, value);
        put(TIMES, times);
        self.memory.store(deed, GuestAddress(ORDER), Ordering::Release).expect("memory");
        let start = Instant::now();
        while self.memory.load::<u32>(GuestAddress(ORDER), Ordering::Acquire).expect("memory") != 0 {
            let end = self.ends.try_recv().ok();
            assert!(end.is_none(), "the guest ended: {end:?}");
            assert!(start.elapsed() < PATIENCE, "the guest does not do what it is told");
            std::thread::sleep(A_MOMENT);
        }
        self.memory.read_obj(GuestAddress(VALUE)).expect("memory")
    }

    /// Lets it write one and the other at `address` whenever it waits: first one of all that flips, and after a pause the other.
    pub fn flip(&mut self, address: u64, one: &[u8], other: &[u8]) -> Result<(), String> {
        self.flips.push((address, one.to_vec(), other.to_vec()));
        let mut code = Vec::new();
        for which in [false, true] {
            for (address, one, other) in &self.flips {
                put(&mut code, *address, if which { other } else { one })?;
            }
            // pause
            code.extend(b"\xf3\x90".repeat(PAUSES));
        }
        // inc qword [rbx + 40]
        code.extend(b"\x48\xff\x43\x28");
        let end = self.next + code.len() as u64 + 5;
        if end > ORDER {
            return Err("there is no room for more that flips".to_owned());
        }
        // jmp to where it waits, which is behind it.
        code.push(0xe9);
        let back = u32::try_from(end - self.waits).map_err(|error| error.to_string())?;
        code.extend(back.wrapping_neg().to_le_bytes());
        // Behind what it may be in the middle of.
        self.memory.write_slice(&code, GuestAddress(self.next)).map_err(|error| error.to_string())?;
        self.go(self.next);
        self.next = end;
        let flipped = || self.memory.load::<u64>(GuestAddress(FLIPPED), Ordering::Acquire).expect("memory");
        let (before, start) = (flipped(), Instant::now());
        while flipped() == before {
            assert!(start.elapsed() < PATIENCE, "the guest flips nothing");
            std::thread::sleep(A_MOMENT);
        }
        Ok(())
    }

    /// It only waits from now on.
    pub fn still(&mut self) {
        self.flips.clear();
        self.go(self.waits);
        // What it was in the middle of is over.
        self.order(COPY_IN, ORDER, 0, 0);
    }

    fn go(&self, routine: u64) {
        self.memory.store(routine, GuestAddress(ROUTINE), Ordering::Release).expect("memory");
    }

    /// What `data` is long, as one piece where a processor has one of that length.
    fn deed(length: usize) -> Option<u32> {
        let width = WIDTHS.iter().position(|width| *width == length)?;
        u32::try_from(width + 1).ok()
    }

    /// Reads registers or memory.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        let length = data.len();
        match Self::deed(length) {
            Some(deed) => {
                let value = self.order(deed + 4, address, 0, 1).to_le_bytes();
                data.copy_from_slice(&value[..length]);
            }
            None => {
                self.order(COPY_IN, address, length as u64, 1);
                self.memory.read_slice(data, GuestAddress(BYTES)).expect("memory");
            }
        }
    }

    /// Writes there, of a piece of four bytes so many times.
    pub fn write(&self, address: u64, data: &[u8], times: u64) {
        match Self::deed(data.len()) {
            Some(deed) => {
                let mut value = [0; 8];
                value[..data.len()].copy_from_slice(data);
                self.order(deed, address, u64::from_le_bytes(value), times);
            }
            None => {
                self.memory.write_slice(data, GuestAddress(BYTES)).expect("memory");
                self.order(COPY_OUT, address, data.len() as u64, 1);
            }
        }
    }
}

/// Whether cases are run against guests: where a KVM is there that is one.
pub fn is_wanted() -> bool {
    std::env::var_os("KILN_KVM_REQUIRED").is_some()
}
