//! Roots: from a locked source to a tree that a machine can have as its `/`.
//!
//! - [`debian`]: a root made of Debian packages, and Debian's kernels.
//! - [`modules`]: which files of a kernel's modules to load, in which order.

pub mod debian;
mod decompress;
pub mod modules;
