//! Our formats, judged by programs that others wrote.

#![allow(clippy::disallowed_methods, reason = "a test fails by panicking")]

mod cpio;
mod erofs;
mod fat;
mod images;
mod judge;
mod squashfs;
mod tar;
mod uefi;
mod verity;
