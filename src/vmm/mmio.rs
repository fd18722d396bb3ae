//! The registers of a virtio-mmio device, version 2 (virtio 1.3 §4.2.2): what is negotiated, where the queues lie, and when
//! whoever serves them is to begin and to end.
//!
//! The registers serve no queue. They collect what a driver says, hold it against the device's limits and the guest's memory,
//! and hand it to a [`Target`] at DRIVER_OK. From then on notifications and interrupts go by descriptors and touch
//! no register, so the interrupt's reason is always said to be a used buffer: whoever raises it does not come by here.

use std::io;

use kiln_virtio::device::StateError;
use serde::{Deserialize, Serialize};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::bus::{Effect, Window};
use crate::vm::Slot;

/// How far a device and its driver are with a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// The next entry of the available ring.
    pub available: u16,
    /// The next entry of the used ring.
    pub used: u16,
}

/// What whoever takes over a device's driver must know, beside where the queues are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Frozen {
    /// Of each queue that runs.
    pub positions: Vec<Option<Position>>,
    /// What the device itself knows.
    pub device: Vec<u8>,
    /// Its driver has been interrupted, perhaps just before.
    pub has_interrupted: bool,
}

/// One queue as its driver laid it out: a size that is a power of two and not beyond the device's, rings that lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Queue {
    /// How many descriptors.
    pub size: u16,
    /// Their table.
    pub descriptors: GuestAddress,
    /// The ring of the driver.
    pub available: GuestAddress,
    /// The ring of the device.
    pub used: GuestAddress,
}

/// The descriptors between a device and its driver.
pub struct Lines {
    /// By which the driver notifies of each queue.
    pub notified: Vec<EventFd>,
    /// Which interrupts the driver.
    pub interrupt: EventFd,
}

/// Whoever serves a device's queues.
pub trait Target: Send {
    /// The device type (virtio 1.3 §5).
    fn device_type(&self) -> u32;

    /// The largest size of each queue.
    fn queue_sizes(&self) -> &[u16];

    /// Feature bits that are offered.
    fn features(&self) -> u64;

    /// The configuration space.
    fn config(&self) -> &[u8];

    /// Takes what is between it and whatever drivers come, once and before all else.
    ///
    /// # Errors
    /// It cannot.
    fn connect(&mut self, lines: Lines) -> io::Result<()>;

    /// Begins to serve `queues`, of which those that are none are not used.
    ///
    /// # Errors
    /// It cannot: the driver is told that the device needs a reset.
    fn start(&mut self, features: u64, queues: &[Option<Queue>]) -> io::Result<()>;

    /// Ends that, and forgets the driver.
    ///
    /// # Errors
    /// It cannot, and is not to be started again.
    fn stop(&mut self) -> io::Result<()>;

    /// What whoever takes over its driver must know. The guest does no more.
    ///
    /// # Errors
    /// See [`StateError`]; one that cannot be part of a frozen machine is `Unsupported`.
    fn freeze(&mut self) -> Result<Frozen, StateError> {
        Err(StateError::Unsupported)
    }

    /// Takes over the driver of a device that was frozen: as [`Target::start`], but goes on where that one stopped.
    ///
    /// # Errors
    /// It cannot.
    fn thaw(&mut self, _features: u64, _queues: &[Option<Queue>], _frozen: &Frozen) -> io::Result<()> {
        Err(io::Error::other(StateError::Unsupported))
    }

    /// The guest has been stopped: nothing more is served from now on, also of what it asked for before.
    fn halt(&mut self) {}

    /// What the guest that was stopped left for others is passed on.
    fn finish(&mut self) {}
}

/// A device on a bus that can be part of a frozen machine.
pub trait Carried: Window {
    /// Its registers and what its target knows. The guest does no more.
    ///
    /// # Errors
    /// See [`StateError`].
    fn freeze(&mut self) -> Result<DeviceState, StateError>;

    /// Becomes the device that was frozen.
    ///
    /// # Errors
    /// The state is not one of such a device, or its target cannot go on.
    fn thaw(&mut self, state: &DeviceState) -> io::Result<()>;

    /// The guest has been stopped: see [`Target::halt`].
    fn halt(&mut self);

    /// The guest has ended: see [`Target::finish`].
    fn finish(&mut self);
}

/// A frozen device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceState {
    device_type: u32,
    registers: Said,
    /// Where a driver runs it.
    frozen: Option<Frozen>,
}

/// "virt", and the version of the interface.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "KILN", for who made the device.
const VENDOR: u32 = 0x4e4c_494b;

/// Bits of the device status (virtio 1.3 §2.1).
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const FEATURES_OK: u32 = 8;
const DRIVER_OK: u32 = 4;
const NEEDS_RESET: u32 = 0x40;
const FAILED: u32 = 0x80;
/// Bits of the interrupt status: a used buffer, and a change of the configuration.
pub(crate) const USED_BUFFER: u32 = 1;
const CONFIGURATION: u32 = 2;
/// VIRTIO_F_VERSION_1, without which a driver is none for us.
const VERSION_1: u64 = 1 << 32;
/// Where the configuration space begins.
const CONFIG: u64 = 0x100;

/// What the driver has said of a queue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Draft {
    size: u32,
    ready: bool,
    descriptors: u64,
    available: u64,
    used: u64,
}

/// What the driver has said.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Said {
    offered_page: u32,
    accepted_page: u32,
    accepted: u64,
    selected: u32,
    status: u32,
    changed: u32,
    queues: Vec<Draft>,
}

/// The registers in front of `T`.
pub struct Registers<T: Target> {
    target: T,
    memory: GuestMemoryMmap,
    notified: Vec<EventFd>,
    interrupt: EventFd,
    said: Said,
    running: bool,
}

impl Said {
    /// By no driver yet, of `queues` queues.
    fn of_nobody(queues: usize) -> Self {
        Self { queues: vec![Draft::default(); queues], ..Self::default() }
    }
}

impl<T: Target + 'static> Registers<T> {
    /// Registers in front of `target`, as a slot of a machine with `memory`.
    ///
    /// # Errors
    /// The system gives no more descriptors.
    pub fn slot(mut target: T, memory: &GuestMemoryMmap) -> io::Result<Slot> {
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let notified = target.queue_sizes().iter().map(|_| event()).collect::<io::Result<Vec<_>>>()?;
        let interrupt = event()?;
        let same = |events: &[EventFd]| events.iter().map(EventFd::try_clone).collect::<io::Result<Vec<_>>>();
        target.connect(Lines { notified: same(&notified)?, interrupt: interrupt.try_clone()? })?;
        let registers = Self {
            said: Said::of_nobody(notified.len()),
            notified: same(&notified)?,
            interrupt: interrupt.try_clone()?,
            target,
            memory: memory.clone(),
            running: false,
        };
        let device = std::sync::Arc::new(std::sync::Mutex::new(registers));
        Ok(Slot { device, interrupt, notified })
    }
}

impl<T: Target> Registers<T> {
    fn register(&self, offset: u64) -> u32 {
        let queue = usize::try_from(self.said.selected).ok().and_then(|index| self.said.queues.get(index));
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => self.target.device_type(),
            0x0c => VENDOR,
            0x10 => half(self.target.features(), self.said.offered_page),
            0x34 => usize::try_from(self.said.selected)
                .ok()
                .and_then(|index| self.target.queue_sizes().get(index))
                .map_or(0, |size| u32::from(*size)),
            0x44 => queue.map_or(0, |queue| u32::from(queue.ready)),
            0x60 => USED_BUFFER | self.said.changed,
            0x70 => self.said.status,
            // No shared memory: a length of all ones (§4.2.2, SHMLen).
            0xb0..=0xbc => u32::MAX,
            _ => 0,
        }
    }

    fn set_register(&mut self, offset: u64, value: u32) {
        // Features are agreed on first, then queues are laid out, and both are settled once the driver runs (§3.1.1).
        let open = self.said.status & (FEATURES_OK | DRIVER_OK) == FEATURES_OK;
        let agreeing = self.said.status & (DRIVER | FEATURES_OK) == DRIVER;
        let queue =
            usize::try_from(self.said.selected).ok().and_then(|index| self.said.queues.get_mut(index));
        match (offset, queue) {
            (0x14, _) => self.said.offered_page = value,
            (0x24, _) => self.said.accepted_page = value,
            (0x20, _) if agreeing => set_half(&mut self.said.accepted, self.said.accepted_page, value),
            (0x30, _) => self.said.selected = value,
            (0x38, Some(queue)) if open && !queue.ready => queue.size = value,
            (0x44, Some(queue)) if open => queue.ready = value & 1 == 1,
            (0x64, _) => self.said.changed &= !value,
            (0x70, _) => self.set_status(value),
            (0x80 | 0x84, Some(queue)) if open && !queue.ready => {
                set_half(&mut queue.descriptors, u32::from(offset == 0x84), value);
            }
            (0x90 | 0x94, Some(queue)) if open && !queue.ready => {
                set_half(&mut queue.available, u32::from(offset == 0x94), value);
            }
            (0xa0 | 0xa4, Some(queue)) if open && !queue.ready => {
                set_half(&mut queue.used, u32::from(offset == 0xa4), value);
            }
            // A notification comes here only where nothing serves the queue.
            _ => {}
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        // A driver may not take bits back, nor say for the device that it needs a reset, and each bit comes behind the one
        // before it; the last one in a write of its own, since the driver has to read whether its features are good.
        self.said.status |= value & (ACKNOWLEDGE | FAILED);
        if value & DRIVER != 0 && self.said.status & ACKNOWLEDGE != 0 {
            self.said.status |= DRIVER;
        }
        let agreed = self.said.status & FEATURES_OK != 0;
        if value & FEATURES_OK != 0 && self.said.status & DRIVER != 0 && self.features_suit() {
            self.said.status |= FEATURES_OK;
        }
        let stays_off = self.said.status & (DRIVER_OK | NEEDS_RESET | FAILED) != 0;
        if value & DRIVER_OK != 0 && agreed && !stays_off {
            self.said.status |= DRIVER_OK;
            self.running = true;
            let started = self.layouts().ok_or_else(|| io::Error::other("a queue is not in memory"));
            let started = started.and_then(|queues| self.target.start(self.said.accepted, &queues));
            if started.is_err() {
                self.fail();
            }
        }
    }

    fn features_suit(&self) -> bool {
        self.said.accepted & !self.target.features() == 0 && self.said.accepted & VERSION_1 != 0
    }

    /// The queues that are ready, where all of them are what they should be.
    fn layouts(&self) -> Option<Vec<Option<Queue>>> {
        let layout = |(draft, most): (&Draft, &u16)| match draft.ready {
            false => Some(None),
            true => self.layout(draft, *most).map(Some),
        };
        self.said.queues.iter().zip(self.target.queue_sizes()).map(layout).collect()
    }

    fn layout(&self, draft: &Draft, most: u16) -> Option<Queue> {
        let size = u16::try_from(draft.size).ok().filter(|size| *size <= most && size.is_power_of_two())?;
        let entries = u64::from(size);
        // §2.7: what each part is aligned to, and how long it is.
        let fits = |address: u64, alignment: u64, bytes: u64| {
            let length = usize::try_from(bytes).ok()?;
            let lies =
                address.is_multiple_of(alignment) && self.memory.check_range(GuestAddress(address), length);
            lies.then_some(GuestAddress(address))
        };
        Some(Queue {
            size,
            descriptors: fits(draft.descriptors, 16, 16 * entries)?,
            available: fits(draft.available, 2, 6 + 2 * entries)?,
            used: fits(draft.used, 4, 6 + 8 * entries)?,
        })
    }

    fn reset(&mut self) {
        if self.running && self.target.stop().is_err() {
            return self.fail();
        }
        for event in &self.notified {
            // What was notified of is gone; that nothing was is no error.
            let _ = event.read();
        }
        (self.said, self.running) = (Said::of_nobody(self.notified.len()), false);
    }

    fn fail(&mut self) {
        self.said.status |= NEEDS_RESET;
        self.said.changed |= CONFIGURATION;
        // Only a full counter fails, and then the interrupt is up anyway.
        let _ = self.interrupt.write(1);
    }
}

impl<T: Target> Carried for Registers<T> {
    fn freeze(&mut self) -> Result<DeviceState, StateError> {
        let frozen = if self.running { Some(self.target.freeze()?) } else { None };
        Ok(DeviceState { device_type: self.target.device_type(), registers: self.said.clone(), frozen })
    }

    fn thaw(&mut self, state: &DeviceState) -> io::Result<()> {
        let is_another = state.device_type != self.target.device_type()
            || state.registers.queues.len() != self.notified.len()
            || state.registers.accepted & !self.target.features() != 0;
        if is_another {
            return Err(io::Error::other("it is of another device"));
        }
        self.said = state.registers.clone();
        if let Some(frozen) = &state.frozen {
            let queues = self.layouts().ok_or_else(|| io::Error::other("a queue is not in memory"))?;
            self.target.thaw(self.said.accepted, &queues, frozen)?;
            self.running = true;
        }
        Ok(())
    }

    fn halt(&mut self) {
        self.target.halt();
    }

    fn finish(&mut self) {
        self.target.finish();
    }
}

impl<T: Target> Window for Registers<T> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if offset >= CONFIG {
            let config = self.target.config();
            let at = usize::try_from(offset - CONFIG).unwrap_or(usize::MAX);
            for (index, byte) in data.iter_mut().enumerate() {
                *byte = at.checked_add(index).and_then(|at| config.get(at)).copied().unwrap_or(0);
            }
            return;
        }
        data.fill(0);
        // Registers are 32 bits wide and are read so (§4.2.2.2).
        if let (Ok(word), true) = (<&mut [u8; 4]>::try_from(data), offset.is_multiple_of(4)) {
            *word = self.register(offset).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        // The configuration of these devices is not the driver's to write.
        if let (Ok(word), true) = (<[u8; 4]>::try_from(data), offset.is_multiple_of(4) && offset < CONFIG) {
            self.set_register(offset, u32::from_le_bytes(word));
        }
        Effect::Nothing
    }
}

/// The half of `bits` that `page` selects; there are two.
fn half(bits: u64, page: u32) -> u32 {
    let bits = match page {
        0 => bits,
        1 => bits >> 32,
        _ => 0,
    };
    u32::try_from(bits & u64::from(u32::MAX)).unwrap_or_default()
}

fn set_half(bits: &mut u64, page: u32, value: u32) {
    *bits = match page {
        0 => *bits & !u64::from(u32::MAX) | u64::from(value),
        1 => *bits & u64::from(u32::MAX) | u64::from(value) << 32,
        _ => *bits,
    };
}

#[cfg(test)]
mod tests;
