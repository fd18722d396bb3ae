//! Debian.
pub mod control;
pub mod packages;
pub mod relation;
pub mod release;
pub mod resolve;
pub mod sources;
pub mod spec;
pub mod version;
