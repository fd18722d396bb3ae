//! What a device process and its parent say to each other, over one unix stream socket.
//!
//! The parent asks ([`Request`]) and is answered ([`Event::Reply`]) in whatever order answers are ready; the
//! device process also tells of connections that the guest made ([`Event::Accepted`]), and what the guest did
//! that ended it ([`Event::Misbehaved`]). Directories and streams travel as descriptors with the message. The
//! parent's half is [`Client`]; it does not trust the other side, which serves a hostile guest: every message is
//! bounded, and one that does not belong ends the connection.
//!
//! | request | descriptor | answered when |
//! | --- | --- | --- |
//! | `AddShare` | the directory | the guest can see it |
//! | `Hide` | | the paths are not shown |
//! | `RemoveShare` | | the guest can no longer read it |
//! | `Narrow` | | no thread will open a file but beneath a share's directory; no share can be added any more |
//! | `Listen` | | the guest may connect to the port, once |
//! | `Connect` | one end of a stream | the guest has accepted or refused |
//! | `Stop` | | the guest, where it runs in that process, does no more |
//! | `Freeze` | a file | the guest has stopped, and its machine without the memory is in the file |
//! | `WorkingSet` | a file | which pages of its memory the guest has touched is in the file |
//! | `Finish` | | the record has been sent, as `Event::Record` parts |

mod client;
mod frame;
mod server;

use serde::{Deserialize, Serialize};

pub use self::client::{Client, ClientError};
pub use self::frame::{FrameError, MOST_FRAME_BYTES};
use self::frame::{receive, send};
pub use self::server::{Guest, Server};
use crate::fs::Attributes;
use crate::fs::record::{PathBytes, RecordPart};

/// What the parent asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// The parent's name for the request, for the answer.
    pub id: u64,
    /// What is asked.
    pub what: Ask,
}

/// See [`Request`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ask {
    /// Let the directory that comes along appear as a share.
    AddShare {
        /// Its name.
        name: PathBytes,
        /// What its files show.
        attributes: Attributes,
    },
    /// Leave some paths out of what a share shows. Asked before the guest runs.
    Hide {
        /// The share.
        name: PathBytes,
        /// Paths in it.
        paths: Vec<PathBytes>,
    },
    /// Let a share disappear.
    RemoveShare {
        /// Its name.
        name: PathBytes,
    },
    /// Lock all threads in that open files. Asked when all shares are there, before anything of a step runs.
    Narrow,
    /// Let the guest connect to a vsock port of the host, once.
    Listen {
        /// The port.
        port: u32,
    },
    /// Connect the stream that comes along to a vsock port of the guest.
    Connect {
        /// The port.
        port: u32,
    },
    /// End the guest, where it runs in the process that is asked.
    Stop,
    /// Freeze it into the file that comes along.
    Freeze,
    /// Say into the file that comes along which pages of its memory the guest has touched.
    WorkingSet,
    /// Look once more at what was read, and send the record.
    Finish,
}

/// What the device process tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Event {
    /// The answer to a request.
    Reply {
        /// Which.
        id: u64,
        /// What went wrong, in words, if anything did.
        result: Result<(), String>,
    },
    /// The guest has connected to this port of the host; the stream comes along.
    Accepted {
        /// The port.
        port: u32,
    },
    /// The guest did what no driver does, and the process ends.
    Misbehaved {
        /// What, in words.
        what: String,
    },
    /// A piece of the record.
    Record {
        /// The `Finish` it answers.
        id: u64,
        /// The piece.
        part: RecordPart,
    },
}

#[cfg(test)]
mod tests;
