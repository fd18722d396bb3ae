//! What is said at a machine's door: who is there, and what the caller wants. One frame each way and one back, small and
//! read to the byte, because what follows on the same stream is the wire.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use kiln_wire::encode_frame;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The version of what is said here.
pub(super) const VERSION: u32 = 2;

/// Longest frame: the end of a console, each byte of which may become six.
const MAX_BYTES: u32 = 512 << 10;

/// Most descriptors at once.
const MOST_DESCRIPTORS: usize = 8;

/// The owner's first word.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Greeting {
    /// [`VERSION`].
    pub version: u32,
    /// The version of the wire that its agent speaks.
    pub wire: u16,
}

impl Greeting {
    /// This kiln's.
    pub fn ours() -> Self {
        Self { version: VERSION, wire: kiln_wire::VERSION }
    }
}

/// What the caller wants.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Request {
    /// That the machine ends. The stream ends when it has.
    Stop,
    /// To run one command in it: the wire follows.
    Enter,
    /// To have it for a step: what it is and its descriptors follow.
    Borrow,
}

/// The owner's answer.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Answer {
    /// So be it.
    Granted,
    /// No, and why, in words.
    Refused(String),
}

/// Says something.
pub(super) fn say<T: Serialize>(mut stream: &UnixStream, what: &T) -> io::Result<()> {
    stream.write_all(&encode_frame(&serde_json::to_vec(what)?))
}

/// Hears something.
pub(super) fn hear<T: DeserializeOwned>(mut stream: &UnixStream) -> io::Result<T> {
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length);
    if length > MAX_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a word that is too long"));
    }
    let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()];
    stream.read_exact(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}

/// Hands descriptors over, with a byte to carry them.
pub(super) fn say_descriptors(stream: &UnixStream, descriptors: &[OwnedFd]) -> io::Result<()> {
    let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    rustix::net::sendmsg(stream, &[IoSlice::new(&[0])], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Takes `count` descriptors.
pub(super) fn hear_descriptors(stream: &UnixStream, count: usize) -> io::Result<Vec<OwnedFd>> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [IoSliceMut::new(&mut byte)];
    let message = rustix::net::recvmsg(stream, &mut bytes, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let taken = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let taken: Vec<OwnedFd> = taken.flatten().collect();
    if message.bytes == 1 && taken.len() == count {
        Ok(taken)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidData, "descriptors are missing"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_to_the_byte() {
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        say(&theirs, &Request::Enter).expect("room");
        theirs.write_all(b"wire").expect("room");
        assert_eq!(hear::<Request>(&ours).expect("a request"), Request::Enter);
        let mut rest = [0; 4];
        (&ours).read_exact(&mut rest).expect("the wire");
        assert_eq!(&rest, b"wire");
    }

    #[test]
    fn what_is_no_word_is_refused() {
        for bytes in [&[0xff; 8][..], &[0, 0, 0, 0], &[2, 0, 0, 0, b'{', b'}'], &[9, 0, 0, 0, 1]] {
            let (ours, mut theirs) = UnixStream::pair().expect("a pair");
            theirs.write_all(bytes).expect("room");
            drop(theirs);
            assert!(hear::<Request>(&ours).is_err(), "{bytes:?}");
        }
    }
}
