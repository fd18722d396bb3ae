//! One stream connection: its credits in both directions, its buffer, what it still has to tell the guest.
//!
//! Data from the guest goes to the host's stream at once; what the stream does not take waits in a buffer that
//! never holds more than [`BUFFER_BYTES`], because that is all the credit the guest gets. Data to the guest is
//! read from the stream straight into the guest's buffers, so none waits here, whatever credit the guest
//! claims. Knows no queue: the muxer calls it with chains.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::event::epoll::EventFlags;
use rustix::net::{SendFlags, Shutdown};
use vm_memory::bitmap::Bitmap;

use super::Answer;
use super::packet::{Header, SHUT_RECEIVE, SHUT_SEND, op};
use crate::ring::{Readable, Writable};

/// Receive buffer of one connection on the host's side, and the credit that the guest gets.
pub const BUFFER_BYTES: u32 = 64 << 10;

/// The guest broke the rules of the connection, or the host's end is gone: the connection ends with RST.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Broken;

bitflags::bitflags! {
    /// Packets that the guest is still to be sent, in this order.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    struct Pending: u8 {
        const REQUEST = 1;
        const RESPONSE = 2;
        const CREDIT_UPDATE = 4;
        const CREDIT_REQUEST = 8;
        const SHUTDOWN = 16;
    }
}

/// One connection.
pub struct Connection {
    /// Port on the host's side.
    pub host_port: u32,
    /// Port on the guest's side.
    pub guest_port: u32,
    stream: UnixStream,
    /// Whoever waits for the guest to accept.
    waiting: Option<Answer>,
    pending: Pending,
    /// The stream may have something to read.
    readable: bool,
    /// What the host's end has shut, as SHUT_*; told to the guest with SHUTDOWN.
    host_shut: u32,
    /// What the guest has shut, as SHUT_*.
    guest_shut: u32,
    buffer: VecDeque<u8>,
    /// Bytes from the guest; taken out of the buffer; of those, told to the guest. All modulo 2^32.
    received: u32,
    forwarded: u32,
    told: u32,
    /// Bytes to the guest; of those, taken by it; and its buffer.
    sent: u32,
    guest_forwarded: u32,
    guest_buffer: u32,
    credit_requested: bool,
    /// What the stream is being waited for, if anything.
    pub armed: Option<EventFlags>,
    /// The muxer has it in its list of those with something to send.
    pub queued: bool,
}

impl Connection {
    /// A connection that the guest asked for with `request`, to `stream`.
    pub fn accepted(request: &Header, stream: UnixStream) -> Self {
        let mut connection = Self::new(request.dst_port.get(), request.src_port.get(), stream);
        connection.pending = Pending::RESPONSE;
        connection.guest_buffer = request.buf_alloc.get();
        connection
    }

    /// A connection that the host asks for; `waiting` hears whether the guest accepts.
    pub fn requested(host_port: u32, guest_port: u32, stream: UnixStream, waiting: Answer) -> Self {
        let mut connection = Self::new(host_port, guest_port, stream);
        connection.pending = Pending::REQUEST;
        connection.waiting = Some(waiting);
        connection
    }

    fn new(host_port: u32, guest_port: u32, stream: UnixStream) -> Self {
        Self {
            host_port,
            guest_port,
            stream,
            waiting: None,
            pending: Pending::empty(),
            readable: false,
            host_shut: 0,
            guest_shut: 0,
            buffer: VecDeque::new(),
            received: 0,
            forwarded: 0,
            told: 0,
            sent: 0,
            guest_forwarded: 0,
            guest_buffer: 0,
            credit_requested: false,
            armed: None,
            queued: false,
        }
    }

    /// Bytes that wait in the buffer.
    #[cfg(test)]
    pub fn buffered(&self) -> usize {
        self.buffer.len()
    }

    /// Lets all counters stand at `count`.
    #[cfg(test)]
    pub fn set_counters(&mut self, count: u32) {
        (self.received, self.forwarded, self.told) = (count, count, count);
        (self.sent, self.guest_forwarded) = (count, count);
    }

    /// The host's stream.
    pub fn stream(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Takes one packet of the guest's. `Ok(false)` where that was its last and the connection is to end.
    pub fn take<B: Bitmap + 'static>(
        &mut self,
        header: &Header,
        data: &mut Readable<'_, B>,
    ) -> Result<bool, Broken> {
        let op = header.op.get();
        if self.waiting.is_some() {
            // Until the guest has accepted, all it may do is that.
            if op != op::RESPONSE || self.pending.contains(Pending::REQUEST) {
                return Err(Broken);
            }
            self.guest_buffer = header.buf_alloc.get();
            if let Some(waiting) = self.waiting.take() {
                waiting(true);
            }
            return Ok(true);
        }
        self.take_credit(header)?;
        match op {
            op::RW => self.take_data(header.length.get(), data)?,
            op::CREDIT_UPDATE => {}
            op::CREDIT_REQUEST => self.pending |= Pending::CREDIT_UPDATE,
            op::SHUTDOWN => {
                self.guest_shut |= header.flags.get() & (SHUT_RECEIVE | SHUT_SEND);
                if self.guest_shut & SHUT_RECEIVE != 0 {
                    self.readable = false;
                    let _ = rustix::net::shutdown(&self.stream, Shutdown::Read);
                }
                self.pass_shutdown();
            }
            _ => return Err(Broken),
        }
        Ok(!self.over())
    }

    /// The guest's side of the credit: what it has taken can only grow, up to what was sent.
    fn take_credit(&mut self, header: &Header) -> Result<(), Broken> {
        let forwarded = header.fwd_cnt.get();
        let step = forwarded.wrapping_sub(self.guest_forwarded);
        if step > self.sent.wrapping_sub(self.guest_forwarded) {
            return Err(Broken);
        }
        self.guest_forwarded = forwarded;
        self.guest_buffer = header.buf_alloc.get();
        // A guest that has none to give is not asked again before it has.
        self.credit_requested &= self.credit() == 0;
        Ok(())
    }

    fn take_data<B: Bitmap + 'static>(
        &mut self,
        length: u32,
        data: &mut Readable<'_, B>,
    ) -> Result<(), Broken> {
        let held = self.received.wrapping_sub(self.forwarded);
        let room = BUFFER_BYTES.saturating_sub(held);
        if self.guest_shut & SHUT_SEND != 0 || length > room {
            return Err(Broken);
        }
        self.received = self.received.wrapping_add(length);
        let mut left = length as usize;
        while left > 0 && self.buffer.is_empty() {
            match data.send_to(self.stream.as_fd(), left) {
                Ok(0) => return Err(Broken),
                Ok(sent) => {
                    left -= sent;
                    self.count_forwarded(sent);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return Err(Broken),
            }
        }
        if left > 0 {
            let mut rest = vec![0; left];
            if data.read(&mut rest) < left {
                return Err(Broken);
            }
            self.buffer.extend(rest);
        }
        Ok(())
    }

    fn count_forwarded(&mut self, bytes: usize) {
        let bytes = u32::try_from(bytes).unwrap_or(0);
        self.forwarded = self.forwarded.wrapping_add(bytes);
        // Linux waits for room of its own accord; tell it before it runs dry, but not for every packet.
        if self.forwarded.wrapping_sub(self.told) >= BUFFER_BYTES / 2 {
            self.pending |= Pending::CREDIT_UPDATE;
        }
    }

    /// Takes what epoll says of the stream. `Ok(false)` as for [`Connection::take`].
    pub fn take_event(&mut self, event: EventFlags) -> Result<bool, Broken> {
        if self.waiting.is_some() {
            // Whoever asked for the connection has given up.
            return Err(Broken);
        }
        if event.contains(EventFlags::OUT) || event.contains(EventFlags::ERR) {
            self.flush()?;
        }
        let ended = EventFlags::IN | EventFlags::HUP | EventFlags::RDHUP | EventFlags::ERR;
        if event.intersects(ended) && self.guest_shut & SHUT_RECEIVE == 0 {
            self.readable = true;
        }
        if event.contains(EventFlags::HUP) && self.host_shut & SHUT_SEND != 0 {
            // The other end read nothing after its last word and is gone.
            self.shut(SHUT_RECEIVE);
        }
        Ok(!self.over())
    }

    fn flush(&mut self) -> Result<(), Broken> {
        while !self.buffer.is_empty() {
            let (front, _) = self.buffer.as_slices();
            match rustix::net::send(&self.stream, front, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) => {
                    self.buffer.drain(..sent);
                    self.count_forwarded(sent);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Ok(()),
                Err(_) => return Err(Broken),
            }
        }
        self.buffer = VecDeque::new();
        self.pass_shutdown();
        Ok(())
    }

    /// Passes the end of the guest's data on, once all of it is through.
    fn pass_shutdown(&mut self) {
        if self.guest_shut & SHUT_SEND != 0 && self.buffer.is_empty() {
            let _ = rustix::net::shutdown(&self.stream, Shutdown::Write);
        }
    }

    /// The guest has ended both directions and everything it sent is through.
    fn over(&self) -> bool {
        self.guest_shut == SHUT_RECEIVE | SHUT_SEND && self.buffer.is_empty()
    }

    fn shut(&mut self, what: u32) {
        if self.host_shut & what != what {
            self.host_shut |= what;
            self.pending |= Pending::SHUTDOWN;
        }
    }

    /// Bytes that the guest has room for.
    fn credit(&self) -> u32 {
        self.guest_buffer.saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    fn can_read(&self) -> bool {
        self.waiting.is_none() && self.readable && self.host_shut & SHUT_SEND == 0
    }

    /// True where the guest is to be sent something.
    pub fn has_packet(&self) -> bool {
        !self.pending.is_empty() || (self.can_read() && (self.credit() > 0 || !self.credit_requested))
    }

    /// What the stream is to be waited for; `None` for nothing at all, not even its end.
    pub fn interest(&self) -> Option<EventFlags> {
        if self.waiting.is_some() {
            return Some(EventFlags::empty());
        }
        let mut interest = EventFlags::empty();
        let may_read = self.guest_shut & SHUT_RECEIVE == 0 && self.host_shut & SHUT_SEND == 0;
        interest.set(EventFlags::IN | EventFlags::RDHUP, may_read && !self.readable);
        interest.set(EventFlags::OUT, !self.buffer.is_empty());
        (!interest.is_empty()).then_some(interest)
    }

    /// The next packet for the guest, whose data, if any, goes straight into `room`, the part of the guest's
    /// buffer behind the header. `None` where there is none after all.
    pub fn give<B: Bitmap + 'static>(
        &mut self,
        room: &mut Writable<'_, B>,
    ) -> Result<Option<Header>, Broken> {
        for (pending, op) in [
            (Pending::REQUEST, op::REQUEST),
            (Pending::RESPONSE, op::RESPONSE),
            (Pending::CREDIT_UPDATE, op::CREDIT_UPDATE),
            (Pending::CREDIT_REQUEST, op::CREDIT_REQUEST),
            (Pending::SHUTDOWN, op::SHUTDOWN),
        ] {
            if self.pending.contains(pending) {
                self.pending -= pending;
                let flags = if op == op::SHUTDOWN { self.host_shut } else { 0 };
                return Ok(Some(self.header(op, 0, flags)));
            }
        }
        if !self.can_read() {
            return Ok(None);
        }
        let most = (self.credit() as usize).min(room.remaining_bytes());
        if most == 0 {
            if self.credit_requested || self.credit() > 0 {
                return Ok(None);
            }
            self.credit_requested = true;
            return Ok(Some(self.header(op::CREDIT_REQUEST, 0, 0)));
        }
        match room.receive_from(self.stream.as_fd(), most) {
            Ok(0) => {
                self.readable = false;
                self.shut(SHUT_SEND | if self.host_gone() { SHUT_RECEIVE } else { 0 });
                self.pending -= Pending::SHUTDOWN;
                Ok(Some(self.header(op::SHUTDOWN, 0, self.host_shut)))
            }
            Ok(count) => {
                let count = u32::try_from(count).map_err(|_| Broken)?;
                self.sent = self.sent.wrapping_add(count);
                Ok(Some(self.header(op::RW, count, 0)))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Ok(None)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(None),
            Err(_) => Err(Broken),
        }
    }

    /// True where the other end of the stream is closed, not only shut for writing.
    fn host_gone(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, poll};
        let mut wait = [PollFd::new(&self.stream, PollFlags::empty())];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut wait, Some(&now)).is_ok() && wait[0].revents().contains(PollFlags::HUP)
    }

    fn header(&mut self, op: u16, length: u32, flags: u32) -> Header {
        self.told = self.forwarded;
        self.pending -= Pending::CREDIT_UPDATE;
        Header {
            src_port: self.host_port.into(),
            dst_port: self.guest_port.into(),
            length: length.into(),
            kind: super::packet::STREAM.into(),
            op: op.into(),
            flags: flags.into(),
            buf_alloc: BUFFER_BYTES.into(),
            fwd_cnt: self.forwarded.into(),
            ..Header::default()
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(waiting) = self.waiting.take() {
            waiting(false);
        }
    }
}
