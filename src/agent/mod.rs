//! The host side of the wire: a session with the agent of one machine, and what is carried out of its layers.
//!
//! The guest is hostile, and so is whoever answers as its agent: every message is bounded by `kiln-wire`, checked
//! for its place in the conversation here, and a violation ends the session. A [`Session`] does one thing at a time; a
//! [`Hub`] shares one among several who run commands in it.

mod hub;
mod input;
mod session;
mod transfer;

pub use hub::{Hub, Misplaced, Remote};
pub use session::{Controls, ExecEnd, RUNNING, Session, SessionError};
pub use transfer::{Limits, Listing, TransferError};
