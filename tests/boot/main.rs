//! `kiln run` in real machines: what a user sees of the contract, and what is left when a run is over, however it ends.
//!
//! `ci/test boot` runs them with the kiln of `target/dist`. Most boot a root of nothing but busybox, because a machine
//! under emulation takes seconds and there are many. All share one store, so that the kernel is fetched once.

#![allow(clippy::disallowed_methods, reason = "a test fails by panicking")]

#[path = "../acceptance/held.rs"]
mod acceptance;
mod build;
mod command;
mod contract;
mod debian;
mod disks;
mod drun;
mod enter;
mod erofs;
mod failure;
#[path = "../folder/mod.rs"]
mod folder;
mod garbage;
mod host;
mod jail;
#[path = "../judge/mod.rs"]
mod judge;
mod keep;
mod killed;
mod leftovers;
mod made;
mod meet;
mod names;
mod offline;
mod outputs;
mod reads;
mod ready;
mod roots;
mod screen;
mod secure;
mod shortage;
mod squashfs;
mod strace;
mod stress;
mod template;
mod typist;
