//! Guest memory and virtqueues as a driver writes them, well or badly, and the statements about them. The driver is this process,
//! or the processor of a guest, whose memory it is then.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use kiln_virtio::device::{Device, Wake};
use kiln_vmm::vm::Slot;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::processor::{Memory, Processor};
use super::script::Step;
use super::value::Value;

/// Where two regions of memory touch, and the end of both.
pub const SEAM: u64 = 8 << 20;
pub const END: u64 = 9 << 20;
/// Start and length of the regions.
pub const REGIONS: [(u64, usize); 2] = [(0, 8 << 20), (SEAM, 1 << 20)];
/// Descriptors of each queue.
const SIZE: u16 = 256;
/// What memory is filled with, to see what a device has written.
pub const POISON: u8 = 0xa5;
/// How often a device may ask to be called again before that counts as no end.
const MOST_ROUNDS: usize = 10_000;

const RING_STRIDE: u64 = 0x1_0000;
const DATA_STRIDE: u64 = 0x20_0000;

/// Who a device's driver is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    /// This process.
    Process,
    /// A guest's processor.
    Guest,
}

/// A guest that is the driver.
struct Guest {
    memory: Memory,
    /// None while another one takes its place.
    processor: Option<Rc<RefCell<Processor>>>,
}

/// One virtqueue, seen from the driver.
pub struct Ring {
    queue: Queue,
    table: u64,
    available: u64,
    used: u64,
    data: u64,
    next_available: u16,
    next_used: u16,
}

/// Something that changes memory while the device reads it.
struct Flipper {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

/// Memory and queues of one device.
pub struct Rings {
    pub memory: GuestMemoryMmap,
    guest: Option<Guest>,
    rings: Vec<Ring>,
    /// The queue that statements are about.
    pub current: usize,
    flippers: Vec<Flipper>,
    /// What the device said of a queue that it will not serve any more.
    pub broken: Option<String>,
    /// Head and length of the last used element.
    last: (u32, u32),
}

impl Ring {
    fn new(index: usize) -> Result<Self, String> {
        let index = index as u64;
        let table = RING_STRIDE * (index + 1);
        let mut ring = Self {
            queue: Queue::new(SIZE).map_err(|error| error.to_string())?,
            table,
            available: table + 0x8000,
            used: table + 0xa000,
            data: DATA_STRIDE * (index + 1),
            next_available: 0,
            next_used: 0,
        };
        ring.place()?;
        Ok(ring)
    }

    fn place(&mut self) -> Result<(), String> {
        let say = |error: virtio_queue::Error| error.to_string();
        self.queue.try_set_desc_table_address(GuestAddress(self.table)).map_err(say)?;
        self.queue.try_set_avail_ring_address(GuestAddress(self.available)).map_err(say)?;
        self.queue.try_set_used_ring_address(GuestAddress(self.used)).map_err(say)?;
        self.queue.set_ready(true);
        Ok(())
    }

    fn size(&self) -> u64 {
        self.queue.size().into()
    }

    /// Where a request of the language's own has its answer.
    fn answer(&self) -> u64 {
        self.data + DATA_STRIDE / 2
    }
}

fn outside<T>(_: T) -> String {
    "that address is not in memory".to_owned()
}

impl Rings {
    /// Memory in two regions, and `count` queues that are ready.
    pub fn new(count: usize, driver: Driver) -> Result<Self, String> {
        if driver == Driver::Guest {
            let memory = Memory::new()?;
            let mut rings = Self::within(memory.of_case()?, count)?;
            rings.guest = Some(Guest { memory, processor: None });
            rings.engage(None, count)?;
            return Ok(rings);
        }
        let regions = REGIONS.map(|(start, length)| (GuestAddress(start), length));
        let memory = GuestMemoryMmap::from_ranges(&regions).map_err(|error| error.to_string())?;
        Self::within(memory, count)
    }

    /// Has another guest for the driver, before the device of `slot`, and starts anew. None where the driver is no guest.
    pub fn engage(
        &mut self,
        slot: Option<&Slot>,
        count: usize,
    ) -> Result<Option<Rc<RefCell<Processor>>>, String> {
        let Some(guest) = &mut self.guest else { return Ok(None) };
        // One at a time: they have one memory.
        guest.processor = None;
        let processor = Rc::new(RefCell::new(Processor::new(&guest.memory, slot)?));
        guest.processor = Some(Rc::clone(&processor));
        self.renew(count)?;
        Ok(Some(processor))
    }

    fn processor(&self) -> Option<&RefCell<Processor>> {
        self.guest.as_ref()?.processor.as_deref()
    }

    /// Queues in memory whose regions are [`REGIONS`].
    pub fn within(memory: GuestMemoryMmap, count: usize) -> Result<Self, String> {
        let mut rings = Self {
            memory,
            guest: None,
            rings: Vec::new(),
            current: 1,
            flippers: Vec::new(),
            broken: None,
            last: (0, 0),
        };
        rings.renew(count)?;
        Ok(rings)
    }

    /// Starts anew: no queue has been used, and memory is poison but for the rings.
    pub fn renew(&mut self, count: usize) -> Result<(), String> {
        self.still()?;
        self.fill(0, END, POISON)?;
        self.fill(0, RING_STRIDE * (count as u64 + 1), 0)?;
        self.rings = (0..count).map(Ring::new).collect::<Result<_, _>>()?;
        self.current = 1.min(count.saturating_sub(1));
        self.broken = None;
        Ok(())
    }

    fn fill(&self, from: u64, to: u64, byte: u8) -> Result<(), String> {
        let block = [byte; 0x1_0000];
        let put = |at| self.memory.write_slice(&block, GuestAddress(at)).map_err(outside);
        (from..to).step_by(block.len()).try_for_each(put)
    }

    /// Writes bytes.
    pub fn write(&self, at: u64, bytes: &[u8]) -> Result<(), String> {
        match self.processor() {
            None => self.memory.write_slice(bytes, GuestAddress(at)).map_err(outside),
            // It has more memory than is the case's.
            Some(_) if !self.is_inside(at, bytes.len()) => Err(outside(at)),
            Some(processor) => {
                processor.borrow().write(at, bytes, 1);
                Ok(())
            }
        }
    }

    /// Reads bytes.
    pub fn read(&self, at: u64, length: usize) -> Result<Vec<u8>, String> {
        let mut bytes = vec![0; length];
        match self.processor() {
            None => self.memory.read_slice(&mut bytes, GuestAddress(at)).map_err(outside)?,
            Some(_) if !self.is_inside(at, length) => return Err(outside(at)),
            Some(processor) => processor.borrow().read(at, &mut bytes),
        }
        Ok(bytes)
    }

    fn is_inside(&self, at: u64, length: usize) -> bool {
        length == 0 || self.memory.check_range(GuestAddress(at), length)
    }

    fn read_u16(&self, at: u64) -> Result<u16, String> {
        let bytes = self.read(at, 2)?;
        Ok(bytes.iter().rev().fold(0, |number, byte| number << 8 | u16::from(*byte)))
    }

    fn ring(&self) -> Result<&Ring, String> {
        self.rings.get(self.current).ok_or_else(|| "there is no such queue".to_owned())
    }

    fn ring_mut(&mut self) -> Result<&mut Ring, String> {
        self.rings.get_mut(self.current).ok_or_else(|| "there is no such queue".to_owned())
    }

    /// Where the current queue's parts are: descriptor table, available and used ring.
    pub fn parts(&self) -> Result<[u64; 3], String> {
        self.ring().map(|ring| [ring.table, ring.available, ring.used])
    }

    /// Where the current queue has data and the answer to it.
    pub fn places(&self) -> Result<(u64, u64), String> {
        self.ring().map(|ring| (ring.data, ring.answer()))
    }

    /// Writes a descriptor of the current queue's table.
    pub fn describe(
        &self,
        index: u64,
        (address, length): (u64, u32),
        flags: u16,
        next: u16,
    ) -> Result<(), String> {
        describe_at(self, self.ring()?.table + index * 16, (address, length), flags, next)
    }

    /// Puts `head` into the next place of the available ring, and moves the index on.
    pub fn offer(&mut self, head: u16) -> Result<(), String> {
        let ring = self.ring()?;
        let slot = u64::from(ring.next_available) % ring.size().max(1);
        self.write(ring.available + 4 + slot * 2, &head.to_le_bytes())?;
        self.set_available(ring.next_available.wrapping_add(1))
    }

    fn set_available(&mut self, index: u16) -> Result<(), String> {
        self.write(self.ring()?.available + 2, &index.to_le_bytes())?;
        self.ring_mut()?.next_available = index;
        Ok(())
    }

    /// The next used element of the current queue: head and length.
    pub fn used(&mut self) -> Result<Option<(u32, u32)>, String> {
        let ring = self.ring()?;
        if self.read_u16(ring.used + 2)? == ring.next_used {
            return Ok(None);
        }
        let slot = u64::from(ring.next_used) % ring.size().max(1);
        let element = self.read(ring.used + 4 + slot * 8, 8)?;
        let number =
            |at: usize| element[at..at + 4].iter().rev().fold(0, |n, byte| n << 8 | u32::from(*byte));
        let ring = self.ring_mut()?;
        ring.next_used = ring.next_used.wrapping_add(1);
        Ok(Some((number(0), number(4))))
    }

    /// Lets `device` work, as its carrier would. What it says of a broken queue is kept.
    pub fn process<D: Device<()> + ?Sized>(&mut self, device: &mut D, wake: Wake) -> Result<(), String> {
        if self.broken.is_some() {
            return Ok(());
        }
        let mut queues: Vec<_> = self.rings.iter_mut().map(|ring| Some(&mut ring.queue)).collect();
        for _ in 0..MOST_ROUNDS {
            match device.process(wake, &mut queues, &self.memory) {
                Ok(outcome) if outcome.again => {}
                Ok(_) => return Ok(()),
                Err(error) => {
                    let source = std::error::Error::source(&error).map(ToString::to_string);
                    self.broken = Some(format!("{error}: {}", source.unwrap_or_default()));
                    return Ok(());
                }
            }
        }
        Err(format!("the device asked to be called again {MOST_ROUNDS} times"))
    }

    /// How many chains of the current queue the device has not taken.
    pub fn untaken(&self) -> Result<u64, String> {
        let ring = self.ring()?;
        Ok(ring.next_available.wrapping_sub(ring.queue.next_avail()).into())
    }

    /// Whether all chains of the current queue that were offered have come back.
    pub fn given_back(&self) -> Result<bool, String> {
        let ring = self.ring()?;
        Ok(self.read_u16(ring.used + 2)? == ring.next_available)
    }

    fn flip(&mut self, at: u64, one: Vec<u8>, other: Vec<u8>) -> Result<(), String> {
        if let Some(processor) = self.processor() {
            if !self.is_inside(at, one.len().max(other.len())) {
                return Err(outside(at));
            }
            return processor.borrow_mut().flip(at, &one, &other);
        }
        let stop = Arc::new(AtomicBool::new(false));
        let (memory, stopped) = (self.memory.clone(), Arc::clone(&stop));
        self.write(at, &one)?;
        let flip = move || {
            while !stopped.load(Ordering::Relaxed) {
                for bytes in [&one, &other] {
                    // The address was good a moment ago.
                    let _ = memory.write_slice(bytes, GuestAddress(at));
                }
            }
        };
        let thread = std::thread::Builder::new().spawn(flip).map_err(|error| error.to_string())?;
        self.flippers.push(Flipper { stop, thread });
        Ok(())
    }

    fn still(&mut self) -> Result<(), String> {
        if let Some(processor) = self.processor() {
            processor.borrow_mut().still();
        }
        for flipper in self.flippers.drain(..) {
            flipper.stop.store(true, Ordering::Relaxed);
            flipper.thread.join().map_err(|_| "a flipper panicked".to_owned())?;
        }
        Ok(())
    }

    /// Does a statement about memory and queues; false where it is none.
    pub fn act(&mut self, step: &mut Step) -> Result<bool, String> {
        match step.verb.as_str() {
            "queue" => {
                self.current = step.number_at(0)?;
                self.ring().map(drop)?;
            }
            "desc" => {
                let (address, length) = (step.number("addr", 0)?, step.number("len", 0)?);
                let (flags, next) = (step.number("flags", 0)?, step.number("next", 0)?);
                let table = step.number("table", self.ring()?.table)?;
                let at = table.wrapping_add(step.number_at::<u64>(0)? * 16);
                describe_at(self, at, (address, length), flags, next)?;
            }
            "offer" => {
                let head = step.number_at(0)?;
                (0..step.number("times", 1_u64)?).try_for_each(|_| self.offer(head))?;
            }
            "avail" => self.set_available(step.number_at(0)?)?,
            "write" => self.write(step.number_at(0)?, &step.bytes_at(1)?)?,
            "flip" => self.flip(step.number_at(0)?, step.bytes_at(1)?, step.bytes_at(2)?)?,
            "still" => self.still()?,
            "event_idx" => {
                let enabled = step.number_at::<u8>(0)? != 0;
                self.ring_mut()?.queue.set_event_idx(enabled);
            }
            "base" => {
                // What the driver had come to before.
                let index = step.number_at(0)?;
                self.set_available(index)?;
                self.ring_mut()?.queue.set_next_avail(index);
            }
            "place" => {
                let ring = self.ring_mut()?;
                ring.table = step.number("table", ring.table)?;
                ring.available = step.number("avail", ring.available)?;
                ring.used = step.number("used", ring.used)?;
                let size = step.number("size", SIZE)?;
                let placed = ring.queue.try_set_size(size).map_err(|error| error.to_string());
                match (placed.and_then(|()| ring.place()), step.expected_word()) {
                    (Ok(()), None | Some("ok")) => {}
                    (Err(why), Some("refused")) => step.expect_text(&why)?,
                    (placed, _) => return Err(step.unlike(format!("{placed:?}"))),
                }
            }
            "used" => self.expect_used(step)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn expect_used(&mut self, step: &mut Step) -> Result<(), String> {
        let used = self.used()?;
        let found = used.map_or("nothing".to_owned(), |(head, length)| format!("head={head} len={length}"));
        match (used, step.expected_word()) {
            (None, Some("nothing")) | (Some(_), None) => {}
            (Some((head, length)), Some(_)) => {
                for (key, word) in step.expected() {
                    let holds = match key.as_deref() {
                        Some("head") => word.value.clone()?.to::<u32>("head")? == head,
                        Some("len") => word.value.clone()?.to::<u32>("len")? == length,
                        _ => false,
                    };
                    if !holds {
                        return Err(step.unlike(found));
                    }
                }
            }
            (None, _) => return Err(step.unlike(found)),
        }
        self.last = used.unwrap_or_default();
        Ok(())
    }

    /// Checks what became of a kick.
    pub fn expect_kick(&self, step: &Step) -> Result<(), String> {
        match (&self.broken, step.expected_word()) {
            (_, Some("any")) | (None, None | Some("ok")) => Ok(()),
            (Some(why), Some("ends")) => step.expect_text(why),
            (Some(why), _) => Err(step.unlike(why)),
            (None, _) => Err(step.unlike("a queue that is served")),
        }
    }

    /// Addresses and flags by name.
    pub fn name(&self, name: &str) -> Option<Value> {
        let ring = self.ring().ok();
        Some(Value::from(match name {
            "NEXT" => 1,
            "WRITE" => 2,
            "INDIRECT" => 4,
            "SEAM" => SEAM,
            "END" => END,
            "TABLE" => ring?.table,
            "AVAIL" => ring?.available,
            "USED" => ring?.used,
            "DATA" => ring?.data,
            "ANSWER" => ring?.answer(),
            "used.head" => self.last.0.into(),
            "used.len" => self.last.1.into(),
            _ => return None,
        }))
    }

    /// Functions about memory and queues.
    pub fn call(&mut self, function: &str, arguments: &[Value]) -> Result<Value, String> {
        match (function, arguments) {
            ("mem", [at, length]) => self.read(at.to("mem")?, length.to("mem")?).map(Value::Bytes),
            ("used_index", []) => Ok(Value::from(u64::from(self.read_u16(self.ring()?.used + 2)?))),
            _ => Err(format!("`{function}()` is not known here")),
        }
    }
}

impl Drop for Rings {
    fn drop(&mut self) {
        let _ = self.still();
    }
}

fn describe_at(
    rings: &Rings,
    at: u64,
    (address, length): (u64, u32),
    flags: u16,
    next: u16,
) -> Result<(), String> {
    let mut bytes = address.to_le_bytes().to_vec();
    bytes.extend(length.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(next.to_le_bytes());
    rings.write(at, &bytes)
}
