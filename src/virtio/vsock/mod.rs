//! The vsock device (virtio 1.3 §5.10): stream sockets between guest and host, in both directions.
//!
//! What is behind the device is one trait, [`Backend`], for connections that the guest asks for; the host asks
//! through a [`Connector`]. Streams are unix sockets. `connection` is one connection's state, `muxer` the table
//! of them, `packet` the layout, and this file is the device: queues in, packets out.
//!
//! Datagram and seqpacket sockets are not offered. The event queue carries nothing from this device.

mod connection;
mod muxer;
mod packet;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::Bitmap;
use zerocopy::FromBytes;

pub use self::muxer::MOST_CONNECTIONS;
use self::muxer::Muxer;
use self::packet::{HEADER_BYTES, Header};
use crate::device::{COMMON_FEATURES, Device, LAST_WORDS, Outcome, Wake};
use crate::ring::{Chain, Limits, QueueError};

/// VIRTIO_ID_VSOCK.
pub const DEVICE_TYPE: u32 = 19;
/// Receive, transmit, events.
const QUEUE_SIZES: [u16; 3] = [256, 256, 256];
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// VIRTIO_VSOCK_F_STREAM.
const FEATURE_STREAM: u64 = 1;
/// A packet of Linux carries at most 64 KiB.
const LIMITS: Limits = Limits { readable_bytes: 128 << 10, writable_bytes: 1 << 20, slices: 256 };

/// Hears whether the guest accepted.
pub type Answer = Box<dyn FnOnce(bool) + Send>;

/// What is behind the host's ports.
pub trait Backend: Send {
    /// The guest connects to `port` of the host: the device's end of a stream, or `None` to refuse.
    fn connect_from_guest(&mut self, port: u32) -> Option<UnixStream>;
}

/// The vsock device.
pub struct Vsock {
    muxer: Muxer,
    backend: Box<dyn Backend>,
    inbox: Arc<Inbox>,
    config: [u8; 8],
}

/// Connects host streams to guest ports, from any thread.
#[derive(Clone)]
pub struct Connector {
    inbox: Arc<Inbox>,
}

struct Inbox {
    // Connections that the device's thread has not seen yet.
    waiting: Mutex<Vec<(u32, UnixStream, Answer)>>,
    bell: OwnedFd,
}

impl Vsock {
    /// A device for the guest whose context id is `guest_cid`, and what connects to it. There will be at most
    /// `most_connections` at a time, each with a descriptor, and never more than [`MOST_CONNECTIONS`].
    ///
    /// # Errors
    /// No epoll or event descriptor can be had.
    pub fn new(
        guest_cid: u64,
        most_connections: usize,
        backend: Box<dyn Backend>,
    ) -> std::io::Result<(Self, Connector)> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let muxer = Muxer::new(guest_cid, most_connections)?;
        muxer.watch_inbox(&bell)?;
        let inbox = Arc::new(Inbox { waiting: Mutex::default(), bell });
        let connector = Connector { inbox: inbox.clone() };
        Ok((Self { muxer, backend, inbox, config: guest_cid.to_le_bytes() }, connector))
    }

    /// Takes packets from the guest, at most a queue's length; true where more may be there.
    fn transmit<B: Bitmap + 'static>(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap<B>,
        outcome: &mut Outcome,
    ) -> Result<(), virtio_queue::Error> {
        let mut taken = 0;
        queue.disable_notification(memory)?;
        while self.muxer.takes_packets() {
            if taken == queue.size() {
                outcome.again = true;
                break;
            }
            let Some(next) = Chain::next_of(queue, memory, LIMITS)? else {
                if queue.enable_notification(memory)? {
                    queue.disable_notification(memory)?;
                    continue;
                }
                break;
            };
            taken += 1;
            // A chain that is none, or holds no header, is a packet from nobody.
            if let Ok(mut chain) = next.chain
                && let Some(bytes) = chain.readable.read_array::<HEADER_BYTES>()
                && let Ok(header) = Header::read_from_bytes(&bytes)
            {
                self.muxer.take(&header, &mut chain.readable, &mut *self.backend);
            }
            queue.add_used(memory, next.head, 0)?;
        }
        if taken > 0 && queue.needs_notification(memory)? {
            outcome.interrupt_for(TRANSMIT);
        }
        Ok(())
    }

    /// Gives packets to the guest, as long as there are any and it has room, at most a queue's length.
    fn receive<B: Bitmap + 'static>(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap<B>,
        outcome: &mut Outcome,
    ) -> Result<(), virtio_queue::Error> {
        let mut given = 0;
        while self.muxer.has_packet() {
            if given == queue.size() {
                outcome.again = true;
                break;
            }
            // The driver's next buffers come with a notification.
            let Some(next) = Chain::next_or_notify(queue, memory, LIMITS)? else { break };
            let mut written = 0;
            if let Ok(mut chain) = next.chain
                && let Some(mut room) = chain.writable.split_off(HEADER_BYTES)
            {
                if !self.muxer.give(&mut chain.writable, &mut room) {
                    // Nothing to send after all: the buffer stays the driver's next.
                    queue.set_next_avail(queue.next_avail().wrapping_sub(1));
                    break;
                }
                let total = chain.writable.written_bytes() + room.written_bytes();
                written = u32::try_from(total).unwrap_or(0);
            }
            queue.add_used(memory, next.head, written)?;
            given += 1;
        }
        if given > 0 && queue.needs_notification(memory)? {
            outcome.interrupt_for(RECEIVE);
        }
        Ok(())
    }
}

impl Connector {
    /// Connects `stream` to port `guest_port` of the guest; `answer` hears whether the guest accepted, on the
    /// device's thread. Closing the other end of the stream before that gives up.
    pub fn connect_to_guest(
        &self,
        guest_port: u32,
        stream: UnixStream,
        answer: impl FnOnce(bool) + Send + 'static,
    ) {
        let mut waiting = self.inbox.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.push((guest_port, stream, Box::new(answer)));
        drop(waiting);
        // Only a full counter fails, and then the bell rings anyway.
        let _ = rustix::io::write(&self.inbox.bell, &1_u64.to_ne_bytes());
    }
}

impl<B: Bitmap + 'static> Device<B> for Vsock {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES | FEATURE_STREAM
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn events(&self) -> Option<BorrowedFd<'_>> {
        Some(self.muxer.events())
    }

    fn process(
        &mut self,
        wake: Wake,
        queues: &mut [Option<&mut Queue>],
        memory: &GuestMemoryMmap<B>,
    ) -> Result<Outcome, QueueError> {
        let mut outcome = Outcome::default();
        if wake == Wake::Events && self.muxer.poll() {
            let _ = rustix::io::read(&self.inbox.bell, &mut [0; 8]);
            let waiting =
                std::mem::take(&mut *self.inbox.waiting.lock().unwrap_or_else(PoisonError::into_inner));
            for (guest_port, stream, answer) in waiting {
                self.muxer.connect(guest_port, stream, answer);
            }
        }
        // Before and after receiving, because each makes room for the other.
        let mut stalled = true;
        if let Some(Some(queue)) = queues.get_mut(TRANSMIT) {
            let fail = |source| QueueError { queue: TRANSMIT, source };
            self.transmit(queue, memory, &mut outcome).map_err(fail)?;
            stalled = !self.muxer.takes_packets();
        }
        if let Some(Some(queue)) = queues.get_mut(RECEIVE) {
            let fail = |source| QueueError { queue: RECEIVE, source };
            self.receive(queue, memory, &mut outcome).map_err(fail)?;
            // Whoever waits in the transmit queue was not taken while refusals were in the way.
            outcome.again |= stalled && self.muxer.takes_packets();
        }
        Ok(outcome)
    }

    fn reset(&mut self) {
        self.muxer.reset();
    }

    fn finish(&mut self, queues: &mut [Option<&mut Queue>], memory: &GuestMemoryMmap<B>) {
        let give_up = Instant::now() + LAST_WORDS;
        // A queue that the guest broke last has nothing more to say.
        while Device::<B>::process(self, Wake::Queue(TRANSMIT), queues, memory)
            .is_ok_and(|outcome| outcome.again)
            && Instant::now() < give_up
        {}
        self.muxer.reset();
    }
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
