//! What is said at a machine's door: who is there, and what the caller wants. One frame each way and one back, small and
//! read to the byte, because what follows on the same stream is the wire.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use kiln_wire::encode_frame;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The version of what is said here.
pub(super) const VERSION: u32 = 1;

/// Longest frame.
const MAX_BYTES: u32 = 16 << 10;

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
    /// That the machine ends. The stream ends when its owner has.
    Stop,
    /// To run one command in it: the wire follows.
    Enter,
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
