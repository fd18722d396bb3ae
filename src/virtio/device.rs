//! The contract between a virtio device and what carries it (vhost-user, virtio-mmio).
//!
//! A device owns no queue, no memory and no interrupt. The carrier owns them, calls the device when the driver
//! has notified a queue or when the device's own descriptor is readable, and raises what the device returns.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::Bitmap;

use crate::ring::QueueError;

/// Virtio feature bits that every device here offers (virtio 1.3 §6): VERSION_1, EVENT_IDX, INDIRECT_DESC.
pub const COMMON_FEATURES: u64 = 1 << 32 | 1 << 29 | 1 << 28;

/// What woke the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wake {
    /// The driver made buffers available in this queue.
    Queue(usize),
    /// The descriptor that [`Device::events`] names is readable.
    Events,
}

/// What a call to [`Device::process`] leaves to its carrier.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Queues (one bit each) whose driver has to be interrupted.
    pub interrupt: u64,
    /// There is more to do than one call may take: call again, after letting others at the queues.
    pub again: bool,
    /// With `again`: all queues were worked off, and more is likely to come in a moment. The driver was not told to
    /// notify of it; the next call that finds nothing tells it.
    pub lingers: bool,
}

impl Outcome {
    /// Notes that the driver has to be interrupted for queue `index`.
    pub fn interrupt_for(&mut self, index: usize) {
        self.interrupt |= 1 << index;
    }
}

/// Longest frozen state of a device, bytes.
pub const MOST_STATE_BYTES: usize = 64;

/// Why a device cannot be frozen, or its state not be taken up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// There is no frozen form of such a device.
    #[error("this device cannot be frozen")]
    Unsupported,
    /// It has something that its frozen form cannot say.
    #[error("the device is in use")]
    InUse,
    /// The bytes are no state of such a device.
    #[error("not a state of this device")]
    Malformed,
}

/// How long what a guest that is gone had written may take to be passed on.
pub(crate) const LAST_WORDS: Duration = Duration::from_secs(5);

/// A virtio device, whatever carries it. `B` is the dirty bitmap of the guest memory it is used with.
pub trait Device<B: Bitmap + 'static>: Send {
    /// The device type (virtio 1.3 §5).
    fn device_type(&self) -> u32;

    /// The largest size of each queue; their number is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// Feature bits the device offers, [`COMMON_FEATURES`] among them.
    fn features(&self) -> u64;

    /// The device's configuration space, which none of these devices changes or lets the driver write.
    fn config(&self) -> &[u8];

    /// A descriptor that becomes readable when the device has work that no driver notification tells of.
    fn events(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Works off what is there, at most about one queue's length of requests, and returns what is left.
    ///
    /// `queues` holds all queues in order, `None` for each that is not running.
    ///
    /// # Errors
    /// A queue that the driver has made unusable (its ring addresses or indexes are invalid). The carrier
    /// stops serving that queue until the device is reset.
    fn process(
        &mut self,
        wake: Wake,
        queues: &mut [Option<&mut Queue>],
        memory: &GuestMemoryMmap<B>,
    ) -> Result<Outcome, QueueError>;

    /// Forgets everything about the driver that was there. What the host configured stays.
    fn reset(&mut self);

    /// The guest has ended: whatever it left in `queues` for others to read is passed on, and they learn that no more
    /// comes.
    fn finish(&mut self, _queues: &mut [Option<&mut Queue>], _memory: &GuestMemoryMmap<B>) {}

    /// Whether the device can be part of a frozen machine: [`Device::freeze`] and [`Device::thaw`].
    fn can_freeze(&self) -> bool {
        false
    }

    /// What a device that takes over the driver of this one must know, beside the positions in its queues: at most
    /// [`MOST_STATE_BYTES`]. The queues are stopped.
    ///
    /// # Errors
    /// See [`StateError`].
    fn freeze(&self) -> Result<Vec<u8>, StateError> {
        Err(StateError::Unsupported)
    }

    /// Takes over the driver of the device that was frozen as `state`, which may hold anything.
    ///
    /// # Errors
    /// See [`StateError`]; the device is as it was.
    fn thaw(&mut self, _state: &[u8]) -> Result<(), StateError> {
        Err(StateError::Unsupported)
    }
}
