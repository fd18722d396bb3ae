//! The entropy device (virtio 1.3 §5.4): random numbers of the host's in whatever room the driver offers.
//!
//! A machine that is to be frozen has a silent one. Whatever its device had given would be in the memory that copies share,
//! in the driver's buffer and in its kernel's, and each copy would take it for numbers of its own. So nothing is given before a copy
//! is there: its driver's request has waited in the ring, and gets numbers that are the copy's alone. A device that has given
//! some is not frozen.

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::Bitmap;

use crate::device::{COMMON_FEATURES, Device, Outcome, StateError, Wake};
use crate::ring::{Chain, Limits, QueueError};

/// VIRTIO_ID_ENTROPY.
pub const DEVICE_TYPE: u32 = 4;
const QUEUE_SIZES: [u16; 1] = [64];
/// A device only writes (§5.4.6.1). It may use less than the whole room, so room without need is taken as well.
const LIMITS: Limits = Limits { readable_bytes: 0, writable_bytes: 1 << 20, slices: 64 };
/// Most bytes for one request: what getrandom(2) gives in one piece, at once and whatever signals come. Linux asks for 64.
/// With what a queue holds, a round takes some 50 µs.
const MOST_BYTES: usize = 256;

/// A source of random numbers.
#[derive(Debug)]
pub struct Rng {
    is_silent: bool,
    /// The guest has numbers of it.
    has_given: bool,
}

impl Rng {
    /// One that gives numbers.
    pub fn new() -> Self {
        Self { is_silent: false, has_given: false }
    }

    /// One of a machine that is to be frozen, which lets its driver wait.
    pub fn silent() -> Self {
        Self { is_silent: true, has_given: false }
    }

    fn serve<B: Bitmap + 'static>(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap<B>,
        outcome: &mut Outcome,
    ) -> Result<(), virtio_queue::Error> {
        let mut taken = 0;
        loop {
            if taken == queue.size() {
                outcome.again = true;
                break;
            }
            let Some(next) = Chain::next_or_notify(queue, memory, LIMITS)? else { break };
            let mut given = 0;
            if let Ok(mut chain) = next.chain {
                let mut numbers = [0; MOST_BYTES];
                let wanted = chain.writable.remaining_bytes().min(MOST_BYTES);
                // This process has had numbers before it ran a guest, so there are some. Were there none, room that nothing was
                // put into must not go back as if it held any.
                given = getrandom(&mut numbers[..wanted], GetRandomFlags::NONBLOCK).unwrap_or(0);
                if given < wanted || !chain.writable.write(&numbers[..given]) {
                    queue.set_next_avail(queue.next_avail().wrapping_sub(1));
                    break;
                }
            }
            taken += 1;
            self.has_given |= given > 0;
            queue.add_used(memory, next.head, u32::try_from(given).unwrap_or(0))?;
        }
        if taken > 0 && queue.needs_notification(memory)? {
            outcome.interrupt_for(0);
        }
        Ok(())
    }
}

impl Default for Rng {
    fn default() -> Self {
        Self::new()
    }
}

impl<B: Bitmap + 'static> Device<B> for Rng {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn process(
        &mut self,
        _wake: Wake,
        queues: &mut [Option<&mut Queue>],
        memory: &GuestMemoryMmap<B>,
    ) -> Result<Outcome, QueueError> {
        let mut outcome = Outcome::default();
        if let Some(Some(queue)) = queues.first_mut()
            && !self.is_silent
        {
            self.serve(queue, memory, &mut outcome).map_err(|source| QueueError { queue: 0, source })?;
        }
        Ok(outcome)
    }

    fn reset(&mut self) {}

    fn can_freeze(&self) -> bool {
        true
    }

    /// Beside its place in the queue there is nothing to know of a driver that was given nothing.
    fn freeze(&self) -> Result<Vec<u8>, StateError> {
        if self.has_given { Err(StateError::InUse) } else { Ok(Vec::new()) }
    }

    fn thaw(&mut self, state: &[u8]) -> Result<(), StateError> {
        if state.is_empty() { Ok(()) } else { Err(StateError::Malformed) }
    }
}

#[cfg(test)]
mod tests;
