//! The carrier of the wire, a virtio-serial port or a vsock stream, and the frames in flight on it.
//!
//! Nothing here blocks unless asked to: what is sent waits in a queue whose filling the session watches.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use kiln_wire::{
    AGENT_VSOCK_PORT, DecodeError, FrameError, FrameReader, FromAgent, MAX_PAYLOAD_BYTES, SERIAL_PORT_NAME,
    ToAgent, encode_frame,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::io::Errno;

use crate::failure::Failure;
use crate::layer::Sink;
use crate::sys;

/// Above this many waiting bytes nothing more is read from commands.
const QUEUE_BYTES: usize = 1 << 20;

/// How much is read, and how many small messages are gathered, before something is done with them.
const BATCH_BYTES: usize = 64 << 10;

/// How long the carrier's device may take to appear.
const PATIENCE: Duration = Duration::from_secs(10);

/// vsock's address of the host (vsock(7), VMADDR_CID_HOST).
const HOST_CID: u32 = 2;

/// How often to look whether a host is back on a virtio-serial port, of which poll(2) does not tell.
pub const ABSENCE: Duration = Duration::from_millis(10);

/// Why the wire is of no more use. The machine ends then.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Neither carrier is there.
    #[error("no carrier for the wire appeared")]
    NoCarrier,
    /// The host closed the stream.
    #[error("the host closed the wire")]
    Closed,
    /// The host closed the stream within a frame.
    #[error("the host closed the wire within a message")]
    Truncated,
    /// Reading or writing failed.
    #[error("the wire failed: {0}")]
    Failed(Errno),
    /// The host's bytes are no frames.
    #[error("the host broke the protocol: {0}")]
    Frame(#[from] FrameError),
    /// The host's frame holds no message.
    #[error("the host broke the protocol: {0}")]
    Message(#[from] DecodeError),
}

/// The wire.
pub struct Link {
    carrier: OwnedFd,
    /// Another host may come after this one.
    may_return: bool,
    reader: FrameReader,
    buffer: Vec<u8>,
    queue: Vec<u8>,
    written: usize,
    /// No host is on the other end of a serial port, as of the last read.
    absent: bool,
}

impl Link {
    /// Opens the carrier that the machine has, waiting for its device to appear.
    ///
    /// # Errors
    /// [`LinkError::NoCarrier`].
    pub fn open() -> Result<Self, LinkError> {
        let command_line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
        let use_vsock = command_line.split_ascii_whitespace().any(|word| word == "kiln.wire=vsock");
        let give_up = Instant::now() + PATIENCE;
        loop {
            let serial = serial_port(Path::new("/sys/class/virtio-ports")).map(OwnedFd::from);
            let is_serial = serial.is_some();
            let vsock = || if use_vsock { sys::connect_vsock(HOST_CID, AGENT_VSOCK_PORT).ok() } else { None };
            if let Some(carrier) = serial.or_else(vsock) {
                return Self::on(carrier, is_serial);
            }
            if Instant::now() >= give_up {
                return Err(LinkError::NoCarrier);
            }
            sleep(Duration::from_millis(2));
        }
    }

    fn on(carrier: OwnedFd, is_serial: bool) -> Result<Self, LinkError> {
        fcntl_setfl(&carrier, OFlags::NONBLOCK).map_err(LinkError::Failed)?;
        Ok(Self {
            carrier,
            may_return: is_serial,
            reader: FrameReader::new(MAX_PAYLOAD_BYTES),
            buffer: vec![0; BATCH_BYTES],
            queue: Vec::new(),
            written: 0,
            absent: false,
        })
    }

    /// From now on the host on the other end is the only one there will be: once it goes, the wire has ended. Before
    /// that a serial port may change hosts, as it does when the machine is frozen and copied.
    pub fn bind(&mut self) {
        self.may_return = false;
    }

    /// What to poll, and for what. `None` while no host is there, when only time helps ([`ABSENCE`]).
    pub fn interest(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let mut flags = PollFlags::IN;
        flags.set(PollFlags::OUT, self.queued_bytes() > 0);
        // poll(2) tells of a host's absence whether asked or not, so the carrier is left out meanwhile.
        (!self.absent).then(|| (self.carrier.as_fd(), flags))
    }

    /// Whether commands' output may be read.
    pub fn has_room(&self) -> bool {
        self.queued_bytes() < QUEUE_BYTES
    }

    fn queued_bytes(&self) -> usize {
        self.queue.len().saturating_sub(self.written)
    }

    /// Queues a message.
    pub fn queue(&mut self, message: &FromAgent) {
        self.queue.extend_from_slice(&encode_frame(&message.encode()));
    }

    /// Writes what the carrier takes now.
    ///
    /// # Errors
    /// The wire is of no more use.
    pub fn write(&mut self) -> Result<(), LinkError> {
        while let Some(rest @ [_, ..]) = self.queue.get(self.written..) {
            match rustix::io::write(&self.carrier, rest) {
                Ok(length) => self.written += length,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(LinkError::Closed),
                Err(error) => return Err(LinkError::Failed(error)),
            }
        }
        self.queue.clear();
        self.written = 0;
        Ok(())
    }

    /// Waits until everything queued is with the carrier.
    ///
    /// # Errors
    /// The wire is of no more use.
    pub fn flush(&mut self) -> Result<(), LinkError> {
        loop {
            self.write()?;
            if self.queue.is_empty() {
                return Ok(());
            }
            let mut fds = [PollFd::new(&self.carrier, PollFlags::OUT)];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(LinkError::Failed(error)),
            }
            if fds.iter().all(|fd| !fd.revents().contains(PollFlags::OUT)) {
                if !self.may_return {
                    return Err(LinkError::Closed);
                }
                sleep(ABSENCE);
            }
        }
    }

    /// Waits until everything queued has reached the host, as far as the carrier can tell: a write to a port that may
    /// block returns only when the host has taken the bytes.
    ///
    /// # Errors
    /// The wire is of no more use.
    pub fn flush_to_host(&mut self) -> Result<(), LinkError> {
        fcntl_setfl(&self.carrier, OFlags::empty()).map_err(LinkError::Failed)?;
        self.write()
    }

    /// Reads what has arrived.
    ///
    /// # Errors
    /// The wire is of no more use.
    pub fn read(&mut self) -> Result<(), LinkError> {
        let mut arrived = 0;
        // A serial port gives one of its buffers (a page) at a time.
        while arrived < BATCH_BYTES {
            match rustix::io::read(&self.carrier, &mut self.buffer[..]) {
                Ok(length @ 1..) => {
                    arrived += length;
                    self.reader.push(self.buffer.get(..length).unwrap_or_default());
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                // What arrived before the end is looked at first; the end will be there next time.
                Ok(_) | Err(Errno::CONNRESET) if arrived > 0 => break,
                Ok(_) | Err(Errno::CONNRESET) if self.reader.pending_bytes() > 0 => {
                    return Err(LinkError::Truncated);
                }
                // A serial port without a host reads as ended.
                Ok(_) if self.may_return => {
                    self.absent = true;
                    return Ok(());
                }
                Ok(_) | Err(Errno::CONNRESET) => return Err(LinkError::Closed),
                Err(error) => return Err(LinkError::Failed(error)),
            }
        }
        self.absent = false;
        Ok(())
    }

    /// Whether no host is on the other end now.
    pub fn is_absent(&self) -> bool {
        self.absent
    }

    /// The next message that has arrived.
    ///
    /// # Errors
    /// The host broke the protocol.
    pub fn next(&mut self) -> Result<Option<ToAgent>, LinkError> {
        match self.reader.next()? {
            Some(payload) => Ok(Some(ToAgent::decode(&payload)?)),
            None => Ok(None),
        }
    }
}

/// Listings and contents: gathered into large writes, and held back while the host is slow.
impl Sink for Link {
    fn send(&mut self, message: &FromAgent) -> Result<(), Failure> {
        self.queue(message);
        let result = match self.queued_bytes() {
            0..BATCH_BYTES => Ok(()),
            BATCH_BYTES..QUEUE_BYTES => self.write(),
            _ => self.flush(),
        };
        // The session meets the same error again and ends the machine.
        result.map_err(|_| Failure::new("sending to the host", Errno::PIPE))
    }
}

/// The device of the wire's virtio-serial port, opened, if it is there.
fn serial_port(ports: &Path) -> Option<File> {
    std::fs::read_dir(ports).ok()?.filter_map(Result::ok).find_map(|port| {
        let name = std::fs::read_to_string(port.path().join("name")).ok()?;
        if name.trim_end() != SERIAL_PORT_NAME {
            return None;
        }
        File::options().read(true).write(true).open(Path::new("/dev").join(port.file_name())).ok()
    })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pair() -> (Link, UnixStream) {
        let (agent, host) = UnixStream::pair().expect("a stream");
        (Link::on(agent.into(), false).expect("a link"), host)
    }

    #[test]
    fn messages_arrive_in_pieces() {
        let (mut link, mut host) = pair();
        let frame = encode_frame(&ToAgent::Hello { version: 1 }.encode());
        let (start, end) = frame.split_at(3);
        link.read().expect("nothing yet");
        host.write_all(start).expect("written");
        link.read().expect("a piece");
        assert!(link.next().expect("honest").is_none());
        host.write_all(end).expect("written");
        host.write_all(&frame).expect("written");
        drop(host);
        link.read().expect("the rest");
        assert_eq!(link.next().expect("honest"), Some(ToAgent::Hello { version: 1 }));
        assert_eq!(link.next().expect("honest"), Some(ToAgent::Hello { version: 1 }));
        assert!(matches!(link.read(), Err(LinkError::Closed)));
    }

    #[test]
    fn a_stream_cut_within_a_frame_is_an_error() {
        let (mut link, mut host) = pair();
        host.write_all(&[9, 0, 0, 0, 1]).expect("written");
        drop(host);
        link.read().expect("a piece");
        assert!(link.next().expect("so far honest").is_none());
        assert!(matches!(link.read(), Err(LinkError::Truncated)));
    }

    #[test]
    fn garbage_is_an_error() {
        for (bytes, is_frame) in [(&[0xff; 8][..], true), (&[1, 0, 0, 0, 0xff][..], false)] {
            let (mut link, mut host) = pair();
            host.write_all(bytes).expect("written");
            link.read().expect("some bytes");
            let error = link.next().expect_err("garbage");
            assert_eq!(matches!(error, LinkError::Frame(_)), is_frame);
            assert_eq!(matches!(error, LinkError::Message(_)), !is_frame);
        }
    }

    #[test]
    fn a_slow_host_fills_the_queue_and_no_more() {
        let (mut link, mut host) = pair();
        let message = FromAgent::Log("x".repeat(4000));
        while link.has_room() {
            link.queue(&message);
            link.write().expect("a host");
        }
        assert!(link.queued_bytes() < QUEUE_BYTES + 5000);
        let reader = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            host.read_to_end(&mut bytes).map(|_| bytes.len())
        });
        link.flush().expect("a host");
        assert_eq!(link.queued_bytes(), 0);
        drop(link);
        assert!(reader.join().expect("no panic").expect("read") > QUEUE_BYTES);
    }
}
