//! The driver: it offers requests and chains that no driver offers, breaks rings, and gives what came of that as bytes.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kiln_vmm::mmio::Carried;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::testkit::{INDIRECT, NEXT, Ring, SEAM, WRITE, describe_at};

pub const QUEUE_SIZE: u16 = 64;
pub const PATIENCE: Duration = Duration::from_secs(20);
pub const VERSION_1: u64 = 1 << 32;
const EVENT_IDX: u64 = 1 << 29;
const INDIRECT_DESC: u64 = 1 << 28;
/// What drivers negotiate, of what is offered.
pub const NEGOTIATED: [u64; 4] = [VERSION_1, VERSION_1 | EVENT_IDX, VERSION_1 | INDIRECT_DESC, u64::MAX];
/// What is in the room for an answer before.
pub const POISON: u8 = 0xa5;

/// A device behind some transport, and the driver's side of its queues.
pub struct Driven {
    pub memory: GuestMemoryMmap,
    pub rings: Vec<Ring>,
    pub notified: Vec<EventFd>,
    pub features: u64,
    /// Whether the driver has broken a queue.
    pub broken: Box<dyn Fn() -> bool>,
    /// The device where it is on a bus.
    pub carried: Option<Arc<Mutex<dyn Carried>>>,
    /// A request in another queue that follows each notification, where what was offered has no answer without it.
    pub prompt: Option<(usize, Vec<u8>)>,
    /// What lives as long as the device.
    pub _keep: Box<dyn std::any::Any>,
}

impl Driven {
    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).expect("memory");
    }

    pub fn read(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).expect("memory");
        bytes
    }

    pub fn notify(&mut self, queue: usize) {
        self.notified[queue].write(1).expect("a notification");
        if let Some((other, request)) = self.prompt.take() {
            self.ask(other, &request, 0);
            self.prompt = Some((other, request));
        }
    }

    /// Waits for the next used element of `queue`; none where the device has ended.
    pub fn used(&mut self, queue: usize) -> Option<(u32, u32)> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            // Before the ring: what came back before the end is there by then.
            let has_ended = (self.broken)();
            if let Some(used) = self.rings[queue].used(&self.memory) {
                return Some(used);
            }
            if has_ended {
                return None;
            }
            assert!(Instant::now() < deadline, "queue {queue} is silent");
            std::thread::yield_now();
        }
    }

    /// Offers the chain at `head` of `queue`, and gives what came of it in bytes: the used element, and the room as it is then.
    pub fn offer(&mut self, queue: usize, head: u16) -> Vec<u8> {
        let room = self.rings[queue].answer();
        self.rings[queue].offer(&self.memory, head);
        self.notify(queue);
        match self.used(queue) {
            None => b"broken".to_vec(),
            Some((head, length)) => {
                let mut came = [head, length].map(u32::to_le_bytes).concat();
                came.extend(self.read(room, 1024));
                came
            }
        }
    }

    /// One request with `room` for its answer.
    pub fn ask(&mut self, queue: usize, request: &[u8], room: u32) -> Vec<u8> {
        let (at, answer) = (self.rings[queue].data(), self.rings[queue].answer());
        let length = u32::try_from(request.len()).expect("short");
        self.write(at, request);
        self.write(answer, &[POISON; 1024]);
        let more = if room > 0 { NEXT } else { 0 };
        self.rings[queue].describe(&self.memory, 0, (at, length), more, 1);
        self.rings[queue].describe(&self.memory, 1, (answer, room), WRITE, 0);
        self.offer(queue, 0)
    }

    /// Chains that are wrong in every way that is known, with good ones between them.
    pub fn hostile_chains(&mut self, queue: usize, good: &[u8]) -> Vec<Vec<u8>> {
        let (at, answer) = (self.rings[queue].data(), self.rings[queue].answer());
        let (end, length) = (SEAM + (1 << 20), u32::try_from(good.len()).expect("short"));
        // Address, length, flags and next of each descriptor.
        type Chain = Vec<((u64, u32), u16, u16)>;
        let chains: Vec<Chain> = vec![
            vec![((at, length), NEXT, 0)],
            vec![((at, 1), NEXT, 1), ((at, 1), NEXT, 0)],
            vec![((at, length), NEXT, 999)],
            vec![((at, 0), 0, 0)],
            vec![((at, u32::MAX), 0, 0)],
            vec![((end - 1, 2), 0, 0)],
            vec![((u64::MAX - 3, 8), WRITE, 0)],
            vec![((answer, 64), WRITE | NEXT, 1), ((at, length), 0, 0)],
            vec![((at, length), NEXT, 1), ((answer, u32::MAX), WRITE, 0)],
            vec![((at, length), INDIRECT, 0)],
            vec![((at, 15), INDIRECT | NEXT, 1)],
            vec![((at, length), NEXT, 1), ((at, 16), INDIRECT, 0)],
            vec![((at, length / 2), NEXT, 1), ((at, 0), NEXT, 2), ((answer, 300), WRITE, 0)],
            vec![((SEAM - 4, 20), NEXT, 1), ((SEAM - 400, 300), WRITE, 0)],
        ];
        let mut answers = Vec::new();
        for chain in chains {
            self.write(at, good);
            self.write(answer, &[POISON; 1024]);
            for (index, (piece, flags, next)) in (0..).zip(chain) {
                self.rings[queue].describe(&self.memory, index, piece, flags, next);
            }
            answers.push(self.offer(queue, 0));
            answers.push(self.ask(queue, good, 1000));
        }
        // A good one by way of an indirect table.
        let table = at + 0x8000;
        self.write(answer, &[POISON; 1024]);
        describe_at(&self.memory, table, (at, length), NEXT, 1);
        describe_at(&self.memory, table + 16, (answer, 1000), WRITE, 0);
        self.rings[queue].describe(&self.memory, 0, (table, 32), INDIRECT, 0);
        answers.push(self.offer(queue, 0));
        answers
    }

    /// Breaks `queue`; what comes of that.
    pub fn break_ring(&mut self, queue: usize, good: &[u8], index: Option<u16>) -> Vec<u8> {
        match index {
            Some(index) => {
                self.rings[queue].set_available(&self.memory, index);
                self.notify(queue);
                self.used(queue).map_or(b"broken".to_vec(), |_| b"served".to_vec())
            }
            None => {
                self.write(self.rings[queue].data(), good);
                self.offer(queue, QUEUE_SIZE)
            }
        }
    }
}
