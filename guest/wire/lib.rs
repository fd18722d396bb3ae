//! The messages between host and agent, their bytes, and how either counts the other's time. No I/O: frames go in and out as
//! slices, and times as values.
//!
//! Either side treats the other's bytes as hostile: every length has a limit that is checked before anything is
//! allocated, decoding is flat (no recursion) and never panics, and a violation is an error that ends the machine.
//! What carries the frames (a virtio-serial port, vsock) is not this crate's business.

mod codec;
mod credit;
mod deadline;
mod frame;
mod from_agent;
mod message;
mod to_agent;

pub use codec::DecodeError;
pub use credit::{CREDIT_BYTES, Credit, Taken};
pub use deadline::Deadline;
pub use frame::{FrameError, FrameReader, MAX_FROM_AGENT_BYTES, MAX_PAYLOAD_BYTES, encode_frame};
pub use message::*;
