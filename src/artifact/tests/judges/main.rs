//! Our formats, judged by programs that others wrote.

mod cpio;
mod erofs;
mod images;
mod judge;
mod tar;
mod uefi;
