//! kiln: every build step in its own microVM, and a record of what each step read.
//!
//! The map of the house; imports go downwards only (`tests/layering.rs` holds that):
//!
//! - [`cli`]: clap types, one file a verb family, and output rendering; no logic.
//! - [`engine`]: a step's life from its description to merged outputs.
//! - [`root`]: from a locked source (Debian packages, a directory, an archive) to a root image.
//! - [`fetch`]: the lock file and the HTTP client.
//! - [`machine`]: one VM, whichever backend runs it; [`agent`]: the host side of the wire.
//! - [`store`]: content-addressed blobs and what refers to them.
//! - [`settings`]: every setting with its origin.
//! - [`plan`]: pure data and pure functions: a step, its globs, its environment.
//!
//! Crates of their own, because their target, trust or dependencies differ: `kiln-digest`, `kiln-artifact`,
//! `kiln-openpgp`, `kiln-virtio`, `kiln-wire` and the agent.

pub mod fetch;
pub mod root;
pub mod store;
