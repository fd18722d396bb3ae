//! kiln: every build step in its own microVM, and a record of what each step read.
//!
//! The map of the house; imports go downwards only (`tests/layering.rs` holds that):
//!
//! - [`cli`]: clap types, one file a verb family, and output rendering; no logic.
//! - [`engine`]: a step's life from its description to merged outputs.
//! - [`cache`]: traces of what steps read, and whether they still hold.
//! - [`root`]: from a locked source (Debian packages, a directory, an archive) to a root image, and what a
//!   machine boots.
//! - [`fetch`]: the lock file and the HTTP client.
//! - [`keeper`]: machines by name: which there are, and the way into those that were kept.
//! - [`boot`]: systems on real firmware, held against what they should print.
//! - [`machine`]: one VM, whichever backend runs it; [`agent`]: the host side of the wire.
//! - [`sign`]: keys and signatures of boot images.
//! - [`store`]: content-addressed blobs and what refers to them.
//! - [`upkeep`]: what keeps a blob, what may go, and what is damaged; [`writes`]: the door through which files of the
//!   store and of WORK are changed.
//! - [`settings`]: every setting with its origin; [`clock`]: the door to the host's clock; [`threads`]: that to threads;
//!   [`shortage`]: what a host may be short of.
//! - [`apart`]: what must have nothing in common, such as SECRETS and whatever is shown, built or booted.
//! - [`plan`]: pure data and pure functions: recipes and their graph, a step's root, globs, environment, quantities.
//!
//! Crates of their own, because their target, trust or dependencies differ: `kiln-digest`, `kiln-artifact`,
//! `kiln-openpgp`, `kiln-virtio`, `kiln-wire` and the agent.

#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "a test fails by panicking"))]

pub mod agent;
pub mod apart;
pub mod boot;
pub mod cache;
pub mod cli;
pub mod clock;
pub mod engine;
pub mod fetch;
pub mod keeper;
pub mod machine;
pub mod plan;
pub mod root;
pub mod settings;
pub mod shortage;
pub mod sign;
pub mod store;
pub mod threads;
pub mod upkeep;
pub mod writes;
