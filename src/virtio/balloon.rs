//! The balloon device (virtio 1.3 §5.5) for one thing: the guest reports memory that it has no use for (§5.5.6.7), and the host
//! gets it back. The guest has it again by touching it.
//!
//! There is no balloon: its size is none, and what a driver puts into it or takes out is answered and stays as it is.
//!
//! What is in memory that was given back? In a machine that booted, zeros: a hole is made in its memory's file. In the copy of a
//! template, whose mapping is private, what the template had there: what the guest wrote is dropped, and nothing else can be.
//! Either is right, as a driver counts on nothing in a page that it reported unless VIRTIO_BALLOON_F_PAGE_POISON is agreed on
//! (§5.5.6.6), which is not offered. Linux zeroes pages when they are taken (`init_on_alloc`), or whoever takes them writes first;
//! where its allocator does count on what is in free pages (`init_on_free`, `page_poison`) and the feature is not there, it
//! reports none (virtballoon_validate). QEMU does both, too (ram_block_discard_range). Whatever a hostile guest reports is a
//! part of its own memory, and what it loses is its own.

use virtio_queue::{Queue, QueueT};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

use crate::device::{COMMON_FEATURES, Device, Outcome, StateError, Wake};
use crate::ring::{Backing, Chain, Limits, QueueError};

/// VIRTIO_ID_BALLOON.
pub const DEVICE_TYPE: u32 = 5;
/// To put into the balloon and to take out of it, statistics, hints, and reports (§5.5.2). The third and the fourth have no use
/// without features that are not offered, and Linux then numbers on without them: reports come in the third, as
/// all devices have it that it meets, and in the fifth from a driver that goes by the specification. So all of these are for reports.
const QUEUE_SIZES: [u16; 5] = [64; 5];
const FIRST_OF_REPORTS: usize = 2;
/// VIRTIO_BALLOON_F_REPORTING.
const REPORTING: u64 = 1 << 5;
/// How many pages the balloon is to have, and how many it has: none, and there is nothing that a driver could write.
const CONFIG: [u8; 8] = [0; 8];
/// Linux reports up to 32 pieces of at most 4 MiB at a time, and puts up to 256 numbers of pages into a balloon.
const LIMITS: Limits = Limits { readable_bytes: 4096, writable_bytes: MOST_BYTES, slices: 128 };
/// Most bytes of a report, and of a round: to give back that much took 15 to 45 ms where all of it was in use.
const MOST_BYTES: usize = 128 << 20;

/// A way for guests to give memory back.
#[derive(Debug, Default)]
pub struct Balloon(());

impl Balloon {
    /// One of size none.
    pub fn new() -> Self {
        Self::default()
    }
}

fn serve<B: Bitmap + 'static>(
    (index, queue): (usize, &mut Queue),
    memory: &GuestMemoryMmap<B>,
    outcome: &mut Outcome,
) -> Result<(), virtio_queue::Error> {
    let backing = match memory.iter().all(|region| region.flags() & libc::MAP_SHARED != 0) {
        true => Backing::Shared,
        false => Backing::Private,
    };
    let (mut taken, mut bytes) = (0, 0_usize);
    loop {
        if taken == queue.size() || bytes >= MOST_BYTES {
            outcome.again = true;
            break;
        }
        let Some(next) = Chain::next_or_notify(queue, memory, LIMITS)? else { break };
        taken += 1;
        if let Ok(mut chain) = next.chain
            && index >= FIRST_OF_REPORTS
        {
            bytes = bytes.saturating_add(chain.writable.remaining_bytes());
            chain.writable.give_back(backing);
        }
        // Nothing was written that a driver could read (§5.5.6.7).
        queue.add_used(memory, next.head, 0)?;
    }
    if taken > 0 && queue.needs_notification(memory)? {
        outcome.interrupt_for(index);
    }
    Ok(())
}

impl<B: Bitmap + 'static> Device<B> for Balloon {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES | REPORTING
    }

    fn config(&self) -> &[u8] {
        &CONFIG
    }

    fn process(
        &mut self,
        wake: Wake,
        queues: &mut [Option<&mut Queue>],
        memory: &GuestMemoryMmap<B>,
    ) -> Result<Outcome, QueueError> {
        let mut outcome = Outcome::default();
        if let Wake::Queue(index) = wake
            && let Some(Some(queue)) = queues.get_mut(index)
        {
            let served = serve((index, queue), memory, &mut outcome);
            served.map_err(|source| QueueError { queue: index, source })?;
        }
        Ok(outcome)
    }

    fn reset(&mut self) {}

    fn can_freeze(&self) -> bool {
        true
    }

    /// What was given back is in nobody's books.
    fn freeze(&self) -> Result<Vec<u8>, StateError> {
        Ok(Vec::new())
    }

    fn thaw(&mut self, state: &[u8]) -> Result<(), StateError> {
        if state.is_empty() { Ok(()) } else { Err(StateError::Malformed) }
    }
}

#[cfg(test)]
mod tests;
