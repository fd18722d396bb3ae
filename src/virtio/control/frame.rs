//! Frames on the control socket: a length, JSON of that length, and at most one descriptor.
//!
//! The socket is a stream. The descriptor rides on the length's bytes, so the receiver takes them with
//! recvmsg(2) and the rest with plain reads.

use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest frame, bytes.
pub const MOST_FRAME_BYTES: usize = 16 << 20;

/// Why a frame was not sent or received.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The socket failed.
    #[error("control socket failed")]
    Socket(#[from] io::Error),
    /// Longer than [`MOST_FRAME_BYTES`].
    #[error("control message of {0} bytes")]
    TooLong(usize),
    /// Not a message of this protocol.
    #[error("malformed control message")]
    Malformed(#[from] serde_json::Error),
    /// More than one descriptor.
    #[error("more than one descriptor with a control message")]
    Descriptors,
}

/// Sends one message, and a descriptor with it.
pub fn send(
    mut socket: &UnixStream,
    message: &impl Serialize,
    descriptor: Option<BorrowedFd<'_>>,
) -> Result<(), FrameError> {
    let body = serde_json::to_vec(message)?;
    let length = u32::try_from(body.len()).ok().filter(|_| body.len() <= MOST_FRAME_BYTES);
    let length = length.ok_or(FrameError::TooLong(body.len()))?.to_le_bytes();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = descriptor.as_slice();
    if descriptor.is_some() {
        control.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    let sent = loop {
        match sendmsg(socket, &[io::IoSlice::new(&length)], &mut control, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result.map_err(io::Error::from)?,
        }
    };
    socket.write_all(&length[sent..])?;
    Ok(socket.write_all(&body)?)
}

/// Receives one message, and the descriptor that came with it; `None` when the other side has hung up.
pub fn receive<T: DeserializeOwned>(
    mut socket: &UnixStream,
) -> Result<Option<(T, Option<OwnedFd>)>, FrameError> {
    let mut length = [0; 4];
    // Room for one more than is allowed, so that too many are seen.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut buffers = [io::IoSliceMut::new(&mut length)];
        match recvmsg(socket, &mut buffers, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result.map_err(io::Error::from)?,
        }
    };
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    if descriptors.len() > 1 || received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(FrameError::Descriptors);
    }
    socket.read_exact(&mut length[received.bytes..])?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MOST_FRAME_BYTES {
        return Err(FrameError::TooLong(length));
    }
    // Grows with what really comes, not with what is claimed.
    let mut body = Vec::new();
    socket.take(length as u64).read_to_end(&mut body)?;
    if body.len() < length {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    Ok(Some((serde_json::from_slice(&body)?, descriptors.pop())))
}
