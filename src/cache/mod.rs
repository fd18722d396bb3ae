//! Traces: what a step was seen to read and what it gave, and whether that still holds.
//!
//! - [`key`]: what a step is. Under its key the store keeps [`trace`]s ([`index`]), and what it did last is in [`notes`]. All
//!   lie in packs, as lines of files.
//! - [`verify`]: whether a trace holds against the files as they are now, and if not, the first [`difference`].
//! - [`ledger`]: what kiln put into a WORK and is answerable for.
//!
//! Nothing here runs a step, and nothing here believes a time stamp that could be older than what it stands for.

mod codec;
pub mod difference;
pub mod index;
pub mod key;
pub mod ledger;
pub mod notes;
mod pack;
pub mod stock;
pub mod trace;
pub mod verify;

/// The family of records of what a lock says of one thing.
pub const LOCKED: &str = "locked";

pub use difference::{Difference, What};
pub use index::{Found, Index, Scope, ScopeError};
pub use key::Key;
pub use notes::LastRun;
pub use trace::{Entry, ShareTrace, Trace};
pub use verify::{Hidden, Place, Places};
