//! The table of connections: packets in, packets out, and what streams are waited for.
//!
//! Everything here is bounded: connections by [`MOST_CONNECTIONS`], refusals that wait for the guest to take
//! them by [`MOST_RESETS`], after which no more packets are taken from the guest. A stream is waited for once
//! (EPOLLONESHOT) and again only when there is something to do with the answer, so neither a guest without
//! receive buffers nor a stream that has ended keeps this busy.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use vm_memory::bitmap::Bitmap;

use super::connection::Connection;
use super::packet::{HOST_CID, Header, STREAM, op};
use super::{Answer, Backend};
use crate::ring::{Readable, Writable};

/// Most connections at a time, as in Firecracker.
pub const MOST_CONNECTIONS: usize = 1023;
/// Most refusals that wait for the guest to take them.
pub const MOST_RESETS: usize = 1024;
/// Where the host's own port numbers start.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// The epoll datum of the inbox.
pub const INBOX: u64 = u64::MAX;

/// All connections of one device.
pub struct Muxer {
    guest_cid: u64,
    most_connections: usize,
    epoll: OwnedFd,
    connections: BTreeMap<u64, Connection>,
    by_ports: BTreeMap<(u32, u32), u64>,
    next_id: u64,
    next_port: u32,
    /// Connections with something to send, each once.
    ready: VecDeque<u64>,
    resets: VecDeque<Header>,
}

impl Muxer {
    /// No connections yet and `most_connections` at most, for the guest whose context id is `guest_cid`.
    pub fn new(guest_cid: u64, most_connections: usize) -> rustix::io::Result<Self> {
        Ok(Self {
            guest_cid,
            most_connections: most_connections.min(MOST_CONNECTIONS),
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            connections: BTreeMap::new(),
            by_ports: BTreeMap::new(),
            next_id: 0,
            next_port: FIRST_HOST_PORT,
            ready: VecDeque::new(),
            resets: VecDeque::new(),
        })
    }

    /// What becomes readable when a stream has something.
    pub fn events(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Waits for `inbox` too; its events come out of [`Muxer::poll`] as true.
    pub fn watch_inbox(&self, inbox: impl AsFd) -> rustix::io::Result<()> {
        epoll::add(&self.epoll, inbox, EventData::new_u64(INBOX), EventFlags::IN)
    }

    /// Ends all connections without a word to the guest.
    pub fn reset(&mut self) {
        self.connections.clear();
        self.by_ports.clear();
        self.ready.clear();
        self.resets.clear();
    }

    /// How many connections there are.
    #[cfg(test)]
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// Bytes that wait in the buffer of connection number `id`.
    #[cfg(test)]
    pub fn buffered(&self, id: u64) -> usize {
        self.connections.get(&id).map_or(0, Connection::buffered)
    }

    /// Lets all counters of connection number `id` stand at `count`.
    #[cfg(test)]
    pub fn set_counters(&mut self, id: u64, count: u32) {
        self.connections.get_mut(&id).expect("connection").set_counters(count);
    }

    /// Connects `stream` to port `guest_port` of the guest.
    pub fn connect(&mut self, guest_port: u32, stream: UnixStream, answer: Answer) {
        if self.connections.len() >= self.most_connections {
            return answer(false);
        }
        // There are far more numbers than connections.
        while self.by_ports.contains_key(&(self.next_port, guest_port)) {
            self.next_port = self.next_port.wrapping_add(1).max(FIRST_HOST_PORT);
        }
        let host_port = self.next_port;
        self.next_port = self.next_port.wrapping_add(1).max(FIRST_HOST_PORT);
        self.insert(Connection::requested(host_port, guest_port, stream, answer));
    }

    /// True while the guest's packets may be taken.
    pub fn takes_packets(&self) -> bool {
        self.resets.len() < MOST_RESETS
    }

    /// Takes one packet of the guest's: its header, and the bytes behind it.
    pub fn take<B: Bitmap + 'static>(
        &mut self,
        header: &Header,
        data: &mut Readable<'_, B>,
        backend: &mut dyn Backend,
    ) {
        // A guest speaks for itself, and only to the host.
        if header.src_cid.get() != self.guest_cid || header.dst_cid.get() != HOST_CID {
            return;
        }
        let op = header.op.get();
        let ports = (header.dst_port.get(), header.src_port.get());
        let id = self.by_ports.get(&ports).copied();
        let too_short = data.remaining_bytes() < header.length.get() as usize;
        if header.kind.get() != STREAM || too_short || (op == op::REQUEST && id.is_some()) {
            if let Some(id) = id {
                self.remove(id);
            }
            return self.refuse(header);
        }
        match (op, id) {
            (op::REQUEST, None) => {
                let full = self.connections.len() >= self.most_connections;
                match if full { None } else { backend.connect_from_guest(ports.0) } {
                    Some(stream) => self.insert(Connection::accepted(header, stream)),
                    None => self.refuse(header),
                }
            }
            (op::RST, Some(id)) => self.remove(id),
            (_, Some(id)) => {
                let Some(connection) = self.connections.get_mut(&id) else { return };
                let result = connection.take(header, data);
                // A closed connection is confirmed with RST (virtio 1.3 §5.10.6.5), like a broken one.
                if matches!(result, Ok(true)) {
                    self.touch(id);
                } else {
                    self.remove(id);
                    self.refuse(header);
                }
            }
            (_, None) => self.refuse(header),
        }
    }

    /// Takes what happened to streams, without waiting; true where the inbox has something.
    pub fn poll(&mut self) -> bool {
        let mut inbox = false;
        let mut events = Vec::with_capacity(64);
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        if epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&now)).is_err() {
            return false;
        }
        for event in events {
            let id = event.data.u64();
            if id == INBOX {
                inbox = true;
                continue;
            }
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            connection.armed = None;
            match connection.take_event(event.flags) {
                Ok(true) => self.touch(id),
                Ok(false) | Err(_) => self.end(id),
            }
        }
        inbox
    }

    /// True where the guest is to be sent something.
    pub fn has_packet(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// Writes the next packet for the guest; false where there was none, and nothing was written. `header`
    /// is room for the header, `room` what is behind it.
    pub fn give<B: Bitmap + 'static>(
        &mut self,
        header: &mut Writable<'_, B>,
        room: &mut Writable<'_, B>,
    ) -> bool {
        let mut packet = self.resets.pop_front();
        while packet.is_none() {
            let Some(id) = self.ready.pop_front() else { return false };
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            connection.queued = false;
            match connection.give(room) {
                Ok(next) => {
                    packet = next;
                    // To the end of the line, behind the others.
                    self.touch(id);
                }
                Err(_) => {
                    self.end(id);
                    packet = self.resets.pop_front();
                }
            }
        }
        let Some(mut packet) = packet else { return false };
        packet.src_cid = HOST_CID.into();
        packet.dst_cid = self.guest_cid.into();
        header.write(zerocopy::IntoBytes::as_bytes(&packet))
    }

    fn insert(&mut self, connection: Connection) {
        let id = self.next_id;
        self.next_id += 1;
        if epoll::add(&self.epoll, connection.stream(), EventData::new_u64(id), EventFlags::ONESHOT).is_err()
        {
            let mut refusal = Header { kind: STREAM.into(), op: op::RST.into(), ..Header::default() };
            refusal.src_port = connection.host_port.into();
            refusal.dst_port = connection.guest_port.into();
            return self.resets.push_back(refusal);
        }
        self.by_ports.insert((connection.host_port, connection.guest_port), id);
        self.connections.insert(id, connection);
        self.touch(id);
    }

    /// Removes a connection that the guest knows to be over.
    fn remove(&mut self, id: u64) {
        // Closing the stream takes it out of the epoll set.
        if let Some(connection) = self.connections.remove(&id) {
            self.by_ports.remove(&(connection.host_port, connection.guest_port));
            if connection.queued {
                self.ready.retain(|queued| *queued != id);
            }
        }
    }

    /// Removes a connection and tells the guest.
    fn end(&mut self, id: u64) {
        let Some(connection) = self.connections.get(&id) else { return };
        let mut reset = Header { kind: STREAM.into(), op: op::RST.into(), ..Header::default() };
        reset.src_port = connection.host_port.into();
        reset.dst_port = connection.guest_port.into();
        self.remove(id);
        self.resets.push_back(reset);
    }

    /// Answers a packet with RST, unless it is one.
    fn refuse(&mut self, header: &Header) {
        if header.op.get() != op::RST {
            self.resets.push_back(header.reset());
        }
    }

    /// Puts a connection in line if it has something to send, and waits for its stream as it wants.
    fn touch(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if connection.has_packet() && !connection.queued {
            connection.queued = true;
            self.ready.push_back(id);
        }
        if let Some(interest) = connection.interest()
            && connection.armed != Some(interest)
        {
            let flags = interest | EventFlags::ONESHOT;
            let armed = epoll::modify(&self.epoll, connection.stream(), EventData::new_u64(id), flags);
            connection.armed = armed.is_ok().then_some(interest);
        }
    }
}
