//! Our formats, judged by programs that others wrote.

mod cpio;
mod erofs;
mod fat;
mod images;
mod judge;
mod squashfs;
mod tar;
mod uefi;
mod verity;
