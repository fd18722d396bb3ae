//! The registers of kiln's own VMM and a disk behind them: accesses of any width anywhere, memory as it comes, and requests
//! of a driver that knows what it does, whose answers are held against a model of the disk.
//!
//! An input is steps, each an action (one byte), a place (two bytes), a length (one byte) and so many bytes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use kiln_virtio::device::{Device, Wake};
use kiln_vmm::bus::Bus;
use kiln_vmm::disk::Disk;
use kiln_vmm::mmio::{Lines, Queue, Registers, Target as Served};
use virtio_queue::{Queue as Virtqueue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::driver::{Seen, Target, campaign};
use crate::random::Random;
use crate::testkit::{NEXT, REGIONS, Ring, WRITE, memory};

/// Most steps of one input that are done.
const MOST_STEPS: usize = 64;
/// Length of the disk, and descriptors of its queue.
const SECTORS: u64 = 64;
const SECTOR_BYTES: usize = 512;
const DISK_BYTES: usize = 64 * SECTOR_BYTES;
const QUEUE_SIZE: u16 = 256;
const VERSION_1: u64 = 1 << 32;
const EVENT_IDX: u64 = 1 << 29;
const WINDOW_BYTES: u64 = 0x1000;
const STATUS: u64 = 0x70;
const NEEDS_RESET: u32 = 0x40;
/// Ends of requests.
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// What the place of an answer holds before.
const POISON: u8 = 0xa5;

/// The disk, served by whoever notifies it.
struct Carried {
    disk: Disk,
    ring: Option<Virtqueue>,
    starts: u64,
}

/// The registers' side of it.
struct Direct {
    carried: Arc<Mutex<Carried>>,
    features: u64,
    config: Vec<u8>,
}

impl Direct {
    fn lock(&self) -> std::sync::MutexGuard<'_, Carried> {
        self.carried.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Served for Direct {
    fn device_type(&self) -> u32 {
        2
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn connect(&mut self, _: Lines) -> io::Result<()> {
        Ok(())
    }

    fn start(&mut self, features: u64, queues: &[Option<Queue>]) -> io::Result<()> {
        assert_eq!(features & !self.features, 0, "what was not offered is not agreed on");
        assert_ne!(features & VERSION_1, 0);
        let mut carried = self.lock();
        assert!(carried.ring.is_none(), "it is started once");
        carried.starts += 1;
        let [queue] = queues else { unreachable!("there is one queue") };
        let Some(queue) = queue else { return Ok(()) };
        let end = REGIONS[1].0 + REGIONS[1].1 as u64;
        let size = u64::from(queue.size);
        assert!(queue.size <= QUEUE_SIZE && queue.size.is_power_of_two());
        assert!(queue.descriptors.0 + 16 * size <= end && queue.descriptors.0.is_multiple_of(16));
        assert!(queue.available.0 + 6 + 2 * size <= end && queue.available.0.is_multiple_of(2));
        assert!(queue.used.0 + 6 + 8 * size <= end && queue.used.0.is_multiple_of(4));
        let mut ring = Virtqueue::new(QUEUE_SIZE).expect("a size");
        ring.set_size(queue.size);
        ring.try_set_desc_table_address(queue.descriptors).expect("aligned");
        ring.try_set_avail_ring_address(queue.available).expect("aligned");
        ring.try_set_used_ring_address(queue.used).expect("aligned");
        ring.set_event_idx(features & EVENT_IDX != 0);
        ring.set_ready(true);
        carried.ring = Some(ring);
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        let mut carried = self.lock();
        carried.ring = None;
        Device::<()>::reset(&mut carried.disk);
        Ok(())
    }
}

/// A machine with one disk, and its driver.
struct Machine<'a> {
    memory: &'a GuestMemoryMmap,
    bus: Bus,
    carried: Arc<Mutex<Carried>>,
    ring: Ring,
    file: File,
    /// What the disk holds, as long as nobody has sent what the model does not know.
    model: Option<Vec<u8>>,
    /// Rings and registers are as the driver set them up.
    sound: bool,
}

impl Machine<'_> {
    fn get(&self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.bus.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    fn set(&self, offset: u64, value: u64) {
        let value = u32::try_from(value & u64::from(u32::MAX)).expect("masked");
        self.bus.write(offset, &value.to_le_bytes());
    }

    /// Brings the device up as a good driver does.
    fn start(&mut self, features: u64) {
        self.set(STATUS, 0);
        self.ring = Ring::new(0, QUEUE_SIZE);
        let [table, available, used] = self.ring.addresses();
        for at in [available, used] {
            self.memory.write_slice(&[0; 4], GuestAddress(at)).expect("memory");
        }
        self.set(STATUS, 1);
        self.set(STATUS, 3);
        for page in [0, 1] {
            self.set(0x24, page);
            self.set(0x20, features >> (32 * page));
        }
        self.set(STATUS, 11);
        self.set(0x38, QUEUE_SIZE.into());
        for (register, at) in [(0x80, table), (0x90, available), (0xa0, used)] {
            self.set(register, at);
        }
        self.set(0x44, 1);
        self.set(STATUS, 15);
        self.sound = self.get(STATUS) == 15;
        if self.model.is_none() {
            let mut bytes = vec![0; DISK_BYTES];
            self.file.read_exact_at(&mut bytes, 0).expect("as long as before");
            self.model = Some(bytes);
        }
    }

    /// Lets the disk work; false where the driver has broken its queue, and the machine ends.
    fn process(&self) -> bool {
        let mut carried = self.carried.lock().unwrap_or_else(PoisonError::into_inner);
        let Carried { disk, ring, .. } = &mut *carried;
        for _ in 0..1000 {
            let mut queues = [ring.as_mut()];
            match Device::<()>::process(disk, Wake::Queue(0), &mut queues, self.memory) {
                Ok(outcome) if outcome.again => {}
                Ok(_) => return true,
                Err(_) => return false,
            }
        }
        unreachable!("the disk has no end of things to do")
    }

    /// A request of a driver that knows what it does: type, sector, and data or room.
    fn request(&mut self, kind: u8, sector: u16, bytes: &[u8], seen: &mut Seen) -> bool {
        let kind = [0_u32, 0, 1, 1, 4, 8, 11, 13, 2, 99][usize::from(kind) % 10];
        let sector =
            if sector < 0xff00 { u64::from(sector) % 80 } else { u64::MAX / 512 - u64::from(sector) };
        // Sectors for data come from few bytes; parts to discard as they are.
        let count = bytes.first().map_or(1, |count| usize::from(*count) % 5);
        let data = match kind {
            1 => bytes.iter().copied().cycle().take(if bytes.is_empty() { 0 } else { count * 512 }).collect(),
            11 | 13 => bytes.to_vec(),
            _ => Vec::new(),
        };
        let room = match kind {
            0 => count * SECTOR_BYTES + usize::from(bytes.len() % 7 == 6),
            8 => 16 + count * 2,
            _ => 0,
        };
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        let (at, answer) = (self.ring.data(), self.ring.answer() - 0x4000);
        self.memory.write_slice(&[&header[..], &data].concat(), GuestAddress(at)).expect("memory");
        self.memory.write_slice(&vec![POISON; room + 16], GuestAddress(answer)).expect("memory");
        let length = |bytes: usize| u32::try_from(bytes).expect("short");
        self.ring.describe(self.memory, 0, (at, length(header.len() + data.len())), NEXT, 1);
        self.ring.describe(self.memory, 1, (answer, length(room + 1)), WRITE, 0);
        self.ring.offer(self.memory, 0);
        if !self.process() {
            return false;
        }
        let (head, written) = self.ring.used(self.memory).expect("a good request comes back");
        let mut answered = vec![0; room + 16];
        self.memory.read_slice(&mut answered, GuestAddress(answer)).expect("memory");
        let (reply, rest) = answered.split_at(room);
        let Some(expected) = self.expected(kind, sector, &data, room) else { return true };
        assert_eq!(rest[0], expected, "request {kind} at {sector} of {} and {room}", data.len());
        assert!(rest[1..].iter().all(|byte| *byte == POISON), "nothing is written behind the end");
        assert_eq!(head, 0);
        let filled = if expected == OK && kind == 0 {
            room
        } else if expected == OK && kind == 8 {
            20
        } else {
            0
        };
        assert_eq!(written as usize, filled + 1);
        assert!(reply[filled..].iter().all(|byte| *byte == POISON), "no byte more than was asked for");
        if kind == 0 && expected == OK {
            let start = usize::try_from(sector).expect("on the disk") * SECTOR_BYTES;
            assert_eq!(self.model.as_ref().map(|model| &model[start..start + room]), Some(reply));
        }
        seen.note(u64::from(kind) << 8 | u64::from(expected));
        true
    }

    /// How a request has to end, and what it makes of the model; none where there is no model.
    fn expected(&mut self, kind: u32, sector: u64, data: &[u8], room: usize) -> Option<u8> {
        let model = self.model.as_mut()?;
        let range = |sector: u64, bytes: usize| {
            let end = sector.checked_mul(512)?.checked_add(bytes as u64)?;
            let inside = end <= SECTORS * 512 && bytes.is_multiple_of(SECTOR_BYTES);
            let start = usize::try_from(sector * 512).ok()?;
            inside.then_some(start..start + bytes)
        };
        Some(match kind {
            0 => range(sector, room).map_or(IOERR, |_| OK),
            1 => match range(sector, data.len()) {
                None => IOERR,
                Some(range) => {
                    model[range].copy_from_slice(data);
                    OK
                }
            },
            4 => OK,
            8 => u8::from(room < 20),
            11 | 13 => {
                let (most, most_sectors) = if kind == 11 { (16, 1 << 21) } else { (1, 1 << 15) };
                if data.is_empty() || !data.len().is_multiple_of(16) || data.len() / 16 > most {
                    return Some(IOERR);
                }
                let mut ranges = Vec::new();
                let mut unmap = false;
                for part in data.chunks_exact(16) {
                    let number = |at: usize| u32::from_le_bytes(part[at..at + 4].try_into().expect("four"));
                    let first = u64::from(number(0)) | u64::from(number(4)) << 32;
                    if number(12) & !1 != 0 {
                        return Some(UNSUPP);
                    }
                    unmap |= number(12) == 1;
                    let bytes = usize::try_from(number(8)).ok()? * SECTOR_BYTES;
                    match range(first, bytes).filter(|_| number(8) <= most_sectors) {
                        None => return Some(IOERR),
                        Some(range) => ranges.push(range),
                    }
                }
                if kind == 11 && unmap {
                    return Some(UNSUPP);
                }
                ranges.into_iter().for_each(|range| model[range].fill(0));
                OK
            }
            _ => UNSUPP,
        })
    }

    /// One step; false where the machine has ended.
    fn step(&mut self, (action, place, bytes): Step<'_>, seen: &mut Seen) -> bool {
        match action % 16 {
            0..=3 if !bytes.is_empty() => {
                let offset = u64::from(place) % 0x1100;
                self.bus.write(offset, &bytes[..bytes.len().min(8)]);
                if offset < 0x100 && !matches!(offset, 0x50 | 0x14) {
                    (self.sound, self.model) = (false, None);
                }
            }
            4 => {
                let mut data = [0; 8];
                self.bus.read(u64::from(place) % 0x1100, &mut data[..bytes.len().min(8)]);
            }
            // Anywhere in what the rings and the first buffers are.
            5 => {
                let at = GuestAddress(0x1_0000 + u64::from(place));
                self.memory.write_slice(bytes, at).expect("memory");
                (self.sound, self.model) = (false, None);
            }
            6 => return self.process(),
            7 => self.start([VERSION_1, VERSION_1 | EVENT_IDX, 0, u64::MAX][usize::from(place) % 4]),
            // What is left of an earlier driver is not to be taken for an answer.
            _ if !self.sound => self.start(VERSION_1),
            _ => return self.request(action, place, bytes, seen),
        }
        true
    }

    /// What holds after every step.
    fn check(&self, seen: &mut Seen) {
        let status = self.get(STATUS);
        let behind = |bit: u32, before: u32| status & bit == 0 || status & before != 0;
        assert!(behind(4, 8) && behind(8, 2) && behind(2, 1), "status {status:#x}");
        let carried = self.carried.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(carried.ring.is_none() || status & 4 != 0, "a queue is served and the status is {status:#x}");
        seen.note(1 << 32 | u64::from(status) << 8 | carried.starts.min(3));
        if status & NEEDS_RESET != 0 {
            seen.note(2 << 32);
        }
    }
}

/// Action, place, bytes.
type Step<'a> = (u8, u16, &'a [u8]);

/// The next step, and what follows it.
fn next_step(input: &[u8]) -> Option<(Step<'_>, &[u8])> {
    let ([action, low, high, length], rest) = input.split_first_chunk()?;
    let (bytes, rest) = rest.split_at(usize::from(*length).min(rest.len()));
    Some(((*action, u16::from_le_bytes([*low, *high]), bytes), rest))
}

struct Mmio {
    memory: GuestMemoryMmap,
}

impl Target for Mmio {
    const NAME: &'static str = "mmio";

    fn new() -> Self {
        Self { memory: memory() }
    }

    fn generate(&mut self, random: &mut Random, input: &mut Vec<u8>) {
        let mut push = |action: u8, place: u16, bytes: &[u8]| {
            input.push(action);
            input.extend(place.to_le_bytes());
            input.push(u8::try_from(bytes.len()).expect("short"));
            input.extend_from_slice(bytes);
        };
        if !random.once_in(4) {
            push(7, u16::from(random.byte()) % 4, b"");
        }
        for _ in 0..=random.below(16) {
            match random.below(16) {
                0..=2 => {
                    let place = random
                        .pick(&[0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x90, 0xa0]);
                    let edge = random.edge32();
                    let value = random.pick(&[0, 1, 3, 11, 15, 256, 0x1_0000, edge]);
                    push(0, place, &value.to_le_bytes());
                }
                3 => {
                    let (place, width) = (random.u16(), random.pick(&[1, 2, 4, 4, 8]));
                    push(0, place, &random.bytes(width));
                }
                4 => push(4, random.u16(), &[0; 8][..random.pick(&[1, 2, 4, 8])]),
                // Descriptors, the available index, an entry of the ring.
                5 => {
                    let place = random.pick(&[0, 8, 12, 14, 16, 0x8002, 0x8004, 0xa002]);
                    let length = random.pick(&[1, 2, 4, 8, 16]);
                    push(5, place, &random.bytes(length));
                    push(6, 0, b"");
                }
                6 => push(7, u16::from(random.byte()) % 4, b""),
                _ => {
                    let action = 8 + random.byte() % 8 + 16 * (random.byte() % 4);
                    let sector = if random.once_in(8) { random.u16() } else { u16::from(random.byte() % 70) };
                    let bytes = if random.once_in(2) { parts(random) } else { random.bytes(3) };
                    push(action, sector, &bytes);
                }
            }
        }
    }

    fn parts(input: &[u8]) -> Vec<usize> {
        let (mut ends, mut rest) = (Vec::new(), input);
        while let Some((_, behind)) = next_step(rest) {
            rest = behind;
            ends.push(input.len() - rest.len());
        }
        ends
    }

    fn run(&mut self, input: &[u8], seen: &mut Seen) {
        let content: Vec<u8> = (0..64_u8).flat_map(|number| [number; SECTOR_BYTES]).collect();
        let file = kiln_virtio::ram::new(DISK_BYTES as u64).expect("a file");
        file.write_all_at(&content, 0).expect("room");
        let disk = Disk::new(file.try_clone().expect("a descriptor"), "fuzz", false, |error| {
            unreachable!("the host does not fail: {error}")
        });
        let disk = disk.expect("a disk");
        let (features, config) = (Device::<()>::features(&disk), Device::<()>::config(&disk).to_vec());
        let carried = Arc::new(Mutex::new(Carried { disk, ring: None, starts: 0 }));
        let direct = Direct { carried: Arc::clone(&carried), features, config };
        let slot = Registers::slot(direct, &self.memory).expect("descriptors");
        let mut bus = Bus::default();
        assert!(bus.insert(0, WINDOW_BYTES, slot.device));
        let (ring, model) = (Ring::new(0, QUEUE_SIZE), Some(content));
        let memory = &self.memory;
        let mut machine = Machine { memory, bus, carried, ring, file, model, sound: false };
        let mut rest = input;
        let mut ended = false;
        for _ in 0..MOST_STEPS {
            let Some((step, behind)) = next_step(rest) else { break };
            rest = behind;
            ended = !machine.step(step, seen);
            machine.check(seen);
            if ended {
                seen.note(3 << 32);
                break;
            }
        }
        assert_eq!(machine.file.metadata().expect("metadata").len(), DISK_BYTES as u64);
        if let Some(model) = &machine.model {
            let mut bytes = vec![0; model.len()];
            machine.file.read_exact_at(&mut bytes, 0).expect("as long as before");
            assert!(bytes == *model, "the disk is what was written to it");
        }
        // Whatever came before, the next driver is served; but a machine that has ended has none.
        if !ended {
            machine.start(VERSION_1);
            assert!(machine.sound && machine.request(15, 0, b"", seen));
        }
    }

    fn memory_limit(_: usize) -> usize {
        // A request's data on its way, and the model with a copy.
        512 << 10
    }
}

/// Parts to discard or zero, most of them on the disk.
fn parts(random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..=random.below(3) {
        let sector = if random.once_in(8) { random.edge() } else { u64::from(random.byte() % 66) };
        let count = if random.once_in(8) { random.edge32() } else { u32::from(random.byte() % 8) };
        bytes.extend(sector.to_le_bytes());
        bytes.extend(count.to_le_bytes());
        bytes.extend(random.pick(&[0_u32, 0, 0, 0, 1, 2]).to_le_bytes());
    }
    bytes
}

#[test]
fn no_driver_breaks_the_registers_or_the_disk_behind_them() {
    campaign::<Mmio>();
}
