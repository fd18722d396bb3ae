//! A guest whose processor does the accesses to a device's registers: a program of a few instructions in a machine of kiln's own
//! VMM, which takes an order at a time from a place in its memory. So what KVM makes of an access, and what it takes upon itself,
//! is between the case and the device. Queues stay in memory of the case's own.

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
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::testkit::{CODE, device, kernel};

/// Where orders are put: what to do, and behind it an address, a value, how often, and bytes.
const ORDER: u64 = CODE + 0x10_0000;
const ADDRESS: u64 = ORDER + 8;
const VALUE: u64 = ORDER + 16;
const TIMES: u64 = ORDER + 24;
const BYTES: u64 = ORDER + 64;
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

fn program() -> Vec<u8> {
    // mov rbx, ORDER
    let mut code = b"\x48\xbb".to_vec();
    code.extend(ORDER.to_le_bytes());
    let wait = code.len();
    // pause; mov ecx, [rbx]; test ecx, ecx; jz wait
    code.extend(b"\xf3\x90\x8b\x0b\x85\xc9\x74\xf8");
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
    code
}

/// The guest never stops looking for an order: whoever else has something to do comes first.
fn patient() -> std::io::Result<()> {
    Ok(rustix::process::setpriority_process(None, 19)?)
}

/// A machine with one device, whose processor waits for orders.
pub struct Processor {
    memory: GuestMemoryMmap,
    window: u64,
    ends: Receiver<End>,
    /// It stops with this.
    _running: Running,
}

impl Processor {
    /// One before the device of `slot`, whose interrupts stay the case's.
    pub fn new(slot: &Slot) -> Result<Self, String> {
        let say = |error: std::io::Error| error.to_string();
        let memory = make_file(LEAST_BYTES).and_then(|file| map(&file, LEAST_BYTES));
        let memory = memory.map_err(|error| error.to_string())?;
        let notified = slot.notified.iter().map(EventFd::try_clone).collect::<Result<_, _>>().map_err(say)?;
        let interrupt = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(say)?;
        let (sender, ends) = channel();
        let parts = Parts {
            kvm: device().ok_or("there is no KVM")?.into(),
            origin: Origin::Boot {
                kernel: kernel(&program()),
                initramfs: tempfile::tempfile().map_err(say)?,
                command_line: String::new(),
            },
            generation: [7; 16],
            memory: memory.clone(),
            working_set: None,
            cpus: 1,
            model: Model::Fixed,
            console: Box::new(std::io::sink()),
            devices: vec![Slot { device: Arc::clone(&slot.device), interrupt, notified }],
            on_end: Arc::new(move |end| drop(sender.send(end))),
        };
        let running = Machine::new(parts).and_then(|machine| machine.start(patient));
        let (window, _) = acpi::place(0).ok_or("there is no place for a device")?;
        let running = running.map_err(|error| error.to_string())?;
        Ok(Self { memory, window: window.0, ends, _running: running })
    }

    /// Has it done: the value that it leaves.
    fn order(&self, deed: u32, offset: u64, value: u64, times: u64) -> u64 {
        let put = |at, value: u64| self.memory.write_obj(value, GuestAddress(at)).expect("memory");
        put(ADDRESS, self.window.wrapping_add(offset));
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

    /// What `data` is long, as one piece where a processor has one of that length.
    fn deed(length: usize) -> Option<u32> {
        let width = WIDTHS.iter().position(|width| *width == length)?;
        u32::try_from(width + 1).ok()
    }

    /// Reads the device's window.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let length = data.len();
        match Self::deed(length) {
            Some(deed) => {
                let value = self.order(deed + 4, offset, 0, 1).to_le_bytes();
                data.copy_from_slice(&value[..length]);
            }
            None => {
                self.order(COPY_IN, offset, length as u64, 1);
                self.memory.read_slice(data, GuestAddress(BYTES)).expect("memory");
            }
        }
    }

    /// Writes there, of a piece of four bytes so many times.
    pub fn write(&self, offset: u64, data: &[u8], times: u64) {
        match Self::deed(data.len()) {
            Some(deed) => {
                let mut value = [0; 8];
                value[..data.len()].copy_from_slice(data);
                self.order(deed, offset, u64::from_le_bytes(value), times);
            }
            None => {
                self.memory.write_slice(data, GuestAddress(BYTES)).expect("memory");
                self.order(COPY_OUT, offset, data.len() as u64, 1);
            }
        }
    }
}

/// Whether cases are run against guests: where a KVM is there that is one.
pub fn is_wanted() -> bool {
    std::env::var_os("KILN_KVM_REQUIRED").is_some()
}
