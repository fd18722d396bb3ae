//! Fuzzing on stable Rust: what a hostile guest, host or archive can send, run in this process as fast as it goes.
//!
//! | target | an input is | held against it |
//! | --- | --- | --- |
//! | `fuse` | requests and descriptor chains for the fs device | right answers, nothing from outside the shares |
//! | `vsock` | packets, buffers and streams on both sides of the vsock device | right packets, within the guest's credit |
//! | `mmio` | accesses to the registers of our own VMM and requests to a disk behind them | a model of the disk, the order of the status |
//! | `console` | chains and messages of a driver, and what the host says, reads and closes | both streams, byte by byte and in order, to the last words |
//! | `rng` | chains of room for random numbers | as many as there is room for, and not a byte beside it |
//! | `balloon` | reports of free memory | whole pages of what was reported go, and nothing else |
//! | `snapshot` | what is to be a frozen machine | what is decoded is encoded to the same |
//! | `to_host` | a stream of an agent's frames for the host's decoder | a message has one form, however the stream is cut |
//! | `to_agent` | the same for the agent's decoder | the same |
//! | `session` | all that an agent says in one run of a command | lists are trees, contents are what was sent |
//! | `pe` | an image, stub, message, certificate, signature list, enrolment file or SBAT | every byte has one place, what verifies was signed, what is written is read |
//! | `erofs` | choices that make a tree | the image reads back as the tree, and `fsck.erofs` agrees with a sample |
//!
//! No input may panic, or hold more memory than its target says ([`meter`]). `cargo test --test fuzz` replays the corpus
//! (`corpus/TARGET`) and goes on for a second each; `ci/fuzz TARGET SECONDS` goes on for longer and counts. What fails
//! is made shorter and joins the corpus.

mod chains;
mod console;
mod driver;
mod erofs;
mod fuse;
mod messages;
mod meter;
mod mmio;
mod pe;
mod places;
mod random;
mod rooms;
mod session;
mod signer;
mod snapshot;
mod steps;
mod vsock;
mod wire;

#[path = "../../src/virtio/testkit.rs"]
#[expect(dead_code, reason = "shared with the tests of the devices")]
mod testkit;

#[path = "../../src/artifact/uefi/pe/sample.rs"]
#[expect(dead_code, reason = "shared with the tests of the reader")]
mod sample;
