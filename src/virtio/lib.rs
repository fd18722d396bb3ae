//! Virtio devices written once, against queues and guest memory: fs (virtio 1.3 §5.11), vsock (§5.10), console (§5.3),
//! entropy (§5.4) and balloon (§5.5).
//!
//! A [`device::Device`] is given its queues and the guest's memory, works off what is there, and *returns*
//! which queues the driver has to be interrupted for; it never signals, and it knows no transport.
//! [`vhost_user`] carries a device to QEMU. [`process`] is the whole device process beside one QEMU, and
//! [`control`] what its parent says to it and hears from it.
//!
//! | room | what |
//! | --- | --- |
//! | [`ring`] | one descriptor chain, walked once, bounded: the only door for bytes of the guest |
//! | [`device`] | the contract between a device and what carries it |
//! | [`fs`] | a FUSE server over read-only shares, and the record of what the guest asked for |
//! | [`vsock`] | stream sockets between guest and host, credits, one trait to what is behind them |
//! | [`console`] | a stream by a port's name |
//! | [`rng`] | random numbers of the host's |
//! | [`balloon`] | memory that a guest has no use for goes back to the host |
//! | [`patience`] | how long to look out for a driver's next request |
//! | [`vhost_user`] | carries a device over the vhost-user protocol |
//! | [`control`] | the messages between parent and device process, and both halves |
//! | [`process`] | the device process's entry |
//!
//! The guest is hostile from its first instruction: every number that comes out of guest memory is read once,
//! checked at the door and bounded, and no request may panic, allocate without bound, or spin.

#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "a test fails by panicking"))]

pub mod balloon;
pub mod console;
pub mod control;
pub mod device;
pub mod fs;
pub mod patience;
pub mod process;
pub mod ram;
pub mod ring;
pub mod rng;
pub mod vhost_user;
pub mod vsock;

#[cfg(test)]
mod testkit;
