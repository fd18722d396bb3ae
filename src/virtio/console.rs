//! The console device (virtio 1.3 §5.3) with one port under a name and no console on it: a stream between the guest and the
//! socket behind the device.
//!
//! What the guest writes is copied out at once and goes on as the socket takes it; meanwhile nothing more is taken. What
//! the socket has waits there until the guest holds the port open and offers room.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write as _};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::Bitmap;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::device::{COMMON_FEATURES, Device, LAST_WORDS, Outcome, StateError, Wake};
use crate::ring::{Chain, Limits, QueueError};

/// VIRTIO_ID_CONSOLE.
pub const DEVICE_TYPE: u32 = 3;
/// To and from the guest: the port, and what is said about it.
const QUEUE_SIZES: [u16; 4] = [64; 4];
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const TOLD: usize = 2;
const SAID: usize = 3;
/// VIRTIO_CONSOLE_F_MULTIPORT: ports have names.
const FEATURE_MULTIPORT: u64 = 1 << 1;
/// Linux writes pieces of 32 KiB and offers pages.
const LIMITS: Limits = Limits { readable_bytes: 128 << 10, writable_bytes: 128 << 10, slices: 64 };
/// Most messages about the port that wait for the guest's room: it has to ask for each.
const MOST_TOLD: usize = 16;

/// Events of messages about a port (§5.3.6.2).
const DEVICE_READY: u16 = 0;
const DEVICE_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;
/// The only port.
const PORT: u32 = 0;

/// struct virtio_console_control.
#[derive(Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Message {
    port: U32,
    event: U16,
    value: U16,
}

impl Message {
    fn of(event: u16, value: u16) -> Vec<u8> {
        Self { port: PORT.into(), event: event.into(), value: value.into() }.as_bytes().to_vec()
    }
}

/// A console device with one port.
#[derive(Debug)]
pub struct Console {
    name: String,
    stream: UnixStream,
    /// Watches the stream for what can be done about it.
    epoll: OwnedFd,
    watched: EventFlags,
    config: [u8; 12],
    /// Messages that the guest has no room for yet.
    told: VecDeque<Vec<u8>>,
    /// The guest holds the port open.
    is_open: bool,
    /// What the guest wrote and the stream has not taken.
    unsent: VecDeque<u8>,
    /// The guest has room, and the port open.
    wants: bool,
    /// Nobody is at the other end any more.
    is_gone: bool,
}

impl Console {
    /// A device whose port is called `name` and leads to `stream`.
    ///
    /// # Errors
    /// What epoll(7) says, or the stream.
    pub fn new(name: &str, stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &stream, EventData::new_u64(0), EventFlags::ONESHOT)?;
        // Columns, rows, and the number of ports; the last is for a feature that is not offered.
        let mut config = [0; 12];
        config[4] = 1;
        Ok(Self {
            name: name.to_owned(),
            stream,
            epoll,
            watched: EventFlags::empty(),
            config,
            told: VecDeque::new(),
            is_open: false,
            unsent: VecDeque::new(),
            wants: false,
            is_gone: false,
        })
    }

    /// Takes what the guest says about the port.
    fn hear(&mut self, message: &Message) {
        let answers = match (message.event.get(), message.value.get()) {
            (DEVICE_READY, 1) => vec![Message::of(DEVICE_ADD, 1)],
            (PORT_READY, 1) if message.port == PORT => {
                let mut named = Message::of(PORT_NAME, 1);
                named.extend(self.name.as_bytes());
                vec![named, Message::of(PORT_OPEN, 1)]
            }
            (PORT_OPEN, value) if message.port == PORT => {
                self.is_open = value == 1;
                Vec::new()
            }
            _ => Vec::new(),
        };
        self.told.extend(answers);
        self.told.truncate(MOST_TOLD);
    }

    fn heard<B: Bitmap + 'static>(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap<B>,
        outcome: &mut Outcome,
    ) -> Result<(), virtio_queue::Error> {
        let mut taken = 0;
        while taken < queue.size() {
            let Some(next) = Chain::next_or_notify(queue, memory, LIMITS)? else { break };
            taken += 1;
            if let Ok(mut chain) = next.chain
                && let Some(bytes) = chain.readable.read_array::<{ size_of::<Message>() }>()
                && let Ok(message) = Message::read_from_bytes(&bytes)
            {
                self.hear(&message);
            }
            queue.add_used(memory, next.head, 0)?;
        }
        outcome.again |= taken == queue.size();
        if taken > 0 && queue.needs_notification(memory)? {
            outcome.interrupt_for(SAID);
        }
        Ok(())
    }

    fn tell<B: Bitmap + 'static>(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap<B>,
        outcome: &mut Outcome,
    ) -> Result<(), virtio_queue::Error> {
        let mut given = false;
        while let Some(message) = self.told.front() {
            let Some(next) = Chain::next_or_notify(queue, memory, LIMITS)? else { break };
            let fits = next.chain.is_ok_and(|mut chain| chain.writable.write(message));
            let length = if fits { message.len() } else { 0 };
            queue.add_used(memory, next.head, u32::try_from(length).unwrap_or(0))?;
            // A message that does not fit is lost on whoever asked for it.
            self.told.pop_front();
            given = true;
        }
        if given && queue.needs_notification(memory)? {
            outcome.interrupt_for(TOLD);
        }
        Ok(())
    }

    /// Sends what waits, as much as the stream takes.
    fn send(&mut self) {
        while !self.unsent.is_empty() && !self.is_gone {
            let (front, _) = self.unsent.as_slices();
            match self.stream.write(front) {
                Ok(count) => drop(self.unsent.drain(..count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => self.is_gone = true,
            }
        }
        if self.is_gone {
            self.unsent.clear();
        }
    }

    fn transmit<B: Bitmap + 'static>(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap<B>,
        outcome: &mut Outcome,
    ) -> Result<(), virtio_queue::Error> {
        self.send();
        let mut taken = 0;
        while self.unsent.is_empty() {
            if taken == queue.size() {
                outcome.again = true;
                break;
            }
            let Some(next) = Chain::next_or_notify(queue, memory, LIMITS)? else { break };
            taken += 1;
            if let Ok(mut chain) = next.chain {
                let mut bytes = vec![0; chain.readable.remaining_bytes()];
                let length = chain.readable.read(&mut bytes);
                self.unsent.extend(&bytes[..length]);
                self.send();
            }
            queue.add_used(memory, next.head, 0)?;
        }
        if taken > 0 && queue.needs_notification(memory)? {
            outcome.interrupt_for(TRANSMIT);
        }
        Ok(())
    }

    fn receive<B: Bitmap + 'static>(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap<B>,
        outcome: &mut Outcome,
    ) -> Result<(), virtio_queue::Error> {
        self.wants = false;
        let mut given = 0;
        while self.is_open && !self.is_gone {
            if given == queue.size() {
                outcome.again = true;
                break;
            }
            let Some(next) = Chain::next_or_notify(queue, memory, LIMITS)? else { break };
            let mut written = 0;
            if let Ok(mut chain) = next.chain
                && chain.writable.remaining_bytes() > 0
            {
                let room = chain.writable.remaining_bytes();
                written = match chain.writable.receive_from(self.stream.as_fd(), room) {
                    Ok(count) => count,
                    Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                        // Nothing to give after all: the room stays the driver's next.
                        queue.set_next_avail(queue.next_avail().wrapping_sub(1));
                        self.wants = true;
                        break;
                    }
                    Err(_) => 0,
                };
                if written == 0 {
                    queue.set_next_avail(queue.next_avail().wrapping_sub(1));
                    self.is_gone = true;
                    self.told.push_back(Message::of(PORT_OPEN, 0));
                    break;
                }
            }
            queue.add_used(memory, next.head, u32::try_from(written).unwrap_or(0))?;
            given += 1;
        }
        if given > 0 && queue.needs_notification(memory)? {
            outcome.interrupt_for(RECEIVE);
        }
        Ok(())
    }

    /// Watches the stream for what is wanted of it, once: its end would else be told again and again.
    fn watch(&mut self) {
        let mut wanted = EventFlags::empty();
        wanted.set(EventFlags::IN, self.wants && !self.is_gone);
        wanted.set(EventFlags::OUT, !self.unsent.is_empty() && !self.is_gone);
        if wanted != self.watched {
            let flags = wanted | EventFlags::ONESHOT;
            // One that cannot be watched is not heard of again.
            self.is_gone |= epoll::modify(&self.epoll, &self.stream, EventData::new_u64(0), flags).is_err();
            self.watched = wanted;
        }
    }
}

impl<B: Bitmap + 'static> Device<B> for Console {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES | FEATURE_MULTIPORT
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn events(&self) -> Option<BorrowedFd<'_>> {
        Some(self.epoll.as_fd())
    }

    fn process(
        &mut self,
        wake: Wake,
        queues: &mut [Option<&mut Queue>],
        memory: &GuestMemoryMmap<B>,
    ) -> Result<Outcome, QueueError> {
        let mut outcome = Outcome::default();
        if wake == Wake::Events {
            let mut events = [epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }];
            let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
            // It told once, and is told anew what to watch for below.
            let _ = epoll::wait(&self.epoll, &mut events, Some(&at_once));
            self.watched = EventFlags::empty();
        }
        let fail = |queue| move |source| QueueError { queue, source };
        if let Some(Some(queue)) = queues.get_mut(SAID) {
            self.heard(queue, memory, &mut outcome).map_err(fail(SAID))?;
        }
        if let Some(Some(queue)) = queues.get_mut(TRANSMIT) {
            self.transmit(queue, memory, &mut outcome).map_err(fail(TRANSMIT))?;
        }
        if let Some(Some(queue)) = queues.get_mut(RECEIVE) {
            self.receive(queue, memory, &mut outcome).map_err(fail(RECEIVE))?;
        }
        if let Some(Some(queue)) = queues.get_mut(TOLD) {
            self.tell(queue, memory, &mut outcome).map_err(fail(TOLD))?;
        }
        self.watch();
        Ok(outcome)
    }

    fn reset(&mut self) {
        self.told.clear();
        self.unsent.clear();
        (self.is_open, self.wants) = (false, false);
        self.watch();
    }

    fn can_freeze(&self) -> bool {
        true
    }

    fn freeze(&self) -> Result<Vec<u8>, StateError> {
        match self.told.is_empty() && self.unsent.is_empty() && !self.is_gone {
            true => Ok(vec![u8::from(self.is_open)]),
            false => Err(StateError::InUse),
        }
    }

    fn thaw(&mut self, state: &[u8]) -> Result<(), StateError> {
        self.is_open = match state {
            [0] => false,
            [1] => true,
            _ => return Err(StateError::Malformed),
        };
        Ok(())
    }

    fn finish(&mut self, queues: &mut [Option<&mut Queue>], memory: &GuestMemoryMmap<B>) {
        let give_up = Instant::now() + LAST_WORDS;
        loop {
            let outcome = Device::<B>::process(self, Wake::Queue(TRANSMIT), queues, memory);
            let left = give_up.saturating_duration_since(Instant::now());
            let again = outcome.is_ok_and(|outcome| outcome.again);
            if self.is_gone || left.is_zero() || self.unsent.is_empty() && !again {
                break;
            }
            if !self.unsent.is_empty() {
                let mut wait = [PollFd::new(&self.stream, PollFlags::OUT)];
                let left = Timespec::try_from(left).ok();
                let _ = poll(&mut wait, left.as_ref());
            }
        }
        let _ = self.stream.shutdown(Shutdown::Both);
        self.is_gone = true;
        self.watch();
    }
}

#[cfg(test)]
mod tests;
