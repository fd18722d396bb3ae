//! A driver for tests: writes descriptors into a small guest memory, well or badly, and reads the used ring.

use std::fs::File;
use std::num::Wrapping;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

/// VIRTQ_DESC_F_NEXT.
pub const NEXT: u16 = 1;
/// VIRTQ_DESC_F_WRITE.
pub const WRITE: u16 = 2;
/// VIRTQ_DESC_F_INDIRECT.
pub const INDIRECT: u16 = 4;

/// Two regions that touch, so that a buffer can lie across them.
pub const REGIONS: [(u64, usize); 2] = [(0, 8 << 20), (8 << 20, 1 << 20)];
/// Where the two regions touch.
pub const SEAM: u64 = 8 << 20;

const RING_STRIDE: u64 = 0x10000;
const DATA_STRIDE: u64 = 0x20_0000;

/// One virtqueue, seen from the driver.
pub struct Ring {
    /// The device's side of it.
    pub queue: Queue,
    base: u64,
    data: u64,
    size: u16,
    available: Wrapping<u16>,
    used: Wrapping<u16>,
}

/// Guest memory.
pub fn memory() -> GuestMemoryMmap {
    let regions = REGIONS.map(|(start, length)| (GuestAddress(start), length));
    GuestMemoryMmap::from_ranges(&regions).expect("memory")
}

/// Guest memory that another process could map, and that cannot shrink.
pub fn shared_memory() -> GuestMemoryMmap {
    let regions = REGIONS.map(|(start, length)| {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("guest", flags).expect("file"));
        file.set_len(length as u64).expect("length");
        fcntl_add_seals(&file, SealFlags::SHRINK).expect("seal");
        (GuestAddress(start), length, Some(FileOffset::new(file, 0)))
    });
    GuestMemoryMmap::from_ranges_with_files(regions).expect("memory")
}

impl Ring {
    /// Ring number `number` of `size` descriptors.
    pub fn new(number: u64, size: u16) -> Self {
        let base = RING_STRIDE * (number + 1);
        let mut queue = Queue::new(size).expect("size");
        queue.try_set_desc_table_address(GuestAddress(base)).expect("aligned");
        queue.try_set_avail_ring_address(GuestAddress(base + 0x8000)).expect("aligned");
        queue.try_set_used_ring_address(GuestAddress(base + 0xa000)).expect("aligned");
        queue.set_ready(true);
        let data = DATA_STRIDE * (number + 1);
        Self { queue, base, data, size, available: Wrapping(0), used: Wrapping(0) }
    }

    /// Where descriptor table, available and used ring are.
    pub fn addresses(&self) -> [u64; 3] {
        [self.base, self.base + 0x8000, self.base + 0xa000]
    }

    /// Where this ring's buffers start.
    pub fn data(&self) -> u64 {
        self.data
    }

    /// Writes one descriptor of the table.
    pub fn describe(
        &self,
        memory: &GuestMemoryMmap,
        index: u16,
        (address, length): (u64, u32),
        flags: u16,
        next: u16,
    ) {
        describe_at(memory, self.base + u64::from(index) * 16, (address, length), flags, next);
    }

    /// Makes the chain that starts at `head` available.
    pub fn offer(&mut self, memory: &GuestMemoryMmap, head: u16) {
        let at = self.base + 0x8004 + u64::from(self.available.0 % self.size) * 2;
        memory.write_obj(head, GuestAddress(at)).expect("ring");
        self.available += 1;
        self.set_available(memory, self.available.0);
    }

    /// Sets the available index, whatever was offered.
    pub fn set_available(&mut self, memory: &GuestMemoryMmap, index: u16) {
        memory.write_obj(index, GuestAddress(self.base + 0x8002)).expect("ring");
        self.available = Wrapping(index);
    }

    /// The next used element: head and length.
    pub fn used(&mut self, memory: &GuestMemoryMmap) -> Option<(u32, u32)> {
        let index: u16 = memory.read_obj(GuestAddress(self.base + 0xa002)).expect("ring");
        if Wrapping(index) == self.used {
            return None;
        }
        let at = self.base + 0xa004 + u64::from(self.used.0 % self.size) * 8;
        self.used += 1;
        let head = memory.read_obj(GuestAddress(at)).expect("ring");
        Some((head, memory.read_obj(GuestAddress(at + 4)).expect("ring")))
    }

    /// Offers `request` and `room` bytes for the answer, as descriptors 0 and 1.
    pub fn send(&mut self, memory: &GuestMemoryMmap, request: &[u8], room: u32) {
        let length = u32::try_from(request.len()).expect("short");
        memory.write_slice(request, GuestAddress(self.data)).expect("data");
        self.describe(memory, 0, (self.data, length), if room > 0 { NEXT } else { 0 }, 1);
        self.describe(memory, 1, (self.answer(), room), WRITE, 0);
        self.offer(memory, 0);
    }

    /// Where [`Ring::send`] puts the room for the answer.
    pub fn answer(&self) -> u64 {
        self.data + DATA_STRIDE / 2 - 0x2000
    }
}

/// Writes a descriptor anywhere.
pub fn describe_at(memory: &GuestMemoryMmap, at: u64, (address, length): (u64, u32), flags: u16, next: u16) {
    memory.write_obj(address, GuestAddress(at)).expect("table");
    memory.write_obj(length, GuestAddress(at + 8)).expect("table");
    memory.write_obj(flags, GuestAddress(at + 12)).expect("table");
    memory.write_obj(next, GuestAddress(at + 14)).expect("table");
}
