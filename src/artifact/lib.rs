//! File formats that kiln writes itself, readers of the formats it takes in, and the file tree between them.
//!
//! Everything here is a pure function of a [`tree::Tree`] and the contents it names: no clock, no environment, no
//! network, and equal input gives equal bytes. It uses nothing of kiln but digests.

#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "a test fails by panicking"))]

pub mod archive;
mod content;
pub mod cpio;
pub mod erofs;
pub mod fat;
pub mod gpt;
pub mod image;
pub mod kernel;
pub mod squashfs;
pub mod tree;
pub mod uefi;
mod uuid;
pub mod variables;
pub mod verity;

pub use content::ContentError;
