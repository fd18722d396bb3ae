//! The registers of kiln's own VMM as a target, with a device behind them that a thread of its own serves: what a driver
//! writes where, and what comes of its queues. The driver is this process, or the processor of a guest.

use std::cell::RefCell;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

use kiln_virtio::balloon::Balloon;
use kiln_virtio::console::Console;
use kiln_virtio::device::Device;
use kiln_virtio::fs::{Fs, Settings};
use kiln_virtio::rng::Rng;
use kiln_virtio::vsock::{Backend, Vsock};
use kiln_vmm::bus::Bus;
use kiln_vmm::disk::Disk;
use kiln_vmm::local::{Local, Thread};
use kiln_vmm::mmio::Registers;
use kiln_vmm::vcpu::End;
use kiln_vmm::vm::Slot;

use super::processor::Processor;
use super::rings::{Driver, Rings};
use super::script::{Step, Target};
use super::value::{Value, little_endian};

/// How long a device may take, behind a guest on an emulated KVM too, and how long one is given that need not do anything.
const PATIENCE: Duration = Duration::from_secs(2);
const PATIENCE_WITH_GUESTS: Duration = Duration::from_secs(60);
const A_MOMENT: Duration = Duration::from_millis(5);
/// Length of a device's window.
const WINDOW_BYTES: u64 = 0x1000;
const VERSION_1: u64 = 1 << 32;

/// Registers (virtio 1.3 §4.2.2).
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SEL: u64 = 0x24;
const QUEUE_SEL: u64 = 0x30;
const QUEUE_NUM: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const QUEUE_NOTIFY: u64 = 0x50;
const STATUS: u64 = 0x70;
/// Each has a half above it: table, available and used ring.
const PARTS: [u64; 3] = [0x80, 0x90, 0xa0];
const NEEDS_RESET: u32 = 0x40;

/// Devices behind the registers: name, queues, and the queue of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Balloon,
    Console,
    Disk,
    Fs,
    Rng,
    Vsock,
}

impl Kind {
    const ALL: [(&'static str, Self); 6] = [
        ("balloon", Self::Balloon),
        ("console", Self::Console),
        ("disk", Self::Disk),
        ("fs", Self::Fs),
        ("rng", Self::Rng),
        ("vsock", Self::Vsock),
    ];

    /// Descriptors of a queue.
    fn queue_size(self) -> u32 {
        if matches!(self, Self::Balloon | Self::Console | Self::Rng) { 64 } else { 256 }
    }

    fn queues(self) -> usize {
        match self {
            Self::Disk | Self::Rng => 1,
            Self::Fs => 2,
            // Those that Linux has.
            Self::Balloon | Self::Vsock => 3,
            Self::Console => 4,
        }
    }
}

/// Accepts nothing.
struct Nobody;

impl Backend for Nobody {
    fn connect_from_guest(&mut self, _: u32) -> Option<UnixStream> {
        None
    }
}

/// What a driver's accesses come by.
enum Way {
    Bus(Bus),
    Processor(Rc<RefCell<Processor>>),
}

impl Way {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self {
            Self::Bus(bus) => bus.read(offset, data),
            Self::Processor(processor) => {
                processor.borrow().read(Processor::window().wrapping_add(offset), data)
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match self {
            Self::Bus(bus) => drop(bus.write(offset, data)),
            Self::Processor(processor) => {
                processor.borrow().write(Processor::window().wrapping_add(offset), data, 1);
            }
        }
    }
}

/// One device, its registers and its driver.
pub struct MmioTarget {
    kind: Kind,
    driver: Driver,
    rings: Rings,
    way: Way,
    slot: Slot,
    ends: Receiver<End>,
    /// The other end of a console's stream, which nobody reads.
    reader: UnixStream,
    /// How it has ended the machine.
    ended: Option<String>,
}

fn say(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn slot<D: Device<()> + 'static>(device: D, rings: &Rings) -> Result<(Slot, Receiver<End>), String> {
    let (sender, ends) = channel();
    let thread = Thread { name: "device", confine: || Ok(()), narrowing: None };
    let on_end = Arc::new(move |end| drop(sender.send(end)));
    let local = Local::new(thread, device, &rings.memory, on_end).map_err(say)?;
    Ok((Registers::slot(local, &rings.memory).map_err(say)?, ends))
}

/// A device of that kind behind registers.
fn made(kind: Kind, rings: &mut Rings) -> Result<(Way, Slot, Receiver<End>, UnixStream), String> {
    let (reader, stream) = UnixStream::pair().map_err(say)?;
    let (slot, ends) = match kind {
        Kind::Balloon => slot(Balloon::new(), rings),
        Kind::Console => slot(Console::new("hostile", stream).map_err(say)?, rings),
        Kind::Disk => slot(Disk::new(super::disk::file()?, "hostile", false, |_| ()).map_err(say)?, rings),
        Kind::Fs => slot(Fs::new(Settings { open_files: 16, ..Settings::default() }).0, rings),
        Kind::Rng => slot(Rng::new(), rings),
        Kind::Vsock => slot(Vsock::new(77, 16, Box::new(Nobody)).map_err(say)?.0, rings),
    }?;
    if let Some(processor) = rings.engage(Some(&slot), kind.queues())? {
        return Ok((Way::Processor(processor), slot, ends, reader));
    }
    let mut bus = Bus::default();
    if !bus.insert(0, WINDOW_BYTES, Arc::clone(&slot.device) as _) {
        return Err("the bus takes no window".to_owned());
    }
    Ok((Way::Bus(bus), slot, ends, reader))
}

impl MmioTarget {
    /// A disk whose driver has said nothing yet.
    pub fn new(driver: Driver) -> Result<Self, String> {
        let (kind, mut rings) = (Kind::Disk, Rings::new(Kind::Disk.queues(), driver)?);
        let (way, slot, ends, reader) = made(kind, &mut rings)?;
        Ok(Self { kind, driver, rings, way, slot, ends, reader, ended: None })
    }

    fn patience(&self) -> Duration {
        if self.driver == Driver::Guest { PATIENCE_WITH_GUESTS } else { PATIENCE }
    }

    /// Another machine with a device of that kind.
    fn replace(&mut self, kind: Kind) -> Result<(), String> {
        self.retire()?;
        self.rings.renew(kind.queues())?;
        // A guest ends with the way to it: the next has its memory.
        self.way = Way::Bus(Bus::default());
        (self.way, self.slot, self.ends, self.reader) = made(kind, &mut self.rings)?;
        (self.kind, self.ended) = (kind, None);
        Ok(())
    }

    /// Ends the device's thread, which otherwise runs as long as the process: by a driver that breaks its queue.
    fn retire(&mut self) -> Result<(), String> {
        self.listen();
        if self.ended.is_some() {
            return Ok(());
        }
        self.set(STATUS, 0);
        self.rings.renew(self.kind.queues())?;
        self.start(self.kind.queue_size(), VERSION_1)?;
        let [_, available, _] = self.rings.parts()?;
        self.rings.write(available + 2, &u16::MAX.to_le_bytes())?;
        self.notify(1)?;
        match self.ends.recv_timeout(self.patience()) {
            Ok(_) => Ok(()),
            Err(_) => Err("a broken queue does not end the machine".to_owned()),
        }
    }

    fn get(&self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.way.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    fn set(&self, offset: u64, value: u32) {
        self.way.write(offset, &value.to_le_bytes());
    }

    fn set_halves(&self, offset: u64, value: u64) {
        for (half, shift) in [(0, 0), (4, 32)] {
            self.set(offset + half, u32::try_from(value >> shift & u64::from(u32::MAX)).unwrap_or(0));
        }
    }

    fn negotiate(&self, features: u64) {
        self.set(STATUS, 1);
        self.set(STATUS, 3);
        for (page, shift) in [(0, 0), (1, 32)] {
            self.set(DRIVER_FEATURES_SEL, page);
            self.set(DRIVER_FEATURES, u32::try_from(features >> shift & u64::from(u32::MAX)).unwrap_or(0));
        }
        self.set(STATUS, 11);
    }

    /// Lays the current queue out where its rings are.
    fn lay_out(&self, size: u32) -> Result<(), String> {
        self.set(QUEUE_SEL, u32::try_from(self.rings.current).map_err(say)?);
        self.set(QUEUE_NUM, size);
        for (register, at) in PARTS.into_iter().zip(self.rings.parts()?) {
            self.set_halves(register, at);
        }
        self.set(QUEUE_READY, 1);
        Ok(())
    }

    fn start(&self, size: u32, features: u64) -> Result<(), String> {
        self.negotiate(features);
        self.lay_out(size)?;
        self.set(STATUS, 15);
        Ok(())
    }

    /// Tells the device of the queue so many times: what KVM makes of the driver's word in one case, and that word in the other.
    fn notify(&self, times: u64) -> Result<(), String> {
        let notified = self.slot.notified.get(self.rings.current).ok_or("there is no such queue")?;
        match &self.way {
            Way::Bus(_) => (0..times).try_for_each(|_| notified.write(1)).map_err(say),
            Way::Processor(processor) => {
                let queue = u32::try_from(self.rings.current).map_err(say)?;
                if times > 0 {
                    let register = Processor::window() + QUEUE_NOTIFY;
                    processor.borrow().write(register, &queue.to_le_bytes(), times);
                }
                Ok(())
            }
        }
    }

    /// Hears how the device has ended the machine, if it has.
    fn listen(&mut self) {
        match self.ends.try_recv() {
            Ok(end) => self.ended = Some(end.to_string()),
            Err(TryRecvError::Disconnected) if self.ended.is_none() => {
                self.ended = Some("its thread is gone without a word".to_owned());
            }
            Err(_) => {}
        }
    }

    /// Tells the device of the queue, and waits until it has given back all that was offered, or has ended.
    fn kick(&mut self, patience: Duration) -> Result<&'static str, String> {
        self.notify(1)?;
        let deadline = Instant::now() + patience;
        loop {
            self.listen();
            if self.ended.is_some() {
                return Ok("ends");
            }
            if self.get(STATUS) & NEEDS_RESET != 0 {
                return Ok("needs_reset");
            }
            if self.rings.given_back()? {
                return Ok("ok");
            }
            if Instant::now() > deadline {
                return Ok("silence");
            }
            std::thread::yield_now();
        }
    }

    /// A good request of the current device, on memory of its own.
    fn request(&mut self) -> Result<(), String> {
        let (data, answer) = self.rings.places()?;
        let (request, room, expected) = match self.kind {
            Kind::Console => (b"a line\n".to_vec(), 0, 0),
            // The disk's name.
            Kind::Disk => ([&[8][..], &[0; 15]].concat(), 21, 21),
            // INIT.
            Kind::Fs => {
                let mut init = [104_u32, 26, 1, 0].map(u32::to_le_bytes).concat();
                init.extend([0; 24]);
                init.extend([7_u32, 41].map(u32::to_le_bytes).concat());
                init.extend([0; 56]);
                (init, 4096, 80)
            }
            // Nothing but room; the balloon fills none.
            Kind::Balloon => (Vec::new(), 4096, 0),
            Kind::Rng => (Vec::new(), 64, 64),
            // A packet of no stream's.
            Kind::Vsock => (vec![0; 44], 0, 0),
        };
        self.rings.write(data, &request)?;
        let length = u32::try_from(request.len()).map_err(say)?;
        self.rings.describe(0, (data, length), u16::from(room > 0), 1)?;
        self.rings.describe(1, (answer, room), 2, 0)?;
        self.rings.offer(0)?;
        let found = self.kick(self.patience())?;
        match (found, self.rings.used()?) {
            ("ok", Some((0, length))) if length == expected => Ok(()),
            (found, used) => Err(format!("a good request gets {found}, used {used:?}")),
        }
    }

    fn expect_kick(&self, step: &Step, found: &str) -> Result<(), String> {
        match (step.expected_word(), &self.ended) {
            (Some("any"), _) => Ok(()),
            (Some("ends"), Some(why)) => step.expect_text(why),
            (expected, _) if expected.unwrap_or("ok") == found => Ok(()),
            (_, Some(why)) => Err(step.unlike(why)),
            _ => Err(step.unlike(found)),
        }
    }
}

impl Target for MmioTarget {
    fn act(&mut self, step: &mut Step) -> Result<(), String> {
        if self.rings.act(step)? {
            return Ok(());
        }
        match step.verb.as_str() {
            "device" => {
                let kind = Kind::ALL.iter().find(|(name, _)| *name == step.word(0));
                let (_, kind) = kind.ok_or_else(|| format!("there is no device `{}`", step.word(0)))?;
                self.replace(*kind)?;
            }
            // A register, or anything else in or behind the window.
            "set" => {
                let bytes = little_endian(step.at(1)?.number("set")?, step.number("width", 4)?, "set")?;
                self.way.write(step.number_at(0)?, &bytes);
            }
            "negotiate" => self.negotiate(step.number("features", VERSION_1)?),
            "layout" => self.lay_out(step.number("size", self.kind.queue_size())?)?,
            "start" => {
                self.start(step.number("size", self.kind.queue_size())?, step.number("features", VERSION_1)?)?
            }
            "serves" => self.request()?,
            "kick" => {
                let any = step.expected_word() == Some("any");
                let mut found = "ok";
                for _ in 0..step.number("times", 1_u64)? {
                    found = self.kick(if any { A_MOMENT } else { self.patience() })?;
                }
                self.expect_kick(step, found)?;
            }
            // Without waiting for what comes of it.
            "notify" => self.notify(step.number("times", 1)?)?,
            // The driver begins anew, with the same device.
            "reset" => {
                self.set(STATUS, 0);
                self.rings.renew(self.kind.queues())?;
            }
            verb => return Err(format!("`{verb}` is not known here")),
        }
        Ok(())
    }

    fn name(&self, name: &str) -> Option<Value> {
        match name {
            "SPLITS" => Some(Value::from(u64::from(self.driver == Driver::Guest))),
            _ => self.rings.name(name),
        }
    }

    fn call(&mut self, function: &str, arguments: &[Value]) -> Result<Value, String> {
        match (function, arguments) {
            ("get", [offset]) => Ok(Value::from(u64::from(self.get(offset.to("get")?)))),
            ("bytes", [offset, width]) => {
                let mut bytes = vec![0; width.to("bytes")?];
                self.way.read(offset.to("bytes")?, &mut bytes);
                Ok(Value::Bytes(bytes))
            }
            // How often the device has interrupted since it was asked last.
            ("interrupts", []) => Ok(Value::from(self.slot.interrupt.read().unwrap_or(0))),
            _ => self.rings.call(function, arguments),
        }
    }

    fn serve(&mut self) -> Result<(), String> {
        self.listen();
        if self.ended.is_some() {
            // A machine that has ended is followed by another.
            self.replace(self.kind)?;
        }
        self.set(STATUS, 0);
        self.rings.renew(self.kind.queues())?;
        self.start(self.kind.queue_size(), VERSION_1)?;
        self.request()?;
        // For the descriptors of its thread to be closed.
        self.retire()
    }
}
