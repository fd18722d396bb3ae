//! The fs device (virtio 1.3 §5.11): read-only shares of host directories, served over FUSE, and the record of
//! what the guest asked for.
//!
//! The guest sees one file system whose root holds the shares by name; they may come and go while it runs. A
//! name from the guest is compared with an index that the host's own listings filled (`index`) and never
//! reaches the host's kernel; files are opened beneath the share's descriptor by paths from that index
//! (`host`). `tree` joins the two and keeps the record (`record`), without which nothing is answered (`recorded`);
//! `server` speaks FUSE (`abi`), and this file is the device: queues in, answers out.
//!
//! What is mounted below a shared directory is shown as the host shows it, but for file systems of the kernel's own
//! (`kernel`), which are shown as empty folders.
//!
//! The driver is expected to mount it read-only; whether it does or not, nothing can be written.

mod abi;
mod assemble;
mod host;
mod index;
mod kernel;
mod missed;
mod packed;
pub mod record;
mod recorded;
mod server;
mod share;
mod state;
mod tree;
mod walks;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::Bitmap;

pub use self::host::{
    Open, fingerprint_of, kind_of, list as list_directory, open_beneath, xattrs as xattrs_of,
};
pub use self::kernel::kernel_filesystem;
pub use self::missed::MISSED_BYTES;
use self::server::{MOST_READ_BYTES, Server};
pub use self::share::{Attributes, Share};
pub use self::tree::{AddShareError, Tree};
use crate::device::{COMMON_FEATURES, Device, Outcome, StateError, Wake};
use crate::ring::{Chain, Limits, QueueError};

/// VIRTIO_ID_FS.
pub const DEVICE_TYPE: u32 = 26;
/// Most request queues of a device. Where a driver has one for each of its processors, it is told of an answer on the
/// one that asked, so the other, idle, need not be woken: under emulation a question for a name takes 0.8 times as long.
pub const MOST_REQUEST_QUEUES: u8 = 8;
/// Of the high-priority queue and of each request queue.
const QUEUE_SIZES: [u16; 1 + MOST_REQUEST_QUEUES as usize] = [1024; 1 + MOST_REQUEST_QUEUES as usize];
/// Room for a READ of a mebibyte, and as much again for a WRITE that will be refused.
const LIMITS: Limits = Limits {
    readable_bytes: MOST_READ_BYTES + (8 << 10),
    writable_bytes: MOST_READ_BYTES + (8 << 10),
    slices: 1024,
};

/// How to make an [`Fs`].
#[derive(Debug, Clone, Copy)]
pub struct Settings<'a> {
    /// The name by which the driver mounts it, at most 36 bytes.
    pub tag: &'a str,
    /// Most descriptors of shared files to keep open.
    pub open_files: usize,
    /// Most memory for names that the guest looks for and that are not there. With more of them it gets EIO, and
    /// the record says so ([`record::Record::full`]).
    pub missed_bytes: usize,
}

impl Default for Settings<'_> {
    fn default() -> Self {
        Self { tag: "kiln", open_files: 512, missed_bytes: MISSED_BYTES }
    }
}

/// Whoever asks for little mostly asks the next thing as soon as it has the answer. Where answers come to as much as
/// this, the guest has work to do first, and can use the processor.
const LARGE_ANSWER_BYTES: u64 = 64 << 10;

/// What became of a call's requests.
#[derive(Default)]
struct Done {
    requests: u64,
    written_bytes: u64,
    /// Queues (one bit each) whose driver has to be interrupted.
    interrupt: u64,
}

/// Where the configuration has the number of request queues.
const REQUEST_QUEUES_AT: usize = 36;

/// The fs device.
pub struct Fs {
    server: Arc<Mutex<Server>>,
    config: [u8; 40],
}

/// The side of an fs device that adds shares and takes the record, while the device serves.
#[derive(Clone)]
pub struct Shares {
    // Protects the tree: the thread that serves the queues and the one that adds shares take turns, a request
    // each.
    server: Arc<Mutex<Server>>,
}

impl Fs {
    /// A device without shares, and what adds them.
    pub fn new(settings: Settings<'_>) -> (Self, Shares) {
        let server = Server::new(Tree::new(settings.open_files, settings.missed_bytes));
        let server = Arc::new(Mutex::new(server));
        // struct virtio_fs_config: the tag, padded with zeroes, and the number of request queues (a little-endian u32).
        let mut config = [0; 40];
        config.iter_mut().zip(settings.tag.bytes().take(36)).for_each(|(to, from)| *to = from);
        config[REQUEST_QUEUES_AT] = 1;
        (Self { server: server.clone(), config }, Shares { server })
    }

    /// The same with `count` request queues, [`MOST_REQUEST_QUEUES`] at most, in place of one.
    #[must_use]
    pub fn with_request_queues(mut self, count: u8) -> Self {
        self.config[REQUEST_QUEUES_AT] = count.clamp(1, MOST_REQUEST_QUEUES);
        self
    }

    fn server(&self) -> MutexGuard<'_, Server> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers what is in a queue, one queue's length of requests at most, so that whoever wants to stop it gets a
    /// turn, and nothing after a large answer, so that the guest has it before the next is made. The driver need not notify of more.
    fn work_off<B: Bitmap + 'static>(
        &self,
        index: usize,
        queue: &mut Queue,
        memory: &GuestMemoryMmap<B>,
        done: &mut Done,
    ) -> Result<(), virtio_queue::Error> {
        queue.disable_notification(memory)?;
        let mut taken = 0;
        while taken < queue.size()
            && done.written_bytes < LARGE_ANSWER_BYTES
            && let Some(next) = Chain::next_of(queue, memory, LIMITS)?
        {
            taken += 1;
            let written = next.chain.map_or(0, |chain| self.server().serve(chain));
            queue.add_used(memory, next.head, written)?;
            done.written_bytes += u64::from(written);
        }
        done.requests += u64::from(taken);
        if taken > 0 && queue.needs_notification(memory)? {
            done.interrupt |= 1 << index;
        }
        Ok(())
    }
}

impl Shares {
    /// Runs `with` on the tree, between two requests of the guest.
    pub fn with_tree<T>(&self, with: impl FnOnce(&mut Tree) -> T) -> T {
        with(self.server.lock().unwrap_or_else(PoisonError::into_inner).tree())
    }
}

impl<B: Bitmap + 'static> Device<B> for Fs {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES.get(..=usize::from(self.config[REQUEST_QUEUES_AT])).unwrap_or(&QUEUE_SIZES)
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn process(
        &mut self,
        wake: Wake,
        queues: &mut [Option<&mut Queue>],
        memory: &GuestMemoryMmap<B>,
    ) -> Result<Outcome, QueueError> {
        let mut outcome = Outcome::default();
        if wake == Wake::Events {
            return Ok(outcome);
        }
        let mut done = Done::default();
        for (index, queue) in queues.iter_mut().enumerate() {
            let Some(queue) = queue else { continue };
            let fail = |source| QueueError { queue: index, source };
            self.work_off(index, queue, memory, &mut done).map_err(fail)?;
        }
        outcome.interrupt = done.interrupt;
        if done.requests > 0 {
            outcome.again = true;
            outcome.lingers = done.written_bytes < LARGE_ANSWER_BYTES;
            return Ok(outcome);
        }
        for (index, queue) in queues.iter_mut().enumerate() {
            let Some(queue) = queue else { continue };
            // Another request may have come in just before notifications were on again.
            outcome.again |=
                queue.enable_notification(memory).map_err(|source| QueueError { queue: index, source })?;
        }
        Ok(outcome)
    }

    fn reset(&mut self) {
        self.server().reset();
    }

    fn can_freeze(&self) -> bool {
        true
    }

    fn freeze(&self) -> Result<Vec<u8>, StateError> {
        self.server().freeze()
    }

    fn thaw(&mut self, state: &[u8]) -> Result<(), StateError> {
        self.server().thaw(state)
    }
}

#[cfg(test)]
mod tests;
