//! File formats that kiln writes itself, and the file tree they are made from.
//!
//! Everything here is a pure function of a [`tree::Tree`] and the contents it names: no clock, no
//! environment, no network, and equal input gives equal bytes. It uses nothing of kiln but digests.

pub mod cpio;
pub mod erofs;
pub mod tree;
